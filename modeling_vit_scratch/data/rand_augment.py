"""RandAugment (Cubuk et al., 2020) on a batch: each image gets its own operations, computed on the device."""

import math

import numpy as np
import torch

# RandAugment (Cubuk et al., 2020, sec. 3), in the order of its list.
RAND_AUGMENT_OPS = (
    "identity", "auto_contrast", "equalize", "rotate", "solarize", "color", "posterize", "contrast", "brightness",
    "sharpness", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
TABLE_OPS = ("auto_contrast", "equalize", "solarize", "posterize", "contrast", "brightness")
BLEND_OPS = ("color", "sharpness")
AFFINE_OPS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def beside(values: torch.Tensor | np.ndarray, images: torch.Tensor) -> torch.Tensor:
    """Values of the CPU on the images' device. A GPU is not waited for: it goes on with the step before."""
    return torch.as_tensor(values).to(images.device, non_blocking=images.is_cuda)


def draw_rand_augment(batch: int, num_ops: int, key: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which operations, and in which direction, each image gets; a function of the key alone.

    Returns:
        int64 (num_ops, B), indices into `RAND_AUGMENT_OPS`; and float32 (num_ops, B), -1 or 1. On the CPU.
    """
    generator = np.random.default_rng(key)
    ops = generator.integers(len(RAND_AUGMENT_OPS), size=(num_ops, batch))
    signs = generator.integers(2, size=(num_ops, batch)) * 2 - 1
    return torch.from_numpy(ops), torch.from_numpy(signs).float()


def rand_augment(
    images: torch.Tensor, ops: torch.Tensor, signs: torch.Tensor, magnitude: float, fill: list[int]
) -> torch.Tensor:
    """RandAugment (Cubuk et al., 2020), byte for byte as with PIL: uint8 (B, C, H, W) -> uint8 (B, C, H, W).

    The ranges are AutoAugment's (Cubuk et al., 2019, table 6), reached at magnitude 10: shear 0.3, translation 150/331
    of the side, rotation 30 degrees, enhancement factors 1 +- 0.9, posterize to 4 bits, solarize everything.

    Args:
        images: 1 or 3 channels.
        ops: int64 (N, B), on the CPU: what each image goes through, one row after the other.
        signs: float32 (N, B), on the CPU: direction, -1 or 1, of operations that have one.
        magnitude: In [0, 10].
        fill: Of pixels that come from outside, one byte per channel.
    """
    for op, sign in zip(ops, signs, strict=True):
        groups = ((TABLE_OPS, _by_table), (BLEND_OPS, _by_blend), (AFFINE_OPS, _by_affine))
        result = images.clone()
        for names, function in groups:
            members = [RAND_AUGMENT_OPS.index(name) for name in names]
            # Sorted by operation, so that each is one slice of the group.
            index = torch.cat([(op == member).nonzero()[:, 0] for member in members])
            counts = [int((op == member).sum()) for member in members]
            if len(index) == 0:
                continue
            strength = beside(sign[index].double() * (magnitude / 10), images)
            index = beside(index, images)
            slices = dict(zip(names, _slices(counts), strict=True))
            result[index] = function(images[index], slices, strength, magnitude / 10, fill)
        images = result
    return images


def _slices(counts: list[int]) -> list[slice]:
    ends = np.cumsum(counts).tolist()
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _grey(images: torch.Tensor) -> torch.Tensor:
    """Luminance by ITU-R 601-2 as PIL rounds it: uint8 (n, C, H, W) -> int32 (n, 1, H, W)."""
    if images.shape[1] == 1:
        return images.int()
    red, green, blue = images.int().split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _blend(base: torch.Tensor, images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """base + factor (images - base), in float32, clipped and cut off to bytes."""
    base = base.float()
    return (base + factor.float() * (images.float() - base)).clamp(0, 255).byte()


def _by_table(images, slices, strength, magnitude, fill) -> torch.Tensor:
    """Operations that map each value of a channel to another, by look-up tables uint8 (n, C, 256)."""
    n, C, H, W = images.shape
    values = torch.arange(256, device=images.device)
    table = values.byte().repeat(n, C, 1)
    pixels = images.flatten(2).long()  # (n, C, H * W)

    rows = slices["auto_contrast"]
    if rows.start < rows.stop:
        low, high = (bound.double()[..., None] for bound in pixels[rows].aminmax(dim=2))
        scale = high.new_full((), 255) / (high - low)  # 255 / ... would round twice
        stretched = (values * scale + -low * scale).clamp(0, 255).byte()  # float64, in PIL's order
        table[rows] = torch.where(high > low, stretched, table[rows])

    rows = slices["equalize"]
    if rows.start < rows.stop:
        selected = pixels[rows]
        histogram = torch.zeros(len(selected), C, 256, dtype=torch.int64, device=images.device)
        histogram.scatter_add_(2, selected, torch.ones_like(selected))
        brightest = histogram.gather(2, selected.amax(2, keepdim=True))
        step = (H * W - brightest).div(255, rounding_mode="floor")  # (n, C, 1)
        before = histogram.cumsum(2) - histogram
        level = (before + step // 2).div(step.clamp(min=1), rounding_mode="floor").clamp(max=255)
        table[rows] = torch.where(step > 0, level.byte(), table[rows])

    rows = slices["solarize"]
    table[rows] = torch.where(values < 256 * (1 - magnitude), values, 255 - values).byte()

    rows = slices["posterize"]
    table[rows] = (values & (0xFF << round(4 * magnitude))).byte()

    rows = slices["contrast"]
    total = _grey(images[rows]).long().sum((1, 2, 3))
    mean = (2 * total + H * W) // (2 * H * W)  # rounded half up
    table[rows] = _blend(mean.view(-1, 1, 1), values, 1 + 0.9 * strength[rows].view(-1, 1, 1)).expand(-1, C, -1)

    rows = slices["brightness"]
    table[rows] = _blend(torch.zeros_like(values), values, 1 + 0.9 * strength[rows].view(-1, 1, 1)).expand(-1, C, -1)
    return table.gather(2, pixels).view(n, C, H, W)


def _by_blend(images, slices, strength, magnitude, fill) -> torch.Tensor:
    """Operations that move an image to or from another one made of it: its grey, or its smoothed version."""
    base = images.clone()
    base[slices["color"]] = _grey(images[slices["color"]]).byte()
    rows = slices["sharpness"]
    sharp = images[rows].int()
    if sharp.numel() and min(sharp.shape[2:]) > 2:  # borders stay as they are
        H, W = sharp.shape[2:]
        around = sum(sharp[:, :, i : H - 2 + i, j : W - 2 + j] for i in range(3) for j in range(3))
        base[rows, :, 1:-1, 1:-1] = ((2 * (around + 4 * sharp[:, :, 1:-1, 1:-1]) + 13) // 26).byte()  # rounded / 13
    return _blend(base, images, 1 + 0.9 * strength.view(-1, 1, 1, 1))


def _by_affine(images, slices, strength, magnitude, fill) -> torch.Tensor:
    """Operations that move pixels: an affine map from each pixel to the nearest one it comes from."""
    n, C, H, W = images.shape
    matrix = beside(torch.tensor([1.0, 0, 0, 0, 1, 0], dtype=torch.float64), images).repeat(n, 1)
    rows = slices["rotate"]
    angle = strength[rows] * -math.radians(30)
    cos, sin = angle.cos(), angle.sin()
    x, y = W / 2, H / 2
    matrix[rows] = torch.stack([cos, sin, x - x * cos - y * sin, -sin, cos, y + x * sin - y * cos], dim=1)
    for name, column, reach in (
        ("shear_x", 1, 0.3), ("shear_y", 3, 0.3), ("translate_x", 2, 150 / 331 * W), ("translate_y", 5, 150 / 331 * H),
    ):  # fmt: skip
        matrix[slices[name], column] = strength[slices[name]] * reach
    # From the middle of a pixel, in whole 1/65536 of a pixel: exact, and so the same on every device.
    matrix[:, 2] += (matrix[:, 0] + matrix[:, 1]) / 2
    matrix[:, 5] += (matrix[:, 3] + matrix[:, 4]) / 2
    a, b, c, d, e, f = (matrix * 65536 + 0.5).floor().long()[:, :, None, None].unbind(1)  # (n, 1, 1) each
    across, down = torch.arange(W, device=images.device), torch.arange(H, device=images.device)[:, None]
    x, y = (a * across + b * down + c) >> 16, (d * across + e * down + f) >> 16  # (n, H, W)
    inside = ((x >= 0) & (x < W) & (y >= 0) & (y < H))[:, None]
    source = (y.clamp(0, H - 1) * W + x.clamp(0, W - 1)).view(n, 1, H * W).expand(-1, C, -1)
    outside = beside(torch.tensor(fill, dtype=torch.uint8), images).view(1, C, 1, 1)
    return torch.where(inside, images.flatten(2).gather(2, source).view(n, C, H, W), outside)
