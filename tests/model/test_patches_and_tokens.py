"""Patches, positions, tokens, pooling: what each part computes, and what is refused."""

import inspect
import math
import re

import pytest
import torch
from small_models import FIXED, OBLONG, RICH, TINY, equal, every_class, every_config, images, make
from torch import nn

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchModel
from modeling_vit_scratch import modeling_vit_scratch as modeling
from modeling_vit_scratch.configuration_vit_scratch import POSITION_INTERPOLATIONS


@pytest.mark.parametrize("patch_size", [(4, 4), (8, 4), (2, 6), (16, 24)])
def test_patchify_equals_unfold_and_linear_and_equals_the_strided_convolution(patch_size):
    config = ViTScratchConfig(**{**TINY, "image_size": (16, 24), "patch_size": patch_size, "num_channels": 3})
    patchify = modeling.ViTScratchPatchEmbeddings(config)
    (ph, pw), weight, bias = patch_size, patchify.projection.weight, patchify.projection.bias
    x = torch.randn(2, 3, 16, 24)

    unfolded = x.unfold(2, ph, ph).unfold(3, pw, pw).permute(0, 2, 3, 1, 4, 5).reshape(2, -1, 3 * ph * pw)
    equal(patchify(x), nn.functional.linear(unfolded, weight, bias))

    kernel = weight.reshape(32, 3, ph, pw)
    convolved = nn.functional.conv2d(x, kernel, bias, stride=patch_size)  # (B, D, h, w)
    equal(patchify(x), convolved.flatten(2).transpose(1, 2), 1e-5)


def test_patches_are_counted_row_by_row():
    config = ViTScratchConfig(**OBLONG)  # 2 x 6 patches of 8 x 4
    patchify = modeling.ViTScratchPatchEmbeddings(config)
    before = patchify(torch.zeros(1, 3, 16, 24))
    for row, column in [(0, 0), (0, 5), (1, 0), (1, 3)]:
        x = torch.zeros(1, 3, 16, 24)
        x[:, :, 8 * row : 8 * row + 8, 4 * column : 4 * column + 4] = torch.randn(3, 8, 4)
        changed = (patchify(x) != before).any(dim=-1)[0].nonzero().flatten().tolist()
        assert changed == [row * 6 + column]


@every_config
def test_channels_last_images_give_the_same(fields):
    model = make(ViTScratchModel, fields)
    x = images(model)
    with torch.no_grad():
        equal(
            model(x.contiguous(memory_format=torch.channels_last)).last_hidden_state, model(x).last_hidden_state, 1e-5
        )


@every_class
def test_a_wrong_size_names_both_sizes_and_the_flag(cls):
    model = make(cls, OBLONG)
    for size in [(24, 16), (16, 32), (17, 24), (15, 23)]:
        with pytest.raises(ValueError) as error:
            model(torch.randn(1, 3, *size), interpolate_pos_encoding=False)
        for part in (f"{size[0]}x{size[1]}", "16x24", "interpolate_pos_encoding=True"):
            assert part in str(error.value)
    for size in [(17, 24), (16, 22), (4, 24)]:  # no patch divides these
        with pytest.raises(
            ValueError, match=rf"{size[0]}x{size[1]}.*patches of 8x4 do not divide.*pad them to "
        ) as error:
            model(torch.randn(1, 3, *size), interpolate_pos_encoding=True)
        assert "interpolate_pos_encoding" not in str(error.value)  # it is on
        fits = [int(side) for side in re.search(r"to (\d+)x(\d+)\.$", str(error.value)).groups()]
        assert model(torch.randn(1, 3, *fits), interpolate_pos_encoding=True)


@every_class
def test_integer_pixels_are_refused(cls):
    model = make(cls)
    for dtype in (torch.uint8, torch.int64, torch.bool):
        with pytest.raises(ValueError, match=rf"{dtype}.*floating point.*image processor"):
            model(torch.ones(1, 3, 16, 16, dtype=dtype))


