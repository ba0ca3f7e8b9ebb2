"""What a folder on the Hub must hold, and must not: all of it is checked here, before anything is sent."""

import ast
import fnmatch
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 exports it only with torchvision

from .. import modeling_vit_scratch as modeling
from ..configuration_vit_scratch import AUTO_MAP, ViTScratchConfig
from .masking import redact
from .model_card import read_json

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# Left out of a push, by name (that of a folder ends in a slash), with the reason that is shown.
LEFT_OUT = {
    ".*": "hidden", "*checkpoint-*/": "a checkpoint", "runs/": "logs", "logs/": "logs", "wandb/": "logs",
    "*.log": "a log", "events.out.tfevents*": "a log", "training_args.bin": "training state",
    "trainer_state.json": "training state", "optimizer*": "training state", "scheduler.pt": "training state",
    "scaler.pt": "training state", "rng_state*": "training state", "__pycache__/": "bytecode", "*.pyc": "bytecode",
    "samples.png": "training images", "*.tmp": "a temporary file", "*.lock": "a temporary file",
}  # fmt: skip
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}
TEXT_SUFFIXES = {".json", ".jsonl", ".md", ".csv", ".txt", ".py", ".yaml", ".yml"}
MOST_TENSORS = 8  # that a refusal names


class FolderError(ValueError):
    """A folder that must not be pushed; `problems` lists every reason."""

    def __init__(self, folder: Path, problems: list[str]):
        self.problems = problems
        super().__init__(
            f"{folder} was not pushed; nothing was sent. To mend:\n" + "\n".join(f"  - {p}" for p in problems)
        )


@dataclass(frozen=True)
class Contents:
    """What a push of a folder sends, and what it leaves out with the reason; paths relative to the folder."""

    files: list[str]
    left_out: dict[str, str]


def list_folder(folder: str | Path) -> Contents:
    """The files of a folder that a push sends, and those it leaves out: checkpoints, training state, logs, hidden."""
    files, left_out = [], {}
    for root, folders, names in os.walk(folder):
        inside = Path(root).relative_to(folder)
        for name in sorted([*names, *(f"{name}/" for name in folders)]):
            path = (inside / name).as_posix()
            patterns = [p for p in LEFT_OUT if p == ".*" or p.endswith("/") == name.endswith("/")]
            reason = next((LEFT_OUT[pattern] for pattern in patterns if fnmatch.fnmatch(name, pattern)), None)
            if reason and name.endswith("/"):
                left_out[f"{path}/"] = reason
                folders.remove(name[:-1])
            elif reason:
                left_out[path] = reason
            elif not name.endswith("/"):
                files.append(path)
        folders.sort()
    return Contents(files, left_out)


