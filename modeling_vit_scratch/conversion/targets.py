"""What models of other libraries can hold, and their configs and arguments for a config of ours."""

import torch
import transformers

from ..configuration_vit_scratch import ViTScratchConfig
from .architectures import ACTIVATIONS, POOLINGS
from .families import CONFIG_FIELDS
from .layouts import DINOV2, DINOV2_GATED, DINOV3, JAX, TIMM, TORCHVISION, TOWER, TRANSFORMERS, Layout

# What goes beyond a ViT with a class token, learned positions, a final norm and biases; a destination names those that
# it can hold.
NO_CLS, MEAN, ATTENTION = "no class token", "mean pooling", "pooling by attention"
BOTH, TWO_CLS, REGISTERS = "pooling by class token and mean", "several class tokens", "registers"
NO_NORM, NORM_AFTER, NORM_BEFORE = "no final norm", "a norm after the pooling", "a norm before the first block"
ROPE, LEARNED_ROPE, NO_POSITIONS = "rotary positions", "learned positions beside rotary ones", "no positions"
SCALE, GATED, QK_NORM = "layer scale", "a gated MLP", "normalised queries and keys"
NO_BIAS, NO_KEY_BIAS = "no bias of query, key and value", "biases of query and value without the key's"
TANH, STEM = "a tanh layer before the classifier", "early convolutions"


def features(config: ViTScratchConfig) -> list[str]:
    """What the model has beyond the paper's, in the words above."""
    positions = config.position_embedding_type
    there = {
        NO_CLS: not config.use_cls_token,
        TWO_CLS: config.cls_tokens > 1,
        MEAN: config.pooling == "mean",
        BOTH: config.pooling == "cls+mean",
        ATTENTION: config.pooling == "attention",
        NO_NORM: not config.use_final_norm,
        NORM_AFTER: config.norm_after_pooling,
        NORM_BEFORE: config.use_embedding_norm,
        REGISTERS: bool(config.num_register_tokens),
        SCALE: config.layerscale_value is not None,
        GATED: config.use_gated_mlp,
        QK_NORM: config.use_qk_norm,
        ROPE: positions == "rope",
        LEARNED_ROPE: positions == "learned+rope",
        NO_POSITIONS: positions == "none",
        NO_BIAS: not config.qkv_bias,
        NO_KEY_BIAS: config.qkv_bias and not config.key_bias,
        TANH: config.representation_size is not None,
        STEM: bool(config.stem_channels),
    }
    return [what for what, is_there in there.items() if is_there]


class Destination:
    """A model of another library.

    Args:
        layout: Of its tensors.
        holds: The features that it can hold.
        prefix: Before the names of its encoder's tensors.
        classes: transformers' config and model, by name.
        headless: Whether it has no classifier.
    """

    def __init__(self, layout: Layout, holds: set[str], prefix: str = "", classes=(), headless: bool = False):
        self.layout, self.holds, self.prefix, self.headless = layout, holds, prefix, headless
        self.config_class, self.model_class = (getattr(transformers, name, None) for name in classes or ("", ""))


def destination(config: ViTScratchConfig, target: str) -> Destination:
    """The target's model that is nearest to ours."""
    if target == "transformers":
        return _of_transformers(config)
    if target == "timm":
        if config.cls_tokens == 2:
            return Destination(TIMM, {TWO_CLS, NO_BIAS})
        plain = {NO_CLS, MEAN, ATTENTION, NO_NORM, NORM_AFTER, NORM_BEFORE, REGISTERS, SCALE, GATED, QK_NORM, NO_BIAS}
        if is_eva(config):
            # It pools by attention over the registers, too.
            holds = plain | {ROPE, LEARNED_ROPE, NO_KEY_BIAS, NO_POSITIONS}
            return Destination(TIMM, holds - ({ATTENTION} if config.num_register_tokens else set()))
        return Destination(TIMM, plain | {NO_POSITIONS})
    if target == "torchvision":
        return Destination(TORCHVISION, {TANH})
    gap, pooled = {NO_CLS, MEAN}, {NO_CLS, ATTENTION}
    there = set(features(config))
    return Destination(JAX, {TANH} | (gap if gap <= there else pooled if pooled <= there else set()))