@every_class
def test_wrong_channels_and_dimensions_are_refused(cls):
    model = make(cls)
    for shape in [(1, 1, 16, 16), (1, 4, 16, 16), (3, 16, 16), (1, 1, 3, 16, 16), (1, 16, 16, 3)]:
        with pytest.raises(ValueError, match=re.escape(f"must be (B, 3, H, W), got {shape}")):
            model(torch.randn(*shape))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grey_and_colour(channels):
    model = make(ViTScratchForImageClassification, num_channels=channels)
    assert model(images(model)).logits.shape == (3, 5)


def test_interpolation_on_the_same_grid_changes_nothing():
    for fields in (OBLONG, FIXED):
        model = make(ViTScratchModel, fields)
        x = images(model)
        with torch.no_grad():
            equal(model(x, interpolate_pos_encoding=True).last_hidden_state, model(x).last_hidden_state)


@pytest.mark.parametrize("grid", [(3, 5), (7, 2), (2, 12)])
def test_interpolation_of_an_oblong_grid(grid):
    embeddings = make(ViTScratchModel, OBLONG).embeddings  # 2 x 6
    positions = embeddings.position_embeddings
    resized = embeddings.interpolate_pos_encoding(grid)
    assert resized.shape == (1, 1 + math.prod(grid), 32)
    equal(resized[:, 0], positions[:, 0])
    for channel in (0, 31):
        plane = positions[0, 1:, channel].reshape(1, 1, 2, 6)
        expected = nn.functional.interpolate(plane, size=grid, mode="bicubic", align_corners=False)
        equal(resized[0, 1:, channel], expected.flatten(), 1e-6)


@pytest.mark.parametrize("how", POSITION_INTERPOLATIONS)
@pytest.mark.parametrize("grid", [(3, 5), (4, 12), (1, 4), (2, 6)])
def test_interpolation_as_the_config_says(how, grid):
    """Against torch's own function in double precision; by its scale factor where there is an offset."""
    embeddings = make(ViTScratchModel, OBLONG, position_interpolation=how).double().embeddings  # 2 x 6
    plane = embeddings.position_embeddings[:, 1:].unflatten(1, (2, 6)).permute(0, 3, 1, 2)
    flags = {"align_corners": True} if how.endswith("align_corners") else {"antialias": how.endswith("antialias")}
    size = {"scale_factor": [(grid[0] + 0.1) / 2, (grid[1] + 0.1) / 6]} if how == "bicubic_offset" else {"size": grid}
    expected = nn.functional.interpolate(plane, mode=how.split("_")[0], **size, **flags).permute(0, 2, 3, 1)
    if grid == (2, 6):
        expected = plane.permute(0, 2, 3, 1)
    resized = embeddings.interpolate_pos_encoding(grid)
    equal(resized[:, 1:], expected.flatten(1, 2), 1e-12)
    equal(resized[:, :1], embeddings.position_embeddings[:, :1])


@pytest.mark.parametrize("how", POSITION_INTERPOLATIONS)
def test_interpolation_is_differentiable_and_takes_half_precision(how):
    model = make(ViTScratchModel, position_interpolation=how)
    model(torch.randn(2, 3, 20, 24), interpolate_pos_encoding=True).last_hidden_state.square().sum().backward()
    assert (model.embeddings.position_embeddings.grad != 0).any(dim=-1).all()
    halved = model.bfloat16().embeddings.interpolate_pos_encoding((5, 6))
    assert halved.dtype == torch.bfloat16
    equal(halved, model.float().embeddings.interpolate_pos_encoding((5, 6)).bfloat16())  # rounded once


