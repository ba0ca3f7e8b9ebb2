"""Bad and odd input, in tables: each is refused with an error that says what is wrong and where, or read correctly.

Odd pictures, bad pictures, labels, columns, splits, folders and paths go through the loader; recipes through
finetune.py's parser; configs and weights through the door that training, prediction and validation load models by.
"""

import importlib.util
import io
import json
import os
import pickle
import re
import shutil
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTImageProcessorPil

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.conversion import convert_checkpoint
from modeling_vit_scratch.data import load_splits
from modeling_vit_scratch.data.sources import load_image

FINETUNE = Path(__file__).parents[1] / "scripts" / "finetune.py"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """What `datasets` prepares goes to a temporary folder, and nothing is asked of the Hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def encode(image: Image.Image | np.ndarray, file_format: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def as_array(*rows) -> np.ndarray:
    return np.array(rows, dtype=np.uint8)


def png(width: int, height: int, depth: int, color: int, data: bytes) -> bytes:
    """A PNG file written by hand: for kinds that PIL does not write, and for sizes that nobody should decode."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


# Odd pictures that are read: encoded bytes, and the pixels that RGB or grey must have

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
CORNERS = as_array([RED, GREEN, BLUE], [WHITE, BLACK, (10, 20, 30)])  # (2, 3, RGB): no symmetry hides a mistake


def palette(transparent: int | None = None) -> bytes:
    image = Image.fromarray(as_array([0, 1]))
    image = image.convert("P")
    image.putpalette([*RED, *GREEN])
    return encode(image, "png", **({} if transparent is None else {"transparency": transparent}))


def animation(file_format: str) -> bytes:
    frames = [Image.new("RGB", (2, 1), color) for color in (RED, BLUE)]
    return encode(frames[0], file_format, save_all=True, append_images=frames[1:], duration=50, lossless=True)


def rotated(orientation: int) -> bytes:
    """CORNERS stored turned or mirrored, with the EXIF tag that says how to undo it."""
    stored = {
        1: CORNERS,
        2: CORNERS[:, ::-1],
        3: CORNERS[::-1, ::-1],
        4: CORNERS[::-1],
        5: CORNERS.transpose(1, 0, 2),
        6: np.rot90(CORNERS, 1),
        7: CORNERS[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(CORNERS, -1),
        99: CORNERS,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(np.ascontiguousarray(stored), "png", exif=exif)


def float_tiff(*values: float) -> bytes:
    return encode(np.array([values], dtype=np.float32), "tiff")


ODD_PICTURES = {
    "1 bit": (lambda: encode(Image.fromarray(as_array([0, 255])).convert("1")), [[BLACK, WHITE]]),
    "grey": (lambda: encode(as_array([0, 77])), [[BLACK, (77,) * 3]]),
    "grey and alpha": (
        lambda: encode(Image.fromarray(as_array([[60, 255], [60, 0], [60, 51]]), "LA")),
        [[(60,) * 3, WHITE, (216,) * 3]],
    ),
    "grey with a transparent value": (lambda: encode(as_array([0, 77]), transparency=77), [[BLACK, WHITE]]),
    "RGB with a transparent colour": (lambda: encode(as_array([RED, GREEN]), transparency=RED), [[WHITE, GREEN]]),
    "RGB and alpha": (
        lambda: encode(as_array([[*RED, 255], [*RED, 0], [*RED, 51]])),
        [[RED, WHITE, (255, 204, 204)]],
    ),
    "palette": (palette, [[RED, GREEN]]),
    "palette with transparency": (lambda: palette(transparent=0), [[WHITE, GREEN]]),
    "CMYK": (
        lambda: encode(Image.fromarray(as_array([[0, 255, 255, 0], [255, 0, 255, 0], [0, 0, 0, 255]]), "CMYK"), "tiff"),
        [[RED, GREEN, BLACK]],
    ),
    "YCbCr": (  # compressed: Pillow 12 cannot read the plain one that it writes
        lambda: encode(Image.new("YCbCr", (1, 1), (128, 128, 128)), "tiff", compression="tiff_lzw"),
        [[(128,) * 3]],
    ),
    "16 bit grey PNG": (
        lambda: encode(np.array([[0, 32768, 65535]], np.uint16)),
        [[BLACK, (128,) * 3, WHITE]],
    ),
    "16 bit grey TIFF, big-endian": (
        lambda: encode(Image.frombytes("I;16B", (2, 1), b"\x00\x00\xff\xff"), "tiff"),
        [[BLACK, WHITE]],
    ),
    "16 bit RGB PNG": (
        lambda: png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 65535, 32896, 0)),
        [[(255, 128, 0)]],
    ),
    "32 bit integers of 16 bit": (lambda: encode(np.array([[0, 65535]], np.int32), "tiff"), [[BLACK, WHITE]]),
    "floats in [0, 1]": (lambda: float_tiff(0, 0.5, 1), [[BLACK, (128,) * 3, WHITE]]),
    "floats in [0, 255]": (lambda: float_tiff(0, 100, 255), [[BLACK, (100,) * 3, WHITE]]),
    **{f"EXIF orientation {n}": (lambda n=n: rotated(n), CORNERS) for n in (1, 2, 3, 4, 5, 6, 7, 8)},
    "EXIF orientation that does not exist": (lambda: rotated(99), CORNERS),
    "EXIF that is damaged": (lambda: encode(CORNERS, exif=b"Exif\0\0nonsense"), CORNERS),
    "animated GIF": (lambda: animation("gif"), [[RED, RED]]),
    "animated PNG": (lambda: animation("png"), [[RED, RED]]),
    "animated WebP": (lambda: animation("webp"), [[RED, RED]]),
    "BMP": (lambda: encode(CORNERS, "bmp"), CORNERS),
    "lossless WebP": (lambda: encode(CORNERS, "webp", lossless=True), CORNERS),
    "PPM": (lambda: encode(CORNERS, "ppm"), CORNERS),
    "1 x 1": (lambda: encode(as_array([RED])), [[RED]]),
    "1 x 5000": (lambda: encode(np.full((5000, 1, 3), 9, np.uint8)), np.full((5000, 1, 3), 9)),
    "5000 x 1": (lambda: encode(np.full((1, 5000, 3), 9, np.uint8)), np.full((1, 5000, 3), 9)),
}


