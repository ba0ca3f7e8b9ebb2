"""The number of steps that fit into a time budget: some are rehearsed, and the rest is arithmetic."""

import copy
import itertools
import statistics
import sys
import time
from dataclasses import dataclass

import torch
from accelerate.utils import broadcast_object_list

from .arguments import ImageTrainingArguments
from .trainer import ImageTrainer

# What saving a checkpoint, and plots and the card at the end, take at most on a slow machine.
SAVE_SECONDS, FINISH_SECONDS = 0.5, 6.0
# A twentieth is left for what else a machine does meanwhile.
USED = 0.95


@dataclass(frozen=True)
class Rehearsal:
    """Seconds that the parts of a run take, measured.

    Args:
        step: An optimizer step.
        image: Measuring one image.
        first: The first step and the first measured batch, which compile and warm up; the run has them again.
    """

    step: float
    image: float
    first: float


@dataclass(frozen=True)
class Recurring:
    """What is done again and again beside the steps.

    Args:
        strategy: "no", "epoch" or "steps", as in TrainingArguments.
        every: Steps between two, or, below 1, their share of all steps.
        seconds: Each takes.
    """

    strategy: str
    every: float | None
    seconds: float


def rehearse(trainer: ImageTrainer, seconds: float) -> Rehearsal:
    """Time some steps and two measured batches on a copy of the model, for a fiftieth of `seconds`, at most 30 s,
    but six steps at least.

    Args:
        trainer: Of the run, before training.
        seconds: That are left.
    """
    args = trainer.args
    model = copy.deepcopy(trainer.model).train()
    optimizer = trainer.make_optimizer(model)
    forward = torch.compile(model) if args.torch_compile else model
    loader = trainer.get_train_dataloader()
    ends, times, evaluations = time.monotonic() + min(0.02 * seconds, 30), [], []
    with torch.random.fork_rng():
        begun = time.monotonic()
        for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
            inputs = trainer.training_inputs(trainer._prepare_inputs(batch), 0, 0.0)
            with trainer.accelerator.autocast():
                loss = trainer.compute_loss(forward, inputs)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # waits for a GPU
            begun, duration = time.monotonic(), time.monotonic() - begun
            times.append(duration)
            if len(times) >= 6 and begun > ends:
                break
        batch = next(iter(trainer.get_eval_dataloader()))
        forward.eval()
        for _ in range(2):
            begun = time.monotonic()
            trainer.prediction_step(forward, dict(batch), prediction_loss_only=False)[0].item()
            evaluations.append(time.monotonic() - begun)
    # The first steps warm up; and compiling anew for a last, smaller batch is no ordinary step.
    average = statistics.median if args.torch_compile else statistics.mean
    step = average(times[2:]) * args.gradient_accumulation_steps
    return Rehearsal(step, evaluations[1] / len(batch["labels"]), times[0] + evaluations[0])


def recurring_parts(args: ImageTrainingArguments, measure: float) -> list[Recurring]:
    """Measurements and checkpoints of a run, as its options say.

    Args:
        args: Of the run.
        measure: Seconds that measuring the validation split takes.
    """
    evaluates = Recurring(args.eval_strategy.value, args.eval_steps, measure)
    if args.save_strategy.value == "best":  # at most
        return [evaluates, Recurring(evaluates.strategy, evaluates.every, SAVE_SECONDS)]
    return [evaluates, Recurring(args.save_strategy.value, args.save_steps, SAVE_SECONDS)]


def steps_that_fit(
    seconds: float, step: float, last: float, recurring: list[Recurring], steps_per_epoch: int
) -> tuple[int, float, float]:
    """Steps that end, with all that recurs beside them and what comes last, in so many seconds.

    Args:
        seconds: That are left.
        step: Seconds of an optimizer step.
        last: Seconds of what is done once, after the last step.
        recurring: What is done again and again.
        steps_per_epoch: Optimizer steps in an epoch.

    Returns:
        The steps, below 1 where not one fits; seconds of a step with its part of what recurs; and of what comes last.
    """
    for part in recurring:
        if part.strategy == "epoch":
            step += part.seconds / max(steps_per_epoch, 1)
        elif part.strategy == "steps" and part.every < 1:  # a share of all steps
            last += part.seconds / part.every
        elif part.strategy == "steps":
            step += part.seconds / part.every
    return int((USED * seconds - last) / step), step, last


def steps_in_budget(trainer: ImageTrainer, seconds: float, batches: int, images_at_end: int) -> int:
    """Optimizer steps after which training, validation, saving and the last measurements end in so many seconds.

    Args:
        trainer: Of the run, before training.
        seconds: That are left, the rehearsal included.
        batches: In an epoch.
        images_at_end: Images that are measured once more after training.

    Raises:
        ValueError: There is no time for a single step.
    """
    args, began = trainer.args, time.monotonic()
    if args.process_index == 0:
        print("Timing some steps, to see what fits into the time budget.", file=sys.stderr)
    found = rehearse(trainer, seconds)
    seconds -= time.monotonic() - began + found.first
    last = found.image * images_at_end * (2 if args.flip_tta else 1) + FINISH_SECONDS
    recurring = recurring_parts(args, found.image * len(trainer.eval_dataset))
    per_epoch = batches // args.gradient_accumulation_steps
    steps, step, last = steps_that_fit(seconds, found.step, last, recurring, per_epoch)
    if args.world_size > 1:  # the main process decides for all
        steps = broadcast_object_list([steps])[0]
    if steps < 1:
        raise ValueError(
            f"time_budget ({args.time_budget}) leaves {seconds:.0f} s for training, but measuring and "
            f"saving take {last:.0f} s in all, and a step {step:.2g} s; give it more."
        )
    return steps