def test_interpolation_keeps_rows_apart_from_columns():
    embeddings = make(ViTScratchModel, OBLONG).embeddings
    with torch.no_grad():
        embeddings.position_embeddings[:, 1:] = torch.randn(2, 1, 32).expand(2, 6, 32).reshape(1, 12, 32)
    resized = embeddings.interpolate_pos_encoding((4, 9))[0, 1:].reshape(4, 9, 32)
    equal(resized, resized[:, :1].expand(4, 9, 32), 1e-6)
    assert (resized[0] - resized[3]).abs().max() > 0.1


@every_class
def test_any_size_that_the_patch_divides(cls):
    model = make(cls, RICH)
    for size in [(8, 4), (24, 24), (16, 60)]:
        outputs = model(torch.randn(2, 3, *size), interpolate_pos_encoding=True, output_hidden_states=True)
        assert outputs.hidden_states[-1].shape == (2, 4 + size[0] // 8 * size[1] // 4, 32)


def test_order_of_tokens():
    model = make(ViTScratchModel, RICH)
    embeddings, x = model.embeddings, images(model)
    tokens = embeddings(x, None, False)
    assert tokens.shape == (3, 1 + 3 + 12, 32)
    positions = embeddings.position_embeddings
    equal(tokens[:, :1], (embeddings.cls_token + positions[:, :1]).expand(3, -1, -1))
    equal(tokens[:, 1:4], embeddings.register_tokens.expand(3, -1, -1))
    equal(tokens[:, 4:], embeddings.patch_embeddings(x) + positions[:, 1:])


def test_shapes_in_the_docstrings():
    model = make(ViTScratchForImageClassification, RICH)
    shapes = {}
    for name, module in model.named_modules():

        def record(module, args, output, name=name):
            shapes[name] = tuple((output[0] if isinstance(output, tuple) else output).shape)

        if name and not isinstance(module, ViTScratchModel):
            module.register_forward_hook(record)
    outputs = model(images(model), output_attentions=True)
    B, N, T, D = 3, 12, 16, 32
    assert shapes["vit.embeddings.patch_embeddings"] == (B, N, D)
    assert shapes["vit.embeddings"] == (B, T, D)
    for i in range(2):
        assert shapes[f"vit.layers.{i}.attention.qkv"] == (B, T, 3 * D)
        assert shapes[f"vit.layers.{i}.attention"] == shapes[f"vit.layers.{i}.mlp"] == (B, T, D)
        assert shapes[f"vit.layers.{i}.mlp.fc1"] == (B, T, 48)
        assert shapes[f"vit.layers.{i}"] == (B, T, D)
    assert shapes["vit.norm"] == (B, T, D)
    assert shapes["pre_logits"] == (B, 12)
    assert outputs.logits.shape == (B, 5)
    assert outputs.attentions[0].shape == (B, 4, T, T)


def test_pooling():
    for fields in (TINY, RICH, FIXED):
        model = make(ViTScratchModel, fields)
        outputs = model(images(model))
        prefix = model.config.num_prefix_tokens
        tokens = outputs.last_hidden_state
        equal(outputs.pooler_output, tokens[:, 0] if fields is TINY else tokens[:, prefix:].mean(dim=1), 1e-6)


def test_final_norm_is_optional():
    model = make(ViTScratchModel, use_final_norm=False)
    outputs = model(images(model), output_hidden_states=True)
    equal(outputs.last_hidden_state, outputs.hidden_states[-1])
    model = make(ViTScratchModel)
    outputs = model(images(model), output_hidden_states=True)
    equal(outputs.last_hidden_state, model.norm(outputs.hidden_states[-1]))


@pytest.mark.parametrize("fields", [TINY, RICH, FIXED], ids=["cls", "mean", "mean of all"])
def test_norm_after_pooling(fields):
    model, before = make(ViTScratchModel, fields, norm_after_pooling=True), make(ViTScratchModel, fields)
    before.load_state_dict({name.replace("pooled_norm", "norm"): p for name, p in model.state_dict().items()})
    x = images(model)
    outputs, expected = model(x, output_hidden_states=True), before(x, output_hidden_states=True)
    equal(outputs.last_hidden_state, outputs.hidden_states[-1])
    equal(outputs.last_hidden_state, expected.hidden_states[-1])
    equal(outputs.pooler_output, before.norm(before.pool(expected.hidden_states[-1])[:, 0]))
    assert torch.equal(outputs.pooler_output, expected.pooler_output) == (fields is TINY)  # one token: the same


def test_pre_training_head():
    model = make(ViTScratchForImageClassification, representation_size=12)
    x = images(model)
    linear, _ = model.pre_logits
    equal(model(x).logits, model.classifier(torch.tanh(linear(model.vit(x).pooler_output))), 1e-6)


def test_no_classes_gives_features():
    model = make(ViTScratchForImageClassification, num_labels=0)
    x = images(model)
    equal(model(x).logits, model.vit(x).pooler_output, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"num_register_tokens": 2, "layerscale_value": 0.5, "representation_size": 8},
        {"pooling": "mean", "use_cls_token": False, "use_final_norm": False},
        {"pooling": "mean", "norm_after_pooling": True, "num_register_tokens": 2, "layerscale_value": 0.5},
    ],
    ids=["cls", "cls, more", "mean", "mean, more"],
)
def test_only_one_token_leaves_the_last_block_where_only_logits_are_asked_for(implementation, more):
    """Logits and gradients are those of all tokens; the end of the last MLP works on the class token or the mean."""
    model = make(ViTScratchForImageClassification, **more)
    model.set_attn_implementation(implementation)
    x, tokens = images(model), []
    model.vit.layers[-1].mlp.fc2.register_forward_hook(lambda module, args, output: tokens.append(output.shape[1]))
    parameters = list(model.parameters())
    short = model(x).logits
    gradients = torch.autograd.grad(short.square().sum(), parameters)
    full = model.classifier(model.pre_logits(model.vit(x).pooler_output))
    expected = torch.autograd.grad(full.square().sum(), parameters)
    equal(short, full, atol=1e-5)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-4, rtol=1e-4)
    T = model.config.num_prefix_tokens + math.prod(model.config.grid_hw)
    asked = [model(x, output_hidden_states=True).logits, model(x, output_attentions=[-1]).logits]
    masked = model(x, attention_mask=torch.zeros(len(x), 1, T, T)).logits
    for logits in (*asked, masked):
        equal(logits, short, atol=1e-5)
    assert tokens == [1, T, T, T, 1 if model.config.pooling == "mean" else T]
    assert model(x, output_attentions=[0]).logits.shape == short.shape and tokens[-1] == 1


