"""Measure a model on labelled images, or say which of two is better.

python scripts/validate.py runs/showcase uoft-cs/cifar10        one model
python scripts/validate.py runs/a runs/b uoft-cs/cifar10        A against B
python scripts/validate.py vit photos/ --split validation --flip --json

MODEL is a folder, file or Hub id: of this package, or what convert.py reads.
DATASET is a Hub id, a folder with one directory per class, or 'digits'; its
classes are found among the model's by name. Intervals are of 95 % (Wilson's; of
a difference, Tango's); two models are compared on the same images (McNemar's
exact test).
--split validation is what the model's run held out of train, where its folder
tells and the data are the same; a line says what was taken.

Exit status: 0; 1 if an image cannot be read; 2 if the model, the dataset or
an option is wrong.
"""

import argparse
import json
import sys

import cli

PROGRAM = "validate.py"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__, f"{PROGRAM} MODEL [MODEL_B] DATASET [--option value ...]")
    parser.add_argument("words", nargs="+", metavar="MODEL [MODEL_B] DATASET", help="what to measure, and on what")
    data = parser.add_argument_group("data")
    cli.add_split_options(data)
    model = parser.add_argument_group("model")
    cli.add_model_options(model)
    cli.add_speed_options(model)
    model.add_argument("--flip", action="store_true", help="also with mirror images: the mean of both answers")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="JSON instead of tables")
    output.add_argument("--batch_size", type=cli.at_least_one, default=64, metavar="N", help="default: 64")
    arguments = parser.parse_args(argv)
    *arguments.models, arguments.dataset = arguments.words
    if not 1 <= len(arguments.models) <= 2:
        parser.error(f"one or two models and a dataset are needed, got {' '.join(arguments.words)!r}.")
    return arguments


def validate(arguments: argparse.Namespace) -> int:
    from modeling_vit_scratch.data.records import BadImages
    from modeling_vit_scratch.evaluation import compare_models, evaluate_model, report_text

    predictors = [cli.load_predictor(PROGRAM, arguments, model) for model in arguments.models]
    split = cli.read_split(PROGRAM, arguments, predictors)
    measure = evaluate_model if len(predictors) == 1 else compare_models
    try:
        report = measure(*predictors, split, flip=arguments.flip, batch_size=arguments.batch_size)
    except BadImages as error:
        cli.say(PROGRAM, str(error))
        return 1
    print(json.dumps(report, indent=2, ensure_ascii=False) if arguments.json else report_text(report))
    return 0


def main(argv: list[str] | None = None) -> int:
    return cli.run(PROGRAM, parse, validate, argv)


if __name__ == "__main__":
    sys.exit(main())
