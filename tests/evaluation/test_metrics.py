"""Metrics against numbers worked by hand, and against scikit-learn."""

import functools
import itertools
import json
import math
import os
from fractions import Fraction
from statistics import NormalDist

import evaluate
import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.metrics import confusion_matrix, top_k_accuracy_score

from modeling_vit_scratch.evaluation import ImageClassificationMetrics
from modeling_vit_scratch.evaluation.metrics import (
    expected_calibration_error,
    mcnemar_test,
    paired_difference_interval,
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
    """The roots of Wilson's equation; at 0 and n its end is exact."""
    for correct, n, confidence in [(0, 10, 0.95), (10, 10, 0.95), (7, 10, 0.9), (6746, 10_000, 0.95), (1, 3, 0.99)]:
        z, interval = NormalDist().inv_cdf((1 + confidence) / 2), wilson_interval(correct, n, confidence)
        for p in interval:
            assert abs(correct / n - p) == pytest.approx(z * math.sqrt(p * (1 - p) / n), abs=1e-12)
        assert interval[0] < correct / n < interval[1] or correct in (0, n)
    assert wilson_interval(0, 10)[0] == 0.0 and wilson_interval(10, 10)[1] == 1.0
    low, high = wilson_interval(6746, 10_000)
    assert (low, high) == pytest.approx((0.66535, 0.68371), abs=1e-5)
    for bad in [(11, 10), (-1, 10), (0, 0)]:
        with pytest.raises(ValueError, match=rf"\({bad[0]}\).*\({bad[1]}\)"):
            wilson_interval(*bad)
    with pytest.raises(ValueError, match="confidence"):
        wilson_interval(1, 2, confidence=95)


def test_mcnemar_by_hand():
    # Only A is right on 1 image, only B on 5: p = 2 * (C(6, 0) + C(6, 1)) / 2^6 = 14 / 64.
    a = np.array([True] + [False] * 5 + [True] * 4)
    b = np.array([False] + [True] * 5 + [True] * 4)
    assert mcnemar_test(a, b) == {"only_a": 1, "only_b": 5, "examples": 10, "p_value": pytest.approx(14 / 64)}
    swapped = mcnemar_test(torch.tensor(b), torch.tensor(a))
    assert (swapped["only_a"], swapped["p_value"]) == (5, pytest.approx(14 / 64))


def test_mcnemar_agrees_with_the_sum_of_the_tail():
    rng = np.random.default_rng(0)
    a, b = rng.random(10_000) < 0.70, rng.random(10_000) < 0.69
    result = mcnemar_test(a, b)
    n, fewer = result["only_a"] + result["only_b"], min(result["only_a"], result["only_b"])
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    assert result["p_value"] == pytest.approx(float(Fraction(2 * tail, 2**n)))
    assert mcnemar_test(a, a)["p_value"] == 1.0
    even = np.array([True, False])
    assert mcnemar_test(even, ~even)["p_value"] == 1.0  # 2 * P[X <= 1] of 2 is 1.5: cut at 1


def test_mcnemar_refuses():
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        mcnemar_test([True, False], [True, False, True])
    with pytest.raises(ValueError, match="bool"):
        mcnemar_test([1, 0], [0, 1])
    assert math.isfinite(mcnemar_test([True], [False])["p_value"])


# Newcombe's published spreadsheet of Tango's method (50, 12, 2); the tables of Fagerland, Lydersen and Laake (2014,
# Statistics in Medicine 33:2850), as their R package contingencytables prints them (161, 6, 16); and R's PropCIs,
# scoreci.mp, which takes the counts in the other order.
@pytest.mark.parametrize(
    ("only_a", "only_b", "n", "confidence", "published"),
    [
        (12, 2, 50, 0.95, (0.0611, 0.3447)),
        (6, 16, 161, 0.95, (-0.1240, -0.0054)),
        (60, 20, 1000, 0.95, (0.0231, 0.0584)),
        (28, 25, 618, 0.90, (-0.0148, 0.0247)),
    ],
)
def test_paired_difference_interval_is_what_was_published(only_a, only_b, n, confidence, published):
    assert paired_difference_interval(only_a, only_b, n, confidence) == pytest.approx(published, abs=5e-5)


def test_paired_difference_interval_at_the_extremes():
    z2 = NormalDist().inv_cdf(0.975) ** 2
    for n in (1, 2, 50, 10_000, 10**8):
        # No image tells the models apart: z^2 / (n + z^2) (Tango, 1998, appendix); all do: the other root, n - z^2.
        zero, most = pytest.approx(z2 / (n + z2), rel=1e-9), pytest.approx((n - z2) / (n + z2), rel=1e-9)
        assert paired_difference_interval(0, 0, n) == (-paired_difference_interval(0, 0, n)[1], zero)
        assert paired_difference_interval(n, 0, n) == (most, 1.0)
        assert paired_difference_interval(0, n, n)[0] == -1.0
    # B is never right alone: the upper end is Wilson's, of A's images among all.
    assert paired_difference_interval(10, 0, 1000)[1] == pytest.approx(wilson_interval(10, 1000)[1], rel=1e-9)
    for b, c, n in itertools.product((0, 1, 2, 5, 49, 50, 999, 1000), (0, 1, 3, 50, 500, 1000), (1, 50, 1000)):
        if b + c <= n:
            low, high = paired_difference_interval(b, c, n)
            assert -1 <= low <= (b - c) / n <= high <= 1 and low < high, (b, c, n)
            assert paired_difference_interval(c, b, n) == (-high, -low)
            assert paired_difference_interval(b, c, n, 0.5)[1] <= high <= paired_difference_interval(b, c, n, 0.999)[1]


def exact_coverage(n: int, p_b: float, p_c: float, interval) -> float:
    """How probable it is that `interval` holds p_b - p_c: a sum over all (b, c), save of 1e-6 in all at the tails."""
    tail, total = 1e-7, 0.0
    for c in range(int(binom.ppf(tail, n, p_c)), int(binom.isf(tail, n, p_c)) + 1):
        share = min(p_b / (1 - p_c), 1.0)
        bs = np.arange(max(binom.ppf(tail, n - c, share), 0), binom.isf(tail, n - c, share) + 1, dtype=int)
        held = [low <= p_b - p_c <= high for low, high in (interval(b, c, n) for b in bs.tolist())]
        total += binom.pmf(c, n, p_c) * (binom.pmf(bs, n - c, share) * held).sum()
    return total


def test_paired_difference_interval_covers_what_it_says():
    """Exactly computed, not simulated.

    A score interval covers 95 % on average and swings about it, as counts are whole numbers; where few images are
    expected to differ it covers more. The worst of these cells has 92.7 %.
    """
    interval = functools.cache(paired_difference_interval)
    shares = (0, 0.001, 0.01, 0.05, 0.2, 0.5)
    pairs = [(p_b, p_c) for p_b in shares for p_c in shares if p_c <= p_b]
    cells = [(n, *pair) for n in (50, 200) for pair in pairs]
    cells += [(1000, p_b, p_c) for p_b, p_c in pairs if p_b <= 0.05 or p_c == 0]
    cells += [(10_000, *pair) for pair in ((0.001, 0), (0.001, 0.001), (0.01, 0), (0.01, 0.001), (0.05, 0), (0.5, 0))]
    cells += [(100, 0.055, 0), (200, 0.0287, 0.005), (1000, 0.0041, 5e-5)]  # the lowest that a search found
    cells += [(50, 0.01, 0.05), (200, 0, 0.2)]  # and the models changed about
    covered = {cell: exact_coverage(*cell, interval) for cell in cells}
    assert min(covered.values()) > 0.925, min(covered, key=covered.get)
    assert all(share > 1 - 1e-5 for (n, *pair), share in covered.items() if pair == [0, 0])
    many = [share for (n, p_b, p_c), share in covered.items() if n * (p_b + p_c) >= 9]
    assert max(many) < 0.975 and np.mean(many) == pytest.approx(0.95, abs=0.003)


def test_paired_difference_interval_refuses():
    for bad in [(-1, 0, 10), (0, -1, 10), (6, 5, 10), (0, 0, 0)]:
        with pytest.raises(ValueError, match=rf"\({bad[0]}\).*\({bad[1]}\).*\({bad[2]}\)"):
            paired_difference_interval(*bad)
    with pytest.raises(ValueError, match=r"confidence \(95\)"):
        paired_difference_interval(1, 2, 10, confidence=95)