@pytest.mark.parametrize("fields", [TINY, {**TINY, "pooling": "mean", "use_cls_token": False, "use_final_norm": False}])
def test_blocks_return_one_tensor_to_hooks(fields):
    """As Grad-CAM tools expect; in the last block of a classifier it is the one token that is read."""
    model = make(ViTScratchForImageClassification, fields)
    T, seen = 16 + model.config.use_cls_token, []
    for layer in model.vit.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
    model(images(model)).logits[:, 0].sum().backward()
    assert [tuple(output.shape) for output in seen] == [(3, T, 32), (3, 1, 32)]
    seen.clear()
    outputs = model(images(model), output_attentions=[0], output_hidden_states=True)
    (states, maps), last = seen
    equal(states, outputs.hidden_states[1])
    equal(maps, outputs.attentions[0])
    equal(last, outputs.hidden_states[2])


def test_a_block_is_its_equations():
    model = make(ViTScratchModel, layerscale_value=0.5)
    block, z = model.layers[1], torch.randn(3, 17, 32)
    expected = z + block.layer_scale1(block.attention(block.norm1(z)))
    expected = expected + block.layer_scale2(block.mlp(block.norm2(expected)))
    equal(block(z), expected, 1e-6)
    equal(modeling.ViTScratchBlock.forward(block, z), block(z))
    source = inspect.getsource(modeling.ViTScratchBlock.forward).splitlines()
    assert len(source) <= 1 + 2 * 2  # at most two lines an equation


