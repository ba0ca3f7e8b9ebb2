"""Conversion of other libraries' weights: against their own models, or a small reference written here.

Every tensor of every checkpoint is random, and the residual stream is so small (about 1e-3) that another epsilon
changes it; comparisons are in double precision, where a correct conversion agrees to 1e-9 or so.
"""

import json
import logging
import math
import os
import pickle
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
import transformers
from benchmarking.peers import MODULES
from hub_server import Repo
from runs import load_script
from safetensors.torch import load_file, save_file

from modeling_vit_scratch import (
    ViTScratchBackbone,
    ViTScratchConfig,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchModel,
    conversion,
)
from modeling_vit_scratch.conversion import (
    convert_checkpoint,
    export_checkpoint,
    image_processor_for,
    verify_checkpoint,
    verify_export,
)
from modeling_vit_scratch.conversion import loading as loading_module
from modeling_vit_scratch.conversion import planning as planning_module
from modeling_vit_scratch.conversion import reading as reading_module
from modeling_vit_scratch.conversion import recognition as recognition_module
from modeling_vit_scratch.conversion.layouts import FAMILIES
from modeling_vit_scratch.conversion.processors import read_labels

torchvision, timm = MODULES.get("torchvision"), MODULES.get("timm")
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 24, "patch_size": 8}
HEADS = {"num_attention_heads": 4}
CLASSES = 6
# A register's position is added to it in single precision; everything else is exact but for the order of sums.
NEAR, NEAR_WITH_REGISTER_POSITIONS = 1e-8, 1e-4

needs_timm = pytest.mark.skipif(timm is None, reason="timm, or the torchvision it needs, does not import here")
needs_torchvision = pytest.mark.skipif(torchvision is None, reason="torchvision does not import here")


