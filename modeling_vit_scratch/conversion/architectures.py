"""timm's architectures: which are understood, and what their tensors do not tell."""

import re
from collections.abc import Mapping

from transformers.image_utils import PILImageResampling

from .reading import Checkpoint

# timm's arguments -> our fields, where the value is the same.
ARGUMENTS = {
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "patch_size": "patch_size",
    "in_chans": "num_channels",
    "img_size": "image_size",
    "class_token": "use_cls_token",
    "reg_tokens": "num_register_tokens",
    "num_reg_tokens": "num_register_tokens",
    "final_norm": "use_final_norm",
    "fc_norm": "norm_after_pooling",
    "use_fc_norm": "norm_after_pooling",
    "pre_norm": "use_embedding_norm",
    "use_pre_transformer_norm": "use_embedding_norm",
    "qk_norm": "use_qk_norm",
    "swiglu_mlp": "use_gated_mlp",
    "global_pool": "pooling",
    "act_layer": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",  # ours, which timm's config.json cannot say
    "rope_temperature": "rope_theta",
    "rope_grid_offset": "rope_offset",
}
POOLINGS = {"token": "cls", "avg": "mean", "map": "attention", "": None}
ACTIVATIONS = {
    "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "quickgelu": "quick_gelu",
    "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip
RESAMPLE = {kind.name.lower(): int(kind) for kind in PILImageResampling}

# What is understood, by timm's names (as of timm 1.0.31): the family -> its architectures.
UNDERSTOOD = {
    "ViT": r"vit_(tiny|small|base|large|huge|giant|gigantic)_patch(8|14|16|32)(_36x1|_plus)?_(224|240|256|384)(_miil)?",
    "DeiT": r"deit_(tiny|small|base)(_distilled)?_patch16_(224|384)",
    "DeiT III": r"deit3_(small|medium|base|large|huge)_patch(14|16)_(224|384)",
    "FlexiViT": r"flexivit_(small|base|large)",
    "CLIP": r"vit_(xsmall|medium|betwixt|base|large|huge|giant|gigantic)_patch(14|16|32)(_plus)?_clip(_quickgelu)?_\d+",
    "SigLIP": r"vit_(base|large|so400m|giantopt)_patch(14|16|32)_siglip(_gap)?_\d+",
    "DINOv2": r"vit_(small|base|large|giant)_patch14(_reg4)?_dinov2",
    "TIPS v2": r"vit_(base|large|so400m|giant)_patch14_reg1_tipsv2",
    "DINOv3": r"vit_(tiny|small|small_plus|base|large|huge_plus|7b)_patch16_dinov3(_qkvb)?",
    "LingBot-Vision": r"vit_(small|base|large|giant)_patch16_lingbot",
    "EVA": r"eva_(large_patch14|giant_patch14|giant_patch14_clip)_\d+",
    "EVA-02": r"eva02_(tiny|small)_patch14_(224|336)",
    "RADIO": r"(naflex)?vit_(base|large|huge|giant|so400m)_patch16_radio_v[34]",
    "InternViT": r"vit_intern300m_patch14_448",
    "Perception Encoder": r"vit_pe_(lang|spatial)_(tiny|small|base|large|gigantic)_patch(14|16)_\d+",
    "RoPE-ViT": r"vit_(small|base|large)_patch16_rope(_mixed)?(_ape)?_224",
    "timm's own, rotary": r"vit_(medium|mediumd|betwixt|base)_patch16_rope_reg[14]_gap_256",
    "timm's own": (
        r"vit_(wee|little|medium|mediumd|betwixt|base|huge|giant|so150m|so150m2)_patch(14|16)(_reg[14])?_(gap|map)_\d+"
    ),
    "NaFlexViT": r"naflexvit_(base|so150m2|so400m)_patch16_(gap|par_gap|map|siglip|reg1_gap|reg1_map)",
    "timm's smallest": r"test_vit2?",
}
# Rotary positions as timm names their parts; those of DINOv3 lie in [-1, 1], and pair channels j and j + d / 2.
_ROPE = {"use_rot_pos_emb": True, "rope_type": "cat"}
# Where they differ from heads of 64 channels, an epsilon of 1e-6, GELU, a final norm, and no rotary positions.
DIFFERENCES = {
    r".*_so400m_.*|.*_huge_patch.*|.*_giant_patch14_(clip_)?224|eva_giant_.*": {"num_heads": 16},
    r".*_gigantic_.*|.*_giantopt_.*|vit_(base|giant)_patch16_gap_224": {"num_heads": 16},
    r"test_vit2?": {"num_heads": 2},
    r".*_7b_.*": {"num_heads": 32},
    r"vit_.*_clip_.*|vit_.*_(dinov3|lingbot).*|vit_pe_.*": {"layer_norm_eps": 1e-5},
    r".*_quickgelu_.*": {"act_layer": "quick_gelu"},
    r"vit_(so400m_patch16|giantopt_patch16|base_patch32)_siglip.*|vit_large_patch16_siglip_.*512": {
        "act_layer": "gelu_tanh"
    },
    r"naflexvit_.*_siglip": {"act_layer": "gelu_tanh"},
    r"eva02_.*|vit_giant_patch14_.*(dinov2|tipsv2)|vit_(small_plus|huge_plus|7b)_.*|vit_giant_.*_lingbot": {
        "act_layer": "silu"
    },
    r".*_radio_.*|vit_intern300m_.*": {"final_norm": False},
    r"vit_pe_.*": {
        **_ROPE, "final_norm": False, "fc_norm": False, "rope_grid_indexing": "xy", "ref_feat_shape": 32,
        "rope_grid_offset": 1.0,
    },
    r"vit_pe_.*_gigantic_.*": {"rope_grid_offset": 0.0},
    r"eva02_.*|vit_.*_rope_reg[14]_gap_.*": {**_ROPE, "ref_feat_shape": 16},
    r"vit_.*_dinov3.*|vit_pe_.*": {"global_pool": "avg"},
    r"vit_.*_(dinov3|lingbot).*": {
        **_ROPE, "rope_type": "dinov3", "rope_temperature": 100.0, "rope_rotate_half": True
    },
    r"vit_.*_rope(_mixed)?(_ape)?_224": {**_ROPE, "rope_temperature": 100.0, "rope_grid_indexing": "xy"},
    r"vit_.*_rope_mixed(_ape)?_224": {"rope_type": "mixed", "rope_temperature": 10.0},
}  # fmt: skip
# Architectures whose positions timm resizes another way than its others'.
INTERPOLATIONS = {
    r".*flexi.*": "bilinear",
    r".*(base|huge)_patch16_radio_v3.*": "bilinear_align_corners",
    r".*radio.*": "bilinear",
    r"naflexvit_.*siglip": "bilinear",
}
# Architectures whose tensors have the names of a ViT, and which compute something else.
REFUSED_ARCHITECTURES = {
    r"beit3_.*|eva02_(base|large)_.*": "norms inside attention or MLP",
    r"beit.*|.*_s?relpos_.*|samvit_.*": "relative positions",
    r".*_rpn_.*|eva02_enormous_.*": "norms after the branches",
    r"vit_pe_core_.*|test_vit3": "attention pooling over the tokens before the patches, or with heads of its own",
    r".*_sapiens2": "RMSNorm and groups of queries",
    r"test_vit4|.*_xp_.*": "RMSNorm",
    r".*_18x2_.*|.*_d?pwee_.*": "parallel blocks",
    r"vit_d(little|wee)_.*": "differential attention",
    r".*_(r26|r50|resnet26d|resnet50d|r)_s\d+_.*|.*_resnet\d+d_.*|vit_base_mci_.*": "a convolutional stem",
    r".*_parfac_.*": "positions that are sums of rows and columns",
}
# Values that timm's arguments may have; another is refused by name.
ALLOWED = {
    "norm_layer": ("layernorm",), "pool_include_prefix": (False,), "pos_embed": ("learn", "learned", "", "none"),
    "global_pool": tuple(POOLINGS), "act_layer": tuple(ACTIVATIONS), "rope_type": ("cat", "mixed", "dinov3", ""),
    "rope_grid_indexing": ("ij", "xy"), "use_post_norm": (False,), "gated_attn": (False,), "num_kv_heads": (),
    "scale_mlp": (False,), "scale_attn_inner": (False,), "scale_attn_norm": (False,), "scale_mlp_norm": (False,),
    "attn_only_layer_scale": (False,), "attn_pool_num_heads": (), "proj_bias": (True,),
}  # fmt: skip


class Untold(ValueError):
    """A checkpoint is understood but for something that it does not tell; the text says what to pass."""


def check_names(opened: Checkpoint, family: str, names: Mapping, hints: dict, arguments: dict):
    """Whether tensors with timm's names and its arguments tell enough, and nothing that this model has not.

    Raises:
        Untold: They are of timm's class Eva, and no architecture says how it turns queries and keys.
        ValueError: The model computes something that ours cannot.
    """
    has = {name: f"blocks.0.{name}" in names for name in ("gamma_1", "attn.q_bias")}
    eva = has["attn.q_bias"] or "rope.freqs" in names or (family == "timm" and has["gamma_1"])
    rotary = hints.get("position_embedding_type", "").endswith("rope")
    absent = not {"pos_embed", "embeds.pos_embed"} & set(names) and hints.get("position_embedding_type") != "none"
    if "architecture" not in opened.config and family != "dinov3" and (eva or rotary or absent):
        raise Untold(
            f"{opened.title} does not tell its positions, which may be rotary (it has "
            f"{'no pos_embed' if absent else 'names of class Eva'}); pass architecture=, timm's name of the model"
            f"{', or source=deit for a file of DeiT III' if has['gamma_1'] and not absent else ''}."
        )
    pool, kept = arguments.get("global_pool"), "head.weight" in names
    registers = "reg_token" in names and (eva or arguments.get("use_rot_pos_emb"))
    wrong = {
        "an answer for each token (global_pool='')": pool == "" and kept,
        "attention pooling over registers": pool == "map" and registers,
        "rotary positions of NaFlexViT": any(name.startswith("embeds.") for name in names)
        and bool(arguments.get("rope_type")),
    }
    for what, there in wrong.items():
        if there:
            raise ValueError(f"{opened.title} has {what}, which this model has not.")


def family_of(architecture: str) -> str | None:
    """The family of timm's that an architecture belongs to, of those that are understood, or None."""
    return next((title for title, pattern in UNDERSTOOD.items() if re.fullmatch(pattern, architecture)), None)


def arguments_of(opened: Checkpoint) -> dict:
    """timm's arguments of a checkpoint with timm's config.json: what the architecture has, and what overrides it.

    Raises:
        ValueError: The architecture, or a value of an argument, is one that this model has not.
    """
    config, architecture = opened.config, opened.config["architecture"]
    for pattern, what in REFUSED_ARCHITECTURES.items():
        if re.fullmatch(pattern, architecture):
            raise ValueError(f"{opened.title} is timm's {architecture}, with {what}, which this model has not.")
    card, given = config.get("pretrained_cfg") or {}, config.get("model_args") or {}
    arguments = {"img_size": card["input_size"][1:]} if card.get("input_size") else {}
    for pattern, differing in DIFFERENCES.items():
        arguments |= differing if re.fullmatch(pattern, architecture) else {}
    arguments |= {"global_pool": config["global_pool"]} if config.get("global_pool") is not None else {}
    arguments |= {name: value for name, value in given.items() if value is not None}
    if given.get("norm_layer") == "layernorm":
        arguments["layer_norm_eps"] = 1e-6  # timm's own, whatever the architecture has
    grid = arguments.get("ref_feat_shape")
    if isinstance(grid, (list, tuple)) and len(set(grid)) > 1:
        raise ValueError(f"{opened.title} has timm's ref_feat_shape={grid!r}, no square, which this model has not.")
    if arguments.get("rope_type") == "dinov3" and arguments.get("rope_grid_offset"):
        raise ValueError(f"{opened.title} has an offset of DINOv3's positions, which this model has not.")
    for name, values in ALLOWED.items():
        if arguments.get(name) is not None and arguments[name] not in values:
            raise ValueError(f"{opened.title} has timm's {name}={arguments[name]!r}, which this model has not.")
    return arguments


def claims_of(arguments: dict) -> dict:
    """Our config's fields that timm's arguments tell."""
    translated = dict(arguments)
    for name, table in {"global_pool": POOLINGS, "act_layer": ACTIVATIONS}.items():
        translated[name] = table.get(arguments.get(name))
    if "use_post_transformer_norm" in arguments:
        translated["final_norm"] = bool(arguments["use_post_transformer_norm"] or arguments.get("use_fc_norm"))
    claims = {ours: translated[theirs] for theirs, ours in ARGUMENTS.items() if translated.get(theirs) is not None}
    if not arguments.get("use_rot_pos_emb"):
        claims = {name: value for name, value in claims.items() if not name.startswith("rope_")}
        absent = arguments.get("pos_embed", "learn") in ("", "none") or arguments.get("use_abs_pos_emb") is False
        return {**claims, "position_embedding_type": "none"} if absent else claims
    kind, grid = arguments.get("rope_type", "cat"), arguments.get("ref_feat_shape")
    claims["position_embedding_type"] = "rope"
    claims["rope_coordinates"] = "centered" if kind == "dinov3" else "index"
    claims["rope_frequencies"] = "mixed" if kind == "mixed" else "axial"
    claims.setdefault("rope_theta", 10000.0)
    if kind != "cat":
        claims.pop("rope_offset", None)  # timm reads neither
    elif grid is not None:
        claims["rope_grid_size"] = grid[0] if isinstance(grid, (list, tuple)) else grid
    return claims


def channel_order(arguments: dict, head_dim: int) -> list[int] | None:
    """Where each channel of a head of ours stands in timm's, for rotary positions; None where it is the same place.

    Ours has the first channels of all pairs, then the second ones, and turns the first half of the pairs by y; timm's
    pairs neighbours, unless told otherwise, and begins with x if told so.
    """
    if not arguments.get("use_rot_pos_emb"):
        return None
    pairs = list(range(head_dim // 2))
    if arguments.get("rope_grid_indexing") == "xy" and arguments.get("rope_type") != "mixed":
        pairs = pairs[head_dim // 4 :] + pairs[: head_dim // 4]
    if arguments.get("rope_rotate_half"):
        order = pairs + [pair + head_dim // 2 for pair in pairs]
    else:
        order = [2 * pair for pair in pairs] + [2 * pair + 1 for pair in pairs]
    return None if order == list(range(head_dim)) else order
