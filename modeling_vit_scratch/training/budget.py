"""How many steps fit into a time budget."""

import copy
import itertools
import statistics
import sys
import time

import torch
from accelerate.utils import broadcast_object_list

from .trainer import ImageTrainer

# Of a time budget: what saving a checkpoint, and pictures and the card at the end, take at most on a slow machine.
SAVE_SECONDS, FINISH_SECONDS = 0.5, 6.0


def steps_in_budget(trainer: ImageTrainer, seconds: float, last_pictures: int) -> int:
    """Optimizer steps after which training, validation, saving and the last measurements end in so many seconds.

    A copy of the model rehearses some steps and two validation batches, in the same time. The main process decides for
    all.

    Args:
        trainer: Of the run, before training.
        seconds: That are left.
        last_pictures: Predicted once more after training.

    Raises:
        ValueError: There is no time for a single step.
    """
    args, entered = trainer.args, time.monotonic()
    if args.process_index == 0:
        print("Timing some steps, to see how many fit into the time budget.", file=sys.stderr)
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
        # The first ones warm up; and compiling anew for a last, smaller batch is no ordinary step.
        average = statistics.median if args.torch_compile else statistics.mean
        step = average(times[2:]) * args.gradient_accumulation_steps
        batch = next(iter(trainer.get_eval_dataloader()))
        forward.eval()
        for _ in range(2):
            begun = time.monotonic()
            trainer.prediction_step(forward, dict(batch), prediction_loss_only=False)[0].item()
            evaluations.append(time.monotonic() - begun)
        picture = evaluations[1] / len(batch["labels"])
    # What the rehearsal took is gone, and the model itself has to be compiled and warmed up as its copy was.
    seconds -= time.monotonic() - entered + times[0] + evaluations[0]
    last = picture * last_pictures * (2 if args.flip_tta else 1) + FINISH_SECONDS
    evaluates = args.eval_strategy.value, args.eval_steps, picture * len(trainer.eval_dataset)
    saves = args.save_strategy.value, args.save_steps, SAVE_SECONDS
    if args.save_strategy.value == "best":  # at most
        saves = *evaluates[:2], SAVE_SECONDS
    for strategy, every, cost in (evaluates, saves):
        if strategy == "epoch":
            step += cost / max(len(loader) // args.gradient_accumulation_steps, 1)
        elif strategy == "steps" and every < 1:  # a share of all steps
            last += cost / every
        elif strategy == "steps":
            step += cost / every
    # A twentieth for what else a machine does meanwhile.
    steps = int((0.95 * seconds - last) / step)
    if args.world_size > 1:
        steps = broadcast_object_list([steps])[0]
    if steps < 1:
        raise ValueError(
            f"time_budget ({args.time_budget}) leaves {seconds:.0f} s for training, but the last measurements take "
            f"{last:.0f} s and a step {step:.2g} s; give it more."
        )
    return steps
