"""Colours, figures, captions, and how a figure is saved."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip
# "Color universal design" (Okabe and Ito, 2008), without its yellow, which is too pale for lines on white.
OKABE_ITO = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, BLACK)
GREY = "#666666"
# Of maps over images.
HEAT, HEAT_ALPHA = "cividis", 0.7
# Points of many classes differ in shape too; the last three colours are from Tol's "muted" scheme (2021), and grey.
CATEGORIES = (*OKABE_ITO, "#999999", "#882255", "#DDCC77")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*")


def save_figure(figure: Figure, path: str | Path, max_bytes: int = 150_000, svg: bool = True) -> list[Path]:
    """Write `path` + ".png" and ".svg", the same bytes each time; the folder is made.

    Args:
        path: Without a suffix.
        max_bytes: Size that the PNG should keep to: first by a palette of 256 colours, then by fewer pixels.
        svg: False for the PNG only.

    Returns:
        The files written.
    """
    files = [Path(f"{path}.png")]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    files[0].write_bytes(_png(figure, max_bytes))
    if svg:
        files.append(Path(f"{path}.svg"))
        with matplotlib.rc_context({"svg.hashsalt": "vit_scratch"}):
            figure.savefig(files[1], metadata={"Date": None})
    return files


def _png(figure: Figure, max_bytes: int) -> bytes:
    for dpi in (150, 130, 110, 95, 80):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
        if buffer.tell() <= max_bytes:
            break
        image = Image.open(buffer).convert("RGB")
        flat = image.quantize(256, kmeans=1)
        for reduced in (image.quantize(palette=flat), flat):  # dithered first
            colours, background = reduced.getpalette(), 3 * reduced.getpixel((0, 0))
            reduced.putpalette([*colours[:background], 255, 255, 255, *colours[background + 3 :]])
            buffer = io.BytesIO()
            reduced.save(buffer, format="png", optimize=True)
            if buffer.tell() <= max_bytes:
                return buffer.getvalue()
    return buffer.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """A light figure of `width` x `height` inches that lays itself out."""
    return Figure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")


def tidy(axes, grid: str = "both"):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def as_pixels(image: torch.Tensor) -> torch.Tensor:
    """An image for drawing: (C, H, W) in [0, 1], 1 or 3 channels."""
    image = torch.as_tensor(image).detach().cpu()
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"an image must be (1 or 3, H, W), got shape {tuple(image.shape)}.")
    image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    if not (image.min() >= -1e-4 and image.max() <= 1 + 1e-4):
        raise ValueError(
            f"pixels must be uint8 or in [0, 1], got {image.min():g} to {image.max():g}; take them before normalising."
        )
    return image.clamp(0, 1)


def show_image(axes, image: torch.Tensor):
    """Draw (1 or 3, H, W) in [0, 1], pixel by pixel, without ticks."""
    axes.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()


def caption(axes, text: str, x: float = 0.5, line: int = 0, ha: str = "center", fontsize: float = 8, **style):
    """Write a line below the axes."""
    offset = (0, -3 - 1.3 * fontsize * line)
    place = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": ha, "va": "top", "fontsize": fontsize}
    plain(axes.annotate(text, (x, 0), offset, **place, **style))


def overlay(axes, image: torch.Tensor, heat: torch.Tensor, top: float | None = None):
    """Draw a map (h, w) over an image (C, H, W) in grey, in colours from 0 to `top`, its largest value where None; for
    `heat_bar`.
    """
    H, W = image.shape[1:]
    show_image(axes, image.mean(dim=0, keepdim=True))
    return axes.imshow(
        heat.numpy(),
        cmap=HEAT,
        alpha=HEAT_ALPHA,
        extent=(-0.5, W - 0.5, H - 0.5, -0.5),
        vmin=0,
        vmax=top,
        interpolation="nearest",
    )


def heat_bar(figure: Figure, drawn, axes, aspect: float = 16):
    """The colour bar of what `overlay` drew, beside these axes."""
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8, aspect=aspect, pad=0.03)
    bar.solids.set_alpha(1)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.ax.yaxis.set_major_locator(MaxNLocator(4))
    bar.set_label("× even share", fontsize=8)


def line_colours(count: int):
    """Okabe and Ito's as far as they go, then shades from dark to light."""
    return OKABE_ITO[:count] if count <= len(OKABE_ITO) else matplotlib.colormaps["viridis"](np.linspace(0, 0.9, count))


def legend_handle(colour, label: str, linestyle: str = "-", marker: str | None = None) -> Line2D:
    return Line2D([], [], color=colour, label=label, linestyle=linestyle, marker=marker, markerfacecolor="white")


def draw_legend(place, handles, **kwargs):
    legend = place.legend(handles=handles, **{"frameon": False, "fontsize": 9, **kwargs})
    plain(*legend.get_texts())


def plain(*texts):
    """Names are drawn as they are: a "$" in one does not start a formula."""
    for text in texts:
        text.set_parse_math(False)


def axis_names(class_names: Sequence[str] | None, classes: int) -> list[str]:
    names = [str(i) for i in range(classes)] if class_names is None else [str(name) for name in class_names]
    if len(names) != classes:
        raise ValueError(f"class_names has {len(names)} names for {classes} classes.")
    return [short(name) for name in names]


def short(name: str, length: int = 24) -> str:
    """The first name of several ("tench, Tinca tinca"), cut to `length` letters."""
    return cut_text(name.split(",")[0].strip() or name, length)


def cut_text(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