def values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random numbers: a small residual stream, and wide queries, keys, MLPs and classifiers."""
    noise = torch.randn(shape, generator=generator)
    if any(part in name for part in ("norm", "ln_", "encoder.ln", "LayerNorm", "Norm")):
        return noise * 0.3 + (0 if name.endswith("bias") else 1)
    small = (
        "token",
        "cls",
        "pos",
        "patch",
        "conv_proj",
        "embedding",
        "o_proj",
        "output.dense",
        "attn.proj",
        "out_proj",
    )
    small += ("fc2", "linear_2", "mlp.3", "out/kernel", "out/bias", "Dense_1")
    if any(part in name for part in small) and "intermediate" not in name:
        return noise * 2e-3
    return noise * (0.5 if len(shape) > 1 else 1.0)


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(values(name, tuple(parameter.shape), generator))
    return module.eval()


def images(model: ViTScratchForImageClassification, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    config = model.config
    return torch.randn(count, config.num_channels, *config.image_hw, generator=generator, dtype=torch.float64)


@torch.no_grad()
def assert_same(ours: ViTScratchForImageClassification, theirs: torch.nn.Module, **arguments):
    """Equal hidden states after every block, final tokens, and logits where the other model has them."""
    ours, theirs = ours.double(), theirs.double()
    near = NEAR_WITH_REGISTER_POSITIONS if "DeiT" in type(theirs).__name__ else NEAR
    pixels = images(ours)
    expected = theirs(pixels, output_hidden_states=True, **arguments)
    actual = ours(pixels, output_hidden_states=True)
    assert len(expected.hidden_states) == len(actual.hidden_states) == 4
    for state, wanted in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert wanted.abs().max() > 1e-4
        torch.testing.assert_close(state, wanted, atol=near * 1e-3, rtol=0)
    if "logits" in expected and "mask" not in expected:
        assert expected.logits.abs().max() > 0.1
        torch.testing.assert_close(actual.logits, expected.logits, atol=near, rtol=0)
    elif "last_hidden_state" in expected:
        tokens = ours.vit(pixels).last_hidden_state
        torch.testing.assert_close(tokens, expected.last_hidden_state, atol=near, rtol=0)
        if expected.get("pooler_output") is not None and ours.config.representation_size:
            pooled = ours.pre_logits(ours.vit(pixels).pooler_output)
            torch.testing.assert_close(pooled, expected.pooler_output, atol=near, rtol=0)


# --- transformers ----------------------------------------------------------------------------------------------------

OF_TRANSFORMERS = {
    "ViTForImageClassification": ("transformers", transformers.ViTConfig, {"intermediate_size": 48}),
    "ViTModel": ("transformers", transformers.ViTConfig, {"intermediate_size": 48, "pooler_output_size": 20}),
    "ViTForMaskedImageModeling": (
        "transformers", transformers.ViTConfig, {"intermediate_size": 48, "encoder_stride": 8},
    ),
    "DeiTForImageClassification": ("deit", transformers.DeiTConfig, {"intermediate_size": 48}),
    "DeiTModel": ("deit", transformers.DeiTConfig, {"intermediate_size": 48}),
    "Dinov2Model": ("dinov2", transformers.Dinov2Config, {"mlp_ratio": 2}),
    "Dinov2WithRegistersModel": (
        "dinov2_with_registers", transformers.Dinov2WithRegistersConfig, {"mlp_ratio": 2, "num_register_tokens": 3},
    ),
    "ViTMAEModel": ("mae", transformers.ViTMAEConfig, {"intermediate_size": 48, "mask_ratio": 0.0}),
    "ViTMAEForPreTraining": (
        "mae", transformers.ViTMAEConfig,
        {"intermediate_size": 48, "mask_ratio": 0.0, "decoder_num_hidden_layers": 1, "decoder_hidden_size": 16,
         "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16},
    ),
}  # fmt: skip


def of_transformers(name: str, **changes):
    family, config_class, extra = OF_TRANSFORMERS[name]
    fields = {**SIZES, **extra, "num_labels": CLASSES, "layer_norm_eps": 1e-5, **changes}
    return family, randomised(getattr(transformers, name)(config_class(**fields)))


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
@pytest.mark.parametrize("where", ["memory", "folder"])
def test_transformers_classes(name, where, tmp_path, caplog):
    family, theirs = of_transformers(name)
    if where == "memory":  # names as in memory, and no config: heads and epsilon are hints
        ours = convert_checkpoint(theirs.state_dict(), source=family, **HEADS, layer_norm_eps=1e-5)
    else:  # names as on the Hub, and a config
        theirs.save_pretrained(tmp_path)
        assert any(".attention.attention.query." in key for key in load_file(tmp_path / "model.safetensors"))
        ours = convert_checkpoint(tmp_path)
        assert f"({family})" in caplog.text and "Assumed" not in caplog.text
    assert ours.config.layer_norm_eps == 1e-5 and not ours.training
    arguments = {"noise": torch.arange(9).expand(2, -1)} if family == "mae" else {}
    encoder = theirs.vit if name in ("ViTMAEForPreTraining", "ViTForMaskedImageModeling") else theirs
    assert_same(ours, encoder, **arguments)
    if "ForImageClassification" not in name:
        assert "Made a new head" in caplog.text and not ours.classifier.weight.any()
    if name == "ViTModel":
        assert ours.config.representation_size == 20
    if name.startswith("DeiT"):
        assert ours.config.num_register_tokens == 1


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_transformers_families_are_recognised_by_names_alone(name, caplog):
    family, theirs = of_transformers(name)
    if name == "ViTMAEModel":
        family = "transformers"  # without its decoder it has ViT's names
    convert_checkpoint(theirs.state_dict(), **HEADS)
    assert f"({family})" in caplog.text


def test_default_epsilon_is_the_published_one():
    for name, epsilon in {"ViTForImageClassification": 1e-12, "Dinov2Model": 1e-6, "DeiTModel": 1e-12}.items():
        _, theirs = of_transformers(name, layer_norm_eps=epsilon)
        assert_same(convert_checkpoint(theirs.state_dict(), **HEADS), theirs)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu_pytorch_tanh"},
        {"qkv_bias": False},
        {"num_channels": 1},
        {"image_size": [16, 40], "patch_size": [4, 8]},
        {"layer_norm_eps": 1e-12},
    ],
    ids=str,
)
def test_transformers_options_come_from_the_config(changes, tmp_path):
    _, theirs = of_transformers("ViTForImageClassification", **changes)
    theirs.save_pretrained(tmp_path)
    assert_same(convert_checkpoint(tmp_path), theirs)


def test_dinov2_head_on_two_inputs_is_refused_and_its_encoder_is_not(tmp_path, caplog):
    config = transformers.Dinov2Config(**SIZES, mlp_ratio=2, num_labels=CLASSES)
    theirs = randomised(transformers.Dinov2ForImageClassification(config))
    with pytest.raises(ValueError, match=r"head on class token and mean .*classifier\.weight.*num_labels="):
        convert_checkpoint(theirs.state_dict(), **HEADS)
    ours = convert_checkpoint(theirs.state_dict(), num_labels=CLASSES, **HEADS)
    assert "Left out a head on class token" in caplog.text and "Made a new head for 6 classes" in caplog.text
    assert_same(ours, theirs.dinov2)


def test_distilled_heads_are_refused_and_their_encoder_is_not():
    config = transformers.DeiTConfig(**SIZES, intermediate_size=48, num_labels=CLASSES)
    theirs = randomised(transformers.DeiTForImageClassificationWithTeacher(config))
    with pytest.raises(ValueError, match=r"distilled second head.*cls_classifier\.weight"):
        convert_checkpoint(theirs.state_dict(), **HEADS)
    ours = convert_checkpoint(theirs.state_dict(), num_labels=3, **HEADS)
    assert ours.config.num_labels == 3
    assert_same(ours, theirs.deit)
    assert verify_checkpoint(theirs.state_dict(), num_labels=3, **HEADS).passed


def test_pooler_beside_a_classifier_is_left_out_as_transformers_does(caplog):
    _, theirs = of_transformers("ViTForImageClassification")
    state = theirs.state_dict() | {
        "vit.pooler.dense.weight": torch.ones(32, 32),
        "vit.pooler.dense.bias": torch.ones(32),
    }
    assert_same(convert_checkpoint(state, **HEADS, layer_norm_eps=1e-5), theirs)
    assert "Left out the pooler" in caplog.text


def test_the_tanh_layer_can_be_left_out():
    _, theirs = of_transformers("ViTModel")
    ours = convert_checkpoint(theirs.state_dict(), representation_size=None, num_labels=3, **HEADS)
    assert isinstance(ours.pre_logits, torch.nn.Identity) and ours.classifier.weight.shape == (3, 32)


# --- The other layouts: random tensors, and what they compute --------------------------------------------------------


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: values(name, shape, generator) for name, shape in shapes.items()}


def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def timm_tensors(
    D=32, M=48, L=3, patches=9, cls=True, registers=0, positions="cls", scale=None, bias=True, classes=CLASSES, **names
) -> dict[str, torch.Tensor]:
    """A checkpoint with timm's names; `positions` is which tokens before the patches have some."""
    before = {"none": 0, "cls": int(cls), "all": int(cls) + registers}[positions]
    shapes = {"cls_token": (1, 1, D)} if cls else {}
    shapes |= {names.get("register", "reg_token"): (1, registers, D)} if registers else {}
    shapes |= {
        "pos_embed": (1, before + patches, D),
        "patch_embed.proj.weight": (D, 3, 8, 8),
        "patch_embed.proj.bias": (D,),
    }
    for i in range(L):
        block = {**norm("norm1", D), **linear("attn.qkv", D, 3 * D), **linear("attn.proj", D, D), **norm("norm2", D)}
        block |= {**linear("mlp.fc1", D, M), **linear("mlp.fc2", M, D)}
        if not bias:
            del block["attn.qkv.bias"]
        if scale:
            block |= {scale.format(1): (D,), scale.format(2): (D,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    shapes |= norm(names.get("final_norm", "norm"), D) | (linear("head", D, classes) if classes else {})
    return random_tensors(shapes)


def torchvision_tensors(D=32, M=48, L=3, patches=9, representation=None, published=False) -> dict[str, torch.Tensor]:
    first, second = ("mlp.linear_1", "mlp.linear_2") if published else ("mlp.0", "mlp.3")
    shapes = {"class_token": (1, 1, D), "conv_proj.weight": (D, 3, 8, 8), "conv_proj.bias": (D,)}
    shapes |= {"encoder.pos_embedding": (1, 1 + patches, D)}
    for i in range(L):
        block = {
            **norm("ln_1", D),
            "self_attention.in_proj_weight": (3 * D, D),
            "self_attention.in_proj_bias": (3 * D,),
        }
        block |= {**linear("self_attention.out_proj", D, D), **norm("ln_2", D)}
        block |= {**linear(first, D, M), **linear(second, M, D)}
        shapes |= {f"encoder.layers.encoder_layer_{i}.{name}": shape for name, shape in block.items()}
    shapes |= norm("encoder.ln", D)
    shapes |= linear("heads.pre_logits", D, representation) if representation else {}
    return random_tensors(shapes | linear("heads.head", representation or D, CLASSES))


def jax_arrays(
    D=32, M=48, L=3, A=4, patches=9, cls=True, representation=None, big_vision=False
) -> dict[str, np.ndarray]:
    attention, mlp, norm2 = (0, 0, 1) if big_vision else (1, 3, 2)
    positions = "pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"
    shapes = {"cls": (1, 1, D)} if cls else {}
    shapes |= {positions: (1, int(cls) + patches, D), "embedding/kernel": (8, 8, 3, D), "embedding/bias": (D,)}
    for i in range(L):
        start = f"Transformer/encoderblock_{i}/"
        for part in ("query", "key", "value"):
            shapes[f"{start}MultiHeadDotProductAttention_{attention}/{part}/kernel"] = (D, A, D // A)
            shapes[f"{start}MultiHeadDotProductAttention_{attention}/{part}/bias"] = (A, D // A)
        shapes[f"{start}MultiHeadDotProductAttention_{attention}/out/kernel"] = (A, D // A, D)
        shapes[f"{start}MultiHeadDotProductAttention_{attention}/out/bias"] = (D,)
        shapes |= {f"{start}MlpBlock_{mlp}/Dense_0/kernel": (D, M), f"{start}MlpBlock_{mlp}/Dense_0/bias": (M,)}
        shapes |= {f"{start}MlpBlock_{mlp}/Dense_1/kernel": (M, D), f"{start}MlpBlock_{mlp}/Dense_1/bias": (D,)}
        for number in (0, norm2):
            shapes |= {f"{start}LayerNorm_{number}/scale": (D,), f"{start}LayerNorm_{number}/bias": (D,)}
    shapes |= {"Transformer/encoder_norm/scale": (D,), "Transformer/encoder_norm/bias": (D,)}
    if representation:
        shapes |= {"pre_logits/kernel": (D, representation), "pre_logits/bias": (representation,)}
    shapes |= {"head/kernel": (representation or D, CLASSES), "head/bias": (CLASSES,)}
    return {name: tensor.numpy() for name, tensor in random_tensors(shapes).items()}


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * weight + bias


def exact_gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """softmax(q k / sqrt(d)) v for (tokens, heads, d) each."""
    scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(axis=-1, keepdims=True), v)


def patches_of(image: np.ndarray, size: int = 8) -> np.ndarray:
    """(C, H, W) -> (patches, C, size, size), row by row."""
    _, height, width = image.shape
    corners = [(y, x) for y in range(0, height, size) for x in range(0, width, size)]
    return np.stack([image[:, y : y + size, x : x + size] for y, x in corners])


def wide(tensors: dict) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor, dtype=np.float64) for name, tensor in tensors.items()}


def timm_logits(tensors: dict, image: np.ndarray, heads=4, eps=1e-6, gelu=exact_gelu, positions="cls", mean=False):
    """What timm's VisionTransformer computes, written from its paper and documentation."""
    t = wide(tensors)
    x = np.einsum("nchw,dchw->nd", patches_of(image), t["patch_embed.proj.weight"]) + t["patch_embed.proj.bias"]
    cls = [t["cls_token"][0]] if "cls_token" in t else []
    registers = [t[name][0] for name in ("reg_token", "register_tokens") if name in t]
    if positions == "none":
        x = np.concatenate([*cls, *registers, x + t["pos_embed"][0]])
    elif positions == "cls":
        x = np.concatenate([*cls, x]) + t["pos_embed"][0]
        x = np.concatenate([x[: len(cls)], *registers, x[len(cls) :]])
    else:
        x = np.concatenate([*cls, *registers, x]) + t["pos_embed"][0]
    before = len(x) - len(patches_of(image))
    for i in range(3):
        b = {name.removeprefix(f"blocks.{i}."): value for name, value in t.items() if name.startswith(f"blocks.{i}.")}
        scales = [next((b[s.format(n)] for s in ("ls{}.gamma", "gamma_{}") if s.format(n) in b), 1.0) for n in (1, 2)]
        y = layer_norm(x, b["norm1.weight"], b["norm1.bias"], eps)
        qkv = (y @ b["attn.qkv.weight"].T + b.get("attn.qkv.bias", 0)).reshape(len(x), 3, heads, -1)
        y = attend(qkv[:, 0], qkv[:, 1], qkv[:, 2]).reshape(len(x), -1)
        x = x + scales[0] * (y @ b["attn.proj.weight"].T + b["attn.proj.bias"])
        y = layer_norm(x, b["norm2.weight"], b["norm2.bias"], eps)
        y = gelu(y @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]) @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
        x = x + scales[1] * y
    x = layer_norm(x, t["norm.weight"], t["norm.bias"], eps) if "norm.weight" in t else x
    pooled = x[before:].mean(axis=0) if mean else x[0]
    pooled = layer_norm(pooled, t["fc_norm.weight"], t["fc_norm.bias"], eps) if "fc_norm.weight" in t else pooled
    return t["head.weight"] @ pooled + t["head.bias"] if "head.weight" in t else pooled


def torchvision_logits(tensors: dict, image: np.ndarray, heads=4, eps=1e-6, gelu=exact_gelu):
    """What torchvision's VisionTransformer computes."""
    t = wide(tensors)
    x = np.einsum("nchw,dchw->nd", patches_of(image), t["conv_proj.weight"]) + t["conv_proj.bias"]
    x = np.concatenate([t["class_token"][0], x]) + t["encoder.pos_embedding"][0]
    for i in range(3):
        start = f"encoder.layers.encoder_layer_{i}."
        b = {
            name.removeprefix(start).replace("linear_1", "0").replace("linear_2", "3"): t[name]
            for name in t
            if name.startswith(start)
        }
        y = layer_norm(x, b["ln_1.weight"], b["ln_1.bias"], eps)
        weights, biases = np.split(b["self_attention.in_proj_weight"], 3), np.split(b["self_attention.in_proj_bias"], 3)
        q, k, v = ((y @ w.T + c).reshape(len(x), heads, -1) for w, c in zip(weights, biases, strict=True))
        y = attend(q, k, v).reshape(len(x), -1)
        x = x + y @ b["self_attention.out_proj.weight"].T + b["self_attention.out_proj.bias"]
        y = layer_norm(x, b["ln_2.weight"], b["ln_2.bias"], eps)
        x = x + gelu(y @ b["mlp.0.weight"].T + b["mlp.0.bias"]) @ b["mlp.3.weight"].T + b["mlp.3.bias"]
    pooled = layer_norm(x, t["encoder.ln.weight"], t["encoder.ln.bias"], eps)[0]
    if "heads.pre_logits.weight" in t:
        pooled = np.tanh(t["heads.pre_logits.weight"] @ pooled + t["heads.pre_logits.bias"])
    return t["heads.head.weight"] @ pooled + t["heads.head.bias"]


def jax_logits(arrays: dict, image: np.ndarray, eps=1e-6, gelu=tanh_gelu, big_vision=False):
    """What Google's vision_transformer computes, kernel by kernel as flax applies them (nn.gelu: the tanh form)."""
    t = wide(arrays)
    attention, mlp, norm2 = (0, 0, 1) if big_vision else (1, 3, 2)
    pixels = patches_of(image).transpose(0, 2, 3, 1)  # channels last
    x = np.einsum("nhwc,hwcd->nd", pixels, t["embedding/kernel"]) + t["embedding/bias"]
    x = np.concatenate([t["cls"][0], x]) if "cls" in t else x
    x = x + t["pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"][0]
    for i in range(3):
        b = {name.removeprefix(f"Transformer/encoderblock_{i}/"): value for name, value in t.items()}
        a = f"MultiHeadDotProductAttention_{attention}"
        y = layer_norm(x, b["LayerNorm_0/scale"], b["LayerNorm_0/bias"], eps)
        q, k, v = (
            np.einsum("td,dhk->thk", y, b[f"{a}/{part}/kernel"]) + b[f"{a}/{part}/bias"]
            for part in ("query", "key", "value")
        )
        x = x + np.einsum("thk,hkd->td", attend(q, k, v), b[f"{a}/out/kernel"]) + b[f"{a}/out/bias"]
        y = layer_norm(x, b[f"LayerNorm_{norm2}/scale"], b[f"LayerNorm_{norm2}/bias"], eps)
        y = gelu(y @ b[f"MlpBlock_{mlp}/Dense_0/kernel"] + b[f"MlpBlock_{mlp}/Dense_0/bias"])
        x = x + y @ b[f"MlpBlock_{mlp}/Dense_1/kernel"] + b[f"MlpBlock_{mlp}/Dense_1/bias"]
    x = layer_norm(x, t["Transformer/encoder_norm/scale"], t["Transformer/encoder_norm/bias"], eps)
    pooled = x[0] if "cls" in t else x.mean(axis=0)
    if "pre_logits/kernel" in t:
        pooled = np.tanh(pooled @ t["pre_logits/kernel"] + t["pre_logits/bias"])
    return pooled @ t["head/kernel"] + t["head/bias"]


@torch.no_grad()
def assert_logits(ours: ViTScratchForImageClassification, logits_of, pooled: bool = False, near: float = NEAR):
    """Our logits (or pooled tokens) are those that `logits_of` computes for each image."""
    pixels = images(ours)
    ours = ours.double()
    actual = ours.vit(pixels).pooler_output if pooled else ours(pixels).logits
    expected = torch.from_numpy(np.stack([logits_of(image) for image in pixels.numpy()]))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(actual, expected, atol=near, rtol=0)


TIMM_CASES = {
    "plain": ({}, {}, {}),
    "deit3": ({"positions": "none", "scale": "ls{}.gamma"}, {"positions": "none"}, {}),
    "deit3 as published": ({"positions": "none", "scale": "gamma_{}"}, {"positions": "none"}, {}),
    "registers without positions": ({"registers": 4, "positions": "none"}, {"positions": "none"}, {}),
    "registers with positions": ({"registers": 4, "positions": "all"}, {"positions": "all"}, {}),
    "no class token": ({"cls": False, "bias": False, "positions": "none"}, {"positions": "none", "mean": True}, {}),
    "registers, no class token": (
        {"cls": False, "registers": 2, "positions": "none"}, {"positions": "none", "mean": True}, {},
    ),
    "mean pooling": ({}, {"mean": True}, {"pooling": "mean"}),
    "norm after mean pooling": ({"final_norm": "fc_norm"}, {"mean": True}, {}),
    "norm after the class token": ({"final_norm": "fc_norm"}, {}, {"pooling": "cls"}),
    "tanh GELU": ({}, {"gelu": tanh_gelu}, {"hidden_act": "gelu_pytorch_tanh"}),
    "another epsilon": ({}, {"eps": 1e-5}, {"layer_norm_eps": 1e-5}),
    "two heads": ({}, {"heads": 2}, {"num_attention_heads": 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", TIMM_CASES)
def test_timm(case):
    shapes, computed, hints = TIMM_CASES[case]
    tensors = timm_tensors(**shapes)
    ours = convert_checkpoint(tensors, **{**HEADS, **hints})
    near = NEAR_WITH_REGISTER_POSITIONS if case == "registers with positions" else NEAR
    assert_logits(ours, lambda image: timm_logits(tensors, image, **computed), near=near)


@needs_timm
@pytest.mark.parametrize("case", TIMM_CASES)
def test_timm_reference_is_timm(case):
    """The reference above and timm's own model agree, so the tests above are about timm."""
    shapes, computed, hints = TIMM_CASES[case]
    tensors = timm_tensors(**shapes)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=24, patch_size=8, embed_dim=32, depth=3, num_heads=hints.get("num_attention_heads", 4), mlp_ratio=1.5,
        num_classes=CLASSES, qkv_bias=shapes.get("bias", True), class_token=shapes.get("cls", True),
        reg_tokens=shapes.get("registers", 0), no_embed_class=shapes.get("positions") == "none",
        init_values=1.0 if "scale" in shapes else None, global_pool="avg" if computed.get("mean") else "token",
        fc_norm="final_norm" in shapes, act_layer="gelu_tanh" if "gelu" in computed else "gelu",
        norm_layer=lambda *a, **k: torch.nn.LayerNorm(*a, **{**k, "eps": computed.get("eps", 1e-6)}),
    )  # fmt: skip
    state = {name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): t for name, t in tensors.items()}
    model.load_state_dict(state)
    image = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    expected = model.double().eval()(image)[0].detach().numpy()
    np.testing.assert_allclose(timm_logits(tensors, image[0].numpy(), **computed), expected, atol=NEAR)


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("representation", [None, 20])
def test_torchvision(published, representation):
    tensors = torchvision_tensors(published=published, representation=representation)
    ours = convert_checkpoint(tensors, **HEADS)
    assert ours.config.representation_size == representation
    assert_logits(ours, lambda image: torchvision_logits(tensors, image))


@needs_torchvision
def test_torchvision_reference_is_torchvision():
    tensors = torchvision_tensors(representation=20)
    model = torchvision.models.VisionTransformer(24, 8, 3, 4, 32, 48, num_classes=CLASSES, representation_size=20)
    model.load_state_dict(tensors)
    image = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    expected = model.double().eval()(image)[0].detach().numpy()
    np.testing.assert_allclose(torchvision_logits(tensors, image[0].numpy()), expected, atol=NEAR)


@pytest.mark.parametrize("representation", [None, 20])
@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("big_vision", [True, False])
@pytest.mark.parametrize("gelu", [exact_gelu, tanh_gelu])
def test_jax(representation, cls, big_vision, gelu, tmp_path, caplog):
    arrays = jax_arrays(representation=representation, cls=cls, big_vision=big_vision)
    np.savez(
        tmp_path / "vit.npz", **{f"params/{name}" if big_vision else name: array for name, array in arrays.items()}
    )
    ours = convert_checkpoint(tmp_path / "vit.npz", **({} if gelu is tanh_gelu else {"hidden_act": "gelu"}))
    assert ("Assumed the tanh form of GELU" in caplog.text) == (gelu is tanh_gelu)
    assert ours.config.num_attention_heads == 4  # read off the kernels
    assert_logits(ours, lambda image: jax_logits(arrays, image, gelu=gelu, big_vision=big_vision))


@needs_timm
@pytest.mark.parametrize("big_vision", [True, False])
def test_jax_reference_is_what_timm_reads(big_vision, tmp_path):
    arrays = jax_arrays(big_vision=big_vision)
    np.savez(tmp_path / "vit.npz", **arrays)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=24, patch_size=8, embed_dim=32, depth=3, num_heads=4, mlp_ratio=1.5, num_classes=CLASSES,
        act_layer="gelu_tanh",
    )  # fmt: skip
    model.load_pretrained(str(tmp_path / "vit.npz"))
    image = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    expected = model.double().eval()(image)[0].detach().numpy()
    np.testing.assert_allclose(jax_logits(arrays, image[0].numpy(), big_vision=big_vision), expected, atol=NEAR)


def test_jax_heads_that_a_hint_denies():
    with pytest.raises(ValueError, match="num_attention_heads=8, but the tensors say 4"):
        convert_checkpoint(jax_arrays(), num_attention_heads=8)


# --- DeiT, DINO, DINOv2 and MAE as their authors publish them ---------------------------------------------------------


def test_dino_teacher(tmp_path, caplog):
    tensors = timm_tensors(classes=None)
    teacher = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    teacher |= {"head.mlp.0.weight": torch.ones(4, 32), "head.last_layer.weight_v": torch.ones(4, 4)}
    student = {f"module.backbone.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"student": student, "teacher": teacher, "epoch": 3}, tmp_path / "dino.pth")
    ours = convert_checkpoint(tmp_path / "dino.pth", **HEADS)
    assert "Took 'teacher'" in caplog.text and "(dino)" in caplog.text and "DINO's projection head" in caplog.text
    assert_logits(ours, lambda image: timm_logits(tensors, image), pooled=True)
    assert_logits(convert_checkpoint(student, source="dino", **HEADS), lambda i: timm_logits(tensors, i), pooled=True)


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2(registers, caplog):
    tensors = timm_tensors(registers=registers, scale="ls{}.gamma", classes=None, register="register_tokens")
    ours = convert_checkpoint({**tensors, "mask_token": torch.ones(1, 32)}, **HEADS)
    assert f"({'dinov2_with_registers' if registers else 'dinov2'})" in caplog.text
    assert "Left out the mask token" in caplog.text and "Made a new head" in caplog.text
    assert ours.config.num_register_tokens == registers
    assert_logits(ours, lambda image: timm_logits(tensors, image), pooled=True)


def test_mae_and_deit_wrapped_in_model(tmp_path, caplog):
    tensors = timm_tensors(classes=None)
    decoder = {
        "mask_token": torch.ones(1, 1, 8),
        "decoder_embed.weight": torch.ones(8, 32),
        "decoder_pos_embed": torch.ones(1, 10, 8),
    }
    torch.save({"model": tensors | decoder}, tmp_path / "mae.pth")
    torch.save({"model": tensors}, tmp_path / "encoder.pth")
    for name in ("mae.pth", "encoder.pth"):
        ours = convert_checkpoint(tmp_path / name, **HEADS)
        assert "(mae)" in caplog.text and ("Left out the pre-training decoder" in caplog.text) == (name == "mae.pth")
        assert_logits(ours, lambda image: timm_logits(tensors, image), pooled=True)
        caplog.clear()
    tensors = timm_tensors()
    torch.save({"model": {f"module.{name}": tensor for name, tensor in tensors.items()}}, tmp_path / "deit.pth")
    ours = convert_checkpoint(tmp_path / "deit.pth", **HEADS)
    assert "(deit)" in caplog.text
    assert image_processor_for(tmp_path / "deit.pth", ours).image_mean[0] == 0.485  # not timm's 0.5
    assert_logits(ours, lambda image: timm_logits(tensors, image))


def test_mae_fine_tuned(tmp_path, caplog):
    """MAE's own fine-tuning puts the norm after the mean of the patches."""
    tensors = timm_tensors(final_norm="fc_norm")
    torch.save({"model": tensors}, tmp_path / "mae_finetuned.pth")
    ours = convert_checkpoint(tmp_path / "mae_finetuned.pth", **HEADS)
    assert "(mae)" in caplog.text and ours.config.norm_after_pooling
    assert_logits(ours, lambda image: timm_logits(tensors, image, mean=True))


def test_timm_distilled_deit():
    tensors = timm_tensors(registers=1, register="dist_token", positions="all") | {
        "head_dist.weight": torch.ones(CLASSES, 32), "head_dist.bias": torch.ones(CLASSES),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"distilled second head.*head_dist\.weight"):
        convert_checkpoint(tensors, **HEADS)
    assert convert_checkpoint(tensors, num_labels=3, **HEADS).config.num_register_tokens == 1


# --- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin", "legacy .bin", ".npz", "sharded"])
def test_every_kind_of_file(suffix, tmp_path):
    tensors = timm_tensors()
    path = tmp_path / f"weights{suffix.removeprefix('legacy ')}"
    if suffix == ".safetensors":
        save_file(tensors, path)
    elif suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif suffix == "sharded":
        names = list(tensors)
        halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, part in halves.items():
            save_file({name: tensors[name] for name in part}, tmp_path / file)
        index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        path = tmp_path
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=not suffix.startswith("legacy"))
    ours = convert_checkpoint(str(path), **HEADS)
    assert_logits(ours, lambda image: timm_logits(tensors, image))


def test_half_precision_becomes_float32(caplog):
    tensors = {name: tensor.bfloat16() for name, tensor in timm_tensors().items()}
    ours = convert_checkpoint(tensors, **HEADS)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert "Weights of bfloat16 became float32" in caplog.text
    assert_logits(ours, lambda image: timm_logits({n: t.float() for n, t in tensors.items()}, image))


def test_the_model_does_not_share_memory_with_the_state_dict():
    tensors = timm_tensors()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    ours = convert_checkpoint(tensors, **HEADS)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert all(parameter.requires_grad for parameter in ours.parameters())
    assert all(torch.equal(tensors[name], before[name]) for name in before)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": timm_tensors(), "args": Evil()}, "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth.*nothing else is unpickled"):
        convert_checkpoint("evil.pth")
    with open("evil.bin", "wb") as file:
        pickle.dump(Evil(), file)
    with pytest.raises(ValueError, match=r"evil\.bin"):
        convert_checkpoint("evil.bin")
    np.savez("evil.npz", **{"embedding/kernel": np.array([Evil()], dtype=object)}, allow_pickle=True)
    with pytest.raises(ValueError, match=r"evil\.npz"):
        convert_checkpoint("evil.npz")
    assert not os.path.exists("evil")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"\x00" * 64, b"PK\x03\x04 torn", b"{}"])