@pytest.mark.parametrize("name", ODD_PICTURES)
def test_odd_pictures_are_read(name, tmp_path):
    make, expected = ODD_PICTURES[name]
    encoded, expected = make(), np.array(expected, dtype=np.uint8)
    image = load_image(encoded)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), expected)
    grey = load_image(encoded, 1)
    assert grey.mode == "L"
    luminance = expected @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(np.asarray(grey), luminance, atol=1.01)
    path = tmp_path / "named wrongly.jpg"  # the content decides
    path.write_bytes(encoded)
    assert np.array_equal(load_image(path), image)
    with Image.open(path) as opened:
        assert np.array_equal(load_image(opened), image)


def test_lab():
    """PIL converts it by LittleCMS, which rounds as it likes: L* of 20 is a grey of 48."""
    encoded = encode(Image.new("LAB", (1, 1), (51, 128, 128)), "tiff")
    np.testing.assert_allclose(np.asarray(load_image(encoded)), 48, atol=2)
    np.testing.assert_allclose(np.asarray(load_image(encoded, 1)), 48, atol=2)


@pytest.mark.parametrize("name", ["1 x 1", "1 x 5000", "5000 x 1", "animated GIF", "1 bit", "CMYK"])
def test_odd_pictures_become_samples(name, tmp_path):
    """At the model's size, beside ordinary ones."""
    folder = picture_folder(tmp_path, ODD_PICTURES[name][0](), "odd.png")
    splits = load_splits(str(folder), PROCESSOR, train_val_split=0.5)
    pixels = [part[i]["pixel_values"] for part in (splits.train, splits.validation) for i in range(len(part))]
    assert {tuple(image.shape) for image in pixels} == {(3, 8, 8)}


# Pictures that are refused, by name

PROCESSOR = ViTImageProcessorPil(size={"height": 8, "width": 8})
PHOTO = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)

BAD_PICTURES = {
    "truncated JPEG": (lambda: encode(PHOTO, "jpeg")[:-300], "[Tt]runcated"),
    "truncated PNG": (lambda: encode(PHOTO)[:2000], "unreadable image"),
    "truncated header": (lambda: encode(PHOTO)[:20], "unreadable image"),
    "text": (lambda: b"This is no picture.", "UnidentifiedImageError"),
    "web page": (lambda: b"<!DOCTYPE html><html><body>404</body></html>", "UnidentifiedImageError"),
    "empty file": (lambda: b"", "UnidentifiedImageError"),
    "zeros": (lambda: bytes(5000), "UnidentifiedImageError"),
    "decompression bomb that PIL warns of": (
        lambda: png(10_000, 10_000, 1, 0, b""),
        r"10000 x 10000 pixels are more than the 89,478,485 .*MAX_IMAGE_PIXELS",
    ),
    "decompression bomb that PIL refuses": (lambda: png(50_000, 50_000, 1, 0, b""), "decompression bomb"),
    "NaN pixels": (lambda: float_tiff(0, float("nan"), 1), "NaN or infinite pixels"),
    "infinite pixels": (lambda: float_tiff(0, float("inf"), 1), "NaN or infinite pixels"),
    "floats of an unknown range": (lambda: float_tiff(-3, 0, 700), r"\[-3, 700\]; only \[0, 1\] and \[0, 255\]"),
    "integers of an unknown range": (
        lambda: encode(np.array([[0, 1_000_000]], np.int32), "tiff"),
        r"\[0, 1e\+06\]; only 16 bits",
    ),
    "pickle": (lambda: pickle.dumps({"a": 1}), "UnidentifiedImageError"),
}


