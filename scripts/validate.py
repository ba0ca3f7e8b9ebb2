"""Measure a model on labelled pictures, or say which of two is better.

python scripts/validate.py runs/showcase uoft-cs/cifar10        one model
python scripts/validate.py runs/a runs/b uoft-cs/cifar10        A against B
python scripts/validate.py vit photos/ --split validation --flip --json

MODEL is a folder, file or Hub id: of this package, or what convert.py reads.
DATASET is a Hub id, a folder with one directory per class, or 'digits'; its
classes are found among the model's by name. Intervals are of 95 % (Wilson's; of
a difference, Tango's); two models are compared on the same pictures (McNemar's
exact test).
--split validation is what the model's run held out of train, where its folder
tells and the data are the same; a line says what was taken.

Exit status: 0; 1 if a picture cannot be read; 2 if the model, the dataset or
an option is wrong.
"""

import argparse
import json
import sys

import numpy as np

from modeling_vit_scratch import cli
from modeling_vit_scratch.evaluation import Predictor
from modeling_vit_scratch.evaluation.inference import Answers, compare, match_classes, measure

PROGRAM = "validate.py"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__, f"{PROGRAM} MODEL [MODEL_B] DATASET [--option value ...]")
    parser.add_argument("words", nargs="+", metavar="MODEL [MODEL_B] DATASET", help="what to measure, and on what")
    data = parser.add_argument_group("data")
    cli.add_split_options(data)
    model = parser.add_argument_group("model")
    cli.add_model_options(model)
    model.add_argument("--flip", action="store_true", help="also with mirror images: the mean of both answers")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="JSON instead of tables")
    output.add_argument("--batch_size", type=cli.at_least_one, default=64, metavar="N", help="default: 64")
    arguments = parser.parse_args(argv)
    *arguments.models, arguments.dataset = arguments.words
    if not 1 <= len(arguments.models) <= 2:
        parser.error(f"one or two models and a dataset are needed, got {' '.join(arguments.words)!r}.")
    return arguments


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def between(interval: tuple[float, float], sign: str = "") -> str:
    low, high = interval
    return f"{100 * low:{sign}.2f} to {100 * high:{sign}.2f}"


def summary_rows(results: list[dict]) -> list[list[str]]:
    """The table of one model, or of two side by side; each has two columns: value and interval.

    Among five classes or fewer the right one is always in the top 5, which says nothing: that stays empty.
    """
    heads = ["value"] if len(results) == 1 else ["A", "B"]
    rows = [["", *(cell for head in heads for cell in (head, "95 % interval"))]]

    def add(name, *cells):
        rows.append([name, *(part for cell in cells for part in cell)])

    def add_accuracies(suffix: str, parts: list[dict]):
        add(f"top-1{suffix}", *((percent(r["accuracy"]), between(r["accuracy_interval"])) for r in parts))
        cells = [
            (percent(r["top5_accuracy"]), between(r["top5_accuracy_interval"]))
            if len(r["class_names"]) > 5
            else ("", "")
            for r in parts
        ]
        if any(value for value, _ in cells):
            add(f"top-5{suffix}", *cells)

    add_accuracies("", results)
    if "flip" in results[0]:
        add_accuracies(", with flip", [r["flip"] for r in results])
    add("mean confidence", *((percent(r["mean_confidence"]), "") for r in results))
    add("calibration error", *((percent(r["expected_calibration_error"]), "") for r in results))
    add("cross-entropy", *((f"{r['loss']:.4f}", "") for r in results))
    add("pictures/s", *((f"{r['pictures_per_second']:,.0f}", "") for r in results))
    add("  with reading", *((f"{r['pictures_per_second_with_reading']:,.0f}", "") for r in results))
    return rows


def print_rows(rows: list[list[str]], left: int = 1):
    """A table: the first `left` columns flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            f"{cell:{'<' if i < left else '>'}{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def class_rows(results: list[dict]) -> list[list[str]]:
    """Accuracy of each class, the first model's best first; of many classes, those at both ends."""
    per_class = [result["per_class"] for result in results]
    names = sorted(per_class[0], key=lambda name: -per_class[0][name]["accuracy"])
    rows = [["class", "pictures", *(["right", "95 % interval"] if len(results) == 1 else ["A", "B", "A less B"])]]
    for name in names:
        classes = [classes[name] for classes in per_class]
        shares = [percent(part["accuracy"]) for part in classes]
        if len(results) == 1:
            shares.append(between(classes[0]["interval"]))
        else:
            shares.append(f"{100 * (classes[0]['accuracy'] - classes[1]['accuracy']):+.2f}")
        rows.append([name if len(name) <= 36 else f"{name[:35]}…", f"{classes[0]['examples']:,}", *shares])
    if len(names) > 60:
        rows[21:-20] = [[f"... {len(names) - 40} more (--json has all)", *[""] * (len(rows[0]) - 1)]]
    return rows


