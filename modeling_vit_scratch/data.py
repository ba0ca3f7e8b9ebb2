"""Pictures and labels, from wherever they are to uint8 tensors.

A Hub dataset, a local folder in the Hub's layout, an image folder with one directory per class, or the bundled
`digits` become an `ImageSplits`: train, validation and test datasets whose samples are
`{"pixel_values": uint8 (C, H, W), "labels": int}`, and what belongs to them (class names, mean, standard deviation).
Pixels stay integers until they are augmented and normalised as a batch on the training device (`augmentation.py`).

Pictures of one size that fit in memory are decoded once (`DecodedImages`); others are decoded and resized sample by
sample in worker processes (`LazyImages`). Both give the same pixels for the same picture.
"""

import difflib
import io
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from .augmentation import crop_box

logger = logging.getLogger(__name__)

CIFAR10 = "uoft-cs/cifar10"
DIGITS = "digits"
IMAGE_COLUMNS = ("image", "img", "images", "picture", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "category")
VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
# Half of a small machine's memory; CIFAR-10 takes 0.18e9.
MAX_DECODED_BYTES = 4e9
# Pictures that mean and standard deviation are taken from; at 32 px already 8 million pixels.
MAX_STATISTICS_IMAGES = 8192


def load_image(source: bytes | str | Path | Image.Image, num_channels: int = 3) -> Image.Image:
    """Decode a picture to 8-bit grey (1 channel) or RGB (3 channels), upright.

    EXIF rotation is applied; 16-bit and floating-point grey are scaled to 8 bits; transparent pixels are laid on
    white; CMYK, palette, 1-bit and grey pictures are converted; an animation gives its first frame.

    Args:
        source: Encoded bytes, a path, or an open picture.
        num_channels: 1 or 3.

    Raises:
        ValueError: The picture cannot be decoded, or has NaN or infinite pixels.
    """
    if num_channels not in (1, 3):
        raise ValueError(f"pictures have 1 or 3 channels, not {num_channels}; set num_channels to 1 or 3.")
    try:
        image = source
        if not isinstance(source, Image.Image):
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        image.load()
        image = ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise
    except Exception as error:  # each decoder fails in its own way
        raise ValueError(f"unreadable image ({type(error).__name__}: {error})") from error
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        image = _to_8_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if num_channels == 3 else "L")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit integers in [0, 65535], or floats in [0, 1] or [0, 255], to 8 bits."""
    pixels = np.asarray(image).astype(np.float64)
    if not np.isfinite(pixels).all():
        raise ValueError("unreadable image (NaN or infinite pixels)")
    if image.mode == "F":
        scale = 255 if pixels.max() <= 1 else 1
        if pixels.min() < 0 or pixels.max() > 255:
            raise ValueError(
                f"unreadable image (floating-point pixels in [{pixels.min():g}, {pixels.max():g}]; "
                "only [0, 1] and [0, 255] have a meaning)"
            )
    else:
        scale = 255 / 65535
    return Image.fromarray(np.clip(np.rint(pixels * scale), 0, 255).astype(np.uint8))


class _Records:
    """Encoded pictures and checked labels of one split, by row; no picture is decoded here."""

    def __init__(self, dataset: datasets.Dataset, image_column: str, labels: np.ndarray, rows: np.ndarray, split: str):
        self.dataset, self.image_column, self.rows, self.split = dataset, image_column, rows, split
        self.labels = labels[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: np.ndarray) -> "_Records":
        records = _Records.__new__(_Records)
        records.dataset, records.image_column, records.split = self.dataset, self.image_column, self.split
        records.rows, records.labels = self.rows[indices], self.labels[indices]
        return records

    def image(self, index: int, num_channels: int) -> Image.Image:
        row = int(self.rows[index])
        return self._decode(self.dataset[row][self.image_column], row, num_channels)

    def images(self, indices: range, num_channels: int) -> list[Image.Image]:
        rows = self.rows[indices.start : indices.stop]
        column = self.dataset[rows][self.image_column]
        return [self._decode(value, int(row), num_channels) for value, row in zip(column, rows, strict=True)]

    def _decode(self, value: dict | None, row: int, num_channels: int) -> Image.Image:
        path = (value or {}).get("path")
        where = f"row {row} of split {self.split!r}" + (f" ({path})" if path else "")
        if value is None or (value["bytes"] is None and not path):
            raise ValueError(f"{where}: there is no image; remove the row.")
        try:
            return load_image(path if value["bytes"] is None else value["bytes"], num_channels)
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}: {error}; repair or remove it.") from error


def _to_tensor(image: Image.Image, processor) -> torch.Tensor:
    """Resize as the image processor does, but leave the pixels integer: uint8 (C, H, W)."""
    if image.size != (processor.size["width"], processor.size["height"]):
        resized = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        return torch.from_numpy(np.ascontiguousarray(resized)).to(torch.uint8)
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

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}

    def __getitems__(self, indices: list[int]) -> dict:
        """A whole batch by one gather: torch's DataLoader calls this instead of `__getitem__`."""
        index = torch.as_tensor(indices)
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

    def __init__(self, records: _Records, processor, num_channels: int, crop_scale: float | None = None, seed: int = 0):
        self.records, self.processor, self.num_channels = records, processor, num_channels
        self.crop_scale, self.seed, self.epoch = crop_scale, seed, 0
        self.labels = torch.from_numpy(records.labels)

    def __len__(self) -> int:
        return len(self.records)

    def set_epoch(self, epoch: int):
        """Called by the training loop: other crops in each epoch."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict:
        image = self.records.image(index, self.num_channels)
        if self.crop_scale is not None:
            image = image.crop(crop_box(image.size, self.crop_scale, (self.seed, self.epoch, index)))
        return {"pixel_values": _to_tensor(image, self.processor), "labels": self.labels[index]}


def collate(batch: dict | list[dict]) -> dict:
    """A batch `{"pixel_values": uint8 (B, C, H, W), "labels": int64 (B,)}`; one that was gathered whole passes."""
    return batch if isinstance(batch, dict) else torch.utils.data.default_collate(batch)


@dataclass
class ImageSplits:
    """What training needs of a dataset.

    Args:
        name: Hub id, folder, or "digits".
        train: Pictures to learn from.
        validation: Pictures to choose the model by, given, or cut from train.
        test: Pictures to measure the chosen model on, or None where the dataset has none.
        class_names: By label.
        mean: Of the training pixels per channel, in [0, 1].
        std: Likewise, standard deviation.
    """

    name: str
    train: torch.utils.data.Dataset
    validation: torch.utils.data.Dataset
    test: torch.utils.data.Dataset | None
    class_names: list[str]
    mean: list[float]
    std: list[float]
    records: dict[str, _Records] = field(repr=False)


def load_raw(
    name: str,
    config_name: str | None = None,
    data_files: dict[str, str] | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
    image_size: tuple[int, int] = (32, 32),
) -> datasets.DatasetDict:
    """A dataset by its Hub id, its folder, or the name "digits"; pictures still encoded.

    Args:
        name: Where it is; a folder is in the Hub's layout, or has one directory per class (with or without directories
            for the splits above them).
        config_name: Which of a Hub dataset's configurations.
        data_files: Split name -> folder with one directory per class; used instead of `name`.
        cache_dir: Where `datasets` keeps its files.
        token: For private Hub datasets.
        image_size: (height, width) at which digits are drawn.

    Raises:
        ValueError: There is no such dataset, or a class directory of an image folder has no images.
    """
    if name == DIGITS and not data_files:
        return _digits(image_size)
    folders = {split: Path(folder) for split, folder in (data_files or {}).items()}
    if not folders and Path(name).is_dir() and _is_image_folder(Path(name)):
        folders = {split.name: split for split in sorted(Path(name).iterdir()) if _is_split(split)}
        folders = folders or {"train": Path(name)}
    try:
        if folders:
            return datasets.DatasetDict(
                {split: _image_folder(folder, split, cache_dir) for split, folder in folders.items()}
            )
        loaded = datasets.load_dataset(name, config_name, cache_dir=cache_dir, token=token)
    except ValueError:
        raise
    except (OSError, ConnectionError, RuntimeError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(
            f"dataset {name!r} could not be loaded: {error} "
            "Give a Hub id, a folder with one directory per class, or 'digits'."
        ) from error
    return loaded


def _is_image_folder(folder: Path) -> bool:
    has_tables = any(folder.rglob("*.parquet")) or any(folder.rglob("*.arrow"))
    return not has_tables and not (folder / "metadata.csv").exists() and any(folder.iterdir())


def _is_split(folder: Path) -> bool:
    known = ("train", "training", "test", "testing", *VALIDATION_SPLITS)
    return folder.is_dir() and folder.name.lower() in known


def _image_folder(folder: Path, split: str, cache_dir: str | None) -> datasets.Dataset:
    """Pictures of a folder with one directory per class, labelled by the directories' sorted names."""
    if not folder.is_dir():
        raise ValueError(f"split {split!r}: there is no folder {folder}.")
    directories = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not directories:
        raise ValueError(f"split {split!r}: {folder} has no directories; put the pictures into one per class.")
    loose = [path.name for path in folder.iterdir() if path.suffix.lower() in Image.registered_extensions()]
    if loose:
        raise ValueError(f"split {split!r}: {loose[0]} lies in {folder} beside the classes; move it into one of them.")
    paths, labels = [], []
    for label, directory in enumerate(directories):
        files = sorted(path for path in directory.rglob("*") if path.is_file() and not path.name.startswith("."))
        if not files:
            raise ValueError(
                f"split {split!r}: class {directory.name!r} has no images; add some or remove {directory}."
            )
        paths += [str(path) for path in files]
        labels += [label] * len(files)
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "label": datasets.ClassLabel(names=[directory.name for directory in directories]),
        }
    )
    columns = {"image": [{"bytes": None, "path": path} for path in paths], "label": labels}
    return datasets.Dataset.from_dict(columns, features=features)


