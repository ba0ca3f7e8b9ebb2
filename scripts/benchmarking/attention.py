"""Eager attention, which keeps its maps, beside PyTorch's fused one: the measurement behind `suit_attention`."""

import argparse
import itertools
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from modeling_vit_scratch import plots
from modeling_vit_scratch.evaluation.devices import has_fast_bfloat16
from modeling_vit_scratch.evaluation.tables import text_table

from .cases import SHOWCASE, Case, make_model, make_step
from .measuring import OURS, faster, interleave, number, one_thread, ratio, stopwatch, under_titles

EAGER, FUSED = "eager", "sdpa"
NARROW = {"patch_size": 4, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3}
CASES = [
    replace(SHOWCASE, title="showcase, 16 patches, batch 64"),
    Case("width 96, 64 patches, batch 128", "showcase", 128, fields=NARROW),
    Case("ViT-Ti/16, 196 patches, batch 8", "tiny", 8, quick=False),
    Case("ViT-B/16, 196 patches, batch 4", "base", 4, quick=False),
    Case("ViT-Ti/16, 576 patches, batch 4", "tiny", 4, fields={"image_size": 384}, quick=False),
    Case("ViT-B/16, 576 patches, batch 2", "base", 2, fields={"image_size": 384}, quick=False),
]


def measure(args: argparse.Namespace) -> dict:
    """On one core or the GPU, inference and training steps with both, taking turns, in the types that are fast there.

    In bfloat16 the weights of inference are rounded; training takes autocast.
    """
    rows = []
    types = [False, True] if has_fast_bfloat16(args.device) else [False]
    cases = [case for case in CASES if case.quick or not args.quick]
    for case, bf16, training in itertools.product(cases, types, (False, True)):
        case = replace(case, bf16=bf16, training=training)
        work = f"{'training' if training else 'inference'}, {'bfloat16' if bf16 else 'float32'}"
        steps = {}
        with one_thread():
            for name in (EAGER, FUSED):
                model = make_model(case, OURS)
                step = make_step(case, model, args.device)
                model.set_attn_implementation(name)  # last, since `make_step` chooses one itself
                steps[name] = stopwatch(step, args.device, args.least)
            samples = interleave(steps, args.rounds, f"{case.title}, {work}")
        rows.append({
            "case": case.title, "work": work, "samples": samples, "eager_speed": faster(samples, EAGER, FUSED),
            "images_per_second": {name: case.batch / float(np.median(samples[name])) for name in samples},
        })  # fmt: skip
    return {"rows": rows}


def show(result: dict) -> str:
    def cells(row: dict) -> list[str]:
        speeds = row["images_per_second"]
        return [row["work"], number(speeds[FUSED]), number(speeds[EAGER]), ratio(row["eager_speed"])]

    table = text_table([["", "fused", EAGER, "eager is"], *under_titles(result["rows"], cells)])
    return f"Images per second on one core or the GPU, with fused and with eager attention\n{table}"


def draw(result: dict) -> Figure:
    groups = {}
    for row in result["rows"]:
        bar = row["eager_speed"], ratio(row["eager_speed"])
        groups.setdefault(row["case"], {})[row["work"]] = bar
    return plots.plot_bars(groups, "speed of eager attention over that of the fused one", reference=1)
