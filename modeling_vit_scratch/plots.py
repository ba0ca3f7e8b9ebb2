"""Pictures of a model and of its training.

What is shown is computed by functions from tensors to tensors (`attention_distance`, `attention_rollout`, ...); the
functions named `plot_*` take tensors or files and return a matplotlib `Figure`. Nothing touches pyplot, so no window,
backend or global state is involved. Colours tell apart for the colour-blind: Okabe and Ito's for categories, single-hue
or "cividis" maps for quantities.

Letters in shape comments are those of `modeling_vit_scratch`: B batch, C channels, H and W pixels, h x w patch grid,
N = h * w patches, T tokens, D hidden size, A attention heads; L layers, n pictures.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter
from PIL import Image

from .metrics import expected_calibration_error, reliability_bins

BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip
# "Color universal design" (Okabe and Ito, 2008), without its yellow, which is too pale for lines on white.
OKABE_ITO = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, BLACK)
GREY = "#666666"
# What a run's loss is, by the task that its metrics.json names.
LOSSES = {
    "image-classification": "cross-entropy (nats)",
    "masked-image-modeling": "mean error (standard deviations)",
}
# Of maps over pictures.
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
        picture = Image.open(buffer).convert("RGB")
        flat = picture.quantize(256, kmeans=1)
        for reduced in (picture.quantize(palette=flat), flat):  # dithered first
            colours, background = reduced.getpalette(), 3 * reduced.getpixel((0, 0))
            reduced.putpalette([*colours[:background], 255, 255, 255, *colours[background + 3 :]])
            buffer = io.BytesIO()
            reduced.save(buffer, format="png", optimize=True)
            if buffer.tell() <= max_bytes:
                return buffer.getvalue()
    return buffer.getvalue()


# -- training and results ----------------------------------------------------------------------------------------------


def plot_training_curves(
    histories: str | Path | Mapping[str, str | Path], loss: str = LOSSES["image-classification"]
) -> Figure:
    """Loss (training and validation) and validation accuracy over the epochs, of one or several runs.

    The values are those of the files. Of more than 200 training losses, the running mean over a fiftieth of them is
    drawn in front of the values.

    Args:
        histories: A `history.csv` or the folder that holds it, or several by name. Columns: "epoch" or "step"; "loss",
            "eval_loss" and "eval_accuracy" (in [0, 1]), as far as there are any. Cells may be empty.
        loss: What the loss is, and its unit.

    Raises:
        ValueError: A file has no rows, lacks these columns, or holds something that is not a number.
    """
    single = not isinstance(histories, Mapping)
    runs = {"": histories} if single else dict(histories)
    if not runs:
        raise ValueError("there are 0 histories; give at least 1.")
    runs = {name: read_history(path) for name, path in runs.items()}
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
    panels[0].set(title="Loss", ylabel=loss)
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


def read_history(path: str | Path) -> dict[str, np.ndarray]:
    """The columns of a `history.csv`, or of the one in a folder, as floats; NaN where a cell is empty or no number.

    Raises:
        ValueError: As `plot_training_curves`.
    """
    path = Path(path)
    path = path / "history.csv" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; scripts/finetune.py writes one beside the model.")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            columns, rows = reader.fieldnames or [], list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no CSV file: {error}.") from error
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

    names = ("epoch", "step", "loss", "eval_loss", "eval_accuracy", "train_seconds", "train_cpu_seconds")
    return {name: numbers(name) for name in names}


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


# -- speed -------------------------------------------------------------------------------------------------------------


def plot_bars(
    groups: Mapping[str, Mapping[str, tuple[float, str]]], label: str, reference: float | None = None
) -> Figure:
    """Contestants in groups: a bar each, in the same colour in every group, with a text at its end.

    Args:
        groups: By title, for each contestant the length of its bar, at least 0, and the text.
        label: What the lengths are.
        reference: Where a dashed line stands.

    Raises:
        ValueError: There are no groups, or one is empty.
    """
    if not groups or not all(groups.values()):
        raise ValueError("there is nothing to draw; give at least 1 group, and 1 bar in each.")
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    colours = dict(zip(names, _line_colours(len(names)), strict=True))
    figure = _figure(7.5, 0.8 + sum(0.45 + 0.26 * len(bars) for bars in groups.values()))
    heights = [len(bars) for bars in groups.values()]
    panels = figure.subplots(len(groups), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    longest = max(value for bars in groups.values() for value, _ in bars.values())
    for axes, (title, bars) in zip(panels, groups.items(), strict=True):
        values = [value for value, _ in bars.values()]
        axes.barh(range(len(bars)), values, color=[colours[name] for name in bars], height=0.75)
        for row, (value, text) in enumerate(bars.values()):
            patch = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # where the dashed line would cross it
            _plain(axes.text(value + 0.01 * longest, row, text, va="center", fontsize=8, bbox=patch))
        if reference is not None:
            axes.axvline(reference, color=GREY, linewidth=1.0, linestyle="--")
        axes.set_yticks(range(len(bars)), list(bars), fontsize=9)
        axes.set(xlim=(0, 1.3 * longest or 1), ylim=(len(bars) - 0.5, -0.5))
        axes.set_title(title, fontsize=10, loc="left")
        _plain(*axes.get_yticklabels(), axes.title)
        _tidy(axes, grid="x")
        axes.tick_params(axis="y", length=0)
    panels[-1].set_xlabel(label)
    return figure


def plot_scaling(panels: Mapping[str, Mapping[str, Sequence]]) -> Figure:
    """How quantities grow: a column of axes for each thing that was varied, a row for each quantity.

    Args:
        panels: By the name of what was varied: "x", its values, numbers (drawn as a line, both axes logarithmic) or
            names (drawn as bars), and each quantity by name, None where it is not known. All have the same quantities.

    Raises:
        ValueError: There are no panels, or their quantities differ.
    """
    quantities = [[name for name in panel if name != "x"] for panel in panels.values()]
    if not quantities or any(names != quantities[0] for names in quantities):
        raise ValueError(f"panels must have the same quantities, got {quantities}.")
    rows = quantities[0]
    figure = _figure(3.2 * len(panels), 2.6 * len(rows))
    grid = figure.subplots(len(rows), len(panels), squeeze=False)
    for column, (varied, panel) in enumerate(panels.items()):
        for row, quantity in enumerate(rows):
            axes = grid[row, column]
            known = [(x, y) for x, y in zip(panel["x"], panel[quantity], strict=True) if y is not None]
            if not known:
                axes.set_axis_off()
                continue
            x, y = zip(*known, strict=True)
            if isinstance(x[0], str):
                axes.bar(range(len(x)), y, color=SKY, width=0.7)
                axes.set_xticks(range(len(x)), [name.replace(", ", ",\n") for name in x], fontsize=8)
                axes.tick_params(axis="x", length=0)
                axes.set_ylabel(quantity)
            else:
                axes.plot(x, y, "o-", color=BLUE, linewidth=1.5, markersize=4)
                axes.set(xscale="log", yscale="log", xlabel=varied, ylabel=quantity)
                axes.set_xticks(x, [f"{value:g}" for value in x], fontsize=8)
                axes.set_xticks([], minor=True)
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
                axes.yaxis.set_major_formatter("{x:,.5g}")
                axes.set_yticks([], minor=True)
            _tidy(axes)
    return figure


def plot_race(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], unit: str) -> Figure:
    """Validation accuracy against the time that training took so far, a line for each run.

    Args:
        curves: By name: seconds, and accuracies in [0, 1], as many.
        unit: What the seconds are, e.g. "CPU seconds".

    Raises:
        ValueError: There are no curves, or one has no points.
    """
    if not curves or not all(len(seconds) for seconds, _ in curves.values()):
        raise ValueError("there is nothing to draw; give at least 1 curve, and 1 point in each.")
    figure = _figure(6.4, 4.0)
    axes = figure.subplots()
    entries = []
    for (name, (seconds, accuracy)), colour in zip(curves.items(), _line_colours(len(curves)), strict=True):
        axes.plot(seconds, accuracy, "o-", color=colour, linewidth=1.5, markersize=3)
        entries.append(_handle(colour, f"{name}: {max(accuracy):.2%} in {seconds[-1]:,.0f}", marker="o"))
    axes.set(xscale="log", xlabel=f"{unit} of training", ylabel="validation accuracy (%)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    _tidy(axes)
    _legend(axes, entries, loc="lower right")
    return figure


# -- what the model sees: computations ---------------------------------------------------------------------------------


def patch_sequence(image: torch.Tensor, patch_hw: tuple[int, int]) -> torch.Tensor:
    """The patches in the order the model reads them, row by row: (C, H, W) -> (N, C, patch height, patch width).

    ViT, sec. 3.1: x in R^(H x W x C) becomes x_p in R^(N x P^2 C), N = HW / P^2.

    Raises:
        ValueError: The patch does not divide the picture.
    """
    C, H, W = image.shape
    height, width = patch_hw
    if H % height or W % width:
        raise ValueError(f"a picture of {H}x{W} cannot be cut into patches of {height}x{width}.")
    patches = image.reshape(C, H // height, height, W // width, width).permute(1, 3, 0, 2, 4)  # (h, w, C, ., .)
    return patches.reshape(-1, C, height, width)


def filter_components(
    weight: torch.Tensor, patch_hw: tuple[int, int], count: int = 28
) -> tuple[torch.Tensor, torch.Tensor]:
    """Principal components of the patch embedding's filters (ViT, fig. 7 left).

    The D filters are points in R^(C * patch height * patch width). Their components are the right singular vectors of
    the filters less their mean; the share of the variance of component k is s_k^2 / sum_j s_j^2. The entry of largest
    magnitude is made positive.

    Args:
        weight: (D, C * patch height * patch width), as a linear layer on flattened patches has it, or the kernel
            (D, C, patch height, patch width) of a convolution.
        count: How many; fewer are returned where there are fewer.

    Returns:
        Components (k, C, patch height, patch width) of unit length, and their shares (k,), largest first.
    """
    flat = weight.detach().double().flatten(1).cpu()  # (D, C * patch height * patch width)
    pixels = patch_hw[0] * patch_hw[1]
    if flat.shape[1] % pixels:
        raise ValueError(f"filters of {flat.shape[1]} numbers are not of patches of {patch_hw[0]}x{patch_hw[1]}.")
    _, s, components = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False)
    rank = min(count, len(flat) - 1, flat.shape[1])
    components = components[:rank]
    largest = components.abs().argmax(dim=1, keepdim=True)
    components = components * components.gather(1, largest).sign()
    share = s.square()[:rank] / s.square().sum().clamp_min(torch.finfo(s.dtype).tiny)
    return components.reshape(rank, -1, *patch_hw).float(), share.float()


def position_similarity(position_embeddings: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
    """Cosine similarity of the patches' position embeddings (ViT, fig. 7 centre).

    Args:
        position_embeddings: (1, P, D) or (P, D), the N patches' last; what leads them (a class token's) is left out.
        grid_hw: Patches (down, across).

    Returns:
        (h, w, h, w): entry [i, j, k, l] is p_ij . p_kl / (|p_ij| |p_kl|), in [-1, 1]; 0 for a zero embedding.
    """
    h, w = grid_hw
    positions = position_embeddings.detach().float().cpu().flatten(0, -2)  # (P, D)
    if len(positions) < h * w:
        raise ValueError(f"{len(positions)} position embeddings are too few for a grid of {h}x{w} = {h * w} patches.")
    positions = torch.nn.functional.normalize(positions[len(positions) - h * w :], dim=1)
    return (positions @ positions.T).clamp(-1, 1).reshape(h, w, h, w)


def attention_distance(
    attentions: Sequence[torch.Tensor], grid_hw: tuple[int, int], patch_hw: tuple[int, int], num_prefix_tokens: int
) -> torch.Tensor:
    """How far each head looks, in pixels (ViT, fig. 7 right; sec. 4.5).

    The distance of two patches is that of their centres. For a query patch i it is averaged over the key patches j with
    the attention as weight, d_i = sum_j a_ij |c_i - c_j| / sum_j a_ij; d_i is averaged over queries and pictures. Class
    token and registers have no place, so they count neither as queries nor as keys; a query that looks at nothing else
    is left out.

    Args:
        attentions: L maps (B, A, T, T), rows are queries.
        grid_hw: Patches (down, across).
        patch_hw: Pixels (height, width) of a patch.
        num_prefix_tokens: Tokens before the first patch.

    Returns:
        (L, A) pixels; NaN for a head that no patch uses to look at a patch.
    """
    y, x = torch.meshgrid(torch.arange(grid_hw[0]), torch.arange(grid_hw[1]), indexing="ij")
    centres = torch.stack([y.flatten() * patch_hw[0], x.flatten() * patch_hw[1]], dim=1).double()  # (N, 2)
    distance = (centres[:, None] - centres[None]).norm(dim=2)  # (N, N)
    means = []
    for maps in _checked_maps(attentions, grid_hw, num_prefix_tokens):
        maps = maps[..., num_prefix_tokens:, num_prefix_tokens:].double()  # (B, A, N, N)
        mean = (maps * distance.to(maps.device)).sum(dim=3) / maps.sum(dim=3)  # (B, A, N); 0 / 0 is NaN
        means.append(mean.transpose(0, 1).flatten(1).nanmean(dim=1).cpu())
    return torch.stack(means).float()


def attention_rollout(attentions: Sequence[torch.Tensor]) -> torch.Tensor:
    """How much of each input token reaches each output token through all layers (Abnar and Zuidema, 2020).

    R = A_L ... A_2 A_1 with A_l = (mean over heads of layer l + I) / 2, where I stands for the residual connection.

    Args:
        attentions: L maps (B, A, T, T), rows are queries, first layer first.

    Returns:
        (B, T, T); row i says what output token i is made of. Rows sum to 1.
    """
    rollout = None
    for maps in _checked_maps(attentions):
        mixed = maps.float().mean(dim=1)  # (B, T, T)
        mixed = 0.5 * mixed + 0.5 * torch.eye(mixed.shape[-1], device=mixed.device)
        mixed = mixed / mixed.sum(dim=-1, keepdim=True)
        rollout = mixed if rollout is None else mixed @ rollout
    return rollout


def patch_map(
    maps: torch.Tensor, grid_hw: tuple[int, int], num_prefix_tokens: int, pooling: str = "cls"
) -> torch.Tensor:
    """What the classifier looks at: the share of each patch, relative to an even share.

    Of maps over tokens, such as a head's attention or a rollout, take the class token's row ("cls"), or the mean over
    the rows of the patches ("mean"), keep the patches' columns, and scale them to mean 1.

    Args:
        maps: (..., T, T), rows are queries.
        grid_hw: Patches (down, across).
        num_prefix_tokens: Tokens before the first patch.
        pooling: The config's: "cls" or "mean".

    Returns:
        (..., h, w); 1 is what attention spread evenly over the patches gives.
    """
    (maps,) = _checked_maps([maps], grid_hw, num_prefix_tokens)
    if pooling == "cls" and num_prefix_tokens < 1:
        raise ValueError("pooling 'cls' needs a class token, but num_prefix_tokens is 0; use 'mean'.")
    rows = maps[..., 0, :] if pooling == "cls" else maps[..., num_prefix_tokens:, :].mean(dim=-2)  # (..., T)
    patches = rows[..., num_prefix_tokens:].float()  # (..., N)
    patches = patches / patches.mean(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return patches.unflatten(-1, grid_hw)


def overlay_pixels(image: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """A map over a picture in grey, as `plot_attention_rollout` draws it, without a figure around it.

    Args:
        image: (C, H, W), uint8, or floating point in [0, 1].
        heat: (h, w), at least 0; dark is 0, bright the largest value.

    Returns:
        uint8 (H, W, 3).
    """
    grey = _pixels(image).mean(dim=0)  # (H, W)
    heat = heat.detach().float().cpu() / heat.max().clamp_min(torch.finfo(torch.float32).tiny)
    large = torch.nn.functional.interpolate(heat[None, None], size=grey.shape, mode="nearest-exact")[0, 0]
    colours = torch.from_numpy(matplotlib.colormaps[HEAT](large.numpy())[..., :3])  # (H, W, 3)
    return (255 * (HEAT_ALPHA * colours + (1 - HEAT_ALPHA) * grey[..., None])).round().to(torch.uint8)


def patch_mosaic(image: torch.Tensor, patch_hw: tuple[int, int], enlarge: int = 1, gap: int = 1) -> torch.Tensor:
    """The patches in their places with white gaps between: uint8 (C, H, W) -> (C, H', W').

    Args:
        image: As the model gets it.
        patch_hw: Pixels (height, width) of a patch.
        enlarge: Each pixel becomes a square of so many.
        gap: Pixels between patches.
    """
    patches = patch_sequence(image, patch_hw).repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    patches = torch.nn.functional.pad(patches, (0, gap, 0, gap), value=255)  # (N, C, height + gap, width + gap)
    grid = patches.unflatten(0, (-1, image.shape[2] // patch_hw[1])).permute(2, 0, 3, 1, 4)  # (C, h, ., w, .)
    return grid.flatten(3, 4).flatten(1, 2)[:, :-gap, :-gap]


def confident_mistakes(probabilities: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the wrong answers, the most confident first: probabilities (n, classes), labels (n,) -> (k,)."""
    confidence, predicted = torch.as_tensor(probabilities).max(dim=1)
    wrong = (predicted != torch.as_tensor(labels)).nonzero().flatten()
    return wrong[confidence[wrong].argsort(descending=True, stable=True)][:count]


