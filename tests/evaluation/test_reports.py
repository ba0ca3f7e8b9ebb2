"""evaluate_model and compare_models, called from Python: what they give, what they take and refuse; and tables."""

import json

import pytest
import torch
from colours import BLUE, NAMES, RED, colour_model, paint_folder, save_trained

from modeling_vit_scratch.data import load_split
from modeling_vit_scratch.data.records import BadImages
from modeling_vit_scratch.evaluation import Predictor, compare_models, evaluate_model, report_text
from modeling_vit_scratch.evaluation.metrics import mcnemar_test, wilson_interval
from modeling_vit_scratch.evaluation.tables import shorten, text_table


def without_times(report: dict) -> dict:
    models = [{key: value for key, value in result.items() if "second" not in key} for result in report["models"]]
    return {**report, "models": models}


# -- one model ---------------------------------------------------------------------------------------------------------


def test_a_model_is_measured(model, data):
    report = evaluate_model(model, data, flip=True, batch_size=4)
    assert list(report) == ["dataset", "split", "cut", "models"]
    assert (report["dataset"], report["split"], report["cut"]) == (data, "train", None)
    (result,) = report["models"]
    assert (result["model"], result["examples"], result["accuracy"]) == (str(model), 10, 0.9)
    assert result["accuracy_interval"] == wilson_interval(9, 10)
    assert result["flip"]["accuracy"] == 0.9
    assert result["confusion_matrix"] == [[3, 0, 1], [0, 3, 0], [0, 0, 3]]
    assert result["pictures_per_second"] > 0 and result["pictures_per_second_with_reading"] > 0
    json.dumps(report)
    lines = report_text(report).splitlines()
    assert lines[:2] == [str(model), f"on {data}, split train: 10 images of 3 classes"]
    assert any(line.split()[:5] == ["top-1,", "with", "flip", "90.00", "%"] for line in lines)


def test_a_predictor_and_a_loaded_split_give_the_same(model, data):
    predictor = Predictor(model, "cpu")
    split = load_split(data, image_size=predictor.image_hw, models=[predictor])
    named = without_times(evaluate_model(model, data))
    assert without_times(evaluate_model(predictor, split)) == {
        **named,
        "models": [{**named["models"][0], "device": "cpu"}],
    }


def test_options_of_the_split_are_taken(model, data, caplog):
    held_out = evaluate_model(model, data, "validation", train_val_split=0.3, seed=1)
    assert held_out["models"][0]["examples"] == 3
    assert held_out["cut"] == {
        "method": "stratified", "train_val_split": 0.3, "seed": 1, "max_train_samples": None, "max_eval_samples": None,
        "of_the_run": False,
    }  # fmt: skip
    assert "split validation: 3 images, cut from train as the options say" in caplog.text
    assert evaluate_model(model, data, max_samples=5)["models"][0]["examples"] == 5


# -- two models --------------------------------------------------------------------------------------------------------


def test_two_models_are_compared(model, biased, data):
    report = compare_models(model, Predictor(biased, "cpu"), data)
    assert [result["model"] for result in report["models"]] == [str(model), str(biased)]
    assert [result["accuracy"] for result in report["models"]] == [0.9, 0.4]
    right_a, right_b = [True] * 3 + [False] + [True] * 6, [True] * 4 + [False] * 6
    test = mcnemar_test(torch.tensor(right_a), torch.tensor(right_b))
    comparison = report["comparison"]
    assert {key: comparison[key] for key in test} == test
    assert comparison["difference"] == 0.5
    text = report_text(report)
    assert text.startswith(f"A: {model}\nB: {biased}\n")
    assert "right: only A on 6 images, only B on 1\nA less B: +50.00 points" in text
    # Each is what it is alone, and the other way round the sign changes.
    alone = [without_times(evaluate_model(each, data))["models"][0] for each in (model, biased)]
    alone[1]["device"] = "cpu"
    assert without_times(report)["models"] == alone
    assert compare_models(biased, model, data)["comparison"]["difference"] == -0.5


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["evaluate", "compare"])
def test_bad_input_is_named_in_a_line(call, model, data, tmp_path, monkeypatch):
    untrained = colour_model()
    torch.nn.init.zeros_(untrained.classifier.weight)
    bad = {
        "untrained": save_trained(untrained, tmp_path / "untrained"),
        "several": save_trained(colour_model(problem_type="multi_label_classification"), tmp_path / "several"),
        "other": save_trained(colour_model(id2label={**NAMES, 0: "pink"}), tmp_path / "other"),
    }
    monkeypatch.setattr(Predictor, "answers", lambda *args: pytest.fail("a model started before all were checked"))

    def measure(which, *args, **options):
        if call == "evaluate":
            return evaluate_model(which, *args, **options)
        return compare_models(model, which, *args, **options)

    predictor = Predictor(model, "cpu")
    for words, options, message in (
        ((tmp_path / "nothing" / "there" / "x", data), {}, "there is no file or folder"),
        ((model, str(tmp_path / "nothing")), {}, "could not be loaded"),
        ((model, data, "test"), {}, "there is no split 'test'"),
        ((bad["untrained"], data), {}, "no trained classifier"),
        ((bad["several"], data), {}, "several classes"),
        ((bad["other"], data), {}, "does not know 1 of the data's 3 classes: red"),
        ((model, load_split(data, models=[predictor]), "test"), {"seed": 1}, "split, seed cannot be chosen any more"),
    ):
        with pytest.raises(ValueError) as error:
            measure(*words, **options)
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(TypeError, match="no_such_option"):
        measure(model, data, no_such_option=1)


def test_batches_and_images_that_cannot_be(model, tmp_path):
    folder = paint_folder(tmp_path / "bad", red=[RED], blue=[BLUE])
    with pytest.raises(ValueError, match=r"batch_size \(0\) must be at least 1"):
        evaluate_model(model, folder, batch_size=0)
    (tmp_path / "bad" / "red" / "0.png").write_bytes(b"no image")
    with pytest.raises(BadImages, match=r"0\.png\): unreadable image"):
        evaluate_model(model, folder)


# -- tables ------------------------------------------------------------------------------------------------------------


def test_columns_are_flush_left_and_right():
    rows = [["name", "kind", "n"], ["a", "long kind", "1"], ["bc", "", "1,000"]]
    assert text_table(rows, left=2).splitlines() == [
        "name  kind           n",
        "a     long kind      1",
        "bc               1,000",
    ]
    assert text_table(rows, left=0).splitlines()[1] == "   a  long kind      1"
    assert text_table([["a", ""], ["b", ""]]) == "a\nb"  # nothing trails


def test_a_value_of_several_lines_goes_on_under_its_column():
    """Two columns, as a summary of settings has them."""
    rows = [["model", "ViT"], ["optimizer", "AdamW\nof two groups"], ["output", "here"]]
    assert text_table(rows, left=2, indent=2).splitlines() == [
        "  model      ViT",
        "  optimizer  AdamW",
        "             of two groups",
        "  output     here",
    ]


def test_headings_stand_apart_and_widen_no_column():
    assert text_table([["", "ms"], "a heading wider than all", ["ours", "1"]]).splitlines() == [
        "      ms",
        "",
        "a heading wider than all",
        "ours   1",
    ]


def test_rows_must_have_the_same_columns():
    with pytest.raises(ValueError):
        text_table([["a", "b"], ["c"]])


def test_long_names_are_shortened():
    assert shorten("x" * 36) == "x" * 36
    assert shorten("y" * 37) == "y" * 35 + "…"
    assert shorten("abcdef", 4) == "abc…"
