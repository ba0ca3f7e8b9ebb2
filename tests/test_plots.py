"""Pictures: the computations against cases worked by hand, the drawings by what stands on them, and plot.py."""

import itertools
import math
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from runs import load_script
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, plots

HEADER = "step,epoch,learning_rate,loss,grad_norm,eval_loss,eval_accuracy\n"


def draw(figure):
    """Lay a figure out as saving does."""
    figure.draw_without_rendering()  # a bare canvas has no draw()
    return figure


def overlaps(texts) -> list[tuple[str, str]]:
    """The pairs of visible texts whose boxes share more than a pixel."""
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text() and t.get_visible()]
    return [
        (a, b)
        for (a, p), (b, q) in itertools.combinations(boxes, 2)
        if min(p.x1, q.x1) - max(p.x0, q.x0) > 1 and min(p.y1, q.y1) - max(p.y0, q.y0) > 1
    ]


@pytest.fixture
def history(tmp_path):
    """Two training rows and one evaluation row for each of three epochs, interleaved."""
    lines = [HEADER]
    for epoch in range(3):
        for half in (1, 2):
            lines.append(f"{20 * epoch + 10 * half},{epoch + half / 2},0.001,{2.0 - epoch / 2 - half / 4},1.5,,\n")
        lines.append(f"{20 * epoch + 20},{epoch + 1},,,,{1.9 - epoch / 2},{[0.4, 0.625, 0.6][epoch]}\n")
    path = tmp_path / "run" / "history.csv"
    path.parent.mkdir()
    path.write_text("".join(lines))
    return path


# -- saving ------------------------------------------------------------------------------------------------------------


def test_saves_png_and_svg_small_and_the_same_each_time(tmp_path):
    noise = np.random.default_rng(0).random((150, 150, 3))

    def save(name):
        figure = plots._figure(1, 1)
        figure.subplots().imshow(noise)
        return plots.save_figure(figure, tmp_path / "new" / name, max_bytes=12_000)

    (png, svg), (again_png, again_svg) = save("a"), save("b")
    assert (png, svg) == (tmp_path / "new" / "a.png", tmp_path / "new" / "a.svg")
    assert png.read_bytes() == again_png.read_bytes()
    assert svg.read_bytes() == again_svg.read_bytes()
    assert png.stat().st_size <= 12_000  # 40 kB at first
    assert b"<svg" in svg.read_bytes()

    plain = plots.save_figure(plots.plot_confusion_matrix(np.eye(10, dtype=int)), tmp_path / "v1.5")[0]
    assert plain.name == "v1.5.png"
    assert plain.stat().st_size < 150_000
    with Image.open(plain) as picture:
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


# -- training and results ----------------------------------------------------------------------------------------------


def test_training_curves_draw_the_numbers_of_the_file(history):
    figure = draw(plots.plot_training_curves(history))
    assert isinstance(figure, Figure)
    loss, accuracy = figure.axes
    training, validation = loss.get_lines()
    np.testing.assert_allclose(training.get_xydata()[:, 0], [0.5, 1, 1.5, 2, 2.5, 3])
    np.testing.assert_allclose(training.get_xydata()[:, 1], [1.75, 1.5, 1.25, 1, 0.75, 0.5])
    np.testing.assert_allclose(validation.get_xydata(), [[1, 1.9], [2, 1.4], [3, 0.9]])
    line, best = accuracy.get_lines()
    np.testing.assert_allclose(line.get_xydata(), [[1, 0.4], [2, 0.625], [3, 0.6]])
    np.testing.assert_allclose(best.get_xydata(), [[2, 0.625]])
    assert accuracy.get_legend().get_texts()[0].get_text() == "best 62.50% at epoch 2"
    assert loss.get_xlabel() == accuracy.get_xlabel() == "epoch"
    assert "%" in accuracy.get_ylabel()
    assert "40.0" in {text.get_text() for text in accuracy.get_yticklabels()}
    # the folder will do as well
    assert len(plots.plot_training_curves(history.parent).axes) == 2


