"""Token merging: a slow reading of the paper as an oracle, and what stays as it was."""

import copy
import json
import math

import cli
import pytest
import torch
from colours import processor
from runs import load_script
from small_models import CHOICES, RICH, TINY, equal, images, main_output, make
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_vit_scratch import (
    ViTScratchBackbone,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchModel,
)
from modeling_vit_scratch.evaluation import Predictor, merge_tokens
from modeling_vit_scratch.evaluation.programs import Logits, missing_for_onnx, open_file, write_files
from modeling_vit_scratch.evaluation.token_merging import MergedTokens, match_tokens

DEEP = {**TINY, "num_hidden_layers": 3}
MEAN = {**DEEP, "pooling": "mean", "use_cls_token": False, "use_final_norm": False}
# What the last block may leave out differs between "cls", the mean before a norm, and all others.
WAYS = {
    "plain": DEEP,
    "mean": {**DEEP, "pooling": "mean"},
    "early mean": MEAN,
    "rich": {**RICH, "num_hidden_layers": 3},
}
WAYS |= {"sincos": {**DEEP, "position_embedding_type": "sincos"}}
WAYS |= {name: {**DEEP, **fields} for name, fields in CHOICES.items()}
every_way = pytest.mark.parametrize("fields", WAYS.values(), ids=WAYS)


def merging(fields=DEEP, r=2, cls=ViTScratchForImageClassification, **more):
    model = make(cls, fields, **more)
    merge_tokens(model, r)
    return model


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


# -- the oracle --------------------------------------------------------------------------------------------------------


def slow_match(keys: list[list[float]], r: int) -> list[list[int]]:
    """Groups of token numbers, in order, of one image: keys of n tokens, loops, and the paper's five steps."""

    def cosine(a, b):
        norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / norms

    receiving, giving = {}, {}
    for number, key in enumerate(keys):
        (giving if number % 2 else receiving)[number] = key
    edges = []
    for number, key in giving.items():
        partner = max(receiving, key=lambda other: cosine(key, receiving[other]))
        edges.append((cosine(key, receiving[partner]), number, partner))
    merged = {number: partner for _, number, partner in sorted(edges, reverse=True)[:r]}
    groups = [[number] for number in giving if number not in merged]
    return groups + [[a, *(b for b, partner in merged.items() if partner == a)] for a in receiving]


