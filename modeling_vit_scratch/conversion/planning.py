"""What of a foreign checkpoint goes where, and the config that describes it."""

import logging
import math
import re
from dataclasses import dataclass, field

import torch

from .layouts import (
    CONFIG_FIELDS,
    DINOV2,
    FAMILIES,
    PUBLISHED_HEADS,
    REFUSED_HEADS,
    TIMM_ACTIVATIONS,
    TIMM_ARCHITECTURES,
    TIMM_ARGUMENTS,
    TIMM_INTERPOLATIONS,
    TIMM_POOLINGS,
    TIMM_REFUSED,
    TRANSFORMERS,
    Layout,
)
from .reading import Checkpoint, first_few
from .recognition import NamedTensors, refuse

logger = logging.getLogger(__package__)


def raise_unfit(title: str, problems: dict[str, list[str]]):
    texts = [f"{problem} are {first_few(names)}" for problem, names in problems.items() if names]
    if texts:
        raise ValueError(f"{title} does not fit: {'; '.join(texts)}.")


@dataclass
class Plan:
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


def make_plan(opened: Checkpoint, family: str, named: NamedTensors, hints: dict, new_head: bool) -> Plan:
    """Read the geometry off the tensors, and what they cannot tell off hints, config.json and the published values."""
    refuse(list(named.names), opened.title)
    hints = dict(hints)
    claims = _claims(opened)
    grid = hints.pop("grid_size", None)
    blocks = _num_blocks(named, opened.title)
    kernel = named.shape("vit.embeddings.patch_embeddings.projection.weight")
    if len(kernel) != 4:
        raise ValueError(f"{opened.title}: {named.layout.marker} must have 4 dimensions, got {len(kernel)}.")
    D, C, *patch = kernel
    claimed = as_pair(claims.pop("image_size", None))
    if claimed is not None and not (isinstance(claimed, tuple) and [type(side) for side in claimed] == [int, int]):
        raise ValueError(
            f"config.json says image_size={claimed!r}, which is neither a number nor a height and a width."
        )
    if grid is None and claimed is not None:
        grid = (claimed[0] // patch[0], claimed[1] // patch[1])
        if claimed != (grid[0] * patch[0], grid[1] * patch[1]):
            logger.warning("Left out the rows and columns of %dx%d images beyond the last whole patch.", *claimed)
    plan = Plan({}, {}, {}, None)
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
            if name in measured and as_pair(value) != as_pair(measured[name]):
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


def _interpolation(opened: Checkpoint, family: str, layout: Layout) -> str:
    """How the code that the checkpoint comes from resizes positions."""
    if layout in (TRANSFORMERS, DINOV2):
        return FAMILIES[family].in_transformers
    architecture = opened.config.get("architecture") or ""
    special = (how for pattern, how in TIMM_INTERPOLATIONS.items() if re.fullmatch(pattern, architecture))
    return next(special, FAMILIES[family].interpolation)


def _num_blocks(named: NamedTensors, title: str) -> int:
    patterns = [re.escape(start).replace(r"\{i\}", r"(\d+)") for start in named.layout.block.split("|")]
    matches = [re.match(pattern, name) for name in named.names for pattern in patterns]
    numbers = {int(match[1]) for match in matches if match}
    if not numbers:
        raise ValueError(f"{title} has {named.layout.title} names, but no blocks {named.layout.block.split('|')[0]}*.")
    return max(numbers) + 1


def as_pair(value):
    """A size as (height, width), whichever way it is written; anything else as it is."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value, value)
    return tuple(value) if isinstance(value, list) else value


def _single(size: list[int]) -> int | tuple[int, int]:
    return size[0] if size[0] == size[1] else tuple(size)


def _plan_tokens(
    plan: Plan, title: str, named: NamedTensors, D: int, grid: tuple[int, int] | None
) -> tuple[tuple[int, int], int]:
    """Class token, registers and positions in our form: a position for the class token, none for registers.

    A register with a position is the register plus its position; a class token without one has position 0. Returns the
    grid (down, across), and the number of registers.
    """
    prefix = "vit.embeddings."
    tokens = int(named.use_cls_token)
    positions = named.read(prefix + "position_embeddings")
    if positions is None:
        raise_unfit(title, {"missing": named.missing})
    shapes = {"registers": named.shape(prefix + "register_tokens"), "positions": list(positions.shape)}
    wrong = [
        f"{name} {tuple(shape)} instead of (1, tokens, {D})"
        for name, shape in shapes.items()
        if shape is not None and (len(shape) != 3 or shape[0] != 1 or shape[2] != D)
    ]
    raise_unfit(title, {"misshapen": wrong})
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


def _plan_head(plan: Plan, opened: Checkpoint, named: NamedTensors, D: int, hints: dict, new_head: bool) -> str | None:
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
                f"{opened.title} has {what}, which this model has not: {first_few(names)}. "
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


def _claims(opened: Checkpoint) -> dict:
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