def test_a_file_that_is_no_checkpoint(suffix, content, tmp_path):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\."):
        convert_checkpoint(path)


def test_torn_files(tmp_path):
    save_file(timm_tensors(), tmp_path / "whole.safetensors")
    np.savez(tmp_path / "whole.npz", **jax_arrays())
    torch.save(timm_tensors(), tmp_path / "whole.pt")
    for whole in list(tmp_path.iterdir()):
        torn = whole.with_stem("torn")
        torn.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        with pytest.raises(ValueError, match=r"torn\."):
            convert_checkpoint(torn, **HEADS)


@pytest.mark.parametrize("kind", ["V2", ">f4", "object"])  # V2: bfloat16, as numpy saves it
def test_arrays_that_torch_cannot_hold_are_named(kind, tmp_path):
    np.savez(tmp_path / "odd.npz", **{name: array.astype(kind) for name, array in jax_arrays().items()})
    with pytest.raises(ValueError, match="embedding/kernel cannot be read"):
        convert_checkpoint(tmp_path / "odd.npz")


def test_a_damaged_array_is_named(tmp_path):
    np.savez(tmp_path / "whole.npz", **jax_arrays())
    content = bytearray((tmp_path / "whole.npz").read_bytes())
    content[content.index(jax_arrays()["cls"].tobytes())] ^= 1
    (tmp_path / "damaged.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"cls cannot be read: Bad CRC-32"):
        convert_checkpoint(tmp_path / "damaged.npz")


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({}, "holds no named tensors"),
        ({"a": 1}, "no state dict"),
        ({"model": {}}, "holds no named tensors"),
        ({"layer1.0.conv1.weight": torch.ones(3)}, "was not recognised"),
        ({"patch_embed.proj.weight": torch.ones(4, 3, 2, 2)}, "no blocks"),
        ("no/such/file.safetensors", "no file or folder"),
        ("weights.npz", "no file or folder"),
        ("no/such/folder", "no file or folder"),
    ],
    ids=str,
)
def test_what_is_no_checkpoint(checkpoint, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(checkpoint)


def test_a_folder_without_or_with_two_files_of_weights(tmp_path):
    with pytest.raises(ValueError, match="must hold one file of weights, found none"):
        convert_checkpoint(tmp_path)
    for name in ("a.pth", "b.pth"):
        torch.save(timm_tensors(), tmp_path / name)
    with pytest.raises(ValueError, match=r"found a\.pth, b\.pth"):
        convert_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="by its name"):
        convert_checkpoint(tmp_path / "notes.txt")


def test_own_weights_without_their_config_are_refused():
    own = ViTScratchForImageClassification(ViTScratchConfig(**SIZES, intermediate_size=48))
    with pytest.raises(ValueError, match=r"this package's own.*config\.json beside them, and no source"):
        convert_checkpoint(own.state_dict())


# --- What does not fit -----------------------------------------------------------------------------------------------


def test_every_misfit_is_listed_with_its_number():
    tensors = timm_tensors()
    for name in ("norm.weight", "blocks.1.attn.qkv.bias", "head.bias"):
        del tensors[name]
    tensors |= {"odd.one": torch.ones(2), "odd.two": torch.ones(2)}
    tensors["blocks.2.mlp.fc1.weight"] = torch.ones(47, 32)
    tensors["blocks.0.norm1.bias"][3] = float("nan")
    tensors["pos_embed"][0, 2, 1] = float("inf")
    with pytest.raises(ValueError) as caught:
        convert_checkpoint(tensors, **HEADS)
    text = str(caught.value)
    assert "missing are 3 (blocks.1.attn.qkv.bias, norm.weight, head.bias)" in text
    assert "left over are 2 (odd.one, odd.two)" in text
    assert "misshapen are 1 (blocks.2.mlp.fc1.weight (47, 32) instead of (48, 32))" in text
    assert "not finite are 2 (pos_embed, blocks.0.norm1.bias)" in text


