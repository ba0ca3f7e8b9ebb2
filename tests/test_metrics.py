"""Metrics against numbers worked by hand, and against scikit-learn."""

import json
import math
import os

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, top_k_accuracy_score

from modeling_vit_scratch.metrics import (
    ImageClassificationMetrics,
    expected_calibration_error,
    mcnemar_test,
    reliability_bins,
    wilson_interval,
)

LOGITS = np.array([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0], [2.0, 1.0, 0.0], [0.1, 0.3, 0.2]])
LABELS = np.array([0, 1, 1, 1])


def compute(predictions, references):
    return ImageClassificationMetrics().compute(predictions=predictions, references=references)


def test_worked_by_hand():
    result = compute(LOGITS, LABELS)
    assert result == {
        "accuracy": 0.75,
        "top5_accuracy": 1.0,
        "per_class_accuracy": [1.0, 2 / 3, None],  # no example is of class 2
        "confusion_matrix": [[1, 0, 0], [1, 2, 0], [0, 0, 0]],  # rows true
        "examples": 4,
    }
    assert json.loads(json.dumps(result)) == result
    assert isinstance(ImageClassificationMetrics(), evaluate.Metric)


@pytest.mark.parametrize("classes", [2, 5, 6, 100])
def test_agrees_with_scikit_learn(classes):
    rng = np.random.default_rng(classes)
    logits, labels = rng.normal(size=(500, classes)).astype(np.float32), rng.permutation(500) % classes
    result = compute(logits, labels)
    matrix = confusion_matrix(labels, logits.argmax(1), labels=range(classes))
    assert result["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
    assert result["confusion_matrix"] == matrix.tolist()
    np.testing.assert_allclose(result["per_class_accuracy"], matrix.diagonal() / matrix.sum(1))
    top5 = (
        top_k_accuracy_score(labels, logits, k=5, labels=range(classes)) if classes > 5 else 1.0
    )  # k = min(5, classes)
    assert result["top5_accuracy"] == pytest.approx(top5)
    assert result["top5_accuracy"] == 1.0 or classes > 5


def test_ties_rank_by_class_index():
    equal = compute(np.zeros((10, 10)), np.arange(10))
    assert equal["accuracy"] == 0.1
    assert equal["top5_accuracy"] == 0.5
    assert [row[0] for row in equal["confusion_matrix"]] == [1] * 10
    # accuracy is always the trace of the confusion matrix
    logits = np.random.default_rng(0).integers(3, size=(200, 8)).astype(float)
    result = compute(logits, np.arange(200) % 8)
    assert result["accuracy"] == pytest.approx(np.trace(result["confusion_matrix"]) / 200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_takes_tensors(dtype):
    logits = torch.tensor(LOGITS, dtype=dtype, requires_grad=True)
    assert compute(logits, torch.tensor(LABELS)) == compute(LOGITS, LABELS)
    assert compute(LOGITS.tolist(), LABELS.tolist()) == compute(LOGITS, LABELS)


def test_infinite_logits_are_ranked():
    assert compute([[np.inf, 0.0], [-np.inf, 0.0]], [0, 1])["accuracy"] == 1.0


def test_batches_add_up_and_are_forgotten(tmp_path, monkeypatch):
    metric = ImageClassificationMetrics(cache_dir=str(tmp_path))
    metric.add_batch(predictions=LOGITS[:2], references=LABELS[:2])
    metric.add(prediction=LOGITS[2], reference=LABELS[2])
    assert metric.compute(predictions=LOGITS[3:], references=LABELS[3:]) == compute(LOGITS, LABELS)
    assert metric.compute(predictions=LOGITS[:1], references=LABELS[:1])["examples"] == 1
    assert not [name for _, _, files in os.walk(tmp_path) for name in files]


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        (LOGITS[0], LABELS, ["(3,)", "(n, classes)"]),
        (LOGITS, LABELS[:3], ["(3,)", "(4, 3)"]),
        (LOGITS, LABELS[:, None], ["(4, 1)", "(4, 3)"]),
        (LOGITS, [0, 1, 3, 1], ["label 3", "example 2", "[0, 2]"]),
        (LOGITS, [0, -100, 1, 1], ["label -100", "example 1"]),
        (LOGITS, LABELS.astype(float), ["float64"]),
        (np.where(LOGITS == 5, np.nan, LOGITS), LABELS, ["NaN", "1 of 4", "row 1"]),
        (np.zeros((0, 3)), np.zeros(0, int), ["(0, 3)"]),
        (LOGITS, None, ["labels are missing"]),
    ],
)
def test_refuses(logits, labels, words):
    with pytest.raises(ValueError) as error:
        compute(logits, labels)
    assert all(word in str(error.value) for word in words), error.value


def test_refuses_other_misuse():
    with pytest.raises(ValueError, match="no predictions"):
        ImageClassificationMetrics().compute()
    with pytest.raises(ValueError, match="gather"):
        ImageClassificationMetrics(num_process=2, process_id=0)
    metric = ImageClassificationMetrics()
    metric.add_batch(predictions=LOGITS, references=LABELS)
    with pytest.raises(ValueError, match="2 classes, but earlier batches have 3"):
        metric.add_batch(predictions=LOGITS[:, :2], references=LABELS)


