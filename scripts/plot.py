"""Draw what a model learned and what it sees, as PNG and SVG.

python scripts/plot.py rollout heads runs/my_model --images photo.jpg
python scripts/plot.py all runs/my_model --dataset uoft-cs/cifar10
python scripts/plot.py curves runs/first runs/second --output compared

KIND is one or more of
  filters positions                 of the model alone
  patches rollout heads distance    of pictures (--images or --dataset)
  mistakes reliability features     of a labelled split (--dataset)
  confusion per-class               of a split, or as the run saved them
  curves                            of a run's history.csv; several runs compare
  all                               each of these that the input allows

MODEL is a folder or a Hub id of this package's models, or of a run for curves.
The files written are listed on standard output.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessorPil

import modeling_vit_scratch  # noqa: F401  registers the auto classes
from modeling_vit_scratch import plots
from modeling_vit_scratch.data import LazyImages, collate, decode, load_image, load_raw, load_records

FILES = {
    "filters": "patch_filters",
    "positions": "position_similarity",
    "patches": "patch_sequence",
    "rollout": "attention_rollout",
    "heads": "attention_heads",
    "distance": "attention_distance",
    "mistakes": "mistakes",
    "reliability": "reliability",
    "features": "features",
    "confusion": "confusion_matrix",
    "per-class": "per_class_accuracy",
    "curves": "training_curves",
}
NEED_PICTURES = {"patches", "rollout", "heads", "distance"}
NEED_LABELS = {"mistakes", "reliability", "features"}
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="plot.py",
        usage="plot.py KIND [KIND ...] MODEL [MODEL ...] [--option value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="+", metavar="KIND ... MODEL", help="what to draw, then of which model")
    group = parser.add_argument_group("pictures")
    group = group.add_mutually_exclusive_group()
    group.add_argument("--images", nargs="+", metavar="PATH", help="pictures, or folders of pictures")
    group.add_argument("--dataset", metavar="NAME", help="Hub id, folder with one directory per class, or 'digits'")
    group = parser.add_argument_group("options of --dataset")
    group.add_argument("--split", default="test", choices=("train", "validation", "test"), help="default: test")
    group.add_argument("--dataset_config_name", metavar="NAME", help="which of a Hub dataset's configurations")
    group.add_argument("--image_column_name", metavar="NAME", help="found if not named")
    group.add_argument("--label_column_name", metavar="NAME", help="found if not named")
    group.add_argument("--max_samples", type=_positive, metavar="N", help="use so many pictures only, drawn at random")
    group = parser.add_argument_group("what is drawn")
    group.add_argument("--layer", type=int, default=-1, metavar="L", help="of heads, from 1; default: -1, the last")
    group.add_argument("--count", type=_positive, default=25, metavar="N", help="of mistakes; default: 25")
    group.add_argument(
        "--max_pictures", type=_positive, default=4, metavar="N", help="of patches, rollout and heads; default: 4"
    )
    group.add_argument("--seed", type=int, default=0, help="of features: which pictures, and t-SNE; default: 0")
    group = parser.add_argument_group("output and device")
    group.add_argument("--output", type=Path, default=Path("plots"), metavar="DIR", help="default: plots")
    group.add_argument("--batch_size", type=_positive, default=64, metavar="N", help="default: 64")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, with `words` split into `kinds` and `models`, and what cannot be drawn refused."""
    options = parser()
    args = options.parse_args(argv)
    known = [*FILES, "all"]
    split = next((i for i, word in enumerate(args.words) if word not in known), len(args.words))
    args.kinds, args.models = list(dict.fromkeys(args.words[:split])), args.words[split:]
    if not args.kinds:
        options.error(f"{args.words[0]!r} is no KIND; known are {', '.join(known)}.")
    if not args.models:
        options.error("MODEL is missing: a folder or a Hub id.")
    if len(args.models) > 1 and args.kinds != ["curves"]:
        options.error(
            f"there are {len(args.models)} models ({', '.join(args.models)}); only curves take more than one."
        )
    labelled, pictures = args.dataset is not None, args.dataset is not None or args.images is not None
    args.all = "all" in args.kinds
    if args.all:
        args.kinds = [kind for kind in FILES if pictures or kind not in NEED_PICTURES]
        args.kinds = [kind for kind in args.kinds if labelled or kind not in NEED_LABELS]
    for kind in args.kinds:
        if kind in NEED_LABELS and not labelled:
            options.error(f"{kind} needs labelled pictures: add --dataset NAME.")
        if kind in NEED_PICTURES and not pictures:
            options.error(f"{kind} needs pictures: add --images PATH, or --dataset NAME.")
    return args