def test_only_the_first_ten_names_are_listed():
    tensors = timm_tensors() | {f"odd.{i:02}": torch.ones(2) for i in range(13)}
    with pytest.raises(ValueError, match=r"left over are 13 \(odd\.00, .*odd\.09, \.\.\.\)"):
        convert_checkpoint(tensors, **HEADS)


@pytest.mark.parametrize("layout", ["transformers", "timm", "torchvision", "jax"])
def test_each_tensor_is_needed(layout):
    tensors = {
        "transformers": lambda: of_transformers("ViTForImageClassification")[1].state_dict(),
        "timm": lambda: timm_tensors(scale="ls{}.gamma"),
        "torchvision": lambda: torchvision_tensors(representation=20),
        "jax": lambda: jax_arrays(representation=20),
    }[layout]()
    wholes = {"cls_token", "cls"}  # without a class token it is another, whole model, whose positions do not fit
    for name in tensors:
        rest = {key: value for key, value in tensors.items() if key != name}
        with pytest.raises(ValueError) as caught:
            convert_checkpoint(rest, **HEADS)
        if name not in wholes and "patch_embed" not in name and not name.startswith(("embedding", "conv_proj")):
            assert name.replace("vit.", "") in str(caught.value) or "left over" in str(caught.value)


@pytest.mark.parametrize("layout", ["transformers", "dinov2", "timm", "torchvision", "jax"])
def test_each_shape_is_checked(layout):
    tensors = {
        "transformers": lambda: of_transformers("ViTModel")[1].state_dict(),
        "dinov2": lambda: of_transformers("Dinov2WithRegistersModel")[1].state_dict(),
        "timm": lambda: timm_tensors(L=1, scale="ls{}.gamma", registers=2, positions="all"),
        "torchvision": lambda: torchvision_tensors(L=1, representation=20),
        "jax": lambda: jax_arrays(L=1, representation=20),
    }[layout]()
    for name, tensor in tensors.items():
        if "mask_token" in name or ("layers.0." not in name and "layer.0." not in name and "layer" in name):
            continue  # unused, or of a later block
        tensor = torch.as_tensor(tensor)
        for wrong in (tensor.flatten()[0], tensor.flatten(), tensor[None, None], torch.cat([tensor, tensor], dim=-1)):
            longer_patch = wrong.ndim == 4 and "proj" in name  # another whole model
            if wrong.shape == tensor.shape or longer_patch or name.endswith(("query/bias", "key/bias", "value/bias")):
                continue  # Google's biases may come flat: they hold the same
            try:
                convert_checkpoint({**tensors, name: wrong}, **HEADS)
            except ValueError:
                continue
            raise AssertionError(f"{name} {tuple(wrong.shape)} instead of {tuple(tensor.shape)} was taken.")


def test_a_name_that_is_there_twice():
    tensors = timm_tensors()
    twice = {f"backbone.{name}": tensor for name, tensor in tensors.items()} | {"norm.weight": torch.ones(32)}
    with pytest.raises(ValueError, match=r"norm\.weight twice"):
        convert_checkpoint(twice, **HEADS)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("blocks.0.mlp.w12.weight", "SwiGLU"),
        ("blocks.0.mlp.w3.weight", "SwiGLU"),
        ("blocks.0.mlp.fc1_g.weight", "SwiGLU"),
        ("norm_pre.weight", "before the first block"),
        ("attn_pool.latent.weight", "attention pooling"),
        ("blocks.0.attn.q_norm.weight", "normalised queries"),
        ("blocks.0.attn.q_bias", "without a key bias"),
        ("blocks.0.attn.relative_position_bias_table", "relative or rotary"),
        ("patch_embed.backbone.stem.conv.weight", "convolutional stem"),
        ("blocks.0.attns.0.norm.weight", "parallel blocks"),
        ("blocks.0.attn.norm.weight", "norms inside"),
    ],
)
def test_what_the_model_has_not_is_refused_by_name(name, what):
    with pytest.raises(ValueError, match=f"{what}.*{name}".replace(".", r"\.").replace(r"\.*", ".*")):
        convert_checkpoint(timm_tensors() | {name: torch.ones(3)}, **HEADS)


@pytest.mark.parametrize(
    "names",
    [
        ["vision_model.pre_layrnorm.weight", "vision_model.embeddings.patch_embedding.weight"],
        ["visual.ln_pre.weight", "visual.conv1.weight"],
        ["Transformer/encoderblock/LayerNorm_0/scale", "embedding/kernel"],
        ["embedding/kernel", "MAPHead_0/probe"],
        ["conv_proj.conv_last.weight", "conv_proj.conv_bn_relu_0.0.weight"],
    ],
    ids=lambda names: names[0],
)
def test_towers_of_other_kinds_are_refused_by_name(names):
    with pytest.raises(ValueError, match="which this model has not"):
        convert_checkpoint({name: torch.ones(3, 3, 3, 3) for name in names})


