"""The other libraries with Vision Transformers, as far as they import here, and their models with our weights.

Import this before transformers and the package. torchvision's wheel does not import beside a CPU build of torch, whose
operators it was not compiled for, and transformers' models then do not either; here it is made to.
"""

import importlib
import tempfile
from functools import partial
from importlib.metadata import version
from types import ModuleType

import torch
from torch import nn

LIBRARIES = ("torchvision", "timm", "vit_pytorch")  # torchvision first: the others import it

DETECTION = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
ALIGN = (
    "(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, int sampling_ratio, "
    "bool aligned) -> Tensor"
)
OPERATORS = {
    "nms": DETECTION,
    "qnms": DETECTION,
    "roi_align": ALIGN,
    "qroi_align": ALIGN,
    **dict.fromkeys(
        (
            "_roi_align_backward", "ps_roi_align", "_ps_roi_align_backward", "roi_pool", "_roi_pool_backward",
            "ps_roi_pool", "_ps_roi_pool_backward", "deform_conv2d", "_deform_conv2d_backward",
        ),
        "(Tensor x) -> Tensor",
    ),
}  # fmt: skip


def declare_operators() -> torch.library.Library:
    """Declare the operators that torchvision's own library would define; they vanish with what is returned.

    The wheel registers shape functions for them on import, which fails where that library does not load. Being declared
    is enough: models and transforms use none of them.
    """
    library = torch.library.Library("torchvision", "DEF")
    for name, schema in OPERATORS.items():
        library.define(name + schema)
    return library


def import_libraries() -> tuple[dict[str, ModuleType], dict[str, str], torch.library.Library | None]:
    """The modules of `LIBRARIES` that import, why others do not, and the operators that had to be declared."""
    modules, reasons, operators = {}, {}, None
    for name in LIBRARIES:
        try:
            try:
                modules[name] = importlib.import_module(name)
            except RuntimeError:
                if name != "torchvision":
                    raise
                operators = declare_operators()
                modules[name] = importlib.import_module(name)
        except (ImportError, RuntimeError) as error:
            reasons[name] = str(error).splitlines()[0]
    return modules, reasons, operators


MODULES, REASONS, _operators = import_libraries()


def versions() -> dict[str, str]:
    """The versions of torch, transformers, and the libraries that import."""
    return {name.replace("_", "-"): version(name) for name in ("torch", "transformers", *MODULES)}


