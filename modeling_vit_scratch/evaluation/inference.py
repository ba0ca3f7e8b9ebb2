"""A trained model at work: images in, answers out.

`Predictor` is what predicting, measuring, drawing, exporting and serving share. Letters in shape comments are those of
`modeling_vit_scratch`; n images.
"""

import copy
import difflib
import glob
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from ..conversion import convert_checkpoint, image_processor_for
from ..conversion.loading import HEADS, own_folder, quantized_by
from ..conversion.reading import silent
from ..data import load_split
from ..data.cuts import RunRecord, Split, read_record
from ..data.records import Records
from ..data.sources import images_below, load_image
from ..data.splits import bounded_map, enough_pixels, progress_bar, to_tensor
from .devices import find_device
from .token_merging import merge_tokens

logger = logging.getLogger(__name__)

# As many images `load_for_inference` compares with float32.
COMPARED_IMAGES = 8


def find_images(patterns: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Paths of images in the order given, each with what is wrong if nothing is there.

    Args:
        patterns: Files, folders (their images, and those in folders below them), and patterns such as "*.jpg".
    """
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = list(map(str, images_below(path)))
            wrong = "the folder holds no images"
        elif path.exists():
            found, wrong = [pattern], None
        else:
            found = [name for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
            wrong = "nothing matches the pattern" if glob.has_magic(pattern) else "there is no such file"
        yield from ((name, None) for name in found) if found else ((pattern, wrong),)


@dataclass
class Answers:
    """What a model says of labelled images.

    Args:
        labels: Indices of the model's classes, int64 (n,).
        features: What the classifier sees, `pooler_output`: float32 (n, D).
        probabilities: float32 (n, classes); None if the model has no trained classifier.
        flipped: Likewise, of the mean of the logits of each image and its mirror image (finetune.py's flip_tta); None
            if it was not asked for.
        seconds: Time it took, reading included.
    """

    labels: torch.Tensor
    features: torch.Tensor
    probabilities: torch.Tensor | None
    flipped: torch.Tensor | None
    seconds: float


class Classify(nn.Module):
    """The model as a function of pixels (B, C, H, W): what the classifier reads (B, D), and its logits (B, K)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = self.model.vit(pixel_values, pooled_only=True).pooler_output
        return pooled, self.model.classifier(self.model.pre_logits(pooled))


class Predictor:
    """A model with its image processor, on a device, in float32; `load_for_inference` makes it faster.

    A folder that was saved quantised stays so.

    Args:
        checkpoint: Folder, file or Hub id of ours, or of any model that `convert_checkpoint` reads.
        device: See `devices.find_device`.
        id2label: Names of the classes, in place of the model's own.
        source: Whose checkpoint it is; told by its names if None. See `convert_checkpoint`.
        revision: Branch, tag or commit of a Hub id.
        token_merging: Patch tokens that each block merges, as `merge_tokens` does.

    Raises:
        ValueError: The model cannot be had, or the names do not fit it; the device cannot be used; or `token_merging`
            is out of range.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        device: str | None = None,
        id2label: dict[int, str] | None = None,
        source: str | None = None,
        revision: str | None = None,
        token_merging: int = 0,
    ):
        self.name, self.source, self.revision, self.device = str(checkpoint), source, revision, find_device(device)
        with silent(HEADS):  # an untrained one is of no use here, which `require_classifier` says where it matters
            model = convert_checkpoint(checkpoint, source, id2label=id2label, revision=revision)
        # Classifiers start at zero: one that is still there was never trained, or is not in the checkpoint. Asked on
        # the CPU: not every device has `dequantize`.
        self.can_classify = any(bool(p.detach().dequantize().any()) for p in model.classifier.parameters())
        self.model = model.to(self.device)
        merge_tokens(self.model, token_merging)
        self.config = self.model.config
        self.engine: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = Classify(self.model)
        library = quantized_by(self.model)
        self.computes_in = "float32" if library is None else f"quantised weights ({library})"

    @cached_property
    def processor(self):
        """The image processor; found when it is first needed: a model without one can still be drawn."""
        return image_processor_for(self.name, self.model, source=self.source, revision=self.revision)

    @cached_property
    def record(self) -> RunRecord | None:
        """What the run that trained the model wrote of its data; None for a model of another library."""
        folder = own_folder(self.name, revision=self.revision)
        return None if folder is None else read_record(folder)

    @property
    def image_hw(self) -> tuple[int, int]:
        """Pixels (height, width) of the images that it takes."""
        return self.config.image_hw

    @property
    def class_names(self) -> list[str]:
        """The name of each class, or its index where it has none."""
        names = (self.config.id2label.get(i, f"LABEL_{i}") for i in range(self.config.num_labels))
        return [str(i) if name == f"LABEL_{i}" else name for i, name in enumerate(names)]

    def require_classifier(self):
        """Raise a ValueError if there is no trained classifier."""
        if not self.can_classify:
            raise ValueError(f"{self.name} has no trained classifier, so there is nothing to predict with.")

    def pixels(self, images: Sequence[Image.Image], enlarge: int = 1) -> torch.Tensor:
        """Images as the image processor resizes and crops them, not yet normalised: uint8 (B, C, H, W).

        Args:
            images: Of the model's channels, as `load_image` gives them.
            enlarge: Factor on the pixels of each side: the same part of the image, larger, to be looked at.
        """
        processor = self.processor
        if enlarge > 1:
            processor = copy.deepcopy(processor)
            for name in ("size", "crop_size"):
                size = getattr(processor, name, None)
                if size:
                    larger = {key: enlarge * side for key, side in dict(size).items() if side}
                    setattr(processor, name, type(size)(**larger))
        return torch.stack([to_tensor(image, processor) for image in images])

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W) to what the model takes, on its device: float32 (B, C, H, W)."""
        pixels, processor = pixels.to(self.device).float(), self.processor
        if processor.do_rescale:
            pixels = pixels * processor.rescale_factor
        if processor.do_normalize:
            for_channels = (processor.image_mean, processor.image_std)
            mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in for_channels)
            pixels = (pixels - mean) / std
        return pixels

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor, **kwargs) -> ImageClassifierOutput:
        """The model's output for uint8 (B, C, H, W); `kwargs` go to it, e.g. `output_attentions`."""
        return self.model(self.normalise(pixels), **kwargs)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Of each class, float32 (B, classes); each by itself where an image can have several."""
        several = self.config.problem_type == "multi_label_classification"
        return logits.float().sigmoid() if several else logits.float().softmax(dim=1)

    @torch.inference_mode()
    def classify(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the classifier reads, (B, D), and its logits, (B, classes), of uint8 (B, C, H, W): float32, on the CPU.

        The fast way, where there is one; `__call__` gives more.
        """
        pooled, logits = self.engine(self.normalise(pixels))
        return pooled.float().cpu(), logits.float().cpu()

    @torch.inference_mode()
    def answers(self, records: Records, class_names: list[str], batch_size: int = 64, flip: bool = False) -> Answers:
        """Go through a split; images are read in threads meanwhile.

        Args:
            records: The images and labels, from `load_split`.
            class_names: Of the labels; each must be a class of the model, if it classifies.
            batch_size: Images at once.
            flip: Whether to look at mirror images too, which takes twice as long.

        Raises:
            ValueError: The model has no class of such a name; an image cannot be read (`BadImages`).
        """
        if batch_size < 1:
            raise ValueError(f"batch_size ({batch_size}) must be at least 1.")
        labels = torch.from_numpy(records.labels)
        if self.can_classify:
            labels = torch.from_numpy(match_classes(class_names, self.class_names))[labels]
        chunks = [range(start, min(start + batch_size, len(records))) for start in range(0, len(records), batch_size)]
        features, plain, mirrored = [], [], []
        if self.computes_in != "float32":  # the first call, which compiles and compares, is not timed
            self.classify(self.pixels(records.images(chunks[0][:COMPARED_IMAGES], self.config.num_channels)))
        started = time.perf_counter()
        with ThreadPoolExecutor(os.cpu_count()) as pool, progress_bar(len(records), "Classifying") as bar:
            read = bounded_map(pool, lambda chunk: self.pixels(records.images(chunk, self.config.num_channels)), chunks)
            for pixels in read:
                pooled, logits = self.classify(pixels)
                features.append(pooled)
                plain.append(self.probabilities(logits))
                if flip:
                    mirrored.append(self.probabilities((logits + self.classify(pixels.flip(3))[1]) / 2))
                bar.update(len(pixels))
        return Answers(
            labels,
            torch.cat(features),
            torch.cat(plain) if self.can_classify else None,
            torch.cat(mirrored) if flip and self.can_classify else None,
            time.perf_counter() - started,
        )

    def throughput(self, batch_size: int = 64, seconds: float = 1.0) -> float:
        """Images per second of the model alone: the median of repeated batches, after a first one."""
        pixels = torch.zeros(batch_size, self.config.num_channels, *self.config.image_hw, dtype=torch.uint8)
        times, end = [], None
        while end is None or time.perf_counter() < end or len(times) < 3:
            started = time.perf_counter()
            self.classify(pixels)  # on the CPU: it waits for the device
            if end is None:
                end = time.perf_counter() + seconds
            else:
                times.append(time.perf_counter() - started)
        return batch_size / float(np.median(times))


