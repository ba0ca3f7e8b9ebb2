"""What a run says, writes and draws: its summary, its history, its numbers and its pictures."""

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
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainingArguments

from .. import model_card, plots
from ..data import ImageSplits
from ..data.splits import DecodedImages
from ..data.streaming import StreamedImages
from ..modeling_vit_scratch import ViTScratchForImageClassification
from .arguments import DataArguments
from .optimization import describe_groups, parameter_groups
from .trainer import ImageTrainer


def flops_per_image(model: ViTScratchForImageClassification) -> int:
    """Floating-point operations (a multiplication and an addition are two) of a forward pass on one picture."""
    config = model.config
    pixels = torch.zeros(1, config.num_channels, *config.image_hw, device=model.device)
    training = model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(pixels, output_attentions=True)  # eager attention: the counter knows matrix products
    model.train(training)
    return counter.get_total_flops()


def hardware(device: torch.device) -> str:
    """What this run computes on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def table(rows: dict[str, object]) -> str:
    width = max(map(len, rows))
    next_line = "\n" + " " * (width + 4)  # of a value of several lines
    return "\n".join(f"  {name:<{width}}  {str(value).replace(chr(10), next_line)}" for name, value in rows.items())


def summary(trainer: ImageTrainer, splits: ImageSplits, steps: int, last_rate: float | None) -> str:
    args, config = trainer.args, trainer.model.config
    sizes = [f"{count:,} {name}" for name, count in split_sizes(splits).items()]
    if isinstance(splits.train, StreamedImages):
        sizes.insert(0, "streamed train")
    global_batch = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    classes = f"{len(splits.class_names)} classes, " if splits.class_names else ""
    rate = "set by validation" if last_rate is None else f"{last_rate:.3g}"
    height, width = config.image_hw
    epochs = ""
    if not isinstance(splits.train, StreamedImages):
        per_epoch = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
        epochs = f" ({steps / per_epoch:g} epochs)"
    rows = {
        "model": f"ViT, {config.num_hidden_layers} blocks, width {config.hidden_size}, {config.num_attention_heads} "
        f"heads, MLP {config.intermediate_size}, patch {config.patch_hw[0]}x{config.patch_hw[1]}",
        "parameters": f"{trainer.model.num_parameters():,}{_frozen(trainer.model)}",
        "FLOPs per image": f"{flops_per_image(trainer.model):,} (forward)",
        "data": f"{splits.name}: {', '.join(sizes)} images, {classes}{height}x{width} px, "
        f"column{'s' * (splits.columns[1] is not None)} {' and '.join(filter(None, splits.columns))}",
        "global batch": f"{global_batch} = {args.per_device_train_batch_size} per device x {args.world_size} "
        f"process{'es' * (args.world_size > 1)} x {args.gradient_accumulation_steps} accumulated",
        "steps": f"{steps:,}{epochs}",
        "learning rate": f"{args.learning_rate:.3g}, {args.lr_scheduler_type.value}, last step {rate}",
        "optimizer": describe_groups(parameter_groups(trainer.model, args), args.optim.value),
        "device": f"{hardware(args.device)}, {precision_of(args)}",
        "settings": args.settings_from,
        "output": args.output_dir,
    }
    for change in trainer.run_facts["changes"]:
        options = (f"{name} {values[0]} -> {values[1]}" for name, values in change.items() if name != "step")
        rows[f"from step {change['step']:,}"] = ", ".join(options)
    return table(rows)


def _frozen(model: ViTScratchForImageClassification) -> str:
    trained = model.num_parameters(only_trainable=True)
    return "" if trained == model.num_parameters() else f", of which {trained:,} are trained"


def parts_of(splits: ImageSplits) -> dict[str, torch.utils.data.Dataset]:
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    return {name: part for name, part in parts.items() if part is not None}


def split_sizes(splits: ImageSplits) -> dict[str, int]:
    """Pictures of each split; a stream has no known number."""
    return {name: len(part) for name, part in parts_of(splits).items() if not isinstance(part, StreamedImages)}


def precision_of(args: TrainingArguments) -> str:
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"


def write_history(folder: Path, log_history: list[dict]) -> bool:
    """One row per logged event, in the order of steps; empty where an event has no such number. False if none was."""
    names = ["step", "epoch", "learning_rate", "loss", "grad_norm", "eval_loss", "eval_accuracy", "eval_top5_accuracy"]
    names += ["train_seconds", "train_cpu_seconds"]
    rows = [row for row in log_history if "loss" in row or "eval_loss" in row]
    with open(folder / "history.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return bool(rows)


def write_predictions(folder: Path, split: str, logits: np.ndarray, labels: np.ndarray, rows: np.ndarray, names):
    """One row per picture: its row in the split, its class, the predicted class, and the model's confidence."""
    probabilities = torch.from_numpy(logits).float().softmax(-1)
    confidence, predicted = probabilities.max(-1)
    with open(folder / f"predictions_{split}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "label", "predicted", "confidence", "label_probability"])
        own = probabilities[torch.arange(len(labels)), torch.from_numpy(labels)]
        for row, label, guess, p, q in zip(rows, labels, predicted.tolist(), confidence, own, strict=True):
            writer.writerow([row, names[label], names[guess], f"{p:.6f}", f"{q:.6f}"])


def _without_resuming(command: list[str]) -> list[str]:
    """A command without the options that are about to be added to it."""
    kept, skip = [], False
    for word in command:
        if not skip and word.partition("=")[0] not in ("--output_dir", "--resume_from_checkpoint"):
            kept.append(word)
        skip = word in ("--output_dir", "--resume_from_checkpoint")
    return kept


def say_how_to_resume(trainer: ImageTrainer):
    """Print the command that continues a run that was stopped."""
    if trainer.args.process_index == 0:
        options = ["--output_dir", trainer.args.output_dir, "--resume_from_checkpoint", "last"]
        command = shlex.join(["python", *_without_resuming(sys.argv), *options])
        print(f"Stopped at step {trainer.state.global_step}. To continue:\n  {command}")


def describe_training(trainer: ImageTrainer, steps: int, data_args: DataArguments, lora_rank: int | None) -> dict:
    """The settings of a run, for `metrics.json`."""
    args, augmentation = trainer.args, trainer.augmentation
    lazy = not isinstance(trainer.train_dataset, DecodedImages)
    return {
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "optimizer": args.optim.value,
        "learning_rate": args.learning_rate,
        "muon_learning_rate": args.muon_learning_rate,
        "changed_on_resuming": trainer.run_facts["changes"],
        "lora_rank": lora_rank,
        "ema_decay": args.ema_decay,
        "lr_scheduler_type": args.lr_scheduler_type.value,
        "warmup_steps": args.get_warmup_steps(steps),
        "weight_decay": args.weight_decay,
        "global_batch_size": args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps,
        "label_smoothing": args.label_smoothing_factor,
        "seed": args.seed,
        "precision": precision_of(args),
        "augmentation": {
            "crop_padding": augmentation.crop_padding,
            "crop_mode": augmentation.crop_mode,
            "crop_scale": trainer.train_dataset.crop_scale if lazy else None,
            "horizontal_flip": augmentation.horizontal_flip,
            "rand_augment": augmentation.rand_augment_ops,
            "rand_augment_magnitude": augmentation.rand_augment_magnitude if augmentation.rand_augment_ops else None,
            "random_erasing": augmentation.erasing,
            "mixup_alpha": augmentation.mixup_alpha,
            "cutmix_alpha": augmentation.cutmix_alpha,
            "mix_probability": augmentation.mix_probability,
            "until": dict(augmentation.until),
        },
    }


def describe_machine(trainer: ImageTrainer) -> dict:
    """Time and environment of a run, for `metrics.json`."""
    args, clock = trainer.args, trainer.clock
    cpu = torch.tensor(clock.cpu, dtype=torch.float64)
    if args.world_size > 1:
        cpu = trainer.accelerator.gather(cpu.to(args.device).view(1)).sum()
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
    }


