"""Pictures and labels, from wherever they are to uint8 tensors.

What `sources.py` finds becomes an `ImageSplits`: train, validation and test datasets whose samples are
`{"pixel_values": uint8 (C, H, W), "labels": int}`, and what belongs to them (class names, mean, standard deviation).
Pixels stay integers until they are augmented and normalised as a batch on the training device (`augmentation.py`).

Pictures of one size that fit in memory are decoded once (`DecodedImages`); others are decoded and resized sample by
sample in worker processes (`LazyImages`). Both give the same pixels for the same picture.
"""

import difflib
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from .augmentation import crop_box
from .sources import (
    CIFAR10,
    DIGITS,
    VALIDATION_SPLITS,
    default_dataset,
    load_image,
    load_raw,
    pictures_below,
    public_name,
)

__all__ = [
    "CIFAR10",
    "DIGITS",
    "Cut",
    "DecodedImages",
    "ImageSplits",
    "LazyImages",
    "collate",
    "decode",
    "default_dataset",
    "load_image",
    "load_raw",
    "load_records",
    "load_splits",
    "pictures_below",
    "pixel_statistics",
    "public_name",
]

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "img", "images", "picture", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "category")
# Half of a small machine's memory; CIFAR-10 takes 0.18e9.
MAX_DECODED_BYTES = 4e9
# Pictures that mean and standard deviation are taken from; at 32 px already 8 million pixels.
MAX_STATISTICS_IMAGES = 8192
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
    """Encoded pictures and checked labels of one split, by row; no picture is decoded here."""

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
        """The files' contents, in order; nothing of a missing picture."""
        for start in range(0, len(self), 1024):
            for value in self.dataset[self.rows[start : start + 1024]][self.image_column]:
                value = value or {"bytes": b"", "path": None}
                yield Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]

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
        """The place of a picture in words: its row in the dataset, and its file if there is one."""
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


def to_tensor(image: Image.Image, processor) -> torch.Tensor:
    """Resize and crop as the image processor does, but leave the pixels integer: uint8 (C, H, W)."""
    size = dict(processor.size)
    if getattr(processor, "do_center_crop", None) or image.size != (size.get("width"), size.get("height")):
        resized = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
        return resized.round().to(torch.uint8)
    pixels = np.array(image)  # (H, W) or (H, W, C)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()


class DecodedImages(torch.utils.data.Dataset):
    """Pictures in one uint8 tensor.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        self.images, self.labels = images, labels

    def to(self, device: torch.device) -> "DecodedImages":
        """Move the pictures to a device, where batches are then gathered."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        return self

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}

    def __getitems__(self, indices: list[int]) -> dict:
        """A whole batch by one gather: torch's DataLoader calls this instead of `__getitem__`."""
        index = torch.as_tensor(indices).to(self.images.device, non_blocking=self.images.is_cuda)
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


class LazyImages(torch.utils.data.Dataset):
    """Pictures decoded and resized when they are asked for, in the DataLoader's worker processes.

    In training, a random part of the picture is cut out first (`augmentation.crop_box`), as a function of (seed,
    epoch, index) only.

    Args:
        records: Where the pictures are.
        processor: The image processor that resizes them.
        num_channels: 1 or 3.
        crop_scale: Smallest share of a picture's area that a random crop keeps, in (0, 1]; None for no crop.
        seed: Of the random crop.
    """

    def __init__(self, records: Records, processor, num_channels: int, crop_scale: float | None = None, seed: int = 0):
        self.records, self.processor, self.num_channels = records, processor, num_channels
        self.crop_scale, self.seed = crop_scale, seed
        # Shared memory: worker processes that outlive an epoch (persistent_workers) see the next one too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._cropped_epochs = torch.full((), torch.iinfo(torch.int64).max).share_memory_()
        self.labels = torch.from_numpy(records.labels)

    def __len__(self) -> int:
        return len(self.records)

    def set_epoch(self, epoch: int):
        """Called by the training loop: other crops in each epoch."""
        self._epoch.fill_(epoch)

    def crop_until(self, epoch: int):
        """Crop no more from this epoch on."""
        self._cropped_epochs.fill_(epoch)

    def __getitem__(self, index: int) -> dict:
        image = self.records.image(index, self.num_channels)
        if self.crop_scale is not None and self._epoch < self._cropped_epochs:
            image = image.crop(crop_box(image.size, self.crop_scale, (self.seed, int(self._epoch), index)))
        return {"pixel_values": to_tensor(image, self.processor), "labels": self.labels[index]}


def collate(batch: dict | list[dict]) -> dict:
    """A batch `{"pixel_values": uint8 (B, C, H, W), "labels": int64 (B,)}`; one that was gathered whole passes."""
    return batch if isinstance(batch, dict) else torch.utils.data.default_collate(batch)


