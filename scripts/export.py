"""Export a model to ONNX and torch.export, and measure what came out.

python scripts/export.py runs/mine exported
python scripts/export.py runs/mine exported --int8 --dataset uoft-cs/cifar10
python scripts/export.py google/vit-base-patch16-224 vit --formats onnx

MODEL is a folder, file or Hub id: of this package, or what convert.py reads.
OUT becomes a folder of model.onnx, model.pt2 (a torch.export program),
model_int8.onnx (with --int8), and the config.json and preprocessor_config.json
of the model: the names of its classes, and how it takes images. Of an earlier
export into OUT nothing stays.

Each takes `pixel_values`, float32 (batch, channels, height, width), any batch,
and gives `logits` (batch, classes), or `features` (batch, width) if num_labels
is 0 in the model's config; a classifier that was never trained is refused.
Each is run on random images beside the model: a difference above 1e-4 is an
error, save for int8, whose price is what --dataset shows. Times are medians of
calls that take turns, on the CPU.

Exit status: 0; 1, nothing written, if a file does not compute what the model
does; 2 if the model, the dataset or an option is wrong.
"""

import argparse
import json
import sys
from pathlib import Path

import cli

PROGRAM = "export.py"
FORMATS = ("onnx", "program")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__, f"{PROGRAM} MODEL OUT [--option value ...]")
    parser.add_argument("model", metavar="MODEL", help="what to export")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    what = parser.add_argument_group("what is written")
    what.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="NAME",
        help="onnx, program (of torch.export); default: both",
    )  # fmt: skip
    what.add_argument("--opset", type=int, default=20, help="version of ONNX's operators; default: 20")
    what.add_argument("--int8", action="store_true", help="also ONNX with weights and products in 8 bits")
    cli.add_source_options(what)
    data = parser.add_argument_group("accuracy on labelled images")
    data.add_argument("--dataset", metavar="NAME", help="Hub id, folder with one directory per class, or 'digits'")
    cli.add_split_options(data)
    output = parser.add_argument_group("timing and output")
    output.add_argument(
        "--batch_size", type=cli.at_least_one, default=1, metavar="N", help="images at once when timed; default: 1"
    )
    output.add_argument(
        "--repeats", type=cli.at_least_one, default=30, metavar="N", help="timed calls of each; default: 30"
    )
    output.add_argument("--json", action="store_true", help="JSON instead of a table")
    arguments = parser.parse_args(argv)
    if arguments.int8 and "onnx" not in arguments.formats:
        parser.error("--int8 is made of the ONNX file: add onnx to --formats.")
    return arguments


def export(arguments: argparse.Namespace) -> int:
    from modeling_vit_scratch.evaluation import Predictor
    from modeling_vit_scratch.export import ExportDifferenceError, check_formats, export_model, report_text

    check_formats(arguments.formats, arguments.int8)  # before the model is loaded
    predictor = Predictor(arguments.model, "cpu", source=arguments.source, revision=arguments.revision)
    split = None if arguments.dataset is None else cli.read_split(PROGRAM, arguments, [predictor])
    settings = {name: getattr(arguments, name) for name in ("opset", "int8", "batch_size", "repeats")}
    try:
        report = export_model(predictor, arguments.out, arguments.formats, dataset=split, **settings)
    except ExportDifferenceError as error:
        for line in str(error).splitlines():
            cli.say(PROGRAM, line)
        return 1
    print(json.dumps(report, indent=2, ensure_ascii=False) if arguments.json else report_text(report))
    files = sorted(row["file"] for row in report["rows"] if row["file"])
    cli.say(PROGRAM, f"wrote {arguments.out}: {', '.join(files)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return cli.run(PROGRAM, parse, export, argv)


if __name__ == "__main__":
    sys.exit(main())
