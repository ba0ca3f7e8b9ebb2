"""doctor.py: duplicates and leaks are found and nothing else is; the fingerprint changes when it should."""

import io
import json
import random

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from runs import CIFAR10_COPY
from transformers import ViTImageProcessorPil

from modeling_vit_scratch.data import Augmentation, inspect_splits, load_splits
from modeling_vit_scratch.data import doctor as inspection
from modeling_vit_scratch.data import splits as splits_module
from modeling_vit_scratch.data.doctor import fingerprint, near_pairs, perceptual_hash, sample_images, sample_sheet

PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32}, resample=Image.Resampling.BICUBIC)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """What `datasets` prepares goes to a temporary folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def photo(seed: int, size: int = 64) -> Image.Image:
    """Something with large shapes and fine detail, as photos have."""
    generator = np.random.default_rng(seed)
    pixels = np.zeros((size, size, 3))
    for cells, weight in ((3, 110), (8, 60), (24, 40)):
        layer = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += weight / 255 * np.asarray(layer.resize((size, size), Image.Resampling.BICUBIC), dtype=float)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, file_format: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def table(images: list, labels: list[int] | None = None, names=("cat", "dog")) -> datasets.Dataset:
    labels = [i % len(names) for i in range(len(images))] if labels is None else labels
    encoded = [image if isinstance(image, bytes) else encode(image) for image in images]
    columns = {"image": [{"bytes": content, "path": None} for content in encoded], "label": labels}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    return datasets.Dataset.from_dict(columns, features=features)


def split(train, test=None, validation=None, **options) -> splits_module.ImageSplits:
    parts = {"train": train, "validation": validation or table([photo(9000 + i) for i in range(4)]), "test": test}
    raw = datasets.DatasetDict({name: part for name, part in parts.items() if part is not None})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits_module, "load_raw", lambda *args, **kwargs: raw)
        return load_splits("some images", PROCESSOR, **options)


def found(report, name: str) -> inspection.Overlap:
    return next(overlap for overlap in report.overlaps if overlap.split == name)


# Duplicates


def test_a_clean_dataset_has_no_complaints():
    report = inspect_splits(split(table([photo(i) for i in range(60)]), table([photo(500 + i) for i in range(30)])))
    assert report.warnings == []
    assert [(o.split, o.exact, o.near) for o in report.overlaps] == [
        ("train", 0, 0), ("validation", 0, 0), ("test", 0, 0),
    ]  # fmt: skip
    assert report.counts["test"] == {"cat": 15, "dog": 15}
    assert report.inspected == {"train": 60, "validation": 4, "test": 30}
    assert "No complaints" in str(report)
    assert "60 images, 30 of each class" in str(report)


@pytest.mark.parametrize("lazy", [False, True])
def test_exact_duplicates(lazy, monkeypatch):
    if lazy:
        monkeypatch.setattr(splits_module, "MAX_DECODED_BYTES", 0)
    train = [photo(i) for i in range(40)] + [photo(3), photo(3), photo(4)]
    test = [photo(700 + i) for i in range(10)] + [photo(5), photo(6), photo(6)]
    labels = [i % 2 for i in range(40)] + [1, 0, 0]
    report = inspect_splits(split(table(train, labels), table(test), table([photo(800), photo(7)]), crop_scale=0.3))
    assert (found(report, "train").exact, found(report, "train").near) == (3, 0)
    assert found(report, "train").contradictory == 1, "row 41 is a dog, row 3 a cat... or the other way"
    assert found(report, "train").examples[0] == ("row 40 of split 'train'", "row 3 of split 'train'", "exact")
    assert (found(report, "test").exact, found(report, "test").near) == (3, 0)
    assert found(report, "test").examples[0] == ("row 10 of split 'test'", "row 5 of split 'train'", "exact")
    assert found(report, "validation").exact == 1
    text = str(report)
    assert "3 test images are in train too" in text
    assert "1 validation images are in train too" in text
    assert "1 images of train carry another label than the same image in train" in text


CHANGES = {
    "JPEG": lambda image: Image.open(io.BytesIO(encode(image, "jpeg", quality=60))),
    "half size": lambda image: image.resize((32, 32), Image.Resampling.LANCZOS),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.7),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.6),
    "grey": lambda image: image.convert("L"),
    "noise": lambda image: Image.fromarray(
        (np.asarray(image) + np.random.default_rng(0).normal(0, 8, (64, 64, 3))).clip(0, 255).astype(np.uint8)
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_near_duplicates(name):
    """Of 40 test images, 8 are changed training images: found, and no other."""
    train = [photo(i) for i in range(60)]
    test = [CHANGES[name](photo(i)) for i in range(8)] + [photo(300 + i) for i in range(32)]
    report = inspect_splits(split(table(train), table(test)))
    assert (found(report, "test").exact, found(report, "test").near) == (0, 8)
    assert found(report, "test").examples[:2] == [
        ("row 0 of split 'test'", "row 0 of split 'train'", "near"),
        ("row 1 of split 'test'", "row 1 of split 'train'", "near"),
    ]
    assert found(report, "train").near == found(report, "validation").near == 0


def test_pairs_against_all_pairs():
    """Whatever the chunks: each pair once, the later image first."""
    images = [photo(i % 70).resize((16, 16)) for i in range(200)]
    thumbnails = torch.stack([torch.from_numpy(np.array(image.convert("L"))) for image in images])
    pairs = near_pairs(thumbnails)
    assert sorted(map(tuple, pairs.tolist())) == [(i, j) for i in range(200) for j in range(i) if (i - j) % 70 == 0]
    across = near_pairs(thumbnails[:100], thumbnails[100:])
    expected = [(i, j) for i in range(100) for j in range(100) if (100 + j - i) % 70 == 0]
    assert sorted(map(tuple, across.tolist())) == expected
    assert near_pairs(thumbnails[:0], thumbnails).shape == (0, 2)


def scene(down: float, seed: int) -> torch.Tensor:
    """16 x 16: brighter to the right, so that all hashes agree; brighter or darker downwards; with details."""
    pixels = torch.linspace(60, 195, 16) + down * torch.linspace(-1, 1, 16)[:, None]
    detail = torch.rand(16, 16, generator=torch.Generator().manual_seed(seed)) * 40 - 20
    return (pixels + detail).clamp(0, 255).round().byte()


def test_the_hash_alone_proves_nothing():
    """The same hash: one image; other details in the same scene; the same details in another scene."""
    one, noisy, detail, layout = scene(45, 1), scene(43, 1), scene(45, 2), scene(-45, 1)
    thumbnails = torch.stack([one, noisy, detail, layout])
    bits = perceptual_hash(thumbnails)
    assert np.bitwise_count(bits ^ bits[0]).max() <= inspection.HASH_DISTANCE
    assert near_pairs(thumbnails).tolist() == [[1, 0]]


def test_exact_and_near_duplicates_are_told_apart():
    """An exact copy counts once, and rows are those of the dataset whatever was left out before them."""
    train = [photo(i) for i in range(20)] + [photo(2), CHANGES["darker"](photo(2))]
    test = [photo(5), photo(6), CHANGES["JPEG"](photo(7)), photo(300), CHANGES["darker"](photo(8))]
    report = inspect_splits(split(table(train), table(test)))
    assert [(place, twin, kind) for place, twin, kind in found(report, "train").examples] == [
        ("row 20 of split 'train'", "row 2 of split 'train'", "exact"),
        ("row 21 of split 'train'", "row 2 of split 'train'", "near"),
    ]
    assert [(place[4], twin[4], kind) for place, twin, kind in found(report, "test").examples] == [
        ("0", "5", "exact"), ("1", "6", "exact"), ("2", "7", "near"), ("4", "8", "near"),
    ]  # fmt: skip


def test_the_hash_is_that_of_the_definition():
    thumbnails = torch.randint(256, (5, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for thumbnail, value in zip(thumbnails.double(), perceptual_hash(thumbnails), strict=True):
        cells = torch.nn.functional.adaptive_avg_pool2d(thumbnail[None], (8, 9))[0]
        bits = "".join("1" if cells[i, j + 1] > cells[i, j] else "0" for i in range(8) for j in range(8))
        assert int(value).to_bytes(8, "little") == int(bits, 2).to_bytes(8, "big")


def test_images_of_one_colour_are_no_near_duplicates():
    """They have no detail that could agree; only equal ones count, as exact."""
    flat = [Image.new("RGB", (32, 32), (i, i, i)) for i in range(50)]
    report = inspect_splits(split(table(flat), table([Image.new("RGB", (32, 32), (7, 7, 7))])))
    assert (found(report, "train").exact, found(report, "train").near) == (0, 0)
    assert (found(report, "test").exact, found(report, "test").near) == (1, 0)


def test_images_alike_by_nature():
    """Of digits nearly each resembles another: said once, and no leak is cried."""
    report = inspect_splits(load_splits("digits", PROCESSOR))
    assert found(report, "train").near > 500
    assert found(report, "test").exact == 0
    assert len(report.warnings) == 1
    assert "alike by nature" in report.warnings[0]


def test_large_datasets_are_sampled_and_that_is_said(monkeypatch):
    monkeypatch.setitem(inspection.MAX_INSPECTED, "train", 20)
    report = inspect_splits(split(table([photo(i) for i in range(50)]), table([photo(300)])))
    assert report.inspected["train"] == 20
    assert sum(report.counts["train"].values()) == 50, "labels are counted in full"
    assert "Of train, only 20 of 50 images were compared." in report.warnings


# Classes


def test_imbalance_and_missing_classes():
    labels = [0] * 50 + [1] * 5 + [2] * 20
    train = table([photo(i) for i in range(75)], labels, ("cat", "dog", "eel"))
    validation = table([photo(700), photo(701), photo(702)], [0, 1, 2], ("cat", "dog", "eel"))
    test = table([photo(800), photo(801)], [0, 2], ("cat", "dog", "eel"))
    report = inspect_splits(split(train, test, validation))
    assert any("50 training images of cat, 5 of dog" in warning for warning in report.warnings)
    assert "test has no images of 1 of 3 classes: dog." in report.warnings
    assert "5 (dog) to 50 (cat) of a class" in str(report)
    balanced = inspect_splits(split(table([photo(i) for i in range(8)], [0, 0, 0, 0, 0, 0, 1, 1])))
    assert balanced.warnings == [], "3 to 1 is still in order"


def test_the_report_is_json():
    report = inspect_splits(split(table([photo(i) for i in range(6)] + [photo(0)]), table([photo(0)])))
    content = json.loads(json.dumps(report.to_dict()))
    assert content["fingerprint"] == report.fingerprint
    assert content["overlaps"][2] == {
        "split": "test", "exact": 1, "near": 0, "contradictory": 0,
        "examples": [["row 0 of split 'test'", "row 0 of split 'train'", "exact"]],
    }  # fmt: skip


# Fingerprint


def test_the_fingerprint_is_of_files_not_of_places(tmp_path):
    """The same images as a table and as a folder, in two places."""
    names = ("cat", "dog")
    images = [encode(photo(i)) for i in range(12)]
    for place in ("a", "b"):
        for i, content in enumerate(images):
            path = tmp_path / place / names[i // 6] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    table(images, [0] * 6 + [1] * 6).to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    prints = {
        fingerprint(load_splits(str(tmp_path / place), PROCESSOR, train_val_split=0.5)) for place in ("a", "b", "hub")
    }
    assert len(prints) == 1
    assert len(prints.pop()) == 32


def test_the_fingerprint_changes_with_the_data():
    images, test = [photo(i) for i in range(12)], table([photo(50)])
    other_pixel = photo(3)
    other_pixel.putpixel((5, 5), (1, 2, 3))
    variants = {
        "same": split(table(images), test),
        "a pixel": split(table([other_pixel if i == 3 else p for i, p in enumerate(images)]), test),
        "a label": split(table(images, [0, 1] * 5 + [1, 1]), test),
        "a class name": split(table(images, names=("cat", "Dog")), table([photo(50)], names=("cat", "Dog")),
                              table([photo(9000 + i) for i in range(4)], names=("cat", "Dog"))),
        "order": split(table(images[2:] + images[:2]), test),
        "one less": split(table(images[:11]), test),
        "no test": split(table(images)),
        "fewer samples": split(table(images), test, max_train_samples=8),
        "other samples": split(table(images), test, max_train_samples=8, seed=1),
    }  # fmt: skip
    prints = {name: fingerprint(splits) for name, splits in variants.items()}
    assert len(set(prints.values())) == len(prints)
    assert fingerprint(split(table(images), test)) == prints["same"]


def test_the_fingerprint_depends_on_the_validation_cut():
    raw = datasets.DatasetDict(train=table([photo(i) for i in range(20)]))
    prints = []
    for seed in (0, 0, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(splits_module, "load_raw", lambda *args, **kwargs: raw)
            prints.append(fingerprint(load_splits("x", PROCESSOR, train_val_split=0.5, seed=seed)))
    assert prints[0] == prints[1] != prints[2]


def test_the_fingerprint_does_not_depend_on_the_path_of_decoding(monkeypatch):
    train = table([photo(i) for i in range(12)])
    decoded = fingerprint(split(train))
    monkeypatch.setattr(splits_module, "MAX_DECODED_BYTES", 0)
    assert fingerprint(split(train)) == decoded


def test_the_fingerprint_samples_large_datasets(monkeypatch):
    monkeypatch.setattr(inspection, "MAX_FINGERPRINTED", 6)
    images = [photo(i) for i in range(12)]
    before = fingerprint(split(table(images)))
    sampled = inspection.evenly(12, 6)
    unseen = next(i for i in range(12) if i not in sampled)
    for position, same in ((unseen, True), (int(sampled[2]), False)):
        changed = [photo(99) if i == position else image for i, image in enumerate(images)]
        assert (fingerprint(split(table(changed))) == before) == same


def test_known_fingerprints():
    """Pinned: the same on every machine and in every run."""
    small = ViTImageProcessorPil(size={"height": 8, "width": 8})
    assert fingerprint(load_splits("digits", small, 1)) == "d6ac79bd66a2a0567057529cb31cfc41"


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10_COPY.exists(), reason=f"the JPEG copy of CIFAR-10 is not at {CIFAR10_COPY}")
def test_cifar10():
    splits = load_splits(str(CIFAR10_COPY), PROCESSOR)
    assert fingerprint(splits) == "ced7d8f60f6b2b8096352c68dc27aa1d"
    report = inspect_splits(splits)
    print(report)
    assert all(overlap.exact == 0 for overlap in report.overlaps)
    # Barz and Denzler (2020, "Do we train on test data?") judged 3.25 % of test to have near duplicates in train, by
    # eye and with crops and shifts that this does not look for.
    assert 150 < found(report, "test").near < 325


# Samples


def test_samples_are_what_the_model_sees():
    splits = split(table([photo(i) for i in range(40)]))
    plain = Augmentation(splits.mean, splits.std)
    pixels, texts = sample_images(splits, plain, 10)
    rows = [round(i * 39 / 9) for i in range(10)]
    assert torch.equal(pixels, splits.train.images[rows])
    assert texts == [("cat", "dog")[row % 2] for row in rows]
    strong = Augmentation(splits.mean, splits.std, rand_augment_ops=2, erasing=1.0, horizontal_flip=0.5, seed=3)
    pixels, texts = sample_images(splits, strong, 40)
    expected = strong(splits.train.images, 0, 0)
    mean, std = torch.tensor(splits.mean).view(-1, 1, 1), torch.tensor(splits.std).view(-1, 1, 1)
    assert torch.equal(pixels, ((expected * std + mean) * 255).round().clamp(0, 255).byte())
    assert texts == ["cat", "dog"] * 20


def test_mixed_labels_are_spelt_out():
    splits = split(table([photo(i) for i in range(40)]))
    mixing = Augmentation(splits.mean, splits.std, mixup_alpha=1.0, num_labels=2)
    _, texts = sample_images(splits, mixing, 40)
    _, labels = mixing.with_labels(splits.train.images, splits.train.labels, 0, 0)
    for text, (cat, dog) in zip(texts, labels.tolist(), strict=True):
        if min(cat, dog) < 0.005:
            assert text in ("cat", "dog")
        else:
            high, low = ("cat", "dog") if cat > dog else ("dog", "cat")
            assert text == f"{max(cat, dog):.0%} {high} + {min(cat, dog):.0%} {low}"


@pytest.mark.parametrize(("count", "channels"), [(40, 3), (1, 3), (11, 1)])
def test_the_sheet_is_drawn(tmp_path, count, channels):
    if channels == 3:
        splits = split(table([photo(i) for i in range(40)]))
    else:
        splits = load_splits("digits", ViTImageProcessorPil(size={"height": 16, "width": 16}), 1)
    augmentation = Augmentation(splits.mean, splits.std, crop_padding=2)
    path = sample_sheet(splits, augmentation, tmp_path / "samples.png", count)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    drawn = (pixels < 255).any(-1)
    assert drawn.mean() > 0.4, "most of the sheet is images"
    rows, columns = -(-count // 8), min(count, 8)
    height, width = drawn.shape[0] // rows, drawn.shape[1] // columns
    cells = [drawn[i // 8 * height :][:height, i % 8 * width :][:, :width].mean() for i in range(rows * columns)]
    assert [cell > 0.3 for cell in cells] == [i < count for i in range(rows * columns)], "one image in each cell"


def test_global_randomness_is_neither_read_nor_moved(tmp_path):
    splits = split(table([photo(i) for i in range(40)]), table([photo(i) for i in range(50, 60)]))
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    inspect_splits(splits)
    sample_sheet(splits, Augmentation(splits.mean, splits.std, rand_augment_ops=1, erasing=0.5), tmp_path / "x.png")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (str(np.random.get_state()), random.getstate()) == before[1:]
