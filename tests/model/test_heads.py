"""Masked image modelling and the backbone. What every class has in common is in the other files of this folder."""

import copy
import json
import math
import re

import pytest
import torch
from small_models import FIXED, OBLONG, RICH, TINY, equal, images, inputs, make, oracle, weights_for_transformers
from torch import nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModelForMaskedImageModeling,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Backbone,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTForMaskedImageModeling,
    set_seed,
)

from modeling_vit_scratch import (
    ViTScratchBackbone,
    ViTScratchConfig,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchModel,
)

POOLED_NORM = {**RICH, "norm_after_pooling": True}


@pytest.mark.parametrize("fields", [TINY, FIXED, POOLED_NORM])
@pytest.mark.parametrize("cls", [ViTScratchForMaskedImageModeling, ViTScratchBackbone])
def test_every_parameter_gets_a_gradient(cls, fields):
    """Distributed training stops at one that does not; these heads read tokens, so a norm of the pooled one would."""
    model = make(cls, fields)
    outputs = model(**inputs(model, targets=True))
    (outputs.feature_maps[0].square().mean() if cls is ViTScratchBackbone else outputs.loss).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert model.vit(images(model)).pooler_output is None


# Masked image modelling


def random_mask(model, batch=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, math.prod(model.config.grid_hw), generator=generator) < 0.4


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_equals_transformers(implementation):
    model = make(ViTScratchForMaskedImageModeling, attn_implementation=implementation)
    theirs = oracle(model, ViTForMaskedImageModeling)
    x, mask = images(model), random_mask(model)
    for masked in (mask, mask.long(), torch.zeros_like(mask), torch.ones_like(mask), None):
        with torch.no_grad():
            a = model(x, bool_masked_pos=masked, output_hidden_states=True, output_attentions=True)
            b = theirs(x, bool_masked_pos=masked, output_hidden_states=True, output_attentions=True)
        equal(a.reconstruction, b.reconstruction, 1e-5)
        assert (a.loss is None) == (masked is None)
        if masked is not None:
            equal(a.loss, b.loss, 1e-5)
        for name in ("hidden_states", "attentions"):
            for ours, other in zip(a[name], b[name], strict=True):
                equal(ours, other, 2e-5)


def test_gradients_equal_transformers():
    model = make(ViTScratchForMaskedImageModeling)
    theirs = oracle(model, ViTForMaskedImageModeling)
    x, mask = images(model), random_mask(model)
    model(x, bool_masked_pos=mask).loss.backward()
    theirs(x, bool_masked_pos=mask).loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.grad)
    for name, gradient in weights_for_transformers(model).items():
        equal(gradient, gradients[name], 2e-5)


@pytest.mark.parametrize("fields", [TINY, OBLONG, RICH, FIXED])
def test_tokens_decode_to_the_pixels_of_their_patch(fields):
    """`fold` is torch's own inverse of cutting patches."""
    model = make(ViTScratchForMaskedImageModeling, fields)
    x, mask = images(model), random_mask(model)
    outputs = model(x, bool_masked_pos=mask)
    tokens = model.vit(x, bool_masked_pos=mask).last_hidden_state[:, model.config.num_prefix_tokens :]
    pixels = model.decoder(tokens).transpose(1, 2)
    hw, patch_hw = model.config.image_hw, model.config.patch_hw
    equal(outputs.reconstruction, nn.functional.fold(pixels, hw, patch_hw, stride=patch_hw), 1e-6)
    assert outputs.reconstruction.shape == x.shape


@pytest.mark.parametrize("fields", [TINY, OBLONG])
def test_loss_is_the_mean_error_of_masked_pixels(fields):
    model = make(ViTScratchForMaskedImageModeling, fields)
    x, mask = images(model), random_mask(model)
    outputs = model(x, bool_masked_pos=mask)
    (h, w), (ph, pw) = model.config.grid_hw, model.config.patch_hw
    errors = []
    for b in range(3):
        for i in mask[b].nonzero().flatten().tolist():
            rows, columns = i // w * ph, i % w * pw
            window = (b, slice(None), slice(rows, rows + ph), slice(columns, columns + pw))
            errors.append((outputs.reconstruction[window] - x[window]).abs().mean())
    assert 0 < len(errors) < 3 * h * w
    equal(outputs.loss, torch.stack(errors).mean(), 1e-6)
    equal(model(x, bool_masked_pos=mask.reshape(3, h, w)).loss, outputs.loss)


