"""Bad and odd input, in tables: each is refused with an error that says what is wrong and where, or read correctly.

Odd images, bad images, labels, columns, splits, folders and paths go through the loader; recipes through
finetune.py's parser; configs and weights through the door that training, prediction and validation load models by.
"""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessorPil

from modeling_vit_scratch.data import load_splits


def encode(image: Image.Image | np.ndarray, file_format: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


PROCESSOR = ViTImageProcessorPil(size={"height": 8, "width": 8})
PHOTO = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)


def make_table(images=None, labels=None, n=12, names=("cat", "dog"), feature=None):
    """A split of n tiny images whose classes alternate."""
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


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path
