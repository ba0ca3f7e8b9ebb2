"""What does not fit, and what this model has not, is refused by name."""

import json

import pytest
import torch
import transformers
from foreign import HEADS, SIZES, jax_arrays, of_transformers, timm_tensors, torchvision_tensors

from modeling_vit_scratch.conversion import convert_checkpoint


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
