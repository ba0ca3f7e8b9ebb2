"""1,200 random configs: each is refused by a ValueError that names a field at fault, or works from end to end."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.configuration_vit_scratch import POSITION_INTERPOLATIONS

WRONG = st.sampled_from([0, -1, 2.5, "8", True, None, [1], math.nan, math.inf])
SIZES = st.sampled_from([1, 2, 4, 6, 8, 12, 16])


def mostly(good, bad=WRONG):
    """Values of `good`, and seldom one of `bad`."""
    return st.integers(0, 79).flatmap(lambda draw: bad if draw == 17 else good)


PAIRS = st.one_of(SIZES, st.tuples(SIZES, SIZES), st.lists(SIZES, min_size=2, max_size=2))
PROBABILITY = st.sampled_from([0, 0.0, 0.1, 0.5, 1, 1.0])
POSITIONS = ("learned", "sincos", "none", "rope", "learned+rope")
# fmt: off
FIELDS = {
    "hidden_size": mostly(st.sampled_from([4, 8, 12, 16, 18, 32, 64])),
    "num_hidden_layers": mostly(st.sampled_from([1, 2])),
    "num_attention_heads": mostly(st.sampled_from([1, 2, 3, 4])),
    "intermediate_size": mostly(st.integers(1, 64)),
    "hidden_act": mostly(st.sampled_from(["gelu", "relu", "silu"]), st.sampled_from(["gulu", "", 3])),
    "hidden_dropout_prob": mostly(PROBABILITY, st.sampled_from([-0.1, 1.1, "0", True, math.nan])),
    "attention_probs_dropout_prob": mostly(PROBABILITY, st.sampled_from([-0.1, 1.1, "0", True, math.nan])),
    "drop_path_rate": mostly(PROBABILITY, st.sampled_from([-0.1, 1.1, "0", True, math.nan])),
    "initializer_range": mostly(st.sampled_from([0.02, 0.5, "fan_in"]), st.sampled_from([-1.0, "fan", None, math.nan])),
    "layer_norm_eps": mostly(st.sampled_from([1e-12, 1e-6, 1e-5]), st.sampled_from([-1.0, "1e-6", math.nan])),
    "image_size": mostly(st.one_of(st.just(8), st.just(24), PAIRS), st.sampled_from([0, "8", (8,), (8, 8, 8), 8.0])),
    "patch_size": mostly(st.one_of(st.just(4), st.just(8), PAIRS), st.sampled_from([0, "4", (4,), (4, -4), 4.0])),
    "num_channels": mostly(st.sampled_from([1, 3, 4])),
    "stem_channels": mostly(st.sampled_from([*[()] * 5, [], [4], (4, 6)]), st.sampled_from([0, [0], [2.5], "8", None])),
    "qkv_bias": mostly(st.booleans(), st.sampled_from([1, "yes", None])),
    "use_cls_token": mostly(st.booleans(), st.sampled_from([1, "yes", None])),
    "use_final_norm": mostly(st.booleans(), st.sampled_from([1, "yes", None])),
    "norm_after_pooling": mostly(st.booleans(), st.sampled_from([1, "yes", None])),
    "num_register_tokens": mostly(st.integers(0, 3), st.sampled_from([-1, 1.5, "2", None])),
    "pooling": mostly(
        st.sampled_from(["cls", "cls", "mean", "mean", "cls+mean", "attention"]), st.sampled_from(["max", "", None])
    ),
    "key_bias": mostly(st.booleans(), st.sampled_from([1, "yes", None])),
    "use_qk_norm": mostly(st.booleans(), st.sampled_from([1, "yes", None])),
    "use_gated_mlp": mostly(st.booleans(), st.sampled_from([1, "yes", None])),
    "use_embedding_norm": mostly(st.booleans(), st.sampled_from([1, "yes", None])),
    "num_cls_tokens": mostly(st.sampled_from([1, 1, 1, 1, 2])),
    "rope_theta": mostly(st.sampled_from([1, 10, 100.0]), st.sampled_from([0.5, "10", None, math.nan])),
    "rope_coordinates": st.sampled_from(["centered", "index"]),
    "rope_grid_size": mostly(st.sampled_from([None, 2]), st.sampled_from([0, -1, 2.5, "8"])),
    "rope_offset": mostly(st.sampled_from([0, 1, 0.5]), st.sampled_from([-1, "1", None, math.nan])),
    "rope_frequencies": st.sampled_from(["axial", "mixed"]),
    "position_interpolation": st.sampled_from(POSITION_INTERPOLATIONS),
    "position_embedding_type": mostly(st.sampled_from(POSITIONS), st.sampled_from(["ropes", None])),
    "representation_size": mostly(st.sampled_from([None, 5]), st.sampled_from([0, -3, 2.0, "5"])),
    "layerscale_value": mostly(st.sampled_from([None, 0.1, 1]), st.sampled_from([-0.1, "0.1", math.nan])),
}
# fmt: on


def is_count(value, minimum=1) -> bool:
    return type(value) is int and value >= minimum


def is_number(value, minimum=0.0, maximum=math.inf) -> bool:
    return type(value) in (int, float) and minimum <= value <= maximum and not math.isinf(value)


def faults(fields: dict) -> set[str]:
    """Fields that are wrong by themselves, or, if none is, in a combination; written apart from the config's checks."""
    wrong = set()
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels")
    for name in (*sizes, "num_cls_tokens"):
        wrong |= set() if is_count(fields[name]) else {name}
    wrong |= set() if is_count(fields["num_register_tokens"], 0) else {"num_register_tokens"}
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
        wrong |= set() if is_number(fields[name], 0, 1) else {name}
    wrong |= set() if is_number(fields["layer_norm_eps"]) else {"layer_norm_eps"}
    if not (fields["layerscale_value"] is None or is_number(fields["layerscale_value"])):
        wrong.add("layerscale_value")
    for name in ("representation_size", "rope_grid_size"):
        wrong |= set() if fields[name] is None or is_count(fields[name]) else {name}
    wrong |= set() if is_number(fields["rope_theta"], 1) else {"rope_theta"}
    wrong |= set() if is_number(fields["rope_offset"]) else {"rope_offset"}
    if not (fields["initializer_range"] == "fan_in" or is_number(fields["initializer_range"])):
        wrong.add("initializer_range")
    flags = ("qkv_bias", "key_bias", "use_qk_norm", "use_gated_mlp", "use_embedding_norm")
    for name in (*flags, "use_cls_token", "use_final_norm", "norm_after_pooling"):
        wrong |= set() if type(fields[name]) is bool else {name}
    known = {
        "hidden_act": ("gelu", "relu", "silu"), "pooling": ("cls", "mean", "cls+mean", "attention"),
        "position_embedding_type": POSITIONS,
    }  # fmt: skip
    wrong |= {name for name, values in known.items() if fields[name] not in values}
    pairs = {}
    for name in ("image_size", "patch_size"):
        value = fields[name]
        pairs[name] = list(value) if isinstance(value, (tuple, list)) else [value] * 2
        if len(pairs[name]) != 2 or not all(map(is_count, pairs[name])):
            wrong.add(name)
    stages = fields["stem_channels"]
    if not isinstance(stages, (tuple, list)) or not all(map(is_count, stages)):
        wrong.add("stem_channels")
    if wrong:
        return wrong
    if any(patch % 2 ** len(stages) for patch in pairs["patch_size"]):
        wrong |= {"stem_channels", "patch_size"}
    if any(image % patch for image, patch in zip(pairs["image_size"], pairs["patch_size"], strict=True)):
        wrong |= {"image_size", "patch_size"}
    if fields["hidden_size"] % fields["num_attention_heads"]:
        wrong |= {"hidden_size", "num_attention_heads"}
    if fields["position_embedding_type"] == "sincos" and fields["hidden_size"] % 4:
        wrong |= {"position_embedding_type", "hidden_size"}
    elif "rope" in fields["position_embedding_type"] and fields["hidden_size"] // fields["num_attention_heads"] % 4:
        wrong |= {"hidden_size", "rotary positions"}
    if fields["use_cls_token"] is (fields["pooling"] in ("mean", "attention")) and fields["pooling"] != "mean":
        wrong |= {"pooling", "use_cls_token"}
    if fields["num_cls_tokens"] > 1 and not fields["use_cls_token"]:
        wrong |= {"num_cls_tokens", "use_cls_token"}
    if fields["norm_after_pooling"] and not fields["use_final_norm"]:
        wrong |= {"norm_after_pooling", "use_final_norm"}
    return wrong


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_random_configs_are_refused_or_work(tmp_path):
    seen = {"refused": 0, "worked": 0}

    @settings(
        max_examples=600, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip
    @given(st.fixed_dictionaries(FIELDS))
    def check(fields):
        at_fault = faults(fields)
        try:
            config = ViTScratchConfig(**fields, num_labels=3)
        except ValueError as error:
            assert any(name in str(error) for name in at_fault), f"{error} (at fault: {at_fault})"
            seen["refused"] += 1
            return
        assert not at_fault
        model = ViTScratchForImageClassification(config)
        pixels = torch.randn(2, config.num_channels, *config.image_hw)
        model(pixels, labels=torch.tensor([0, 2])).loss.backward()
        larger = pixels.repeat(1, 1, 2, 3)
        assert model(larger, interpolate_pos_encoding=True).logits.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        with torch.no_grad():
            model.classifier.weight.normal_()
        model.save_pretrained(tmp_path)
        again = ViTScratchForImageClassification.from_pretrained(tmp_path)
        assert again.config.to_dict() | {"dtype": None} == config.to_dict() | {
            "dtype": None,
            "_name_or_path": str(tmp_path),
        }
        state = again.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        with torch.no_grad():  # the last bit depends on where in memory a weight begins
            torch.testing.assert_close(model.eval()(pixels).logits, again(pixels).logits, atol=1e-4, rtol=1e-5)
        seen["worked"] += 1

    check()
    assert min(seen.values()) > 50, seen
