"""What a run says and writes: its summary before, and its numbers, history and predictions after."""

import csv
import json
import math
import platform
import shlex
import sys
from pathlib import Path

import accelerate
import numpy as np
import torch
import transformers
from matplotlib.figure import Figure

from .. import plots
from ..data.sources import public_name
from ..data.splits import DecodedImages
from ..evaluation.tables import text_table
from ..hub import public_command, write_model_card
from ..hub.model_card import choices_of
from ..modeling_vit_scratch import ViTScratchPreTrainedModel
from .arguments import ImageTrainingArguments
from .models import flops_per_image
from .optimization import describe_groups, parameter_groups
from .processes import common_launcher
from .run import Run


def say_what_will_happen(run: Run):
    """Print the summary that a run begins with; the main process alone."""
    if not run.is_main:
        return
    args, config, data = run.args, run.model.config, run.splits
    sizes = ["streamed train"] * run.streamed + [f"{count:,} {name}" for name, count in run.sizes.items()]
    classes = f"{len(data.class_names)} classes, " if data.class_names else ""
    columns = f"column{'s' * (data.columns[1] is not None)} {' and '.join(filter(None, data.columns))}"
    processes = f"{args.world_size} process{'es' * (args.world_size > 1)}"
    rate = "set by validation" if run.last_rate is None else f"{run.last_rate:.3g}"
    height, width = config.image_hw
    epochs = ""
    if not run.streamed:
        per_epoch = math.ceil(run.batches / args.gradient_accumulation_steps)
        epochs = f" ({run.steps / per_epoch:g} epochs)"
    stages = len(config.stem_channels)
    stem = f", {stages} convolutional stage{'s' * (stages > 1)} before it" if stages else ""
    rows = {
        "model": f"ViT, {config.num_hidden_layers} blocks, width {config.hidden_size}, {config.num_attention_heads} "
        f"heads, MLP {config.intermediate_size}, patch {config.patch_hw[0]}x{config.patch_hw[1]}{stem}",
        "choices": choices_of(config.to_dict()) or "none: as in the paper",
        "parameters": f"{run.model.num_parameters():,}{_frozen(run.model)}",
        "FLOPs per image": f"{flops_per_image(run.model):,} (forward)",
        "data": f"{data.name}: {', '.join(sizes)} images, {classes}{height}x{width} px, {columns}",
        "global batch": f"{global_batch_size(args)} = {args.per_device_train_batch_size} per device x {processes} "
        f"x {args.gradient_accumulation_steps} accumulated",
        "steps": f"{run.steps:,}{epochs}",
        "learning rate": f"{args.learning_rate:.3g}, {args.lr_scheduler_type.value}, last step {rate}",
        "optimizer": describe_groups(parameter_groups(run.model, args), args.optim.value),
        "device": f"{hardware(args.device)}, {precision_of(args)}{', compiled' * args.torch_compile}",
        "settings": args.settings_from,
        "output": args.output_dir,
    }
    for change in run.facts["changes"]:
        options = (f"{name} {values[0]} -> {values[1]}" for name, values in change.items() if name != "step")
        rows[f"from step {change['step']:,}"] = ", ".join(options)
    print(text_table(list(rows.items()), left=2, indent=2), flush=True)


def _frozen(model: ViTScratchPreTrainedModel) -> str:
    trained = model.num_parameters(only_trainable=True)
    return "" if trained == model.num_parameters() else f", of which {trained:,} are trained"


def global_batch_size(args: ImageTrainingArguments) -> int:
    """Images of an optimizer step, over all processes."""
    return args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps


def precision_of(args: ImageTrainingArguments) -> str:
    """What it computes in."""
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"


