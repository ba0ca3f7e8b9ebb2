"""A model made from a checkpoint: ours, or filled by a plan, with positions resized or a new head."""

import copy
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from torch import nn
from tqdm.auto import tqdm

from ..configuration_vit_scratch import ViTScratchConfig
from ..modeling_vit_scratch import ViTScratchForImageClassification, resize_positions
from .layouts import WEIGHT_FILES
from .planning import Plan, as_pair, make_plan, raise_unfit
from .reading import Checkpoint, first_few, locate, one_line, open_checkpoint, read_json, silent
from .recognition import NamedTensors, recognise

logger = logging.getLogger(__package__)


# A trained model of CIFAR-10's classes that comes with the package (scripts/recipes/budget.yaml).
PACKAGED_MODEL = Path(__file__).parents[1] / "packaged"


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
    A folder of ours that was saved quantised (with a `quantization_config`) stays so.

    Its outputs have names, as what uses it here expects, even if the checkpoint's own config says `return_dict=False`;
    `from_pretrained`, and `return_dict=False` among the hints, give tuples.

    Args:
        checkpoint: A state dict, a dict of numpy arrays, a file (.safetensors, .npz, .pt, .pth, .bin), a folder, or a
            Hub id. A config.json beside the weights is read.
        source: One of `FAMILIES`; None to recognise it from the names.
        image_size: Pixels, one number or (height, width), to resize the positions to, as the source's own code does
            (the config's `position_interpolation`); None keeps the resolution.
        num_labels: Classes; a number other than the checkpoint's makes the head anew.
        id2label: Names of the classes; as many as there are.
        replace_head: Whether `representation_size=None` may take the head with the tanh layer before it, as it may if
            `num_labels` is given.
        revision: Branch, tag or commit of a Hub id.
        cache_dir: Where files of the Hub are kept; None for its usual cache.
        token: For a private Hub id; None for the one that `hf auth login` stored.
        **hints: `architecture`, timm's name of the model, for a bare file of timm's; fields of the config that tensors
            cannot tell, such as `num_attention_heads`, `layer_norm_eps`, `hidden_act`, `pooling`,
            `position_interpolation` or `drop_path_rate`; `grid_size`, the checkpoint's patches (down, across) where
            they are no square; `representation_size=None` to leave out a tanh layer before a new head.

    Raises:
        ValueError: The checkpoint cannot be read or recognised; tensors are missing, left over, of a wrong shape or
            not finite; the model cannot express it; or hints contradict the tensors.
    """
    located = locate(checkpoint, revision=revision, cache_dir=cache_dir, token=token)
    own = None if source is not None else find_own_folder(located)
    if own is not None:
        model, headless = _load_own(own, {"return_dict": True, **hints})
    else:
        opened = open_checkpoint(located, str(checkpoint))
        family, named = recognise(opened, source)
        named.consume = opened.path is not None and isinstance(opened.tensors, dict)
        plan = make_plan(opened, family, named, hints, replace_head or num_labels is not None)
        model, headless = convert(opened, family, named, plan)
    return _change(model, headless, image_size, num_labels, id2label)


def config_fields(text: str | None) -> dict:
    """The fields of a config that `--config_overrides field=value,field=value` names, with their values."""
    fields = {}
    for item in filter(None, re.split(r",(?![^\[]*\])", text or "")):  # no comma of a list
        name, separator, value = item.partition("=")
        if not separator:
            raise ValueError(f"config_overrides: {item!r} is not of the form field=value.")
        name = name.strip()
        if name in ("source", "revision", "cache_dir", "token", "replace_head"):  # keywords of `convert_checkpoint`
            raise ValueError(f"config_overrides: {name} is no field of the config; --help lists the options.")
        value = yaml.safe_load(value)
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value, re.IGNORECASE):
            value = float(value)  # which YAML takes for text, since it has no point
        fields[name] = value
    return fields


def quantized_by(model: ViTScratchForImageClassification) -> str | None:
    """The library that quantised the weights of a model before it was saved, e.g. "torchao"; None for plain ones."""
    config = getattr(model.config, "quantization_config", None)
    method = config["quant_method"] if isinstance(config, dict) else getattr(config, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def require_unquantized(model: ViTScratchForImageClassification, name: str):
    """Raise a ValueError if weights were saved quantised: they can neither be trained nor written for others."""
    if quantized_by(model) is not None:
        raise ValueError(f"{name} has quantised weights, which only predict; take the model that it was made of.")


def is_own(checkpoint, **hub) -> bool:
    """Whether a file, folder or Hub id (`hub`: revision, cache_dir, token) holds a model that this package saved."""
    return own_folder(checkpoint, **hub) is not None


def own_folder(checkpoint, **hub) -> Path | None:
    """The folder of a file, folder or Hub id, as for `is_own`, that holds a model that this package saved, or None."""
    return find_own_folder(locate(checkpoint, **hub))


def find_own_folder(located) -> Path | None:
    """The folder of a checkpoint that this package saved, or None."""
    if isinstance(located, Mapping):
        return None
    if located.is_file() and located.name not in WEIGHT_FILES:
        return None  # a file of its own beside our config
    folder = located if located.is_dir() else located.parent
    config = folder / "config.json"
    if config.is_file() and read_json(config).get("model_type") == ViTScratchConfig.model_type:
        return folder
    return None


# What says that a head was made: to who trains it, and not to who only predicts.
HEADS = logging.getLogger(f"{__name__}.heads")
# Whose table of missing and left-over tensors is not printed: we say it our way.
REPORT = logging.getLogger("transformers.modeling_utils")


def _load_own(folder: Path, hints: dict) -> tuple[ViTScratchForImageClassification, bool]:
    """A model of this package, and whether its head is new."""
    config, unknown = ViTScratchConfig.from_pretrained(folder, return_unused_kwargs=True, **hints)
    if unknown:
        ViTScratchConfig(**unknown)  # says which is no field
    try:
        with silent(REPORT):
            model, report = ViTScratchForImageClassification.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
            )
    except ImportError as error:  # of what quantised it
        raise ValueError(
            f"{folder} cannot be loaded: {one_line(error)}; pip install 'modeling_vit_scratch[quantize]' has torchao."
        ) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be loaded: {one_line(error)}") from error
    missing, left_over = set(report["missing_keys"]), set(report["unexpected_keys"])
    architecture = (config.architectures or [""])[0]
    untrained = () if architecture == "ViTScratchForImageClassification" else ("classifier.", "pre_logits.")
    if architecture in ("ViTScratchForMaskedImageModeling", "ViTScratchBackbone"):  # these read the tokens alone
        untrained += ("vit.pooled_norm.", "vit.attention_pooling.")
    head = {name for name in missing if name.startswith(untrained)}
    decoder = {name for name in left_over if re.match(r"(vit\.)?(embeddings\.)?(decoder|mask_token)", name)}
    problems = {
        "missing": sorted(missing - head),
        "left over": sorted(left_over - decoder),
        "of another shape": [f"{name} {tuple(old)} for {tuple(new)}" for name, old, new in report["mismatched_keys"]],
        "not finite (NaN or infinite)": [
            name for name, p in model.state_dict().items() if not p.detach().dequantize().isfinite().all()
        ],
    }
    raise_unfit(str(folder), problems)
    if decoder:
        logger.warning("Left out the pre-training decoder: %s.", first_few(sorted(decoder)))
    return model.eval(), bool(head)


def convert(
    opened: Checkpoint, family: str, named: NamedTensors, plan: Plan
) -> tuple[ViTScratchForImageClassification, bool]:
    """The exact conversion, at the checkpoint's resolution, and whether its head is new."""
    model = meta_model(ViTScratchConfig(**plan.fields))
    state = _fill(model, opened.title, named, plan)
    config = model.config
    logger.warning(
        "Recognised %s names (%s): %d blocks of width %d, %d heads, MLP of %d, patches of %s, images of %s, %s.",
        named.layout.title, family, config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
        config.intermediate_size, "x".join(map(str, config.patch_hw)), "x".join(map(str, config.image_hw)),
        "no classifier" if plan.classes is None else f"{plan.classes} classes",
    )  # fmt: skip
    for what in dict.fromkeys(plan.left_out.values()):
        logger.warning("Left out %s: %s.", what, first_few([n for n in plan.left_out if plan.left_out[n] == what]))
    if named.dtypes - {"float32"}:
        logger.warning("Weights of %s became float32.", " and ".join(sorted(named.dtypes - {"float32"})))
    return materialise(model, state), plan.classes is None


def _fill(
    model: ViTScratchForImageClassification, title: str, named: NamedTensors, plan: Plan
) -> dict[str, torch.Tensor]:
    """The state dict of `model`, a copy of the checkpoint's tensors, without a head that has to be new.

    Raises:
        ValueError: Tensors are missing, left over, misshapen or not finite; all of them are listed.
    """
    named.missing = []
    state, nameless, misshapen, infinite = {}, [], [], []
    needed = model.state_dict().items()
    for ours, empty in tqdm(needed, "Converting", unit="tensor", delay=2, leave=False):
        if plan.classes is None and ours.startswith("classifier."):
            continue
        tensor = plan.tensors[ours] if ours in plan.tensors else named.read(ours)
        if tensor is None:
            nameless += [] if named.find(ours) else [ours]  # which these names have as part of another, or not at all
            continue
        theirs = "/".join(filter(None, named.find(ours)))
        if ours.endswith("patch_embeddings.projection.weight"):
            tensor = tensor.flatten(1)
        if plan.channels is not None:
            tensor = reorder_channels(ours, tensor, plan.channels)
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
    raise_unfit(
        title,
        {
            "missing": named.missing + nameless,
            "left over": left_over,
            "misshapen": [*named.misshapen.values(), *misshapen],
            "not finite": infinite,
        },
    )
    return state


def reorder_channels(ours: str, tensor: torch.Tensor, channels: list[int]) -> torch.Tensor:
    """Of our tensor `ours`, the channels of each head of queries and keys in this order; others as they are."""
    match = re.fullmatch(r"vit\.layers\.\d+\.attention\.(qkv\.weight|qkv\.bias|q_bias|[qk]_norm\.\w+)", ours)
    if not match:
        return tensor
    value = tensor.shape[0] * 2 // 3 if match[1].startswith("qkv") else tensor.shape[0]  # values keep their order
    turned = tensor[:value].unflatten(0, (-1, len(channels)))[:, channels].flatten(0, 1)
    return torch.cat([turned, tensor[value:]])


def meta_model(config: ViTScratchConfig) -> ViTScratchForImageClassification:
    """A model without memory behind its parameters."""
    with torch.device("meta"):
        return ViTScratchForImageClassification(config)


def materialise(
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
    if image_size is not None and as_pair(image_size) != old:
        config.image_size = image_size
        config.validate()
        position = "vit.embeddings.position_embeddings"
        if position in state:
            resized = model.config.grid_hw, config.grid_hw, config.position_interpolation
            state[position] = resize_positions(state[position], *resized)
        if model.vit.embeddings.position_embeddings is not None:  # rotary ones are computed for any size
            logger.warning(
                "Resized the positions from %dx%d to %dx%d patches (images of %dx%d).", *model.config.grid_hw,
                *config.grid_hw, *config.image_hw,
            )  # fmt: skip
    new_head = headless or num_labels != config.num_labels
    if new_head:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("classifier.")}
        if num_labels != config.num_labels:
            config.num_labels = num_labels
        HEADS.warning("Made a new head for %d classes.", num_labels)
    if id2label is not None:
        config.id2label = {int(index): str(name) for index, name in id2label.items()}
        config.label2id = {name: index for index, name in config.id2label.items()}
    return materialise(meta_model(config), state)
