"""Training by the teaching protocol, by our default recipe and by the speedrun's record, by the time that it takes."""

import argparse
import contextlib
import hashlib
import json
import sys
import textwrap
from pathlib import Path

import cli
import numpy as np
from matplotlib.figure import Figure

from modeling_vit_scratch import plots
from modeling_vit_scratch.data.sources import default_dataset
from modeling_vit_scratch.evaluation.tables import text_table
from modeling_vit_scratch.training import checkpoints

from .measuring import one_thread

PROGRAM = "benchmark.py"
ROOT = Path(__file__).parent.parent.parent
RACE = {
    "teaching protocol": "scripts/recipes/teaching_adamw.yaml",
    "default recipe": "scripts/recipes/showcase.yaml",
    "record of CPU-80": "speedrun/cpu80.yaml",
}


def run_name(recipe: Path, options: list[str]) -> str:
    """A folder's name that follows from the recipe's text and the options beside it."""
    digest = hashlib.sha256(json.dumps([recipe.read_text(), *options]).encode()).hexdigest()[:8]
    return f"{recipe.stem}-{digest}"


def run_recipe(name: str, args: argparse.Namespace) -> Path:
    """The folder of a finished run of a recipe: found, continued, or made. Its name follows from what is run.

    Raises:
        ValueError: The run failed.
    """
    import finetune  # the script beside benchmark.py

    recipe = ROOT / RACE[name]
    options = ["--dataset_name", args.dataset_name, "--use_cpu", str(args.device.type == "cpu"), *args.race_options]
    folder = args.output / "race" / run_name(recipe, options)
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


def curve_of(folder: Path, column: str) -> dict[str, list[float]]:
    """Validation accuracies of a finished run, and the seconds of training until each, of a column of its history."""
    history = plots.read_history(folder)
    known = np.isfinite(history["eval_accuracy"])
    return {"seconds": history[column][known].tolist(), "accuracy": history["eval_accuracy"][known].tolist()}


def measure(args: argparse.Namespace) -> dict:
    """Train by each recipe, on one core (or the GPU), and compare by time of training, evaluation left out."""
    args.dataset_name = args.dataset_name or default_dataset()
    with one_thread():
        folders = {name: run_recipe(name, args) for name in RACE}
    column = "train_cpu_seconds" if args.device.type == "cpu" else "train_seconds"
    rows, curves = [], {}
    for name, folder in folders.items():
        metrics = json.loads((folder / "metrics.json").read_text())
        curves[name] = curve_of(folder, column)
        row = {"name": name, "recipe": RACE[name], "dataset": metrics["dataset"]["name"]}
        row |= {"epochs": metrics["training"]["epochs"], "seconds": metrics["time"][column]}
        rows.append({**row, "parameters": metrics["model"]["parameters"], "accuracy": metrics["test"]["accuracy"]})
    goal = max(curves["teaching protocol"]["accuracy"])
    for row in rows:
        curve = curves[row["name"]]
        there = [seconds for seconds, accuracy in zip(*curve.values(), strict=True) if accuracy >= goal]
        row["seconds_to_goal"] = there[0] if there else None
    return {"rows": rows, "curves": curves, "goal": goal, "unit": "CPU seconds" if "cpu" in column else "seconds"}


def show(result: dict) -> str:
    lines = []
    for row in result["rows"]:
        to_goal = "never" if row["seconds_to_goal"] is None else f"{row['seconds_to_goal']:,.0f}"
        cells = [f"{round(row['epochs'], 1):g}", f"{row['accuracy']:.2%}", f"{row['seconds']:,.0f}", to_goal]
        lines.append([row["name"], f"{row['parameters']:,}", *cells])
    header = ["", "parameters", "epochs", "test", result["unit"], f"until {result['goal']:.2%}"]
    teaching, *others = result["rows"]
    text = (
        f"{teaching['dataset']}, one core or the GPU; {result['unit']} of training, without evaluation. The last "
        "column: until validation, after each epoch, gives the best accuracy of the teaching protocol."
    )
    for row in others:
        if row["seconds_to_goal"]:
            times = teaching["seconds_to_goal"] / row["seconds_to_goal"]
            text += f" The {row['name']} is there {times:.1f} times sooner."
    return f"{textwrap.fill(text, 80)}\n\n{text_table([header, *lines])}"


def draw(result: dict) -> Figure:
    """Of a race's or a speedrun's curves."""
    return plots.plot_race(
        {name: (curve["seconds"], curve["accuracy"]) for name, curve in result["curves"].items()}, result["unit"]
    )
