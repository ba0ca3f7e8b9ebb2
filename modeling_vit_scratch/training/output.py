"""The output folder: taken or free, what a run writes into it, and whether it will fit."""

import contextlib
import shutil
import sys
from pathlib import Path

from ..data.sources import refuse_image_folder
from ..modeling_vit_scratch import ViTScratchForImageClassification
from . import checkpoints, lora
from .arguments import ImageTrainingArguments, ModelArguments
from .processes import asks_for_sharding


def settle_output(arguments: ImageTrainingArguments, model: ModelArguments, dataset: str) -> tuple[str, str | None]:
    """Name the output folder and the checkpoint to resume; refuse a folder that is taken, or not writable.

    Returns:
        The folder, which is there then, and the checkpoint, if there is one to resume.
    """
    folder, resume = arguments.output_dir, arguments.resume_from_checkpoint
    if arguments.output_dir_is_default:
        stem = f"{Path(model.model_name_or_path or model.preset or 'vit').name}-{Path(dataset).name}"
        candidates = (Path("runs") / f"{stem}{f'-{n}' if n > 1 else ''}" for n in range(1, 10_000))
        folder = next(folder for folder in candidates if not folder.exists())
    folder = Path(folder)
    checkpoints.recover(folder)
    if resume is not None and resume.lower() in ("true", "last", "latest"):
        last, notes = checkpoints.last_good_checkpoint(folder)
        for note in notes:
            print(note, file=sys.stderr)
        if last is None:
            raise ValueError(f"there is no good checkpoint in {folder}; name one with --resume_from_checkpoint FOLDER.")
        resume = str(last)
    elif resume is not None:
        wrong = checkpoints.damage(Path(resume)) if Path(resume).is_dir() else "there is no such folder"
        if wrong is not None:
            raise ValueError(
                f"cannot resume from {resume}: {wrong}; --resume_from_checkpoint last takes the last good one."
            )
    elif checkpoints.list_checkpoints(folder) or (folder / "model.safetensors").exists():
        if not arguments.overwrite_output_dir:
            raise ValueError(
                f"{folder} already holds a run; continue it with --resume_from_checkpoint last, choose another "
                "--output_dir, or replace it with --overwrite_output_dir."
            )
        trained = model.model_name_or_path
        if trained and Path(trained).resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{folder} is to be overwritten, but model_name_or_path ({trained}) lies in it; choose another."
            )
    else:
        refuse_image_folder(folder)
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}); choose another --output_dir.") from error
    return str(folder), resume


def remove_if_empty(arguments: ImageTrainingArguments):
    """Take back the folder that a run named itself, if it ended before it wrote anything: names would count up."""
    if arguments.output_dir_is_default and arguments.output_dir and arguments.process_index == 0:
        with contextlib.suppress(OSError):  # it holds something, or was never made
            Path(arguments.output_dir).rmdir()


# What a run writes into its output folder. Logs of `--report_to` carry the time of their run, and stay.
RUN_FILES = (
    "checkpoint-*", checkpoints.STAGING, ".hub_push-*", "model*.safetensors", "model.safetensors.index.json",
    "config.json", "preprocessor_config.json", "configuration_vit_scratch.py", "modeling_vit_scratch.py", "README.md",
    "metrics.json", "history.csv", "predictions_*.csv", "samples.png", lora.FOLDER, "plots/training_curves.png",
    "plots/per_class_accuracy.png", "plots/confusion_matrix.png", "plots/reconstructions.png",
)  # fmt: skip


def replace_run(args: ImageTrainingArguments):
    """Remove what the run before left in the output folder, if that is what the options say; all else was in order."""
    if args.overwrite_output_dir and not args.resume_from_checkpoint and args.process_index == 0:
        remove_run(Path(args.output_dir))


def remove_run(folder: Path):
    """Remove what an earlier run left in a folder, and nothing else: no number of it may speak for another run."""
    for path in [path for pattern in RUN_FILES for path in folder.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_space(model: ViTScratchForImageClassification, args: ImageTrainingArguments):
    """Refuse a disk that the checkpoints would fill: weights and two moments each, one more than are kept; a sharded
    run's have the weights once for others and once to go on with.
    """
    copies = 4 if asks_for_sharding(args) else 3
    needed = copies * sum(p.numel() * p.element_size() for p in model.parameters()) * ((args.save_total_limit or 2) + 2)
    free = shutil.disk_usage(args.output_dir).free
    if args.save_strategy.value != "no" and free < needed:
        raise ValueError(
            f"{args.output_dir} has {free / 1e9:.2f} GB free, but its checkpoints take {needed / 1e9:.2f} GB; "
            "free some, lower --save_total_limit, or choose another --output_dir."
        )
