"""Augmentation: batched tensor operations on the training device, with randomness that has no state.

What is drawn for a batch is a function of (seed, step, rank), and for one picture in a worker process of (seed, epoch,
index); the global generators are neither read nor moved. A run that is resumed therefore draws what it would have
drawn, whatever was prefetched when it stopped.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F


def stateless_generator(*key: int) -> torch.Generator:
    """A CPU generator that is a function of the key's whole numbers alone, e.g. (seed, step, rank)."""
    # SeedSequence mixes all bits of all numbers: neighbouring keys give unrelated streams.
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


def crop_box(size: tuple[int, int], scale: float, key: tuple[int, ...]) -> tuple[int, int, int, int]:
    """A random part of a picture (Szegedy et al., 2015, "Going deeper with convolutions", sec. 6).

    Args:
        size: (width, height) in pixels.
        scale: Smallest share of the area to keep, in (0, 1]; the share is uniform in [scale, 1], and the aspect ratio
            log-uniform in [3/4, 4/3].
        key: What the randomness is a function of: (seed, epoch, index).

    Returns:
        (left, top, right, bottom) in pixels; the whole picture where ten draws do not fit into it.
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
    """Shift each picture by up to `padding` pixels each way: uint8 (B, C, H, W) -> uint8 (B, C, H, W).

    Args:
        padding: Pixels added on every side before a window of the old size is cut out at random.
        mode: What is added: "constant" (black) or "reflect".
        generator: On the CPU.
    """
    B, C, H, W = images.shape
    # F.pad reflects floating point only; bytes fit into half precision exactly.
    padded = F.pad(images.half(), (padding,) * 4, mode="reflect").byte() if mode == "reflect" else None
    padded = F.pad(images, (padding,) * 4) if padded is None else padded
    top, left = torch.randint(2 * padding + 1, (2, B), generator=generator).to(images.device)
    rows = (top[:, None] + torch.arange(H, device=images.device)).view(B, 1, H, 1)
    columns = (left[:, None] + torch.arange(W, device=images.device)).view(B, 1, 1, W)
    batch = torch.arange(B, device=images.device).view(B, 1, 1, 1)
    channels = torch.arange(C, device=images.device).view(1, C, 1, 1)
    return padded[batch, channels, rows, columns]


def random_flip(images: torch.Tensor, p: float, generator: torch.Generator) -> torch.Tensor:
    """Mirror each picture left to right with probability p: (B, C, H, W) -> (B, C, H, W)."""
    flip = (torch.rand(len(images), generator=generator) < p).to(images.device)
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)


def normalize(images: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """Bytes to normalised floats, as the image processor does: uint8 (B, C, H, W) -> float32 (B, C, H, W)."""
    mean, std = (torch.tensor(value, device=images.device).view(-1, 1, 1) for value in (mean, std))
    return (images.float() / 255 - mean) / std


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
    """

    mean: list[float]
    std: list[float]
    crop_padding: int = 0
    crop_mode: str = "constant"
    horizontal_flip: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding ({self.crop_padding}) must be at least 0 pixels.")
        if self.crop_mode not in ("constant", "reflect"):
            raise ValueError(f"crop_mode ({self.crop_mode!r}) must be 'constant' or 'reflect'.")
        if not 0 <= self.horizontal_flip <= 1:
            raise ValueError(f"horizontal_flip ({self.horizontal_flip}) must be a probability in [0, 1].")

    def __call__(self, images: torch.Tensor, step: int, rank: int) -> torch.Tensor:
        """Augment and normalise a batch: uint8 (B, C, H, W) -> float32 (B, C, H, W), on the images' device.

        Args:
            images: On any device.
            step: Batches this rank has trained on before, over the whole run.
            rank: Of this process.
        """
        generator = stateless_generator(self.seed, step, rank)
        if self.crop_padding:
            images = random_crop(images, self.crop_padding, self.crop_mode, generator)
        if self.horizontal_flip:
            images = random_flip(images, self.horizontal_flip, generator)
        return normalize(images, self.mean, self.std)
