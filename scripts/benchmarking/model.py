"""Inference and training step, against the libraries that import here."""

import argparse
import gc
import textwrap

import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from modeling_vit_scratch import plots
from modeling_vit_scratch.evaluation.tables import text_table
from modeling_vit_scratch.training.models import flops_per_image

from . import peers
from .cases import difference, make_models, make_step, peak_memory
from .measuring import (
    OURS,
    PEAK,
    compare,
    faster,
    in_fresh_processes,
    interleave,
    matrix_product,
    megabytes,
    number,
    ratio,
    share,
    stopwatch,
)


def measure(args: argparse.Namespace) -> dict:
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


def show(result: dict) -> str:
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
        "our speed over this one's; of peak: floating-point operations per second (GFLOP: of one image, all tokens "
        "in all blocks, though ours leaves out what no logit needs) over those of a large matrix product; MB: most "
        "memory of model and computation.",
        *(f"Not compared, as it does not import here: {name} ({why})" for name, why in result["absent"].items()),
    ]
    notes = (textwrap.fill(note, 80, subsequent_indent="  ") for note in notes)
    return "\n".join([text_table([header, *lines]), *notes])


def draw(result: dict) -> Figure:
    groups = {group["case"]: {} for group in result["cases"]}
    for row in result["rows"]:
        text = f"{number(row['images_per_second'])} images/s"
        groups[row["case"]][row["name"]] = row.get("vs_fastest_peer", 1.0), text
    return plots.plot_bars(groups, "speed over that of the fastest peer", reference=1.0)
