"""Images and labels, from wherever they are to uint8 tensors.

What `sources` finds becomes an `ImageSplits`: train, validation and test datasets whose samples are
`{"pixel_values": uint8 (C, H, W), "labels": int}`, and what belongs to them (class names, mean, standard deviation).
Pixels stay integers until they are augmented and normalised as a batch on the training device (`augmentation`).

Images of one size that fit in memory are decoded once (`DecodedImages`); others are decoded and resized sample by
sample in worker processes (`LazyImages`). Both give the same pixels for the same image.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers.image_processing_backends import PilBackend, TorchvisionBackend

from .augmentation import crop_box, draw_first_flips
from .columns import IMAGE_COLUMNS, find_column, find_columns
from .records import BadImages, Cut, Records, check_limits, load_records, load_unlabelled, train_of
from .sources import VALIDATION_SPLITS, load_raw

# Half of a small machine's memory; CIFAR-10 takes 0.18e9.
MAX_DECODED_BYTES = 4e9
# Images that mean and standard deviation are taken from; at 32 px already 8 million pixels.
MAX_STATISTICS_IMAGES = 8192
# Of a JPEG that is not decoded in full, on each side, for each pixel that is left after resizing.
PIXELS_FOR_EACH = 3


def to_tensor(image: Image.Image, processor) -> torch.Tensor:
    """Resize and crop as the image processor does, but leave the pixels integer: uint8 (C, H, W)."""
    size = dict(processor.size)
    if isinstance(processor, PilBackend) and _resizes_plainly(processor) and isinstance(processor.resample, int):
        # The processor's own call of Pillow, without its copies from Pillow to NumPy and back.
        image = image.resize(_resized(image.size, size), processor.resample)
    if getattr(processor, "do_center_crop", None) or image.size != (size.get("width"), size.get("height")):
        resized = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
        return resized.round().to(torch.uint8)
    pixels = np.array(image)  # (H, W) or (H, W, C)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()


# Those after which so few pixels differ; after others, which have sharp edges, more do.
SMOOTH_FILTERS = {Image.Resampling[name] for name in ("BILINEAR", "BICUBIC", "LANCZOS")}


def enough_pixels(processor) -> int | None:
    """What `load_image` may take for `at_least` when the image is for this processor; None for every pixel.

    A JPEG keeps `PIXELS_FOR_EACH` pixels on each side for each one that the processor's size has. After the processor,
    pixels of photos then differ from those of full decoding by half a level of 255 on average and by 8 at most; those
    of white noise, the worst there is, by 1.4 and 7. (Saving a photo as JPEG of quality 90 itself changes them by 1 on
    average and by 18 at most.)
    """
    if not _resizes_plainly(processor) or processor.resample not in SMOOTH_FILTERS:
        return None
    return PIXELS_FOR_EACH * max(side for side in dict(processor.size).values() if side)


def _resizes_plainly(processor) -> bool:
    """Whether it resizes as transformers' backends do, to a height and width or to a shortest edge, and at once."""
    kind, size = type(processor), {name for name, side in dict(processor.size).items() if side}
    return (
        any(kind.resize is b.resize and kind._preprocess is b._preprocess for b in (PilBackend, TorchvisionBackend))
        and processor.do_resize
        and not getattr(processor, "do_pad", None)
        and size in ({"height", "width"}, {"shortest_edge"})
    )


def _resized(image_size: tuple[int, int], size: dict[str, int]) -> tuple[int, int]:
    """(width, height) that a processor of this size makes of an image of (width, height)."""
    edge = size.get("shortest_edge")
    if not edge:
        return size["width"], size["height"]
    short = min(image_size)
    return tuple(edge if side == short else int(edge * side / short) for side in image_size)


class _Numbered(torch.utils.data.Dataset):
    """Images that have numbers, so that each can be mirrored in every second epoch."""

    first_flips: torch.Tensor | None = None  # bool (N,), or None where chance mirrors images

    def alternate_flips(self, seed: int):
        """Add "first_flips" to samples and batches: whether an image is mirrored in the first epoch, the third, ..."""
        self.first_flips = draw_first_flips(len(self), seed)

    def _flips(self, index: int | torch.Tensor) -> dict:
        return {} if self.first_flips is None else {"first_flips": self.first_flips[index]}


