"""The encoded images and checked labels of each split, and how validation is cut from train."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from .columns import IMAGE_COLUMNS, find_class_names, find_column, find_columns, hidden_labels, read_class_indices
from .sources import VALIDATION_SPLITS, load_image

logger = logging.getLogger(__name__)


# Images that an error names where many are bad.
MAX_NAMED = 10


class BadImages(ValueError):
    """Images that cannot be used, each with what is wrong; the text names up to ten of them.

    Args:
        found: (Where it is and what is wrong, the mend) of each.
    """

    def __init__(self, found: list[tuple[str, str]]):
        self.found = found
        text = "; ".join(found[0]) + "."
        if len(found) > 1:
            shown = "".join(f"\n  {what}" for what, _ in found[:MAX_NAMED])
            more = f"\n  and {len(found) - MAX_NAMED:,} more" if len(found) > MAX_NAMED else ""
            text = f"{len(found):,} images cannot be used; repair or remove them:{shown}{more}"
        super().__init__(text)


class Records:
    """Encoded images and checked labels of one split, by row; no image is decoded here."""

    def __init__(self, dataset: datasets.Dataset, image_column: str, labels: np.ndarray, rows: np.ndarray, split: str):
        self.dataset, self.image_column, self.rows, self.split = dataset, image_column, rows, split
        self.labels = labels[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: np.ndarray) -> "Records":
        records = Records.__new__(Records)
        records.dataset, records.image_column, records.split = self.dataset, self.image_column, self.split
        records.rows, records.labels = self.rows[indices], self.labels[indices]
        return records

    def encoded(self) -> Iterator[bytes]:
        """The files' contents, in order; nothing of a missing image."""
        for value in self._values():
            value = value or {"bytes": b"", "path": None}
            yield Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]

    def files(self, folder: str | Path) -> list[str] | None:
        """The images' paths below a folder; None where they are not all files there."""
        root, found = os.path.abspath(folder), []
        for value in self._values():
            path = Path(os.path.abspath(value["path"])) if value and value["bytes"] is None else None
            if path is None or not path.is_relative_to(root):
                return None
            found.append(path.relative_to(root).as_posix())
        return found

    def _values(self) -> Iterator[dict | None]:
        """What the image column holds, row by row, read some at a time."""
        for start in range(0, len(self), 1024):
            yield from self.dataset[self.rows[start : start + 1024]][self.image_column]

    def image(self, index: int, num_channels: int) -> Image.Image:
        row = int(self.rows[index])
        return self._decode(self.dataset[row][self.image_column], row, num_channels)

    def images(self, indices: range, num_channels: int) -> list[Image.Image]:
        found, bad = self.readable(indices, num_channels)
        if bad:
            raise BadImages(bad)
        return found

    def readable(self, indices: range, num_channels: int) -> tuple[list[Image.Image | None], list[tuple[str, str]]]:
        """The images, None for each bad one; and what is wrong with those, as for `BadImages`."""
        rows = self.rows[indices.start : indices.stop]
        images, bad = [], []
        for value, row in zip(self.dataset[rows][self.image_column], rows, strict=True):
            try:
                images.append(self._decode(value, int(row), num_channels))
            except BadImages as error:
                images.append(None)
                bad += error.found
        return images, bad

    def where(self, index: int) -> str:
        """The place of an image in words: its row in the dataset, and its file if there is one."""
        row = int(self.rows[index])
        value = self.dataset[row][self.image_column] or {}
        return self._where(row, value.get("path"))

    def _where(self, row: int, path: str | None) -> str:
        return f"row {row} of split {self.split!r}" + (f" ({path})" if path else "")

    def _decode(self, value: dict | None, row: int, num_channels: int) -> Image.Image:
        path = (value or {}).get("path")
        if value is None or (value["bytes"] is None and not path):
            raise BadImages([(f"{self._where(row, None)}: there is no image", "remove the row")])
        try:
            return load_image(path if value["bytes"] is None else value["bytes"], num_channels)
        except (ValueError, OSError) as error:
            raise BadImages([(f"{self._where(row, path)}: {error}", "repair or remove it")]) from error


