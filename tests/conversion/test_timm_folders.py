"""Folders of timm, and what of its registry is understood."""

import pytest
import torch
from foreign import HEADS, assert_logits, needs_timm, tanh_gelu, timm, timm_folder, timm_logits, timm_tensors

from modeling_vit_scratch import ViTScratchConfig
from modeling_vit_scratch.conversion import convert_checkpoint, image_processor_for
from modeling_vit_scratch.conversion import loading as loading_module
from modeling_vit_scratch.conversion import planning as planning_module
from modeling_vit_scratch.conversion import reading as reading_module
from modeling_vit_scratch.conversion import recognition as recognition_module


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


@pytest.mark.parametrize("architecture", ["vit_base_patch16_rope_ape_224", "vit_base_patch16_rpn_224"])
def test_timm_architectures_with_the_names_of_a_vit_that_compute_something_else(architecture, tmp_path):
    with pytest.raises(ValueError, match=f"is timm's {architecture}, with "):
        convert_checkpoint(timm_folder(tmp_path, architecture=architecture))


@needs_timm
@pytest.mark.slow
def test_every_vit_of_timm_is_understood_or_refused():
    """Heads, epsilon, activation, pooling and resolution of timm's whole registry, without memory for the weights."""
    activations = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu"}
    understood, refused = [], []
    for name in timm.list_models(["vit_*", "deit*", "flexivit*"]):
        with torch.device("meta"):
            theirs = timm.create_model(name)
        config = {"architecture": name, "global_pool": getattr(theirs, "global_pool", None)}
        opened = reading_module.Checkpoint(dict(theirs.state_dict()), name, config)
        try:
            family, named = recognition_module.recognise(opened, None)
            plan = planning_module.make_plan(opened, family, named, {}, new_head=False)
        except ValueError as error:
            assert any(text in str(error) for text in ("this model has not", "missing are", "SwiGLU"))
            refused.append(name)
            continue
        ours = ViTScratchConfig(**plan.fields)
        needed = loading_module.meta_model(ours).state_dict()
        found = {theirs for name in needed for theirs in named.find(name) if theirs}
        if found != set(named.names) - set(plan.left_out):
            assert "rope.freqs" in named.names  # left over, so refused
            continue
        block = theirs.blocks[0]
        assert isinstance(theirs, timm.models.vision_transformer.VisionTransformer)
        assert ours.num_attention_heads == block.attn.num_heads, name
        assert ours.layer_norm_eps == block.norm1.eps, name
        assert ours.hidden_act == activations[type(block.mlp.act).__name__], name
        assert ours.pooling == {"token": "cls", "avg": "mean"}[theirs.global_pool], name
        assert ours.grid_hw == theirs.patch_embed.grid_size, name
        norms = ours.use_final_norm and not ours.norm_after_pooling, ours.norm_after_pooling
        assert norms == tuple(isinstance(norm, torch.nn.LayerNorm) for norm in (theirs.norm, theirs.fc_norm)), name
        understood.append(name)
    assert len(understood) > 80 and len(refused) > 80


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
