"""The later families by their authors' own names: Meta's DINOv3, OpenAI's CLIP, OpenCLIP, big_vision's SigLIP, EVA."""

import json
import re

import numpy as np
import pytest
import torch
from foreign import (
    CLASSES,
    HEADS,
    assert_same_outputs,
    images,
    jax_arrays,
    linear,
    needs_timm,
    norm,
    of_later_classes,
    random_tensors,
    randomised,
    timm,
    timm_folder,
    timm_tensors,
)
from safetensors.torch import save_file

from modeling_vit_scratch.conversion import convert_checkpoint, verify_checkpoint


def renamed(tensors: dict[str, torch.Tensor], *rules: tuple[str, str]) -> dict[str, torch.Tensor]:
    """Each name changed by the first rule whose pattern it has."""
    changed = {}
    for name, tensor in tensors.items():
        pattern, replacement = next((rule for rule in rules if re.search(rule[0], name)), ("$^", ""))
        changed[re.sub(pattern, replacement, name)] = tensor
    return changed


def stacked(tensors: dict[str, torch.Tensor], parts: list[str], whole: str, missing=None) -> dict[str, torch.Tensor]:
    """`whole` in place of queries, keys and values, block by block; `missing` makes a part that is not there."""
    tensors = dict(tensors)
    for name in [name for name in tensors if parts[0] in name]:
        found = [tensors.pop(name.replace(parts[0], part), None) for part in parts]
        found = [missing(found[0]) if part is None else part for part in found]
        tensors[name.replace(parts[0], whole)] = torch.cat(found)
    return tensors


