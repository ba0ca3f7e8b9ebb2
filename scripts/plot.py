"""Draw what a model learned and what it sees, as PNG and SVG.

python scripts/plot.py rollout heads runs/my_model --images photo.jpg
python scripts/plot.py all runs/my_model --dataset uoft-cs/cifar10
python scripts/plot.py curves runs/first runs/second --output compared

KIND is one or more of
  filters positions                 of the model alone
  patches rollout heads distance    of images (--images or --dataset)
  mistakes reliability features     of a labelled split (--dataset)
  confusion per-class               of a split, or as the run saved them
  curves                            of a run's history.csv; several runs compare
  all                               each of these that the input allows
  docs                              those of docs/how_it_works.md

MODEL is a folder, file or Hub id: of this package, or what convert.py reads.
The files written are listed on standard output.

Exit status: 0; 1 if an image cannot be read or a KIND cannot be drawn; 2 if
the model, the dataset or an option is wrong.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import cli

if TYPE_CHECKING:
    from modeling_vit_scratch.plots.views import ModelView

PROGRAM = "plot.py"
KINDS = (
    "filters", "positions", "patches", "rollout", "heads", "distance", "mistakes", "reliability", "features",
    "confusion", "per-class", "curves",
)  # fmt: skip
DOCS = ("patches", "filters", "positions", "heads", "rollout")
EXAMPLES = [
    str(Path(__file__).parent.parent / "docs" / "images" / "examples" / f"{name}.jpg")
    for name in ("horse", "ship", "bird")
]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, with `words` split into `kinds` and `models`, and what cannot be drawn refused."""
    options = cli.Parser(__doc__, f"{PROGRAM} KIND [KIND ...] MODEL [MODEL ...] [--option value ...]")
    options.add_argument("words", nargs="+", metavar="KIND ... MODEL", help="what to draw, then of which model")
    group = options.add_argument_group("images")
    group = group.add_mutually_exclusive_group()
    group.add_argument("--images", nargs="+", metavar="PATH", help="images, folders of images, or patterns")
    group.add_argument("--dataset", metavar="NAME", help="Hub id, folder with one directory per class, or 'digits'")
    group = options.add_argument_group("options of --dataset")
    cli.add_split_options(group)
    cli.add_model_options(options.add_argument_group("options of MODEL"))
    group = options.add_argument_group("what is drawn")
    text = "of heads and of mixed rotary positions, from 1; default: -1, the last"
    group.add_argument("--layer", type=int, default=-1, metavar="L", help=text)
    group.add_argument("--count", type=cli.at_least_one, default=25, metavar="N", help="of mistakes; default: 25")
    group.add_argument(
        "--max_pictures", type=cli.at_least_one, default=4, metavar="N", help="of patches, rollout, heads; default: 4"
    )
    group.add_argument(
        "--features_seed", type=int, default=0, metavar="N", help="of features: which images, and t-SNE; default: 0"
    )
    group = options.add_argument_group("output")
    group.add_argument("--output", type=Path, default=Path("plots"), metavar="DIR", help="default: plots")
    group.add_argument("--batch_size", type=cli.at_least_one, default=64, metavar="N", help="default: 64")

    args = options.parse_args(argv)
    known = [*KINDS, "all", "docs"]
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
    args.all, args.docs = "all" in args.kinds, "docs" in args.kinds
    if args.docs and not args.dataset:
        args.images = args.images or EXAMPLES
    from modeling_vit_scratch.plots.figures import NEED_IMAGES, NEED_LABELS

    labelled, images = args.dataset is not None, args.dataset is not None or args.images is not None
    if args.all:
        args.kinds = [kind for kind in KINDS if images or kind not in NEED_IMAGES]
        args.kinds = [kind for kind in args.kinds if labelled or kind not in NEED_LABELS]
    elif args.docs:  # PNG only, one of each kind, three of rollout
        args.kinds = list(DOCS)
        args.max_pictures = 3
    for kind in args.kinds:
        if kind in NEED_LABELS and not labelled:
            options.error(f"{kind} needs labelled images: add --dataset NAME.")
        if kind in NEED_IMAGES and not images:
            options.error(f"{kind} needs images: add --images PATH, or --dataset NAME.")
    return args


def load_view(args: argparse.Namespace) -> tuple["ModelView", int]:
    """The model with its images, as the options say, and the number of images that could not be read."""
    from modeling_vit_scratch.plots.views import ModelView

    predictor = cli.load_predictor(PROGRAM, args, args.models[0])
    split = cli.read_split(PROGRAM, args, [predictor]) if args.dataset else None
    unread = []

    def leave_out(name: str, wrong: str):
        unread.append(name)
        cli.say(PROGRAM, f"{name}: {wrong}")

    view = ModelView(predictor, args.images or (), split, args.max_pictures, args.batch_size, leave_out)
    return view, len(unread)


def run(args: argparse.Namespace) -> int:
    from modeling_vit_scratch import plots
    from modeling_vit_scratch.plots.figures import SAVED, Choices, draw_figure

    saved = set(args.kinds) <= SAVED and not (args.dataset or args.images)
    view, failed = (None, 0) if saved else load_view(args)
    args.output.mkdir(parents=True, exist_ok=True)
    for kind in args.kinds:
        images = 1 if args.docs and kind != "rollout" else args.max_pictures
        choices = Choices(args.layer, args.count, images, args.features_seed)
        try:
            figures = draw_figure(kind, view, args.models, choices)
        except (ValueError, OSError) as error:
            cli.say(PROGRAM, f"{kind}: {error}")
            failed += not (args.all and kind in SAVED | {"positions"})  # a model need not have a run, nor positions
            continue
        for name, figure in figures.items():
            print(*plots.save_figure(figure, args.output / name, svg=not args.docs), sep="\n", flush=True)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    return cli.run(PROGRAM, parse, run, argv)


if __name__ == "__main__":
    sys.exit(main())