def finish(folder: Path, metrics: dict, log_history: list[dict]):
    """Write what people look at: numbers, curves, card; say the result."""
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    logged = write_history(folder, log_history)
    final = "test" if "test" in metrics else "validation"
    names, result = metrics["dataset"]["class_names"], metrics[final]
    figures = {
        "per_class_accuracy": plots.plot_per_class_accuracy(list(result["per_class_accuracy"].values()), names),
        "confusion_matrix": plots.plot_confusion_matrix(result["confusion_matrix"], names),
    }
    if logged:
        figures["training_curves"] = plots.plot_training_curves(folder / "history.csv")
    (folder / "plots").mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / "plots" / f"{name}.png", dpi=110)
    model_card.write_model_card(folder)
    flipped = "flip_tta_accuracy" in result
    shown = {
        f"{split} accuracy": f"{metrics[split]['accuracy']:.2%}  (top-5 {metrics[split]['top5_accuracy']:.2%}, "
        f"loss {metrics[split]['loss']:.4f}, {metrics[split]['examples']:,} images)"
        + (f"; with mirror images {metrics[split]['flip_tta_accuracy']:.2%}" if flipped else "")
        for split in ("validation", "test")
        if split in metrics
    }
    shown["training time"] = (
        f"{metrics['time']['train_seconds']:.0f} s ({metrics['time']['train_cpu_seconds']:.0f} CPU s)"
    )
    shown["everything is in"] = folder
    print(table(shown))