@dataclass(frozen=True)
class Cut:
    """How the splits of a run were made of its dataset; `load_splits` explains the settings.

    Args:
        method: "given" (the dataset has a validation split), "stratified" (`load_records`), "random" (`load_pictures`),
            or "by content" (`streaming.is_held_out`).
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


@dataclass
class ImageSplits:
    """What training needs of a dataset.

    Args:
        name: Hub id, folder, or "digits".
        train: Pictures to learn from.
        validation: Pictures to choose the model by, given, or cut from train.
        test: Images to measure the chosen model on, or None where the dataset has none, or hides their labels.
        class_names: By label.
        mean: Of the training pixels per channel, in [0, 1].
        std: Likewise, standard deviation.
        records: Where the images of each split are.
        columns: Names of (image, label) in the dataset; no label's where none is read.
        cut: How the splits were made.
    """

    name: str
    train: torch.utils.data.Dataset
    validation: torch.utils.data.Dataset
    test: torch.utils.data.Dataset | None
    class_names: list[str]
    mean: list[float]
    std: list[float]
    records: dict[str, Records] = field(repr=False)
    columns: tuple[str, str | None]
    cut: Cut


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
    can_be = [name for name in named if name in typed or (kind == "label" and _holds_names(dataset.features[name]))]
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


def _train_of(dataset: datasets.DatasetDict) -> datasets.Dataset:
    if "train" not in dataset:
        raise ValueError(f"there is no 'train' split; the dataset has {', '.join(dataset) or 'none'}.")
    return dataset["train"]


def find_columns(dataset: datasets.Dataset, image_column: str | None, label_column: str | None) -> tuple[str, str]:
    """Names of the (image, label) columns; see `find_column`."""
    return (
        find_column(dataset, image_column, IMAGE_COLUMNS, "image"),
        find_column(dataset, label_column, LABEL_COLUMNS, "label"),
    )


def _holds_names(feature) -> bool:
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
    if not _holds_names(feature):
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


def _labels(dataset: datasets.Dataset, label_column: str, class_names: list[str], split: str) -> np.ndarray:
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


def _stratified_cut(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (kept, cut), each sorted; every class gives the same share, as nearly as whole pictures allow."""
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
    images than classes, the largest classes give one, drawn among those of one size.

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
    columns = find_columns(_train_of(dataset), image_column, label_column)
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


