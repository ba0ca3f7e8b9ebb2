"""A trained model at work: pictures in, answers out, and how good they are on labelled pictures.

`Predictor` is what predicting, measuring, drawing and serving share. Letters in shape comments are those of
`modeling_vit_scratch`; n pictures.
"""

import copy
import difflib
import glob
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.modeling_outputs import ImageClassifierOutput

from ..conversion import convert_checkpoint, image_processor_for
from ..conversion.loading import own_folder
from ..data.cuts import RunRecord, read_record
from ..data.records import Records
from ..data.sources import images_below
from ..data.splits import bounded_map, progress_bar, to_tensor
from .metrics import (
    ImageClassificationMetrics,
    expected_calibration_error,
    mcnemar_test,
    paired_difference_interval,
    wilson_interval,
)


def find_device(name: str | None = None) -> torch.device:
    """The device of that name ("cpu", "cuda", "cuda:1", "mps"); of None, an accelerator if there is one.

    Raises:
        ValueError: There is no such device, or it cannot be used.
    """
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def find_pictures(patterns: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Paths of pictures in the order given, each with what is wrong if nothing is there.

    Args:
        patterns: Files, folders (their pictures, and those in folders below them), and patterns such as "*.jpg".
    """
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = list(map(str, images_below(path)))
            wrong = "the folder holds no pictures"
        elif path.exists():
            found, wrong = [pattern], None
        else:
            found = [name for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
            wrong = "nothing matches the pattern" if glob.has_magic(pattern) else "there is no such file"
        yield from ((name, None) for name in found) if found else ((pattern, wrong),)


@dataclass
class Answers:
    """What a model says of labelled pictures.

    Args:
        labels: Indices of the model's classes, int64 (n,).
        features: What the classifier sees, `pooler_output`: float32 (n, D).
        probabilities: float32 (n, classes); None if the model has no trained classifier.
        flipped: Of the mean of a picture's logits and its mirror image's (finetune.py's flip_tta), if asked for.
        seconds: It took, reading included.
    """

    labels: torch.Tensor
    features: torch.Tensor
    probabilities: torch.Tensor | None
    flipped: torch.Tensor | None
    seconds: float


class Predictor:
    """A model with its image processor, on a device.

    Args:
        checkpoint: Folder, file or Hub id of ours, or of any model that `convert_checkpoint` reads.
        device: See `find_device`.
        id2label: Names of the classes, in place of the model's own.
        **where: `source` and `revision`, as for `convert_checkpoint`.

    Raises:
        ValueError: The model cannot be had, or the names do not fit it; the device cannot be used.
    """

    def __init__(
        self, checkpoint: str, device: str | None = None, id2label: dict[int, str] | None = None, **where: str | None
    ):
        self.name, self.where, self.device = str(checkpoint), where, find_device(device)
        self.model = convert_checkpoint(checkpoint, id2label=id2label, **where).to(self.device)
        self.config = self.model.config
        # Classifiers start at zero: one that is still there was never trained, or is not in the checkpoint.
        self.can_classify = any(bool(p.any()) for p in self.model.classifier.parameters())

    @cached_property
    def processor(self):
        """The image processor; found when it is first needed: a model without one can still be drawn."""
        return image_processor_for(self.name, self.model, **self.where)

    @cached_property
    def record(self) -> RunRecord | None:
        """What the run that trained the model wrote of its data; None for a model of another library."""
        folder = own_folder(self.name, revision=self.where.get("revision"))
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
        """Pictures as the image processor resizes and crops them, not yet normalised: uint8 (B, C, H, W).

        Args:
            images: Of the model's channels, as `load_image` gives them.
            enlarge: The same part of the picture with so many times the pixels on a side, to be looked at.
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
        """uint8 (B, C, H, W) to what the model takes, on its device: floating point (B, C, H, W)."""
        pixels, processor = pixels.to(self.device).float(), self.processor
        if processor.do_rescale:
            pixels = pixels * processor.rescale_factor
        if processor.do_normalize:
            for_channels = (processor.image_mean, processor.image_std)
            mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in for_channels)
            pixels = (pixels - mean) / std
        return pixels.to(self.model.dtype)

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor, **kwargs) -> ImageClassifierOutput:
        """The model's output for uint8 (B, C, H, W); `kwargs` go to it, e.g. `output_attentions`."""
        return self.model(self.normalise(pixels), **kwargs)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Of each class, float32 (B, classes); each by itself where a picture can have several."""
        several = self.config.problem_type == "multi_label_classification"
        return logits.float().sigmoid() if several else logits.float().softmax(dim=1)

    def _classify(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = self.model.vit(self.normalise(pixels)).pooler_output  # (B, D)
        logits = self.model.classifier(self.model.pre_logits(pooled))  # (B, classes)
        return pooled.float().cpu(), logits.float().cpu()

    @torch.inference_mode()
    def answers(self, records: Records, class_names: list[str], batch_size: int = 64, flip: bool = False) -> Answers:
        """Go through a split; pictures are read in threads meanwhile.

        Args:
            records: The images and labels, from `load_split`.
            class_names: Of the labels; each must be a class of the model, if it classifies.
            batch_size: Pictures at once.
            flip: Whether to look at mirror images too, which takes twice as long.

        Raises:
            ValueError: The model has no class of such a name; a picture cannot be read.
        """
        labels = torch.from_numpy(records.labels)
        if self.can_classify:
            labels = torch.from_numpy(match_classes(class_names, self.class_names))[labels]
        chunks = [range(start, min(start + batch_size, len(records))) for start in range(0, len(records), batch_size)]
        features, plain, mirrored = [], [], []
        started = time.perf_counter()
        with ThreadPoolExecutor(os.cpu_count()) as pool, progress_bar(len(records), "Classifying") as bar:
            read = bounded_map(pool, lambda chunk: self.pixels(records.images(chunk, self.config.num_channels)), chunks)
            for pixels in read:
                pooled, logits = self._classify(pixels)
                features.append(pooled)
                plain.append(self.probabilities(logits))
                if flip:
                    mirrored.append(self.probabilities((logits + self._classify(pixels.flip(3))[1]) / 2))
                bar.update(len(pixels))
        return Answers(
            labels,
            torch.cat(features),
            torch.cat(plain) if self.can_classify else None,
            torch.cat(mirrored) if flip and self.can_classify else None,
            time.perf_counter() - started,
        )

    def throughput(self, batch_size: int = 64, seconds: float = 1.0) -> float:
        """Pictures per second of the model alone: the median of repeated batches, after a first one."""
        pixels = torch.zeros(batch_size, self.config.num_channels, *self.config.image_hw, dtype=torch.uint8)
        times, end = [], None
        while end is None or time.perf_counter() < end or len(times) < 3:
            started = time.perf_counter()
            self(pixels).logits.cpu()  # waits for the device
            if end is None:
                end = time.perf_counter() + seconds
            else:
                times.append(time.perf_counter() - started)
        return batch_size / float(np.median(times))


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


def measure(probabilities: torch.Tensor, labels: torch.Tensor, class_names: Sequence[str]) -> dict:
    """How good answers are, with 95 % intervals (Wilson, 1927) of what is a share of pictures.

    Args:
        probabilities: (n, classes).
        labels: Class indices (n,).
        class_names: Of the model, one for each class.

    Returns:
        "examples"; "accuracy", "top5_accuracy" (1 where there are at most 5 classes), each with "..._interval" (low,
        high), in [0, 1]; "loss", the mean cross-entropy in nats; "mean_confidence" and "expected_calibration_error"
        (15 bins), in [0, 1]; "per_class": name -> "examples", "accuracy", "interval" (of classes with examples);
        "confusion_matrix", counts, rows true, columns predicted; "class_names". JSON can hold it.
    """
    result = ImageClassificationMetrics().compute(predictions=probabilities, references=labels)
    n, confusion = result["examples"], np.array(result["confusion_matrix"])
    own = probabilities[torch.arange(n), labels].double()
    shares = {name: result[name] for name in ("accuracy", "top5_accuracy")}
    intervals = {f"{name}_interval": wilson_interval(round(share * n), n) for name, share in shares.items()}
    counts = zip(class_names, confusion.diagonal().tolist(), confusion.sum(axis=1).tolist(), strict=True)
    return {
        "examples": n,
        **shares,
        **intervals,
        "loss": 0.0 - own.clamp_min(torch.finfo(torch.float32).tiny).log().mean().item(),  # and not -0.0
        "mean_confidence": probabilities.max(dim=1).values.double().mean().item(),
        "expected_calibration_error": expected_calibration_error(probabilities, labels),
        "per_class": {
            name: {"examples": total, "accuracy": right / total, "interval": wilson_interval(right, total)}
            for name, right, total in counts
            if total
        },
        "confusion_matrix": result["confusion_matrix"],
        "class_names": list(class_names),
    }


def compare(a: Answers, b: Answers) -> dict[str, int | float | tuple[float, float]]:
    """Is model A better than model B on the same pictures, or was it luck?

    Returns:
        `mcnemar_test`'s numbers; "difference", A's accuracy less B's, and its 95 % interval "difference_interval",
        by `paired_difference_interval`.
    """
    test = mcnemar_test(*((x.probabilities.argmax(dim=1) == x.labels) for x in (a, b)))
    counts = test["only_a"], test["only_b"], test["examples"]
    return {
        **test,
        "difference": (counts[0] - counts[1]) / counts[2],
        "difference_interval": paired_difference_interval(*counts),
    }
