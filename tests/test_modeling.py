"""The model: transformers' ViT as an oracle, and everything the library promises of its own models.

Weights are drawn large, so that attention is far from uniform: near the usual start values a wrong scale does not show.
"""

import ast
import contextlib
import copy
import inspect
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    set_seed,
)
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling_vit_scratch import (
    ViTScratchBackbone,
    ViTScratchConfig,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchModel,
)
from modeling_vit_scratch import modeling_vit_scratch as modeling
from modeling_vit_scratch.configuration_vit_scratch import POSITION_INTERPOLATIONS

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "num_labels": 5}
TINY |= {"image_size": 16, "patch_size": 4, "encoder_stride": 4}
OBLONG = {**TINY, "image_size": (16, 24), "patch_size": (8, 4), "encoder_stride": (8, 4)}
# Every option that adds tokens, parameters or buffers.
RICH = {**OBLONG, "num_register_tokens": 3, "layerscale_value": 0.5, "pooling": "mean", "representation_size": 12}
FIXED = {**TINY, "position_embedding_type": "sincos", "use_cls_token": False, "pooling": "mean", "qkv_bias": False}
FIXED |= {"stem_channels": [6]}
CONFIGS = {"tiny": TINY, "oblong": OBLONG, "rich": RICH, "fixed": FIXED}

CLASSES = [
    ViTScratchModel,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchBackbone,
]
HEADS = [ViTScratchForImageClassification, ViTScratchForMaskedImageModeling]
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__.removeprefix("ViTScratch"))
every_head = pytest.mark.parametrize("cls", HEADS, ids=lambda cls: cls.__name__.removeprefix("ViTScratch"))
every_config = pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)


def make(cls, fields=TINY, seed=0, **more):
    """A model in evaluation mode whose every parameter is large and random."""
    torch.manual_seed(seed)
    model = cls(ViTScratchConfig(**{**fields, **more})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=1 / math.sqrt(p.shape[-1]) if p.ndim == 2 else 0.5)
            if "qkv" in name and p.ndim == 2:
                p.mul_(2)
            if re.search(r"norm\d?\.weight", name):
                p.add_(1)
    return model


def images(model, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, model.config.num_channels, *model.config.image_hw, generator=generator)


def inputs(model, batch=3, targets=False):
    """Arguments of a call, with what its loss needs."""
    result = {"pixel_values": images(model, batch)}
    if targets and isinstance(model, ViTScratchForImageClassification):
        result["labels"] = torch.arange(batch) % model.num_labels
    if targets and isinstance(model, ViTScratchForMaskedImageModeling):
        count = math.prod(model.config.grid_hw)
        result["bool_masked_pos"] = (torch.arange(batch * count) % 3 == 0).reshape(batch, count)
    return result


def main_output(outputs):
    """What the class is for: features, logits, pixels or maps."""
    for name in ("last_hidden_state", "logits", "reconstruction"):
        if name in outputs:
            return outputs[name]
    return torch.cat([feature_map.flatten(1) for feature_map in outputs.feature_maps], dim=1)


def equal(a, b, atol=0.0):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# transformers' ViT as an oracle. Our names on the left; {} is the number of a block.

NAMES_IN_TRANSFORMERS = {
    "vit.embeddings.cls_token": "vit.embeddings.cls_token",
    "vit.embeddings.mask_token": "vit.embeddings.mask_token",
    "vit.embeddings.position_embeddings": "vit.embeddings.position_embeddings",
    "vit.embeddings.patch_embeddings.projection": "vit.embeddings.patch_embeddings.projection",
    "vit.layers.{}.norm1": "vit.layers.{}.layernorm_before",
    "vit.layers.{}.attention.proj": "vit.layers.{}.attention.o_proj",
    "vit.layers.{}.norm2": "vit.layers.{}.layernorm_after",
    "vit.layers.{}.mlp.fc1": "vit.layers.{}.mlp.fc1",
    "vit.layers.{}.mlp.fc2": "vit.layers.{}.mlp.fc2",
    "vit.norm": "vit.layernorm",
    "classifier": "classifier",
    "decoder": "decoder.0",
}


def weights_for_transformers(model):
    """Our state dict under the names and in the shapes of transformers' ViT."""
    state = {}
    for name, tensor in model.state_dict().items():
        module, kind = (name, "") if name.endswith(("token", "embeddings")) else name.rsplit(".", 1)
        kind = kind and f".{kind}"
        number = "".join(re.findall(r"layers\.(\d+)", module))
        module = re.sub(r"layers\.\d+", "layers.{}", module)
        if module.endswith("qkv"):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[f"vit.layers.{number}.attention.{letter}_proj{kind}"] = part
            continue
        if module.endswith("projection") and kind == ".weight":
            tensor = tensor.reshape(tensor.shape[0], model.config.num_channels, *model.config.patch_hw)
        if module == "decoder" and kind == ".weight":
            tensor = tensor[:, :, None, None]
        state[NAMES_IN_TRANSFORMERS[module].format(number) + kind] = tensor
    return state


def oracle(model, cls=ViTForImageClassification):
    """transformers' own model with the same weights."""
    shared = {name: value for name, value in model.config.to_dict().items() if hasattr(ViTConfig(), name)}
    for name in ("auto_map", "model_type", "architectures", "output_attentions"):
        shared.pop(name, None)
    if isinstance(shared["encoder_stride"], list):  # theirs is one number
        del shared["encoder_stride"]
    theirs = cls(ViTConfig(**shared, attn_implementation="eager")).eval()
    theirs.load_state_dict(weights_for_transformers(model), strict=True)
    return theirs


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("fields", [TINY, OBLONG, {**TINY, "qkv_bias": False, "num_channels": 1}])
def test_equals_transformers(fields, implementation):
    model = make(ViTScratchForImageClassification, fields, attn_implementation=implementation)
    x = images(model)
    with torch.no_grad():
        ours = model(x, output_hidden_states=True, output_attentions=True)
        theirs = oracle(model)(x, output_hidden_states=True, output_attentions=True)
        plain = model(x)
    equal(ours.logits, theirs.logits, 1e-5)
    equal(plain.logits, theirs.logits, 1e-5)
    for name in ("hidden_states", "attentions"):
        assert len(ours[name]) == len(theirs[name]) > 0
        for a, b in zip(ours[name], theirs[name], strict=True):
            equal(a, b, 2e-5)
    # The comparison means something: attention is far from uniform, and images differ.
    tokens = ours.attentions[0].shape[-1]
    assert ours.attentions[0].amax(-1).mean() > 3 / tokens
    assert ours.logits.std(dim=0).mean() > 0.1