def picture_folder(folder: Path, encoded: bytes, name: str = "bad picture.jpg") -> Path:
    for label in ("cat", "dog"):
        (folder / "data" / label).mkdir(parents=True)
        for i in range(3):
            (folder / "data" / label / f"{i}.png").write_bytes(encode(PHOTO[i : i + 20, i : i + 20]))
    (folder / "data" / "dog" / name).write_bytes(encoded)
    return folder / "data"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures_are_refused_by_name(name, tmp_path):
    make, message = BAD_PICTURES[name]
    folder = picture_folder(tmp_path, make())
    with pytest.raises(ValueError, match=message) as caught:
        load_splits(str(folder), PROCESSOR, train_val_split=0.5)
    assert "dog/bad picture.jpg" in str(caught.value), "the file is named"
    assert "row 6 of split 'train'" in str(caught.value)
    assert str(caught.value).endswith("repair or remove it.")


@pytest.mark.parametrize(("count", "more"), [(2, ""), (10, ""), (13, "\n  and 3 more")])
def test_all_bad_images_of_a_folder_are_named_at_once(count, more, tmp_path):
    """Of train, of what is cut from it, and of test; in the order of the splits, up to ten by name."""
    for split, good in (("train", 8), ("test", 300)):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(good):
                (tmp_path / split / label / f"{i:03}.png").write_bytes(encode(PHOTO[i % 9 : i % 9 + 20, :20]))
    files = [*sorted((tmp_path / "train").rglob("*.png"))[1:16:3], *sorted((tmp_path / "test").rglob("*.png"))[3::67]]
    for path in files[:count]:
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=f"^{count} images cannot be used; repair or remove them:\n  row ") as caught:
        load_splits(str(tmp_path), PROCESSOR, train_val_split=0.5)
    text = str(caught.value)
    named = [path for path in files if str(path) in text]
    assert len(named) == min(count, 10) == text.count("unreadable image") and text.endswith(more or ")")
    assert set(named) <= set(files[:count])


def test_bad_images_are_named_though_all_are_bad():
    with pytest.raises(ValueError, match=r"^12 images cannot be used"):
        load(make_table([b"nothing"] * 12))


def test_bad_images_in_several_places_of_a_table_are_named():
    rows = [encode(PHOTO[:8, :8])] * 600
    rows[0] = rows[300] = b"no image"
    rows[599] = None
    with pytest.raises(ValueError, match=r"^3 images cannot be used") as caught:
        load(make_table(), test=make_table(rows))
    for row in (0, 300, 599):
        assert f"row {row} of split 'test'" in str(caught.value)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_bad_picture_in_a_table_is_refused_by_row(lazy, monkeypatch):
    if lazy:
        monkeypatch.setattr("modeling_vit_scratch.data.splits.MAX_DECODED_BYTES", 0)
    rows = [encode(PHOTO[:8, :8])] * 11 + [b"no picture"] + [encode(PHOTO[:8, :8])] * 8
    with pytest.raises(ValueError, match=r"row 11 of split 'test': unreadable image .* repair or remove it\."):
        splits = load(make_table(n=12), test=make_table(rows))
        for i in range(len(splits.test)):
            splits.test[i]


def test_a_missing_file_is_refused_by_name(tmp_path, monkeypatch):
    """Deleted between listing and reading."""
    folder = picture_folder(tmp_path, encode(PHOTO))
    listed = datasets.Dataset.from_dict

    def from_dict(*args, **kwargs):
        (folder / "cat" / "1.png").unlink(missing_ok=True)
        return listed(*args, **kwargs)

    monkeypatch.setattr(datasets.Dataset, "from_dict", from_dict)
    with pytest.raises(ValueError, match=r"cat/1\.png.*No such file"):
        load_splits(str(folder), PROCESSOR, train_val_split=0.5)


# Tables: labels, columns, splits


def make_table(images=None, labels=None, n=12, names=("cat", "dog"), feature=None):
    """A split of n tiny pictures whose classes alternate."""
    images = [encode(PHOTO[:8, :8])] * (n if labels is None else len(labels)) if images is None else images
    labels = [i % len(names) for i in range(len(images))] if labels is None else labels
    feature = feature or datasets.ClassLabel(names=list(names))
    columns = {
        "image": [None if image is None else {"bytes": image, "path": None} for image in images],
        "label": labels,
    }
    features = {"image": datasets.Image(), "label": feature}
    table = datasets.Dataset.from_dict({name: columns[name] for name in features}, features=datasets.Features(features))
    return table


