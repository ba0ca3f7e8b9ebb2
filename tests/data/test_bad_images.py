"""Images that are odd are read as they are meant; images that are bad are refused by name."""

import pickle
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
from bad_files import PHOTO, PROCESSOR, encode, load, make_table
from PIL import Image

from modeling_vit_scratch.data import load_splits
from modeling_vit_scratch.data.sources import load_image

pytestmark = pytest.mark.usefixtures("offline")


def as_array(*rows) -> np.ndarray:
    return np.array(rows, dtype=np.uint8)


def png(width: int, height: int, depth: int, color: int, data: bytes) -> bytes:
    """A PNG file written by hand: for kinds that PIL does not write, and for sizes that nobody should decode."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


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
def test_odd_images_are_read(name, tmp_path):
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
def test_odd_images_become_samples(name, tmp_path):
    """At the model's size, beside ordinary ones."""
    folder = picture_folder(tmp_path, ODD_PICTURES[name][0](), "odd.png")
    splits = load_splits(str(folder), PROCESSOR, train_val_split=0.5)
    pixels = [part[i]["pixel_values"] for part in (splits.train, splits.validation) for i in range(len(part))]
    assert {tuple(image.shape) for image in pixels} == {(3, 8, 8)}


BAD_PICTURES = {
    "truncated JPEG": (lambda: encode(PHOTO, "jpeg")[:-300], "[Tt]runcated"),
    "truncated PNG": (lambda: encode(PHOTO)[:2000], "unreadable image"),
    "truncated header": (lambda: encode(PHOTO)[:20], "unreadable image"),
    "text": (lambda: b"This is no image.", "UnidentifiedImageError"),
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


def picture_folder(folder: Path, encoded: bytes, name: str = "bad image.jpg") -> Path:
    for label in ("cat", "dog"):
        (folder / "data" / label).mkdir(parents=True)
        for i in range(3):
            (folder / "data" / label / f"{i}.png").write_bytes(encode(PHOTO[i : i + 20, i : i + 20]))
    (folder / "data" / "dog" / name).write_bytes(encoded)
    return folder / "data"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_images_are_refused_by_name(name, tmp_path):
    make, message = BAD_PICTURES[name]
    folder = picture_folder(tmp_path, make())
    with pytest.raises(ValueError, match=message) as caught:
        load_splits(str(folder), PROCESSOR, train_val_split=0.5)
    assert "dog/bad image.jpg" in str(caught.value), "the file is named"
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
def test_a_bad_image_in_a_table_is_refused_by_row(lazy, monkeypatch):
    if lazy:
        monkeypatch.setattr("modeling_vit_scratch.data.splits.MAX_DECODED_BYTES", 0)
    rows = [encode(PHOTO[:8, :8])] * 11 + [b"no image"] + [encode(PHOTO[:8, :8])] * 8
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


def test_the_tables_of_images_are_long_enough():
    assert len(ODD_PICTURES) + len(BAD_PICTURES) >= 46
