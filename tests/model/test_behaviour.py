"""Determinism, learning, dropout and stochastic depth."""

import inspect
import math

import pytest
import torch
from small_models import (
    FIXED,
    RICH,
    TINY,
    equal,
    every_class,
    every_config,
    every_head,
    images,
    inputs,
    main_output,
    make,
)
from torch import nn
from transformers import set_seed

from modeling_vit_scratch import (
    ViTScratchConfig,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchModel,
)
from modeling_vit_scratch import modeling_vit_scratch as modeling


@every_class
@every_config
def test_determinism_and_a_batch_answers_as_its_images_do(cls, fields):
    model = make(cls, {**fields, "drop_path_rate": 0.5, "hidden_dropout_prob": 0.5})
    x = images(model, batch=4)
    with torch.no_grad():
        outputs = model(x, output_hidden_states=True, output_attentions=True)
        equal(main_output(outputs), main_output(model(x, output_hidden_states=True, output_attentions=True)))
        for i in range(4):
            single = model(x[i : i + 1], output_hidden_states=True, output_attentions=True)
            equal(main_output(single), main_output(outputs)[i : i + 1], 1e-4)
            for name in ("hidden_states", "attentions"):
                for a, b in zip(single[name], outputs[name], strict=True):
                    equal(a, b[i : i + 1], 1e-4)


def flat(outputs):
    """All tensors of nested tuples, in order."""
    return [t for item in outputs for t in (flat(item) if isinstance(item, tuple) else [item])]


@every_class
def test_tuple_and_dict_outputs_are_equal(cls):
    model = make(cls)
    for targets in (False, True):
        x = inputs(model, targets=targets)
        for more in ({}, {"output_hidden_states": True}, {"output_hidden_states": True, "output_attentions": True}):
            with torch.no_grad():
                as_dict, as_tuple = model(**x, **more), model(**x, **more, return_dict=False)
                model.config.return_dict = False
                by_config = model(**x, **more)
                still_dict = model(**x, **more, return_dict=True)
                model.config.return_dict = True
            assert type(as_tuple) is type(by_config) is tuple
            equal(flat(as_tuple), flat(as_dict.to_tuple()))
            equal(flat(by_config), flat(as_dict.to_tuple()))
            assert still_dict.keys() == as_dict.keys()


@every_class
def test_signature(cls):
    names = list(inspect.signature(cls.forward).parameters)
    assert names[:2] == ["self", "pixel_values"]
    assert cls.main_input_name == "pixel_values"
    annotation = inspect.signature(cls.forward).parameters["kwargs"].annotation
    assert "output_attentions" in annotation.__args__[0].__annotations__  # the object, not its name


@every_class
def test_input_embeddings(cls):
    model = make(cls)
    assert isinstance(model.get_input_embeddings(), modeling.ViTScratchPatchEmbeddings)
    assert model.get_output_embeddings() is None
    model.enable_input_require_grads()
    model.disable_input_require_grads()
    other = nn.Embedding(2, 2)
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other


@every_head
def test_every_parameter_changes_within_two_steps(cls):
    """Two, since a zero classifier passes no gradient back in the first."""
    set_seed(0)
    model = cls(ViTScratchConfig(**RICH)).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs(model, targets=True)).loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    for name, p in model.named_parameters():
        parts = {name: (p, before[name])}
        if name.endswith("qkv.bias"):  # softmax does not see a bias of the keys
            D = model.config.hidden_size
            parts = {"query": (p[:D], before[name][:D]), "value": (p[2 * D :], before[name][2 * D :])}
        for part, (after, start) in parts.items():
            assert (after != start).any(), (name, part)


