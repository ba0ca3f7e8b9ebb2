"""The way out for what goes beyond the paper's ViT: which model of each library holds it, and what none holds."""

import pytest
import torch
import transformers
from foreign import CLASSES, HEADS, SIZES, images, needs_timm, of_later_classes, randomised, timm

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.conversion import convert_checkpoint, export_checkpoint, verify_export

BASE = {**SIZES, "intermediate_size": 64, "num_labels": CLASSES}
HEADLESS = {**BASE, "num_labels": 0}
DINOV3 = {
    "position_embedding_type": "rope", "key_bias": False, "num_register_tokens": 2, "layerscale_value": 0.1,
    "layer_norm_eps": 1e-5,
}  # fmt: skip
GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
INDEX = {"rope_coordinates": "index", "layer_norm_eps": 1e-6}
MIXED = {**INDEX, "rope_frequencies": "mixed"}
# Model -> its fields, and for each target the class that holds it, or what it lacks.
MODELS = {
    "DINOv3": (HEADLESS | DINOV3, {"transformers": "DINOv3ViTModel", "timm": "Eva", "jax": "registers"}),
    "DINOv3, SwiGLU": (HEADLESS | DINOV3 | GATED, {"transformers": "DINOv3ViTModel", "timm": "Eva"}),
    "DINOv3, no biases": (
        HEADLESS | DINOV3 | {"qkv_bias": False}, {"transformers": "DINOv3ViTModel", "timm": "Eva"},
    ),
    "CLIP": (
        HEADLESS
        | {"use_embedding_norm": True, "norm_after_pooling": True, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
        {
            "transformers": "CLIPVisionModel", "timm": "VisionTransformer", "torchvision": "a norm after the pooling",
            "jax": "a norm after the pooling",
        },
    ),
    "SigLIP": (
        HEADLESS | {"pooling": "attention", "use_cls_token": False, "hidden_act": "gelu_pytorch_tanh"},
        {"transformers": "SiglipVisionModel", "timm": "VisionTransformer", "jax": "", "torchvision": "no class token"},
    ),
    "I-JEPA": (
        BASE | {"pooling": "mean", "use_cls_token": False},
        {"transformers": "IJepaForImageClassification", "timm": "VisionTransformer", "torchvision": "no class token"},
    ),
    "DeiT, distilled": (
        BASE | {"num_cls_tokens": 2},
        {
            "transformers": "DeiTForImageClassificationWithTeacher", "timm": "VisionTransformer",
            "torchvision": "several class tokens", "jax": "several class tokens",
        },
    ),
    "DINOv2, SwiGLU, head on two inputs": (
        BASE | GATED | {"layerscale_value": 0.1, "pooling": "cls+mean", "intermediate_size": 88},
        {"transformers": "Dinov2ForImageClassification", "timm": "pooling by class token and mean"},
    ),
    "DINOv2 with registers, head on two inputs": (
        BASE | {"layerscale_value": 0.1, "pooling": "cls+mean", "num_register_tokens": 2},
        {"transformers": "Dinov2WithRegistersForImageClassification", "jax": "pooling by class token and mean"},
    ),
    "EVA-02": (
        BASE | GATED | INDEX | {"position_embedding_type": "learned+rope", "rope_grid_size": 4, "pooling": "mean",
         "rope_theta": 1e4, "rope_offset": 1},
        {"transformers": "learned positions beside rotary ones", "timm": "Eva"},
    ),
    "RoPE-ViT": (
        BASE | MIXED | {"position_embedding_type": "rope", "use_qk_norm": True},
        {"transformers": "normalised queries and keys", "timm": "Eva", "torchvision": "normalised queries and keys"},
    ),
    "RoPE-ViT, learned positions": (
        BASE | MIXED | {"position_embedding_type": "learned+rope", "use_embedding_norm": True, "pooling": "mean"},
        {"transformers": "mean pooling", "timm": "Eva"},
    ),
    "rotary, not of DINOv3's kind": (
        HEADLESS | INDEX | {"position_embedding_type": "rope", "layerscale_value": 0.1},
        {"transformers": "rotary positions of another kind than DINOv3's", "timm": "Eva", "jax": "layer scale"},
    ),
    "query-key norm, SwiGLU": (
        BASE | GATED | {"use_qk_norm": True},
        {"transformers": "normalised queries and keys", "timm": "VisionTransformer", "jax": "a gated MLP"},
    ),
    "a gated MLP of another activation": (
        BASE | {"use_gated_mlp": True, "layerscale_value": 0.1, "intermediate_size": 88},
        {"transformers": "the activation gelu in a gated MLP", "timm": "the activation gelu in a gated MLP"},
    ),
    "no positions": (
        BASE | {"position_embedding_type": "none"},
        {"transformers": "no positions", "timm": "VisionTransformer", "torchvision": "no positions"},
    ),
    "no key bias": (
        BASE | {"key_bias": False},
        {"transformers": "no layer scale", "timm": "Eva", "jax": "biases of query and value without the key's"},
    ),
    "three class tokens": (
        BASE | {"num_cls_tokens": 3}, dict.fromkeys(("transformers", "timm", "jax"), "several class tokens"),
    ),
    "attention pooling beside registers": (
        HEADLESS | DINOV3 | {"pooling": "attention", "use_cls_token": False},
        {"transformers": "no class token", "timm": "pooling by attention"},
    ),
}  # fmt: skip
PAIRS = [(name, target, goal) for name, (_, goals) in MODELS.items() for target, goal in goals.items()]


def is_a_class(goal: str) -> bool:
    return goal == "" or goal[0].isupper()


def made(name: str) -> ViTScratchForImageClassification:
    model = randomised(ViTScratchForImageClassification(ViTScratchConfig(**MODELS[name][0])))
    if model.config.use_embedding_norm:  # no library's patches have a bias before a norm
        torch.nn.init.zeros_(model.vit.embeddings.patch_embeddings.projection.bias)
    return model


@pytest.mark.parametrize(("name", "target", "goal"), [pair for pair in PAIRS if is_a_class(pair[2])], ids=str)
def test_out_and_back_is_the_identity(name, target, goal, tmp_path):
    model = made(name)
    export_checkpoint(model, target, tmp_path)
    back = convert_checkpoint(tmp_path, num_labels=model.config.num_labels)
    expected = dict(model.state_dict())
    assert set(back.state_dict()) == set(expected)
    for key, tensor in back.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    pixels = images(model).float()
    with torch.no_grad():
        assert torch.equal(back.vit(pixels).pooler_output, model.vit(pixels).pooler_output)
        assert torch.equal(back(pixels).logits, model(pixels).logits)


@pytest.mark.peers
@pytest.mark.parametrize(("name", "target", "goal"), [pair for pair in PAIRS if is_a_class(pair[2])], ids=str)
def test_the_targets_own_model_computes_the_same(name, target, goal):
    if target != "transformers" and timm is None:
        pytest.skip("timm does not import here")
    proof = verify_export(made(name), target)
    assert proof.passed and proof.largest < 1e-5 and goal in proof.reference


@pytest.mark.parametrize(("name", "target", "goal"), [pair for pair in PAIRS if not is_a_class(pair[2])], ids=str)
def test_what_a_target_cannot_hold_is_named(name, target, goal, tmp_path):
    with pytest.raises(ValueError, match=f"{target} has no model with {goal}; it cannot be exported there"):
        export_checkpoint(made(name), target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["DINOv3", "CLIP", "SigLIP"])
def test_a_trained_classifier_is_not_lost(name, tmp_path):
    """transformers has no classifier on these; a new one, all zeros, may be left behind."""
    fields = {**MODELS[name][0], "num_labels": CLASSES}
    model = ViTScratchForImageClassification(ViTScratchConfig(**fields))
    with torch.no_grad():
        model.vit.embeddings.patch_embeddings.projection.bias.zero_()
    assert not model.classifier.weight.any()
    export_checkpoint(model, "transformers", tmp_path)
    with torch.no_grad():
        model.classifier.bias[0] = 1
    with pytest.raises(ValueError, match="has no classifier, and this model's is trained; it cannot be exported"):
        export_checkpoint(model, "transformers", tmp_path)


@pytest.mark.parametrize("target", ["transformers", pytest.param("timm", marks=needs_timm)])
def test_a_fine_tuned_clip_goes_out_with_its_patch_bias_in_the_positions(target, tmp_path):
    """There a patch has no bias, and fine-tuning moves ours from zero."""
    model = made("CLIP")
    bias = model.vit.embeddings.patch_embeddings.projection.bias
    with torch.no_grad():
        bias.copy_(torch.randn(32, generator=torch.Generator().manual_seed(2)) * 2e-3)
    pixels = images(model).float()
    with torch.no_grad():
        before = model.vit(pixels).pooler_output
    position = model.vit.embeddings.position_embeddings.clone()
    export_checkpoint(model, target, tmp_path)
    back = convert_checkpoint(tmp_path)
    moved = back.vit.embeddings.position_embeddings - position
    assert not back.vit.embeddings.patch_embeddings.projection.bias.any() and not moved[:, 0].any()
    torch.testing.assert_close(moved[:, 1:], bias.expand(1, 9, 32), atol=1e-7, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(back.vit(pixels).pooler_output, before, atol=1e-5, rtol=0)
        bias.zero_()
        assert (model.vit(pixels).pooler_output - before).abs().max() > 1e-2  # without it, it is another model
    assert torch.equal(model.vit.embeddings.position_embeddings, position)  # ours keeps its own


def test_a_patch_bias_that_no_position_can_take_is_refused():
    fields = BASE | MIXED | {"position_embedding_type": "rope", "use_embedding_norm": True}
    model = randomised(ViTScratchForImageClassification(ViTScratchConfig(**fields)))
    with pytest.raises(ValueError, match="have no bias, and there are no positions to add this model's to"):
        export_checkpoint(model, "timm")


@pytest.mark.parametrize("case", ["dinov3", "dinov3, SwiGLU", "clip", "siglip", "ijepa, classifier"])
def test_in_then_out_gives_the_same_tensors(case):
    """By the names that the installed version has in memory."""
    _, theirs = of_later_classes(case)
    hints = {"hidden_act": "quick_gelu"} if case == "clip" else {}
    ours = convert_checkpoint(theirs.state_dict(), layer_norm_eps=1e-5, image_size=24, **HEADS, **hints)
    exported, expected = export_checkpoint(ours, "transformers"), theirs.state_dict()
    assert set(exported) | {name for name in expected if name.endswith("position_ids")} == set(expected)
    for name, tensor in exported.items():
        if "mask_token" not in name:
            torch.testing.assert_close(tensor, expected[name], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name", ["DINOv3", "CLIP", "SigLIP"])
def test_transformers_loads_the_folder(name, tmp_path):
    model = made(name)
    export_checkpoint(model, "transformers", tmp_path)
    model_class = getattr(transformers, MODELS[name][1]["transformers"])
    theirs, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    theirs.load_state_dict(export_checkpoint(model, "transformers"))


@needs_timm
@pytest.mark.parametrize(
    "name", ["DINOv3", "EVA-02", "RoPE-ViT", "SigLIP", "DeiT, distilled", "query-key norm, SwiGLU"]
)
def test_timm_loads_the_folder(name, tmp_path):
    model = made(name)
    export_checkpoint(model, "timm", tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).double().eval()
    pixels = images(model)
    with torch.no_grad():
        ours = model.double()
        expected = ours(pixels).logits if model.config.num_labels else ours.vit(pixels).pooler_output
        torch.testing.assert_close(theirs(pixels), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
