"""What other libraries call a Vision Transformer's tensors, and what their tensors cannot tell: tables of facts.

The other rooms of this wing read and write weights by them.
"""

import re
from dataclasses import dataclass, field

from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling


@dataclass(frozen=True)
class Layout:
    """The names one library gives to a ViT's tensors.

    Args:
        title: What the layout is called in messages.
        marker: Name of the patch projection's kernel, by which the layout is recognised.
        names: Our module or tensor outside the blocks -> theirs. "a|b" are spellings of different versions; a tuple
            names the parts that are stacked to one tensor of ours.
        block: How the names of block `{i}` begin.
        block_names: As `names`, inside a block.
        unused: Pattern of names that a classifier has no use for -> what they are.
        layer_norm_eps: The library's published epsilon.
        hidden_act: The activation that the library's code has where nothing says another.
        positions: Which tokens before the patches have positions, in the order tried: "none", "cls", or "all", class
            token and registers.
        jax: Whether kernels are (in, out), the patch kernel (h, w, C, D), and heads have an axis of their own.
    """

    title: str
    marker: str
    names: dict[str, str | tuple[str, ...]]
    block: str
    block_names: dict[str, str | tuple[str, ...]]
    unused: dict[str, str] = field(default_factory=dict)
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu"
    positions: tuple[str, ...] = ("cls",)
    jax: bool = False


TRANSFORMERS = Layout(
    title="transformers'",
    marker="embeddings.patch_embeddings.projection.weight",
    names={
        "vit.embeddings.cls_token": "embeddings.cls_token",
        "vit.embeddings.register_tokens": "embeddings.distillation_token",  # DeiT's is a register with a position
        "vit.embeddings.position_embeddings": "embeddings.position_embeddings",
        "vit.embeddings.patch_embeddings.projection": "embeddings.patch_embeddings.projection",
        "vit.norm": "layernorm",
        "pre_logits.0": "pooler.dense",
        "classifier": "classifier",
    },
    block="layers.{i}.|encoder.layer.{i}.",  # in memory | on the Hub
    block_names={
        "norm1": "layernorm_before",
        "attention.qkv": (
            "attention.q_proj|attention.attention.query",
            "attention.k_proj|attention.attention.key",
            "attention.v_proj|attention.attention.value",
        ),
        "attention.proj": "attention.o_proj|attention.output.dense",
        "norm2": "layernorm_after",
        "mlp.fc1": "mlp.fc1|intermediate.dense",
        "mlp.fc2": "mlp.fc2|output.dense",
    },
    unused={r"embeddings\.mask_token": "the mask token", r"decoder\..*": "the pre-training decoder"},
    layer_norm_eps=1e-12,
    positions=("all",),
)

DINOV2 = Layout(
    title="transformers' DINOv2",
    marker="embeddings.patch_embeddings.projection.weight",
    names={
        **TRANSFORMERS.names,
        "vit.embeddings.register_tokens": "embeddings.register_tokens",
    },
    block="layers.{i}.|encoder.layer.{i}.",
    block_names={
        **TRANSFORMERS.block_names,
        "norm1": "norm1",
        "layer_scale1.scale": "layer_scale1.lambda1",
        "norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "layer_scale2.scale": "layer_scale2.lambda1",
    },
    unused={r"embeddings\.mask_token": "the mask token"},
)

TIMM = Layout(
    title="timm's",  # and those of DeiT, DINO, DINOv2 and MAE, whose code began as timm's
    marker="patch_embed.proj.weight",
    names={
        "vit.embeddings.cls_token": "cls_token",
        "vit.embeddings.register_tokens": "reg_token|register_tokens|dist_token",
        "vit.embeddings.position_embeddings": "pos_embed",
        "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
        "vit.norm": "norm",
        "vit.pooled_norm": "fc_norm",
        "pre_logits.0": "pre_logits.fc",
        "classifier": "head",
    },
    block="blocks.{i}.",
    block_names={
        "norm1": "norm1",
        "attention.qkv": "attn.qkv",
        "attention.proj": "attn.proj",
        "layer_scale1.scale": "ls1.gamma|gamma_1",
        "norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "layer_scale2.scale": "ls2.gamma|gamma_2",
    },
    unused={
        r"mask_token": "the mask token",
        r"decoder_.*": "the pre-training decoder",
        r"(module\.)?head\.(mlp|last_layer)\..*": "DINO's projection head",
    },
    positions=("none", "cls", "all"),
)

