"""Classify pictures.

python scripts/predict.py photo.jpg
python scripts/predict.py photos/ "more/*.png" --top_k 3 \\
    --model google/vit-base-patch16-224
python scripts/predict.py photos/ --model vit --json > predictions.json

PICTURE is a file, a folder (its pictures, and those in folders below it) or a
pattern. Pictures are turned upright as their EXIF data says and converted to
the model's channels. Those that cannot be read are named on the standard error
while the others finish.

Exit status: 0; 1 if a picture cannot be read; 2 if the model or an option is
wrong.
"""

import argparse
import json
import sys
from collections.abc import Iterator

from tqdm.auto import tqdm

from modeling_vit_scratch import cli
from modeling_vit_scratch.conversion import PACKAGED_MODEL
from modeling_vit_scratch.data.sources import load_image
from modeling_vit_scratch.evaluation import Predictor
from modeling_vit_scratch.evaluation.inference import find_pictures

PROGRAM = "predict.py"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__, f"{PROGRAM} PICTURE... [--model MODEL] [--option value ...]")
    what = parser.add_argument_group("pictures and model")
    what.add_argument("pictures", metavar="PICTURE", nargs="+", help="file, folder, or pattern such as 'photos/*.jpg'")
    what.add_argument(
        "--model",
        default=str(PACKAGED_MODEL),
        metavar="MODEL",
        help="folder, Hub id, or file of any model convert.py reads; default: the packaged one of CIFAR-10's classes",
    )
    cli.add_model_options(what)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--top_k", type=cli.at_least_one, default=5, metavar="N", help="classes for each picture; default: 5"
    )
    output.add_argument("--json", action="store_true", help="JSON instead of a table")
    output.add_argument(
        "--batch_size", type=cli.at_least_one, default=32, metavar="N", help="pictures at once; default: 32"
    )
    return parser.parse_args(argv)


def predict(
    predictor: Predictor, pictures: list[tuple[str, str | None]], top_k: int, batch_size: int
) -> Iterator[dict]:
    """For each picture, in order: its name, and `predictions` (index, label, probability), or an `error`."""
    names = predictor.class_names
    for start in range(0, len(pictures), batch_size):
        batch, images = [], []
        for name, wrong in pictures[start : start + batch_size]:
            entry = {"picture": name}
            try:
                if wrong:
                    raise ValueError(wrong)
                images.append(load_image(name, predictor.config.num_channels))
            except (ValueError, OSError) as error:
                entry["error"] = str(error)
            batch.append(entry)
        if images:
            probabilities = predictor.probabilities(predictor(predictor.pixels(images)).logits)
            best = iter(zip(*(tensor.tolist() for tensor in probabilities.topk(min(top_k, len(names)))), strict=True))
        for entry in batch:
            if "error" not in entry:
                entry["predictions"] = [
                    {"index": index, "label": names[index], "probability": probability}
                    for probability, index in zip(*next(best), strict=True)
                ]
            yield entry


def print_table(results: list[dict]):
    """80 columns wide at most: long paths lose their beginning, long names their end; `--json` has all of both."""
    rows = [("picture", "class", "probability")]
    for result in results:
        for number, best in enumerate(result.get("predictions", [])):
            label = best["label"] if len(best["label"]) <= 36 else f"{best['label'][:35]}…"
            rows.append((result["picture"] if number == 0 else "", label, f"{best['probability']:11.4f}"))
    name_width = max(len(row[1]) for row in rows)
    room = 80 - 2 - name_width - 2 - len("probability")
    rows = [(path if len(path) <= room else f"…{path[1 - room :]}", *rest) for path, *rest in rows]
    width = max(len(row[0]) for row in rows)
    for picture, name, probability in rows:
        print(f"{picture:{width}}  {name:{name_width}}  {probability}")


def run(arguments: argparse.Namespace) -> int:
    predictor = cli.load_predictor(arguments, arguments.model)
    predictor.require_classifier()
    pictures = list(find_pictures(arguments.pictures))

    results = []
    progress = tqdm(total=len(pictures), unit="picture", delay=2, file=sys.stderr)
    with progress:
        for result in predict(predictor, pictures, arguments.top_k, arguments.batch_size):
            if "error" in result:
                progress.clear()  # tqdm's own write() would leave a bar behind where none was due
                cli.say(PROGRAM, f"{result['picture']}: {result['error']}")
            results.append(result)
            progress.update()
    unread = sum("error" in result for result in results)
    if arguments.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    elif unread < len(results):
        print_table(results)
    return 1 if unread else 0


def main(argv: list[str] | None = None) -> int:
    return cli.run(PROGRAM, run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
