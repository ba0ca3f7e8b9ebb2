"""What does not fit, and what this model has not, is refused by name."""

import json
import re

import pytest
import torch
from foreign import HEADS, jax_arrays, of_transformers, timm_folder, timm_tensors, torchvision_tensors

from modeling_vit_scratch.conversion import convert_checkpoint
from modeling_vit_scratch.conversion.families import REFUSED


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


# A name -> what it is the name of; one at least for each of the patterns that are refused.
NOT_HERE = {
    "blocks.0.attn.relative_position_bias_table": "relative positions",
    "blocks.0.attn.rel_pos.mlp.fc1.weight": "relative positions",
    "patch_embed.backbone.stem.conv.weight": "a convolutional stem",
    "patch_embed.proj.0.conv.weight": "a convolutional stem",
    "blocks.0.attns.0.norm.weight": "parallel blocks",
    "blocks.0.in_proj.weight": "parallel blocks",
    "blocks.0.attn.norm.weight": "norms inside attention or MLP",
    "blocks.0.mlp.norm.weight": "norms inside attention or MLP",
    "blocks.0.attn.lambda_q1": "norms inside attention or MLP",
    "blocks.0.attn.q_ln.weight": "normalised queries and keys of Google's",
    "blocks.0.attn.q_proj.weight": "queries and keys projected apart",
    "Transformer/encoderblock/LayerNorm_0/scale": "blocks stacked by flax's scan",
    "detection_tokens": "detection tokens",
    "embeds.pos_embed_y": "positions that are sums of rows and columns",
    "attn_pool.pos_embed": "another attention pooling than timm's",
}


@pytest.mark.parametrize("name", NOT_HERE)
def test_what_the_model_has_not_is_refused_by_name(name):
    what = re.escape(NOT_HERE[name])
    with pytest.raises(ValueError, match=f"has {what}.*, which this model has not: .*{re.escape(name)}"):
        convert_checkpoint(timm_tensors() | {name: torch.ones(3)}, **HEADS)


def test_each_refusal_of_a_name_is_tried():
    untried = [what for pattern, what in REFUSED.items() if not any(re.fullmatch(pattern, name) for name in NOT_HERE)]
    assert not untried


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["vision_model.pre_layrnorm.weight", "vision_model.embeddings.patch_embedding.weight"], "but no blocks"),
        (["visual.ln_pre.weight", "visual.conv1.weight"], "was not recognised"),  # a ResNet's first layer, too
        (["Transformer/encoderblock/LayerNorm_0/scale", "embedding/kernel"], "stacked by flax's scan"),
        (["embedding/kernel", "MAPHead_0/probe"], "but no blocks"),
        (["conv_proj.conv_last.weight", "conv_proj.conv_bn_relu_0.0.weight"], "a convolutional stem"),
    ],
    ids=str,
)
def test_towers_without_their_blocks_and_of_other_kinds(names, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint({name: torch.ones(3, 3, 3, 3) for name in names})


@pytest.mark.parametrize(
    ("added", "message"),
    [
        # Half of a form that this model has is not passed over.
        ({"blocks.0.mlp.fc1_g.weight": (24, 32)}, "left over are 1 .blocks.0.mlp.fc1_g.weight"),
        ({"blocks.0.mlp.w12.weight": (48, 32)}, "left over are 1 .blocks.0.mlp.w12.weight"),
        ({"norm_pre.weight": (32,)}, "missing are 1 .norm_pre.bias"),
        ({"blocks.0.attn.q_norm.weight": (8,)}, "missing are .*blocks.0.attn.k_norm.weight"),
        ({"blocks.0.attn.q_bias": (32,)}, "names of class Eva"),
        ({"attn_pool.latent": (1, 1, 32)}, "attention.*use_cls_token=False"),
    ],
    ids=str,
)
def test_half_of_what_the_model_can_have(added, message):
    tensors = {name: torch.ones(shape) for name, shape in added.items()}
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(timm_tensors() | tensors, **HEADS)


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


def test_timms_name_of_a_model_that_is_not_timms():
    _, theirs = of_transformers("ViTForImageClassification")
    with pytest.raises(ValueError, match=r"transformers' names, not timm's: an architecture .*vit_tiny_patch16_224"):
        convert_checkpoint(theirs.state_dict(), architecture="vit_tiny_patch16_224", num_attention_heads=2)


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


def test_heads_of_a_published_width_are_the_published_ones(caplog):
    assert convert_checkpoint({"model": timm_tensors(D=192, M=8, L=1)}, "deit").config.num_attention_heads == 3
    assert "Assumed 3 heads of 64 channels" in caplog.text


@pytest.mark.slow
def test_heads_of_vit_huge_are_the_published_ones():
    assert convert_checkpoint({"model": timm_tensors(D=1280, M=8, L=1)}, "mae").config.num_attention_heads == 16


def test_heads_that_nothing_tells_are_asked_for(tmp_path):
    """timm has several models of one width; of other families, a width that was never published."""
    for width in (32, 192, 768):
        with pytest.raises(ValueError, match="models of one width differ; pass num_attention_heads=, often"):
            convert_checkpoint(timm_tensors(D=width, M=8, L=1))
    with pytest.raises(ValueError, match="'torchvision' has published no model of width 32; pass num_attention_heads="):
        convert_checkpoint(torchvision_tensors())
    folder = timm_folder(tmp_path, architecture="vit_of_next_year", model_args={"num_heads": None})
    with pytest.raises(ValueError, match=r"timm's vit_of_next_year is not known here.*pass num_attention_heads="):
        convert_checkpoint(folder)
    assert convert_checkpoint(folder, **HEADS).config.num_attention_heads == 4
