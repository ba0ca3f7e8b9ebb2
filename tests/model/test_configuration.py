"""The configuration: defaults, round trips, refusals, presets."""

import copy
import dataclasses
import json
import re
from difflib import SequenceMatcher

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, ViTConfig

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchModel
from modeling_vit_scratch.configuration_vit_scratch import AUTO_MAP, POSITION_INTERPOLATIONS, PRESETS, nearest

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TINY |= {"image_size": 16, "patch_size": 4}

# Fields of transformers' ViTConfig that this config leaves out (the dense pooler) or gives another default.
NO_SUCH_FIELD = {"pooler_output_size", "pooler_act"}
OTHER_DEFAULT = {"layer_norm_eps": 1e-6}

# Published counts (ViT, table 1; DeiT, table 1) at 224 px with 1000 classes, and the teaching model's.
PARAMETERS = {
    "showcase": 847_626,
    "tiny": 5_717_416,
    "small": 22_050_664,
    "base": 86_567_656,
    "large": 304_326_632,
    "huge": 632_045_800,
}


def count_parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in ViTScratchForImageClassification(config).parameters())


# Defaults


def test_defaults_are_those_of_transformers():
    own = {field.name: field.default for field in dataclasses.fields(ViTConfig)}
    ours, theirs = ViTScratchConfig(), ViTConfig()
    compared = set()
    for name in own:
        if name in NO_SUCH_FIELD:
            assert not hasattr(ours, name)
        elif name in OTHER_DEFAULT:
            assert getattr(ours, name) == OTHER_DEFAULT[name] != getattr(theirs, name)
        else:
            assert getattr(ours, name) == getattr(theirs, name), name
            compared.add(name)
    assert {"hidden_size", "patch_size", "initializer_range", "encoder_stride", "id2label"} <= compared


def test_additions_to_the_paper_are_off_by_default():
    config = ViTScratchConfig()
    assert (config.use_cls_token, config.pooling, config.use_final_norm) == (True, "cls", True)
    assert not config.norm_after_pooling
    assert (config.position_embedding_type, config.representation_size) == ("learned", None)
    assert config.position_interpolation == "bicubic"
    assert (config.layerscale_value, config.drop_path_rate, config.num_register_tokens) == (None, 0.0, 0)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.0, 0.0)
    assert not (config.use_gated_mlp or config.use_qk_norm or config.use_embedding_norm)
    assert (config.qkv_bias, config.key_bias, config.num_cls_tokens) == (True, True, 1)


def test_a_config_of_before_positions_had_a_choice_loads_as_it_was(tmp_path):
    ViTScratchConfig(**TINY).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields.pop("position_interpolation") == "bicubic"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert ViTScratchConfig.from_pretrained(tmp_path).position_interpolation == "bicubic"


def test_every_field_is_documented():
    own = set(ViTScratchConfig.__annotations__)
    documented = {
        line.strip().split(":")[0]
        for line in ViTScratchConfig.__doc__.splitlines()
        if line.startswith(" " * 8) and ":" in line and not line.startswith(" " * 9)
    }
    assert own <= documented
    assert documented - own <= {"ValueError", "out_features", "out_indices"}


def test_width_of_what_is_pooled():
    for fields, tokens in [
        ({}, 1), ({"num_cls_tokens": 3}, 3), ({"num_cls_tokens": 3, "pooling": "mean"}, 1),
        ({"pooling": "cls+mean"}, 2), ({"num_cls_tokens": 2, "pooling": "cls+mean"}, 3),
        ({"pooling": "attention", "use_cls_token": False}, 1),
    ]:  # fmt: skip
        assert ViTScratchConfig(**TINY, **fields).pooled_size == 32 * tokens, fields


def test_every_way_to_resize_positions_is_documented():
    text = ViTScratchConfig.__doc__.split("position_interpolation:")[1].split("representation_size:")[0]
    assert set(re.findall(r'"(\w+)"', text)) == set(POSITION_INTERPOLATIONS)


# Round trips

