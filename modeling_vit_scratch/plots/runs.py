"""What a run and a split show: curves, confusion, accuracy of each class, mistakes, reliability."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from ..evaluation.metrics import expected_calibration_error, reliability_bins
from .drawing import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    SKY,
    as_pixels,
    axis_names,
    caption,
    draw_legend,
    legend_handle,
    line_colours,
    new_figure,
    plain,
    short,
    show_image,
    tidy,
)

# What a run's loss is, by the task that its metrics.json names.
LOSSES = {
    "image-classification": "cross-entropy (nats)",
    "masked-image-modeling": "mean error (standard deviations)",
}


def plot_training_curves(
    histories: str | Path | Mapping[str, str | Path], loss: str = LOSSES["image-classification"]
) -> Figure:
    """Loss (training and validation) and validation accuracy over the epochs, of one or several runs.

    The values are those of the files. Of more than 200 training losses, the running mean over a fiftieth of them is
    drawn in front of the values. Marked is the step whose weights the run kept, as the `metrics.json` beside the
    history says; where it does not, the last of the best accuracies.

    Args:
        histories: A `history.csv` or the folder that holds it, or several by name. Columns: "epoch" or "step"; "loss",
            "eval_loss" and "eval_accuracy" (in [0, 1]), as far as there are any. Cells may be empty.
        loss: What the loss is, and its unit.

    Raises:
        ValueError: A file has no rows, lacks these columns, or holds something that is not a number; or `metrics.json`
            cannot be read.
    """
    single = not isinstance(histories, Mapping)
    runs = {"": histories} if single else dict(histories)
    if not runs:
        raise ValueError("there are 0 histories; give at least 1.")
    marks = {name: _kept_step(path) for name, path in runs.items()}
    runs = {name: read_history(path) for name, path in runs.items()}
    unit = "epoch" if all(np.isfinite(run["epoch"]).any() for run in runs.values()) else "step"
    accurate = any(np.isfinite(run["eval_accuracy"]).any() for run in runs.values())

    figure = new_figure(9.0 if accurate else 5.0, 3.8)
    panels = figure.subplots(1, 2 if accurate else 1, squeeze=False)[0]
    entries = []
    for (name, run), colour in zip(runs.items(), line_colours(len(runs)), strict=True):
        validation, marker = ORANGE if single else colour, None
        _draw_training(panels[0], run[unit], run["loss"], colour, "-" if single else "--")
        _draw_evaluation(panels[0], run[unit], run["eval_loss"], validation)
        if np.isfinite(run["eval_accuracy"]).any():
            _draw_evaluation(panels[1], run[unit], run["eval_accuracy"], validation)
            row, word = _marked_row(run, marks[name])
            if row is not None:
                x, y = run[unit][row], run["eval_accuracy"][row]
                panels[1].plot(x, y, "o", color=validation, markersize=7, markerfacecolor="white")
                name = f"{name}{': ' if name else ''}{word} {y:.2%} at {unit} {x:g}"
                marker = "o"
        if name:
            entries.append(legend_handle(validation, name, marker=marker))

    for axes in panels:
        axes.set_xlabel(unit)
        tidy(axes)
    panels[0].set(title="Loss", ylabel=loss)
    kinds = [("training", "loss", BLUE, "-" if single else "--"), ("validation", "eval_loss", ORANGE, "-")]
    draw_legend(
        panels[0],
        [
            legend_handle(colour if single else GREY, label, linestyle)
            for label, column, colour, linestyle in kinds
            if any(np.isfinite(run[column]).any() for run in runs.values())
        ],
    )
    if accurate:
        panels[1].set(title="Validation accuracy", ylabel="accuracy (%)")
        panels[1].yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    if entries:  # outside: a curve may lie anywhere
        draw_legend(figure, entries, loc="outside lower center", ncols=1 if len(entries) < 4 else 2)
    return figure


def saved_metrics(run: str | Path) -> dict:
    """What the `metrics.json` in a run's folder holds; nothing where there is none.

    Raises:
        ValueError: It cannot be read.
    """
    file = Path(run) / "metrics.json"
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} is no JSON file: {error}; mend or remove it.") from error


def _kept_step(history: str | Path) -> int | None:
    """The step whose weights a run kept, None where it does not say."""
    history = Path(history)
    return saved_metrics(history if history.is_dir() else history.parent).get("training", {}).get("kept_step")


def _marked_row(run: Mapping[str, np.ndarray], kept: int | None) -> tuple[int | None, str]:
    """The row of the kept step, None if its accuracy was not measured, or else of the best; and what it is."""
    accuracy = run["eval_accuracy"]
    if kept is not None:
        rows, word = np.flatnonzero(np.isfinite(accuracy) & (run["step"] == kept)), "kept"
    else:
        rows, word = np.flatnonzero(accuracy == np.nanmax(accuracy)), "best"
    return (rows[-1] if len(rows) else None), word  # of equals the last, as training keeps it


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

    Row i, column j is the number of images of class i that were called j. The colour is that number over the sum of
    the row, on a square-root scale, so that rare confusions show beside the diagonal. Numbers are written up to 25
    classes, names up to 120; below the columns they stand upright where one is wider than its column.

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
    names = axis_names(class_names, classes)
    rows = matrix.sum(axis=1, keepdims=True)
    share = matrix / np.maximum(rows, 1)

    side = min(max(0.55 * classes, 2.4), 7.0) if classes <= 25 else 8.8  # inches of the matrix itself
    figure = new_figure(side, side)
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
    axes.set_xticks(shown, [names[i] for i in shown], fontsize=size)
    axes.set_yticks(shown, [names[i] for i in shown], fontsize=size)
    plain(*axes.get_xticklabels(), *axes.get_yticklabels())
    longest = max(text.get_window_extent().width for text in axes.get_yticklabels()) / figure.dpi
    upright = longest > 0.9 * step * side / classes
    axes.tick_params(axis="x", rotation=90 if upright else 0)
    axes.tick_params(length=0)
    # Around the matrix: names, labels, colour bar and title; this last is on the figure, and may be wider.
    figure.set_size_inches(max(side + longest + 1.7, 4.6), side + (longest if upright else size / 72) + 1.0)
    figure.set_layout_engine("compressed")
    axes.spines[:].set_visible(False)
    n, right = int(matrix.sum()), int(matrix.diagonal().sum())
    axes.set(xlabel="predicted class", ylabel="true class")
    figure.suptitle(f"Confusion matrix: {right / max(n, 1):.2%} of {n:,} images right", fontsize=11)
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
    names = axis_names(class_names, len(values))
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
    figure = new_figure(6.0 if len(columns) == 1 else 4.0 * len(columns), 1.4 + (0.28 if rows <= 12 else 0.18) * rows)
    for axes, classes in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        axes.barh(range(len(classes)), np.nan_to_num(values[classes]), color=SKY, height=0.75)
        for row, value in enumerate(values[classes]):
            none = np.isnan(value)
            text = "no examples" if none else f"{value:.1%}"
            axes.text(0.01 if none else 1.14, row, text, ha="left" if none else "right", va="center", fontsize=size)
        axes.axvline(mean, color=ORANGE, linewidth=1.2, linestyle="--")
        axes.set_yticks(range(len(classes)), [names[i] for i in classes], fontsize=size)
        plain(*axes.get_yticklabels())
        axes.set(xlabel="accuracy (%)", xlim=(0, 1.15), ylim=(rows - 0.4, -0.6), xticks=np.linspace(0, 1, 6))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        tidy(axes, grid="x")
        axes.tick_params(axis="y", length=0)
    part = f": the 30 best and 30 worst of {len(values)}" if len(values) > 120 else ""
    figure.suptitle(f"Accuracy of each class{part} (dashed: mean {mean:.2%})", fontsize=11)
    return figure


def confident_mistakes(probabilities: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the wrong answers, the most confident first: probabilities (n, classes), labels (n,) -> (k,)."""
    confidence, predicted = torch.as_tensor(probabilities).max(dim=1)
    wrong = (predicted != torch.as_tensor(labels)).nonzero().flatten()
    return wrong[confidence[wrong].argsort(descending=True, stable=True)][:count]


