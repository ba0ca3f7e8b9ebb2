"""Conversion proved: both models on the same images, block by block."""

import copy
import logging
import math
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

from ..configuration_vit_scratch import ViTScratchConfig
from ..modeling_vit_scratch import ViTScratchForImageClassification
from .architectures import ARGUMENTS
from .exporting import export_checkpoint
from .layouts import JAX, NAFLEX, OPEN_CLIP, TIMM, TORCHVISION, TOWER
from .loading import REPORT, convert, find_own_folder
from .planning import make_plan
from .reading import Checkpoint, first_few, locate, open_checkpoint, silent
from .recognition import recognise
from .targets import is_eva, timm_arguments, transformers_config

logger = logging.getLogger(__package__)


TOLERANCE = 1e-4


@dataclass
class Verification:
    """How far our model is from the source library's own.

    Args:
        reference: Whose model it was compared with.
        differences: Output -> largest difference, in the order they are computed; where an output's largest number is
            above 1, as a share of it. (Rotary positions are angles in single precision on both sides.)
        top5: Images for which the five largest logits are the same classes in the same order, or None without
            logits.
        num_images: Images compared.
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
        """Whether every output agrees to 1e-4, and the top-5 of every image."""
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
        num_labels: As for `convert_checkpoint`.
        **hints: As for `convert_checkpoint`.

    Raises:
        ImportError: The source library cannot be imported here.
        NotImplementedError: No library still has a model that computes this.
        ValueError: As `convert_checkpoint`, or the checkpoint is one of ours.
    """
    located = locate(checkpoint, revision=revision)
    if source is None and find_own_folder(located):
        raise ValueError(f"{checkpoint} is this package's own; there is nothing to compare it with.")
    if model is not None:
        hints = {"num_attention_heads": model.config.num_attention_heads, **hints}
    with silent(logger):
        opened = open_checkpoint(located, str(checkpoint))
        family, named = recognise(opened, source)
        plan = make_plan(opened, family, named, hints, new_head=num_labels is not None)
        model = convert(opened, family, named, plan)[0] if model is None else copy.deepcopy(model).eval()
    headless = plan.classes is None
    make = {
        id(TIMM): _timm_reference,
        id(NAFLEX): _timm_reference,
        id(TORCHVISION): _torchvision_reference,
        id(JAX): _jax_reference,
        id(OPEN_CLIP): _open_clip_reference,
    }
    told = _Told(ViTScratchConfig(**plan.fields), plan.told | {"num_attention_heads"})
    reference = make.get(id(named.layout), _transformers_reference)(opened, family, named, told, headless, num_images)
    generator = torch.Generator().manual_seed(0)
    config = model.config
    images = torch.randn(num_images, config.num_channels, *config.image_hw, generator=generator, dtype=torch.float64)
    theirs = _outputs(reference, images, headless)
    title = reference.title
    del reference
    after = {"final norm": model.vit.pooled_norm if config.norm_after_pooling else model.vit.norm}
    if "attention pooling" in theirs:
        after["attention pooling"] = model.vit.attention_pooling
    # Without hidden states the last block computes the class token alone.
    arguments = {"return_dict": True, "output_hidden_states": True}
    ours = _outputs(_Reference("ours", model, model.vit.layers, after, arguments), images, headless)
    if "tanh layer" in theirs:
        ours["tanh layer"] = model.pre_logits(ours["final norm"][:, 0])
    differences = {name: _difference(ours[name], theirs[name]) for name in theirs}
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
        with silent(logger):
            export_checkpoint(model, target, folder)
        return verify_checkpoint(folder, model=model, num_images=num_images)


@dataclass
class _Told:
    """What a checkpoint and hints tell its own library: the fields of `config` that are in `names`."""

    config: ViTScratchConfig
    names: set[str]


@dataclass
class _Reference:
    """A model, and where in it are the blocks and what comes after them: name -> module."""

    title: str
    module: nn.Module
    blocks: nn.Module
    after: dict[str, nn.Module]
    arguments: dict = field(default_factory=dict)


