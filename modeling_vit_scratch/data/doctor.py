"""A doctor for data: duplicates, leaks from train to test, classes out of balance, and a fingerprint.

`inspect_splits` looks at every image once (CIFAR-10's 60,000 in about ten seconds) and returns a `Report`, whose text
is what `finetune.py --dry_run` shows. `fingerprint` is cheap enough for every run. `sample_sheet` draws what the model
will see.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional as F

from .augmentation import Augmentation
from .records import Records
from .splits import DecodedImages, ImageSplits, LazyImages, as_batch, bounded_map, progress_bar

# Images of a split that are looked at, evenly spaced: comparing all pairs grows with the square.
MAX_INSPECTED = {"train": 60_000, "validation": 20_000, "test": 20_000}
# Images of a split whose bytes the fingerprint covers, evenly spaced.
MAX_FINGERPRINTED = 65_536
# Two images are near duplicates if at most so many of 64 bits differ, and both correlations reach so much. Found on
# CIFAR-10: nearly all pairs that pass are one photo in two versions. Crops, shifts, mirror images are not looked for.
HASH_DISTANCE, LIKENESS, DETAIL_LIKENESS = 10, 0.9, 0.75
IMBALANCE = 3.0
# Share of training images with a near twin in train, above which near means little.
ALIKE = 0.2
SHOWN = 5


class HasRecords(Protocol):
    """What a fingerprint is made of: `ImageSplits`, or splits that are not decoded."""

    records: dict[str, Records]
    class_names: list[str]


def fingerprint(splits: HasRecords) -> str:
    """32 hexadecimal digits that tell a dataset, as it is split here, from any other.

    A BLAKE2b digest over the class names, and for train, validation and test in this order, as far as they exist: the
    number of images, their labels (int64, little-endian), and length and bytes of each encoded image, in order;
    beyond 65,536 images of a split, those of so many evenly spaced ones. Nothing else counts: the same files give
    the same fingerprint from a folder, a table or the Hub, on every machine; of a stream, its first images do.
    """
    digest = hashlib.blake2b(json.dumps(splits.class_names).encode(), digest_size=16)
    for split in ("train", "validation", "test"):
        records = splits.records.get(split)
        if records is None:
            continue
        digest.update(f"{split} {len(records)}".encode())
        digest.update(records.labels.astype("<i8").tobytes())
        for encoded in records.select(evenly(len(records), MAX_FINGERPRINTED)).encoded():
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.hexdigest()


def evenly(count: int, limit: int) -> np.ndarray:
    """At most `limit` indices below `count`, evenly spaced, in order."""
    return np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64)


@dataclass
class Overlap:
    """Images of one split that occur in train as well, or twice in train.

    Args:
        split: Which split.
        exact: Number of images with exactly the pixels of another image in train.
        near: Number of others that are nearly the same as one in train.
        contradictory: Number of the exact ones that carry another label than their twin.
        examples: Some of them: where it is, where its twin in train is, "exact" or "near".
    """

    split: str
    exact: int = 0
    near: int = 0
    contradictory: int = 0
    examples: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass
class Report:
    """What `inspect_splits` found; `str` of it is for people, `to_dict` for JSON.

    Args:
        name: Of the dataset.
        fingerprint: See `fingerprint`.
        counts: Split -> class name -> images.
        inspected: Split -> images that were looked at.
        overlaps: One for each split.
        warnings: What is wrong, one sentence each, with the mend.
    """

    name: str
    fingerprint: str
    counts: dict[str, dict[str, int]]
    inspected: dict[str, int]
    overlaps: list[Overlap]
    warnings: list[str]

    def to_dict(self) -> dict:
        """Numbers, texts, lists and dictionaries only."""
        return json.loads(json.dumps(asdict(self)))

    def __str__(self) -> str:
        lines = [f"  dataset {self.name}, fingerprint {self.fingerprint}"]
        for split, counts in self.counts.items():
            low, high = min(counts, key=counts.get), max(counts, key=counts.get)
            spread = f"{counts[low]:,} ({low}) to {counts[high]:,} ({high})"
            lines.append(
                f"  {split:<10}  {sum(counts.values()):>9,} images, "
                + (f"{counts[low]:,} of each class" if counts[low] == counts[high] else f"{spread} of a class")
            )
        for overlap in self.overlaps:
            where = "twice in train" if overlap.split == "train" else "in train too"
            lines.append(f"  {overlap.split:<10}  {overlap.exact:>9,} {where}, {overlap.near:,} more nearly the same")
            lines += [f"{'':<14}{where} = {twin}, {kind}" for where, twin, kind in overlap.examples]
        lines += [f"  ! {warning}" for warning in self.warnings] or ["  No complaints."]
        return "\n".join(lines)


def inspect_splits(splits: ImageSplits) -> Report:
    """Look at every image of every split; see `Report`. Takes time: about a minute for 400,000 small images."""
    parts = {"train": _by_index(splits), "validation": splits.validation, "test": splits.test}
    looks, warnings = {}, []
    if parts["train"] is not splits.train:
        warnings.append(f"Of train, only the first {len(parts['train']):,} images of the stream were compared.")
    for split, part in parts.items():
        if part is None:
            continue
        look = looks[split] = _look(part, splits.records[split], split)
        if len(look.index) < look.total:
            warnings.append(f"Of {split}, only {len(look.index):,} of {look.total:,} images were compared.")
    classes = len(splits.class_names)
    counts = {
        split: dict(zip(splits.class_names, np.bincount(look.all_labels, minlength=classes).tolist(), strict=True))
        for split, look in looks.items()
    }
    overlaps = _compare(looks)
    warnings = [*_label_warnings(counts), *_overlap_warnings(overlaps, len(looks["train"].index)), *warnings]
    inspected = {split: len(look.index) for split, look in looks.items()}
    return Report(splits.name, fingerprint(splits), counts, inspected, overlaps, warnings)


def _by_index(splits: ImageSplits) -> torch.utils.data.Dataset:
    """The training images; of a stream, those that were read at the start."""
    train = splits.train
    if not isinstance(train, torch.utils.data.IterableDataset):
        return train
    return LazyImages(splits.records["train"], train.processor, train.num_channels, train.crop_scale, train.seed)


def _label_warnings(counts: dict[str, dict[str, int]]) -> list[str]:
    warnings = []
    train = counts["train"]
    low, high = min(train, key=train.get), max(train, key=train.get)
    if train[high] > IMBALANCE * train[low]:
        warnings.append(
            f"Classes are out of balance: {train[high]:,} training images of {high}, {train[low]:,} of {low}; the "
            f"model will favour {high}, and accuracy alone will not show it: look at the accuracy of each class."
        )
    for split, of_classes in counts.items():
        missing = [name for name, count in of_classes.items() if count == 0]
        if missing:
            names = ", ".join(missing[:SHOWN]) + ", ..." * (len(missing) > SHOWN)
            warnings.append(f"{split} has no images of {len(missing)} of {len(of_classes)} classes: {names}.")
    return warnings


def _overlap_warnings(overlaps: list[Overlap], train_images: int) -> list[str]:
    warnings = []
    share = overlaps[0].near / train_images
    if share > ALIKE:
        warnings.append(
            f"{share:.0%} of the training images are nearly the same as another: either they come in series (frames of "
            "a video; then keep each series within one split), or are alike by nature, and near twins mean nothing."
        )
    for overlap in overlaps:
        found = overlap.exact + overlap.near * (share <= ALIKE)
        if overlap.split != "train" and found:
            warnings.append(
                f"{found:,} {overlap.split} images are in train too, exactly or nearly: {overlap.split} accuracy will "
                "look better than it is; remove them from train."
            )
        if overlap.contradictory:
            warnings.append(
                f"{overlap.contradictory:,} images of {overlap.split} carry another label than the same image in "
                "train; correct or remove them."
            )
    return warnings


# Looking at images


@dataclass
class _Look:
    """What is kept of a split's images.

    Args:
        records: Where they are.
        index: int64 (n,), which of the records.
        labels: int64 (n,).
        digests: Of all pixels, 16 bytes each.
        thumbnails: uint8 (n, 16, 16), grey.
        all_labels: int64 (N,), also of the images that were not looked at.
        total: N.
    """

    records: Records
    index: np.ndarray
    labels: np.ndarray
    digests: list[bytes]
    thumbnails: torch.Tensor
    all_labels: np.ndarray
    total: int


def _look(dataset: torch.utils.data.Dataset, records: Records, split: str) -> _Look:
    index = evenly(len(dataset), MAX_INSPECTED[split])
    labels = dataset.labels.numpy()
    digests, thumbnails = [], []
    with progress_bar(len(index), f"Inspecting {split}") as bar:
        for images in _batches_of_images(dataset, index):
            digests += [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images.numpy()]
            thumbnails.append(F.adaptive_avg_pool2d(_grey(images), 16).round().byte())
            bar.update(len(images))
    return _Look(records, index, labels[index], digests, torch.cat(thumbnails), labels, len(dataset))


def _grey(images: torch.Tensor) -> torch.Tensor:
    """Luminance (ITU-R 601-2): uint8 (n, C, H, W) -> float32 (n, H, W)."""
    weights = [0.299, 0.587, 0.114] if images.shape[1] == 3 else [1.0]
    return torch.einsum("nchw,c->nhw", images.float(), torch.tensor(weights))


def _batches_of_images(dataset: torch.utils.data.Dataset, index: np.ndarray) -> Iterator[torch.Tensor]:
    """Images at the model's size, without random crops: uint8 (n, C, H, W), up to 256 at a time."""
    chunks = [index[start : start + 256] for start in range(0, len(index), 256)]
    if isinstance(dataset, DecodedImages):
        yield from (dataset.images[torch.from_numpy(chunk)] for chunk in chunks)
        return
    whole = LazyImages(dataset.records, dataset.processor, dataset.num_channels)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from bounded_map(pool, lambda chunk: torch.stack([whole[int(i)]["pixel_values"] for i in chunk]), chunks)


