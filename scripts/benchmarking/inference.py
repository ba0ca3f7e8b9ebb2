"""The ways of `load_for_inference`: their speed beside float32, and what they cost in accuracy."""

import argparse
import tempfile
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from modeling_vit_scratch import plots
from modeling_vit_scratch.conversion import PACKAGED_MODEL
from modeling_vit_scratch.evaluation import Predictor, load_for_inference
from modeling_vit_scratch.evaluation.devices import has_fast_bfloat16
from modeling_vit_scratch.evaluation.tables import text_table
from modeling_vit_scratch.training.models import make_processor

from . import peers
from .cases import Case, make_model, make_step
from .data import MEAN, STD
from .measuring import OURS, faster, interleave, number, one_thread, ratio, stopwatch, under_titles
from .merging import BATCH, PACKAGED, accuracies, cells_of_accuracy, find_images

SMALL = Case("ViT-Ti/16, 224 px, batch 1", "tiny", 1)
LARGE = Case("ViT-B/16, 224 px, batch 8", "base", 8)
FLOAT32 = "float32"
WAYS = {
    FLOAT32: {"dtype": "float32"},
    "float32, compiled": {"dtype": "float32", "compile": True},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, compiled": {"dtype": "bfloat16", "compile": True},
    "int8": {"quantize": "int8"},
    "int8, compiled": {"quantize": "int8", "compile": True},
}


def load_all(checkpoint: Path, args: argparse.Namespace) -> tuple[dict[str, Predictor], dict[str, str]]:
    """A predictor for each way that there is here, and why others are not."""
    found, reasons = {}, {}
    for name, options in tqdm(WAYS.items(), desc="Loading models", unit="model", delay=2, leave=False):
        if options.get("dtype") == "bfloat16" and not has_fast_bfloat16(args.device):
            reasons[name] = "this device has no fast units for it"
        elif options.get("compile") and args.quick:
            reasons[name] = "left out of quick runs"
        else:
            try:
                found[name] = load_for_inference(checkpoint, str(args.device), **options)
            except ValueError as error:
                reasons[name] = str(error)
    return found, reasons


def speeds(title: str, predictors: dict[str, Predictor], batch: int, args: argparse.Namespace, others: dict) -> dict:
    """A row for each predictor and each of `others`, functions to time, by name."""
    first = predictors[FLOAT32]
    pixels = torch.randint(256, (batch, first.config.num_channels, *first.image_hw), dtype=torch.uint8)
    steps = {name: partial(predictor.classify, pixels) for name, predictor in predictors.items()}
    contestants = {name: stopwatch(step, args.device, args.least) for name, step in (steps | others).items()}
    samples = interleave(contestants, args.rounds, title)
    return {
        name: {
            "case": title,
            "name": name,
            "computes_in": predictors[name].computes_in if name in predictors else name,
            "images_per_second": batch / float(np.median(samples[name])),
            "speed": faster(samples, name, FLOAT32),
            "samples": samples[name],
        }
        for name in contestants
    }


def measure(args: argparse.Namespace) -> dict:
    """Speed, on one core or the GPU, of the packaged model and of a large one; of the first, accuracy."""
    with one_thread(), tempfile.TemporaryDirectory() as temporary:
        predictors, reasons = load_all(PACKAGED_MODEL, args)
        packaged = speeds(PACKAGED, predictors, BATCH, args, {})
        split, note = find_images(predictors[FLOAT32], args)
        if split is not None:
            answers = {name: each.answers(split.records, split.class_names) for name, each in predictors.items()}
            for name, found in accuracies(answers).items():
                packaged[name] |= found
        case = SMALL if args.quick else LARGE
        model = make_model(case, OURS)
        model.save_pretrained(temporary)
        make_processor(case.config, MEAN, STD).save_pretrained(temporary)
        others = {}
        if "timm" in peers.MODULES:
            others["timm, float32"] = make_step(case, make_model(case, "timm"), args.device)
        predictors, more_reasons = load_all(Path(temporary), args)
        large = speeds(case.title, predictors, case.batch, args, others)
    return {"rows": [*packaged.values(), *large.values()], "absent": reasons | more_reasons, "note": note}


def show(result: dict) -> str:
    def cells(row: dict) -> list[str]:
        speed = [row["name"], number(row["images_per_second"]), ratio(row["speed"])]
        return [*speed, *cells_of_accuracy(row, first=row["name"] == FLOAT32)]

    table = text_table([["", "images/s", "speed", "accuracy", "change", "95 %"], *under_titles(result["rows"], cells)])
    int8 = {row["computes_in"] for row in result["rows"] if row["name"] == "int8"}
    notes = [
        f"speed: over that of float32, in turns; ours from bytes of pixels on. {result['note']}",
        *(f"int8: {words}" for words in sorted(int8)),
        *(f"Not measured: {name} ({why})" for name, why in result["absent"].items()),
    ]
    return "\n".join([table, "", *(textwrap.fill(note, 80, subsequent_indent="  ") for note in notes)])


def draw(result: dict) -> Figure:
    groups = {row["case"]: {} for row in result["rows"]}
    for row in result["rows"]:
        cost = f", accuracy {100 * row['change']:+.2f} points" if "change" in row and row["name"] != FLOAT32 else ""
        groups[row["case"]][row["name"]] = row["speed"], ratio(row["speed"]) + cost
    return plots.plot_bars(groups, "speed over that of float32", reference=1.0)