def load_pictures(
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
    column = find_column(_train_of(dataset), image_column, IMAGE_COLUMNS, "image")
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
                f"{train_val_split:g} of {count} pictures cannot be held out; add pictures, or change "
                "--train_val_split."
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
    labels = _labels(dataset, label_column, class_names, split)
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


def decode(records: Records, processor, num_channels: int) -> DecodedImages | None:
    """Decode a split into memory, in parallel; None if its images differ in size or do not fit.

    Raises:
        BadImages: Some cannot be used; all of those that were looked at.
    """
    height, width = processor.size["height"], processor.size["width"]
    if len(records) * num_channels * height * width > MAX_DECODED_BYTES:
        return None
    images = torch.empty(len(records), num_channels, height, width, dtype=torch.uint8)
    chunks = [range(start, min(start + 256, len(records))) for start in range(0, len(records), 256)]
    sizes, bad = set(), []

    def fill(chunk: range) -> tuple[set, list[tuple[str, str]]]:
        found, wrong = records.readable(chunk, num_channels)
        found = [(index, image) for index, image in zip(chunk, found, strict=True) if image is not None]
        different = {image.size for _, image in found}
        for index, image in found if len(different) == 1 else ():
            images[index] = to_tensor(image, processor)
        return different, wrong

    with ThreadPoolExecutor(os.cpu_count()) as pool, progress_bar(len(records), f"Decoding {records.split}") as bar:
        for chunk, (different, wrong) in zip(chunks, bounded_map(pool, fill, chunks), strict=True):
            sizes |= different
            bad += wrong
            if len(sizes) > 1:
                break
            bar.update(len(chunk))
    if bad:
        raise BadImages(bad)
    return DecodedImages(images, torch.from_numpy(records.labels)) if len(sizes) == 1 else None


def decode_all(splits: dict[str, Records], processor, num_channels: int) -> dict[str, DecodedImages | None]:
    """Each split through `decode`.

    Raises:
        BadImages: Of all splits.
    """
    decoded, bad = {}, []
    for split, records in splits.items():
        try:
            decoded[split] = decode(records, processor, num_channels)
        except BadImages as error:
            bad += error.found
    if bad:
        raise BadImages(bad)
    return decoded


def bounded_map(pool: ThreadPoolExecutor, function, items: list) -> Iterator:
    """`pool.map` that stops handing out work once its results are no longer taken."""
    ahead = 2 * (os.cpu_count() or 1)
    futures = [pool.submit(function, item) for item in items[:ahead]]
    for position in range(len(items)):
        yield futures[position].result()
        futures[position] = None
        if position + ahead < len(items):
            futures.append(pool.submit(function, items[position + ahead]))


def progress_bar(total: int, text: str) -> tqdm:
    """A bar that one process of each machine shows, and only if the work takes more than a second."""
    quiet = os.environ.get("LOCAL_RANK", "0") != "0"
    return tqdm(
        total=total, desc=text, unit="image", unit_scale=True, delay=1, mininterval=0.5, disable=quiet, leave=False
    )


def pixel_statistics(images: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, in [0, 1], of uint8 (N, C, H, W) pictures."""
    if len(images) > MAX_STATISTICS_IMAGES:
        images = images[torch.linspace(0, len(images) - 1, MAX_STATISTICS_IMAGES).long()]
    # Exact integer sums: a float32 mean over millions of pixels drifts.
    pixels = images.transpose(0, 1).flatten(1).long()  # (C, N * H * W)
    mean = pixels.sum(1).double() / pixels.shape[1]
    variance = pixels.square().sum(1).double() / pixels.shape[1] - mean.square()
    std = variance.clamp(min=0).sqrt()
    std[std == 0] = 255  # a constant channel: nothing to scale
    return [round(value, 4) for value in (mean / 255).tolist()], [round(value, 4) for value in (std / 255).tolist()]


def load_splits(
    name: str,
    processor,
    num_channels: int = 3,
    config_name: str | None = None,
    data_files: dict[str, str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    train_val_split: float = 0.1,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    crop_scale: float | None = None,
    crop_all: bool = False,
    seed: int = 42,
    cache_dir: str | None = None,
    token: str | None = None,
    labelled: bool = True,
) -> ImageSplits:
    """Load a dataset for training; everything is checked before the first picture is decoded.

    Args:
        name: Hub id, folder, or "digits"; see `load_raw`, also for `config_name` and `data_files`.
        processor: Image processor whose `size` the pictures are brought to.
        num_channels: 1 or 3.
        image_column: Name of the picture column; found if None.
        label_column: Name of the label column; found if None.
        train_val_split: Share in (0, 1) of train that becomes validation where the dataset has none: the same share of
            each class, or, of images without labels, any.
        max_train_samples: Train on so many images only, drawn with `seed`, the same share of each class (`draw`).
        max_eval_samples: Likewise for validation and test.
        crop_scale: For training images that are decoded one by one: see `LazyImages`.
        crop_all: Whether training images are decoded one by one, and so cropped, even if they are of one size.
        seed: Of the validation cut and of random crops.
        cache_dir: Where `datasets` keeps its files.
        token: For private Hub datasets.
        labelled: False for pictures alone: a folder may then hold them without directories for classes, and there
            are no class names and no test split.

    Raises:
        ValueError: Says which row, column, split or class is wrong, and the mend.
    """
    if not 0 < train_val_split < 1:
        raise ValueError(f"train_val_split ({train_val_split}) must be in (0, 1), e.g. 0.1.")
    for option, value in (("max_train_samples", max_train_samples), ("max_eval_samples", max_eval_samples)):
        if value is not None and value < 1:
            raise ValueError(f"{option} ({value}) must be at least 1.")
    size = processor.size["height"], processor.size["width"]
    raw = load_raw(name, config_name, data_files, cache_dir, token, size, labelled=labelled)
    limits = train_val_split, max_train_samples, max_eval_samples, seed
    if labelled:
        columns = find_columns(_train_of(raw), image_column, label_column)
        records, class_names = load_records(raw, *columns, *limits)
    else:
        columns = find_column(_train_of(raw), image_column, IMAGE_COLUMNS, "image"), None
        records, class_names = load_pictures(raw, columns[0], *limits), []
    at_once = {split: part for split, part in records.items() if not (crop_all and split == "train")}
    splits = dict.fromkeys(records) | decode_all(at_once, processor, num_channels)
    if splits["train"] is None:
        sample = np.linspace(0, len(records["train"]) - 1, min(len(records["train"]), 512)).astype(int)
        images = LazyImages(records["train"], processor, num_channels)
        pixels = torch.stack([images[int(index)]["pixel_values"] for index in sample])
    else:
        pixels = splits["train"].images
    mean, std = pixel_statistics(pixels)
    for split, part in records.items():
        if splits[split] is None:
            scale = crop_scale if split == "train" else None
            splits[split] = LazyImages(part, processor, num_channels, scale, seed)
    given = any(split in raw for split in VALIDATION_SPLITS)
    method = "given" if given else "stratified" if labelled else "random"
    cut = Cut(method, None if given else float(train_val_split), seed, max_train_samples, max_eval_samples)
    parts = splits["train"], splits["validation"], splits.get("test")
    return ImageSplits(name, *parts, class_names, mean, std, records, columns, cut)
