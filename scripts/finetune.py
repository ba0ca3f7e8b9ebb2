"""Train a Vision Transformer on images.

python scripts/finetune.py
python scripts/finetune.py --dataset_name path/to/folder
python scripts/finetune.py scripts/recipes/teaching_adamw.yaml
accelerate launch scripts/finetune.py ...

Without options it trains on CIFAR-10, or, where the Hub cannot be reached, on
scikit-learn's digits. A folder has one directory per class. A recipe is a file
of options, which those after it override. The last line is for several GPUs.

Whoever names no recipe and chooses no model (--preset, --config_overrides,
--image_size, --model_name_or_path, --task) gets settings that suit the data:
CIFAR-10 and digits those of their recipes, other data those that go with their
number of images and their size. Otherwise, what is not given is as --help_all
shows. The summary says which it was.

Exit status: 0; 1 if the loss diverges, a checkpoint cannot be saved, another
process of the run has ended, or the Hub fails; 2 if the data or an option is
wrong; 130 after Ctrl-C, SIGTERM or SIGUSR1, which save a checkpoint.
"""

import argparse
import re
import sys
from pathlib import Path

import cli
import yaml

with cli.importing("finetune.py"):
    from accelerate.utils import broadcast_object_list
    from transformers import HfArgumentParser

    from modeling_vit_scratch.data.sources import CIFAR10, DIGITS, default_dataset
    from modeling_vit_scratch.hub import HubError, mask_tokens
    from modeling_vit_scratch.training import DataArguments, ImageTrainingArguments, ModelArguments, finetune, pretrain
    from modeling_vit_scratch.training.arguments import MASKED
    from modeling_vit_scratch.training.defaults import advice, choose_settings, look_at
    from modeling_vit_scratch.training.output import remove_if_empty
    from modeling_vit_scratch.training.processes import RunLost, say_lost

RECIPES = Path(__file__).parent / "recipes"
USUAL = (
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run", "num_train_epochs", "max_steps",
    "time_budget", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "muon_learning_rate", "head_learning_rate", "layer_decay", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "label_smoothing_factor", "ema_decay", "optim", "seed", "use_cpu", "bf16", "torch_compile", "flip_tta",
    "report_to", "push_to_hub", "hub_model_id",
)  # fmt: skip


# The recipe of a dataset, by its name; it stands beside this script's other recipes.
RECIPE_OF = {CIFAR10: "showcase.yaml", DIGITS: "digits.yaml"}
# Options that choose a model; with one of these, no settings are chosen by the data.
CHOOSE_THE_MODEL = {"task", "model_name_or_path", "preset", "config_overrides", "image_size"}
# Options of a recipe -> those on the command line that put them out of force: another way to say how long the run is,
# or a trained model, which has its architecture.
_LENGTHS = ("num_train_epochs", "max_steps", "time_budget")
DISPLACED_BY = {way: tuple(other for other in _LENGTHS if other != way) for way in _LENGTHS}
DISPLACED_BY |= dict.fromkeys(("preset", "config_overrides"), ("model_name_or_path",))
# The same for settings chosen by the data: any option of the user wins over them.
_MEASURED = ("eval_strategy", "eval_steps", "save_strategy", "save_steps")
UNNAMED_DISPLACED_BY = DISPLACED_BY | dict.fromkeys(_MEASURED, _MEASURED)
UNNAMED_DISPLACED_BY |= {"muon_learning_rate": ("optim",), "bf16": ("fp16",), "augment_until": ("rand_augment",)}


class _Formatter(cli.HelpFormatter):
    """Show one spelling per option, VALUE instead of its choices, and its default where its text does not."""

    def _get_help_string(self, action):
        default = getattr(action.default, "value", action.default)
        if default in (None, argparse.SUPPRESS, [], {}) or "default" in action.help.lower():
            return action.help
        return f"{action.help} Default: {str(default).replace('%', '%%')}."

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


