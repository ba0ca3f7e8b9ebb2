"""Figures of models with the choices beyond the paper: rotary positions, pooling by attention, several class tokens."""

import math

import numpy as np
import pytest
import torch
from drawings import draw, noise_image, overlaps, small_config
from PIL import Image
from runs import load_script
from transformers import ViTImageProcessorPil

from modeling_vit_scratch import (
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchModel,
    plots,
)
from modeling_vit_scratch.evaluation import Predictor
from modeling_vit_scratch.plots.views import look, on_grid, view_image

TODAY = {
    "rope": {"position_embedding_type": "rope"},
    "both": {"position_embedding_type": "learned+rope", "rope_coordinates": "index", "rope_grid_size": 5},
    "mixed": {"position_embedding_type": "rope", "rope_frequencies": "mixed", "num_register_tokens": 2},
    "without positions": {"position_embedding_type": "none"},
    "attention": {"pooling": "attention", "use_cls_token": False, "num_register_tokens": 2},
    "attention, norm after": {"pooling": "attention", "use_cls_token": False, "norm_after_pooling": True},
    "cls+mean": {"pooling": "cls+mean", "num_register_tokens": 1},
    "two class tokens": {"num_cls_tokens": 2, "pooling": "cls"},
    "three class tokens and the mean": {"num_cls_tokens": 3, "pooling": "cls+mean", "num_register_tokens": 1},
    "the block": {"use_gated_mlp": True, "use_qk_norm": True, "use_embedding_norm": True, "key_bias": False},
}
# What "positions" draws.
POSITIONS = {
    "rope": {"rotary_positions"},
    "both": {"position_similarity", "rotary_positions"},
    "mixed": {"rotary_positions"},
    "without positions": set(),
}


def make(cls=ViTScratchForImageClassification, **fields):
    """A model of 3 x 4 patches, whose heads have 4 channels, with large random weights."""
    torch.manual_seed(0)
    model = cls(small_config(**fields)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith("frequencies"):
                p.normal_(std=0.5)
    return model


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "0.png"
    Image.fromarray(noise_image(3, 30, 20).permute(1, 2, 0).numpy()).save(path)
    return path


def save(folder, **fields):
    make(**fields).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 24, "width": 16}).save_pretrained(folder)
    return folder


# -- rotary positions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "step_hw"),
    [
        ({}, (4 * math.pi / 3, 4 * math.pi / 4)),  # from -2 pi to 2 pi, whatever the number of patches
        ({"rope_coordinates": "index", "rope_offset": 1}, (1, 1)),
        ({"rope_coordinates": "index", "rope_grid_size": 6}, (6 / 3, 6 / 4)),
        ({"rope_frequencies": "mixed", "num_register_tokens": 2}, (4 * math.pi / 3, 4 * math.pi / 4)),
    ],
)
def test_rotary_scores_are_cosines_of_the_offset(fields, step_hw):
    vit = make(ViTScratchModel, position_embedding_type="rope", hidden_size=24, rope_theta=50, **fields)
    rotary = vit.rotary_positions[0]
    scores = plots.rotary_scores(rotary, (3, 4))
    if rotary.frequencies is None:
        turns = [[(50.0 ** (-j / 2), 0.0) for j in (0, 1)] + [(0.0, 50.0 ** (-j / 2)) for j in (0, 1)]]
    else:
        turns = [list(zip(*head, strict=True)) for head in rotary.frequencies.tolist()]
    assert scores.shape == (len(turns), 4, 5, 7)
    for head, pairs in enumerate(turns):
        for pair, (f, g) in enumerate(pairs):
            for dy, dx in np.ndindex(5, 7):
                expected = math.cos((dy - 2) * f * step_hw[0] + (dx - 3) * g * step_hw[1])
                assert scores[head, pair, dy, dx] == pytest.approx(expected, abs=1e-5)