def as_predictor(model: Predictor | str | Path, device: str | None = None) -> Predictor:
    """The model itself, or the one of that folder, file or Hub id, on `device`."""
    return model if isinstance(model, Predictor) else Predictor(model, device)


def find_split(dataset: str | Split, predictors: Sequence[Predictor], split: str | None = None, **options) -> Split:
    """The labelled images that these models are used on; what was taken is logged.

    Args:
        dataset: A Hub id, a folder, or "digits"; or what `load_split` found already.
        predictors: The models; images are drawn for the first one's size where the dataset can choose.
        split: "train", "validation" or "test"; see `load_split` for None.
        **options: Of `load_split`: `config_name`, `image_column`, `label_column`, `max_samples`, `train_val_split` and
            `seed`.

    Raises:
        ValueError: As `load_split`; or `dataset` is a split already, and another one was asked for.
    """
    if isinstance(dataset, Split):
        if split is not None or options:
            named = ", ".join([*(["split"] if split is not None else []), *options])
            raise ValueError(f"{named} cannot be chosen any more: the dataset is a loaded split; name a dataset.")
        return dataset
    found = load_split(dataset, split, image_size=predictors[0].image_hw, models=predictors, **options)
    if found.line:
        logger.warning(found.line)
    return found


def predict_files(
    predictor: Predictor, files: Sequence[tuple[str, str | None]], top_k: int = 5, batch_size: int = 32
) -> Iterator[dict]:
    """The likeliest classes of image files, one after the other; files are read in threads meanwhile.

    Large JPEGs are decoded no larger than the image processor needs (`enough_pixels` says how far pixels then differ
    from those of `Predictor.answers`, which decodes in full, as training does).

    Args:
        predictor: The model.
        files: Paths, each with what is wrong if nothing is there, as `find_images` gives them.
        top_k: Number of classes for each image.
        batch_size: Images at once.

    Yields:
        For each file, in order, "picture", its path, and "predictions", the likeliest class first, each with "index",
        "label" and "probability" in [0, 1]; or "error", why the file cannot be read.
    """
    names, at_least = predictor.class_names, enough_pixels(predictor.processor)

    def read(file: tuple[str, str | None]) -> torch.Tensor | str:
        name, wrong = file
        if wrong:
            return wrong
        try:
            image = load_image(name, predictor.config.num_channels, at_least)
        except (ValueError, OSError) as error:
            return str(error)
        return predictor.pixels([image])[0]  # (C, H, W)

    # A batch in reserve, so that threads read while the model computes; only pixels at its size wait.
    ahead = max(batch_size, 2 * (os.cpu_count() or 1))
    with ThreadPoolExecutor(os.cpu_count()) as pool, closing(bounded_map(pool, read, files, ahead)) as found:
        for start in range(0, len(files), batch_size):
            batch = list(islice(found, batch_size))
            images = [pixels for pixels in batch if isinstance(pixels, torch.Tensor)]
            if images:
                probabilities = predictor.probabilities(predictor.classify(torch.stack(images))[1])
                best = iter(
                    zip(*(tensor.tolist() for tensor in probabilities.topk(min(top_k, len(names)))), strict=True)
                )
            for (name, _), pixels in zip(files[start : start + batch_size], batch, strict=True):
                if isinstance(pixels, str):
                    yield {"picture": name, "error": pixels}
                    continue
                predictions = [
                    {"index": index, "label": names[index], "probability": probability}
                    for probability, index in zip(*next(best), strict=True)
                ]
                yield {"picture": name, "predictions": predictions}


def match_classes(data_names: Sequence[str], model_names: Sequence[str]) -> np.ndarray:
    """The model's index of each of the data's classes, found by name: int64 (classes of the data,).

    The model may know more classes than the data has.

    Raises:
        ValueError: The model has no class of such a name, or two.
    """
    if list(data_names) == list(model_names):
        return np.arange(len(data_names))
    index = {name: i for i, name in enumerate(model_names)}
    missing = [name for name in data_names if name not in index]
    if missing:
        near = difflib.get_close_matches(missing[0], model_names, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"the model does not know {len(missing)} of the data's {len(data_names)} classes: {_some(missing)}; it "
            f"knows {len(model_names)}: {_some(model_names)} (nearest to {missing[0]!r}: {near!r}). Give its classes "
            "the data's names with --labels FILE, or choose data of its classes."
        )
    twice = [name for name in data_names if list(model_names).count(name) > 1]
    if twice:
        raise ValueError(f"several of the model's classes are called {twice[0]!r}; tell them apart with --labels FILE.")
    return np.array([index[name] for name in data_names])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + ", ..." * (len(names) > 4)
