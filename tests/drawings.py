"""For tests of plots: a small model's config, an image, a run's history, and what stands on a drawn figure."""

import itertools
from pathlib import Path

import torch

from modeling_vit_scratch import ViTScratchConfig

HEADER = "step,epoch,learning_rate,loss,grad_norm,eval_loss,eval_accuracy\n"


def draw(figure):
    """Lay a figure out as saving does."""
    figure.draw_without_rendering()  # a bare canvas has no draw()
    return figure


def overlaps(texts) -> list[tuple[str, str]]:
    """The pairs of visible texts whose boxes share more than a pixel."""
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text() and t.get_visible()]
    return [
        (a, b)
        for (a, p), (b, q) in itertools.combinations(boxes, 2)
        if min(p.x1, q.x1) - max(p.x0, q.x0) > 1 and min(p.y1, q.y1) - max(p.y0, q.y0) > 1
    ]


def write_history(folder: Path) -> Path:
    """Two training rows and one evaluation row for each of three epochs, interleaved; the file."""
    lines = [HEADER]
    for epoch in range(3):
        for half in (1, 2):
            lines.append(f"{20 * epoch + 10 * half},{epoch + half / 2},0.001,{2.0 - epoch / 2 - half / 4},1.5,,\n")
        lines.append(f"{20 * epoch + 20},{epoch + 1},,,,{1.9 - epoch / 2},{[0.4, 0.625, 0.6][epoch]}\n")
    path = folder / "run" / "history.csv"
    path.parent.mkdir()
    path.write_text("".join(lines))
    return path


def small_config(**fields) -> ViTScratchConfig:
    """Non-square images and patches: a grid of 3 x 4."""
    return ViTScratchConfig(
        **{
            "image_size": (24, 16), "patch_size": (8, 4), "hidden_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 3, "intermediate_size": 8, "num_labels": 10, **fields,
        }
    )  # fmt: skip


def noise_image(C=3, H=24, W=16, seed=0) -> torch.Tensor:
    return torch.randint(0, 256, (C, H, W), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