def test_rotary_scores_are_those_of_attention():
    """The mean over a head's pairs is the score of the model's own attention where queries and keys are all equal."""
    model = make(
        ViTScratchModel, position_embedding_type="rope", rope_frequencies="mixed", use_cls_token=False, pooling="mean"
    )
    attention, d = model.layers[1].attention, 4
    seen = []
    with torch.no_grad():
        attention.qkv.weight.zero_()
        attention.qkv.bias.copy_(torch.cat([torch.ones(24), torch.zeros(12)]))  # pairs of length sqrt(2)
        attention(torch.zeros(1, 12, 12), keep_maps=seen.append, rotation=model.rotary_positions[1]((3, 4), "cpu"))
    scores = plots.rotary_scores(model.rotary_positions[1], (3, 4)).mean(dim=1) * d / math.sqrt(d)  # (A, 5, 7)
    for y, x in ((0, 0), (1, 2), (2, 3)):
        row = scores[:, 2 - y : 5 - y, 3 - x : 7 - x].flatten(1).softmax(dim=1)  # what the patch at (y, x) sees
        torch.testing.assert_close(seen[0][0, :, 4 * y + x], row)


def test_draws_axial_rotary_positions():
    """A row of pairs turned by y, one by x, and the mean over all of them."""
    vit = make(ViTScratchModel, position_embedding_type="rope", hidden_size=120, num_hidden_layers=1)
    figure = draw(plots.plot_rotary_positions(vit.rotary_positions[0], (3, 4)))
    *panels, bar = figure.axes
    scores = plots.rotary_scores(vit.rotary_positions[0], (3, 4))[0]  # 20 pairs: 10 by y, 10 by x
    by_y, mean, by_x = panels[:4], panels[4], panels[5:]
    for row, first in ((by_y, 0), (by_x, 10)):
        for axes, band in zip(row, (0, 3, 6, 9), strict=True):
            np.testing.assert_allclose(axes.images[0].get_array(), scores[first + band], atol=1e-6)
            assert axes.images[0].get_clim() == (-1, 1)
    np.testing.assert_allclose(mean.images[0].get_array(), scores.mean(0), atol=1e-6)
    assert mean.images[0].get_extent() == [-3.5, 3.5, 2.5, -2.5]
    assert [axes.get_title() for axes in (by_y[0], by_x[0], mean)] == [
        "a turn in 1.5 patches",  # 2 pi / (4 pi / 3)
        "a turn in 2.0 patches",
        "mean of 20 pairs",
    ]
    assert by_y[0].get_ylabel() == "pairs turned by y\npatches down" and by_x[3].get_xlabel() == "patches across"
    assert bar.get_ylabel() == "score"
    assert not overlaps([axes.title for axes in panels])
    assert not overlaps([label for axes in by_x for label in axes.get_xticklabels()])


@pytest.mark.parametrize(("heads", "rows"), [(3, 3), (10, 8)])
def test_draws_mixed_rotary_positions(heads, rows):
    """A row for each head, its pairs from fast to slow."""
    fields = {"rope_frequencies": "mixed", "hidden_size": 12 * heads, "num_attention_heads": heads}
    vit = make(ViTScratchModel, position_embedding_type="rope", **fields)
    rotary = vit.rotary_positions[1]
    with torch.no_grad():
        rotary.frequencies[2] = torch.tensor([[0.0, 0, 0, 3, 0.1, 0], [0.5, 1, 0, 4, 0, 2]])
    figure = draw(plots.plot_rotary_positions(rotary, (3, 4), "Whose"))
    *panels, _ = figure.axes
    assert len(panels) == 5 * rows
    step = torch.tensor([4 * math.pi / 3, math.pi])
    period = 2 * math.pi / (rotary.frequencies[2].detach() * step[:, None]).norm(dim=0)
    scores = plots.rotary_scores(rotary, (3, 4))[2]
    for axes, pair in zip(panels[10:14], (3, 1, 0, 2), strict=True):  # of 6, ranks 0, 2, 3, 5; pair 2 never turns
        np.testing.assert_allclose(axes.images[0].get_array(), scores[pair], atol=1e-6)
        assert pair == 2 or axes.get_title() == f"a turn in {period[pair]:.1f} patches"
    np.testing.assert_allclose(panels[14].images[0].get_array(), scores.mean(0), atol=1e-6)
    assert panels[10].get_ylabel() == "head 3\npatches down"
    assert figure.get_suptitle().startswith("Whose, 8 of 10 heads:\n" if heads == 10 else "Whose:\n")


@pytest.mark.parametrize("grid_hw", [(1, 1), (1, 9), (16, 2), (40, 40)])
def test_draws_rotary_positions_of_any_grid(grid_hw):
    vit = make(ViTScratchModel, position_embedding_type="rope", rope_frequencies="mixed")
    figure = draw(plots.plot_rotary_positions(vit.rotary_positions[0], grid_hw))
    assert not overlaps([axes.title for axes in figure.axes])
    assert not overlaps([axes.yaxis.label for axes in figure.axes])


