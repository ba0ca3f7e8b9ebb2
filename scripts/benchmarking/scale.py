"""Speed and memory against batch size, image size and processes."""

import argparse
import math
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

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
)

ARRANGEMENTS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread": (2, 1)}


def train_in_processes(processes: int, threads: int, steps: int) -> float:
    """Seconds per image of training the showcase model, 64 images per process (DistributedDataParallel, gloo)."""
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


def measure(args: argparse.Namespace) -> dict:
    """Speed and memory against batch size (training), image size (inference) and processes (training)."""
    series = {
        "images per batch": {
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


def show(result: dict) -> str:
    lines, axis = [], None
    for row in result["rows"]:
        if row["axis"] != axis:
            axis = row["axis"]
            lines.append(row["work"])
        name = row["x"] if axis == "processes" else f"{row['x']} {axis}"
        gflop = f"{row['flops_per_image'] / 1e9:.3g}" if "flops_per_image" in row else ""
        speed, memory = number(row["images_per_second"]), megabytes(row.get("memory_bytes"))
        lines.append([name, str(row.get("tokens", "")), gflop, speed, share(row.get("of_peak")), memory])
    return text_table([["", "tokens", "GFLOP each", "images/s", "of peak", "MB"], *lines])


def draw(result: dict) -> Figure:
    panels = {}
    for row in result["rows"]:
        panel = panels.setdefault(row["axis"], {"x": [], "images/s": [], "MB": []})
        panel["x"].append(row["x"])
        panel["images/s"].append(row["images_per_second"])
        panel["MB"].append(row["memory_bytes"] / 1e6 if row.get("memory_bytes") else None)
    return plots.plot_scaling(panels)