class TeachingBlock(nn.Module):
    """Pre-norm block, sequence first: (N, B, D) -> (N, B, D)."""

    def __init__(self, D: int, heads: int, mlp: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention = nn.MultiheadAttention(D, heads)
        self.mlp = nn.Sequential(nn.Linear(D, mlp), nn.GELU(), nn.Linear(mlp, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed)[0]  # the mean map is computed, and thrown away
        return x + self.mlp(self.norm2(x))


class TeachingViT(nn.Module):
    """The layout of teaching code: `nn.MultiheadAttention`, sequence first, returning weights; mean of the patches.

    With its default sizes it has 847,626 parameters, like the preset "showcase".
    """

    def __init__(self, image=32, patch=8, channels=3, D=256, blocks=2, heads=2, mlp=256, classes=10):
        super().__init__()
        self.patch = patch
        self.embedding = nn.Linear(channels * patch * patch, D)
        self.positions = nn.Parameter(torch.randn((image // patch) ** 2, 1, D))
        self.blocks = nn.Sequential(*(TeachingBlock(D, heads, mlp) for _ in range(blocks)))
        self.classifier = nn.Linear(D, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        B, C, P = images.shape[0], images.shape[1], self.patch
        patches = images.unfold(2, P, P).unfold(3, P, P)  # (B, C, h, w, P, P)
        patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(B, -1, C * P * P)  # (B, N, C * P * P)
        tokens = self.embedding(patches).permute(1, 0, 2) + self.positions  # (N, B, D)
        return self.classifier(self.blocks(tokens).mean(dim=0))


# -- models of others, with the weights of one of ours -----------------------------------------------------------------
# transformers and the package are imported where they are needed: after torchvision, above.


def make_transformers(ours) -> nn.Module:
    from transformers import AutoConfig, AutoModelForImageClassification

    from modeling_vit_scratch.conversion import export_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        tensors = export_checkpoint(ours, "transformers", folder)
        config = AutoConfig.from_pretrained(folder)
    model = AutoModelForImageClassification.from_config(config, attn_implementation="sdpa")
    model.load_state_dict(tensors)
    return model


def make_timm(ours) -> nn.Module:
    from modeling_vit_scratch.conversion import export_checkpoint

    tensors, config = export_checkpoint(ours, "timm"), ours.config
    model = MODULES["timm"].models.VisionTransformer(
        img_size=config.image_hw,
        patch_size=config.patch_hw,
        in_chans=config.num_channels,
        num_classes=config.num_labels,
        global_pool={"cls": "token", "mean": "avg"}[config.pooling],
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        class_token=config.use_cls_token,
        final_norm=config.use_final_norm,
        fc_norm=False,
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
    )
    model.load_state_dict(tensors)
    return model


def make_torchvision(ours) -> nn.Module:
    from modeling_vit_scratch.conversion import export_checkpoint

    tensors, config = export_checkpoint(ours, "torchvision"), ours.config
    model = MODULES["torchvision"].models.VisionTransformer(
        image_size=config.image_hw[0],
        patch_size=config.patch_hw[0],
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        hidden_dim=config.hidden_size,
        mlp_dim=config.intermediate_size,
        num_classes=config.num_labels,
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
    )
    model.load_state_dict(tensors)
    return model


def make_vit_pytorch(ours) -> nn.Module:
    config = ours.config
    if not config.use_cls_token or config.pooling != "cls" or not config.use_final_norm:
        raise ValueError("it has no model without class token and final norm")
    return MODULES["vit_pytorch"].ViT(
        image_size=config.image_hw,
        patch_size=config.patch_hw,
        num_classes=config.num_labels,
        dim=config.hidden_size,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        dim_head=config.hidden_size // config.num_attention_heads,
        mlp_dim=config.intermediate_size,
    )


def make_teaching(ours) -> nn.Module:
    config, tensors = ours.config, ours.state_dict()
    if config.use_cls_token or config.pooling != "mean" or config.use_final_norm:
        raise ValueError("it has neither class token nor final norm")
    model = TeachingViT(
        config.image_hw[0],
        config.patch_hw[0],
        config.num_channels,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.intermediate_size,
        config.num_labels,
    )
    names = {"embedding.": "vit.embeddings.patch_embeddings.projection.", "classifier.": "classifier."}
    inside = {
        "norm1.": "norm1.",
        "attention.in_proj_": "attention.qkv.",
        "attention.out_proj.": "attention.proj.",
        "norm2.": "norm2.",
        "mlp.0.": "mlp.fc1.",
        "mlp.2.": "mlp.fc2.",
    }
    for i in range(config.num_hidden_layers):
        names |= {f"blocks.{i}.{theirs}": f"vit.layers.{i}.{own}" for theirs, own in inside.items()}
    state = {theirs + kind: tensors[own + kind] for theirs, own in names.items() for kind in ("weight", "bias")}
    state["positions"] = tensors["vit.embeddings.position_embeddings"].transpose(0, 1)
    model.load_state_dict(state)
    return model


# What the peers' models here have, field by field; other values would be left out of the comparison unseen.
PLAIN = {
    "position_embedding_type": ("learned", "sincos"), "use_gated_mlp": (False,), "use_embedding_norm": (False,),
    "use_qk_norm": (False,), "key_bias": (True,), "num_cls_tokens": (1,), "pooling": ("cls", "mean"),
}  # fmt: skip


def require_plain(config):
    """Refuse a model with a choice that no peer has.

    Raises:
        ValueError: Says which choices.
    """
    chosen = [f"{name}={getattr(config, name)!r}" for name in PLAIN if getattr(config, name) not in PLAIN[name]]
    if chosen:
        raise ValueError(f"it has no model with {', '.join(chosen)}")


# By name: what makes the model, and whether ours and its can have the same weights. vit-pytorch's has LayerNorms before
# and after the patch projection and no bias for query, key and value, about the same arithmetic.
PEERS = {
    "transformers": (make_transformers, True),
    "timm": (make_timm, True),
    "torchvision": (make_torchvision, True),
    "vit-pytorch": (make_vit_pytorch, False),
    "teaching layout": (make_teaching, True),
}


def make_peer(name: str, ours) -> nn.Module:
    """A peer's model with the geometry of ours and, where both can have the same, its weights.

    Args:
        name: One of `PEERS`.
        ours: A `ViTScratchForImageClassification` in float32, on the CPU.

    Raises:
        ImportError: The library does not import here; says why.
        ValueError: The library has no such model.
    """
    library = name.replace("-", "_")
    if library in REASONS:
        raise ImportError(REASONS[library])
    require_plain(ours.config)
    return PEERS[name][0](ours)