def test_history_has_times_where_there_are_any(history, tmp_path):
    assert np.isnan(plots.read_history(history)["train_cpu_seconds"]).all()
    (tmp_path / "history.csv").write_text("step,loss,train_seconds,train_cpu_seconds\n1,2.5,0.5,0.75\n2,1.5,1,1.5\n")
    columns = plots.read_history(tmp_path)
    assert (columns["train_seconds"].tolist(), columns["train_cpu_seconds"].tolist()) == ([0.5, 1], [0.75, 1.5])


def test_bars_of_contestants_in_groups():
    groups = {
        "small": {"ours": (2.0, "2 $x$"), "theirs": (1.0, "1 x")},
        "large": {"theirs": (1.0, "1 x"), "third": (0.5, "half"), "ours": (1.5, "1.5 x")},
    }
    figure = draw(plots.plot_bars(groups, "speed", reference=1.0))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["small", "large"]
    assert [[bar.get_width() for bar in axes.patches] for axes in figure.axes] == [[2, 1], [1, 0.5, 1.5]]
    for axes, bars in zip(figure.axes, groups.values(), strict=True):
        assert [label.get_text() for label in axes.get_yticklabels()] == list(bars)
        assert [text.get_text() for text in axes.texts] == [text for _, text in bars.values()]
        assert axes.lines[0].get_xdata()[0] == 1
        assert axes.get_xlim() == figure.axes[0].get_xlim()
        assert overlaps([*axes.texts, axes.title]) == []
    colours = [
        {name: bar.get_facecolor() for name, bar in zip(bars, axes.patches, strict=True)}
        for axes, bars in zip(figure.axes, groups.values(), strict=True)
    ]
    assert colours[0]["ours"] == colours[1]["ours"] != colours[0]["theirs"] == colours[1]["theirs"]
    assert figure.axes[-1].get_xlabel() == "speed"
    for nothing in ({}, {"small": {}}):
        with pytest.raises(ValueError, match="nothing to draw"):
            plots.plot_bars(nothing, "speed")


def test_scaling_draws_numbers_as_lines_and_names_as_bars():
    panels = {
        "batch": {"x": [1, 8, 64], "images/s": [10.0, 60.0, 100.0], "MB": [1.0, None, 4.0]},
        "processes": {"x": ["1 process, 1 thread", "2 processes"], "images/s": [5.0, 9.0], "MB": [None, None]},
    }
    figure = draw(plots.plot_scaling(panels))
    speed, bars, memory, nothing = figure.axes
    assert (speed.lines[0].get_xdata().tolist(), speed.lines[0].get_ydata().tolist()) == ([1, 8, 64], [10, 60, 100])
    assert (speed.get_xscale(), speed.get_yscale(), speed.get_xlabel()) == ("log", "log", "batch")
    assert [label.get_text() for label in speed.get_xticklabels()] == ["1", "8", "64"]
    assert memory.lines[0].get_xdata().tolist() == [1, 64]  # what is not known is left out
    assert [bar.get_height() for bar in bars.patches] == [5, 9]
    assert not nothing.axison
    assert overlaps([*bars.get_xticklabels(), *speed.get_xticklabels()]) == []
    with pytest.raises(ValueError, match="same quantities"):
        plots.plot_scaling({**panels, "other": {"x": [1], "MB": [1.0]}})


def test_race_draws_accuracy_against_time():
    curves = {"theirs": ([10.0, 20.0, 40.0], [0.3, 0.5, 0.45]), "ours": ([2.0, 4.0], [0.4, 0.6])}
    figure = draw(plots.plot_race(curves, "CPU seconds"))
    (axes,) = figure.axes
    assert [line.get_xdata().tolist() for line in axes.lines] == [[10, 20, 40], [2, 4]]
    assert [line.get_ydata().tolist() for line in axes.lines] == [[0.3, 0.5, 0.45], [0.4, 0.6]]
    assert axes.get_xlabel() == "CPU seconds of training"
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["theirs: 50.00% in 40", "ours: 60.00% in 4"]
    for nothing in ({}, {"ours": ([], [])}):
        with pytest.raises(ValueError, match="nothing to draw"):
            plots.plot_race(nothing, "seconds")