def test_masked_patches_are_not_seen():
    model = make(ViTScratchForMaskedImageModeling, OBLONG)
    x, mask = images(model), random_mask(model)
    hidden = mask.reshape(3, 1, *model.config.grid_hw).float()
    hidden = nn.functional.interpolate(hidden, model.config.image_hw).bool()
    other = torch.where(hidden, torch.randn_like(x), x)
    with torch.no_grad():
        equal(model(x, bool_masked_pos=mask).reconstruction, model(other, bool_masked_pos=mask).reconstruction, 1e-6)
        seen = torch.where(hidden, x, torch.randn_like(x))
        difference = model(x, bool_masked_pos=mask).reconstruction - model(seen, bool_masked_pos=mask).reconstruction
    assert difference.abs().max() > 0.1


def test_mask_token_takes_the_place_of_the_patch_but_not_of_its_position():
    embeddings = make(ViTScratchForMaskedImageModeling, RICH).vit.embeddings
    x, mask = torch.randn(1, 3, 16, 24), torch.tensor([[True] + [False] * 11])
    before, after = embeddings(x, None, False), embeddings(x, mask, False)
    assert (before != after).any(-1)[0].nonzero().flatten().tolist() == [4]  # class token, 3 registers, first patch
    equal(after[0, 4], embeddings.mask_token[0, 0] + embeddings.position_embeddings[0, 1])


def test_no_masked_patch_gives_a_loss_of_zero_and_finite_gradients():
    model = make(ViTScratchForMaskedImageModeling).train()
    loss = model(images(model), bool_masked_pos=torch.zeros(3, 16, dtype=torch.long)).loss
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_any_size():
    model = make(ViTScratchForMaskedImageModeling, OBLONG)
    x = torch.randn(2, 3, 24, 40)
    mask = torch.rand(2, 3 * 10) < 0.5
    outputs = model(x, bool_masked_pos=mask, interpolate_pos_encoding=True)
    assert outputs.reconstruction.shape == x.shape
    assert outputs.loss > 0


def test_stride_must_be_the_patch_size_where_pixels_are_compared():
    model = make(ViTScratchForMaskedImageModeling, OBLONG, encoder_stride=2)
    x, mask = images(model), random_mask(model)
    with pytest.raises(ValueError, match=r"encoder_stride \(2, 2\) must equal patch_size \(8, 4\).*=\(8, 4\)"):
        model(x, bool_masked_pos=mask)
    outputs = model(x)
    assert outputs.loss is None
    assert outputs.reconstruction.shape == (3, 3, 2 * 2, 6 * 2)


