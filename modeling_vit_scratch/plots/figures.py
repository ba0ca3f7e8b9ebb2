"""Every figure of a model or a run, by what it shows: what `scripts/plot.py` draws."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

from ..data.cuts import Split
from ..evaluation import ImageClassificationMetrics, Predictor
from ..evaluation.inference import as_predictor, find_split
from .analysis import attention_distance, attention_rollout, pooling_attention
from .model import (
    plot_attention_distance,
    plot_attention_heads,
    plot_attention_rollout,
    plot_features,
    plot_patch_filters,
    plot_patch_sequence,
    plot_position_similarity,
    plot_rotary_positions,
)
from .runs import (
    LOSSES,
    plot_confusion_matrix,
    plot_mistakes,
    plot_per_class_accuracy,
    plot_reliability,
    plot_training_curves,
    saved_metrics,
)
from .views import ModelView, on_grid

# What can be drawn, and the name of its figure.
KINDS = {
    "filters": "patch_filters",
    "positions": "position_similarity",
    "patches": "patch_sequence",
    "rollout": "attention_rollout",
    "heads": "attention_heads",
    "distance": "attention_distance",
    "mistakes": "mistakes",
    "reliability": "reliability",
    "features": "features",
    "confusion": "confusion_matrix",
    "per-class": "per_class_accuracy",
    "curves": "training_curves",
}
NEED_IMAGES = {"patches", "rollout", "heads", "distance"}
NEED_LABELS = {"mistakes", "reliability", "features"}
# Drawn from the files that a run saved, where there is no dataset.
SAVED = {"curves", "confusion", "per-class"}


@dataclass(frozen=True)
class Choices:
    """What a figure shows of all that there is.

    Args:
        layer: Of heads, and of rotary positions that differ by layer: from 1, or from -1 backwards.
        count: Number of mistakes.
        max_images: Number of images of patches, rollout and heads.
        features_seed: Of features: which images, and t-SNE.
    """

    layer: int = -1
    count: int = 25
    max_images: int = 4
    features_seed: int = 0


def draw_figures(
    model: Predictor | str | Path | Sequence[str | Path],
    kinds: str | Sequence[str],
    images: str | Path | Image.Image | Sequence[str | Path | Image.Image] = (),
    dataset: str | Split | None = None,
    split: str | None = None,
    *,
    layer: int = -1,
    count: int = 25,
    max_images: int = 4,
    features_seed: int = 0,
    batch_size: int = 64,
    **options,
) -> dict[str, Figure]:
    """Draw what a model learned, what it sees, and how its run went.

        draw_figures("runs/mine", ["filters", "rollout"], images=["photo.jpg"])

    Args:
        model: A folder, file or Hub id, of this package or of a library that `convert_checkpoint` reads; or a
            `Predictor`. Of "curves" alone also the folders of several runs, to be compared.
        kinds: What to draw, one or more of `KINDS`: "filters" and "positions" of the model alone; "patches", "rollout",
            "heads" and "distance" of images or a dataset; "mistakes", "reliability" and "features" of a dataset;
            "confusion" and "per-class" of a dataset, or else as the run saved them; "curves" of a run's history.csv.
        images: Files, folders, patterns such as "*.jpg", or images opened with PIL.
        dataset: Labelled images in place of `images`, as for `evaluate_model`.
        split: Of the dataset, as for `evaluate_model`.
        layer: Of heads, and of rotary positions that differ by layer: from 1, or from -1 backwards.
        count: Number of mistakes.
        max_images: Number of images of patches, rollout and heads.
        features_seed: Of features: which images, and t-SNE.
        batch_size: Images at once.
        **options: Of `load_split`, as for `evaluate_model`.

    Returns:
        The figures, by name, for `save_figure`. The name is that of `KINDS`; patches and heads of several images are
        figures of their own, numbered from "..._1". Rotary positions are drawn as "rotary_positions", and the heads of
        attention pooling, beside those of the layer, as "pooling_heads".

    Raises:
        ValueError: A kind is unknown, lacks what it is drawn from, or cannot be drawn of this model; the model, the
            dataset or an image cannot be read.
        OSError: A file of the run is missing.
    """
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    images = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
    runs = list(model) if isinstance(model, (list, tuple)) else [model]
    check_kinds(kinds, len(runs), has_images=bool(images) or dataset is not None, has_labels=dataset is not None)
    for name, number in (("count", count), ("max_images", max_images)):
        if number < 1:
            raise ValueError(f"{name} ({number}) must be at least 1.")
    view = None
    if not set(kinds) <= SAVED or (dataset is not None and set(kinds) != {"curves"}):
        predictor = as_predictor(runs[0])
        found = None if dataset is None else find_split(dataset, [predictor], split, **options)
        view = ModelView(predictor, images, found, max_images, batch_size)
    paths = [run.name if isinstance(run, Predictor) else str(run) for run in runs]
    figures = {}
    for kind in kinds:
        figures |= draw_figure(kind, view, paths, Choices(layer, count, max_images, features_seed))
    return figures


def check_kinds(kinds: Sequence[str], num_models: int, has_images: bool, has_labels: bool):
    """Raise a ValueError if something cannot be drawn of so many models, of images or not, with labels or not."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no KIND; known are {', '.join(KINDS)}.")
    if num_models < 1 or (num_models > 1 and set(kinds) != {"curves"}):
        raise ValueError(f"there are {num_models} models; only curves take more than one.")
    for kind in kinds:
        if kind in NEED_LABELS and not has_labels:
            raise ValueError(f"{kind} needs a labelled dataset.")
        if kind in NEED_IMAGES and not has_images:
            raise ValueError(f"{kind} needs images, or a dataset.")