def plot_mistakes(
    images: Sequence[torch.Tensor],
    probabilities: torch.Tensor,
    labels: torch.Tensor,
    class_names: Sequence[str] | None = None,
    count: int = 25,
) -> Figure:
    """The most confidently wrong answers: images with their true class, and the predicted one with its probability.

    Args:
        images: n images (C, H, W), uint8, or floating point in [0, 1]; only those shown are taken out.
        probabilities: (n, classes).
        labels: Class indices (n,).
        class_names: One for each class; None for their indices.
        count: Number shown at most.
    """
    probabilities, labels = torch.as_tensor(probabilities), torch.as_tensor(labels)
    names = axis_names(class_names, probabilities.shape[1])
    chosen = confident_mistakes(probabilities, labels, count).tolist()
    wrong = len(confident_mistakes(probabilities, labels, len(labels)))
    if not chosen:
        figure = new_figure(5.0, 1.0)
        figure.text(0.5, 0.5, f"No mistakes in {len(labels):,} images.", ha="center", va="center")
        return figure
    columns = min(5, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    images = [as_pixels(images[i]) for i in chosen]
    ratio = max(image.shape[1] / image.shape[2] for image in images)
    figure = new_figure(max(1.75 * columns, 4.2), rows * (1.5 * ratio + 0.45) + 0.55)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.set_axis_off()
    for axes, i, image in zip(panels, chosen, images, strict=False):
        show_image(axes, image)
        p, guess = probabilities[i].max(dim=0)
        caption(axes, short(names[labels[i]], 20), color=BLUE)
        caption(axes, f"{short(names[guess], 14)} {p:.0%}", line=1, color=ORANGE)
    figure.suptitle(f"Most confident of {wrong:,} mistakes in {len(labels):,} images", fontsize=11)
    handles = [
        Line2D([], [], marker="s", color="none", markerfacecolor=c, markeredgecolor="none", label=label)
        for c, label in ((BLUE, "true class"), (ORANGE, "predicted class, its probability"))
    ]
    draw_legend(figure, handles, loc="outside lower center", ncols=2)
    return figure


def plot_reliability(probabilities, labels, bins: int = 15) -> Figure:
    """Is the model right as often as it is sure? Accuracy over confidence in bins, and the calibration error.

    ECE = sum_m |B_m| / n * |acc(B_m) - conf(B_m)| (Guo et al., 2017, eq. 3 and fig. 1); see `reliability_bins`.

    Args:
        probabilities: (n, classes).
        labels: Class indices (n,).
        bins: Number of bins.
    """
    table = reliability_bins(probabilities, labels, bins)
    error = expected_calibration_error(probabilities, labels, bins)
    edges, count = table["edges"], table["count"]
    accuracy, confidence = np.nan_to_num(table["accuracy"]), np.nan_to_num(table["confidence"])
    middle, width, n = (edges[1:] + edges[:-1]) / 2, 1 / bins, count.sum()
    figure = new_figure(5.0, 5.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.bar(middle, accuracy, width, color=SKY, edgecolor="white", label="accuracy")
    bottom = np.minimum(accuracy, confidence)
    gap = {"facecolor": "none", "edgecolor": ORANGE, "linewidth": 0, "hatch": "////"}
    upper.bar(middle, np.abs(accuracy - confidence), width, bottom=bottom, label="gap to the confidence", **gap)
    upper.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfectly calibrated")
    upper.set(ylabel="accuracy (%)", ylim=(0, 1))
    lower.bar(middle, count / n, width, color=GREY, edgecolor="white")
    mean = (count * confidence).sum() / n, (count * accuracy).sum() / n
    for x, colour, label in zip(mean, (ORANGE, BLUE), ("mean confidence", "accuracy"), strict=True):
        lower.axvline(x, ymax=1 / 1.4, color=colour, linewidth=1.5, label=f"{label} {x:.1%}")
    lower.set(xlabel="confidence: largest probability (%)", ylabel="images (%)", xlim=(0, 1))
    lower.set_ylim(0, 1.4 * count.max() / n)  # room for the legend
    draw_legend(lower, lower.get_legend_handles_labels()[0], loc="upper center", ncols=2)
    for axes in (upper, lower):
        tidy(axes)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    upper.set_title(f"Expected calibration error {error:.2%} ({n:,} images)", fontsize=11)
    # Below, not inside: a bin of few images can have a bar anywhere.
    draw_legend(figure, upper.get_legend_handles_labels()[0], loc="outside lower center", ncols=3, columnspacing=1)
    return figure
