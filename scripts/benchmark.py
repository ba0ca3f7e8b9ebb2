"""Measure this package's speed and memory side by side with its peers'.

python scripts/benchmark.py --quick                 all but race, in 2 minutes
python scripts/benchmark.py --sections model,memory
python scripts/benchmark.py --sections race --dataset_name path/to/cifar10

SECTION is one or more of
  model     inference and training step against the libraries that import
  data      images per second of the data path, on one core or on the GPU;
            seconds of a look at a whole data set (--dataset_name)
  trainer   what ImageTrainer adds to a bare training loop
  memory    loading a 632 M-parameter model from disk
  scale     against batch size, image size and processes
  race      training: the teaching protocol against our recipe (an hour)

Peers take turns, each round in another order, so that what else the machine
does strikes all alike; ratios are medians over the rounds. A table goes to the
standard output; numbers and charts (JSON, PNG, SVG) go into a folder. A race
that was interrupted goes on, and one that was run before is not run again.

Exit status: 0; 1 if a section could not be measured; 2 if an option is wrong;
130 after Ctrl-C.
"""

import argparse
import contextlib
import gc
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from benchmarking import peers  # before transformers
from benchmarking.measuring import (
    OURS,
    PEAK,
    PeakMemory,
    compare,
    faster,
    in_fresh_processes,
    interleave,
    matrix_product,
    megabytes,
    memory_now,
    number,
    one_thread,
    ratio,
    share,
    stopwatch,
    synchronise,
    table,
)
from matplotlib.figure import Figure
from PIL import Image
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, cli, plots
from modeling_vit_scratch.conversion import export_checkpoint
from modeling_vit_scratch.data import Augmentation, inspect_splits, load_splits
from modeling_vit_scratch.data.doctor import fingerprint
from modeling_vit_scratch.data.sources import DIGITS, default_dataset
from modeling_vit_scratch.data.splits import DecodedImages, collate
from modeling_vit_scratch.training import ImageTrainer, ImageTrainingArguments, checkpoints
from modeling_vit_scratch.training.models import flops_per_image, make_processor
from modeling_vit_scratch.training.optimization import parameter_groups
from modeling_vit_scratch.training.report import hardware

MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
RECIPES = Path(__file__).parent / "recipes"
PROGRAM = "benchmark.py"
RACE = {"teaching protocol": "teaching_adamw.yaml", OURS: "showcase.yaml"}


# -- model -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model, and what is done with it: inference, or a training step (forward, backward, AdamW).

    Args:
        title: In words.
        preset: Of `ViTScratchConfig`.
        batch: Pictures.
        training: A training step instead of inference.
        fields: Of the config, where they differ from the preset's.
        bf16: bfloat16 autocast and `torch.compile` instead of float32.
        quick: Whether it is measured in quick mode too.
    """

    title: str
    preset: str
    batch: int
    training: bool = False
    fields: dict = field(default_factory=dict)
    bf16: bool = False
    quick: bool = True

    @property
    def config(self) -> ViTScratchConfig:
        # N(0, 1 / fan_in) is drawn faster than the default, and the outputs are larger.
        return ViTScratchConfig.preset(self.preset, initializer_range="fan_in", **self.fields)


CLASS_TOKEN = {"use_cls_token": True, "pooling": "cls", "use_final_norm": True}
SHOWCASE = Case("showcase, training, batch 64", "showcase", 64, training=True)
CASES = {
    "cpu": [
        Case("ViT-B/16, inference, batch 1", "base", 1),
        Case("ViT-B/16, inference, batch 8", "base", 8, quick=False),
        SHOWCASE,
        Case("showcase + class token, training, batch 64", "showcase", 64, True, CLASS_TOKEN),
    ],
    "cuda": [
        Case("ViT-B/16, inference, batch 256, bf16, compiled", "base", 256, bf16=True),
        Case("ViT-B/16, training, batch 256, bf16, compiled", "base", 256, True, bf16=True),
        Case("showcase, training, batch 256, bf16, compiled", "showcase", 256, True, bf16=True),
    ],
}


def make_model(case: Case, name: str) -> torch.nn.Module:
    """The model of a contestant, in evaluation mode, with the same weights for all that can have them.

    Raises:
        ImportError, ValueError: As `peers.make_peer`.
    """
    torch.manual_seed(0)
    ours = ViTScratchForImageClassification(case.config).eval()
    torch.nn.init.normal_(ours.classifier.weight, std=0.1)  # from zero, as it starts, all outputs would agree
    return ours if name == OURS else peers.make_peer(name, ours).eval()


def make_models(case: Case) -> tuple[dict[str, torch.nn.Module], dict[str, str]]:
    """Our model and those of the peers that have its geometry, and why others do not import."""
    models, reasons = {OURS: make_model(case, OURS)}, {}
    for name in tqdm(peers.PEERS, desc=f"{case.title}: making models", unit="model", delay=2, leave=False):
        try:
            models[name] = peers.make_peer(name, models[OURS]).eval()
        except ImportError as error:
            reasons[name] = str(error)
        except ValueError:  # another geometry
            continue
    return models, reasons


def logits_of(output) -> torch.Tensor:
    return getattr(output, "logits", output)


@torch.inference_mode()
def difference(case: Case, model: torch.nn.Module, other: torch.nn.Module) -> float:
    """The largest difference of two models' logits on two pictures, over the largest logit."""
    pixels = torch.randn(2, case.config.num_channels, *case.config.image_hw)
    ours, theirs = (logits_of(m(pixels)) for m in (model, other))
    return float((ours - theirs).abs().max() / ours.abs().max())


