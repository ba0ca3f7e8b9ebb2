"""Folders of timm."""

import re

import pytest
from foreign import HEADS, assert_logits, tanh_gelu, timm_folder, timm_logits, timm_tensors

from modeling_vit_scratch.conversion import convert_checkpoint, image_processor_for
from modeling_vit_scratch.conversion.architectures import REFUSED_ARCHITECTURES


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


# One at least for each of the patterns that are refused.
ARCHITECTURES_REFUSED = [
    "eva02_base_patch14_224", "beit_base_patch16_224", "vit_relpos_base_patch16_224", "vit_base_patch16_rpn_224",
    "vit_pe_core_base_patch16_224", "vit_giant_patch16_sapiens2", "vit_base_patch16_xp_224",
    "vit_small_patch16_18x2_224", "vit_dlittle_patch16_reg1_gap_256", "vit_base_r50_s16_224",
    "naflexvit_base_patch16_parfac_gap",
]  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES_REFUSED)
def test_timm_architectures_with_the_names_of_a_vit_that_compute_something_else(architecture, tmp_path):
    with pytest.raises(ValueError, match=f"is timm's {architecture}, with .*, which this model has not"):
        convert_checkpoint(timm_folder(tmp_path, architecture=architecture))


def test_each_refusal_of_an_architecture_is_tried():
    tried = ARCHITECTURES_REFUSED
    assert all(any(re.fullmatch(pattern, name) for name in tried) for pattern in REFUSED_ARCHITECTURES)


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
