"""How good a model is on labelled images, or which of two is better: the numbers, and the report of them as text.

`measure` and `compare` compute from answers that are there already; `evaluate_model` and `compare_models` let the
models answer first. `scripts/validate.py` is these two on a terminal.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..data.cuts import Split
from .inference import Answers, Predictor, as_predictor, find_split, match_classes
from .metrics import (
    ImageClassificationMetrics,
    expected_calibration_error,
    mcnemar_test,
    paired_difference_interval,
    wilson_interval,
)
from .tables import shorten, text_table

# -- numbers of answers ------------------------------------------------------------------------------------------------


def measure(probabilities: torch.Tensor, labels: torch.Tensor, class_names: Sequence[str]) -> dict:
    """How good answers are, with 95 % intervals (Wilson, 1927) of what is a share of images.

    Args:
        probabilities: (n, classes).
        labels: Class indices (n,).
        class_names: Of the model, one for each class.

    Returns:
        "examples"; "accuracy", "top5_accuracy" (1 where there are at most 5 classes), each with "..._interval" (low,
        high), in [0, 1]; "loss", the mean cross-entropy in nats; "mean_confidence" and "expected_calibration_error"
        (15 bins), in [0, 1]; "per_class": name -> "examples", "accuracy", "interval" (of classes with examples);
        "confusion_matrix", counts, rows true, columns predicted; "class_names". JSON can hold it.
    """
    result = ImageClassificationMetrics().compute(predictions=probabilities, references=labels)
    n, confusion = result["examples"], np.array(result["confusion_matrix"])
    own = probabilities[torch.arange(n), labels].double()
    shares = {name: result[name] for name in ("accuracy", "top5_accuracy")}
    intervals = {f"{name}_interval": wilson_interval(round(share * n), n) for name, share in shares.items()}
    counts = zip(class_names, confusion.diagonal().tolist(), confusion.sum(axis=1).tolist(), strict=True)
    return {
        "examples": n,
        **shares,
        **intervals,
        "loss": 0.0 - own.clamp_min(torch.finfo(torch.float32).tiny).log().mean().item(),  # and not -0.0
        "mean_confidence": probabilities.max(dim=1).values.double().mean().item(),
        "expected_calibration_error": expected_calibration_error(probabilities, labels),
        "per_class": {
            name: {"examples": total, "accuracy": right / total, "interval": wilson_interval(right, total)}
            for name, right, total in counts
            if total
        },
        "confusion_matrix": result["confusion_matrix"],
        "class_names": list(class_names),
    }


def compare(a: Answers, b: Answers) -> dict[str, int | float | tuple[float, float]]:
    """Is model A better than model B on the same images, or was it luck?

    Returns:
        `mcnemar_test`'s numbers; "difference", A's accuracy less B's, and its 95 % interval "difference_interval",
        by `paired_difference_interval`.
    """
    test = mcnemar_test(*((x.probabilities.argmax(dim=1) == x.labels) for x in (a, b)))
    counts = test["only_a"], test["only_b"], test["examples"]
    return {
        **test,
        "difference": (counts[0] - counts[1]) / counts[2],
        "difference_interval": paired_difference_interval(*counts),
    }


# -- models measured ---------------------------------------------------------------------------------------------------


def evaluate_model(
    model: Predictor | str | Path,
    dataset: str | Split,
    split: str | None = None,
    *,
    flip: bool = False,
    batch_size: int = 64,
    **options,
) -> dict:
    """Measure a model on labelled images.

        evaluate_model("runs/showcase", "uoft-cs/cifar10")["models"][0]["accuracy"]

    Args:
        model: A folder, file or Hub id, of this package or of a library that `convert_checkpoint` reads; or a
            `Predictor`, which can also name the device and the classes, and run faster (`load_for_inference`).
        dataset: A Hub id, a folder with one directory for each class, or "digits"; or what `load_split` gave. Its
            classes are found among the model's by name.
        split: "train", "validation" (what the model's run held out of train, where the dataset has none) or "test".
            None: test; if there is none, or its labels are hidden, validation; or else the dataset's only one.
        flip: Whether to measure also the mean of the logits of each image and its mirror image, which takes twice as
            long.
        batch_size: Images at once, also when the speed is measured.
        **options: Of `load_split`: `config_name`, `image_column`, `label_column`, `max_samples`, `train_val_split` and
            `seed`.

    Returns:
        The report, which JSON can hold and `report_text` makes readable. "dataset", its name; "split"; "cut", the
        settings by which the split was cut from train, or None; and "models", a list of one: "model", its name; the
        numbers of `measure`; "flip", the same with mirror images, if asked for; "device"; "computes_in", e.g.
        "float32"; "pictures_per_second", of the model alone, and "pictures_per_second_with_reading".

    Raises:
        ValueError: The model or the split cannot be had; the model has no trained classifier, gives an image several
            classes, or does not know the dataset's; an image cannot be read (`BadImages`).
    """
    return _measured([model], dataset, split, flip, batch_size, options)[0]


def compare_models(
    model_a: Predictor | str | Path,
    model_b: Predictor | str | Path,
    dataset: str | Split,
    split: str | None = None,
    *,
    flip: bool = False,
    batch_size: int = 64,
    **options,
) -> dict:
    """Measure two models on the same labelled images, and say whether one is better.

    Args:
        model_a: As `model` of `evaluate_model`, also for all other arguments.
        model_b: Likewise.

    Returns:
        As `evaluate_model`, with A and B in "models"; and "comparison", the numbers of `compare`, without mirror
        images.

    Raises:
        ValueError: As `evaluate_model`, for either model.
    """
    report, answers = _measured([model_a, model_b], dataset, split, flip, batch_size, options)
    return report | {"comparison": compare(*answers)}


def _measured(models, dataset, split, flip, batch_size, options) -> tuple[dict, list[Answers]]:
    """The report of one or more models, and their answers; all models are checked before the first of them starts."""
    predictors = [as_predictor(model) for model in models]
    split = find_split(dataset, predictors, split, **options)
    for predictor in predictors:
        predictor.require_classifier()
        if predictor.config.problem_type == "multi_label_classification":
            raise ValueError(f"{predictor.name} gives an image several classes; top-1 says nothing of it.")
        match_classes(split.class_names, predictor.class_names)
    results, answers = [], []
    for predictor in predictors:
        answers.append(predictor.answers(split.records, split.class_names, batch_size, flip))
        results.append(_result(predictor, answers[-1], batch_size))
    return {"dataset": split.dataset, **split.to_dict(), "models": results}, answers


def _result(predictor: Predictor, answers: Answers, batch_size: int) -> dict:
    """A model's part of the report."""
    names = predictor.class_names
    result = {"model": predictor.name, **measure(answers.probabilities, answers.labels, names)}
    if answers.flipped is not None:
        result["flip"] = measure(answers.flipped, answers.labels, names)
    return result | {
        "device": str(predictor.device),
        "computes_in": predictor.computes_in,
        "pictures_per_second": predictor.throughput(batch_size),
        "pictures_per_second_with_reading": len(answers.labels) / answers.seconds,
    }


# -- the report as text ------------------------------------------------------------------------------------------------


def report_text(report: dict) -> str:
    """What `evaluate_model` or `compare_models` gave, as tables of at most 80 columns; only names can be longer."""
    results = report["models"]
    letters = [f"{letter}: " if len(results) > 1 else "" for letter in "AB"[: len(results)]]
    kinds = [f" ({result['computes_in']})" if result["computes_in"] != "float32" else "" for result in results]
    names = [f"{a}{result['model']}{kind}\n" for a, result, kind in zip(letters, results, kinds, strict=True)]
    n, classes = results[0]["examples"], len(results[0]["per_class"])
    parts = ["".join(names) + f"on {report['dataset']}, split {report['split']}: {n:,} images of {classes} classes"]
    parts.append(text_table(_summary_rows(results)))
    if "comparison" in report:
        parts.append(comparison_text(report["comparison"]))
    parts.append(text_table(class_rows(results)))
    parts += [letter + confusion_text(result) for letter, result in zip(letters, results, strict=True)]
    return "\n\n".join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _between(interval: tuple[float, float], sign: str = "") -> str:
    low, high = interval
    return f"{100 * low:{sign}.2f} to {100 * high:{sign}.2f}"


def _summary_rows(results: list[dict]) -> list[list[str]]:
    """The numbers of one model, or of two side by side; each has two columns: value and interval.

    Among five classes or fewer the right one is always in the top 5, which says nothing: that stays empty.
    """
    heads = ["value"] if len(results) == 1 else ["A", "B"]
    rows = [["", *(cell for head in heads for cell in (head, "95 % interval"))]]

    def add(name, *cells):
        rows.append([name, *(part for cell in cells for part in cell)])

    def add_accuracies(suffix: str, parts: list[dict]):
        add(f"top-1{suffix}", *((_percent(r["accuracy"]), _between(r["accuracy_interval"])) for r in parts))
        cells = [
            (_percent(r["top5_accuracy"]), _between(r["top5_accuracy_interval"]))
            if len(r["class_names"]) > 5
            else ("", "")
            for r in parts
        ]
        if any(value for value, _ in cells):
            add(f"top-5{suffix}", *cells)

    add_accuracies("", results)
    if "flip" in results[0]:
        add_accuracies(", with flip", [r["flip"] for r in results])
    add("mean confidence", *((_percent(r["mean_confidence"]), "") for r in results))
    add("calibration error", *((_percent(r["expected_calibration_error"]), "") for r in results))
    add("cross-entropy", *((f"{r['loss']:.4f}", "") for r in results))
    add("images/s", *((f"{r['pictures_per_second']:,.0f}", "") for r in results))
    add("  with reading", *((f"{r['pictures_per_second_with_reading']:,.0f}", "") for r in results))
    return rows


def comparison_text(test: dict) -> str:
    """What `compare` gave, in words."""
    p = test["p_value"]
    if p < 0.05:
        verdict = f"{'A' if test['difference'] > 0 else 'B'} is better"
    else:
        verdict = "these images cannot tell which is better"
    interval = _between(test["difference_interval"], "+")
    return (
        f"right: only A on {test['only_a']:,} images, only B on {test['only_b']:,}\n"
        f"A less B: {100 * test['difference']:+.2f} points, 95 % interval {interval}\n"
        f"McNemar's exact test: p = {p:.2g}: {verdict}"
    )


def class_rows(results: list[dict]) -> list[list[str]]:
    """Accuracy of each class, the first model's best first; of many classes, those at both ends."""
    per_class = [result["per_class"] for result in results]
    names = sorted(per_class[0], key=lambda name: -per_class[0][name]["accuracy"])
    rows = [["class", "images", *(["right", "95 % interval"] if len(results) == 1 else ["A", "B", "A less B"])]]
    for name in names:
        classes = [classes[name] for classes in per_class]
        shares = [_percent(part["accuracy"]) for part in classes]
        if len(results) == 1:
            shares.append(_between(classes[0]["interval"]))
        else:
            shares.append(f"{100 * (classes[0]['accuracy'] - classes[1]['accuracy']):+.2f}")
        rows.append([shorten(name), f"{classes[0]['examples']:,}", *shares])
    if len(names) > 60:
        rows[21:-20] = [[f"... {len(names) - 40} more (--json has all)", *[""] * (len(rows[0]) - 1)]]
    return rows


def confusion_text(result: dict) -> str:
    """The confusion matrix if it fits 80 columns, else the commonest confusions."""
    names, matrix = result["class_names"], np.array(result["confusion_matrix"])
    width = max(len(f"{matrix.max()}"), 3) + 1
    name_width = max(map(len, names))
    if 3 + name_width + width * len(names) <= 80:
        lines = ["confusion matrix (rows true, columns predicted, in the same order)"]
        for i, row in enumerate(matrix):
            lines.append(f"{i:2} {names[i]:{name_width}}" + "".join(f"{count or '·':>{width}}" for count in row))
        return "\n".join(lines)
    wrong = matrix * (1 - np.eye(len(names), dtype=int))
    most = [index for index in np.argsort(-wrong, axis=None, kind="stable")[:20] if wrong.flat[index]]
    rows = [["true class", "predicted class", "images", "of the class"]]
    for true, guess in (divmod(int(index), len(names)) for index in most):
        share = matrix[true, guess] / matrix[true].sum()
        rows.append([names[true][:24], names[guess][:24], f"{matrix[true, guess]:,}", f"{share:.1%}"])
    return f"the commonest confusions\n{text_table(rows, left=2)}"
