"""Metrics of image classification, computed in memory and without the network.

`ImageClassificationMetrics` is an `evaluate.Metric`; the functions below it say how far its numbers can be trusted:
calibration (Guo et al., 2017), the interval of an accuracy (Wilson, 1927), a paired test (McNemar, 1947), and the
interval of the difference of two accuracies on the same images (Tango, 1998).
"""

import math
from statistics import NormalDist

import datasets
import evaluate
import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest

_CITATION = """\
@inproceedings{guo2017calibration,
  title={On Calibration of Modern Neural Networks},
  author={Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle={ICML},
  year={2017}
}
"""

_INPUTS = """
Args:
    predictions: Logits or probabilities (n, classes), floating point, without NaN.
    references: Class indices (n,), integers in [0, classes).

Returns:
    "accuracy" and "top5_accuracy" in [0, 1] (top k with k = min(5, classes)); "per_class_accuracy", one number for
    each class, None for a class without examples; "confusion_matrix", counts, rows true, columns predicted;
    "examples", n. Python numbers and lists, which JSON can hold.
"""


class ImageClassificationMetrics(evaluate.Metric):
    """Top-1, top-5, per-class accuracy and the confusion matrix of logits.

    Of equal logits the one with the lowest class index ranks first, as in `numpy.argmax`: a model that says the same of
    every class is right on class 0 only. Batches added with `add_batch` are kept in memory; no file is written. In
    several processes, gather the logits first.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.num_process > 1:
            raise ValueError(f"num_process ({self.num_process}) must be 1; gather the logits, then compute once.")
        self._batches: list[tuple[np.ndarray, np.ndarray]] = []

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy, top-5 accuracy, accuracy per class and confusion matrix of an image classifier.",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    # The base class sends every number through an Arrow table as a Python object: 10,000 x 1000 logits take seconds.
    def add_batch(self, *, predictions=None, references=None):
        """Keep a batch for `compute`."""
        logits, labels = _checked(predictions, references)
        if self._batches and logits.shape[1] != self._batches[0][0].shape[1]:
            raise ValueError(
                f"predictions have {logits.shape[1]} classes, but earlier batches have {self._batches[0][0].shape[1]}."
            )
        self._batches.append((logits, labels))

    def add(self, *, prediction=None, reference=None):
        """Keep one example for `compute`."""
        self.add_batch(predictions=_array(prediction)[None], references=_array(reference)[None])

    def compute(self, *, predictions=None, references=None):
        """The metrics of this batch and of all that were added before, which are then forgotten."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if not self._batches:
            raise ValueError("there are no predictions: add batches, or pass predictions and references.")
        batches, self._batches = self._batches, []
        logits, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        return self._compute(logits, labels)

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict:
        n, classes = predictions.shape
        own = predictions[np.arange(n), references][:, None]
        # Classes that rank before the true one: larger logits, and equal ones of a lower index.
        rank = (predictions > own).sum(axis=1)
        rank += ((predictions == own) & (np.arange(classes) < references[:, None])).sum(axis=1)
        confusion = np.zeros((classes, classes), dtype=np.int64)
        np.add.at(confusion, (references, predictions.argmax(axis=1)), 1)
        per_class = [
            int(right) / int(total) if total else None
            for right, total in zip(confusion.diagonal(), confusion.sum(axis=1), strict=True)
        ]
        return {
            "accuracy": float((rank == 0).mean()),
            "top5_accuracy": float((rank < 5).mean()),
            "per_class_accuracy": per_class,
            "confusion_matrix": confusion.tolist(),
            "examples": n,
        }


