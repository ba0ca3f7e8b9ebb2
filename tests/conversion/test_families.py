"""Each family of names, against the library's own model or a small reference."""

import numpy as np
import pytest
import torch
import transformers
from foreign import (
    CLASSES,
    HEADS,
    NEAR,
    NEAR_WITH_REGISTER_POSITIONS,
    OF_TRANSFORMERS,
    SIZES,
    TIMM_CASES,
    assert_logits,
    assert_same,
    exact_gelu,
    images,
    jax_arrays,
    jax_logits,
    needs_timm,
    needs_torchvision,
    of_transformers,
    randomised,
    tanh_gelu,
    timm,
    timm_logits,
    timm_tensors,
    torchvision,
    torchvision_logits,
    torchvision_tensors,
)
from safetensors.torch import load_file

from modeling_vit_scratch.conversion import convert_checkpoint, image_processor_for, verify_checkpoint
from modeling_vit_scratch.training.models import with_classes


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


def test_dinov2_head_on_two_inputs(caplog):
    config = transformers.Dinov2Config(**SIZES, mlp_ratio=2, num_labels=CLASSES)
    theirs = randomised(transformers.Dinov2ForImageClassification(config))
    ours = convert_checkpoint(theirs.state_dict(), **HEADS)
    assert ours.config.pooling == "cls+mean" and ours.classifier.weight.shape == (CLASSES, 64)
    assert_same(ours, theirs)
    other = convert_checkpoint(theirs.state_dict(), num_labels=3, **HEADS)
    assert "Made a new head for 3 classes" in caplog.text and other.classifier.weight.shape == (3, 64)
    assert_same(other, theirs.dinov2)


def test_distilled_heads():
    config = transformers.DeiTConfig(**SIZES, intermediate_size=48, num_labels=CLASSES)
    theirs = randomised(transformers.DeiTForImageClassificationWithTeacher(config))
    ours = convert_checkpoint(theirs.state_dict(), **HEADS)
    assert ours.config.num_cls_tokens == 2 and ours.config.num_register_tokens == 0
    assert_same(ours, theirs)
    assert verify_checkpoint(theirs.state_dict(), **HEADS).passed
    other = convert_checkpoint(theirs.state_dict(), num_labels=3, **HEADS)
    assert other.config.num_labels == 3
    assert_same(other, theirs.deit)
    kept = convert_checkpoint(theirs.state_dict(), num_labels=CLASSES, **HEADS)  # as many as there are
    assert kept.classifier.weight.any() and with_classes(kept, ["a", "b"])(images(kept).float()).logits.shape == (2, 2)
    assert verify_checkpoint(theirs.state_dict(), num_labels=3, **HEADS).passed
    state = theirs.state_dict()
    del state["distillation_classifier.bias"]
    with pytest.raises(ValueError, match=r"missing are 1 \(distillation_classifier\.bias\)"):
        convert_checkpoint(state, **HEADS)


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


@needs_timm
def test_timm_distilled_deit(tmp_path):
    sizes = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
    theirs = randomised(timm.models.deit.VisionTransformerDistilled(**sizes, num_classes=CLASSES))
    ours = convert_checkpoint(theirs.state_dict(), **HEADS)
    assert ours.config.num_cls_tokens == 2 and ours.config.num_register_tokens == 0
    pixels = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.double()(pixels)  # the mean of both heads, which is rounded to single precision here
        torch.testing.assert_close(ours.double()(pixels).logits, expected, atol=1e-6, rtol=0)
    assert convert_checkpoint(theirs.state_dict(), num_labels=3, **HEADS).config.num_cls_tokens == 2
