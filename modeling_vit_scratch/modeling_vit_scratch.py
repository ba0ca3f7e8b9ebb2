"""The Vision Transformer of "An Image is Worth 16x16 Words" (Dosovitskiy et al., 2021), from scratch.

Read it top to bottom: patches, embeddings, attention, MLP, block, the encoder that puts them together, and its heads.
Equation numbers are those of the paper's section 3.1 and appendix A.

    z0 = [x_class; x1 E; ...; xN E] + E_pos      (eq. 1)  ViTScratchPatchEmbeddings, ViTScratchEmbeddings
    z' = MSA(LN(z)) + z                          (eq. 2)  ViTScratchAttention, ViTScratchBlock
    z  = MLP(LN(z')) + z'                        (eq. 3)  ViTScratchMLP, ViTScratchBlock
    y  = LN(z_L[class])                          (eq. 4)  ViTScratchModel

Letters, here and in every shape comment:

    B     images in the batch        N     patches, h * w                      A  attention heads
    C     channels                   T     tokens: class, registers, patches   d  width of a head, D / A
    H, W  image height and width     D     width of a token, `hidden_size`     L  blocks
    P, Q  patch height and width     h, w  patches down and across             K  classes

Shapes count one class token; of several, `num_cls_tokens` takes the place of that 1, also in what is pooled.

Where this file leaves the paper, or Google's code of it (google-research/vision_transformer, models_vit.py):

- Weights start from N(0, 0.02^2), truncated at -2 and 2, which is next to never; Google's from Xavier's uniform
  distribution, and those of the patches from LeCun's normal one. The classifier starts at 0 in both. Every bias starts
  at 0; Google's in the MLP from N(0, 1e-6^2). The class token starts as positions do; Google's at 0.
- GELU is exact, with erf; Google's is the approximation with tanh, here `hidden_act="gelu_pytorch_tanh"`.
- One matrix (D, 3 D) makes queries, keys and values; Google's are three. A matrix projects patches, as in the paper;
  Google's convolution computes the same.
- Positions are resized by bicubic interpolation, Google's by bilinear, here `position_interpolation`. Dropout is 0 by
  default, Google's 0.1.
- `pooler_output` is what the classifier reads, with no dense layer and tanh as transformers' ViT has them; in
  the paper these belong to the head of pre-training (`representation_size`).

Beyond the paper, each off by default: early convolutions, pooling by the mean or by attention, a norm after it or
none, no class token or several, registers, LayerScale, stochastic depth, fixed 2-D sine-cosine positions, a mask token;
and what made the ViT of 2021 that of today: rotary positions, a gated MLP, a norm before the first block, normalised
queries and keys, no bias of the keys. docs/today.md shows which model has which.
"""

import torch
from torch import nn
from transformers import BackboneMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_vit_scratch import ViTScratchConfig


