"""Steps of a run, its learning rate at the last of them, and when random crops end."""

import math

import torch
import transformers

from ..data.splits import DecodedImages
from ..data.streaming import StreamedImages
from .arguments import ImageTrainingArguments
from .trainer import ImageTrainer


def settle_schedule(arguments: ImageTrainingArguments, batches: int | None) -> tuple[int, float | None]:
    """Optimizer steps of the run, and the learning rate of its last one (None where it depends on validation).

    Args:
        arguments: Of the run; `num_decay_steps` of a warmup-stable-decay schedule becomes a number of steps where it
            is a share of them (0.2 if not given), and schedules that follow a metric are told its direction.
        batches: In an epoch; None for a stream, which has `max_steps`.

    Raises:
        ValueError: The schedule does not take the given settings.
    """
    steps = arguments.max_steps
    if steps <= 0:
        per_epoch = max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)
        steps = math.ceil(arguments.num_train_epochs * per_epoch)
    if arguments.lr_scheduler_type == "warmup_stable_decay":
        settings = {"num_decay_steps": 0.2, **(arguments.lr_scheduler_kwargs or {})}
        decay = settings["num_decay_steps"]
        settings["num_decay_steps"] = round(decay * steps) if decay < 1 else decay
        arguments.lr_scheduler_kwargs = settings
    if arguments.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):  # they take every metric for a loss
        mode = "max" if arguments.greater_is_better else "min"
        arguments.lr_scheduler_kwargs = {"mode": mode, **(arguments.lr_scheduler_kwargs or {})}
    try:
        scheduler = transformers.get_scheduler(
            arguments.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)], lr=arguments.learning_rate),
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )
    except TypeError as error:
        raise ValueError(f"lr_scheduler_kwargs ({arguments.lr_scheduler_kwargs}): {error}") from error
    factors = getattr(scheduler, "lr_lambdas", None)
    return steps, None if factors is None else arguments.learning_rate * factors[0](steps - 1)


def settle_crops(trainer: ImageTrainer, steps: int, batches: int | None):
    """Tell images that are cropped when they are read when that ends (`augment_until`).

    Args:
        trainer: Of the run.
        steps: Of the run.
        batches: In an epoch; None for a stream.

    Raises:
        ValueError: No epoch begins after that share of the training, and crops can end between two epochs only.
    """
    args, images = trainer.args, trainer.train_dataset
    until = trainer.augmentation.until.get("crop", 1.0)
    if until == 1 or isinstance(images, DecodedImages):
        return
    if isinstance(images, StreamedImages):
        trained = steps * args.gradient_accumulation_steps  # batches
        images.crop_until(math.ceil(until * trained), args.per_device_train_batch_size)
        return
    epochs = steps / math.ceil(batches / args.gradient_accumulation_steps)
    epoch = math.ceil(until * epochs)
    if epoch >= epochs:
        raise ValueError(
            f"augment_until: no epoch begins after {until:g} of {epochs:g} epochs, and random crops of "
            f"images of different sizes end between epochs: train for {math.ceil(1 / (1 - until) - 1e-6)} or more, or "
            "add crop=1 to augment_until."
        )
    images.crop_until(epoch)
