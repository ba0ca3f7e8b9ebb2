"""Figures of what a model sees: the computations against cases worked by hand, the drawings by what stands on them."""

import math

import matplotlib
import numpy as np
import pytest
import torch
from drawings import draw, noise_image, overlaps, small_config

from modeling_vit_scratch import ViTScratchForImageClassification, plots

# -- what the model sees: computations ---------------------------------------------------------------------------------


def test_patch_sequence_reads_row_by_row():
    image = torch.arange(2 * 4 * 6).reshape(2, 4, 6)
    patches = plots.patch_sequence(image, (2, 3))
    assert patches.shape == (4, 2, 2, 3)
    for i, (top, left) in enumerate([(0, 0), (0, 3), (2, 0), (2, 3)]):
        assert torch.equal(patches[i], image[:, top : top + 2, left : left + 3])
    with pytest.raises(ValueError, match="4x6 cannot be cut into patches of 3x3"):
        plots.patch_sequence(image, (3, 3))


def test_filter_components_by_hand():
    """Filters m +- 3u, m +- v with orthonormal u, v: components u and v, shares 9 : 1."""
    u, v = torch.zeros(2, 2 * 2 * 3)
    u[[0, 1]] = torch.tensor([-0.6, 0.8])
    v[7] = -1.0
    weight = torch.randn(12, generator=torch.Generator().manual_seed(0)) + torch.stack([3 * u, -3 * u, v, -v])
    components, share = plots.filter_components(weight, (2, 3))
    assert components.shape == (3, 2, 2, 3)  # 4 points span 3 dimensions
    torch.testing.assert_close(components[0].flatten(), u, atol=1e-6, rtol=0)
    torch.testing.assert_close(components[1].flatten(), -v, atol=1e-6, rtol=0)  # the largest entry is positive
    torch.testing.assert_close(share, torch.tensor([0.9, 0.1, 0.0]), atol=1e-6, rtol=0)
    kernel, _ = plots.filter_components(weight.reshape(4, 2, 2, 3), (2, 3), count=2)
    torch.testing.assert_close(kernel, components[:2])
    with pytest.raises(ValueError, match="12 numbers are not of patches of 5x5"):
        plots.filter_components(weight, (5, 5))


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_position_similarity_by_hand(prefix):
    """A 2 x 3 grid: (0, 0) and (1, 1) opposite, (0, 1) at 60 degrees, (1, 2) zero; leading rows are ignored."""
    patches = torch.tensor([[2.0, 0], [1, 3**0.5], [0, 5], [3, 0], [-1, 0], [0, 0]])
    positions = torch.cat([torch.full((prefix, 2), 7.0), patches])[None]
    similarity = plots.position_similarity(positions, (2, 3))
    assert similarity.shape == (2, 3, 2, 3)
    expected = torch.tensor([[1, 0.5, 0], [1, -1, 0]])  # of (0, 0) with each
    torch.testing.assert_close(similarity[0, 0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(similarity[0, 1, 0, 2], torch.tensor(3**0.5 / 2))
    torch.testing.assert_close(similarity, similarity.permute(2, 3, 0, 1))
    assert (similarity[1, 2] == 0).all()
    with pytest.raises(ValueError, match="too few for a grid of 4x4 = 16"):
        plots.position_similarity(positions, (4, 4))


def moves(grid_hw, move) -> torch.Tensor:
    """Attention (1, 1, N, N) of patches that each look at the patch `move` names, and at no other."""
    h, w = grid_hw
    maps = torch.zeros(h, w, h, w)
    for i, j in np.ndindex(h, w):
        maps[(i, j, *move(i, j))] = 1
    return maps.reshape(1, 1, h * w, h * w)


def with_prefix(maps: torch.Tensor, tokens: int, weight: float) -> torch.Tensor:
    """The same attention with leading tokens that take `weight` of every row."""
    B, A, N, _ = maps.shape
    full = torch.full((B, A, tokens + N, tokens + N), weight / tokens)
    full[..., tokens:] = (1 - weight) / N
    full[..., tokens:, tokens:] = maps * (1 - weight)
    return full


PATCH = (8, 20)


@pytest.mark.parametrize(
    ("grid_hw", "maps", "pixels"),
    [
        ((2, 3), moves((2, 3), lambda i, j: (i, j)), 0.0),  # the identity
        ((2, 3), moves((2, 3), lambda i, j: (1 - i, j)), 8.0),  # one down or up
        ((3, 2), moves((3, 2), lambda i, j: (i, 1 - j)), 20.0),  # one to the side
        ((2, 2), moves((2, 2), lambda i, j: (1 - i, 1 - j)), math.hypot(8, 20)),
        ((1, 3), moves((1, 3), lambda i, j: (0, 0)), (0 + 20 + 40) / 3),  # the distances from the first
        ((1, 3), torch.full((1, 1, 3, 3), 1 / 3), (60 + 40 + 60) / 9),  # uniform
        ((2, 2), torch.full((1, 1, 4, 4), 1 / 4), (0 + 8 + 20 + math.hypot(8, 20)) / 4),
    ],
)
def test_attention_distance_by_hand(grid_hw, maps, pixels):
    assert plots.attention_distance([maps], grid_hw, PATCH, 0).item() == pytest.approx(pixels, abs=1e-5)
    # what goes to the class token and to registers has no distance
    full = with_prefix(maps, tokens=3, weight=0.6)
    assert plots.attention_distance([full], grid_hw, PATCH, 3).item() == pytest.approx(pixels, abs=1e-5)
    assert plots.attention_distance([maps.half()], grid_hw, PATCH, 0).item() == pytest.approx(pixels, rel=1e-3)


def test_attention_distance_of_layers_heads_and_images():
    still, down, side = (
        moves((2, 2), move) for move in (lambda i, j: (i, j), lambda i, j: (1 - i, j), lambda i, j: (i, 1 - j))
    )
    first = torch.cat([torch.cat([still, down], dim=1), torch.cat([down, down], dim=1)])  # 2 images, 2 heads
    second = torch.cat([side, still], dim=1).expand(2, -1, -1, -1)
    distance = plots.attention_distance((first, second), (2, 2), PATCH, 0)
    torch.testing.assert_close(distance, torch.tensor([[4.0, 8.0], [20.0, 0.0]]))


def test_attention_distance_of_queries_that_see_no_patch():
    maps = with_prefix(moves((2, 2), lambda i, j: (1 - i, j)), tokens=1, weight=0.5)
    maps[..., 1:3, :] = torch.tensor([1.0, 0, 0, 0, 0])  # the patches above look at the class token only
    assert plots.attention_distance([maps], (2, 2), PATCH, 1).item() == pytest.approx(8)
    maps[..., 1:, :] = torch.tensor([1.0, 0, 0, 0, 0])
    assert plots.attention_distance([maps], (2, 2), PATCH, 1).isnan().all()


def test_attention_rollout_by_hand():
    eye = torch.eye(3).expand(2, 4, 3, 3)
    torch.testing.assert_close(plots.attention_rollout([eye] * 5), torch.eye(3).expand(2, 3, 3))
    uniform = torch.full((1, 2, 4, 4), 0.25)
    torch.testing.assert_close(plots.attention_rollout([uniform])[0], 0.5 * torch.eye(4) + 0.125)
    # uniform twice: (I + J) / 2 squared, J = ones / 4 = J^2, is I / 4 + 3 J / 4
    torch.testing.assert_close(plots.attention_rollout([uniform] * 2)[0], 0.25 * torch.eye(4) + 0.1875)
    # two layers: A_1 looks at token 0, A_2 at token 1. [[1/2, 1/2], [0, 1]] @ [[1, 0], [1/2, 1/2]]
    first, second = torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([[0.0, 1], [0, 1]])
    rollout = plots.attention_rollout([first[None, None], second[None, None]])
    torch.testing.assert_close(rollout[0], torch.tensor([[0.75, 0.25], [0.5, 0.5]]))
    # heads are averaged: one looks at 0, the other at 1
    both = plots.attention_rollout([torch.stack([first, second])[None]])
    torch.testing.assert_close(both[0], torch.tensor([[0.75, 0.25], [0.25, 0.75]]))


def test_attention_on_grid_by_hand():
    """2 leading tokens and a 1 x 2 grid."""
    maps = torch.tensor([[0.1, 0.3, 0.15, 0.45], [1, 0, 0, 0], [0.5, 0, 0.5, 0], [0.2, 0.2, 0.3, 0.3]])
    cls = plots.attention_on_grid(maps, (1, 2), 2, "cls")
    torch.testing.assert_close(cls, torch.tensor([[0.5, 1.5]]))  # 0.15 : 0.45
    mean = plots.attention_on_grid(maps[None, None], (1, 2), 2, "mean")
    torch.testing.assert_close(mean, torch.tensor([[[[0.8 / 0.55, 0.3 / 0.55]]]]))  # 0.5 + 0.3 : 0 + 0.3
    assert plots.attention_on_grid(torch.eye(6), (3, 2), 0, "mean").shape == (3, 2)
    assert (plots.attention_on_grid(torch.zeros(4, 4), (1, 2), 2, "cls") == 0).all()
    with pytest.raises(ValueError, match="num_prefix_tokens is 0"):
        plots.attention_on_grid(torch.eye(6), (3, 2), 0, "cls")


@pytest.mark.parametrize(
    "compute", [plots.attention_rollout, lambda maps: plots.attention_distance(maps, (2, 2), PATCH, 0)]
)
def test_missing_maps_are_named(compute):
    for maps in ((), (torch.eye(4)[None, None], None)):
        with pytest.raises(ValueError, match="output_attentions=True"):
            compute(maps)
    with pytest.raises(ValueError, match=r"\(1, 1, 5, 5\).*7 tokens \(1 \+ 2x3 patches\)"):
        plots.attention_distance([torch.eye(5)[None, None]], (2, 3), PATCH, 1)


KINDS_OF_MODEL = [
    {"pooling": "cls", "num_register_tokens": 0},
    {"pooling": "cls", "num_register_tokens": 3},
    {"pooling": "mean", "num_register_tokens": 2},
    {"pooling": "mean", "use_cls_token": False},
]


@pytest.mark.parametrize("fields", KINDS_OF_MODEL)
def test_of_real_models(fields):
    """With zero queries every token attends evenly, which fixes distance and rollout; other weights do not."""
    config = small_config(**fields)
    torch.manual_seed(0)
    model = ViTScratchForImageClassification(config).eval()
    geometry = config.grid_hw, config.patch_hw, config.num_prefix_tokens
    even = plots.attention_distance([torch.ones(1, 1, 12, 12)], (3, 4), (8, 4), 0)
    for layer in model.vit.layers:
        torch.nn.init.zeros_(layer.attention.qkv.weight)
    pixels = torch.randn(2, 3, 24, 16)
    with torch.no_grad():
        maps = model(pixels, output_attentions=True).attentions
        torch.testing.assert_close(plots.attention_distance(maps, *geometry), even.expand(2, 3))
        rollout = plots.attention_on_grid(
            plots.attention_rollout(maps), config.grid_hw, config.num_prefix_tokens, config.pooling
        )
        torch.testing.assert_close(rollout, torch.ones(2, 3, 4))
        for layer in model.vit.layers:
            torch.nn.init.normal_(layer.attention.qkv.weight, std=1.0)
        maps = model(pixels, output_attentions=True).attentions
        assert (plots.attention_distance(maps, *geometry) - even).abs().min() > 1e-3
        torch.testing.assert_close(plots.attention_rollout(maps).sum(-1), torch.ones(2, 12 + config.num_prefix_tokens))
        similarity = plots.position_similarity(model.vit.embeddings.position_embeddings, config.grid_hw)
    own = model.vit.embeddings.position_embeddings[0, -12:]
    torch.testing.assert_close(similarity[2, 1, 0, 3], torch.cosine_similarity(own[9], own[3], dim=0))


def test_confident_mistakes_by_hand():
    probabilities = torch.tensor([[0.6, 0.4], [0.1, 0.9], [0.8, 0.2], [0.2, 0.8], [0.8, 0.2]])
    labels = torch.tensor([1, 1, 1, 0, 1])  # wrong: 0, 2, 3, 4
    assert plots.confident_mistakes(probabilities, labels, 10).tolist() == [2, 3, 4, 0]
    assert plots.confident_mistakes(probabilities, labels, 2).tolist() == [2, 3]


def test_project_features():
    """Points on a plane in 5 dimensions: PCA finds the plane; t-SNE keeps two clusters apart, the same each time."""
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(40, 2, generator=generator) * torch.tensor([4.0, 1.0]) + torch.tensor(
        [[-20.0, 0], [20, 0]] * 20
    )
    basis = torch.linalg.qr(torch.randn(5, 5, generator=generator))[0][:2]
    points, share = plots.project_features(plane @ basis + 3)
    assert sum(share) == pytest.approx(1) and share[0] > 0.9
    torch.testing.assert_close(torch.pdist(points), torch.pdist(plane), atol=1e-3, rtol=1e-3)
    near, none = plots.project_features(plane @ basis, "tsne", seed=1)
    assert none == [] and torch.equal(near, plots.project_features(plane @ basis, "tsne", seed=1)[0])
    centre = torch.stack([near[::2].mean(0), near[1::2].mean(0)])
    assert (torch.cdist(near, centre).argmin(1) == torch.arange(40) % 2).all()
    with pytest.raises(ValueError, match="'umap'"):
        plots.project_features(plane, "umap")
    with pytest.raises(ValueError, match=r"at least 4 images, got shape \(3, 2\)"):
        plots.project_features(plane[:3])


# -- what the model sees: drawings -------------------------------------------------------------------------------------


def test_draws_the_patch_sequence():
    image = noise_image()
    figure = draw(plots.plot_patch_sequence(image, (8, 4)))
    whole, sequence = figure.axes
    np.testing.assert_allclose(whole.images[0].get_array(), image.permute(1, 2, 0) / 255)
    assert [text.get_text() for text in sequence.texts] == [str(i + 1) for i in range(12)]
    assert not overlaps(sequence.texts)
    canvas = sequence.images[0].get_array()
    np.testing.assert_allclose(canvas[:8, :4], image[:, :8, :4].permute(1, 2, 0) / 255)
    assert whole.get_title() == "24 × 16 pixels"
    assert sequence.get_title() == "12 patches of 8 × 4 pixels, in reading order"
    many = draw(plots.plot_patch_sequence(noise_image(1, 224, 224), (16, 16)))
    assert [text.get_text() for text in many.axes[1].texts] == [str(i) for i in range(1, 197, 28)]
    assert not overlaps(many.axes[1].texts)


def test_draws_reconstructions():
    images = torch.stack([noise_image(3, 8, 12), noise_image(3, 8, 12)])
    painted = torch.rand(2, 3, 8, 12)
    mask = torch.zeros(2, 2, 3, dtype=torch.bool)
    mask[0, 0, 1] = mask[1, 1, 2] = True  # patches of 4 x 4
    figure = draw(plots.plot_reconstructions(images, mask, painted))
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    assert len(shown) == 6
    for i, rows, columns in ((0, slice(0, 4), slice(4, 8)), (1, slice(4, 8), slice(8, 12))):
        whole, seen, done = shown[i], shown[2 + i], shown[4 + i]
        np.testing.assert_allclose(whole, images[i].permute(1, 2, 0) / 255, atol=1e-6)
        assert (seen[rows, columns] == 0.5).all()
        np.testing.assert_allclose(done[rows, columns], painted[i].permute(1, 2, 0)[rows, columns], atol=1e-6)
        for changed in (seen, done):
            changed[rows, columns] = whole[rows, columns]
            np.testing.assert_array_equal(changed, whole)  # all else is as it was
    with pytest.raises(ValueError, match="of the same images"):
        plots.plot_reconstructions(images, mask[:1], painted)


def test_draws_filters():
    figure = draw(plots.plot_patch_filters(torch.randn(20, 3 * 8 * 4), (8, 4), count=9))
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 9
    for axes in shown:
        values = np.asarray(axes.images[0].get_array())
        assert values.shape == (8, 4, 3)
        assert np.abs(values - 0.5).max() == pytest.approx(0.5)
    assert shown[0].get_title().startswith("1: ")
    assert not overlaps([axes.title for axes in shown])
    assert figure.get_suptitle().startswith("Patch filters: first 9 principal components")
    assert len(plots.plot_patch_filters(torch.randn(20, 8 * 4), (8, 4)).axes) == 21  # 19 components, 3 rows of 7


@pytest.mark.parametrize(
    ("grid_hw", "tiles"),
    [
        ((3, 4), (3, 4)),
        ((3, 12), (3, 12)),
        ((2, 20), (2, 3)),
        ((24, 3), (2, 3)),
        ((20, 20), (16, 16)),
        ((1, 1), (1, 1)),
    ],
)
def test_draws_position_similarity(grid_hw, tiles):
    h, w = grid_hw
    positions = torch.randn(1, 1 + h * w, 6, generator=torch.Generator().manual_seed(0))
    figure = draw(plots.plot_position_similarity(positions, grid_hw))
    axes, bar = figure.axes
    canvas = axes.images[0].get_array()
    similarity = plots.position_similarity(positions, grid_hw).numpy()
    cell = math.ceil(24 / min(h, w))
    np.testing.assert_allclose(canvas[: h * cell : cell, : w * cell : cell], similarity[0, 0])
    np.testing.assert_allclose(canvas[-h * cell :: cell, -w * cell :: cell], similarity[-1, -1])
    assert (len(axes.get_yticks()), len(axes.get_xticks())) == tiles
    assert axes.get_xticklabels()[-1].get_text() == str(w)
    assert not overlaps([*axes.get_xticklabels(), *axes.get_yticklabels()])
    assert "cosine similarity" in (bar.get_ylabel(), bar.get_xlabel())


def test_draws_attention_distance():
    distances = torch.tensor([[1.0, 3.0], [10.0, 20.0], [5.0, math.nan]])
    figure = draw(plots.plot_attention_distance(distances, uniform=12.3))
    axes = figure.axes[0]
    points = axes.collections[0].get_offsets()
    np.testing.assert_allclose(points[:, 1], distances.flatten())
    assert np.round(points[:5, 0]).tolist() == [1, 1, 2, 2, 3]
    np.testing.assert_allclose(axes.get_lines()[0].get_xydata(), [[1, 2], [2, 15], [3, 5]])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "mean attention distance (pixels)")
    assert "even attention: 12.3" in [text.get_text() for text in figure.legends[0].get_texts()]
    draw(plots.plot_attention_distance(torch.zeros(1, 1)))


def test_draws_rollout_and_heads():
    images, maps = (
        [noise_image(), noise_image(1, seed=1)],
        torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)),
    )
    figure = draw(plots.plot_attention_rollout(images, maps, ["a $cat$: said $dog", "b"]))
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert len(panels) == 6
    grey, heat = panels[1].images
    np.testing.assert_allclose(heat.get_array(), maps[0])
    assert heat.get_extent() == [-0.5, 15.5, 23.5, -0.5]  # over all pixels, the first row on top
    np.testing.assert_allclose(grey.get_array(), images[0].float().mean(0) / 255, atol=1e-6)
    lit = np.asarray(panels[2].images[0].get_array())
    assert lit.max() <= 1 and lit.shape == (24, 16, 3)
    assert panels[0].texts[-1].get_text() == "a $cat$: said $dog"
    assert not overlaps([panels[0].texts[-1], panels[3].texts[-1], panels[0].title])
    assert {axes.get_ylabel() for axes in figure.axes if axes.get_label() == "<colorbar>"} == {"× even share"}
    with pytest.raises(ValueError, match="1 images for 2 maps"):
        plots.plot_attention_rollout(images[:1], maps)

    maps = torch.rand(6, 3, 4) * torch.arange(1, 7).view(-1, 1, 1)
    heads = draw(plots.plot_attention_heads(images[0], maps, "Layer 2"))
    titles = [axes.get_title() for axes in heads.axes if axes.get_title()]
    assert titles == ["image", *(f"head {i}" for i in range(1, 7))]
    assert heads.get_suptitle() == "Layer 2"
    ranges = {axes.images[1].get_clim() for axes in heads.axes[1:7]}
    assert ranges == {(0, maps.max().item())}  # heads are compared
    (bar,) = [axes for axes in heads.axes if axes.get_label() == "<colorbar>"]
    assert bar.get_ylabel() == "× even share"


