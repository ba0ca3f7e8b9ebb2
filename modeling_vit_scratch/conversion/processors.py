"""Image processors and class names that belong to a checkpoint."""

import json
import logging
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path

import transformers
from transformers import AutoImageProcessor, BitImageProcessorPil, ViTImageProcessorPil

from ..configuration_vit_scratch import ViTScratchConfig
from ..modeling_vit_scratch import ViTScratchForImageClassification
from .architectures import RESAMPLE
from .families import FAMILIES, Family
from .reading import locate, one_line, open_checkpoint, read_json, silent
from .recognition import recognise

logger = logging.getLogger(__package__)


def image_processor_for(checkpoint, model: ViTScratchForImageClassification, source: str | None = None, **hub):
    """The image processor that belongs to a checkpoint, at the resolution of the model made of it.

    Args:
        checkpoint: As for `convert_checkpoint`, or the name of a family. A preprocessor_config.json beside the weights
            is read, or timm's config.json; otherwise it is the one that the family publishes.
        model: The converted model.
        source: As for `convert_checkpoint`.
        **hub: revision, cache_dir and token, as for `convert_checkpoint`.

    Raises:
        ValueError: As `convert_checkpoint`; or a folder of ours has no preprocessor_config.json.
    """
    C = model.config.num_channels
    if isinstance(checkpoint, str) and checkpoint in FAMILIES and not Path(checkpoint).exists():
        return _processor(model.config.image_hw, C, FAMILIES[checkpoint])
    located, folder = locate(checkpoint, **hub), None
    if not isinstance(located, Mapping):
        folder = located if located.is_dir() else located.parent
    if folder is not None and (folder / "preprocessor_config.json").is_file():
        return _fit(_load_processor(folder, C), model.config.image_hw)
    with silent(logger):  # `convert_checkpoint` has said what was taken
        opened = open_checkpoint(located, str(checkpoint), mmap=True)
    if source is None and opened.config.get("model_type") == ViTScratchConfig.model_type:
        raise ValueError(f"{checkpoint} has no preprocessor_config.json.")
    family = FAMILIES[recognise(opened, source)[0]]
    card = {**opened.config, **(opened.config.get("pretrained_cfg") or {})}
    if "architecture" in opened.config and "mean" in card:
        family = Family(
            family.layouts, tuple(card["mean"]), tuple(card["std"]),
            RESAMPLE.get(card.get("interpolation"), family.resample),
            None if card.get("crop_mode") == "squash" else card.get("crop_pct", family.crop),
        )  # fmt: skip
    return _processor(model.config.image_hw, C, family)


def _load_processor(folder: Path, num_channels: int):
    file = folder / "preprocessor_config.json"
    config = read_json(file)
    try:
        try:
            processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        except ImportError:  # older versions of transformers have it with torchvision only
            kind = config.get("image_processor_type") or config.get("feature_extractor_type") or "ViTImageProcessor"
            kind = kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
            kind = "ViTImageProcessor" if kind == "DINOv3ViTImageProcessor" else kind  # which resizes alike
            processor = getattr(transformers, f"{kind}Pil").from_pretrained(folder)
    except Exception as error:  # each processor fails in its own way, some with a list of all others
        reason = textwrap.shorten(one_line(error), 160, placeholder=" ...")
        raise ValueError(f"no image processor can be made of {file}: {reason}") from error
    for name in ("image_mean", "image_std"):
        value = getattr(processor, name, None)
        value = [value] * num_channels if isinstance(value, int | float) else value
        numbers = isinstance(value, list | tuple) and all(isinstance(number, int | float) for number in value)
        if processor.do_normalize and not (numbers and len(value) == num_channels):
            raise ValueError(f"{file}: {name} ({value!r}) must be a number for each of {num_channels} channels.")
        setattr(processor, name, value)
    return processor


def _processor(image_hw: tuple[int, int], num_channels: int, family: Family):
    height, width = image_hw
    mean, std = list(family.mean), list(family.std)
    if num_channels != len(mean):
        mean, std = [sum(mean) / len(mean)] * num_channels, [sum(std) / len(std)] * num_channels
        logger.warning("Averaged the image processor's mean and deviation for %d channels.", num_channels)
    shared = {
        "image_mean": mean, "image_std": std, "resample": family.resample, "do_convert_rgb": num_channels == 3 or None,
    }  # fmt: skip
    if family.crop is None:
        return ViTImageProcessorPil(size={"height": height, "width": width}, **shared)
    resized = [math.floor(side / family.crop) for side in image_hw]
    size = {"shortest_edge": resized[0]} if height == width else {"height": resized[0], "width": resized[1]}
    return BitImageProcessorPil(size=size, crop_size={"height": height, "width": width}, **shared)


def _fit(processor, image_hw: tuple[int, int]):
    """The processor at another resolution, with the same share cropped."""
    height, width = image_hw
    size, crop = dict(processor.size), dict(getattr(processor, "crop_size", None) or {})
    target = {"height": height, "width": width}
    if not (getattr(processor, "do_center_crop", None) and crop):
        if (size.get("height"), size.get("width")) != image_hw:
            logger.warning("The image processor resizes to %dx%d now, as the model expects.", height, width)
        processor.size = type(processor.size)(**target) if not isinstance(processor.size, dict) else target
        return processor
    if (crop["height"], crop["width"]) != image_hw:
        grown = {
            key: round(side * (width if key == "width" else height) / crop["width" if key == "width" else "height"])
            for key, side in size.items()
            if side
        }
        processor.size = type(processor.size)(**grown) if not isinstance(processor.size, dict) else grown
        processor.crop_size = type(processor.crop_size)(**target) if not isinstance(crop, dict) else target
        logger.warning("The image processor crops to %dx%d now, as the model expects.", height, width)
    return processor


def read_labels(path: str | Path) -> dict[int, str]:
    """Names of the classes from a text file, one a line, or a JSON list or object {index: name}.

    Raises:
        ValueError: The file cannot be read, or its indices are not 0 to n - 1.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"labels cannot be read from {path}: {error}") from error
    if isinstance(content, list):
        while content and content[-1] == "":
            content.pop()
        content = dict(enumerate(content))
    try:
        labels = {int(index): str(name).strip() for index, name in content.items()}
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{path} must hold a JSON list of names, or an object of index and name.") from error
    if sorted(labels) != list(range(len(labels))) or not labels:
        raise ValueError(f"{path} must name the classes 0 to n - 1, got {len(labels)} names.")
    return dict(sorted(labels.items()))
