"""What of a foreign checkpoint goes where, and the config that describes it."""

import logging
import math
import re
from dataclasses import dataclass, field

import torch
import transformers

from .architectures import (
    INTERPOLATIONS,
    Untold,
    arguments_of,
    channel_order,
    check_names,
    claims_of,
    family_of,
)
from .families import CONFIG_FIELDS, DISTILLED_HEADS, FAMILIES, VISION_CONFIGS
from .layouts import DINOV2, DINOV2_GATED, DINOV3, NAFLEX, TIMM, TOWER, TRANSFORMERS, Layout
from .reading import Checkpoint, first_few
from .recognition import OF_TRANSFORMERS, NamedTensors, refuse

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
        channels: Where each channel of a head of queries and keys stands in theirs; None where the order is the same.
        told: The fields that tensors, config.json or hints tell; the others are the published values.
    """

    fields: dict
    tensors: dict[str, torch.Tensor]
    left_out: dict[str, str]
    classes: int | None
    channels: list[int] | None = None
    told: set[str] = field(default_factory=set)


def make_plan(opened: Checkpoint, family: str, named: NamedTensors, hints: dict, new_head: bool) -> Plan:
    """Read the geometry off the tensors, and what they cannot tell off hints, config.json and the published values."""
    refuse(list(named.names), opened.title)
    hints = dict(hints)
    if "architecture" in hints:
        if named.layout not in (TIMM, NAFLEX):
            raise ValueError(
                f"{opened.title} has {named.layout.title} names, not timm's: an architecture of timm's "
                f"({hints['architecture']}) says nothing of it; leave it out."
            )
        opened.config["architecture"] = hints.pop("architecture")
    arguments = arguments_of(opened) if "architecture" in opened.config else {}
    claims = {**_claims(opened), **claims_of(arguments)}
    plan = Plan({}, {}, {**named.unused, **dict.fromkeys(named.outside, "what is not the image tower")}, None)
    blocks = _num_blocks(named, opened.title)
    if named.layout in (TIMM, NAFLEX):
        check_names(opened, family, named.names, hints, arguments)
    D, C, *patch = _kernel(opened.title, named)
    grid = _grid(opened, named, claims, hints, patch)
    told_head = _plan_head(plan, opened, named, D, hints, new_head)
    rotary = {**FAMILIES[family].fields, **claims, **hints}.get("position_embedding_type")
    grid, registers = _plan_tokens(plan, opened.title, named, D, grid, rotary)
    measured = {**_measure(named, blocks), **told_head.pop("measured", {})}
    measured |= {
        "hidden_size": D,
        "num_channels": C,
        "patch_size": _single(patch),
        "image_size": _single([grid[0] * patch[0], grid[1] * patch[1]]),
        "num_register_tokens": registers,
    }
    if set(named.find("pre_logits.0.bias")) & set(plan.left_out):
        measured["representation_size"] = None
    # Of a rotary model, both may be told: whether there are learned positions besides, the tensors know.
    learned = "vit.embeddings.position_embeddings" in plan.tensors
    if learned and {**claims, **hints}.get("position_embedding_type") in ("none", "sincos"):
        raise ValueError(f"{opened.title} has embeddings of positions, though they are said to be {rotary!r}.")
    if rotary in ("rope", "learned+rope"):
        measured["position_embedding_type"] = "learned+rope" if learned else "rope"
        claims.pop("position_embedding_type", None)
        hints.pop("position_embedding_type", None)
    for origin, told in (("config.json says", claims), ("the hint is", hints)):
        for name, value in told.items():
            if name in measured and as_pair(value) != as_pair(measured[name]):
                raise ValueError(f"{origin} {name}={value!r}, but the tensors say {measured[name]!r}.")
    bare = not (measured["use_cls_token"] or registers or measured["qkv_bias"] or arguments)
    if measured["norm_after_pooling"] and bare and "norm_after_pooling" not in hints:
        raise ValueError(
            f"{opened.title} has the names of timm's vit_*_rpn_*, with norms after the branches, which this model has "
            "not; pass norm_after_pooling=True if it has norms before them."
        )
    scaled = any(named.has(f"vit.layers.0.layer_scale{n}.scale") for n in (1, 2))
    defaults = {
        "pooling": "mean" if measured["norm_after_pooling"] or not measured["use_cls_token"] else "cls",
        "layer_norm_eps": FAMILIES[family].layer_norm_eps or _epsilon(named, measured["use_embedding_norm"]),
        "layerscale_value": float(opened.config.get("layerscale_value") or 1e-5) if scaled else None,
        "position_interpolation": _interpolation(opened, family, named.layout),
        "hidden_act": _activation(family, named, measured["use_gated_mlp"]),
        **FAMILIES[family].fields,
    }
    if named.layout is DINOV2_GATED:
        claims["hidden_act"] = "silu"  # whatever the config says, its SwiGLU has this one
    fields = {**claims, **told_head, **hints, **measured}
    plan.told = set(fields) | ({"pooling"} if defaults["pooling"] == "mean" else set())
    fields = {**defaults, **fields}
    if "num_attention_heads" not in fields:
        fields["num_attention_heads"] = heads = _published_heads(opened, family, D)
        logger.warning("Assumed %d heads of %d channels; num_attention_heads= says otherwise.", heads, D // heads)
    if not fields["hidden_act"]:
        raise Untold(
            f"{opened.title} does not tell its activation; pass hidden_act='quick_gelu' for OpenAI's own weights and "
            "those trained with it, or hidden_act='gelu' for most of OpenCLIP's."
        )
    if named.layout.jax and "hidden_act" not in plan.told:
        logger.warning("Assumed the tanh form of GELU, as Google's code has; hidden_act='gelu' is the exact one.")
    _plan_attention(plan, named, arguments, fields)
    _name_classes(plan, opened, fields)
    plan.fields = fields
    return plan


def _kernel(title: str, named: NamedTensors) -> list[int]:
    """The shape of the patch projection's kernel: (D, C, h, w)."""
    kernel = named.shape("vit.embeddings.patch_embeddings.projection.weight")
    if len(kernel) != 4:
        raise ValueError(f"{title}: {named.layout.marker} must have 4 dimensions, got {len(kernel)}.")
    return kernel