def _digits(image_size: tuple[int, int]) -> datasets.DatasetDict:
    """scikit-learn's 1,797 handwritten digits (UCI ML repository), drawn at `image_size`, a fifth of them for test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows = np.arange(len(digits.target))
    train, test = _stratified_cut(digits.target, share=0.2, seed=0)
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=[str(n) for n in range(10)])}
    )

    def drawn(selected: np.ndarray) -> datasets.Dataset:
        images = []
        for row in rows[selected]:
            image = Image.fromarray(np.rint(digits.images[row] * (255 / 16)).astype(np.uint8))
            buffer = io.BytesIO()
            image.resize((image_size[1], image_size[0]), Image.Resampling.BICUBIC).save(buffer, "png")
            images.append({"bytes": buffer.getvalue(), "path": None})
        return datasets.Dataset.from_dict({"image": images, "label": digits.target[selected]}, features=features)

    return datasets.DatasetDict({"train": drawn(train), "test": drawn(test)})


def default_dataset(seconds: float = 10.0) -> str:
    """The dataset of a run that names none: CIFAR-10 from the Hub or its cache, else the bundled digits.

    Args:
        seconds: How long the Hub may take to answer. If it does not, this process stays offline.
    """
    answer = []

    def ask():
        try:
            huggingface_hub.HfApi().dataset_info(CIFAR10, timeout=seconds)
            answer.append(True)
        except Exception as error:  # whatever goes wrong here, the Hub cannot be had
            logger.debug("The Hub did not answer: %s", error)

    # A deadline of its own: a server that accepts and dribbles outlasts every timeout of a single read.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if answer:
        return CIFAR10
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        datasets.load_dataset_builder(CIFAR10)
        return CIFAR10
    except Exception:  # not in the cache
        return DIGITS


def _find_column(dataset: datasets.Dataset, wanted: str | None, known: tuple[str, ...], kind: str) -> str:
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
    if kind == "label" and len(typed) > 1:  # CIFAR-100 has fine_label and coarse_label
        typed = [name for name in known if name in typed] or typed
    for candidates in (typed, named):
        if candidates:
            return candidates[0]
    raise ValueError(
        f"no {kind} column was found among {', '.join(dataset.column_names)}; name it with --{kind}_column_name."
    )


def _class_names(dataset: datasets.Dataset, label_column: str, split: str) -> list[str]:
    feature = dataset.features[label_column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    values = dataset.unique(label_column)
    if any(value is None for value in values):
        row = list(dataset[label_column]).index(None)
        raise ValueError(f"row {row} of split {split!r} has no label; label or remove it.")
    wrong = [value for value in values if isinstance(value, bool) or not isinstance(value, (int, str))]
    if wrong:
        row = list(dataset[label_column]).index(wrong[0])
        raise ValueError(
            f"row {row} of split {split!r}: label {wrong[0]!r} is a {type(wrong[0]).__name__}; "
            "labels are whole numbers or names."
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
        lookup = {type(values[0])(name): index for index, name in enumerate(class_names)}
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


def load_records(
    dataset: datasets.DatasetDict,
    image_column: str | None = None,
    label_column: str | None = None,
    train_val_split: float = 0.1,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 42,
) -> tuple[dict[str, _Records], list[str]]:
    """Check the labels and settle the splits; see `load_splits` for the arguments.

    Returns:
        Split name ("train", "validation", and "test" where there is one) -> records; and the class names.
    """
    if "train" not in dataset:
        raise ValueError(f"there is no 'train' split; the dataset has {', '.join(dataset) or 'none'}.")
    image_column = _find_column(dataset["train"], image_column, IMAGE_COLUMNS, "image")
    label_column = _find_column(dataset["train"], label_column, LABEL_COLUMNS, "label")
    chosen = {"train": "train"}
    validation = next((name for name in VALIDATION_SPLITS if name in dataset), None)
    chosen |= {"validation": validation} if validation else {}
    chosen |= {"test": "test"} if "test" in dataset else {}
    class_names = None
    records = {}
    for split, name in chosen.items():
        data = dataset[name]
        if len(data) == 0:
            raise ValueError(f"split {name!r} is empty; remove it, or add images.")
        for column in (image_column, label_column):
            if column not in data.column_names:
                raise ValueError(f"split {name!r} has no column {column!r}; it has {', '.join(data.column_names)}.")
        class_names = class_names or _class_names(data, label_column, name)
        labels = _labels(data, label_column, class_names, name)
        if split == "train":
            if len(class_names) < 2:
                raise ValueError(f"there is only one class ({class_names[0]!r}); classification needs at least two.")
            empty = np.flatnonzero(np.bincount(labels, minlength=len(class_names)) == 0)
            if len(empty):
                raise ValueError(
                    f"class {class_names[empty[0]]!r} has no images in split 'train'; add some, or remove it."
                )
        if not isinstance(data.features[image_column], datasets.Image):
            kind = data.features[image_column]
            raise ValueError(
                f"column {image_column!r} does not hold images but {kind}; name another, or cast it to Image."
            )
        data = data.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        records[split] = _Records(data, image_column, labels, np.arange(len(labels)), name)
    if "validation" not in records:
        kept, cut = _stratified_cut(records["train"].labels, train_val_split, seed)
        records["train"], records["validation"] = records["train"].select(kept), records["train"].select(cut)
    limits = {"train": max_train_samples, "validation": max_eval_samples, "test": max_eval_samples}
    for split, limit in limits.items():
        if limit is not None and split in records and limit < len(records[split]):
            order = np.random.default_rng(seed).permutation(len(records[split]))[:limit]
            records[split] = records[split].select(np.sort(order))
    return records, class_names


def decode(records: _Records, processor, num_channels: int) -> DecodedImages | None:
    """Decode a split into memory, in parallel; None if its pictures differ in size or do not fit."""
    height, width = processor.size["height"], processor.size["width"]
    if len(records) * num_channels * height * width > MAX_DECODED_BYTES:
        return None
    images = torch.empty(len(records), num_channels, height, width, dtype=torch.uint8)
    first = records.image(0, num_channels).size
    chunks = [range(start, min(start + 256, len(records))) for start in range(0, len(records), 256)]

    def fill(chunk: range) -> bool:
        for index, image in zip(chunk, records.images(chunk, num_channels), strict=True):
            if image.size != first:
                return False
            images[index] = _to_tensor(image, processor)
        return True

    with ThreadPoolExecutor(os.cpu_count()) as pool, _progress(len(records), f"Decoding {records.split}") as bar:
        for chunk, same_size in zip(chunks, _bounded_map(pool, fill, chunks), strict=False):
            if not same_size:
                return None
            bar.update(len(chunk))
    return DecodedImages(images, torch.from_numpy(records.labels))


def _bounded_map(pool: ThreadPoolExecutor, function, items: list) -> Iterator:
    """`pool.map` that stops handing out work once its results are no longer taken."""
    ahead = 2 * (os.cpu_count() or 1)
    futures = [pool.submit(function, item) for item in items[:ahead]]
    for position in range(len(items)):
        yield futures[position].result()
        futures[position] = None
        if position + ahead < len(items):
            futures.append(pool.submit(function, items[position + ahead]))


def _progress(total: int, text: str) -> tqdm:
    quiet = os.environ.get("LOCAL_RANK", "0") != "0"
    return tqdm(total=total, desc=text, unit="image", unit_scale=True, delay=1, disable=quiet, leave=False)


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
    seed: int = 42,
    cache_dir: str | None = None,
    token: str | None = None,
) -> ImageSplits:
    """Load a dataset for training; everything is checked before the first picture is decoded.

    Args:
        name: Hub id, folder, or "digits"; see `load_raw`, also for `config_name` and `data_files`.
        processor: Image processor whose `size` the pictures are brought to.
        num_channels: 1 or 3.
        image_column: Name of the picture column; found if None.
        label_column: Name of the label column; found if None.
        train_val_split: Share in (0, 1) of train that becomes validation where the dataset has none.
        max_train_samples: Train on so many pictures only, drawn with `seed`.
        max_eval_samples: Likewise for validation and test.
        crop_scale: For pictures that are decoded one by one: see `LazyImages`.
        seed: Of the validation cut and of random crops.
        cache_dir: Where `datasets` keeps its files.
        token: For private Hub datasets.

    Raises:
        ValueError: Says which row, column, split or class is wrong, and the mend.
    """
    if not 0 < train_val_split < 1:
        raise ValueError(f"train_val_split ({train_val_split}) must be in (0, 1), e.g. 0.1.")
    for option, value in (("max_train_samples", max_train_samples), ("max_eval_samples", max_eval_samples)):
        if value is not None and value < 1:
            raise ValueError(f"{option} ({value}) must be at least 1.")
    size = processor.size["height"], processor.size["width"]
    raw = load_raw(name, config_name, data_files, cache_dir, token, size)
    records, class_names = load_records(
        raw, image_column, label_column, train_val_split, max_train_samples, max_eval_samples, seed
    )
    splits = {split: decode(part, processor, num_channels) for split, part in records.items()}
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
    return ImageSplits(name, splits["train"], splits["validation"], splits.get("test"), class_names, mean, std, records)