TORCHVISION = Layout(
    title="torchvision's",
    marker="conv_proj.weight",
    names={
        "vit.embeddings.cls_token": "class_token",
        "vit.embeddings.position_embeddings": "encoder.pos_embedding",
        "vit.embeddings.patch_embeddings.projection": "conv_proj",
        "vit.norm": "encoder.ln",
        "pre_logits.0": "heads.pre_logits",
        "classifier": "heads.head",
    },
    block="encoder.layers.encoder_layer_{i}.",
    block_names={
        "norm1": "ln_1",
        "attention.qkv.weight": "self_attention.in_proj_weight",
        "attention.qkv.bias": "self_attention.in_proj_bias",
        "attention.proj": "self_attention.out_proj",
        "norm2": "ln_2",
        "mlp.fc1": "mlp.0|mlp.linear_1",  # in memory | in the published files
        "mlp.fc2": "mlp.3|mlp.linear_2",
    },
)

JAX = Layout(
    title="Google's",
    marker="embedding/kernel",
    names={
        "vit.embeddings.cls_token": "cls",
        "vit.embeddings.position_embeddings": "Transformer/posembed_input/pos_embedding|pos_embedding",
        "vit.embeddings.patch_embeddings.projection.weight": "embedding/kernel",
        "vit.embeddings.patch_embeddings.projection.bias": "embedding/bias",
        "vit.norm.weight": "Transformer/encoder_norm/scale",
        "vit.norm.bias": "Transformer/encoder_norm/bias",
        "pre_logits.0.weight": "pre_logits/kernel",
        "pre_logits.0.bias": "pre_logits/bias",
        "classifier.weight": "head/kernel",
        "classifier.bias": "head/bias",
    },
    block="Transformer/encoderblock_{i}/",
    block_names={  # vision_transformer | big_vision
        "norm1.weight": "LayerNorm_0/scale",
        "norm1.bias": "LayerNorm_0/bias",
        "attention.qkv.weight": tuple(
            f"MultiHeadDotProductAttention_1/{part}/kernel|MultiHeadDotProductAttention_0/{part}/kernel"
            for part in ("query", "key", "value")
        ),
        "attention.qkv.bias": tuple(
            f"MultiHeadDotProductAttention_1/{part}/bias|MultiHeadDotProductAttention_0/{part}/bias"
            for part in ("query", "key", "value")
        ),
        "attention.proj.weight": "MultiHeadDotProductAttention_1/out/kernel|MultiHeadDotProductAttention_0/out/kernel",
        "attention.proj.bias": "MultiHeadDotProductAttention_1/out/bias|MultiHeadDotProductAttention_0/out/bias",
        "norm2.weight": "LayerNorm_2/scale|LayerNorm_1/scale",
        "norm2.bias": "LayerNorm_2/bias|LayerNorm_1/bias",
        "mlp.fc1.weight": "MlpBlock_3/Dense_0/kernel|MlpBlock_0/Dense_0/kernel",
        "mlp.fc1.bias": "MlpBlock_3/Dense_0/bias|MlpBlock_0/Dense_0/bias",
        "mlp.fc2.weight": "MlpBlock_3/Dense_1/kernel|MlpBlock_0/Dense_1/kernel",
        "mlp.fc2.bias": "MlpBlock_3/Dense_1/bias|MlpBlock_0/Dense_1/bias",
    },
    unused={r"opt/state/.*": "the optimizer's state"},
    hidden_act="gelu_pytorch_tanh",  # flax's nn.gelu approximates unless told not to, and neither codebase tells it
    jax=True,
)

