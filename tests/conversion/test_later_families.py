"""DINOv3, CLIP, SigLIP, I-JEPA, MSN and the heads of DINOv2 and DeiT, against transformers' own classes."""

import pytest
import torch
import transformers
from foreign import HEADS, LATER_CLASSES, assert_same_outputs, of_later_classes

from modeling_vit_scratch.conversion import convert_checkpoint, image_processor_for, verify_checkpoint


@pytest.mark.parametrize("where", ["memory", "folder"])
@pytest.mark.parametrize("case", LATER_CLASSES)
def test_later_classes(case, where, tmp_path, caplog):
    """By the names in memory with what nothing tells as hints, and by those on the Hub with a config.json."""
    family, theirs = of_later_classes(case)
    if where == "folder":
        theirs.save_pretrained(tmp_path)
        ours = convert_checkpoint(tmp_path)
        assert "Assumed" not in caplog.text
    else:
        config = getattr(theirs.config, "vision_config", theirs.config)
        hints = {"layer_norm_eps": config.layer_norm_eps, "hidden_act": config.hidden_act}
        hints |= {"rope_theta": config.rope_theta} if "SwiGLU" in case and family == "dinov3" else {}
        hints = {**hints, "hidden_act": "silu"} if family.startswith("dinov2") and "SwiGLU" in case else hints
        hints |= {"source": "msn"} if family == "msn" else {}  # whose names are ViT's
        ours = convert_checkpoint(theirs.state_dict(), **HEADS, **hints)
    assert f"({family})" in caplog.text and not ours.training
    assert_same_outputs(ours, theirs)


@pytest.mark.parametrize("case", LATER_CLASSES)
def test_later_classes_are_proved_block_by_block(case, tmp_path):
    _, theirs = of_later_classes(case)
    theirs.save_pretrained(tmp_path)
    proof = verify_checkpoint(tmp_path)
    assert proof.passed and proof.largest < 1e-5 and proof.reference.startswith("transformers'")
    assert list(proof.differences)[:4] == ["embeddings", "block 1", "block 2", "block 3"]
    assert ("logits" in proof.differences) == ("classifier" in case or "heads" in case)
    assert ("attention pooling" in proof.differences) == (case in ("siglip", "siglip, two towers"))


def test_rotary_positions_of_images_of_another_size(tmp_path):
    _, theirs = of_later_classes("dinov3")
    theirs.save_pretrained(tmp_path)
    ours = convert_checkpoint(tmp_path, image_size=(16, 40))
    assert ours.config.grid_hw == (2, 5)
    assert_same_outputs(ours, theirs)


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        ("dinov3", {"rope_theta": 50.0}),
        ("dinov3", {"layer_norm_eps": 1e-6}),
        ("clip", {"hidden_act": "gelu"}),
        ("clip", {"num_attention_heads": 8}),
        ("siglip", {"hidden_act": "gelu"}),
        ("dinov2, classifier", {"layer_norm_eps": 1e-5}),
    ],
    ids=str,
)
def test_a_wrong_hint_fails_the_proof(case, wrong, tmp_path):
    _, theirs = of_later_classes(case)
    theirs.save_pretrained(tmp_path)
    assert not verify_checkpoint(tmp_path, **wrong).passed


# Families whose published widths tell what tensors cannot: case -> width, heads.
PUBLISHED = {
    "dinov3": (192, 3), "dinov2, SwiGLU": (1536, 24), "siglip": (1152, 16), "msn": (384, 6), "ijepa": (1408, 16),
    "deit, two heads": (192, 3),
}  # fmt: skip


@pytest.mark.parametrize("case", PUBLISHED)
def test_bare_tensors_of_a_published_width_need_no_hints(case, caplog):
    width, heads = PUBLISHED[case]
    fields = {"num_hidden_layers": 1, "hidden_size": width, "num_attention_heads": heads}
    fields |= {"mlp_ratio": 1} if case.startswith("dinov2") else {"intermediate_size": 8}
    fields |= {"layer_norm_eps": 1e-12} if case.startswith("deit") else {}
    _, theirs = of_later_classes(case, **fields)
    ours = convert_checkpoint(theirs.state_dict(), "msn" if case == "msn" else None)
    assert f"Assumed {heads} heads" in caplog.text
    assert ours.config.hidden_act == ("silu" if "SwiGLU" in case else theirs.config.hidden_act)  # changes little
    assert_same_outputs(ours, theirs)


