"""The model: transformers' ViT as an oracle, and everything the library promises of its own models.

Weights are drawn large, so that attention is far from uniform: near the usual start values a wrong scale does not show.
"""

import math
import re

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

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
# Each choice beyond the ViT of 2021 alone, and then all that go together, with either kind of pooling.
CHOICES = {
    "rope": {"position_embedding_type": "rope"},
    "rope-index": {
        "position_embedding_type": "rope",
        "rope_coordinates": "index",
        "rope_grid_size": 3,
        "rope_offset": 1,
    },
    "rope-mixed": {"position_embedding_type": "rope", "rope_coordinates": "index", "rope_frequencies": "mixed"},
    "learned+rope": {"position_embedding_type": "learned+rope"},
    "no-positions": {"position_embedding_type": "none"},
    "gated-mlp": {"use_gated_mlp": True, "hidden_act": "silu"},
    "embedding-norm": {"use_embedding_norm": True},
    "qk-norm": {"use_qk_norm": True},
    "cls+mean": {"pooling": "cls+mean"},
    "attention-pooling": {"pooling": "attention", "use_cls_token": False},
    "two-cls": {"num_cls_tokens": 2},
    "no-key-bias": {"key_bias": False},
}
SHARED = {"use_gated_mlp": True, "use_embedding_norm": True, "use_qk_norm": True, "key_bias": False}
SHARED |= {"num_register_tokens": 2, "layerscale_value": 0.5}
CHOICES["all"] = {
    **SHARED, "position_embedding_type": "learned+rope", "rope_frequencies": "mixed", "pooling": "cls+mean",
    "num_cls_tokens": 2, "representation_size": 12,
}  # fmt: skip
CHOICES["all-attention-pooling"] = {
    **SHARED, **CHOICES["rope-index"], **CHOICES["attention-pooling"], "norm_after_pooling": True
}  # fmt: skip
CLASSES = [
    ViTScratchModel,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchBackbone,
]
HEADS = [ViTScratchForImageClassification, ViTScratchForMaskedImageModeling]
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__.removeprefix("ViTScratch"))
every_head = pytest.mark.parametrize("cls", HEADS, ids=lambda cls: cls.__name__.removeprefix("ViTScratch"))
every_choice = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
# Where each costs seconds: between them these have every choice.
TOGETHER = {name: CHOICES[name] for name in ("all", "all-attention-pooling")}
all_together = pytest.mark.parametrize("choice", TOGETHER.values(), ids=TOGETHER)
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


NAMES_IN_TRANSFORMERS = {
    "vit.embeddings.cls_token": "vit.embeddings.cls_token",
    "vit.embeddings.mask_token": "vit.embeddings.mask_token",
    "vit.embeddings.position_embeddings": "vit.embeddings.position_embeddings",
    "vit.embeddings.patch_embeddings.projection": "vit.embeddings.patch_embeddings.projection",
    "vit.layers.{}.norm1": "vit.layers.{}.layernorm_before",
    "vit.layers.{}.attention.proj": "vit.layers.{}.attention.o_proj",
    "vit.layers.{}.norm2": "vit.layers.{}.layernorm_after",
    "vit.layers.{}.mlp.fc1": "vit.layers.{}.mlp.fc1",
    "vit.layers.{}.mlp.fc2": "vit.layers.{}.mlp.fc2",
    "vit.norm": "vit.layernorm",
    "classifier": "classifier",
    "decoder": "decoder.0",
}


def weights_for_transformers(model):
    """Our state dict under the names and in the shapes of transformers' ViT."""
    state = {}
    for name, tensor in model.state_dict().items():
        module, kind = (name, "") if name.endswith(("token", "embeddings")) else name.rsplit(".", 1)
        kind = kind and f".{kind}"
        number = "".join(re.findall(r"layers\.(\d+)", module))
        module = re.sub(r"layers\.\d+", "layers.{}", module)
        if module.endswith("qkv"):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[f"vit.layers.{number}.attention.{letter}_proj{kind}"] = part
            continue
        if module.endswith("projection") and kind == ".weight":
            tensor = tensor.reshape(tensor.shape[0], model.config.num_channels, *model.config.patch_hw)
        if module == "decoder" and kind == ".weight":
            tensor = tensor[:, :, None, None]
        state[NAMES_IN_TRANSFORMERS[module].format(number) + kind] = tensor
    return state


def oracle(model, cls=ViTForImageClassification):
    """transformers' own model with the same weights."""
    shared = {name: value for name, value in model.config.to_dict().items() if hasattr(ViTConfig(), name)}
    for name in ("auto_map", "model_type", "architectures", "output_attentions"):
        shared.pop(name, None)
    if isinstance(shared["encoder_stride"], list):  # theirs is one number
        del shared["encoder_stride"]
    theirs = cls(ViTConfig(**shared, attn_implementation="eager")).eval()
    theirs.load_state_dict(weights_for_transformers(model), strict=True)
    return theirs


SIZES = [(2, 3, 16, 16), (3, 3, 32, 8), (1, 3, 20, 24)]


def dynamic():
    """Dimensions of a batch of images of any number and size."""
    batch, h, w = (torch.export.Dim(name, min=1 if name == "batch" else 2, max=32) for name in ("batch", "h", "w"))
    return {0: batch, 2: 4 * h, 3: 4 * w}


def exported_for_any_size(model):
    """The model as a program for images of any number and size, exported from one batch."""
    shapes = {"pixel_values": dynamic(), "interpolate_pos_encoding": None}
    example = {"pixel_values": torch.randn(2, 3, 20, 24), "interpolate_pos_encoding": True}
    return torch.export.export(model, (), example, dynamic_shapes=shapes).module()


class Resized(nn.Module):
    """A function of one tensor, for exporters that know nothing else."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values, interpolate_pos_encoding=True, return_dict=False)[0]