def test_overlay_pixels_by_hand():
    """The largest value in cividis' last colour, 0 in its first, 7 parts to 3 of grey, patch by patch."""
    first, last = (np.array(matplotlib.colormaps["cividis"](end)[:3]) for end in (0.0, 1.0))
    image = torch.full((3, 4, 6), 100, dtype=torch.uint8)
    drawn = plots.overlay_pixels(image, torch.tensor([[0.0, 3.0]]))
    assert drawn.shape == (4, 6, 3) and drawn.dtype == torch.uint8
    for columns, colour in ((slice(0, 3), first), (slice(3, 6), last)):
        expected = torch.from_numpy(np.rint(0.7 * 255 * colour + 0.3 * 100)).byte()
        assert (drawn[:, columns].int() - expected.int()).abs().max() <= 1
    assert plots.overlay_pixels(image[:1], torch.zeros(2, 3)).shape == (4, 6, 3)  # grey; nothing attended to


def test_patch_mosaic_by_hand():
    image = torch.arange(2 * 6, dtype=torch.uint8).reshape(1, 2, 6)  # two patches of 2 x 3
    mosaic = plots.patch_mosaic(image, (2, 3), enlarge=2, gap=1)
    assert mosaic.shape == (1, 4, 13)
    assert (mosaic[:, :, 6] == 255).all()
    for column, pixel in ((0, 0), (1, 0), (4, 2), (7, 3), (12, 5)):
        assert mosaic[0, :, column].tolist() == [pixel, pixel, pixel + 6, pixel + 6]
    assert plots.patch_mosaic(noise_image(), (8, 4), gap=2).shape == (3, 24 + 2 * 2, 16 + 3 * 2)


