"""What people would rather look at than read, as matplotlib figures.

    analysis  what is computed of weights, attention maps and features before it is drawn
    model     what a model sees and has learned: patches, filters, positions, attention, features, reconstructions
    runs      what a run and a split show: curves, confusion, accuracy of each class, mistakes, reliability
    speed     what scripts/benchmark.py measured
    drawing   colours, captions, and how a figure is saved
    views     a model, images, and what it makes of them, computed once for all figures
    figures   every figure of a model or a run by what it shows, for `scripts/plot.py` and from Python

`draw_figures` draws what is named; the caller saves a figure, as PNG and SVG, with `save_figure`.
"""

from .analysis import (
    attention_distance,
    attention_on_grid,
    attention_rollout,
    filter_components,
    overlay_pixels,
    patch_mosaic,
    patch_sequence,
    pooling_attention,
    position_similarity,
    project_features,
    rotary_scores,
)
from .drawing import save_figure
from .figures import draw_figures
from .model import (
    plot_attention_distance,
    plot_attention_heads,
    plot_attention_rollout,
    plot_features,
    plot_patch_filters,
    plot_patch_sequence,
    plot_position_similarity,
    plot_reconstructions,
    plot_rotary_positions,
)
from .runs import (
    LOSSES,
    confident_mistakes,
    plot_confusion_matrix,
    plot_mistakes,
    plot_per_class_accuracy,
    plot_reliability,
    plot_training_curves,
    read_history,
)
from .speed import plot_bars, plot_race, plot_scaling, plot_tradeoff

__all__ = [
    "LOSSES",
    "attention_distance",
    "attention_on_grid",
    "attention_rollout",
    "confident_mistakes",
    "draw_figures",
    "filter_components",
    "overlay_pixels",
    "patch_mosaic",
    "patch_sequence",
    "plot_attention_distance",
    "plot_attention_heads",
    "plot_attention_rollout",
    "plot_bars",
    "plot_confusion_matrix",
    "plot_features",
    "plot_mistakes",
    "plot_patch_filters",
    "plot_patch_sequence",
    "plot_per_class_accuracy",
    "plot_position_similarity",
    "plot_race",
    "plot_reconstructions",
    "plot_reliability",
    "plot_rotary_positions",
    "plot_scaling",
    "plot_tradeoff",
    "plot_training_curves",
    "pooling_attention",
    "position_similarity",
    "project_features",
    "read_history",
    "rotary_scores",
    "save_figure",
]
