"""Loading a large model from disk, each time in a fresh process."""

import argparse
import shutil
import tempfile
import textwrap
import time
from pathlib import Path

import torch
import transformers
from matplotlib.figure import Figure

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, plots
from modeling_vit_scratch.conversion import export_checkpoint
from modeling_vit_scratch.evaluation.tables import text_table

from .measuring import OURS, PeakMemory, in_fresh_processes, megabytes, memory_now, ratio


def save_random(preset: str, folder: Path) -> int:
    """Save a model with random weights, for us and for transformers; its number of parameters."""
    with torch.device("meta"):
        model = ViTScratchForImageClassification(ViTScratchConfig.preset(preset))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.02, 0.02)
    model.save_pretrained(folder / OURS)
    export_checkpoint(model, "transformers", folder / "transformers")
    return model.num_parameters()


def load(name: str, folder: Path) -> dict:
    """Seconds and most anonymous memory of `from_pretrained`; and what the process has in all once it used the model.

    transformers maps the file into memory instead of copying it, so that its pages are the system's to drop.
    """
    model_class = ViTScratchForImageClassification if name == OURS else transformers.ViTForImageClassification
    transformers.utils.logging.disable_progress_bar()
    before = memory_now("VmRSS")
    with PeakMemory() as memory:
        start = time.perf_counter()
        model = model_class.from_pretrained(folder / name)
        seconds = time.perf_counter() - start
    config = model.config
    size = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    with torch.inference_mode():
        model(torch.zeros(1, config.num_channels, *size))
    resident = None if before is None else memory_now("VmRSS") - before
    return {"name": name, "seconds": seconds, "memory_bytes": memory.bytes, "resident_bytes": resident}


def measure(args: argparse.Namespace) -> dict:
    """Load a large model from disk, each time in a fresh process."""
    with torch.device("meta"):
        size = 4 * ViTScratchForImageClassification(ViTScratchConfig.preset(args.large)).num_parameters()
    with tempfile.TemporaryDirectory() as temporary:
        folder, free = Path(temporary), shutil.disk_usage(temporary).free
        if free < 2.1 * size:
            raise ValueError(
                f"{temporary} has {free / 1e9:.1f} GB free, but two models take {2 * size / 1e9:.1f} GB; name another "
                "folder in TMPDIR."
            )
        jobs = [(save_random, (args.large, folder)), *((load, (name, folder)) for name in (OURS, "transformers"))]
        _, *rows = in_fresh_processes(jobs, f"Loading {args.large}")
    for row in rows:
        row["of_size"] = None if row["memory_bytes"] is None else row["memory_bytes"] / size
    return {"rows": rows, "preset": args.large, "parameters": size // 4, "float32_bytes": size}


def show(result: dict) -> str:
    lines = []
    for row in result["rows"]:
        anonymous, resident = megabytes(row["memory_bytes"]), megabytes(row["resident_bytes"])
        lines.append([row["name"], f"{row['seconds']:.1f} s", anonymous, ratio(row["of_size"]), resident])
    size = f"{result['parameters']:,} parameters, {megabytes(result['float32_bytes'])} MB in float32"
    header = ["from_pretrained", "time", "most anonymous MB", "of its size", "MB in use"]
    note = "in use: after an inference, with the pages of the file, which is mapped into memory"
    return f"{result['preset']}, {size}\n{text_table([header, *lines])}\n\n{textwrap.fill(note, 80)}"


def draw(result: dict) -> Figure:
    bars = {row["name"]: (row["of_size"] or 0, ratio(row["of_size"])) for row in result["rows"]}
    title = f"Loading {result['preset']}, {result['parameters']:,} parameters"
    return plots.plot_bars({title: bars}, "most anonymous memory over the size in float32", reference=1.0)
