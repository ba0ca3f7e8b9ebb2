"""Large photos decode faster at a smaller scale: by how much their pixels differ, and when it is not done."""

import io
import threading

import numpy as np
import pytest
import torch
import transformers
from bad_files import encode
from benchmarking.photos import jpeg, photo
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import ViTImageProcessorPil
from transformers.image_processing_backends import PilBackend
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from modeling_vit_scratch.data import splits
from modeling_vit_scratch.data.sources import load_image
from modeling_vit_scratch.data.splits import enough_pixels, to_tensor


def square(side: int, **fields) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": side, "width": side}, **fields)


PROCESSORS = {
    "plain": square(24),
    "not square": ViTImageProcessorPil(size={"height": 24, "width": 40}, resample=Image.Resampling.LANCZOS),
    "CLIP": transformers.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
    "timm": BitImageProcessorPil(size={"shortest_edge": 27}, crop_size={"height": 24, "width": 24}),
    "crop larger than the image": BitImageProcessorPil(
        size={"shortest_edge": 20}, crop_size={"height": 30, "width": 24}
    ),
    "crop of a square": BitImageProcessorPil(size={"height": 27, "width": 27}, crop_size={"height": 24, "width": 24}),
    "SigLIP": transformers.SiglipImageProcessorPil(size={"height": 24, "width": 24}),
    "crop alone": BitImageProcessorPil(do_resize=False, crop_size={"height": 24, "width": 24}),
    "its own way": transformers.ConvNextImageProcessorPil(size={"shortest_edge": 24}),
}


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("size", [(24, 24), (40, 24), (27, 27), (500, 400), (401, 503), (61, 28), (33, 97), (7, 90)])
def test_resizing_is_the_processors_own(kind, size):
    """To the last bit, although Pillow is called without it."""
    processor = PROCESSORS[kind]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    expected = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(to_tensor(image, processor), expected.to(torch.uint8))


def test_resizing_makes_no_copies(monkeypatch):
    asked = []
    monkeypatch.setattr(PilBackend, "process_image", lambda *args, **kwargs: asked.append(args))
    image = Image.new("L", (90, 60), 7)
    assert torch.equal(to_tensor(image, square(24)), torch.full((1, 24, 24), 7, dtype=torch.uint8))
    assert not asked


# -- smaller scales ----------------------------------------------------------------------------------------------------


def pictures() -> dict[str, Image.Image]:
    """Two photos, two made ones, and what is worse than any photo; their sides are multiples of 8."""
    photos = {f"photo {i}": Image.fromarray(pixels[:424]) for i, pixels in enumerate(load_sample_images().images)}
    photos |= {"made": photo(1600, 1200, 0), "made, of a phone's size": photo(4000, 3000, 1)}
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), dtype=np.uint8)
    return {**photos, "noise": Image.fromarray(noise)}


