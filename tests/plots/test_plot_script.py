"""scripts/plot.py: what it draws of models, images, splits and runs, and its exit statuses."""

import shutil
from pathlib import Path

import pytest
import torch
from drawings import noise_image, small_config, write_history
from PIL import Image
from runs import load_script
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from modeling_vit_scratch import ViTScratchForImageClassification, plots
from modeling_vit_scratch.plots.figures import KINDS, run_labels


@pytest.fixture
def history(tmp_path):
    return write_history(tmp_path)


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


def test_script_draws_images(script, folder, tmp_path, capsys):
    for name in ("a.png", "b.jpg"):
        Image.fromarray(noise_image(3, 30, 20).permute(1, 2, 0).numpy()).save(tmp_path / name)
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
    assert [Path(file).stem for file in listed[::2]] == [KINDS[kind] for kind in kinds]


def test_script_says_what_the_model_says(script, folder):
    """The split's answers are those of the model called by hand on processed images."""
    view, _ = script.load_view(script.parse(["features", str(folder), "--dataset", "digits", "--max_samples", "20"]))
    answers = view.answers
    image = Image.fromarray(view[3].permute(1, 2, 0).numpy())
    with torch.no_grad():
        pixels = view.predictor.processor(image, return_tensors="pt")["pixel_values"]
        logits = view.model(pixels).logits
        pooled = view.model.vit(pixels).pooler_output
    torch.testing.assert_close(answers.probabilities[3], logits.softmax(1)[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(answers.features[3], pooled[0], atol=1e-5, rtol=1e-4)
    assert answers.labels.shape == (20,)
    assert view.distance().shape == (2, 3)


def test_script_finds_classes_by_name(script, folder, tmp_path):
    """A model whose classes stand in another order than the data's."""
    model = ViTScratchForImageClassification.from_pretrained(folder)
    model.config.id2label = {i: str(9 - i) for i in range(10)}
    model.config.label2id = {str(9 - i): i for i in range(10)}
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil.from_pretrained(folder).save_pretrained(tmp_path)
    words, rest = ["features"], ["--dataset", "digits", "--max_samples", "50"]
    (straight, _), (turned, _) = (
        script.load_view(script.parse([*words, str(path), *rest])) for path in (folder, tmp_path)
    )
    assert turned.class_names == straight.class_names[::-1]
    assert torch.equal(turned.answers.labels, 9 - straight.answers.labels)


def test_script_compares_runs(script, history, tmp_path, capsys):
    other = tmp_path / "other" / "run"
    other.mkdir(parents=True)
    (other / "history.csv").write_text(history.read_text())
    assert script.main(["curves", str(history.parent), str(other), "--output", str(tmp_path / "p")]) == 0
    assert len(capsys.readouterr().out.split()) == 2
    names = run_labels([str(history.parent), str(other)])
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
    monkeypatch.setattr(plots, "save_figure", lambda figure, path, svg: [drawn.setdefault(path.name, figure)])
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


def test_the_filters_of_early_convolutions_are_named(tmp_path):
    config = small_config(image_size=32, patch_size=8, stem_channels=[4, 6])
    ViTScratchForImageClassification(config).save_pretrained(tmp_path)
    figure = plots.draw_figures(tmp_path, "filters")["patch_filters"]
    assert figure.get_suptitle().startswith("Kernels of the first convolution: first 3 principal components")
    assert figure.axes[0].images[0].get_array().shape == (3, 3, 3)


def test_script_draws_images_from_all_parts_of_a_split(script, folder, tmp_path):
    """Folders are sorted by class."""
    for label in range(3):
        (tmp_path / str(label)).mkdir()
        for i in range(3):
            image = Image.fromarray(noise_image(3, 16, 8, seed=3 * label + i).permute(1, 2, 0).numpy())
            image.save(tmp_path / str(label) / f"{i}.png")
    words = ["rollout", str(folder), "--dataset", str(tmp_path), "--max_pictures", "3"]
    view, _ = script.load_view(script.parse(words))
    assert view.titles == ["0", "1", "2"]
    shown = torch.stack([view[i] for i in (0, 4, 8)])
    assert torch.equal(torch.stack(view.pixels), shown)
    config = view.config
    geometry = config.grid_hw, config.patch_hw, config.num_prefix_tokens
    expected = plots.attention_distance(view.look(shown).attentions, *geometry)
    torch.testing.assert_close(view.distance(most=3), expected)


def test_script_remakes_the_images_of_the_docs(script, folder, tmp_path, capsys):
    words = ["docs", str(folder)]
    assert script.parse(words).output == Path("plots")  # and so no command of a page writes over a committed image
    assert script.main([*words, "--output", str(tmp_path / "out")]) == 0
    drawn = {file.name for file in (tmp_path / "out").iterdir()}
    assert drawn == {f"{KINDS[kind]}.png" for kind in script.DOCS}
    assert len(capsys.readouterr().out.split()) == len(drawn)


def test_script_status_when_an_input_fails(script, folder, history, tmp_path, capsys):
    (tmp_path / "broken.png").write_text("no image")
    good = tmp_path / "good.png"
    Image.new("L", (9, 9)).save(good)
    words = ["patches", str(folder), "--output", str(tmp_path / "p"), "--images"]
    assert script.main([*words, str(good), str(tmp_path / "broken.png"), str(tmp_path / "none.png")]) == 1
    out, err = capsys.readouterr()
    assert len(out.split()) == 2  # the good one is drawn
    assert "broken.png" in err and "none.png" in err
    assert script.main([*words, str(tmp_path / "broken.png")]) == 2
    assert "none of 1 images" in capsys.readouterr().err
    assert script.main(["curves", "filters", str(folder), "--output", str(tmp_path / "p")]) == 1
    assert "history.csv" in capsys.readouterr().err
    assert script.main(["heads", str(folder), "--images", str(good), "--layer", "3", "--output", str(tmp_path)]) == 1
    assert "--layer (3) must be 1 to 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["rolout", "x"], "'rolout' is no KIND"),
        (["rollout"], "MODEL is missing"),
        (["rollout", "x"], "rollout needs images"),
        (["features", "x", "--images", "a.png"], "features needs labelled images"),
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
    view, _ = script.load_view(script.parse(words))
    with torch.no_grad():
        logits = other.eval()(view.predictor.normalise(view.batch(range(5)))).logits
    torch.testing.assert_close(view.judgements()[0][:5], logits.softmax(1), atol=1e-5, rtol=1e-4)