class Sight:
    """A model, its processor and its pictures, and what the model makes of them; each is computed once.

    Args:
        args: The parsed arguments.

    Raises:
        ValueError: The model or the pictures cannot be had.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.failed = args, 0
        self.model, self.processor = _load(args.models[0], args.device)
        self.config = self.model.config
        self.dataset, self.pictures, self.titles = None, [], []
        if args.dataset:
            self.dataset, self.class_names = self._split()
            shown = range(min(args.max_pictures, len(self.dataset)))
            self.pictures = [self.dataset[i]["pixel_values"] for i in shown]
            self.titles = [self.class_names[int(self.dataset[i]["labels"])] for i in shown]
        elif args.images:
            self._read(_files(args.images))
        self._answers = None

    def _read(self, files: list[Path]):
        for file in tqdm(files, desc="Reading", unit="image", delay=2, leave=False):
            try:
                image = load_image(file, self.config.num_channels)
            except (ValueError, OSError) as error:
                self.failed += 1
                say(f"{file}: {error}")
                continue
            pixels = self.processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
            self.pictures.append(torch.from_numpy(pixels[0]).round().to(torch.uint8))
            self.titles.append(file.name)
        if not self.pictures:
            raise ValueError(f"none of {len(files)} pictures could be read.")

    def _split(self) -> tuple[torch.utils.data.Dataset, list[str]]:
        args = self.args
        raw = load_raw(args.dataset, args.dataset_config_name, image_size=self.config.image_hw)
        limits = {"max_train_samples": args.max_samples, "max_eval_samples": args.max_samples}
        records, names = load_records(raw, args.image_column_name, args.label_column_name, **limits)
        if args.split not in records:
            raise ValueError(f"there is no split {args.split!r}; {args.dataset} has {', '.join(records)}.")
        records = records[args.split]
        own = [self.config.id2label[i] for i in range(self.config.num_labels)]
        if sorted(own) == sorted(names):  # the same classes, perhaps in another order
            records.labels = torch.tensor([own.index(name) for name in names]).numpy()[records.labels]
            names = own
        elif len(own) == len(names):
            say(f"the model's classes ({own[0]}, ...) have other names than the data's ({names[0]}, ...).")
        else:
            raise ValueError(f"the model has {len(own)} classes, but {args.dataset} has {len(names)}.")
        channels = self.config.num_channels
        return decode(records, self.processor, channels) or LazyImages(records, self.processor, channels), names

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W) to what the model takes, as its image processor does."""
        pixels = pixels.to(self.args.device).float()
        if self.processor.do_rescale:
            pixels = pixels * self.processor.rescale_factor
        if self.processor.do_normalize:
            mean, std = (
                torch.tensor(v, device=pixels.device) for v in (self.processor.image_mean, self.processor.image_std)
            )
            pixels = (pixels - mean[:, None, None]) / std[:, None, None]
        return pixels

    @torch.inference_mode()
    def answers(self) -> dict[str, torch.Tensor]:
        """Of every picture of the split: probabilities (n, classes), features (n, D), labels (n,)."""
        if self._answers is None:
            loader = torch.utils.data.DataLoader(self.dataset, self.args.batch_size, collate_fn=collate)
            probabilities, features, labels = [], [], []
            for batch in tqdm(loader, desc="Classifying", unit="batch", delay=2, leave=False):
                pooled = self.model.vit(self.normalise(batch["pixel_values"])).pooler_output
                logits = self.model.classifier(self.model.pre_logits(pooled))
                probabilities.append(logits.float().softmax(dim=1).cpu())
                features.append(pooled.float().cpu())
                labels.append(batch["labels"])
            parts = {"probabilities": probabilities, "features": features, "labels": labels}
            self._answers = {name: torch.cat(values) for name, values in parts.items()}
        return self._answers

    @torch.inference_mode()
    def look(self, pictures: list[torch.Tensor]):
        """The model's output with attention maps for a few pictures."""
        return self.model(self.normalise(torch.stack(pictures)), output_attentions=True)

    def distance(self, most: int = 128) -> torch.Tensor:
        """`attention_distance` over up to 128 pictures, as many as in the paper."""
        pictures = self.pictures
        if self.dataset is not None:
            pictures = [self.dataset[i]["pixel_values"] for i in range(min(most, len(self.dataset)))]
        geometry = self.config.grid_hw, self.config.patch_hw, self.config.num_prefix_tokens
        total = 0
        chunks = range(0, len(pictures[:most]), 8)  # maps are large: 12 MB for each picture of ViT-B/16
        for start in tqdm(chunks, desc="Measuring", unit="batch", delay=2, leave=False):
            chunk = pictures[start : min(start + 8, most)]
            total = total + len(chunk) * plots.attention_distance(self.look(chunk).attentions, *geometry)
        return total / len(pictures[:most])