@dataclass(frozen=True)
class Cut:
    """How the splits of a run were made of its dataset; `load_splits` explains the settings.

    Args:
        method: "given" (the dataset has a validation split), "stratified" (`load_records`), "random"
            (`load_unlabelled`), or "by content" (`is_held_out`).
        train_val_split: Share of train that was held out; None where none was.
        seed: Of the cut, and of what the limits left.
        max_train_samples: None for no limit.
        max_eval_samples: Likewise.
    """

    method: str
    train_val_split: float | None
    seed: int
    max_train_samples: int | None = None
    max_eval_samples: int | None = None

    @classmethod
    def read(cls, value: dict) -> "Cut":
        """The cut that `asdict` made a dictionary of.

        Raises:
            ValueError: It is no such dictionary.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(value, dict) or set(value) != set(names):
            raise ValueError(f"a cut has {', '.join(names)}, not {value!r}")
        method, share, *numbers = (value[name] for name in names)
        known = method in ("stratified", "random", "by content") and type(share) is float and 0 < share < 1
        known = known or (method == "given" and share is None)
        optional = (
            (type(number) is int and (i == 0 or number > 0)) or (number is None and i > 0)
            for i, number in enumerate(numbers)
        )
        if not known or not all(optional):
            raise ValueError(f"there is no cut {value!r}")
        return cls(**value)

    def __str__(self) -> str:
        share = [] if self.train_val_split is None else [f"share {self.train_val_split:g}"]
        limits = [(name, getattr(self, name)) for name in ("max_train_samples", "max_eval_samples")]
        limits = [f"{name} {limit:,}" for name, limit in limits if limit is not None]
        return ", ".join([self.method, *share, f"seed {self.seed}", *limits])


def check_limits(train_val_split: float, max_train_samples: int | None = None, max_eval_samples: int | None = None):
    """Refuse a share that is none, and limits that leave no image."""
    if not 0 < train_val_split < 1:
        raise ValueError(f"train_val_split ({train_val_split}) must be in (0, 1), e.g. 0.1.")
    for option, value in (("max_train_samples", max_train_samples), ("max_eval_samples", max_eval_samples)):
        if value is not None and value < 1:
            raise ValueError(f"{option} ({value}) must be at least 1.")


def train_of(dataset: datasets.DatasetDict) -> datasets.Dataset:
    """The train split; a ValueError where there is none."""
    if "train" not in dataset:
        raise ValueError(f"there is no 'train' split; the dataset has {', '.join(dataset) or 'none'}.")
    return dataset["train"]


def _stratified_cut(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (kept, cut), each sorted; every class gives the same share, as nearly as whole images allow."""
    from sklearn.model_selection import train_test_split

    try:
        kept, cut = train_test_split(np.arange(len(labels)), test_size=share, stratify=labels, random_state=seed)
    except ValueError as error:
        raise ValueError(
            f"{share:g} of {len(labels)} training images cannot be cut off with every class on both sides ({error}); "
            "add images, or change --train_val_split."
        ) from error
    return np.sort(kept), np.sort(cut)