def test_masks_that_do_not_fit_are_refused():
    model = make(ViTScratchForMaskedImageModeling)
    for shape in [(3, 15), (3, 17), (3, 1), (2, 16), (1, 16), (16,)]:
        with pytest.raises(ValueError, match=r"bool_masked_pos of shape .* must be \(3, 16\)"):
            model(images(model), bool_masked_pos=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("cls", [ViTScratchModel, ViTScratchForImageClassification])
def test_masks_need_a_mask_token(cls):
    model = make(cls)
    with pytest.raises(ValueError, match="use_mask_token=True"):
        model(images(model), bool_masked_pos=random_mask(model))


def test_base_model_with_a_mask_token(tmp_path):
    head = make(ViTScratchForMaskedImageModeling)
    head.save_pretrained(tmp_path)
    model, report = ViTScratchModel.from_pretrained(tmp_path, use_mask_token=True, output_loading_info=True)
    assert set(report["unexpected_keys"]) == {"decoder.weight", "decoder.bias"}
    x, mask = images(model), random_mask(model)
    with torch.no_grad():
        equal(model(x, bool_masked_pos=mask).last_hidden_state, head.vit(x, bool_masked_pos=mask).last_hidden_state)


def test_auto_class_and_fine_tuning_from_pre_training(tmp_path):
    model = AutoModelForMaskedImageModeling.from_config(ViTScratchConfig(**TINY))
    assert type(model) is ViTScratchForMaskedImageModeling
    model.save_pretrained(tmp_path)
    assert type(AutoModelForMaskedImageModeling.from_pretrained(tmp_path)) is ViTScratchForMaskedImageModeling
    classifier = ViTScratchForImageClassification.from_pretrained(tmp_path, num_labels=7)
    state = classifier.vit.state_dict()
    equal(state, {name: model.vit.state_dict()[name] for name in state})
    assert classifier(images(model)).logits.shape == (3, 7)


def test_fine_tuning_with_a_norm_after_pooling_starts_it_anew(tmp_path):
    model = make(ViTScratchForMaskedImageModeling, POOLED_NORM)
    model.save_pretrained(tmp_path)
    classifier, report = ViTScratchForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert {name for name in report["missing_keys"] if name.startswith("vit.")} == {
        "vit.pooled_norm.weight",
        "vit.pooled_norm.bias",
    }
    assert (classifier.vit.pooled_norm.weight == 1).all()
    assert (classifier.vit.pooled_norm.bias == 0).all()


# Backbone


@pytest.mark.parametrize("fields", [TINY, OBLONG, RICH, FIXED, {**TINY, "use_final_norm": False}, POOLED_NORM])
def test_maps_are_the_normalised_patch_tokens_in_their_places(fields):
    model = make(ViTScratchBackbone, fields, out_indices=[0, 1, 2])
    x = images(model)
    outputs = model(x, output_hidden_states=True)
    h, w = model.config.grid_hw
    assert len(outputs.feature_maps) == len(outputs.hidden_states) == 3
    for feature_map, state in zip(outputs.feature_maps, outputs.hidden_states, strict=True):
        assert feature_map.shape == (3, 32, h, w)
        tokens = model.vit.norm(state)[:, model.config.num_prefix_tokens :]
        for row in range(h):
            for column in range(w):
                equal(feature_map[:, :, row, column], tokens[:, row * w + column])
    last = model.vit(x).last_hidden_state[:, model.config.num_prefix_tokens :]
    equal(outputs.feature_maps[-1].flatten(2).transpose(1, 2), last, 1e-6)


def test_chosen_stages():
    every = make(ViTScratchBackbone, num_hidden_layers=3, out_indices=[0, 1, 2, 3])
    x = images(every)
    maps = every(x).feature_maps
    for fields, features, indices, stages in [
        ({}, ["stage3"], [3], [3]),
        ({"out_features": ["stem", "stage2"]}, ["stem", "stage2"], [0, 2], [0, 2]),
        ({"out_indices": [1, 3]}, ["stage1", "stage3"], [1, 3], [1, 3]),
        ({"out_indices": (1, 2)}, ["stage1", "stage2"], [1, 2], [1, 2]),
        ({"out_indices": [-2, -1]}, ["stage2", "stage3"], [-2, -1], [2, 3]),
        ({"out_features": ["stage1"], "out_indices": [1]}, ["stage1"], [1], [1]),
        ({"out_features": None, "out_indices": None}, ["stage3"], [3], [3]),
    ]:
        model = make(ViTScratchBackbone, num_hidden_layers=3, **fields)
        assert (model.out_features, model.out_indices) == (features, indices)
        assert (model.config.out_features, model.config.out_indices) == (features, indices)
        assert model.stage_names == model.config.stage_names == ["stem", "stage1", "stage2", "stage3"]
        assert model.channels == [32] * len(stages)
        assert model.num_features == [32] * 4
        assert model.out_feature_channels == dict.fromkeys(model.stage_names, 32)
        outputs = model(x)
        assert len(outputs.feature_maps) == len(stages)
        for feature_map, stage in zip(outputs.feature_maps, stages, strict=True):
            equal(feature_map, maps[stage])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"out_features": ["stage4"]}, r"out_features \('stage4'\) is unknown.*stem, stage1, stage2"),
        ({"out_indices": [3]}, r"out_indices asks for stage 3, but there are 3: use -3 to 2"),
        ({"out_indices": [-4]}, r"out_indices \(-4\) must be at least -3"),
        ({"out_indices": [1, 1]}, r"\[1, 1\] must name each stage once, in order; use \[1\]"),
        ({"out_indices": [2, -1]}, r"\[2, -1\] must name each stage once, in order; use \[2\]"),
        ({"out_indices": [2, 0]}, r"\[2, 0\] must name each stage once, in order; use \[0, 2\]"),
        ({"out_features": ["stage2", "stem"]}, r"\[2, 0\] must name each stage once, in order; use \[0, 2\]"),
        ({"out_features": ["stage1"], "out_indices": [2]}, r"\['stage1'\] and out_indices \[2\] differ"),
        ({"out_indices": ["stage1"]}, r"out_indices must be a whole number, got 'stage1'"),
        ({"out_features": "stage1"}, r"out_features .* unknown"),
    ],
)
def test_wrong_stages_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        ViTScratchConfig(**TINY, **fields)