@every_head
@pytest.mark.parametrize("fields", [TINY, RICH, FIXED])
def test_overfits_one_batch(cls, fields):
    set_seed(0)
    model = cls(ViTScratchConfig(**fields)).train()
    x = inputs(model, batch=4, targets=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    first = None
    for _ in range(120):
        optimizer.zero_grad()
        loss = model(**x).loss
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < (0.1 if cls is ViTScratchForImageClassification else 0.5) * first


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_stochastic_depth_drops_samples_at_its_rate(p):
    set_seed(0)
    module = modeling.ViTScratchDropPath(p).train()
    x = torch.ones(1000, 5, 8)
    y = module(x)
    dropped = (y == 0).flatten(1)
    assert (dropped.all(1) == dropped.any(1)).all()  # a sample is dropped whole or not at all
    rate = dropped.all(1).float().mean().item()
    assert rate == p if p in (0.0, 1.0) else abs(rate - p) < 4 * math.sqrt(p * (1 - p) / 1000)
    if p < 1:
        equal(y[~dropped.all(1)], x[~dropped.all(1)] / (1 - p))
    assert y.isfinite().all()
    equal(module.eval()(x), x)


def test_stochastic_depth_grows_with_depth():
    for rate, layers in [(0.3, 4), (1, 3), (0.5, 1), (0.0, 3)]:
        model = ViTScratchModel(ViTScratchConfig(**{**TINY, "num_hidden_layers": layers, "drop_path_rate": rate}))
        rates = [layer.drop_path.p for layer in model.layers]
        assert rates == pytest.approx([rate * i / max(layers - 1, 1) for i in range(layers)])


def test_stochastic_depth_of_one_skips_the_last_block():
    model = make(ViTScratchModel, drop_path_rate=1.0).train()
    states = model(images(model), output_hidden_states=True).hidden_states
    equal(states[2], states[1])
    assert (states[1] - states[0]).abs().max() > 0.1


def test_both_branches_of_a_block_are_dropped_apart():
    set_seed(0)
    model = make(ViTScratchModel, drop_path_rate=0.5).train()
    x = images(model, batch=1).expand(400, -1, -1, -1)
    with torch.no_grad():
        states = model(x, output_hidden_states=True).hidden_states
    kinds = []
    for change in (states[2] - states[1])[:, 0]:
        if all((change - kind).abs().max() > 1e-3 for kind in kinds):
            kinds.append(change)
    assert len(kinds) == 4  # neither branch, either one, both


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_dropout_is_active_only_in_training(implementation):
    for p in (0.0, 0.5):
        model = make(ViTScratchModel, attention_probs_dropout_prob=p, attn_implementation=implementation)
        x = images(model)
        with torch.no_grad():
            still = model(x).last_hidden_state
            equal(model(x).last_hidden_state, still)
            model.train()
            moved = (model(x).last_hidden_state - still).abs().max() > 1e-3
        assert moved == (p > 0)


def test_dropout_of_attention_maps_by_frequency():
    model = make(ViTScratchModel, attention_probs_dropout_prob=0.3).train()
    set_seed(0)
    maps = torch.cat([m.flatten() for m in model(images(model, 8), output_attentions=True).attentions])
    assert (maps == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_hidden_dropout_follows_every_dense_layer_but_qkv_and_the_positions():
    model = make(ViTScratchModel, hidden_dropout_prob=0.5)
    counts = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.5
            module.register_forward_hook(lambda m, a, o, name=name: counts.update({name: counts.get(name, 0) + 1}))
    model.train()(images(model))
    assert counts == {
        "embeddings.dropout": 1,
        **{f"layers.{i}.attention.dropout": 1 for i in range(2)},
        **{f"layers.{i}.mlp.dropout": 2 for i in range(2)},
    }
    equal(model.eval()(images(model)).last_hidden_state, model(images(model)).last_hidden_state)


def test_no_weight_decay():
    model = ViTScratchForMaskedImageModeling(ViTScratchConfig(**RICH))
    excluded = model.no_weight_decay()
    decayed = {name for name, _ in model.named_parameters()} - excluded
    assert decayed == {name for name, _ in model.named_parameters() if name.endswith(".weight") and "norm" not in name}
    assert {f"vit.embeddings.{name}" for name in ("cls_token", "register_tokens", "mask_token")} <= excluded
    assert "vit.layers.0.layer_scale1.scale" in excluded