def test_draws_mistakes():
    images = [noise_image(seed=i) for i in range(5)]
    probabilities = torch.tensor([[0.6, 0.4], [0.1, 0.9], [0.8, 0.2], [0.25, 0.75], [0.9, 0.1]])
    figure = draw(plots.plot_mistakes(images, probabilities, torch.tensor([1, 1, 1, 0, 0]), ["cat", "dog $5"], count=2))
    assert figure.get_suptitle() == "Most confident of 3 mistakes in 5 images"
    captions = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert captions == [["dog $5", "cat 80%"], ["cat", "dog $5 75%"]]
    np.testing.assert_allclose(figure.axes[1].images[0].get_array(), images[3].permute(1, 2, 0) / 255)
    assert not overlaps([text for axes in figure.axes for text in axes.texts])
    none = plots.plot_mistakes(images, probabilities, probabilities.argmax(1))
    assert none.texts[0].get_text() == "No mistakes in 5 images."


def test_draws_reliability():
    """The example of the calibration test: two bins, gaps 0 and 0.3, error 0.15."""
    probabilities = [[0.5, 0.5], [0.5, 0.5], [0.9, 0.1], [0.3, 0.7]]
    figure = draw(plots.plot_reliability(probabilities, [0, 1, 0, 0], bins=2))
    upper, lower = figure.axes
    bars, gaps = upper.containers
    np.testing.assert_allclose([bar.get_height() for bar in bars], [0.5, 0.5])
    np.testing.assert_allclose([bar.get_height() for bar in gaps], [0.0, 0.3], atol=1e-7)
    np.testing.assert_allclose([bar.get_height() for bar in lower.containers[0]], [0.5, 0.5])
    assert "15.00% (4 images)" in upper.get_title()
    assert upper.get_ylabel() == "accuracy (%)"
    labels = [text.get_text() for text in lower.get_legend().get_texts()]
    assert labels == ["mean confidence 65.0%", "accuracy 50.0%"]


