"""Classify pictures with a model of this package, or any that `convert.py` reads.

python scripts/predict.py photo.jpg                                       a picture, by the packaged model
python scripts/predict.py photos/ "more/*.png" --model google/vit-base-patch16-224 --top_k 3
python scripts/predict.py photos/ --model vit --json > predictions.json

PICTURE is a file, a folder (its pictures, and those in folders below it) or a pattern. Pictures are turned upright as
their EXIF data says and converted to the model's channels. Those that cannot be read are named on the standard error
while the others finish. Exit status: 0; 1 if a picture could not be read; 2 if the model or an option is wrong.
"""

import argparse
import glob
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from modeling_vit_scratch import ViTScratchForImageClassification
from modeling_vit_scratch.conversion import (
    FAMILIES,
    PACKAGED_MODEL,
    convert_checkpoint,
    image_processor_for,
    read_labels,
)
from modeling_vit_scratch.data import load_image


def make_parser() -> argparse.ArgumentParser:
    example, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="predict.py",
        usage="predict.py PICTURE... [--model ID_OR_FOLDER] [--option value ...]",
        description=f"{rest.partition(chr(10) * 2)[0]}\n\n{example}\n\n{rest.partition(chr(10) * 2)[2]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what")
    what.add_argument("pictures", metavar="PICTURE", nargs="+", help="File, folder, or pattern such as 'photos/*.jpg'.")
    what.add_argument(
        "--model",
        default=str(PACKAGED_MODEL),
        metavar="ID_OR_FOLDER",
        help="Folder, Hub id, or file of any model convert.py reads. Default: the packaged one (CIFAR-10's classes).",
    )
    what.add_argument(
        "--source", choices=tuple(FAMILIES), help="Where the model comes from. Default: told by its names."
    )
    what.add_argument("--revision", help="Branch, tag or commit of a Hub id.")
    what.add_argument("--labels", metavar="FILE", help="Names of the classes: text, one a line, or a JSON list.")
    output = parser.add_argument_group("output")
    output.add_argument("--top_k", type=int, default=5, help="Classes to show for each picture (default: 5).")
    output.add_argument("--json", action="store_true", help="JSON instead of a table.")
    speed = parser.add_argument_group("speed")
    speed.add_argument("--batch_size", type=int, default=32, help="Pictures at once (default: 32).")
    speed.add_argument("--device", help="'cpu', 'cuda', 'cuda:1', 'mps'. Default: an accelerator if there is one.")
    return parser


def find_pictures(patterns: list[str]) -> Iterator[tuple[str, str | None]]:
    """Paths of pictures in the order given, each with what is wrong if nothing is there."""
    suffixes = Image.registered_extensions()
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = [
                str(file) for file in sorted(path.rglob("*")) if file.suffix.lower() in suffixes and file.is_file()
            ]
            wrong = "the folder holds no pictures"
        elif path.exists():
            found, wrong = [pattern], None
        else:
            found = [name for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
            wrong = "nothing matches the pattern" if glob.has_magic(pattern) else "there is no such file"
        yield from ((name, None) for name in found) if found else ((pattern, wrong),)


@torch.inference_mode()
def predict(
    model: ViTScratchForImageClassification,
    processor,
    pictures: list[tuple[str, str | None]],
    top_k: int,
    batch_size: int,
) -> Iterator[dict]:
    """For each picture, in order: its name, and `predictions` (index, label, probability), or an `error`."""
    config = model.config
    for start in range(0, len(pictures), batch_size):
        batch, images = [], []
        for name, wrong in pictures[start : start + batch_size]:
            entry = {"picture": name}
            try:
                if wrong:
                    raise ValueError(wrong)
                images.append(load_image(name, config.num_channels))
            except (ValueError, OSError) as error:
                entry["error"] = str(error)
            batch.append(entry)
        if images:
            pixels = processor(images=images, return_tensors="pt")["pixel_values"]
            logits = model(pixels.to(model.device, model.dtype)).logits.float()
            several = config.problem_type == "multi_label_classification"
            probabilities = logits.sigmoid() if several else logits.softmax(dim=1)
            best = iter(
                zip(*(tensor.tolist() for tensor in probabilities.topk(min(top_k, config.num_labels))), strict=True)
            )
        for entry in batch:
            if "error" not in entry:
                entry["predictions"] = [
                    {"index": index, "label": label_of(config, index), "probability": probability}
                    for probability, index in zip(*next(best), strict=True)
                ]
            yield entry


def label_of(config, index: int) -> str:
    """The name of a class, or its index where it has none."""
    name = config.id2label.get(index, str(index))
    return str(index) if name == f"LABEL_{index}" else name


def print_table(results: list[dict]):
    rows = [("picture", "class", "probability")]
    for result in results:
        for number, best in enumerate(result.get("predictions", [])):
            rows.append((result["picture"] if number == 0 else "", best["label"], f"{best['probability']:11.4f}"))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for picture, name, probability in rows:
        print(f"{picture:{widths[0]}}  {name:{widths[1]}}  {probability}")


def run(arguments: argparse.Namespace) -> int:
    for name in ("top_k", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} ({getattr(arguments, name)}) must be at least 1.")
    device = arguments.device
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = accelerator.type if accelerator else "cpu"
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {arguments.device!r} cannot be used: {str(error).splitlines()[0]}") from error
    labels = None if arguments.labels is None else read_labels(arguments.labels)
    where = {"source": arguments.source, "revision": arguments.revision}
    model = convert_checkpoint(arguments.model, id2label=labels, **where)
    if not model.config.num_labels or not model.classifier.weight.any():
        raise ValueError(f"{arguments.model} has no trained classifier, so there is nothing to predict with.")
    processor = image_processor_for(arguments.model, model, **where)
    pictures = list(find_pictures(arguments.pictures))

    results = []
    progress = tqdm(total=len(pictures), unit="picture", delay=2, file=sys.stderr)
    with progress:
        for result in predict(model.to(device), processor, pictures, arguments.top_k, arguments.batch_size):
            if "error" in result:
                progress.write(f"predict.py: {result['picture']}: {result['error']}", file=sys.stderr)
            results.append(result)
            progress.update()
    unread = sum("error" in result for result in results)
    if arguments.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    elif unread < len(results):
        print_table(results)
    return 1 if unread else 0


def main(argv: list[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    transformers_logging.disable_progress_bar()
    try:
        return run(arguments)
    except ValueError as error:
        print(f"predict.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