@pytest.mark.parametrize("case", ["clip", "clip, projected", "clip, two towers", "clip, classifier"])
def test_bare_clip_does_not_tell_its_activation(case):
    """OpenAI's has QuickGELU, most of OpenCLIP's GELU."""
    _, theirs = of_later_classes(case)
    with pytest.raises(ValueError, match=r"does not tell its activation; pass hidden_act='quick_gelu' .*'gelu'"):
        convert_checkpoint(theirs.state_dict(), **HEADS)
    with pytest.raises(ValueError, match="'clip' has published no model of width 32; pass num_attention_heads="):
        convert_checkpoint(theirs.state_dict(), hidden_act="quick_gelu")


def test_a_text_tower_and_projections_are_left_out(caplog):
    for case in ("clip, two towers", "siglip, two towers"):
        caplog.clear()
        convert_checkpoint(of_later_classes(case)[1].state_dict(), hidden_act="gelu", **HEADS)
        assert "Left out the text tower" in caplog.text
        assert ("the projection to the texts' space" in caplog.text) == case.startswith("clip")


def test_the_class_on_one_input_of_two(tmp_path):
    """A head of DINOv2 that was trained on the class token alone, or on the mean, needs no more of ours."""
    for half, pooling in ((slice(32, None), "cls"), (slice(0, 32), "mean")):
        _, theirs = of_later_classes("dinov2, classifier")
        with torch.no_grad():
            theirs.classifier.weight[:, half] = 0
        ours = convert_checkpoint(theirs.state_dict(), **HEADS)
        assert ours.config.pooling == pooling and ours.classifier.weight.shape[1] == 32
        assert_same_outputs(ours, theirs)


def numbers(processor, image) -> torch.Tensor:
    return processor(image, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize(
    ("case", "name"), [("clip", "CLIPImageProcessorPil"), ("siglip", "SiglipImageProcessorPil")], ids=str
)
def test_processors_are_the_ones_of_transformers(case, name):
    """Of bare tensors, with the sizes that the family publishes: CLIP crops, SigLIP squashes."""
    _, theirs = of_later_classes(case, image_size=224, patch_size=56)
    state = theirs.state_dict()
    ours = convert_checkpoint(state, hidden_act="gelu", **HEADS)
    processor, expected = image_processor_for(state, ours), getattr(transformers, name)()
    image = torch.randint(0, 256, (300, 400, 3), generator=torch.Generator().manual_seed(0)).numpy().astype("uint8")
    actual = numbers(processor, image)
    assert actual.shape == (1, 3, 224, 224) and processor.resample == 3
    torch.testing.assert_close(actual, numbers(expected, image), atol=1e-5, rtol=0)


def test_processor_of_dinov3():
    """Squashed, bilinear, with ImageNet's mean, as transformers' own that needs torchvision."""
    _, theirs = of_later_classes("dinov3", image_size=224, patch_size=56)
    processor = image_processor_for(theirs.state_dict(), convert_checkpoint(theirs.state_dict(), **HEADS))
    assert dict(processor.size) == {"height": 224, "width": 224} and processor.resample == 2
    assert not getattr(processor, "do_center_crop", None) and list(processor.image_mean) == [0.485, 0.456, 0.406]


@pytest.mark.slow
def test_each_tensor_of_the_later_classes_is_needed():
    for case in ("dinov3, SwiGLU", "dinov2, SwiGLU", "clip", "siglip"):
        _, theirs = of_later_classes(case)
        tensors = theirs.state_dict()
        for name in tensors:
            if name.endswith(("mask_token", "position_ids", "register_tokens")):
                continue  # of no use here; and without registers it is another, whole model
            rest = {key: tensor for key, tensor in tensors.items() if key != name}
            try:
                convert_checkpoint(rest, hidden_act="silu" if "SwiGLU" in case else "gelu", **HEADS)
            except ValueError:
                continue
            raise AssertionError(f"{case} was taken without {name}.")
