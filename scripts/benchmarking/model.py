"""Inference and training step, against the libraries that import here."""

import argparse
import textwrap

import torch
from matplotlib.figure import Figure

from modeling_vit_scratch import plots
from modeling_vit_scratch.evaluation.tables import text_table
from modeling_vit_scratch.training.models import flops_per_image

from . import peers
from .cases import Case, difference, make_models, make_step, peak_memory
from .measuring import (
    OURS,
    PEAK,
    compare,
    faster,
    in_fresh_processes,
    interleave,
    lowest_and_highest,
    matrix_product,
    megabytes,
    number,
    ratio,
    share,
    stopwatch,
)


def measure_case(case: Case, device: torch.device, rounds: int, least: float, seed: int) -> dict:
    """Seconds of our model, the peers' that have its geometry, and the matrix product, in turns; in this process.

    Raises:
        ValueError: A peer with our weights computes something else.
    """
    models, absent = make_models(case)
    contestants, facts = {}, {}
    for name, other in models.items():
        shared = name == OURS or peers.PEERS[name][1]
        facts[name] = {"difference": difference(case, models[OURS], other) if shared else None}
        if shared and not facts[name]["difference"] <= 1e-3:  # NaN too
            raise ValueError(
                f"{case.title}: the logits of {name} differ from ours by {facts[name]['difference']:.1e} of the "
                "largest, although the weights are the same; nothing was compared."
            )
    for name, model in models.items():
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        contestants[name] = stopwatch(make_step(case, model, device), device, least)
        if device.type == "cuda":
            facts[name]["memory_bytes"] = torch.cuda.max_memory_allocated(device) - before
    product, peak = matrix_product(device, case.dtype)
    contestants[PEAK] = stopwatch(product, device, least)
    samples = interleave(contestants, rounds, None, seed)
    flops = flops_per_image(models[OURS]) * (3 if case.training else 1)
    return {"samples": samples, "facts": facts, "absent": absent, "peak_flops": peak, "flops_per_image": flops}


def measure(args: argparse.Namespace) -> dict:
    """Every case of the device, each in several fresh processes: where a weight lies in memory moves a ratio."""
    device, rows, absent, groups = args.device, [], {}, []
    for case in args.cases:
        jobs = [(measure_case, (case, device, args.rounds_each, args.least, seed)) for seed in range(args.processes)]
        found = in_fresh_processes(jobs, case.title, "spawn")  # forked ones would share their addresses
        parts, flops, peak = [part["samples"] for part in found], found[0]["flops_per_image"], found[0]["peak_flops"]
        absent |= found[0]["absent"]
        samples = {name: [seconds for part in parts for seconds in part[name]] for name in parts[0]}
        compared = compare(samples)
        speed = peak / compared.pop(PEAK)["seconds"]
        fastest = min(
            (name for name in compared if name != OURS), key=lambda name: compared[name]["seconds"], default=""
        )
        groups.append(
            {"case": case.title, "flops_per_image": flops, "peak_flops_per_second": speed, "fastest": fastest}
        )
        for name, row in compared.items():
            row |= {"images_per_second": case.batch / row["seconds"], **found[0]["facts"][name]}
            row |= {"of_peak": faster(samples, name, PEAK) * flops * case.batch / peak}
            if name != OURS:
                row["ours_is_range"] = lowest_and_highest(parts, OURS, name)
            rows.append({"case": case.title, "name": name, **row})
    if device.type == "cpu":
        cases = {case.title: case for case in args.cases}
        plain = [row for row in rows if not cases[row["case"]].compiled]  # the compiler's memory would count
        jobs = [(peak_memory, (cases[row["case"]], row["name"])) for row in plain]
        for row, memory in zip(plain, in_fresh_processes(jobs, "Memory"), strict=True):
            row["memory_bytes"] = memory
    return {"rows": rows, "cases": groups, "absent": absent, "processes": args.processes, "rounds": args.rounds_each}


# Of fewer processes the range says too little.
FEWEST = 5


def verdict(row: dict) -> str:
    """What the range over processes says of our speed over that of the row's contestant."""
    low, high = row["ours_is_range"]
    return "faster" if low > 1 else "slower" if high < 1 else "not told apart"


def show(result: dict) -> str:
    lines, verdicts = [], []
    for group in result["cases"]:
        gflop, peak = group["flops_per_image"] / 1e9, group["peak_flops_per_second"] / 1e12
        lines.append(f"{group['case']} ({gflop:.3g} GFLOP; {peak:.3g} TFLOP/s)")
        for row in (row for row in result["rows"] if row["case"] == group["case"]):
            cells = [f"{row['seconds'] * 1e3:.1f}", f"{row['spread']:.0%}", number(row["images_per_second"]), "", ""]
            if row["name"] != OURS:
                low, high = row["ours_is_range"]
                cells[-2:] = ratio(row["ours_is"]), f"{low:.2f}-{high:.2f}"
            lines.append([row["name"], *cells, share(row["of_peak"]), megabytes(row.get("memory_bytes"))])
            if row["name"] == group["fastest"]:
                verdicts.append(f"{group['case']}: {verdict(row)} ({row['ours_is']:.2f} x {row['name']})")
    header = ["", "ms", "spread", "images/s", "ours is", "range", "of peak", "MB"]
    notes = [
        f"ms: median of {result['rounds']} rounds in each of {result['processes']} fresh processes; spread: "
        "interquartile range over it; ours is: our speed over this one's; range: of that, over the processes; of peak: "
        "floating-point operations per second (GFLOP: of one image, all tokens in all blocks, though ours leaves out "
        "what no logit needs) over those of a large matrix product (TFLOP/s); MB: most memory of model and "
        "computation.",
        *(f"Not compared, as it does not import here: {name} ({why})" for name, why in result["absent"].items()),
    ]
    if verdicts and result["processes"] >= FEWEST:
        chance = 2 ** (1 - result["processes"])
        notes += [
            "Ours beside the fastest peer of each case; not told apart: the range holds 1. It misses the true median "
            f"with a probability of {chance:.0%}.",
            *verdicts,
        ]
    notes = (textwrap.fill(note, 80, subsequent_indent="  ") for note in notes)
    return "\n".join([text_table([header, *lines]), "", *notes])


def draw(result: dict) -> Figure:
    groups = {group["case"]: {} for group in result["cases"]}
    for row in result["rows"]:
        text = f"{number(row['images_per_second'])} images/s"
        groups[row["case"]][row["name"]] = row.get("vs_fastest_peer", 1.0), text
    return plots.plot_bars(groups, "speed over that of the fastest peer", reference=1.0)
