"""Reading photos: JPEGs in memory, decoded, resized and normalised on one core, beside what a model then takes."""

import argparse
import io
import itertools
import textwrap
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from modeling_vit_scratch import plots
from modeling_vit_scratch.conversion import PACKAGED_MODEL
from modeling_vit_scratch.data.augmentation import normalize
from modeling_vit_scratch.data.sources import load_image
from modeling_vit_scratch.data.splits import enough_pixels, to_tensor
from modeling_vit_scratch.evaluation import Predictor
from modeling_vit_scratch.evaluation.tables import text_table
from modeling_vit_scratch.training.models import make_processor

from . import peers
from .cases import Case, make_model, make_step
from .measuring import OURS, compare, faster, interleave, number, one_thread, ratio, share, stopwatch

PREDICTING = "..., as predict.py reads"
# (width, height): ImageNet's photos, and a phone's.
SIZES = {"500 x 400": (500, 400), "4000 x 3000": (4000, 3000)}
QUALITY = 90
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def photo(width: int, height: int, seed: int) -> Image.Image:
    """What has a photo's spectrum: noise of every scale, half as strong at half the size; and some sharp edges."""
    rng, longer = np.random.default_rng(seed), max(width, height)
    pixels = np.full((height, width, 3), 120, np.float32)
    for level in range(2, int(np.log2(longer)) + 1):
        shape = [max(2, (2**level * side) // longer) for side in (height, width)]
        noise = rng.normal(size=(*shape, 1)) + 0.4 * rng.normal(size=(*shape, 3))  # mostly of brightness
        noise = (60 * 0.55 ** (level - 2) * noise).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(layer)
    for _ in range(12):
        top, left = rng.integers(0, height), rng.integers(0, width)
        box = np.s_[top : top + height // rng.integers(4, 16), left : left + width // rng.integers(4, 16)]
        pixels[box] = pixels[box] / 2 + rng.integers(0, 128, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=QUALITY)
    return buffer.getvalue()


# -- from an encoded photo to float32 (1, 3, H, W) ---------------------------------------------------------------------


def read_ours(encoded: bytes, processor, at_least: int | None = None) -> torch.Tensor:
    pixels = to_tensor(load_image(encoded, 3, at_least), processor)
    return normalize(pixels[None], processor.image_mean, processor.image_std)


def read_transformers(encoded: bytes, processor) -> torch.Tensor:
    return processor(Image.open(io.BytesIO(encoded)).convert("RGB"), return_tensors="pt")["pixel_values"]


def transformed(encoded: bytes, transform: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor:
    """As torchvision's `ImageFolder` and timm's datasets open a file."""
    return transform(Image.open(io.BytesIO(encoded)).convert("RGB"))[None]


def torchvision_transform(processor) -> Callable[[Image.Image], torch.Tensor]:
    transforms = peers.MODULES["torchvision"].transforms
    size = processor.size["height"], processor.size["width"]
    return transforms.Compose(
        [
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(processor.image_mean, processor.image_std),
        ]
    )


def timm_transform(processor) -> Callable[[Image.Image], torch.Tensor]:
    from timm.data import create_transform

    return create_transform(
        (3, processor.size["height"], processor.size["width"]),
        interpolation="bicubic",
        mean=processor.image_mean,
        std=processor.image_std,
        crop_pct=1.0,
        crop_mode="squash",
    )


def readers(processor) -> dict[str, Callable[[bytes], torch.Tensor]]:
    """How each contestant reads a photo for a model with this image processor."""
    found = {
        OURS: partial(read_ours, processor=processor),
        PREDICTING: partial(read_ours, processor=processor, at_least=enough_pixels(processor)),
        "transformers, Pillow": partial(read_transformers, processor=processor),
    }
    makers = {"torchvision": torchvision_transform, "timm": timm_transform}
    if "torchvision" in peers.MODULES:  # timm's transforms are made of torchvision's
        for name, make in makers.items():
            if name in peers.MODULES:
                found[name] = partial(transformed, transform=make(processor))
    return found


# -- measuring ---------------------------------------------------------------------------------------------------------


def models(device: torch.device, quick: bool) -> dict[str, tuple[Callable[[], object], int, object]]:
    """By title: one inference, its number of images, and the image processor."""
    on_gpu = device.type == "cuda"
    batch = 256 if on_gpu else 1 if quick else 8
    case = Case("", "base", batch, bf16=on_gpu, compiled=on_gpu)
    step = make_step(case, make_model(case, OURS), device)
    packaged = Predictor(PACKAGED_MODEL, str(device))
    pixels = torch.zeros(batch, 3, *packaged.image_hw, dtype=torch.uint8)
    return {
        "ViT-B/16": (step, batch, make_processor(case.config, MEAN, STD)),
        "the packaged model": (lambda: packaged(pixels), batch, packaged.processor),
    }


def measure(args: argparse.Namespace) -> dict:
    """Photos per second of one core, and the share of reading where reading and the model take turns."""
    rows, cases = [], []
    photos = {
        size: [jpeg(photo(*sides, seed)) for seed in range(1 if args.quick else 3)] for size, sides in SIZES.items()
    }
    with one_thread():
        for model, (step, batch, processor) in models(args.device, args.quick).items():
            infer = stopwatch(step, args.device, args.least)
            for size, encoded in photos.items():
                title = f"{size}, to {processor.size['width']} pixels a side for {model}"
                contestants = {
                    name: stopwatch(partial(_next, read, itertools.cycle(encoded)), torch.device("cpu"), args.least)
                    for name, read in readers(processor).items()
                }
                samples = interleave({**contestants, "model": infer}, args.rounds, title)
                samples["model"] = [seconds / batch for seconds in samples["model"]]
                # Only what decodes every pixel, as the peers do, is compared with them.
                compared = compare({name: samples[name] for name in contestants if name != PREDICTING})
                compared[PREDICTING] = compare({PREDICTING: samples[PREDICTING]})[PREDICTING]
                cases.append({"case": title, "model_images_per_second": 1 / float(np.median(samples["model"]))})
                for name in contestants:
                    row = {"case": title, "name": name, **compared[name]}
                    row |= {"images_per_second": 1 / row["seconds"]}
                    rows.append(row | {"share": 1 / (1 + faster(samples, name, "model"))})
    bytes_each = {size: sum(map(len, encoded)) // len(encoded) for size, encoded in photos.items()}
    return {"rows": rows, "cases": cases, "bytes": bytes_each}


def _next(read: Callable[[bytes], torch.Tensor], photos: itertools.cycle):
    read(next(photos))


def show(result: dict) -> str:
    lines = []
    for case in result["cases"]:
        lines.append(f"{case['case']}: {number(case['model_images_per_second'])} images/s")
        for row in result["rows"]:
            if row["case"] == case["case"]:
                cells = [number(row["images_per_second"]), f"{row['spread']:.0%}"]
                peer = row["name"] not in (OURS, PREDICTING)
                lines.append([row["name"], *cells, ratio(row["ours_is"]) if peer else "", share(row["share"])])
    sizes = ", ".join(f"{size}: {count / 1e3:,.0f} kB" for size, count in result["bytes"].items())
    note = (
        f"Made photos, JPEG of quality {QUALITY} ({sizes}), read on one core. {PREDICTING}: a large JPEG is decoded at "
        "a half, a quarter or an eighth. In titles: what the model alone does, on one core or the GPU. of the time: of "
        "reading and the model, one after the other."
    )
    table = text_table([["", "images/s", "spread", "ours is", "of the time"], *lines])
    return f"{table}\n\n{textwrap.fill(note, 80)}"


def draw(result: dict) -> Figure:
    groups = {case["case"]: {} for case in result["cases"]}
    for row in result["rows"]:
        groups[row["case"]][row["name"]] = row["images_per_second"], f"{number(row['images_per_second'])}"
    return plots.plot_bars(groups, "photos per second, read on one core")
