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
  readme                            those of docs/how_it_works.md, of CIFAR-10

MODEL is a folder, file or Hub id: of this package, or what convert.py reads.
The files written are listed on standard output.

Exit status: 0; 1 if a picture cannot be read or a KIND cannot be drawn; 2 if
the model, the dataset or an option is wrong.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm

from modeling_vit_scratch import cli, plots
from modeling_vit_scratch.data import load_image
from modeling_vit_scratch.inference import Answers, find_pictures
from modeling_vit_scratch.inspection import evenly
from modeling_vit_scratch.metrics import ImageClassificationMetrics

PROGRAM = "plot.py"
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
SAVED = {"curves", "confusion", "per-class"}
README = ("patches", "filters", "positions", "heads", "rollout")
IMAGES = Path(__file__).parent.parent / "docs" / "images"  # of the docs: PNG only, one of each kind, 3 of rollout
EXAMPLES = [str(IMAGES / "examples" / f"{name}.jpg") for name in ("horse", "ship", "bird")]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, with `words` split into `kinds` and `models`, and what cannot be drawn refused."""
    options = cli.Parser(__doc__, f"{PROGRAM} KIND [KIND ...] MODEL [MODEL ...] [--option value ...]")
    options.add_argument("words", nargs="+", metavar="KIND ... MODEL", help="what to draw, then of which model")
    group = options.add_argument_group("pictures")
    group = group.add_mutually_exclusive_group()
    group.add_argument("--images", nargs="+", metavar="PATH", help="pictures, folders of pictures, or patterns")
    group.add_argument("--dataset", metavar="NAME", help="Hub id, folder with one directory per class, or 'digits'")
    group = options.add_argument_group("options of --dataset")
    cli.add_split_options(group)
    cli.add_model_options(options.add_argument_group("options of MODEL"))
    group = options.add_argument_group("what is drawn")
    group.add_argument("--layer", type=int, default=-1, metavar="L", help="of heads, from 1; default: -1, the last")
    group.add_argument("--count", type=cli.at_least_one, default=25, metavar="N", help="of mistakes; default: 25")
    group.add_argument(
        "--max_pictures", type=cli.at_least_one, default=4, metavar="N", help="of patches, rollout, heads; default: 4"
    )
    group.add_argument(
        "--features_seed", type=int, default=0, metavar="N", help="of features: which images, and t-SNE; default: 0"
    )
    group = options.add_argument_group("output")
    group.add_argument("--output", type=Path, metavar="DIR", help="default: plots")
    group.add_argument("--batch_size", type=cli.at_least_one, default=64, metavar="N", help="default: 64")

    args = options.parse_args(argv)
    known = [*FILES, "all", "readme"]
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
    args.all, args.readme = "all" in args.kinds, "readme" in args.kinds
    if args.readme and not args.dataset:
        args.images = args.images or EXAMPLES
    labelled, pictures = args.dataset is not None, args.dataset is not None or args.images is not None
    if args.all:
        args.kinds = [kind for kind in FILES if pictures or kind not in NEED_PICTURES]
        args.kinds = [kind for kind in args.kinds if labelled or kind not in NEED_LABELS]
    elif args.readme:
        args.kinds = list(README)
        args.max_pictures = 3
    args.output = args.output or (IMAGES if args.readme else Path("plots"))
    for kind in args.kinds:
        if kind in NEED_LABELS and not labelled:
            options.error(f"{kind} needs labelled pictures: add --dataset NAME.")
        if kind in NEED_PICTURES and not pictures:
            options.error(f"{kind} needs pictures: add --images PATH, or --dataset NAME.")
    return args


class Sight:
    """A model, its pictures, and what it makes of them.

    Args:
        args: The parsed arguments.

    Raises:
        ValueError: The model or the pictures cannot be had.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.failed = args, 0
        self.predictor = cli.load_predictor(args, args.models[0])
        self.config, self.model = self.predictor.config, self.predictor.model
        self.records, self.pictures, self.titles, self._answers = None, [], [], None
        if args.dataset:
            split = cli.read_split(PROGRAM, args, [self.predictor])
            self.records, self.data_names = split.records, split.class_names
            some = self.records.select(evenly(len(self.records), args.max_pictures))  # folders are sorted by class
            self.pictures = list(self.predictor.pixels(some.images(range(len(some)), self.config.num_channels)))
            self.titles = [self.data_names[label] for label in some.labels]
        elif args.images:
            self._read(list(find_pictures(args.images)))

    def _read(self, files: list[tuple[str, str | None]]):
        for name, wrong in tqdm(files, desc="Reading", unit="image", delay=2, leave=False):
            try:
                if wrong:
                    raise ValueError(wrong)
                self.pictures += self.predictor.pixels([load_image(name, self.config.num_channels)])
            except (ValueError, OSError) as error:
                self.failed += 1
                cli.say(PROGRAM, f"{name}: {error}")
                continue
            title = Path(name).name
            self.titles.append(title if len(title) <= 40 else f"{title[:26]}…{title[-13:]}")
        if not self.pictures:
            raise ValueError(f"none of {len(files)} pictures could be read.")

    def batch(self, indices: range) -> torch.Tensor:
        """Pictures of the split: uint8 (B, C, H, W)."""
        return self.predictor.pixels(self.records.images(indices, self.config.num_channels))

    def __getitem__(self, index: int) -> torch.Tensor:
        """One picture of the split: uint8 (C, H, W)."""
        return self.batch(range(index, index + 1))[0]

    def answers(self) -> Answers:
        """What the model says of every picture of the split."""
        if self._answers is None:
            self._answers = self.predictor.answers(self.records, self.data_names, self.args.batch_size)
        return self._answers

    def judgements(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities (n, classes) and labels (n,) of the split.

        Raises:
            ValueError: The model has no trained classifier, or other classes.
        """
        self.predictor.require_classifier()
        answers = self.answers()
        return answers.probabilities, answers.labels

    @property
    def class_names(self) -> list[str]:
        """Of the labels that `answers` has."""
        return self.predictor.class_names if self.predictor.can_classify else self.data_names

    def look(self, pictures: torch.Tensor):
        """The model's output with attention maps, of a few pictures (B, C, H, W)."""
        return self.predictor(pictures, output_attentions=True)

    def distance(self, most: int = 128) -> torch.Tensor:
        """`attention_distance` over up to 128 pictures, as many as in the paper."""
        some = None if self.records is None else self.records.select(evenly(len(self.records), most))
        n = min(most, len(self.pictures)) if some is None else len(some)
        geometry = self.config.grid_hw, self.config.patch_hw, self.config.num_prefix_tokens
        total = 0
        with tqdm(total=n, desc="Measuring", unit="image", delay=2, leave=False) as bar:
            for start in range(0, n, 8):  # maps are large: 22 MB for each picture of ViT-B/16
                end = min(start + 8, n)
                if some is None:
                    chunk = torch.stack(self.pictures[start:end])
                else:
                    chunk = self.predictor.pixels(some.images(range(start, end), self.config.num_channels))
                total = total + len(chunk) * plots.attention_distance(self.look(chunk).attentions, *geometry)
                bar.update(len(chunk))
        return total / n


def draw(kind: str, args: argparse.Namespace, sight: Sight | None) -> dict[str, plots.Figure]:
    """The figures of a kind, by file name.

    Raises:
        ValueError, OSError: What it is drawn from is missing or wrong.
    """
    name = FILES[kind]
    if kind == "curves":
        runs = args.models
        losses = {plots.LOSSES.get(_saved(run).get("task"), plots.LOSSES["image-classification"]) for run in runs}
        if len(losses) > 1:
            raise ValueError(f"the losses of these runs are not of one kind: {' and '.join(sorted(losses))}.")
        histories = runs[0] if len(runs) == 1 else dict(zip(_labels(runs), runs, strict=True))
        return {name: plots.plot_training_curves(histories, losses.pop())}
    if kind in ("confusion", "per-class"):
        matrix, per_class, names = _results(args, sight)
        if kind == "confusion":
            return {name: plots.plot_confusion_matrix(matrix, names)}
        return {name: plots.plot_per_class_accuracy(per_class, names)}
    config, model = sight.config, sight.model
    embeddings = model.vit.embeddings
    if kind == "filters":
        weight, size = embeddings.patch_embeddings.projection.weight, config.patch_hw
        title = "Patch filters"
        if config.stem_channels:
            weight, size = embeddings.patch_embeddings.stem[0].convolution.weight, (3, 3)
            title = "Kernels of the first convolution"
        return {name: plots.plot_patch_filters(weight, size, title=title)}
    if kind == "positions":
        return {name: plots.plot_position_similarity(embeddings.position_embeddings, config.grid_hw)}
    if kind == "distance":
        N = config.grid_hw[0] * config.grid_hw[1]
        even = plots.attention_distance([torch.ones(1, 1, N, N)], config.grid_hw, config.patch_hw, 0).item()
        return {name: plots.plot_attention_distance(sight.distance(), uniform=even)}
    if kind == "features":
        answers = sight.answers()
        figure = plots.plot_features(answers.features, answers.labels, sight.class_names, seed=args.features_seed)
        return {name: figure}
    if kind == "reliability":
        return {name: plots.plot_reliability(*sight.judgements())}
    if kind == "mistakes":
        return {name: plots.plot_mistakes(sight, *sight.judgements(), sight.class_names, args.count)}

    shown = 1 if args.readme and kind != "rollout" else args.max_pictures
    pictures, titles = sight.pictures[:shown], sight.titles[:shown]
    numbers = [""] if len(pictures) == 1 else [f"_{i + 1}" for i in range(len(pictures))]
    if kind == "patches":
        drawn = [plots.plot_patch_sequence(picture, config.patch_hw) for picture in pictures]
        return {f"{name}{number}": figure for number, figure in zip(numbers, drawn, strict=True)}
    output = sight.look(torch.stack(pictures))
    where = config.grid_hw, config.num_prefix_tokens, config.pooling
    if kind == "rollout":
        maps = plots.patch_map(plots.attention_rollout(output.attentions), *where)
        if sight.predictor.can_classify:
            p, guess = sight.predictor.probabilities(output.logits).max(dim=1)
            answers = [f"{sight.class_names[int(k)]} ({q:.0%})" for k, q in zip(guess, p, strict=True)]
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
    metrics = _saved(args.models[0])
    result = metrics.get("test") or metrics.get("validation", {})
    if "confusion_matrix" not in result:
        raise ValueError(f"{args.models[0]} has no metrics.json with a confusion matrix; add --dataset NAME.")
    return result["confusion_matrix"], list(result["per_class_accuracy"].values()), metrics["dataset"]["class_names"]


def _saved(run: str) -> dict:
    """What a run's metrics.json holds; nothing where there is none."""
    file = Path(run) / "metrics.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _labels(paths: list[str]) -> list[str]:
    """Names of runs: the last parts of their paths, as many as make them differ."""
    parts = [Path(path).parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same run is named twice among {', '.join(paths)}.")


def run(args: argparse.Namespace) -> int:
    saved = set(args.kinds) <= SAVED and not (args.dataset or args.images)
    sight = None if saved else Sight(args)
    args.output.mkdir(parents=True, exist_ok=True)
    failed = 0 if sight is None else sight.failed
    for kind in args.kinds:
        try:
            figures = draw(kind, args, sight)
        except (ValueError, OSError) as error:
            cli.say(PROGRAM, f"{kind}: {error}")
            failed += not (args.all and kind in SAVED)  # a model need not have a run
            continue
        for name, figure in figures.items():
            print(*plots.save_figure(figure, args.output / name, svg=not args.readme), sep="\n", flush=True)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    return cli.run(PROGRAM, run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