def test_gradients_equal_transformers():
    model = make(ViTScratchForImageClassification)
    theirs = oracle(model)
    x, labels = images(model), torch.tensor([0, 3, 4])
    ours_loss, theirs_loss = model(x, labels=labels).loss, theirs(x, labels=labels).loss
    equal(ours_loss, theirs_loss, 1e-5)
    ours_loss.backward()
    theirs_loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.grad)
    for name, gradient in weights_for_transformers(model).items():
        equal(gradient, gradients[name], 2e-5)


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (8, 20), (4, 4)])
def test_interpolation_equals_transformers(size):
    model = make(ViTScratchForImageClassification)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        ours = model(x, interpolate_pos_encoding=True).logits
        equal(ours, oracle(model)(x, interpolate_pos_encoding=True).logits, 1e-5)


# Patches


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


# Sizes and what is refused


@every_class
def test_a_wrong_size_names_both_sizes_and_the_flag(cls):
    model = make(cls, OBLONG)
    for size in [(24, 16), (16, 32), (17, 24), (15, 23)]:
        with pytest.raises(ValueError) as error:
            model(torch.randn(1, 3, *size), interpolate_pos_encoding=False)
        for part in (f"{size[0]}x{size[1]}", "16x24", "interpolate_pos_encoding=True"):
            assert part in str(error.value)
    for size in [(17, 24), (16, 22), (4, 24)]:  # no patch divides these
        with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]}.*patches of 8x4"):
            model(torch.randn(1, 3, *size), interpolate_pos_encoding=True)


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


# Tokens


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


