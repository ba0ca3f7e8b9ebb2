"""Which columns of a dataset hold images and labels, and what its classes are called."""

import difflib
from collections.abc import Iterable

import datasets
import numpy as np

IMAGE_COLUMNS = ("image", "img", "images", "picture", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "category", "cls")  # the last is WebDataset's


def find_column(dataset: datasets.Dataset, wanted: str | None, known: tuple[str, ...], kind: str) -> str:
    """The name of the "image" or "label" column: the one that is wanted, or the only one that it can be.

    A column with a usual name wins over others that could be it, in the order of `known`: image, not mask; fine_label,
    not coarse_label (CIFAR-100); a string called label, not a ClassLabel called domain.

    Raises:
        ValueError: There is no such column, none at all, or several and none of a usual name.
    """
    if wanted is not None:
        if wanted not in dataset.column_names:
            near = difflib.get_close_matches(wanted, dataset.column_names, n=1, cutoff=0.0)
            raise ValueError(
                f"there is no column {wanted!r}; the dataset has {', '.join(dataset.column_names)}"
                f"{f': did you mean {near[0]!r}?' if near else '.'}"
            )
        return wanted
    feature = datasets.Image if kind == "image" else datasets.ClassLabel
    typed = [name for name, value in dataset.features.items() if isinstance(value, feature)]
    named = [name for name in known if name in dataset.column_names]
    can_be = [name for name in named if name in typed or (kind == "label" and holds_names(dataset.features[name]))]
    for candidates in (can_be[:1], typed, named[:1]):  # the last for the error that says what it holds
        if len(candidates) > 1:
            raise ValueError(
                f"columns {', '.join(candidates)} could each be the {kind}s; name one with --{kind}_column_name."
            )
        if candidates:
            return candidates[0]
    raise ValueError(
        f"no {kind} column was found among {', '.join(dataset.column_names)}; name it with --{kind}_column_name."
    )


def find_columns(dataset: datasets.Dataset, image_column: str | None, label_column: str | None) -> tuple[str, str]:
    """Names of the (image, label) columns; see `find_column`."""
    return (
        find_column(dataset, image_column, IMAGE_COLUMNS, "image"),
        find_column(dataset, label_column, LABEL_COLUMNS, "label"),
    )


def holds_names(feature) -> bool:
    """Whether a column holds whole numbers or names."""
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint", "string", "large_string"))


def hidden_labels(dataset: datasets.Dataset, label_column: str) -> str | None:
    """What every label of a split is if its makers keep the true ones: "-1", "None"; None where some are known."""
    if not isinstance(dataset.features.get(label_column), (datasets.ClassLabel, datasets.Value)):
        return None
    return all_hidden(dataset.unique(label_column))


def all_hidden(labels: Iterable) -> str | None:
    """As for `hidden_labels`, of these labels."""
    found = set(labels)
    return " or ".join(sorted(map(str, found))) if found and found <= {-1, None} else None


def find_class_names(dataset: datasets.Dataset, label_column: str, split: str) -> list[str]:
    """The names of a split's classes: those of its ClassLabel, or its labels, sorted."""
    feature = dataset.features[label_column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    if not holds_names(feature):
        raise ValueError(
            f"column {label_column!r} of split {split!r} holds {feature}, e.g. {dataset[0][label_column]!r}; "
            "labels are whole numbers or names."
        )
    values = dataset.unique(label_column)
    if None in values:
        row = list(dataset[label_column]).index(None)
        raise ValueError(f"row {row} of split {split!r} has no label; label or remove it.")
    negative = [value for value in values if isinstance(value, int) and value < 0]
    if negative:
        row = list(dataset[label_column]).index(negative[0])
        raise ValueError(
            f"row {row} of split {split!r}: label {negative[0]} is negative, which usually means that it is not known; "
            "label or remove it."
        )
    return [str(value) for value in sorted(values)]


def read_class_indices(dataset: datasets.Dataset, label_column: str, class_names: list[str], split: str) -> np.ndarray:
    """Labels as indices into `class_names`: int64 (N,)."""
    values = list(dataset[label_column])
    if isinstance(dataset.features[label_column], datasets.ClassLabel):
        names = list(dataset.features[label_column].names)
        if names != class_names:
            raise ValueError(
                f"split {split!r} has other classes than train: {_first_difference(names, class_names)}; "
                "give every split the same classes."
            )
        lookup = {index: index for index in range(len(class_names))}
    else:
        lookup = {name: index for index, name in enumerate(class_names)}
        values = [str(value) if isinstance(value, int) else value for value in values]
    labels = np.empty(len(values), dtype=np.int64)
    for row, value in enumerate(values):
        if value is None:
            raise ValueError(f"row {row} of split {split!r} has no label; label or remove it.")
        if value not in lookup:
            raise ValueError(
                f"row {row} of split {split!r}: label {value!r} is none of train's {len(class_names)} classes "
                f"({', '.join(class_names[:10])}{', ...' if len(class_names) > 10 else ''})."
            )
        labels[row] = lookup[value]
    return labels


def _first_difference(names: list[str], expected: list[str]) -> str:
    extra, missing = sorted(set(names) - set(expected)), sorted(set(expected) - set(names))
    parts = [f"{text} {', '.join(values[:5])}" for text, values in (("extra", extra), ("missing", missing)) if values]
    return "; ".join(parts) or "the same names in another order"