def draw_figure(kind: str, view: ModelView | None, runs: Sequence[str], choices: Choices) -> dict[str, Figure]:
    """The figures of a kind, by name; `draw_figures` says which kind needs what.

    Args:
        kind: One of `KINDS`.
        view: The model and its images; None will do for a kind of `SAVED`.
        runs: The folder of the model, or of several runs.
        choices: What to show.

    Raises:
        ValueError, OSError: What it is drawn from is missing or wrong.
    """
    name = KINDS[kind]
    if kind in ONE_FOR_EACH_IMAGE:
        return _numbered(name, ONE_FOR_EACH_IMAGE[kind](view, choices))
    if kind == "heads":
        figures = _numbered(name, _draw_heads(view, choices))
        pooled = view.config.pooling == "attention"
        return figures | _numbered("pooling_heads", _draw_pooling(view, choices)) if pooled else figures
    if kind == "positions":
        return _draw_positions(view, choices)
    return {name: _draw_saved(kind, view, runs) if kind in SAVED else OF_A_VIEW[kind](view, choices)}


def _numbered(name: str, figures: list[Figure]) -> dict[str, Figure]:
    """By name; those of several images by name and number."""
    return {name if len(figures) == 1 else f"{name}_{i + 1}": figure for i, figure in enumerate(figures)}


# -- of what a run saved -----------------------------------------------------------------------------------------------


def _draw_saved(kind: str, view: ModelView | None, runs: Sequence[str]) -> Figure:
    if kind == "curves":
        return _draw_curves(runs)
    matrix, per_class, names = _results(view, runs[0])
    return plot_confusion_matrix(matrix, names) if kind == "confusion" else plot_per_class_accuracy(per_class, names)


def _draw_curves(runs: Sequence[str]) -> Figure:
    losses = {LOSSES.get(saved_metrics(run).get("task"), LOSSES["image-classification"]) for run in runs}
    if len(losses) > 1:
        raise ValueError(f"the losses of these runs are not of one kind: {' and '.join(sorted(losses))}.")
    histories = runs[0] if len(runs) == 1 else dict(zip(run_labels(runs), runs, strict=True))
    return plot_training_curves(histories, losses.pop())


def _results(view: ModelView | None, run: str):
    """Confusion matrix, accuracy of each class and class names: of the split, or as the run saved them."""
    if view is not None and view.records is not None:
        probabilities, labels = view.judgements()
        result = ImageClassificationMetrics().compute(predictions=probabilities, references=labels)
        return result["confusion_matrix"], result["per_class_accuracy"], view.class_names
    metrics = saved_metrics(run)
    result = metrics.get("test") or metrics.get("validation", {})
    if "confusion_matrix" not in result:
        raise ValueError(f"{run} has no metrics.json with a confusion matrix; add --dataset NAME.")
    return result["confusion_matrix"], list(result["per_class_accuracy"].values()), metrics["dataset"]["class_names"]


