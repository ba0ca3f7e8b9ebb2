"""augmentation.py: every operation against a slow, plain, per-image reference, by frequency, and without a state."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from modeling_vit_scratch.data import Augmentation
from modeling_vit_scratch.data import augmentation as augmentation_module
from modeling_vit_scratch.data.augmentation import (
    AUGMENTATIONS,
    crop_box,
    draw_erasing,
    draw_mixing,
    mix,
    normalize,
    parse_until,
    random_crop,
    random_erasing,
    stateless_generator,
)
from modeling_vit_scratch.data.rand_augment import RAND_AUGMENT_OPS, draw_rand_augment, rand_augment
from modeling_vit_scratch.data.splits import DecodedImages

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
EVERYTHING = {
    "crop_padding": 4,
    "horizontal_flip": 0.5,
    "rand_augment_ops": 2,
    "rand_augment_magnitude": 7.0,
    "erasing": 0.5,
    "mixup_alpha": 0.4,
    "cutmix_alpha": 1.0,
    "num_labels": 10,
}


def noise(batch: int, size=(32, 32), channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (batch, channels, *size), dtype=torch.uint8, generator=generator)


def photos(batch: int, size=(32, 32), channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Smooth images of few and of many values: what equalize, contrast and the like are sensitive to."""
    generator = np.random.default_rng(seed)
    images = []
    for i in range(batch):
        small = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((size[1], size[0]), Image.Resampling.BICUBIC)).astype(float)
        low, high = sorted(generator.uniform(0, 255, 2))
        pixels = low + pixels / 255 * (high - low) if i % 3 else np.round(pixels / 64) * 64
        pixels = np.full_like(pixels, low) if i % 10 == 9 else pixels  # one colour
        images.append(torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)[:channels])
    return torch.stack(images)


def as_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())


def from_pil(image: Image.Image) -> torch.Tensor:
    pixels = np.array(image)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def assert_binomial(hits: int, draws: int, p: float):
    """Within four and a half standard deviations: wrong once in 150,000 times, and never for a given seed."""
    assert abs(hits - draws * p) <= 4.5 * math.sqrt(draws * p * (1 - p)), f"{hits} of {draws} at p = {p:g}"


# Crop and flip


@pytest.mark.parametrize("mode", ["constant", "reflect"])
@pytest.mark.parametrize(("size", "padding"), [((32, 32), 4), ((9, 14), 3), ((6, 6), 5), ((8, 8), 1)])
def test_crop_against_a_loop(mode, size, padding):
    images = noise(40, size)
    cropped = random_crop(images, padding, mode, stateless_generator(5))
    top, left = torch.randint(2 * padding + 1, (2, 40), generator=stateless_generator(5)).tolist()
    for i, image in enumerate(images):
        padded = np.pad(image.numpy(), ((0, 0), (padding, padding), (padding, padding)), mode=mode)
        window = padded[:, top[i] : top[i] + size[0], left[i] : left[i] + size[1]]
        assert np.array_equal(cropped[i], window)
    assert cropped.dtype == torch.uint8


def test_crop_offsets_are_uniform():
    """1,000 draws: each of the 9 x 9 windows about equally often."""
    position = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).expand(1000, 1, 8, 8)
    cropped = random_crop(position, 4, "constant", stateless_generator(0))
    corner = cropped[:, 0].flatten(1)
    first = (corner > 0).int().argmax(1)  # the first pixel that is not padding tells the offset
    value = corner.gather(1, first[:, None])[:, 0].long() - 1
    down, across = value // 8 - first // 8 + 4, value % 8 - first % 8 + 4
    for offset in (down, across):
        counts = torch.bincount(offset, minlength=9)
        assert len(counts) == 9
        for count in counts.tolist():
            assert_binomial(count, 1000, 1 / 9)
    assert len(set(zip(down.tolist(), across.tolist(), strict=True))) == 81


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_flip_by_frequency(p):
    images = noise(1000, (4, 4))
    augment = Augmentation([0.0] * 3, [1.0] * 3, horizontal_flip=p)
    flipped = (255 * augment(images, 1, 0)).round().byte()
    pairs = zip(flipped, images, strict=True)
    mirrored = torch.tensor([np.array_equal(new, old.numpy()[:, :, ::-1]) for new, old in pairs])
    same = (flipped == images).flatten(1).all(1)
    assert bool((mirrored | same).all())
    assert_binomial(int(mirrored.sum()), 1000, p)