def _grid(
    opened: Checkpoint, named: NamedTensors, claims: dict, hints: dict, patch: list[int]
) -> tuple[int, int] | None:
    """The patches (down, across) that hints, a grid of positions or config.json tell."""
    if "grid_size" in hints:
        claims.pop("image_size", None)
        return hints.pop("grid_size")
    claimed = as_pair(claims.pop("image_size", None))
    if claimed is not None and not (isinstance(claimed, tuple) and [type(side) for side in claimed] == [int, int]):
        raise ValueError(
            f"config.json says image_size={claimed!r}, which is neither a number nor a height and a width."
        )
    position = named.find("vit.embeddings.position_embeddings")
    if named.layout is NAFLEX and position[0] and len(shape := named.raw(position[0]).shape) == 4:
        return shape[1], shape[2]  # whatever size the config names for images: they may have any
    if claimed is None:
        return None
    grid = (claimed[0] // patch[0], claimed[1] // patch[1])
    if claimed != (grid[0] * patch[0], grid[1] * patch[1]):
        logger.warning("Left out the rows and columns of %dx%d images beyond the last whole patch.", *claimed)
    return grid


def _measure(named: NamedTensors, blocks: int) -> dict:
    """The fields of our config that the tensors tell."""
    inner = next((shape[-1] for i in range(blocks) if (shape := named.shape(f"vit.layers.{i}.mlp.fc2.weight"))), None)
    width = next((shape[-1] for i in range(blocks) if (shape := named.shape(f"vit.layers.{i}.mlp.fc1.bias"))), inner)
    biased = [
        [part is not None for part in named.find(f"vit.layers.{i}.attention.qkv.bias")] or [False]
        for i in range(blocks)
    ]
    separate = any(named.has(f"vit.layers.{i}.attention.q_bias") for i in range(blocks))
    masked = any(name.endswith(".bias_mask") for name in named.names)
    # CLIP normalises what it pools, SigLIP every token; transformers gives that norm the same name.
    after = named.has("vit.pooled_norm.weight") and (named.layout is not TOWER or named.use_cls_token)
    query = named.find("vit.layers.0.attention.qkv.weight")[0]
    heads = {}
    if named.layout.jax and query is not None and (kernel := named.raw(query)).ndim == 3:
        heads = {"num_attention_heads": kernel.shape[1]}
    return {
        **heads,
        "num_hidden_layers": blocks,
        "intermediate_size": inner,
        "use_gated_mlp": bool(width and inner and width == 2 * inner),
        "use_cls_token": named.use_cls_token,
        "qkv_bias": separate or any(map(any, biased)),
        "key_bias": not (separate and not any(map(all, biased))) and not masked,
        "use_qk_norm": named.has("vit.layers.0.attention.q_norm.weight"),
        "use_embedding_norm": named.has("vit.embedding_norm.weight"),
        "norm_after_pooling": after,
        "representation_size": (named.shape("pre_logits.0.bias") or [None])[-1],
    }


def _epsilon(named: NamedTensors, before: bool) -> float:
    """The layout's published epsilon; timm's models with a norm before the blocks have CLIP's."""
    return 1e-5 if named.layout is TIMM and before else named.layout.layer_norm_eps


def _activation(family: str, named: NamedTensors, gated: bool) -> str:
    """The published activation; "" where the family has several."""
    if gated and named.layout is not DINOV3:
        return "silu"
    if FAMILIES[family].hidden_act is not None:
        return FAMILIES[family].hidden_act
    return "silu" if gated else named.layout.hidden_act


def _published_heads(opened: Checkpoint, family: str, D: int) -> int:
    """The heads of the family's published model of this width.

    Raises:
        ValueError: There is none, or several with different heads.
    """
    architecture, heads = opened.config.get("architecture"), FAMILIES[family].heads
    if architecture is not None:
        if family_of(architecture) is None:
            raise Untold(
                f"timm's {architecture} is not known here, so its heads cannot be told; pass num_attention_heads=, and "
                "whatever else differs from a plain ViT."
            )
        heads = {D: D // 64}
    if D not in heads:
        reason = f"{family!r} has published no model of width {D}" if heads else "timm's models of one width differ"
        raise Untold(
            f"the heads cannot be told from the tensors: {reason}; pass num_attention_heads=, often "
            f"{max(D // 64, 1)} at this width."
        )
    return heads[D]


def _plan_attention(plan: Plan, named: NamedTensors, arguments: dict, fields: dict):
    """What of attention is more than a tensor under another name: masked biases, learned frequencies, pooling."""
    D, A, L = fields["hidden_size"], fields["num_attention_heads"], fields["num_hidden_layers"]
    plan.channels = channel_order(arguments, D // A)
    if any(name.endswith(".bias_mask") for name in named.names):  # Meta's DINOv3 masks the keys' part
        for i in range(L):
            query, _, value = named.read(f"vit.layers.{i}.attention.qkv.bias").float().chunk(3)
            plan.tensors |= {
                f"vit.layers.{i}.attention.q_bias": query,
                f"vit.layers.{i}.attention.v_bias": value,
            }
    if "rope.freqs" in named.names:
        named.used.add("rope.freqs")
        frequencies = named.raw("rope.freqs").float()  # (2, L, A, d / 2), x and y
        if frequencies.shape != (2, L, A, D // A // 2):
            raise ValueError(f"rope.freqs is {tuple(frequencies.shape)}, not {(2, L, A, D // A // 2)}.")
        first_x = arguments.get("rope_grid_indexing") == "xy"  # ours has y first
        for i, layer in enumerate((frequencies.flip(0) if first_x else frequencies).permute(1, 2, 0, 3)):
            plan.tensors[f"vit.rotary_positions.{i}.frequencies"] = layer
    for leaf in ("weight", "bias"):
        if named.has(f"vit.attention_pooling.qkv.{leaf}"):
            fused = named.read(f"vit.attention_pooling.qkv.{leaf}").float()
            plan.tensors[f"vit.attention_pooling.q.{leaf}"] = fused[:D]
            plan.tensors[f"vit.attention_pooling.kv.{leaf}"] = fused[D:]
    bias = "vit.embeddings.patch_embeddings.projection.bias"
    if not named.has(bias) and fields["use_embedding_norm"]:  # CLIP's patches have none
        plan.tensors[bias] = torch.zeros(D)


def _name_classes(plan: Plan, opened: Checkpoint, fields: dict):
    labels = _label_names(opened.config)
    if labels and plan.classes in (None, len(labels)):
        fields |= {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}
    elif plan.classes is not None:
        fields["num_labels"] = plan.classes
        if labels:
            logger.warning("config.json names %d classes, the head has %d: left out.", len(labels), plan.classes)


def _interpolation(opened: Checkpoint, family: str, layout: Layout) -> str:
    """How the code that the checkpoint comes from resizes positions."""
    if layout in OF_TRANSFORMERS:
        return FAMILIES[family].in_transformers
    architecture = opened.config.get("architecture") or ""
    special = (how for pattern, how in INTERPOLATIONS.items() if re.fullmatch(pattern, architecture))
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
    plan: Plan, title: str, named: NamedTensors, D: int, grid: tuple[int, int] | None, told: str | None
) -> tuple[tuple[int, int], int]:
    """Class token, registers and positions in our form: a position for the class token, none for registers.

    A register with a position is the register plus its position; a class token without one has position 0. Returns the
    grid (down, across), and the number of registers.
    """
    prefix = "vit.embeddings."
    tokens = int(named.use_cls_token)
    if prefix + "cls_token" in plan.tensors:  # a class token and a distillation token
        tokens = plan.tensors[prefix + "cls_token"].shape[1]
    registers = named.shape(prefix + "register_tokens") if tokens < 2 else None
    _check_tokens(title, "registers", registers, D)
    registers = registers[1] if registers else 0
    named.used.update(filter(None, named.find(prefix + "register_tokens")))  # though there may be none in it
    if not named.has(prefix + "position_embeddings"):
        if told not in ("rope", "learned+rope", "none"):
            raise_unfit(title, {"missing": [named.layout.names[prefix + "position_embeddings"]]})
        kernel = named.shape(prefix + "patch_embeddings.projection.weight")
        return grid or (224 // kernel[2], 224 // kernel[3]), registers
    positions = named.read(prefix + "position_embeddings")
    if positions is None:
        raise_unfit(title, {"missing": named.missing})
    _check_tokens(title, "positions", list(positions.shape), D)
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


def _check_tokens(title: str, name: str, shape: list[int] | None, D: int):
    if shape is not None and (len(shape) != 3 or shape[0] != 1 or shape[2] != D):
        raise_unfit(title, {"misshapen": [f"{name} {tuple(shape)} instead of (1, tokens, {D})"]})


def _plan_head(plan: Plan, opened: Checkpoint, named: NamedTensors, D: int, hints: dict, new_head: bool) -> dict:
    """Which head is taken over (`plan.classes`) and which left out; the fields that the head tells, those under
    "measured" beyond doubt."""
    classifier = [name for name in named.find("classifier.weight") + named.find("classifier.bias") if name]
    tanh = [name for name in named.find("pre_logits.0.weight") + named.find("pre_logits.0.bias") if name]
    if classifier:
        plan.classes = (named.shape("classifier.bias") or named.shape("classifier.weight") or [0])[0]
    told = {}
    if named.has("vit.attention_pooling.query"):
        told["measured"] = {"pooling": "attention"}
        if named.layout is TOWER and classifier:  # transformers' classifier reads the mean instead
            told["measured"] = {}
            told["pooling"] = "mean"
            plan.left_out |= {name: "attention pooling" for name in named.names if name.startswith("head.")}
    elif named.layout is TOWER and classifier and named.use_cls_token:  # CLIP's, of tokens without its norm
        told |= {"pooling": "mean", "use_final_norm": False}
        told["measured"] = {"norm_after_pooling": False}
        plan.left_out |= {name: "the norm of the class token" for name in named.names if name.startswith("post_layer")}
    if any(name.startswith(heads[1]) for name in named.names for heads in DISTILLED_HEADS.values()):
        told["measured"] = {"num_cls_tokens": 2}
        _plan_two_heads(plan, named)
    if named.layout in (DINOV2, DINOV2_GATED) and named.shape("classifier.weight") == [plan.classes, 2 * D]:
        on_cls, on_mean = named.read("classifier.weight").float().split(D, dim=1)
        if on_cls.any() and on_mean.any():
            told["pooling"] = "cls+mean"
        else:
            told["pooling"] = "mean" if on_mean.any() else "cls"
            plan.tensors["classifier.weight"] = on_mean if on_mean.any() else on_cls
    if tanh and named.layout in (TRANSFORMERS, DINOV2):
        if classifier:
            plan.left_out |= dict.fromkeys(tanh, "the pooler, which its classifier does not use")
        elif opened.config.get("pooler_act", "tanh") != "tanh":
            raise ValueError(f"{opened.title} has a pooler with {opened.config['pooler_act']!r}; only tanh is known.")
    if tanh and hints.get("representation_size", 0) is None and (new_head or not classifier):
        plan.classes = None
        plan.left_out |= dict.fromkeys([*tanh, *classifier], "the tanh layer")
    return told


def _plan_two_heads(plan: Plan, named: NamedTensors):
    """DeiT's two heads, whose mean it predicts, as one on the class token and the distillation token side by side."""
    prefix = "vit.embeddings."
    tokens = [named.read(prefix + "cls_token").float(), named.read(prefix + "register_tokens").float()]
    plan.tensors[prefix + "cls_token"] = torch.cat(tokens, dim=1)
    heads = next(heads for heads in DISTILLED_HEADS.values() if f"{heads[1]}.weight" in named.names)
    names = [f"{head}.{leaf}" for head in heads for leaf in ("weight", "bias")]
    raise_unfit("the distilled model", {"missing": [name for name in names if name not in named.names]})
    named.used.update(names)
    on_cls, on_distilled = ([named.raw(f"{head}.{leaf}").float() for leaf in ("weight", "bias")] for head in heads)
    plan.classes = len(on_cls[1])
    plan.tensors["classifier.weight"] = torch.cat([on_cls[0], on_distilled[0]], dim=1) / 2
    plan.tensors["classifier.bias"] = (on_cls[1] + on_distilled[1]) / 2


def _claims(opened: Checkpoint) -> dict:
    """Our config's fields as transformers' config.json beside the tensors has them."""
    config = opened.config
    if config.get("model_type") in VISION_CONFIGS:  # saved without what is as by default
        vision = {name: value for name, value in (config.get("vision_config") or {}).items() if name != "model_type"}
        config = {**getattr(transformers, VISION_CONFIGS[config["model_type"]])(**vision).to_dict(), "pooling": None}
    return {name: config[name] for name in CONFIG_FIELDS if config.get(name) is not None}


def _label_names(config: dict) -> dict[int, str] | None:
    """Names of the classes from a config.json of transformers or timm."""
    if isinstance(config.get("id2label"), dict):
        return {int(index): str(name) for index, name in config["id2label"].items()}
    card = {**(config.get("pretrained_cfg") or {}), **config}
    names, texts = card.get("label_names"), card.get("label_descriptions") or {}
    return {index: str(texts.get(name, name)) for index, name in enumerate(names)} if names else None
