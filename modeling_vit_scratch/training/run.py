"""A run is settled."""

import ctypes
import json
import logging
import math
import os
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
import yaml
from accelerate.utils import broadcast_object_list
from PIL import Image
from transformers import TrainingArguments, ViTImageProcessorPil, set_seed

from ..configuration_vit_scratch import ViTScratchConfig
from ..conversion import convert_checkpoint, image_processor_for
from ..data import Augmentation, ImageSplits
from ..data.augmentation import check_padding, parse_until
from ..data.doctor import fingerprint
from ..data.sources import DIGITS, public_name
from ..data.splits import DecodedImages
from ..data.streaming import StreamedImages
from ..modeling_vit_scratch import ViTScratchForImageClassification
from . import checkpoints
from .arguments import (
    DataArguments,
    ImageTrainingArguments,
    ModelArguments,
    check_options,
    default_options,
    run_options,
)
from .budget import steps_in_budget
from .output import settle_output
from .report import parts_of, split_sizes, summary
from .trainer import ImageTrainer

logger = logging.getLogger(__name__)


# Smallest share of an image's area that a random crop keeps, where nothing else is given.
CROP_SCALE = 0.35


def config_overrides(arguments: ModelArguments) -> dict:
    """The fields that `--config_overrides` names, with their values."""
    overrides = {}
    for item in filter(None, re.split(r",(?![^\[]*\])", arguments.config_overrides or "")):  # no comma of a list
        name, separator, value = item.partition("=")
        if not separator:
            raise ValueError(f"config_overrides: {item!r} is not of the form field=value.")
        overrides[name.strip()] = yaml.safe_load(value)
    return overrides


def make_config(arguments: ModelArguments, class_names: list[str]) -> ViTScratchConfig:
    """The preset's config with its overrides, for these classes."""
    overrides = config_overrides(arguments)
    if arguments.image_size is not None:
        overrides["image_size"] = arguments.image_size
    labels = dict(enumerate(class_names))
    return ViTScratchConfig.preset(
        arguments.preset or "showcase",
        **{"problem_type": "single_label_classification", **overrides},
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )


def make_processor(
    config: ViTScratchConfig, mean: list[float] | None = None, std: list[float] | None = None
) -> ViTImageProcessorPil:
    """transformers' image processor for this model's size and pixels of this mean and standard deviation."""
    height, width = config.image_hw
    return ViTImageProcessorPil(
        size={"height": height, "width": width}, image_mean=mean, image_std=std, resample=Image.Resampling.BICUBIC
    )


def load_trained(arguments: ModelArguments) -> tuple[ViTScratchForImageClassification, ViTImageProcessorPil]:
    """A trained classifier, ours or converted from another library, and an image processor with its mean and std."""
    name, fields = arguments.model_name_or_path, config_overrides(arguments)
    where = {"source": arguments.source, "cache_dir": arguments.cache_dir, "token": arguments.token}
    model = convert_checkpoint(name, image_size=arguments.image_size, replace_head=True, **where, **fields)
    processor = image_processor_for(name, model, **where)
    return model, make_processor(model.config, processor.image_mean, processor.image_std)


def with_classes(model: ViTScratchForImageClassification, class_names: list[str]) -> ViTScratchForImageClassification:
    """The model for these classes: unchanged if it knows them already, else with a new head (all zero)."""
    config = model.config
    if [config.id2label[index] for index in range(config.num_labels)] != class_names:
        logger.warning("The head is new: %d classes instead of %d.", len(class_names), config.num_labels)
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: index for index, name in enumerate(class_names)}
        width = config.representation_size or config.hidden_size
        model.num_labels, model.classifier = config.num_labels, torch.nn.Linear(width, config.num_labels)
        model.classifier.apply(model._init_weights)
    config.problem_type = "single_label_classification"
    return model


def _settle_schedule(arguments: ImageTrainingArguments, batches: int | None) -> tuple[int, float | None]:
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


def move_small_data(splits: ImageSplits, args: TrainingArguments):
    """Pictures that take less than a tenth of the GPU's free memory live there: no batch is copied while training."""
    decoded = [part for part in parts_of(splits).values() if isinstance(part, DecodedImages)]
    free, _ = torch.cuda.mem_get_info(args.device)
    if args.dataloader_num_workers == 0 and sum(part.images.nbytes for part in decoded) < free / 10:
        args.dataloader_pin_memory = False
        for part in decoded:
            part.to(args.device)


def trainer_state(checkpoint: str) -> dict:
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text())


def run_facts(config: ViTScratchConfig, splits: ImageSplits, args: ImageTrainingArguments) -> dict:
    """What a checkpoint must share with the run that continues it; and, below "changeable", what it need not."""
    options = args.recorded
    if isinstance(splits.train, StreamedImages):  # which worker reads what decides the order
        options = options | {"stream_workers": args.dataloader_num_workers}
    return {
        **{name: getattr(config, name) for name in ViTScratchConfig.__annotations__},
        "dataset": public_name(splits.name),
        "classes": splits.class_names,
        "images": split_sizes(splits),
        "processes": args.world_size,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        **options,
        "cut": asdict(splits.cut),
        "fingerprint": fingerprint(splits),  # last: what else differs says more
        "changeable": args.changeable,
        "changes": [],
    }


def check_resuming(args: ImageTrainingArguments, facts: dict):
    """Refuse a checkpoint of another run, or note in `facts` what this run does otherwise from here on."""
    if args.resume_from_checkpoint:
        fields = {name: field.default for name, field in ViTScratchConfig.__dataclass_fields__.items()}
        checkpoint = Path(args.resume_from_checkpoint)
        facts["changes"] = checkpoints.check_run(checkpoint, facts, {**fields, **default_options()})


