"""Pictures of a model and of its training: every function takes tensors or files and returns a matplotlib `Figure`.

Nothing here touches pyplot, so no window, backend or global state is involved. Colours tell apart for the colour-blind:
Okabe and Ito's for categories, single-hue or "cividis" maps for quantities.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from PIL import Image

BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip
# "Color universal design" (Okabe and Ito, 2008), without its yellow, which is too pale for lines on white.
OKABE_ITO = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, BLACK)
GREY = "#666666"


def save_figure(figure: Figure, path: str | Path, max_bytes: int = 150_000) -> list[Path]:
    """Write `path` + ".png" and ".svg", the same bytes each time; the folder is made.

    Args:
        path: Without a suffix.
        max_bytes: Size that the PNG should keep to: first by a palette of 256 colours, then by fewer pixels.

    Returns:
        The two files written.
    """
    png, svg = (Path(f"{path}{suffix}") for suffix in (".png", ".svg"))
    png.parent.mkdir(parents=True, exist_ok=True)
    png.write_bytes(_png(figure, max_bytes))
    with matplotlib.rc_context({"svg.hashsalt": "vit_scratch"}):
        figure.savefig(svg, metadata={"Date": None})
    return [png, svg]


def _png(figure: Figure, max_bytes: int) -> bytes:
    for dpi in (150, 110, 80):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
        if buffer.tell() > max_bytes:
            picture = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
            buffer = io.BytesIO()
            picture.save(buffer, format="png", optimize=True)
        if buffer.tell() <= max_bytes:
            break
    return buffer.getvalue()


# -- training and results ----------------------------------------------------------------------------------------------


def plot_training_curves(histories: str | Path | Mapping[str, str | Path]) -> Figure:
    """Loss (training and validation) and validation accuracy over the epochs, of one or several runs.

    The values are those of the files. Of more than 200 training losses, the running mean over a fiftieth of them is
    drawn in front of the values.

    Args:
        histories: A `history.csv` or the folder that holds it, or several by name. Columns: "epoch" or "step"; "loss",
            "eval_loss" and "eval_accuracy" (in [0, 1]), as far as there are any. Cells may be empty.

    Raises:
        ValueError: A file has no rows, lacks these columns, or holds something that is not a number.
    """
    single = not isinstance(histories, Mapping)
    runs = {"": histories} if single else dict(histories)
    if not runs:
        raise ValueError("there are 0 histories; give at least 1.")
    runs = {name: _read_history(path) for name, path in runs.items()}
    unit = "epoch" if all(np.isfinite(run["epoch"]).any() for run in runs.values()) else "step"
    accurate = any(np.isfinite(run["eval_accuracy"]).any() for run in runs.values())

    figure = _figure(9.0 if accurate else 5.0, 3.8)
    panels = figure.subplots(1, 2 if accurate else 1, squeeze=False)[0]
    entries = []
    for (name, run), colour in zip(runs.items(), _line_colours(len(runs)), strict=True):
        validation = ORANGE if single else colour
        _draw_training(panels[0], run[unit], run["loss"], colour, "-" if single else "--")
        _draw_evaluation(panels[0], run[unit], run["eval_loss"], validation)
        if np.isfinite(run["eval_accuracy"]).any():
            _draw_evaluation(panels[1], run[unit], run["eval_accuracy"], validation)
            best = np.nanargmax(run["eval_accuracy"])
            x, y = run[unit][best], run["eval_accuracy"][best]
            panels[1].plot(x, y, "o", color=validation, markersize=7, markerfacecolor="white")
            name = f"{name}{': ' if name else ''}best {y:.2%} at {unit} {x:g}"
        if name:
            entries.append(_handle(validation, name, marker="o" if "best" in name else None))

    for axes in panels:
        axes.set_xlabel(unit)
        _tidy(axes)
    panels[0].set(title="Loss", ylabel="cross-entropy (nats)")
    kinds = [("training", "loss", BLUE, "-" if single else "--"), ("validation", "eval_loss", ORANGE, "-")]
    _legend(
        panels[0],
        [
            _handle(colour if single else GREY, label, linestyle)
            for label, column, colour, linestyle in kinds
            if any(np.isfinite(run[column]).any() for run in runs.values())
        ],
    )
    if accurate:
        panels[1].set(title="Validation accuracy", ylabel="right answers (%)")
        panels[1].yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    if len(entries) == 1:
        _legend(panels[-1], entries, loc="lower right")
    elif entries:
        _legend(figure, entries, loc="outside lower center", ncols=1 if len(entries) < 4 else 2)
    return figure


def _draw_training(axes, x, loss, colour, linestyle):
    known = np.isfinite(loss)
    if not known.any():
        return
    x, loss = x[known], loss[known]
    window = len(loss) // 50 if len(loss) > 200 else 1
    if window > 1:
        axes.plot(x, loss, color=colour, alpha=0.2, linewidth=0.8)
        x, loss = (np.convolve(values, np.full(window, 1 / window), mode="valid") for values in (x, loss))
    axes.plot(x, loss, color=colour, linewidth=1.5, linestyle=linestyle, marker="." if len(x) < 2 else None)


def _draw_evaluation(axes, x, values, colour):
    known = np.isfinite(values)
    if known.any():
        axes.plot(x[known], values[known], color=colour, linewidth=1.5, marker="." if known.sum() <= 30 else None)


def _read_history(path: str | Path) -> dict[str, np.ndarray]:
    path = Path(path)
    path = path / "history.csv" if path.is_dir() else path
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns, rows = reader.fieldnames or [], list(reader)
    if not rows:
        raise ValueError(f"{path} has 0 rows; a run writes one for each log.")
    if not {"epoch", "step"} & set(columns) or not {"loss", "eval_loss", "eval_accuracy"} & set(columns):
        raise ValueError(
            f"{path} must have 'epoch' or 'step', and 'loss', 'eval_loss' or 'eval_accuracy'; "
            f"its columns are {', '.join(columns)}."
        )

    def numbers(name):
        values = []
        for line, row in enumerate(rows, start=2):
            try:
                values.append(float(row.get(name) or "nan"))
            except ValueError:
                raise ValueError(f"{path}, line {line}: {name} is {row[name]!r}, not a number.") from None
        values = np.array(values)
        return np.where(np.isfinite(values), values, np.nan)

    return {name: numbers(name) for name in ("epoch", "step", "loss", "eval_loss", "eval_accuracy")}


def plot_confusion_matrix(matrix, class_names: Sequence[str] | None = None) -> Figure:
    """Which classes are taken for which: counts in the cells, the share of each true class as colour.

    Row i, column j is the number of pictures of class i that were called j. The colour is that number over the sum of
    the row, on a square-root scale, so that rare confusions show beside the diagonal. Numbers are written up to 25
    classes, names up to 120.

    Args:
        matrix: Counts (classes, classes), rows true, columns predicted.
        class_names: One for each class; None for their indices.

    Raises:
        ValueError: The matrix is not square, negative, or the names are not one for each class.
    """
    matrix = np.asarray(matrix)
    classes = len(matrix)
    if matrix.shape != (classes, classes) or classes < 1 or (matrix < 0).any():
        raise ValueError(f"matrix must be counts (classes, classes), got shape {matrix.shape}.")
    names = _names(class_names, classes)
    rows = matrix.sum(axis=1, keepdims=True)
    share = matrix / np.maximum(rows, 1)

    side = min(max(3.4, 1.4 + 0.52 * classes), 8.0) if classes <= 25 else 10.0
    figure = _figure(side + 0.9, side)
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1], shrink=0.8, aspect=30, pad=0.02)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    if classes <= 25:
        size = 9 if classes <= 12 else 6
        for i, j in np.ndindex(classes, classes):
            if matrix[i, j]:
                colour = "white" if share[i, j] > 0.3 else BLACK
                axes.text(j, i, f"{matrix[i, j]}", ha="center", va="center", fontsize=size, color=colour)
    step = math.ceil(classes / 120)
    size = 9 if classes <= 12 else 7 if classes <= 40 else 5 if classes > 60 else 6
    shown = range(0, classes, step)
    axes.set_xticks(shown, [names[i] for i in shown], rotation=90 if classes > 3 else 0, fontsize=size)
    axes.set_yticks(shown, [names[i] for i in shown], fontsize=size)
    _plain(*axes.get_xticklabels(), *axes.get_yticklabels())
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    n, right = int(matrix.sum()), int(matrix.diagonal().sum())
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(f"Confusion matrix: {right / max(n, 1):.2%} of {n:,} pictures right", fontsize=11)
    return figure


def plot_per_class_accuracy(
    per_class_accuracy: Sequence[float | None], class_names: Sequence[str] | None = None
) -> Figure:
    """The accuracy (recall) of each class, best first, and their mean.

    A class without examples (None or NaN) is named last, without a bar. Of more than 120 classes the 30 best and the 30
    worst are shown.

    Args:
        per_class_accuracy: In [0, 1], one for each class, or None.
        class_names: One for each class; None for their indices.

    Raises:
        ValueError: No class has examples, a number is not in [0, 1], or the names are not one for each class.
    """
    values = np.array([np.nan if value is None else float(value) for value in per_class_accuracy])
    names = _names(class_names, len(values))
    known = np.flatnonzero(~np.isnan(values))
    if not len(known):
        raise ValueError(f"0 of {len(values)} classes have an accuracy; at least 1 must.")
    if values[known].min() < 0 or values[known].max() > 1:
        raise ValueError(
            f"accuracies must be in [0, 1], got {values[known].min():g} to {values[known].max():g}; percent?"
        )
    order = [*known[np.argsort(-values[known], kind="stable")], *np.flatnonzero(np.isnan(values))]
    mean = values[known].mean()
    columns = [order] if len(order) <= 40 else [order[:30], order[-30:]]
    if 40 < len(order) <= 120:
        per_column = math.ceil(len(order) / math.ceil(len(order) / 40))
        columns = [order[i : i + per_column] for i in range(0, len(order), per_column)]

    rows = max(map(len, columns))
    size = 9 if rows <= 12 else 7
    figure = _figure(6.0 if len(columns) == 1 else 4.0 * len(columns), 1.4 + (0.28 if rows <= 12 else 0.18) * rows)
    for axes, classes in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        axes.barh(range(len(classes)), np.nan_to_num(values[classes]), color=SKY, height=0.75)
        for row, value in enumerate(values[classes]):
            none = np.isnan(value)
            text = "no examples" if none else f"{value:.1%}"
            axes.text(0.01 if none else 1.14, row, text, ha="left" if none else "right", va="center", fontsize=size)
        axes.axvline(mean, color=ORANGE, linewidth=1.2, linestyle="--")
        axes.set_yticks(range(len(classes)), [names[i] for i in classes], fontsize=size)
        _plain(*axes.get_yticklabels())
        axes.set(xlabel="accuracy (%)", xlim=(0, 1.15), ylim=(rows - 0.4, -0.6), xticks=np.linspace(0, 1, 6))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        _tidy(axes, grid="x")
        axes.tick_params(axis="y", length=0)
    part = f": the 30 best and 30 worst of {len(values)}" if len(values) > 120 else ""
    figure.suptitle(f"Accuracy of each class{part} (dashed: mean {mean:.2%})", fontsize=11)
    return figure


# -- drawing -----------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    """A light figure of `width` x `height` inches that lays itself out."""
    return Figure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")


def _tidy(axes, grid: str = "both"):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def _line_colours(count: int):
    """Okabe and Ito's as far as they go, then shades from dark to light."""
    return OKABE_ITO[:count] if count <= len(OKABE_ITO) else matplotlib.colormaps["viridis"](np.linspace(0, 0.9, count))


def _handle(colour, label: str, linestyle: str = "-", marker: str | None = None) -> Line2D:
    return Line2D([], [], color=colour, label=label, linestyle=linestyle, marker=marker, markerfacecolor="white")


def _legend(place, handles, **kwargs):
    legend = place.legend(handles=handles, frameon=False, fontsize=9, **kwargs)
    _plain(*legend.get_texts())


def _plain(*texts):
    """Names are drawn as they are: a "$" in one does not start a formula."""
    for text in texts:
        text.set_parse_math(False)


def _names(class_names: Sequence[str] | None, classes: int) -> list[str]:
    names = [str(i) for i in range(classes)] if class_names is None else [str(name) for name in class_names]
    if len(names) != classes:
        raise ValueError(f"class_names has {len(names)} names for {classes} classes.")
    return [_short(name) for name in names]


def _short(name: str, length: int = 24) -> str:
    """The first name of several ("tench, Tinca tinca"), cut to `length` letters."""
    name = name.split(",")[0].strip() or name
    return name if len(name) <= length else name[: length - 1] + "…"
