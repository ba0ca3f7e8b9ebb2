"""Figures of runs and speed: by what stands on them, and how they are saved."""

import json
import math

import numpy as np
import pytest
from drawings import HEADER, draw, overlaps, write_history
from matplotlib.figure import Figure
from PIL import Image

from modeling_vit_scratch import plots
from modeling_vit_scratch.plots import drawing as drawing_module


@pytest.fixture
def history(tmp_path):
    return write_history(tmp_path)


# -- saving ------------------------------------------------------------------------------------------------------------


def test_saves_png_and_svg_small_and_the_same_each_time(tmp_path):
    noise = np.random.default_rng(0).random((150, 150, 3))

    def save(name):
        figure = drawing_module.new_figure(1, 1)
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
    with Image.open(plain) as image:
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


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
    assert accuracy.get_legend() is None  # it could lie on the curve
    assert figure.legends[0].get_texts()[0].get_text() == "best 62.50% at epoch 2"
    assert loss.get_xlabel() == accuracy.get_xlabel() == "epoch"
    assert accuracy.get_ylabel() == "accuracy (%)"
    assert "40.0" in {text.get_text() for text in accuracy.get_yticklabels()}
    # the folder will do as well
    assert len(plots.plot_training_curves(history.parent).axes) == 2


def test_training_curves_mark_what_the_run_kept(history):
    def marked(metrics):
        (history.parent / "metrics.json").write_text(json.dumps(metrics))
        figure = draw(plots.plot_training_curves(history))
        texts = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        return figure.axes[1].get_lines()[1:], texts

    (mark,), text = marked({"training": {"kept_step": 60}})  # of the lowest loss, say: not of the best accuracy
    np.testing.assert_allclose(mark.get_xydata(), [[3, 0.6]])
    assert text == ["kept 60.00% at epoch 3"]
    assert marked({"training": {"kept_step": 50}}) == ([], [])  # not measured there
    assert marked({"training": {}})[1] == marked({})[1] == ["best 62.50% at epoch 2"]  # of an older version
    (history.parent / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json is no JSON file.*mend or remove it"):
        plots.plot_training_curves(history)


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
    speed, _, memory, _ = draw(plots.plot_scaling(panels, {"batch": {"images/s": (0.5, 12.0)}})).axes
    assert speed.lines[1].get_ydata().tolist() == pytest.approx([12.0, 12 * 8**0.5, 96.0])
    assert [text.get_text() for text in speed.texts] == ["$x^{0.50}$"]
    assert len(memory.lines) == 1
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
    assert texts == ["theirs: 50.00% in 40 s", "ours: 60.00% in 4 s"]
    for line, entry in zip(axes.lines, axes.get_legend().get_lines(), strict=True):  # looks like its line
        assert entry.get_marker() == line.get_marker() == "o"
        assert entry.get_markerfacecolor() == line.get_markerfacecolor() == line.get_color() == entry.get_color()
    for low, high, labels in ((2, 40, "2 5 10 20"), (60, 700, "100 200 500"), (400, 3000, "500 1,000 2,000")):
        axes = draw(plots.plot_race({"ours": ([low, high], [0.4, 0.6])}, "seconds")).axes[0]
        drawn = [tick.label1.get_text() for tick in axes.xaxis.get_major_ticks() + axes.xaxis.get_minor_ticks()]
        shown = [text for text in drawn if text and low <= float(text.replace(",", "")) <= high]
        assert shown == labels.split()
    for nothing in ({}, {"ours": ([], [])}):
        with pytest.raises(ValueError, match="nothing to draw"):
            plots.plot_race(nothing, "seconds")


def test_tradeoff_draws_accuracy_against_speed():
    points = {0: (50.0, 0.9, (0.88, 0.91)), 8: (80.0, 0.85, (0.83, 0.88))}
    (axes,) = draw(plots.plot_tradeoff(points, "images per second")).axes
    line, (low, high) = axes.lines[0], axes.lines[1:3]
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([50, 80], [0.9, 0.85])
    assert [*low.get_ydata(), *high.get_ydata()] == pytest.approx([0.88, 0.83, 0.91, 0.88])
    assert [text.get_text() for text in axes.texts] == ["0", "8"]
    assert axes.get_xlabel() == "images per second"
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.plot_tradeoff({}, "images per second")


def test_training_curves_of_several_runs(history, tmp_path):
    (tmp_path / "other.csv").write_text(HEADER + "5,0.5,1,2.5,1,,\n10,1,,,,2.0,0.2\n")
    figure = draw(plots.plot_training_curves({"a $x$ run": history, "other": tmp_path / "other.csv"}))
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["a $x$ run: best 62.50% at epoch 2", "other: best 20.00% at epoch 1"]
    colours = [line.get_color() for line in figure.axes[0].get_lines()]
    assert colours == [drawing_module.BLUE, drawing_module.BLUE, drawing_module.ORANGE, drawing_module.ORANGE]
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
    assert f"{np.trace(matrix) / matrix.sum():.2%} of {matrix.sum():,}" in figure.get_suptitle()
    assert bar.get_ylabel() == "share of the true class"
    assert not overlaps([*axes.get_xticklabels(), *axes.get_yticklabels()])
    assert not overlaps(axes.texts[: 2 * classes])


@pytest.mark.parametrize(
    ("names", "upright"),
    [
        (["circle", "square", "triangle"], False),
        (["a", "b", "c", "d"], False),
        ([str(i) for i in range(10)], False),
        (["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"], True),
        (["a name of many letters"] * 2, True),
        (["a name of many letters"] * 100, True),
    ],
)
def test_names_of_a_confusion_matrix_fit(names, upright):
    figure = draw(plots.plot_confusion_matrix(np.eye(len(names), dtype=int) * 1000, names))
    axes, bar = figure.axes
    assert {text.get_rotation() for text in axes.get_xticklabels()} == {90 if upright else 0}
    texts = [*axes.get_xticklabels(), *axes.get_yticklabels(), *bar.get_yticklabels()]
    texts += [axes.xaxis.label, axes.yaxis.label, bar.yaxis.label, figure._suptitle]
    assert not overlaps(texts)
    for text in texts:
        box = text.get_window_extent()
        assert min(box.x0, box.y0) > -3, text  # a box is a little larger than its letters
        assert box.x1 < figure.bbox.width + 3 and box.y1 < figure.bbox.height + 3, text
    assert axes.get_window_extent().width >= 240  # of the matrix much is left


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