def begin_run(model_args: ModelArguments, data_args: DataArguments, args: ImageTrainingArguments) -> str:
    """Check and note the options, settle the output folder, seed everything; the dataset's name."""
    check_options(model_args, data_args, args)
    args.recorded, args.changeable = run_options(model_args, data_args, args)
    data_name = data_args.dataset_name or data_args.train_dir
    if args.process_index == 0:
        settle_output(args, model_args, data_name)
    if args.world_size > 1:  # one process decides, before any of them makes a folder
        args.output_dir, args.resume_from_checkpoint = broadcast_object_list(
            [args.output_dir, args.resume_from_checkpoint]
        )
    set_seed(args.seed)
    transformers.utils.logging.disable_progress_bar()  # of reading and writing files; training keeps its own
    return data_name


def data_settings(
    model_args: ModelArguments, data_args: DataArguments, args: ImageTrainingArguments, num_channels: int
) -> dict:
    """What `load_splits` and `load_streaming` have in common, as the options say."""
    folders = {"train": data_args.train_dir, "validation": data_args.validation_dir, "test": data_args.test_dir}
    return {
        "num_channels": num_channels,
        "config_name": data_args.dataset_config_name,
        "data_files": {split: folder for split, folder in folders.items() if folder},
        "image_column": data_args.image_column_name,
        "label_column": data_args.label_column_name,
        "train_val_split": data_args.train_val_split,
        "max_eval_samples": data_args.max_eval_samples,
        "crop_scale": CROP_SCALE if data_args.crop_scale is None else data_args.crop_scale,
        "seed": args.seed,
        "cache_dir": model_args.cache_dir,
        "token": model_args.token,
    }


def make_augmentation(data_args: DataArguments, args: ImageTrainingArguments, processor, splits: ImageSplits):
    """The augmentation of a run, as the options say."""
    size, padding = (processor.size["height"], processor.size["width"]), data_args.crop_padding
    if padding is None:  # other images than decoded ones are cropped when they are read
        padding = min(size) // 8 if isinstance(splits.train, DecodedImages) else 0
    if data_args.crop_mode != "constant" and padding == 0:
        raise ValueError(
            f"crop_mode ({data_args.crop_mode!r}) goes with --crop_padding, which is 0: images are not shifted."
        )
    check_padding(padding, data_args.crop_mode, size)
    flip = data_args.horizontal_flip
    if flip is None:
        flip = 0.0 if data_args.dataset_name == DIGITS else 0.5  # mirrored digits are other signs
    return Augmentation(
        mean=processor.image_mean,
        std=processor.image_std,
        crop_padding=padding,
        crop_mode=data_args.crop_mode,
        horizontal_flip=flip,
        seed=args.seed,
        rand_augment_ops=data_args.rand_augment,
        rand_augment_magnitude=data_args.rand_augment_magnitude,
        erasing=data_args.random_erasing,
        mixup_alpha=data_args.mixup_alpha,
        cutmix_alpha=data_args.cutmix_alpha,
        mix_probability=data_args.mix_probability,
        num_labels=len(splits.class_names),
        until=parse_until(data_args.augment_until),
    )


def keep_freed_memory():
    """Let the C library keep the memory that a step frees, for the next step, where it can (glibc).

    On a CPU, pages that went back to the system and are touched anew took 4 to 9 % of a step.
    """
    trim_threshold, mmap_threshold, one_gib = -1, -3, 1 << 30
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(trim_threshold, one_gib)
        mallopt(mmap_threshold, one_gib)


def suit_device(args: ImageTrainingArguments, model, splits: ImageSplits):
    """Set what the options leave open as the device and the data want it."""
    if not isinstance(splits.train, DecodedImages) and args.dataloader_num_workers == 0:
        args.dataloader_num_workers = max((os.cpu_count() or 1) - 1, 1)
    if args.device.type == "cpu":
        keep_freed_memory()
        args.dataloader_pin_memory = False
        if args.bf16:  # torch's fused attention has a slow backward pass in bfloat16 on CPUs
            model.set_attn_implementation("eager")


def _settle_crops(trainer: ImageTrainer, steps: int, batches: int | None):
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


def settle_steps(trainer: ImageTrainer, splits: ImageSplits, started: float) -> tuple[int, float | None]:
    """Steps of the run, within its time budget if it has one, and the learning rate of the last; say what will happen.

    Args:
        trainer: Of the run.
        splits: Its pictures.
        started: `time.monotonic()` when the run began.
    """
    args, streamed = trainer.args, isinstance(splits.train, StreamedImages)
    batches = None if streamed else len(trainer.get_train_dataloader())
    if batches == 0:
        raise ValueError(
            f"no batch is full: {len(splits.train)} pictures for training, per_device_train_batch_size "
            f"{args.per_device_train_batch_size}; lower it, or leave out dataloader_drop_last."
        )
    if args.time_budget_seconds is not None:
        if args.resume_from_checkpoint:
            args.max_steps = trainer_state(args.resume_from_checkpoint)["max_steps"]
        else:
            left = args.time_budget_seconds - (time.monotonic() - started)
            measured = (len(part) for name, part in parts_of(splits).items() if name != "train")
            args.max_steps = steps_in_budget(trainer, left, sum(measured))
    steps, last_rate = _settle_schedule(args, batches)
    _settle_crops(trainer, steps, batches)
    done = trainer_state(args.resume_from_checkpoint)["global_step"] if args.resume_from_checkpoint else 0
    if steps < done:
        raise ValueError(
            f"{args.resume_from_checkpoint} is past the end: it has taken {done:,} steps, and this run has {steps:,}; "
            "give max_steps or num_train_epochs of that many or more."
        )
    if args.process_index == 0:
        print(summary(trainer, splits, steps, last_rate), flush=True)
    return steps, last_rate
