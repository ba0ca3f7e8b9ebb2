"""Where images come from: a Hub dataset, a folder, or the bundled digits; and how one image is decoded.

Datasets stay encoded here; `load_image` decodes one image, and `splits` makes tensors of all.
"""

import contextlib
import io
import logging
import os
import threading
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from PIL import ExifTags, Image, ImageOps

logger = logging.getLogger(__name__)

CIFAR10 = "uoft-cs/cifar10"
DIGITS = "digits"
VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
# Directory name -> split, for image folders.
SPLIT_FOLDERS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_FOLDERS |= dict.fromkeys(VALIDATION_SPLITS, "validation")
# What marks a folder as one in the Hub's layout instead of an image folder.
TABLES = (".parquet", ".arrow", ".tar")
# Files that operating systems leave in folders.
LITTER = ("thumbs.db", "desktop.ini")
# How long the Hub may take to say whether it has a dataset.
HUB_SECONDS = 10.0


def load_image(
    source: bytes | str | Path | Image.Image, num_channels: int = 3, at_least: int | None = None
) -> Image.Image:
    """Decode an image to 8-bit grey (1 channel) or RGB (3 channels), upright.

    EXIF rotation is applied; 16-bit and floating-point grey are scaled to 8 bits; transparent pixels are laid on
    white; CMYK, palette, 1-bit and grey images are converted; an animation gives its first frame.

    Args:
        source: Encoded bytes, a path, or an open image.
        num_channels: 1 or 3.
        at_least: Pixels on each side that are enough. A JPEG of 2, 4 or 8 times as many is decoded smaller by that
            factor, which takes less time (libjpeg's scaled inverse DCT), where the factor divides both of its sides.
            None for every pixel.

    Raises:
        ValueError: The image cannot be decoded, has NaN or infinite pixels, or more pixels than PIL thinks safe.
    """
    if num_channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, not {num_channels}; set num_channels to 1 or 3.")
    try:
        if isinstance(source, Image.Image):
            return _converted(_upright(source), num_channels)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            return _converted(_upright(opened, at_least), num_channels)
    except FileNotFoundError:
        raise
    except Exception as error:  # each decoder fails in its own way
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(f"unreadable image ({reason})") from error


def _converted(image: Image.Image, num_channels: int) -> Image.Image:
    """A new image of mode L or RGB."""
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        image = _to_8_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":  # which PIL turns into nothing else
        image = image.convert("RGB")
    return image.convert("RGB" if num_channels == 3 else "L")


def _upright(image: Image.Image, at_least: int | None = None) -> Image.Image:
    """The image, decoded, or a turned copy of it."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:  # PIL itself only warns, up to twice as many
        raise ValueError(
            f"{image.width} x {image.height} pixels are more than the {limit:,} that PIL thinks safe: a decompression "
            "bomb? If not, shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS"
        )
    if at_least is not None:
        _draft(image, at_least)
    image.load()
    try:
        # `exif_transpose` copies what it does not turn, which takes as long as a fifth of decoding.
        turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # damaged EXIF; the pixels are there
        return image


def _draft(image: Image.Image, at_least: int):
    """Have a JPEG decoded at an eighth, a quarter or a half of its size, the smallest with enough pixels.

    Only where that is a whole number of pixels: libjpeg rounds up, and all of the image would move a little.
    """
    if image.format not in ("JPEG", "MPO") or not _is_of_cosines(image.fp):
        return
    for factor in (8, 4, 2):
        if all(side % factor == 0 and side >= factor * at_least for side in image.size):
            image.draft(None, (image.width // factor, image.height // factor))
            return


def _is_of_cosines(file) -> bool:
    """Whether a JPEG's frame is baseline, extended or progressive: those have a DCT to be scaled.

    libjpeg decodes lossless JPEGs (ITU-T T.81, process 14) at full size whatever it is asked for, and Pillow 12.3 lets
    it write beyond the end of the small image's memory.
    """
    file.seek(2)  # behind "start of image"
    while True:
        prefix, marker, *length = file.read(4).ljust(4, b"\0")
        length = int.from_bytes(bytes(length))
        if prefix == 0xFF and marker in (0xC0, 0xC1, 0xC2):
            return True
        # Tables, restart interval, applications' data and comments may come before; with all else, better not.
        if prefix != 0xFF or not (marker in (0xC4, 0xDB, 0xDD, 0xFE) or 0xE0 <= marker <= 0xEF) or length < 2:
            return False
        file.seek(length - 2, 1)  # the length counts its own two bytes


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Integers in [0, 65535], or floats in [0, 1] or [0, 255], to 8 bits."""
    pixels = np.asarray(image).astype(np.float64)
    if not np.isfinite(pixels).all():
        raise ValueError("NaN or infinite pixels")
    low, high = pixels.min(), pixels.max()
    if image.mode == "F":
        if low < 0 or high > 255:
            raise ValueError(
                f"floating-point pixels in [{low:g}, {high:g}]; only [0, 1] and [0, 255] have a known meaning"
            )
        scale = 255 if high <= 1 else 1
    else:
        if low < 0 or high > 65535:
            raise ValueError(f"integer pixels in [{low:g}, {high:g}]; only 16 bits, [0, 65535], have a known meaning")
        scale = 255 / 65535
    return Image.fromarray(np.rint(pixels * scale).astype(np.uint8))


