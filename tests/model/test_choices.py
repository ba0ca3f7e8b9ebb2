"""What each choice beyond the ViT of 2021 computes, against its formula written another way."""

import math

import pytest
import torch
from small_models import CHOICES, OBLONG, TINY, equal, images, make
from torch import nn
from torch.nn import functional as F

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchModel
from modeling_vit_scratch import modeling_vit_scratch as modeling

D, A, L, N, INNER, K = 32, 4, 2, 16, 48, 5  # of TINY: width, heads, blocks, patches, width inside the MLP, classes
REGISTERS = {**OBLONG, "num_register_tokens": 2}  # patches of 8 x 4 pixels, 2 down and 6 across
ROTARY = {
    "centered": {},
    "index": {"rope_coordinates": "index", "rope_theta": 10_000.0},
    "offset": {"rope_coordinates": "index", "rope_offset": 1},
    "scaled": {"rope_coordinates": "index", "rope_grid_size": 4, "rope_offset": 0.5},
    "mixed": {"rope_coordinates": "index", "rope_frequencies": "mixed"},
}
every_rotary = pytest.mark.parametrize("rotary", ROTARY.values(), ids=ROTARY)


def places_of(config, grid_hw):
    """(y, x) of each patch, row by row: (N, 2)."""

    def axis(side):
        if config.rope_coordinates == "centered":
            return [2 * math.pi * (2 * (i + 0.5) / side - 1) for i in range(side)]
        return [(i + config.rope_offset) * (config.rope_grid_size or side) / side for i in range(side)]

    return torch.tensor([(y, x) for y in axis(grid_hw[0]) for x in axis(grid_hw[1])], dtype=torch.float64)