def check_folder(folder: str | Path, token: str | None = None) -> Contents:
    """Refuse a folder that would not load from the Hub, or that must not be seen there. Sends nothing.

    Args:
        folder: A folder as `save_pretrained` and the training write it, with its model card.
        token: A token that must not stand in any of the files; whatever looks like one is refused too.

    Returns:
        What a push sends and what it leaves out.

    Raises:
        FolderError: Everything that is missing or wrong, each with the mend.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FolderError(folder, ["it is not a folder."])
    contents = list_folder(folder)
    config, problems = _read_config(folder)
    problems += _wrong_in_code(folder, config)
    problems += _wrong_in_weights(folder, config)
    problems += _wrong_in_processor(folder, config)
    problems += _wrong_in_card(folder)
    problems += _wrong_in_contents(folder, contents.files, token)
    if problems:
        raise FolderError(folder, problems)
    return contents


def _read_config(folder: Path) -> tuple[ViTScratchConfig | None, list[str]]:
    """The config, if it can be read, and what is wrong in it."""
    try:
        content = read_json(folder / "config.json")
    except ValueError as error:
        return None, [str(error)]
    if content.get("model_type") != ViTScratchConfig.model_type:
        return None, [f"config.json: model_type is {content.get('model_type')!r}, not {ViTScratchConfig.model_type!r}."]
    problems = []
    auto_map = content.get("auto_map")
    missing = [key for key in AUTO_MAP if not isinstance(auto_map, dict) or key not in auto_map]
    if missing:
        problems.append(f"config.json: auto_map lacks {', '.join(missing)}; save the model anew with save_pretrained.")
    architecture = (content.get("architectures") or [None])[0]
    if not (isinstance(architecture, str) and hasattr(modeling, architecture)):
        problems.append(f"config.json: architectures names {architecture!r}, which is no model of this package.")
    try:
        return ViTScratchConfig.from_pretrained(folder), problems
    except Exception as error:
        return None, [*problems, f"config.json: {error}"]


def _wrong_in_code(folder: Path, config: ViTScratchConfig | None) -> Iterator[str]:
    """Every class of the auto_map stands in a file of the folder, which parses and finds its relative imports there."""
    classes = {}  # of each file: its classes' names, or None if it cannot be read
    for key, reference in (config.auto_map if config is not None else AUTO_MAP).items():
        if not isinstance(reference, str) or reference.count(".") != 1 or "--" in reference:
            yield (
                f"config.json: auto_map's {key} is {reference!r}, not a file of this folder and a class in it; "
                "save the model anew with save_pretrained."
            )
            continue
        module, class_name = reference.split(".")
        if module not in classes:
            classes[module] = yield from _read_module(folder, f"{module}.py")
        if classes[module] is not None and class_name not in classes[module]:
            yield f"{module}.py: there is no class {class_name}, which auto_map's {key} names."


def _read_module(folder: Path, name: str) -> Generator[str, None, set[str] | None]:
    """Yields what is wrong in a file of code; returns the names of its classes, or None if it cannot be read."""
    path = folder / name
    if not path.is_file():
        yield f"{name} is missing: the model's code; save the model anew with save_pretrained."
        return None
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        yield f"{name} is not Python: {error}."
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            needed = (node.module or "").split(".")[0]
            if node.level > 1 or not needed or not (folder / f"{needed}.py").is_file():
                yield f"{name}, line {node.lineno}: the import finds nothing in this folder."
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def _wrong_in_weights(folder: Path, config: ViTScratchConfig | None) -> list[str]:
    """The tensors are those of the model that the config describes; only the heads of the files are read."""
    index = folder / WEIGHTS_INDEX
    shards, problems, found = [WEIGHTS], [], {}
    if not (folder / WEIGHTS).is_file():
        if not index.is_file():
            return [f"{WEIGHTS} is missing: the weights; save the model with save_pretrained."]
        try:
            shards = sorted(set(read_json(index)["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            return [f"{index.name}: no usable weight_map ({error})."]
    elif index.is_file():
        problems.append(f"{WEIGHTS} and {index.name} are both here; loading would use the first: remove one.")
    if getattr(config, "quantization_config", None) is not None:
        problems.append("the weights are quantised, which most libraries cannot read: push the model it was made of.")
        return problems
    for shard in shards:
        try:
            with safe_open(folder / shard, framework="pt") as tensors:
                found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            problems.append(f"{shard} is not a readable safetensors file: {error}.")
    model_class = getattr(modeling, ((config and config.architectures) or [""])[0], None)
    if problems or model_class is None:  # the latter is told by the check of the config
        return problems
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in model_class(config).state_dict().items()}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            problems.append(f"weights: {name} {expected[name]} is missing.")
        elif name not in expected:
            problems.append(f"weights: {name} {found[name]} has no place in the model that config.json describes.")
        elif found[name] != expected[name]:
            problems.append(f"weights: {name} is {found[name]}, but config.json says {expected[name]}.")
    more = len(problems) - MOST_TENSORS
    return problems[:MOST_TENSORS] + [f"weights: {more} more tensors do not fit."] * (more > 0)


def _wrong_in_processor(folder: Path, config: ViTScratchConfig | None) -> list[str]:
    """The processor loads, and makes of an image what the model takes."""
    name = "preprocessor_config.json"
    if not (folder / name).is_file():
        return [f"{name} is missing: how images become pixels; save it with processor.save_pretrained."]
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
    except Exception as error:
        return [f"{name}: {_in_short(error)}"]
    if config is None or config.num_channels not in (1, 3):
        return []
    image = Image.new("L" if config.num_channels == 1 else "RGB", (57, 43))
    expected = (1, config.num_channels, *config.image_hw)
    try:
        shape = tuple(processor(image, return_tensors="pt")["pixel_values"].shape)
    except Exception as error:
        return [f"{name}: the processor fails on an image: {_in_short(error)}"]
    if shape != expected:
        return [f"{name}: an image becomes {shape}, but the model takes {expected}; set the processor's size."]
    return []


def _wrong_in_card(folder: Path) -> list[str]:
    path = folder / "README.md"
    if not path.is_file():
        return ["README.md is missing: the model card; make one with write_model_card."]
    try:
        card = ModelCard.load(path)
    except Exception as error:
        return [f"README.md: its YAML head cannot be read: {_in_short(error)}"]
    if not card.data.to_dict() or not card.text.strip():
        return ["README.md has no YAML head, or no text below it; make one with write_model_card."]
    return []


def _wrong_in_contents(folder: Path, files: list[str], token: str | None) -> Iterator[str]:
    """No pickle, no token, nothing unreadable among what would be sent."""
    for name in files:
        path = folder / name
        try:
            with path.open("rb") as file:
                content = file.read(-1 if path.suffix in TEXT_SUFFIXES else 2)
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror}."
            continue
        begins_as_pickle = content[:1] == b"\x80" and content[1:2] in b"\x02\x03\x04\x05"
        if path.suffix in PICKLE_SUFFIXES or (path.suffix != ".safetensors" and begins_as_pickle):
            yield f"{name} is a pickle, which can run code on loading; save tensors as safetensors, or move it."
        if path.suffix in TEXT_SUFFIXES:
            lines = content.decode("utf-8", errors="replace").split("\n")
            for number, line in enumerate(lines, 1):
                if redact(line, token) != line:
                    yield f"{name}, line {number}: this looks like a token; remove it, and revoke it if it was real."
                    break


def _in_short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
