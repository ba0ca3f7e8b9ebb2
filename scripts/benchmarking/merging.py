"""Token merging: accuracy against speed of the packaged model, and speed of larger ones."""

import argparse
import math
import textwrap
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure

from modeling_vit_scratch import ViTScratchConfig, plots
from modeling_vit_scratch.conversion import PACKAGED_MODEL
from modeling_vit_scratch.data.cuts import Split
from modeling_vit_scratch.data.sources import default_dataset
from modeling_vit_scratch.evaluation import Predictor, merge_tokens
from modeling_vit_scratch.evaluation.inference import Answers, find_split, match_classes
from modeling_vit_scratch.evaluation.metrics import wilson_interval
from modeling_vit_scratch.evaluation.reports import compare
from modeling_vit_scratch.evaluation.tables import text_table

from .cases import Case, make_model
from .measuring import OURS, faster, interleave, number, one_thread, ratio, stopwatch, under_titles

PACKAGED, BATCH = "packaged model, 32 px, batch 64", 64
CASES = [
    Case("ViT-B/16, 224 px, batch 4", "base", 4, quick=False),
    Case("ViT-B/16, 384 px, batch 1", "base", 1, fields={"image_size": 384}, quick=False),
    Case("ViT-Ti/16, 224 px, batch 8", "tiny", 8),
]


def merged_a_block(config: ViTScratchConfig) -> list[int]:
    """Numbers of tokens: none, and each quarter of what would leave no patch after the last block, or half of all."""
    patches, blocks = math.prod(config.grid_hw), max(config.num_hidden_layers, 2)
    return sorted({quarters * patches // (4 * blocks) for quarters in range(5)})


def patches_left(config: ViTScratchConfig, r: int) -> int:
    """After the last block, of which each merges half of its patches at most."""
    left = math.prod(config.grid_hw)
    for _ in range(config.num_hidden_layers):
        left -= min(r, left // 2)
    return left


def speeds(title: str, model: torch.nn.Module, batch: int, args: argparse.Namespace) -> list[dict]:
    """A row for each number of merged tokens; one model computes all in turn."""
    config = model.config
    pixels = torch.randn(batch, config.num_channels, *config.image_hw, device=args.device)

    @torch.inference_mode()
    def step(r: int):
        merge_tokens(model, r)
        model(pixels)

    numbers = merged_a_block(config)
    contestants = {r: stopwatch(partial(step, r), args.device, args.least) for r in numbers}
    samples = interleave(contestants, args.rounds, title)
    return [
        {
            "case": title,
            "r": r,
            "patches_left": patches_left(config, r),
            "images_per_second": batch / float(np.median(samples[r])),
            "speed": faster(samples, r, 0),
            "samples": samples[r],
        }
        for r in numbers
    ]


def accuracies(answers: dict[object, Answers]) -> dict[object, dict]:
    """For each setting the accuracy, and its difference from the first one's, with 95 % intervals."""
    found, first = {}, next(iter(answers.values()))
    for name, said in answers.items():
        compared = compare(said, first)
        right = int((said.probabilities.argmax(dim=1) == said.labels).sum())
        found[name] = {"accuracy": right / len(said.labels), "change": compared["difference"]}
        found[name] |= {"accuracy_interval": wilson_interval(right, len(said.labels))}
        found[name] |= {"change_interval": compared["difference_interval"]}
    return found


def find_images(predictor: Predictor, args: argparse.Namespace) -> tuple[Split | None, str]:
    """The test split, and a line that says of what accuracies are; or why there are none."""
    try:
        split = find_split(args.dataset_name or default_dataset(), [predictor], "test", max_samples=args.images)
        match_classes(split.class_names, predictor.class_names)
    except ValueError as error:
        return None, f"Accuracy was not measured: {error}"
    return split, f"Accuracy on {len(split.records):,} images of {split.dataset}, test."


def cells_of_accuracy(row: dict, first: bool) -> list[str]:
    """Accuracy, change and interval as a table's cells, empty where they were not measured."""
    if "accuracy" not in row:
        return ["", "", ""]
    low, high = row["change_interval"]
    change = ["", ""] if first else [f"{row['change']:+.2%}", f"{low:+.2%} to {high:+.2%}"]
    return [f"{row['accuracy']:.2%}", *change]


def measure(args: argparse.Namespace) -> dict:
    """Speed, on one core or on the GPU, of a model with random weights and of the packaged one; of this, accuracy."""
    rows = []
    with one_thread():
        predictor = Predictor(str(PACKAGED_MODEL), str(args.device))
        rows += speeds(PACKAGED, predictor.model, BATCH, args)
        for case in CASES:
            if case.quick == args.quick:
                rows += speeds(case.title, make_model(case, OURS).to(args.device), case.batch, args)
        split, note = find_images(predictor, args)
        if split is not None:
            answers, packaged = {}, {row["r"]: row for row in rows if row["case"] == PACKAGED}
            for r in packaged:
                merge_tokens(predictor.model, r)
                answers[r] = predictor.answers(split.records, split.class_names)
            for r, found in accuracies(answers).items():
                packaged[r] |= found
    return {"rows": rows, "note": note}


def show(result: dict) -> str:
    def cells(row: dict) -> list[str]:
        speed = [str(row["r"]), str(row["patches_left"]), number(row["images_per_second"]), ratio(row["speed"])]
        return [*speed, *cells_of_accuracy(row, first=row["r"] == 0)]

    lines = under_titles(result["rows"], cells)
    header = ["merged a block", "left", "images/s", "speed", "accuracy", "change", "95 %"]
    notes = f"left: patches after the last block; speed: over that without merging, in turns. {result['note']}"
    return f"{text_table([header, *lines])}\n\n{textwrap.fill(notes, 80)}"


def draw(result: dict) -> Figure:
    """Accuracy against speed; where it is not known, speed alone."""
    known = [row for row in result["rows"] if "accuracy" in row]
    if known:
        points = {row["r"]: (row["images_per_second"], row["accuracy"], row["accuracy_interval"]) for row in known}
        return plots.plot_tradeoff(points, f"images per second ({PACKAGED})")
    groups = {row["case"]: {} for row in result["rows"]}
    for row in result["rows"]:
        groups[row["case"]][f"{row['r']} a block"] = row["speed"], ratio(row["speed"])
    return plots.plot_bars(groups, "speed over that without merging", reference=1.0)