def _of_transformers(config: ViTScratchConfig) -> Destination:
    there = set(features(config))
    if there & {ROPE, NO_KEY_BIAS}:
        holds = {ROPE, SCALE, GATED, REGISTERS, NO_KEY_BIAS, NO_BIAS}
        classes = "DINOv3ViTConfig", "DINOv3ViTModel"
        return Destination(DINOV3, holds, classes=classes, headless=True)
    if NORM_BEFORE in there:
        return Destination(
            TOWER, {NORM_BEFORE, NORM_AFTER}, classes=("CLIPVisionConfig", "CLIPVisionModel"), headless=True
        )
    if ATTENTION in there:
        classes = "SiglipVisionConfig", "SiglipVisionModel"
        return Destination(TOWER, {ATTENTION, NO_CLS}, classes=classes, headless=True)
    if TWO_CLS in there and config.cls_tokens == 2:
        classes = "DeiTConfig", "DeiTForImageClassificationWithTeacher"
        return Destination(TRANSFORMERS, {TWO_CLS, NO_BIAS}, "deit.", classes)
    if {NO_CLS, MEAN} <= there:
        classes = "IJepaConfig", "IJepaForImageClassification"
        return Destination(TRANSFORMERS, {NO_CLS, MEAN, NO_BIAS}, "ijepa.", classes)
    if SCALE in there or GATED in there or BOTH in there:
        layout = DINOV2_GATED if config.use_gated_mlp else DINOV2
        holds = {SCALE, MEAN, BOTH, GATED, NO_BIAS}
        if config.num_register_tokens:
            classes = "Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification"
            return Destination(layout, holds | {REGISTERS}, "dinov2_with_registers.", classes)
        return Destination(layout, holds, "dinov2.", ("Dinov2Config", "Dinov2ForImageClassification"))
    return Destination(TRANSFORMERS, {NO_BIAS}, "vit.", ("ViTConfig", "ViTForImageClassification"))


def is_eva(config: ViTScratchConfig) -> bool:
    """Whether timm's class for the model is its Eva."""
    return bool({ROPE, LEARNED_ROPE, NO_KEY_BIAS} & set(features(config)))


def obstacle(config: ViTScratchConfig, target: str) -> str | None:
    """What the target's library lacks for the model, or None."""
    goal, there = destination(config, target), features(config)
    lacking = next((what for what in there if what not in goal.holds), None)
    if lacking is not None:
        return lacking
    if {ATTENTION, GATED} <= set(there):
        return "attention pooling whose MLP is gated"
    if config.cls_tokens == 2 and not config.num_labels:
        return "two class tokens and no classifier"
    if goal.layout in (DINOV2, DINOV2_GATED) and not config.num_labels and config.pooling != "cls":
        return f"pooling={config.pooling!r} and no classifier that tells it"
    rotary = {ROPE, LEARNED_ROPE} & set(there)
    activation = f"the activation {config.hidden_act}"
    odd = {
        "transformers": {
            "an MLP whose width is no multiple of its own (with layer scale)": (
                goal.layout in (DINOV2, DINOV2_GATED) and mlp_ratio(config) is None
            ),
            "no layer scale": goal.layout in (DINOV2, DINOV2_GATED, DINOV3) and SCALE not in there,
            "a norm of all tokens before it pools": NORM_BEFORE in there and NORM_AFTER not in there,
            "rotary positions of another kind than DINOv3's": bool(rotary)
            and (config.rope_coordinates, config.rope_frequencies) != ("centered", "axial"),
            "no rotary positions": goal.layout is DINOV3 and not rotary,
            f"{activation} in a gated MLP": goal.layout is DINOV2_GATED and config.hidden_act != "silu",
        },
        "timm": {
            activation: config.hidden_act not in ACTIVATIONS.values(),
            f"{activation} in a gated MLP": GATED in there and config.hidden_act != "silu",
            f"{activation} and rotary positions or no key bias": is_eva(config)
            and GATED not in there
            and config.hidden_act != "gelu",
            "learned frequencies of rotary positions that are not plain indices": config.rope_frequencies == "mixed"
            and bool(rotary)
            and (config.rope_coordinates, config.rope_grid_size, config.rope_offset) != ("index", None, 0),
        },
        "torchvision": {
            activation: config.hidden_act != "gelu",
            "images or patches that are no squares": len({*config.image_hw}) + len({*config.patch_hw}) > 2,
            f"{config.num_channels} channels": config.num_channels != 3,
            "no classifier": not config.num_labels,
        },
        "jax": {activation: config.hidden_act not in ("gelu", JAX.hidden_act)},
    }[target]
    return next((what for what, is_there in odd.items() if is_there), None)