def test_only_a_choice_of_stages_is_written(tmp_path):
    ViTScratchConfig(**TINY).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert not {"stage_names", "out_features", "out_indices"} & set(fields)
    ViTScratchConfig(**TINY, out_features=["stem", "stage1"]).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["out_indices"] == [0, 1]
    assert not {"stage_names", "out_features", "_out_stages"} & set(fields)
    assert AutoConfig.from_pretrained(tmp_path).out_features == ["stem", "stage1"]


def test_only_a_choice_of_tokens_and_norm_is_written(tmp_path):
    """The config.json of a model that is no backbone is the one of before the two fields."""
    ViTScratchConfig(**TINY).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert not {"reshape_hidden_states", "apply_layernorm"} & set(fields)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.reshape_hidden_states is loaded.apply_layernorm is True
    for name in ("reshape_hidden_states", "apply_layernorm"):
        ViTScratchConfig(**TINY, **{name: False}).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())[name] is False
        assert getattr(AutoConfig.from_pretrained(tmp_path), name) is False
        with pytest.raises(ValueError, match=f"{name} must be True or False, got 1"):
            ViTScratchConfig(**TINY, **{name: 1})


def test_loading_with_another_number_of_layers(tmp_path):
    for chosen, layers, expected in [
        (None, 1, ["stage1"]),
        (None, 5, ["stage5"]),
        ([-1], 5, ["stage5"]),
        ([0, 1], 1, ["stem", "stage1"]),
        ([1, 2], 5, ["stage1", "stage2"]),
    ]:
        ViTScratchBackbone(ViTScratchConfig(**TINY, out_indices=chosen)).save_pretrained(tmp_path)
        model = ViTScratchBackbone.from_pretrained(tmp_path, num_hidden_layers=layers)
        assert model.out_features == expected
        assert len(model.stage_names) == len(model.num_features) == layers + 1
        assert len(model(images(model)).feature_maps) == len(expected)
    with pytest.raises(ValueError, match="out_indices asks for stage 2, but there are 2"):
        ViTScratchBackbone.from_pretrained(tmp_path, num_hidden_layers=1)


def test_stages_chosen_on_loading_and_later(tmp_path):
    make(ViTScratchForImageClassification).save_pretrained(tmp_path)
    model = ViTScratchBackbone.from_pretrained(tmp_path, out_features=["stem", "stage1"])
    assert len(model(images(model)).feature_maps) == 2
    assert ViTScratchBackbone.from_pretrained(tmp_path, out_indices=[0, 2]).out_features == ["stem", "stage2"]
    model.out_indices = [1, 2]
    assert model.out_features == ["stage1", "stage2"]
    assert len(model(images(model)).feature_maps) == 2
    model.config.out_features = ["stage2"]
    assert len(model(images(model)).feature_maps) == 1
    changed = copy.deepcopy(model.config)
    changed.out_features = None
    assert ViTScratchBackbone(changed).out_features == ["stage2"]


