"""What a run shows while it trains: a bar on a terminal, and one line for each evaluation."""

import sys
import time

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import has_length

# Name and width of each column, so that a line fits into 80 characters.
COLUMNS = {"epoch": 6, "step": 9, "train loss": 10, "validation loss": 15, "accuracy": 9, "best": 10, "seconds": 8}
# Where no evaluation comes for so long, and there is no bar, a line says how far the training is. In seconds.
SILENCE = 60.0
# Between two counts of an evaluation's batches, in the bar. In seconds.
REFRESH = 0.2
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {rate_noinv_fmt}, {remaining} left{postfix}"


class Progress(TrainerCallback):
    """Shows how far a run is, in place of Trainer's bars and dictionaries.

    Where the standard error is a terminal, a bar counts steps there; `disable_tqdm` leaves it out. Lines go to the
    standard output: the mean training loss of the steps since the last evaluation, the validation's loss and accuracy,
    and the best so far of what the arguments choose the model by. A file gets no control characters.

    Args:
        clock: Of the trainer; its seconds of training are those of `history.csv`.
        summed_loss: Gives the sum of the training losses of this process's steps up to now, of which differences count
            alone. It may wait for a GPU: it is asked where a line is due.

    Attributes:
        since: Steps before the last evaluation, or, where there was none, before the training.
        before: What `summed_loss` gave then; less the losses since, after resuming.
    """

    def __init__(self, clock, summed_loss):
        self.clock, self.summed_loss = clock, summed_loss
        self.bar = self.measuring = None
        self.headed = self.training = False
        self.measured = 0  # batches of the evaluation that goes on

    def on_train_begin(self, args, state, control, **kwargs):
        self.training, self.since, self.before = True, state.global_step, self.summed_loss()
        self.said = self.drawn = time.monotonic()
        if state.is_world_process_zero and _has_terminal(args):
            shown = {"total": state.max_steps, "initial": state.global_step, "unit": " steps", "bar_format": BAR}
            self.bar = tqdm(dynamic_ncols=True, leave=False, **shown)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        elif state.is_world_process_zero and time.monotonic() - self.said > SILENCE:
            self._say(args, state, {}, self._mean_loss(state))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is not None and "loss" in (logs or {}):
            self.bar.set_postfix_str(f"loss {logs['loss']:.4f}", refresh=False)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._end_measuring()
        if self.training and "eval_loss" in (metrics or {}):
            loss = self._mean_loss(state)
            if args.world_size > 1 and loss is not None:  # each has measured, and is here
                shared = torch.tensor(loss, device=args.device)
                torch.distributed.all_reduce(shared)
                loss = shared.item() / args.world_size
            self._say(args, state, metrics, loss)
            self.since, self.before = state.global_step, self.summed_loss()
            if self.bar is not None:
                self.bar.set_postfix_str("", refresh=False)

    def on_predict(self, args, state, control, **kwargs):
        self._end_measuring()

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not state.is_world_process_zero or not _has_terminal(args):
            return
        self.measured += 1
        total = len(eval_dataloader) if has_length(eval_dataloader) else None
        if self.bar is None:
            if self.measuring is None:
                shown = {"desc": "measuring", "total": total, "unit": " batches"}
                self.measuring = tqdm(dynamic_ncols=True, leave=False, **shown)
            self.measuring.update()
        elif time.monotonic() - self.drawn > REFRESH:
            self.drawn = time.monotonic()
            self.bar.set_postfix_str(f"validation {self.measured / total:.0%}" if total else "validation")

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self):
        """End the bars, also where an error ended the training."""
        self._end_measuring()
        if self.bar is not None:
            self.bar.close()
        self.bar, self.training = None, False

    def _end_measuring(self):
        if self.measuring is not None:
            self.measuring.close()
        self.measuring, self.measured = None, 0

    def _mean_loss(self, state) -> float | None:
        steps = state.global_step - self.since
        return (self.summed_loss() - self.before) / steps if steps else None

    def _say(self, args: TrainingArguments, state, metrics: dict, loss: float | None):
        """One line: of an evaluation, or, without metrics, of where the training is."""
        if not state.is_world_process_zero:
            return
        self.said = time.monotonic()
        chosen, best = args.metric_for_best_model or "loss", state.best_metric
        if f"eval_{chosen}" in metrics:  # Trainer takes it into its state only after this
            now = metrics[f"eval_{chosen}"]
            best = now if best is None else (max if args.greater_is_better else min)(best, now)
        cells = {
            "epoch": f"{state.epoch:.2f}",
            "step": f"{state.global_step:,}",
            "train loss": _number(loss),
            "validation loss": _number(metrics.get("eval_loss")),
            "accuracy": _share(metrics.get("eval_accuracy")),
            "best": _number(best) if chosen == "loss" else _share(best),
            "seconds": f"{self.clock.wall:,.0f}",
        }
        if not self.headed:
            names = {"loss": "best loss", "top5_accuracy": "best top-5"}
            self._write({name: names.get(chosen, name) if name == "best" else name for name in cells})
            self.headed = True
        self._write(cells)

    def _write(self, cells: dict[str, str]):
        line = "  ".join(cells[name].rjust(width) for name, width in COLUMNS.items())
        if self.bar is None:
            print(line, flush=True)
        else:  # above the bar
            tqdm.write(line, file=sys.stdout)


def _has_terminal(args: TrainingArguments) -> bool:
    return sys.stderr.isatty() and not args.disable_tqdm


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
