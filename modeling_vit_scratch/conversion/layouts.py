"""What other libraries call a Vision Transformer's tensors: tables of facts.

The other rooms of this wing read and write weights by them.
"""

import re
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Layout:
    """The names one library gives to a ViT's tensors.

    Args:
        title: What the layout is called in messages.
        marker: Name of the patch projection's kernel, by which the layout is recognised.
        names: Our module or tensor outside the blocks -> theirs. "a|b" are spellings of different versions; a tuple
            names the parts that are stacked to one tensor of ours; a list, forms of which a checkpoint has one.
        block: How the names of block `{i}` begin.
        block_names: As `names`, inside a block.
        unused: Pattern of names that a classifier has no use for -> what they are.
        layer_norm_eps: The library's published epsilon.
        hidden_act: The activation that the library's code has where nothing says another.
        positions: Which tokens before the patches have positions, in the order tried: "none", "cls", or "all", class
            token and registers.
        may_lack_cls: Whether there are models without a class token.
        jax: Whether kernels are (in, out), the patch kernel (h, w, C, D), and heads have an axis of their own.
    """

    title: str
    marker: str
    names: dict[str, str | tuple[str, ...] | list]
    block: str
    block_names: dict[str, str | tuple[str, ...] | list]
    unused: dict[str, str] = field(default_factory=dict)
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu"
    positions: tuple[str, ...] = ("cls",)
    may_lack_cls: bool = False
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
DINOV2_GATED = replace(
    DINOV2,
    title="transformers' DINOv2 (SwiGLU)",
    block_names={
        **DINOV2.block_names,
        "mlp.fc1": [("mlp.gate_proj", "mlp.up_proj"), "mlp.weights_in"],  # in memory, on the Hub
        "mlp.fc2": "mlp.down_proj|mlp.weights_out",
    },
    hidden_act="silu",
)

DINOV3 = Layout(
    title="transformers' DINOv3",
    marker="embeddings.patch_embeddings.weight",
    names={
        "vit.embeddings.cls_token": "embeddings.cls_token",
        "vit.embeddings.register_tokens": "embeddings.register_tokens",
        "vit.embeddings.patch_embeddings.projection": "embeddings.patch_embeddings",
        "vit.norm": "norm",
    },
    block="model.layer.{i}.|layer.{i}.",
    block_names={
        **DINOV2.block_names,
        "attention.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attention.q_bias": "attention.q_proj.bias",
        "attention.v_bias": "attention.v_proj.bias",
        "attention.proj": "attention.o_proj",
        "mlp.fc1": [("mlp.gate_proj", "mlp.up_proj"), "mlp.up_proj"],
        "mlp.fc2": "mlp.down_proj",
    },
    unused={r"embeddings\.mask_token": "the mask token"},
    layer_norm_eps=1e-5,
)

