"""What the scripts have in common on a terminal: help, options, streams, and exit statuses.

Results go to the standard output, all else to the standard error. Exit status: 0; 1 if some inputs failed; 2 for wrong
usage, with one line that says what is wrong; 130 after Ctrl-C; 141 where the reader of results had enough (`| head`).

Nothing here imports the package before the options are read: with PyTorch, that takes seconds, and nobody wants to wait
that long for `--help`. The choices of options are therefore repeated in the scripts; tests/test_cli.py compares them.
"""

import argparse
import contextlib
import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modeling_vit_scratch.data.cuts import Split
    from modeling_vit_scratch.evaluation import Predictor

SOURCES = (
    "transformers", "timm", "torchvision", "jax", "deit", "dino", "dinov2", "dinov2_with_registers", "dinov3", "mae",
    "msn", "ijepa", "clip", "siglip",
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")
SPEED = ("dtype", "compile", "quantize")
SHARE, SEED = 0.1, 42  # finetune.py's own


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Texts as they are written, 80 columns whatever the terminal's width."""

    def __init__(self, prog: str, **kwargs):
        super().__init__(prog, **{"max_help_position": 28, "width": 80, **kwargs})


class OneLineErrors:
    """For an ArgumentParser: wrong usage is one line, with no usage text above it."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {_one_line(message).removesuffix('.')}; --help shows how\n")


class Parser(OneLineErrors, argparse.ArgumentParser):
    """A parser whose `--help` begins with examples.

    Args:
        doc: The script's docstring: one sentence, examples, and what else there is to say, blank lines between.
        usage: One line that begins with the script's name.
    """

    def __init__(self, doc: str, usage: str):
        super().__init__(
            prog=usage.split()[0],
            usage=usage,
            description=describe(doc),
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str):
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        super().error(unknown_option(unknown[1], self) if unknown else message)


def unknown_option(option: str, parser: argparse.ArgumentParser) -> str:
    """What there is to say of an option that a parser does not know."""
    known = [name[2:] for name in parser._option_string_actions if name.startswith("--")]
    longer = [name for name in known if name.endswith(f"_{option[2:]}")]  # --batch_size: of training, or of evaluation
    if len(longer) > 1:
        return f"unknown option {option}; there are {', '.join(f'--{name}' for name in longer)}"
    return f"unknown option {option}; the nearest is --{nearest(option[2:], longer or known)}"


def nearest(name: str, choices: Collection[str]) -> str:
    """The choice that shares most words, then most letters, as `configuration_vit_scratch.nearest` has it."""

    def likeness(choice: str) -> tuple[int, float]:
        words = len(set(name.split("_")) & set(choice.split("_")))
        return words, difflib.SequenceMatcher(None, name, choice).ratio()

    return max(choices, key=likeness)


def describe(doc: str) -> str:
    """A script's docstring, as for `Parser`, with the examples first."""
    summary, examples, *rest = doc.strip().split("\n\n")
    return "\n\n".join([examples, summary, *rest])


def at_least_one(text: str) -> int:
    """An option's whole number, 1 or more."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def share(text: str) -> float:
    """An option's number in (0, 1)."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be in (0, 1), e.g. 0.1")
    return number


def add_source_options(group):
    """Whose a checkpoint is, and which of its revisions."""
    group.add_argument(
        "--source",
        choices=SOURCES,
        metavar="NAME",
        help=f"default: told by its names; {', '.join(SOURCES)}",
    )
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub id")


def add_model_options(group):
    """The options that `load_predictor` reads."""
    add_source_options(group)
    group.add_argument("--labels", metavar="FILE", help="names of its classes: text, one a line, or a JSON list")
    group.add_argument("--device", metavar="NAME", help="'cpu', 'cuda', 'cuda:1', 'mps'; default: an accelerator")
    group.add_argument(
        "--token_merging",
        type=int,
        default=0,
        metavar="R",
        help="patch tokens that each block merges into others like them: faster, less exact; default: 0",
    )


def add_speed_options(group, maps: bool = False):
    """The options that `load_predictor` reads besides, of scripts that classify; only those that `maps` can have."""
    group.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        metavar="NAME",
        help=f"{', '.join(DTYPES)}; default: auto, bfloat16 where the device has fast units for it, which a line says, "
        "else float32",
    )
    if not maps:
        group.add_argument("--compile", action="store_true", help="by torch.compile: a minute first; pays on GPUs")
        group.add_argument(
            "--quantize", choices=("int8",), metavar="int8", help="products in 8 bits, by torchao or ONNX Runtime"
        )