def draw(labels: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """`limit` of the indices of some images, or all if there are no more, in order: int64 (n,).

    Every class gives the same share, as nearly as whole images allow, and at least one image; where there are fewer
    images than classes, one image from each of the largest classes; ties are drawn.

    Args:
        labels: Class indices (N,).
        limit: Images to draw.
        seed: Of which ones.
    """
    if limit >= len(labels):
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    counts = np.bincount(labels)
    shares = counts * (limit / len(labels))
    ties = 1e-9 * rng.random(len(counts))
    taken = np.floor(shares + ties).astype(np.int64)
    if limit >= np.count_nonzero(counts):
        taken = np.maximum(taken, counts > 0)
    while taken.sum() < limit:
        taken[np.argmax(np.where(taken < counts, shares - taken + ties, -np.inf))] += 1
    while taken.sum() > limit:  # what small classes got too much
        taken[np.argmax(np.where(taken > 1, taken - shares + ties, -np.inf))] -= 1
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class by class, each in random order
    place = np.arange(len(labels)) - (np.cumsum(counts) - counts)[labels[order]]
    return np.sort(order[place < taken[labels[order]]])


def load_records(
    dataset: datasets.DatasetDict,
    image_column: str | None = None,
    label_column: str | None = None,
    train_val_split: float = 0.1,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 42,
) -> tuple[dict[str, Records], list[str]]:
    """Check the labels and settle the splits; see `load_splits` for the arguments.

    Returns:
        Split name ("train", "validation", and "test" where there is one whose labels are not hidden) -> records; and
        the class names.
    """
    columns = find_columns(train_of(dataset), image_column, label_column)
    chosen = {"train": "train"}
    validation = next((name for name in VALIDATION_SPLITS if name in dataset), None)
    chosen |= {"validation": validation} if validation else {}
    hidden = hidden_labels(dataset["test"], columns[1]) if "test" in dataset else None
    if hidden:
        logger.warning("Split 'test' is not measured: its labels are hidden (%s everywhere).", hidden)
    elif "test" in dataset:
        chosen["test"] = "test"
    class_names = None
    records = {}
    for split, name in chosen.items():
        records[split], class_names = check_split(dataset[name], columns, class_names, name)
    if len(class_names) < 2:
        raise ValueError(f"there is only one class ({class_names[0]!r}); classification needs at least two.")
    empty = np.flatnonzero(np.bincount(records["train"].labels, minlength=len(class_names)) == 0)
    if len(empty):
        raise ValueError(f"class {class_names[empty[0]]!r} has no images in split 'train'; add some, or remove it.")
    if "validation" not in records:
        kept, cut = _stratified_cut(records["train"].labels, train_val_split, seed)
        records["train"], records["validation"] = records["train"].select(kept), records["train"].select(cut)
    if max_train_samples is not None and max_train_samples < len(class_names):
        raise ValueError(
            f"max_train_samples ({max_train_samples}) must be at least the number of classes ({len(class_names)}), one "
            f"image of each; use {len(class_names)} or more."
        )
    limits = {"train": max_train_samples, "validation": max_eval_samples, "test": max_eval_samples}
    return _limited(records, limits, seed), class_names


def _limited(records: dict[str, Records], limits: dict[str, int | None], seed: int) -> dict[str, Records]:
    """Of each split at most so many images; see `draw`."""
    return {
        split: part if limits[split] is None else part.select(draw(part.labels, limits[split], seed))
        for split, part in records.items()
    }


def load_unlabelled(
    dataset: datasets.DatasetDict,
    image_column: str | None = None,
    train_val_split: float = 0.1,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 42,
) -> dict[str, Records]:
    """Images to learn from without labels, and those held out, at random; a test split is left alone. Every label is 0.

    Arguments as for `load_splits`.
    """
    column = find_column(train_of(dataset), image_column, IMAGE_COLUMNS, "image")
    validation = next((name for name in VALIDATION_SPLITS if name in dataset), None)
    records = {}
    for split, name in (("train", "train"), ("validation", validation)):
        if name is not None:
            _check_columns(dataset[name], (column,), name)
            records[split] = _records(dataset[name], column, np.zeros(len(dataset[name]), np.int64), name)
    if validation is None:
        train, count = records["train"], len(records["train"])
        held_out = round(train_val_split * count)
        if not 0 < held_out < count:
            raise ValueError(
                f"{train_val_split:g} of {count} images cannot be held out; add images, or change --train_val_split."
            )
        order = np.random.default_rng(seed).permutation(count)
        records = {"train": train.select(np.sort(order[held_out:])), "validation": train.select(order[:held_out])}
    return _limited(records, {"train": max_train_samples, "validation": max_eval_samples}, seed)


def check_split(
    dataset: datasets.Dataset, columns: tuple[str, str], class_names: list[str] | None, split: str
) -> tuple[Records, list[str]]:
    """The records of one split, checked.

    Args:
        dataset: The split.
        columns: Names of (image, label).
        class_names: Those of train; found if None.
        split: Its name in the dataset.

    Returns:
        The records, and the class names.
    """
    image_column, label_column = columns
    _check_columns(dataset, columns, split)
    class_names = class_names or find_class_names(dataset, label_column, split)
    labels = read_class_indices(dataset, label_column, class_names, split)
    return _records(dataset, image_column, labels, split), class_names


def _check_columns(dataset: datasets.Dataset, columns: tuple[str, ...], split: str):
    if len(dataset) == 0:
        raise ValueError(f"split {split!r} is empty; remove it, or add images.")
    for column in columns:
        if column not in dataset.column_names:
            raise ValueError(f"split {split!r} has no column {column!r}; it has {', '.join(dataset.column_names)}.")


def _records(dataset: datasets.Dataset, image_column: str, labels: np.ndarray, split: str) -> Records:
    kind = dataset.features[image_column]
    if not isinstance(kind, datasets.Image):
        raise ValueError(f"column {image_column!r} does not hold images but {kind}; name another, or cast it to Image.")
    dataset = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    return Records(dataset, image_column, labels, np.arange(len(labels)), split)