def read_recipe(path: Path, known: set[str]) -> dict:
    """A recipe's options and their values.

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
    for key in recipe:
        if key not in known:
            raise ValueError(f"recipe {path}: unknown key {key!r}; the nearest is {cli.nearest(str(key), known)!r}.")
    return recipe


def as_options(settings: dict) -> list[str]:
    """Settings as on a command line, so that they are checked as those are."""
    options = []
    for key, value in settings.items():
        if isinstance(value, dict):
            value = ",".join(f"{name}={part}" for name, part in value.items())
        if value is not None:
            options += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return options


def without_displaced(settings: dict, given: set[str], displaced_by: dict[str, tuple[str, ...]]) -> dict:
    """The settings, without those that an option on the command line puts out of force."""
    return {key: value for key, value in settings.items() if not given & set(displaced_by.get(key, ()))}


def settings_by_data(model: ModelArguments, data: DataArguments, seed: int, known: set[str]) -> tuple[dict, str]:
    """The settings that suit the data, and where they come from, in words.

    Raises:
        ValueError: The data cannot be used.
    """
    if data.dataset_name in RECIPE_OF:
        recipe = RECIPES / RECIPE_OF[data.dataset_name]
        return read_recipe(recipe, known), f"those of scripts/recipes/{recipe.name}, which is made for this dataset"
    if data.streaming:
        return {}, "as given; the rest are the defaults of --help_all, for a stream does not tell its size"
    if not 0 < data.train_val_split < 1:
        return {}, ""  # refused when the data are loaded, in its own words
    look = look_at(model, data, seed)
    return choose_settings(look), f"by the data: {look}\n{advice(look)}"


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, ImageTrainingArguments]:
    """The arguments of a run: a recipe's values, or those that suit the data, which the command line overrides.

    Raises:
        ValueError: The data cannot be used.
    """
    # Parsed twice: first to learn what the data are, then with the settings that these call for.
    parser = Parser()
    known = {action.dest for action in parser._actions} - {"help", "help_all"}
    recipe = Path(argv.pop(0)) if argv and argv[0].endswith((".yaml", ".yml")) else None
    options = [word.partition("=")[0] for word in argv if word.startswith("--")]
    for option in options:
        if option not in parser._option_string_actions:
            parser.error(cli.unknown_option(option, parser))
    given = {option[2:].replace("-", "_") for option in options}
    try:
        settings = without_displaced(read_recipe(recipe, known), given, DISPLACED_BY) if recipe else {}
        model, data, training = parser.parse_args_into_dataclasses([*as_options(settings), *argv])
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    for option in ("validation_dir", "test_dir"):
        if getattr(data, option) and data.train_dir is None and data.dataset_name is None:
            parser.error(f"{option} goes with --train_dir")
    if data.dataset_name is None and data.train_dir is None:
        name = [default_dataset() if training.process_index == 0 else None]
        name = broadcast_object_list(name)[0] if training.world_size > 1 else name[0]
        argv = ["--dataset_name", name, *argv]
        if name == DIGITS and training.process_index == 0:
            print("CIFAR-10 is neither on the Hub within 10 s nor in the cache: training on scikit-learn's digits.")
        data.dataset_name = name
    origin = f"those of {recipe}" if recipe else training.settings_from
    if not (recipe or given & CHOOSE_THE_MODEL):
        with training.main_process_first(desc="looking at the data"):
            settings, origin = settings_by_data(model, data, training.seed, known)
        settings = without_displaced(settings, given, UNNAMED_DISPLACED_BY)
    try:
        model, data, training = parser.parse_args_into_dataclasses([*as_options(settings), *argv])
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    training.settings_from = origin
    return model, data, training


def without_traceback(error: Exception) -> str:
    """What an error says, also one that torch passes on from a process that reads images, with all that led there."""
    text = str(error)
    if "Original Traceback" not in text:
        return text
    beginnings = list(re.finditer(rf"^(\w+\.)*{type(error).__name__}: ", text, re.MULTILINE))
    return text[beginnings[-1].end() :].strip() if beginnings else text.strip().splitlines()[-1]


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    sys.argv[1:] = mask_tokens(sys.argv[1:])  # W&B sends it
    arguments = None
    try:
        arguments = parse(argv)
        result = (pretrain if arguments[0].task == MASKED else finetune)(*arguments)
    except (ValueError, ImportError) as error:  # ImportError: an option, e.g. --optim, needs a package
        print(f"finetune.py: {without_traceback(error)}", file=sys.stderr)
        return 2
    except (FloatingPointError, HubError, RunLost) as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        lost = arguments and say_lost(error, arguments[2])
        if not lost:
            raise
        print(f"finetune.py: {lost}", file=sys.stderr)
        return 1
    finally:
        if arguments:
            remove_if_empty(arguments[2])
    return 0 if result is not None else 130  # 130: stopped by Ctrl-C, as shells count it


if __name__ == "__main__":
    sys.exit(main())