def test_swiglu_is_refused_in_every_spelling():
    config = transformers.Dinov2Config(**SIZES, mlp_ratio=2, use_swiglu_ffn=True)
    with pytest.raises(ValueError, match="SwiGLU"):
        convert_checkpoint(transformers.Dinov2Model(config).state_dict(), **HEADS)
    packed = timm_tensors()
    for i in range(3):
        packed[f"blocks.{i}.mlp.fc1.weight"], packed[f"blocks.{i}.mlp.fc1.bias"] = torch.ones(96, 32), torch.ones(96)
    with pytest.raises(ValueError, match="SwiGLU"):
        convert_checkpoint(packed, **HEADS)


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        ({"hidden_size": 64}, "hidden_size=64, but the tensors say 32"),
        ({"patch_size": 16}, "patch_size=16, but the tensors say 8"),
        ({"num_hidden_layers": 12}, "num_hidden_layers=12, but the tensors say 3"),
        ({"num_attention_heads": 5}, "must be divisible by num_attention_heads"),
        ({"heads": 4}, "'heads' is not a field"),
        ({"hidden_act": "gelu_"}, "hidden_act"),
        ({"grid_size": (2, 4)}, "10 positions, which do not fit 2 x 4 patches"),
    ],
    ids=str,
)
def test_hints_that_cannot_be(hints, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(timm_tensors(), **{**HEADS, **hints})


def test_sources_that_cannot_be():
    with pytest.raises(ValueError, match="'keras' is unknown; use one of transformers, timm"):
        convert_checkpoint(timm_tensors(), "keras")
    with pytest.raises(ValueError, match="source='torchvision', but the state dict has timm's names"):
        convert_checkpoint(timm_tensors(), "torchvision")


def test_a_config_that_contradicts_the_tensors(tmp_path):
    _, theirs = of_transformers("ViTForImageClassification")
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value, message in [
        ("hidden_size", 64, r"config\.json says hidden_size=64"),
        ("image_size", 32, "10 positions, which do not fit 4 x 4 patches"),
        ("image_size", "big", "image_size='big', which is neither a number nor"),
        ("model_type", "swin", "model_type 'swin'"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no JSON file"):
        convert_checkpoint(tmp_path)


def test_heads(caplog):
    with pytest.raises(ValueError, match="width 32 is no multiple of 64; pass num_attention_heads="):
        convert_checkpoint(timm_tensors())
    assert convert_checkpoint(timm_tensors(D=128, L=1)).config.num_attention_heads == 2
    assert "Assumed 2 heads of 64 channels" in caplog.text


@pytest.mark.slow
def test_heads_of_vit_huge_are_the_published_ones():
    assert convert_checkpoint(timm_tensors(D=1280, M=8, L=1)).config.num_attention_heads == 16


# --- Resolution, classes, labels -------------------------------------------------------------------------------------


def test_a_grid_that_is_no_square():
    tensors = timm_tensors(patches=10)
    with pytest.raises(ValueError, match="no square grid"):
        convert_checkpoint(tensors, **HEADS)
    ours = convert_checkpoint(tensors, grid_size=(2, 5), **HEADS)
    assert ours.config.image_size == (16, 40)
    assert_logits(ours, lambda image: timm_logits(tensors, image))


@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "DeiTForImageClassification", "Dinov2Model", "Dinov2WithRegistersModel"]
)
@pytest.mark.parametrize("size", [40, (16, 48)])
def test_positions_are_resized_as_the_family_does(name, size, tmp_path, caplog):
    _, theirs = of_transformers(name)
    theirs.save_pretrained(tmp_path)
    ours = convert_checkpoint(tmp_path, image_size=size)
    assert ours.config.image_hw == (size if isinstance(size, tuple) else (size, size))
    assert "Resized the positions from 3x3 to" in caplog.text
    extra = {} if name.startswith("Dinov2") else {"interpolate_pos_encoding": True}
    pixels = images(ours).float()
    with torch.no_grad():  # in single precision, in which DINOv2 resizes
        expected, actual = theirs(pixels, output_hidden_states=True, **extra), ours(pixels, output_hidden_states=True)
    for state, wanted in zip(actual.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state, wanted, atol=1e-6, rtol=1e-4)


def positions_of(kind: str, side: int = 6, D: int = 32) -> torch.Tensor:
    """(1, 1 + side * side, D): a class token's, and those of a square grid, as in a trained model or of white noise."""
    generator = torch.Generator().manual_seed(2)
    positions = torch.randn(1, 1 + side * side, D, generator=generator)
    if kind == "smooth":
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        waves = torch.rand(2, D, 1, 1, generator=generator) / side * 3
        positions[0, 1:] = torch.sin(waves[0] * x + waves[1] * y).flatten(1).T
    return positions


def resized_as_torch_does(positions: torch.Tensor, **how) -> torch.Tensor:
    """As `torch.nn.functional.interpolate` does it, with what the library passes to it."""
    side = math.isqrt(positions.shape[1] - 1)
    patches = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(patches, mode="bicubic", **how)
    return torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def resized_by_meta(positions: torch.Tensor, grid: tuple[int, int], offset: float, antialias: bool) -> torch.Tensor:
    """The arithmetic of interpolate_pos_encoding in facebookresearch/dinov2, dinov2/models/vision_transformer.py.

    hub/backbones.py makes the models with offset 0.1 and no antialiasing, those with registers with 0.0 and with it;
    facebookresearch/dino, vision_transformer.py, has 0.1 written into it.
    """
    side = math.isqrt(positions.shape[1] - 1)
    if not offset:
        return resized_as_torch_does(positions, size=grid, antialias=antialias)
    scales = tuple((count + offset) / side for count in grid)
    return resized_as_torch_does(positions, scale_factor=scales, antialias=antialias)


def resized_by_google(positions: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The call of load_pretrained in google-research/vision_transformer, vit_jax/checkpoint.py."""
    side = math.isqrt(positions.shape[1] - 1)
    patches = positions[0, 1:].numpy().reshape(side, side, -1)
    patches = scipy.ndimage.zoom(patches, (grid[0] / side, grid[1] / side, 1), order=1)
    return torch.cat([positions[:, :1], torch.from_numpy(patches).reshape(1, grid[0] * grid[1], -1)], dim=1)


def resized_by_torchvision(positions: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    state = {"encoder.pos_embedding": positions}
    return torchvision.models.vision_transformer.interpolate_embeddings(8 * grid[0], 8, state)["encoder.pos_embedding"]


def meta_tensors(registers: int, **changes) -> dict[str, torch.Tensor]:
    tensors = timm_tensors(registers=registers, scale="ls{}.gamma", classes=None, register="register_tokens", **changes)
    return {**tensors, "mask_token": torch.ones(1, 32)}


# By source: a checkpoint of 6 x 6 patches, the name of its positions, and the library's own resizing.
RESIZED = {
    "timm": (timm_tensors, "pos_embed", lambda p, grid: timm.layers.resample_abs_pos_embed(p, list(grid))),
    "torchvision": (torchvision_tensors, "encoder.pos_embedding", resized_by_torchvision),
    "jax": (jax_arrays, "Transformer/posembed_input/pos_embedding", resized_by_google),
    "dino": (partial(timm_tensors, classes=None), "pos_embed", partial(resized_by_meta, offset=0.1, antialias=False)),
    "dinov2": (partial(meta_tensors, 0), "pos_embed", partial(resized_by_meta, offset=0.1, antialias=False)),
    "dinov2_with_registers": (
        partial(meta_tensors, 4), "pos_embed", partial(resized_by_meta, offset=0.0, antialias=True),
    ),
    # interpolate_pos_embed in facebookresearch/mae, util/pos_embed.py, and main.py of facebookresearch/deit
    "mae": (timm_tensors, "pos_embed", lambda p, grid: resized_as_torch_does(p, size=grid, align_corners=False)),
    "deit": (timm_tensors, "pos_embed", lambda p, grid: resized_as_torch_does(p, size=grid, align_corners=False)),
}  # fmt: skip
OWN_LIBRARY = {"timm": [needs_timm], "torchvision": [needs_torchvision]}


@pytest.mark.parametrize("size", [32, 80, (24, 96), (48, 40)], ids=str)
@pytest.mark.parametrize("kind", ["smooth", "random"])
@pytest.mark.parametrize("source", [pytest.param(source, marks=OWN_LIBRARY.get(source, ())) for source in RESIZED])
def test_positions_are_resized_by_the_library_of_the_source(source, kind, size):
    """At load, and at run time, to the bit the same."""
    if source == "torchvision" and isinstance(size, tuple):
        size = 56  # its function knows squares alone
    make, name, resize = RESIZED[source]
    positions = positions_of(kind)
    tensors = {**make(patches=36), name: positions}
    if source == "jax":
        tensors[name] = positions.numpy()
    ours, resized = (convert_checkpoint(tensors, source, **HEADS, **more) for more in ({}, {"image_size": size}))
    grid = resized.config.grid_hw
    there = resized.vit.embeddings.position_embeddings
    torch.testing.assert_close(there, resize(positions.clone(), grid), atol=2e-5, rtol=0)
    assert torch.equal(ours.vit.embeddings.interpolate_pos_encoding(grid), there)
    pixels = images(resized).float()
    with torch.no_grad():
        assert torch.equal(ours(pixels, interpolate_pos_encoding=True).logits, resized(pixels).logits)
    assert ours.config.position_interpolation == resized.config.position_interpolation
    others = {"bicubic", "bicubic_antialias", "bicubic_align_corners", "bicubic_offset", "bilinear_align_corners"}
    for other in others - {ours.config.position_interpolation}:
        hints = {**HEADS, "image_size": size, "position_interpolation": other}
        elsewhere = convert_checkpoint(tensors, source, **hints).vit.embeddings.position_embeddings
        if not ("antialias" in ours.config.position_interpolation + other and 80 == size):
            assert (elsewhere - there).abs().max() > 1e-3, other  # the comparison could tell


@needs_timm
@pytest.mark.parametrize("size", [(32, 32), (24, 80)], ids=str)
def test_timm_computes_the_same_at_another_size(size):
    """timm resizes at run time too, and its file of the larger model is what it resizes at load."""
    tensors = {**timm_tensors(patches=36), "pos_embed": positions_of("random")}
    shared = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 1.5, "num_classes": CLASSES}
    dynamic = timm.models.VisionTransformer(img_size=48, dynamic_img_size=True, **shared).eval()
    dynamic.load_state_dict(tensors)
    larger = timm.models.VisionTransformer(img_size=size, **shared).eval()
    larger.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(dict(tensors), larger))
    ours = convert_checkpoint(tensors, image_size=size, **HEADS)
    pixels = images(ours).float()
    with torch.no_grad():
        for theirs in (dynamic, larger):
            torch.testing.assert_close(ours(pixels).logits, theirs(pixels), atol=1e-3, rtol=1e-4)


@needs_torchvision
def test_torchvision_computes_the_same_at_another_size():
    tensors = {**torchvision_tensors(patches=36), "encoder.pos_embedding": positions_of("random")}
    theirs = torchvision.models.VisionTransformer(32, 8, 3, 4, 32, 48, num_classes=CLASSES).eval()
    theirs.load_state_dict(torchvision.models.vision_transformer.interpolate_embeddings(32, 8, dict(tensors)))
    ours = convert_checkpoint(tensors, **HEADS)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = ours(pixels, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(logits, theirs(pixels), atol=1e-3, rtol=1e-4)


def test_transformers_classes_resize_their_own_way():
    """facebook's DINO and DINOv2 as transformers' classes have no offset, which Meta's code has."""
    for name, source, how in [
        ("ViTForImageClassification", "dino", "bicubic"),
        ("Dinov2Model", "dinov2", "bicubic"),
        ("Dinov2WithRegistersModel", "dinov2_with_registers", "bicubic_antialias"),
        ("ViTMAEModel", "mae", "bicubic"),
        ("DeiTModel", "deit", "bicubic"),
    ]:
        ours = convert_checkpoint(of_transformers(name)[1].state_dict(), source, **HEADS)
        assert ours.config.position_interpolation == how


@pytest.mark.parametrize(
    ("architecture", "how"),
    [
        ("vit_base_patch16_224", "bicubic_antialias"),
        ("flexivit_small", "bilinear"),
        ("vit_base_patch16_radio_v3_224", "bilinear_align_corners"),
    ],
)
def test_timm_architectures_that_resize_another_way(architecture, how, tmp_path):
    ours = convert_checkpoint(timm_folder(tmp_path, architecture=architecture), use_final_norm=True)
    assert ours.config.position_interpolation == how


def test_a_library_that_resizes_another_way_is_named(caplog):
    _, model = to_export("timm")
    export_checkpoint(model, "timm")
    assert "For images of another size timm resizes positions as 'bicubic_antialias', this model as" in caplog.text
    model.config.position_interpolation = "bicubic_antialias"
    caplog.clear()
    export_checkpoint(model, "timm")
    assert "resizes positions" not in caplog.text


def test_own_folder_keeps_the_way_of_its_source(tmp_path):
    """A folder that was saved after fine-tuning goes on as it began."""
    tensors = {**timm_tensors(patches=36), "pos_embed": positions_of("random")}
    convert_checkpoint(tensors, num_labels=3, image_size=32, **HEADS).save_pretrained(tmp_path)
    ours, resized = convert_checkpoint(tmp_path), convert_checkpoint(tmp_path, image_size=80)
    assert ours.config.position_interpolation == resized.config.position_interpolation == "bicubic_antialias"
    there = resized.vit.embeddings.position_embeddings
    assert torch.equal(ours.vit.embeddings.interpolate_pos_encoding((10, 10)), there)


def test_the_same_resolution_is_no_change(caplog):
    convert_checkpoint(timm_tensors(), image_size=24, num_labels=CLASSES, **HEADS)
    assert "Resized" not in caplog.text and "new head" not in caplog.text
    with pytest.raises(ValueError, match="must be divisible by patch_size"):
        convert_checkpoint(timm_tensors(), image_size=30, **HEADS)


def test_other_classes_make_the_head_anew(caplog):
    tensors = timm_tensors()
    old, new = convert_checkpoint(tensors, **HEADS), convert_checkpoint(tensors, num_labels=3, **HEADS)
    assert "Made a new head for 3 classes" in caplog.text
    assert new.classifier.weight.shape == (3, 32) and not new.classifier.weight.any() and not new.classifier.bias.any()
    assert new.classifier.weight.requires_grad and new.config.id2label == {i: f"LABEL_{i}" for i in range(3)}
    for name, tensor in old.vit.state_dict().items():
        assert torch.equal(tensor, new.vit.state_dict()[name])
    with pytest.raises(ValueError, match=r"num_labels \(-3\) must be at least 0"):
        convert_checkpoint(tensors, num_labels=-3, **HEADS)


def test_labels(tmp_path, caplog):
    names = {i: f"class {i}" for i in range(CLASSES)}
    ours = convert_checkpoint(timm_tensors(), id2label=names, **HEADS)
    assert ours.config.id2label == names and ours.config.label2id["class 2"] == 2 and ours.classifier.weight.any()
    with pytest.raises(ValueError, match=r"id2label names 2 classes, but there are 6.*num_labels=2"):
        convert_checkpoint(timm_tensors(), id2label={0: "a", 1: "b"}, **HEADS)
    two = convert_checkpoint(timm_tensors(), id2label={0: "a", 1: "b"}, num_labels=2, **HEADS)
    assert two.config.id2label == {0: "a", 1: "b"} and not two.classifier.weight.any()
    headless = convert_checkpoint(timm_tensors(classes=None), id2label={0: "a", 1: "b", 2: "c"}, **HEADS)
    assert headless.config.num_labels == 3

    _, theirs = of_transformers("ViTForImageClassification", id2label=names)
    theirs.save_pretrained(tmp_path)
    assert convert_checkpoint(tmp_path).config.id2label == names
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": {0: "a", 1: "b"}}))
    assert convert_checkpoint(tmp_path).config.id2label == {i: f"LABEL_{i}" for i in range(CLASSES)}
    assert "names 2 classes, the head has 6" in caplog.text


def test_label_files(tmp_path):
    (tmp_path / "labels.txt").write_text("cat\ndog\n\n")
    (tmp_path / "list.json").write_text('["cat", "dog"]')
    (tmp_path / "object.json").write_text('{"1": "dog", "0": "cat"}')
    for name in ("labels.txt", "list.json", "object.json"):
        assert read_labels(tmp_path / name) == {0: "cat", 1: "dog"}
    for name, content in {"a.json": '{"1": "dog"}', "b.json": "[", "c.txt": "", "d.json": '"cat"'}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            read_labels(tmp_path / name)
    with pytest.raises(ValueError, match="cannot be read"):
        read_labels(tmp_path / "none.txt")


# --- Our own folders, and the Hub ------------------------------------------------------------------------------------


@pytest.fixture
def own():
    config = ViTScratchConfig(
        **SIZES, intermediate_size=48, num_labels=CLASSES, num_register_tokens=2, layerscale_value=0.1
    )
    return randomised(ViTScratchForImageClassification(config))


def test_own_folder(own, tmp_path, caplog):
    own.save_pretrained(tmp_path)
    same = convert_checkpoint(tmp_path)
    fields = ViTScratchConfig.__dataclass_fields__
    assert all(getattr(same.config, name) == getattr(own.config, name) for name in fields if name in SIZES)
    assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in same.state_dict().items())
    other = convert_checkpoint(tmp_path / "model.safetensors", image_size=(16, 48), num_labels=3, drop_path_rate=0.2)
    assert other.config.image_size == (16, 48) and other.config.num_labels == 3
    assert other.vit.layers[-1].drop_path.p == 0.2
    assert "Resized the positions" in caplog.text and "Made a new head for 3 classes" in caplog.text
    pixels = torch.randn(1, 3, 16, 48)
    expected = own.vit(pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(other.vit(pixels).last_hidden_state, expected)
    with pytest.raises(ValueError, match="'drop_path' is not a field"):
        convert_checkpoint(tmp_path, drop_path=0.2)
    with pytest.raises(ValueError, match="of another shape"):
        convert_checkpoint(tmp_path, intermediate_size=64)


def test_outputs_have_names_even_if_the_config_says_tuples(own, tmp_path):
    pixels = torch.randn(1, 3, 24, 24)
    expected = own(pixels).logits
    own.config.return_dict = False
    own.save_pretrained(tmp_path)
    torch.testing.assert_close(convert_checkpoint(tmp_path)(pixels).logits, expected)
    assert convert_checkpoint(tmp_path).vit(pixels).pooler_output.shape == (1, 32)
    for model in (
        ViTScratchForImageClassification.from_pretrained(tmp_path),
        convert_checkpoint(tmp_path, return_dict=False),
    ):
        assert isinstance(model(pixels), tuple)


def test_own_fixed_positions(tmp_path):
    config = ViTScratchConfig(**SIZES, intermediate_size=48, position_embedding_type="sincos")
    model = randomised(ViTScratchForImageClassification(config))
    model.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 24, 24)
    torch.testing.assert_close(convert_checkpoint(tmp_path)(pixels).logits, model(pixels).logits)
    larger = convert_checkpoint(tmp_path, image_size=40)
    assert larger.vit.embeddings.position_embeddings.shape == (1, 26, 32)
    fresh = ViTScratchForImageClassification(larger.config).vit.embeddings.position_embeddings
    torch.testing.assert_close(larger.vit.embeddings.position_embeddings, fresh)


@pytest.mark.parametrize("norm_after_pooling", [False, True])
def test_own_folder_without_a_classifier(tmp_path, caplog, monkeypatch, norm_after_pooling):
    """A new classifier; and a new norm before it, where the class has none."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # its reports would be in caplog, too
    fields = {**SIZES, "intermediate_size": 48, "encoder_stride": 8, "norm_after_pooling": norm_after_pooling}
    for cls in (ViTScratchModel, ViTScratchForMaskedImageModeling, ViTScratchBackbone):
        model = randomised(cls(ViTScratchConfig(**fields)))
        model.save_pretrained(tmp_path / cls.__name__)
        ours = convert_checkpoint(tmp_path / cls.__name__, num_labels=3)
        encoder = getattr(model, "vit", model).state_dict()
        new = {"pooled_norm.weight": torch.ones(32), "pooled_norm.bias": torch.zeros(32)}
        for key, tensor in ours.vit.state_dict().items():
            assert torch.equal(tensor, encoder[key] if key in encoder else new[key])
        assert not ours.classifier.weight.any()
    assert "Left out the pre-training decoder" in caplog.text and "Made a new head for 3 classes" in caplog.text
    assert all(record.name.startswith(conversion.__name__) for record in caplog.records)


def test_a_file_of_its_own_beside_our_config(own, tmp_path):
    own.save_pretrained(tmp_path)
    torch.save(timm_tensors(), tmp_path / "other.pth")
    (tmp_path / "config.json").rename(tmp_path / "ours.json")
    ours = convert_checkpoint(tmp_path / "other.pth", **HEADS)
    assert_logits(ours, lambda image: timm_logits(timm_tensors(), image))
    (tmp_path / "ours.json").rename(tmp_path / "config.json")
    ours = convert_checkpoint(tmp_path / "other.pth")  # the file that was named, not ours
    assert_logits(ours, lambda image: timm_logits(timm_tensors(), image))


def test_own_encoder_that_lost_its_norm_after_pooling(tmp_path):
    config = ViTScratchConfig(**SIZES, intermediate_size=48, norm_after_pooling=True)
    ViTScratchModel(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["pooled_norm.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing are 1 \(vit\.pooled_norm\.bias\)"):
        convert_checkpoint(tmp_path)


def test_own_folder_with_missing_tensors(own, tmp_path):
    own.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["vit.layers.1.mlp.fc1.bias"]
    save_file(tensors | {"odd": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing are 1 \(vit\.layers\.1\.mlp\.fc1\.bias\); left over are 1 \(odd\)"):
        convert_checkpoint(tmp_path)


def put_on_hub(hub, repo_id: str, folder: Path, ref: str = "main"):
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    repo = hub.repos.setdefault(("model", repo_id), Repo(private=False))
    repo.add(ref, "files", files, None)


def test_hub_id_of_transformers(hub, tmp_path):
    _, theirs = of_transformers("ViTForImageClassification")
    theirs.save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessorPil(size={"height": 24, "width": 24}, resample=3).save_pretrained(tmp_path / "vit")
    put_on_hub(hub, "google/vit", tmp_path / "vit")
    ours = convert_checkpoint("google/vit")
    assert_same(ours, theirs)
    assert image_processor_for("google/vit", ours).resample == 3
    assert not any("pytorch_model.bin" in path for _, path in hub.requests)


def test_a_download_shows_its_progress(hub, tmp_path, monkeypatch):
    """Where transformers' own bars are switched off, as the scripts do, too."""
    folder = timm_folder(tmp_path / "timm")
    put_on_hub(hub, "timm/vit", folder)
    loaded = {}

    def update(bar, n=1):
        assert not bar.disable and bar.delay == 2 and bar.total
        loaded[bar.total] = loaded.get(bar.total, 0) + n

    monkeypatch.setattr(reading_module._DownloadBar, "update", update)
    transformers.utils.logging.disable_progress_bar()
    try:
        convert_checkpoint("timm/vit")
    finally:
        transformers.utils.logging.enable_progress_bar()
    size = (folder / "model.safetensors").stat().st_size
    assert loaded[size] == size


def test_hub_id_of_timm_on_a_branch(hub, tmp_path):
    put_on_hub(hub, "timm/vit", timm_folder(tmp_path / "timm"), ref="v2")
    ours = convert_checkpoint("timm/vit", revision="v2")
    assert_logits(ours, lambda image: timm_logits(timm_tensors(), image))
    assert image_processor_for("timm/vit", ours, revision="v2").crop_size["height"] == 24


def test_hub_id_with_shards_or_torch_files(hub, tmp_path):
    for name, limit in {"shards": "20KB", "bin": None}.items():
        _, theirs = of_transformers("ViTForImageClassification")
        theirs.save_pretrained(tmp_path / name, max_shard_size=limit or "5GB")
        if name == "bin":
            torch.save(load_file(tmp_path / "bin" / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
            (tmp_path / "bin" / "model.safetensors").unlink()
        put_on_hub(hub, f"google/{name}", tmp_path / name)
        assert_same(convert_checkpoint(f"google/{name}"), theirs)


def test_hub_id_of_our_own(hub, own, tmp_path):
    own.save_pretrained(tmp_path / "own")
    put_on_hub(hub, "me/own", tmp_path / "own")
    ours = convert_checkpoint("me/own", num_labels=3)
    assert torch.equal(ours.vit.norm.weight, own.vit.norm.weight) and ours.config.num_labels == 3


def test_what_the_hub_does_not_have(hub, tmp_path):
    with pytest.raises(ValueError, match=r"nobody/nothing is no file or folder here, and the Hub did not .*404"):
        convert_checkpoint("nobody/nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    put_on_hub(hub, "me/empty", tmp_path / "empty")
    with pytest.raises(ValueError, match=r"the Hub's me/empty holds none of model\.safetensors"):
        convert_checkpoint("me/empty")


def test_without_the_hub_the_cache_is_used(hub, tmp_path, monkeypatch):
    put_on_hub(hub, "timm/vit", timm_folder(tmp_path / "timm"))
    convert_checkpoint("timm/vit")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    count = len(hub.requests)
    ours = convert_checkpoint("timm/vit")
    assert image_processor_for("timm/vit", ours).crop_size["height"] == 24 and len(hub.requests) == count
    with pytest.raises(ValueError, match="me/other is no file or folder here, and the Hub did not give it"):
        convert_checkpoint("me/other")


def test_a_hub_that_cannot_be_reached_is_asked_once(hub, tmp_path, monkeypatch):
    """A download would ask again and again, for half a minute."""
    put_on_hub(hub, "timm/vit", timm_folder(tmp_path / "timm"))
    convert_checkpoint("timm/vit")
    hub.stop()

    def wait(seconds):
        raise AssertionError("asked again")

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", wait)
    assert_logits(convert_checkpoint("timm/vit"), lambda image: timm_logits(timm_tensors(), image))
    with pytest.raises(ValueError, match=r"me/other is no file or folder here, .*: .*refused"):
        convert_checkpoint("me/other")


# --- The image processor ---------------------------------------------------------------------------------------------


def test_processors_of_the_families():
    model = ViTScratchForImageClassification(ViTScratchConfig(**{**SIZES, "image_size": 224}, intermediate_size=48))
    for family in FAMILIES:
        processor = image_processor_for(family, model)
        pixels = processor(np.full((300, 400, 3), 255, np.uint8), return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 224, 224)
        expected = (1 - torch.tensor(processor.image_mean)) / torch.tensor(processor.image_std)
        torch.testing.assert_close(pixels[0, :, 100, 100], expected)
    by_family = {family: image_processor_for(family, model) for family in FAMILIES}
    assert list(by_family["transformers"].image_mean) == [0.5, 0.5, 0.5] and by_family["transformers"].resample == 2
    assert dict(by_family["transformers"].size) == {"height": 224, "width": 224}
    assert by_family["timm"].size["shortest_edge"] == 248 and by_family["timm"].resample == 3
    assert by_family["torchvision"].size["shortest_edge"] == 256 and by_family["torchvision"].resample == 2
    assert by_family["dinov2"].size["shortest_edge"] == 256 and by_family["dinov2"].image_mean[0] == 0.485


def test_processor_of_the_checkpoint(tmp_path, caplog):
    _, theirs = of_transformers("ViTForImageClassification")
    theirs.save_pretrained(tmp_path)
    own = transformers.ViTImageProcessorPil(size={"height": 24, "width": 24}, image_mean=[0.1, 0.2, 0.3], resample=3)
    own.save_pretrained(tmp_path)
    processor = image_processor_for(tmp_path, convert_checkpoint(tmp_path))
    assert list(processor.image_mean) == [0.1, 0.2, 0.3] and processor.resample == 3
    assert "resizes to" not in caplog.text
    larger = image_processor_for(tmp_path, convert_checkpoint(tmp_path, image_size=48))
    assert (larger.size["height"], larger.size["width"]) == (48, 48) and "resizes to 48x48 now" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is no JSON file"),
        ({"image_processor_type": "NoSuchProcessor"}, "no image processor can be made of"),
        (
            {"image_processor_type": "ViTImageProcessor", "image_mean": "x"},
            "image_mean .*a number for each of 3 channels",
        ),
        ({"image_processor_type": "ViTImageProcessor", "image_std": [1, 2]}, "image_std .*1, 2.* must be a number"),
    ],
)
def test_a_processor_that_cannot_be_read_is_refused_in_a_line(own, content, message, tmp_path):
    own.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        image_processor_for(tmp_path, own)
    text = str(caught.value).replace(str(tmp_path), "")
    assert file.name in text and len(text) < 300 and "\n" not in text


def test_a_processor_with_one_mean_for_all_channels(own, tmp_path):
    own.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}, "image_mean": 0.25}'
    )
    assert list(image_processor_for(tmp_path, own).image_mean) == [0.25] * 3