class ViTScratchPatchEmbeddings(nn.Module):
    """Cut images into patches and project each: (B, C, H, W) -> (B, N, D). ViT, eq. 1, the matrix E.

    A linear layer on flattened patches; its weight, viewed as (D, C, P, Q), is the kernel of the strided convolution
    that computes the same.
    """

    def __init__(self, config: ViTScratchConfig):
        super().__init__()
        P, Q = self.patch_hw = config.patch_hw
        self.projection = nn.Linear(config.num_channels * P * Q, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        P, Q = self.patch_hw
        patches = pixel_values.unflatten(3, (-1, Q)).unflatten(2, (-1, P))  # (B, C, H, W) -> (B, C, h, P, w, Q)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # -> (B, h, w, C, P, Q) -> (B, N, C P Q)
        return self.projection(patches)  # (B, N, D)


class ViTScratchStemStage(nn.Module):
    """One stage of early convolutions: (B, C, H, W) -> (B, C', H / 2, W / 2).

    Max pooling after a convolution of stride 1 is CCT's (Hassani et al., 2021, "Escaping the Big Data Paradigm with
    Compact Transformers"); it has no norm, and ReLU before the pooling.
    """

    def __init__(self, config: ViTScratchConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm = nn.LayerNorm(out_channels, eps=config.layer_norm_eps)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        maps = nn.functional.max_pool2d(self.convolution(pixel_values), 2).permute(0, 2, 3, 1)  # (B, H / 2, W / 2, C')
        return self.activation(self.norm(maps).permute(0, 3, 1, 2))  # (B, C', H / 2, W / 2)


class ViTScratchStemPatchEmbeddings(ViTScratchPatchEmbeddings):
    """Optional: early convolutions, and patches of their feature map: (B, C, H, W) -> (B, N, D).

    After Xiao et al., 2021, "Early Convolutions Help Transformers See Better". The map is smaller than the image by a
    factor of 2 a stage; so are its patches, and their number stays.
    """

    def __init__(self, config: ViTScratchConfig):
        nn.Module.__init__(self)  # the projection is of another size, and its parameters come after the stem's
        channels = [config.num_channels, *config.stem_channels]
        stages = zip(channels, config.stem_channels, strict=False)  # what goes in and comes out of each
        self.stem = nn.Sequential(*(ViTScratchStemStage(config, *stage) for stage in stages))
        P, Q = self.patch_hw = tuple(side // 2 ** len(self.stem) for side in config.patch_hw)
        self.projection = nn.Linear(channels[-1] * P * Q, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        # Pooling and norm are fastest with the channels of a pixel side by side in memory, and copy nothing then.
        return super().forward(self.stem(pixel_values.contiguous(memory_format=torch.channels_last)))


def sincos_positions(config: ViTScratchConfig) -> torch.Tensor:
    """Fixed 2-D positions (1, 1 + N, D), or (1, N, D) without class token: sine and cosine of x, then of y (MAE)."""
    (h, w), D = config.grid_hw, config.hidden_size
    omega = 10000 ** -(torch.arange(D // 4, dtype=torch.float64) / (D // 4))
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")  # (h, w) each
    angles = [axis.reshape(-1, 1) * omega for axis in (x, y)]  # (N, D / 4) each
    patches = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)  # (N, D)
    positions = nn.functional.pad(patches, (0, 0, config.cls_tokens, 0))  # a row of zeros for the class token
    return positions.unsqueeze(0).to(torch.get_default_dtype())


def resize_positions(positions: torch.Tensor, old_hw, new_hw, how: str) -> torch.Tensor:
    """Positions for another grid, as `position_interpolation` says: (1, 1 + N, D) -> (1, 1 + N', D). ViT, sec. 3.2."""
    cls, patches = positions.tensor_split([positions.shape[1] - old_hw[0] * old_hw[1]], dim=1)
    patches = patches.to(torch.promote_types(cls.dtype, torch.float32))
    patches = patches.unflatten(1, old_hw).permute(0, 3, 1, 2)  # (1, N, D) -> (1, h, w, D) -> (1, D, h, w)
    if how == "bicubic_offset":
        rows, columns = (torch.arange(side, dtype=patches.dtype, device=patches.device) for side in new_hw)
        # DINO's way, unless the grid is the same; in tensors, so that an exported program decides it for each size.
        offset = 0.1 * ((rows[-1] != old_hw[0] - 1) | (columns[-1] != old_hw[1] - 1)).to(patches.dtype)
        y, x = (2 * (steps + 0.5) / (steps[-1] + 1 + offset) - 1 for steps in (rows, columns))  # edges at -1 and 1
        points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).unsqueeze(0)  # (1, h', w', 2)
        patches = nn.functional.grid_sample(patches, points, "bicubic", padding_mode="border", align_corners=False)
    else:
        flags = {"align_corners": how.endswith("_align_corners"), "antialias": how.endswith("_antialias")}
        patches = nn.functional.interpolate(patches, size=new_hw, mode=how.partition("_")[0], **flags)
    # Not flatten(2).transpose(1, 2), which ExecuTorch computes wrongly at dynamic sizes.
    patches = patches.to(cls.dtype).permute(0, 2, 3, 1).flatten(1, 2)  # (1, D, h', w') -> (1, N', D)
    return torch.cat([cls, patches], dim=1)


class ViTScratchEmbeddings(nn.Module):
    """Patches, positions, class token, registers: (B, C, H, W) -> (B, T, D). ViT, eq. 1.

    Positions cover the class token and the patches; registers have none (Darcet et al., 2024). Where rotary positions
    take their place, there are no embeddings of positions, and images may have any size.
    """

    def __init__(self, config: ViTScratchConfig, use_mask_token: bool = False):
        super().__init__()
        D, registers = config.hidden_size, config.num_register_tokens
        self.num_channels, self.num_cls_tokens = config.num_channels, config.cls_tokens
        self.image_hw, self.patch_hw, self.grid_hw = config.image_hw, config.patch_hw, config.grid_hw
        self.position_interpolation = config.position_interpolation
        embeddings_class = ViTScratchStemPatchEmbeddings if config.stem_channels else ViTScratchPatchEmbeddings
        self.patch_embeddings = embeddings_class(config)
        self.cls_token = nn.Parameter(torch.empty(1, self.num_cls_tokens, D)) if config.use_cls_token else None
        self.register_tokens = nn.Parameter(torch.empty(1, registers, D)) if registers else None
        self.mask_token = nn.Parameter(torch.empty(1, 1, D)) if use_mask_token else None
        if config.position_embedding_type.startswith("learned"):
            N = self.grid_hw[0] * self.grid_hw[1]
            self.position_embeddings = nn.Parameter(torch.empty(1, self.num_cls_tokens + N, D))
        else:
            positions = sincos_positions(config) if config.position_embedding_type == "sincos" else None
            self.register_buffer("position_embeddings", positions, persistent=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor, bool_masked_pos, interpolate_pos_encoding: bool) -> torch.Tensor:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(f"pixel_values must be (B, {self.num_channels}, H, W), got {tuple(pixel_values.shape)}.")
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values are {pixel_values.dtype}, not floating point; use the image processor.")
        (B, _, H, W), (P, Q) = pixel_values.shape, self.patch_hw
        any_size = interpolate_pos_encoding or self.position_embeddings is None
        if any_size and (H % P or W % Q):
            raise ValueError(
                f"pixel_values are {H}x{W}, which patches of {P}x{Q} do not divide; resize them, or pad them to "
                f"{-(-H // P) * P}x{-(-W // Q) * Q}."
            )
        if not any_size and (H, W) != self.image_hw:
            raise ValueError(
                f"pixel_values are {H}x{W}, but the model was made for {self.image_hw[0]}x{self.image_hw[1]}; resize "
                f"them, or pass interpolate_pos_encoding=True for a size that patches of {P}x{Q} divide."
            )
        patches = self.patch_embeddings(pixel_values.to(self.patch_embeddings.projection.bias.dtype))  # (B, N, D)
        if bool_masked_pos is not None:
            if self.mask_token is None or bool_masked_pos.numel() != B * patches.shape[1]:
                raise ValueError(
                    f"bool_masked_pos of shape {tuple(bool_masked_pos.shape)} must be ({B}, {patches.shape[1]}), and "
                    "needs a mask token: make the model with use_mask_token=True."
                )
            mask = bool_masked_pos.reshape(B, -1, 1).bool()  # (B, N, 1)
            patches = torch.where(mask, self.mask_token, patches)
        cls = self.cls_token  # (1, 1, D)
        if self.position_embeddings is not None:
            positions = self.position_embeddings  # (1, 1 + N, D)
            if interpolate_pos_encoding:
                positions = self.interpolate_pos_encoding((H // P, W // Q))
            patches = patches + positions[:, self.num_cls_tokens :]
            cls = None if cls is None else cls + positions[:, : self.num_cls_tokens]
        prefix = [token.expand(B, -1, -1) for token in (cls, self.register_tokens) if token is not None]
        return self.dropout(torch.cat([*prefix, patches], dim=1))  # (B, T, D)

    def interpolate_pos_encoding(self, grid_hw: tuple[int, int]) -> torch.Tensor:
        """Positions for another grid, as the config says: (1, 1 + N, D) -> (1, 1 + N', D)."""
        # A traced or exported program runs at other sizes too: there, equal ones are no shortcut.
        if not torch.jit.is_tracing() and not torch.compiler.is_exporting() and grid_hw == self.grid_hw:
            return self.position_embeddings
        return resize_positions(self.position_embeddings, self.grid_hw, grid_hw, self.position_interpolation)


class ViTScratchRotaryPositions(nn.Module):
    """Optional: rotary positions (Su et al., 2021, "RoFormer"): a grid (h, w) -> cosines and sines (2, ..., T, d).

    Channels j and j + d / 2 of a query or key are a point in the plane. It is turned by an angle that grows with the
    place (y, x) of its patch, so that the score of two patches depends on how far apart they are, and not on where.
    Class tokens and registers are not turned. Pair j turns by y or by x alone at frequency `rope_theta`^(-4 j / d)
    ("axial": EVA-02, DINOv3), or by y f_j + x g_j with learned f and g for each head and layer (Heo et al., 2024).
    """

    def __init__(self, config: ViTScratchConfig):
        super().__init__()
        self.config, A = config, config.num_attention_heads
        mixed = config.rope_frequencies == "mixed"
        self.frequencies = nn.Parameter(torch.empty(A, 2, config.hidden_size // A // 2)) if mixed else None

    def axial(self, device: torch.device | None = None) -> torch.Tensor:
        """Radians for each step of y (first row) and x: (2, d / 2); half of the pairs turn by each."""
        quarter = self.config.hidden_size // self.config.num_attention_heads // 4
        bands = self.config.rope_theta ** -(torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
        return torch.stack([nn.functional.pad(bands, (0, quarter)), nn.functional.pad(bands, (quarter, 0))])

    def places(self, side: int, device: torch.device) -> torch.Tensor:
        """Where the patches of one axis stand: (h,) or (w,)."""
        config, steps = self.config, torch.arange(side, dtype=torch.float32, device=device)
        if config.rope_coordinates == "centered":
            return 2 * torch.pi * (2 * (steps + 0.5) / side - 1)
        return (steps + config.rope_offset) * (1 if config.rope_grid_size is None else config.rope_grid_size / side)

    def forward(self, grid_hw: tuple[int, int], device: torch.device) -> torch.Tensor:
        y, x = torch.meshgrid(*(self.places(side, device) for side in grid_hw), indexing="ij")  # (h, w) each
        places = torch.stack([y, x], dim=-1).flatten(0, 1)  # (h, w, 2) -> (N, 2)
        places = nn.functional.pad(places, (0, 0, self.config.num_prefix_tokens, 0))  # (T, 2)
        # (2, d / 2), or (A, 1, 2, d / 2); a sum, since autocast would compute a product of matrices in bfloat16.
        frequencies = self.axial(device) if self.frequencies is None else self.frequencies.float().unsqueeze(1)
        angles = (places.unsqueeze(2) * frequencies).sum(dim=-2)  # (T, 2, 1) -> (T, d / 2) or (A, T, d / 2)
        return torch.stack([angles.cos().tile(2), torch.cat([-angles.sin(), angles.sin()], dim=-1)])  # (2, ..., T, d)


def rotate(tokens: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn each pair of channels of queries or keys (B, A, T, d) by its angle. RoFormer, eq. 34."""
    cos, sin = rotation.to(tokens.dtype)  # (T, d) or (A, T, d); of the first channel of a pair, the sine is negated
    return tokens * cos + tokens.roll(tokens.shape[-1] // 2, dims=-1) * sin


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(q k^T * scaling) v: q, k, v (B, A, T, d) -> (B, T, A, d) and the maps (B, A, T, T). ViT, app. A."""
    scores = (query * scaling) @ key.transpose(-2, -1)  # (B, A, T, d) @ (B, A, d, T) -> (B, A, T, T)
    scores = scores if attention_mask is None else scores + attention_mask
    maps = scores.softmax(dim=-1).to(query.dtype)  # half precision is computed in float32 inside
    maps = nn.functional.dropout(maps, p=dropout, training=module.training)
    return (maps @ value).transpose(1, 2), maps  # (B, A, T, d) -> (B, T, A, d)


class ViTScratchAttention(nn.Module):
    """Multi-head self-attention with one fused projection: (B, T, D) -> (B, T, D). ViT, app. A, eq. 5 to 8.

    Runs on the implementation that the config names (eager, sdpa, flash, flex); a call that keeps the maps is computed
    eagerly, since no other implementation has them.
    """

    def __init__(self, config: ViTScratchConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False  # read by transformers' attention functions
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias and config.key_bias)
        self.q_bias = self.v_bias = None
        if config.qkv_bias and not config.key_bias:  # BEiT (Bao et al., 2022), DINOv3
            self.q_bias, self.v_bias = (nn.Parameter(torch.empty(config.hidden_size)) for _ in range(2))
        self.q_norm = self.k_norm = nn.Identity()
        if config.use_qk_norm:  # Dehghani et al., 2023, "Scaling Vision Transformers to 22 Billion Parameters"
            self.q_norm, self.k_norm = (nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps) for _ in range(2))
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, hidden_states: torch.Tensor, keep_maps=None, num_queries: int | None = None, rotation=None, **kwargs
    ):
        """`keep_maps` is called with the maps (B, A, T, T). Of the tokens, the first `num_queries` ask; None is all."""
        qkv = self.qkv(hidden_states)  # (B, T, D) -> (B, T, 3 D)
        if self.q_bias is not None:
            qkv = qkv + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]).to(qkv.dtype)
        parts = qkv.chunk(3, dim=2)  # (B, T, D) each; apart before heads are, which spares the backward pass a copy
        query, key, value = (x.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for x in parts)  # (B, A, T, d) each
        query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        implementation = self.config._attn_implementation if keep_maps is None else "eager"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        kwargs = {"attention_mask": None, "scaling": self.scaling, "dropout": dropout, **kwargs}
        context, maps = attend(self, query[:, :, :num_queries], key, value, **kwargs)
        if keep_maps is not None:
            keep_maps(maps)
        return self.dropout(self.proj(context.flatten(2)))  # (B, T, A, d) -> (B, T, D)


class ViTScratchMLP(nn.Module):
    """Two dense layers with an activation between: (B, T, D) -> (B, T, D). ViT, eq. 3.

    Gated, the first layer has two outputs of that width, and the activation of one multiplies the other (Shazeer, 2020,
    "GLU Variants Improve Transformer"; SwiGLU where the activation is SiLU).
    """

    def __init__(self, config: ViTScratchConfig):
        super().__init__()
        self.gated = config.use_gated_mlp
        self.fc1 = nn.Linear(config.hidden_size, (1 + self.gated) * config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def hidden(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What fc2 reads: (B, T, D) -> (B, T, `intermediate_size`)."""
        if not self.gated:
            return self.activation(self.fc1(hidden_states))
        gate, value = self.fc1(hidden_states).chunk(2, dim=-1)
        return self.activation(gate) * value

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.fc2(self.dropout(self.hidden(hidden_states))))


class ViTScratchDropPath(nn.Module):
    """Stochastic depth: drop a residual branch of whole samples, scale others by 1 / (1 - p) (Huang et al., 2016)."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.p == 0.0 or not self.training:
            return hidden_states
        keep = hidden_states.new_full((hidden_states.shape[0], 1, 1), 1 - self.p).bernoulli()
        return hidden_states * keep / max(1 - self.p, 1e-6)  # p = 1 keeps nothing: 0 / 1e-6, not 0 / 0


class ViTScratchLayerScale(nn.Module):
    """A learned factor per channel on a residual branch (Touvron et al., 2021b, "Going deeper", eq. 4)."""

    def __init__(self, config: ViTScratchConfig):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.scale


class ViTScratchBlock(nn.Module):
    """One block, z (B, T, D) -> (B, T, D): z' = MSA(LN(z)) + z, then z = MLP(LN(z')) + z'. ViT, eq. 2 and 3."""

    def __init__(self, config: ViTScratchConfig, layer_idx: int):
        super().__init__()
        scaled = config.layerscale_value is not None
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ViTScratchAttention(config)
        self.layer_scale1 = ViTScratchLayerScale(config) if scaled else nn.Identity()
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ViTScratchMLP(config)
        self.layer_scale2 = ViTScratchLayerScale(config) if scaled else nn.Identity()
        self.drop_path = ViTScratchDropPath(config.drop_path_rate * layer_idx / max(config.num_hidden_layers - 1, 1))

    def forward(self, z: torch.Tensor, **kwargs) -> torch.Tensor:
        z = self.drop_path(self.layer_scale1(self.attention(self.norm1(z), **kwargs))) + z
        return self.drop_path(self.layer_scale2(self.mlp(self.norm2(z)))) + z


class ViTScratchLayer(ViTScratchBlock, GradientCheckpointingLayer):
    """The block as the encoder calls it (ViT, eq. 2 and 3); to be skipped at a first reading.

    It can be checkpointed, gives its attention maps (B, A, T, T) too where they are asked for, and the last one of a
    classifier computes only what is read of it, in `last_block`.
    """

    def forward(self, hidden_states: torch.Tensor, output_attentions: bool = False, pool=None, **kwargs):
        if pool is not None:
            return self.last_block(hidden_states, pool, **kwargs)
        maps = []
        hidden_states = super().forward(hidden_states, keep_maps=maps.append if output_attentions else None, **kwargs)
        return (hidden_states, *maps) if output_attentions else hidden_states

    def last_block(self, hidden_states: torch.Tensor, pool, **kwargs) -> torch.Tensor:
        """What `pool` makes of this block's output, sooner: (B, T, D) -> (B, 1, D).

        The class token alone asks, and enters the MLP; or the mean is taken before fc2, since fc2 of a mean is the mean
        of fc2. The first saves 6 % of ViT-B/16's forward pass, the second 5 % of a training step of the showcase.
        """
        config = self.attention.config
        cls = config.pooling == "cls"
        gathered = self.attention(self.norm1(hidden_states), num_queries=config.cls_tokens if cls else None, **kwargs)
        z = self.drop_path(self.layer_scale1(gathered)) + (pool(hidden_states) if cls else hidden_states)
        inner = self.mlp if cls else lambda x: self.mlp.fc2(pool(self.mlp.hidden(x)))
        return self.drop_path(self.layer_scale2(inner(self.norm2(z)))) + pool(z)

    def can_pool(self, attention_mask: torch.Tensor | None = None, **kwargs) -> bool:
        """Whether `last_block` gives the same: a mask has a row for each query, a norm or dropout is not linear."""
        config = self.attention.config
        if config.pooling == "cls":
            return attention_mask is None
        normed = config.use_final_norm and not config.norm_after_pooling
        return config.pooling == "mean" and not normed and not (self.training and config.hidden_dropout_prob)


class ViTScratchAttentionPooling(nn.Module):
    """Optional: a learned query gathers from the patches, and an MLP follows: (B, N, D) -> (B, 1, D).

    The head of "Scaling Vision Transformers" (Zhai et al., 2022) and of SigLIP (Zhai et al., 2023).
    """

    def __init__(self, config: ViTScratchConfig):
        super().__init__()
        D = config.hidden_size
        self.head_dim = D // config.num_attention_heads
        self.query = nn.Parameter(torch.empty(1, 1, D))
        self.q, self.kv, self.proj = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D)
        self.norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.mlp = ViTScratchMLP(config)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        query = self.q(self.query).unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # (1, A, 1, d)
        parts = self.kv(patches).chunk(2, dim=2)  # (B, N, D) each
        key, value = (x.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for x in parts)  # (B, A, N, d) each
        context, _ = eager_attention_forward(self, query, key, value, None, self.head_dim**-0.5)  # (B, 1, A, d)
        pooled = self.proj(context.flatten(2))  # (B, 1, A, d) -> (B, 1, D)
        return pooled + self.mlp(self.norm(pooled))


class ViTScratchPreTrainedModel(PreTrainedModel):
    """What every model here shares: start values, and what transformers has to know."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Start values. std is `initializer_range` (0.02 under "fan_in"), std' `position_initializer_range` (or std).

        | tensor                                            | start                                                |
        |---------------------------------------------------|------------------------------------------------------|
        | weight of a linear or convolutional layer         | truncated N(0, std^2) in [-2, 2]                     |
        | the same, `initializer_range="fan_in"`            | N(0, 1 / fan_in)                                     |
        | weight of `classifier`                            | 0 (as in Google's code)                              |
        | bias, `q_bias`, `v_bias`                          | 0                                                    |
        | LayerNorm                                         | weight 1, bias 0                                     |
        | `cls_token`, `register_tokens`, learned positions | truncated N(0, std'^2) in [-2, 2] * max(std', 1)      |
        | `query` of attention pooling                      | the same                                             |
        | `frequencies` of rotary positions                 | the axial ones, turned by a random angle for a head  |
        | sincos positions                                  | `sincos_positions`                                   |
        | `mask_token`                                      | 0                                                    |
        | LayerScale                                        | `layerscale_value`                                   |
        """
        fan_in = self.config.initializer_range == "fan_in"
        std = 0.02 if fan_in else self.config.initializer_range
        token_std = std if self.config.position_initializer_range is None else self.config.position_initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            if module is getattr(self, "classifier", None):
                init.zeros_(module.weight)
            elif fan_in:
                init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            else:
                init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ViTScratchLayerScale):
            init.constant_(module.scale, self.config.layerscale_value)
        elif isinstance(module, ViTScratchAttention) and module.q_bias is not None:
            init.zeros_(module.q_bias)
            init.zeros_(module.v_bias)
        elif isinstance(module, ViTScratchRotaryPositions) and module.frequencies is not None:
            angle = 2 * torch.pi * torch.rand(self.config.num_attention_heads, dtype=torch.float32)
            turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], dim=1)  # (A, 4)
            init.copy_(module.frequencies, turn.view(-1, 2, 2) @ module.axial())  # (A, 2, 2) @ (2, d / 2)
        elif isinstance(module, (ViTScratchEmbeddings, ViTScratchAttentionPooling)):
            cut = 2.0 * max(token_std, 1.0)
            for name, tensor in module.named_parameters(recurse=False):  # tokens and, where they are learned, positions
                zero = name == "mask_token"
                init.zeros_(tensor) if zero else init.trunc_normal_(tensor, std=token_std, a=-cut, b=cut)
            if isinstance(module, ViTScratchEmbeddings) and self.config.position_embedding_type == "sincos":
                init.copy_(module.position_embeddings, sincos_positions(self.config))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone: biases, norms, scales, tokens, positions."""
        own = {"cls_token", "register_tokens", "mask_token", "position_embeddings", "query", "frequencies"}
        return {name for name, tensor in self.named_parameters() if tensor.ndim < 2 or name.rsplit(".", 1)[-1] in own}

    # What transformers has to know, and nothing that a Vision Transformer needs; at the end of the file is the rest.

    config: ViTScratchConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # Trainer then divides the loss by the accumulation steps itself, which is right for class probabilities too.
    accepts_loss_kwargs = False
    _no_split_modules = ["ViTScratchEmbeddings", "ViTScratchLayer"]
    _input_embed_layer = "patch_embeddings"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: ViTScratchConfig, *args, **kwargs):
        config.validate()  # fields may have changed since it was made, e.g. by from_pretrained(..., field=)
        super().__init__(config, *args, **kwargs)
        self.__module__ = __name__  # FSDP2 renames the class; saving finds this file by it


class ViTScratchModel(ViTScratchPreTrainedModel):
    """The encoder: pixels (B, C, H, W) -> `last_hidden_state` (B, T, D) and `pooler_output` (B, D). ViT, eq. 1 to 4.

    Models that do not read the pooled token leave it out (`add_pooling_layer=False`): a norm that nothing reads gets no
    gradient, and stops DistributedDataParallel.
    """

    def __init__(self, config: ViTScratchConfig, use_mask_token: bool = False, add_pooling_layer: bool = True):
        super().__init__(config)
        self.add_pooling_layer = add_pooling_layer
        self.embeddings = ViTScratchEmbeddings(config, use_mask_token)
        D, eps = config.hidden_size, config.layer_norm_eps
        self.embedding_norm = nn.LayerNorm(D, eps=eps) if config.use_embedding_norm else nn.Identity()  # CLIP
        rotary = config.num_hidden_layers if config.rope_frequencies == "mixed" else 1  # of each layer, or of all
        rotary = rotary if config.position_embedding_type.endswith("rope") else 0
        self.rotary_positions = nn.ModuleList([ViTScratchRotaryPositions(config) for _ in range(rotary)])
        self.layers = nn.ModuleList([ViTScratchLayer(config, i) for i in range(config.num_hidden_layers)])
        norm = nn.LayerNorm(D, eps=eps)
        self.norm = norm if config.use_final_norm and not config.norm_after_pooling else nn.Identity()
        self.pooled_norm = norm if config.norm_after_pooling and add_pooling_layer else nn.Identity()
        if config.pooling == "attention" and add_pooling_layer:
            self.attention_pooling = ViTScratchAttentionPooling(config)
        self.post_init()

    def pool(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The token that the classifier sees: (B, T, D) -> (B, 1, D); of "cls+mean" two, and each of several "cls"."""
        cls, patches = hidden_states[:, : self.config.cls_tokens], hidden_states[:, self.config.num_prefix_tokens :]
        if self.config.pooling == "cls":
            return cls
        if self.config.pooling == "attention":
            return self.attention_pooling(patches)
        mean = patches.mean(dim=1, keepdim=True)
        return mean if self.config.pooling == "mean" else torch.cat([cls, mean], dim=1)

    def patch_grid(self, hidden_states: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """The patch tokens at their places in the image: (B, T, D) -> (B, h, w, D)."""
        (H, W), (P, Q) = pixel_values.shape[2:], self.config.patch_hw
        patches = hidden_states[:, self.config.num_prefix_tokens :]
        return patches.unflatten(1, (H // P, W // Q))  # (B, N, D) -> (B, h, w, D)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | int | list[int] | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        pooled_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: (B, C, H, W), floating point, normalised as the image processor does.
            bool_masked_pos: (B, N) or (B, h, w), 1 where the mask token takes a patch's place; needs `use_mask_token`.
            interpolate_pos_encoding: Resize the positions where (H, W) is not the config's `image_size`.
            output_attentions: Whether to return each layer's maps (B, A, T, T), under every attention implementation;
                or the layers to return, e.g. [0, -1], with None for the others. None follows the config.
            output_hidden_states: Likewise for the L + 1 states (B, T, D): the embeddings, then each layer's output,
                all before the final norm.
            pooled_only: Whether the last block may pool as early as it can, unless its map or output is asked for:
                `last_hidden_state` is then the class token alone or, where no norm comes before it, the mean.
            **kwargs: Passed to the attention implementation, e.g. an `attention_mask` (B, 1, T, T) added to the scores.

        Raises:
            ValueError: Pixels are of integer type, or of a size or channel count the model was not made for;
                or a layer is asked for that is not there.
        """
        L = len(self.layers)
        want_maps = self.config.selected("output_attentions", output_attentions, L)
        want_states = self.config.selected("output_hidden_states", output_hidden_states, L + 1)
        early = pooled_only and L - 1 not in want_maps and L not in want_states and self.layers[-1].can_pool(**kwargs)
        hidden_states = self.embeddings(pixel_values, bool_masked_pos, interpolate_pos_encoding)  # (B, T, D)
        hidden_states = self.embedding_norm(hidden_states)
        (H, W), (P, Q) = pixel_values.shape[2:], self.config.patch_hw
        rotations = [rotary((H // P, W // Q), hidden_states.device) for rotary in self.rotary_positions]
        all_states, all_maps = [hidden_states if 0 in want_states else None], []
        for i, layer in enumerate(self.layers):
            pool = self.pool if early and i == L - 1 else None
            kwargs |= {"rotation": rotations[i % len(rotations)]} if rotations else {}
            outputs = layer(hidden_states, output_attentions=i in want_maps, pool=pool, **kwargs)
            hidden_states, maps = outputs if i in want_maps else (outputs, None)
            all_states.append(hidden_states if i + 1 in want_states else None)
            all_maps.append(maps)
        hidden_states = self.norm(hidden_states)
        pooled = None
        if self.add_pooling_layer:
            pooled = hidden_states if early else self.pool(hidden_states)  # (B, 1, D)
            pooled = self.pooled_norm(pooled).flatten(1)  # (B, D)
        states, maps = tuple(all_states) if want_states else None, tuple(all_maps) if want_maps else None
        return BaseModelOutputWithPooling(hidden_states, pooled, states, maps)


def image_classification_loss(labels, logits, config: ViTScratchConfig, **kwargs) -> torch.Tensor:
    """The loss that `config.problem_type` names; without one, regression for one class and else cross-entropy.

    Args:
        labels: Single label: class indices (B,), integers, or class probabilities (B, K), as mixup makes them.
            Multi label: 0 or 1 for each class (B, K). Regression: (B, K), or (B,) for one.
        logits: (B, K).
        **kwargs: Not read; transformers hands a model's loss all that `forward` was given.

    Raises:
        ValueError: The labels do not fit the problem type or the number of classes.
    """
    logits, labels = logits.float(), labels.to(logits.device)
    B, K = logits.shape
    problem_type = config.problem_type or ("regression" if K == 1 else "single_label_classification")
    if problem_type != "single_label_classification" and labels.numel() == logits.numel():
        labels = labels.reshape(B, K).to(logits.dtype)  # (B, K)
    elif problem_type == "single_label_classification" and not labels.is_floating_point():
        labels = labels.reshape(-1)  # (B,)
    elif labels.shape == logits.shape and config.problem_type is None and not torch.compiler.is_compiling():
        total = labels.detach().sum(dim=1)
        if not torch.allclose(total, torch.ones_like(total), atol=1e-2):
            raise ValueError(
                "labels are taken for class probabilities, but a row does not sum to 1; set "
                "config.problem_type = 'multi_label_classification' if an image can have several classes."
            )
    if labels.is_floating_point() and labels.shape != logits.shape:
        raise ValueError(
            f"labels of {labels.dtype} and shape {tuple(labels.shape)} are neither class indices (integers, shape "
            f"({B},)) nor numbers for each class (shape {(B, K)})."
        )
    losses = {"regression": nn.functional.mse_loss, "single_label_classification": nn.functional.cross_entropy}
    return losses.get(problem_type, nn.functional.binary_cross_entropy_with_logits)(logits, labels)


class ViTScratchForImageClassification(ViTScratchPreTrainedModel):
    """The encoder and a linear classifier: pixels (B, C, H, W) -> `logits` (B, K) and, given labels, `loss`.

    ViT, sec. 3.1: a hidden layer with tanh (`representation_size`) for pre-training, one linear layer for fine-tuning.
    """

    loss_function = staticmethod(image_classification_loss)

    def __init__(self, config: ViTScratchConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = ViTScratchModel(config)
        D, width, K = config.pooled_size, config.representation_size, config.num_labels
        self.pre_logits = nn.Sequential(nn.Linear(D, width), nn.Tanh()) if width else nn.Identity()
        self.classifier = nn.Linear(width or D, K) if K else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: As in `ViTScratchModel.forward`, like the other arguments not listed here.
            labels: As in `image_classification_loss`.
        """
        kwargs |= {"interpolate_pos_encoding": interpolate_pos_encoding, "return_dict": True, "pooled_only": True}
        outputs = self.vit(pixel_values, **kwargs)
        logits = self.classifier(self.pre_logits(outputs.pooler_output))  # (B, K)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class ViTScratchForMaskedImageModeling(ViTScratchPreTrainedModel):
    """SimMIM (Xie et al., 2022): hide patches behind a mask token, and predict the pixels of each token."""

    def __init__(self, config: ViTScratchConfig):
        super().__init__(config)
        self.vit = ViTScratchModel(config, use_mask_token=True, add_pooling_layer=False)
        self.decoder = nn.Linear(config.hidden_size, config.num_channels * config.stride_hw[0] * config.stride_hw[1])
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedImageModelingOutput:
        """Reconstruct images: `reconstruction` (B, C, H, W) and, given a mask, `loss`, the mean L1 error under it.

        Args:
            pixel_values: As in `ViTScratchModel.forward`, like the other arguments not listed here.
            bool_masked_pos: (B, N) or (B, h, w), 1 for each patch to hide; `encoder_stride` must be the patch size.
        """
        stride_hw, patch_hw = self.config.stride_hw, self.config.patch_hw
        if bool_masked_pos is not None and stride_hw != patch_hw:
            raise ValueError(
                f"encoder_stride {stride_hw} must equal patch_size {patch_hw}, so that what is predicted for a masked "
                f"patch is its pixels; use encoder_stride={self.config.patch_size}."
            )
        outputs = self.vit(pixel_values, bool_masked_pos, interpolate_pos_encoding, return_dict=True, **kwargs)
        pixels = self.decoder(self.vit.patch_grid(outputs.last_hidden_state, pixel_values))  # (B, h, w, C P Q)
        pixels = pixels.unflatten(3, (-1, *stride_hw)).permute(0, 3, 1, 4, 2, 5)  # (B, C, h, P, w, Q)
        reconstruction = pixels.flatten(4, 5).flatten(2, 3)  # (B, C, H, W)
        loss = None
        if bool_masked_pos is not None:
            error = (reconstruction.float() - pixel_values.to(reconstruction.device)).abs().mean(dim=1)  # (B, H, W)
            error = nn.functional.avg_pool2d(error, patch_hw)  # (B, h, w)
            mask = bool_masked_pos.to(error.device).bool().reshape(error.shape)  # (B, h, w)
            loss = (error * mask).sum() / mask.sum().clamp(min=1)
        return MaskedImageModelingOutput(loss, reconstruction, outputs.hidden_states, outputs.attentions)


class ViTScratchBackbone(BackboneMixin, ViTScratchPreTrainedModel):
    """The encoder for dense prediction: for each of `out_features`, patch tokens (B, D, h, w) after the final norm.

    As transformers' `Dinov2Backbone`, it returns all tokens (B, T, D) without `reshape_hidden_states`, and leaves the
    norm out without `apply_layernorm`.
    """

    def __init__(self, config: ViTScratchConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.vit = ViTScratchModel(config, add_pooling_layer=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = True,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BackboneOutput:
        """Encode images of any size that the patch divides; arguments as in `ViTScratchModel.forward`."""
        L = self.config.num_hidden_layers
        stages = [index % (L + 1) for index in self.out_indices]
        want_states = self.config.selected("output_hidden_states", output_hidden_states, L + 1)
        kwargs |= {"interpolate_pos_encoding": interpolate_pos_encoding, "return_dict": True}
        outputs = self.vit(pixel_values, output_hidden_states=[*stages, *want_states], **kwargs)
        maps = [outputs.hidden_states[i] for i in stages]  # (B, T, D) each
        if self.config.apply_layernorm:
            maps = [self.vit.norm(tokens) for tokens in maps]
        if self.config.reshape_hidden_states:
            maps = [self.vit.patch_grid(tokens, pixel_values).permute(0, 3, 1, 2) for tokens in maps]  # (B, D, h, w)
        states = tuple(state if i in want_states else None for i, state in enumerate(outputs.hidden_states))
        return BackboneOutput(tuple(maps), states if want_states else None, outputs.attentions)


# What transformers has to know: which of its auto classes a saved folder of each model is loaded by.
ViTScratchModel.register_for_auto_class("AutoModel")
ViTScratchForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ViTScratchForMaskedImageModeling.register_for_auto_class("AutoModelForMaskedImageModeling")
ViTScratchBackbone.register_for_auto_class("AutoBackbone")