def test_a_mean_is_not_taken_before_a_norm_or_a_dropout():
    mean = {"pooling": "mean", "use_cls_token": False}
    for more in (mean, {**mean, "use_final_norm": False, "hidden_dropout_prob": 0.5}):
        model = make(ViTScratchForImageClassification, **more).train()
        assert model.vit(images(model), pooled_only=True).last_hidden_state.shape[1] > 1
    assert model.eval().vit(images(model), pooled_only=True).last_hidden_state.shape[1] == 1


def test_early_convolutions_are_the_written_out_ones():
    model = make(ViTScratchModel, stem_channels=[6, 8], patch_size=8)
    embeddings, x = model.embeddings.patch_embeddings, images(model)
    for stage in embeddings.stem:
        x = nn.functional.conv2d(x, stage.convolution.weight, padding=1)
        x = torch.stack([x[:, :, i::2, j::2] for i in range(2) for j in range(2)]).amax(0)
        mean, var = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        x = (x - mean) / (var + 1e-6).sqrt() * stage.norm.weight.view(-1, 1, 1) + stage.norm.bias.view(-1, 1, 1)
        x = nn.functional.gelu(x)
    kernel = embeddings.projection.weight.view(-1, 8, 2, 2)
    patches = nn.functional.conv2d(x, kernel, embeddings.projection.bias, stride=2).flatten(2).mT
    equal(embeddings(images(model)), patches, atol=1e-4)
    assert patches.shape == (3, 4, 32)


def test_early_convolutions_keep_the_channels_of_a_pixel_side_by_side():
    model = make(ViTScratchModel, stem_channels=[6, 8], patch_size=8)
    embeddings, layouts = model.embeddings.patch_embeddings, []
    for stage in embeddings.stem:
        stage.convolution.register_forward_hook(lambda _, __, maps: layouts.append(maps.stride(1)))
    embeddings(images(model))
    assert layouts == [1, 1]


def test_layer_scale():
    scaled, plain = make(ViTScratchModel, layerscale_value=1.0), make(ViTScratchModel)
    state = scaled.state_dict()
    for i in range(2):
        for number, linear in ((1, "attention.proj"), (2, "mlp.fc2")):
            scale = state.pop(f"layers.{i}.layer_scale{number}.scale")
            state[f"layers.{i}.{linear}.weight"] = state[f"layers.{i}.{linear}.weight"] * scale[:, None]
            state[f"layers.{i}.{linear}.bias"] = state[f"layers.{i}.{linear}.bias"] * scale
    plain.load_state_dict(state)
    x = images(plain)
    with torch.no_grad():
        equal(scaled(x).last_hidden_state, plain(x).last_hidden_state, 1e-5)


def test_layer_norm_epsilon_is_the_one_of_the_config():
    model = make(ViTScratchModel, layer_norm_eps=0.25)
    assert [m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)] == [0.25] * 5
    default = ViTScratchModel(ViTScratchConfig(**TINY))
    assert {m.eps for m in default.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_sine_cosine_positions():
    config = ViTScratchConfig(**{**OBLONG, "position_embedding_type": "sincos"})  # 2 x 6 patches
    positions = ViTScratchModel(config).embeddings.position_embeddings
    assert positions.shape == (1, 13, 32)
    assert not positions.requires_grad
    assert (positions[0, 0] == 0).all()  # class token
    for row in range(2):
        for column in range(6):
            expected = []
            for value in (column, row):
                for f in (math.sin, math.cos):
                    expected += [f(value / 10000 ** (i / 8)) for i in range(8)]
            equal(positions[0, 1 + row * 6 + column], torch.tensor(expected), 1e-6)
