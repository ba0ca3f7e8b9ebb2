"""Other libraries' Vision Transformer weights, in and out, by the tables of names in `layouts.py`.

    model = convert_checkpoint("google/vit-base-patch16-224")       # or a file, a folder, a state dict
    processor = image_processor_for("google/vit-base-patch16-224", model)
    tensors = export_checkpoint(model, "timm")
    verify_checkpoint("google/vit-base-patch16-224").passed         # runs the source library's own model
    verify_export(model, "timm").passed                             # or the target's

A conversion is exact or it is refused: every tensor must have a name in the table, the right shape and finite values.
What was recognised, assumed, left out, resized or made anew is said in one line each, as warnings of this module's
logger (Python prints those to stderr).

Read it top to bottom: reading files, recognising, converting, changing resolution or classes, the image
processor, the way out, and the proof.
"""

import copy
import json
import logging
import math
import pickle
import re
import tempfile
import textwrap
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, BitImageProcessorPil, ViTImageProcessorPil

from .checkpoints import open_to_others
from .configuration_vit_scratch import ViTScratchConfig
from .layouts import (
    CONFIG_FIELDS,
    DINOV2,
    FAMILIES,
    JAX,
    MODEL_TYPES,
    PUBLISHED_HEADS,
    REFUSED,
    REFUSED_HEADS,
    SUFFIXES,
    TARGETS,
    TIMM,
    TIMM_ACTIVATIONS,
    TIMM_ARCHITECTURES,
    TIMM_ARGUMENTS,
    TIMM_INTERPOLATIONS,
    TIMM_POOLINGS,
    TIMM_REFUSED,
    TIMM_RESAMPLE,
    TORCHVISION,
    TRANSFORMERS,
    WEIGHT_FILES,
    WRAPPERS,
    Family,
    Layout,
    spellings_of,
)
from .modeling_vit_scratch import ViTScratchForImageClassification, resize_positions

logger = logging.getLogger(__name__)

# A trained model of CIFAR-10's classes that comes with the package (scripts/recipes/budget.yaml).
PACKAGED_MODEL = Path(__file__).parent / "packaged"

# --- Reading ---------------------------------------------------------------------------------------------------------


@dataclass
class _Checkpoint:
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
        raise ValueError(f"{path} is no checkpoint that torch can read: {_line(error)}") from error


def _line(error: Exception) -> str:
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
        files = sorted({path.parent / name for name in _read_json(path).get("weight_map", {}).values()})
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


def _read_json(path: Path) -> dict:
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
            and _read_json(found[0]).get("model_type") == ViTScratchConfig.model_type
        ):
            get("metrics.json")  # which says what the run held out of its data
        weights = next((path for path in map(get, WEIGHT_FILES) if path), None)
        if weights is not None and weights.name.endswith(".index.json"):
            for name in sorted(set(_read_json(weights)["weight_map"].values())):
                get(name)
        if weights is None and unreachable:
            raise unreachable[0]
    except Exception as error:  # the client has many: unknown repository, no network, no permission
        raise ValueError(f"{repo_id} is no file or folder here, and the Hub did not give it: {_line(error)}") from error
    if weights is None:
        raise ValueError(f"the Hub's {repo_id} holds none of {', '.join(WEIGHT_FILES)}.")
    return (found or [weights])[0].parent


def _locate(checkpoint, **hub):
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


def _open(located, title: str, mmap: bool = False) -> _Checkpoint:
    """The tensors and config of what was located; with `mmap`, those of torch's files are read when touched."""
    if isinstance(located, Mapping):
        return _unwrap(_Checkpoint(located, "the state dict"))
    path = _weights_in(located) if located.is_dir() else located
    config = path.parent / "config.json"
    opened = _Checkpoint(_read_file(path, mmap), title, _read_json(config) if config.is_file() else {}, path)
    return _unwrap(opened)


def _unwrap(opened: _Checkpoint) -> _Checkpoint:
    """Step into {"model": weights, ...}, and take off what DistributedDataParallel and compile put before names."""
    tensors = opened.tensors
    while isinstance(tensors, dict) and any(isinstance(tensors.get(key), Mapping) for key in WRAPPERS):
        opened.wrapper = next(key for key in WRAPPERS if isinstance(tensors.get(key), Mapping))
        others = [str(key) for key in tensors if key != opened.wrapper]
        if others:
            logger.warning("Took %r of %s; left out %s.", opened.wrapper, opened.title, _some(others))
        tensors = tensors[opened.wrapper]
    if not isinstance(tensors, Mapping) or not len(tensors):
        raise ValueError(f"{opened.title} holds no named tensors.")
    if isinstance(tensors, dict):
        wrong = [str(key) for key, value in tensors.items() if not isinstance(value, (torch.Tensor, np.ndarray))]
        if wrong or not all(isinstance(key, str) for key in tensors):
            raise ValueError(f"{opened.title} is no state dict: {_some(wrong or list(map(str, tensors)))} no tensors.")
    opened.tensors = tensors
    return opened


def _some(names: list[str]) -> str:
    """The first ten names and their number."""
    return f"{len(names)} ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})"


# --- Recognising -----------------------------------------------------------------------------------------------------


