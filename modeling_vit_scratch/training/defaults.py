"""What a run does where its options do not say: settings for a classifier from scratch, by what the data are."""

import contextlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..data.records import load_records
from ..data.sources import load_raw
from .arguments import DataArguments, ModelArguments

# Images whose sizes are looked at, evenly spaced.
LOOKED_AT = 64
# Training images that a run goes through, by repeating them, within these bounds of epochs.
IMAGES_SEEN, FEWEST_EPOCHS, MOST_EPOCHS = 400_000, 5, 150
# Below so many training images, batches are half as large: twice as many steps.
FEW_IMAGES = 2_000
# Below so many training images, a model that has seen millions of others is the better start.
WORTH_PRETRAINED = 50_000
PRETRAINED = "google/vit-base-patch16-224"
# By the shorter side of an image (median, pixels, below): the size that images are brought to, the channels of the
# early convolutions, and the patch size. 64 tokens each time, at about the same cost.
SIZES = ((48, 32, [32, 64], 4), (96, 64, [16, 32, 64], 8), (float("inf"), 128, [8, 16, 32, 64], 16))


@dataclass
class Look:
    """What was seen of a dataset.

    Args:
        images: Number of training images, without those that are held out for validation.
        classes: Number of classes.
        size: (height, width) in pixels of the image whose shorter side is the median.
    """

    images: int
    classes: int
    size: tuple[int, int]

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.images:,} training images of {self.classes} classes, {height}x{width} pixels in the median"


def look_at(model_args: ModelArguments, data_args: DataArguments, seed: int) -> Look:
    """Look at the data that the options name: labels are checked, of some images the size is read.

    Raises:
        ValueError: The data cannot be used; see `load_records`.
    """
    folders = {"train": data_args.train_dir, "validation": data_args.validation_dir, "test": data_args.test_dir}
    raw = load_raw(
        data_args.dataset_name,
        data_args.dataset_config_name,
        {split: folder for split, folder in folders.items() if folder},
        model_args.cache_dir,
        model_args.token,
    )
    columns = data_args.image_column_name, data_args.label_column_name
    limits = data_args.train_val_split, data_args.max_train_samples, data_args.max_eval_samples
    records, class_names = load_records(raw, *columns, *limits, seed)
    train = records["train"]
    chosen = train.select(np.linspace(0, len(train) - 1, min(len(train), LOOKED_AT)).astype(int))
    sizes = []
    for content in chosen.encoded():
        with contextlib.suppress(Exception), Image.open(io.BytesIO(content)) as image:  # decoding says what is wrong
            sizes.append((image.height, image.width))
    sizes.sort(key=min)
    return Look(len(train), len(class_names), sizes[len(sizes) // 2] if sizes else (0, 0))


def choose_settings(look: Look) -> dict:
    """Options of `finetune.py` for a classifier from scratch on such data.

    The architecture and the optimiser's settings are those of scripts/recipes/budget.yaml, chosen there on a validation
    split of CIFAR-10; larger images get one or two more stages of early convolutions, and so the same 64 tokens. On
    270 images of three classes of CIFAR-10 (JPEG copy), one seed, these settings, measured each epoch, gave 74.6 % on
    1,350 others, and `--preset showcase` with the defaults of the options 51.7 %; torch 2.13.0, a Xeon with bfloat16
    units. The bounds of the epochs were set by judgement, not by search.
    """
    image_size, stem_channels, patch_size = next(row[1:] for row in SIZES if min(look.size) < row[0])
    epochs = min(max(round(IMAGES_SEEN / look.images), FEWEST_EPOCHS), MOST_EPOCHS)
    shares = {"eval_strategy": "steps", "eval_steps": 0.05, "save_strategy": "steps", "save_steps": 0.05}
    return {
        "config_overrides": {
            "image_size": image_size,
            "stem_channels": stem_channels,
            "patch_size": patch_size,
            "hidden_size": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "use_final_norm": "true",
            "initializer_range": "fan_in",
        },
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 64 if look.images >= FEW_IMAGES else 32,
        "muon_learning_rate": 0.02,
        "learning_rate": 2e-3,
        "warmup_steps": 0.05,
        "weight_decay": 0.1,
        "label_smoothing_factor": 0.1,
        "rand_augment": 1,
        "augment_until": "rand_augment=0.8",
        **(shares if epochs > 20 else {}),  # short epochs are not each measured and saved
    }


def advice(look: Look) -> str:
    """The one line that gives more than the chosen settings do."""
    if look.images < WORTH_PRETRAINED and min(look.size) >= 48:
        return (
            f"with so few images a pretrained model gives far more: --model_name_or_path {PRETRAINED} "
            "--learning_rate 1e-4 --layer_decay 0.75"
        )
    return "for more accuracy, train longer: --num_train_epochs N or --time_budget 1h"