def make_step(case: Case, model: torch.nn.Module, device: torch.device) -> Callable[[], object]:
    """What is timed: one inference, or one training step, on random pictures."""
    config = case.config
    pixels = torch.randn(case.batch, config.num_channels, *config.image_hw, device=device)
    labels = torch.randint(config.num_labels, (case.batch,), device=device)
    model = model.to(device).train(case.training)
    forward = torch.compile(model) if case.bf16 else model

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=case.bf16)

    if not case.training:

        def infer():
            with torch.inference_mode(), autocast():
                forward(pixels)

        return infer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def train():
        with autocast():
            logits = logits_of(forward(pixels))
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return train


def peak_memory(case: Case, name: str) -> int | None:
    """Most memory, in bytes, of a contestant's model and what it computes; on the CPU, in a fresh process."""
    memory = PeakMemory()
    step = make_step(case, make_model(case, name), torch.device("cpu"))
    with memory:
        started, steps = time.perf_counter(), 0
        while steps < 2 or time.perf_counter() < started + 0.3:
            step()
            steps += 1
    return memory.bytes


def measure_model(args: argparse.Namespace) -> dict:
    """Every case of the device: our model and the peers' that have its geometry, and the matrix product."""
    device, rows, absent, groups = args.device, [], {}, []
    for case in args.cases:
        models, reasons = make_models(case)
        absent |= reasons
        flops = flops_per_image(models[OURS]) * case.batch * (3 if case.training else 1)
        contestants, facts = {}, {}
        for name in models:
            shared = name == OURS or peers.PEERS[name][1]
            facts[name] = {"difference": difference(case, models[OURS], models[name]) if shared else None}
            if shared and not facts[name]["difference"] <= 1e-3:  # NaN too
                raise ValueError(
                    f"{case.title}: the logits of {name} differ from ours by {facts[name]['difference']:.1e} of the "
                    "largest, although the weights are the same; nothing was compared."
                )
        for name, model in tqdm(models.items(), desc=f"{case.title}: warming up", unit="model", delay=2, leave=False):
            if device.type == "cuda":
                before = torch.cuda.memory_allocated(device)
                torch.cuda.reset_peak_memory_stats(device)
            contestants[name] = stopwatch(make_step(case, model, device), device, args.least)
            if device.type == "cuda":
                facts[name]["memory_bytes"] = torch.cuda.max_memory_allocated(device) - before
        product, peak = matrix_product(device, torch.bfloat16 if case.bf16 else torch.float32)
        contestants[PEAK] = stopwatch(product, device, args.least)
        samples = interleave(contestants, args.rounds, case.title)
        compared = compare(samples)
        speed = peak / compared.pop(PEAK)["seconds"]
        groups.append({"case": case.title, "flops_per_image": flops // case.batch, "peak_flops_per_second": speed})
        for name, row in compared.items():
            row |= {"images_per_second": case.batch / row["seconds"], **facts[name]}
            row |= {"of_peak": faster(samples, name, PEAK) * flops / peak}
            rows.append({"case": case.title, "name": name, **row})
        del models, model, contestants
        gc.collect()  # before the next are made
    if device.type == "cpu":
        cases = {case.title: case for case in args.cases}
        jobs = [(peak_memory, (cases[row["case"]], row["name"])) for row in rows]
        for row, memory in zip(rows, in_fresh_processes(jobs, "Memory"), strict=True):
            row["memory_bytes"] = memory
    return {"rows": rows, "cases": groups, "absent": absent}


def show_model(result: dict) -> str:
    lines = []
    for group in result["cases"]:
        gflop, peak = group["flops_per_image"] / 1e9, group["peak_flops_per_second"] / 1e12
        lines.append(f"{group['case']} ({gflop:.3g} GFLOP, peak {peak:.3g} TFLOP/s)")
        for row in result["rows"]:
            if row["case"] == group["case"]:
                cells = [f"{row['seconds'] * 1e3:.1f}", f"{row['spread']:.0%}", number(row["images_per_second"])]
                cells += [ratio(row.get("vs_fastest_peer")), "" if row["name"] == OURS else ratio(row["ours_is"])]
                lines.append([row["name"], *cells, share(row["of_peak"]), megabytes(row["memory_bytes"])])
    header = ["", "ms", "spread", "images/s", "vs fastest", "ours is", "of peak", "MB"]
    notes = [
        "",
        "ms: median; spread: interquartile range over it; vs fastest: speed over that of the fastest peer; ours is: "
        "our speed over this one's; of peak: floating-point operations per second (GFLOP: of one picture, all tokens "
        "in all blocks, though ours leaves out what no logit needs) over those of a large matrix product; MB: most "
        "memory of model and computation.",
        *(f"Not compared, as it does not import here: {name} ({why})" for name, why in result["absent"].items()),
    ]
    return "\n".join([table(header, lines), *(textwrap.fill(note, 80, subsequent_indent="  ") for note in notes)])


def draw_model(result: dict) -> Figure:
    groups = {group["case"]: {} for group in result["cases"]}
    for row in result["rows"]:
        text = f"{number(row['images_per_second'])} images/s"
        groups[row["case"]][row["name"]] = row.get("vs_fastest_peer", 1.0), text
    return plots.plot_bars(groups, "speed over that of the fastest peer", reference=1.0)


# -- data --------------------------------------------------------------------------------------------------------------

DATA_BATCH = 256
DATA_CASES = {
    "crop, flip, normalise": {},
    "... and RandAugment": {"rand_augment_ops": 2, "rand_augment_magnitude": 5.0},
    "... and mixup": {"mixup_alpha": 1.0, "num_labels": 10},
}


def random_pictures(count: int, device: torch.device) -> DecodedImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return DecodedImages(images.to(device), torch.randint(10, (count,), generator=generator).to(device))


def batches(count: int, size: int):
    """Endless batches of indices, as a data loader hands them out."""
    while True:
        order = torch.randperm(count)
        yield from (order[start : start + size].tolist() for start in range(0, count - size + 1, size))


def our_data_path(pictures: DecodedImages, settings: dict) -> Callable[[], object]:
    augmentation = Augmentation(MEAN, STD, crop_padding=4, horizontal_flip=0.5, **settings)
    indices, steps = batches(len(pictures), DATA_BATCH), itertools.count()

    def step():
        batch = collate(pictures.__getitems__(next(indices)))
        return augmentation.with_labels(batch["pixel_values"], batch["labels"], next(steps), 0)

    return step


def torchvision_data_path(pictures: DecodedImages, settings: dict) -> Callable[[], object]:
    """The same with torchvision: picture by picture, as its users write it; magnitude 15 of 30 is ours of 5 of 10."""
    transforms = peers.MODULES["torchvision"].transforms
    augment = [transforms.RandAugment(settings["rand_augment_ops"], 15)] if "rand_augment_ops" in settings else []
    each = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            *augment,
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    from torchvision.transforms import v2

    mixup = v2.MixUp(num_classes=10) if "mixup_alpha" in settings else None
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pictures.images.cpu()]
    labels, indices = pictures.labels.cpu(), batches(len(pictures), DATA_BATCH)

    def step():
        index = next(indices)
        batch = torch.stack([each(images[i]) for i in index]), labels[index]
        return batch if mixup is None else mixup(*batch)

    return step


def measure_data(args: argparse.Namespace) -> dict:
    """Batches from bytes in memory to normalised floats, on one core or on the GPU; the share of a training step."""
    pictures = random_pictures(4 * DATA_BATCH, args.device)
    case = Case("", "showcase", DATA_BATCH, training=True, bf16=args.device.type == "cuda")
    rows = []
    with one_thread():
        train = stopwatch(make_step(case, make_model(case, OURS), args.device), args.device, args.least)
        for title, settings in DATA_CASES.items():
            contestants = {OURS: stopwatch(our_data_path(pictures, settings), args.device, args.least)}
            if "torchvision" in peers.MODULES:
                step = torchvision_data_path(pictures, settings)
                contestants["torchvision"] = stopwatch(step, torch.device("cpu"), args.least)
            samples = interleave({**contestants, "step": train}, args.rounds, title)
            for name, row in compare({name: samples[name] for name in contestants}).items():
                row |= {"images_per_second": DATA_BATCH / row["seconds"]}
                row |= {"share_of_step": 1 / (1 + faster(samples, name, "step"))}
                rows.append({"case": title, "name": name, **row})
        inspection = measure_inspection(args.dataset_name or DIGITS)
    return {"rows": rows, "inspection": inspection}


def measure_inspection(dataset_name: str) -> dict:
    """Seconds that a run's look at its data takes: a fingerprint at every start, all else in a dry run."""
    splits = load_splits(dataset_name, make_processor(SHOWCASE.config))
    seconds = []
    for look in (fingerprint, inspect_splits):
        start = time.perf_counter()
        look(splits)
        seconds.append(time.perf_counter() - start)
    images = len(splits.train) + len(splits.validation) + len(splits.test)
    return {"dataset": dataset_name, "images": images, "fingerprint_seconds": seconds[0], "seconds": seconds[1]}


def show_data(result: dict) -> str:
    lines, title = [], None
    for row in result["rows"]:
        if row["case"] != title:
            title = row["case"]
            lines.append(title)
        own = row["name"] == OURS
        cells = [number(row["images_per_second"]), f"{row['spread']:.0%}", "" if own else ratio(row["ours_is"])]
        lines.append([row["name"], *cells, share(row["share_of_step"])])
    text = f"{DATA_BATCH} pictures of 32 x 32; one core, or the GPU if it is the device\n" + table(
        ["", "images/s", "spread", "ours is", "of a training step"], lines
    )
    look = result["inspection"]
    return text + (
        f"\n\n{look['dataset']}, {look['images']:,} images: fingerprint {number(look['fingerprint_seconds'])} s, "
        f"inspection {number(look['seconds'])} s"
    )


def draw_data(result: dict) -> Figure:
    groups = {row["case"]: {} for row in result["rows"]}
    for row in result["rows"]:
        groups[row["case"]][row["name"]] = row["images_per_second"], f"{row['images_per_second']:,.0f}"
    return plots.plot_bars(groups, "images per second")


# -- trainer -----------------------------------------------------------------------------------------------------------

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


def trainer_seconds(config: ViTScratchConfig, pictures: DecodedImages, steps: int, device: torch.device) -> float:
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
            train_dataset=pictures,
            callbacks=[times],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    warm = len(times.ends) // 4
    return (times.ends[-1] - times.ends[warm]) / (len(times.ends) - 1 - warm)


def bare_seconds(config: ViTScratchConfig, pictures: DecodedImages, steps: int, device: torch.device) -> float:
    """Seconds per step of the shortest loop that computes the same: gather, augment, forward, backward, clip, AdamW."""
    model = ViTScratchForImageClassification(config).to(device).train()
    with tempfile.TemporaryDirectory() as folder:
        groups = parameter_groups(model, ImageTrainingArguments(output_dir=folder, use_cpu=device.type == "cpu"))
    optimizer = torch.optim.AdamW(groups, fused=True)
    augmentation, warm = Augmentation(MEAN, STD, crop_padding=4, horizontal_flip=0.5), steps // 4
    for step, indices in enumerate(itertools.islice(batches(len(pictures), TRAINER_BATCH), steps)):
        if step == warm:
            synchronise(device)
            start = time.perf_counter()
        batch = pictures.__getitems__(indices)
        images = augmentation(batch["pixel_values"], step, 0)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(images, labels=batch["labels"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    synchronise(device)
    return (time.perf_counter() - start) / (steps - warm)


def measure_trainer(args: argparse.Namespace) -> dict:
    """Trainer against a bare loop, on the same model and data."""
    pictures, rows = random_pictures(16 * TRAINER_BATCH, args.device), []
    for title, fields in TRAINER_CASES.items():
        work = ViTScratchConfig.preset("showcase", **fields), pictures, args.steps, args.device
        contestants = {"bare": partial(bare_seconds, *work), "trainer": partial(trainer_seconds, *work)}
        samples = interleave(contestants, args.rounds, f"Trainer, {title}")
        bare, trainer = (np.array(samples[name]) for name in ("bare", "trainer"))
        row = {f"{name}_seconds": float(np.median(values)) for name, values in (("bare", bare), ("trainer", trainer))}
        cost = {"cost_seconds": float(np.median(trainer - bare)), "cost_share": float(np.median(trainer / bare - 1))}
        rows.append({"case": title, **row, **cost, "samples": samples})
    return {"rows": rows}


def show_trainer(result: dict) -> str:
    lines = [
        [row["case"]]
        + [f"{row[key] * 1e3:.2f} ms" for key in ("bare_seconds", "trainer_seconds", "cost_seconds")]
        + [f"{row['cost_share']:.0%}"]
        for row in result["rows"]
    ]
    return f"A training step, batch {TRAINER_BATCH}\n" + table(
        ["", "bare loop", "ImageTrainer", "cost of it", "of the step"], lines
    )


def draw_trainer(result: dict) -> Figure:
    names = {"bare loop": "bare_seconds", "ImageTrainer": "trainer_seconds"}
    groups = {
        row["case"]: {name: (row[key] * 1e3, f"{row[key] * 1e3:.2f}") for name, key in names.items()}
        for row in result["rows"]
    }
    return plots.plot_bars(groups, "ms per step")


# -- memory ------------------------------------------------------------------------------------------------------------


def save_random(preset: str, folder: Path) -> int:
    """Save a model with random weights, for us and for transformers; its number of parameters."""
    with torch.device("meta"):
        model = ViTScratchForImageClassification(ViTScratchConfig.preset(preset))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.02, 0.02)
    model.save_pretrained(folder / OURS)
    export_checkpoint(model, "transformers", folder / "transformers")
    return model.num_parameters()


def load(name: str, folder: Path) -> dict:
    """Seconds and most anonymous memory of `from_pretrained`; and what the process has in all once it used the model.

    transformers maps the file into memory instead of copying it, so that its pages are the system's to drop.
    """
    model_class = ViTScratchForImageClassification if name == OURS else transformers.ViTForImageClassification
    transformers.utils.logging.disable_progress_bar()
    before = memory_now("VmRSS")
    with PeakMemory() as memory:
        start = time.perf_counter()
        model = model_class.from_pretrained(folder / name)
        seconds = time.perf_counter() - start
    config = model.config
    size = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    with torch.inference_mode():
        model(torch.zeros(1, config.num_channels, *size))
    resident = None if before is None else memory_now("VmRSS") - before
    return {"name": name, "seconds": seconds, "memory_bytes": memory.bytes, "resident_bytes": resident}


def measure_memory(args: argparse.Namespace) -> dict:
    """Load a large model from disk, each time in a fresh process."""
    with torch.device("meta"):
        size = 4 * ViTScratchForImageClassification(ViTScratchConfig.preset(args.large)).num_parameters()
    with tempfile.TemporaryDirectory() as temporary:
        folder, free = Path(temporary), shutil.disk_usage(temporary).free
        if free < 2.1 * size:
            raise ValueError(
                f"{temporary} has {free / 1e9:.1f} GB free, but two models take {2 * size / 1e9:.1f} GB; name another "
                "folder in TMPDIR."
            )
        jobs = [(save_random, (args.large, folder)), *((load, (name, folder)) for name in (OURS, "transformers"))]
        _, *rows = in_fresh_processes(jobs, f"Loading {args.large}")
    for row in rows:
        row["of_size"] = None if row["memory_bytes"] is None else row["memory_bytes"] / size
    return {"rows": rows, "preset": args.large, "parameters": size // 4, "float32_bytes": size}


def show_memory(result: dict) -> str:
    lines = []
    for row in result["rows"]:
        anonymous, resident = megabytes(row["memory_bytes"]), megabytes(row["resident_bytes"])
        lines.append([row["name"], f"{row['seconds']:.1f} s", anonymous, ratio(row["of_size"]), resident])
    size = f"{result['parameters']:,} parameters, {megabytes(result['float32_bytes'])} MB in float32"
    header = ["from_pretrained", "time", "most anonymous MB", "of its size", "MB in use"]
    note = "in use: after an inference, with the pages of the file, which is mapped into memory"
    return f"{result['preset']}, {size}\n{table(header, lines)}\n\n{textwrap.fill(note, 80)}"


def draw_memory(result: dict) -> Figure:
    bars = {row["name"]: (row["of_size"] or 0, ratio(row["of_size"])) for row in result["rows"]}
    title = f"Loading {result['preset']}, {result['parameters']:,} parameters"
    return plots.plot_bars({title: bars}, "most anonymous memory over the size in float32", reference=1.0)


# -- scale -------------------------------------------------------------------------------------------------------------

ARRANGEMENTS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread": (2, 1)}


def train_in_processes(processes: int, threads: int, steps: int) -> float:
    """Seconds per picture of training the showcase model, 64 pictures per process (DistributedDataParallel, gloo)."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool,
    ):
        meeting = f"file://{folder}/meeting"
        jobs = [pool.submit(_train, rank, processes, threads, steps, meeting) for rank in range(processes)]
        return max(job.result() for job in jobs) / (processes * SHOWCASE.batch)


def _train(rank: int, processes: int, threads: int, steps: int, meeting: str) -> float:
    """Seconds per step of one of several processes."""
    torch.set_num_threads(threads)
    model = make_model(SHOWCASE, OURS)
    if processes > 1:
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
        model = torch.nn.parallel.DistributedDataParallel(model)
    step = make_step(SHOWCASE, model, torch.device("cpu"))
    for _ in range(3):
        step()
    if processes > 1:
        torch.distributed.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if processes > 1:
        torch.distributed.barrier()
    seconds = (time.perf_counter() - start) / steps
    if processes > 1:
        torch.distributed.destroy_process_group()
    return seconds


def measure_scale(args: argparse.Namespace) -> dict:
    """Speed and memory against batch size (training), image size (inference) and processes (training)."""
    series = {
        "pictures per batch": {
            batch: Case("showcase, training", "showcase", batch, training=True) for batch in args.batch_sizes
        },
        "pixels a side": {
            size: Case("ViT-Ti/16, inference, batch 4", "tiny", 4, fields={"image_size": size})
            for size in args.image_sizes
        },
    }
    rows, jobs = [], []
    for axis, cases in series.items():
        product, peak = matrix_product(args.device, torch.float32)
        contestants = {PEAK: stopwatch(product, args.device, args.least)}
        for x, case in cases.items():
            step = make_step(case, make_model(case, OURS), args.device)
            contestants[x] = stopwatch(step, args.device, args.least)
        samples = interleave(contestants, args.rounds, f"Scale, {axis}")
        for x, case in cases.items():
            flops = flops_per_image(make_model(case, OURS)) * (3 if case.training else 1)
            of_peak = faster(samples, x, PEAK) * flops * case.batch / peak
            speed = case.batch / float(np.median(samples[x]))
            tokens = case.config.num_prefix_tokens + math.prod(case.config.grid_hw)
            row = {"axis": axis, "x": x, "work": case.title, "tokens": tokens, "flops_per_image": flops}
            rows.append({**row, "images_per_second": speed, "of_peak": of_peak, "samples": samples[x]})
            jobs.append((peak_memory, (case, OURS)))
    if args.device.type == "cpu":
        for row, memory in zip(rows, in_fresh_processes(jobs, "Memory"), strict=True):
            row["memory_bytes"] = memory
        contestants = {name: partial(train_in_processes, *work, args.steps) for name, work in ARRANGEMENTS.items()}
        samples = interleave(contestants, args.process_rounds, "Scale, processes")
        for name, values in samples.items():
            row = {"axis": "processes", "x": name, "work": f"{SHOWCASE.title} per process", "samples": values}
            rows.append({**row, "images_per_second": 1 / float(np.median(values))})
    return {"rows": rows}


def show_scale(result: dict) -> str:
    lines, axis = [], None
    for row in result["rows"]:
        if row["axis"] != axis:
            axis = row["axis"]
            lines.append(row["work"])
        name = row["x"] if axis == "processes" else f"{row['x']} {axis}"
        gflop = f"{row['flops_per_image'] / 1e9:.3g}" if "flops_per_image" in row else ""
        speed, memory = number(row["images_per_second"]), megabytes(row.get("memory_bytes"))
        lines.append([name, str(row.get("tokens", "")), gflop, speed, share(row.get("of_peak")), memory])
    return table(["", "tokens", "GFLOP each", "images/s", "of peak", "MB"], lines)


def draw_scale(result: dict) -> Figure:
    panels = {}
    for row in result["rows"]:
        panel = panels.setdefault(row["axis"], {"x": [], "images/s": [], "MB": []})
        panel["x"].append(row["x"])
        panel["images/s"].append(row["images_per_second"])
        panel["MB"].append(row["memory_bytes"] / 1e6 if row.get("memory_bytes") else None)
    return plots.plot_scaling(panels)


# -- race --------------------------------------------------------------------------------------------------------------


def run_recipe(name: str, args: argparse.Namespace) -> Path:
    """The folder of a finished run of a recipe: found, continued, or made. Its name follows from what is run.

    Raises:
        ValueError: The run failed.
    """
    import finetune  # it imports transformers, which must come after `peers`

    recipe = RECIPES / RACE[name]
    options = ["--dataset_name", args.dataset_name, "--use_cpu", str(args.device.type == "cpu"), *args.race_options]
    digest = hashlib.sha256(json.dumps([recipe.read_text(), *options]).encode()).hexdigest()[:8]
    folder = args.output / "race" / f"{recipe.stem}-{digest}"
    if (folder / "metrics.json").is_file():
        cli.say(PROGRAM, f"{name}: {folder} is there already.")
        return folder
    started = checkpoints.last_good_checkpoint(folder)[0] is not None
    go_on = ["--resume_from_checkpoint", "last"] if started else ["--overwrite_output_dir", "True"]
    cli.say(PROGRAM, f"{name}: {recipe.name}")
    with contextlib.redirect_stdout(sys.stderr):
        status = finetune.main([str(recipe), *options, "--output_dir", str(folder), *go_on])
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise ValueError(f"{recipe.name} failed.")
    return folder


def measure_race(args: argparse.Namespace) -> dict:
    """Train by both recipes, on one core (or the GPU), and compare by time of training, evaluation left out."""
    args.dataset_name = args.dataset_name or default_dataset()
    with one_thread():
        folders = {name: run_recipe(name, args) for name in RACE}
    column = "train_cpu_seconds" if args.device.type == "cpu" else "train_seconds"
    rows, curves = [], {}
    for name, folder in folders.items():
        metrics = json.loads((folder / "metrics.json").read_text())
        history = plots.read_history(folder)
        known = np.isfinite(history["eval_accuracy"])
        seconds, accuracy = (history[key][known].tolist() for key in (column, "eval_accuracy"))
        curves[name] = {"seconds": seconds, "accuracy": accuracy}
        row = {"name": name, "recipe": RACE[name], "dataset": metrics["dataset"]["name"]}
        row |= {"epochs": metrics["training"]["epochs"], "seconds": metrics["time"][column]}
        rows.append({**row, "parameters": metrics["model"]["parameters"], "accuracy": metrics["test"]["accuracy"]})
    goal = max(curves["teaching protocol"]["accuracy"])
    for row in rows:
        curve = curves[row["name"]]
        there = [seconds for seconds, accuracy in zip(*curve.values(), strict=True) if accuracy >= goal]
        row["seconds_to_goal"] = there[0] if there else None
    return {"rows": rows, "curves": curves, "goal": goal, "unit": "CPU seconds" if "cpu" in column else "seconds"}


def show_race(result: dict) -> str:
    lines = []
    for row in result["rows"]:
        to_goal = "never" if row["seconds_to_goal"] is None else f"{row['seconds_to_goal']:,.0f}"
        cells = [f"{row['epochs']:g}", f"{row['accuracy']:.2%}", f"{row['seconds']:,.0f}", to_goal]
        lines.append([row["name"], f"{row['parameters']:,}", *cells])
    header = ["", "parameters", "epochs", "test", result["unit"], f"until {result['goal']:.2%}"]
    teaching, ours = result["rows"]
    text = (
        f"{teaching['dataset']}, one core or the GPU; {result['unit']} of training, without evaluation. The last "
        "column: until validation, after each epoch, gives the best accuracy of the teaching protocol."
    )
    if ours["seconds_to_goal"]:
        text += f" {OURS} is there {teaching['seconds_to_goal'] / ours['seconds_to_goal']:.1f} times sooner."
    return f"{textwrap.fill(text, 80)}\n\n{table(header, lines)}"


def draw_race(result: dict) -> Figure:
    return plots.plot_race(
        {name: (curve["seconds"], curve["accuracy"]) for name, curve in result["curves"].items()}, result["unit"]
    )


# -- the command -------------------------------------------------------------------------------------------------------

SECTIONS = {
    "model": (measure_model, show_model, draw_model),
    "data": (measure_data, show_data, draw_data),
    "trainer": (measure_trainer, show_trainer, draw_trainer),
    "memory": (measure_memory, show_memory, draw_memory),
    "scale": (measure_scale, show_scale, draw_scale),
    "race": (measure_race, show_race, draw_race),
}


def sections(text: str) -> list[str]:
    names = list(SECTIONS) if text == "all" else text.split(",")
    for name in names:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SECTIONS)}")
    return names


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, and the sizes that follow from them."""
    parser = cli.Parser(__doc__, f"{PROGRAM} [--sections SECTION,...] [--quick] [--option value ...]")
    what = parser.add_argument_group("what")
    what.add_argument("--sections", type=sections, metavar="SECTION,...", help="or 'all'; default: all but race")
    what.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    what.add_argument("--device", metavar="NAME", help="cpu or cuda; default: cuda if there is one")
    what.add_argument(
        "--dataset_name",
        metavar="NAME",
        help="of race, as in finetune.py, and inspected by data; default: CIFAR-10, offline digits; for data digits",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", type=Path, default=Path("runs/benchmark"), metavar="DIR", help="default: %(default)s"
    )
    output.add_argument("--json", action="store_true", help="JSON instead of tables")
    args = parser.parse_args(argv)
    args.sections = args.sections or [name for name in SECTIONS if name != "race"]
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] not in CASES:
        parser.error(f"--device ({device}) must be cpu or cuda")
    if device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device ({device}) is not there; use cpu")
    args.device = torch.device(device)
    args.cases = [case for case in CASES[args.device.type] if case.quick or not args.quick]
    args.rounds, args.least, args.steps, args.process_rounds = (3, 0.05, 30, 1) if args.quick else (15, 0.2, 100, 3)
    args.large = "base" if args.quick else "huge"
    args.batch_sizes = [1, 8, 64, 256] if args.quick else [1, 4, 16, 64, 256, 1024]
    args.image_sizes = [64, 224, 384] if args.quick else [64, 112, 160, 224, 320, 448, 640]
    tiny = ["--max_train_samples", "400", "--max_eval_samples", "200", "--num_train_epochs", "3"]
    args.race_options = tiny if args.quick else []
    return args


def environment(device: torch.device) -> dict:
    """Where this is measured."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"hardware": hardware(device), "cores": os.cpu_count(), "load": load, "versions": peers.versions()}


def headline(section: str, where: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    load = "" if where["load"] is None else f"; load before the start {where['load']:.1f} on {where['cores']} cores"
    return textwrap.fill(f"{section}: {where['hardware']}{load}; {versions}", 80)


def run(args: argparse.Namespace) -> int:
    """Measure and report each section; 1 if one could not be measured."""
    args.output.mkdir(parents=True, exist_ok=True)
    for library, reason in peers.REASONS.items():
        cli.say(PROGRAM, f"no {library} ({reason}); pip install -e '.[benchmark]' has it.")
    failed, results, where = False, {}, environment(args.device)
    for section in args.sections:
        measure, show, draw = SECTIONS[section]
        try:
            result = {"environment": where, "quick": args.quick, **measure(args)}
        except (ValueError, OSError) as error:
            cli.say(PROGRAM, f"{section}: {error}")
            failed = True
            continue
        except KeyboardInterrupt:
            cli.say(PROGRAM, "stopped; a race goes on where it was when it is started again.")
            return 130
        results[section] = result
        (args.output / f"{section}.json").write_text(json.dumps(result, indent=1) + "\n")
        plots.save_figure(draw(result), args.output / section)
        if not args.json:
            print(f"{headline(section, where)}\n\n{show(result)}\n", flush=True)
    if args.json:
        print(json.dumps(results, indent=1))
    cli.say(PROGRAM, f"numbers and charts are in {args.output}.")
    return int(failed)


def main(argv: list[str] | None = None) -> int:
    return cli.run(PROGRAM, run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