def mlp_ratio(config: ViTScratchConfig) -> int | None:
    """The whole number from which transformers' DINOv2 computes the width of its MLP, or None."""
    D, width = config.hidden_size, config.intermediate_size
    if not config.use_gated_mlp:
        return width // D if width % D == 0 else None
    return next((r for r in range(1, 65) if (int(D * r * 2 / 3) + 7) // 8 * 8 == width), None)


def transformers_config(config: ViTScratchConfig, config_class: type, names=CONFIG_FIELDS):
    """A config of transformers with the fields of ours that it has, of those named."""
    fields = {name: getattr(config, name) for name in names if hasattr(config_class, name)}
    if isinstance(config.initializer_range, str):  # "fan_in", which its configs do not know; of new weights only
        fields.pop("initializer_range", None)
    fields |= {"id2label": config.id2label, "label2id": config.label2id, "problem_type": config.problem_type}
    if hasattr(config_class, "mlp_ratio"):
        fields |= {"mlp_ratio": mlp_ratio(config), "use_swiglu_ffn": config.use_gated_mlp}
    if hasattr(config_class, "layerscale_value"):
        fields |= {"layerscale_value": float(config.layerscale_value)}
    if hasattr(config_class, "use_gated_mlp"):  # DINOv3's, of which each projection may have a bias
        biases = {"query_bias": config.qkv_bias, "value_bias": config.qkv_bias}
        fields |= {"use_gated_mlp": config.use_gated_mlp, **biases, "key_bias": config.qkv_bias and config.key_bias}
        fields.pop("qkv_bias", None)
    if config.representation_size and hasattr(config_class, "pooler_output_size"):
        fields |= {"pooler_output_size": config.representation_size}
    if hasattr(config_class, "num_register_tokens"):
        fields |= {"num_register_tokens": config.num_register_tokens}
    if hasattr(config_class, "use_mask_token"):
        fields |= {"use_mask_token": False}
    return config_class(**fields)


def timm_arguments(config: ViTScratchConfig, no_embed_class: bool) -> dict:
    """The arguments of timm's VisionTransformer, as JSON can hold them."""
    width = config.intermediate_size * (2 if config.use_gated_mlp and not is_eva(config) else 1)  # GluMlp's of both
    ratio = width / config.hidden_size
    if int(config.hidden_size * ratio) != width:  # timm floors
        ratio = (width + 0.5) / config.hidden_size
    shared = {
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
        "global_pool": {ours: theirs for theirs, ours in POOLINGS.items()}[config.pooling],
        "act_layer": {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[config.hidden_act],
    }
    shared |= {"qk_norm": True} if config.use_qk_norm else {}
    if is_eva(config):
        del shared["act_layer"]  # GELU, or SiLU where it is gated
        return {**shared, **_eva_arguments(config)}
    if config.use_gated_mlp and config.layerscale_value is None:
        shared["init_values"] = 0  # timm passes over None, and the architecture has one
    return {
        **shared,
        "reg_tokens": config.num_register_tokens,
        "final_norm": config.use_final_norm,
        "fc_norm": config.norm_after_pooling,
        "pre_norm": config.use_embedding_norm,
        **({"pos_embed": "none"} if config.position_embedding_type == "none" else {}),
    }


def _eva_arguments(config: ViTScratchConfig) -> dict:
    """Those of timm's Eva that its VisionTransformer has not."""
    kinds = {("centered", "axial"): "dinov3", ("index", "axial"): "cat", ("index", "mixed"): "mixed"}
    rotary = config.position_embedding_type.endswith("rope")
    kind = kinds[config.rope_coordinates, config.rope_frequencies] if rotary else "cat"
    size = config.rope_grid_size
    return {
        "num_reg_tokens": config.num_register_tokens,
        "use_abs_pos_emb": config.position_embedding_type in ("learned", "sincos", "learned+rope"),
        "use_pre_transformer_norm": config.use_embedding_norm,
        "use_post_transformer_norm": config.use_final_norm and not config.norm_after_pooling,
        "use_fc_norm": config.norm_after_pooling,
        "swiglu_mlp": config.use_gated_mlp,
        "attn_type": "rope" if config.key_bias else "eva",
        "use_rot_pos_emb": rotary,
        "rope_type": kind,
        "rope_temperature": float(config.rope_theta),
        "rope_grid_offset": float(config.rope_offset) if kind == "cat" else 0.0,
        "rope_grid_indexing": "xy" if kind == "mixed" else "ij",
        "rope_rotate_half": kind != "mixed",
        **({"ref_feat_shape": [size, size]} if rotary and kind == "cat" and size is not None else {}),
    }


def timm_architecture(config: ViTScratchConfig) -> str:
    """An architecture of timm's that becomes ours by overriding its arguments: those of its class are all overridden,
    but an epsilon, a gated MLP and a second class token cannot be."""
    if config.cls_tokens == 2:
        return "deit_base_distilled_patch16_224"
    if is_eva(config):
        if config.layerscale_value is None:
            return "eva_giant_patch14_224"
        return "vit_base_patch16_dinov3" if config.layer_norm_eps == 1e-5 else "vit_base_patch16_rope_224"
    if config.use_gated_mlp:
        return "vit_giant_patch14_dinov2"
    return "vit_base_patch16_clip_224" if config.layer_norm_eps == 1e-5 else "vit_base_patch16_224"


def timm_epsilon(config: ViTScratchConfig) -> float:
    """The epsilon of that architecture."""
    return 1e-5 if timm_architecture(config) in ("vit_base_patch16_dinov3", "vit_base_patch16_clip_224") else 1e-6


def timm_channels(tensor: torch.Tensor) -> torch.Tensor:
    """Learned frequencies as timm has them: L of (A, 2, d / 2), stacked, -> (2, L, A, d / 2), x before y."""
    return tensor.permute(2, 0, 1, 3).flip(0).contiguous()
