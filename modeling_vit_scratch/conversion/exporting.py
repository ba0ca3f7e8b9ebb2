"""The way out: our weights under another library's names."""

import json
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from ..configuration_vit_scratch import ViTScratchConfig
from ..modeling_vit_scratch import ViTScratchForImageClassification
from .architectures import ACTIVATIONS, POOLINGS, RESAMPLE
from .families import CONFIG_FIELDS, FAMILIES, MODEL_TYPES, TARGETS
from .layouts import DINOV2, JAX, TIMM, forms_of
from .recognition import to_jax

logger = logging.getLogger(__package__)


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
        parts = forms_of(layout, name)[0]
        for spellings, part in zip(parts, tensor.chunk(len(parts)), strict=True):
            part = to_jax(name, part, config.num_attention_heads) if layout.jax else part
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
            f"the activation {config.hidden_act}": config.hidden_act not in ACTIVATIONS.values(),
        },
        "torchvision": {
            **plain,
            **stem,
            "no bias of query, key and value": not config.qkv_bias,
            f"the activation {config.hidden_act}": config.hidden_act != "gelu",
            "images or patches that are no squares": len({*config.image_hw}) + len({*config.patch_hw}) > 2,
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
        there = model_class(transformers_config(config, config_class)).state_dict()

    def names(spellings: list[str]) -> tuple[str, str]:
        full = [name if name.startswith("classifier.") else f"{prefix}.{name}" for name in spellings]
        return next(name for name in full if name in there), full[-1]

    return names


def transformers_config(config: ViTScratchConfig, config_class: type, names=CONFIG_FIELDS):
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


def timm_arguments(config: ViTScratchConfig, no_embed_class: bool) -> dict:
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
        "global_pool": {ours: theirs for theirs, ours in POOLINGS.items()}[config.pooling],
        "act_layer": {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[config.hidden_act],
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
        theirs = transformers_config(config, config_class)
        theirs.architectures = [model_class.__name__]
        theirs.save_pretrained(folder)
        open_to_others(folder)
        return
    fields = {name: getattr(config, name) for name in CONFIG_FIELDS}
    if target == "timm":
        arguments = timm_arguments(config, tensors["pos_embed"].shape[1] == math.prod(config.grid_hw))
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
                "interpolation": {number: name for name, number in RESAMPLE.items()}[
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


def open_to_others(folder: Path):
    """Give files of weights the mode of the config.json beside them: safetensors makes them their owner's alone."""
    for path in folder.glob("*.safetensors"):
        shutil.copymode(next(folder.glob("*config.json")), path)
