"""Fixtures that several of these files use."""

import signal
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from transformers import TrainerCallback

from modeling_vit_scratch.training import ImageTrainer


@pytest.fixture(scope="module", autouse=True)
def unpainted():
    """Plots of runs are made and written, but not painted, which takes longer than so small a run; other tests do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, **kwargs: Path(path).touch())
        yield


@pytest.fixture
def interrupt(monkeypatch):
    """Send a signal (Ctrl-C's, if no other is named) after a given step, once; to one process, or to all.

    With "late", not until the epoch that this step ends does so.
    """
    step = {}

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, late=False, **kwargs):
            now = late == step.get("late", False) and state.global_step == step.get("at")
            if now and step.get("process") in (None, args.process_index):
                number, send = step.get("signal", signal.SIGINT), step.get("send", signal.raise_signal)
                step.clear()
                send(number)

        def on_epoch_end(self, args, state, control, **kwargs):
            self.on_step_end(args, state, control, late=True)

    original = ImageTrainer.__init__

    def with_interrupt(self, *args, **kwargs):
        # Before StopOnSignal in the list, so that the signal is seen in the same step.
        original(self, *args, **{**kwargs, "callbacks": [Interrupt(), *kwargs["callbacks"]]})

    monkeypatch.setattr(ImageTrainer, "__init__", with_interrupt)
    return step