# Hidden states and attention maps


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@every_class
def test_attention_maps_under_every_implementation(cls, implementation):
    model = make(cls, RICH, attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    x = images(model)
    with torch.no_grad():
        plain = model(x)
        outputs = model(x, output_attentions=True)
    assert plain.attentions is None
    assert len(outputs.attentions) == 2
    for maps in outputs.attentions:
        assert maps.shape == (3, 4, 16, 16)
        equal(maps.sum(-1), torch.ones(3, 4, 16), 1e-5)
    equal(main_output(plain), main_output(outputs), 1e-4)


@contextlib.contextmanager
def uncompiled():
    """Flex attention without its kernel, which takes many seconds to compile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compiler.set_stance("force_eager")
        try:
            yield
        finally:
            torch.compiler.set_stance("default")


def test_flex_attention():
    model = make(ViTScratchForImageClassification, OBLONG, attn_implementation="flex_attention")
    assert model.config._attn_implementation == "flex_attention"
    x = images(model)
    with torch.no_grad(), uncompiled():
        flex = model(x)
        maps = model(x, output_attentions=True).attentions
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(x, output_attentions=True)
    equal(flex.logits, eager.logits, 1e-5)
    for a, b in zip(maps, eager.attentions, strict=True):
        equal(a, b, 1e-5)


@pytest.mark.slow
def test_flex_attention_compiled():
    model = make(ViTScratchForImageClassification, hidden_size=64, attn_implementation="flex_attention")
    x = images(model)
    with torch.no_grad():
        flex = model(x)
        model.set_attn_implementation("eager")
        equal(flex.logits, model(x).logits, 1e-5)


def test_flash_attention_is_declared():
    for cls in CLASSES:
        assert cls._supports_flash_attn
        assert cls._supports_sdpa
        assert cls._supports_flex_attn
        assert cls._supports_attention_backend
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="FlashAttention2"):
            make(ViTScratchModel, attn_implementation="flash_attention_2")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention runs on a GPU only")
def test_flash_attention():
    pytest.importorskip("flash_attn")
    model = make(ViTScratchForImageClassification, OBLONG, hidden_size=64).to("cuda", torch.bfloat16)
    x = images(model).cuda()
    logits = []
    for implementation in ("eager", "flash_attention_2"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits.append(model(x).logits.float())
    equal(logits[1], logits[0], 5e-2 * logits[0].abs().max().item())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_maps_and_states_of_selected_layers(implementation):
    model = make(ViTScratchForImageClassification, num_hidden_layers=4, attn_implementation=implementation)
    x = images(model)
    with torch.no_grad():
        every = model(x, output_attentions=True, output_hidden_states=True)
        for wanted, present in [([0, -1], {0, 3}), (2, {2}), ([1], {1}), (0, {0}), (-1, {3}), ((1, 2), {1, 2})]:
            some = model(x, output_attentions=wanted)
            assert {i for i, maps in enumerate(some.attentions) if maps is not None} == present
            assert len(some.attentions) == 4
            for i in present:
                equal(some.attentions[i], every.attentions[i], 1e-5)
        for wanted, present in [([0, -1], {0, 4}), (2, {2}), ([4], {4})]:
            some = model(x, output_hidden_states=wanted)
            assert {i for i, state in enumerate(some.hidden_states) if state is not None} == present
            assert len(some.hidden_states) == 5
            for i in present:
                equal(some.hidden_states[i], every.hidden_states[i], 1e-4)
    assert model(x, output_attentions=[]).attentions is None
    assert model(x, output_attentions=False, output_hidden_states=False).hidden_states is None


def test_only_the_selected_layers_compute_maps(monkeypatch):
    model = make(ViTScratchModel, num_hidden_layers=4)
    calls = []
    eager = modeling.eager_attention_forward
    monkeypatch.setattr(modeling, "eager_attention_forward", lambda *a, **k: calls.append(a[0]) or eager(*a, **k))
    model(images(model), output_attentions=[1, 3])
    assert calls == [model.layers[1].attention, model.layers[3].attention]


def test_layers_that_are_not_there_are_refused():
    model = make(ViTScratchModel)
    with pytest.raises(ValueError, match=r"output_attentions asks for 2, but there are 2: use -2 to 1"):
        model(images(model), output_attentions=2)
    with pytest.raises(ValueError, match=r"output_hidden_states asks for \[-4\], but there are 3: use -3 to 2"):
        model(images(model), output_hidden_states=[-4])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@every_class
def test_outputs_by_the_config(cls, implementation, tmp_path):
    model = make(cls, attn_implementation=implementation, output_attentions=True, output_hidden_states=True)
    outputs = model(images(model))
    assert len(outputs.attentions) == 2
    assert len(outputs.hidden_states) == 3
    assert model(images(model), output_attentions=False).attentions is None
    model.save_pretrained(tmp_path)
    assert len(cls.from_pretrained(tmp_path)(images(model)).attentions) == 2
    later = make(cls, attn_implementation=implementation)
    later.config.output_attentions = later.config.output_hidden_states = True
    assert len(later(images(later)).attentions) == 2
    loaded = cls.from_pretrained(tmp_path, attn_implementation=implementation, output_attentions=True)
    assert loaded.config._attn_implementation == implementation
    assert len(loaded(images(loaded)).attentions) == 2


@every_class
def test_gradients_reach_hidden_states_and_maps(cls):
    model = make(cls)
    outputs = model(images(model), output_hidden_states=True, output_attentions=True)
    kept = [*outputs.hidden_states[:2], *outputs.attentions]
    for tensor in kept:
        tensor.retain_grad()
    main_output(outputs).square().sum().backward()
    for tensor in kept:
        assert tensor.grad.abs().sum() > 0


def test_an_additive_mask_reaches_every_implementation():
    model = make(ViTScratchModel)
    mask = torch.zeros(3, 1, 17, 17)
    mask[..., 5:] = float("-inf")
    x = images(model)
    results = []
    for implementation in ("eager", "sdpa", "flex_attention"):
        model.set_attn_implementation(implementation)
        with torch.no_grad(), uncompiled():
            results.append(model(x, attention_mask=mask).last_hidden_state)
    equal(results[1], results[0], 1e-4)
    equal(results[2], results[0], 1e-4)
    assert (model(x, output_attentions=True, attention_mask=mask).attentions[0][..., 5:] == 0).all()


DTYPES = {"float32": (torch.float32, 1e-5), "bfloat16": (torch.bfloat16, 5e-2), "float16": (torch.float16, 1e-2)}


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.values(), ids=DTYPES)
@every_class
def test_implementations_agree_at_load_and_when_switched(cls, dtype, tolerance, tmp_path):
    make(cls, OBLONG).save_pretrained(tmp_path)
    eager = cls.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager")
    sdpa = cls.from_pretrained(tmp_path, dtype=dtype)
    assert (eager.config._attn_implementation, sdpa.config._attn_implementation) == ("eager", "sdpa")
    x = images(eager)
    with torch.no_grad():
        first, second = main_output(eager(x)), main_output(sdpa(x))
        eager.set_attn_implementation("sdpa")
        equal(main_output(eager(x)), second)
        sdpa.set_attn_implementation("flex_attention")
        with uncompiled():
            third = main_output(sdpa(x))
    assert first.dtype == second.dtype == third.dtype == dtype
    scale = first.float().abs().max()
    assert (first.float() - second.float()).abs().max() <= tolerance * scale
    assert (first.float() - third.float()).abs().max() <= tolerance * scale


def test_an_unknown_implementation_is_refused():
    model = make(ViTScratchModel)
    with pytest.raises(ValueError, match='Specified `attn_implementation="foo"` is not supported'):
        model.set_attn_implementation("foo")
    assert model.config._attn_implementation == "sdpa"


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fields", [TINY, FIXED])
@every_class
def test_half_precision_weights_take_float32_pixels(cls, fields, dtype, tmp_path):
    model = make(cls, fields)
    x = inputs(model, targets=True)
    full = main_output(model(**x)).detach()
    model.save_pretrained(tmp_path)
    for half in (copy.deepcopy(model).to(dtype), cls.from_pretrained(tmp_path, dtype=dtype)):
        assert {t.dtype for t in (*half.parameters(), *half.buffers())} == {dtype}
        outputs = half(**x)
        assert main_output(outputs).dtype == dtype
        assert (main_output(outputs).float() - full).abs().max() < 0.1 * full.abs().max()
        equal(main_output(half(**{**x, "pixel_values": x["pixel_values"].to(dtype)})), main_output(outputs))
        if "loss" in outputs:
            assert outputs.loss.dtype == torch.float32
            outputs.loss.backward()


def test_double_precision():
    model = make(ViTScratchForImageClassification).double()
    assert model(images(model)).logits.dtype == torch.float64


@every_head
def test_autocast(cls):
    model = make(cls).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**inputs(model, targets=True))
    assert outputs.loss.dtype == torch.float32
    outputs.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


# Activation checkpointing


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("fields", [TINY, {**RICH, "drop_path_rate": 0.5, "hidden_dropout_prob": 0.2}])
@every_head
def test_activation_checkpointing_gives_equal_gradients(cls, fields, reentrant):
    model = make(cls, fields).train()
    calls = []
    for layer in model.vit.layers:
        layer.attention.register_forward_hook(lambda module, args, output: calls.append(module))

    def run():
        calls.clear()
        model.zero_grad()
        set_seed(0)
        loss = model(**inputs(model, targets=True)).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters()], len(calls)

    loss, gradients, count = run()
    assert count == 2
    model.gradient_checkpointing_enable(None if reentrant is None else {"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    if reentrant:
        model.enable_input_require_grads()
    again, other_gradients, count = run()
    assert count == 4  # each block's forward twice, and no more
    equal(again, loss)
    equal(other_gradients, gradients)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert run()[2] == 2
    model.eval()
    model.gradient_checkpointing_enable()
    calls.clear()
    model(**inputs(model, targets=True)).loss.backward()
    assert len(calls) == 2  # only in training


@every_class
def test_activation_checkpointing_reaches_every_block(cls):
    model = make(cls)
    assert not model.is_gradient_checkpointing
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert len(layers) == 2
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in layers)
    model.train()
    outputs = model(images(model), output_attentions=True, output_hidden_states=True)
    assert len(outputs.attentions) == 2
    main_output(outputs).sum().backward()


def test_activation_checkpointing_by_the_config():
    config = ViTScratchConfig(**TINY)
    config.gradient_checkpointing = True
    assert ViTScratchModel(config).is_gradient_checkpointing


# Compilers and exporters


@every_class
def test_compile_without_graph_breaks(cls):
    torch.compiler.reset()
    model = make(cls, RICH)
    x = inputs(model, targets=True)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for more in ({}, {"output_hidden_states": True, "output_attentions": True}):
            ours, theirs = compiled(**x, **more), model(**x, **more)
            equal(main_output(ours), main_output(theirs), 1e-5)
            for name in ("hidden_states", "attentions"):
                assert len(ours.get(name) or ()) == len(theirs.get(name) or ())
        sized = {**x, "pixel_values": torch.randn(3, 3, 24, 32)}
        sized.pop("bool_masked_pos", None)
        equal(
            main_output(compiled(**sized, interpolate_pos_encoding=True)),
            main_output(model(**sized, interpolate_pos_encoding=True)),
            1e-5,
        )


@every_head
def test_compile_for_training(cls):
    torch.compiler.reset()
    model = make(cls, RICH, drop_path_rate=0.0).train()
    x = inputs(model, targets=True)
    model(**x).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(**x, output_hidden_states=True).loss.backward()
    equal([p.grad for p in model.parameters()], expected, 1e-4)


def test_compile_with_class_probabilities_and_every_problem_type():
    torch.compiler.reset()
    for problem in (None, "single_label_classification", "multi_label_classification", "regression"):
        model = make(ViTScratchForImageClassification, problem_type=problem)
        labels = torch.rand(3, 5).softmax(-1)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        equal(compiled(images(model), labels=labels).loss, model(images(model), labels=labels).loss, 1e-5)


@pytest.mark.slow
def test_compile_with_inductor():
    torch.compiler.reset()
    model = make(ViTScratchForImageClassification)
    x = images(model)
    with torch.no_grad():
        outputs = torch.compile(model, fullgraph=True)(x, output_hidden_states=True)
        equal(outputs.logits, model(x).logits, 1e-4)
        assert len(outputs.hidden_states) == 3


@pytest.mark.parametrize("fields", [RICH, FIXED])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@every_class
def test_jit_trace(cls, fields, implementation, tmp_path):
    model = make(cls, fields, attn_implementation=implementation, return_dict=False)
    x, y = images(model), images(model, batch=5, seed=2)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x)
        torch.jit.save(traced, tmp_path / "traced.pt")
        loaded = torch.jit.load(tmp_path / "traced.pt")
        for pixels in (x, y):
            ours, theirs = model(pixels)[0], loaded(pixels)[0]
            equal(theirs, ours, 1e-5)
    assert set(loaded.state_dict()) >= set(model.state_dict())


@pytest.mark.parametrize("fields", [RICH, FIXED])
@every_class
def test_export_with_a_dynamic_batch(cls, fields):
    model = make(cls, fields)
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (), {"pixel_values": images(model)}, dynamic_shapes=shapes)
    for batch in (1, 3, 7):
        x = images(model, batch)
        with torch.no_grad():
            equal(main_output(program.module()(pixel_values=x)), main_output(model(x)), 1e-5)


SIZES = [(2, 3, 16, 16), (3, 3, 32, 8), (1, 3, 20, 24)]


@every_class
def test_export_with_dynamic_sizes(cls):
    model = make(cls, num_register_tokens=2)
    batch, h, w = (torch.export.Dim(name, min=1 if name == "batch" else 2, max=32) for name in ("batch", "h", "w"))
    shapes = {"pixel_values": {0: batch, 2: 4 * h, 3: 4 * w}, "interpolate_pos_encoding": None}
    example = {"pixel_values": torch.randn(2, 3, 20, 24), "interpolate_pos_encoding": True}
    program = torch.export.export(model, (), example, dynamic_shapes=shapes).module()
    for size in SIZES:
        x = {"pixel_values": torch.randn(size), "interpolate_pos_encoding": True}
        with torch.no_grad():
            equal(main_output(program(**x)), main_output(model(**x)), 1e-5)


class Resized(nn.Module):
    """`torch.jit.trace` takes tensors alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values, interpolate_pos_encoding=True, return_dict=False)[0]


