"""The way out: our weights under another library's names."""

import json
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from ..configuration_vit_scratch import ViTScratchConfig
from ..modeling_vit_scratch import ViTScratchForImageClassification
from .architectures import RESAMPLE, channel_order
from .families import CONFIG_FIELDS, FAMILIES, MODEL_TYPES, TARGETS
from .layouts import DINOV2, DINOV2_GATED, JAX, TOWER, forms_of
from .loading import reorder_channels, require_unquantized
from .recognition import to_jax
from .targets import (
    Destination,
    destination,
    is_eva,
    obstacle,
    timm_architecture,
    timm_arguments,
    timm_channels,
    timm_epsilon,
    transformers_config,
)

logger = logging.getLogger(__package__)


def export_checkpoint(
    model: ViTScratchForImageClassification, target: str, folder: str | Path | None = None, image_processor=None
) -> dict[str, torch.Tensor] | dict[str, np.ndarray]:
    """The model's tensors in another library's layout; converting them back gives the same model.

    What a layout's tensors do not carry (heads, epsilon, activation) stands in the config.json of `folder`; without
    one, `convert_checkpoint` takes it as hints.

    Args:
        model: To export; it keeps its tensors, these are copies.
        target: "transformers" (ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP or I-JEPA, whichever holds the model; by the
            names that the installed version's `load_state_dict` takes), "timm", "torchvision", or "jax" (numpy arrays).
            transformers' DINOv3, CLIP and SigLIP have no classifier: theirs are exported whose head is new or none.
        folder: Where to write it as well: model.safetensors (for transformers with the Hub's names) or model.npz, and
            config.json.
        image_processor: Written there too, or, for timm, into its config.json.

    Raises:
        ValueError: The target is unknown, or its library cannot express the model.
    """
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is unknown; use one of {', '.join(TARGETS)}.")
    require_unquantized(model, "the model")
    config = model.config
    lacking = obstacle(config, target)
    if lacking:
        raise ValueError(f"{target} has no model with {lacking}; it cannot be exported there.")
    goal = destination(config, target)
    ours = _our_tensors(model, target, goal)
    names = _transformers_names(config, goal) if target == "transformers" else lambda forms: (forms[0], forms[0])
    spelling = 1 if is_eva(config) else 0  # timm's Eva calls layer scale as DeiT does
    tensors, on_disk = {}, {}
    for name, tensor in ours.items():
        if name.endswith("patch_embeddings.projection.weight"):
            tensor = tensor.unflatten(1, (config.num_channels, *config.patch_hw))
        for store, form in zip((tensors, on_disk), names(forms_of(goal.layout, name)), strict=True):
            for spellings, part in zip(form, tensor.chunk(len(form)), strict=True):
                part = to_jax(name, part, config.num_attention_heads) if goal.layout.jax else part
                part = part.clone(memory_format=torch.contiguous_format)
                chosen = spellings[min(spelling, len(spellings) - 1) if "layer_scale" in name else 0]
                if config.cls_tokens == 2 and name.endswith("register_tokens"):
                    chosen = spellings[-1]  # the distillation token
                store[chosen] = part.numpy() if goal.layout.jax else part
    _add_what_only_they_have(tensors, on_disk, model, target, goal)
    _say_what_differs(config, target)
    if folder is not None:
        _write(on_disk, model, target, Path(folder), image_processor)
    return tensors


