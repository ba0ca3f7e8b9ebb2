"""Whose a checkpoint is, told by the names of its tensors."""

import math
import re
import zipfile
import zlib

import numpy as np
import torch

from .families import FAMILIES, MODEL_TYPES, REFUSED, REFUSED_TYPES
from .layouts import (
    DINOV2,
    DINOV2_GATED,
    DINOV3,
    JAX,
    NAFLEX,
    OPEN_CLIP,
    TIMM,
    TORCHVISION,
    TOWER,
    TRANSFORMERS,
    Layout,
    forms_of,
)
from .reading import Checkpoint, first_few, one_line

# In the order they are tried: conv1.weight is the first layer of many a network.
LAYOUTS = (TRANSFORMERS, DINOV3, TOWER, TIMM, NAFLEX, TORCHVISION, JAX, OPEN_CLIP)


class NamedTensors:
    """A checkpoint's tensors by our names.

    `names` are theirs without what comes before the patch projection's ("vit.", "module.backbone.", "opt/target/").
    What stands beside OpenCLIP's image tower ("visual.") is `outside`; `unused` are names that a classifier has no use
    for, with what they are.
    """

    def __init__(self, opened: Checkpoint, layout: Layout, start: str):
        self.tensors, self.layout = opened.tensors, layout
        outer = re.match(r"((module|_orig_mod)\.)*", start)[0]
        self.names, self.outside = {}, []
        tower = re.match(r"(.*\.)?visual\.", start)
        for name in opened.tensors:
            if tower and not name.startswith(start):
                self.outside.append(name)
                continue
            short = name.removeprefix(start) if name.startswith(start) else name.removeprefix(outer)
            if short in self.names:
                raise ValueError(f"{opened.title} has {short} twice, as {self.names[short]} and as {name}.")
            self.names[short] = name
        self.unused = {
            name: what for pattern, what in layout.unused.items() for name in self.names if re.fullmatch(pattern, name)
        }
        self.used: set[str] = set()
        self.missing: list[str] = []
        self.misshapen: dict[str, str] = {}
        self.dtypes: set[str] = set()
        self.may_lack_cls = layout.may_lack_cls
        self.consume = False  # whether tensors that were copied may be forgotten, to save memory

    def find(self, ours: str) -> list[str | None]:
        """For each part of our tensor, the name it has here, or None."""
        return [next((name for name in part if name in self.names), None) for part in self._form(ours)]

    def _form(self, ours: str) -> list[list[str]]:
        """Of the forms that our tensor may have, the one that is here; the first where none is whole."""
        forms = forms_of(self.layout, ours)
        whole = (form for form in forms if form and all(any(name in self.names for name in part) for part in form))
        return next(whole, forms[0])

    @property
    def use_cls_token(self) -> bool:
        """Whether there is a class token, or has to be."""
        return self.has("vit.embeddings.cls_token") or not self.may_lack_cls

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
            raise ValueError(f"{name} cannot be read: {one_line(error)}") from error
        if not value.is_floating_point():
            raise ValueError(f"{name} holds {value.dtype}, not floating-point numbers.")
        return value

    def read(self, ours: str, note: bool = True) -> torch.Tensor | None:
        """Our tensor in torch's layout (a patch kernel still (D, C, h, w)), or None and its names in `missing`."""
        found = self.find(ours)
        missing = [part[0] for name, part in zip(found, self._form(ours), strict=True) if name is None]
        if note:
            self.missing += [name for name in missing if name not in self.missing]
            self.used.update(filter(None, found))
        if missing or not found:
            return None
        parts = [self.raw(name) for name in found]
        self.dtypes.update(str(part.dtype).removeprefix("torch.") for part in parts)
        if self.layout.jax:
            parts = [from_jax(ours, part) for part in parts]
        if len({part.shape for part in parts}) > 1 or (len(parts) > 1 and parts[0].ndim == 0):
            self.misshapen[ours] = f"{'/'.join(found)} {' and '.join(str(tuple(part.shape)) for part in parts)}"
            return None
        return self._shaped(ours, parts[0] if len(parts) == 1 else torch.cat(parts))

    def _shaped(self, ours: str, tensor: torch.Tensor) -> torch.Tensor:
        """Tokens and positions that are stored without a batch, or on a grid, and NaFlexViT's patches, as ours are."""
        if ours.endswith("embeddings.cls_token") and self.layout in (TOWER, OPEN_CLIP) and tensor.ndim == 1:
            return tensor.view(1, 1, -1)
        if ours.endswith("position_embeddings") and self.layout in (TOWER, OPEN_CLIP) and tensor.ndim == 2:
            return tensor.unsqueeze(0)
        if ours.endswith("position_embeddings") and self.layout is NAFLEX and tensor.ndim == 4:
            return tensor.flatten(1, 2)
        if ours.endswith("projection.weight") and self.layout is NAFLEX and tensor.ndim == 2:
            side = math.isqrt(tensor.shape[1] // 3)  # (D, h w C) of square patches in three colours
            if tensor.shape[1] == 3 * side**2:
                return tensor.view(-1, side, side, 3).permute(0, 3, 1, 2)
        return tensor


def from_jax(ours: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of Google's layout in torch's."""
    if tensor.ndim == 4 and ours.endswith("projection.weight"):  # patch kernel (h, w, C, D)
        return tensor.permute(3, 2, 0, 1)
    if tensor.ndim == 3 and ours.endswith(".proj.weight"):  # (heads, head dim, D)
        return tensor.flatten(0, 1).T
    if tensor.ndim == 3 and ours.endswith(".weight"):  # (D, heads, head dim)
        return tensor.flatten(1).T
    if tensor.ndim == 2 and ours.endswith(".bias"):  # (heads, head dim)
        return tensor.flatten()
    return tensor.T if tensor.ndim == 2 else tensor


def to_jax(ours: str, tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The way back."""
    if tensor.ndim == 4:
        return tensor.permute(2, 3, 1, 0)
    if ours.endswith((".qkv.weight", ".q.weight", ".kv.weight")):
        return tensor.T.unflatten(1, (num_heads, -1))
    if ours.endswith((".attention.proj.weight", ".attention_pooling.proj.weight")):
        return tensor.T.unflatten(0, (num_heads, -1))
    if ours.endswith((".qkv.bias", ".q.bias", ".kv.bias")):
        return tensor.unflatten(0, (num_heads, -1))
    return tensor.T if tensor.ndim == 2 else tensor


def recognise(opened: Checkpoint, source: str | None) -> tuple[str, NamedTensors]:
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
    layouts = [layout for layout in LAYOUTS if _marked(layout, names) is not None]
    if not layouts:
        refuse(names, opened.title)
        raise ValueError(
            f"{opened.title} was not recognised: none of its {first_few(names)} names ends with "
            f"{', '.join(layout.marker for layout in LAYOUTS)}."
        )
    layout = layouts[0]
    if layout is TRANSFORMERS and any(re.search(r"\.norm1\.weight$", name) for name in names):
        gated = any(re.search(r"\.mlp\.(weights_in|gate_proj)\.weight$", name) for name in names)
        layout = DINOV2_GATED if gated else DINOV2
    named = NamedTensors(opened, layout, _marked(layout, names))
    family = _family(opened, named)
    if source is not None and not (source == "transformers" and layout in OF_TRANSFORMERS):
        if layout not in FAMILIES[source].layouts:
            raise ValueError(f"source={source!r}, but {opened.title} has {layout.title} names (as of {family!r}).")
        family = source
    named.may_lack_cls |= family == "ijepa"
    return family, named


def _marked(layout: Layout, names: list[str]) -> str | None:
    """What comes before the layout's marker, or None where it is absent."""
    if layout is OPEN_CLIP and not any("resblocks.0." in name for name in names):
        return None
    found = [name for name in names if re.search(rf"(^|[./]){re.escape(layout.marker)}$", name)]
    return min(found, key=len).removesuffix(layout.marker) if found else None


OF_TRANSFORMERS = (TRANSFORMERS, DINOV2, DINOV2_GATED, DINOV3, TOWER)


def _family(opened: Checkpoint, named: NamedTensors) -> str:
    model_type = opened.config.get("model_type")
    if named.layout in OF_TRANSFORMERS:
        if model_type is not None:
            if model_type in REFUSED_TYPES:
                raise ValueError(
                    f"{opened.title} is transformers' {model_type}, with {REFUSED_TYPES[model_type]}, which this model "
                    "has not."
                )
            if model_type not in MODEL_TYPES:
                raise ValueError(
                    f"config.json says model_type {model_type!r}; known are {', '.join([*MODEL_TYPES, 'vit_scratch'])}."
                )
            return MODEL_TYPES[model_type]
        if named.layout is DINOV3:
            return "dinov3"
        if named.layout is TOWER:
            return "clip" if named.has("vit.embeddings.cls_token") else "siglip"
        if named.layout in (DINOV2, DINOV2_GATED):
            return "dinov2_with_registers" if "embeddings.register_tokens" in named.names else "dinov2"
        if "embeddings.distillation_token" in named.names:
            return "deit"
        positions = named.shape("vit.embeddings.position_embeddings") or [1, 2]
        if "embeddings.cls_token" not in named.names and math.isqrt(positions[1]) ** 2 == positions[1]:
            return "ijepa"  # else a class token is missing
        return "mae" if "decoder.decoder_embed.weight" in named.names else "transformers"
    if named.layout is OPEN_CLIP:
        return "clip"
    if named.layout is NAFLEX:
        return "timm"
    if named.layout is TIMM:
        if "storage_tokens" in named.names:
            return "dinov3"
        if "mask_token" in named.names and named.has("vit.layers.0.layer_scale1.scale"):
            return "dinov2_with_registers" if "register_tokens" in named.names else "dinov2"
        if "decoder_embed.weight" in named.names:
            return "mae"
        if "dist_token" in named.names or ("blocks.0.gamma_1" in named.names and opened.wrapper == "model"):
            return "deit"  # unwrapped, LayerScale has that name in timm's class Eva
        if opened.wrapper == "model":  # as DeiT and MAE publish theirs, and timm does not
            plain_head = named.has("classifier.weight") and not named.has("vit.pooled_norm.weight")
            return "deit" if plain_head else "mae"
        return "dino" if opened.wrapper in ("teacher", "student") else "timm"
    return {id(family.layouts[0]): name for name, family in FAMILIES.items()}[id(named.layout)]


def refuse(names: list[str], title: str):
    for pattern, what in REFUSED.items():
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            raise ValueError(f"{title} has {what}, which this model has not: {first_few(found)}.")