@pytest.mark.parametrize("how", POSITION_INTERPOLATIONS)
@pytest.mark.parametrize("exporter", ["export", "trace", "onnx"])
def test_every_interpolation_can_be_exported_with_dynamic_sizes(how, exporter, tmp_path):
    """Of a model for 16 x 16 pixels, whose positions stay as they are where the size is that."""
    model = make(ViTScratchForImageClassification, position_interpolation=how)
    h, w = (torch.export.Dim(name, min=2, max=32) for name in "hw")
    program, x, shapes = Resized(model).eval(), torch.randn(2, 3, 20, 24), ({2: 4 * h, 3: 4 * w},)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "trace":
            run = torch.jit.trace(program, x)
        elif exporter == "export":
            run = torch.export.export(program, (x,), dynamic_shapes=shapes).module()
        else:
            pytest.importorskip("onnxscript", reason="pip install 'modeling_vit_scratch[export]'")
            runtime = pytest.importorskip("onnxruntime", reason="pip install 'modeling_vit_scratch[export]'")
            options = {"dynamo": True, "dynamic_shapes": shapes, "opset_version": 20, "verbose": False}
            torch.onnx.export(program, (x,), tmp_path / "model.onnx", **options)
            session = runtime.InferenceSession(tmp_path / "model.onnx")

            def run(x):
                return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])

        for size in [(2, 3, 16, 16), (2, 3, 32, 8), (2, 3, 24, 16), (2, 3, 20, 28)]:
            x = torch.randn(size)
            equal(run(x), program(x), 1e-4)


@pytest.mark.parametrize("cls", CLASSES[:3])
def test_jit_trace_with_dynamic_sizes(cls):
    model = Resized(make(cls, num_register_tokens=2))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, torch.randn(2, 3, 16, 16))
        for size in SIZES:
            x = torch.randn(size)
            equal(traced(x), model(x), 1e-5)


def test_export_with_hidden_states_and_maps():
    model = make(ViTScratchForImageClassification)
    x = images(model)
    program = torch.export.export(
        model, (), {"pixel_values": x, "output_hidden_states": True, "output_attentions": True}
    )
    outputs = program.module()(pixel_values=x, output_hidden_states=True, output_attentions=True)
    assert (len(outputs.hidden_states), len(outputs.attentions)) == (3, 2)


# Devices


@every_class
def test_device_map_auto(cls, tmp_path):
    model = make(cls, RICH)
    model.save_pretrained(tmp_path)
    placed = cls.from_pretrained(tmp_path, device_map="auto")
    assert all(p.device.type != "meta" for p in placed.parameters())
    with torch.no_grad():
        equal(main_output(placed(images(model))).cpu(), main_output(model(images(model))), 1e-5)


@pytest.mark.parametrize("fields", [RICH, FIXED])
@every_class
def test_offloading_any_module_to_the_disk(cls, fields, tmp_path):
    """Embeddings and blocks are indivisible: each may lie elsewhere, and is fetched when it runs."""
    model = make(cls, fields)
    model.save_pretrained(tmp_path / "model")
    prefix = "" if cls is ViTScratchModel else "vit."
    names = [name for name, _ in model.named_children()] if prefix else []
    device_map = dict.fromkeys([name for name in names if name != "vit"], "cpu")
    device_map |= {f"{prefix}embeddings": "disk", f"{prefix}layers.0": "cpu"}
    device_map |= {f"{prefix}layers.1": "disk", f"{prefix}norm": "disk"}
    placed = cls.from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload")
    assert all(p.device.type == "meta" for name, p in placed.named_parameters() if "layers.1" in name)
    x = inputs(model, targets=True)
    with torch.no_grad():
        equal(main_output(placed(**x)), main_output(model(**x)), 1e-5)


@every_class
def test_indivisible_modules_exist(cls):
    model = make(cls)
    present = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) == {"ViTScratchEmbeddings", "ViTScratchLayer"} <= present


@every_class
@every_config
def test_meta_device(cls, fields):
    config = ViTScratchConfig(**fields)
    with torch.device("meta"):
        model = cls(config)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan"))
    model.init_weights()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.isfinite().all(), name
    main_output(model.eval()(images(model)))
    buffers = dict(cls(config).named_buffers())
    for name, buffer in model.named_buffers():
        equal(buffer, buffers[name])


def test_buffers_are_right_before_initialisation():
    with init.no_init_weights():
        raw = ViTScratchModel(ViTScratchConfig(**FIXED))
    equal(raw.embeddings.position_embeddings, ViTScratchModel(raw.config).embeddings.position_embeddings)