def _our_tensors(model: ViTScratchForImageClassification, target: str, goal: Destination) -> dict[str, torch.Tensor]:
    """Our tensors, changed where the destination has another form of the same function."""
    config = model.config
    ours = {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()}
    position = "vit.embeddings.position_embeddings"
    if model.vit.embeddings.position_embeddings is not None:
        ours[position] = model.vit.embeddings.position_embeddings.detach().float().cpu()
    if config.use_embedding_norm:  # after which no library's patches have a bias
        bias = ours.pop("vit.embeddings.patch_embeddings.projection.bias")
        if position in ours:
            ours[position] = ours[position].clone()
            ours[position][:, config.cls_tokens :] += bias
        elif bias.any():
            raise ValueError(
                f"{target}'s patches before a norm have no bias, and there are no positions to add this model's to."
            )
    if target == "timm" and position in ours:
        ours[position] = _timm_positions(config, ours[position])
    if goal.layout in (DINOV2, DINOV2_GATED) and config.num_labels:
        ours["classifier.weight"] = _on_both(ours["classifier.weight"], config.pooling)
    if goal.headless:
        if any(ours[name].any() for name in list(ours) if name.startswith("classifier.")):
            raise ValueError(
                f"transformers' {goal.model_class.__name__} has no classifier, and this model's is trained; "
                "it cannot be exported there with it."
            )
        ours = {name: tensor for name, tensor in ours.items() if not name.startswith("classifier.")}
    if config.cls_tokens == 2:  # two tokens and two heads, whose mean is predicted
        tokens = ours["vit.embeddings.cls_token"].split(1, dim=1)
        ours["vit.embeddings.cls_token"], ours["vit.embeddings.register_tokens"] = tokens
        ours = {name: tensor for name, tensor in ours.items() if not name.startswith("classifier.")}
    if is_eva(config) and target == "timm":
        order = channel_order(timm_arguments(config, False), config.hidden_size // config.num_attention_heads)
        if order is not None:
            back = torch.tensor(order).argsort().tolist()
            ours = {name: reorder_channels(name, tensor, back) for name, tensor in ours.items()}
    if goal.layout is TOWER:
        for name in (position, "vit.embeddings.cls_token"):
            if name in ours:
                ours[name] = ours[name].squeeze(0) if name == position else ours[name].flatten()
    if goal.layout is TOWER and config.pooling == "attention":  # one matrix for query, keys and values
        for leaf in ("weight", "bias"):
            parts = [ours.pop(f"vit.attention_pooling.{part}.{leaf}") for part in ("q", "kv")]
            ours[f"vit.attention_pooling.qkv.{leaf}"] = torch.cat(parts)
    return {name: tensor for name, tensor in ours.items() if ".rotary_positions." not in name}


def _add_what_only_they_have(
    tensors: dict, on_disk: dict, model: ViTScratchForImageClassification, target: str, goal: Destination
):
    """A mask token where it is there whether used or not, a distilled model's second head, learned frequencies."""
    config, added = model.config, {}
    if goal.model_class is not None and hasattr(goal.config_class, "num_register_tokens"):
        shape = (1, 1, config.hidden_size) if goal.headless else (1, config.hidden_size)
        added[f"{goal.prefix}embeddings.mask_token"] = torch.zeros(shape)
        if goal.headless and not config.num_register_tokens:
            added[f"{goal.prefix}embeddings.register_tokens"] = torch.zeros(1, 0, config.hidden_size)
    if config.cls_tokens == 2:
        heads = ("cls_classifier", "distillation_classifier") if target == "transformers" else ("head", "head_dist")
        for head, weight in zip(heads, (2 * model.classifier.weight).chunk(2, dim=1), strict=True):
            added[f"{head}.weight"] = weight.detach().float().cpu().contiguous()
            added[f"{head}.bias"] = model.classifier.bias.detach().float().cpu().clone()
    if target == "timm" and config.rope_frequencies == "mixed" and len(model.vit.rotary_positions):
        learned = [rotary.frequencies.detach().float().cpu() for rotary in model.vit.rotary_positions]
        added["rope.freqs"] = timm_channels(torch.stack(learned))
    tensors |= added
    on_disk |= added


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
        theirs = FAMILIES[MODEL_TYPES[destination(config, target).config_class.model_type]].in_transformers
    embedded = config.position_embedding_type not in ("rope", "none")  # those computed are for any size
    if embedded and config.position_interpolation != theirs:
        logger.warning(
            "For images of another size %s resizes positions as %r, this model as %r.",
            target, theirs, config.position_interpolation,
        )  # fmt: skip


def _timm_positions(config: ViTScratchConfig, positions: torch.Tensor) -> torch.Tensor:
    """Positions as timm has them: of the patches alone where the class token's is 0, else of every token."""
    own, patches = positions.tensor_split([config.cls_tokens], dim=1)
    if not own.any() and config.cls_tokens < 2:
        return patches
    return torch.cat([own, own.new_zeros(1, config.num_register_tokens, config.hidden_size), patches], dim=1)


def _on_both(weight: torch.Tensor, pooling: str) -> torch.Tensor:
    """A classifier as DINOv2's (classes, 2 D), which sees class token and mean."""
    if pooling == "cls+mean":
        return weight
    zero = torch.zeros_like(weight)
    return torch.cat([weight, zero] if pooling == "cls" else [zero, weight], dim=1)


def _transformers_names(config: ViTScratchConfig, goal: Destination):
    """A function of a tensor's forms: the one in the installed transformers' model, and the one on the Hub."""
    with torch.device("meta"):
        there = goal.model_class(transformers_config(config, goal.config_class)).state_dict()
    on_hub = "vision_model." if goal.layout is TOWER else goal.prefix

    def full(name: str, prefix: str) -> str:
        return name if name.startswith("classifier.") else prefix + name

    def in_memory(part: list[str]) -> str | None:
        names = [full(name, prefix) for name in part for prefix in (goal.prefix, on_hub)]
        return next((name for name in names if name in there), None)

    def names(forms: list) -> tuple[list, list]:
        form = next(form for form in forms if all(in_memory(part) for part in form))
        hub = forms[-1] if goal.layout is DINOV2_GATED else form  # which has one matrix for what is two in memory
        return [[in_memory(part)] for part in form], [[full(part[-1], on_hub)] for part in hub]

    return names


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
        goal = destination(config, target)
        theirs = transformers_config(config, goal.config_class)
        theirs.architectures = [goal.model_class.__name__]
        theirs.save_pretrained(folder)
        open_to_others(folder)
        return
    fields = {name: getattr(config, name) for name in CONFIG_FIELDS if not name.startswith(("rope_", "position_emb"))}
    if target == "timm":
        positions = tensors.get("pos_embed")
        arguments = timm_arguments(config, positions is None or positions.shape[1] == math.prod(config.grid_hw))
        if config.layer_norm_eps != timm_epsilon(config):
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
                "interpolation": {number: name for name, number in RESAMPLE.items()}[int(image_processor.resample)],
                "crop_pct": cropped["height"] / resized if cropped else 1.0,
                "crop_mode": "center" if cropped else "squash",
            }
        fields = {
            "architecture": timm_architecture(config),  # its arguments are all overridden
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