def hardware(device: torch.device) -> str:
    """What this run computes on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def describe(run: Run) -> dict:
    """Data, model and settings of a run, for `metrics.json`."""
    facts = run.facts
    classes = {"class_names": run.splits.class_names} if run.splits.class_names else {}
    base = run.model_args.model_name_or_path
    model = {} if base is None else {"base_model": public_name(base)}
    return {
        "task": run.model_args.task,
        "dataset": {"name": facts["dataset"], "fingerprint": facts["fingerprint"], "cut": facts["cut"]}
        | {"splits": run.sizes, **classes},
        "model": {"parameters": run.model.num_parameters(), "flops_per_image": flops_per_image(run.model), **model},
        "training": _describe_training(run),
    }


def _describe_training(run: Run) -> dict:
    args, trainer, augmentation = run.args, run.trainer, run.augmentation
    lazy = not isinstance(trainer.train_dataset, DecodedImages)
    return {
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "kept_step": trainer.kept_step,
        "optimizer": args.optim.value,
        "learning_rate": args.learning_rate,
        "muon_learning_rate": args.muon_learning_rate,
        "changed_on_resuming": run.facts["changes"],
        "lora_rank": run.model_args.lora_rank,
        "ema_decay": args.ema_decay,
        "lr_scheduler_type": args.lr_scheduler_type.value,
        "warmup_steps": args.get_warmup_steps(run.steps),
        "weight_decay": args.weight_decay,
        "global_batch_size": global_batch_size(args),
        "label_smoothing": args.label_smoothing_factor,
        "seed": args.seed,
        "precision": precision_of(args),
        "torch_compile": args.torch_compile,
        "augmentation": {
            "crop_padding": augmentation.crop_padding,
            "crop_mode": augmentation.crop_mode,
            "crop_scale": trainer.train_dataset.crop_scale if lazy else None,
            "horizontal_flip": augmentation.horizontal_flip,
            "flip_mode": run.data_args.flip_mode,
            "rand_augment": augmentation.rand_augment_ops,
            "rand_augment_magnitude": augmentation.rand_augment_magnitude if augmentation.rand_augment_ops else None,
            "random_erasing": augmentation.erasing,
            "mixup_alpha": augmentation.mixup_alpha,
            "cutmix_alpha": augmentation.cutmix_alpha,
            "mix_probability": augmentation.mix_probability,
            "until": dict(augmentation.until),
        },
    }


def describe_machine(run: Run) -> dict:
    """Time, environment and command of a run, for `metrics.json`; each process takes part."""
    args, clock = run.args, run.trainer.clock
    cpu = torch.tensor(clock.cpu, dtype=torch.float64)
    if args.world_size > 1:
        cpu = run.trainer.accelerator.gather(cpu.to(args.device).view(1)).sum()
    return {
        "time": {"train_seconds": clock.wall, "train_cpu_seconds": cpu.item()},
        "environment": {
            "hardware": hardware(args.device),
            "processes": args.world_size,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
        "command": public_command(shlex.join([*common_launcher(), *sys.argv]), run.data_name),
    }


def write_numbers(run: Run, metrics: dict) -> bool:
    """Write `metrics.json` and `history.csv`, before anything is drawn that could fail; whether anything was logged."""
    (run.folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    return _write_history(run.folder, run.trainer.state.log_history)


def finish(run: Run, metrics: dict, figures: dict[str, Figure], logged: bool, shown: dict, further: dict | None = None):
    """Write the plots and the model card, and say the result.

    Args:
        run: That has ended.
        metrics: What `metrics.json` holds.
        figures: File name -> figure, beside the training curves.
        logged: Whether there is anything to draw curves of.
        shown: What is said first, by its name.
        further: And last.
    """
    folder, seconds = run.folder, metrics["time"]
    loss = plots.LOSSES[metrics["task"]]
    curves = {"training_curves": plots.plot_training_curves(folder / "history.csv", loss)} if logged else {}
    (folder / "plots").mkdir(exist_ok=True)
    for name, figure in {**figures, **curves}.items():
        figure.savefig(folder / "plots" / f"{name}.png", dpi=110)
    write_model_card(folder)
    shown = shown | {
        "training time": f"{seconds['train_seconds']:.0f} s ({seconds['train_cpu_seconds']:.0f} CPU s)",
        "everything is in": str(folder),
    }
    print(text_table([*shown.items(), *(further or {}).items()], left=2, indent=2))


def _write_history(folder: Path, log_history: list[dict]) -> bool:
    """One row per logged event, in the order of steps; empty where an event has no such number. False if none was."""
    names = ["step", "epoch", "learning_rate", "loss", "grad_norm", "eval_loss", "eval_accuracy", "eval_top5_accuracy"]
    names += ["train_seconds", "train_cpu_seconds"]
    rows = [row for row in log_history if "loss" in row or "eval_loss" in row]
    with open(folder / "history.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return bool(rows)


def write_predictions(
    folder: Path,
    split: str,
    logits: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
    names: list[str],
    files: list[str] | None,
):
    """One row per image: its row in the split, its class, the predicted class, the model's confidence, and its file if
    the images are files.
    """
    probabilities = torch.from_numpy(logits).float().softmax(-1)
    confidence, predicted = probabilities.max(-1)
    own = probabilities[torch.arange(len(labels)), torch.from_numpy(labels)]
    columns = {
        "row": rows,
        "label": [names[label] for label in labels],
        "predicted": [names[guess] for guess in predicted],
        "confidence": [f"{p:.6f}" for p in confidence],
        "label_probability": [f"{p:.6f}" for p in own],
    }
    if files is not None:
        columns["file"] = files
    path = folder / f"predictions_{split}.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
