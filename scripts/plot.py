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

MODEL is a folder, file or Hub id: of this package, or what convert.py reads.
The files written are listed on standard output.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm

from modeling_vit_scratch import plots
from modeling_vit_scratch.conversion import convert_checkpoint, image_processor_for
from modeling_vit_scratch.data import load_records
from modeling_vit_scratch.metrics import ImageClassificationMetrics
from modeling_vit_scratch.sources import load_image, load_raw

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
    """A model, its image processor and its pictures, and what the model makes of them.

    Args:
        args: The parsed arguments.

    Raises:
        ValueError: The model or the pictures cannot be had.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.failed = args, 0
        self.model = convert_checkpoint(args.models[0]).to(args.device)
        self.processor = image_processor_for(args.models[0], self.model) if args.images or args.dataset else None
        self.config = self.model.config
        # Classifiers start at zero: one that is still there was never trained, or is not in the checkpoint.
        self.can_classify = any(bool(p.any()) for p in self.model.classifier.parameters())
        self.records, self.pictures, self.titles, self._answers = None, [], [], None
        if args.dataset:
            self._open_split()
            shown = range(min(args.max_pictures, len(self.records)))
            self.pictures = list(self.batch(shown))
            self.titles = [self.class_names[self.records.labels[i]] for i in shown]
        elif args.images:
            self._read(_files(args.images))

    def _read(self, files: list[Path]):
        for file in tqdm(files, desc="Reading", unit="image", delay=2, leave=False):
            try:
                self.pictures += self._process([load_image(file, self.config.num_channels)])
            except (ValueError, OSError) as error:
                self.failed += 1
                say(f"{file}: {error}")
                continue
            self.titles.append(file.name if len(file.name) <= 40 else f"{file.name[:26]}…{file.name[-13:]}")
        if not self.pictures:
            raise ValueError(f"none of {len(files)} pictures could be read.")

    def _open_split(self):
        args = self.args
        raw = load_raw(args.dataset, args.dataset_config_name, image_size=self.config.image_hw)
        limits = {"max_train_samples": args.max_samples, "max_eval_samples": args.max_samples}
        records, names = load_records(raw, args.image_column_name, args.label_column_name, **limits)
        if args.split not in records:
            raise ValueError(f"there is no split {args.split!r}; {args.dataset} has {', '.join(records)}.")
        self.records, self.class_names = records[args.split], names
        own = [self.config.id2label[i] for i in range(self.config.num_labels)]
        if not self.can_classify or own == names:
            return
        if sorted(own) == sorted(names):  # the same classes in another order
            self.records.labels = torch.tensor([own.index(name) for name in names]).numpy()[self.records.labels]
            self.class_names = own
        elif len(own) == len(names):
            say(f"the model's classes ({own[0]}, ...) have other names than the data's ({names[0]}, ...).")
        else:
            raise ValueError(f"the model has {len(own)} classes, but {args.dataset} has {len(names)}.")

    def _process(self, images: list) -> torch.Tensor:
        """Pictures as the model's image processor cuts and resizes them, not yet normalised: uint8 (B, C, H, W)."""
        pixels = self.processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
        return pixels.round().to(torch.uint8)

    def batch(self, indices: range) -> torch.Tensor:
        """Pictures of the split: uint8 (B, C, H, W)."""
        return self._process(self.records.images(indices, self.config.num_channels))

    def __getitem__(self, index: int) -> torch.Tensor:
        """One picture of the split: uint8 (C, H, W)."""
        return self.batch(range(index, index + 1))[0]

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W) to what the model takes."""
        pixels = pixels.to(self.args.device).float()
        if self.processor.do_rescale:
            pixels = pixels * self.processor.rescale_factor
        if self.processor.do_normalize:
            for_channels = (self.processor.image_mean, self.processor.image_std)
            mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in for_channels)
            pixels = (pixels - mean) / std
        return pixels

    @torch.inference_mode()
    def answers(self) -> dict[str, torch.Tensor]:
        """Of every picture of the split: probabilities (n, classes), features (n, D), labels (n,)."""
        if self._answers is None:
            probabilities, features = [], []
            with tqdm(total=len(self.records), desc="Classifying", unit="image", delay=2, leave=False) as bar:
                for start in range(0, len(self.records), self.args.batch_size):
                    pixels = self.batch(range(start, min(start + self.args.batch_size, len(self.records))))
                    pooled = self.model.vit(self.normalise(pixels)).pooler_output
                    logits = self.model.classifier(self.model.pre_logits(pooled))
                    probabilities.append(logits.float().softmax(dim=1).cpu())
                    features.append(pooled.float().cpu())
                    bar.update(len(pixels))
            self._answers = {
                "probabilities": torch.cat(probabilities),
                "features": torch.cat(features),
                "labels": torch.from_numpy(self.records.labels),
            }
        return self._answers

    def judgements(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities (n, classes) and labels (n,) of the split.

        Raises:
            ValueError: The model has no trained classifier.
        """
        if not self.can_classify:
            raise ValueError(f"{self.args.models[0]} has no trained classifier.")
        answers = self.answers()
        return answers["probabilities"], answers["labels"]

    @torch.inference_mode()
    def look(self, pictures: torch.Tensor):
        """The model's output with attention maps, of a few pictures (B, C, H, W)."""
        return self.model(self.normalise(pictures), output_attentions=True)

    def distance(self, most: int = 128) -> torch.Tensor:
        """`attention_distance` over up to 128 pictures, as many as in the paper."""
        n = min(most, len(self.pictures if self.records is None else self.records))
        geometry = self.config.grid_hw, self.config.patch_hw, self.config.num_prefix_tokens
        total = 0
        with tqdm(total=n, desc="Measuring", unit="image", delay=2, leave=False) as bar:
            for start in range(0, n, 8):  # maps are large: 22 MB for each picture of ViT-B/16
                end = min(start + 8, n)
                chunk = torch.stack(self.pictures[start:end]) if self.records is None else self.batch(range(start, end))
                total = total + len(chunk) * plots.attention_distance(self.look(chunk).attentions, *geometry)
                bar.update(len(chunk))
        return total / n


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
        weight, size = embeddings.patch_embeddings.projection.weight, config.patch_hw
        if config.stem_channels:
            weight, size = embeddings.patch_embeddings.stem[0].convolution.weight.flatten(1), (3, 3)
        return {name: plots.plot_patch_filters(weight, size)}
    if kind == "positions":
        return {name: plots.plot_position_similarity(embeddings.position_embeddings, config.grid_hw)}
    if kind == "distance":
        N = config.grid_hw[0] * config.grid_hw[1]
        even = plots.attention_distance([torch.ones(1, 1, N, N)], config.grid_hw, config.patch_hw, 0).item()
        return {name: plots.plot_attention_distance(sight.distance(), uniform=even)}
    if kind == "features":
        answers = sight.answers()
        figure = plots.plot_features(answers["features"], answers["labels"], sight.class_names, seed=args.seed)
        return {name: figure}
    if kind == "reliability":
        return {name: plots.plot_reliability(*sight.judgements())}
    if kind == "mistakes":
        return {name: plots.plot_mistakes(sight, *sight.judgements(), sight.class_names, args.count)}

    pictures, titles = sight.pictures[: args.max_pictures], sight.titles[: args.max_pictures]
    numbers = [""] if len(pictures) == 1 else [f"_{i + 1}" for i in range(len(pictures))]
    if kind == "patches":
        drawn = [plots.plot_patch_sequence(picture, config.patch_hw) for picture in pictures]
        return {f"{name}{number}": figure for number, figure in zip(numbers, drawn, strict=True)}
    output = sight.look(torch.stack(pictures))
    where = config.grid_hw, config.num_prefix_tokens, config.pooling
    if kind == "rollout":
        maps = plots.patch_map(plots.attention_rollout(output.attentions), *where)
        if sight.can_classify:
            p, guess = output.logits.float().softmax(dim=1).max(dim=1)
            answers = [f"{config.id2label[int(k)]} ({q:.0%})" for k, q in zip(guess, p, strict=True)]
            titles = [f"{title}: the model says {answer}" for title, answer in zip(titles, answers, strict=True)]
        return {name: plots.plot_attention_rollout(pictures, maps, titles)}
    L = config.num_hidden_layers
    layer = args.layer - 1 if args.layer > 0 else args.layer + L
    if args.layer == 0 or not 0 <= layer < L:
        raise ValueError(f"--layer ({args.layer}) must be 1 to {L}, or -1 to {-L} from the last.")
    maps = plots.patch_map(output.attentions[layer], *where)
    title = f"Attention of each head, layer {layer + 1} of {L}"
    drawn = [plots.plot_attention_heads(picture, heads, title) for picture, heads in zip(pictures, maps, strict=True)]
    return {f"{name}{number}": figure for number, figure in zip(numbers, drawn, strict=True)}


def _results(args: argparse.Namespace, sight: Sight | None):
    """Confusion matrix, per-class accuracy and class names: of the split, or as the run saved them."""
    if sight is not None and sight.records is not None:
        probabilities, labels = sight.judgements()
        result = ImageClassificationMetrics().compute(predictions=probabilities, references=labels)
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
