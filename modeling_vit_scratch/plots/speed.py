"""What scripts/benchmark.py measured: bars, scaling, the race, and what speed costs."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter

from .drawing import (
    BLUE,
    GREY,
    SKY,
    draw_legend,
    line_colours,
    new_figure,
    plain,
    tidy,
)


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
    colours = dict(zip(names, line_colours(len(names)), strict=True))
    figure = new_figure(7.5, 0.8 + sum(0.45 + 0.26 * len(bars) for bars in groups.values()))
    heights = [len(bars) for bars in groups.values()]
    panels = figure.subplots(len(groups), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    longest = max(value for bars in groups.values() for value, _ in bars.values())
    for axes, (title, bars) in zip(panels, groups.items(), strict=True):
        values = [value for value, _ in bars.values()]
        axes.barh(range(len(bars)), values, color=[colours[name] for name in bars], height=0.75)
        for row, (value, text) in enumerate(bars.values()):
            patch = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # where the dashed line would cross it
            plain(axes.text(value + 0.01 * longest, row, text, va="center", fontsize=8, bbox=patch))
        if reference is not None:
            axes.axvline(reference, color=GREY, linewidth=1.0, linestyle="--")
        axes.set_yticks(range(len(bars)), list(bars), fontsize=9)
        axes.set(xlim=(0, 1.3 * longest or 1), ylim=(len(bars) - 0.5, -0.5))
        axes.set_title(title, fontsize=10, loc="left")
        plain(*axes.get_yticklabels(), axes.title)
        tidy(axes, grid="x")
        axes.tick_params(axis="y", length=0)
    panels[-1].set_xlabel(label)
    return figure


def plot_scaling(
    panels: Mapping[str, Mapping[str, Sequence]], laws: Mapping[str, Mapping[str, tuple[float, float]]] | None = None
) -> Figure:
    """How quantities grow: a column of axes for each thing that was varied, a row for each quantity.

    Args:
        panels: By the name of what was varied: "x", its values, numbers (drawn as a line, both axes logarithmic) or
            names (drawn as bars), and each quantity by name, None where it is not known. All have the same quantities.
        laws: By panel and quantity, the exponent and the factor of a power law, factor * x ** exponent, drawn as a
            dashed line.

    Raises:
        ValueError: There are no panels, or their quantities differ.
    """
    quantities = [[name for name in panel if name != "x"] for panel in panels.values()]
    if not quantities or any(names != quantities[0] for names in quantities):
        raise ValueError(f"panels must have the same quantities, got {quantities}.")
    rows = quantities[0]
    figure = new_figure(3.2 * len(panels), 2.6 * len(rows))
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
                if quantity in (laws or {}).get(varied, {}):
                    _draw_law(axes, x, *laws[varied][quantity])
            tidy(axes)
    return figure


def _draw_law(axes, x: Sequence[float], exponent: float, factor: float):
    """A dashed line over the same axes, and its exponent."""
    limits = axes.get_ylim()
    axes.plot(x, [factor * value**exponent for value in x], "--", color=GREY, linewidth=1.0, zorder=1)
    axes.set_ylim(limits)
    axes.text(0.05, 0.95, f"$x^{{{exponent:.2f}}}$", color=GREY, fontsize=9, va="top", transform=axes.transAxes)


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
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    for (name, (seconds, accuracy)), colour in zip(curves.items(), line_colours(len(curves)), strict=True):
        label = f"{name}: {max(accuracy):.2%} in {seconds[-1]:,.0f} s"
        axes.plot(seconds, accuracy, "o-", color=colour, linewidth=1.5, markersize=3, label=label)
    axes.set(xscale="log", xlabel=f"{unit} of training", ylabel="validation accuracy (%)")
    axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:,g}", minor_formatter="")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    tidy(axes)
    draw_legend(axes, axes.get_lines(), loc="lower right")
    return figure


def plot_tradeoff(points: Mapping[object, tuple[float, float, tuple[float, float]]], label: str) -> Figure:
    """What speed costs: accuracy against it, a point for each setting, joined in order, with its interval.

    Args:
        points: By setting, which stands at the point: the speed, the accuracy in [0, 1], and its interval.
        label: What the speed is.

    Raises:
        ValueError: There are no points.
    """
    if not points:
        raise ValueError("there is nothing to draw; give at least 1 point.")
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    speeds, accuracies, intervals = zip(*points.values(), strict=True)
    ends = [[y - low for y, (low, _) in zip(accuracies, intervals, strict=True)]]
    ends += [[high - y for y, (_, high) in zip(accuracies, intervals, strict=True)]]
    axes.errorbar(speeds, accuracies, ends, fmt="o-", color=BLUE, ecolor=GREY, linewidth=1.5, elinewidth=0.8, capsize=2)
    for name, speed, accuracy in zip(points, speeds, accuracies, strict=True):
        plain(axes.annotate(str(name), (speed, accuracy), (5, 5), textcoords="offset points", fontsize=9))
    axes.set(xlabel=label, ylabel="accuracy (%)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    tidy(axes)
    return figure
