"""Images and datasets made here: tables, folders, and the Hub's layout."""

import io
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from modeling_vit_scratch.data.splits import as_batch

CLASSES = ["cat", "dog", "eel"]


def make_processor(size=(32, 32), channels=3, mean=None, std=None) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(
        size={"height": size[0], "width": size[1]},
        image_mean=mean or [0.5, 0.4, 0.3][:channels],
        image_std=std or [0.2, 0.25, 0.3][:channels],
        resample=Image.Resampling.BICUBIC,
    )


def make_image(seed: int, size=(32, 32), mode="RGB") -> Image.Image:
    """Noise; size is (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image: Image.Image, file_format: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def make_dataset(
    n: int, size=(32, 32), image="image", label="label", seed=0, classes=CLASSES, sizes=None, mode="RGB"
) -> datasets.Dataset:
    """n images, their classes in turn."""
    images = [encode(make_image(seed + i, sizes[i % len(sizes)] if sizes else size, mode)) for i in range(n)]
    columns = {
        image: [{"bytes": image, "path": None} for image in images],
        label: [i % len(classes) for i in range(n)],
    }
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=list(classes))})
    return datasets.Dataset.from_dict(columns, features=features)


def write_hub_layout(folder: Path, **splits: datasets.Dataset) -> str:
    (folder / "data").mkdir(parents=True)
    for split, dataset in splits.items():
        dataset.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def write_image_folder(folder: Path, per_class: int, seed: int = 0, classes=CLASSES, size=(32, 32)) -> str:
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            make_image(seed + 100 * label + i, size).save(folder / name / f"{i:03}.png")
    return str(folder)


def all_of(dataset, workers: int = 0) -> dict:
    loader = torch.utils.data.DataLoader(dataset, batch_size=len(dataset), collate_fn=as_batch, num_workers=workers)
    return next(iter(loader))


def with_labels(n: int, values: list, feature) -> datasets.Dataset:
    part = make_dataset(n, (8, 8)).remove_columns("label")
    return part.add_column("label", [values[i % len(values)] for i in range(n)], feature=feature)
