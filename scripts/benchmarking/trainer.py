"""What ImageTrainer adds to a bare training loop."""

import argparse
import itertools
import tempfile
import time
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import TrainerCallback

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, plots
from modeling_vit_scratch.data import Augmentation
from modeling_vit_scratch.data.splits import DecodedImages
from modeling_vit_scratch.evaluation.tables import text_table
from modeling_vit_scratch.training import ImageTrainer, ImageTrainingArguments
from modeling_vit_scratch.training.optimization import parameter_groups

from .data import MEAN, STD, batches, random_images
from .measuring import interleave, synchronise

TRAINER_CASES = {
    "2 blocks, width 64": {"hidden_size": 64, "intermediate_size": 256},
    "showcase": {},
}
TRAINER_BATCH = 64


class StepTimes(TrainerCallback):
    """When each step ended."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())


def trainer_seconds(config: ViTScratchConfig, dataset: DecodedImages, steps: int, device: torch.device) -> float:
    """Seconds per step of `ImageTrainer`, as scripts/finetune.py uses it, without its start."""
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        args = ImageTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=TRAINER_BATCH,
            eval_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=False,
        )
        trainer = ImageTrainer(
            Augmentation(MEAN, STD, crop_padding=4, horizontal_flip=0.5),
            {},
            model=ViTScratchForImageClassification(config),
            args=args,
            train_dataset=dataset,
            callbacks=[times],
        )
        trainer.train()
    warm = len(times.ends) // 4
    return (times.ends[-1] - times.ends[warm]) / (len(times.ends) - 1 - warm)


def bare_seconds(config: ViTScratchConfig, dataset: DecodedImages, steps: int, device: torch.device) -> float:
    """Seconds per step of the shortest loop that computes the same: gather, augment, forward, backward, clip, AdamW."""
    model = ViTScratchForImageClassification(config).to(device).train()
    with tempfile.TemporaryDirectory() as folder:
        groups = parameter_groups(model, ImageTrainingArguments(output_dir=folder, use_cpu=device.type == "cpu"))
    optimizer = torch.optim.AdamW(groups, fused=True)
    augmentation, warm = Augmentation(MEAN, STD, crop_padding=4, horizontal_flip=0.5), steps // 4
    for step, indices in enumerate(itertools.islice(batches(len(dataset), TRAINER_BATCH), steps)):
        if step == warm:
            synchronise(device)
            start = time.perf_counter()
        batch = dataset.__getitems__(indices)
        images = augmentation(batch["pixel_values"], step, 0)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(images, labels=batch["labels"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    synchronise(device)
    return (time.perf_counter() - start) / (steps - warm)


def measure(args: argparse.Namespace) -> dict:
    """Trainer against a bare loop, on the same model and data."""
    dataset, rows = random_images(16 * TRAINER_BATCH, args.device), []
    for title, fields in TRAINER_CASES.items():
        work = ViTScratchConfig.preset("showcase", **fields), dataset, args.steps, args.device
        contestants = {"bare": partial(bare_seconds, *work), "trainer": partial(trainer_seconds, *work)}
        samples = interleave(contestants, args.rounds, f"Trainer, {title}")
        bare, trainer = (np.array(samples[name]) for name in ("bare", "trainer"))
        row = {f"{name}_seconds": float(np.median(values)) for name, values in (("bare", bare), ("trainer", trainer))}
        cost = {"cost_seconds": float(np.median(trainer - bare)), "cost_share": float(np.median(trainer / bare - 1))}
        rows.append({"case": title, **row, **cost, "samples": samples})
    return {"rows": rows}


def show(result: dict) -> str:
    lines = [
        [row["case"]]
        + [f"{row[key] * 1e3:.2f} ms" for key in ("bare_seconds", "trainer_seconds", "cost_seconds")]
        + [f"{row['cost_share']:.0%}"]
        for row in result["rows"]
    ]
    return f"A training step, batch {TRAINER_BATCH}\n" + text_table(
        [["", "bare loop", "ImageTrainer", "cost of it", "of the step"], *lines]
    )


def draw(result: dict) -> Figure:
    names = {"bare loop": "bare_seconds", "ImageTrainer": "trainer_seconds"}
    groups = {
        row["case"]: {name: (row[key] * 1e3, f"{row[key] * 1e3:.2f}") for name, key in names.items()}
        for row in result["rows"]
    }
    return plots.plot_bars(groups, "ms per step")