def test_loading_under_a_meta_device_is_refused(tmp_path):
    make(ViTScratchModel).save_pretrained(tmp_path)
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta device context manager"):
        ViTScratchModel.from_pretrained(tmp_path)


# Losses


def loss_of(logits, labels, problem_type=None, **kwargs):
    config = ViTScratchConfig(**{**TINY, "num_labels": max(logits.shape[1], 2)}, problem_type=problem_type)
    return modeling.image_classification_loss(labels, logits, config, **kwargs)


def test_loss_from_class_indices():
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    expected = -logits.log_softmax(-1)[range(6), labels].mean()
    for problem in (None, "single_label_classification"):
        equal(loss_of(logits, labels, problem), expected, 1e-6)
        equal(loss_of(logits, labels.reshape(6, 1), problem), expected, 1e-6)
        equal(loss_of(logits, labels.to(torch.uint8).long(), problem), expected, 1e-6)


def test_loss_from_class_probabilities():
    logits, labels = torch.randn(6, 5), torch.rand(6, 5).softmax(-1)
    equal(loss_of(logits, labels), -(labels * logits.log_softmax(-1)).sum(-1).mean(), 1e-6)
    indices = torch.arange(6) % 5
    one_hot = nn.functional.one_hot(indices, 5).float()
    equal(loss_of(logits, one_hot), loss_of(logits, indices), 1e-6)
    mixed = 0.3 * one_hot + 0.7 * one_hot.flip(0)
    expected = 0.3 * loss_of(logits, indices) + 0.7 * loss_of(logits, indices.flip(0))
    equal(loss_of(logits, mixed), expected, 1e-6)
    equal(loss_of(logits, mixed.to(torch.bfloat16)), expected, 2e-2)


def test_loss_of_several_labels():
    logits, labels = torch.randn(6, 5), (torch.rand(6, 5) > 0.5).float()
    p = logits.sigmoid()
    expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    equal(loss_of(logits, labels, "multi_label_classification"), expected, 1e-6)
    equal(loss_of(logits, labels.long(), "multi_label_classification"), expected, 1e-6)


