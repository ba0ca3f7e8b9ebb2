"""Conversion proved: both models on the same images, block by block."""

import copy
import logging
import math
import re
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
from .exporting import export_checkpoint, timm_arguments, transformers_config
from .layouts import JAX, TIMM, TORCHVISION
from .loading import REPORT, convert, find_own_folder
from .planning import make_plan
from .reading import Checkpoint, first_few, locate, open_checkpoint, silent
from .recognition import recognise

logger = logging.getLogger(__package__)


TOLERANCE = 1e-4


@dataclass
class Verification:
    """How far our model is from the source library's own.

    Args:
        reference: Whose model it was compared with.
        differences: Output -> largest absolute difference, in the order they are computed.
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
        num_labels: As for `convert_checkpoint`; only where the head cannot be expressed.
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
        config = transformers_config(told.config, config_class, told.names)
    config.return_dict = True  # within its own forward, too
    arguments, keywords = {}, {}
    if family == "mae":
        config.mask_ratio = 0.0
        arguments["noise"] = torch.arange(math.prod(told.config.grid_hw)).expand(num_images, -1)  # keeps the order
    elif model_class.__name__ in ("ViTModel", "DeiTModel"):
        keywords["add_pooling_layer"] = told.config.representation_size is not None
    state = {name: named.raw(short).clone() for short, name in named.names.items()}
    with silent(REPORT):
        loaded, report = model_class.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, dtype=torch.float32, **keywords
        )
    if report["missing_keys"]:
        raise ValueError(f"{model_class.__name__} misses {first_few(sorted(report['missing_keys']))}.")
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
    arguments = {**timm_arguments(config, no_embed_class), "num_classes": classes, "norm_layer": norm}
    for theirs in ("act_layer", "global_pool", "final_norm"):
        if ARGUMENTS[theirs] not in told.names:
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
    for pattern in TIMM.unused:
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
