"""Where the time of a training step goes: its parts, beside timm's, and the operators that take it."""

import argparse
import gc
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from modeling_vit_scratch import plots
from modeling_vit_scratch.data import Augmentation
from modeling_vit_scratch.evaluation.tables import text_table

from . import peers
from .cases import SHOWCASE, Case, logits_of, make_model
from .data import MEAN, STD
from .measuring import OURS, one_thread, ratio, share, synchronise, under_titles

STEP_CASES = [
    SHOWCASE,
    Case("ViT-Ti/16, training, batch 8", "tiny", 8, training=True),
    Case("ViT-B/16, training, batch 2", "base", 2, training=True, quick=False),
]
PARTS = ("data", "forward", "backward", "clipping", "optimizer")
# Operators by what they do; the others go by their own names.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "scaled_dot_product", "convolution", "flash_attention")
LEAST = 0.03


def parts_of_steps(case: Case, model: torch.nn.Module, device: torch.device) -> Iterator[dict[str, float]]:
    """Train for ever; of each step, the seconds that each of `PARTS` took."""
    config = case.config
    images = torch.randint(256, (case.batch, config.num_channels, *config.image_hw), dtype=torch.uint8, device=device)
    labels = torch.randint(config.num_labels, (case.batch,), device=device)
    augmentation = Augmentation(MEAN, STD, crop_padding=4, horizontal_flip=0.5)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for step in range(1 << 30):
        times = [time.perf_counter()]

        def ended(times=times):
            synchronise(device)
            times.append(time.perf_counter())

        pixels = augmentation(images, step, 0)
        ended()
        loss = F.cross_entropy(logits_of(model(pixels)), labels)
        ended()
        loss.backward()
        ended()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        ended()
        optimizer.step()
        optimizer.zero_grad()
        ended()
        yield dict(zip(PARTS, np.diff(times).tolist(), strict=True))


def operators(steps: Iterator[dict[str, float]], count: int) -> dict[str, float]:
    """The share of each operator in the time of `count` steps, matrix products together, the largest first."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for _ in range(count):
            next(steps)
    seconds = defaultdict(float)
    for event in record.key_averages():
        name = event.key.removeprefix("aten::")
        seconds["matrix products" if any(word in name for word in PRODUCTS) else name] += event.self_cpu_time_total
    total = sum(seconds.values())
    return {name: spent / total for name, spent in sorted(seconds.items(), key=lambda item: -item[1])}


def measure(args: argparse.Namespace) -> dict:
    """Parts of a step, ours and timm's taking turns, on one core or on the GPU; and, on the CPU, its operators."""
    rows, device = [], args.device
    names = [OURS, "timm"] if "timm" in peers.MODULES else [OURS]
    for case in (case for case in STEP_CASES if case.quick or not args.quick):
        with one_thread():
            steps = {name: parts_of_steps(case, make_model(case, name), device) for name in names}
            samples = {name: [] for name in names}
            for turn in range(args.rounds + 1):
                for name in names[:: 1 if turn % 2 else -1]:
                    found = next(steps[name])
                    if turn:  # the first one warms up
                        samples[name].append(found)
            by_operator = operators(steps[OURS], max(args.rounds // 5, 1)) if device.type == "cpu" else {}
        for name in names:
            parts = {part: [step[part] for step in samples[name]] for part in PARTS}
            whole = np.sum([parts[part] for part in PARTS], axis=0)
            row = {"case": case.title, "name": name, "seconds": float(np.median(whole)), "samples": whole.tolist()}
            row["parts"] = {part: float(np.median(values)) for part, values in parts.items()}
            row["operators"] = by_operator if name == OURS else {}
            rows.append(row)
        for row in rows[-len(names) :]:
            row["ours_is"] = float(np.median(np.divide(row["samples"], rows[-len(names)]["samples"])))
        del steps
        gc.collect()
    return {"rows": rows}


def show(result: dict) -> str:
    def cells(row: dict) -> list[str]:
        parts = [f"{seconds * 1e3:,.1f}" for seconds in (*row["parts"].values(), row["seconds"])]
        return [row["name"], *parts, "" if row["name"] == OURS else ratio(row["ours_is"])]

    lines = under_titles(result["rows"], cells)
    table = text_table([["", *PARTS, "step", "ours is"], *lines])
    notes = []
    for row in result["rows"]:
        large = [f"{name} {share(part)}" for name, part in row["operators"].items() if part >= LEAST]
        if large:
            notes.append(f"Operators of {row['case']}: {', '.join(large)}; each other less than {LEAST:.0%}.")
    text = "ms of a step's parts, medians; float32, one core; ours is: our speed over theirs"
    return "\n".join([text, table, "", *(textwrap.fill(note, 80, subsequent_indent="  ") for note in notes)])


def draw(result: dict) -> Figure:
    groups = {}
    for row in (row for row in result["rows"] if row["name"] == OURS):
        whole = sum(row["parts"].values())
        groups[row["case"]] = {
            part: (100 * spent / whole, f"{spent / whole:.0%}") for part, spent in row["parts"].items()
        }
    return plots.plot_bars(groups, "% of a step")