def test_hidden_states_and_maps_only_on_request():
    model = make(ViTScratchBackbone, num_hidden_layers=3, out_indices=[1, 3])
    x = images(model)
    plain = model(x)
    assert list(plain) == ["feature_maps"]
    assert isinstance(plain.feature_maps, tuple)
    outputs = model(x, output_hidden_states=True, output_attentions=True)
    assert (len(outputs.hidden_states), len(outputs.attentions)) == (4, 3)
    some = model(x, output_hidden_states=[0], output_attentions=-1)
    assert [state is None for state in some.hidden_states] == [False, True, True, True]
    assert [maps is None for maps in some.attentions] == [True, True, False]
    assert len(some.feature_maps) == 2
    assert len(model(x, return_dict=False)) == 1


def test_images_of_any_size_that_the_patch_divides():
    model = make(ViTScratchBackbone, OBLONG)
    for size in [(16, 24), (8, 4), (32, 60)]:
        assert model(torch.randn(2, 3, *size)).feature_maps[0].shape == (2, 32, size[0] // 8, size[1] // 4)
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
        model(torch.randn(2, 3, 8, 4), interpolate_pos_encoding=False)


def test_auto_backbone():
    config = ViTScratchConfig(**TINY, out_features=["stage1"])
    model = AutoBackbone.from_config(config)
    assert type(model) is ViTScratchBackbone
    assert model.channels == [32]
    assert ViTScratchBackbone._auto_class == "AutoBackbone"


@pytest.mark.parametrize("fields", [TINY, RICH, FIXED], ids=["tiny", "rich", "fixed"])
@pytest.mark.parametrize("norm", [True, False])
def test_maps_as_tokens_and_without_the_norm(fields, norm):
    """All tokens then, the class token and the registers among them, as `Dinov2Backbone` returns them."""
    maps = make(ViTScratchBackbone, fields, out_indices=[1, 2], apply_layernorm=norm)
    tokens = make(ViTScratchBackbone, fields, out_indices=[1, 2], apply_layernorm=norm, reshape_hidden_states=False)
    x, prefix = images(maps), maps.config.num_prefix_tokens
    outputs = tokens(x, output_hidden_states=True)
    assert len(outputs.feature_maps) == 2
    for feature_map, sequence, state in zip(
        maps(x).feature_maps, outputs.feature_maps, outputs.hidden_states[1:], strict=True
    ):
        equal(sequence, tokens.vit.norm(state) if norm else state)
        assert norm == (sequence - state).abs().max().gt(0.1)
        assert sequence.shape == (3, prefix + math.prod(maps.config.grid_hw), 32)
        equal(feature_map.flatten(2).mT, sequence[:, prefix:])


def weights_for_dinov2(model) -> dict:
    """Ours under the names of transformers' DINOv2, of which older versions have others for attention."""
    state = {}
    for name, tensor in model.vit.state_dict().items():
        name = re.sub("^norm", "layernorm", name).replace("layers.", "encoder.layer.").replace(".scale", ".lambda1")
        if name.endswith("projection.weight"):
            tensor = tensor.reshape(tensor.shape[0], model.config.num_channels, *model.config.patch_hw)
        state[name] = tensor
        for other in ("attention.o_proj", "attention.output.dense"):
            state[name.replace("attention.proj", other)] = tensor
        for word, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True) if "qkv" in name else ():
            for other in (f"{word[0]}_proj", f"attention.{word}"):
                state[name.replace("qkv", other)] = part
    return state


@pytest.mark.parametrize("reshape", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_maps_equal_those_of_dinov2(reshape, norm):
    options = {"reshape_hidden_states": reshape, "apply_layernorm": norm, "out_indices": [0, 1, 2]}
    ours = make(ViTScratchBackbone, {**TINY, "intermediate_size": 64, "layerscale_value": 1.0}, **options)
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "layer_norm_eps")
    config = Dinov2Config(**{name: getattr(ours.config, name) for name in same}, mlp_ratio=2, **options)
    theirs = Dinov2Backbone(config).eval()
    assert theirs.load_state_dict(weights_for_dinov2(ours), strict=False).missing_keys == ["embeddings.mask_token"]
    x = images(ours)
    for a, b in zip(ours(x).feature_maps, theirs(x).feature_maps, strict=True):
        equal(a, b, 2e-5)