HALF = (0.5, 0.5, 0.5)
BILINEAR, BICUBIC = int(PILImageResampling.BILINEAR), int(PILImageResampling.BICUBIC)


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
    """

    layouts: tuple[Layout, ...]
    mean: tuple[float, ...] = tuple(IMAGENET_DEFAULT_MEAN)
    std: tuple[float, ...] = tuple(IMAGENET_DEFAULT_STD)
    resample: int = BICUBIC
    crop: float | None = 224 / 256
    interpolation: str = "bicubic"
    in_transformers: str = "bicubic"


# Positions are resized by interpolate_pos_encoding in transformers' classes and in vision_transformer.py of DINO and
# DINOv2 (hub/backbones.py sets its offset and antialiasing), resample_abs_pos_embed in timm, interpolate_embeddings in
# torchvision, load_pretrained in Google's vit_jax/checkpoint.py (scipy.ndimage.zoom of order 1, which aligns corners;
# big_vision does the same), interpolate_pos_embed in MAE, main.py in DeiT. timm's reader of .npz files does not align
# corners; what it reads is Google's, whose own code is followed.
FAMILIES = {
    "transformers": Family((TRANSFORMERS,), HALF, HALF, BILINEAR, crop=None),
    "timm": Family((TIMM,), HALF, HALF, BICUBIC, crop=0.9, interpolation="bicubic_antialias"),
    "torchvision": Family((TORCHVISION,), resample=BILINEAR, interpolation="bicubic_align_corners"),
    "jax": Family((JAX,), HALF, HALF, BILINEAR, crop=None, interpolation="bilinear_align_corners"),
    "deit": Family((TRANSFORMERS, TIMM)),
    "dino": Family((TRANSFORMERS, TIMM), interpolation="bicubic_offset"),
    "dinov2": Family((DINOV2, TIMM), interpolation="bicubic_offset"),
    "dinov2_with_registers": Family(
        (DINOV2, TIMM), interpolation="bicubic_antialias", in_transformers="bicubic_antialias"
    ),
    "mae": Family((TRANSFORMERS, TIMM)),
}
TARGETS = {"transformers": TRANSFORMERS, "timm": TIMM, "torchvision": TORCHVISION, "jax": JAX}

# `model_type` of a config.json -> family.
MODEL_TYPES = {
    "vit": "transformers",
    "deit": "deit",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2_with_registers",
    "vit_mae": "mae",
}

# Widths whose published models do not have 64 channels per head (ViT-H, SoViT, ViT-g, ViT-G).
PUBLISHED_HEADS = {1280: 16, 1152: 16, 1408: 16, 1664: 16}

# timm's arguments -> our fields; and the architectures that differ from their families.
TIMM_ARGUMENTS = {
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "patch_size": "patch_size",
    "in_chans": "num_channels",
    "img_size": "image_size",
    "qkv_bias": "qkv_bias",
    "class_token": "use_cls_token",
    "reg_tokens": "num_register_tokens",
    "final_norm": "use_final_norm",
    "fc_norm": "norm_after_pooling",
    "global_pool": "pooling",
    "act_layer": "hidden_act",
}
TIMM_POOLINGS = {"token": "cls", "avg": "mean", "": None}
TIMM_ACTIVATIONS = {
    "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "quickgelu": "quick_gelu",
    "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip
TIMM_ARCHITECTURES = {
    r"vit_base_patch16_gap_224|vit_giantopt_patch16_siglip_.*": {"num_heads": 16},
    r"vit_(so400m_patch16|giantopt_patch16|base_patch32)_siglip_.*|vit_large_patch16_siglip_.*512": {
        "act_layer": "gelu_tanh"
    },
    r"vit_intern300m_.*|vit_.*_radio_.*": {"final_norm": False},
}
# Architectures whose positions timm resizes another way than its others'.
TIMM_INTERPOLATIONS = {
    r".*flexi.*": "bilinear",
    r".*(base|huge)_patch16_radio_v3.*": "bilinear_align_corners",
    r".*radio.*": "bilinear",
}
# Architectures whose tensors have the names of a ViT, and which compute something else.
TIMM_REFUSED = {r".*_rope_.*|eva.*|beit.*": "relative or rotary positions", r".*_rpn_.*": "norms after the branches"}
TIMM_RESAMPLE = {kind.name.lower(): int(kind) for kind in PILImageResampling}

# Fields of a config.json beside the tensors that are taken over, or, where the tensors tell, compared with them.
CONFIG_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "image_size",
    "patch_size", "num_channels", "qkv_bias", "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob",
    "initializer_range", "encoder_stride", "pooling", "problem_type", "position_interpolation",
)  # fmt: skip

# Names of what the config cannot express -> what it is.
REFUSED = {
    r".*\bmlp\.(w12|w3|w1|w2|weights_in|weights_out|gate_proj|up_proj|fc1_g|fc1_x)\..*": "a SwiGLU MLP",
    r".*\b(norm_pre|ln_pre|pre_layrnorm)\..*": "a norm before the first block (pre-norm towers such as CLIP's)",
    r".*\battn_pool\..*|.*MAPHead_0/.*|.*vision_model\.head\..*": "attention pooling",
    r".*\b(q_norm|k_norm|q_ln|k_ln)\b.*|.*/(query_norm|key_norm)/.*": "normalised queries and keys",
    r".*\b(q_bias|v_bias)": "query and value biases without a key bias (BEiT)",
    r".*relative_position.*|.*\brel_pos.*|.*rope_embed.*": "relative or rotary positions",
    r".*patch_embed\.backbone\..*|.*conv_root/.*|conv_proj\.conv_.*|.*patch_embed\.(norm|proj\.\d).*": (
        "a convolutional stem"
    ),
    r".*\b(attns|ffns)\.\d+\..*|.*\.in_proj\..*|.*\.mlp_out_proj\..*": "parallel blocks",
    r".*\battn\.norm\..*|.*\bmlp\.norm\..*|.*\battn\.(lambda|sub_norm).*": "norms inside attention or MLP",
    r".*Transformer/encoderblock/.*": "blocks stacked by flax's scan",
    r".*\bdetection_tokens|.*mid_position_embeddings": "detection tokens",
}
# Heads that the model does not have; asking for a new head (`num_labels=`) leaves them out.
REFUSED_HEADS = {
    r"(cls_classifier|distillation_classifier|head_dist)\..*": "a distilled second head",
}

SUFFIXES = (".safetensors", ".npz", ".pt", ".pth", ".bin")
# Files of a folder or Hub repository, in the order they are looked for.
WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "model.npz",
)  # fmt: skip
# Keys below which training scripts store the weights.
WRAPPERS = ("state_dict", "model", "teacher", "student", "model_ema", "module")


def spellings_of(layout: Layout, ours: str) -> list[list[str]]:
    """Their names for our tensor: for each part that is stacked to it, the spellings to try."""
    in_block = re.fullmatch(r"vit\.layers\.(\d+)\.(.+)", ours)
    table = layout.block_names if in_block else layout.names
    starts = [start.format(i=in_block[1]) for start in layout.block.split("|")] if in_block else [""]
    inner, suffix = (in_block[2] if in_block else ours), ""
    if inner not in table:
        inner, _, leaf = inner.rpartition(".")
        suffix = f".{leaf}"
    entry = table.get(inner, ())  # nothing: the layout has no such tensor
    parts = entry if isinstance(entry, tuple) else (entry,)
    return [[start + name + suffix for name in part.split("|") for start in starts] for part in parts]