def print_confusion(result: dict, title: str):
    """The confusion matrix if it fits 80 columns, else the commonest confusions."""
    names, matrix = result["class_names"], np.array(result["confusion_matrix"])
    width = max(len(f"{matrix.max()}"), 3) + 1
    name_width = max(map(len, names))
    print()
    if 3 + name_width + width * len(names) <= 80:
        print(f"{title}confusion matrix (rows true, columns predicted, in the same order)")
        for i, row in enumerate(matrix):
            print(f"{i:2} {names[i]:{name_width}}" + "".join(f"{count or '·':>{width}}" for count in row))
        return
    wrong = matrix * (1 - np.eye(len(names), dtype=int))
    most = [index for index in np.argsort(-wrong, axis=None, kind="stable")[:20] if wrong.flat[index]]
    rows = [["true class", "predicted class", "pictures", "of the class"]]
    for true, guess in (divmod(int(index), len(names)) for index in most):
        share = matrix[true, guess] / matrix[true].sum()
        rows.append([names[true][:24], names[guess][:24], f"{matrix[true, guess]:,}", f"{share:.1%}"])
    print(f"{title}the commonest confusions")
    print_rows(rows, left=2)


def print_result(report: dict):
    results = report["models"]
    letters = [f"{letter}: " if len(results) > 1 else "" for letter in "AB"]
    for letter, result in zip(letters, results, strict=False):
        print(f"{letter}{result['model']}")
    n, classes = results[0]["examples"], len(results[0]["per_class"])
    print(f"on {report['dataset']}, split {report['split']}: {n:,} pictures of {classes} classes\n")
    print_rows(summary_rows(results))
    if "comparison" in report:
        print_comparison(report["comparison"])
    print()
    print_rows(class_rows(results))
    for letter, result in zip(letters, results, strict=False):
        print_confusion(result, letter)


def print_comparison(test: dict):
    p = test["p_value"]
    if p < 0.05:
        verdict = f"{'A' if test['difference'] > 0 else 'B'} is better"
    else:
        verdict = "these pictures cannot tell which is better"
    print(
        f"\nright: only A on {test['only_a']:,} pictures, only B on {test['only_b']:,}\n"
        f"A less B: {100 * test['difference']:+.2f} points, 95 % interval {between(test['difference_interval'], '+')}\n"
        f"McNemar's exact test: p = {p:.2g}: {verdict}"
    )


def validate(arguments: argparse.Namespace) -> int:
    predictors = [cli.load_predictor(arguments, model) for model in arguments.models]
    split = cli.read_split(PROGRAM, arguments, predictors)
    for predictor in predictors:  # before the first of them starts
        predictor.require_classifier()
        if predictor.config.problem_type == "multi_label_classification":
            raise ValueError(f"{predictor.name} gives a picture several classes; top-1 says nothing of it.")
        match_classes(split.class_names, predictor.class_names)

    results, answers = [], []
    for predictor in predictors:
        try:
            answers.append(predictor.answers(split.records, split.class_names, arguments.batch_size, arguments.flip))
        except ValueError as error:
            cli.say(PROGRAM, str(error))
            return 1
        results.append(result_of(predictor, answers[-1], arguments.batch_size))
    report = {"dataset": arguments.dataset, **split.to_dict(), "models": results}
    if len(predictors) > 1:
        report["comparison"] = compare(*answers)
    if arguments.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print_result(report)
    return 0


def result_of(predictor: Predictor, answers: Answers, batch_size: int) -> dict:
    """A model's numbers."""
    names = predictor.class_names
    result = {"model": predictor.name, **measure(answers.probabilities, answers.labels, names)}
    if answers.flipped is not None:
        result["flip"] = measure(answers.flipped, answers.labels, names)
    return result | {
        "device": str(predictor.device),
        "pictures_per_second": predictor.throughput(batch_size),
        "pictures_per_second_with_reading": len(answers.labels) / answers.seconds,
    }


def main(argv: list[str] | None = None) -> int:
    return cli.run(PROGRAM, validate, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