def load(train, options=None, **splits):
    """The splits' DatasetDict through `load_splits`, as if it had been loaded from somewhere."""
    raw = datasets.DatasetDict({"train": train, **splits} if train is not None else splits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeling_vit_scratch.data.splits.load_raw", lambda *args, **kwargs: raw)
        return load_splits("a table", PROCESSOR, **{"train_val_split": 0.25, **(options or {})})


def plain(kind: str) -> datasets.Value:
    return datasets.Value(kind)


BAD_TABLES = {
    # labels
    "label missing, class labels": (
        lambda: load(make_table(labels=[0, 1, None, 1])),
        "row 2 of split 'train' has no label; label or remove it",
    ),
    "label missing, numbers": (
        lambda: load(make_table(labels=[3, None, 4], feature=plain("int64"))),
        "row 1 of split 'train' has no label",
    ),
    "label missing, names": (
        lambda: load(make_table(labels=["a", "b", None], feature=plain("string"))),
        "row 2 of split 'train' has no label",
    ),
    "label missing first in test": (
        lambda: load(
            make_table(labels=["a", "b"] * 6, feature=plain("string")),
            test=make_table(labels=[None, "a"], feature=plain("string")),
        ),
        "row 0 of split 'test' has no label",
    ),
    "label negative, class labels": (
        lambda: load(make_table(), test=make_table(labels=[0, -1, 1])),
        "row 1 of split 'test': label -1 is none of train's 2 classes .cat, dog.",
    ),
    "label negative, numbers": (
        lambda: load(make_table(labels=[0, 1, -1, 0], feature=plain("int64"))),
        "row 2 of split 'train': label -1 is negative, which usually means that it is not known",
    ),
    "label too large": (
        lambda: load(
            make_table(labels=[0, 1] * 6, feature=plain("int32")),
            test=make_table(labels=[0, 1, 2], feature=plain("int32")),
        ),
        "row 2 of split 'test': label '2' is none of train's 2 classes",
    ),
    "label a float": (
        lambda: load(make_table(labels=[0.0, 1.5] * 6, feature=plain("float32"))),
        "column 'label' of split 'train' holds .*float32.*, e.g. 0.0; labels are whole numbers or names",
    ),
    "label NaN": (
        lambda: load(make_table(labels=[float("nan"), 1.0] * 6, feature=plain("float32"))),
        "holds .*float32.*, e.g. nan",
    ),
    "label a truth value": (
        lambda: load(make_table(labels=[True, False] * 6, feature=plain("bool"))),
        "holds .*bool.*, e.g. True; labels are whole numbers or names",
    ),
    "label a list": (
        lambda: load(make_table(labels=[[0], [1]] * 6, feature=datasets.List(plain("int64")))),
        "holds List.*, e.g. .0.; labels are whole numbers or names",
    ),
    "label of another type in test": (
        lambda: load(
            make_table(labels=["a", "b"] * 6, feature=plain("string")),
            test=make_table(labels=[0, 1], feature=plain("int64")),
        ),
        "row 0 of split 'test': label '0' is none of train's 2 classes .a, b.",
    ),
    "label unknown in test": (
        lambda: load(
            make_table(labels=["a", "b"] * 6, feature=plain("string")),
            test=make_table(labels=["a", "A"], feature=plain("string")),
        ),
        "row 1 of split 'test': label 'A' is none of train's 2 classes",
    ),
    "one class only": (
        lambda: load(make_table(labels=[0] * 6, names=["cat"])),
        "there is only one class .'cat'.; classification needs at least two",
    ),
    "one value only": (lambda: load(make_table(labels=["x"] * 6, feature=plain("string"))), "only one class .'x'."),
    "class without images": (
        lambda: load(make_table(labels=[0, 2] * 6, names=["cat", "dog", "eel"])),
        "class 'dog' has no images in split 'train'; add some, or remove it",
    ),
    "class of one image": (
        lambda: load(make_table(labels=[0] * 11 + [1])),
        "0.25 of 12 training images cannot be cut off with every class on both sides .*--train_val_split",
    ),
    # columns
    "no image column": (
        lambda: (
            load(make_table().rename_column("image", "x").cast_column("x", datasets.Value("string")))
            if False
            else load(make_table().remove_columns("image").add_column("text", ["a"] * 12))
        ),
        "no image column was found among label, text; name it with --image_column_name",
    ),
    "no label column": (
        lambda: load(make_table().remove_columns("label").add_column("text", ["a"] * 12)),
        "no label column was found among image, text; name it with --label_column_name",
    ),
    "image column misspelt": (
        lambda: load(make_table(), {"image_column": "imgae"}),
        "there is no column 'imgae'; the dataset has image, label: did you mean 'image'",
    ),
    "label column misspelt": (
        lambda: load(make_table(), {"label_column": "lable"}),
        "there is no column 'lable'; the dataset has image, label: did you mean 'label'",
    ),
    "image column of text": (
        lambda: load(make_table().add_column("img", ["a.png"] * 12), {"image_column": "img"}),
        "column 'img' does not hold images but Value.*cast it to Image",
    ),
    "image column of numbers": (
        lambda: load(make_table().remove_columns("image").add_column("pixel_values", [[[1, 2], [3, 4]]] * 12)),
        "column 'pixel_values' does not hold images but List",
    ),
    "label column of images": (
        lambda: load(make_table(), {"label_column": "image"}),
        "column 'image' of split 'train' holds Image.*; labels are",
    ),
    "column missing in test": (
        lambda: load(make_table(), test=make_table().remove_columns("label")),
        "split 'test' has no column 'label'; it has image",
    ),
    "image missing": (
        lambda: load(make_table([encode(PHOTO[:8, :8])] * 5 + [None] * 3, n=8)),
        "3 images cannot be used; repair or remove them:\n  row . of split 'train': there is no image",
    ),
    "one image missing": (
        lambda: load(make_table([encode(PHOTO[:8, :8])] * 7 + [None], n=8)),
        "row 7 of split 'train': there is no image; remove the row",
    ),
    # splits
    "no train": (
        lambda: load(None, test=make_table(), extra=make_table()),
        "there is no 'train' split; the dataset has test, extra",
    ),
    "train is empty": (lambda: load(make_table(labels=[])), "split 'train' is empty; remove it, or add images"),
    "validation is empty": (
        lambda: load(make_table(), validation=make_table(labels=[])),
        "split 'validation' is empty",
    ),
    "test is empty": (lambda: load(make_table(), test=make_table(labels=[])), "split 'test' is empty"),
    "test has a class more": (
        lambda: load(make_table(), test=make_table(names=["cat", "dog", "eel"])),
        "split 'test' has other classes than train: extra eel; give every split the same classes",
    ),
    "test has a class less": (
        lambda: load(make_table(names=["cat", "dog", "eel"]), test=make_table()),
        "split 'test' has other classes than train: missing eel",
    ),
    "test has the classes in another order": (
        lambda: load(make_table(), test=make_table(names=["dog", "cat"])),
        "the same names in another order",
    ),
    "validation share of 0": (lambda: load(make_table(), {"train_val_split": 0}), r"train_val_split \(0\) must be in"),
    "validation share of 1.5": (lambda: load(make_table(), {"train_val_split": 1.5}), r"train_val_split \(1.5\)"),
    "validation share too small": (
        lambda: load(make_table(), {"train_val_split": 0.01}),
        "0.01 of 12 training images cannot be cut off",
    ),
    "no training samples": (lambda: load(make_table(), {"max_train_samples": 0}), r"max_train_samples \(0\) must be"),
    "negative evaluation samples": (lambda: load(make_table(), {"max_eval_samples": -1}), r"max_eval_samples \(-1\)"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_are_refused(name):
    run, message = BAD_TABLES[name]
    with pytest.raises(ValueError, match=message):
        run()


# Folders and paths


def class_folder(folder: Path, *classes: str, n: int = 4) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            (folder / name / f"{i}.png").write_bytes(encode(PHOTO[i : i + 8, :8]))
    return folder


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


BAD_FOLDERS = {
    "no folder": (lambda at: at / "nothing", "dataset '.*nothing' could not be loaded: .*'digits'"),
    "relative path that is no Hub id": (lambda at: Path("./no thing"), "dataset 'no thing' could not be loaded"),
    "no name": (lambda at: "", "dataset '' could not be loaded"),
    "an empty folder": (lambda at: (at / "x").mkdir() or at / "x", "could not be loaded: .*any data files"),
    "a file": (lambda at: write(at / "x.zip", b"no zip"), "could not be loaded"),
    "pictures without classes": (
        lambda at: write(at / "x" / "1.png", encode(PHOTO)).parent,
        "split 'train': .*x has no directories; put the pictures into one per class",
    ),
    "pictures beside classes": (
        lambda at: write(class_folder(at / "x", "cat", "dog") / "1.png", encode(PHOTO)).parent,
        "1.png lies in .*x beside the classes; move it into one of them",
    ),
    "a class without pictures": (
        lambda at: (class_folder(at / "x", "cat", "dog") / "eel").mkdir() or at / "x",
        "class 'eel' has no images; add some or remove .*eel",
    ),
    "one class": (lambda at: class_folder(at / "x", "cat"), "only one class .'cat'."),
    "other classes in test": (
        lambda at: [class_folder(at / "x" / n, "cat", c) for n, c in (("train", "dog"), ("test", "fox"))][-1].parent,
        "split 'test' has other classes than train: extra fox; missing dog",
    ),
    "test only": (
        lambda at: class_folder(at / "x" / "test", "cat", "dog").parent,
        "there is no 'train' split; the dataset has test",
    ),
    "two folders for one split": (
        lambda at: [class_folder(at / "x" / n, "cat", "dog") for n in ("train", "val", "valid")][-1].parent,
        "val and .*valid are both 'validation'; keep one of them",
    ),
    "splits without classes": (
        lambda at: [write(at / "x" / n / "1.png", encode(PHOTO)) for n in ("train", "test")] and at / "x",
        "has no directories; put the pictures into one per class",
    ),
    "a text file among pictures": (
        lambda at: write(class_folder(at / "x", "cat", "dog") / "cat" / "notes.txt", "hello").parents[1],
        "cat/notes.txt.*unreadable image.*repair or remove it",
    ),
    "a damaged parquet file": (
        lambda at: write(at / "x" / "train.parquet", b"PAR1 no table").parent,
        "could not be loaded: Parquet",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = BAD_FOLDERS[name]
    folder = str(make(tmp_path))
    with pytest.raises(ValueError, match=message):
        load_splits(folder, PROCESSOR, train_val_split=0.25)


def test_a_folder_given_by_option_that_is_not_there(tmp_path):
    files = {"train": str(class_folder(tmp_path / "a", "cat", "dog")), "test": str(tmp_path / "b")}
    with pytest.raises(ValueError, match=r"split 'test': there is no folder .*b"):
        load_splits("x", PROCESSOR, data_files=files)


@pytest.mark.parametrize("name", ["with space", "Ünïcödé", "北京 🐈", "-dash", "per%20cent", "[ab]*?", "a'quote\""])
def test_any_path_will_do(name, tmp_path):
    """Of the folder, of classes and of files, in both layouts."""
    folder = class_folder(tmp_path / name, name, "other one")
    (folder / name / "0.png").rename(folder / name / f"{name}.png")
    splits = load_splits(str(folder), PROCESSOR, train_val_split=0.25)
    assert sorted(splits.class_names) == sorted([name, "other one"])
    assert len(splits.train) == 6


@pytest.mark.parametrize("name", ["with space", "Ünïcödé", "北京 🐈"])
def test_any_path_will_do_in_hub_layout(name, tmp_path):
    (tmp_path / name / "data").mkdir(parents=True)
    make_table(names=[name, "other"]).to_parquet(tmp_path / name / "data" / "train-00000-of-00001.parquet")
    splits = load_splits(str(tmp_path / name), PROCESSOR, train_val_split=0.25)
    assert splits.class_names == [name, "other"]


def test_a_read_only_data_folder_is_enough(tmp_path):
    folder = class_folder(tmp_path / "x", "cat", "dog")
    before = sorted(path for path in tmp_path.rglob("*"))
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555)
    try:
        assert len(load_splits(str(folder), PROCESSOR, train_val_split=0.25).train) == 6
        assert sorted(path for path in tmp_path.rglob("*")) == before, "nothing is written beside the pictures"
    finally:
        for path in (folder, *folder.iterdir()):
            path.chmod(0o755)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_picture_is_named(tmp_path):
    folder = class_folder(tmp_path / "x", "cat", "dog")
    (folder / "cat" / "2.png").chmod(0)
    with pytest.raises(ValueError, match=r"cat/2\.png.*Permission"):
        load_splits(str(folder), PROCESSOR, train_val_split=0.25)


# Recipes and the command line


@pytest.fixture(scope="module")
def finetune():
    spec = importlib.util.spec_from_file_location("finetune_for_tests", FINETUNE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BAD_RECIPES = {
    "unknown key": ("dataset_name: digits\nfrobnicate: 1", "unknown key 'frobnicate'; the nearest is '"),
    "misspelt key": ("lerning_rate: 1e-3", "unknown key 'lerning_rate'; the nearest is 'learning_rate'"),
    "abbreviated key": ("learning_rat: 1e-3", "unknown key 'learning_rat'; the nearest is 'learning_rate'"),
    "dashes for underscores": ("learning-rate: 1e-3", "the nearest is 'learning_rate'"),
    "number for a key": ("1: 2", "unknown key 1"),
    "duplicated key": ("seed: 1\nseed: 2", "key 'seed' stands there twice; keep one"),
    "duplicated key of a mapping": (
        "config_overrides: {hidden_size: 8, hidden_size: 16}",
        "key 'hidden_size' stands there twice",
    ),
    "text for a number": ("num_train_epochs: many", "num_train_epochs.*invalid float value: 'many'"),
    "fraction for a whole number": ("max_steps: 1.5", "max_steps.*invalid int value: '1.5'"),
    "list for a number": ("seed: [1, 2]", "2"),
    "neither yes nor no": ("bf16: maybe", "bf16.*maybe"),
    "no mapping": ("- preset\n- showcase", "must hold lines of the form 'option: value'"),
    "empty file": ("", "must hold lines of the form 'option: value'"),
    "no YAML": ("preset: [", "recipe .*while parsing"),
    "tabs": ("preset:\n\tshowcase", "recipe .*cannot start any token"),
    "no text": (b"\xff\xfe\x00", "recipe .*can't decode byte 0xff"),
    "a Python object": ("seed: !!python/object/apply:os.system ['touch pwned']", "could not determine a constructor"),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_bad_recipes_are_refused(name, finetune, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text, message = BAD_RECIPES[name]
    recipe = write(tmp_path / "a recipe.yaml", text)
    with pytest.raises(SystemExit) as left:
        finetune.parse([str(recipe), "--dataset_name", "digits"])
    assert left.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("key", ["help", "help_all"])
def test_help_is_no_key_of_a_recipe(key, finetune, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        finetune.parse([str(write(tmp_path / "x.yaml", f"{key}: true")), "--dataset_name", "digits"])
    assert left.value.code == 2


def test_a_recipe_that_is_not_there(finetune, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        finetune.parse([str(tmp_path / "nothing.yaml")])
    assert left.value.code == 2
    assert "nothing.yaml" in capsys.readouterr().err


GOOD_RECIPES = {
    "scientific notation, which YAML reads as text": ("learning_rate: 1e-3", "learning_rate", 1e-3),
    "number in quotes": ("seed: '7'", "seed", 7),
    "null keeps the default": ("weight_decay: null", "weight_decay", 0.0),
    "the command line wins": ("num_train_epochs: 5", "num_train_epochs", 3),
    "space and unicode in a path": ("output_dir: a b/ü", "output_dir", "a b/ü"),
}


@pytest.mark.parametrize("name", GOOD_RECIPES)
def test_odd_recipes_are_read(name, finetune, tmp_path):
    text, field, value = GOOD_RECIPES[name]
    recipe = write(tmp_path / "a recipe ü.yaml", text)
    arguments = finetune.parse([str(recipe), "--dataset_name", "digits", "--num_train_epochs", "3"])
    assert getattr(arguments[2], field) == value


@pytest.mark.parametrize("options", [["--learning_rat", "1"], ["--nonsense", "1"], ["--preset"], ["stray"]])
def test_bad_options_are_refused(options, finetune, capsys):
    with pytest.raises(SystemExit) as left:
        finetune.parse(["--dataset_name", "digits", *options])
    assert left.value.code == 2
    assert options[0].lstrip("-") in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_made(finetune, tmp_path, capsys):
    """A file stands in its way: refused before the data is loaded, for root too."""
    write(tmp_path / "file", "")
    folder = tmp_path / "file" / "run"
    assert finetune.main(["--dataset_name", "digits", "--output_dir", str(folder), "--use_cpu", "true"]) == 2
    error = capsys.readouterr().err
    assert f"cannot write to {folder}" in error
    assert "--output_dir" in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output_folder(finetune, tmp_path, capsys):
    (tmp_path / "run").mkdir(mode=0o555)
    assert finetune.main(["--dataset_name", "digits", "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"]) == 2
    assert "cannot write to" in capsys.readouterr().err


# Configs and weights


@pytest.fixture(scope="module")
def good_model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = ViTScratchConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        num_labels=3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("good") / "model"
    ViTScratchForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def model_folder(good_model, tmp_path) -> Path:
    return Path(shutil.copytree(good_model, tmp_path / "a model"))


def config_with(**changes):
    """... for a value removes the field."""

    def edit(folder: Path):
        fields = json.loads((folder / "config.json").read_text())
        fields = {name: value for name, value in {**fields, **changes}.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(fields))

    return edit


def weights_with(change):
    def edit(folder: Path):
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def bytes_with(change):
    def edit(folder: Path):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return edit


class Evil:
    """A pickle that writes a file when it is read."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def only_pickle(content: bytes | dict):
    def edit(folder: Path):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        if isinstance(content, bytes):
            (folder / "pytorch_model.bin").write_bytes(content)
        else:
            torch.save(tensors, folder / "pytorch_model.bin")

    return edit


QKV = "vit.layers.0.attention.qkv.weight"


BAD_MODELS = {
    # config.json
    "misspelt field": (
        config_with(hiden_size=8, hidden_size=...),
        "'hiden_size' is not a field .* the nearest is 'hidden_size'",
    ),
    "text for a number": (config_with(hidden_size="8"), "hidden_size must be a whole number, got '8' .str."),
    "fraction for a whole number": (config_with(num_hidden_layers=1.0), "num_hidden_layers must be a whole number"),
    "truth value for a number": (config_with(num_attention_heads=True), "num_attention_heads must be a whole number"),
    "text for a truth value": (config_with(qkv_bias="yes"), "qkv_bias must be True or False, got 'yes'"),
    "null": (config_with(hidden_size=None), "hidden_size must be a whole number, got None"),
    "negative": (config_with(hidden_size=-8), r"hidden_size \(-8\) must be at least 1"),
    "NaN": (config_with(hidden_dropout_prob=float("nan")), r"hidden_dropout_prob \(nan\) must be in"),
    "three sizes": (config_with(image_size=[8, 8, 8]), "image_size must be one number or .height, width."),
    "unknown pooling": (config_with(pooling="max"), "pooling .'max'. is unknown"),
    "another model type": (config_with(model_type="vit"), "config.json"),
    "no model type": (config_with(model_type=...), "config.json"),
    "size missing": (config_with(hidden_size=...), "of another shape"),
    "too few class names": (config_with(id2label={"0": "a"}), "of another shape"),
    "class names in a list": (config_with(id2label=["a", "b", "c"]), "id2label"),
    "no JSON": (lambda at: write(at / "config.json", "{"), "config.json is no JSON file"),
    "JSON, but no object": (lambda at: write(at / "config.json", "[]"), "config.json holds no JSON object"),
    "empty config": (lambda at: write(at / "config.json", ""), "config.json is no JSON file"),
    "no config": (lambda at: (at / "config.json").unlink(), "config.json"),
    # weights
    "missing tensor": (weights_with(lambda t: t.pop(QKV)), f"missing .*{QKV}"),
    "missing head": (
        weights_with(lambda t: t.pop("classifier.weight")),
        "missing .*classifier.weight",
    ),
    "extra tensor": (weights_with(lambda t: t.update(bogus=torch.zeros(2))), "left over .*bogus"),
    "misshapen tensor": (
        weights_with(lambda t: t.update({QKV: torch.zeros(3, 3)})),
        QKV,
    ),
    "NaN weights": (weights_with(lambda t: t[QKV].fill_(float("nan"))), f"NaN.*{QKV}"),
    "infinite weights": (weights_with(lambda t: t[QKV].fill_(float("inf"))), QKV),
    "empty file": (bytes_with(lambda content: b""), "cannot be loaded"),
    "truncated file": (bytes_with(lambda content: content[:-100]), "cannot be loaded"),
    "truncated header": (bytes_with(lambda content: content[:50]), "cannot be loaded"),
    "endless header": (bytes_with(lambda content: (2**60).to_bytes(8, "little") + b"{}"), "cannot be loaded"),
    "a pickle named safetensors": (bytes_with(lambda content: pickle.dumps(Evil())), "cannot be loaded"),
    "a pickle instead": (only_pickle(pickle.dumps(Evil())), "safetensors"),
    "an honest pickle instead": (only_pickle({}), "safetensors"),
    "no weights": (lambda at: (at / "model.safetensors").unlink(), "model.safetensors"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models_are_refused(name, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edit, message = BAD_MODELS[name]
    edit(model_folder)
    try:
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(str(model_folder))
    finally:
        if (tmp_path / "pwned").exists():
            os._exit(3)  # code of a checkpoint was run: no test result is worth anything any more


GOOD_MODELS = {
    "a field of somebody else": config_with(my_note="trained on Tuesday"),
    "a field with its default missing": config_with(layer_norm_eps=...),
    "half precision": weights_with(lambda t: t.update({name: tensor.half() for name, tensor in t.items()})),
}


@pytest.mark.parametrize("name", GOOD_MODELS)
def test_odd_models_are_loaded(name, model_folder, good_model):
    GOOD_MODELS[name](model_folder)
    pixels = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        logits = convert_checkpoint(str(model_folder)).float()(pixels).logits
        expected = ViTScratchForImageClassification.from_pretrained(good_model)(pixels).logits
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-2)


def test_the_tables_are_long_enough():
    tables = (ODD_PICTURES, BAD_PICTURES, BAD_TABLES, BAD_FOLDERS, BAD_RECIPES, GOOD_RECIPES, BAD_MODELS, GOOD_MODELS)
    assert sum(map(len, tables)) >= 150