# Comparing images


def perceptual_hash(thumbnails: torch.Tensor) -> np.ndarray:
    """64 bits that change little when an image does: uint8 (n, 16, 16), grey -> uint64 (n,).

    Bit (i, j) says whether cell (i, j + 1) of 8 x 9 is brighter than cell (i, j) ("dHash").
    """
    cells = F.adaptive_avg_pool2d(thumbnails.float(), (8, 9))
    bits = (cells[:, :, 1:] > cells[:, :, :-1]).flatten(1).numpy()
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def _descriptors(thumbnails: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors whose scalar products are correlations: of whole thumbnails, and of their details only."""
    grey = thumbnails.float()[:, None]
    coarse = F.interpolate(F.adaptive_avg_pool2d(grey, 4), size=16, mode="bilinear")
    vectors = (grey.flatten(1), (grey - coarse).flatten(1))
    vectors = [vector - vector.mean(1, keepdim=True) for vector in vectors]
    return tuple((vector / vector.norm(dim=1, keepdim=True).clamp(min=1)).half() for vector in vectors)


def near_pairs(thumbnails: torch.Tensor, others: torch.Tensor | None = None) -> np.ndarray:
    """Pairs of nearly the same image: int64 (M, 2), positions in `thumbnails` and in `others`.

    Args:
        thumbnails: uint8 (n, 16, 16), grey.
        others: Likewise; None for pairs within `thumbnails`, the later image first.
    """
    hashes, whole, detail = perceptual_hash(thumbnails), *_descriptors(thumbnails)
    within = others is None
    if within:
        other_hashes, other_whole, other_detail = hashes, whole, detail
    else:
        other_hashes, other_whole, other_detail = perceptual_hash(others), *_descriptors(others)
    found = [np.zeros((0, 2), dtype=np.int64)]
    for start in range(0, len(hashes), 64):
        end = start + 64
        against = other_hashes[: min(end, len(hashes))] if within else other_hashes
        close = np.bitwise_count(hashes[start:end, None] ^ against) <= HASH_DISTANCE
        first, second = np.nonzero(close)
        first += start
        if within:
            first, second = first[second < first], second[second < first]
        for part in range(0, len(first), 65_536):  # where all images resemble each other
            a, b = first[part : part + 65_536], second[part : part + 65_536]
            like = (whole[a].float() * other_whole[b].float()).sum(1) >= LIKENESS
            like &= (detail[a].float() * other_detail[b].float()).sum(1) >= DETAIL_LIKENESS
            found.append(np.stack([a[like.numpy()], b[like.numpy()]], axis=1))
    return np.concatenate(found)


def _compare(looks: dict[str, _Look]) -> list[Overlap]:
    """Each split against train; train against itself."""
    train = looks["train"]
    first_at = {}
    for position, digest in enumerate(train.digests):
        first_at.setdefault(digest, position)
    overlaps = []
    for split, look in looks.items():
        twins: dict[int, tuple[int, str]] = {}
        for position, digest in enumerate(look.digests):
            twin = first_at.get(digest)
            if twin is not None and not (look is train and twin == position):
                twins[position] = twin, "exact"
        # Exact copies are not looked at again: they would be near to everything that the first of them is near to.
        rest = np.array([p for p in range(len(look.digests)) if p not in twins], dtype=np.int64)
        if look is train:
            pairs = rest[near_pairs(look.thumbnails[rest])]
        else:
            pairs = near_pairs(look.thumbnails[rest], train.thumbnails)
            pairs[:, 0] = rest[pairs[:, 0]]
        for position, twin in pairs.tolist():
            twins.setdefault(position, (twin, "near"))
        overlap = Overlap(split)
        for position, (twin, kind) in sorted(twins.items(), key=lambda item: (item[1][1], item[0])):
            setattr(overlap, kind, getattr(overlap, kind) + 1)
            overlap.contradictory += int(kind == "exact" and look.labels[position] != train.labels[twin])
            if len(overlap.examples) < SHOWN:
                places = look.records.where(look.index[position]), train.records.where(train.index[twin])
                overlap.examples.append((*places, kind))
        overlaps.append(overlap)
    return overlaps


# Samples


def sample_images(splits: ImageSplits, augmentation: Augmentation, count: int = 40) -> tuple[torch.Tensor, list[str]]:
    """Training images as the model will see them in its first step, in colours a person can look at.

    Args:
        splits: Where they are from: `count` training images, evenly spaced.
        augmentation: What happens to them.

    Returns:
        uint8 (count, C, H, W); and the label of each, or the shares of its labels where images are mixed.
    """
    train = _by_index(splits)
    batch = as_batch([train[int(i)] for i in evenly(len(train), count)])
    images, labels = augmentation.with_labels(batch["pixel_values"], batch["labels"], step=0, rank=0)
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (augmentation.mean, augmentation.std))
    pixels = ((images * std + mean) * 255).round().clamp(0, 255).byte()
    if labels.ndim == 1:
        return pixels, [splits.class_names[label] for label in labels.tolist()]
    texts = []
    for shares in labels:
        top = [(share, name) for share, name in zip(shares.tolist(), splits.class_names, strict=True) if share >= 0.005]
        texts.append(" + ".join(name if share > 0.995 else f"{share:.0%} {name}" for share, name in sorted(top)[::-1]))
    return pixels, texts


def sample_sheet(splits: ImageSplits, augmentation: Augmentation, path: str | Path, count: int = 40) -> Path:
    """Draw `sample_images` with their labels into an image file, and return its path."""
    from matplotlib.figure import Figure

    pixels, texts = sample_images(splits, augmentation, count)
    columns = min(8, len(texts))
    rows = -(-len(texts) // columns)
    figure = Figure(figsize=(1.5 * columns, 1.7 * rows), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(rows, columns)).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, image, text in zip(axes, pixels.permute(0, 2, 3, 1).numpy(), texts, strict=False):
        axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(text if len(text) <= 26 else f"{text[:25]}…", fontsize=7)
    figure.savefig(path, dpi=100)
    return Path(path)