def dense_model(name, backbone):
    """A small model of transformers for dense prediction around our backbone, with random weights."""
    necks = {"neck_hidden_sizes": [8, 12, 16, 16], "fusion_hidden_size": 8, "backbone_config": backbone}
    if name == "DPT":
        config = DPTConfig(**necks, hidden_size=32, reassemble_factors=[4, 2, 1, 0.5], num_labels=3)
        return DPTForDepthEstimation(config)
    if name == "Depth Anything":
        config = DepthAnythingConfig(
            **necks, patch_size=backbone.patch_size, reassemble_hidden_size=32, head_hidden_size=8
        )
        return DepthAnythingForDepthEstimation(config)
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=16, pool_scales=[1, 2], auxiliary_in_channels=32, auxiliary_channels=8
    )
    return UperNetForSemanticSegmentation(config)


@pytest.mark.parametrize("name", ["DPT", "Depth Anything", "UperNet"])
def test_dense_heads_of_transformers(name, tmp_path):
    """Forward, backward, and saved and loaded; DPT and Depth Anything read tokens, UperNet maps."""
    set_seed(0)
    fields = {**TINY, "num_hidden_layers": 4, "image_size": 32}
    backbone = ViTScratchConfig(**fields, out_indices=[1, 2, 3, 4], reshape_hidden_states=name == "UperNet")
    model = dense_model(name, backbone).train()
    assert type(model.backbone) is ViTScratchBackbone
    x = torch.randn(2, 3, 32, 32)
    outputs = model(x)
    answer = outputs.logits if name == "UperNet" else outputs.predicted_depth
    assert answer.shape[0] == 2
    assert answer.shape[-1] == answer.shape[-2] == (8 * 16 if name == "DPT" else 32)  # DPT takes a patch for 16 pixels
    answer.square().mean().backward()
    for parameter, tensor in model.backbone.named_parameters():
        assert tensor.grad is not None and tensor.grad.isfinite().all(), parameter
        assert (tensor.grad != 0).any() or parameter.endswith("cls_token"), parameter
    model.eval().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.backbone_config.reshape_hidden_states == (name == "UperNet")
    with torch.no_grad():
        for a, b in zip(loaded(x).to_tuple(), model(x).to_tuple(), strict=True):
            equal(a, b)


def test_inside_a_segmentation_model(tmp_path):
    """Trained for a few steps, saved and loaded."""
    set_seed(0)
    backbone = ViTScratchConfig(**{**RICH, "num_hidden_layers": 4}, out_features=["stem", "stage1", "stage2", "stage4"])
    config = UperNetConfig(
        backbone_config=backbone,
        hidden_size=16,
        pool_scales=[1, 2],
        auxiliary_in_channels=32,
        auxiliary_channels=8,
        num_labels=3,
    )
    model = UperNetForSemanticSegmentation(config).train()
    assert type(model.backbone) is ViTScratchBackbone
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert 0.01 < start["backbone.vit.layers.0.mlp.fc1.weight"].std() < 0.03
    assert (start["backbone.vit.layers.0.layer_scale1.scale"] == 0.5).all()

    x = torch.randn(2, 3, 16, 24)
    labels = torch.zeros(2, 16, 24, dtype=torch.long)
    labels[:, :, 12:] = 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        outputs = model(x, labels=labels)
        outputs.loss.backward()
        optimizer.step()
        losses.append(outputs.loss.item())
    assert outputs.logits.shape == (2, 3, 16, 24)
    assert losses[-1] < 0.8 * losses[0]
    moved = {name for name, p in model.named_parameters() if (p != start[name]).any()}
    assert {name for name in start if name.startswith("backbone.")} <= moved

    model.eval().save_pretrained(tmp_path)
    loaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    assert loaded.config.backbone_config.out_features == backbone.out_features
    with torch.no_grad():
        equal(loaded(x).logits, model(x).logits)
        bigger = model(torch.randn(1, 3, 32, 24), output_hidden_states=True, output_attentions=True)
    assert bigger.logits.shape == (1, 3, 32, 24)
    assert (len(bigger.hidden_states), len(bigger.attentions)) == (5, 4)


def test_inputs_of_the_shared_tests_mask_something():
    model = make(ViTScratchForMaskedImageModeling)
    assert 0 < inputs(model, targets=True)["bool_masked_pos"].sum() < 48