def test_loss_of_regression():
    logits, labels = torch.randn(6, 5), torch.randn(6, 5)
    equal(loss_of(logits, labels, "regression"), (logits - labels).square().mean(), 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no broadcasting of (B,) against (B, 1)
        for problem in (None, "regression"):
            for target in (labels[:, 0], labels[:, :1]):
                loss = loss_of(logits[:, :1], target, problem)
                equal(loss, (logits[:, 0] - labels[:, 0]).square().mean(), 1e-6)


def test_loss_refuses_labels_that_do_not_fit():
    logits = torch.randn(6, 5)
    for labels, problem in [
        (torch.randn(6), None),
        (torch.rand(6, 4).softmax(-1), None),
        (torch.rand(6, 4), "multi_label_classification"),
        (torch.rand(6), "regression"),
    ]:
        with pytest.raises(ValueError, match=r"shape .* neither class indices .*\(6,\)\) nor .*\(6, 5\)"):
            loss_of(logits, labels, problem)
    with pytest.raises(ValueError, match="multi_label_classification"):
        loss_of(logits, torch.ones(6, 5))
    equal(
        loss_of(logits, torch.ones(6, 5), "single_label_classification"), -logits.log_softmax(-1).sum(-1).mean(), 1e-5
    )


def test_loss_in_half_precision_is_computed_in_float32():
    logits, labels = torch.randn(6, 5), torch.arange(6) % 5
    half = loss_of(logits.to(torch.bfloat16), labels)
    assert half.dtype == torch.float32
    equal(half, loss_of(logits.to(torch.bfloat16).float(), labels))


def test_the_loss_can_be_replaced_and_gets_what_forward_was_given():
    """As transformers' own models hand it on, so that a loss written for them fits."""
    model, given = make(ViTScratchForImageClassification), {}

    def loss(labels, logits, config, num_items_in_batch=None, **kwargs):
        given.update(labels=labels, config=config, num_items_in_batch=num_items_in_batch)
        return logits.sum()

    model.loss_function = loss
    labels = torch.tensor([1, 2, 3])
    outputs = model(images(model), labels=labels, num_items_in_batch=12)
    equal(outputs.loss, outputs.logits.sum())
    assert given == {"labels": labels, "config": model.config, "num_items_in_batch": 12}


def test_problem_types_through_the_model():
    for problem, count, dtype in [
        ("multi_label_classification", 2, torch.float),
        ("regression", 1, torch.float),
        ("regression", 3, torch.float),
        (None, 1, torch.float),
        (None, 4, torch.long),
    ]:
        model = make(ViTScratchForImageClassification, num_labels=count, problem_type=problem).train()
        shape = (3,) if dtype == torch.long else (3, count)
        outputs = model(images(model), labels=torch.ones(shape, dtype=dtype))
        assert outputs.logits.shape == (3, count)
        outputs.loss.backward()


class SixteenImages(torch.utils.data.Dataset):
    """The same ones each time, with class indices or probabilities."""

    def __init__(self, soft=False):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(16, 3, 16, 16, generator=generator)
        self.labels = torch.randint(5, (16,), generator=generator)
        if soft:
            self.labels = torch.randn(16, 5, generator=generator).softmax(-1)

    def __len__(self):
        return 16

    def __getitem__(self, i):
        return {"pixel_values": self.pixels[i], "labels": self.labels[i]}


def trained(output, batch, accumulate, soft=False, **arguments):
    """Weights after the stock Trainer's SGD over the sixteen images, in order."""
    model = make(ViTScratchForImageClassification)
    arguments = TrainingArguments(
        output_dir=output,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=2,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="sgd",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1,
        **arguments,
    )
    trainer = Trainer(model, arguments, train_dataset=SixteenImages(soft))
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {name: p.detach() for name, p in model.named_parameters()}, losses


@pytest.mark.parametrize("soft", [False, True])
def test_trainer_gives_the_same_weights_with_1_and_4_accumulation_steps(soft, tmp_path):
    one, one_losses = trained(tmp_path, 8, 1, soft)
    four, four_losses = trained(tmp_path, 2, 4, soft)
    start = dict(make(ViTScratchForImageClassification).named_parameters())
    assert len(one_losses) == len(four_losses) == 4
    for name in one:
        equal(four[name], one[name], 2e-5)
    assert max((one[name] - start[name]).abs().max() for name in one) > 1e-2
    assert one_losses == pytest.approx(four_losses, abs=1e-4)
    data = SixteenImages(soft)
    with torch.no_grad():
        first = make(ViTScratchForImageClassification)(data.pixels[:8], labels=data.labels[:8]).loss
    assert one_losses[0] == pytest.approx(first.item(), abs=1e-4)  # not divided by the number of classes


def test_trainer_takes_only_labels_for_labels(tmp_path):
    arguments = TrainingArguments(output_dir=tmp_path, report_to="none", use_cpu=True)
    assert Trainer(make(ViTScratchForImageClassification), arguments).label_names == ["labels"]


# Initialisation: the table in the docstring, row by row


def statistics(tensor):
    return tensor.mean().item(), tensor.std().item()


BIG = {**TINY, "hidden_size": 128, "intermediate_size": 192, "image_size": 40}


def init_table():
    """(tensor, start) of each row of the table in `_init_weights`."""
    doc = inspect.getdoc(modeling.ViTScratchPreTrainedModel._init_weights)
    rows = [line.strip("| ").split("|") for line in doc.splitlines() if line.startswith("|")]
    return [(row[0].strip(), row[1].strip()) for row in rows[2:]]


def rows_of(name):
    """The row of the table that a parameter or buffer belongs to, by its name alone."""
    last = name.rsplit(".", 1)[-1]
    if last in ("cls_token", "register_tokens", "position_embeddings"):
        return "`cls_token`, `register_tokens`, learned positions"
    if last == "mask_token":
        return "`mask_token`"
    if last == "scale":
        return "LayerScale"
    if "norm" in name.rsplit(".", 2)[-2]:
        return "LayerNorm"
    if last == "bias":
        return "bias"
    return "weight of `classifier`" if name == "classifier.weight" else "weight of a linear or convolutional layer"


FULL = {**BIG, "num_register_tokens": 4, "layerscale_value": 0.25, "representation_size": 96, "stem_channels": [32]}


@pytest.mark.parametrize("cls", [*HEADS, ViTScratchModel])
def test_every_tensor_starts_as_the_table_says(cls):
    table = dict(init_table())
    assert list(table) == [
        "weight of a linear or convolutional layer",
        'the same, `initializer_range="fan_in"`',
        "weight of `classifier`",
        "bias",
        "LayerNorm",
        "`cls_token`, `register_tokens`, learned positions",
        "sincos positions",
        "`mask_token`",
        "LayerScale",
    ]
    set_seed(0)
    model = cls(ViTScratchConfig(**FULL, initializer_range=0.03, position_initializer_range=0.5))
    seen = set()
    for name, p in model.named_parameters():
        row = rows_of(name)
        seen.add(row)
        mean, std = statistics(p)
        noise = 4 / math.sqrt(p.numel())
        if row == "weight of a linear or convolutional layer":
            assert table[row] == "truncated N(0, std^2) in [-2, 2]"
            assert abs(mean) < 0.03 * noise
            assert std == pytest.approx(0.03, rel=noise)
        elif row in ("weight of `classifier`", "bias", "`mask_token`"):
            assert table[row].startswith("0")
            assert (p == 0).all(), name
        elif row == "LayerNorm":
            assert table[row] == "weight 1, bias 0"
            assert (p == (1 if name.endswith("weight") else 0)).all(), name
        elif row == "LayerScale":
            assert table[row] == "`layerscale_value`"
            assert (p == 0.25).all(), name
        else:
            assert table[row] == "truncated N(0, std'^2) in [-2, 2] * max(std', 1)"
            assert abs(mean) < 0.5 * noise
            assert std == pytest.approx(0.5, rel=noise)
    expected = set(table) - {'the same, `initializer_range="fan_in"`', "sincos positions"}
    absent = {
        ViTScratchForImageClassification: {"`mask_token`"},
        ViTScratchForMaskedImageModeling: {"weight of `classifier`"},
        ViTScratchModel: {"`mask_token`", "weight of `classifier`"},
    }
    assert seen == expected - absent[cls]


def test_fan_in_initialisation():
    set_seed(0)
    model = ViTScratchForImageClassification(ViTScratchConfig(**FULL, initializer_range="fan_in"))
    linears = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    del linears["classifier"]
    fan_in = {name: m.weight[0].numel() for name, m in linears.items()}
    assert set(fan_in.values()) == {3 * 3 * 3, 32 * 2 * 2, 128, 192}
    for name, linear in linears.items():
        mean, std = statistics(linear.weight)
        noise = 4 / math.sqrt(linear.weight.numel())
        assert std == pytest.approx(fan_in[name] ** -0.5, rel=noise), name
        assert abs(mean) < noise * std
        assert linear.bias is None or (linear.bias == 0).all()
    assert statistics(model.vit.embeddings.position_embeddings)[1] == pytest.approx(0.02, rel=0.1)
    assert (model.classifier.weight == 0).all()


def test_positions_follow_the_range_or_have_their_own():
    for fields, expected in [
        ({}, 0.02),
        ({"initializer_range": 0.1}, 0.1),
        ({"position_initializer_range": 1.0}, 0.8796),  # N(0, 1) cut at 2 standard deviations
        ({"position_initializer_range": 3.0}, 3 * 0.8796),
    ]:
        set_seed(0)
        embeddings = ViTScratchModel(ViTScratchConfig(**BIG, **fields)).embeddings
        assert statistics(embeddings.position_embeddings)[1] == pytest.approx(expected, rel=0.04)
        assert embeddings.position_embeddings.abs().max() <= 2 * max(1, fields.get("position_initializer_range", 1))


def test_truncation():
    set_seed(0)
    model = ViTScratchModel(ViTScratchConfig(**BIG, initializer_range=1.5))
    weights = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, nn.Linear)])
    assert 1.99 < weights.abs().max() <= 2.0


def test_same_seed_same_weights():
    for cls in CLASSES:
        states = []
        for seed in (0, 0, 1):
            set_seed(seed)
            states.append(cls(ViTScratchConfig(**RICH)).state_dict())
        equal(states[0], states[1])
        assert any((states[0][name] != states[2][name]).any() for name in states[0])


@every_class
def test_tiny_ranges_leave_means_of_zero_and_one(cls):
    config = ViTScratchConfig(**{**RICH, "layerscale_value": 1.0})
    for name in list(vars(config)):
        if "_range" in name or "_std" in name:
            setattr(config, name, 1e-10)
    for name, p in cls(config).named_parameters():
        assert round(p.mean().item() * 1e9) / 1e9 in (0.0, 1.0), name


# Saving and loading


@contextlib.contextmanager
def seeded_initialisation(monkeypatch):
    """The same random numbers for each module, whatever the order of initialisation."""
    original = modeling.PreTrainedModel._initialize_weights
    with monkeypatch.context() as patch:
        patch.setattr(
            modeling.PreTrainedModel, "_initialize_weights", lambda *a, **k: set_seed(42) or original(*a, **k)
        )
        yield


@every_class
@every_config
def test_nothing_is_left_uninitialised_without_any_weights(cls, fields, monkeypatch):
    config = ViTScratchConfig(**fields)
    with seeded_initialisation(monkeypatch):
        made = cls(copy.deepcopy(config))
        loaded = cls.from_pretrained(None, config=copy.deepcopy(config), state_dict={})
    tensors = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}
    for name, tensor in (*made.named_parameters(), *made.named_buffers()):
        equal(tensors[name], tensor)