def test_normalize():
    images = noise(10)
    reference = (images.numpy().astype(np.float64) / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    result = normalize(images, MEAN, STD)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result, reference, atol=1e-6)


def test_random_part_of_one_image():
    """Area and aspect ratio stay in their ranges and reach their ends; a scale of 1 rarely fits, and gives it all."""
    boxes = np.array([crop_box((200, 150), 0.3, (0, 0, index)) for index in range(1000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes >= 0).all()
    assert (boxes[:, 2] <= 200).all()
    assert (boxes[:, 3] <= 150).all()
    area, ratio = width * height / 30000, width / height
    inner = ~((width == 200) & (height == 150))
    assert inner.mean() > 0.99
    assert 0.29 < area.min() < 0.32
    assert 0.9 < area.max()
    assert 0.74 < ratio[inner].min() < 0.78
    assert 1.28 < ratio[inner].max() < 1.35
    assert crop_box((100, 1), 0.5, (0, 0, 0)) == (0, 0, 100, 1)
    assert crop_box((1, 1), 0.5, (0, 0, 0)) == (0, 0, 1, 1)


# RandAugment


def reference_operation(image: Image.Image, name: str, sign: float, magnitude: float, fill) -> Image.Image:
    """As AutoAugment's and RandAugment's authors do it, with PIL; ranges of AutoAugment, table 6."""
    level, strength = magnitude / 10, sign * magnitude / 10
    W, H = image.size
    enhance = {
        "color": ImageEnhance.Color,
        "contrast": ImageEnhance.Contrast,
        "brightness": ImageEnhance.Brightness,
        "sharpness": ImageEnhance.Sharpness,
    }
    affine = {
        "shear_x": (1, 0.3 * strength, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * strength, 1, 0),
        "translate_x": (1, 0, 150 / 331 * W * strength, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, 150 / 331 * H * strength),
    }
    if name in enhance:
        return enhance[name](image).enhance(1 + 0.9 * strength)
    if name in affine:
        nearest = Image.Resampling.NEAREST
        return image.transform(image.size, Image.Transform.AFFINE, affine[name], nearest, fillcolor=fill)
    return {
        "identity": lambda: image,
        "auto_contrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "solarize": lambda: ImageOps.solarize(image, 256 * (1 - level)),
        "posterize": lambda: ImageOps.posterize(image, 8 - round(4 * level)),
        "rotate": lambda: image.rotate(30 * strength, Image.Resampling.NEAREST, fillcolor=fill),
    }[name]()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [0.0, 3.0, 6.0, 7.3, 10.0])
@pytest.mark.parametrize("name", RAND_AUGMENT_OPS)
def test_operations_against_pil(name, magnitude, channels):
    fill = [128, 100, 7][:channels]
    for images in (
        photos(20, channels=channels),
        noise(6, channels=channels),
        photos(12, (20, 33), channels, seed=1),
        noise(3, (2, 5), channels),
        noise(2, (1, 1), channels),
    ):
        ops = torch.full((1, len(images)), RAND_AUGMENT_OPS.index(name))
        signs = torch.tensor([[1.0, -1.0]]).repeat(1, len(images))[:, : len(images)]
        results = rand_augment(images, ops, signs, magnitude, fill)
        assert results.dtype == torch.uint8
        for image, result, sign in zip(images, results, signs[0].tolist(), strict=True):
            color = fill[0] if channels == 1 else tuple(fill)
            expected = from_pil(reference_operation(as_pil(image), name, sign, magnitude, color))
            assert torch.equal(result, expected), f"{(result != expected).sum()} of {result.numel()} bytes differ"


def test_rand_augment_of_a_mixed_batch():
    """Several operations one after the other, different ones for each image."""
    images = photos(60)
    ops, signs = draw_rand_augment(60, 3, (1, 2, 3))
    results = rand_augment(images, ops, signs, 6.0, [10, 20, 30])
    for i, image in enumerate(images):
        image = as_pil(image)
        for op, sign in zip(ops[:, i].tolist(), signs[:, i].tolist(), strict=True):
            image = reference_operation(image, RAND_AUGMENT_OPS[op], sign, 6.0, (10, 20, 30))
        assert torch.equal(results[i], from_pil(image))


def test_the_published_operations():
    """RandAugment, sec. 3: K = 14."""
    published = (
        "identity autoContrast equalize rotate solarize color posterize contrast brightness sharpness shear-x shear-y "
        "translate-x translate-y"
    )
    names = ["".join("_" + c.lower() if c.isupper() else c for c in name) for name in published.split()]
    assert [name.replace("-", "_") for name in names] == list(RAND_AUGMENT_OPS)


def test_operations_are_drawn_uniformly():
    ops, signs = draw_rand_augment(1000, 4, (0, 0, 0))
    for row in ops:
        for count in torch.bincount(row, minlength=14).tolist():
            assert_binomial(count, 1000, 1 / 14)
    assert_binomial(int((signs > 0).sum()), 4000, 0.5)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert ((ops[0] == ops[1]).sum() - 1000 / 14).abs() < 4.5 * math.sqrt(1000 / 14), "layers are independent"


# Random erasing


def test_erasing_against_a_loop():
    images = noise(50, (20, 30))
    boxes = draw_erasing(50, (20, 30), 0.7, (3,))
    results = random_erasing(images, boxes, (4,))
    generator, erased = np.random.default_rng((4,)), 0
    for image, result, (top, left, height, width) in zip(images, results, boxes, strict=True):
        expected = image.clone()
        if height:
            fresh = generator.integers(256, size=(3, 20, 30), dtype=np.uint8)
            for y in range(top, top + height):
                for x in range(left, left + width):
                    expected[:, y, x] = torch.from_numpy(fresh[:, y, x])
            erased += 1
        assert torch.equal(result, expected)
    assert 20 < erased < 50


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_erasing_by_frequency(p):
    boxes = draw_erasing(1000, (32, 32), p, (0, 1, 2))
    assert_binomial(int((boxes[:, 2] > 0).sum()), 1000, p)
    assert ((boxes[:, 2] > 0) == (boxes[:, 3] > 0)).all()


def test_erased_rectangles_have_the_published_shapes():
    """Zhong et al., 2020, sec. 3: s_l = 0.02, s_h = 0.4, r_1 = 0.3, r_2 = 1 / 0.3."""
    top, left, height, width = draw_erasing(20000, (200, 200), 1.0, (0,)).T
    area, ratio = height * width / 40000, height / width
    assert area.min() == pytest.approx(0.02, abs=0.002)
    assert area.max() == pytest.approx(0.4, abs=0.005)
    assert ratio.min() == pytest.approx(0.3, abs=0.02)
    assert ratio.max() == pytest.approx(1 / 0.3, abs=0.1)
    assert (top + height).max() <= 200
    assert (left + width).max() <= 200
    assert np.mean(area) == pytest.approx(0.21, abs=0.02)
    free = 200 - height
    assert np.mean(top / np.maximum(free, 1)) == pytest.approx(0.5, abs=0.01)


def test_erased_pixels_are_uniform_noise():
    images = torch.zeros(200, 3, 32, 32, dtype=torch.uint8)
    boxes = np.tile([[4, 4, 20, 20]], (200, 1))
    patch = random_erasing(images, boxes, (0,))[:, :, 4:24, 4:24].flatten().long()
    counts = torch.bincount(patch, minlength=256).double()
    expected = len(patch) / 256
    assert ((counts - expected).abs() < 5 * math.sqrt(expected)).all()


# Mixing


def slow_mix(images, labels, classes, partners, shares, boxes):
    """One image at a time; pixels of the box are the partner's, all others are shared."""
    mixed, targets = [], []
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        image, own = images[i] * shares[i] + images[partners[i]] * (1 - shares[i]), float(shares[i])
        if height and width:
            image = images[i].clone()
            image[:, top : top + height, left : left + width] = images[partners[i]][
                :, top : top + height, left : left + width
            ]
            own = 1 - height * width / (image.shape[1] * image.shape[2])
        target = torch.zeros(classes)
        target[labels[i]] += own
        target[labels[partners[i]]] += 1 - own
        mixed.append(image)
        targets.append(target)
    return torch.stack(mixed), torch.stack(targets)


@pytest.mark.parametrize("alphas", [(0.3, 0), (0, 1.0), (0.3, 1.0)])
@pytest.mark.parametrize("size", [(32, 32), (9, 14)])
def test_mixing_against_a_loop(alphas, size):
    images, labels = torch.randn(60, 3, *size), torch.arange(60) % 7
    drawn = draw_mixing(60, size, *alphas, 0.8, (1, 2))
    mixed, targets = mix(images, labels, 7, *drawn)
    expected, expected_targets = slow_mix(images, labels, 7, *drawn)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(targets, expected_targets, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(targets.sum(1), torch.ones(60))
    assert targets.dtype == torch.float32
    untouched = (drawn[1] == 1) & (drawn[2][:, 2] * drawn[2][:, 3] == 0)
    assert untouched.any()
    assert torch.equal(mixed[untouched], images[untouched]), "what is not mixed stays bit for bit as it was"
    assert torch.equal(targets[untouched], torch.nn.functional.one_hot(labels[untouched], 7).float())


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("alphas", [(1.0, 0), (0, 1.0), (1.0, 1.0)])
def test_mixing_by_frequency(alphas, p):
    _, shares, boxes = draw_mixing(1000, (1000, 1000), *alphas, p, (5, 6))
    blended, cut = shares < 1, boxes[:, 2] * boxes[:, 3] > 0
    assert not (blended & cut).any()
    tiny = 0.02  # of Beta(1, 1): boxes too small to have pixels
    assert abs(int((blended | cut).sum()) - 1000 * p) <= 4.5 * math.sqrt(1000 * p * (1 - p)) + 1000 * tiny * p
    if all(alphas):
        assert_binomial(int(blended.sum()), 1000, p / 2)
    else:
        assert blended.any() == bool(alphas[0] and p)
        assert cut.any() == bool(alphas[1] and p)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_beta(alpha):
    _, shares, _ = draw_mixing(20000, (32, 32), alpha, 0, 1.0, (7,))
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)  # of Beta(alpha, alpha)
    _, _, boxes = draw_mixing(20000, (1000, 1000), 0, alpha, 1.0, (7,))
    inner = (boxes[:, 0] > 0) & (boxes[:, 1] > 0) & (boxes[:, :2] + boxes[:, 2:] < 1000).all(1)
    top, left, height, width = boxes[inner].T
    assert np.abs(height - width).max() <= 1, "unclipped boxes have the image's shape"
    assert len(top) == len(left) > 100


def test_boxes_follow_the_paper():
    """Yun et al., 2019, eq. 2: centre uniform, sides sqrt(1 - lambda) of the image's, clipped."""
    generator = np.random.default_rng((9,))
    _, _, boxes = draw_mixing(500, (40, 60), 0, 1.0, 1.0, (9,))
    generator.permutation(500), generator.random(500), generator.random(500), generator.beta(1, 1, 500)
    side = np.sqrt(1 - generator.beta(1.0, 1.0, 500))
    y, x = generator.integers(40, size=500), generator.integers(60, size=500)
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        tall, wide = int(40 * side[i]), int(60 * side[i])
        rows = [r for r in range(y[i] - tall // 2, y[i] - tall // 2 + tall) if 0 <= r < 40]
        columns = [c for c in range(x[i] - wide // 2, x[i] - wide // 2 + wide) if 0 <= c < 60]
        assert (height, width) == (len(rows), len(columns))
        if rows and columns:
            assert (top, left) == (rows[0], columns[0])


def test_partners_are_a_permutation():
    partners, _, _ = draw_mixing(100, (8, 8), 1.0, 0, 1.0, (3,))
    assert sorted(partners) == list(range(100))
    assert (partners != np.arange(100)).mean() > 0.9


def test_a_batch_of_one_is_its_own_partner():
    augmentation = Augmentation(MEAN, STD, mixup_alpha=1.0, num_labels=3)
    images, targets = augmentation.with_labels(noise(1), torch.tensor([2]), 0, 0)
    torch.testing.assert_close(images, normalize(noise(1), MEAN, STD))
    torch.testing.assert_close(targets, torch.tensor([[0.0, 0.0, 1.0]]))


# The whole


def test_nothing_but_normalisation_by_default():
    images, labels = noise(8), torch.arange(8)
    same, same_labels = Augmentation(MEAN, STD).with_labels(images, labels, 3, 0)
    assert torch.equal(same, normalize(images, MEAN, STD))
    assert same_labels is labels


@pytest.mark.parametrize(
    "used", [("crop", "flip"), ("rand_augment",), ("erasing",), ("mixup", "cutmix"), AUGMENTATIONS]
)
def test_a_function_of_seed_step_and_rank_only(used):
    images, labels = noise(64), torch.arange(64) % 10
    off = dict.fromkeys(set(AUGMENTATIONS) - set(used), 0.0)
    fields = EVERYTHING | {"erasing": 1.0}

    def run(seed=0, step=5, rank=1):
        return Augmentation(MEAN, STD, seed=seed, until=off, **fields).with_labels(images, labels, step, rank)

    first, targets = run()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    again, targets_again = run()
    assert torch.equal(first, again)
    assert torch.equal(targets, targets_again)
    for other in (run(seed=1), run(step=6), run(rank=0), run(step=1, rank=5)):
        same = (other[0] == first).flatten(1).all(1)
        assert same.float().mean() < 0.1, "each of seed, step and rank changes nearly every image"


def test_each_draw_has_a_stream_of_its_own(monkeypatch):
    keys = []
    for name in ("draw_rand_augment", "draw_erasing", "random_erasing", "draw_mixing"):
        function = getattr(augmentation_module, name)
        monkeypatch.setattr(augmentation_module, name, lambda *a, f=function: keys.append(a[-1]) or f(*a))
    Augmentation(MEAN, STD, seed=7, **EVERYTHING).with_labels(noise(4), torch.arange(4), 5, 3)
    assert len(keys) == len(set(keys)) == 4
    assert all(key[:3] == (7, 5, 3) for key in keys)


def test_global_randomness_is_neither_read_nor_moved():
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    Augmentation(MEAN, STD, **EVERYTHING).with_labels(noise(16), torch.arange(16) % 10, 0, 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (str(np.random.get_state()), random.getstate()) == before[1:]


def test_on_another_device_all_stays_there_and_nothing_is_asked_back():
    """A meta tensor has a device, refuses others beside it, and cannot be read: a GPU need not be waited for."""
    images = DecodedImages(noise(16), torch.arange(16) % 10).to(torch.device("meta"))
    batch = images.__getitems__([3, 1, 2, 5, 8, 13])
    for step in range(8):
        augmentation = Augmentation(MEAN, STD, crop_mode="reflect", **EVERYTHING)
        images, labels = augmentation.with_labels(batch["pixel_values"], batch["labels"], step, 0)
        assert (images.device.type, images.shape, images.dtype) == ("meta", (6, 3, 32, 32), torch.float32)
        assert (labels.device.type, labels.shape) == ("meta", (6, 10))


def test_inputs_stay_as_they_are():
    images, labels = photos(20), torch.arange(20) % 10
    before = images.clone()
    Augmentation(MEAN, STD, **EVERYTHING).with_labels(images, labels, 0, 0)
    assert torch.equal(images, before)
    assert torch.equal(labels, torch.arange(20) % 10)


@pytest.mark.parametrize("name", ["rand_augment", "erasing", "mixup", "cutmix"])
def test_switching_one_off_leaves_the_others_draws(name):
    """Streams of randomness are apart: an ablation changes what it says, and nothing else."""
    images, labels = photos(64), torch.arange(64) % 10
    fields = {key: value for key, value in EVERYTHING.items() if key not in ("mixup_alpha", "cutmix_alpha")}
    fields |= {"mixup_alpha": 0.4} if name != "cutmix" else {"cutmix_alpha": 1.0}
    fields["erasing"] = 0.3
    on = Augmentation(MEAN, STD, **fields).with_labels(images, labels, 0, 0)
    off = Augmentation(MEAN, STD, **fields, until={name: 0.5}).with_labels(images, labels, 0, 0, progress=0.6)
    if name in ("rand_augment", "erasing"):
        assert torch.equal(on[1], off[1]), "labels are mixed as before"
    else:
        assert torch.equal(off[1], labels)
        assert torch.equal(off[0], Augmentation(MEAN, STD, **fields)(images, 0, 0)), "pixels but for the mixing"
    assert not torch.equal(on[0], off[0])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_stops_when_told(name):
    field = {
        "crop": {"crop_padding": 4},
        "flip": {"horizontal_flip": 1.0},
        "rand_augment": {"rand_augment_ops": 2},
        "erasing": {"erasing": 1.0},
        "mixup": {"mixup_alpha": 1.0, "num_labels": 10},
        "cutmix": {"cutmix_alpha": 1.0, "num_labels": 10},
    }[name]
    images, labels = photos(32), torch.arange(32) % 10
    plain = normalize(images, MEAN, STD)
    augmentation = Augmentation(MEAN, STD, **field, until={name: 0.8})
    for progress in (0.0, 0.5, 0.799):
        assert not torch.equal(augmentation.with_labels(images, labels, 0, 0, progress)[0], plain)
    for progress in (0.8, 0.9, 1.0):
        result, result_labels = augmentation.with_labels(images, labels, 0, 0, progress)
        assert torch.equal(result, plain)
        assert torch.equal(result_labels, labels)
    always = Augmentation(MEAN, STD, **field)
    assert not torch.equal(always.with_labels(images, labels, 0, 0, 1.0)[0], plain)
    never = Augmentation(MEAN, STD, **field, until={name: 0.0})
    assert torch.equal(never.with_labels(images, labels, 0, 0, 0.0)[0], plain)


def test_cutmix_goes_on_alone_after_mixup():
    augmentation = Augmentation(MEAN, STD, mixup_alpha=1.0, cutmix_alpha=1.0, num_labels=10, until={"mixup": 0.5})
    images, labels = noise(200), torch.arange(200) % 10
    mixed, _ = augmentation.with_labels(images, labels, 0, 0, 0.6)
    known = normalize(images, MEAN, STD).flatten()
    assert torch.isin(mixed.flatten(), known).all(), "no pixel is a blend"


def test_parse_until():
    assert parse_until(None) == parse_until("") == {}
    assert parse_until("0.9") == parse_until(0.9) == dict.fromkeys(AUGMENTATIONS, 0.9)
    assert parse_until("mixup=0.8, rand_augment=1") == {"mixup": 0.8, "rand_augment": 1.0}
    assert parse_until("0.9,mixup=0.5") == dict.fromkeys(AUGMENTATIONS, 0.9) | {"mixup": 0.5}
    for text in ("mixup", "mixup=", "mixup=soon", "mixup:0.8"):
        with pytest.raises(ValueError, match=r"mixup=0\.9"):
            parse_until(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop_padding": -1}, r"crop_padding \(-1\)"),
        ({"crop_mode": "wrap"}, "crop_mode .'wrap'."),
        ({"horizontal_flip": 1.5}, r"horizontal_flip \(1.5\)"),
        ({"horizontal_flip": float("nan")}, "horizontal_flip"),
        ({"erasing": -0.1}, r"erasing \(-0.1\)"),
        ({"mix_probability": 2}, r"mix_probability \(2\)"),
        ({"rand_augment_ops": -1}, r"rand_augment_ops \(-1\)"),
        ({"rand_augment_ops": 1, "rand_augment_magnitude": 30}, r"rand_augment_magnitude \(30\) .*\[0, 10\]"),
        ({"mean": [0.5] * 4, "std": [0.5] * 4, "rand_augment_ops": 1}, "not 4 channels"),
        ({"mixup_alpha": -1}, r"mixup_alpha \(-1\)"),
        ({"cutmix_alpha": float("inf"), "num_labels": 3}, "cutmix_alpha"),
        ({"mixup_alpha": 1}, "num_labels"),
        ({"until": {"mixups": 0.5}}, "'mixups' is none of crop, flip"),
        ({"until": {"mixup": 1.5}}, r"mixup \(1.5\)"),
    ],
)
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**{"mean": MEAN, "std": STD, **fields})


def test_any_floating_type_is_mixed():
    """Autocast hands over float32; a caller may mix in half precision."""
    images = torch.randn(8, 3, 8, 8).bfloat16()
    mixed, targets = mix(images, torch.arange(8), 8, *draw_mixing(8, (8, 8), 1.0, 1.0, 1.0, (0,)))
    assert mixed.dtype == torch.bfloat16
    assert targets.dtype == torch.float32
