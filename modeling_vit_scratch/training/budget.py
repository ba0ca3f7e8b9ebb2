"""The number of steps that fit into a time budget: some are rehearsed, and the rest is arithmetic.

Whether the steps are compiled is settled here too, where `torch_compile` leaves it open and the budget is long.
"""

import copy
import itertools
import statistics
import sys
import time
from dataclasses import dataclass

import torch
from accelerate.utils import TorchDynamoPlugin, broadcast_object_list, gather_object

from ..evaluation.devices import can_compile
from .arguments import ImageTrainingArguments
from .processes import is_compiled
from .trainer import ImageTrainer

# What saving a checkpoint, and plots and the card at the end, take at most on a slow machine.
SAVE_SECONDS, FINISH_SECONDS = 0.5, 6.0
# A twentieth is left for what else a machine does meanwhile.
USED = 0.95
# Compiling is tried under a budget of so many seconds or more, and then timed for some. On a CPU with two cores it took
# 80 to 126 s, of models of 0.8 M parameters and beside other work: a twentieth or so, which is lost if it does not pay.
TRIED_FROM, TRIED_SECONDS = 30 * 60, 10
# Nor is it tried where its batches alone would take more than this share.
TRIED_SHARE = 0.05


@dataclass(frozen=True)
class Rehearsal:
    """Seconds that training takes, measured.

    Args:
        step: An optimizer step.
        first: What the run has beside such steps: those that warm up or compile.
        compiling: The first step that was rehearsed.
    """

    step: float
    first: float
    compiling: float


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
    """Time steps on a copy of the model, six at least; and once more the first one, if it compiles.

    A process finds in its memory what it has compiled before: measured on a busy CPU with torch 2.13, compiling took
    90 s, the first step of another copy as long as any, and 3 s where only the disk remembered; of two processes 130 s,
    and 0.6 s in the run, whose model they share.

    Args:
        trainer: Of the run, before training.
        seconds: After the first step, for which steps are timed.
    """
    args = trainer.args
    times = _time_steps(trainer, seconds, fewest=6)
    (size, compiling), first = times[0], times[0][1]
    if is_compiled(trainer):
        first = _time_steps(trainer, 0, fewest=1)[0][1]
        # An epoch's last, smaller batch compiles once more, which is no ordinary step; several processes fill it up.
        smaller = next((position for position, (other, _) in enumerate(times) if other != size), None)
        if smaller is not None:
            del times[smaller]
        elif args.world_size == 1 and not args.dataloader_drop_last and len(trainer.train_dataset) % size:
            first += 2 * compiling  # as measured: sizes are free then
    step = statistics.mean(duration for _, duration in times[2:]) * args.gradient_accumulation_steps
    return Rehearsal(step, first, compiling)


def _time_steps(trainer: ImageTrainer, seconds: float, fewest: int) -> list[tuple[int, float]]:
    """Take steps with a copy of the model, until so many seconds have passed after the first: images and seconds of
    each.
    """
    args, accelerator = trainer.args, trainer.accelerator
    model = copy.deepcopy(trainer.model).train()
    if args.gradient_checkpointing:  # Trainer switches it on when it trains, by the name that its version has
        word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{word}_checkpointing_enable")(getattr(args, f"{word}_checkpointing_kwargs"))
    optimizer = trainer.make_optimizer(model)
    forward = accelerator.prepare_model(model, evaluation_mode=True)  # as the run's, but each process for itself
    accelerator._models.pop()  # a copy that training knows nothing of
    times = []
    with torch.random.fork_rng():
        begun = time.monotonic()
        for batch in itertools.chain.from_iterable(itertools.repeat(trainer.get_train_dataloader())):
            inputs = trainer.training_inputs(trainer._prepare_inputs(batch), 0, 0.0)
            loss = trainer.compute_loss(forward, inputs)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # waits for a GPU
            begun, duration = time.monotonic(), time.monotonic() - begun
            if not times:  # which may have compiled
                ends = begun + seconds
            times.append((len(batch["pixel_values"]), duration))
            if len(times) >= fewest and begun >= ends:
                return times