def turned(tokens, model, layer, grid_hw):
    """Queries or keys (B, A, T, d) times complex numbers of size 1, the patches alone."""
    config, half = model.config, tokens.shape[-1] // 2
    if config.rope_frequencies == "mixed":
        y, x = model.rotary_positions[layer].frequencies.double().unbind(1)  # (A, d / 2) each
    else:
        bands = [config.rope_theta ** (-2 * j / half) for j in range(half // 2)]
        nothing = [0.0] * len(bands)
        y, x = (torch.tensor([row], dtype=torch.float64) for row in (bands + nothing, nothing + bands))
    places = places_of(config, grid_hw)
    angles = places[:, :1] * y.unsqueeze(1) + places[:, 1:] * x.unsqueeze(1)  # (A or 1, N, d / 2)
    numbers = torch.complex(tokens[..., :half], tokens[..., half:])  # (B, A, T, d / 2)
    start = config.num_prefix_tokens
    numbers = torch.cat(
        [numbers[:, :, :start], numbers[:, :, start:] * torch.polar(torch.ones_like(angles), angles)], dim=2
    )
    return torch.cat([numbers.real, numbers.imag], dim=-1)


def queries_and_keys(model, tokens, layer):
    """(B, A, T, d) each, from the tokens (B, T, D) that enter a block."""
    attention, normed = model.layers[layer].attention, model.layers[layer].norm1(tokens)
    parts = attention.qkv(normed).chunk(3, dim=-1)[:2]
    return [part.unflatten(2, (A, -1)).transpose(1, 2) for part in parts]


# Rotary positions


@pytest.mark.parametrize("size", [(16, 24), (32, 40)])
@every_rotary
def test_maps_are_of_queries_and_keys_times_complex_numbers(rotary, size):
    model = make(ViTScratchModel, {**REGISTERS, **rotary, "position_embedding_type": "rope"}).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        outputs = model(x, output_attentions=True, output_hidden_states=True)
        for layer, maps in enumerate(outputs.attentions):
            parts = queries_and_keys(model, outputs.hidden_states[layer], layer)
            plain = (parts[0] @ parts[1].transpose(2, 3) / math.sqrt(D // A)).softmax(dim=-1)
            query, key = (turned(part, model, layer, (size[0] // 8, size[1] // 4)) for part in parts)
            expected = (query @ key.transpose(2, 3) / math.sqrt(D // A)).softmax(dim=-1)
            equal(maps, expected, 1e-5)
            assert (maps - plain).abs().max() > 0.1


@every_rotary
def test_the_score_of_two_patches_depends_on_how_far_apart_they_are_alone(rotary):
    rotation = make(ViTScratchModel, {**TINY, **rotary, "position_embedding_type": "rope"}).rotary_positions[0]
    vectors = torch.randn(2, 1, A, 1, D // A).expand(-1, -1, -1, 1 + 3 * 5, -1)  # the same at each place
    query, key = (modeling.rotate(tokens, rotation((3, 5), torch.device("cpu"))) for tokens in vectors)
    scores = (query @ key.transpose(2, 3))[0, :, 1:, 1:]
    by_offset = {}
    for i in range(15):
        for j in range(15):
            by_offset.setdefault((i // 5 - j // 5, i % 5 - j % 5), []).append(scores[:, i, j])
    for values in by_offset.values():
        equal(torch.stack(values), values[0].expand(len(values), -1), 1e-4)
    apart = torch.stack([values[0] for values in by_offset.values()])  # (offsets, A)
    assert len(by_offset) == 5 * 9 and (apart - apart[0]).abs().amax(dim=0).min() > 0.1


@every_rotary
def test_class_tokens_and_registers_are_not_turned_and_no_token_changes_its_length(rotary):
    fields = {**REGISTERS, **rotary, "position_embedding_type": "rope", "num_cls_tokens": 2}
    rotation = make(ViTScratchModel, fields).rotary_positions[0]((2, 6), torch.device("cpu"))
    tokens = torch.randn(1, A, 4 + 12, D // A)
    turned_tokens = modeling.rotate(tokens, rotation)
    equal(turned_tokens[:, :, :4], tokens[:, :, :4])
    equal(turned_tokens.norm(dim=-1), tokens.norm(dim=-1), 1e-5)
    assert (turned_tokens[:, :, 5:] - tokens[:, :, 5:]).abs().amax(dim=(1, 3)).min() > 0.1  # 4 may stand at the origin


def test_centered_places_are_the_same_however_fine_the_grid():
    """Each patch stands where the middle of the four is that it is cut into; all between -2 pi and 2 pi."""
    rotary = modeling.ViTScratchRotaryPositions(ViTScratchConfig(**{**TINY, **CHOICES["rope"]}))
    for side in (1, 3, 4, 16):
        coarse, fine = (rotary.places(number, torch.device("cpu")) for number in (side, 2 * side))
        equal(fine.view(side, 2).mean(dim=1), coarse, 1e-5)
        equal(coarse, -coarse.flip(0), 1e-5)
        assert coarse.abs().max() == pytest.approx(2 * math.pi * (1 - 1 / side), abs=1e-5)


def test_grid_size_and_offset_of_indices():
    def places(side, **fields):
        config = ViTScratchConfig(**TINY, position_embedding_type="rope", rope_coordinates="index", **fields)
        return modeling.ViTScratchRotaryPositions(config).places(side, torch.device("cpu")).tolist()

    assert places(4) == [0, 1, 2, 3]
    assert places(4, rope_offset=1) == [1, 2, 3, 4]
    assert places(8, rope_grid_size=4) == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert places(4, rope_grid_size=4) == [0, 1, 2, 3]
    assert places(2, rope_grid_size=16, rope_offset=0.5) == [4, 12]


def test_frequencies_fall_from_1_towards_1_over_theta_for_y_and_for_x():
    config = ViTScratchConfig(hidden_size=16, num_attention_heads=1, rope_theta=81)
    expected = [1, 1 / 3, 1 / 9, 1 / 27]
    rows = modeling.ViTScratchRotaryPositions(config).axial()
    equal(rows, torch.tensor([expected + [0] * 4, [0] * 4 + expected]), 1e-6)


def test_mixed_frequencies_that_are_the_axial_ones_give_the_axial_model():
    axial, mixed = (
        make(ViTScratchForImageClassification, {**TINY, **CHOICES[name]}) for name in ("rope", "rope-mixed")
    )
    axial.config.rope_coordinates = "index"
    left = mixed.load_state_dict(axial.state_dict(), strict=False)
    assert left.missing_keys == [f"vit.rotary_positions.{layer}.frequencies" for layer in range(L)]
    with torch.no_grad():
        for rotary in mixed.vit.rotary_positions:
            rotary.frequencies.copy_(axial.vit.rotary_positions[0].axial())
        equal(mixed(images(mixed)).logits, axial(images(axial)).logits, 1e-5)
        mixed.vit.rotary_positions[1].frequencies.mul_(1.5)
        assert (mixed(images(mixed)).logits - axial(images(axial)).logits).abs().max() > 1e-2


def test_without_positions_patches_are_a_set():
    """Exchanged patches change nothing that the class token sees; with any kind of positions they do."""
    for name in ("no-positions", "rope", "learned+rope"):
        model = make(ViTScratchForImageClassification, {**TINY, **CHOICES[name]})
        x = images(model)
        with torch.no_grad():
            change = (model(x).logits - model(x.unflatten(2, (4, 4)).flip(2).flatten(2, 3)).logits).abs().max()
        assert change < 1e-4 if name == "no-positions" else change > 1e-2


# Gated MLP, and norms


@pytest.mark.parametrize(
    ("name", "function"), [("silu", lambda x: x * x.sigmoid()), ("relu", lambda x: x.clamp(min=0))]
)
def test_gated_mlp(name, function):
    mlp = make(ViTScratchModel, use_gated_mlp=True, hidden_act=name).double().layers[0].mlp
    x = torch.randn(2, 7, D, dtype=torch.float64)
    gate = torch.einsum("btd,id->bti", x, mlp.fc1.weight[:INNER]) + mlp.fc1.bias[:INNER]
    value = torch.einsum("btd,id->bti", x, mlp.fc1.weight[INNER:]) + mlp.fc1.bias[INNER:]
    equal(mlp(x), torch.einsum("bti,di->btd", function(gate) * value, mlp.fc2.weight) + mlp.fc2.bias, 1e-10)


@pytest.mark.parametrize("more", [{}, {"position_embedding_type": "rope"}])
def test_maps_of_normalised_queries_and_keys(more):
    """Normalised over the channels of a head, then turned."""
    model = make(ViTScratchModel, use_qk_norm=True, layer_norm_eps=1e-3, **more).double()
    x = images(model).double()
    with torch.no_grad():
        outputs = model(x, output_attentions=True, output_hidden_states=True)
        for layer, maps in enumerate(outputs.attentions):
            attention, parts = model.layers[layer].attention, []
            tokens = queries_and_keys(model, outputs.hidden_states[layer], layer)
            for part, norm in zip(tokens, (attention.q_norm, attention.k_norm), strict=True):
                centred = part - part.mean(dim=-1, keepdim=True)
                part = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-3).sqrt() * norm.weight + norm.bias
                parts.append(turned(part, model, layer, (4, 4)) if more else part)
            equal(maps, (parts[0] @ parts[1].transpose(2, 3) / math.sqrt(D // A)).softmax(dim=-1), 1e-5)
    assert not torch.equal(model.layers[0].attention.q_norm.weight, model.layers[0].attention.k_norm.weight)


def test_norm_before_the_first_block():
    model = make(ViTScratchModel, use_embedding_norm=True)
    with torch.no_grad():
        states = model(images(model), output_hidden_states=True).hidden_states
        tokens = model.embeddings(images(model), None, False)
        norm = model.embedding_norm
        equal(states[0], F.layer_norm(tokens, (D,), norm.weight, norm.bias, model.config.layer_norm_eps))
        assert (states[0] - tokens).abs().max() > 0.1
        equal(states[1], model.layers[0](states[0]), 1e-5)


# Pooling, and class tokens


@pytest.mark.parametrize("after", [False, True])
def test_class_token_and_mean_one_after_the_other(after):
    model = make(ViTScratchForImageClassification, REGISTERS, pooling="cls+mean", norm_after_pooling=after)
    with torch.no_grad():
        tokens = model.vit(images(model)).last_hidden_state
        pooled = torch.stack([tokens[:, 0], tokens[:, 3:].mean(dim=1)], dim=1)
        pooled = (model.vit.pooled_norm(pooled) if after else pooled).flatten(1)
        equal(model.vit(images(model)).pooler_output, pooled, 1e-5)
        equal(model(images(model)).logits, pooled @ model.classifier.weight.T + model.classifier.bias, 1e-4)
    assert isinstance(model.vit.pooled_norm, nn.LayerNorm) == after


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_attention_pooling_is_torchs_attention_and_an_mlp(gated, after):
    fields = {**REGISTERS, **CHOICES["attention-pooling"], "use_gated_mlp": gated, "norm_after_pooling": after}
    model = make(ViTScratchModel, fields).double()
    pooling, theirs = model.attention_pooling, nn.MultiheadAttention(D, A, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict(
        {
            "in_proj_weight": torch.cat([pooling.q.weight, pooling.kv.weight]),
            "in_proj_bias": torch.cat([pooling.q.bias, pooling.kv.bias]),
            "out_proj.weight": pooling.proj.weight,
            "out_proj.bias": pooling.proj.bias,
        }
    )
    with torch.no_grad():
        outputs = model(images(model).double())
        patches = outputs.last_hidden_state[:, 2:]  # after two registers
        pooled, maps = theirs(pooling.query.expand(3, -1, -1), patches, patches)
        pooled = pooled + pooling.mlp(pooling.norm(pooled))
        equal(outputs.pooler_output, model.pooled_norm(pooled).squeeze(1), 1e-5)  # a softmax in float32
    assert maps.std() > 0.01 and isinstance(model.pooled_norm, nn.LayerNorm) == after


def test_two_class_tokens_are_a_linear_layer_on_both_such_as_the_average_of_two_heads():
    """DeiT's model with distillation gives the mean of two classifiers' logits (Touvron et al., 2021, sec. 4)."""
    model = make(ViTScratchForImageClassification, num_cls_tokens=2, num_register_tokens=1)
    heads = [nn.Linear(D, K) for _ in range(2)]
    with torch.no_grad():
        tokens = model.vit(images(model)).last_hidden_state
        assert tokens.shape == (3, 2 + 1 + N, D)
        both = torch.cat([tokens[:, 0], tokens[:, 1]], dim=1)
        equal(model(images(model)).logits, both @ model.classifier.weight.T + model.classifier.bias, 1e-4)
        model.classifier.weight.copy_(torch.cat([head.weight for head in heads], dim=1) / 2)
        model.classifier.bias.copy_((heads[0].bias + heads[1].bias) / 2)
        equal(model(images(model)).logits, (heads[0](tokens[:, 0]) + heads[1](tokens[:, 1])) / 2, 1e-5)


def test_each_class_token_has_a_position_and_they_come_first():
    model = make(ViTScratchModel, num_cls_tokens=2, num_register_tokens=1)
    embeddings = model.embeddings
    assert embeddings.position_embeddings.shape == (1, 2 + N, D)
    with torch.no_grad():
        tokens = embeddings(images(model), None, False)
        for i in range(2):
            expected = embeddings.cls_token[0, i] + embeddings.position_embeddings[0, i]
            equal(tokens[:, i], expected.expand(3, -1), 1e-6)
        equal(tokens[:, 2], embeddings.register_tokens[0].expand(3, -1))
        patches = embeddings.patch_embeddings(images(model)) + embeddings.position_embeddings[:, 2:]
        equal(tokens[:, 3:], patches, 1e-6)
    fixed = ViTScratchModel(ViTScratchConfig(**TINY, num_cls_tokens=2, position_embedding_type="sincos"))
    assert (fixed.embeddings.position_embeddings[0, :2] == 0).all()


# Biases


def with_key_bias(model):
    """The plain model of a model without biases of keys: theirs are zeros."""
    state = model.state_dict()
    for layer in range(L):
        name = f"vit.layers.{layer}.attention"
        query, value = state.pop(f"{name}.q_bias"), state.pop(f"{name}.v_bias")
        state[f"{name}.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    plain = make(ViTScratchForImageClassification, **{**model.config.to_diff_dict(), "key_bias": True})
    plain.load_state_dict(state)
    return plain


def descend(model, steps=5):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(images(model), labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_without_a_bias_of_keys_it_is_zero_and_stays_so(positions):
    """Where keys are turned, a bias of theirs has a gradient, and the plain model learns one."""
    model = make(ViTScratchForImageClassification, key_bias=False, position_embedding_type=positions)
    plain = with_key_bias(model)
    equal(model(images(model)).logits, plain(images(model)).logits, 1e-5)
    before = model(images(model)).logits.detach()
    descend(model)
    descend(plain)
    learned = plain.vit.layers[0].attention.qkv.bias.detach()[D : 2 * D].abs().max()
    assert learned > 1e-3 if positions == "rope" else learned < 1e-5
    assert (model(images(model)).logits - before).abs().max() > 0.1
    equal(model(images(model)).logits, with_key_bias(model)(images(model)).logits, 1e-5)
    assert not any(name.endswith("qkv.bias") for name, _ in model.named_parameters())
    without = make(ViTScratchForImageClassification, key_bias=False, qkv_bias=False)
    assert not any(name.endswith(("qkv.bias", "q_bias", "v_bias")) for name, _ in without.named_parameters())


# Counts, and what stayed as it was

LINEAR = (D + 1) * D
MLP = (D + 1) * INNER + (INNER + 1) * D
ADDED = {
    "rope": -(N + 1) * D,
    "rope-index": -(N + 1) * D,
    "rope-mixed": -(N + 1) * D + L * D,
    "learned+rope": 0,
    "no-positions": -(N + 1) * D,
    "gated-mlp": L * (D + 1) * INNER,
    "embedding-norm": 2 * D,
    "qk-norm": L * 2 * 2 * (D // A),
    "cls+mean": K * D,
    "attention-pooling": -2 * D + D + 4 * LINEAR + 2 * D + MLP,  # no class token; query, four layers, norm, MLP
    "two-cls": 2 * D + K * D,
    "no-key-bias": -L * D,
}


@pytest.mark.parametrize("name", ADDED)
def test_each_choice_adds_as_many_parameters_as_it_should(name):
    def count(fields):
        with torch.device("meta"):
            return ViTScratchForImageClassification(ViTScratchConfig(**{**TINY, **fields})).num_parameters()

    assert count(CHOICES[name]) - count({}) == ADDED[name]


def test_no_choice_lacks_a_count():
    assert set(ADDED) == {name for name in CHOICES if not name.startswith("all")}


def test_a_plain_model_has_the_parameters_it_had_before_there_were_choices():
    block = [
        "norm1.weight", "norm1.bias", "attention.qkv.weight", "attention.qkv.bias", "attention.proj.weight",
        "attention.proj.bias", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight",
        "mlp.fc2.bias",
    ]  # fmt: skip
    embeddings = ["cls_token", "position_embeddings", "patch_embeddings.projection.weight"]
    names = [f"vit.embeddings.{name}" for name in (*embeddings, "patch_embeddings.projection.bias")]
    names += [f"vit.layers.{layer}.{name}" for layer in range(L) for name in block]
    names += ["vit.norm.weight", "vit.norm.bias", "classifier.weight", "classifier.bias"]
    assert [name for name, _ in make(ViTScratchForImageClassification).named_parameters()] == names
    assert list(make(ViTScratchForImageClassification).state_dict()) == names