def test_cropping_processor_grows_with_the_model(tmp_path, caplog):
    _, theirs = of_transformers("Dinov2Model", image_size=48)
    theirs.save_pretrained(tmp_path)
    transformers.BitImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 24, "width": 24}, image_mean=[0.5] * 3
    ).save_pretrained(tmp_path)
    processor = image_processor_for(tmp_path, convert_checkpoint(tmp_path))  # as DINOv2's: made for 518, cropped to 224
    assert processor.size["shortest_edge"] == 64 and processor.crop_size["height"] == 48
    assert "crops to 48x48 now" in caplog.text
    assert processor(np.zeros((50, 90, 3), np.uint8), return_tensors="pt")["pixel_values"].shape == (1, 3, 48, 48)


def timm_folder(folder, **changes):
    folder.mkdir(exist_ok=True)
    save_file(timm_tensors(), folder / "model.safetensors")
    config = {
        "architecture": "vit_base_patch16_224", "num_classes": CLASSES, "global_pool": "token",
        "label_names": [f"n{i}" for i in range(CLASSES)], "label_descriptions": {"n1": "a cat"},
        "model_args": {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 1.5},
        "pretrained_cfg": {
            "input_size": [3, 24, 24], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear",
            "crop_pct": 0.75, "crop_mode": "center",
        },
    }  # fmt: skip
    for name, change in changes.items():
        config[name] = {**config[name], **change} if isinstance(change, dict) else change
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_timm_folder(tmp_path, caplog):
    folder = timm_folder(tmp_path / "a")
    ours = convert_checkpoint(folder)
    assert "Assumed" not in caplog.text and ours.config.id2label[1] == "a cat" and ours.config.id2label[2] == "n2"
    assert_logits(ours, lambda image: timm_logits(timm_tensors(), image))
    processor = image_processor_for(folder, ours)
    assert [*processor.image_mean, *processor.image_std] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert processor.size["shortest_edge"] == 32 and processor.crop_size["height"] == 24 and processor.resample == 2
    squash = image_processor_for(timm_folder(tmp_path / "b", pretrained_cfg={"crop_mode": "squash"}), ours)
    assert dict(squash.size) == {"height": 24, "width": 24}
    tanh = convert_checkpoint(timm_folder(tmp_path / "c", model_args={"act_layer": "gelu_tanh"}, global_pool="avg"))
    assert_logits(tanh, lambda image: timm_logits(timm_tensors(), image, gelu=tanh_gelu, mean=True))


@pytest.mark.parametrize(
    "changes",
    [{"global_pool": "max"}, {"model_args": {"act_layer": "mish"}}, {"model_args": {"norm_layer": "rmsnorm"}}],
    ids=str,
)
def test_timm_options_the_model_has_not(changes, tmp_path):
    with pytest.raises(ValueError, match=r"timm's .*which this model has not"):
        convert_checkpoint(timm_folder(tmp_path, **changes))


@pytest.mark.parametrize("architecture", ["vit_base_patch16_rope_ape_224", "vit_base_patch16_rpn_224"])
def test_timm_architectures_with_the_names_of_a_vit_that_compute_something_else(architecture, tmp_path):
    with pytest.raises(ValueError, match=f"is timm's {architecture}, with "):
        convert_checkpoint(timm_folder(tmp_path, architecture=architecture))