@pytest.mark.parametrize("classes", [2, 10, 30])
def test_draws_features(classes):
    features = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % classes
    figure = draw(plots.plot_features(features, labels, [f"class {i}" for i in range(classes)], most=50))
    pca, tsne = figure.axes
    assert sum(len(points.get_offsets()) for points in pca.collections) == 50
    styles = {(str(p.get_facecolor()), p.get_paths()[0].vertices.tobytes()) for p in pca.collections}
    assert len(styles) == classes  # each class looks its own way
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [f"{i} class {i}" if classes > 20 else f"class {i}" for i in range(classes)]
    assert [text.get_text() for text in tsne.texts] == [str(i) for i in range(classes) if classes > 20]
    assert not overlaps(figure.legends[0].get_texts())
    assert "% of the variance" in pca.get_xlabel()
    assert "50 images" in figure.get_suptitle()
    with pytest.raises(ValueError, match="59 labels for 60 features"):
        plots.plot_features(features, labels[:59])


@pytest.mark.parametrize("classes", [10, 100])
def test_long_names_stay_within_the_features_figure(classes):
    features, labels = torch.randn(classes, 4, generator=torch.Generator().manual_seed(0)), torch.arange(classes)
    figure = draw(plots.plot_features(features, labels, [f"great white-winged bird {i}" for i in range(classes)]))
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0


def test_refuses_pixels_that_were_normalised():
    with pytest.raises(ValueError, match="before normalising"):
        plots.plot_patch_sequence(torch.randn(3, 8, 8), (4, 4))
    with pytest.raises(ValueError, match=r"\(8, 8, 3\)"):
        plots.plot_patch_sequence(torch.zeros(8, 8, 3), (4, 4))