def test_training_curves_of_several_runs(history, tmp_path):
    (tmp_path / "other.csv").write_text(HEADER + "5,0.5,1,2.5,1,,\n10,1,,,,2.0,0.2\n")
    figure = draw(plots.plot_training_curves({"a $x$ run": history, "other": tmp_path / "other.csv"}))
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["a $x$ run: best 62.50% at epoch 2", "other: best 20.00% at epoch 1"]
    colours = [line.get_color() for line in figure.axes[0].get_lines()]
    assert colours == [plots.BLUE, plots.BLUE, plots.ORANGE, plots.ORANGE]
    many = draw(plots.plot_training_curves({f"run {i}": history for i in range(9)}))
    assert len({str(line.get_color()) for line in many.axes[0].get_lines()}) == 9


def test_training_curves_smooth_long_runs(tmp_path):
    rows = "".join(f"{i},{i / 100},1,{1 + i % 2},1,,\n" for i in range(1, 301))
    (tmp_path / "history.csv").write_text(HEADER + rows)
    values, mean = plots.plot_training_curves(tmp_path).axes[0].get_lines()
    assert len(values.get_xdata()) == 300
    np.testing.assert_allclose(mean.get_ydata(), 1.5)  # running mean over 300 / 50 = 6 values of 1 and 2 in turn
    assert mean.get_xdata()[0] == pytest.approx(np.mean(np.arange(1, 7) / 100))


