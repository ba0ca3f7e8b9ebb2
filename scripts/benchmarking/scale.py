"""Time and memory against images per batch, tokens, depth and processes, and how fast they grow."""

import argparse
import math
import textwrap
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import numpy as np
import torch
from matplotlib.figure import Figure

from modeling_vit_scratch import plots
from modeling_vit_scratch.evaluation.tables import text_table
from modeling_vit_scratch.training.models import flops_per_image

from .cases import SHOWCASE, Case, make_model, make_step, peak_memory
from .measuring import (
    OURS,
    PEAK,
    faster,
    in_fresh_processes,
    interleave,
    matrix_product,
    megabytes,
    number,
    share,
    stopwatch,
    together,
)

# What time and memory are said to grow with, by what is varied.
AGAINST = {"images per batch": "images", "pixels a side": "tokens", "blocks": "blocks"}
ARRANGEMENTS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread": (2, 1)}


def train_in_processes(processes: int, threads: int, steps: int) -> float:
    """Seconds per step of training the showcase model on 64 images, shared out (DistributedDataParallel, gloo)."""
    return max(together(processes, _train, processes, threads, steps))


def _train(processes: int, threads: int, steps: int) -> float:
    """Seconds per step of one of several processes."""
    torch.set_num_threads(threads)
    case = replace(SHOWCASE, batch=SHOWCASE.batch // processes)
    model = make_model(case, OURS)
    if processes > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    step = make_step(case, model, torch.device("cpu"))
    for _ in range(3):
        step()
    if processes > 1:
        torch.distributed.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if processes > 1:
        torch.distributed.barrier()
    return (time.perf_counter() - start) / steps


def power_law(x: Sequence[float], y: Sequence[float | None]) -> dict[str, float] | None:
    """y = factor * x ** exponent, by least squares of the logarithms, on the upper half of x; None without 2 points.

    At small x, costs that do not grow (of a call, of the weights) hide how the others do.
    """
    points = sorted(zip(x, y, strict=True))[-max(math.ceil(len(x) / 2), 2) :]
    if len(points) < 2 or any(value is None for _, value in points):
        return None
    exponent, logarithm = np.polyfit(*np.log(points).T, 1).tolist()
    return {"exponent": exponent, "factor": math.exp(logarithm), "from": points[0][0], "to": points[-1][0]}


def growth(rows: list[dict]) -> dict[str, dict]:
    """For each axis of numbers, the power laws of "seconds" and "memory_bytes" in what `AGAINST` names."""
    laws = {}
    for axis, against in AGAINST.items():
        members = [row for row in rows if row["axis"] == axis]
        x = [row["tokens" if against == "tokens" else "x"] for row in members]
        fits = {name: power_law(x, [row.get(name) for row in members]) for name in ("seconds", "memory_bytes")}
        laws[axis] = {"against": against, **fits}
    return laws


def measure(args: argparse.Namespace) -> dict:
    """Time and memory against batch size (training), image size (inference), depth and processes (training)."""
    series = {
        "images per batch": {
            batch: Case("showcase, training", "showcase", batch, training=True) for batch in args.batch_sizes
        },
        "pixels a side": {
            size: Case("ViT-Ti/16, inference, batch 4", "tiny", 4, fields={"image_size": size})
            for size in args.image_sizes
        },
        "blocks": {depth: replace(SHOWCASE, fields={"num_hidden_layers": depth}) for depth in args.depths},
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
            # On "meta" nothing is computed: attention maps of 4,097 tokens would take gigabytes.
            flops = flops_per_image(make_model(case, OURS).to("meta")) * (3 if case.training else 1)
            of_peak = faster(samples, x, PEAK) * flops * case.batch / peak
            seconds = float(np.median(samples[x]))
            tokens = case.config.num_prefix_tokens + math.prod(case.config.grid_hw)
            row = {"axis": axis, "x": x, "work": case.title, "tokens": tokens, "flops_per_image": flops}
            row |= {"seconds": seconds, "images_per_second": case.batch / seconds, "of_peak": of_peak}
            rows.append({**row, "samples": samples[x]})
            jobs.append((peak_memory, (case, OURS)))
    if args.device.type == "cpu":
        for row, memory in zip(rows, in_fresh_processes(jobs, "Memory"), strict=True):
            row["memory_bytes"] = memory
        contestants = {name: partial(train_in_processes, *work, args.steps) for name, work in ARRANGEMENTS.items()}
        samples = interleave(contestants, args.process_rounds, "Scale, processes")
        first = next(iter(contestants), None)
        for name, values in samples.items():
            seconds, speed = float(np.median(values)), faster(samples, name, first)
            row = {"axis": "processes", "x": name, "work": f"{SHOWCASE.title} in all", "seconds": seconds}
            row |= {"images_per_second": SHOWCASE.batch / seconds, "speed": speed}
            rows.append({**row, "samples": values})
    return {"rows": rows, "growth": growth(rows)}


def title(axis: str, rows: list[dict], law: dict | None) -> str:
    """What is measured on an axis and, in a second line, how it grows."""
    if axis == "processes":
        speeds = ", ".join(f"{row['speed']:.2f}" for row in rows[1:])
        return f"{rows[0]['work']}\ntimes as fast as {rows[0]['x']}: {speeds}"
    seconds, memory, x = law["seconds"], law["memory_bytes"], law["against"]
    if seconds is None:
        return rows[0]["work"]
    memory = f", memory as {x}^{memory['exponent']:.2f}" if memory else ""
    grow = f"seconds grow as {x}^{seconds['exponent']:.2f}{memory}"
    return f"{rows[0]['work']}\n{grow}, from {seconds['from']:,} to {seconds['to']:,} {x}"


def show(result: dict) -> str:
    lines = [["", "tokens", "GFLOP each", "seconds", "images/s", "of peak", "MB"]]
    for axis, members in groupby(result["rows"], key=lambda row: row["axis"]):
        rows = list(members)
        lines.append(title(axis, rows, result["growth"].get(axis)))
        for row in rows:
            name = row["x"] if axis == "processes" else f"{row['x']:,} {axis}"
            gflop = f"{row['flops_per_image'] / 1e9:.3g}" if "flops_per_image" in row else ""
            tokens = f"{row['tokens']:,}" if "tokens" in row else ""
            cells = [tokens, gflop, number(row["seconds"]), number(row["images_per_second"])]
            lines.append([name, *cells, share(row.get("of_peak")), megabytes(row.get("memory_bytes"))])
    note = (
        "seconds: of a batch. Powers are fitted (least squares of logarithms) to the upper half of each list, where "
        "costs that do not grow weigh little; the MB have those of the weights in them."
    )
    return f"{text_table(lines)}\n\n{textwrap.fill(note, 80)}"


def draw(result: dict) -> Figure:
    panels, laws = {}, {}
    for row in result["rows"]:
        law = result["growth"].get(row["axis"])
        name = law["against"] if law else row["axis"]
        panel = panels.setdefault(name, {"x": [], "seconds a batch": [], "MB": []})
        panel["x"].append(row["tokens"] if name == "tokens" else row["x"])
        panel["seconds a batch"].append(row["seconds"])
        panel["MB"].append(row["memory_bytes"] / 1e6 if row.get("memory_bytes") else None)
        if law:
            laws[name] = {
                quantity: (fit["exponent"], fit["factor"] / scale)
                for quantity, fit, scale in (("seconds a batch", law["seconds"], 1), ("MB", law["memory_bytes"], 1e6))
                if fit
            }
    return plots.plot_scaling(panels, laws)