class DecodedImages(_Numbered):
    """Images in one uint8 tensor.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        self.images, self.labels = images, labels

    def to(self, device: torch.device) -> "DecodedImages":
        """Move the images to a device, where batches are then gathered."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        self.first_flips = None if self.first_flips is None else self.first_flips.to(device)
        return self

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | torch.Tensor) -> dict:
        return {"pixel_values": self.images[index], "labels": self.labels[index], **self._flips(index)}

    def __getitems__(self, indices: list[int]) -> dict:
        """A whole batch by one gather: torch's DataLoader calls this instead of `__getitem__`."""
        return self[torch.as_tensor(indices).to(self.images.device, non_blocking=self.images.is_cuda)]


class LazyImages(_Numbered):
    """Images decoded and resized when they are asked for, in the DataLoader's worker processes.

    In training, a random part of the image is cut out first (`crop_box`), as a function of (seed,
    epoch, index) only.

    Args:
        records: Where the images are.
        processor: The image processor that resizes them.
        num_channels: 1 or 3.
        crop_scale: Smallest share of an image's area that a random crop keeps, in (0, 1]; None for no crop.
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
        labelled = {"pixel_values": to_tensor(image, self.processor), "labels": self.labels[index]}
        return labelled | self._flips(index)


def as_batch(batch: dict | list[dict]) -> dict:
    """A batch `{"pixel_values": uint8 (B, C, H, W), "labels": int64 (B,)}`; `DecodedImages` gives it whole."""
    return batch if isinstance(batch, dict) else torch.utils.data.default_collate(batch)


@dataclass
class ImageSplits:
    """What training needs of a dataset.

    Args:
        name: Hub id, folder, or "digits".
        train: Images to learn from.
        validation: Images to choose the model by, given, or cut from train.
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


def bounded_map(pool: ThreadPoolExecutor, function, items: Sequence, ahead: int | None = None) -> Iterator:
    """`pool.map` that stops handing out work once its results are no longer taken.

    Args:
        pool: The threads.
        function: What they do with an item.
        items: In the order of the results.
        ahead: How many are handed out before their results are taken; twice the machine's cores if None.
    """
    ahead = ahead or 2 * (os.cpu_count() or 1)
    futures = deque(pool.submit(function, item) for item in items[:ahead])
    try:
        for position in range(len(items)):
            yield futures.popleft().result()
            if position + ahead < len(items):
                futures.append(pool.submit(function, items[position + ahead]))
    finally:
        for future in futures:
            future.cancel()


def progress_bar(total: int, text: str) -> tqdm:
    """A bar that one process of each machine shows, and only if the work takes more than a second."""
    quiet = os.environ.get("LOCAL_RANK", "0") != "0"
    return tqdm(
        total=total, desc=text, unit="image", unit_scale=True, delay=1, mininterval=0.5, disable=quiet, leave=False
    )


def pixel_statistics(images: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, in [0, 1], of uint8 (N, C, H, W) images."""
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
    """Load a dataset for training; everything is checked before the first image is decoded.

    Args:
        name: Hub id, folder, or "digits"; see `load_raw`, also for `config_name` and `data_files`.
        processor: Image processor whose `size` the images are brought to.
        num_channels: 1 or 3.
        image_column: Name of the image column; found if None.
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
        labelled: False for images alone: a folder may then hold them without directories for classes, and there
            are no class names and no test split.

    Raises:
        ValueError: Says which row, column, split or class is wrong, and the mend.
    """
    check_limits(train_val_split, max_train_samples, max_eval_samples)
    size = processor.size["height"], processor.size["width"]
    raw = load_raw(name, config_name, data_files, cache_dir, token, size, labelled=labelled)
    limits = train_val_split, max_train_samples, max_eval_samples, seed
    if labelled:
        columns = find_columns(train_of(raw), image_column, label_column)
        records, class_names = load_records(raw, *columns, *limits)
    else:
        columns = find_column(train_of(raw), image_column, IMAGE_COLUMNS, "image"), None
        records, class_names = load_unlabelled(raw, columns[0], *limits), []
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
