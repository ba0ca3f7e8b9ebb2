"""The model: transformers' ViT as an oracle, and everything the library promises of its own models.

Weights are drawn large, so that attention is far from uniform: near the usual start values a wrong scale does not show.
"""

import math
import re

import pytest
import torch

from modeling_vit_scratch import (
    ViTScratchBackbone,
    ViTScratchConfig,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchModel,
)

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "num_labels": 5}
TINY |= {"image_size": 16, "patch_size": 4, "encoder_stride": 4}
OBLONG = {**TINY, "image_size": (16, 24), "patch_size": (8, 4), "encoder_stride": (8, 4)}
# Every option that adds tokens, parameters or buffers.
RICH = {**OBLONG, "num_register_tokens": 3, "layerscale_value": 0.5, "pooling": "mean", "representation_size": 12}
FIXED = {**TINY, "position_embedding_type": "sincos", "use_cls_token": False, "pooling": "mean", "qkv_bias": False}
FIXED |= {"stem_channels": [6]}
CONFIGS = {"tiny": TINY, "oblong": OBLONG, "rich": RICH, "fixed": FIXED}
CLASSES = [
    ViTScratchModel,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchBackbone,
]
HEADS = [ViTScratchForImageClassification, ViTScratchForMaskedImageModeling]
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__.removeprefix("ViTScratch"))
every_head = pytest.mark.parametrize("cls", HEADS, ids=lambda cls: cls.__name__.removeprefix("ViTScratch"))
every_config = pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)


def make(cls, fields=TINY, seed=0, **more):
    """A model in evaluation mode whose every parameter is large and random."""
    torch.manual_seed(seed)
    model = cls(ViTScratchConfig(**{**fields, **more})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=1 / math.sqrt(p.shape[-1]) if p.ndim == 2 else 0.5)
            if "qkv" in name and p.ndim == 2:
                p.mul_(2)
            if re.search(r"norm\d?\.weight", name):
                p.add_(1)
    return model


def images(model, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, model.config.num_channels, *model.config.image_hw, generator=generator)


def inputs(model, batch=3, targets=False):
    """Arguments of a call, with what its loss needs."""
    result = {"pixel_values": images(model, batch)}
    if targets and isinstance(model, ViTScratchForImageClassification):
        result["labels"] = torch.arange(batch) % model.num_labels
    if targets and isinstance(model, ViTScratchForMaskedImageModeling):
        count = math.prod(model.config.grid_hw)
        result["bool_masked_pos"] = (torch.arange(batch * count) % 3 == 0).reshape(batch, count)
    return result


def main_output(outputs):
    """What the class is for: features, logits, pixels or maps."""
    for name in ("last_hidden_state", "logits", "reconstruction"):
        if name in outputs:
            return outputs[name]
    return torch.cat([feature_map.flatten(1) for feature_map in outputs.feature_maps], dim=1)


def equal(a, b, atol=0.0):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)