ROUND_TRIPS = {
    "default": {},
    "tuples": {**TINY, "image_size": (16, 24), "patch_size": (4, 8)},
    "lists": {**TINY, "image_size": [16, 24], "patch_size": [4, 8]},
    "everything": {
        **TINY,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 1,
        "drop_path_rate": 0.2,
        "initializer_range": "fan_in",
        "position_initializer_range": 1.0,
        "layer_norm_eps": 1e-5,
        "num_channels": 1,
        "stem_channels": [4, 6],
        "qkv_bias": False,
        "use_cls_token": False,
        "num_register_tokens": 4,
        "pooling": "mean",
        "use_final_norm": False,
        "position_embedding_type": "sincos",
        "position_interpolation": "bilinear_align_corners",
        "representation_size": 8,
        "layerscale_value": 1e-4,
        "reshape_hidden_states": False,
        "apply_layernorm": False,
    },
    "of today": {
        **TINY,
        "position_embedding_type": "learned+rope",
        "rope_theta": 10_000,
        "rope_coordinates": "index",
        "rope_grid_size": 16,
        "rope_offset": 0.5,
        "rope_frequencies": "mixed",
        "use_gated_mlp": True,
        "use_qk_norm": True,
        "use_embedding_norm": True,
        "key_bias": False,
        "num_cls_tokens": 2,
        "pooling": "cls+mean",
    },
    "classes": {**TINY, "id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}},
    "task": {**TINY, "problem_type": "multi_label_classification", "num_labels": 7, "dtype": "bfloat16"},
    "outputs": {**TINY, "output_attentions": True, "output_hidden_states": True},
    "backbone": {**TINY, "out_features": ["stem", "stage2"]},
}


@pytest.mark.parametrize("fields", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_json_round_trip_three_times_is_the_identity(fields, tmp_path):
    first = ViTScratchConfig(**fields)
    first.save_pretrained(tmp_path / "0")
    text = (tmp_path / "0" / "config.json").read_text()
    for i in range(3):
        loader = ViTScratchConfig if i % 2 else AutoConfig
        config = loader.from_pretrained(tmp_path / str(i))
        assert type(config) is ViTScratchConfig
        assert config.to_diff_dict() == first.to_diff_dict()
        for name in ViTScratchConfig.__annotations__:
            assert getattr(config, name) == getattr(first, name), name
            assert type(getattr(config, name)) is type(getattr(first, name)), name
        config.save_pretrained(tmp_path / str(i + 1))
        assert (tmp_path / str(i + 1) / "config.json").read_text() == text


def test_in_memory_round_trips():
    config = ViTScratchConfig(**ROUND_TRIPS["everything"])
    assert ViTScratchConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert ViTScratchConfig(**config.to_diff_dict()).to_dict() == config.to_dict()
    assert ViTScratchConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert copy.deepcopy(config) == config


def test_json_file_round_trip(tmp_path):
    config = ViTScratchConfig(**ROUND_TRIPS["tuples"])
    config.to_json_file(tmp_path / "config.json")
    assert ViTScratchConfig.from_json_file(tmp_path / "config.json").to_dict() == config.to_dict()


def test_saved_folder_names_every_auto_class_and_holds_the_code(tmp_path):
    ViTScratchConfig(**TINY).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert (tmp_path / "configuration_vit_scratch.py").is_file()


def test_auto_map_of_another_repository_is_not_written_again(tmp_path):
    config = ViTScratchConfig(**TINY, auto_map={"AutoModel": "someone/repo--modeling_vit_scratch.ViTScratchModel"})
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_attributes_that_others_set_survive_saving_and_loading(tmp_path):
    config = ViTScratchConfig(**TINY)
    config.use_cache = False  # Trainer does this
    config.dataset_mean = [0.5, 0.5, 0.5]
    config.save_pretrained(tmp_path)
    for loader in (AutoConfig, ViTScratchConfig):
        assert loader.from_pretrained(tmp_path).dataset_mean == [0.5, 0.5, 0.5]
        loaded, unused = loader.from_pretrained(tmp_path, hidden_act="relu", other=1, return_unused_kwargs=True)
        assert (loaded.hidden_act, loaded.dataset_mean, unused) == ("relu", [0.5, 0.5, 0.5], {"other": 1})


def test_a_misspelt_field_in_a_file_is_refused(tmp_path):
    ViTScratchConfig(**TINY).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["hiden_size"] = fields.pop("hidden_size")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"'hiden_size' is not a field .* 'hidden_size'"):
        AutoConfig.from_pretrained(tmp_path)


def test_a_name_whose_like_is_there_too_is_no_misspelling(tmp_path):
    """transformers' common tests set every model's spelling of the epsilon, then save and load."""
    config = ViTScratchConfig(**TINY)
    for name in ("layer_norm_eps", "layer_norm_epsilon", "norm_eps", "rms_norm_eps"):
        setattr(config, name, 1.0)
    config.save_pretrained(tmp_path)
    loaded = ViTScratchConfig.from_pretrained(tmp_path)
    assert loaded.layer_norm_eps == loaded.layer_norm_epsilon == loaded.norm_eps == loaded.rms_norm_eps == 1.0


def test_common_arguments_of_the_library():
    common = {
        "return_dict": False,
        "output_hidden_states": True,
        "output_attentions": True,
        "chunk_size_feed_forward": 5,
        "architectures": ["ViTScratchModel"],
        "id2label": {0: "label"},
        "label2id": {"label": 0},
        "problem_type": "regression",
        "name_or_path": "somewhere",
        "attn_implementation": "eager",
        "tie_word_embeddings": False,
        "tie_last_hidden_states": False,
    }
    config = ViTScratchConfig(**common, dtype="float16", torch_dtype="float32")
    for name, value in common.items():
        assert getattr(config, "_attn_implementation" if name == "attn_implementation" else name) == value
    assert config.dtype == torch.float16


def test_attention_implementation_is_an_argument_and_an_attribute():
    config = ViTScratchConfig(**TINY, attn_implementation="eager")
    assert config._attn_implementation == "eager"
    config._attn_implementation = "sdpa"
    config.output_attentions = True  # under every implementation
    assert config._attn_implementation == "sdpa"
    assert config.output_attentions


# Sizes


def test_sizes_take_a_number_or_height_and_width():
    square = ViTScratchConfig(image_size=32, patch_size=8)
    assert (square.image_hw, square.patch_hw, square.grid_hw) == ((32, 32), (8, 8), (4, 4))
    wide = ViTScratchConfig(image_size=(32, 48), patch_size=[8, 4])
    assert (wide.image_hw, wide.patch_hw, wide.grid_hw) == ((32, 48), (8, 4), (4, 12))
    assert (wide.image_size, wide.patch_size) == ((32, 48), (8, 4))


def test_prefix_tokens():
    assert ViTScratchConfig().num_prefix_tokens == 1
    assert ViTScratchConfig(num_register_tokens=4).num_prefix_tokens == 5
    assert ViTScratchConfig(num_register_tokens=4, use_cls_token=False, pooling="mean").num_prefix_tokens == 4


# Refusals: (fields, parts the text must hold: what is wrong, both numbers, the mend)

REFUSALS = [
    ({"hidden_size": 770}, ["hidden_size (770)", "num_attention_heads (12)", "11"]),
    ({"hidden_size": 64, "num_attention_heads": 5}, ["hidden_size (64)", "num_attention_heads (5)", "is 4"]),
    ({"image_size": 33, "patch_size": 8}, ["image_size", "33", "patch_size (8)", "use 32 or 40"]),
    ({"image_size": (32, 50), "patch_size": 8}, ["width 50", "patch_size (8)", "use 48 or 56"]),
    ({"image_size": (30, 48), "patch_size": (8, 16)}, ["height 30", "patch_size (8)", "use 24 or 32"]),
    ({"image_size": 8, "patch_size": 16}, ["height 8", "patch_size (16)", "use 16."]),
    ({"patch_size": 6, "image_size": 24, "stem_channels": [8, 8]}, ["patch_size", "6", "divisible by 4", "use 8"]),
    ({"stem_channels": [0]}, ["stem_channels (0)", "at least 1"]),
    ({"stem_channels": 8}, ["stem_channels", "list", "8"]),
    ({"image_size": (32, 32, 3)}, ["image_size", "(height, width)", "3 numbers"]),
    ({"image_size": 0}, ["image_size (0)", "at least 1"]),
    ({"patch_size": -4}, ["patch_size (-4)", "at least 1"]),
    ({"patch_size": (4, 0)}, ["patch_size (0)", "at least 1"]),
    ({"image_size": "32"}, ["image_size", "'32'", "whole number"]),
    ({"image_size": 32.0}, ["image_size", "32.0", "whole number"]),
    ({"hidden_size": 0}, ["hidden_size (0)", "at least 1"]),
    ({"num_hidden_layers": 0}, ["num_hidden_layers (0)", "at least 1"]),
    ({"num_attention_heads": -1}, ["num_attention_heads (-1)", "at least 1"]),
    ({"intermediate_size": 0}, ["intermediate_size (0)", "at least 1"]),
    ({"num_channels": 0}, ["num_channels (0)", "at least 1"]),
    ({"encoder_stride": 0}, ["encoder_stride (0)", "at least 1"]),
    ({"num_register_tokens": -1}, ["num_register_tokens (-1)", "at least 0"]),
    ({"representation_size": 0}, ["representation_size (0)", "at least 1"]),
    ({"hidden_size": "768"}, ["hidden_size", "'768'", "whole number"]),
    ({"hidden_size": True}, ["hidden_size", "True", "whole number"]),
    ({"num_hidden_layers": 2.5}, ["num_hidden_layers", "2.5", "whole number"]),
    ({"hidden_dropout_prob": 1.5}, ["hidden_dropout_prob (1.5)", "[0, 1]"]),
    ({"attention_probs_dropout_prob": -0.1}, ["attention_probs_dropout_prob (-0.1)", "[0, 1]"]),
    ({"drop_path_rate": 2}, ["drop_path_rate (2)", "[0, 1]"]),
    ({"drop_path_rate": float("nan")}, ["drop_path_rate (nan)", "[0, 1]"]),
    ({"hidden_dropout_prob": "0.1"}, ["hidden_dropout_prob", "'0.1'", "number"]),
    ({"hidden_dropout_prob": None}, ["hidden_dropout_prob", "None", "number"]),
    ({"layer_norm_eps": -1.0}, ["layer_norm_eps (-1.0)", "at least 0"]),
    ({"layerscale_value": -1.0}, ["layerscale_value (-1.0)", "at least 0"]),
    ({"initializer_range": -0.02}, ["initializer_range (-0.02)", "at least 1e-12"]),
    ({"initializer_range": 0.0}, ["initializer_range (0.0)", "at least 1e-12"]),
    ({"initializer_range": float("inf")}, ["initializer_range (inf)", "finite"]),
    ({"initializer_range": "fan_on"}, ["initializer_range ('fan_on')", "'fan_in'"]),
    ({"position_initializer_range": -1}, ["position_initializer_range (-1)", "at least 1e-12"]),
    ({"qkv_bias": 1}, ["qkv_bias", "True or False", "1"]),
    ({"use_cls_token": "yes"}, ["use_cls_token", "True or False", "'yes'"]),
    ({"use_final_norm": None}, ["use_final_norm", "True or False", "None"]),
    ({"norm_after_pooling": 1}, ["norm_after_pooling", "True or False", "1"]),
    ({"norm_after_pooling": True, "use_final_norm": False}, ["norm_after_pooling=True", "use_final_norm=True"]),
    ({"hidden_act": "gelo"}, ["hidden_act ('gelo')", "'gelu'"]),
    ({"pooling": "max"}, ["pooling ('max')", "cls, mean"]),
    ({"pooling": "means"}, ["pooling ('means')", "'mean'"]),
    ({"position_interpolation": "bicubic_aa"}, ["position_interpolation ('bicubic_aa')", "bicubic_offset, bilinear"]),
    ({"position_interpolation": None}, ["position_interpolation (None)", "Known: bicubic, bicubic_antialias"]),
    ({"position_embedding_type": "sincosine"}, ["position_embedding_type ('sincosine')", "'sincos'"]),
    ({"use_cls_token": False}, ["pooling='cls'", "use_cls_token=True", "pooling='mean'"]),
    ({"position_embedding_type": "sincos", "hidden_size": 30, "num_attention_heads": 3}, ["(30)", "by 4", "use 32"]),
    ({"position_embedding_type": "ropes"}, ["position_embedding_type ('ropes')", "'rope'"]),
    ({"position_embedding_type": "rope", "hidden_size": 60, "num_attention_heads": 6}, ["60 / 6 = 10", "use", "=72"]),
    ({"position_embedding_type": "learned+rope", "hidden_size": 24}, ["24 / 12 = 2", "by 4", "hidden_size=48"]),
    ({"rope_theta": 0.5}, ["rope_theta (0.5)", "at least 1"]),
    ({"rope_theta": "100"}, ["rope_theta", "'100'", "number"]),
    ({"rope_offset": -1}, ["rope_offset (-1)", "at least 0"]),
    ({"rope_grid_size": 0}, ["rope_grid_size (0)", "at least 1"]),
    ({"rope_grid_size": 14.5}, ["rope_grid_size", "14.5", "whole number"]),
    ({"rope_coordinates": "centred"}, ["rope_coordinates ('centred')", "'centered'"]),
    ({"rope_frequencies": "axle"}, ["rope_frequencies ('axle')", "'axial'"]),
    ({"key_bias": 0}, ["key_bias", "True or False", "0"]),
    ({"use_qk_norm": "yes"}, ["use_qk_norm", "True or False", "'yes'"]),
    ({"use_gated_mlp": 1}, ["use_gated_mlp", "True or False", "1"]),
    ({"use_embedding_norm": None}, ["use_embedding_norm", "True or False", "None"]),
    ({"num_cls_tokens": 0}, ["num_cls_tokens (0)", "at least 1"]),
    ({"num_cls_tokens": 2, "use_cls_token": False, "pooling": "mean"}, ["num_cls_tokens (2)", "use_cls_token=True"]),
    ({"pooling": "cls+mean", "use_cls_token": False}, ["pooling='cls+mean'", "use_cls_token=True", "pooling='mean'"]),
    ({"pooling": "attention"}, ["pooling='attention'", "use_cls_token=False"]),
    ({"pooling": "attn"}, ["pooling ('attn')", "'attention'"]),
]


@pytest.mark.parametrize(("fields", "parts"), REFUSALS, ids=[str(fields) for fields, _ in REFUSALS])
def test_refusals_say_what_is_wrong_and_the_mend(fields, parts):
    with pytest.raises(ValueError) as error:
        ViTScratchConfig(**fields)
    assert type(error.value) is ValueError
    for part in parts:
        assert part in str(error.value)


MISSPELT = {
    "hiden_size": "hidden_size",
    "stem_chanels": "stem_channels",
    "hidden_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "img_size": "image_size",
    "patch_sizes": "patch_size",
    "layer_norm_epsilon": "layer_norm_eps",
    "drop_path": "drop_path_rate",
    "num_registers": "num_register_tokens",
    "use_class_token": "use_cls_token",
    "layer_scale_value": "layerscale_value",
    "pool": "pooling",
    "num_labls": "num_labels",
    "problem_typ": "problem_type",
}


@pytest.mark.parametrize(("wrong", "right"), MISSPELT.items())
def test_a_misspelt_field_is_refused_with_the_nearest(wrong, right):
    with pytest.raises(ValueError, match=f"'{wrong}' is not a field of ViTScratchConfig; the nearest is '{right}'"):
        ViTScratchConfig(**{wrong: 1})


@given(name=st.sampled_from(sorted(ViTScratchConfig.__annotations__)), data=st.data())
@settings(max_examples=200, deadline=None)
def test_one_wrong_letter_is_refused_with_the_right_field(name, data):
    i = data.draw(st.integers(0, len(name) - 1))
    letter = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz"))
    wrong = name[:i] + letter + name[i + 1 :]
    if wrong in ViTScratchConfig.__dataclass_fields__ or wrong.startswith("_"):
        return
    # "kvy_bias" is as near to "qkv_bias" as to "key_bias".
    likeness = {field: SequenceMatcher(None, wrong, field).ratio() for field in ViTScratchConfig.__dataclass_fields__}
    as_near = [field for field in likeness if likeness[field] == likeness[name]]
    with pytest.raises(ValueError, match=f"the nearest is '({'|'.join(as_near)})'"):
        ViTScratchConfig(**{wrong: 1})


def test_nearest_prefers_whole_words():
    assert nearest("heads", ["hidden_act", "num_attention_heads", "head"]) == "num_attention_heads"


def test_a_field_changed_later_is_refused_by_the_model_and_on_saving(tmp_path):
    config = ViTScratchConfig(**TINY)
    config.num_attention_heads = 5
    for build in (ViTScratchModel, ViTScratchForImageClassification):
        with pytest.raises(ValueError, match="num_attention_heads"):
            build(config)
    with pytest.raises(ValueError, match="num_attention_heads"):
        config.save_pretrained(tmp_path)


def test_a_field_changed_on_loading_is_refused(tmp_path):
    ViTScratchModel(ViTScratchConfig(**TINY)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_attention_heads"):
        ViTScratchModel.from_pretrained(tmp_path, num_attention_heads=5)


# Presets


def test_no_preset_lacks_a_count():
    assert set(PARAMETERS) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_published_number_of_parameters(name):
    assert count_parameters(ViTScratchConfig.preset(name)) == PARAMETERS[name]


def test_counts_of_overridden_presets():
    assert count_parameters(ViTScratchConfig.preset("base", patch_size=32)) == 88_224_232
    wide = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    assert count_parameters(ViTScratchConfig.preset("showcase", **wide)) == 85_222_666
    assert count_parameters(ViTScratchConfig(num_labels=1000)) == PARAMETERS["base"]


def test_showcase_is_the_teaching_model():
    config = ViTScratchConfig.preset("showcase")
    assert (config.image_size, config.patch_size, config.hidden_size, config.intermediate_size) == (32, 8, 256, 256)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_labels) == (2, 2, 10)
    assert (config.layer_norm_eps, config.pooling) == (1e-5, "mean")
    assert not config.use_cls_token
    assert not config.use_final_norm


@pytest.mark.parametrize("name", PRESETS)
def test_preset_overrides(name):
    config = ViTScratchConfig.preset(name, image_size=(64, 32), patch_size=16, num_labels=3, drop_path_rate=0.1)
    assert (config.image_hw, config.num_labels, config.drop_path_rate) == ((64, 32), 3, 0.1)
    assert config.hidden_size == PRESETS[name]["hidden_size"]
    named = ViTScratchConfig.preset(name, id2label={0: "cat", 1: "dog"})
    assert (named.num_labels, named.id2label) == (2, {0: "cat", 1: "dog"})


@pytest.mark.parametrize("name", PRESETS)
def test_preset_decodes_one_patch_per_token(name):
    assert ViTScratchConfig.preset(name).encoder_stride == ViTScratchConfig.preset(name).patch_size
    assert ViTScratchConfig.preset(name, patch_size=32, image_size=64).encoder_stride == 32
    assert ViTScratchConfig.preset(name, encoder_stride=2).encoder_stride == 2


def test_unknown_preset_and_bad_override_are_refused():
    with pytest.raises(ValueError, match=r"'medium' is unknown; use one of showcase, tiny, small, base, large, huge"):
        ViTScratchConfig.preset("medium")
    with pytest.raises(ValueError, match=r"'pach_size' is not a field .* 'patch_size'"):
        ViTScratchConfig.preset("base", pach_size=32)
    with pytest.raises(ValueError, match="use 224 or 240"):
        ViTScratchConfig.preset("base", image_size=225)


def test_preset_does_not_change_the_table():
    before = copy.deepcopy(PRESETS)
    ViTScratchConfig.preset("tiny", hidden_size=384, num_attention_heads=6).hidden_size = 1
    assert before == PRESETS
