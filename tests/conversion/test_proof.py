"""Conversion proved against the source's own model."""

import sys

import numpy as np
import pytest
import torch
from foreign import (
    CLASSES,
    EXPORTS,
    HEADS,
    NEAR,
    NEAR_WITH_REGISTER_POSITIONS,
    OF_TRANSFORMERS,
    PLAIN,
    TIMM_CASES,
    hints_for,
    jax_arrays,
    needs_timm,
    needs_torchvision,
    of_transformers,
    timm_folder,
    timm_tensors,
    to_export,
    torchvision_tensors,
)
from safetensors.torch import save_file

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.conversion import convert_checkpoint, export_checkpoint, verify_checkpoint, verify_export


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
        proof = verify_checkpoint(checkpoint, num_labels=3, **HEADS)  # with the heads that it has
        assert proof.passed and list(proof.differences)[-1] == "logits"
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