def test_large_input_takes_no_python_loop():
    """10,000 x 1000 float32 at once: minutes if each number became an object, and the answer stays exact."""
    labels = np.arange(10_000) % 1000
    logits = np.zeros((10_000, 1000), np.float32)
    logits[np.arange(10_000), (labels + (np.arange(10_000) < 2500)) % 1000] = 1
    result = compute(logits, labels)
    assert result["accuracy"] == 0.75
    assert sum(map(sum, result["confusion_matrix"])) == 10_000


# -- calibration -------------------------------------------------------------------------------------------------------


def test_calibration_error_by_hand():
    # Two bins. (0, 0.5]: confidences 0.5, 0.5, right 1 of 2, gap 0. (0.5, 1]: 0.9, 0.7, right 1 of 2, gap 0.3.
    probabilities = [[0.5, 0.5], [0.5, 0.5], [0.9, 0.1], [0.3, 0.7]]
    labels = [0, 1, 0, 0]
    table = reliability_bins(probabilities, labels, bins=2)
    assert table["count"].tolist() == [2, 2]
    np.testing.assert_allclose(table["accuracy"], [0.5, 0.5])
    np.testing.assert_allclose(table["confidence"], [0.5, 0.8])
    assert expected_calibration_error(probabilities, labels, bins=2) == pytest.approx(2 / 4 * 0.3)


def test_calibration_extremes():
    sure = np.eye(4)[[0, 1, 2, 3]]
    assert expected_calibration_error(sure, [0, 1, 2, 3]) == 0.0
    assert expected_calibration_error(sure, [1, 2, 3, 0]) == 1.0
    table = reliability_bins(sure, [0, 1, 2, 3], bins=15)
    assert table["count"].tolist() == [0] * 14 + [4]
    assert np.isnan(table["accuracy"][:14]).all() and table["accuracy"][14] == 1
    assert expected_calibration_error(torch.full((8, 4), 0.25), [0, 0, 1, 1, 2, 2, 3, 3]) == 0.0


def test_a_calibrated_model_has_a_small_error():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(5), size=20_000)
    labels = (probabilities.cumsum(1) > rng.random((20_000, 1))).argmax(1)
    assert expected_calibration_error(probabilities, labels) < 0.02
    sharpened = probabilities**3 / (probabilities**3).sum(1, keepdims=True)
    assert expected_calibration_error(sharpened, labels) > 0.15


def test_calibration_refuses_logits():
    with pytest.raises(ValueError, match="softmax"):
        expected_calibration_error(LOGITS, LABELS)
    with pytest.raises(ValueError, match="softmax"):
        expected_calibration_error([[1.5, -0.5]], [0])
    with pytest.raises(ValueError, match=r"bins \(0\)"):
        expected_calibration_error([[1.0, 0.0]], [0], bins=0)


# -- intervals and tests -----------------------------------------------------------------------------------------------


def test_wilson_interval():
    from scipy.stats import binomtest

    for correct, n, confidence in [(0, 10, 0.95), (10, 10, 0.95), (7, 10, 0.9), (6746, 10_000, 0.95), (1, 3, 0.99)]:
        expected = binomtest(correct, n).proportion_ci(confidence, method="wilson")
        assert wilson_interval(correct, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)
    low, high = wilson_interval(6746, 10_000)
    assert (low, high) == pytest.approx((0.66535, 0.68371), abs=1e-5)
    for bad in [(11, 10), (-1, 10), (0, 0)]:
        with pytest.raises(ValueError, match=rf"\({bad[0]}\).*\({bad[1]}\)"):
            wilson_interval(*bad)
    with pytest.raises(ValueError, match="confidence"):
        wilson_interval(1, 2, confidence=95)


def test_mcnemar_by_hand():
    # Only A is right on 1 picture, only B on 5: p = 2 * (C(6, 0) + C(6, 1)) / 2^6 = 14 / 64.
    a = np.array([True] + [False] * 5 + [True] * 4)
    b = np.array([False] + [True] * 5 + [True] * 4)
    assert mcnemar_test(a, b) == {"only_a": 1, "only_b": 5, "examples": 10, "p_value": pytest.approx(14 / 64)}
    swapped = mcnemar_test(torch.tensor(b), torch.tensor(a))
    assert (swapped["only_a"], swapped["p_value"]) == (5, pytest.approx(14 / 64))


def test_mcnemar_agrees_with_the_binomial_test():
    from scipy.stats import binomtest

    rng = np.random.default_rng(0)
    a, b = rng.random(10_000) < 0.70, rng.random(10_000) < 0.69
    result = mcnemar_test(a, b)
    n = result["only_a"] + result["only_b"]
    assert result["p_value"] == pytest.approx(binomtest(result["only_a"], n).pvalue)
    assert mcnemar_test(a, a)["p_value"] == 1.0
    even = np.array([True, False])
    assert mcnemar_test(even, ~even)["p_value"] == 1.0  # 2 * P[X <= 1] of 2 is 1.5: cut at 1


def test_mcnemar_refuses():
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        mcnemar_test([True, False], [True, False, True])
    with pytest.raises(ValueError, match="bool"):
        mcnemar_test([1, 0], [0, 1])
    assert math.isfinite(mcnemar_test([True], [False])["p_value"])