def reliability_bins(probabilities, labels, bins: int = 15) -> dict[str, np.ndarray]:
    """Sort predictions by confidence: bin B_m holds those in ((m - 1) / M, m / M] (Guo et al., 2017, sec. 2).

    Confidence is the largest probability; the prediction is its class, the lowest index of equal ones.

    Args:
        probabilities: (n, classes), each in [0, 1], rows that sum to 1.
        labels: Class indices (n,).
        bins: M, at least 1.

    Returns:
        Four arrays (M + 1,) or (M,): "edges"; "count"; "accuracy" (eq. for acc(B_m)) and "confidence" (eq. for
        conf(B_m)), NaN where a bin is empty.

    Raises:
        ValueError: Shapes do not fit, or the numbers are no probabilities.
    """
    probabilities, labels = _checked(probabilities, labels, name="probabilities")
    if bins < 1:
        raise ValueError(f"bins ({bins}) must be at least 1.")
    total = probabilities.sum(axis=1, dtype=np.float64)
    worst = total[np.abs(total - 1).argmax()]
    if abs(worst - 1) > 1e-2 or probabilities.min() < 0:
        raise ValueError(
            f"probabilities must be at least 0 and sum to 1, but the smallest is {probabilities.min():g} and a row "
            f"sums to {worst:g}; apply a softmax to logits first."
        )
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = probabilities.argmax(axis=1) == labels
    edges = np.linspace(0.0, 1.0, bins + 1)
    index = np.searchsorted(edges[1:-1], confidence, side="left")  # a value on an edge belongs to the bin below it
    count = np.bincount(index, minlength=bins)
    mean = np.maximum(count, 1)
    return {
        "edges": edges,
        "count": count,
        "accuracy": np.where(count, np.bincount(index, correct, bins) / mean, np.nan),
        "confidence": np.where(count, np.bincount(index, confidence, bins) / mean, np.nan),
    }


def expected_calibration_error(probabilities, labels, bins: int = 15) -> float:
    """ECE = sum_m |B_m| / n * |acc(B_m) - conf(B_m)|, in [0, 1] (Guo et al., 2017, eq. 3; there, too, M = 15).

    Arguments and errors are those of `reliability_bins`.
    """
    table = reliability_bins(probabilities, labels, bins)
    count = table["count"]
    return float(np.nansum(count * np.abs(table["accuracy"] - table["confidence"])) / count.sum())


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a proportion (Wilson, 1927): every p with |correct / n - p| <= z * sqrt(p (1 - p) / n).

    It never leaves [0, 1], and ends there exactly where `correct` is 0 or n.

    Raises:
        ValueError: `correct` is not in [0, n], n is not positive, or `confidence` is not in (0, 1).
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"correct ({correct}) must be in [0, n], and n ({n}) at least 1.")
    _check_confidence(confidence)
    interval = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar_test(correct_a, correct_b) -> dict[str, int | float]:
    """Do two models err equally often on the same images? Exact, two-sided (McNemar, 1947; Dietterich, 1998).

    Of the b + c images that only one model gets right, each is as likely A's as B's if the models are equally good:
    b ~ Binomial(b + c, 1/2).

    Args:
        correct_a: Whether model A is right on each image (n,), bool.
        correct_b: The same of model B, in the same order.

    Returns:
        "only_a" (b), "only_b" (c), "examples" (n), and "p_value", 1 where the models are right on the same images.

    Raises:
        ValueError: The shapes differ, or values are not bool.
    """
    a, b = _array(correct_a), _array(correct_b)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"correct_a {a.shape} and correct_b {b.shape} must be of one shape (n,).")
    if a.dtype != bool or b.dtype != bool:
        raise ValueError(f"correct_a ({a.dtype}) and correct_b ({b.dtype}) must be bool, one for each image.")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    differ = only_a + only_b
    p = float(binomtest(only_a, differ).pvalue) if differ else 1.0
    return {"only_a": only_a, "only_b": only_b, "examples": len(a), "p_value": p}