def _outputs(reference: _Reference, images: torch.Tensor, headless: bool) -> dict[str, torch.Tensor]:
    """Embeddings, every block's output, what comes after them, and the logits."""
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
    for name, module in reference.after.items():
        module.register_forward_hook(keep(name))
    with bar:
        result = reference.module.double().eval()(images, **reference.arguments)
    if getattr(reference.module, "pooler", None) is not None:
        outputs["tanh layer"] = result.pooler_output
    if not headless:
        outputs["logits"] = getattr(result, "logits", result)
    return outputs


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """As in `Verification`; where one side has all tokens and the other what is pooled, of the first token."""
    ours, theirs = (tensor if tensor.ndim == 3 else tensor.unsqueeze(1) for tensor in (ours, theirs))
    if 1 in (ours.shape[1], theirs.shape[1]):
        ours, theirs = ours[:, :1], theirs[:, :1]
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1)).item()


REFERENCES = {  # family -> class with a classifier, without one, and the encoder's name in the former
    "transformers": ("ViTForImageClassification", "ViTModel", "vit"),
    "deit": ("DeiTForImageClassification", "DeiTModel", "deit"),
    "dino": ("ViTForImageClassification", "ViTModel", "vit"),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Model", "dinov2"),
    "dinov2_with_registers": (
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersModel", "dinov2_with_registers",
    ),
    "dinov3": (None, "DINOv3ViTModel", ""),
    "mae": (None, "ViTMAEModel", "vit"),
    "msn": ("ViTMSNForImageClassification", "ViTMSNModel", "vit"),
    "ijepa": ("IJepaForImageClassification", "IJepaModel", "ijepa"),
    "clip": ("CLIPForImageClassification", "CLIPVisionModel", "vision_model"),
    "siglip": ("SiglipForImageClassification", "SiglipVisionModel", "vision_model"),
}  # fmt: skip


def _transformers_reference(opened, family, named, told, headless, num_images) -> _Reference:
    classifier, encoder, prefix = REFERENCES[family]
    model_class = getattr(transformers, encoder if headless or classifier is None else classifier)
    if told.config.cls_tokens == 2 and not headless:
        model_class = transformers.DeiTForImageClassificationWithTeacher
    config_class = model_class.config_class
    if "model_type" in opened.config:
        nested = opened.config.get("vision_config")  # of a model with two towers, of which one is run
        config = config_class.from_dict(nested if nested and "vision" in config_class.model_type else opened.config)
    elif named.layout is TOWER and not headless:
        raise NotImplementedError(f"{model_class.__name__} is made by its config.json, and there is none.")
    else:
        config = transformers_config(told.config, config_class, told.names)
    config.return_dict = True  # within its own forward, too
    arguments, keywords = {}, {}
    if family == "mae":
        config.mask_ratio = 0.0
        arguments["noise"] = torch.arange(math.prod(told.config.grid_hw)).expand(num_images, -1)  # keeps the order
    elif model_class.__name__ in ("ViTModel", "DeiTModel", "IJepaModel"):
        keywords["add_pooling_layer"] = told.config.representation_size is not None
    left_out = named.unused if named.layout is TOWER else {}  # of others, a decoder may be part of the class
    state = {short: named.raw(short).clone() for short in named.names if short not in left_out}
    if named.layout is TOWER:  # some versions have the tower's name before its tensors
        with torch.device("meta"):
            there = model_class(config).state_dict()
        start = next(start for start in ("", "vision_model.") if start + named.layout.marker in there)
        state = {name if name in there else start + name: tensor for name, tensor in state.items()}
    with silent(REPORT):
        loaded, report = model_class.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, dtype=torch.float32, **keywords
        )
    if report["missing_keys"]:
        raise ValueError(f"{model_class.__name__} misses {first_few(sorted(report['missing_keys']))}.")
    base = getattr(loaded, prefix, loaded)
    blocks = next(
        holder.layers if hasattr(holder, "layers") else holder.layer
        for holder in (base, getattr(base, "encoder", None), getattr(base, "model", None))
        if hasattr(holder, "layers") or hasattr(holder, "layer")
    )
    norms = [getattr(base, name, None) for name in ("layernorm", "post_layernorm", "norm")]
    after = {"final norm": next(norm for norm in norms if norm is not None)}
    if family == "siglip" and headless:
        after["attention pooling"] = base.head
    if family == "clip" and not headless:
        after = {}  # its classifier reads tokens without the norm
    return _Reference(f"transformers' {model_class.__name__}", loaded, blocks, after, arguments)


def _import_timm():
    try:
        import timm.layers
        import timm.models.deit
        import timm.models.eva
        import timm.models.vision_transformer as timm_vit
    except (ImportError, RuntimeError) as error:
        raise ImportError(f"timm cannot be imported here ({error}), so its own model was not run.") from error
    return timm, timm_vit