def run_labels(runs: Sequence[str]) -> list[str]:
    """Names of runs in a legend: the last parts of their paths, as many as make them differ.

    Raises:
        ValueError: The same run is named twice.
    """
    parts = [Path(run).parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same run is named twice among {', '.join(runs)}.")


# -- of a model and its images -----------------------------------------------------------------------------------------


def _draw_filters(view: ModelView, choices: Choices) -> Figure:
    embeddings = view.model.vit.embeddings.patch_embeddings
    if view.config.stem_channels:
        weight = embeddings.stem[0].convolution.weight
        return plot_patch_filters(weight, (3, 3), title="Kernels of the first convolution")
    return plot_patch_filters(embeddings.projection.weight, view.config.patch_hw, title="Patch filters")


def _draw_positions(view: ModelView, choices: Choices) -> dict[str, Figure]:
    """Of position embeddings, of rotary positions, or of both."""
    config, vit, figures = view.config, view.model.vit, {}
    if vit.embeddings.position_embeddings is not None:
        figures[KINDS["positions"]] = plot_position_similarity(vit.embeddings.position_embeddings, config.grid_hw)
    if len(vit.rotary_positions) > 0:
        layer = _chosen_layer(view, choices) if len(vit.rotary_positions) > 1 else 0
        whose = f", layer {layer + 1} of {config.num_hidden_layers}" if config.rope_frequencies == "mixed" else ""
        figures["rotary_positions"] = plot_rotary_positions(
            vit.rotary_positions[layer], config.grid_hw, f"What rotary positions do to attention{whose}"
        )
    if not figures:
        raise ValueError("the model has no positions (position_embedding_type='none').")
    return figures


def _draw_distance(view: ModelView, choices: Choices) -> Figure:
    h, w = view.config.grid_hw
    even = attention_distance([torch.ones(1, 1, h * w, h * w)], (h, w), view.config.patch_hw, 0).item()
    return plot_attention_distance(view.distance(), uniform=even)


def _draw_features(view: ModelView, choices: Choices) -> Figure:
    return plot_features(view.answers.features, view.answers.labels, view.class_names, seed=choices.features_seed)


def _draw_reliability(view: ModelView, choices: Choices) -> Figure:
    return plot_reliability(*view.judgements())


def _draw_mistakes(view: ModelView, choices: Choices) -> Figure:
    return plot_mistakes(view, *view.judgements(), view.class_names, choices.count)


def _draw_rollout(view: ModelView, choices: Choices) -> Figure:
    pixels, titles = view.pixels[: choices.max_images], view.titles[: choices.max_images]
    output = view.look(torch.stack(pixels))
    maps = on_grid(view.predictor, attention_rollout(output.attentions), output)
    if view.predictor.can_classify:
        p, guess = view.predictor.probabilities(output.logits).max(dim=1)
        answers = [f"{view.class_names[int(k)]} ({q:.0%})" for k, q in zip(guess, p, strict=True)]
        titles = [f"{title}: the model says {answer}" for title, answer in zip(titles, answers, strict=True)]
    return plot_attention_rollout(pixels, maps, titles, view.image_title(range(len(pixels))))


def _draw_patches(view: ModelView, choices: Choices) -> list[Figure]:
    pixels, patch_hw = view.pixels[: choices.max_images], view.config.patch_hw
    return [plot_patch_sequence(image, patch_hw, view.image_title([i])) for i, image in enumerate(pixels)]


def _draw_heads(view: ModelView, choices: Choices) -> list[Figure]:
    layer = _chosen_layer(view, choices)
    pixels = view.pixels[: choices.max_images]
    output = view.look(torch.stack(pixels))
    maps = on_grid(view.predictor, output.attentions[layer], output)
    title = f"Attention of each head, layer {layer + 1} of {view.config.num_hidden_layers}"
    return _each_with_heads(view, pixels, maps, title)


def _draw_pooling(view: ModelView, choices: Choices) -> list[Figure]:
    pixels = view.pixels[: choices.max_images]
    output = view.look(torch.stack(pixels))
    maps = pooling_attention(view.model.vit, output.hidden_states[-1])  # (B, A, N)
    maps = (maps * maps.shape[-1]).unflatten(-1, view.config.grid_hw)  # 1 is an even share
    title = "Attention of each head of the pooling"
    return _each_with_heads(view, pixels, maps, title)


def _each_with_heads(view: ModelView, pixels: Sequence[torch.Tensor], maps: torch.Tensor, title: str) -> list[Figure]:
    return [
        plot_attention_heads(image, heads, title, view.image_title([i]))
        for i, (image, heads) in enumerate(zip(pixels, maps, strict=True))
    ]


def _chosen_layer(view: ModelView, choices: Choices) -> int:
    L = view.config.num_hidden_layers
    layer = choices.layer - 1 if choices.layer > 0 else choices.layer + L
    if choices.layer == 0 or not 0 <= layer < L:
        raise ValueError(f"--layer ({choices.layer}) must be 1 to {L}, or -1 to {-L} from the last.")
    return layer


OF_A_VIEW = {
    "filters": _draw_filters,
    "rollout": _draw_rollout,
    "distance": _draw_distance,
    "mistakes": _draw_mistakes,
    "reliability": _draw_reliability,
    "features": _draw_features,
}
ONE_FOR_EACH_IMAGE = {"patches": _draw_patches}