def load_predictor(program: str, arguments: argparse.Namespace, model: str | None) -> "Predictor":
    """The model (None: the packaged one), as the options of `add_model_options` say; a line says how it computes, if
    not in float32.
    """
    from modeling_vit_scratch.conversion import PACKAGED_MODEL
    from modeling_vit_scratch.conversion.processors import read_labels
    from modeling_vit_scratch.evaluation import load_for_inference

    labels = None if arguments.labels is None else read_labels(arguments.labels)
    # A drawing, which has none of these options, is of the model as it is.
    speed = {"dtype": "float32"} | {name: getattr(arguments, name) for name in SPEED if name in arguments}
    predictor = load_for_inference(
        str(PACKAGED_MODEL) if model is None else model,
        arguments.device,
        labels,
        source=arguments.source,
        revision=arguments.revision,
        token_merging=arguments.token_merging,
        **speed,
    )
    if predictor.computes_in != "float32":
        say(program, f"{predictor.name} computes in {predictor.computes_in}.")
    return predictor


def add_split_options(group):
    """The options that `read_split` reads besides `dataset`.

    Without a validation split in the dataset, train and validation are cut as the model's run cut them.
    """
    group.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        metavar="NAME",
        help="train, validation or test; default: test; if there is none, or its labels are hidden, validation; or "
        "the only one",
    )
    group.add_argument("--dataset_config_name", metavar="NAME", help="which of a Hub dataset's configurations")
    group.add_argument("--image_column_name", metavar="NAME", help="found if not named")
    group.add_argument("--label_column_name", metavar="NAME", help="found if not named")
    group.add_argument(
        "--train_val_split",
        type=share,
        metavar="SHARE",
        help="of train that its run held out, where the folder of a model of this package does not say; finetune.py's "
        f"own: {SHARE:g}",
    )
    group.add_argument("--seed", type=int, metavar="N", help=f"likewise, of the run; finetune.py's own: {SEED}")
    group.add_argument(
        "--max_samples", type=at_least_one, metavar="N", help="so many images only, the same share of each class"
    )


def read_split(program: str, arguments: argparse.Namespace, predictors: "Sequence[Predictor]") -> "Split":
    """The split for these models, as the options of `add_split_options` say; what was done is said in a line."""
    from modeling_vit_scratch.data import load_split

    split = load_split(
        arguments.dataset,
        arguments.split,
        arguments.dataset_config_name,
        arguments.image_column_name,
        arguments.label_column_name,
        arguments.max_samples,
        predictors[0].image_hw,
        predictors,
        arguments.train_val_split,
        arguments.seed,
    )
    if split.line:
        say(program, split.line)
    return split


def say(program: str, text: str):
    """Print a line for people on the standard error."""
    print(f"{program}: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def importing(program: str):
    """Around a script's imports that fail where a package does not fit, e.g. a torchvision: one line, and status 2."""
    try:
        yield
    except ImportError as error:
        say(program, str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def run(
    program: str,
    parse: Callable[[Sequence[str] | None], argparse.Namespace],
    function: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
) -> int:
    """The exit status of the function of what is parsed; 2, with one line, if something is wrong with what was given,
    or a package is missing or does not fit.
    """
    try:
        arguments = parse(argv)
        from huggingface_hub import constants as hub_constants
        from huggingface_hub.utils import enable_progress_bars
        from transformers.utils import logging as transformers_logging

        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        logging.getLogger("huggingface_hub").propagate = False  # it prints its lines itself
        transformers_logging.disable_progress_bar()  # of reading weights; downloads and uploads keep theirs
        if hub_constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
            enable_progress_bars()
        status = function(arguments)
        sys.stdout.flush()
        return status
    except (ValueError, OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141  # as shells count it
        say(program, _one_line(str(error)))
        return 2
    except KeyboardInterrupt:
        return 130  # as shells count Ctrl-C


def _nobody_reads() -> bool:
    """Whether the standard output is a pipe that was closed; if so, what is still to be written goes nowhere."""
    try:
        print(flush=True)  # nothing less would tell
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
