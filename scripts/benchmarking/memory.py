"""A model that is large for the machine: loaded from disk, and trained, each time in fresh processes."""

import argparse
import shutil
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, plots
from modeling_vit_scratch.conversion import export_checkpoint
from modeling_vit_scratch.evaluation.tables import text_table
from modeling_vit_scratch.training.run import keep_freed_memory

from .measuring import OURS, PeakMemory, in_fresh_processes, megabytes, memory_now, number, ratio, synchronise, together

# By name: over how many processes the model is sharded, and whether activations are checkpointed.
TRAINING = {
    "plain": (1, False),
    "checkpointing": (1, True),
    "FSDP2": (2, False),
    "FSDP2, checkpointing": (2, True),
}
STEPS = 3


def random_model(
    preset: str, device: torch.device, processes: int = 1, checkpointing: bool = False
) -> ViTScratchForImageClassification:
    """A model whose weights are drawn where they stay; of several processes, each holds its shards of every block."""
    config = ViTScratchConfig.preset(preset)
    if checkpointing:
        config.gradient_checkpointing = True  # the model reads it, and takes it away
    with torch.device("meta"):
        model = ViTScratchForImageClassification(config)
    if processes > 1:
        mesh = init_device_mesh(device.type, (processes,))
        for module in (*model.vit.layers, model):
            fully_shard(module, mesh=mesh)
    model.to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter.to_local() if processes > 1 else parameter, -0.02, 0.02)
    return model


def save_random(preset: str, folder: Path) -> int:
    """Save a model with random weights, for us and for transformers; its number of parameters."""
    model = random_model(preset, torch.device("cpu"))
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


def train(preset: str, device: torch.device, processes: int, checkpointing: bool) -> tuple[list[float], int | None]:
    """Seconds of each training step on one image a process, and this process' most memory, in bytes, from the start.

    The processes share the cores.
    """
    torch.set_num_threads(max(torch.get_num_threads() // processes, 1))
    # By itself glibc keeps most of up to 32 MB, and a sharded model takes twice the memory that it needs: each of its
    # blocks is gathered, and freed, twice a step. A user sets MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_.
    keep_freed_memory(1 << 20)
    seconds = []
    with PeakMemory() as memory:
        model = random_model(preset, device, processes, checkpointing).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        pixels = torch.randn(1, model.config.num_channels, *model.config.image_hw, device=device)
        labels = torch.zeros(1, dtype=torch.long, device=device)
        for _ in range(1 + STEPS):  # the first one makes the moments, and is not timed
            start = time.perf_counter()
            model(pixels, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            synchronise(device)
            seconds.append(time.perf_counter() - start)
    return seconds[1:], torch.cuda.max_memory_allocated() if device.type == "cuda" else memory.bytes


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be had; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def measure_training(preset: str, size: int, device: torch.device) -> dict:
    """Training of a model of so many bytes in float32; on a GPU without sharding, for which there is none to share."""
    needed, available = 4 * size + size // 2, available_memory(device)  # gradients and two moments are as large
    if available is not None and available < needed:
        return {"training": [], "no_training": f"about {megabytes(needed)} MB, and {megabytes(available)} MB are free"}
    config, rows = ViTScratchConfig.preset(preset), []
    tokens = config.num_prefix_tokens + config.grid_hw[0] * config.grid_hw[1]
    for name, (processes, checkpointing) in TRAINING.items():
        if processes > 1 and device.type != "cpu":
            continue
        samples, memory = zip(*together(processes, train, preset, device, processes, checkpointing), strict=True)
        slowest = np.max(samples, axis=0).tolist()
        seconds = float(np.median(slowest))
        row = {"name": name, "seconds": seconds, "tokens_per_second": processes * tokens / seconds}
        rows.append({**row, "memory_bytes": None if None in memory else max(memory), "samples": slowest})
    return {"training": rows}


def measure(args: argparse.Namespace) -> dict:
    """Load a large model from disk, and train it."""
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
    result = {"rows": rows, **measure_training(args.large, size, args.device)}
    for row in (*rows, *result["training"]):
        row["of_size"] = None if row["memory_bytes"] is None else row["memory_bytes"] / size
    return {**result, "preset": args.large, "parameters": size // 4, "float32_bytes": size}


def show(result: dict) -> str:
    lines = [["from_pretrained", "time", "most anonymous MB", "of its size", "MB in use"]]
    for row in result["rows"]:
        anonymous, resident = megabytes(row["memory_bytes"]), megabytes(row["resident_bytes"])
        lines.append([row["name"], f"{row['seconds']:.1f} s", anonymous, ratio(row["of_size"]), resident])
    size = f"{result['parameters']:,} parameters, {megabytes(result['float32_bytes'])} MB in float32"
    note = "in use: after an inference, with the pages of the file, which is mapped into memory"
    parts = [f"{result['preset']}, {size}\n{text_table(lines)}", textwrap.fill(note, 80)]
    lines = [["training step, batch 1", "seconds", "tokens/s", "most MB a process", "of its size"]]
    for row in result["training"]:
        speed, memory = number(row["tokens_per_second"]), megabytes(row["memory_bytes"])
        lines.append([row["name"], number(row["seconds"]), speed, memory, ratio(row["of_size"])])
    note = (
        "AdamW, float32; anonymous memory, or the GPU's. checkpointing: activations are computed again in the backward "
        "pass. FSDP2: blocks are sharded over two processes, which share the cores; each has its own image. The C "
        "library returns freed memory at once, as with MALLOC_MMAP_THRESHOLD_=1048576, which costs time."
    )
    if "no_training" in result:
        note = f"Not trained: a step takes {result['no_training']}."
    else:
        parts.append(text_table(lines))
    return "\n\n".join([*parts, textwrap.fill(note, 80)])


def draw(result: dict) -> Figure:
    titles = {f"Loading {result['preset']}, {result['parameters']:,} parameters": result["rows"]}
    titles["Training it, batch 1"] = result["training"]
    groups = {
        title: {row["name"]: (row["of_size"] or 0, ratio(row["of_size"])) for row in rows}
        for title, rows in titles.items()
        if rows
    }
    return plots.plot_bars(groups, "most memory of a process over the size in float32", reference=1.0)
