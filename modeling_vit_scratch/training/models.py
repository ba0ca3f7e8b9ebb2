"""The model of a run: made from a preset, or trained before; and the image processor that goes with it."""

import logging

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTImageProcessorPil

from ..configuration_vit_scratch import ViTScratchConfig
from ..conversion import convert_checkpoint, image_processor_for
from ..conversion.loading import config_fields, require_unquantized
from ..modeling_vit_scratch import ViTScratchForImageClassification
from .arguments import ModelArguments

logger = logging.getLogger(__name__)


def overridden_fields(arguments: ModelArguments) -> dict:
    """The fields of the config that `config_overrides` and `image_size` name.

    Raises:
        ValueError: The data, training or another option decide one.
    """
    fields = config_fields(arguments.config_overrides)
    for name in fields:
        if name in ("num_labels", "id2label", "label2id"):
            raise ValueError(f"config_overrides: {name} follows from the classes of the data; leave it out.")
        if name in ("return_dict", "output_attentions", "output_hidden_states", "problem_type"):
            raise ValueError(f"config_overrides: training decides {name}; leave it out.")
    if arguments.image_size is not None:
        size = fields.setdefault("image_size", arguments.image_size)
        if size != arguments.image_size:
            raise ValueError(f"image_size ({arguments.image_size}) is {size} in config_overrides; leave out one.")
    return fields


def make_config(arguments: ModelArguments, class_names: list[str]) -> ViTScratchConfig:
    """The preset's config with its overrides, for these classes."""
    overrides = overridden_fields(arguments)
    labels = dict(enumerate(class_names))
    return ViTScratchConfig.preset(
        arguments.preset or "showcase",
        **overrides,
        problem_type="single_label_classification",
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )


def make_processor(
    config: ViTScratchConfig, mean: list[float] | None = None, std: list[float] | None = None
) -> ViTImageProcessorPil:
    """transformers' image processor for this model's size and pixels of this mean and standard deviation."""
    height, width = config.image_hw
    return ViTImageProcessorPil(
        size={"height": height, "width": width}, image_mean=mean, image_std=std, resample=Image.Resampling.BICUBIC
    )


def load_trained(arguments: ModelArguments) -> tuple[ViTScratchForImageClassification, ViTImageProcessorPil]:
    """A trained classifier, ours or converted from another library, and an image processor with its mean and std."""
    name, fields = arguments.model_name_or_path, overridden_fields(arguments)
    where = {"source": arguments.source, "cache_dir": arguments.cache_dir, "token": arguments.token}
    model = convert_checkpoint(name, replace_head=True, **where, **fields)
    require_unquantized(model, name)
    processor = image_processor_for(name, model, **where)
    return model, make_processor(model.config, processor.image_mean, processor.image_std)


def with_classes(model: ViTScratchForImageClassification, class_names: list[str]) -> ViTScratchForImageClassification:
    """The model for these classes: unchanged if it knows them already, else with a new head (all zero)."""
    config = model.config
    if [config.id2label[index] for index in range(config.num_labels)] != class_names:
        logger.warning("The head is new: %d classes instead of %d.", len(class_names), config.num_labels)
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: index for index, name in enumerate(class_names)}
        width = config.representation_size or config.pooled_size
        model.num_labels, model.classifier = config.num_labels, torch.nn.Linear(width, config.num_labels)
        model.classifier.apply(model._init_weights)
    config.problem_type = "single_label_classification"
    return model


def flops_per_image(model: ViTScratchForImageClassification) -> int:
    """Floating-point operations (a multiplication and an addition are two) of a forward pass on one image."""
    config = model.config
    pixels = torch.zeros(1, config.num_channels, *config.image_hw, device=model.device)
    training = model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(pixels, output_attentions=True)  # eager attention: the counter knows matrix products
    model.train(training)
    return counter.get_total_flops()
