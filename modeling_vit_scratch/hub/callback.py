"""Checkpoints pushed in the background, while training goes on."""

import functools
import os
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback

from .folder import WEIGHTS_INDEX, FolderError
from .masking import redact
from .model_card import write_model_card
from .push import Pushed, push_folder

# Of a checkpoint. Not every .safetensors: a run that averages its weights keeps those that are trained beside the
# model's.
SNAPSHOT_FILES = ("*.py", "config.json", "preprocessor_config.json", "model*.safetensors", WEIGHTS_INDEX)
SNAPSHOT = ".hub_push-"  # begins the name of a snapshot's folder


class HubPushCallback(TrainerCallback):
    """Push every checkpoint's model in the background, each a repository that loads; training never waits or fails.

    A push that is still under way when the next checkpoint is saved is followed by the newest one. A failure is shown
    in one line and made good by the next checkpoint's push, or at the end of training. `push_final` then pushes the
    finished folder.

    Why a thread of our own, not `HfApi.run_as_future`: that one queues every checkpoint, and a program that ends would
    wait for it, however dead the server is. Nor `CommitScheduler`, which commits at intervals, complete or not.

    Args:
        repo_id: `owner/name`, or `name` for one of the token's owner.
        private: As in `push_folder`, like `revision` and `token`.
        wait_seconds: How long the end of training waits for a push that is under way.
        retry_seconds: Pauses between the tries of `push_final`.
        base_model: Hub id or name of the model that is fine-tuned, for the cards of checkpoints.
        report: Takes each line that is shown; None prints it to standard error.
    """

    def __init__(
        self,
        repo_id: str,
        private: bool = False,
        revision: str | None = None,
        token: str | None = None,
        wait_seconds: float = 600.0,
        retry_seconds: tuple[float, ...] = (5.0, 30.0),
        report: Callable[[str], None] | None = None,
        base_model: str | None = None,
    ):
        self.repo_id, self.private, self.revision, self.token = repo_id, private, revision, token
        self.wait_seconds, self.retry_seconds = wait_seconds, retry_seconds
        self.report = report or functools.partial(print, file=sys.stderr, flush=True)
        self.base_model = base_model
        self.errors: list[str] = []
        self._lock = threading.Lock()
        self._waiting: tuple[Path, str] | None = None  # the newest snapshot that nobody pushes yet, with its message
        self._worker: threading.Thread | None = None
        self._gave_up = False  # waiting took too long once: never wait again
        self._final = False  # the finished folder is on its way: nothing older may come after it

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            for left_over in Path(args.output_dir).glob(f"{SNAPSHOT}*"):  # of a run that was killed
                shutil.rmtree(left_over, ignore_errors=True)

    def on_save(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        steps = f"step {state.global_step}" + (f" of {state.max_steps}" if state.max_steps > 0 else "")
        try:
            snapshot = take_snapshot(checkpoint, f"Training is still going on: this is {steps}.", self.base_model)
        except (OSError, ValueError) as error:
            self._show(f"{checkpoint.name} was not pushed: {error}")
            return
        self._replace_waiting((snapshot, f"Training in progress, {steps}"))
        self._start()

    def on_train_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self.wait()
        self._start()  # once more, if the last push failed
        self.wait()
        self._replace_waiting(None)

    def push_final(self, folder: str | Path, commit_message: str = "End of training") -> Pushed | None:
        """Push the finished folder, trying again after each pause; a failure is shown with the command that mends it.

        Returns:
            The push, or None if it failed.
        """
        self.wait()
        self._final = True
        self._replace_waiting(None)
        for pause in (*self.retry_seconds, None):
            try:
                pushed = push_folder(
                    folder, self.repo_id, self.private, self.revision, token=self.token, commit_message=commit_message
                )
            except Exception as error:
                self._show(str(error))
                if isinstance(error, FolderError):
                    return None
                if pause is not None:
                    time.sleep(pause)
            else:
                self.report(f"pushed to {pushed.url}" if pushed.changed else f"{pushed.url} is up to date")
                return pushed
        command = ["python", "scripts/push_to_hub.py", str(folder), self.repo_id] + ["--private"] * self.private
        command += ["--revision", self.revision] if self.revision else []
        self._show(f"the folder is complete; push it later: {shlex.join(command)}")
        return None

    def wait(self):
        """Wait for the pushes under way, `wait_seconds` at most; after waiting in vain once, not at all."""
        if self._worker is not None and not self._gave_up:
            self._worker.join(self.wait_seconds)
            self._gave_up = self._worker.is_alive()
            if self._gave_up:
                self._show(f"a push to {self.repo_id} is still under way after {self.wait_seconds:g} s; going on.")

    def _take_waiting(self) -> tuple[Path, str] | None:
        with self._lock:
            job, self._waiting = self._waiting, None
        return job

    def _replace_waiting(self, job: tuple[Path, str] | None):
        with self._lock:
            overtaken, self._waiting = self._waiting, job
        if overtaken:
            shutil.rmtree(overtaken[0], ignore_errors=True)

    def _start(self):
        """Push what waits; a worker that is just ending leaves it to the next checkpoint or the end of training."""
        if self._waiting is not None and not (self._worker and self._worker.is_alive()):
            # A daemon: a program that ends must not wait for a dead server, and a push cut short is no commit.
            self._worker = threading.Thread(target=self._work, name="hub-push", daemon=True)
            self._worker.start()

    def _work(self):
        """Push what waits until nothing does; what failed waits again, unless something newer has come."""
        while job := self._take_waiting():
            snapshot, message = job
            try:
                push_folder(
                    snapshot, self.repo_id, self.private, self.revision, token=self.token, commit_message=message,
                    wanted=lambda: not self._final,
                )  # fmt: skip
            except Exception as error:
                if not self._final:
                    self._show(f"{message}: {redact(str(error), self.token)} Training goes on.")
                    with self._lock:
                        if self._waiting is None:
                            self._waiting = job
                            return
            shutil.rmtree(snapshot, ignore_errors=True)

    def _show(self, text: str):
        self.errors.append(text)
        self.report(text)


def take_snapshot(checkpoint: Path, status: str, base_model: str | None = None) -> Path:
    """A checkpoint's model files and a card, linked aside: the checkpoint may be deleted before they are pushed.

    Args:
        checkpoint: A folder that Trainer wrote.
        status: A sentence for the card.
        base_model: As in `write_model_card`.

    Returns:
        A new folder beside the checkpoint.

    Raises:
        OSError, ValueError: It cannot be read, or not be written.
    """
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint.name} is not there.")
    snapshot = Path(tempfile.mkdtemp(prefix=SNAPSHOT, dir=checkpoint.parent))
    try:
        for path in (path for pattern in SNAPSHOT_FILES for path in checkpoint.glob(pattern)):
            try:
                os.link(path, snapshot / path.name)
            except OSError:
                shutil.copy2(path, snapshot / path.name)
        write_model_card(snapshot, status, base_model)
    except BaseException:
        shutil.rmtree(snapshot, ignore_errors=True)
        raise
    return snapshot