def paired_difference_interval(
    only_a: int, only_b: int, examples: int, confidence: float = 0.95
) -> tuple[float, float]:
    """The score interval of A's accuracy less B's on the same images (Tango, 1998, Statistics in Medicine 17:891).

    It is every difference d in [-1, 1] with |b - c - n d| <= z * sqrt(n (2 q + d - d^2)), where q is the likeliest
    share of images that only B gets right if the true difference is d: the larger root of
    2 n q^2 - (b + c - (2 n - b + c) d) q - c d (1 - d) = 0. It takes in how uncertain it is that the models differ on
    b + c images of n: without such images it is -z^2 / (n + z^2) to z^2 / (n + z^2), and not a point. Like Wilson's,
    it covers a little more or less than `confidence` at any one truth, since counts are whole numbers: what says 95 %
    covers 92.7 % in the worst of the cases that its test computes, and more where few images differ.

    At the margin it and `mcnemar_test` can disagree on whether 0 is possible: that test is exact, and so cautious.

    Args:
        only_a: Images that only A gets right (b).
        only_b: Images that only B gets right (c).
        examples: All images (n).
        confidence: In (0, 1).

    Raises:
        ValueError: Counts are negative, or more than n together; n is not positive; `confidence` is not in (0, 1).
    """
    if examples < 1 or min(only_a, only_b) < 0 or only_a + only_b > examples:
        raise ValueError(
            f"only_a ({only_a}) and only_b ({only_b}) must be at least 0 and together at most examples ({examples}), "
            "which must be at least 1."
        )
    _check_confidence(confidence)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return -_tango_bound(only_b, only_a, examples, z), _tango_bound(only_a, only_b, examples, z)


def _tango_bound(b: int, c: int, n: int, z: float) -> float:
    """The upper end of `paired_difference_interval`; the lower one is that of the models changed about, negated."""

    def excess(d: float) -> float:
        """Of d over the bound, negative beyond it: monotone, and finite where the standard error is 0."""
        distance = b - c - n * d
        slope = b + c - (2 * n - b + c) * d
        q = (slope + math.sqrt(max(slope * slope + 8 * n * c * d * (1 - d), 0.0))) / (4 * n)
        variance = n * max(2 * q + d - d * d, 0.0)
        length = math.hypot(distance, math.sqrt(variance))
        return (distance / length if length else 0.0) + z / math.hypot(1, z)

    estimate = (b - c) / n
    return 1.0 if estimate == 1 else brentq(excess, estimate, 1.0, xtol=1e-15)


def _check_confidence(confidence: float):
    if not 0 < confidence < 1:
        raise ValueError(f"confidence ({confidence}) must be between 0 and 1.")


def _array(values) -> np.ndarray:
    """A NumPy array of an array, list or tensor, on any device and of any floating type."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    return np.asarray(values)


def _checked(scores, labels, name: str = "predictions") -> tuple[np.ndarray, np.ndarray]:
    if scores is None or labels is None:
        raise ValueError(f"{name if scores is None else 'labels'} are missing.")
    scores, labels = _array(scores), _array(labels)
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"{name} must be of shape (n, classes), none of them 0, got {scores.shape}.")
    if labels.ndim != 1 or len(labels) != len(scores):
        raise ValueError(f"labels of shape {labels.shape} do not fit {name} of shape {scores.shape}: one for each row.")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}.")
    classes = scores.shape[1]
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        raise ValueError(
            f"label {labels[outside[0]]} (example {outside[0]}) must be in [0, {classes - 1}]: "
            f"{name} have {classes} classes."
        )
    if not np.issubdtype(scores.dtype, np.floating):
        scores = scores.astype(np.float64)
    nans = np.flatnonzero(np.isnan(scores).any(axis=1))
    if len(nans):
        raise ValueError(f"{name} hold NaN in {len(nans)} of {len(scores)} rows, first in row {nans[0]}.")
    return scores, labels


__all__ = [
    "ImageClassificationMetrics",
    "expected_calibration_error",
    "mcnemar_test",
    "paired_difference_interval",
    "reliability_bins",
    "wilson_interval",
]
