"""What a run does beside its steps: the clock, the average of the weights, noise, exact resuming, and signals."""

import functools
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..data.augmentation import stateless_generator
from ..data.splits import LazyImages
from .optimization import WeightAverage


class UpdateAverage(TrainerCallback):
    """Takes the weights of each step into the average."""

    def __init__(self, average: WeightAverage):
        self.average = average

    def on_step_end(self, args, state, control, **kwargs):
        self.average.update(state.global_step)


class Clock(TrainerCallback, ExportableState):
    """Wall and CPU seconds of training, over all parts of a run that was resumed.

    Everything from the first batch (of a resumed part, the first step) to the last step counts, the reading of batches
    too; evaluation, saving and logging do not. CPU seconds are those of this process and of all that it started, such
    as the workers that read images; what these read ahead during an evaluation is left out with it. A GPU is waited for
    before each reading.

    Args:
        device: That the model is trained on.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.wall = self.cpu = 0.0
        self._started = None

    def _now(self) -> tuple[float, float]:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter(), cpu_seconds()

    def start(self):
        """Go on counting, if the clock does not run yet."""
        if self._started is None:
            self._started = self._now()

    def stop(self):
        """Add what has passed since `start`, if the clock runs."""
        if self._started is not None:
            (wall, cpu), self._started = self._started, None
            now = self._now()
            self.wall, self.cpu = self.wall + now[0] - wall, self.cpu + now[1] - cpu

    def on_train_begin(self, args, state, control, **kwargs):
        # Trainer restores callbacks on request only. Other processes took about the CPU time of the main one.
        saved = state.stateful_callbacks[type(self).__name__]["attributes"]
        self.wall, self.cpu = saved["wall"], saved["cpu"]

    def on_step_begin(self, args, state, control, **kwargs):
        self.start()

    def on_log(self, args, state, control, **kwargs):
        state.log_history[-1] |= {"train_seconds": round(self.wall, 3), "train_cpu_seconds": round(self.cpu, 3)}

    def state(self) -> dict:
        return {"args": {}, "attributes": {"wall": self.wall, "cpu": self.cpu}}


def cpu_seconds() -> float:
    """CPU time that this process and all processes that it started have taken, those that have ended included."""
    running = 0.0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            running += sum(child.cpu_times()[:4])  # its own, and that of its children that have ended
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system + running


class OwnNoise(TrainerCallback):
    """Another state of torch's generator in each process, so that no two draw the same dropout and drop-path masks.

    The first process keeps the state that a run of one process has. What is the same everywhere (order of the images,
    weights at the start) is settled before; augmentation draws nothing from this generator.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if args.process_index > 0:  # resumed, each process gets the state that it had
            torch.manual_seed(stateless_generator(args.seed, args.process_index).initial_seed())


class ResumeLoss(TrainerCallback):
    """What Trainer leaves to itself on resuming: the loss since the last log entry, and since the last evaluation; and
    when to log, measure and save.

    A resumed run's history is that of one never stopped; other intervals that it is given are honoured.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if not args.resume_from_checkpoint:
            return
        self.trainer.resumed_at = state.global_step
        state.compute_steps(args, state.max_steps)
        path = Path(args.resume_from_checkpoint) / f"pending_loss_{args.process_index}.json"
        if path.is_file():
            pending = json.loads(path.read_text())
            self.trainer._tr_loss += pending["loss"]
            self.trainer._total_loss_scalar -= pending["loss"]  # whose mean is over the steps of this part alone
            self.trainer._globalstep_last_logged = pending["last_logged"]
            if "since" in pending:  # a version before 0.2.0 does not know it
                self.trainer.progress.since, self.trainer.progress.before = pending["since"], -pending["loss_since"]


class TellEpoch(TrainerCallback):
    """Tells photos their epoch: accelerate forgets to after resuming in mid-epoch, and in several processes."""

    def on_epoch_begin(self, args, state, control, train_dataloader, **kwargs):
        if isinstance(train_dataloader.dataset, LazyImages):  # a stream counts its own
            train_dataloader.dataset.set_epoch(int(state.epoch or 0))


class StopOnSignal(TrainerCallback):
    """On Ctrl-C, SIGTERM or SIGUSR1: finish the step, save a checkpoint, and leave. A second Ctrl-C leaves at once.

    Batch systems send SIGUSR1 where they are asked to warn of the end of a job's time, and SIGTERM at its end, often to
    every process of the job and more than once: neither those that read images nor a second one may spoil the saving.
    One that comes after the last step changes nothing: the run goes on to its end.

    Attributes:
        stopping: Whether the run is left early. All processes agree on it, at the end of a step: each saves, measures
            and leaves where the others do.
    """

    def __init__(self):
        self.stopping = False
        self._previous = {}
        self._process, self._noted, self._state = os.getpid(), False, None  # a signal to this process alone

    def on_train_begin(self, args, state, control, **kwargs):
        self._process, self._state = os.getpid(), state
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows has no SIGUSR1
            if number is not None:
                self._previous[number] = signal.signal(number, self._note)

    def _note(self, number, frame):
        if os.getpid() != self._process:  # one that reads images, forked from this one, before it has begun
            return
        if self._noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._noted:
            return
        self._noted = True
        last = self._state.global_step >= self._state.max_steps
        what = "The last step is done: going on to the end" if last else "Stopping after this step, with a checkpoint"
        print(f"\n{what}; Ctrl-C leaves at once.", file=sys.stderr)

    def on_step_end(self, args, state, control, **kwargs):
        self.stopping = self._noted
        if args.world_size > 1:
            flag = torch.tensor(float(self._noted), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.stopping = bool(flag.item())
        if self.stopping:
            control.should_training_stop = True
            # At an epoch's end the evaluation comes first, as it does in a run that is not stopped.
            control.should_save = control.should_save or not state.epoch.is_integer()

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopping:  # not what this process noted since: it would save alone, and wait for the others
            finished = state.epoch.is_integer()
            control.should_save = finished
            control.should_evaluate = control.should_evaluate and finished

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def keep_workers(loader: torch.utils.data.DataLoader) -> torch.utils.data.DataLoader:
    """A data loader whose workers outlive a signal that was sent to all processes of the run, however they are started.

    Such a worker ends at once, and the run with it, before it has saved a checkpoint.

    Args:
        loader: Of this process, which the workers end with. Changed in place; accelerate's holds another, which makes
            the workers.
    """
    makes_workers = getattr(loader, "base_dataloader", loader)
    if makes_workers.num_workers > 0:
        makes_workers.worker_init_fn = functools.partial(_begin_worker, makes_workers.worker_init_fn, os.getpid())
    return loader


def _begin_worker(begin, run: int, worker: int):
    """What a worker does first: leave SIGINT and SIGUSR1 to the run, whose handler it has only where it was forked, and
    take SIGTERM from the run's process alone, which ends a worker so.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_leave_with_the_run, args=(run,), daemon=True).start()
    if begin is not None:
        begin(worker)


def _leave_with_the_run(run: int):
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run:
        pass
    os._exit(0)