@needs_timm
@pytest.mark.slow
def test_every_vit_of_timm_is_understood_or_refused():
    """Heads, epsilon, activation, pooling and resolution of timm's whole registry, without memory for the weights."""
    activations = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu"}
    understood, refused = [], []
    for name in timm.list_models(["vit_*", "deit*", "flexivit*"]):
        with torch.device("meta"):
            theirs = timm.create_model(name)
        config = {"architecture": name, "global_pool": getattr(theirs, "global_pool", None)}
        opened = reading_module.Checkpoint(dict(theirs.state_dict()), name, config)
        try:
            family, named = recognition_module.recognise(opened, None)
            plan = planning_module.make_plan(opened, family, named, {}, new_head=False)
        except ValueError as error:
            assert any(text in str(error) for text in ("this model has not", "missing are", "SwiGLU"))
            refused.append(name)
            continue
        ours = ViTScratchConfig(**plan.fields)
        needed = loading_module.meta_model(ours).state_dict()
        found = {theirs for name in needed for theirs in named.find(name) if theirs}
        if found != set(named.names) - set(plan.left_out):
            assert "rope.freqs" in named.names  # left over, so refused
            continue
        block = theirs.blocks[0]
        assert isinstance(theirs, timm.models.vision_transformer.VisionTransformer)
        assert ours.num_attention_heads == block.attn.num_heads, name
        assert ours.layer_norm_eps == block.norm1.eps, name
        assert ours.hidden_act == activations[type(block.mlp.act).__name__], name
        assert ours.pooling == {"token": "cls", "avg": "mean"}[theirs.global_pool], name
        assert ours.grid_hw == theirs.patch_embed.grid_size, name
        norms = ours.use_final_norm and not ours.norm_after_pooling, ours.norm_after_pooling
        assert norms == tuple(isinstance(norm, torch.nn.LayerNorm) for norm in (theirs.norm, theirs.fc_norm)), name
        understood.append(name)
    assert len(understood) > 80 and len(refused) > 80


def test_norms_after_the_branches_are_refused_by_tensors_alone():
    tensors = timm_tensors(cls=False, bias=False, positions="none", final_norm="fc_norm")
    with pytest.raises(ValueError, match=r"names of timm's vit_\*_rpn_.*norm_after_pooling=True"):
        convert_checkpoint(tensors, **HEADS)
    ours = convert_checkpoint(tensors, norm_after_pooling=True, **HEADS)
    assert_logits(ours, lambda image: timm_logits(tensors, image, positions="none", mean=True))


def test_images_that_are_no_whole_number_of_patches(tmp_path, caplog):
    """timm and transformers floor: the pixels beyond the last whole patch are not seen."""
    ours = convert_checkpoint(timm_folder(tmp_path, model_args={"img_size": 29}))
    assert ours.config.image_size == 24 and "beyond the last whole patch" in caplog.text


# --- The way out -----------------------------------------------------------------------------------------------------

PLAIN = {**SIZES, "intermediate_size": 64, "num_labels": CLASSES, "layer_norm_eps": 1e-5}
SCALED = {**PLAIN, "layerscale_value": 0.1}
EXPORTS = {
    "transformers": PLAIN,
    "transformers, no qkv bias": PLAIN | {"qkv_bias": False, "hidden_act": "gelu_pytorch_tanh"},
    "transformers, no squares": PLAIN | {"image_size": (16, 40), "patch_size": (4, 8)},
    "transformers, fixed positions": PLAIN | {"position_embedding_type": "sincos", "initializer_range": "fan_in"},
    "transformers, dinov2": SCALED,
    "transformers, dinov2 with registers": SCALED | {"num_register_tokens": 3},
    "transformers, dinov2 and mean pooling": SCALED | {"pooling": "mean"},
    "timm": PLAIN,
    "timm, registers": SCALED | {"num_register_tokens": 3, "layer_norm_eps": 1e-6},
    "timm, mean pooling": PLAIN | {"pooling": "mean", "use_cls_token": False, "hidden_act": "quick_gelu"},
    "timm, mean pooling of the patches": PLAIN | {"pooling": "mean", "num_register_tokens": 2},
    "timm, norm after mean pooling": PLAIN | {"pooling": "mean", "norm_after_pooling": True},
    "timm, no final norm": PLAIN | {"use_final_norm": False, "intermediate_size": 50},
    "timm, no squares": PLAIN | {"image_size": (16, 40), "patch_size": (4, 8)},
    "torchvision": PLAIN,
    "torchvision, tanh layer": PLAIN | {"representation_size": 20},
    "jax": PLAIN,
    "jax, tanh layer": PLAIN | {"representation_size": 20},
    "jax, mean pooling": PLAIN | {"pooling": "mean", "use_cls_token": False},
}


def to_export(case: str) -> tuple[str, ViTScratchForImageClassification]:
    config = ViTScratchConfig(**EXPORTS[case], id2label={i: f"class {i}" for i in range(CLASSES)} or None)
    return case.split(",")[0], randomised(ViTScratchForImageClassification(config))


def hints_for(config: ViTScratchConfig) -> dict:
    names = ("num_attention_heads", "layer_norm_eps", "hidden_act", "pooling", "use_final_norm")
    return {name: getattr(config, name) for name in names} | {"grid_size": config.grid_hw}


@pytest.mark.parametrize("case", EXPORTS)
@pytest.mark.parametrize("where", ["memory", "folder"])
def test_out_then_in_is_the_identity(case, where, tmp_path):
    target, model = to_export(case)
    if where == "memory":
        exported = export_checkpoint(model, target)
        assert {type(tensor) for tensor in exported.values()} == {np.ndarray if target == "jax" else torch.Tensor}
        back = convert_checkpoint(exported, **hints_for(model.config))
    else:  # all that the tensors cannot tell is in config.json
        export_checkpoint(model, target, tmp_path)
        back = convert_checkpoint(tmp_path)
        assert back.config.id2label == model.config.id2label
    expected = dict(model.state_dict())
    if model.config.position_embedding_type == "sincos":  # comes back as learned positions of the same values
        expected["vit.embeddings.position_embeddings"] = model.vit.embeddings.position_embeddings
    assert set(back.state_dict()) == set(expected)
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    pixels = images(model).float()
    with torch.no_grad():
        assert torch.equal(back(pixels).logits, model(pixels).logits)


@pytest.mark.parametrize("case", [case for case in EXPORTS if case.startswith("transformers")])
def test_exported_to_transformers(case, tmp_path):
    _, model = to_export(case)
    export_checkpoint(model, "transformers", tmp_path)
    theirs, report = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert "vit_scratch" not in theirs.config.model_type
    assert_same(model, theirs.eval())
    theirs.float().load_state_dict(export_checkpoint(model.float(), "transformers"))  # the names in memory


@pytest.mark.parametrize(
    "case", ["timm", "timm, mean pooling of the patches", "torchvision", "torchvision, tanh layer"]
)
def test_exported_tensors_compute_the_same_in_torch_layouts(case):
    target, model = to_export(case)
    tensors = export_checkpoint(model, target)
    if target == "timm":
        computed = {"mean": model.config.pooling == "mean", "positions": "all"}
        assert_logits(model, lambda image: timm_logits(tensors, image, eps=1e-5, **computed))
    else:
        assert_logits(model, lambda image: torchvision_logits(tensors, image, eps=1e-5))


@pytest.mark.parametrize("case", ["jax", "jax, tanh layer", "jax, mean pooling"])
def test_exported_arrays_compute_the_same(case):
    _, model = to_export(case)
    arrays = export_checkpoint(model, "jax")
    assert set(arrays) == set(
        jax_arrays(cls=model.config.use_cls_token, representation=model.config.representation_size)
    )
    assert_logits(model, lambda image: jax_logits(arrays, image, eps=1e-5, gelu=exact_gelu))


@needs_timm
@pytest.mark.parametrize("case", [case for case in EXPORTS if case.startswith("timm")])
def test_timm_loads_the_folder(case, tmp_path):
    _, model = to_export(case)
    if model.config.layer_norm_eps != 1e-6:  # which timm's config.json cannot say
        model.config.layer_norm_eps = 1e-6
        for module in model.modules():
            module.eps = 1e-6
    export_checkpoint(model, "timm", tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).double().eval()
    pixels = images(model)
    with torch.no_grad():
        torch.testing.assert_close(theirs(pixels), model.double()(pixels).logits, atol=NEAR, rtol=0)


@pytest.mark.parametrize(
    ("target", "fields", "what"),
    [
        ("transformers", {"num_register_tokens": 2}, "registers"),
        ("transformers", {"pooling": "mean"}, "mean pooling"),
        ("transformers", {"representation_size": 20}, "a tanh layer"),
        ("transformers", {"use_final_norm": False}, "no final norm"),
        ("transformers", {"layerscale_value": 0.1, "intermediate_size": 48}, "no multiple"),
        ("timm", {"representation_size": 20}, "a tanh layer"),
        ("timm", {"hidden_act": "mish"}, "the activation mish"),
        ("torchvision", {"layerscale_value": 0.1}, "layer scale"),
        ("transformers", {"layerscale_value": 0.1, "norm_after_pooling": True}, "a norm after the pooling"),
        ("jax", {"pooling": "mean", "use_cls_token": False, "norm_after_pooling": True}, "a norm after the pooling"),
        ("torchvision", {"qkv_bias": False}, "no bias of query"),
        ("torchvision", {"num_channels": 1}, "1 channels"),
        ("torchvision", {"image_size": (16, 40)}, "no squares"),
        ("jax", {"num_register_tokens": 2}, "registers"),
        ("jax", {"hidden_act": "relu"}, "the activation relu"),
        ("jax", {"pooling": "mean"}, "mean pooling"),
    ],
)
def test_what_a_target_has_not_is_refused(target, fields, what):
    model = ViTScratchForImageClassification(ViTScratchConfig(**{**PLAIN, **fields}))
    with pytest.raises(ValueError, match=f"{target} has no model with .*{what}"):
        export_checkpoint(model, target)
    with pytest.raises(ValueError, match="target 'keras' is unknown"):
        export_checkpoint(model, "keras")


@pytest.mark.parametrize("crop", [None, 0.75])
@pytest.mark.parametrize("target", ["transformers", "timm", "torchvision", "jax"])
def test_the_image_processor_goes_out_and_comes_back(crop, target, tmp_path):
    _, model = to_export("timm")
    resample = 1 if target == "timm" else 3  # Lanczos, which torchvision has not; bicubic
    numbers = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": resample}
    processor = transformers.ViTImageProcessorPil(size={"height": 24, "width": 24}, **numbers)
    if crop:
        processor = transformers.BitImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 24, "width": 24}, **numbers
        )
    export_checkpoint(model, target, tmp_path, processor)
    back = image_processor_for(tmp_path, convert_checkpoint(tmp_path))
    picture = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    expected, actual = (p(picture, return_tensors="pt")["pixel_values"] for p in (processor, back))
    assert back.resample == resample
    torch.testing.assert_close(actual, expected, atol=0.03, rtol=0)  # with torchvision, a level of 255 off in places


# --- The proof -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_verify_runs_transformers_own_class(name, tmp_path):
    family, theirs = of_transformers(name)
    for checkpoint, hints in [
        (theirs.state_dict(), {**HEADS, "layer_norm_eps": 1e-5, "source": family}),
        (tmp_path, {}),
    ]:
        theirs.save_pretrained(tmp_path)
        proof = verify_checkpoint(checkpoint, **hints)
        assert proof.passed and proof.largest < 1e-4 and proof.reference.startswith("transformers'")
        expected = ["embeddings", "block 1", "block 2", "block 3", "final norm"]
        expected += ["tanh layer"] if name in ("ViTModel", "DeiTModel") else []
        expected += ["logits"] if name.endswith("ForImageClassification") else []
        assert list(proof.differences) == expected
        assert proof.top5 == (2 if "logits" in expected else None)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "ViTModel", "Dinov2Model", "ViTMAEForPreTraining"])
def test_verify_where_the_config_says_tuples(name, tmp_path):
    _, theirs = of_transformers(name, return_dict=False)
    theirs.save_pretrained(tmp_path)
    proof = verify_checkpoint(tmp_path)
    assert proof.passed and ("tanh layer" in proof.differences) == (name == "ViTModel")
    assert ("logits" in proof.differences) == (name == "ViTForImageClassification")
    if "logits" in proof.differences:
        ours = convert_checkpoint(tmp_path)
        ours.config.return_dict = False
        assert verify_checkpoint(tmp_path, model=ours).passed