def _make_timm(opened: Checkpoint, told: _Told, headless: bool, no_embed_class: bool, act_layer: str | None = None):
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
    arguments = {**timm_arguments(config, no_embed_class), "num_classes": classes}
    if is_eva(config):
        # By timm's entry for the family, whose epsilon and rotary positions are its own.
        arguments = {name: value for name, value in arguments.items() if not name.startswith(("rope_", "global_pool"))}
        return timm.create_model("vit_base_patch16_dinov3", **arguments)
    for theirs in ("act_layer", "global_pool", "final_norm"):
        if ARGUMENTS[theirs] not in told.names:
            del arguments[theirs]
    arguments = {"act_layer": act_layer, **arguments, "norm_layer": norm}
    if config.use_gated_mlp:
        arguments |= {"mlp_layer": partial(timm.layers.GluMlp, gate_last=False), "act_layer": nn.SiLU}
    if any(name.endswith("dist_token") for name in opened.tensors):
        if not headless and config.cls_tokens < 2:
            raise NotImplementedError("timm has no model with a distillation token and one head to compare.")
        return timm.models.deit.VisionTransformerDistilled(**{**arguments, "reg_tokens": 0})
    return timm_vit.VisionTransformer(**arguments)


def _timm_reference(opened, family, named, told, headless, num_images) -> _Reference:
    state = {short: named.raw(short).clone() for short in named.names}
    registers = "register_tokens" in state
    alone = "pos_embed" not in state or state["pos_embed"].shape[1] == math.prod(told.config.grid_hw)
    reference = _make_timm(opened, told, headless, no_embed_class=alone or registers)
    if headless:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(("head.", "head_dist."))}
    title = f"timm's {type(reference).__name__}"
    if title.endswith("Eva"):
        state = _import_timm()[0].models.eva.checkpoint_filter_fn(state, reference)
    state = {name: tensor for name, tensor in state.items() if name not in named.unused}
    if title.endswith(("Eva", "NaFlexVit")):
        reference.load_state_dict(state)
        return _Reference(title, reference, reference.blocks, _timm_after(reference))
    if registers or "blocks.0.mlp.w12.weight" in state:
        state["mask_token"] = torch.zeros(1)  # by which timm recognises DINOv2
    reference.load_state_dict(_import_timm()[1].checkpoint_filter_fn(state, reference, adapt_layer_scale=True))
    return _Reference("timm's VisionTransformer", reference, reference.blocks, _timm_after(reference))


def _timm_after(reference: nn.Module) -> dict[str, nn.Module]:
    norm = reference.norm if isinstance(reference.fc_norm, nn.Identity) else reference.fc_norm
    pool = getattr(reference, "attn_pool", None)
    return {"final norm": norm, **({} if pool is None else {"attention pooling": pool})}


def _open_clip_reference(opened, family, named, told, headless, num_images) -> _Reference:
    """timm's model, by its reader of OpenAI's names, which normalises all tokens before one is pooled."""
    config = copy.deepcopy(told.config)
    config.norm_after_pooling = False
    if "layer_norm_eps" not in told.names:
        config.layer_norm_eps = nn.LayerNorm(1).eps  # torch's default, which OpenAI's code leaves as it is
    told = _Told(config, told.names | {"layer_norm_eps"})
    reference = _make_timm(opened, told, headless, no_embed_class=False)
    state = {f"visual.{short}": named.raw(short).clone() for short in named.names if short not in named.unused}
    reference.load_state_dict(_import_timm()[1].checkpoint_filter_fn(state, reference))
    title = "timm's VisionTransformer, by its reader of OpenAI's names"
    return _Reference(title, reference, reference.blocks, _timm_after(reference))


def _jax_reference(opened, family, named, told, headless, num_images) -> _Reference:
    # nn.gelu in vit_jax/models_vit.py and big_vision/models/vit.py: flax's default is the tanh form, timm's is not.
    reference = _make_timm(opened, told, headless, no_embed_class=False, act_layer="gelu_tanh")
    with tempfile.TemporaryDirectory() as folder:
        path = opened.path
        if path is None:
            path = Path(folder) / "model.npz"
            np.savez(path, **{short: named.raw(short).numpy() for short in named.names})
        reference.load_pretrained(str(path))
    title = "timm's VisionTransformer, by its reader of .npz files"
    return _Reference(title, reference, reference.blocks, _timm_after(reference))


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
    after = {"final norm": reference.encoder.ln}
    return _Reference("torchvision's VisionTransformer", reference, reference.encoder.layers, after)