def project_features(features: torch.Tensor, method: str = "pca", seed: int = 0) -> tuple[torch.Tensor, list[float]]:
    """Features in the plane: (n, D) -> (n, 2).

    Args:
        method: "pca", the two directions of most variance, or "tsne" (van der Maaten and Hinton, 2008), perplexity 30
            or a third of the pictures, started from the components.
        seed: Of t-SNE.

    Returns:
        The points, and each axis' share of the variance (none for t-SNE).
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    features = torch.as_tensor(features).detach().float().cpu().numpy()
    n = len(features)
    if n < 4 or features.ndim != 2:
        raise ValueError(f"features must be (n, D) of at least 4 pictures, got shape {features.shape}.")
    if method == "pca":
        components = PCA(2, random_state=0).fit(features)
        return torch.from_numpy(components.transform(features)), components.explained_variance_ratio_.tolist()
    if method != "tsne":
        raise ValueError(f"method ({method!r}) must be 'pca' or 'tsne'.")
    points = TSNE(2, perplexity=min(30.0, (n - 1) / 3), init="pca", random_state=seed).fit_transform(features)
    return torch.from_numpy(points), []


def _checked_maps(attentions: Sequence[torch.Tensor], grid_hw: tuple[int, int] | None = None, prefix: int = 0):
    """The maps, if they are maps over the tokens that the grid and the prefix make."""
    if len(attentions) == 0 or any(maps is None for maps in attentions):
        raise ValueError("attention maps are missing; call the model with output_attentions=True.")
    tokens = attentions[0].shape[-1]
    expected = tokens if grid_hw is None else prefix + grid_hw[0] * grid_hw[1]
    for maps in attentions:
        if tuple(maps.shape[-2:]) != (expected, expected):
            made = "" if grid_hw is None else f" ({prefix} + {grid_hw[0]}x{grid_hw[1]} patches)"
            raise ValueError(f"maps of shape {tuple(maps.shape)} are not over {expected} tokens{made}.")
    return attentions


# -- what the model sees: drawings -------------------------------------------------------------------------------------


def plot_patch_sequence(image: torch.Tensor, patch_hw: tuple[int, int]) -> Figure:
    """A picture with its patch grid, and the patches as the sequence that the model reads (ViT, fig. 1; sec. 3.1).

    Args:
        image: (C, H, W), uint8, or floating point in [0, 1].
        patch_hw: Pixels (height, width) of a patch.
    """
    image = _pixels(image)
    patches = patch_sequence(image, patch_hw)  # (N, C, patch height, patch width)
    (_, H, W), (height, width), N = image.shape, patch_hw, len(patches)
    h, w = H // height, W // width

    across = min(2 * w, N)
    numbered = N <= 64
    gap = max(1, round(0.08 * width))
    pixel = 6.2 / (across * (width + gap))  # inches
    line = math.ceil(0.2 / pixel) if numbered else gap  # room for the numbers
    down = math.ceil(N / across)
    canvas = torch.ones(image.shape[0], down * (height + line), across * (width + gap) - gap)
    for i, patch in enumerate(patches):
        top, left = i // across * (height + line), i % across * (width + gap)
        canvas[:, top : top + height, left : left + width] = patch

    strip = canvas.shape[1] / canvas.shape[2]
    figure = _figure(9.0, min(max(2.6 * H / W, 6.2 * strip) + 0.5, 7.0))
    whole, sequence = figure.subplots(1, 2, width_ratios=[2.6, 6.2])
    _show(whole, image)
    for i in range(1, h):
        whole.axhline(i * height - 0.5, color="white", linewidth=1.0)
    for j in range(1, w):
        whole.axvline(j * width - 0.5, color="white", linewidth=1.0)
    whole.set_title(f"{H} × {W} pixels", fontsize=10)
    _show(sequence, canvas)
    if numbered:
        for i in range(N):
            top, left = i // across * (height + line), i % across * (width + gap)
            place = left + width / 2 - 0.5, top + height - 0.5 + line / 2
            sequence.text(*place, f"{i + 1}", ha="center", va="center", fontsize=8 if across <= 16 else 6)
    else:
        for row in range(down):
            place = -gap, row * (height + line) + height / 2
            sequence.text(*place, f"{row * across + 1}", ha="right", va="center", fontsize=7)
    sequence.set_title(f"{N} patches of {height} × {width} pixels, in reading order", fontsize=10)
    return figure


def plot_reconstructions(images: torch.Tensor, mask: torch.Tensor, painted: torch.Tensor) -> Figure:
    """What a masked image model sees and what it paints: pictures, the same with patches hidden, and these painted.

    What was not hidden is drawn as it is.

    Args:
        images: (n, C, H, W), uint8, or floating point in [0, 1].
        mask: bool (n, h, w), true for each hidden patch.
        painted: (n, C, H, W), floating point in [0, 1].

    Raises:
        ValueError: The shapes do not fit.
    """
    pictures = torch.stack([_pixels(image) for image in images])
    if painted.shape != pictures.shape or len(mask) != len(pictures):
        raise ValueError(
            f"images {tuple(pictures.shape)}, painted {tuple(painted.shape)} and mask {tuple(mask.shape)} must be of "
            "the same pictures."
        )
    hidden = torch.nn.functional.interpolate(mask[:, None].float(), pictures.shape[2:]) > 0.5  # (n, 1, H, W)
    rows = {
        "picture": pictures,
        "what the model sees": torch.where(hidden, 0.5, pictures),
        "what it paints": torch.where(hidden, painted.float().clamp(0, 1), pictures),
    }
    figure = _figure(min(1.25 * len(pictures), 12.0) + 0.3, 4.1 * pictures.shape[2] / pictures.shape[3] + 0.6)
    panels = figure.subplots(3, len(pictures), squeeze=False)
    for line, (name, row) in zip(panels, rows.items(), strict=True):
        for axes, image in zip(line, row, strict=True):
            _show(axes, image)
        line[0].set_title(name, fontsize=10, loc="left")
    return figure


def plot_patch_filters(
    weight: torch.Tensor, patch_hw: tuple[int, int], count: int = 28, title: str = "Patch filters"
) -> Figure:
    """The first principal components of the patch embedding's filters (ViT, fig. 7 left); see `filter_components`.

    Each is drawn on its own scale, 0.5 + 0.5 v / max |v|: grey is 0. Of other than 3 channels the mean is drawn.

    Args:
        weight: Of the patch embedding's projection.
        patch_hw: Pixels (height, width) of a patch.
        count: How many components.
        title: What the filters are.
    """
    components, share = filter_components(weight, patch_hw, count)
    components = components if components.shape[1] in (1, 3) else components.mean(dim=1, keepdim=True)
    columns = min(7, len(components))
    rows = math.ceil(len(components) / columns)
    figure = _figure(1.02 * columns + 0.2, 1.2 * rows * patch_hw[0] / patch_hw[1] + 0.7)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for k, axes in enumerate(panels):
        axes.set_axis_off()
        if k < len(components):
            v = components[k]
            _show(axes, 0.5 + 0.5 * v / v.abs().max().clamp_min(1e-12))
            axes.set_title(f"{k + 1}: {share[k]:.1%}", fontsize=8, pad=2)
    figure.suptitle(
        f"{title}: first {len(components)} principal components\n"
        f"and their share of the variance ({share.sum():.1%} together)",
        fontsize=10,
    )
    return figure


def plot_position_similarity(position_embeddings: torch.Tensor, grid_hw: tuple[int, int], most: int = 16) -> Figure:
    """Each patch's position embedding compared with all others (ViT, fig. 7 centre); see `position_similarity`.

    The tile in row i, column j shows patch (i, j)'s cosine similarity with every patch, in the same arrangement.

    Args:
        position_embeddings: (1, P, D).
        grid_hw: Patches (down, across).
        most: Tiles down and across; of larger or very long grids evenly spaced patches are compared.
    """
    h, w = grid_hw
    similarity = position_similarity(position_embeddings, grid_hw).numpy()
    down, across = min(h, most), min(w, most)
    across = min(across, max(2, 16 * down * h // w))  # at most 16 times as wide as high, 4 times as high as wide
    down = min(down, max(2, 4 * across * w // h))
    rows, columns = (np.linspace(0, n - 1, k).round().astype(int) for n, k in ((h, down), (w, across)))
    cell = math.ceil(24 / min(h, w))  # canvas pixels, so that the gaps can be narrow
    high, wide, gap = h * cell, w * cell, 3 if min(h, w) <= 24 else math.ceil(min(h, w) / 8)
    canvas = np.full((len(rows) * (high + gap) - gap, len(columns) * (wide + gap) - gap), np.nan)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            tile = similarity[row, column].repeat(cell, axis=0).repeat(cell, axis=1)
            canvas[i * (high + gap) : i * (high + gap) + high, j * (wide + gap) : j * (wide + gap) + wide] = tile

    flat = canvas.shape[1] > 4 * canvas.shape[0]
    scale = (9.0 if flat else 5.2) / max(canvas.shape)  # inches
    width = max(scale * canvas.shape[1] + (0.6 if flat else 1.4), 3.8)
    figure = _figure(width, scale * canvas.shape[0] + (1.7 if flat else 0.9))
    axes = figure.subplots()
    low = min(0.0, math.floor(4 * similarity.min()) / 4)
    image = axes.imshow(canvas, cmap="cividis", vmin=low, vmax=1, interpolation="nearest")
    side = {"location": "bottom", "shrink": 0.5, "aspect": 40} if flat else {"shrink": 0.9, "aspect": 25, "pad": 0.02}
    bar = figure.colorbar(image, ax=axes, **side)
    bar.set_label("cosine similarity")
    bar.outline.set_visible(False)
    axes.set_xticks([j * (wide + gap) + (wide - 1) / 2 for j in range(len(columns))], columns + 1, fontsize=8)
    axes.set_yticks([i * (high + gap) + (high - 1) / 2 for i in range(len(rows))], rows + 1, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="patch column", ylabel="patch row")
    axes.set_title("Similarity of position embeddings", fontsize=11)
    return figure


def plot_attention_distance(distances: torch.Tensor, uniform: float | None = None) -> Figure:
    """Mean attention distance of every head by depth (ViT, fig. 7 right); see `attention_distance`.

    Args:
        distances: (L, A) pixels.
        uniform: Distance of attention spread evenly, for comparison.
    """
    distances = torch.as_tensor(distances)
    L, A = distances.shape
    figure = _figure(5.4, 3.6)
    axes = figure.subplots()
    depth = np.arange(1, L + 1)
    spread = np.linspace(-0.16, 0.16, A) if A > 1 else np.zeros(1)  # heads of equal distance stay apart
    axes.scatter((depth[:, None] + spread).flatten(), distances.flatten(), s=22, color=SKY, edgecolors=BLUE, lw=0.6)
    axes.plot(depth, distances.nanmean(dim=1), color=ORANGE, linewidth=1.5, marker="D", markersize=4)
    handles = [
        Line2D([], [], marker="o", color="none", markerfacecolor=SKY, markeredgecolor=BLUE, label="one head"),
        Line2D([], [], marker="D", markersize=4, color=ORANGE, label=f"mean of {A} heads" if A > 1 else "mean"),
    ]
    if uniform is not None:
        axes.axhline(uniform, color=GREY, linestyle="--", linewidth=1)
        handles.append(_handle(GREY, f"even attention: {uniform:.1f}", "--"))
    top = max(np.nanmax(distances.numpy(), initial=0.0), uniform or 0.0)
    axes.set(xlabel="layer", ylabel="mean attention distance (pixels)", xlim=(0.5, L + 0.5), ylim=(0, 1.1 * top or 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.set_title("How far each head looks", fontsize=11)
    _tidy(axes, grid="y")
    _legend(figure, handles, loc="outside lower center", ncols=3)
    return figure


def plot_attention_rollout(
    images: Sequence[torch.Tensor], maps: torch.Tensor, titles: Sequence[str] | None = None
) -> Figure:
    """Pictures, the attention rollout over each, and the picture lit by it (ViT, fig. 6 and app. D.7).

    The map is drawn over the picture patch by patch, 1 being an even share. In the third column the picture is
    multiplied by the map over its largest value, enlarged bilinearly to the picture's pixels.

    Args:
        images: n pictures (C, H, W), uint8, or floating point in [0, 1].
        maps: (n, h, w), `patch_map` of an `attention_rollout`.
        titles: A line for each picture, e.g. what the model said.
    """
    n = len(maps)
    if len(images) != n or (titles is not None and len(titles) != n):
        raise ValueError(
            f"there are {len(images)} images for {n} maps and {n if titles is None else len(titles)} titles."
        )
    pictures = [_pixels(image) for image in images]
    ratio = max(picture.shape[1] / picture.shape[2] for picture in pictures)
    figure = _figure(7.2, n * (2.1 * ratio + (0.3 if titles else 0.05)) + 0.3)
    for row, (axes, picture) in enumerate(zip(figure.subplots(n, 3, squeeze=False), pictures, strict=True)):
        heat = maps[row].detach().float().cpu()
        _show(axes[0], picture)
        _overlay(figure, axes[1], picture, heat)
        large = torch.nn.functional.interpolate(
            heat[None, None], size=picture.shape[1:], mode="bilinear", align_corners=False
        )[0]
        _show(axes[2], picture * large / large.max().clamp_min(1e-12))
        if row == 0:
            for panel, title in zip(axes, ["picture", "rollout", "picture × rollout"], strict=True):
                panel.set_title(title, fontsize=10)
        if titles is not None:
            # The layout sees a line's height, but not its length: it may run under the next panels.
            _caption(axes[0], " ", x=0, ha="left", fontsize=9)
            _caption(axes[0], _cut(titles[row], 90), x=0, ha="left", fontsize=9, in_layout=False)
    return figure


def plot_attention_heads(image: torch.Tensor, maps: torch.Tensor, title: str = "") -> Figure:
    """Where each head of a layer looks: its attention over the picture, 1 being an even share.

    Args:
        image: (C, H, W), uint8, or floating point in [0, 1].
        maps: (A, h, w), `patch_map` of a layer's attention maps.
        title: Which layer, say.
    """
    picture = _pixels(image)
    A = len(maps)
    rows = math.ceil((A + 1) / 5)
    columns = math.ceil((A + 1) / rows)
    figure = _figure(2.1 * columns, rows * (1.45 * picture.shape[1] / picture.shape[2] + 0.3) + 0.35)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    _show(panels[0], picture)
    panels[0].set_title("picture", fontsize=9)
    for head, axes in enumerate(panels[1:]):
        if head < A:
            _overlay(figure, axes, picture, maps[head].detach().float().cpu(), label="")
            axes.set_title(f"head {head + 1}", fontsize=9)
        else:
            axes.set_axis_off()
    figure.suptitle(f"{title or 'Attention of each head'} (1 is an even share)", fontsize=11)
    return figure


def plot_mistakes(
    images: Sequence[torch.Tensor],
    probabilities: torch.Tensor,
    labels: torch.Tensor,
    class_names: Sequence[str] | None = None,
    count: int = 25,
) -> Figure:
    """The most confidently wrong answers: pictures with their true class, and the predicted one with its probability.

    Args:
        images: n pictures (C, H, W), uint8, or floating point in [0, 1]; only those shown are taken out.
        probabilities: (n, classes).
        labels: Class indices (n,).
        class_names: One for each class; None for their indices.
        count: How many at most.
    """
    probabilities, labels = torch.as_tensor(probabilities), torch.as_tensor(labels)
    names = _names(class_names, probabilities.shape[1])
    chosen = confident_mistakes(probabilities, labels, count).tolist()
    wrong = len(confident_mistakes(probabilities, labels, len(labels)))
    if not chosen:
        figure = _figure(5.0, 1.0)
        figure.text(0.5, 0.5, f"No mistakes in {len(labels):,} pictures.", ha="center", va="center")
        return figure
    columns = min(5, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    pictures = [_pixels(images[i]) for i in chosen]
    ratio = max(picture.shape[1] / picture.shape[2] for picture in pictures)
    figure = _figure(max(1.75 * columns, 4.2), rows * (1.5 * ratio + 0.45) + 0.55)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.set_axis_off()
    for axes, i, picture in zip(panels, chosen, pictures, strict=False):
        _show(axes, picture)
        p, guess = probabilities[i].max(dim=0)
        _caption(axes, _short(names[labels[i]], 20), color=BLUE)
        _caption(axes, f"{_short(names[guess], 14)} {p:.0%}", line=1, color=ORANGE)
    figure.suptitle(f"Most confident of {wrong:,} mistakes in {len(labels):,} pictures", fontsize=11)
    handles = [
        Line2D([], [], marker="s", color="none", markerfacecolor=c, markeredgecolor="none", label=label)
        for c, label in ((BLUE, "true class"), (ORANGE, "predicted class, its probability"))
    ]
    _legend(figure, handles, loc="outside lower center", ncols=2)
    return figure


def plot_reliability(probabilities, labels, bins: int = 15) -> Figure:
    """Is the model right as often as it is sure? Accuracy over confidence in bins, and the calibration error.

    ECE = sum_m |B_m| / n * |acc(B_m) - conf(B_m)| (Guo et al., 2017, eq. 3 and fig. 1); see `metrics.reliability_bins`.

    Args:
        probabilities: (n, classes).
        labels: Class indices (n,).
        bins: How many.
    """
    table = reliability_bins(probabilities, labels, bins)
    error = expected_calibration_error(probabilities, labels, bins)
    edges, count = table["edges"], table["count"]
    accuracy, confidence = np.nan_to_num(table["accuracy"]), np.nan_to_num(table["confidence"])
    middle, width, n = (edges[1:] + edges[:-1]) / 2, 1 / bins, count.sum()
    figure = _figure(5.0, 5.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.bar(middle, accuracy, width, color=SKY, edgecolor="white", label="accuracy")
    bottom = np.minimum(accuracy, confidence)
    gap = {"facecolor": "none", "edgecolor": ORANGE, "linewidth": 0, "hatch": "////"}
    upper.bar(middle, np.abs(accuracy - confidence), width, bottom=bottom, label="gap to the confidence", **gap)
    upper.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfectly calibrated")
    upper.set(ylabel="right answers (%)", ylim=(0, 1))
    lower.bar(middle, count / n, width, color=GREY, edgecolor="white")
    mean = (count * confidence).sum() / n, (count * accuracy).sum() / n
    for x, colour, label in zip(mean, (ORANGE, BLUE), ("mean confidence", "accuracy"), strict=True):
        lower.axvline(x, ymax=1 / 1.4, color=colour, linewidth=1.5, label=f"{label} {x:.1%}")
    lower.set(xlabel="confidence: largest probability (%)", ylabel="pictures (%)", xlim=(0, 1))
    lower.set_ylim(0, 1.4 * count.max() / n)  # room for the legend
    _legend(lower, lower.get_legend_handles_labels()[0], loc="upper center", ncols=2)
    for axes in (upper, lower):
        _tidy(axes)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    upper.set_title(f"Expected calibration error {error:.2%} ({n:,} pictures)", fontsize=11)
    # Below, not inside: a bin of few pictures can have a bar anywhere.
    _legend(figure, upper.get_legend_handles_labels()[0], loc="outside lower center", ncols=3, columnspacing=1)
    return figure


def plot_features(
    features: torch.Tensor,
    labels: torch.Tensor,
    class_names: Sequence[str] | None = None,
    most: int = 2000,
    seed: int = 0,
) -> Figure:
    """Features in the plane, by PCA and by t-SNE, in the classes' colours and shapes; see `project_features`.

    Of more than 20 classes the number stands at the class's median; up to 120 are in the legend.

    Args:
        features: (n, D), e.g. `pooler_output`.
        labels: Class indices (n,).
        class_names: One for each class; None for their indices.
        most: Pictures drawn; of more, so many are chosen at random.
        seed: Of that choice and of t-SNE.
    """
    features, labels = torch.as_tensor(features).detach().float().cpu(), torch.as_tensor(labels).cpu()
    if len(features) != len(labels):
        raise ValueError(f"there are {len(labels)} labels for {len(features)} features.")
    classes = int(labels.max()) + 1 if class_names is None else len(class_names)
    names = _names(class_names, classes)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:most].sort().values
    features, labels = features[chosen], labels[chosen]

    many = classes > 20
    longest = max(len(f"{k} {name}" if many else name) for k, name in enumerate(names))
    size = 6 if many else 9
    # A column is the mark, about 5 letters wide with its gaps, and the name; letters are 0.6 of their size wide.
    columns = max(1, min(8 if many else 5, int(9.6 * 72 / (0.6 * size * (longest + 6)))))
    legend = {"ncols": columns, "fontsize": size, "columnspacing": 1 if many else 2}
    figure = _figure(9.6, 4.5 + (0.13 if many else 0.2) * math.ceil(min(classes, 120) / legend["ncols"]))
    for axes, method in zip(figure.subplots(1, 2), ("pca", "tsne"), strict=True):
        points, share = project_features(features, method, seed)
        for k in labels.unique().tolist():
            x, y = points[labels == k].T
            style = {"color": CATEGORIES[k % len(CATEGORIES)], "marker": MARKERS[k % len(MARKERS)]}
            axes.scatter(
                x,
                y,
                s=10,
                alpha=0.75,
                linewidths=0,
                label=f"{k} {names[k]}" if many else names[k],
                rasterized=True,
                **style,
            )
            if many and method == "tsne":
                text = axes.text(x.median(), y.median(), str(k), fontsize=7, ha="center", va="center")
                text.set_path_effects([withStroke(linewidth=2, foreground="white")])
        axes.set_aspect("equal", adjustable="datalim")
        if method == "pca":
            axes.set(xlabel=f"component 1 ({share[0]:.0%} of the variance)", title="PCA")
            axes.set_ylabel(f"component 2 ({share[1]:.0%} of the variance)")
        else:
            axes.set(xlabel="no unit: only nearness counts", title="t-SNE", xticks=[], yticks=[])
        _tidy(axes)
    if classes <= 120:
        handles = figure.axes[0].get_legend_handles_labels()[0]
        _legend(figure, handles, loc="outside lower center", markerscale=1.3 if many else 2, **legend)
    figure.suptitle(f"Features of {len(labels):,} pictures", fontsize=11)
    return figure


# -- drawing -----------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    """A light figure of `width` x `height` inches that lays itself out."""
    return Figure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")


def _tidy(axes, grid: str = "both"):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def _pixels(image: torch.Tensor) -> torch.Tensor:
    """A picture for drawing: (C, H, W) in [0, 1], 1 or 3 channels."""
    image = torch.as_tensor(image).detach().cpu()
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"a picture must be (1 or 3, H, W), got shape {tuple(image.shape)}.")
    image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    if not (image.min() >= -1e-4 and image.max() <= 1 + 1e-4):
        raise ValueError(
            f"pixels must be uint8 or in [0, 1], got {image.min():g} to {image.max():g}; take them before normalising."
        )
    return image.clamp(0, 1)


def _show(axes, image: torch.Tensor):
    """Draw (1 or 3, H, W) in [0, 1], pixel by pixel, without ticks."""
    axes.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()


def _caption(axes, text: str, x: float = 0.5, line: int = 0, ha: str = "center", fontsize: float = 8, **style):
    """Write a line below the axes."""
    offset = (0, -3 - 1.3 * fontsize * line)
    place = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": ha, "va": "top", "fontsize": fontsize}
    _plain(axes.annotate(text, (x, 0), offset, **place, **style))


def _overlay(figure: Figure, axes, picture: torch.Tensor, heat: torch.Tensor, label: str = "× even share"):
    """Draw a map (h, w) over a picture (C, H, W) in grey, with a colour bar."""
    H, W = picture.shape[1:]
    _show(axes, picture.mean(dim=0, keepdim=True))
    image = axes.imshow(
        heat.numpy(),
        cmap=HEAT,
        alpha=HEAT_ALPHA,
        extent=(-0.5, W - 0.5, H - 0.5, -0.5),
        vmin=0,
        interpolation="nearest",
    )
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=16, pad=0.03)
    bar.solids.set_alpha(1)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.ax.yaxis.set_major_locator(MaxNLocator(4))
    bar.set_label(label, fontsize=8)


def _line_colours(count: int):
    """Okabe and Ito's as far as they go, then shades from dark to light."""
    return OKABE_ITO[:count] if count <= len(OKABE_ITO) else matplotlib.colormaps["viridis"](np.linspace(0, 0.9, count))


def _handle(colour, label: str, linestyle: str = "-", marker: str | None = None) -> Line2D:
    return Line2D([], [], color=colour, label=label, linestyle=linestyle, marker=marker, markerfacecolor="white")


def _legend(place, handles, **kwargs):
    legend = place.legend(handles=handles, **{"frameon": False, "fontsize": 9, **kwargs})
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
    return _cut(name.split(",")[0].strip() or name, length)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