def test_training_curves_survive_gaps(tmp_path):
    (tmp_path / "history.csv").write_text("step,loss\n1,2.5\n2,nan\n3,inf\n4,1.5\n")
    figure = draw(plots.plot_training_curves(tmp_path))
    assert len(figure.axes) == 1  # no accuracy, no panel for it
    np.testing.assert_allclose(figure.axes[0].get_lines()[0].get_xydata(), [[1, 2.5], [4, 1.5]])
    assert figure.axes[0].get_xlabel() == "step"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEADER, "0 rows"),
        (b"\xff\xfe\x00 weights", "no CSV file"),
        ("a,b\n1,2\n", "its columns are a, b"),
        ("step,lr\n1,2\n", "its columns are step, lr"),
        ("step,loss\n1,2\n2,abc\n", "line 3: loss is 'abc'"),
    ],
)
def test_training_curves_refuse(tmp_path, text, words):
    (tmp_path / "history.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=words) as error:
        plots.plot_training_curves(tmp_path)
    assert "history.csv" in str(error.value)
    with pytest.raises(FileNotFoundError, match="is missing"):
        plots.plot_training_curves(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="0 histories"):
        plots.plot_training_curves({})


@pytest.mark.parametrize("classes", [1, 2, 10, 25, 100])
def test_confusion_matrix(classes):
    rng = np.random.default_rng(0)
    matrix = rng.poisson(2, (classes, classes)) + np.diag(rng.integers(20, 90, classes))
    figure = draw(plots.plot_confusion_matrix(matrix.tolist(), [f"the class {i}" for i in range(classes)]))
    axes, bar = figure.axes
    np.testing.assert_allclose(axes.images[0].get_array(), matrix / matrix.sum(1, keepdims=True))
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    expected = {(j, i): str(matrix[i, j]) for i, j in np.ndindex(matrix.shape) if matrix[i, j]}  # x predicted, y true
    assert cells == (expected if classes <= 25 else {})
    assert [t.get_text() for t in axes.get_yticklabels()] == [f"the class {i}" for i in range(classes)]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert f"{np.trace(matrix) / matrix.sum():.2%} of {matrix.sum():,}" in axes.get_title()
    assert bar.get_ylabel() == "share of the true class"
    assert not overlaps([*axes.get_xticklabels(), *axes.get_yticklabels()])
    assert not overlaps(axes.texts[: 2 * classes])


def test_confusion_matrix_with_an_empty_class_and_odd_names():
    figure = draw(plots.plot_confusion_matrix([[0, 0], [1, 3]], ["$a$ and $b", "x" * 60]))
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels[0] == "$a$ and $b"
    assert len(labels[1]) == 24
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        plots.plot_confusion_matrix([[1, 2, 3], [1, 2, 3]])
    with pytest.raises(ValueError, match="3 names for 2 classes"):
        plots.plot_confusion_matrix([[1, 2], [1, 2]], ["a", "b", "c"])


@pytest.mark.parametrize("classes", [2, 10, 100, 300])
def test_per_class_accuracy(classes):
    values = np.random.default_rng(0).random(classes).tolist()
    values[1] = None
    figure = draw(plots.plot_per_class_accuracy(values, [f"the class {i}" for i in range(classes)]))
    known = {f"the class {i}": value for i, value in enumerate(values) if value is not None}
    drawn = {}
    for axes in figure.axes:
        names = [text.get_text() for text in axes.get_yticklabels()]
        drawn |= dict(zip(names, [bar.get_width() for bar in axes.patches], strict=True))
        assert not overlaps([*axes.get_yticklabels(), *axes.texts])
        assert all(text.get_fontsize() >= 7 for text in axes.texts)
    assert list(drawn)[-1] == "the class 1" and drawn.pop("the class 1") == 0
    assert figure.axes[-1].texts[len(figure.axes[-1].patches) - 1].get_text() == "no examples"
    assert list(drawn.values()) == sorted(drawn.values(), reverse=True)
    assert all(known[name] == pytest.approx(value) for name, value in drawn.items())
    assert len(drawn) == (59 if classes == 300 else classes - 1)
    assert f"mean {np.mean(list(known.values())):.2%}" in figure.get_suptitle()


def test_per_class_accuracy_refuses():
    with pytest.raises(ValueError, match="0 of 2 classes"):
        plots.plot_per_class_accuracy([None, math.nan])
    with pytest.raises(ValueError, match="55 to 70"):
        plots.plot_per_class_accuracy([55, 70])
    with pytest.raises(ValueError, match="1 names for 2 classes"):
        plots.plot_per_class_accuracy([0.5, 0.5], ["a"])


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


def test_attention_distance_of_layers_heads_and_pictures():
    still, down, side = (
        moves((2, 2), move) for move in (lambda i, j: (i, j), lambda i, j: (1 - i, j), lambda i, j: (i, 1 - j))
    )
    first = torch.cat([torch.cat([still, down], dim=1), torch.cat([down, down], dim=1)])  # 2 pictures, 2 heads
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


def test_patch_map_by_hand():
    """2 leading tokens and a 1 x 2 grid."""
    maps = torch.tensor([[0.1, 0.3, 0.15, 0.45], [1, 0, 0, 0], [0.5, 0, 0.5, 0], [0.2, 0.2, 0.3, 0.3]])
    cls = plots.patch_map(maps, (1, 2), 2, "cls")
    torch.testing.assert_close(cls, torch.tensor([[0.5, 1.5]]))  # 0.15 : 0.45
    mean = plots.patch_map(maps[None, None], (1, 2), 2, "mean")
    torch.testing.assert_close(mean, torch.tensor([[[[0.8 / 0.55, 0.3 / 0.55]]]]))  # 0.5 + 0.3 : 0 + 0.3
    assert plots.patch_map(torch.eye(6), (3, 2), 0, "mean").shape == (3, 2)
    assert (plots.patch_map(torch.zeros(4, 4), (1, 2), 2, "cls") == 0).all()
    with pytest.raises(ValueError, match="num_prefix_tokens is 0"):
        plots.patch_map(torch.eye(6), (3, 2), 0, "cls")


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


def small_config(**fields) -> ViTScratchConfig:
    """Non-square pictures and patches: a grid of 3 x 4."""
    return ViTScratchConfig(
        **{
            "image_size": (24, 16), "patch_size": (8, 4), "hidden_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 3, "intermediate_size": 8, "num_labels": 10, **fields,
        }
    )  # fmt: skip


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
        rollout = plots.patch_map(
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
    with pytest.raises(ValueError, match=r"at least 4 pictures, got shape \(3, 2\)"):
        plots.project_features(plane[:3])


# -- what the model sees: drawings -------------------------------------------------------------------------------------


def picture(C=3, H=24, W=16, seed=0) -> torch.Tensor:
    return torch.randint(0, 256, (C, H, W), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_draws_the_patch_sequence():
    image = picture()
    figure = draw(plots.plot_patch_sequence(image, (8, 4)))
    whole, sequence = figure.axes
    np.testing.assert_allclose(whole.images[0].get_array(), image.permute(1, 2, 0) / 255)
    assert [text.get_text() for text in sequence.texts] == [str(i + 1) for i in range(12)]
    assert not overlaps(sequence.texts)
    canvas = sequence.images[0].get_array()
    np.testing.assert_allclose(canvas[:8, :4], image[:, :8, :4].permute(1, 2, 0) / 255)
    assert whole.get_title() == "24 × 16 pixels"
    assert sequence.get_title() == "12 patches of 8 × 4 pixels, in reading order"
    many = draw(plots.plot_patch_sequence(picture(1, 224, 224), (16, 16)))
    assert [text.get_text() for text in many.axes[1].texts] == [str(i) for i in range(1, 197, 28)]
    assert not overlaps(many.axes[1].texts)


def test_draws_reconstructions():
    images = torch.stack([picture(3, 8, 12), picture(3, 8, 12)])
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
    with pytest.raises(ValueError, match="of the same pictures"):
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
    images, maps = [picture(), picture(1, seed=1)], torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
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

    heads = draw(plots.plot_attention_heads(images[0], torch.rand(6, 3, 4), "Layer 2"))
    titles = [axes.get_title() for axes in heads.axes if axes.get_title()]
    assert titles == ["picture", *(f"head {i}" for i in range(1, 7))]
    assert heads.get_suptitle().startswith("Layer 2")


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
    assert plots.patch_mosaic(picture(), (8, 4), gap=2).shape == (3, 24 + 2 * 2, 16 + 3 * 2)


def test_draws_mistakes():
    images = [picture(seed=i) for i in range(5)]
    probabilities = torch.tensor([[0.6, 0.4], [0.1, 0.9], [0.8, 0.2], [0.25, 0.75], [0.9, 0.1]])
    figure = draw(plots.plot_mistakes(images, probabilities, torch.tensor([1, 1, 1, 0, 0]), ["cat", "dog $5"], count=2))
    assert figure.get_suptitle() == "Most confident of 3 mistakes in 5 pictures"
    captions = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert captions == [["dog $5", "cat 80%"], ["cat", "dog $5 75%"]]
    np.testing.assert_allclose(figure.axes[1].images[0].get_array(), images[3].permute(1, 2, 0) / 255)
    assert not overlaps([text for axes in figure.axes for text in axes.texts])
    none = plots.plot_mistakes(images, probabilities, probabilities.argmax(1))
    assert none.texts[0].get_text() == "No mistakes in 5 pictures."


def test_draws_reliability():
    """The example of the calibration test: two bins, gaps 0 and 0.3, error 0.15."""
    probabilities = [[0.5, 0.5], [0.5, 0.5], [0.9, 0.1], [0.3, 0.7]]
    figure = draw(plots.plot_reliability(probabilities, [0, 1, 0, 0], bins=2))
    upper, lower = figure.axes
    bars, gaps = upper.containers
    np.testing.assert_allclose([bar.get_height() for bar in bars], [0.5, 0.5])
    np.testing.assert_allclose([bar.get_height() for bar in gaps], [0.0, 0.3], atol=1e-7)
    np.testing.assert_allclose([bar.get_height() for bar in lower.containers[0]], [0.5, 0.5])
    assert "15.00% (4 pictures)" in upper.get_title()
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
    assert "50 pictures" in figure.get_suptitle()
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


# -- scripts/plot.py ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    return load_script("plot")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model of digits, untrained."""
    folder = tmp_path_factory.mktemp("models") / "digits"
    names = {i: str(i) for i in range(10)}
    torch.manual_seed(0)
    config = small_config(image_size=(16, 8), id2label=names, label2id={name: i for i, name in names.items()})
    model = ViTScratchForImageClassification(config)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 8}).save_pretrained(folder)
    return folder


def test_script_draws_pictures(script, folder, tmp_path, capsys):
    for name in ("a.png", "b.jpg"):
        Image.fromarray(picture(3, 30, 20).permute(1, 2, 0).numpy()).save(tmp_path / name)
    output = tmp_path / "plots"
    status = script.main(["all", str(folder), "--images", str(tmp_path), "--output", str(output), "--layer", "1"])
    listed = capsys.readouterr().out.split()
    assert status == 0
    stems = ["patch_filters", "position_similarity", "patch_sequence_1", "patch_sequence_2", "attention_rollout"]
    stems += ["attention_heads_1", "attention_heads_2", "attention_distance"]
    assert listed == [str(output / f"{stem}.{suffix}") for stem in stems for suffix in ("png", "svg")]
    assert all(Path(file).stat().st_size > 0 for file in listed)


def test_script_draws_a_split(script, folder, tmp_path, capsys):
    kinds = ["mistakes", "reliability", "features", "confusion", "per-class", "rollout", "distance"]
    words = [*kinds, str(folder), "--dataset", "digits", "--max_samples", "70", "--output", str(tmp_path)]
    assert script.main(words) == 0
    listed = capsys.readouterr().out.split()
    assert [Path(file).stem for file in listed[::2]] == [script.FILES[kind] for kind in kinds]


def test_script_says_what_the_model_says(script, folder):
    """The split's answers are those of the model called by hand on processed pictures."""
    sight = script.Sight(script.parse(["features", str(folder), "--dataset", "digits", "--max_samples", "20"]))
    answers = sight.answers()
    picture = Image.fromarray(sight[3].permute(1, 2, 0).numpy())
    with torch.no_grad():
        pixels = sight.predictor.processor(picture, return_tensors="pt")["pixel_values"]
        logits = sight.model(pixels).logits
        pooled = sight.model.vit(pixels).pooler_output
    torch.testing.assert_close(answers.probabilities[3], logits.softmax(1)[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(answers.features[3], pooled[0], atol=1e-5, rtol=1e-4)
    assert answers.labels.shape == (20,)
    assert sight.distance().shape == (2, 3)


def test_script_finds_classes_by_name(script, folder, tmp_path):
    """A model whose classes stand in another order than the data's."""
    model = ViTScratchForImageClassification.from_pretrained(folder)
    model.config.id2label = {i: str(9 - i) for i in range(10)}
    model.config.label2id = {str(9 - i): i for i in range(10)}
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil.from_pretrained(folder).save_pretrained(tmp_path)
    words = ["features", "--dataset", "digits", "--max_samples", "50"]
    straight, turned = (script.Sight(script.parse([words[0], str(path), *words[1:]])) for path in (folder, tmp_path))
    assert turned.class_names == straight.class_names[::-1]
    assert torch.equal(turned.answers().labels, 9 - straight.answers().labels)


def test_script_compares_runs(script, history, tmp_path, capsys):
    other = tmp_path / "other" / "run"
    other.mkdir(parents=True)
    (other / "history.csv").write_text(history.read_text())
    assert script.main(["curves", str(history.parent), str(other), "--output", str(tmp_path / "p")]) == 0
    assert len(capsys.readouterr().out.split()) == 2
    names = script._labels([str(history.parent), str(other)])
    assert names[1] == "other/run" and names[0].endswith("/run")


def test_script_takes_the_numbers_that_a_run_saved(script, history, capsys):
    run = history.parent
    (run / "metrics.json").write_text(
        '{"dataset": {"class_names": ["a", "b"]}, "test": {"confusion_matrix": [[3, 1], [0, 4]], '
        '"per_class_accuracy": {"a": 0.75, "b": null}}}'
    )
    assert script.main(["confusion", "per-class", "curves", str(run), "--output", str(run / "plots")]) == 0
    assert len(capsys.readouterr().out.split()) == 6


def test_script_takes_runs_of_other_tasks(script, folder, history, tmp_path, capsys, monkeypatch):
    """One without labels: its loss is another, and it has no confusion matrix; foreign numbers are no run's."""
    drawn = {}
    monkeypatch.setattr(script.plots, "save_figure", lambda figure, path, svg: [drawn.setdefault(path.name, figure)])
    run, foreign = tmp_path / "pretrained", tmp_path / "foreign"
    for path, metrics in ((run, '{"task": "masked-image-modeling", "validation": {"loss": 1}}'), (foreign, "{}")):
        shutil.copytree(folder, path)
        shutil.copy(history, path / "history.csv")
        (path / "metrics.json").write_text(metrics)
    output = ["--output", str(tmp_path / "plots")]
    assert script.main(["all", str(run), *output]) == 0
    assert "confusion: " in capsys.readouterr().err  # said, and the others drawn
    assert set(drawn) == {"patch_filters", "position_similarity", "training_curves"}
    assert drawn["training_curves"].axes[0].get_ylabel() == "mean error (standard deviations)"
    for path in (run, foreign):
        assert script.main(["confusion", str(path), *output]) == 1
        assert "no metrics.json with a confusion matrix; add --dataset NAME" in capsys.readouterr().err
    assert script.main(["curves", str(run), str(foreign), *output]) == 1
    assert "not of one kind: cross-entropy (nats) and mean error" in capsys.readouterr().err


def test_script_names_the_filters_of_early_convolutions(script, tmp_path, capsys):
    config = small_config(image_size=32, patch_size=8, stem_channels=[4, 6])
    ViTScratchForImageClassification(config).save_pretrained(tmp_path)
    args = script.parse(["filters", str(tmp_path)])
    figure = script.draw("filters", args, script.Sight(args))["patch_filters"]
    assert figure.get_suptitle().startswith("Kernels of the first convolution: first 3 principal components")
    assert figure.axes[0].images[0].get_array().shape == (3, 3, 3)


def test_script_draws_pictures_from_all_parts_of_a_split(script, folder, tmp_path):
    """Folders are sorted by class."""
    for label in range(3):
        (tmp_path / str(label)).mkdir()
        for i in range(3):
            image = Image.fromarray(picture(3, 16, 8, seed=3 * label + i).permute(1, 2, 0).numpy())
            image.save(tmp_path / str(label) / f"{i}.png")
    sight = script.Sight(script.parse(["rollout", str(folder), "--dataset", str(tmp_path), "--max_pictures", "3"]))
    assert sight.titles == ["0", "1", "2"]
    shown = torch.stack([sight[i] for i in (0, 4, 8)])
    assert torch.equal(torch.stack(sight.pictures), shown)
    config = sight.config
    geometry = config.grid_hw, config.patch_hw, config.num_prefix_tokens
    expected = plots.attention_distance(sight.look(shown).attentions, *geometry)
    torch.testing.assert_close(sight.distance(most=3), expected)


def test_script_remakes_the_pictures_of_the_readme(script, folder, tmp_path, capsys):
    words = ["readme", str(folder)]
    assert script.parse(words).output == script.IMAGES
    assert script.main([*words, "--output", str(tmp_path / "out")]) == 0
    drawn = {file.name for file in (tmp_path / "out").iterdir()}
    assert drawn == {f"{script.FILES[kind]}.png" for kind in script.README}
    assert len(capsys.readouterr().out.split()) == len(drawn)


def test_script_status_when_an_input_fails(script, folder, history, tmp_path, capsys):
    (tmp_path / "broken.png").write_text("no picture")
    good = tmp_path / "good.png"
    Image.new("L", (9, 9)).save(good)
    words = ["patches", str(folder), "--output", str(tmp_path / "p"), "--images"]
    assert script.main([*words, str(good), str(tmp_path / "broken.png"), str(tmp_path / "none.png")]) == 1
    out, err = capsys.readouterr()
    assert len(out.split()) == 2  # the good one is drawn
    assert "broken.png" in err and "none.png" in err
    assert script.main([*words, str(tmp_path / "broken.png")]) == 2
    assert "none of 1 pictures" in capsys.readouterr().err
    assert script.main(["curves", "filters", str(folder), "--output", str(tmp_path / "p")]) == 1
    assert "history.csv" in capsys.readouterr().err
    assert script.main(["heads", str(folder), "--images", str(good), "--layer", "3", "--output", str(tmp_path)]) == 1
    assert "--layer (3) must be 1 to 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["rolout", "x"], "'rolout' is no KIND"),
        (["rollout"], "MODEL is missing"),
        (["rollout", "x"], "rollout needs pictures"),
        (["features", "x", "--images", "a.png"], "features needs labelled pictures"),
        (["filters", "x", "y"], "there are 2 models"),
        (["filters", "x", "--count", "0"], "0 must be at least 1"),
        (["rollout", "x", "--images", "a", "--dataset", "b"], "not allowed with"),
    ],
)
def test_script_usage(script, words, text, capsys):
    with pytest.raises(SystemExit) as status:
        script.main(words)
    assert status.value.code == 2
    assert text in capsys.readouterr().err


def test_script_refuses_what_is_no_model(script, folder, tmp_path, capsys):
    assert script.main(["filters", str(tmp_path / "nothing" / "there" / "x"), "--output", str(tmp_path)]) == 2
    assert "there is no file or folder" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert script.main(["filters", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err


def test_script_takes_encoders_and_other_libraries(script, folder, tmp_path, capsys):
    """An encoder without a classifier shows what it can; a transformers model is converted on the way."""
    model = ViTScratchForImageClassification.from_pretrained(folder)
    processor = ViTImageProcessorPil.from_pretrained(folder)
    model.vit.save_pretrained(tmp_path / "encoder")
    processor.save_pretrained(tmp_path / "encoder")
    words = [str(tmp_path / "encoder"), "--dataset", "digits", "--max_samples", "40", "--output", str(tmp_path / "p")]
    assert script.main(["features", "rollout", *words]) == 0
    assert script.main(["mistakes", *words]) == 1
    assert "no trained classifier" in capsys.readouterr().err

    torch.manual_seed(0)
    other = ViTForImageClassification(
        ViTConfig(
            image_size=32, patch_size=16, hidden_size=12, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8, num_labels=10,
        )
    )  # fmt: skip
    other.save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    words = ["mistakes", "distance", str(tmp_path / "vit"), "--dataset", "digits", "--max_samples", "40"]
    assert script.main([*words, "--output", str(tmp_path / "q")]) == 0
    sight = script.Sight(script.parse(words))
    with torch.no_grad():
        logits = other.eval()(sight.predictor.normalise(sight.batch(range(5)))).logits
    torch.testing.assert_close(sight.judgements()[0][:5], logits.softmax(1), atol=1e-5, rtol=1e-4)
