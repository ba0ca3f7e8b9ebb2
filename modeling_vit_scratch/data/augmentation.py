"""Augmentation: batched tensor operations on the training device, with randomness that has no state.

What is drawn for a batch is a function of (seed, step, rank), and for one image in a worker process of (seed, epoch,
index); the global generators are neither read nor moved. A run that is resumed therefore draws what it would have
drawn, whatever was prefetched when it stopped.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F

from .rand_augment import beside, draw_rand_augment, rand_augment

# Streams of randomness of one batch: switching one operation on or off leaves the others' draws as they are.
_RAND_AUGMENT, _ERASING, _MIXING, _MASK, _FLIP = 1, 2, 3, 5, 7


def stateless_generator(*key: int) -> torch.Generator:
    """A CPU generator that is a function of the key's whole numbers alone, e.g. (seed, step, rank)."""
    # SeedSequence mixes all bits of all numbers: neighbouring keys give unrelated streams.
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


def crop_box(size: tuple[int, int], scale: float, key: tuple[int, ...]) -> tuple[int, int, int, int]:
    """A random part of an image (Szegedy et al., 2015, "Going deeper with convolutions", sec. 6).

    Args:
        size: (width, height) in pixels.
        scale: Smallest share of the area to keep, in (0, 1]; the share is uniform in [scale, 1], and the aspect ratio
            log-uniform in [3/4, 4/3].
        key: What the randomness is a function of: (seed, epoch, index).

    Returns:
        (left, top, right, bottom) in pixels; the whole image where ten draws do not fit into it.
    """
    width, height = size
    generator = np.random.default_rng(key)
    for _ in range(10):
        area = width * height * generator.uniform(scale, 1)
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = generator.integers(width - w + 1), generator.integers(height - h + 1)
            return int(left), int(top), int(left + w), int(top + h)
    return 0, 0, width, height


def random_crop(images: torch.Tensor, padding: int, mode: str, generator: torch.Generator) -> torch.Tensor:
    """Shift each image by up to `padding` pixels each way: uint8 (B, C, H, W) -> uint8 (B, C, H, W).

    Args:
        padding: Pixels added on every side before a window of the old size is cut out at random.
        mode: What is added: "constant" (black) or "reflect".
        generator: On the CPU.

    Raises:
        ValueError: `check_padding`.
    """
    check_padding(padding, mode, images.shape[2:])
    B, C, H, W = images.shape
    # F.pad reflects floating point only; bytes fit into half precision exactly.
    padded = F.pad(images.half(), (padding,) * 4, mode="reflect").byte() if mode == "reflect" else None
    padded = F.pad(images, (padding,) * 4) if padded is None else padded
    top, left = beside(torch.randint(2 * padding + 1, (2, B), generator=generator), images)
    rows = (top[:, None] + torch.arange(H, device=images.device)).view(B, 1, H, 1)
    columns = (left[:, None] + torch.arange(W, device=images.device)).view(B, 1, 1, W)
    batch = torch.arange(B, device=images.device).view(B, 1, 1, 1)
    channels = torch.arange(C, device=images.device).view(1, C, 1, 1)
    return padded[batch, channels, rows, columns]


def check_padding(padding: int, mode: str, size: tuple[int, int]):
    """Raise a ValueError if images of this size (height, width) do not have enough pixels to be reflected."""
    if mode == "reflect" and padding >= min(size):
        raise ValueError(
            f"crop_padding ({padding}) must be below the image's shorter side ({min(size)} pixels) for crop_mode "
            "'reflect'; lower it, or use crop_mode 'constant'."
        )