class _Named:
    """A checkpoint's tensors by our names.

    `names` are theirs without what comes before the patch projection's ("vit.", "module.backbone.", "opt/target/").
    """

    def __init__(self, opened: _Checkpoint, layout: Layout, start: str):
        self.tensors, self.layout = opened.tensors, layout
        outer = re.match(r"((module|_orig_mod)\.)*", start)[0]
        self.names = {}
        for name in opened.tensors:
            short = name.removeprefix(start) if name.startswith(start) else name.removeprefix(outer)
            if short in self.names:
                raise ValueError(f"{opened.title} has {short} twice, as {self.names[short]} and as {name}.")
            self.names[short] = name
        self.used: set[str] = set()
        self.missing: list[str] = []
        self.misshapen: dict[str, str] = {}
        self.dtypes: set[str] = set()
        self.consume = False  # whether tensors that were copied may be forgotten, to save memory

    def find(self, ours: str) -> list[str | None]:
        """For each part of our tensor, the name it has here, or None."""
        return [next((n for n in part if n in self.names), None) for part in spellings_of(self.layout, ours)]

    @property
    def use_cls_token(self) -> bool:
        """Whether there is a class token; only timm's and Google's models may lack it."""
        return self.has("vit.embeddings.cls_token") or self.layout not in (TIMM, JAX)

    def shape(self, ours: str) -> list[int] | None:
        """The shape of our tensor (a patch kernel's is (D, C, h, w)), or None where a part is not here."""
        if not self.find(ours) or None in self.find(ours):
            return None
        tensor = self.read(ours, note=False)
        return None if tensor is None else list(tensor.shape)

    def has(self, ours: str) -> bool:
        """Whether any part of our tensor is here."""
        return any(self.find(ours))

    def raw(self, name: str) -> torch.Tensor:
        try:
            value = self.tensors[self.names[name]]  # of a .npz file it is read here
            value = torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value.detach()
        except (TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{name} cannot be read: {_line(error)}") from error
        if not value.is_floating_point():
            raise ValueError(f"{name} holds {value.dtype}, not floating-point numbers.")
        return value

    def read(self, ours: str, note: bool = True) -> torch.Tensor | None:
        """Our tensor in torch's layout (a patch kernel still (D, C, h, w)), or None and its names in `missing`."""
        found = self.find(ours)
        missing = [part[0] for name, part in zip(found, spellings_of(self.layout, ours), strict=True) if name is None]
        if note:
            self.missing += [name for name in missing if name not in self.missing]
            self.used.update(filter(None, found))
        if missing or not found:
            return None
        parts = [self.raw(name) for name in found]
        self.dtypes.update(str(part.dtype).removeprefix("torch.") for part in parts)
        if self.layout.jax:
            parts = [_from_jax(ours, part) for part in parts]
        if len({part.shape for part in parts}) > 1 or (len(parts) > 1 and parts[0].ndim == 0):
            self.misshapen[ours] = f"{'/'.join(found)} {' and '.join(str(tuple(part.shape)) for part in parts)}"
            return None
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _from_jax(ours: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of Google's layout in torch's."""
    if tensor.ndim == 4 and ours.endswith("projection.weight"):  # patch kernel (h, w, C, D)
        return tensor.permute(3, 2, 0, 1)
    if tensor.ndim == 3 and ours.endswith("qkv.weight"):  # (D, heads, head dim)
        return tensor.flatten(1).T
    if tensor.ndim == 3 and ours.endswith("proj.weight"):  # (heads, head dim, D)
        return tensor.flatten(0, 1).T
    if ours.endswith("qkv.bias"):  # (heads, head dim)
        return tensor.flatten()
    return tensor.T if tensor.ndim == 2 else tensor


def _to_jax(ours: str, tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The way back."""
    if tensor.ndim == 4:
        return tensor.permute(2, 3, 1, 0)
    if ours.endswith("qkv.weight"):
        return tensor.T.unflatten(1, (num_heads, -1))
    if ours.endswith("attention.proj.weight"):
        return tensor.T.unflatten(0, (num_heads, -1))
    if ours.endswith("qkv.bias"):
        return tensor.unflatten(0, (num_heads, -1))
    return tensor.T if tensor.ndim == 2 else tensor


def _recognise(opened: _Checkpoint, source: str | None) -> tuple[str, _Named]:
    """The family and the layout, from `source`, the config and the names.

    Raises:
        ValueError: The source is unknown, the names are nobody's, or they and the source disagree.
    """
    if source is not None and source not in FAMILIES:
        raise ValueError(f"source {source!r} is unknown; use one of {', '.join(FAMILIES)}.")
    names = list(opened.tensors)
    if any(re.search(r"layers\.\d+\.attention\.qkv\.weight$", name) for name in names):
        raise ValueError(
            f"{opened.title} holds this package's own weights, which need their config.json beside them, and no source."
        )
    layouts = [layout for layout in (TRANSFORMERS, TIMM, TORCHVISION, JAX) if _marked(layout, names) is not None]
    if not layouts:
        _refuse(names, opened.title)
        raise ValueError(
            f"{opened.title} was not recognised: none of its {_some(names)} names ends with "
            f"{', '.join(layout.marker for layout in (TRANSFORMERS, TIMM, TORCHVISION, JAX))}."
        )
    layout = layouts[0]
    if layout is TRANSFORMERS and any(re.search(r"\.norm1\.weight$", name) for name in names):
        layout = DINOV2
    named = _Named(opened, layout, _marked(layout, names))
    family = _family(opened, named)
    if source is not None and not (source == "transformers" and layout in (TRANSFORMERS, DINOV2)):
        if layout not in FAMILIES[source].layouts:
            raise ValueError(f"source={source!r}, but {opened.title} has {layout.title} names (as of {family!r}).")
        family = source
    return family, named


def _marked(layout: Layout, names: list[str]) -> str | None:
    """What comes before the layout's marker, or None where it is absent."""
    found = [name for name in names if re.search(rf"(^|[./]){re.escape(layout.marker)}$", name)]
    return min(found, key=len).removesuffix(layout.marker) if found else None


def _family(opened: _Checkpoint, named: _Named) -> str:
    model_type = opened.config.get("model_type")
    if named.layout in (TRANSFORMERS, DINOV2):
        if model_type is not None:
            if model_type not in MODEL_TYPES:
                raise ValueError(
                    f"config.json says model_type {model_type!r}; known are {', '.join([*MODEL_TYPES, 'vit_scratch'])}."
                )
            return MODEL_TYPES[model_type]
        if named.layout is DINOV2:
            return "dinov2_with_registers" if "embeddings.register_tokens" in named.names else "dinov2"
        if "embeddings.distillation_token" in named.names:
            return "deit"
        return "mae" if "decoder.decoder_embed.weight" in named.names else "transformers"
    if named.layout is TIMM:
        if "mask_token" in named.names and named.has("vit.layers.0.layer_scale1.scale"):
            return "dinov2_with_registers" if "register_tokens" in named.names else "dinov2"
        if "decoder_embed.weight" in named.names:
            return "mae"
        if "blocks.0.gamma_1" in named.names or "dist_token" in named.names:
            return "deit"
        if opened.wrapper == "model":  # as DeiT and MAE publish theirs, and timm does not
            plain_head = named.has("classifier.weight") and not named.has("vit.pooled_norm.weight")
            return "deit" if plain_head else "mae"
        return "dino" if opened.wrapper in ("teacher", "student") else "timm"
    return {id(family.layouts[0]): name for name, family in FAMILIES.items()}[id(named.layout)]


def _refuse(names: list[str], title: str):
    for pattern, what in REFUSED.items():
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            raise ValueError(f"{title} has {what}, which this model has not: {_some(found)}.")


# --- Converting ---------------------------------------------------------------------------------------------------


def convert_checkpoint(
    checkpoint,
    source: str | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    num_labels: int | None = None,
    id2label: dict[int, str] | None = None,
    replace_head: bool = False,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
    **hints,
) -> ViTScratchForImageClassification:
    """Load a ViT of another library, or one of ours, into our model: float32, in evaluation mode, the same function.

    Its outputs have names, as what uses it here expects, even if the checkpoint's own config says `return_dict=False`;
    `from_pretrained`, and `return_dict=False` among the hints, give tuples.

    Args:
        checkpoint: A state dict, a dict of numpy arrays, a file (.safetensors, .npz, .pt, .pth, .bin), a folder, or a
            Hub id. A config.json beside the weights is read.
        source: One of `FAMILIES`; None to recognise it from the names.
        image_size: Pixels, one number or (height, width), to resize the positions to, as the source's own code does
            (the config's `position_interpolation`); None keeps the resolution.
        num_labels: Classes; a number other than the checkpoint's makes the head anew. A head that this model cannot
            express (two heads, or DINOv2's on class token and mean) is made anew if this is given, else refused.
        id2label: Names of the classes; as many as there are.
        replace_head: Make a head that this model cannot express anew even if `num_labels` is not given.
        revision: Branch, tag or commit of a Hub id.
        cache_dir: Where files of the Hub are kept; None for its usual cache.
        token: For a private Hub id; None for the one that `hf auth login` stored.
        **hints: Fields of the config that tensors cannot tell, such as `num_attention_heads`, `layer_norm_eps`,
            `hidden_act`, `pooling`, `position_interpolation` or `drop_path_rate`; `grid_size`, the checkpoint's patches
            (down, across) where they are no square; `representation_size=None` to leave out a tanh layer before a new
            head.

    Raises:
        ValueError: The checkpoint cannot be read or recognised; tensors are missing, left over, of a wrong shape or
            not finite; the model cannot express it; or hints contradict the tensors.
    """
    located = _locate(checkpoint, revision=revision, cache_dir=cache_dir, token=token)
    own = None if source is not None else _own_folder(located)
    if own is not None:
        model, headless = _load_own(own, {"return_dict": True, **hints})
    else:
        opened = _open(located, str(checkpoint))
        family, named = _recognise(opened, source)
        named.consume = opened.path is not None and isinstance(opened.tensors, dict)
        plan = _plan(opened, family, named, hints, replace_head or num_labels is not None)
        model, headless = _convert(opened, family, named, plan)
    return _change(model, headless, image_size, num_labels, id2label)


def is_own(checkpoint, **hub) -> bool:
    """Whether a file, folder or Hub id (`hub`: revision, cache_dir, token) holds a model that this package saved."""
    return own_folder(checkpoint, **hub) is not None


def own_folder(checkpoint, **hub) -> Path | None:
    """The folder of a file, folder or Hub id, as for `is_own`, that holds a model that this package saved, or None."""
    return _own_folder(_locate(checkpoint, **hub))


def _own_folder(located) -> Path | None:
    """The folder of a checkpoint that this package saved, or None."""
    if isinstance(located, Mapping):
        return None
    if located.is_file() and located.name not in WEIGHT_FILES:
        return None  # a file of its own beside our config
    folder = located if located.is_dir() else located.parent
    config = folder / "config.json"
    if config.is_file() and _read_json(config).get("model_type") == ViTScratchConfig.model_type:
        return folder
    return None


# Whose table of missing and left-over tensors is not printed: we say it our way.
REPORT = logging.getLogger("transformers.modeling_utils")


@contextmanager
def _silent(log: logging.Logger):
    """Within it the logger says nothing."""

    def drop(record: logging.LogRecord) -> bool:
        return False

    log.addFilter(drop)  # its level, if raised, makes transformers warn of something else
    try:
        yield
    finally:
        log.removeFilter(drop)


def _load_own(folder: Path, hints: dict) -> tuple[ViTScratchForImageClassification, bool]:
    """A model of this package, and whether its head is new."""
    config, unknown = ViTScratchConfig.from_pretrained(folder, return_unused_kwargs=True, **hints)
    if unknown:
        ViTScratchConfig(**unknown)  # says which is no field
    try:
        with _silent(REPORT):
            model, report = ViTScratchForImageClassification.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
            )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be loaded: {_line(error)}") from error
    missing, left_over = set(report["missing_keys"]), set(report["unexpected_keys"])
    architecture = (config.architectures or [""])[0]
    untrained = () if architecture == "ViTScratchForImageClassification" else ("classifier.", "pre_logits.")
    if architecture in ("ViTScratchForMaskedImageModeling", "ViTScratchBackbone"):  # these read the tokens alone
        untrained += ("vit.pooled_norm.",)
    head = {name for name in missing if name.startswith(untrained)}
    decoder = {name for name in left_over if re.match(r"(vit\.)?(embeddings\.)?(decoder|mask_token)", name)}
    problems = {
        "missing": sorted(missing - head),
        "left over": sorted(left_over - decoder),
        "of another shape": [f"{name} {tuple(old)} for {tuple(new)}" for name, old, new in report["mismatched_keys"]],
        "not finite (NaN or infinite)": [name for name, p in model.state_dict().items() if not p.isfinite().all()],
    }
    _raise_unfit(str(folder), problems)
    if decoder:
        logger.warning("Left out the pre-training decoder: %s.", _some(sorted(decoder)))
    return model.eval(), bool(head)


def _raise_unfit(title: str, problems: dict[str, list[str]]):
    texts = [f"{problem} are {_some(names)}" for problem, names in problems.items() if names]
    if texts:
        raise ValueError(f"{title} does not fit: {'; '.join(texts)}.")


@dataclass
class _Plan:
    """What becomes of a checkpoint.

    Args:
        fields: Of our config.
        tensors: Ours that are more than a tensor of theirs under another name.
        left_out: Their name -> what it is.
        classes: Of the head that is taken over, or None.
        told: The fields that tensors, config.json or hints tell; the others are the published values.
    """

    fields: dict
    tensors: dict[str, torch.Tensor]
    left_out: dict[str, str]
    classes: int | None
    told: set[str] = field(default_factory=set)


def _convert(
    opened: _Checkpoint, family: str, named: _Named, plan: _Plan
) -> tuple[ViTScratchForImageClassification, bool]:
    """The exact conversion, at the checkpoint's resolution, and whether its head is new."""
    model = _meta_model(ViTScratchConfig(**plan.fields))
    state = _fill(model, opened.title, named, plan)
    config = model.config
    logger.warning(
        "Recognised %s names (%s): %d blocks of width %d, %d heads, MLP of %d, patches of %s, images of %s, %s.",
        named.layout.title, family, config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
        config.intermediate_size, "x".join(map(str, config.patch_hw)), "x".join(map(str, config.image_hw)),
        "no classifier" if plan.classes is None else f"{plan.classes} classes",
    )  # fmt: skip
    for what in dict.fromkeys(plan.left_out.values()):
        logger.warning("Left out %s: %s.", what, _some([n for n in plan.left_out if plan.left_out[n] == what]))
    if named.dtypes - {"float32"}:
        logger.warning("Weights of %s became float32.", " and ".join(sorted(named.dtypes - {"float32"})))
    return _materialise(model, state), plan.classes is None


def _plan(opened: _Checkpoint, family: str, named: _Named, hints: dict, new_head: bool) -> _Plan:
    """Read the geometry off the tensors, and what they cannot tell off hints, config.json and the published values."""
    _refuse(list(named.names), opened.title)
    hints = dict(hints)
    claims = _claims(opened)
    grid = hints.pop("grid_size", None)
    blocks = _num_blocks(named, opened.title)
    kernel = named.shape("vit.embeddings.patch_embeddings.projection.weight")
    if len(kernel) != 4:
        raise ValueError(f"{opened.title}: {named.layout.marker} must have 4 dimensions, got {len(kernel)}.")
    D, C, *patch = kernel
    claimed = _pair(claims.pop("image_size", None))
    if claimed is not None and not (isinstance(claimed, tuple) and [type(side) for side in claimed] == [int, int]):
        raise ValueError(
            f"config.json says image_size={claimed!r}, which is neither a number nor a height and a width."
        )
    if grid is None and claimed is not None:
        grid = (claimed[0] // patch[0], claimed[1] // patch[1])
        if claimed != (grid[0] * patch[0], grid[1] * patch[1]):
            logger.warning("Left out the rows and columns of %dx%d images beyond the last whole patch.", *claimed)
    plan = _Plan({}, {}, {}, None)
    for pattern, what in named.layout.unused.items():
        plan.left_out |= {name: what for name in named.names if re.fullmatch(pattern, name)}
    grid, registers = _plan_tokens(plan, opened.title, named, D, grid)
    pooling = _plan_head(plan, opened, named, D, hints, new_head)
    widths = (named.shape(f"vit.layers.{i}.mlp.fc1.bias") for i in range(blocks))
    width = next((shape[-1] for shape in widths if shape), None)
    inner = named.shape("vit.layers.0.mlp.fc2.weight")
    if width and inner and width == 2 * inner[-1]:
        raise ValueError(f"{opened.title} has a SwiGLU MLP (fc1 gives {width}, fc2 takes {inner[-1]}), not an MLP.")
    measured = {
        "hidden_size": D,
        "num_channels": C,
        "num_hidden_layers": blocks,
        "intermediate_size": width or 4 * D,
        "patch_size": _single(patch),
        "image_size": _single([grid[0] * patch[0], grid[1] * patch[1]]),
        "num_register_tokens": registers,
        "use_cls_token": named.use_cls_token,
        "qkv_bias": any(named.has(f"vit.layers.{i}.attention.qkv.bias") for i in range(blocks)),
        "norm_after_pooling": named.has("vit.pooled_norm.weight"),
        "representation_size": (named.shape("pre_logits.0.bias") or [None])[-1],
    }
    if set(named.find("pre_logits.0.bias")) & set(plan.left_out):
        measured["representation_size"] = None
    query = named.find("vit.layers.0.attention.qkv.weight")[0]
    if named.layout.jax and query is not None and (kernel := named.raw(query)).ndim == 3:
        measured["num_attention_heads"] = kernel.shape[1]
    for origin, told in (("config.json says", claims), ("the hint is", hints)):
        for name, value in told.items():
            if name in measured and _pair(value) != _pair(measured[name]):
                raise ValueError(f"{origin} {name}={value!r}, but the tensors say {measured[name]!r}.")
    bare = not (measured["use_cls_token"] or registers or measured["qkv_bias"] or "architecture" in opened.config)
    if measured["norm_after_pooling"] and bare and "norm_after_pooling" not in hints:
        raise ValueError(
            f"{opened.title} has the names of timm's vit_*_rpn_*, with norms after the branches, which this model has "
            "not; pass norm_after_pooling=True if it has norms before them."
        )
    scaled = any(named.has(f"vit.layers.{i}.layer_scale{n}.scale") for i in range(blocks) for n in (1, 2))
    defaults = {
        "pooling": "mean" if measured["norm_after_pooling"] or not measured["use_cls_token"] else "cls",
        "layer_norm_eps": 1e-6 if family.startswith("dinov2") else named.layout.layer_norm_eps,
        "layerscale_value": float(opened.config.get("layerscale_value") or 1e-5) if scaled else None,
        "position_interpolation": _interpolation(opened, family, named.layout),
        "hidden_act": named.layout.hidden_act,
    }
    fields = {**claims, **({"pooling": pooling} if pooling else {}), **hints, **measured}
    plan.told = set(fields) | ({"pooling"} if defaults["pooling"] == "mean" else set())
    fields = {**defaults, **fields}
    if "num_attention_heads" not in fields:
        if D not in PUBLISHED_HEADS and D % 64:
            raise ValueError(f"the heads cannot be told: width {D} is no multiple of 64; pass num_attention_heads=.")
        fields["num_attention_heads"] = heads = PUBLISHED_HEADS.get(D, D // 64)
        logger.warning("Assumed %d heads of %d channels; num_attention_heads= says otherwise.", heads, D // heads)
    if named.layout.jax and "hidden_act" not in plan.told:
        logger.warning("Assumed the tanh form of GELU, as Google's code has; hidden_act='gelu' is the exact one.")
    labels = _label_names(opened.config)
    if labels and plan.classes in (None, len(labels)):
        fields |= {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}
    elif plan.classes is not None:
        fields["num_labels"] = plan.classes
        if labels:
            logger.warning("config.json names %d classes, the head has %d: left out.", len(labels), plan.classes)
    plan.fields = fields
    return plan


def _interpolation(opened: _Checkpoint, family: str, layout: Layout) -> str:
    """How the code that the checkpoint comes from resizes positions."""
    if layout in (TRANSFORMERS, DINOV2):
        return FAMILIES[family].in_transformers
    architecture = opened.config.get("architecture") or ""
    special = (how for pattern, how in TIMM_INTERPOLATIONS.items() if re.fullmatch(pattern, architecture))
    return next(special, FAMILIES[family].interpolation)


def _num_blocks(named: _Named, title: str) -> int:
    patterns = [re.escape(start).replace(r"\{i\}", r"(\d+)") for start in named.layout.block.split("|")]
    matches = [re.match(pattern, name) for name in named.names for pattern in patterns]
    numbers = {int(match[1]) for match in matches if match}
    if not numbers:
        raise ValueError(f"{title} has {named.layout.title} names, but no blocks {named.layout.block.split('|')[0]}*.")
    return max(numbers) + 1


def _pair(value):
    """A size as (height, width), whichever way it is written; anything else as it is."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value, value)
    return tuple(value) if isinstance(value, list) else value


def _single(size: list[int]) -> int | tuple[int, int]:
    return size[0] if size[0] == size[1] else tuple(size)


def _plan_tokens(
    plan: _Plan, title: str, named: _Named, D: int, grid: tuple[int, int] | None
) -> tuple[tuple[int, int], int]:
    """Class token, registers and positions in our form: a position for the class token, none for registers.

    A register with a position is the register plus its position; a class token without one has position 0. Returns the
    grid (down, across), and the number of registers.
    """
    prefix = "vit.embeddings."
    tokens = int(named.use_cls_token)
    positions = named.read(prefix + "position_embeddings")
    if positions is None:
        _raise_unfit(title, {"missing": named.missing})
    shapes = {"registers": named.shape(prefix + "register_tokens"), "positions": list(positions.shape)}
    wrong = [
        f"{name} {tuple(shape)} instead of (1, tokens, {D})"
        for name, shape in shapes.items()
        if shape is not None and (len(shape) != 3 or shape[0] != 1 or shape[2] != D)
    ]
    _raise_unfit(title, {"misshapen": wrong})
    registers = shapes["registers"][1] if shapes["registers"] else 0
    count = positions.shape[1]
    before = {"none": 0, "cls": tokens, "all": tokens + registers}
    before = [before[which] for which in named.layout.positions]
    if grid is None:
        sides = {number: math.isqrt(max(count - number, 0)) for number in before}
        fits = [number for number in before if sides[number] and sides[number] ** 2 == count - number]
        if not fits:
            raise ValueError(
                f"{title} has {count} positions, which are no square grid of patches; pass grid_size=(down, across)."
            )
        grid = (sides[fits[0]], sides[fits[0]])
    number = count - grid[0] * grid[1]
    if number not in before:
        raise ValueError(
            f"{title} has {count} positions, which do not fit {grid[0]} x {grid[1]} patches and "
            f"{' or '.join(map(str, dict.fromkeys(before)))} tokens before them; pass grid_size=(down, across)."
        )
    front, patches = positions.float().split([number, count - number], dim=1)
    own = front[:, :tokens] if number else front.new_zeros(1, tokens, D)
    plan.tensors[prefix + "position_embeddings"] = torch.cat([own, patches], dim=1)
    if registers and number > tokens:
        plan.tensors[prefix + "register_tokens"] = named.read(prefix + "register_tokens").float() + front[:, tokens:]
    return grid, registers


def _plan_head(plan: _Plan, opened: _Checkpoint, named: _Named, D: int, hints: dict, new_head: bool) -> str | None:
    """Which head is taken over (`plan.classes`) and which left out; the pooling, where the head tells it."""
    pooling = None
    classifier = [name for name in named.find("classifier.weight") + named.find("classifier.bias") if name]
    tanh = [name for name in named.find("pre_logits.0.weight") + named.find("pre_logits.0.bias") if name]
    if classifier:
        plan.classes = (named.shape("classifier.bias") or named.shape("classifier.weight") or [0])[0]
    refused = {
        what: [name for name in named.names if re.fullmatch(pattern, name)] for pattern, what in REFUSED_HEADS.items()
    }
    if named.layout is DINOV2 and named.shape("classifier.weight") == [plan.classes, 2 * D]:
        on_cls, on_mean = named.read("classifier.weight").float().split(D, dim=1)
        if on_cls.any() and on_mean.any():
            refused["a head on class token and mean of the patches at once"] = classifier
        else:
            pooling = "mean" if on_mean.any() else "cls"
            plan.tensors["classifier.weight"] = on_mean if on_mean.any() else on_cls
    for what, names in refused.items():
        if names and not new_head:
            raise ValueError(
                f"{opened.title} has {what}, which this model has not: {_some(names)}. "
                "Pass num_labels= to leave its head out and get a new one."
            )
        if names:
            plan.classes = None
            plan.left_out |= dict.fromkeys([*names, *classifier], what)
    if tanh and named.layout in (TRANSFORMERS, DINOV2):
        if classifier:
            plan.left_out |= dict.fromkeys(tanh, "the pooler, which its classifier does not use")
        elif opened.config.get("pooler_act", "tanh") != "tanh":
            raise ValueError(f"{opened.title} has a pooler with {opened.config['pooler_act']!r}; only tanh is known.")
    if tanh and hints.get("representation_size", 0) is None and (new_head or not classifier):
        plan.classes = None
        plan.left_out |= dict.fromkeys([*tanh, *classifier], "the tanh layer")
    return pooling


def _claims(opened: _Checkpoint) -> dict:
    """Our config's fields as the config.json beside the tensors has them."""
    config = opened.config
    claims = {name: config[name] for name in CONFIG_FIELDS if config.get(name) is not None}
    if "architecture" not in config:
        return claims
    for pattern, what in TIMM_REFUSED.items():
        if re.fullmatch(pattern, config["architecture"]):
            raise ValueError(
                f"{opened.title} is timm's {config['architecture']}, with {what}, which this model has not."
            )
    card = config.get("pretrained_cfg") or {}
    arguments = {"img_size": card["input_size"][1:]} if card.get("input_size") else {}
    for pattern, differing in TIMM_ARCHITECTURES.items():
        arguments |= differing if re.fullmatch(pattern, config["architecture"]) else {}
    arguments |= {"global_pool": config["global_pool"]} if config.get("global_pool") is not None else {}
    arguments |= config.get("model_args") or {}
    allowed = {
        "norm_layer": ("layernorm",), "pool_include_prefix": (False,), "pos_embed": ("learn",),
        "global_pool": tuple(TIMM_POOLINGS), "act_layer": tuple(TIMM_ACTIVATIONS),
    }  # fmt: skip
    for name, values in allowed.items():
        if arguments.get(name) is not None and arguments[name] not in values:
            raise ValueError(f"{opened.title} has timm's {name}={arguments[name]!r}, which this model has not.")
    for name, table in {"global_pool": TIMM_POOLINGS, "act_layer": TIMM_ACTIVATIONS}.items():
        arguments[name] = table.get(arguments.get(name))
    timm = {ours: arguments[name] for name, ours in TIMM_ARGUMENTS.items() if arguments.get(name) is not None}
    return {**claims, **timm}


def _label_names(config: dict) -> dict[int, str] | None:
    """Names of the classes from a config.json of transformers or timm."""
    if isinstance(config.get("id2label"), dict):
        return {int(index): str(name) for index, name in config["id2label"].items()}
    card = {**(config.get("pretrained_cfg") or {}), **config}
    names, texts = card.get("label_names"), card.get("label_descriptions") or {}
    return {index: str(texts.get(name, name)) for index, name in enumerate(names)} if names else None


def _fill(model: ViTScratchForImageClassification, title: str, named: _Named, plan: _Plan) -> dict[str, torch.Tensor]:
    """The state dict of `model`, a copy of the checkpoint's tensors, without a head that has to be new.

    Raises:
        ValueError: Tensors are missing, left over, misshapen or not finite; all of them are listed.
    """
    named.missing = []
    state, misshapen, infinite = {}, [], []
    needed = model.state_dict().items()
    for ours, empty in tqdm(needed, "Converting", unit="tensor", delay=2, leave=False):
        if plan.classes is None and ours.startswith("classifier."):
            continue
        tensor = plan.tensors[ours] if ours in plan.tensors else named.read(ours)
        if tensor is None:
            continue
        theirs = "/".join(filter(None, named.find(ours)))
        if ours.endswith("patch_embeddings.projection.weight"):
            tensor = tensor.flatten(1)
        if tensor.shape != empty.shape:
            misshapen.append(f"{theirs} {tuple(tensor.shape)} instead of {tuple(empty.shape)}")
            continue
        if not tensor.sum(dtype=torch.float64).isfinite():  # one pass; float32 cannot overflow it
            infinite.append(theirs)
        state[ours] = torch.empty(empty.shape).copy_(tensor)
        if named.consume:
            for name in named.find(ours):
                named.tensors.pop(named.names[name], None)
    left_over = [name for name in named.names if name not in named.used and name not in plan.left_out]
    _raise_unfit(
        title,
        {
            "missing": named.missing,
            "left over": left_over,
            "misshapen": [*named.misshapen.values(), *misshapen],
            "not finite": infinite,
        },
    )
    return state


def _meta_model(config: ViTScratchConfig) -> ViTScratchForImageClassification:
    """A model without memory behind its parameters."""
    with torch.device("meta"):
        return ViTScratchForImageClassification(config)


def _materialise(
    model: ViTScratchForImageClassification, state: dict[str, torch.Tensor]
) -> ViTScratchForImageClassification:
    """Give a model without memory its tensors, not copied; what has none starts as the model initialises it."""
    unexpected = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    assert not unexpected, unexpected
    for module in model.modules():
        empty = {
            name: tensor
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            if tensor.is_meta
        }
        if empty:
            for tensor in module.parameters(recurse=False):
                tensor._is_hf_initialized = True  # transformers' initialisation leaves it alone then
            for name, tensor in empty.items():
                fresh = torch.empty_like(tensor, device="cpu")
                fresh = nn.Parameter(fresh) if isinstance(tensor, nn.Parameter) else fresh
                setattr(module, name, fresh)
            model._init_weights(module)
    return model.eval()


# --- Another resolution, other classes -------------------------------------------------------------------------------


def _change(
    model: ViTScratchForImageClassification,
    headless: bool,
    image_size: int | tuple[int, int] | None,
    num_labels: int | None,
    id2label: dict[int, str] | None,
) -> ViTScratchForImageClassification:
    """The model with its positions resized, and its head made anew where it has none or one for other classes."""
    config, state = copy.deepcopy(model.config), dict(model.state_dict())
    if num_labels is None:
        num_labels = len(id2label) if headless and id2label else config.num_labels
    if num_labels < 0:
        raise ValueError(f"num_labels ({num_labels}) must be at least 0.")
    if id2label is not None and len(id2label) != num_labels:
        raise ValueError(
            f"id2label names {len(id2label)} classes, but there are {num_labels}; name as many, or pass "
            f"num_labels={len(id2label)} for a new head."
        )
    old = config.image_hw
    if image_size is not None and _pair(image_size) != old:
        config.image_size = image_size
        config.validate()
        position = "vit.embeddings.position_embeddings"
        if position in state:
            resized = model.config.grid_hw, config.grid_hw, config.position_interpolation
            state[position] = resize_positions(state[position], *resized)
        logger.warning(
            "Resized the positions from %dx%d to %dx%d patches (images of %dx%d).", *model.config.grid_hw,
            *config.grid_hw, *config.image_hw,
        )  # fmt: skip
    new_head = headless or num_labels != config.num_labels
    if new_head:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("classifier.")}
        if num_labels != config.num_labels:
            config.num_labels = num_labels
        logger.warning("Made a new head for %d classes.", num_labels)
    if id2label is not None:
        config.id2label = {int(index): str(name) for index, name in id2label.items()}
        config.label2id = {name: index for index, name in config.id2label.items()}
    return _materialise(_meta_model(config), state)


# --- The image processor and the labels ------------------------------------------------------------------------------


def image_processor_for(checkpoint, model: ViTScratchForImageClassification, source: str | None = None, **hub):
    """The image processor that belongs to a checkpoint, at the resolution of the model made of it.

    Args:
        checkpoint: As for `convert_checkpoint`, or the name of a family. A preprocessor_config.json beside the weights
            is read, or timm's config.json; otherwise it is the one that the family publishes.
        model: The converted model.
        source: As for `convert_checkpoint`.
        **hub: revision, cache_dir and token, as for `convert_checkpoint`.

    Raises:
        ValueError: As `convert_checkpoint`; or a folder of ours has no preprocessor_config.json.
    """
    C = model.config.num_channels
    if isinstance(checkpoint, str) and checkpoint in FAMILIES and not Path(checkpoint).exists():
        return _processor(model.config.image_hw, C, FAMILIES[checkpoint])
    located, folder = _locate(checkpoint, **hub), None
    if not isinstance(located, Mapping):
        folder = located if located.is_dir() else located.parent
    if folder is not None and (folder / "preprocessor_config.json").is_file():
        return _fit(_load_processor(folder, C), model.config.image_hw)
    with _silent(logger):  # `convert_checkpoint` has said what was taken
        opened = _open(located, str(checkpoint), mmap=True)
    if source is None and opened.config.get("model_type") == ViTScratchConfig.model_type:
        raise ValueError(f"{checkpoint} has no preprocessor_config.json.")
    family = FAMILIES[_recognise(opened, source)[0]]
    card = {**opened.config, **(opened.config.get("pretrained_cfg") or {})}
    if "architecture" in opened.config and "mean" in card:
        family = Family(
            family.layouts, tuple(card["mean"]), tuple(card["std"]),
            TIMM_RESAMPLE.get(card.get("interpolation"), family.resample),
            None if card.get("crop_mode") == "squash" else card.get("crop_pct", family.crop),
        )  # fmt: skip
    return _processor(model.config.image_hw, C, family)


def _load_processor(folder: Path, num_channels: int):
    file = folder / "preprocessor_config.json"
    config = _read_json(file)
    try:
        try:
            processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        except ImportError:  # older versions of transformers have it with torchvision only
            kind = config.get("image_processor_type") or config.get("feature_extractor_type") or "ViTImageProcessor"
            kind = kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
            processor = getattr(transformers, f"{kind}Pil").from_pretrained(folder)
    except Exception as error:  # each processor fails in its own way, some with a list of all others
        reason = textwrap.shorten(_line(error), 160, placeholder=" ...")
        raise ValueError(f"no image processor can be made of {file}: {reason}") from error
    for name in ("image_mean", "image_std"):
        value = getattr(processor, name, None)
        value = [value] * num_channels if isinstance(value, int | float) else value
        numbers = isinstance(value, list | tuple) and all(isinstance(number, int | float) for number in value)
        if processor.do_normalize and not (numbers and len(value) == num_channels):
            raise ValueError(f"{file}: {name} ({value!r}) must be a number for each of {num_channels} channels.")
        setattr(processor, name, value)
    return processor


def _processor(image_hw: tuple[int, int], num_channels: int, family: Family):
    height, width = image_hw
    mean, std = list(family.mean), list(family.std)
    if num_channels != len(mean):
        mean, std = [sum(mean) / len(mean)] * num_channels, [sum(std) / len(std)] * num_channels
        logger.warning("Averaged the image processor's mean and deviation for %d channels.", num_channels)
    shared = {
        "image_mean": mean, "image_std": std, "resample": family.resample, "do_convert_rgb": num_channels == 3 or None,
    }  # fmt: skip
    if family.crop is None:
        return ViTImageProcessorPil(size={"height": height, "width": width}, **shared)
    resized = [math.floor(side / family.crop) for side in image_hw]
    size = {"shortest_edge": resized[0]} if height == width else {"height": resized[0], "width": resized[1]}
    return BitImageProcessorPil(size=size, crop_size={"height": height, "width": width}, **shared)


def _fit(processor, image_hw: tuple[int, int]):
    """The processor at another resolution, with the same share cropped."""
    height, width = image_hw
    size, crop = dict(processor.size), dict(getattr(processor, "crop_size", None) or {})
    target = {"height": height, "width": width}
    if not (getattr(processor, "do_center_crop", None) and crop):
        if (size.get("height"), size.get("width")) != image_hw:
            logger.warning("The image processor resizes to %dx%d now, as the model expects.", height, width)
        processor.size = type(processor.size)(**target) if not isinstance(processor.size, dict) else target
        return processor
    if (crop["height"], crop["width"]) != image_hw:
        grown = {
            key: round(side * (width if key == "width" else height) / crop["width" if key == "width" else "height"])
            for key, side in size.items()
            if side
        }
        processor.size = type(processor.size)(**grown) if not isinstance(processor.size, dict) else grown
        processor.crop_size = type(processor.crop_size)(**target) if not isinstance(crop, dict) else target
        logger.warning("The image processor crops to %dx%d now, as the model expects.", height, width)
    return processor


def read_labels(path: str | Path) -> dict[int, str]:
    """Names of the classes from a text file, one a line, or a JSON list or object {index: name}.

    Raises:
        ValueError: The file cannot be read, or its indices are not 0 to n - 1.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"labels cannot be read from {path}: {error}") from error
    if isinstance(content, list):
        while content and content[-1] == "":
            content.pop()
        content = dict(enumerate(content))
    try:
        labels = {int(index): str(name).strip() for index, name in content.items()}
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{path} must hold a JSON list of names, or an object of index and name.") from error
    if sorted(labels) != list(range(len(labels))) or not labels:
        raise ValueError(f"{path} must name the classes 0 to n - 1, got {len(labels)} names.")
    return dict(sorted(labels.items()))


# --- The way out -----------------------------------------------------------------------------------------------------


def export_checkpoint(
    model: ViTScratchForImageClassification, target: str, folder: str | Path | None = None, image_processor=None
) -> dict[str, torch.Tensor] | dict[str, np.ndarray]:
    """The model's tensors in another library's layout; converting them back gives the same model.

    What a layout's tensors do not carry (heads, epsilon, activation) stands in the config.json of `folder`; without
    one, `convert_checkpoint` takes it as hints.

    Args:
        model: To export; it keeps its tensors, these are copies.
        target: "transformers" (ViT, or where there is layer scale DINOv2, with or without registers; by the names
            that the installed version's `load_state_dict` takes), "timm", "torchvision", or "jax" (numpy arrays).
        folder: Where to write it as well: model.safetensors (for transformers with the Hub's names) or model.npz, and
            config.json.
        image_processor: Written there too, or, for timm, into its config.json.

    Raises:
        ValueError: The target is unknown, or its library cannot express the model.
    """
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is unknown; use one of {', '.join(TARGETS)}.")
    config = model.config
    obstacle = next((what for what, there in _obstacles(config)[target].items() if there), None)
    if obstacle:
        raise ValueError(f"{target} has no model with {obstacle}; it cannot be exported there.")
    layout = DINOV2 if target == "transformers" and config.layerscale_value is not None else TARGETS[target]
    ours = {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()}
    embeddings = model.vit.embeddings
    ours["vit.embeddings.position_embeddings"] = embeddings.position_embeddings.detach().float().cpu()
    if target == "timm":
        ours["vit.embeddings.position_embeddings"] = _timm_positions(model)
    if layout is DINOV2 and config.num_labels:
        ours["classifier.weight"] = _on_both(ours["classifier.weight"], config.pooling)
    writes = _transformers_names(config) if target == "transformers" else lambda spellings: (spellings[0],) * 2
    tensors, on_disk = {}, {}
    for name, tensor in ours.items():
        if name.endswith("patch_embeddings.projection.weight"):
            tensor = tensor.unflatten(1, (config.num_channels, *config.patch_hw))
        parts = spellings_of(layout, name)
        for spellings, part in zip(parts, tensor.chunk(len(parts)), strict=True):
            part = _to_jax(name, part, config.num_attention_heads) if layout.jax else part
            part = part.clone(memory_format=torch.contiguous_format)
            in_memory, in_file = writes(spellings)
            on_disk[in_file] = tensors[in_memory] = part.numpy() if layout.jax else part
    if layout is DINOV2 and config.num_register_tokens:  # it has a mask token whether that is used or not
        name = "dinov2_with_registers.embeddings.mask_token"
        on_disk[name] = tensors[name] = torch.zeros(1, config.hidden_size)
    _say_what_differs(config, target)
    if folder is not None:
        _write(on_disk, model, target, Path(folder), image_processor)
    return tensors


def _say_what_differs(config: ViTScratchConfig, target: str):
    """Warn of what the target's library computes by default, and not from the tensors, otherwise than the model."""
    if target == "jax":
        for name, theirs in (("hidden_act", JAX.hidden_act), ("layer_norm_eps", JAX.layer_norm_eps)):
            if getattr(config, name) != theirs:
                logger.warning(
                    "Google's code has %s=%r, this model %r: it computes something else there; convert_checkpoint "
                    "reads it from the config.json beside the arrays, or takes it as a hint.",
                    name, theirs, getattr(config, name),
                )  # fmt: skip
    theirs = FAMILIES[target].interpolation
    if target == "transformers":
        theirs = FAMILIES[MODEL_TYPES[_transformers_classes(config)[2]]].in_transformers
    if config.position_interpolation != theirs:
        logger.warning(
            "For images of another size %s resizes positions as %r, this model as %r.",
            target, theirs, config.position_interpolation,
        )  # fmt: skip


def _obstacles(config: ViTScratchConfig) -> dict[str, dict[str, bool]]:
    """For each target, what it lacks, and whether the model has it."""
    scaled, registers = config.layerscale_value is not None, bool(config.num_register_tokens)
    plain = {
        "no class token": not config.use_cls_token,
        "mean pooling": config.pooling == "mean",
        "no final norm": not config.use_final_norm,
        "a norm after the pooling": config.norm_after_pooling,
        "registers": registers,
        "layer scale": scaled,
    }
    tanh = {"a tanh layer before the classifier": config.representation_size is not None}
    stem = {"early convolutions": bool(config.stem_channels)}
    gap = not config.use_cls_token and config.pooling == "mean"
    return {
        "transformers": {
            **{
                what: there
                for what, there in plain.items()
                if not (scaled and what in ("mean pooling", "registers", "layer scale"))
            },
            "an MLP whose width is no multiple of its own (with layer scale)": (
                scaled and config.intermediate_size % config.hidden_size != 0
            ),
            **tanh,
            **stem,
        },
        "timm": {
            **tanh,
            **stem,
            f"the activation {config.hidden_act}": config.hidden_act not in TIMM_ACTIVATIONS.values(),
        },
        "torchvision": {
            **plain,
            **stem,
            "no bias of query, key and value": not config.qkv_bias,
            f"the activation {config.hidden_act}": config.hidden_act != "gelu",
            "pictures or patches that are no squares": len({*config.image_hw}) + len({*config.patch_hw}) > 2,
            f"{config.num_channels} channels": config.num_channels != 3,
            "no classifier": not config.num_labels,
        },
        "jax": {
            **stem,
            **{
                what: there for what, there in plain.items() if not (gap and what in ("no class token", "mean pooling"))
            },
            "no bias of query, key and value": not config.qkv_bias,
            f"the activation {config.hidden_act}": config.hidden_act not in ("gelu", JAX.hidden_act),
        },
    }


def _timm_positions(model: ViTScratchForImageClassification) -> torch.Tensor:
    """Positions as timm has them: of the patches alone where the class token's is 0, else of every token."""
    config = model.config
    positions = model.vit.embeddings.position_embeddings.detach().float().cpu()
    own, patches = positions.tensor_split([int(config.use_cls_token)], dim=1)
    if not own.any():
        return patches
    return torch.cat([own, own.new_zeros(1, config.num_register_tokens, config.hidden_size), patches], dim=1)


def _on_both(weight: torch.Tensor, pooling: str) -> torch.Tensor:
    """A classifier (classes, D) as DINOv2's (classes, 2 D), which sees class token and mean."""
    zero = torch.zeros_like(weight)
    return torch.cat([weight, zero] if pooling == "cls" else [zero, weight], dim=1)


def _transformers_classes(config: ViTScratchConfig) -> tuple[type, type, str]:
    """transformers' config and classifier, and the name of its encoder, for a config of ours."""
    if config.layerscale_value is None:
        return transformers.ViTConfig, transformers.ViTForImageClassification, "vit"
    if config.num_register_tokens:
        config_class = transformers.Dinov2WithRegistersConfig
        return config_class, transformers.Dinov2WithRegistersForImageClassification, "dinov2_with_registers"
    return transformers.Dinov2Config, transformers.Dinov2ForImageClassification, "dinov2"


def _transformers_names(config: ViTScratchConfig):
    """A function of a tensor's spellings: its name in the installed transformers' model, and on the Hub (the last)."""
    config_class, model_class, prefix = _transformers_classes(config)
    with torch.device("meta"):
        there = model_class(_transformers_config(config, config_class)).state_dict()

    def names(spellings: list[str]) -> tuple[str, str]:
        full = [name if name.startswith("classifier.") else f"{prefix}.{name}" for name in spellings]
        return next(name for name in full if name in there), full[-1]

    return names


def _transformers_config(config: ViTScratchConfig, config_class: type, names=CONFIG_FIELDS):
    """A config of transformers with the fields of ours that it has, of those named."""
    fields = {name: getattr(config, name) for name in names if hasattr(config_class, name)}
    if isinstance(config.initializer_range, str):  # "fan_in", which its configs do not know; of new weights only
        fields.pop("initializer_range", None)
    fields |= {"id2label": config.id2label, "label2id": config.label2id, "problem_type": config.problem_type}
    if hasattr(config_class, "mlp_ratio"):
        fields |= {"mlp_ratio": config.intermediate_size // config.hidden_size}
        fields |= {"layerscale_value": float(config.layerscale_value)}
    if config.representation_size and hasattr(config_class, "pooler_output_size"):
        fields |= {"pooler_output_size": config.representation_size}
    if hasattr(config_class, "num_register_tokens"):
        fields |= {"num_register_tokens": config.num_register_tokens}
    if hasattr(config_class, "use_mask_token"):
        fields |= {"use_mask_token": False}
    return config_class(**fields)


def _timm_arguments(config: ViTScratchConfig, no_embed_class: bool) -> dict:
    """The arguments of timm's VisionTransformer, as JSON can hold them."""
    ratio = config.intermediate_size / config.hidden_size
    if int(config.hidden_size * ratio) != config.intermediate_size:  # timm floors
        ratio = (config.intermediate_size + 0.5) / config.hidden_size
    return {
        "img_size": list(config.image_hw),
        "patch_size": list(config.patch_hw),
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": ratio,
        "qkv_bias": config.qkv_bias,
        "init_values": config.layerscale_value,
        "class_token": config.use_cls_token,
        "no_embed_class": no_embed_class,
        "reg_tokens": config.num_register_tokens,
        "final_norm": config.use_final_norm,
        "fc_norm": config.norm_after_pooling,
        "global_pool": {ours: theirs for theirs, ours in TIMM_POOLINGS.items()}[config.pooling],
        "act_layer": {ours: theirs for theirs, ours in reversed(TIMM_ACTIVATIONS.items())}[config.hidden_act],
    }


def _write(tensors: dict, model: ViTScratchForImageClassification, target: str, folder: Path, image_processor):
    """The tensors and a config.json in `folder`, as the target's library writes them, or else in our words."""
    config = model.config
    folder.mkdir(parents=True, exist_ok=True)
    if target == "jax":
        np.savez(folder / "model.npz", **tensors)
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if image_processor is not None and target != "timm":
        image_processor.save_pretrained(folder)
    if target == "transformers":
        config_class, model_class, _ = _transformers_classes(config)
        theirs = _transformers_config(config, config_class)
        theirs.architectures = [model_class.__name__]
        theirs.save_pretrained(folder)
        open_to_others(folder)
        return
    fields = {name: getattr(config, name) for name in CONFIG_FIELDS}
    if target == "timm":
        arguments = _timm_arguments(config, tensors["pos_embed"].shape[1] == math.prod(config.grid_hw))
        if config.layer_norm_eps != TIMM.layer_norm_eps:
            logger.warning(
                "timm's config.json cannot say layer_norm_eps=%g: give its norm_layer.", config.layer_norm_eps
            )
        names = [config.id2label[index] for index in range(config.num_labels)]
        card = {"input_size": [config.num_channels, *config.image_hw], "num_classes": config.num_labels}
        if image_processor is not None:
            cropped = dict(image_processor.crop_size) if getattr(image_processor, "do_center_crop", None) else {}
            resized = image_processor.size["shortest_edge"] or image_processor.size["height"]
            card |= {
                "mean": list(image_processor.image_mean),
                "std": list(image_processor.image_std),
                "interpolation": {number: name for name, number in TIMM_RESAMPLE.items()}[
                    int(image_processor.resample)
                ],
                "crop_pct": cropped["height"] / resized if cropped else 1.0,
                "crop_mode": "center" if cropped else "squash",
            }
        fields = {
            "architecture": "vit_base_patch16_224",  # its arguments are all overridden
            "num_classes": config.num_labels,
            "num_features": config.hidden_size,
            "global_pool": arguments["global_pool"],
            "label_names": names,
            "model_args": arguments,
            "layer_norm_eps": config.layer_norm_eps,
            "pretrained_cfg": card,
        }
    else:
        fields["id2label"] = config.id2label
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    open_to_others(folder)


# --- The proof -------------------------------------------------------------------------------------------------------


TOLERANCE = 1e-4


@dataclass
class Verification:
    """How far our model is from the source library's own.

    Args:
        reference: Whose model it was compared with.
        differences: Output -> largest absolute difference, in the order they are computed.
        top5: Pictures for which the five largest logits are the same classes in the same order, or None without
            logits.
        num_images: Pictures compared.
    """

    reference: str
    differences: dict[str, float]
    top5: int | None
    num_images: int

    @property
    def largest(self) -> float:
        """The largest of all differences."""
        return max(self.differences.values())

    @property
    def passed(self) -> bool:
        """Whether every output agrees to 1e-4, and the top-5 of every picture."""
        return self.largest <= TOLERANCE and self.top5 in (None, self.num_images)


@torch.no_grad()
def verify_checkpoint(
    checkpoint,
    source: str | None = None,
    *,
    model: ViTScratchForImageClassification | None = None,
    num_images: int = 2,
    revision: str | None = None,
    num_labels: int | None = None,
    **hints,
) -> Verification:
    """Run the source library's own model and ours on the same random images, in double precision.

    The reference reads the checkpoint by its own library's code, so a mistake in our tables shows. What tensors,
    config.json and hints tell is the same on both sides; where nothing does (epsilon, activation and pooling of a bare
    file), ours has what `convert_checkpoint` assumes, and the reference its library's own default. Only the heads,
    of which no library has a default for every width, are then the same. It is compared at the checkpoint's resolution,
    and with the checkpoint's head if it has one that our model can express. `convert_checkpoint` says what was
    recognised and assumed; this does not repeat it.

    Args:
        checkpoint: As for `convert_checkpoint`.
        source: As for `convert_checkpoint`.
        model: Ours, which was made of the checkpoint or the checkpoint of it; None converts the checkpoint.
        num_images: Random images.
        revision: As for `convert_checkpoint`.
        num_labels: As for `convert_checkpoint`; only where the head cannot be expressed.
        **hints: As for `convert_checkpoint`.

    Raises:
        ImportError: The source library cannot be imported here.
        NotImplementedError: No library still has a model that computes this.
        ValueError: As `convert_checkpoint`, or the checkpoint is one of ours.
    """
    located = _locate(checkpoint, revision=revision)
    if source is None and _own_folder(located):
        raise ValueError(f"{checkpoint} is this package's own; there is nothing to compare it with.")
    if model is not None:
        hints = {"num_attention_heads": model.config.num_attention_heads, **hints}
    with _silent(logger):
        opened = _open(located, str(checkpoint))
        family, named = _recognise(opened, source)
        plan = _plan(opened, family, named, hints, new_head=num_labels is not None)
        model = _convert(opened, family, named, plan)[0] if model is None else copy.deepcopy(model).eval()
    headless = plan.classes is None
    make = {id(TIMM): _timm_reference, id(TORCHVISION): _torchvision_reference, id(JAX): _jax_reference}
    told = _Told(ViTScratchConfig(**plan.fields), plan.told | {"num_attention_heads"})
    reference = make.get(id(named.layout), _transformers_reference)(opened, family, named, told, headless, num_images)
    generator = torch.Generator().manual_seed(0)
    config = model.config
    images = torch.randn(num_images, config.num_channels, *config.image_hw, generator=generator, dtype=torch.float64)
    theirs = _outputs(reference, images, headless)
    title = reference.title
    del reference
    norm = model.vit.pooled_norm if config.norm_after_pooling else model.vit.norm
    # Without hidden states the last block computes the class token alone.
    arguments = {"return_dict": True, "output_hidden_states": True}
    ours = _outputs(_Reference("ours", model, model.vit.layers, norm, arguments), images, headless)
    if "tanh layer" in theirs:
        ours["tanh layer"] = model.pre_logits(ours["final norm"][:, 0])
    differences = {name: (ours[name] - theirs[name]).abs().max().item() for name in theirs}
    top5 = None
    if "logits" in theirs:
        k = min(5, config.num_labels)
        agree = ours["logits"].topk(k).indices == theirs["logits"].topk(k).indices
        top5 = int(agree.all(dim=1).sum())
    return Verification(title, differences, top5, num_images)


def verify_export(model: ViTScratchForImageClassification, target: str, *, num_images: int = 2) -> Verification:
    """Export the model to a folder for the while, and run what the target's library makes of it as the reference.

    Args:
        model: Ours.
        target: As for `export_checkpoint`, which says what differs; this does not repeat it.
        num_images: Random images.

    Raises:
        ImportError: The target's library cannot be imported here.
        NotImplementedError: No library has a model that computes this.
        ValueError: As `export_checkpoint`.
    """
    with tempfile.TemporaryDirectory() as folder:
        with _silent(logger):
            export_checkpoint(model, target, folder)
        return verify_checkpoint(folder, model=model, num_images=num_images)


@dataclass
class _Told:
    """What a checkpoint and hints tell its own library: the fields of `config` that are in `names`."""

    config: ViTScratchConfig
    names: set[str]


@dataclass
class _Reference:
    """A model, and where in it are the blocks and the final norm."""

    title: str
    module: nn.Module
    blocks: nn.Module
    norm: nn.Module
    arguments: dict = field(default_factory=dict)


def _outputs(reference: _Reference, images: torch.Tensor, headless: bool) -> dict[str, torch.Tensor]:
    """Embeddings, every block's output, the final norm's, and the logits."""
    outputs = {}
    bar = tqdm(total=len(reference.blocks), desc=f"Running {reference.title}", unit="block", delay=2, leave=False)

    def keep(name: str, blocks: int = 0):
        def hook(module, inputs, output):
            outputs[name] = output[0] if isinstance(output, tuple) else output
            bar.update(blocks)

        return hook

    reference.blocks[0].register_forward_pre_hook(lambda module, inputs: outputs.update({"embeddings": inputs[0]}))
    for number, block in enumerate(reference.blocks, start=1):
        block.register_forward_hook(keep(f"block {number}", blocks=1))
    reference.norm.register_forward_hook(keep("final norm"))
    with bar:
        result = reference.module.double().eval()(images, **reference.arguments)
    if getattr(reference.module, "pooler", None) is not None:
        outputs["tanh layer"] = result.pooler_output
    if not headless:
        outputs["logits"] = getattr(result, "logits", result)
    return outputs


def _transformers_reference(opened, family, named, told, headless, num_images) -> _Reference:
    classes = {
        "transformers": ("ViTForImageClassification", "ViTModel", "vit"),
        "deit": ("DeiTForImageClassification", "DeiTModel", "deit"),
        "dino": ("ViTForImageClassification", "ViTModel", "vit"),
        "dinov2": ("Dinov2ForImageClassification", "Dinov2Model", "dinov2"),
        "dinov2_with_registers": (
            "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersModel", "dinov2_with_registers",
        ),
        "mae": (None, "ViTMAEModel", "vit"),
    }  # fmt: skip
    classifier, encoder, prefix = classes[family]
    model_class = getattr(transformers, encoder if headless or classifier is None else classifier)
    config_class = model_class.config_class
    if "model_type" in opened.config:
        config = config_class.from_dict(opened.config)
    else:
        config = _transformers_config(told.config, config_class, told.names)
    config.return_dict = True  # within its own forward, too
    arguments, keywords = {}, {}
    if family == "mae":
        config.mask_ratio = 0.0
        arguments["noise"] = torch.arange(math.prod(told.config.grid_hw)).expand(num_images, -1)  # keeps the order
    elif model_class.__name__ in ("ViTModel", "DeiTModel"):
        keywords["add_pooling_layer"] = told.config.representation_size is not None
    state = {name: named.raw(short).clone() for short, name in named.names.items()}
    with _silent(REPORT):
        loaded, report = model_class.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, dtype=torch.float32, **keywords
        )
    if report["missing_keys"]:
        raise ValueError(f"{model_class.__name__} misses {_some(sorted(report['missing_keys']))}.")
    base = getattr(loaded, prefix, loaded)
    blocks = base.layers if hasattr(base, "layers") else base.encoder.layer
    return _Reference(f"transformers' {model_class.__name__}", loaded, blocks, base.layernorm, arguments)


def _import_timm():
    try:
        import timm.layers
        import timm.models.deit
        import timm.models.vision_transformer as timm_vit
    except (ImportError, RuntimeError) as error:
        raise ImportError(f"timm cannot be imported here ({error}), so its own model was not run.") from error
    return timm, timm_vit


def _make_timm(opened: _Checkpoint, told: _Told, headless: bool, no_embed_class: bool, act_layer: str | None = None):
    """timm's model: the one its config.json names, or one with the fields that are told and timm's other defaults.

    `act_layer` is the activation where none is told; None for timm's own.
    """
    timm, timm_vit = _import_timm()
    config = told.config
    if config.representation_size is not None:
        raise NotImplementedError("timm dropped the tanh layer before the classifier: there is no model to compare.")
    classes = 0 if headless else config.num_labels
    norm = partial(timm.layers.LayerNorm, eps=config.layer_norm_eps) if "layer_norm_eps" in told.names else None
    if "architecture" in opened.config:
        arguments = {"global_pool": opened.config.get("global_pool"), **(opened.config.get("model_args") or {})}
        arguments |= {"norm_layer": norm} if "layer_norm_eps" in opened.config else {}
        arguments = {name: value for name, value in arguments.items() if value is not None}
        return timm.create_model(opened.config["architecture"], num_classes=classes, **arguments)
    arguments = {**_timm_arguments(config, no_embed_class), "num_classes": classes, "norm_layer": norm}
    for theirs in ("act_layer", "global_pool", "final_norm"):
        if TIMM_ARGUMENTS[theirs] not in told.names:
            del arguments[theirs]
    arguments = {"act_layer": act_layer, **arguments}
    if any(name.endswith("dist_token") for name in opened.tensors):
        if not headless:
            raise NotImplementedError("timm has no model with a distillation token and one head to compare.")
        return timm.models.deit.VisionTransformerDistilled(**{**arguments, "reg_tokens": 0})
    return timm_vit.VisionTransformer(**arguments)


def _timm_reference(opened, family, named, told, headless, num_images) -> _Reference:
    state = {short: named.raw(short).clone() for short in named.names}
    registers = "register_tokens" in state
    alone = state["pos_embed"].shape[1] == math.prod(told.config.grid_hw)
    reference = _make_timm(opened, told, headless, no_embed_class=alone or registers)
    for pattern in (*TIMM.unused, *REFUSED_HEADS):
        state = {name: tensor for name, tensor in state.items() if not re.fullmatch(pattern, name)}
    if headless:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    if registers:
        state["mask_token"] = torch.zeros(1)  # by which timm recognises DINOv2
    reference.load_state_dict(_import_timm()[1].checkpoint_filter_fn(state, reference, adapt_layer_scale=True))
    norm = reference.fc_norm if told.config.norm_after_pooling else reference.norm
    return _Reference("timm's VisionTransformer", reference, reference.blocks, norm)


def _jax_reference(opened, family, named, told, headless, num_images) -> _Reference:
    # nn.gelu in vit_jax/models_vit.py and big_vision/models/vit.py: flax's default is the tanh form, timm's is not.
    reference = _make_timm(opened, told, headless, no_embed_class=False, act_layer="gelu_tanh")
    with tempfile.TemporaryDirectory() as folder:
        path = opened.path
        if path is None:
            path = Path(folder) / "model.npz"
            np.savez(path, **{short: named.raw(short).numpy() for short in named.names})
        reference.load_pretrained(str(path))
    return _Reference(
        "timm's VisionTransformer, by its reader of .npz files", reference, reference.blocks, reference.norm
    )


def _torchvision_reference(opened, family, named, told, headless, num_images) -> _Reference:
    try:
        from torchvision.models import VisionTransformer
    except (ImportError, RuntimeError) as error:
        raise ImportError(f"torchvision cannot be imported here ({error}), so its own model was not run.") from error
    config = told.config
    told_norm = {"norm_layer": partial(nn.LayerNorm, eps=config.layer_norm_eps)}
    reference = VisionTransformer(
        image_size=config.image_hw[0],
        patch_size=config.patch_hw[0],
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        hidden_dim=config.hidden_size,
        mlp_dim=config.intermediate_size,
        num_classes=config.num_labels,
        representation_size=config.representation_size,
        **(told_norm if "layer_norm_eps" in told.names else {}),
    )
    state = {short: named.raw(short).clone() for short in named.names}
    if headless:
        state |= {name: tensor for name, tensor in reference.state_dict().items() if name.startswith("heads.")}
    reference.load_state_dict(state)
    return _Reference("torchvision's VisionTransformer", reference, reference.encoder.layers, reference.encoder.ln)
