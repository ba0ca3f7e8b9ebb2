"""scripts/validate.py: its tables, its JSON, two models compared, and its exit statuses."""

import json
import re

import pytest
import torch
from colours import BLUE, GREEN, NAMES, RED, colour_model, paint_folder, save_trained
from runs import load_script

from modeling_vit_scratch.evaluation import reports
from modeling_vit_scratch.evaluation.metrics import wilson_interval


@pytest.fixture(scope="module")
def script():
    return load_script("validate")


def run(script, capsys, *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = script.main([*map(str, words), "--batch_size", "4"])
    return (status, *capsys.readouterr())


def test_one_model(script, model, data, capsys):
    status, out, _ = run(script, capsys, model, data)
    assert status == 0
    assert max(len(line) for line in out.splitlines()[2:]) <= 80  # the first two have paths
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines() if line}
    low, high = wilson_interval(9, 10)
    assert rows["top-1"][1:] == ["90.00", "%", f"{100 * low:.2f}", "to", f"{100 * high:.2f}"]
    assert "top-5" not in out  # of three classes
    assert rows["calibration error"] and rows["images/s"]
    assert rows["red"][1:4] == ["4", "75.00", "%"] and rows["blue"][1:4] == ["3", "100.00", "%"]
    assert re.search(r" 0 red +3 +· +1\n 1 green +· +3 +·\n 2 blue +· +· +3\n", out)
    assert "10 images of 3 classes" in out and "flip" not in out


def test_top_5_is_shown_where_it_says_something(script, model, biased, data, tmp_path, capsys):
    names = {**NAMES, 3: "a", 4: "b"}
    five = save_trained(colour_model(id2label=names), tmp_path / "five")
    six = save_trained(colour_model(id2label={**names, 5: "c"}), tmp_path / "six")
    for words, expected in (
        ([five], []),
        ([six], ["top-5", "top-5, with flip"]),
        ([model, biased], []),
        ([model, six], ["top-5", "top-5, with flip"]),
    ):
        lines = run(script, capsys, *words, data, "--flip")[1].splitlines()
        assert [line.split("  ")[0] for line in lines if line.startswith("top-5")] == expected
    # The last: empty for the model of three classes, and the other's under its letter.
    head, row = (next(line for line in lines if line.startswith(start)) for start in ("    ", "top-5 "))
    assert row.count("%") == 1 and row.index("%") == head.index("B")


def test_json(script, model, data, capsys):
    status, out, _ = run(script, capsys, model, data, "--json", "--flip")
    report = json.loads(out)
    assert status == 0 and report["dataset"] == data and report["split"] == "train" and "comparison" not in report
    (result,) = report["models"]
    assert result["model"] == model and result["accuracy"] == 0.9
    assert result["accuracy_interval"] == list(wilson_interval(9, 10))
    assert result["confusion_matrix"] == [[3, 0, 1], [0, 3, 0], [0, 0, 3]]
    assert result["per_class"]["red"] == {
        "examples": 4,
        "accuracy": 0.75,
        "interval": list(wilson_interval(3, 4)),
    }
    assert result["flip"]["accuracy"] == 0.9  # beside the plain figure
    assert result["pictures_per_second"] > 0 and result["pictures_per_second_with_reading"] > 0


def test_two_models(script, model, biased, data, capsys):
    status, out, _ = run(script, capsys, model, biased, data)
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == f"A: {model}" and lines[1] == f"B: {biased}"
    assert max(map(len, lines[3:])) <= 80
    assert "only A on 6 images, only B on 1" in out and "A less B: +50.00 points" in out
    assert "p = 0.12: these images cannot tell which is better" in out
    assert re.search(r"top-1 +90.00 % .*40.00 %", out)
    assert re.search(r"red +4 +75.00 % +100.00 % +-25.00", out)
    report = json.loads(run(script, capsys, biased, model, data, "--json")[1])
    assert [result["accuracy"] for result in report["models"]] == [0.4, 0.9]
    comparison = report["comparison"]
    assert (comparison["only_a"], comparison["only_b"], comparison["p_value"]) == (1, 6, 0.125)


@pytest.mark.parametrize(("difference", "verdict"), [(0.1, "A is better"), (-0.1, "B is better")])
def test_verdict(difference, verdict):
    test = {"only_a": 9, "only_b": 1, "p_value": 0.01, "difference": difference, "difference_interval": (0.0, 0.2)}
    assert reports.comparison_text(test).endswith(f"p = 0.01: {verdict}")


def test_many_classes():
    """Of more classes than fit, the commonest confusions, and the classes at both ends."""
    names = [f"class {i} of a hundred" for i in range(100)]
    matrix = [[9 * (i == j) + (j == i + 1) for j in range(100)] for i in range(100)]
    matrix[3][4] = 5
    lines = ["", *reports.confusion_text({"class_names": names, "confusion_matrix": matrix}).splitlines()]
    assert len(lines) == 1 + 1 + 1 + 20 and max(map(len, lines)) <= 80
    assert lines[3].split("  ")[0] == "class 3 of a hundred" and lines[3].endswith("35.7%")
    per_class = {name: {"examples": 10, "accuracy": i / 100, "interval": (0, 1)} for i, name in enumerate(names)}
    rows = reports.class_rows([{"per_class": per_class}])
    assert len(rows) == 1 + 20 + 1 + 20 and rows[1][0] == names[99] and rows[-1][0] == names[0]
    assert rows[21][0].startswith("... 60 more")


def test_classes_that_do_not_match(script, model, tmp_path, capsys):
    folder = paint_folder(tmp_path / "data", red=[RED], grün=[GREEN])
    status, out, err = run(script, capsys, model, folder)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert "does not know 1 of the data's 2 classes: grün" in err and "--labels FILE" in err
    (tmp_path / "labels.txt").write_text("red\ngrün\nblau\n", encoding="utf-8")
    status, out, _ = run(script, capsys, model, folder, "--labels", tmp_path / "labels.txt", "--json")
    assert status == 0 and json.loads(out)["models"][0]["accuracy"] == 1.0


def test_statuses(script, model, data, tmp_path, capsys):
    bad = paint_folder(tmp_path / "bad", red=[RED], blue=[BLUE])
    (tmp_path / "bad" / "red" / "1.png").write_bytes(b"no image")
    status, out, err = run(script, capsys, model, bad)
    assert (status, out) == (1, "") and "1.png" in err and "unreadable image" in err
    untrained = colour_model()
    torch.nn.init.zeros_(untrained.classifier.weight)
    several = colour_model(problem_type="multi_label_classification")
    for words, text in (
        ([save_trained(untrained, tmp_path / "untrained"), data], "no trained classifier"),
        ([save_trained(several, tmp_path / "several"), data], "several classes"),
        ([model, data, "--split", "test"], "there is no split 'test'"),
        ([model, tmp_path / "nothing"], "could not be loaded"),
    ):
        status, out, err = run(script, capsys, *words)
        assert (status, out) == (2, "") and text in err
    for words in ([model], [model, model, model, data]):
        with pytest.raises(SystemExit, match="2"):
            script.main(words)
        assert "one or two models and a dataset" in capsys.readouterr().err