def load_raw(
    name: str,
    config_name: str | None = None,
    data_files: dict[str, str] | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
    image_size: tuple[int, int] = (32, 32),
    streaming: bool = False,
    labelled: bool = True,
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """A dataset by its Hub id, its folder, or the name "digits"; images still encoded.

    Args:
        name: Where it is; a folder is in the Hub's layout, or has one directory per class (with or without directories
            for the splits above them).
        config_name: Which of a Hub dataset's configurations.
        data_files: Split name -> folder with one directory per class; used instead of `name`.
        cache_dir: Where `datasets` keeps its files.
        token: For private Hub datasets.
        image_size: (height, width) at which digits are drawn.
        streaming: Read a Hub dataset, or a folder in its layout, while it is used instead of preparing it on disk.
        labelled: Whether the directories of a folder are classes; if not, it is the images below it that count.

    Raises:
        ValueError: There is no such dataset, or a class directory of an image folder has no images.
    """
    if name == DIGITS and not data_files:
        _refuse_configuration(config_name, name)
        return _digits(image_size)
    folders = {split: Path(folder) for split, folder in (data_files or {}).items()}
    if not folders and name and Path(name).is_dir() and _is_image_folder(Path(name)):
        folders = _split_folders(Path(name))
    if folders:
        _refuse_configuration(config_name, name or ", ".join(map(str, folders.values())))
        read = _image_folder if labelled else _loose_images
        return datasets.DatasetDict({split: read(folder, split) for split, folder in folders.items()})
    # `datasets` would ask a Hub that does not answer six times, for half a minute, before it looks into its cache.
    silent = not Path(name).exists() and _ask_hub(name, HUB_SECONDS, token) is None
    try:
        with _offline() if silent else contextlib.nullcontext():
            return datasets.load_dataset(name, config_name, cache_dir=cache_dir, token=token, streaming=streaming)
    except Exception as error:  # each format, and each way of not being there, fails in its own way
        reason = str(error).strip().removesuffix(".") + "; the Hub was not reached" * silent
        raise ValueError(
            f"dataset {name!r} could not be loaded: {reason}. "
            "Give a Hub id, a folder with one directory per class, or 'digits'."
        ) from error


def _refuse_configuration(config_name: str | None, name: str):
    if config_name is not None:
        raise ValueError(f"dataset_config_name ({config_name!r}): {name} has no configurations; leave it out.")


def public_name(name: str) -> str:
    """A dataset's or model's name as others may see it: no path of this machine."""
    return Path(name).resolve().name if Path(name).exists() else name


def _is_image_folder(folder: Path) -> bool:
    if any((folder / f"metadata{suffix}").exists() for suffix in (".csv", ".jsonl")) or not any(folder.iterdir()):
        return False
    saved = ("dataset_dict.json", "state.json")  # Dataset.save_to_disk
    return not any(
        name in saved or name.endswith(TABLES) for _, _, files in os.walk(folder, followlinks=True) for name in files
    )


def _visible_directories(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _split_folders(folder: Path) -> dict[str, Path]:
    """Split -> its folder; all of it is train if no directories of classes are grouped by split.

    A directory that is named like a split is one, except beside others and with no directories in it: then it is a
    class (car, train, bus).
    """
    directories = _visible_directories(folder)
    named = [path for path in directories if path.name.lower() in SPLIT_FOLDERS]
    if len(named) < len(directories):
        named = [path for path in named if _visible_directories(path)]
    splits = {}
    for path in named:
        split = SPLIT_FOLDERS[path.name.lower()]
        if split in splits:
            raise ValueError(f"{splits[split]} and {path} are both {split!r}; keep one of them.")
        splits[split] = path
    ignored = [path.name for path in directories if path not in named]
    if splits and ignored:
        logger.warning("Not used, because it lies beside the splits in %s: %s", folder, ", ".join(ignored))
    return splits or {"train": folder}


def _image_folder(folder: Path, split: str) -> datasets.Dataset:
    """Images of a folder with one directory per class, labelled by the directories' sorted names."""
    if not folder.is_dir():
        raise ValueError(f"split {split!r}: there is no folder {folder}.")
    directories = _visible_directories(folder)
    if not directories:
        raise ValueError(f"split {split!r}: {folder} has no directories; put the images into one per class.")
    loose = [path.name for path in folder.iterdir() if path.suffix.lower() in Image.registered_extensions()]
    if loose:
        raise ValueError(f"split {split!r}: {loose[0]} lies in {folder} beside the classes; move it into one of them.")
    paths, labels, left_out = [], [], []
    suffixes = {"", *_image_suffixes()}
    for label, directory in enumerate(directories):
        files = sorted(path for path in directory.rglob("*") if path.is_file() and _is_visible(path, directory))
        left_out += [path for path in files if path.suffix.lower() not in suffixes]
        files = [path for path in files if path.suffix.lower() in suffixes]
        if not files:
            raise ValueError(
                f"split {split!r}: class {directory.name!r} has no images; add some or remove {directory}."
            )
        paths += [str(path) for path in files]
        labels += [label] * len(files)
    if left_out:
        shown = ", ".join(map(str, left_out[:5])) + (f" and {len(left_out) - 5} more" if len(left_out) > 5 else "")
        # Once: a run looks at its data before it reads them (training.defaults).
        logger.warning_once("Left out of %s, by their names no images: %s", folder, shown)
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "label": datasets.ClassLabel(names=[directory.name for directory in directories]),
        }
    )
    columns = {"image": [{"bytes": None, "path": path} for path in paths], "label": labels}
    return datasets.Dataset.from_dict(columns, features=features)