# The towers of CLIP and SigLIP, whose text towers and projections are left out.
TOWER = Layout(
    title="transformers' CLIP or SigLIP",
    marker="embeddings.patch_embedding.weight",
    names={
        "vit.embeddings.cls_token": "embeddings.class_embedding",
        "vit.embeddings.position_embeddings": "embeddings.position_embedding.weight",
        "vit.embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
        "vit.embedding_norm": "pre_layrnorm",
        "vit.norm": "post_layernorm",
        "vit.pooled_norm": "post_layernorm",
        "vit.attention_pooling.query": "head.probe",
        "vit.attention_pooling.qkv.weight": "head.attention.in_proj_weight",
        "vit.attention_pooling.qkv.bias": "head.attention.in_proj_bias",
        "vit.attention_pooling.proj": "head.attention.out_proj",
        "vit.attention_pooling.norm": "head.layernorm",
        "vit.attention_pooling.mlp": "head.mlp",
        "classifier": "classifier",
    },
    block="encoder.layers.{i}.",
    block_names={
        "norm1": "layer_norm1",
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.proj": "self_attn.out_proj",
        "norm2": "layer_norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
    unused={
        r"embeddings\.position_ids": "the numbers of the positions",
        r"text_model\..*|text_projection\..*|logit_(scale|bias)": "the text tower",
        r"visual_projection\..*": "the projection to the texts' space",
    },
    may_lack_cls=True,
)
OPEN_CLIP = Layout(
    title="OpenAI's and OpenCLIP's",
    marker="conv1.weight",
    names={
        "vit.embeddings.cls_token": "class_embedding",
        "vit.embeddings.position_embeddings": "positional_embedding",
        "vit.embeddings.patch_embeddings.projection": "conv1",
        "vit.embedding_norm": "ln_pre",
        "vit.pooled_norm": "ln_post",
    },
    block="transformer.resblocks.{i}.",
    block_names={
        "norm1": "ln_1",
        "attention.qkv.weight": "attn.in_proj_weight",
        "attention.qkv.bias": "attn.in_proj_bias",
        "attention.proj": "attn.out_proj",
        "norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    },
    unused={r"proj": "the projection to the texts' space"},
    layer_norm_eps=1e-5,
)

TIMM = Layout(
    title="timm's",  # and those of DeiT, DINO, DINOv2 and MAE, whose code began as timm's
    marker="patch_embed.proj.weight",
    names={
        "vit.embeddings.cls_token": "cls_token",
        "vit.embeddings.register_tokens": "reg_token|register_tokens|storage_tokens|dist_token",
        "vit.embeddings.position_embeddings": "pos_embed",
        "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
        "vit.embedding_norm": "norm_pre",
        "vit.norm": "norm",
        "vit.attention_pooling.query": "attn_pool.latent",
        "vit.attention_pooling": "attn_pool",
        "vit.pooled_norm": "fc_norm",
        "pre_logits.0": "pre_logits.fc",
        "classifier": "head",
    },
    block="blocks.{i}.",
    block_names={
        "norm1": "norm1",
        "attention.qkv": "attn.qkv",
        "attention.q_bias": "attn.q_bias",
        "attention.v_bias": "attn.v_bias",
        "attention.q_norm": "attn.q_norm",
        "attention.k_norm": "attn.k_norm",
        "attention.proj": "attn.proj",
        "layer_scale1.scale": "ls1.gamma|gamma_1",
        "norm2": "norm2",
        # timm's packed and split, DINOv2's packed, DINOv3's split
        "mlp.fc1": ["mlp.fc1|mlp.w12", ("mlp.fc1_g|mlp.w1", "mlp.fc1_x|mlp.w2")],
        "mlp.fc2": "mlp.fc2|mlp.w3",
        "layer_scale2.scale": "ls2.gamma|gamma_2",
    },
    unused={
        r"mask_token": "the mask token",
        r"decoder_.*": "the pre-training decoder",
        r"(module\.)?head\.(mlp|last_layer)\..*": "DINO's projection head",
        r"rope_embed\.periods": "the periods of the rotary positions, which the config has",
        r".*\.attn\.qkv\.bias_mask": "the mask of the keys' bias",
        r"local_cls_norm\..*": "the norm of local crops",
        r"k_bias|.*\.attn\.k_bias": "the keys' bias, which is zero",
    },
    positions=("none", "cls", "all"),
    may_lack_cls=True,
)
NAFLEX = replace(
    TIMM,
    title="timm's NaFlexViT",
    marker="embeds.proj.weight",
    names={
        **TIMM.names,
        "vit.embeddings.cls_token": "embeds.cls_token",
        "vit.embeddings.register_tokens": "embeds.reg_token",
        "vit.embeddings.position_embeddings": "embeds.pos_embed",
        "vit.embeddings.patch_embeddings.projection": "embeds.proj",
        "vit.embedding_norm": "embeds.norm",
    },
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
        "vit.attention_pooling.query": "MAPHead_0/probe",
        **{
            f"vit.attention_pooling.{ours}.{leaf}": f"MAPHead_0/MultiHeadDotProductAttention_0/{theirs}/{their_leaf}"
            for ours, theirs in (("q", "query"), ("proj", "out"))
            for leaf, their_leaf in (("weight", "kernel"), ("bias", "bias"))
        },
        **{
            f"vit.attention_pooling.kv.{leaf}": tuple(
                f"MAPHead_0/MultiHeadDotProductAttention_0/{part}/{their_leaf}" for part in ("key", "value")
            )
            for leaf, their_leaf in (("weight", "kernel"), ("bias", "bias"))
        },
        "vit.attention_pooling.norm.weight": "MAPHead_0/LayerNorm_0/scale",
        "vit.attention_pooling.norm.bias": "MAPHead_0/LayerNorm_0/bias",
        **{
            f"vit.attention_pooling.mlp.fc{i}.{leaf}": f"MAPHead_0/MlpBlock_0/Dense_{i - 1}/{their_leaf}"
            for i in (1, 2)
            for leaf, their_leaf in (("weight", "kernel"), ("bias", "bias"))
        },
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
    unused={r"opt/state/.*": "the optimizer's state", r"(params/)?(txt/.*|t|b)": "the text tower"},
    may_lack_cls=True,
    hidden_act="gelu_pytorch_tanh",  # flax's nn.gelu approximates unless told not to, and neither codebase tells it
    jax=True,
)

SUFFIXES = (".safetensors", ".npz", ".pt", ".pth", ".bin")
# Files of a folder or Hub repository, in the order they are looked for.
WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "model.npz",
)  # fmt: skip
# Keys below which training scripts store the weights.
WRAPPERS = ("state_dict", "model", "teacher", "student", "model_ema", "module")


def forms_of(layout: Layout, ours: str) -> list[list[list[str]]]:
    """Their names for our tensor: for each form, for each part that is stacked to it, the spellings to try."""
    in_block = re.fullmatch(r"vit\.layers\.(\d+)\.(.+)", ours)
    table = layout.block_names if in_block else layout.names
    starts = [start.format(i=in_block[1]) for start in layout.block.split("|")] if in_block else [""]
    inner, suffix = (in_block[2] if in_block else ours), ""
    while inner not in table and "." in inner:
        inner, _, leaf = inner.rpartition(".")
        suffix = f".{leaf}{suffix}"
    entry = table.get(inner, ())  # nothing: the layout has no such tensor
    forms = entry if isinstance(entry, list) else [entry]

    def spellings(part: str) -> list[str]:
        return [start + name + suffix for name in part.split("|") for start in starts]

    return [[spellings(part) for part in (form if isinstance(form, tuple) else (form,))] for form in forms]
