"""The way out, and in again."""

import numpy as np
import pytest
import torch
import transformers
from foreign import (
    EXPORTS,
    NEAR,
    PLAIN,
    assert_logits,
    assert_same,
    exact_gelu,
    hints_for,
    images,
    jax_arrays,
    jax_logits,
    needs_timm,
    timm,
    timm_logits,
    to_export,
    torchvision_logits,
)

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.conversion import convert_checkpoint, export_checkpoint, image_processor_for


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
    image = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    expected, actual = (p(image, return_tensors="pt")["pixel_values"] for p in (processor, back))
    assert back.resample == resample
    torch.testing.assert_close(actual, expected, atol=0.03, rtol=0)  # with torchvision, a level of 255 off in places