def _loose_images(folder: Path, split: str) -> datasets.Dataset:
    """Every image in a folder and below it."""
    paths = images_below(folder)
    if not paths:
        raise ValueError(f"split {split!r}: {folder} holds no images.")
    columns = {"image": [{"bytes": None, "path": str(path)} for path in paths]}
    return datasets.Dataset.from_dict(columns, features=datasets.Features({"image": datasets.Image(decode=False)}))


def images_below(folder: Path) -> list[Path]:
    """The files in a folder and below it whose names are of images that can be read, sorted; no hidden ones."""
    suffixes = _image_suffixes()
    files = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes and _is_visible(path, folder))
    return sorted(path for path in files if path.is_file())


def refuse_image_folder(folder: Path):
    """Raise a ValueError if a folder to be written to holds images, or directories of them, that are no run's: they
    would be mixed with what is written, and read with it as data.
    """
    suffixes, ours = _image_suffixes(), ("samples.png", "plots", "widget")
    for root, directories, files in os.walk(folder):
        if Path(root) == folder:
            files = [name for name in files if name not in ours]
            directories[:] = [name for name in directories if name not in ours and not name.startswith(".")]
        for name in files:
            if Path(name).suffix.lower() in suffixes:
                raise ValueError(f"{folder} is a folder of images ({Path(root) / name}); choose one to write to.")


def _image_suffixes() -> set[str]:
    """Of files that can be read as images, with their dots."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _is_visible(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return not hidden and path.name.lower() not in LITTER


def _digits(image_size: tuple[int, int]) -> datasets.DatasetDict:
    """scikit-learn's 1,797 handwritten digits (UCI ML repository), drawn at `image_size`, a fifth of them for test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = np.arange(len(digits.target))
    train, test = train_test_split(rows, test_size=0.2, stratify=digits.target, random_state=0)
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=[str(n) for n in range(10)])}
    )

    def drawn(rows: np.ndarray) -> datasets.Dataset:
        images = []
        for row in rows:
            image = Image.fromarray(np.rint(digits.images[row] * (255 / 16)).astype(np.uint8))
            buffer = io.BytesIO()
            # Uncompressed: the same bytes, and so the same fingerprint, whatever zlib is installed.
            image.resize((image_size[1], image_size[0]), Image.Resampling.BICUBIC).save(buffer, "ppm")
            images.append({"bytes": buffer.getvalue(), "path": None})
        return datasets.Dataset.from_dict({"image": images, "label": digits.target[rows]}, features=features)

    return datasets.DatasetDict({"train": drawn(np.sort(train)), "test": drawn(np.sort(test))})


def default_dataset(seconds: float = HUB_SECONDS) -> str:
    """The dataset of a run that names none: CIFAR-10 from the Hub or its cache, else the bundled digits.

    Args:
        seconds: How long all of this may take. If the Hub has not answered by then, this process stays offline.
    """
    if _ask_hub(CIFAR10, 0.9 * seconds):  # a tenth is left for looking into the cache
        return CIFAR10
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        datasets.load_dataset_builder(CIFAR10)
        return CIFAR10
    except Exception:  # not in the cache
        return DIGITS


def _ask_hub(name: str, seconds: float, token: str | None = None) -> bool | None:
    """Whether the Hub has a dataset that may be read; None if it does not answer in time."""
    answers = []

    def ask():
        try:
            huggingface_hub.HfApi().dataset_info(name, timeout=seconds, token=token)
            answers.append(True)
        except (HfHubHTTPError, HFValidationError):  # the latter: no name that it could have
            answers.append(False)
        except Exception:  # whatever else goes wrong here, the Hub cannot be had
            return

    # A deadline of its own: a server that accepts and dribbles outlasts every timeout of a single read.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


@contextlib.contextmanager
def _offline():
    """Ask nothing of the Hub for a while: only what is cached counts."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
