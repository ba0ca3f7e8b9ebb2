"""Checkpoints that are whole or invisible, know what run they belong to, and notice damage.

A checkpoint is written aside, digested, synced to the disk and renamed, so that a folder named `checkpoint-N` is
always complete, whenever the process was killed. `DIGESTS` lists the SHA-256 of each of its files.

    model.safetensors, config.json, preprocessor_config.json, two .py   the model, with averaged weights if there are
    trained_weights.safetensors     the weights that are trained, where an average is kept
    adapter/                        LoRA's matrices, by PEFT
    optimizer.pt, scheduler.pt, rng_state*.pth, scaler.pt               state of the training
    trainer_state.json              Trainer's: steps, history, the best checkpoint, the clock
    pending_loss_N.json             of each process, the loss since the last log entry, and since the last evaluation
    run.json                        what a run must share to continue it (`check_run`)
    digests.json                    written last
"""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

from ..data.cuts import RUN

logger = logging.getLogger(__name__)

STAGING = ".saving"
DIGESTS = "digests.json"
# Facts that older versions recorded only of the runs that they are true of.
_SOMETIMES = ("task", "freeze_backbone", "lora")
# Facts whose options have another name.
_OPTIONS = {"stream_workers": "dataloader_num_workers"}
# Appended to the name of a checkpoint that is about to be replaced.
_OLD = ".old"


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(staged: Path, final: Path):
    """Make a complete staged folder visible under its final name, in one step.

    Args:
        staged: Complete, on the same file system as `final`.
        final: Name of the checkpoint; a folder that has it already is deleted once its successor stands.
    """
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    digests = {str(path.relative_to(staged)): _digest(path) for path in files}
    (staged / DIGESTS).write_text(json.dumps(digests, indent=1) + "\n")
    for path in [*files, staged / DIGESTS, staged]:
        _sync(path)
    old = staged.with_name(f"{staged.name}{_OLD}")
    if final.exists():
        final.rename(old)
    staged.rename(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path):
    """Put back a checkpoint that `publish` had moved aside when it was killed: its successor if that is whole, or it.

    Args:
        folder: The output folder of a run that nobody is writing to.
    """
    for old in (folder / STAGING).glob(f"checkpoint-*{_OLD}"):
        staged = old.with_name(old.name.removesuffix(_OLD))
        final = folder / staged.name
        if not final.exists():
            (staged if damage(staged) is None else old).rename(final)
            _sync(folder)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, naming the first, or None if all are as they were written."""
    try:
        digests = json.loads((checkpoint / DIGESTS).read_text())
    except (OSError, ValueError) as error:
        return f"{DIGESTS} cannot be read ({type(error).__name__})"
    for name, expected in digests.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _digest(path) != expected:
            return f"{name} is damaged (its SHA-256 is not the one noted when it was saved)"
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of an output folder, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]), reverse=True)


def last_good_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint of an output folder, if any, and a line for each damaged one that is newer."""
    notes = []
    for checkpoint in list_checkpoints(folder):
        wrong = damage(checkpoint)
        if wrong is None:
            return checkpoint, notes
        notes.append(f"{checkpoint.name} is passed over: {wrong}.")
    return None, notes


def fact(checkpoint: Path, name: str, default=None):
    """What a checkpoint's own run noted of itself by a name; the default where that is not known."""
    path = checkpoint / RUN
    return json.loads(path.read_text()).get(name, default) if path.is_file() else default


def check_run(checkpoint: Path, run: dict, defaults: dict) -> list[dict]:
    """Refuse to resume a checkpoint of another run; say what a run that goes on does otherwise.

    Args:
        checkpoint: Folder with the `RUN` file that its own run wrote.
        run: The same facts of this run, by name: architecture, dataset, classes, processes, options, ...; and, below
            "changeable", the options that may differ.
        defaults: Values of options where one of the two does not have them, being of another version.

    Returns:
        For each time that the run was resumed with other options, this one included: {"step": the number of steps
        before, option: [value before, value from then on]}.

    Raises:
        ValueError: A fact differs, with both values; or the checkpoint has no optimizer to go on with.
    """
    path = checkpoint / RUN
    if not path.is_file():
        raise ValueError(f"{checkpoint} has no {RUN}; only checkpoints of scripts/finetune.py can be resumed.")
    saved = json.loads(path.read_text())
    now = json.loads(json.dumps(run))  # tuples and numbers as JSON has them
    changes, before, after = saved.pop("changes", []), saved.pop("changeable", None), now.pop("changeable", {})
    now.pop("changes", None)
    if before is None:  # of a version that kept no record of most options
        logger.warning("%s is of an older version, which did not record all options: give the same ones.", checkpoint)
        now = {name: value for name, value in now.items() if name in saved or name in _SOMETIMES}
        before = {}
    for name in {**saved, **now}:
        was, is_now = (facts.get(name, defaults.get(name)) for facts in (saved, now))
        if was != is_now:
            shown = _OPTIONS.get(name, name)
            raise ValueError(
                f"{checkpoint} was saved with {shown} = {was!r}, but this run has {is_now!r}; "
                "resume with the same settings, or start anew in another --output_dir."
            )
    if not any(checkpoint.glob("optimizer*")):  # Trainer would go on with a new one, and a new schedule
        raise ValueError(
            f"{checkpoint} has weights alone (save_only_model); start a new run from them with --model_name_or_path."
        )
    differing = {name: [before[name], after[name]] for name in before if before[name] != after.get(name, before[name])}
    if differing:
        step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
        changes = [*changes, {"step": step, **differing}]
    return changes