# -- what the classifier looks at --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attention", "attention, norm after"])
def test_pooling_attention_is_that_of_the_model(name):
    """The pooling itself, its values made the patches and its MLP silenced, returns their means with these weights."""
    model = make(**TODAY[name])
    vit, pooling = model.vit, model.vit.attention_pooling
    with torch.no_grad():
        pooling.kv.weight[12:] = torch.eye(12)
        pooling.kv.bias[12:] = 0
        pooling.proj.weight.copy_(torch.eye(12))
        for tensor in (pooling.proj.bias, pooling.mlp.fc2.weight, pooling.mlp.fc2.bias):
            tensor.zero_()
        vit.pooled_norm = torch.nn.Identity()
        pixels = torch.randn(2, 3, 24, 16)
        output = vit(pixels, output_hidden_states=[-1])
    weights = plots.pooling_attention(vit, output.hidden_states[-1])
    assert weights.shape == (2, 3, 12) and weights.std(dim=2).min() > 1e-3
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 3))
    patches = output.last_hidden_state[:, model.config.num_prefix_tokens :].unflatten(2, (3, 4))  # (B, N, A, d)
    expected = (weights.transpose(1, 2).unsqueeze(3) * patches).sum(dim=1)
    torch.testing.assert_close(output.pooler_output, expected.flatten(1))


def test_attention_on_grid_of_each_pooling_by_hand():
    """2 class tokens, 1 register, and a 1 x 2 grid."""
    maps = torch.tensor(
        [
            [0.1, 0.1, 0.2, 0.15, 0.45],
            [0.2, 0.2, 0.1, 0.4, 0.1],
            [1.0, 0.0, 0.0, 0.0, 0.0],
            [0.5, 0.0, 0.0, 0.5, 0.0],
            [0.2, 0.0, 0.2, 0.3, 0.3],
        ]
    )
    both = plots.attention_on_grid(maps, (1, 2), 3, "cls", 2)
    torch.testing.assert_close(both, torch.tensor([[1.0, 1.0]]))  # 0.15 + 0.4 : 0.45 + 0.1
    mean = plots.attention_on_grid(maps, (1, 2), 3, "cls+mean", 2)  # and the mean of the last two rows, 0.4 : 0.15
    torch.testing.assert_close(mean, torch.tensor([[0.95, 0.70]]) * 2 / 1.65)
    weights = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    several = torch.stack([torch.stack([maps, maps.flip(0)]), torch.stack([maps.flip(0), maps])])  # (B, A, T, T)
    heads = plots.attention_on_grid(several, (1, 2), 3, "attention", 1, weights)
    expected = torch.tensor(
        [
            [[0.25 * 0.5 + 0.75 * 0.3, 0.75 * 0.3], [0.25 * 0.4 + 0.75 * 0.15, 0.25 * 0.1 + 0.75 * 0.45]],
            [[0.4, 0.1], [0.5, 0.0]],
        ]
    )
    torch.testing.assert_close(heads, (expected * 2 / expected.sum(2, keepdim=True)).unsqueeze(2))
    rollout = plots.attention_on_grid(several[:, 0], (1, 2), 3, "attention", 1, weights)
    torch.testing.assert_close(rollout, heads[:, 0])
    with pytest.raises(ValueError, match="needs weights: the mean over heads of pooling_attention"):
        plots.attention_on_grid(maps[None], (1, 2), 3, "attention")
    with pytest.raises(ValueError, match="needs 4 class tokens, but num_prefix_tokens is 3"):
        plots.attention_on_grid(maps, (1, 2), 3, "cls+mean", 4)


@pytest.mark.parametrize("name", TODAY)
def test_the_map_is_of_what_the_model_pools(name, tmp_path):
    """Class token c looks at patch c alone, each patch at itself, and registers, which nobody reads, at the last."""
    predictor = Predictor(save(tmp_path, **TODAY[name]), "cpu")
    config, prefix, N = predictor.config, predictor.config.num_prefix_tokens, 12
    output = look(predictor, torch.stack([noise_image(), noise_image(seed=1)]))
    for maps in output.attentions:
        torch.testing.assert_close(on_grid(predictor, maps, output).mean(dim=(2, 3)), torch.ones(2, 3))
    maps = torch.zeros(2, prefix + N, prefix + N)
    maps[:, prefix:, prefix:] = torch.eye(N)
    maps[:, :prefix, -1] = 1
    classes = torch.eye(N)[: config.cls_tokens]
    maps[:, : config.cls_tokens, prefix:] = classes
    if config.pooling == "attention":
        expected = plots.pooling_attention(predictor.model.vit, output.hidden_states[-1]).mean(dim=1)  # (2, N)
    else:
        mean = [torch.full((1, N), 1 / N)] if "mean" in config.pooling else []
        expected = torch.cat([classes, *mean]).mean(dim=0).expand(2, N)
    torch.testing.assert_close(on_grid(predictor, maps, output), N * expected.reshape(2, 3, 4))