def slow_encoder(vit, pixels: torch.Tensor, r: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """States and maps of one image. No token is left out: those of a group are made equal, and the model's own blocks
    then count them one by one."""
    prefix = vit.config.num_prefix_tokens
    grid_hw = [side // patch for side, patch in zip(pixels.shape[2:], vit.config.patch_hw, strict=True)]
    z = vit.embedding_norm(vit.embeddings(pixels, None, True))
    groups = [[token] for token in range(z.shape[1])]
    states, maps = [z], []
    for i, layer in enumerate(vit.layers):
        rotation = None
        if vit.rotary_positions:
            rotation = vit.rotary_positions[i % len(vit.rotary_positions)](grid_hw, z.device)
            for group in groups:
                rotation[..., group, :] = rotation[..., group, :].mean(dim=-2, keepdim=True)
        keys = []  # the queries first, where one identity stands for both norms
        handle = layer.attention.k_norm.register_forward_hook(lambda _, args, key, keys=keys: keys.append(key))
        attended = layer.attention(layer.norm1(z), keep_maps=maps.append, rotation=rotation)
        handle.remove()
        z = layer.layer_scale1(attended) + z
        patches = groups[prefix:]
        own = [keys[-1][0, :, group[0]].mean(dim=0).tolist() for group in patches]
        joined = slow_match(own, min(r, len(patches) // 2))
        groups = groups[:prefix] + [[token for number in numbers for token in patches[number]] for numbers in joined]
        for group in groups:
            z[:, group] = z[:, group].mean(dim=1, keepdim=True)
        z = layer.layer_scale2(layer.mlp(layer.norm2(z))) + z
        states.append(z)
    return states, maps


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_matching_is_that_of_a_slow_reading(n):
    generator = torch.Generator().manual_seed(n)
    keys = torch.randn(3, n, 5, generator=generator, dtype=torch.float64)
    for r in range(n // 2 + 1):
        target = match_tokens(keys, r)
        assert target.shape == (3, n)
        for image, numbers in zip(keys.tolist(), target.tolist(), strict=True):
            groups = [[i for i in range(n) if numbers[i] == group] for group in range(n - r)]
            assert groups == [sorted(group) for group in slow_match(image, r)]


@every_way
@pytest.mark.parametrize("r", [2, 7])
def test_merged_tokens_are_as_many_equal_ones(fields, r):
    """States, maps and logits are those of the model's own blocks with all tokens, those of a group made equal."""
    model = make(ViTScratchForImageClassification, fields)
    pixels = images(model)
    expected = [slow_encoder(model.vit, image[None], min(r, math.prod(model.config.grid_hw) // 2)) for image in pixels]
    pooled = model.vit.pooled_norm(model.vit.pool(model.vit.norm(torch.cat([z[-1] for z, _ in expected])))).flatten(1)
    logits = model.classifier(model.pre_logits(pooled))
    merge_tokens(model, min(r, math.prod(model.config.grid_hw) // 2))
    outputs = model(pixels, output_attentions=True, output_hidden_states=True)
    for i, (states, maps) in enumerate(expected):
        for got, wanted in zip(outputs.hidden_states, states, strict=True):
            equal(got[i : i + 1], wanted, atol=2e-5)
        for got, wanted in zip(outputs.attentions, maps, strict=True):
            equal(got[i : i + 1], wanted, atol=2e-5)
    equal(outputs.logits, logits, atol=2e-5)
    equal(model(pixels).logits, logits, atol=2e-5)  # the last block computes what is read of it only


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@every_way
def test_merging_equal_tokens_changes_nothing(fields, implementation):
    """Equal patches without positions: one that stands for several counts for as many."""
    model = make(ViTScratchForImageClassification, fields, position_embedding_type="none")
    model.set_attn_implementation(implementation)
    (h, w), (P, Q) = model.config.grid_hw, model.config.patch_hw
    patches = torch.randn(2, 1, model.config.num_channels, P, Q, generator=torch.Generator().manual_seed(0))
    two = (torch.arange(h * w) // 2 % 2).reshape(1, h, w, 1, 1, 1)  # two kinds, so that a mean by groups would show
    for kind, r in ((torch.zeros_like(two), h * w // 2), (two, 1)):
        pixels = torch.where(kind == 0, patches[0], patches[1])  # (1, h, w, C, P, Q)
        pixels = pixels.permute(0, 3, 1, 4, 2, 5).reshape(1, -1, h * P, w * Q)
        expected = model(pixels).logits
        merge_tokens(model, r)
        equal(model(pixels).logits, expected, atol=1e-5)
        equal(model(pixels, output_hidden_states=True).logits, expected, atol=1e-5)
        merge_tokens(model, 0)


# -- what stays --------------------------------------------------------------------------------------------------------


def test_weights_are_shared_and_nothing_stays_when_it_is_undone():
    model = make(ViTScratchForImageClassification, DEEP)
    pixels, classes = images(model), [type(module) for module in model.modules()]
    expected, state = model(pixels).logits, model.state_dict(keep_vars=True)
    merge_tokens(model, 2)
    merged = model.state_dict(keep_vars=True)
    assert list(merged) == list(state) and all(merged[name] is state[name] for name in state)
    assert (model(pixels).logits - expected).abs().max() > 1e-3
    for r in (3, 0, 0):
        merge_tokens(model, r)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(pixels).logits, expected)


def test_models_do_not_interfere():
    first, second = merging(r=1), make(ViTScratchForImageClassification, DEEP)
    pixels, plain = images(first), second(images(second)).logits
    expected = first(pixels).logits
    third = copy.deepcopy(first)
    merge_tokens(third, 6)
    assert (third(pixels).logits - expected).abs().max() > 1e-3
    assert torch.equal(first(pixels).logits, expected) and torch.equal(second(pixels).logits, plain)
    merge_tokens(third, 1)
    assert torch.equal(third(pixels).logits, expected)
    assert first.vit.layers[0](torch.ones(1, 3, 32)).shape == (1, 3, 32)  # a block alone merges nothing


@pytest.mark.parametrize(
    ("fields", "left"),
    [(DEEP, [13, 9, 5, 1]), ({**DEEP, "pooling": "mean"}, [13, 9, 5, 3]), (MEAN, [12, 8, 4, 2])],
    ids=["cls", "mean", "early mean"],
)
def test_tokens_in_each_mlp(fields, left):
    """Of 16 patches 4 are merged in a block, but of 4 only 2; the last block of "cls" has the class token to see to."""
    model, seen = merging(fields, r=4, num_hidden_layers=4), []
    for layer in model.vit.layers:
        layer.mlp.fc1.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    model(images(model))
    assert seen == left


def test_class_tokens_and_registers_are_never_merged():
    """Even where they are just like patches, and so are most similar to them."""
    tokens = torch.tensor([1.0, 2.0]).expand(2, 9, 2) * torch.arange(1, 10).unsqueeze(1)  # parallel: cosine 1
    state = MergedTokens(3, prefix=3)
    merged = state.merge(tokens, tokens)
    assert merged.shape == (2, 6, 2) and torch.equal(merged[:, :3], tokens[:, :3])
    assert state.sizes[:, :3].eq(1).all() and state.sizes.sum(dim=1).tolist() == [9, 9]
    assert state.source[:, :3].tolist() == [[0, 1, 2]] * 2 and state.source[:, 3:].min() == 3


def test_tokens_that_are_not_merged_stay_as_they_are():
    state, tokens = MergedTokens(2, prefix=1), torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        tokens, before = state.merge(tokens, tokens), tokens
        single = tokens[0, state.sizes[0] == 1]
        assert len(single) > 6 and all((before[0] == token).all(dim=-1).any() for token in single)
    assert tokens.shape[1] == 14 and state.sizes.sum() == 20


@every_way
def test_maps_and_states_are_of_all_tokens(fields):
    model = merging(fields, r=2, cls=ViTScratchModel)
    T = model.config.num_prefix_tokens + math.prod(model.config.grid_hw)
    outputs = model(images(model, batch=2), output_attentions=True, output_hidden_states=True)
    for maps in outputs.attentions:
        assert maps.shape == (2, 4, T, T)
        equal(maps.sum(dim=-1), torch.ones(2, 4, T), atol=1e-5)
    assert {tuple(state.shape) for state in outputs.hidden_states} == {(2, T, 32)}
    assert len(outputs.last_hidden_state[0].unique(dim=0)) == T - 2 * 3
    assert len(outputs.attentions[-1][0, 0].unique(dim=0)) == T - 2 * 2


@every_way
def test_an_image_alone_is_what_it_is_in_a_batch(fields):
    model = merging(fields, r=2)
    together = model(images(model, batch=4)).logits
    for i, image in enumerate(images(model, batch=4)):
        equal(model(image[None]).logits, together[i : i + 1], atol=1e-5)


def test_eager_is_sdpa():
    for fields in (DEEP, MEAN, WAYS["all"]):
        model = merging(fields)
        model.set_attn_implementation("eager")
        expected = model(images(model)).logits
        model.set_attn_implementation("sdpa")
        equal(model(images(model)).logits, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_way
def test_half_precision(fields, dtype):
    model = merging({**fields, "position_embedding_type": "none"}, r=6).to(dtype)
    pixels = torch.ones(
        1, model.config.num_channels, *model.config.image_hw, dtype=dtype
    )  # which tokens does not matter
    outputs = model(pixels, output_attentions=True)
    assert outputs.logits.dtype == outputs.attentions[-1].dtype == dtype
    merge_tokens(model.float(), 0)
    expected = model(pixels.float()).logits
    equal(outputs.logits.float(), expected, atol=0.06 * float(expected.abs().max()))


def test_autocast():
    model = merging(WAYS["all"])
    expected = model(images(model)).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(images(model)).logits - expected).abs().max() < 0.5


def test_images_of_another_size():
    model = merging(WAYS["learned+rope"], r=8)
    for size in ((8, 28), (4, 4), (36, 36)):  # 14 patches, of which 7 are merged; one; 81
        outputs = model(torch.randn(2, 3, *size), interpolate_pos_encoding=True, output_hidden_states=True)
        N = size[0] * size[1] // 16
        left = [N]
        for _ in range(3):
            left.append(left[-1] - min(8, left[-1] // 2))
        assert [len(state[0, 1:].unique(dim=0)) for state in outputs.hidden_states] == left


def test_backbones_and_masked_image_modelling():
    backbone, masked = (merging(cls=cls) for cls in (ViTScratchBackbone, ViTScratchForMaskedImageModeling))
    [found] = backbone(images(backbone)).feature_maps
    assert found.shape == (3, 32, 4, 4)
    assert len(found[0].flatten(1).unique(dim=1)[0]) == 16 - 3 * 2
    assert main_output(masked(images(masked))).shape == (3, 3, 16, 16)


def test_gradients_reach_the_pixels():
    with torch.inference_mode(False), torch.enable_grad():
        model = merging(WAYS["rope"])
        pixels = images(model).clone().requires_grad_()
        model(pixels).logits.sum().backward()
        assert pixels.grad.flatten(1).norm(dim=1).min() > 0


# -- where it runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "early mean", "all"])
def test_it_compiles_as_one_graph(name):
    torch._dynamo.reset()
    model = merging(WAYS[name])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for r in (2, 4):
        merge_tokens(model, r)
        equal(compiled(images(model)).logits, model(images(model)).logits)


@pytest.mark.parametrize(
    "formats",
    [
        ["torch.export"],
        pytest.param(
            ["ONNX"],
            marks=pytest.mark.skipif(bool(missing_for_onnx()), reason="pip install 'modeling_vit_scratch[export]'"),
        ),
    ],
    ids=str,
)
def test_exported_files_merge_too(formats, tmp_path):
    with torch.inference_mode(False), torch.no_grad():
        model = merging(WAYS["learned+rope"], num_hidden_layers=2)
        write_files(Logits(model), torch.zeros(2, 3, 16, 16), tmp_path, formats, 20, ["logits"])
        [file] = tmp_path.iterdir()
        for batch in (1, 3):
            equal(open_file(file)(images(model, batch)), model(images(model, batch)).logits, atol=1e-4)


def test_saved_while_merging_it_is_an_ordinary_model(tmp_path):
    model = merging()
    for name, part in (("whole", model), ("encoder", model.vit)):
        part.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["architectures"] == [type(part).__name__] and "token_merging" not in config
    merge_tokens(model, 0)
    loaded = ViTScratchForImageClassification.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(loaded(images(model)).logits, model(images(model)).logits)


def test_the_copy_of_the_code_in_a_folder_merges_too(tmp_path, copied_code):
    model = make(ViTScratchForImageClassification, DEEP)
    model.save_pretrained(tmp_path / "model")
    name = "modeling_vit_scratch.ViTScratchForImageClassification"
    copied = get_class_from_dynamic_module(name, tmp_path / "model").from_pretrained(tmp_path / "model").eval()
    assert type(copied.vit.layers[0]) is not type(model.vit.layers[0])
    for each in (model, copied):
        merge_tokens(each, 2)
    assert torch.equal(copied(images(model)).logits, model(images(model)).logits)


def test_predictor_and_scripts(tmp_path, capsys):
    torch.manual_seed(0)
    model = make(ViTScratchForImageClassification, DEEP)
    model.save_pretrained(tmp_path / "model")
    processor().save_pretrained(tmp_path / "model")
    predictor, merged = Predictor(tmp_path / "model", "cpu"), Predictor(tmp_path / "model", "cpu", token_merging=5)
    pixels = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(predictor(pixels).logits, model(predictor.normalise(pixels)).logits)
    merge_tokens(model, 5)
    assert torch.equal(merged(pixels).logits, model(predictor.normalise(pixels)).logits)
    with pytest.raises(ValueError, match=r"token_merging \(9\) must be a whole number from 0 to 8, half of the 16 pat"):
        Predictor(tmp_path / "model", "cpu", token_merging=9)
    for name, words in (("predict", ["photo.png"]), ("validate", ["a model", "digits"]), ("demo", [])):
        assert load_script(name).parse(words).token_merging == 0
        assert load_script(name).parse([*words, "--token_merging", "3"]).token_merging == 3
    arguments = load_script("predict").parse(["photo.png", "--token_merging", "5", "--device", "cpu"])
    loaded = cli.load_predictor("predict.py", arguments, str(tmp_path / "model"))
    assert torch.equal(loaded(pixels).logits, merged(pixels).logits)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [-1, 9, 2.0, True, "2", None])
def test_bad_numbers_are_refused_and_change_nothing(r):
    model = merging(r=3)
    expected = model(images(model)).logits
    with pytest.raises(ValueError, match=rf"\({r}\) must be a whole number from 0 to 8, half of the 16 patches\.$"):
        merge_tokens(model, r)
    assert torch.equal(model(images(model)).logits, expected)


def test_calls_that_cannot_merge_are_refused():
    model, masked = merging(), merging(cls=ViTScratchForMaskedImageModeling)
    with pytest.raises(ValueError, match=r"takes no attention_mask: .*merge_tokens\(model, 0\)"):
        model(images(model), attention_mask=torch.zeros(1, 1, 17, 17))
    with pytest.raises(ValueError, match="takes no bool_masked_pos"):
        masked(images(masked), torch.zeros(3, 16))
    with pytest.raises(ValueError, match=r"in training mode: model.eval\(\)"):
        model.train()(images(model))
    model.eval().config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"needs attention by eager or sdpa, .* and not by flash_attention_2"):
        model(images(model))
    with pytest.raises(ValueError, match="Linear has no encoder of this package"):
        merge_tokens(torch.nn.Linear(1, 1), 1)