def _load(name: str, device: str):
    """A model of this package and its image processor, all weights present."""
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "vit_scratch":
            raise ValueError(f"{name} is a {config.model_type!r} model; convert it with scripts/convert.py first.")
        model, info = AutoModelForImageClassification.from_pretrained(name, output_loading_info=True)
    except OSError as error:
        raise ValueError(f"no model could be loaded from {name}: {str(error).splitlines()[0]}") from error
    wrong = [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]
    if wrong:
        raise ValueError(f"the weights of {name} do not fit: {len(wrong)} are missing or left over, e.g. {wrong[0]}.")
    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError):
        height, width = model.config.image_hw
        processor = ViTImageProcessorPil(size={"height": height, "width": width})
        say(f"{name} has no image processor: taking mean {processor.image_mean} and std {processor.image_std}.")
    return model.eval().to(device), processor


def _files(paths: list[str]) -> list[Path]:
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            if not inside:
                raise ValueError(f"{path} has no pictures ({', '.join(sorted(SUFFIXES))}).")
            files += inside
        else:
            files.append(path)
    return files


def draw(kind: str, args: argparse.Namespace, sight: Sight | None) -> dict[str, plots.Figure]:
    """The figures of a kind, by file name.

    Raises:
        ValueError, OSError: What it is drawn from is missing or wrong.
    """
    name = FILES[kind]
    if kind == "curves":
        runs = args.models
        return {
            name: plots.plot_training_curves(runs[0] if len(runs) == 1 else dict(zip(_labels(runs), runs, strict=True)))
        }
    if kind in ("confusion", "per-class"):
        matrix, per_class, names = _results(args, sight)
        if kind == "confusion":
            return {name: plots.plot_confusion_matrix(matrix, names)}
        return {name: plots.plot_per_class_accuracy(per_class, names)}
    config, model = sight.config, sight.model
    embeddings = model.vit.embeddings
    if kind == "filters":
        return {name: plots.plot_patch_filters(embeddings.patch_embeddings.projection.weight, config.patch_hw)}
    if kind == "positions":
        return {name: plots.plot_position_similarity(embeddings.position_embeddings, config.grid_hw)}
    if kind == "distance":
        N = config.grid_hw[0] * config.grid_hw[1]
        even = plots.attention_distance([torch.ones(1, 1, N, N)], config.grid_hw, config.patch_hw, 0).item()
        return {name: plots.plot_attention_distance(sight.distance(), uniform=even)}
    if kind in NEED_LABELS:
        answers = sight.answers()
        probabilities, labels = answers["probabilities"], answers["labels"]
        if kind == "reliability":
            return {name: plots.plot_reliability(probabilities, labels)}
        if kind == "features":
            return {name: plots.plot_features(answers["features"], labels, sight.class_names, seed=args.seed)}
        images = _Pictures(sight.dataset)
        return {name: plots.plot_mistakes(images, probabilities, labels, sight.class_names, args.count)}

    pictures, titles = sight.pictures[: args.max_pictures], sight.titles[: args.max_pictures]
    numbers = [""] if len(pictures) == 1 else [f"_{i + 1}" for i in range(len(pictures))]
    if kind == "patches":
        drawn = [plots.plot_patch_sequence(picture, config.patch_hw) for picture in pictures]
        return {f"{name}{number}": figure for number, figure in zip(numbers, drawn, strict=True)}
    output = sight.look(pictures)
    where = config.grid_hw, config.num_prefix_tokens, config.pooling
    if kind == "rollout":
        maps = plots.patch_map(plots.attention_rollout(output.attentions), *where)
        p, guess = output.logits.float().softmax(dim=1).max(dim=1)
        titles = [
            f"{t}: the model says {config.id2label[int(k)]} ({q:.0%})" for t, k, q in zip(titles, guess, p, strict=True)
        ]
        return {name: plots.plot_attention_rollout(pictures, maps, titles)}
    L = config.num_hidden_layers
    layer = args.layer - 1 if args.layer > 0 else args.layer + L
    if args.layer == 0 or not 0 <= layer < L:
        raise ValueError(f"--layer ({args.layer}) must be 1 to {L}, or -1 to {-L} from the last.")
    maps = plots.patch_map(output.attentions[layer], *where)
    title = f"Attention of each head, layer {layer + 1} of {L}"
    drawn = [plots.plot_attention_heads(picture, heads, title) for picture, heads in zip(pictures, maps, strict=True)]
    return {f"{name}{number}": figure for number, figure in zip(numbers, drawn, strict=True)}


