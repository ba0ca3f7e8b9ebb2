"""Whose weights are understood, what their tensors cannot tell, and what is refused: facts, as published."""

from dataclasses import dataclass, field

from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    PILImageResampling,
)

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
)

HALF = (0.5, 0.5, 0.5)
BILINEAR, BICUBIC = int(PILImageResampling.BILINEAR), int(PILImageResampling.BICUBIC)


# Widths of published models -> heads; of 64 channels, but for ViT-H's, of 80.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}


@dataclass(frozen=True)
class Family:
    """What the tensors of one source cannot tell, as its authors published it.

    Args:
        layouts: The layouts its files come in.
        mean, std: Of the image processor, per channel.
        resample: PIL's number of the interpolation.
        crop: Share of the resized image's side that the central crop keeps, or None: resized without a crop.
        interpolation: How its authors' own code resizes positions, as the config's `position_interpolation`.
        in_transformers: The same of transformers' class for it, whose tensors have other names.
        heads: Width of its published models -> their heads; empty where the same width has several.
        layer_norm_eps: Its epsilon, where it is not its layout's.
        hidden_act: Its activation, where it is not its layout's; "" where its files have several.
        fields: Of the config, where no tensor tells them.
    """

    layouts: tuple[Layout, ...]
    mean: tuple[float, ...] = tuple(IMAGENET_DEFAULT_MEAN)
    std: tuple[float, ...] = tuple(IMAGENET_DEFAULT_STD)
    resample: int = BICUBIC
    crop: float | None = 224 / 256
    interpolation: str = "bicubic"
    in_transformers: str = "bicubic"
    heads: dict[int, int] = field(default_factory=lambda: HEADS)
    layer_norm_eps: float | None = None
    hidden_act: str | None = None
    fields: dict = field(default_factory=dict)


# Positions are resized by interpolate_pos_encoding in transformers' classes and in vision_transformer.py of DINO and
# DINOv2 (hub/backbones.py sets its offset and antialiasing), resample_abs_pos_embed in timm, interpolate_embeddings in
# torchvision, load_pretrained in Google's vit_jax/checkpoint.py (scipy.ndimage.zoom of order 1, which aligns corners;
# big_vision does the same), interpolate_pos_embed in MAE, main.py in DeiT, resize_pos_embed in OpenCLIP. timm's reader
# of .npz files does not align corners; what it reads is Google's, whose own code is followed.
FAMILIES = {
    "transformers": Family((TRANSFORMERS,), HALF, HALF, BILINEAR, crop=None),
    "timm": Family((TIMM, NAFLEX), HALF, HALF, BICUBIC, crop=0.9, interpolation="bicubic_antialias", heads={}),
    "torchvision": Family((TORCHVISION,), resample=BILINEAR, interpolation="bicubic_align_corners"),
    "jax": Family((JAX,), HALF, HALF, BILINEAR, crop=None, interpolation="bilinear_align_corners"),
    "deit": Family((TRANSFORMERS, TIMM)),
    "dino": Family((TRANSFORMERS, TIMM), interpolation="bicubic_offset"),
    "dinov2": Family(
        (DINOV2, DINOV2_GATED, TIMM), interpolation="bicubic_offset", heads={**HEADS, 1536: 24}, layer_norm_eps=1e-6
    ),
    "dinov2_with_registers": Family(
        (DINOV2, DINOV2_GATED, TIMM),
        interpolation="bicubic_antialias",
        in_transformers="bicubic_antialias",
        heads={**HEADS, 1536: 24},
        layer_norm_eps=1e-6,
    ),
    "dinov3": Family(
        (DINOV3, TIMM),
        resample=BILINEAR,
        crop=None,
        heads={192: 3, 384: 6, 768: 12, 1024: 16, 1280: 20, 4096: 32},
        layer_norm_eps=1e-5,
        fields={"position_embedding_type": "rope", "rope_theta": 100.0, "rope_coordinates": "centered"},
    ),
    "mae": Family((TRANSFORMERS, TIMM)),
    "msn": Family((TRANSFORMERS,), layer_norm_eps=1e-6),
    "ijepa": Family((TRANSFORMERS,), heads={1280: 16, 1408: 16}, layer_norm_eps=1e-6),
    "clip": Family(
        (TOWER, OPEN_CLIP),
        tuple(OPENAI_CLIP_MEAN),
        tuple(OPENAI_CLIP_STD),
        crop=1.0,
        heads={768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16},
        layer_norm_eps=1e-5,
        hidden_act="",  # QuickGELU in OpenAI's, GELU in most of OpenCLIP's
        fields={"pooling": "cls"},
    ),
    "siglip": Family(
        (TOWER,), HALF, HALF, crop=None, heads={768: 12, 1024: 16, 1152: 16, 1536: 16}, hidden_act="gelu_pytorch_tanh"
    ),
}
TARGETS = {"transformers": TRANSFORMERS, "timm": TIMM, "torchvision": TORCHVISION, "jax": JAX}