@pytest.mark.parametrize(
    "wrong", [{"layer_norm_eps": 1e-6}, {"hidden_act": "gelu_pytorch_tanh"}, {"num_attention_heads": 8}], ids=str
)
def test_verify_notices(wrong, tmp_path):
    _, theirs = of_transformers("ViTForImageClassification", layer_norm_eps=1e-12)
    theirs.save_pretrained(tmp_path)  # the config tells the reference what is right
    assert verify_checkpoint(tmp_path).passed
    proof = verify_checkpoint(tmp_path, **wrong)
    assert not proof.passed and proof.differences["embeddings"] < NEAR and proof.differences["logits"] > 1e-4


@pytest.mark.parametrize(
    "tensor", ["vit.layers.1.attention.qkv.weight", "vit.embeddings.patch_embeddings.projection.weight"]
)
def test_verify_notices_a_tensor_in_the_wrong_order(tensor):
    _, theirs = of_transformers("ViTForImageClassification")
    hints = {**HEADS, "layer_norm_eps": 1e-5}
    ours = convert_checkpoint(theirs.state_dict(), **hints)
    weight = ours.get_parameter(tensor)
    with torch.no_grad():
        weight.copy_(weight.reshape(2, -1).flip(0).reshape(weight.shape))
    assert not verify_checkpoint(theirs.state_dict(), model=ours, **hints).passed


@needs_timm
@pytest.mark.parametrize(
    "case", ["plain", "deit3 as published", "registers with positions", "no class token", "norm after mean pooling"]
)
def test_verify_runs_timm(case):
    shapes, _, hints = TIMM_CASES[case]
    proof = verify_checkpoint(timm_tensors(**shapes), **{**HEADS, **hints})
    assert proof.passed and 0 < proof.differences["final norm"] < NEAR_WITH_REGISTER_POSITIONS


@needs_timm
def test_verify_runs_timm_for_distilled_deit(tmp_path):
    distilled = timm_tensors(registers=1, register="dist_token", positions="all")
    second = {"head_dist.weight": torch.ones(CLASSES, 32), "head_dist.bias": torch.ones(CLASSES)}
    folder = timm_folder(tmp_path, architecture="deit_tiny_distilled_patch16_224")
    save_file(distilled | second, folder / "model.safetensors")
    for checkpoint in (distilled | second, folder):
        proof = verify_checkpoint(checkpoint, num_labels=3, **HEADS)
        assert proof.passed and list(proof.differences)[-1] == "final norm"
    with pytest.raises(NotImplementedError, match="a distillation token and one head"):
        verify_checkpoint(distilled, **HEADS)


@needs_timm
@pytest.mark.parametrize("registers", [0, 4])
def test_verify_runs_timm_for_dinov2(registers):
    tensors = timm_tensors(registers=registers, scale="ls{}.gamma", classes=None, register="register_tokens")
    assert verify_checkpoint({**tensors, "mask_token": torch.ones(1, 32)}, **HEADS).passed


@needs_timm
def test_verify_runs_timm_for_its_folders_and_npz_files(tmp_path):
    assert verify_checkpoint(timm_folder(tmp_path / "timm")).passed
    assert not verify_checkpoint(timm_folder(tmp_path / "timm"), layer_norm_eps=1e-5).passed
    np.savez(tmp_path / "vit.npz", **jax_arrays())
    assert verify_checkpoint(tmp_path / "vit.npz").passed
    assert verify_checkpoint(tmp_path / "vit.npz", hidden_act="gelu").passed  # told to both
    with pytest.raises(NotImplementedError, match="tanh layer"):
        verify_checkpoint(jax_arrays(representation=20))


@needs_torchvision
def test_verify_runs_torchvision():
    assert verify_checkpoint(torchvision_tensors(representation=20), **HEADS).passed


BARE = {
    "transformers": lambda: of_transformers("ViTForImageClassification")[1].state_dict(),
    "dinov2": lambda: of_transformers("Dinov2Model")[1].state_dict(),
    "timm": timm_tensors,
    "torchvision": torchvision_tensors,
    "jax": jax_arrays,
}
READERS = {"timm": [needs_timm], "jax": [needs_timm], "torchvision": [needs_torchvision]}


@pytest.mark.parametrize(
    "wrong", [{"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh"}, {"layer_norm_eps": 1e-5}], ids=str
)
@pytest.mark.parametrize("bare", [pytest.param(bare, marks=READERS.get(bare, ())) for bare in BARE])
def test_verify_notices_a_wrong_assumption(bare, wrong):
    """What nobody tells is the source library's own default on the other side, not what we assumed."""
    assert verify_checkpoint(BARE[bare](), **HEADS).passed
    ours = convert_checkpoint(BARE[bare](), **HEADS, **wrong)
    default = wrong == {"hidden_act": "gelu_pytorch_tanh" if bare == "jax" else "gelu"}
    assert verify_checkpoint(BARE[bare](), model=ours).passed == default


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=READERS.get(case.split(",")[0], ())) for case in EXPORTS if case != "jax, tanh layer"],
)
@pytest.mark.parametrize("where", ["memory", "folder"])
def test_verify_exports(case, where):
    """No library has a model for "jax, tanh layer"; in memory, what tensors cannot tell has to be told."""
    target, model = to_export(case)
    if where == "memory":
        assert verify_checkpoint(export_checkpoint(model, target), model=model, **hints_for(model.config)).passed
    else:
        assert verify_export(model, target).passed


def test_verify_says_that_it_cannot(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="timm cannot be imported here"):
        verify_checkpoint(timm_tensors(), **HEADS)


def test_what_google_code_would_compute_otherwise_is_said(caplog, tmp_path):
    _, model = to_export("jax")
    export_checkpoint(model, "jax", tmp_path)
    assert "Google's code has hidden_act='gelu_pytorch_tanh', this model 'gelu'" in caplog.text
    assert "Google's code has layer_norm_eps=1e-06, this model 1e-05" in caplog.text
    caplog.clear()
    assert convert_checkpoint(tmp_path).config.hidden_act == "gelu" and "Assumed" not in caplog.text
    google = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
    google |= {"position_interpolation": "bilinear_align_corners"}
    caplog.clear()
    export_checkpoint(ViTScratchForImageClassification(ViTScratchConfig(**{**PLAIN, **google})), "jax")
    assert not caplog.text


def test_verify_refuses_our_own(own, tmp_path):
    own.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nothing to compare it with"):
        verify_checkpoint(tmp_path)


# --- scripts/convert.py ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    return load_script("convert")


@pytest.fixture
def vit_folder(tmp_path):
    """A folder of transformers' ViT; its epsilon is one that tests can deny."""
    _, theirs = of_transformers("ViTForImageClassification", layer_norm_eps=1e-12)
    theirs.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit", theirs


def test_convert_script(script, vit_folder, tmp_path, capsys, caplog):
    folder, theirs = vit_folder
    assert script.main([str(folder), str(tmp_path / "out"), "--verify", "--num_images", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["transformers' ViTForImageClassification", "on 3 random images, in double precision"]
    table = {line[:10].strip(): line[10:].strip() for line in lines[4:-3]}
    assert list(table) == ["embeddings", "block 1", "block 2", "block 3", "final norm", "logits", "top-5"]
    assert all(float(difference) < NEAR for name, difference in table.items() if name != "top-5")
    assert table["top-5"] == "agree on 3 of 3" and lines[-2].startswith("the same function:")
    assert "Recognised transformers' names" in caplog.text
    ours = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert_same(ours, theirs)
    assert transformers.ViTImageProcessorPil.from_pretrained(tmp_path / "out").size["height"] == 24
    assert (tmp_path / "out" / "modeling_vit_scratch.py").is_file()


@needs_timm
@pytest.mark.parametrize("target", [None, "timm", "jax"])
def test_convert_script_says_everything_once(script, target, tmp_path, caplog):
    """With a proof of what comes in and one of what goes out."""
    tensors = timm_tensors(D=64, classes=None) | {"mask_token": torch.ones(1, 1, 8)}
    decoder = {"decoder_embed.weight": torch.ones(8, 64), "decoder_pos_embed": torch.ones(1, 10, 8)}
    torch.save({"model": tensors | decoder, "epoch": 3}, tmp_path / "mae.pth")
    argv = [str(tmp_path / "mae.pth"), str(tmp_path / "out"), "--verify", "--num_labels", "3", "--image_size", "32"]
    assert script.main([*argv, *(["--to", target] if target else [])]) == 0
    said = [record.getMessage() for record in caplog.records if record.name.startswith(conversion.__name__)]
    assert len(said) == len(set(said))
    for beginning in ("Took 'model'", "Recognised timm's names (mae)", "Assumed 1 heads", "Left out the pre-training"):
        assert sum(line.startswith(beginning) for line in said) == 1, said
    assert ("Google's code has" in "".join(said)) == (target == "jax")


def test_convert_script_fails_where_the_proof_does(script, vit_folder, tmp_path, capsys):
    folder, _ = vit_folder
    assert script.main([str(folder), str(tmp_path / "out"), "--verify", "--layer_norm_eps", "1e-5"]) == 1
    printed = capsys.readouterr()
    assert "NOT the same function" in printed.out and "the proof failed, nothing written" in printed.err
    assert not (tmp_path / "out").exists()


def test_convert_script_with_changes(script, vit_folder, tmp_path):
    folder, _ = vit_folder
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    changes = ["--image_size", "16", "32", "--num_labels", "2", "--labels", str(tmp_path / "labels.txt")]
    assert script.main([str(folder), str(tmp_path / "out"), *changes, "--verify"]) == 0
    config = ViTScratchConfig.from_pretrained(tmp_path / "out")
    assert config.image_size == (16, 32) and config.id2label == {0: "cat", 1: "dog"}
    processor = transformers.ViTImageProcessorPil.from_pretrained(tmp_path / "out")
    assert (processor.size["height"], processor.size["width"]) == (16, 32)


@pytest.mark.parametrize("target", ["transformers", "timm", "torchvision", "jax"])
def test_convert_script_out_again(script, vit_folder, tmp_path, capsys, target):
    folder, theirs = vit_folder
    arguments = [str(folder), str(tmp_path / "out"), "--to", target]
    available = {"timm": timm, "torchvision": torchvision, "jax": timm}.get(target, transformers)
    if available is None:
        assert script.main([*arguments, "--verify"]) == 1
        assert "not verified, nothing written" in capsys.readouterr().err and not (tmp_path / "out").exists()
    else:
        assert script.main([*arguments, "--verify"]) == 0
        assert capsys.readouterr().out.count("the same function") == 2  # in, and out
    assert script.main(arguments) == 0
    assert_same(convert_checkpoint(tmp_path / "out"), theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pth", "out"], "no file or folder none.pth"),
        (["{vit}", "{vit}"], "holds the checkpoint itself"),
        (["{vit}/model.safetensors", "{vit}"], "holds the checkpoint itself"),
        (["{vit}", "{vit}/config.json"], "is a file"),
        (["{vit}", "out", "--image_size", "1", "2", "3"], "one number or two"),
        (["{vit}", "out", "--image_size", "25"], "must be divisible by patch_size"),
        (["{vit}", "out", "--num_images", "0"], "must be at least 1"),
        (["{vit}", "out", "--labels", "none.txt"], "labels cannot be read"),
        (["{vit}", "out", "--source", "torchvision"], "source='torchvision'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_convert_script_usage(script, vit_folder, arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert script.main([argument.format(vit=vit_folder[0]) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out and not Path("out").exists()


def test_convert_script_on_our_own(script, own, tmp_path, capsys):
    own.save_pretrained(tmp_path / "own")
    assert script.main([str(tmp_path / "own"), str(tmp_path / "out"), "--verify"]) == 2
    assert "nothing to verify without --to" in capsys.readouterr().err
    assert script.main([str(tmp_path / "own"), str(tmp_path / "out"), "--image_size", "40"]) == 0
    assert "No image processor was written" in capsys.readouterr().err
    assert ViTScratchConfig.from_pretrained(tmp_path / "out").image_size == 40


def test_convert_script_leaves_no_two_models_in_a_folder(script, vit_folder, tmp_path, capsys):
    folder, out = str(vit_folder[0]), tmp_path / "out"
    assert script.main([folder, str(out)]) == script.main([folder, str(out)]) == 0
    before = sorted(out.iterdir())
    for target, left in (("jax", "model.safetensors"), ("timm", "preprocessor_config.json")):
        assert script.main([folder, str(out), "--to", target]) == 2
        assert f"holds {left} of another model; name another folder" in capsys.readouterr().err
    assert sorted(out.iterdir()) == before


def test_convert_script_help_begins_with_an_example(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("python scripts/convert.py google/vit-base-patch16-224")
    for group in ("what and where:", "changes:", "proof:"):
        assert group in lines
    with pytest.raises(SystemExit, match="2"):
        script.main([])