def flip(images: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    """Mirror left to right the images that bool (B,) says: (B, C, H, W) -> (B, C, H, W)."""
    return torch.where(beside(mirrored, images).view(-1, 1, 1, 1), images.flip(-1), images)


def draw_first_flips(number: int, seed: int) -> torch.Tensor:
    """Which images are mirrored in the first epoch where flips alternate, half of them on average: bool (number,).

    In every further epoch an image is seen the other way round than before, so that two epochs show both of its views
    (Jordan, 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", alternating flip).
    """
    return torch.from_numpy(np.random.default_rng((seed, _FLIP)).random(number) < 0.5)


def draw_erasing(batch: int, size: tuple[int, int], p: float, key: tuple[int, ...]) -> np.ndarray:
    """Rectangles of random erasing (Zhong et al., 2020, alg. 1); a function of the key alone.

    The area is uniform in [0.02, 0.4] of the image's and the aspect ratio uniform in [0.3, 1 / 0.3], the published
    settings; the position is uniform among those that fit.

    Args:
        batch: Number of images B.
        size: (height, width) in pixels.
        p: Probability in [0, 1].
        key: What the randomness is a function of.

    Returns:
        int64 (B, 4): top, left, height, width in pixels; height and width 0 for an image that stays as it is.
    """
    generator = np.random.default_rng(key)
    H, W = size
    area = generator.uniform(0.02, 0.4, (batch, 10)) * H * W
    ratio = generator.uniform(0.3, 1 / 0.3, (batch, 10))
    height, width = np.rint(np.sqrt(area * ratio)).astype(int), np.rint(np.sqrt(area / ratio)).astype(int)
    fits = (height < H) & (width < W) & (height > 0) & (width > 0)
    first = fits.argmax(1)[:, None]  # of ten draws
    erased = fits.any(1) & (generator.random(batch) < p)
    height, width = (np.take_along_axis(side, first, 1)[:, 0] * erased for side in (height, width))
    top, left = generator.integers(H - height + 1), generator.integers(W - width + 1)
    return np.stack([top, left, height, width], axis=1)


def random_erasing(images: torch.Tensor, boxes: np.ndarray, key: tuple[int, ...]) -> torch.Tensor:
    """Fill each image's rectangle with noise, uniform in [0, 255]: uint8 (B, C, H, W) -> uint8 (B, C, H, W).

    Args:
        boxes: int64 (B, 4), as `draw_erasing` gives them.
        key: What the noise is a function of.
    """
    erased = np.flatnonzero(boxes[:, 2] * boxes[:, 3])
    noise = np.random.default_rng(key).integers(256, size=(len(erased), *images.shape[1:]), dtype=np.uint8)
    inside = _inside(boxes[erased], images)
    index = beside(erased, images)
    images = images.clone()
    images[index] = torch.where(inside, beside(noise, images), images[index])
    return images


def _inside(boxes: np.ndarray, images: torch.Tensor) -> torch.Tensor:
    """Whether a pixel lies in its image's box (top, left, height, width): bool (n, 1, H, W)."""
    top, left, height, width = beside(boxes, images).view(-1, 4, 1, 1, 1).unbind(1)
    down = torch.arange(images.shape[2], device=images.device)[:, None]
    across = torch.arange(images.shape[3], device=images.device)
    return (down >= top) & (down < top + height) & (across >= left) & (across < left + width)


def draw_mixing(
    batch: int, size: tuple[int, int], mixup_alpha: float, cutmix_alpha: float, p: float, key: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What mixup (Zhang et al., 2018) and cutmix (Yun et al., 2019, eq. 2) do; a function of the key alone.

    With both, each mixed image gets the one or the other at even odds.

    Args:
        batch: Number of images B.
        size: (height, width) in pixels.
        mixup_alpha: Of the Beta distribution of shares; 0 for no mixup.
        cutmix_alpha: Likewise for cutmix.
        p: Probability in [0, 1] that an image is mixed.
        key: What the randomness is a function of.

    Returns:
        int64 (B,), whom each image is mixed with, a permutation; float32 (B,), mixup's share of its own pixels; and
        int64 (B, 4), cutmix's box (top, left, height, width), which the partner's pixels fill.
    """
    generator = np.random.default_rng(key)
    H, W = size
    partners = generator.permutation(batch)
    mixed = generator.random(batch) < p
    cut = generator.random(batch) < (0 if not cutmix_alpha else 0.5 if mixup_alpha else 1)
    shares = generator.beta(mixup_alpha or 1, mixup_alpha or 1, batch)
    shares = np.where(mixed & ~cut & bool(mixup_alpha), shares, 1)
    side = np.sqrt(1 - generator.beta(cutmix_alpha or 1, cutmix_alpha or 1, batch)) * (mixed & cut)
    bounds = []
    for length in (H, W):  # a box around a point anywhere, clipped
        center, reach = generator.integers(length, size=batch), (length * side).astype(int)
        low, high = (center - reach // 2).clip(0, length), (center - reach // 2 + reach).clip(0, length)
        bounds += [low, high - low]
    top, height, left, width = bounds
    return partners, shares.astype(np.float32), np.stack([top, left, height, width], axis=1)


def mix(
    images: torch.Tensor,
    labels: torch.Tensor,
    num_labels: int,
    partners: np.ndarray,
    shares: np.ndarray,
    boxes: np.ndarray,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix images and labels as `draw_mixing` says; a label's share is the share of its pixels.

    Args:
        images: Floating point (B, C, H, W).
        labels: int64 (B,).
        num_labels: Number of classes K.

    Returns:
        Images (B, C, H, W) and class probabilities, float32 (B, K).
    """
    partners, shares = beside(partners, images), beside(shares, images)
    own = torch.where(_inside(boxes, images), 0, shares.view(-1, 1, 1, 1))  # (B, 1, H, W)
    share = own.mean((1, 2, 3))[:, None]
    targets = F.one_hot(labels, num_labels).float()
    images = images[partners].lerp(images, own.to(images.dtype))
    return images, share * targets + (1 - share) * targets[partners]


def draw_mask(
    batch: int, grid_hw: tuple[int, int], unit_hw: tuple[int, int], ratio: float, key: tuple[int, ...]
) -> torch.Tensor:
    """Which patches of each image are hidden (SimMIM, Xie et al., 2022, sec. 3.2).

    Args:
        batch: Number of images B.
        grid_hw: Patches (h, w) of an image.
        unit_hw: Patches (down, across) that are hidden or shown together.
        ratio: Share of the units that is hidden, rounded up.
        key: What the draw is a function of.

    Returns:
        bool (B, h, w).
    """
    down, across = (-(-side // unit) for side, unit in zip(grid_hw, unit_hw, strict=True))
    rank = torch.rand(batch, down * across, generator=stateless_generator(*key, _MASK)).argsort(1).argsort(1)
    hidden = (rank < math.ceil(ratio * down * across)).view(batch, down, across)
    hidden = hidden.repeat_interleave(unit_hw[0], 1).repeat_interleave(unit_hw[1], 2)
    return hidden[:, : grid_hw[0], : grid_hw[1]]


def normalize(images: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """Bytes to normalised floats, as the image processor does: uint8 (B, C, H, W) -> float32 (B, C, H, W)."""
    mean, std = (beside(torch.tensor(value), images).view(-1, 1, 1) for value in (mean, std))
    return (images.float() / 255 - mean) / std


AUGMENTATIONS = ("crop", "flip", "rand_augment", "erasing", "mixup", "cutmix")


def parse_until(text: str | float | None) -> dict[str, float]:
    """When augmentations stop: "0.9" (all of them) or "mixup=0.8,rand_augment=0.9", as shares of the training.

    `Augmentation` looks it up for each batch; images that are cropped when they are read are told by
    `training.schedule.settle_crops`.

    Raises:
        ValueError: The text has another form.
    """
    until = {}
    for item in filter(None, str("" if text is None else text).replace(" ", "").split(",")):
        name, separator, share = item.rpartition("=")
        try:
            until |= dict.fromkeys([name] if separator else AUGMENTATIONS, float(share))
        except ValueError as error:
            raise ValueError(
                f"augment_until: {item!r} is not of the form name=share, e.g. mixup=0.9, nor a share of the "
                "training for all."
            ) from error
    return until


def parse_sizes(text: str | None) -> dict[int, float]:
    """Progressive resizing: "16=0.4,24=0.7" -> {16: 0.4, 24: 0.7}, sides in pixels, and shares of the training.

    Raises:
        ValueError: The text has another form.
    """
    sizes = {}
    for item in filter(None, (text or "").replace(" ", "").split(",")):
        side, _, share = item.partition("=")
        try:
            sizes[int(side)] = float(share)
        except ValueError as error:
            raise ValueError(f"progressive_resizing: {item!r} is not of the form side=share, e.g. 16=0.4.") from error
    return sizes


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training batch before the model sees it.

    Args:
        mean: Per channel, in [0, 1].
        std: Per channel.
        crop_padding: Pixels; see `random_crop`. 0 switches it off.
        crop_mode: "constant" or "reflect".
        horizontal_flip: Probability in [0, 1].
        seed: What all randomness is a function of, with the step and the rank.
        rand_augment_ops: Operations of RandAugment that each image goes through; 0 switches it off.
        rand_augment_magnitude: Their strength in [0, 10]; see `rand_augment`.
        erasing: Probability in [0, 1] of erasing a rectangle; see `draw_erasing`.
        mixup_alpha: Of the Beta distribution of shares; 0 switches mixup off. See `draw_mixing`.
        cutmix_alpha: Likewise for cutmix.
        mix_probability: Share of the images that are mixed, with either, in [0, 1].
        num_labels: Number of classes; needed for mixing.
        sizes: Sides in pixels to which the augmented images are made smaller, and the share of the training until which
            they are; fewer patches make a step faster (Tan and Le, 2021, "EfficientNetV2", sec. 4).
        until: Of `AUGMENTATIONS`, by name: the share of the training, in [0, 1], after which it stops; 1 if not named.
    """

    mean: list[float]
    std: list[float]
    crop_padding: int = 0
    crop_mode: str = "constant"
    horizontal_flip: float = 0.0
    seed: int = 0
    rand_augment_ops: int = 0
    rand_augment_magnitude: float = 5.0
    erasing: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    mix_probability: float = 1.0
    num_labels: int | None = None
    sizes: Mapping[int, float] = field(default_factory=dict)
    until: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding ({self.crop_padding}) must be at least 0 pixels.")
        if self.crop_mode not in ("constant", "reflect"):
            raise ValueError(f"crop_mode ({self.crop_mode!r}) must be 'constant' or 'reflect'.")
        for name in ("horizontal_flip", "erasing", "mix_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be a probability in [0, 1].")
        for name in ("rand_augment_ops", "mixup_alpha", "cutmix_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 0, which switches it off.")
        if not 0 <= self.rand_augment_magnitude <= 10:
            raise ValueError(f"rand_augment_magnitude ({self.rand_augment_magnitude}) must be in [0, 10].")
        if self.rand_augment_ops and len(self.mean) not in (1, 3):
            raise ValueError(f"RandAugment knows grey and RGB, not {len(self.mean)} channels; set rand_augment_ops=0.")
        if (self.mixup_alpha or self.cutmix_alpha) and (self.num_labels or 0) < 2:
            raise ValueError(f"mixup and cutmix need num_labels ({self.num_labels}), the number of classes.")
        if [*self.sizes.values()] != sorted(share for share in set(self.sizes.values()) if 0 < share <= 1):
            shares = ", ".join(f"{side}={share:g}" for side, share in self.sizes.items())
            raise ValueError(f"progressive_resizing ({shares}): shares of the training must rise, and be in (0, 1].")
        for name, share in self.until.items():
            if name not in AUGMENTATIONS:
                raise ValueError(f"augment_until: {name!r} is none of {', '.join(AUGMENTATIONS)}.")
            if not 0 <= share <= 1:
                raise ValueError(f"augment_until: {name} ({share}) must be a share of the training in [0, 1].")

    def __call__(
        self, images: torch.Tensor, step: int, rank: int, progress: float = 0.0, mirrored: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Augment and normalise a batch: uint8 (B, C, H, W) -> float32 (B, C, H, W), on the images' device.

        As long as one of `sizes` holds, it is the images' height and width.

        Args:
            images: On any device.
            step: Batches this rank has trained on before, over the whole run.
            rank: Of this process.
            progress: Share of the training that is done, in [0, 1].
            mirrored: bool (B,), the images to mirror; None to draw them by `horizontal_flip`.
        """
        key = (self.seed, step, rank)
        generator = stateless_generator(*key)
        if self.crop_padding and self._is_on("crop", progress):
            images = random_crop(images, self.crop_padding, self.crop_mode, generator)
        if self.horizontal_flip and self._is_on("flip", progress):
            if mirrored is None:
                mirrored = torch.rand(len(images), generator=generator) < self.horizontal_flip
            images = flip(images, mirrored)
        if self.rand_augment_ops and self._is_on("rand_augment", progress):
            ops, signs = draw_rand_augment(len(images), self.rand_augment_ops, (*key, _RAND_AUGMENT))
            fill = [round(255 * value) for value in self.mean]
            images = rand_augment(images, ops, signs, self.rand_augment_magnitude, fill)
        if self.erasing and self._is_on("erasing", progress):
            boxes = draw_erasing(len(images), images.shape[2:], self.erasing, (*key, _ERASING))
            images = random_erasing(images, boxes, (*key, _ERASING, 1))
        images = normalize(images, self.mean, self.std)
        side = next((side for side, share in self.sizes.items() if progress < share), None)
        return images if side is None else F.interpolate(images, (side, side), mode="bilinear", antialias=True)

    def with_labels(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        step: int,
        rank: int,
        progress: float = 0.0,
        mirrored: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment, normalise and mix a batch.

        Args:
            images: uint8 (B, C, H, W), on any device.
            labels: int64 (B,), on the same.
            step: Batches this rank has trained on before, over the whole run.
            rank: Of this process.
            progress: Share of the training that is done, in [0, 1].
            mirrored: As for `__call__`.

        Returns:
            float32 (B, C, H, W); and the labels as they were, or, where images are mixed, class probabilities,
            float32 (B, K).
        """
        images = self(images, step, rank, progress, mirrored)
        mixup_alpha = self.mixup_alpha if self._is_on("mixup", progress) else 0
        cutmix_alpha = self.cutmix_alpha if self._is_on("cutmix", progress) else 0
        if not (mixup_alpha or cutmix_alpha):
            return images, labels
        key = (self.seed, step, rank, _MIXING)
        drawn = draw_mixing(len(images), images.shape[2:], mixup_alpha, cutmix_alpha, self.mix_probability, key)
        return mix(images, labels, self.num_labels, *drawn)

    def _is_on(self, name: str, progress: float) -> bool:
        return progress < self.until.get(name, 1.0) or self.until.get(name, 1.0) == 1.0