# `model_type` of a config.json -> family.
MODEL_TYPES = {
    "vit": "transformers",
    "deit": "deit",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2_with_registers",
    "dinov3_vit": "dinov3",
    "vit_mae": "mae",
    "vit_msn": "msn",
    "ijepa": "ijepa",
    "clip": "clip",
    "clip_vision_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
}
# `model_type`s with the names of a ViT, and which compute something else.
REFUSED_TYPES = {
    "beit": "relative positions",
    "data2vec-vision": "relative positions",
    "siglip2": "patches of any number (NaFlex)",
    "siglip2_vision_model": "patches of any number (NaFlex)",
}
# `model_type`s whose own config stands below "vision_config", and transformers' class that knows its defaults.
VISION_CONFIGS = {"clip": "CLIPVisionConfig", "siglip": "SiglipVisionConfig"}

# Fields of a config.json beside the tensors that are taken over, or, where the tensors tell, compared with them.
CONFIG_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "image_size",
    "patch_size", "num_channels", "qkv_bias", "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob",
    "initializer_range", "encoder_stride", "pooling", "problem_type", "position_interpolation", "rope_theta",
    "position_embedding_type", "rope_coordinates", "rope_grid_size", "rope_offset", "rope_frequencies",
)  # fmt: skip

# Names of what the config cannot express -> what it is.
REFUSED = {
    r".*relative_position.*|.*\brel_pos.*": "relative positions",
    r".*patch_embed\.backbone\..*|.*conv_root/.*|conv_proj\.conv_.*|.*patch_embed\.(norm|proj\.\d).*": (
        "a convolutional stem"
    ),
    r".*\b(attns|ffns)\.\d+\..*|.*\.in_proj\..*|.*\.mlp_out_proj\..*": "parallel blocks",
    r".*\battn\.norm\..*|.*\bmlp\.norm\..*|.*\battn\.(lambda|sub_norm).*": "norms inside attention or MLP",
    r".*\b(q_ln|k_ln)\b.*|.*/(query_norm|key_norm)/.*": "normalised queries and keys of Google's",
    r".*\battn\.(q_proj|k_proj)\.weight": "queries and keys projected apart (grouped, or with norms inside)",
    r".*Transformer/encoderblock/.*": "blocks stacked by flax's scan",
    r".*\bdetection_tokens|.*mid_position_embeddings": "detection tokens",
    r".*embeds\.pos_embed_[yx]": "positions that are sums of rows and columns",
    r".*\battn_pool\.(pos_embed|probe).*|.*attn_pool\.layernorm.*": "another attention pooling than timm's",
}
# Two heads of a distilled model, each on a class token of its own: (on the class token, on the distillation token).
DISTILLED_HEADS = {"deit": ("cls_classifier", "distillation_classifier"), "timm": ("head", "head_dist")}
