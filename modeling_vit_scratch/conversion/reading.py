"""Files, folders and Hub ids opened: named tensors and what stands beside them."""

import json
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from ..configuration_vit_scratch import ViTScratchConfig
from .layouts import SUFFIXES, WEIGHT_FILES, WRAPPERS

logger = logging.getLogger(__package__)


@dataclass
class Checkpoint:
    """Tensors by their own names, and what lies beside them."""

    tensors: Mapping[str, Any]
    title: str
    config: dict = field(default_factory=dict)
    path: Path | None = None
    wrapper: str | None = None


class _SafetensorsFiles(Mapping):
    """Tensors of .safetensors files, each read when it is asked for, so that memory holds few of them twice."""

    def __init__(self, paths: list[Path]):
        self.files = {}
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    self.files.update(dict.fromkeys(file.keys(), path))
            except SafetensorError as error:
                raise ValueError(f"{path} is no safetensors file: {error}.") from error

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self):
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def _read_torch(path: Path, mmap: bool) -> dict:
    try:
        mmap = mmap and zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(
            f"{path} holds more than tensors{f' ({found[1]})' if found else ''}, and nothing else is unpickled; "
            "where you trust it, load it and save its state dict."
        ) from error
    except Exception as error:  # torn and foreign files fail in many ways
        if zipfile.is_zipfile(path) and any(
            name.endswith("constants.pkl") for name in zipfile.ZipFile(path).namelist()
        ):
            raise ValueError(
                f"{path} is a program (TorchScript), not tensors; where you trust it, save those that it holds: "
                "torch.save(torch.jit.load(path).state_dict(), 'weights.pt')."
            ) from error
        raise ValueError(f"{path} is no checkpoint that torch can read: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """The first line of an error's text, or its name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read_npz(path: Path) -> Mapping:
    try:
        arrays = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no .npz file of arrays: {error}") from error
    if not isinstance(arrays, Mapping):
        raise ValueError(f"{path} is one array, not a .npz file of named arrays.")
    return arrays


def _read_file(path: Path, mmap: bool = False) -> Mapping:
    if path.name.endswith(".index.json"):
        files = sorted({path.parent / name for name in read_json(path).get("weight_map", {}).values()})
        if all(file.suffix == ".safetensors" for file in files):
            return _SafetensorsFiles(files)
        return {name: tensor for file in files for name, tensor in _read_torch(file, mmap).items()}
    if path.suffix == ".safetensors":
        return _SafetensorsFiles([path])
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix in SUFFIXES:
        return _read_torch(path, mmap)
    raise ValueError(f"{path} is no checkpoint by its name; known are {', '.join(SUFFIXES)}.")


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return content


def _weights_in(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.name != "training_args.bin")
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise ValueError(f"{folder} must hold one file of weights, found {found}; name the file itself.")
    return files[0]


class _DownloadBar(tqdm):
    """Of a download that takes more than two seconds; shown where transformers' own bars are switched off, too."""

    def __init__(self, *args, name: str | None = None, **kwargs):
        super().__init__(*args, **{**kwargs, "delay": 2})


def _download(repo_id: str, **hub) -> Path:
    """Fetch config, processor and weights of a Hub model, or find them in the cache; the folder they lie in."""
    unreachable: list[Exception] = []
    try:  # one question, asked once: a download asks for half a minute where there is no network
        HfApi().model_info(repo_id, revision=hub.get("revision"), token=hub.get("token"), timeout=10)
    except HfHubHTTPError:  # an answer: the downloads say what is wrong
        pass
    except Exception as error:  # no network, no answer, or offline by choice
        unreachable.append(error)

    def get(name: str) -> Path | None:
        try:
            settings = {"local_files_only": bool(unreachable), "tqdm_class": _DownloadBar}
            return Path(hf_hub_download(repo_id, name, **settings, **hub))
        except LocalEntryNotFoundError as error:  # no answer, and not in the cache; ask no more, only look
            unreachable.append(error)
        except EntryNotFoundError:
            pass
        return None

    try:
        found = [path for path in map(get, ("config.json", "preprocessor_config.json")) if path]
        if (
            found
            and found[0].name == "config.json"
            and read_json(found[0]).get("model_type") == ViTScratchConfig.model_type
        ):
            get("metrics.json")  # which says what the run held out of its data
        weights = next((path for path in map(get, WEIGHT_FILES) if path), None)
        if weights is not None and weights.name.endswith(".index.json"):
            for name in sorted(set(read_json(weights)["weight_map"].values())):
                get(name)
        if weights is None and unreachable:
            raise unreachable[0]
    except Exception as error:  # the client has many: unknown repository, no network, no permission
        raise ValueError(
            f"{repo_id} is no file or folder here, and the Hub did not give it: {one_line(error)}"
        ) from error
    if weights is None:
        raise ValueError(f"the Hub's {repo_id} holds none of {', '.join(WEIGHT_FILES)}.")
    return (found or [weights])[0].parent


def locate(checkpoint, **hub):
    """The file or folder that a path or Hub id stands for; tensors as they are. `hub` is for `hf_hub_download`."""
    if isinstance(checkpoint, Mapping):
        return checkpoint
    path = Path(checkpoint).expanduser()
    if path.exists():
        return path
    text = str(checkpoint)
    if path.suffix in SUFFIXES or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text):
        raise ValueError(f"there is no file or folder {text}.")
    return _download(text, **hub)


def open_checkpoint(located, title: str, mmap: bool = False) -> Checkpoint:
    """The tensors and config of what was located; with `mmap`, those of torch's files are read when touched."""
    if isinstance(located, Mapping):
        return _unwrap(Checkpoint(located, "the state dict"))
    path = _weights_in(located) if located.is_dir() else located
    config = path.parent / "config.json"
    opened = Checkpoint(_read_file(path, mmap), title, read_json(config) if config.is_file() else {}, path)
    return _unwrap(opened)


def _unwrap(opened: Checkpoint) -> Checkpoint:
    """Step into {"model": weights, ...}, and take off what DistributedDataParallel and compile put before names."""
    tensors = opened.tensors
    while isinstance(tensors, dict) and any(isinstance(tensors.get(key), Mapping) for key in WRAPPERS):
        opened.wrapper = next(key for key in WRAPPERS if isinstance(tensors.get(key), Mapping))
        others = [str(key) for key in tensors if key != opened.wrapper]
        if others:
            logger.warning("Took %r of %s; left out %s.", opened.wrapper, opened.title, first_few(others))
        tensors = tensors[opened.wrapper]
    if not isinstance(tensors, Mapping) or not len(tensors):
        raise ValueError(f"{opened.title} holds no named tensors.")
    if isinstance(tensors, dict):
        wrong = [str(key) for key, value in tensors.items() if not isinstance(value, (torch.Tensor, np.ndarray))]
        if wrong or not all(isinstance(key, str) for key in tensors):
            raise ValueError(
                f"{opened.title} is no state dict: {first_few(wrong or list(map(str, tensors)))} no tensors."
            )
    opened.tensors = tensors
    return opened


def first_few(names: list[str]) -> str:
    """The first ten names and their number."""
    return f"{len(names)} ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})"


@contextmanager
def silent(log: logging.Logger):
    """Within it the logger says nothing."""

    def drop(record: logging.LogRecord) -> bool:
        return False

    log.addFilter(drop)  # its level, if raised, makes transformers warn of something else
    try:
        yield
    finally:
        log.removeFilter(drop)
