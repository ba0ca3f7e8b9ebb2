"""Train a Vision Transformer on pictures.

python scripts/finetune.py
python scripts/finetune.py --dataset_name path/to/folder
python scripts/finetune.py scripts/recipes/teaching_adamw.yaml
accelerate launch scripts/finetune.py ...

Without options it trains on CIFAR-10, or, where the Hub cannot be reached, on
scikit-learn's digits. A folder has one directory per class. A recipe is a file
of options, which those after it override. The last line is for several GPUs.

Exit status: 0; 1 if the loss diverges or the Hub fails; 2 if the data or an
option is wrong; 130 after Ctrl-C, which saves a checkpoint.
"""

import argparse
import difflib
import sys
from pathlib import Path

import yaml
from accelerate.utils import broadcast_object_list
from transformers import HfArgumentParser

from modeling_vit_scratch import cli
from modeling_vit_scratch.arguments import MASKED, DataArguments, ImageTrainingArguments, ModelArguments
from modeling_vit_scratch.data import DIGITS, default_dataset
from modeling_vit_scratch.hub import HubError
from modeling_vit_scratch.model_card import mask_tokens
from modeling_vit_scratch.pretraining import pretrain
from modeling_vit_scratch.training import finetune

RECIPES = Path(__file__).parent / "recipes"
USUAL = (
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run", "num_train_epochs", "max_steps",
    "time_budget", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "muon_learning_rate", "head_learning_rate", "layer_decay", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "label_smoothing_factor", "ema_decay", "optim", "seed", "use_cpu", "bf16", "torch_compile", "flip_tta",
    "report_to", "push_to_hub", "hub_model_id",
)  # fmt: skip


class _Formatter(cli.HelpFormatter):
    """One spelling of each option, and no list of forty choices in its place."""

    def _format_action_invocation(self, action):
        takes_value = action.nargs != 0
        return f"{action.option_strings[-1 if action.dest == 'help' else 0]}{' VALUE' * takes_value}"


class Parser(cli.OneLineErrors, HfArgumentParser):
    """All options of a run; `--help` shows ours and the usual ones of TrainingArguments, `--help_all` every one."""

    def __init__(self):
        super().__init__(
            (ModelArguments, DataArguments, ImageTrainingArguments),
            prog="finetune.py",
            description=cli.describe(__doc__),
            formatter_class=_Formatter,
            allow_abbrev=False,
            usage="finetune.py [recipe.yaml] [--option value ...]",
        )
        self.add_argument(
            "--help_all", action="help", help="Show every option, also the rare ones of TrainingArguments."
        )
        self._option_string_actions["--help_all"].__class__ = _HelpAll
        ours = {name for group in (ModelArguments, DataArguments) for name in group.__dataclass_fields__}
        self.rare = []
        for action in self._actions:
            if action.dest not in ours and action.dest not in (*USUAL, "help", "help_all"):
                self.rare.append((action, action.help))
                action.help = argparse.SUPPRESS


class _HelpAll(argparse._HelpAction):
    def __call__(self, parser, *args):
        for action, text in parser.rare:
            action.help = text
        super().__call__(parser, *args)


class _UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key given twice instead of keeping the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key) for key, _ in node.value]
        twice = next((key for position, key in enumerate(keys) if key in keys[:position]), None)
        if twice is not None:
            raise ValueError(f"key {twice!r} stands there twice; keep one.")
        return super().construct_mapping(node, deep)


def read_recipe(path: Path, known: set[str]) -> list[str]:
    """A recipe's keys and values as command-line options, so that they are checked as those are.

    Args:
        path: YAML file.
        known: Names of all options.

    Raises:
        ValueError: The file is no YAML mapping, or a key is given twice or unknown; names the nearest known one.
    """
    try:
        recipe = yaml.load(path.read_text(), Loader=_UniqueKeys)  # a SafeLoader
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise ValueError(f"recipe {path}: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"recipe {path}: must hold lines of the form 'option: value'.")
    options = []
    for key, value in recipe.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"recipe {path}: unknown key {key!r}; the nearest is {near!r}.")
        if isinstance(value, dict):
            value = ",".join(f"{name}={part}" for name, part in value.items())
        if value is not None:
            options += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return options


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, ImageTrainingArguments]:
    """The arguments of a run: a recipe's values, which the options on the command line override."""
    parser = Parser()
    known = {action.dest for action in parser._actions} - {"help", "help_all"}
    recipe = Path(argv.pop(0)) if argv and argv[0].endswith((".yaml", ".yml")) else None
    try:
        options = read_recipe(recipe, known) if recipe else []
        model, data, training = parser.parse_args_into_dataclasses([*options, *argv])
        if data.dataset_name is None and data.train_dir is None:
            name = [default_dataset() if training.process_index == 0 else None]
            name = broadcast_object_list(name)[0] if training.world_size > 1 else name[0]
            if recipe is None:  # a run without a recipe is the recipe of its dataset
                recipe = RECIPES / ("digits.yaml" if name == DIGITS else "showcase.yaml")
                argv = [*read_recipe(recipe, known), *argv]
                model, data, training = parser.parse_args_into_dataclasses([*options, *argv])
            data.dataset_name = name
            if name == DIGITS and training.process_index == 0:
                print("CIFAR-10 is neither on the Hub within 10 s nor in the cache: training on scikit-learn's digits.")
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    return model, data, training


def main(argv: list[str] | None = None) -> int:
    arguments = parse(list(sys.argv[1:] if argv is None else argv))
    sys.argv[1:] = mask_tokens(sys.argv[1:])  # W&B sends it
    try:
        result = (pretrain if arguments[0].task == MASKED else finetune)(*arguments)
    except (ValueError, ImportError) as error:  # ImportError: an option, e.g. --optim, needs a package
        print(f"finetune.py: {error}", file=sys.stderr)
        return 2
    except (FloatingPointError, HubError) as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        return 1
    return 0 if result is not None else 130  # 130: stopped by Ctrl-C, as shells count it


if __name__ == "__main__":
    sys.exit(main())