# -- every kind of every choice ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TODAY)
def test_each_kind_is_drawn(name, tmp_path, photo, monkeypatch):
    script, folder, drawn = load_script("plot"), save(tmp_path, **TODAY[name]), set()
    monkeypatch.setattr(plots, "save_figure", lambda figure, path, svg: [drawn.add(path.name), draw(figure)])
    assert script.main(["all", str(folder), "--images", str(photo), "--output", str(tmp_path), "--layer", "1"]) == 0
    of_all = {"patch_filters", "patch_sequence", "attention_rollout", "attention_heads", "attention_distance"}
    pooled = {"pooling_heads"} if "attention" in name else set()
    assert drawn == of_all | pooled | POSITIONS.get(name, {"position_similarity"})
    view = view_image(Predictor(folder, "cpu"), photo)  # what the page of demo.py shows
    assert view.rollout.shape == (3, 4) and view.heads.shape == (2, 3, 3, 4)


def test_features_are_as_wide_as_what_the_classifier_sees(tmp_path):
    folder = save(tmp_path, **TODAY["three class tokens and the mean"])
    split = {"dataset": "digits", "split": "test", "max_samples": 20}
    figures = plots.draw_figures(folder, ["features", "mistakes", "confusion"], **split)
    assert set(figures) == {"features", "mistakes", "confusion_matrix"}


def test_a_model_without_positions_says_so(tmp_path, capsys):
    folder = save(tmp_path / "model", position_embedding_type="none")
    assert load_script("plot").main(["positions", str(folder), "--output", str(tmp_path / "plots")]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "plot.py: positions: the model has no positions (position_embedding_type='none')."
    )


def test_mixed_rotary_positions_are_of_the_layer_that_is_named(tmp_path):
    folder = save(tmp_path, **TODAY["mixed"])
    rotary = ViTScratchForImageClassification.from_pretrained(folder).vit.rotary_positions
    for layer, number in ((1, 1), (2, 2), (-1, 2)):
        figure = plots.draw_figures(folder, "positions", layer=layer)["rotary_positions"]
        assert figure.get_suptitle().startswith(f"What rotary positions do to attention, layer {number} of 2:")
        mean = plots.rotary_scores(rotary[number - 1], (3, 4))[0].mean(0)
        np.testing.assert_allclose(figure.axes[2].images[0].get_array(), mean, atol=1e-6)
    with pytest.raises(ValueError, match=r"--layer \(3\) must be 1 to 2"):
        plots.draw_figures(folder, "positions", layer=3)


def test_the_heads_of_the_pooling_are_drawn(tmp_path, photo):
    folder = save(tmp_path, **TODAY["attention"])
    figure = draw(plots.draw_figures(folder, "heads", photo)["pooling_heads"])
    predictor = Predictor(folder, "cpu")
    output = look(predictor, torch.stack([view_image(predictor, photo).pixels]))
    maps = 12 * plots.pooling_attention(predictor.model.vit, output.hidden_states[-1])[0].reshape(3, 3, 4)
    drawn = [axes.images[-1].get_array() for axes in figure.axes if axes.get_title().startswith("head ")]
    np.testing.assert_allclose(np.stack(drawn), maps, atol=1e-5)
    assert figure.get_suptitle() == "Attention of each head of the pooling"


@pytest.mark.parametrize("name", ["both", "mixed", "without positions", "two class tokens", "the block"])
def test_reconstructions_of_each_choice(name):
    model = make(ViTScratchForMaskedImageModeling, **TODAY[name], encoder_stride=(8, 4))
    images, mask = torch.rand(2, 3, 24, 16), torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[:, 1] = True
    with torch.no_grad():
        painted = model(images, mask).reconstruction
    assert len(draw(plots.plot_reconstructions(images, mask, painted)).axes) == 6