def metas_dinov3(theirs: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The names of Meta's code; its keys have a bias that is masked, and may be anything."""
    tensors = renamed(
        {re.sub(r"^(model\.)?layer\.", "blocks.", name): tensor for name, tensor in theirs.state_dict().items()},
        ("^embeddings.register_tokens", "storage_tokens"),
        (r"^embeddings.patch_embeddings", "patch_embed.proj"),
        (r"^embeddings\.", ""),
        (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
        (r"attention\.o_proj", "attn.proj"),
        (r"attention\.", "attn."),
        (r"mlp\.gate_proj", "mlp.w1"),
        (r"mlp\.up_proj", "mlp.w2" if theirs.config.use_gated_mlp else "mlp.fc1"),
        (r"mlp\.down_proj", "mlp.w3" if theirs.config.use_gated_mlp else "mlp.fc2"),
    )
    tensors = stacked(tensors, ["q_proj", "k_proj", "v_proj"], "qkv", lambda like: torch.full_like(like, torch.nan))
    for name in [name for name in tensors if name.endswith("qkv.bias")]:
        tensors[f"{name}_mask"] = torch.tensor([1.0, torch.nan, 1.0]).repeat_interleave(32)
    return {**tensors, "rope_embed.periods": torch.ones(2)}


@pytest.mark.parametrize("case", ["dinov3", "dinov3, SwiGLU", "dinov3, no biases"])
def test_metas_names_of_dinov3(case, caplog):
    _, theirs = of_later_classes(case, rope_theta=100.0)
    tensors = metas_dinov3(theirs)
    assert "storage_tokens" in tensors and tensors["blocks.0.attn.qkv.weight"].shape == (96, 32)
    source = None if theirs.config.num_register_tokens else "dinov3"  # by which they are told from DINOv2's
    ours = convert_checkpoint(tensors, source, image_size=24, **HEADS)
    assert "(dinov3)" in caplog.text and ours.config.position_embedding_type == "rope"
    assert ours.config.key_bias == (case == "dinov3, no biases")
    assert_same_outputs(ours, theirs)


def openais_names(theirs: torch.nn.Module) -> dict[str, torch.Tensor]:
    tensors = renamed(
        {name.removeprefix("vision_model."): tensor for name, tensor in theirs.state_dict().items()},
        ("^visual_projection.weight", "proj"),
        ("^embeddings.class_embedding", "class_embedding"),
        ("^embeddings.position_embedding.weight", "positional_embedding"),
        ("^embeddings.patch_embedding", "conv1"),
        ("^pre_layrnorm", "ln_pre"),
        ("^post_layernorm", "ln_post"),
    )
    tensors = {name.replace("encoder.layers.", "transformer.resblocks."): tensor for name, tensor in tensors.items()}
    for old, new in {"layer_norm": "ln_", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn": "attn"}.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    tensors = stacked(tensors, ["q_proj.", "k_proj.", "v_proj."], "in_proj_")
    tensors["proj"] = tensors["proj"].T
    return {f"visual.{name}": tensor for name, tensor in tensors.items() if "position_ids" not in name}


TEXT_TOWER = {
    "transformer.resblocks.0.attn.in_proj_weight": (96, 32), "transformer.resblocks.0.ln_1.weight": (32,),
    "positional_embedding": (77, 32), "token_embedding.weight": (100, 32), "ln_final.weight": (32,),
    "text_projection": (32, 8), "logit_scale": (),
}  # fmt: skip


@pytest.mark.parametrize("beside", [{}, TEXT_TOWER], ids=["alone", "beside a text tower"])
def test_openais_names(beside, caplog):
    _, theirs = of_later_classes("clip, projected")
    tensors = openais_names(theirs) | {name: torch.ones(shape) for name, shape in beside.items()}
    with pytest.raises(ValueError, match="does not tell its activation; pass hidden_act="):
        convert_checkpoint(tensors, **HEADS)
    ours = convert_checkpoint(tensors, hidden_act="quick_gelu", **HEADS)
    assert "OpenAI's and OpenCLIP's names (clip)" in caplog.text and ours.config.norm_after_pooling
    assert ("Left out what is not the image tower" in caplog.text) == bool(beside)
    assert_same_outputs(ours, theirs)
    if timm is not None:
        assert verify_checkpoint(tensors, hidden_act="quick_gelu", **HEADS).passed


@needs_timm
def test_open_clips_trunk_of_timm(caplog):
    """OpenCLIP's SigLIP has timm's model below `visual.trunk`."""
    sizes = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
    trunk = timm.models.vision_transformer.VisionTransformer(
        **sizes, class_token=False, global_pool="map", num_classes=0
    )
    trunk = randomised(trunk)
    tensors = {f"visual.trunk.{name}": tensor for name, tensor in trunk.state_dict().items()}
    tensors |= {"logit_bias": torch.ones(()), "text.token_embedding.weight": torch.ones(100, 32)}
    ours = convert_checkpoint(tensors, **HEADS)
    assert ours.config.pooling == "attention" and "Left out what is not the image tower" in caplog.text
    pixels = images(ours)
    with torch.no_grad():
        actual = ours.double().vit(pixels).pooler_output
        torch.testing.assert_close(actual, trunk.double()(pixels), atol=1e-5, rtol=0)


def siglip_arrays(D: int = 32, A: int = 4, M: int = 48) -> dict[str, np.ndarray]:
    """big_vision's, which pools by attention and has no classifier."""
    head, attention = "MAPHead_0", "MAPHead_0/MultiHeadDotProductAttention_0"
    shapes = {f"{head}/probe": (1, 1, D), f"{attention}/out/kernel": (A, D // A, D), f"{attention}/out/bias": (D,)}
    for part in ("query", "key", "value"):
        shapes |= {f"{attention}/{part}/kernel": (D, A, D // A), f"{attention}/{part}/bias": (A, D // A)}
    for number, (inside, outside) in enumerate([(D, M), (M, D)]):
        shapes[f"{head}/MlpBlock_0/Dense_{number}/kernel"] = (inside, outside)
        shapes[f"{head}/MlpBlock_0/Dense_{number}/bias"] = (outside,)
    shapes |= {f"{head}/LayerNorm_0/{leaf}": (D,) for leaf in ("scale", "bias")}
    pooling = {name: tensor.numpy() for name, tensor in random_tensors(shapes, seed=1).items()}
    trunk = {name: array for name, array in jax_arrays(cls=False, big_vision=True).items() if "head/" not in name}
    return {f"params/img/{name}": array for name, array in {**trunk, **pooling}.items()}


@needs_timm
def test_big_visions_siglip_is_what_timm_reads(tmp_path, caplog):
    arrays = siglip_arrays()
    texts = {"params/txt/Embed_0/embedding": np.ones((100, 32)), "params/t": np.ones(1), "params/b": np.ones(1)}
    np.savez(tmp_path / "siglip.npz", **arrays, **texts)
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=24, patch_size=8, embed_dim=32, depth=3, num_heads=4, mlp_ratio=1.5, class_token=False,
        global_pool="map", num_classes=0, act_layer="gelu_tanh",
    )  # fmt: skip
    theirs.load_pretrained(str(tmp_path / "siglip.npz"))
    ours = convert_checkpoint(tmp_path / "siglip.npz")
    assert ours.config.pooling == "attention" and ours.config.num_attention_heads == 4
    assert "Left out the text tower" in caplog.text
    pixels = images(ours)
    with torch.no_grad():
        actual, expected = ours.double().vit(pixels).pooler_output, theirs.double().eval()(pixels)
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
    proof = verify_checkpoint(tmp_path / "siglip.npz")
    assert proof.passed and "attention pooling" in proof.differences


def test_each_array_of_siglip_is_needed():
    arrays = siglip_arrays()
    for name in arrays:
        if "MAPHead_0" in name and not name.endswith("probe"):
            rest = {key: array for key, array in arrays.items() if key != name}
            with pytest.raises(ValueError, match=re.escape(name.removeprefix("params/img/"))):
                convert_checkpoint(rest)


# timm's architectures of the rotary kind, at a small size, and what of ours tells them apart.
ROTARY = {
    "vit_small_patch16_rope_224": {"rope_frequencies": "axial", "rope_theta": 100.0},
    "vit_small_patch16_rope_ape_224": {"position_embedding_type": "learned+rope"},
    "vit_small_patch16_rope_mixed_224": {"rope_frequencies": "mixed", "position_embedding_type": "rope"},
    "vit_small_patch16_rope_mixed_ape_224": {"rope_frequencies": "mixed", "position_embedding_type": "learned+rope"},
    "vit_medium_patch16_rope_reg1_gap_256": {"rope_grid_size": 16, "pooling": "mean", "num_register_tokens": 1},
    "vit_pe_spatial_small_patch16_512": {"rope_offset": 1, "rope_grid_size": 32, "use_embedding_norm": True},
    "vit_small_patch16_dinov3": {"rope_coordinates": "centered", "qkv_bias": False},
    "vit_small_patch16_dinov3_qkvb": {"rope_coordinates": "centered", "key_bias": False},
    "eva02_tiny_patch14_224": {"use_gated_mlp": True, "key_bias": False, "position_embedding_type": "learned+rope"},
    "eva_giant_patch14_224": {"key_bias": False, "position_embedding_type": "learned", "pooling": "mean"},
}


@needs_timm
@pytest.mark.parametrize("size", [24, 56])
@pytest.mark.parametrize("architecture", ROTARY)
def test_timms_rotary_models(architecture, size, tmp_path):
    """Neighbouring channels or halves, x or y first, fixed or learned frequencies, in double precision."""
    arguments = {"img_size": size, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}
    theirs = randomised(timm.create_model(architecture, num_classes=CLASSES, **arguments))
    config = {"architecture": architecture, "num_classes": CLASSES, "model_args": arguments}
    config["global_pool"] = theirs.global_pool
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = convert_checkpoint(tmp_path)
    for name, value in ROTARY[architecture].items():
        assert getattr(ours.config, name) == value, name
    pixels = images(ours)
    with torch.no_grad():
        actual, expected = ours.double()(pixels).logits, theirs.double()(pixels)
    largest = expected.abs().max().item()
    assert largest > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-5 * largest, rtol=0)


def test_tensors_without_positions_do_not_tell_what_is_there_instead(tmp_path):
    shapes = {"cls_token": (1, 1, 32), "patch_embed.proj.weight": (32, 3, 8, 8), "patch_embed.proj.bias": (32,)}
    shapes |= {
        f"blocks.0.{name}": shape
        for name, shape in {
            **norm("norm1", 32), **linear("attn.qkv", 32, 96), **linear("attn.proj", 32, 32), **norm("norm2", 32),
            **linear("mlp.fc1", 32, 48), **linear("mlp.fc2", 48, 32),
        }.items()
    }  # fmt: skip
    save_file(random_tensors(shapes | norm("norm", 32)), tmp_path / "bare.safetensors")
    bare = tmp_path / "bare.safetensors"
    for hints in ({}, {"position_embedding_type": "rope"}):  # which channels make a pair, no field says
        with pytest.raises(ValueError, match=r"may be rotary \(it has no pos_embed\); pass architecture="):
            convert_checkpoint(bare, **HEADS, **hints)
    ours = convert_checkpoint(bare, position_embedding_type="none", **HEADS)
    assert ours.config.position_embedding_type == "none"
    ours = convert_checkpoint(bare, architecture="vit_small_patch16_dinov3", **HEADS)
    assert ours.config.position_embedding_type == "rope" and ours.config.layer_norm_eps == 1e-5


@needs_timm
@pytest.mark.parametrize(
    "name",
    ["vit_base_patch16_rope_224", "vit_base_patch16_rope_mixed_ape_224", "eva02_tiny_patch14_224",
     "vit_base_patch16_dinov3", "vit_base_patch16_rope_ape_224", "eva_giant_patch14_224"],
)  # fmt: skip
def test_bare_tensors_of_timms_eva_need_its_name(name):
    sizes = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 64, "patch_size": 16, "num_classes": CLASSES}
    theirs = randomised(timm.create_model(name, **sizes))
    with pytest.raises(ValueError, match="does not tell its positions, which may be rotary"):
        convert_checkpoint(theirs.state_dict(), num_attention_heads=2)
    ours = convert_checkpoint(theirs.state_dict(), architecture=name, num_attention_heads=2).double()
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.double()(pixels)
        torch.testing.assert_close(ours(pixels).logits, expected, atol=1e-6 * expected.abs().max().item(), rtol=0)
    with pytest.raises(ValueError, match="embeddings of positions, though they are said to be 'none'"):
        convert_checkpoint(timm_tensors(), position_embedding_type="none", **HEADS)


@pytest.mark.parametrize(
    ("architecture", "arguments", "what"),
    [
        ("vit_base_patch16_dinov3", {"rope_grid_offset": 1.0}, "offset of DINOv3's positions"),
        ("eva02_tiny_patch14_224", {"ref_feat_shape": [4, 2]}, "no square"),
        ("naflexvit_base_patch16_gap", {"rope_type": "mrope"}, "rope_type='mrope'"),
    ],
)
def test_arguments_of_timm_that_are_not_followed_are_refused(architecture, arguments, what, tmp_path):
    folder = timm_folder(tmp_path, architecture=architecture, model_args=arguments)
    with pytest.raises(ValueError, match=f"{what}.*which this model has not"):
        convert_checkpoint(folder)