class _Pictures:
    """The pictures of a dataset by index, without their labels."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.dataset[index]["pixel_values"]


def _results(args: argparse.Namespace, sight: Sight | None):
    """Confusion matrix, per-class accuracy and class names: of the split, or as the run saved them."""
    if sight is not None and sight.dataset is not None:
        answers = sight.answers()
        from modeling_vit_scratch.metrics import ImageClassificationMetrics

        result = ImageClassificationMetrics().compute(
            predictions=answers["probabilities"], references=answers["labels"]
        )
        return result["confusion_matrix"], result["per_class_accuracy"], sight.class_names
    file = Path(args.models[0]) / "metrics.json"
    if not file.is_file():
        raise ValueError(f"there is no {file}; name the pictures with --dataset NAME.")
    metrics = json.loads(file.read_text())
    result = metrics.get("test") or metrics["validation"]
    return result["confusion_matrix"], list(result["per_class_accuracy"].values()), metrics["dataset"]["class_names"]


def _labels(paths: list[str]) -> list[str]:
    """Names of runs: the last parts of their paths, as many as make them differ."""
    parts = [Path(path).parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same run is named twice among {', '.join(paths)}.")


def say(text: str):
    print(f"plot.py: {text}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Draw; 0 if everything was drawn, 1 if something was not, 2 for wrong usage."""
    args = parse(argv)
    try:
        saved = set(args.kinds) <= {"curves", "confusion", "per-class"} and not (args.dataset or args.images)
        sight = None if saved else Sight(args)
        args.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        say(str(error))
        return 2
    failed = 0 if sight is None else sight.failed
    for kind in args.kinds:
        try:
            figures = draw(kind, args, sight)
        except (ValueError, OSError) as error:
            say(f"{kind}: {error}")
            failed += not (args.all and kind in ("curves", "confusion", "per-class"))  # a model need not have a run
            continue
        for name, figure in figures.items():
            print(*plots.save_figure(figure, args.output / name), sep="\n", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
