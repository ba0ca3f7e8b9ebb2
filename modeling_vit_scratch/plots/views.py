"""What a model makes of images, computed once for all figures that show it, and for the page of scripts/demo.py."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers.modeling_outputs import ImageClassifierOutput

from ..data.cuts import Split
from ..data.doctor import evenly
from ..data.sources import load_image
from ..evaluation import Predictor
from ..evaluation.inference import Answers, find_images
from .analysis import attention_distance, attention_on_grid, attention_rollout, pooling_attention

# Pixels, about, on the longer side of an image that maps are drawn over.
SHOWN_SIDE = 448
MAX_TITLE = 40


class ModelView:
    """A model, images, and what it makes of them.

    `pixels` are the images that patches, rollout and heads show, each uint8 (C, H, W) as the model gets it, and
    `titles` their names. An index reads one image of the split.

    Args:
        predictor: The model.
        images: Files, folders, patterns such as "*.jpg", or images opened with PIL; not beside `split`.
        split: Labelled images, from `load_split`.
        max_images: Number of images of the split that go into `pixels`, evenly spaced.
        batch_size: Images at once where the model answers for the whole split.
        on_unreadable: Called with the name of an image that cannot be read and what is wrong with it; the others are
            shown. None raises instead.

    Raises:
        ValueError: An image cannot be read, or none of them; there are both images and a split.
    """

    def __init__(
        self,
        predictor: Predictor,
        images: Sequence[str | Path | Image.Image] = (),
        split: Split | None = None,
        max_images: int = 4,
        batch_size: int = 64,
        on_unreadable: Callable[[str, str], None] | None = None,
    ):
        if split is not None and len(images):
            raise ValueError("name images or a dataset, not both.")
        self.predictor, self.config, self.model = predictor, predictor.config, predictor.model
        self.records, self.data_names = (None, []) if split is None else (split.records, split.class_names)
        self.batch_size = batch_size
        self.pixels, self.titles, self.ratios = [], [], []
        if split is not None:
            some = self.records.select(evenly(len(self.records), max_images))  # folders are sorted by class
            for image in some.images(range(len(some)), self.config.num_channels):
                self._show(image)
            self.titles = [self.data_names[label] for label in some.labels]
        elif len(images):
            self._read(images, on_unreadable)

    def _read(self, images: Sequence[str | Path | Image.Image], on_unreadable: Callable[[str, str], None] | None):
        files = list(_sources(images))
        for name, source, wrong in tqdm(files, desc="Reading", unit="image", delay=2, leave=False):
            try:
                if wrong:
                    raise ValueError(wrong)
                self._show(load_image(source, self.config.num_channels))
            except (ValueError, OSError) as error:
                if on_unreadable is None:
                    raise ValueError(f"{name}: {error}") from error
                on_unreadable(name, str(error))
                continue
            title = Path(name).name
            self.titles.append(title if len(title) <= MAX_TITLE else f"{title[:26]}…{title[-13:]}")
        if not self.pixels:
            raise ValueError(f"none of {len(files)} images could be read.")

    def _show(self, image: Image.Image):
        self.pixels += self.predictor.pixels([image])
        self.ratios.append(image.width / image.height)

    def image_title(self, indices: Sequence[int]) -> str:
        """What stands over those of `pixels`: empty unless one was squeezed or cropped to the model's ratio."""
        H, W = self.config.image_hw
        if all(math.isclose(self.ratios[i], W / H, rel_tol=0.02) for i in indices):
            return ""
        return f"as the model sees it\n({H} × {W})"

    def batch(self, indices: range) -> torch.Tensor:
        """Images of the split: uint8 (B, C, H, W)."""
        return self.predictor.pixels(self.records.images(indices, self.config.num_channels))

    def __getitem__(self, index: int) -> torch.Tensor:
        """One image of the split: uint8 (C, H, W)."""
        return self.batch(range(index, index + 1))[0]

    @cached_property
    def answers(self) -> Answers:
        """What the model says of every image of the split."""
        return self.predictor.answers(self.records, self.data_names, self.batch_size)

    def judgements(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities (n, classes) and labels (n,) of the split.

        Raises:
            ValueError: The model has no trained classifier, or other classes.
        """
        self.predictor.require_classifier()
        return self.answers.probabilities, self.answers.labels

    @property
    def class_names(self) -> list[str]:
        """Of the labels that `answers` has."""
        return self.predictor.class_names if self.predictor.can_classify else self.data_names

    def look(self, pixels: torch.Tensor) -> ImageClassifierOutput:
        """The model's output with attention maps, for a few images: uint8 (B, C, H, W)."""
        return look(self.predictor, pixels)

    def distance(self, most: int = 128) -> torch.Tensor:
        """`attention_distance`, (L, A) pixels, over up to 128 images, as many as in the paper."""
        some = None if self.records is None else self.records.select(evenly(len(self.records), most))
        n = min(most, len(self.pixels)) if some is None else len(some)
        geometry = self.config.grid_hw, self.config.patch_hw, self.config.num_prefix_tokens
        total = 0
        with tqdm(total=n, desc="Measuring", unit="image", delay=2, leave=False) as bar:
            for start in range(0, n, 8):  # maps are large: 22 MB for each image of ViT-B/16
                end = min(start + 8, n)
                if some is None:
                    chunk = torch.stack(self.pixels[start:end])
                else:
                    chunk = self.predictor.pixels(some.images(range(start, end), self.config.num_channels))
                total = total + len(chunk) * attention_distance(self.look(chunk).attentions, *geometry)
                bar.update(len(chunk))
        return total / n


def look(predictor: Predictor, pixels: torch.Tensor) -> ImageClassifierOutput:
    """The model's output for uint8 (B, C, H, W), with all that `on_grid` reads: the maps, and the last state."""
    return predictor(pixels, output_attentions=True, output_hidden_states=[-1])


def on_grid(predictor: Predictor, maps: torch.Tensor, output: ImageClassifierOutput) -> torch.Tensor:
    """`attention_on_grid` of maps (B, ..., T, T) that were made of what `look` gave, as the model pools."""
    config, weights = predictor.config, None
    if config.pooling == "attention":
        weights = pooling_attention(predictor.model.vit, output.hidden_states[-1]).mean(dim=1)  # (B, N)
    geometry = config.grid_hw, config.num_prefix_tokens, config.pooling, config.num_cls_tokens
    return attention_on_grid(maps, *geometry, weights)


def _sources(
    images: Sequence[str | Path | Image.Image],
) -> Iterator[tuple[str, str | Image.Image, str | None]]:
    """The name of each image, where to read it from, and what is wrong if nothing is there."""
    for i, image in enumerate(images):
        if isinstance(image, Image.Image):
            yield f"image {i + 1}", image, None
        else:
            yield from ((name, name, wrong) for name, wrong in find_images([str(image)]))


@dataclass
class ImageView:
    """What the model makes of one image.

    Args:
        shown: The image to draw maps over, uint8 (C, H', W').
        pixels: The image as the model gets it, uint8 (C, H, W).
        answers: The likeliest classes and their probabilities; empty without a classifier.
        rollout: (h, w), see `attention_on_grid`.
        heads: (L, A, h, w), likewise.
        seconds: Time that the model took, and that all took.
    """

    shown: torch.Tensor
    pixels: torch.Tensor
    answers: dict[str, float]
    rollout: torch.Tensor
    heads: torch.Tensor
    seconds: tuple[float, float]


def view_image(predictor: Predictor, image: str | Path | Image.Image, top_k: int = 5) -> ImageView:
    """Show the model an image.

    Raises:
        ValueError: The image cannot be read.
    """
    started = time.perf_counter()
    config = predictor.config
    image = load_image(image, config.num_channels)
    pixels = predictor.pixels([image])
    shown = predictor.pixels([image], enlarge=enlargement(config))[0]
    before = time.perf_counter()
    output = look(predictor, pixels)
    probabilities = predictor.probabilities(output.logits)[0].cpu()
    seconds = time.perf_counter() - before
    best = probabilities.topk(min(top_k, config.num_labels)) if predictor.can_classify else None
    names = predictor.class_names
    return ImageView(
        shown,
        pixels[0],
        {} if best is None else {names[i]: p for p, i in zip(*(part.tolist() for part in best), strict=True)},
        on_grid(predictor, attention_rollout(output.attentions), output)[0].cpu(),
        torch.stack([on_grid(predictor, maps, output)[0].cpu() for maps in output.attentions]),
        (seconds, time.perf_counter() - started),
    )


def enlargement(config) -> int:
    """Pixels shown, on a side, for each that the model gets."""
    return max(1, round(SHOWN_SIDE / max(config.image_hw)))