def test_pixels_differ_by_what_is_promised():
    """`enough_pixels` has these numbers: the mean and the largest difference, in levels of 255."""
    worst = {}
    for name, picture in pictures().items():
        for subsampling in (0, 2):
            encoded = encode(picture, "jpeg", quality=90, subsampling=subsampling)
            for factor in (2, 4, 8):
                side = min(picture.size) // (3 * factor)  # the hardest: just enough pixels are left
                for resample in ("BILINEAR", "BICUBIC", "LANCZOS"):
                    processor = square(side, resample=Image.Resampling[resample])
                    small = load_image(encoded, 3, enough_pixels(processor))
                    assert small.size == (picture.width // factor, picture.height // factor)
                    full = to_tensor(load_image(encoded), processor).int()
                    far = (to_tensor(small, processor).int() - full).abs()
                    kind = "noise" if name == "noise" else "photos"
                    mean, largest = worst.get(kind, (0, 0))
                    worst[kind] = max(mean, far.float().mean().item()), max(largest, far.max().item())
    assert worst["photos"][0] <= 0.5 and worst["photos"][1] <= 8
    assert worst["noise"][0] <= 1.4 and worst["noise"][1] <= 7
    assert worst["photos"][0] > 0.1, "nothing was decoded smaller"


@pytest.mark.parametrize("resample", ["NEAREST", "BOX", "HAMMING"])
def test_filters_that_would_give_other_pixels_get_every_one(resample):
    assert enough_pixels(square(64, resample=Image.Resampling[resample])) is None


@pytest.mark.parametrize(
    ("size", "at_least", "expected"),
    [
        ((500, 400), None, (500, 400)),
        ((500, 400), 672, (500, 400)),
        ((500, 400), 200, (250, 200)),
        ((500, 400), 201, (500, 400)),
        ((500, 400), 96, (125, 100)),  # 8 does not divide 500
        ((400, 504), 1, (50, 63)),
        ((640, 427), 10, (640, 427)),
        ((4032, 3024), 672, (1008, 756)),
        ((3024, 4032), 672, (756, 1008)),
    ],
)
def test_never_fewer_pixels_than_asked_for_and_none_moved(size, at_least, expected):
    assert load_image(encode(Image.new("RGB", size), "jpeg"), 3, at_least).size == expected


def test_what_a_processor_needs():
    assert enough_pixels(square(224)) == 672
    needs = {kind: enough_pixels(processor) for kind, processor in PROCESSORS.items()}
    assert needs == {
        "plain": 72, "not square": 120, "CLIP": 72, "timm": 81, "crop larger than the image": 60,
        "crop of a square": 81, "SigLIP": 72, "crop alone": None, "its own way": None,
    }  # fmt: skip
    longest = BitImageProcessorPil(size={"shortest_edge": 24, "longest_edge": 30}, do_center_crop=False)
    assert enough_pixels(longest) is None


WHOLE = photo(160, 96, 2)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(WHOLE, "jpeg", quality=95, exif=exif)


KINDS = {
    **{f"EXIF orientation {n}": lambda n=n: turned(n) for n in range(1, 9)},
    "EXIF that is damaged": lambda: encode(WHOLE, "jpeg", exif=b"Exif\0\0nonsense"),
    "progressive": lambda: encode(WHOLE, "jpeg", progressive=True),
    "grey": lambda: encode(WHOLE.convert("L"), "jpeg"),
    "CMYK": lambda: encode(WHOLE.convert("CMYK"), "jpeg"),
    "restart markers": lambda: encode(WHOLE, "jpeg", restart_marker_blocks=4),
    "commented": lambda: encode(WHOLE, "jpeg", comment=b"by hand"),
    "two pictures, as phones write": lambda: encode(WHOLE, "mpo", save_all=True, append_images=[WHOLE.rotate(180)]),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_jpeg_is_the_same_image_at_a_smaller_scale(kind, channels, tmp_path):
    encoded = KINDS[kind]()
    full, small = load_image(encoded, channels), load_image(encoded, channels, 24)
    assert small.mode == full.mode and small.size == (full.width // 4, full.height // 4)
    far = np.asarray(small).astype(int) - np.asarray(full.reduce(4))
    assert np.abs(far).mean() < 4  # several times less than any turn of the image makes
    (tmp_path / "photo").write_bytes(encoded)
    assert np.array_equal(load_image(tmp_path / "photo", channels, 24), small)


@pytest.mark.parametrize("kind", ["png", "webp", "tiff", "gif"])
def test_other_formats_are_decoded_in_full(kind):
    encoded = encode(WHOLE, kind)
    assert np.array_equal(load_image(encoded, 3, 1), load_image(encoded))


def test_open_images_are_left_as_they_are():
    opened = Image.open(io.BytesIO(jpeg(WHOLE)))
    assert load_image(opened, 3, 1).size == opened.size == WHOLE.size


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_files_are_refused_at_every_scale(progressive):
    encoded = encode(WHOLE, "jpeg", progressive=progressive)
    for kept in np.linspace(10, len(encoded) - 30, 40).astype(int):
        for at_least in (None, 48, 24, 12):
            with pytest.raises(ValueError, match="unreadable image"):
                load_image(encoded[:kept], 3, at_least)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_that_are_too_large_are_refused_at_every_scale(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 160 * 96 - 1)
    with pytest.raises(ValueError, match="160 x 96 pixels are more than the 15,359"):
        load_image(jpeg(WHOLE), 3, 12)


def segment(marker: int, *content: int) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + bytes(content)


@pytest.mark.parametrize("before", [b"", segment(0xFE, 1, 2), b"\xff"], ids=["", "comment", "fill byte"])
def test_lossless_jpegs_are_decoded_in_full(before):
    """They have no DCT; Pillow would write beyond the end of the smaller image's memory."""
    frame = segment(0xC3, 8, 0, 64, 0, 64, 1, 1, 0x11, 0)  # 8 bits, 64 x 64, one component
    table = segment(0xC4, 0, 1, *[0] * 15, 0)  # one code, the bit 0: as predicted
    scan = segment(0xDA, 1, 1, 0, 1, 0, 0) + bytes(64 * 64 // 8)  # a pixel is predicted by its left one, the first 128
    encoded = b"\xff\xd8" + before + frame + table + scan + b"\xff\xd9"
    # Who takes the fill byte for a marker, and 0xC300 behind it for a length, finds a frame with a DCT there.
    encoded = encoded.ljust(6 + 0xC300 - 2, b"\0") + segment(0xC0, *[0] * 9)
    assert np.array_equal(load_image(encoded, 1), np.full((64, 64), 128))
    assert np.array_equal(load_image(encoded, 1, 8), np.full((64, 64), 128))


# -- reading ahead -----------------------------------------------------------------------------------------------------


def test_work_is_handed_out_no_further_ahead_than_asked():
    handed_out, started, go_on = [], [], threading.Event()

    class Pool(splits.ThreadPoolExecutor):
        def submit(self, function, item):
            handed_out.append(item)
            return super().submit(function, item)

    def work(item: int) -> int:
        started.append(item)
        assert item != 20 or go_on.wait(60)
        return -item

    with Pool(1) as pool:
        results = splits.bounded_map(pool, work, range(50), ahead=5)
        for position in range(20):
            assert next(results) == -position
            assert len(handed_out) == position + 5
        results.close()
        go_on.set()
    assert started == list(range(21)), "what nobody waits for is not begun"
