"""The speedrun: a track's record run again with several seeds, and its row of the table in speedrun/README.md."""

import argparse
import datetime
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import cli

from modeling_vit_scratch.evaluation.tables import text_table

from . import race

PROGRAM = "benchmark.py"
FIRST_SEED = 42
draw = race.draw


@dataclass(frozen=True)
class Track:
    """What is to be reached.

    Args:
        goal: Mean test accuracy over the seeds, in [0, 1].
        column: Of a run's `time`, what the clock counts.
        where: The hardware, in words.
    """

    goal: float
    column: str
    where: str


TRACKS = {
    "cpu80": Track(0.80, "train_cpu_seconds", "one core"),
    "cpu90": Track(0.90, "train_seconds", "two cores"),
    "gpu94": Track(0.94, "train_seconds", "one H100"),
}


def recipe_of(track: str) -> Path:
    """The recipe that holds the track's record.

    Raises:
        ValueError: The track is still open.
    """
    path = race.ROOT / "speedrun" / f"{track}.yaml"
    if not path.is_file():
        raise ValueError(f"track {track} is open: there is no {path.name} yet.")
    return path


def command_of(recipe: Path) -> str:
    """The command at the head of a recipe."""
    return re.search(r"^#   (.*finetune\.py.*)$", recipe.read_text(), re.MULTILINE)[1]


def words_of(command: str) -> tuple[dict[str, str], list[str]]:
    """Its environment variables, and its words."""
    words = shlex.split(command)
    variables = [word for word in words if re.match(r"[A-Z_]+=", word)]
    return dict(word.split("=", 1) for word in variables), words[len(variables) :]


def run_seed(recipe: Path, seed: int, args: argparse.Namespace) -> Path:
    """The folder of a finished run of the recipe's command with this seed; one that is there is not run again.

    Raises:
        ValueError: The run failed.
    """
    data = str(Path(args.dataset_name).resolve()) if Path(args.dataset_name).exists() else args.dataset_name
    folder = args.output / "speedrun" / f"{race.run_name(recipe, [data, *args.race_options])}-{seed}"
    if not (folder / "metrics.json").is_file():
        variables, words = words_of(command_of(recipe))
        words[words.index("--dataset_name") + 1] = data
        python = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[words[0]]
        words = [*python, *words[1:], *args.race_options, "--seed", str(seed), "--output_dir", str(folder.resolve())]
        cli.say(PROGRAM, f"{recipe.name}, seed {seed}")
        status = subprocess.run(
            [*words, "--overwrite_output_dir", "True"], cwd=race.ROOT, env=os.environ | variables, stdout=sys.stderr
        ).returncode
        if status:
            raise KeyboardInterrupt if status in (130, -2) else ValueError(f"{recipe.name} failed with seed {seed}.")
    return folder


def measure(args: argparse.Namespace) -> dict:
    """The track's recipe with `args.seeds` seeds, one after another.

    Raises:
        ValueError: The track is open, a run failed, or a test split of another size than CIFAR-10's was read.
    """
    recipe, track = recipe_of(args.track), TRACKS[args.track]
    if args.dataset_name is None:
        raise ValueError("--dataset_name is missing; a record is one of CIFAR-10.")
    folders = {seed: run_seed(recipe, seed, args) for seed in range(FIRST_SEED, FIRST_SEED + args.seeds)}
    runs = [json.loads((folder / "metrics.json").read_text()) for folder in folders.values()]
    if not args.race_options and any(run["test"]["examples"] != 10_000 for run in runs):
        raise ValueError("a record counts the whole test split of CIFAR-10, 10,000 images.")
    accuracies = [run["test"]["accuracy"] for run in runs]
    row = {
        "track": args.track, "recipe": recipe.name, "date": datetime.date.today().isoformat(),
        "command": command_of(recipe), "goal": track.goal,
        "seeds": [*folders], "accuracies": accuracies,
        "accuracy": statistics.mean(accuracies), "deviation": statistics.stdev(accuracies) if args.seeds > 1 else None,
        "clock": track.column, "where": track.where, "seconds": [run["time"][track.column] for run in runs],
        "parameters": runs[0]["model"]["parameters"], "dataset": runs[0]["dataset"]["name"],
    }  # fmt: skip
    validation = [run["validation"]["accuracy"] for run in runs]
    curves = {f"seed {seed}": race.curve_of(folder, track.column) for seed, folder in folders.items()}
    return {"row": row, "validation": validation, "curves": curves, "unit": _clock(track.column)}


def _clock(column: str) -> str:
    return "CPU seconds" if "cpu" in column else "seconds"


def show(result: dict) -> str:
    row = result["row"]
    clock = _clock(row["clock"])
    table = [("seed", "test", clock)]
    table += [
        (str(seed), f"{accuracy:.2%}", f"{seconds:,.0f}")
        for seed, accuracy, seconds in zip(row["seeds"], row["accuracies"], row["seconds"], strict=True)
    ]
    reached = "reached" if row["accuracy"] >= row["goal"] else "missed"
    spread = "" if row["deviation"] is None else f" ± {100 * row['deviation']:.2f}"
    text = (
        f"{row['track']} on {row['dataset']}, {row['where']}: {100 * row['accuracy']:.2f}{spread} % in "
        f"{statistics.mean(row['seconds']):,.0f} {clock}; the goal of {row['goal']:.0%} is {reached}"
        + (", and a record has at least 5 seeds." if len(row["seeds"]) < 5 else ".")
    )
    least, most = min(row["seconds"]), max(row["seconds"])
    cells = [row["date"], f"{statistics.mean(row['seconds']):,.0f} ({least:,.0f} to {most:,.0f})"]
    cells += [f"{100 * row['accuracy']:.2f}{spread} %", str(len(row["seeds"])), f"{row['parameters']:,}"]
    line = f"| {' | '.join(cells)} | `{row['command']}` |"
    return f"{textwrap.fill(text, 80)}\n\n{text_table(table)}\n\n{line}"
