"""Conversion of other libraries' weights: against their own models, or a small reference written here.

Every tensor of every checkpoint is random, and the residual stream is so small (about 1e-3) that another epsilon
changes it; comparisons are in double precision, where a correct conversion agrees to 1e-9 or so.
"""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from benchmarking.peers import MODULES
from safetensors.torch import save_file

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification

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
    small += ("fc2", "linear_2", "mlp.3", "out/kernel", "out/bias", "Dense_1", "down_proj", "attention.proj")
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


WIDTH = {**SIZES, "intermediate_size": 48, "num_labels": CLASSES}
RATIO = {**SIZES, "mlp_ratio": 3, "num_labels": CLASSES}  # DINOv2 computes the width of its MLP
TEXTS = {"text_config": {**HEADS, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}}
# Case -> family, transformers' class, fields of its config.
LATER_CLASSES = {
    "dinov3": ("dinov3", "DINOv3ViTModel", {**WIDTH, "num_register_tokens": 2}),
    "dinov3, no registers": ("dinov3", "DINOv3ViTModel", {**WIDTH, "num_register_tokens": 0}),
    "dinov3, SwiGLU": (
        "dinov3", "DINOv3ViTModel",
        {**WIDTH, "num_register_tokens": 2, "use_gated_mlp": True, "hidden_act": "silu", "rope_theta": 30.0},
    ),
    "dinov3, no biases": ("dinov3", "DINOv3ViTModel", {**WIDTH, "query_bias": False, "value_bias": False}),
    "dinov3, key bias": ("dinov3", "DINOv3ViTModel", {**WIDTH, "key_bias": True}),
    "dinov2, SwiGLU": ("dinov2", "Dinov2Model", {**RATIO, "use_swiglu_ffn": True}),
    "dinov2, classifier": ("dinov2", "Dinov2ForImageClassification", RATIO),
    "dinov2, SwiGLU, classifier": ("dinov2", "Dinov2ForImageClassification", {**RATIO, "use_swiglu_ffn": True}),
    "dinov2 with registers, SwiGLU, classifier": (
        "dinov2_with_registers", "Dinov2WithRegistersForImageClassification",
        {**RATIO, "use_swiglu_ffn": True, "num_register_tokens": 3},
    ),
    "clip": ("clip", "CLIPVisionModel", WIDTH),
    "clip, projected": ("clip", "CLIPVisionModelWithProjection", {**WIDTH, "projection_dim": 8}),
    "clip, two towers": ("clip", "CLIPModel", {"vision_config": {**WIDTH, "hidden_act": "gelu"}, **TEXTS}),
    "clip, classifier": (
        "clip", "CLIPForImageClassification", {"vision_config": WIDTH, "num_labels": CLASSES, **TEXTS},
    ),
    "siglip": ("siglip", "SiglipVisionModel", WIDTH),
    "siglip, two towers": ("siglip", "SiglipModel", {"vision_config": WIDTH, **TEXTS}),
    "siglip, classifier": (
        "siglip", "SiglipForImageClassification", {"vision_config": WIDTH, "num_labels": CLASSES, **TEXTS},
    ),
    "ijepa": ("ijepa", "IJepaModel", {**WIDTH, "layer_norm_eps": 1e-6}),
    "ijepa, classifier": ("ijepa", "IJepaForImageClassification", WIDTH),
    "msn": ("msn", "ViTMSNModel", WIDTH),
    "msn, classifier": ("msn", "ViTMSNForImageClassification", WIDTH),
    "deit, two heads": ("deit", "DeiTForImageClassificationWithTeacher", WIDTH),
}  # fmt: skip


def of_later_classes(case: str, **changes) -> tuple[str, torch.nn.Module]:
    family, name, fields = LATER_CLASSES[case]
    model_class = getattr(transformers, name)
    return family, randomised(model_class(model_class.config_class(**{**fields, **changes})))


@torch.no_grad()
def assert_same_outputs(ours: ViTScratchForImageClassification, theirs: torch.nn.Module, near: float = 1e-5):
    """Equal tokens, pooled tokens and logits, as far as the other model has them.

    `near` is of the largest: both compute rotary positions in single precision, and ours stacks what it adds up.
    """
    ours, theirs = ours.double(), theirs.double()
    pixels = images(ours)
    towers = isinstance(theirs, (transformers.CLIPModel, transformers.SiglipModel))
    expected = (theirs.vision_model if towers else theirs)(pixel_values=pixels)
    actual = ours.vit(pixels)
    pairs = []
    if "logits" in expected:
        pairs.append((ours(pixels).logits, expected.logits))
    if expected.get("last_hidden_state") is not None:
        pairs.append((actual.last_hidden_state, expected.last_hidden_state))
    if expected.get("pooler_output") is not None:
        pairs.append((actual.pooler_output, expected.pooler_output))
    if "image_embeds" in expected:
        pairs.append((theirs.visual_projection(actual.pooler_output), expected.image_embeds))
    assert pairs
    for mine, wanted in pairs:
        largest = wanted.abs().max().item()
        assert largest > 1e-4
        torch.testing.assert_close(mine, wanted, atol=near * largest, rtol=0)


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
    "deit3 as published": (
        {"positions": "none", "scale": "gamma_{}"}, {"positions": "none"}, {"source": "deit"},
    ),
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