@every_class
@every_config
def test_save_and_load(cls, fields, tmp_path):
    model = make(cls, fields)
    x = inputs(model, targets=True)
    for i in range(2):
        model.save_pretrained(tmp_path / str(i))
        names = {path.name for path in (tmp_path / str(i)).iterdir()}
        assert names >= {"config.json", "model.safetensors", "modeling_vit_scratch.py", "configuration_vit_scratch.py"}
        loaded, report = cls.from_pretrained(tmp_path / str(i), output_loading_info=True)
        assert not any(report.values())
        assert not loaded.training
        assert loaded.config.architectures == [cls.__name__]
        equal(loaded.state_dict(), model.state_dict())
        equal(dict(loaded.named_buffers()), dict(model.named_buffers()))
        assert all(p.is_contiguous() for p in loaded.parameters())
        with torch.no_grad():
            equal(main_output(loaded(**x)), main_output(model(**x)))
        model = loaded


@every_class
def test_sharded_save(cls, tmp_path):
    model = make(cls, RICH)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").is_file()
    equal(cls.from_pretrained(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_class
def test_half_precision_save(cls, dtype, tmp_path):
    model = make(cls, FIXED).to(dtype)
    model.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    same = cls.from_pretrained(tmp_path, dtype="auto")
    assert same.dtype == same.config.dtype == dtype
    equal(same.state_dict(), model.state_dict())
    full = cls.from_pretrained(tmp_path, dtype=torch.float32)
    assert {t.dtype for t in (*full.parameters(), *full.buffers())} == {torch.float32}
    sincos = [b for name, b in full.named_buffers() if name.endswith("position_embeddings")]
    equal(sincos, [modeling.sincos_positions(full.config)])


@every_class
def test_dtype_arguments(cls, tmp_path):
    make(cls).save_pretrained(tmp_path)
    for dtype in ("float16", "bfloat16", torch.float16, "float32", "auto"):
        loaded = cls.from_pretrained(tmp_path, dtype=dtype)
        expected = torch.float32 if dtype == "auto" else getattr(torch, str(dtype).removeprefix("torch."))
        assert loaded.dtype == expected
        assert cls.from_pretrained(tmp_path, torch_dtype=dtype).dtype == expected


@every_class
def test_torch_save(cls, tmp_path):
    model = make(cls, RICH)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = make(cls, RICH, seed=1)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    equal(other.state_dict(), model.state_dict())
    torch.save(model, tmp_path / "model.pt")
    whole = torch.load(tmp_path / "model.pt", weights_only=False)
    equal(main_output(whole(images(model))), main_output(model(images(model))))


@every_class
def test_load_without_a_folder(cls):
    model = make(cls)
    loaded = cls.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    equal(loaded.state_dict(), model.state_dict())


@every_class
def test_a_file_without_our_weights_lacks_them_all(cls, tmp_path):
    model = make(cls, FIXED)
    model.save_pretrained(tmp_path)
    save_file({"stranger": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == set(model.state_dict())
    assert set(report["unexpected_keys"]) == {"stranger"}
    for name, p in loaded.named_parameters():
        assert p.isfinite().all(), name


def test_weights_that_a_checkpoint_lacks_are_initialised(tmp_path):
    model = make(ViTScratchForImageClassification)
    model.save_pretrained(tmp_path)
    more = {"num_register_tokens": 3, "layerscale_value": 0.5, "representation_size": 12}
    loaded, report = ViTScratchForImageClassification.from_pretrained(
        tmp_path, **more, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert set(report["missing_keys"]) == {
        "vit.embeddings.register_tokens",
        "pre_logits.0.weight",
        "pre_logits.0.bias",
        *(f"vit.layers.{i}.layer_scale{j}.scale" for i in range(2) for j in (1, 2)),
    }
    assert 0.005 < loaded.vit.embeddings.register_tokens.std() < 0.04
    assert 0.01 < loaded.pre_logits[0].weight.std() < 0.03
    assert (loaded.pre_logits[0].bias == 0).all()
    assert (loaded.vit.layers[1].layer_scale2.scale == 0.5).all()
    assert (loaded.classifier.weight == 0).all()  # 12 features instead of 32: another size
    kept = {k: v for k, v in model.state_dict().items() if k != "classifier.weight"}
    equal({name: loaded.state_dict()[name] for name in kept}, kept)


def test_another_number_of_classes(tmp_path):
    model = make(ViTScratchForImageClassification)
    model.save_pretrained(tmp_path)
    for cls in (ViTScratchForImageClassification, AutoModelForImageClassification):
        with pytest.raises(RuntimeError, match="size"):
            cls.from_pretrained(tmp_path, num_labels=42)
        loaded = cls.from_pretrained(tmp_path, num_labels=42, ignore_mismatched_sizes=True)
        assert loaded(images(model)).logits.shape == (3, 42)
        assert (loaded.classifier.weight == 0).all()
        assert (loaded.classifier.bias == 0).all()
        equal(loaded.vit.state_dict(), model.vit.state_dict())


def test_another_image_size_is_refused_or_ignored_on_request(tmp_path):
    model = make(ViTScratchForImageClassification)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size"):
        ViTScratchForImageClassification.from_pretrained(tmp_path, image_size=32)
    loaded = ViTScratchForImageClassification.from_pretrained(tmp_path, image_size=32, ignore_mismatched_sizes=True)
    assert loaded.vit.embeddings.position_embeddings.shape == (1, 65, 32)
    assert 0.015 < loaded.vit.embeddings.position_embeddings.std() < 0.025
    equal(loaded.vit.embeddings.cls_token, model.vit.embeddings.cls_token)


@pytest.mark.parametrize("cls", CLASSES[1:])
@every_config
def test_base_weights_into_a_head_and_back(cls, fields, tmp_path):
    base = make(ViTScratchModel, fields)
    base.save_pretrained(tmp_path / "base")
    model, report = cls.from_pretrained(tmp_path / "base", output_loading_info=True)
    equal({k: v for k, v in model.vit.state_dict().items() if "mask_token" not in k}, base.state_dict())
    own = {name for name, _ in model.named_parameters() if not name.startswith("vit.") or "mask_token" in name}
    assert set(report["missing_keys"]) == own
    assert not report["unexpected_keys"]
    model.save_pretrained(tmp_path / "head")
    for loader in (ViTScratchModel, AutoModel):
        again, report = loader.from_pretrained(tmp_path / "head", output_loading_info=True)
        equal(again.state_dict(), base.state_dict())
        assert not report["missing_keys"]
        assert set(report["unexpected_keys"]) == own


def test_number_of_layers_can_be_cut_on_loading(tmp_path):
    model = make(ViTScratchBackbone, num_hidden_layers=3)
    model.save_pretrained(tmp_path)
    for cls in CLASSES:
        loaded, report = cls.from_pretrained(tmp_path, num_hidden_layers=2, output_loading_info=True)
        assert len([m for m in loaded.modules() if isinstance(m, modeling.ViTScratchLayer)]) == 2
        assert all("layers.2" in key for key in report["unexpected_keys"])


# Behaviour


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


# Dropout and stochastic depth


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


# What weight decay leaves alone


def test_no_weight_decay():
    model = ViTScratchForMaskedImageModeling(ViTScratchConfig(**RICH))
    excluded = model.no_weight_decay()
    decayed = {name for name, _ in model.named_parameters()} - excluded
    assert decayed == {name for name, _ in model.named_parameters() if name.endswith(".weight") and "norm" not in name}
    assert {f"vit.embeddings.{name}" for name in ("cls_token", "register_tokens", "mask_token")} <= excluded
    assert "vit.layers.0.layer_scale1.scale" in excluded


# The file


SOURCE = Path(modeling.__file__).read_text()


def test_the_file_imports_torch_transformers_and_its_configuration_alone():
    found = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module if node.level else node.module.split(".")[0]))
    assert found == {"torch", "transformers", ".configuration_vit_scratch"}
    # The library reads annotations as objects, and takes import-looking lines in docstrings for imports.
    assert "from __future__" not in SOURCE
    assert len(re.findall(r"^\s*from\s+\.", SOURCE, re.MULTILINE)) == 1


def test_the_configuration_imports_transformers_and_the_standard_library_alone():
    import sys

    source = Path(inspect.getfile(ViTScratchConfig)).read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= sys.stdlib_module_names
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module.split(".")[0] in {"transformers", *sys.stdlib_module_names}


def test_definitions_stand_in_reading_order():
    """Bottom up, and what the paper has before what is optional."""
    order = re.findall(r"^class ViTScratch(\w+)", SOURCE, re.MULTILINE)
    assert order == [
        "PatchEmbeddings", "StemStage", "StemPatchEmbeddings", "Embeddings", "Attention", "MLP", "DropPath",
        "LayerScale", "Block", "Layer", "PreTrainedModel", "Model", "ForImageClassification", "ForMaskedImageModeling",
        "Backbone",
    ]  # fmt: skip


def forward_references(source: str) -> list[str]:
    """Where a top-level definition of the file is named above its place."""
    tree = ast.parse(source)
    places = {node.name: node.lineno for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    named = [(node.id, node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return [f"{name} in line {line}" for name, line in named if places.get(name, 0) > line]


def bare_reshapes(source: str) -> list[str]:
    """Statements that rearrange a tensor, and whose lines have no comment with a shape."""
    rearranging = {"reshape", "view", "permute", "transpose", "unfold", "flatten", "unflatten"}
    lines, found = source.splitlines(), []
    for statement in ast.walk(ast.parse(source)):
        if not isinstance(statement, ast.stmt) or hasattr(statement, "body"):
            continue
        called = {
            node.func.attr for node in ast.walk(statement) if isinstance(node, ast.Call) and hasattr(node.func, "attr")
        }
        text = "\n".join(lines[statement.lineno - 1 : statement.end_lineno])
        if called & rearranging and not re.search(r"# .*\([A-Z1][^()]*,[^()]*\)", text):
            found.append(f"line {statement.lineno}: {text.strip()}")
    return found


def undocumented(source: str) -> list[str]:
    """Classes whose docstring names neither an equation or section of the paper nor another source."""
    known = r"ViT, (eq|sec|app)\. |et al\., 20\d\d|transformers' `Dinov2Backbone`"
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return [node.name for node in classes if not re.search(known, ast.get_docstring(node) or "")]


def test_nothing_is_named_before_it_is_defined():
    assert forward_references(SOURCE) == []
    assert forward_references("class A:\n    def f(self):\n        return B()\n\nclass B:\n    pass\n") == [
        "B in line 3"
    ]


def test_every_rearrangement_says_its_shapes():
    assert bare_reshapes(SOURCE) == []
    assert len(re.findall(r"\.(?:unfold|permute|flatten|unflatten|reshape|transpose)\(", SOURCE)) > 15
    assert bare_reshapes("y = f(\n    x.permute(0, 2, 1)\n)  # turned\n") == [
        "line 1: y = f(\n    x.permute(0, 2, 1)\n)  # turned"
    ]
    assert bare_reshapes("y = x.flatten(2)  # (B, C, h, w) -> (B, C, N)\n") == []


def test_every_class_names_its_equation_or_source():
    assert undocumented(SOURCE) == ["ViTScratchPreTrainedModel"]  # it computes nothing
    assert undocumented('class A:\n    """Something."""\n') == ["A"]


def test_letters_of_shapes_are_those_of_the_legend():
    """No letter in a shape comment or an assignment of one capital that the module docstring does not explain."""
    legend = modeling.__doc__.split("Letters")[1].split("Where this file")[0]
    letters = set(re.findall(r"\w", " ".join(re.findall(r"  (\w(?:, \w)?)  +(?=\S)", legend))))
    used = set()
    for comment in re.findall(r"#(.*)$", SOURCE, re.MULTILINE):
        for shape in re.findall(r"\(([^()]*,[^()]*)\)", comment):
            used |= set(re.findall(r"\b([A-Za-z])\b", shape))
    assert {"B", "C", "H", "W", "N", "T", "D", "A", "d", "h", "w"} <= used <= letters
    assigned = {
        node.id
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and re.fullmatch("[A-Z]", node.id)
    }
    assert assigned <= letters


def test_what_the_docstring_says_of_other_code():
    """The deviations that this model's own code can show."""
    config = ViTScratchConfig()
    assert (config.hidden_act, config.position_interpolation, config.hidden_dropout_prob) == ("gelu", "bicubic", 0.0)
    assert config.initializer_range == 0.02
    gelu = modeling.ACT2FN[config.hidden_act]
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    equal(gelu(x), x * (1 + torch.erf(x / math.sqrt(2))) / 2, 1e-12)
    tanh = x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    equal(modeling.ACT2FN["gelu_pytorch_tanh"](x), tanh, 1e-12)
    model = make(ViTScratchModel)
    outputs = model(images(model))
    equal(outputs.pooler_output, outputs.last_hidden_state[:, 0])


def test_every_parameter_of_forward_is_documented():
    doc = inspect.getdoc(ViTScratchModel.forward)
    for name in list(inspect.signature(ViTScratchModel.forward).parameters)[1:]:
        assert f"{name}:" in doc


def test_base_classes_are_equal_to_the_auto_classes():
    config = ViTScratchConfig(**TINY)
    assert type(AutoModel.from_config(config)) is ViTScratchModel
    assert type(AutoModelForImageClassification.from_config(config)) is ViTScratchForImageClassification
    assert issubclass(ViTModel, modeling.PreTrainedModel)