def time_measuring(trainer: ImageTrainer) -> tuple[float, float]:
    """Seconds of measuring an image, and those of a first batch, which warms up; neither is compiled in any run."""
    model, times = copy.deepcopy(trainer.model).eval(), []
    with torch.random.fork_rng():
        batch = next(iter(trainer.get_eval_dataloader()))
        for _ in range(2):
            begun = time.monotonic()
            with trainer.accelerator.autocast():
                trainer.prediction_step(model, dict(batch), prediction_loss_only=False)[0].item()
            times.append(time.monotonic() - begun)
    return times[1] / len(batch["pixel_values"]), times[0]


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

    Where `torch_compile` is left open and the time is long enough, it is tried and settled, in the trainer too.

    Args:
        trainer: Of the run, before training.
        seconds: That are left, the rehearsal included.
        batches: In an epoch.
        images_at_end: Images that are measured once more after training.

    Raises:
        ValueError: There is no time for a single step.
    """
    args, ends = trainer.args, time.monotonic() + seconds
    _say(trainer, "Timing some steps, to see what fits into the time budget.")
    found = rehearse(trainer, min(0.02 * seconds, 30))
    image, first_measured = time_measuring(trainer)
    compiled = _try_compiled(trainer, found.step / args.gradient_accumulation_steps)
    left = ends - time.monotonic() - first_measured
    recurring = recurring_parts(args, image * len(trainer.eval_dataset))
    last = image * images_at_end * (2 if args.flip_tta else 1) + FINISH_SECONDS
    per_epoch = batches // args.gradient_accumulation_steps

    def fit(found: Rehearsal) -> tuple[int, float, float]:
        return steps_that_fit(left - found.first, found.step, last, recurring, per_epoch)

    steps, step, last_in_all = fit(found)
    if compiled is not None:
        more, *_ = fit(compiled)
        steps, chosen = _of_main(trainer, (max(more, steps), more > steps))
        _settle_compiling(trainer, chosen)
        _say(
            trainer,
            f"Compiled steps take {compiled.step:.2g} s, after a first one of {compiled.compiling:.0f} s, others "
            f"{found.step:.2g} s: training with --torch_compile {str(chosen).lower()}.",
        )
    else:
        steps = _of_main(trainer, steps)
    if steps < 1:
        raise ValueError(
            f"time_budget ({args.time_budget}) leaves {left - found.first:.0f} s for training, but measuring and "
            f"saving take {last_in_all:.0f} s in all, and a step {step:.2g} s; give it more."
        )
    return steps


def _try_compiled(trainer: ImageTrainer, batch: float) -> Rehearsal | None:
    """A rehearsal of compiled steps; None where that is settled already, is not worth the time, or fails.

    Args:
        trainer: Of the run, before training.
        batch: Seconds of a batch that is not compiled; the rehearsal takes seven.
    """
    args, state = trainer.args, trainer.accelerator.state
    alone = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or is_compiled(trainer))
    long_enough = args.time_budget_seconds >= max(TRIED_FROM, 7 * batch / TRIED_SHARE)
    if not _of_main(trainer, args.torch_compile_is_open and alone and long_enough and can_compile(args.device)):
        return None
    before, error = state.dynamo_plugin, None
    state.dynamo_plugin = TorchDynamoPlugin(backend="inductor")
    try:
        found = rehearse(trainer, TRIED_SECONDS)
    except Exception as caught:  # a compiler fails in many ways; what else could fail has just been rehearsed
        error = f"{type(caught).__name__}: {next(iter(str(caught).splitlines()), '')}"
    finally:
        state.dynamo_plugin = before
    errors = [error for error in (gather_object([error]) if args.world_size > 1 else [error]) if error is not None]
    if errors:
        torch.compiler.reset()
        _say(trainer, f"Compiling fails here ({errors[0]}): training with --torch_compile false.")
        return None
    return found


def _settle_compiling(trainer: ImageTrainer, chosen: bool):
    """Have the trainer compile its steps, or not; it is asked after it has been made."""
    trainer.args.settle_compiling(chosen)
    if chosen:  # accelerate looks here when it prepares the model
        trainer.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend=trainer.args.torch_compile_backend)
    else:
        torch.compiler.reset()  # what was compiled takes memory


def _of_main(trainer: ImageTrainer, value):
    """The main process decides for all: its value."""
    return broadcast_object_list([value])[0] if trainer.args.world_size > 1 else value


def _say(trainer: ImageTrainer, line: str):
    if trainer.args.process_index == 0:
        print(line, file=sys.stderr)
