"""Classify images.

python scripts/predict.py photo.jpg
python scripts/predict.py photos/ "more/*.png" --top_k 3 \\
    --model google/vit-base-patch16-224
python scripts/predict.py photos/ --model vit --json > predictions.json

IMAGE is a file, a folder (its images, and those in folders below it) or a
pattern. Images are turned upright as their EXIF data says and converted to
the model's channels. Those that cannot be read are named on the standard error
while the others finish.

Exit status: 0; 1 if an image cannot be read; 2 if the model or an option is
wrong.
"""

import argparse
import json
import sys

import cli

PROGRAM = "predict.py"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__, f"{PROGRAM} IMAGE... [--model MODEL] [--option value ...]")
    what = parser.add_argument_group("images and model")
    what.add_argument("images", metavar="IMAGE", nargs="+", help="file, folder, or pattern such as 'photos/*.jpg'")
    what.add_argument(
        "--model",
        metavar="MODEL",
        help="folder, Hub id, or file of any model convert.py reads; default: the packaged one of CIFAR-10's classes",
    )
    cli.add_model_options(what)
    cli.add_speed_options(what)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--top_k", type=cli.at_least_one, default=5, metavar="N", help="classes for each image; default: 5"
    )
    output.add_argument("--json", action="store_true", help="JSON instead of a table")
    output.add_argument(
        "--batch_size", type=cli.at_least_one, default=32, metavar="N", help="images at once; default: 32"
    )
    return parser.parse_args(argv)


def table(results: list[dict]) -> str:
    """80 columns wide at most: long paths lose their beginning, long names their end; `--json` has all of both."""
    from modeling_vit_scratch.evaluation.tables import shorten, text_table

    rows = [("image", "class", "probability")]
    for result in results:
        for number, best in enumerate(result.get("predictions", [])):
            name = result["picture"] if number == 0 else ""
            rows.append((name, shorten(best["label"]), f"{best['probability']:.4f}"))
    room = 80 - 2 - max(len(label) for _, label, _ in rows) - 2 - len("probability")
    rows = [(path if len(path) <= room else f"…{path[1 - room :]}", *rest) for path, *rest in rows]
    return text_table(rows, left=2)


def run(arguments: argparse.Namespace) -> int:
    from tqdm.auto import tqdm

    from modeling_vit_scratch.evaluation.inference import find_images, predict_files

    predictor = cli.load_predictor(PROGRAM, arguments, arguments.model)
    predictor.require_classifier()
    files = list(find_images(arguments.images))

    results = []
    with tqdm(total=len(files), unit="image", delay=2, file=sys.stderr) as progress:
        for result in predict_files(predictor, files, arguments.top_k, arguments.batch_size):
            if "error" in result:
                progress.clear()  # tqdm's own write() would leave a bar behind where none was due
                cli.say(PROGRAM, f"{result['picture']}: {result['error']}")
            results.append(result)
            progress.update()
    unread = sum("error" in result for result in results)
    if arguments.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    elif unread < len(results):
        print(table(results))
    return 1 if unread else 0


def main(argv: list[str] | None = None) -> int:
    return cli.run(PROGRAM, parse, run, argv)


if __name__ == "__main__":
    sys.exit(main())
