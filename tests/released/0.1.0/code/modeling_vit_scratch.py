"""The Vision Transformer of "An Image is Worth 16x16 Words" (Dosovitskiy et al., 2021), from scratch.

Read it top to bottom: patches, embeddings, attention, MLP, block, the encoder that puts them together, and its heads.
Equation numbers are those of the paper's section 3.1.

    z0 = [x_class; x1 E; ...; xN E] + E_pos      (eq. 1)  ViTScratchPatchEmbeddings, ViTScratchEmbeddings
    z' = MSA(LN(z)) + z                          (eq. 2)  ViTScratchAttention, ViTScratchLayer
    z  = MLP(LN(z')) + z'                        (eq. 3)  ViTScratchMLP, ViTScratchLayer
    y  = LN(z_L[class])                          (eq. 4)  ViTScratchModel

Letters in shape comments: B batch, C channels, H height and W width in pixels, h x w patch grid, N = h * w patches,
T tokens (class token, registers, patches), D hidden size, A attention heads, d = D / A.

Beyond the paper, each off by default: early convolutions, mean pooling, a norm after it, no class token, registers,
LayerScale, stochastic depth, fixed 2-D sine-cosine positions, a mask token.
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


class ViTScratchStemStage(nn.Module):
    """One stage of early convolutions, with pooling and LayerNorm: (B, C, H, W) -> (B, c, H / 2, W / 2)."""

    def __init__(self, config: ViTScratchConfig, in_channels: int, channels: int):
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        pixels = nn.functional.max_pool2d(self.convolution(pixels), 2)
        return self.activation(self.norm(pixels.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class ViTScratchPatchEmbeddings(nn.Module):
    """Cut pictures into patches and project each: (B, C, H, W) -> (B, N, D). ViT, eq. 1, the matrix E.

    A linear layer on flattened patches; its weight, viewed as (D, C, patch height, patch width), is the kernel of the
    strided convolution that computes the same. With `stem_channels`, patches are of the stem's feature map instead, and
    smaller by as much as the map is (Xiao et al., 2021).
    """

    def __init__(self, config: ViTScratchConfig):
        super().__init__()
        channels = [config.num_channels, *config.stem_channels]
        stages = zip(channels, config.stem_channels, strict=False)  # what goes in and comes out of each
        self.stem = nn.Sequential(*(ViTScratchStemStage(config, *stage) for stage in stages))
        self.patch_height, self.patch_width = (side // 2 ** len(self.stem) for side in config.patch_hw)
        self.projection = nn.Linear(channels[-1] * self.patch_height * self.patch_width, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.stem(pixel_values).unflatten(3, (-1, self.patch_width)).unflatten(2, (-1, self.patch_height))
        patches = patches.permute(0, 2, 4, 1, 3, 5)  # (B, C, h, patch height, w, patch width) -> (B, h, w, C, ...)
        return self.projection(patches.flatten(3).flatten(1, 2))  # (B, N, C * patch height * patch width) -> (B, N, D)


def sincos_positions(config: ViTScratchConfig) -> torch.Tensor:
    """Fixed 2-D positions (1, 1 + N, D), or (1, N, D) without class token: sine and cosine of x, then of y (MAE)."""
    (h, w), D = config.grid_hw, config.hidden_size
    omega = 10000 ** -(torch.arange(D // 4, dtype=torch.float64) / (D // 4))
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")  # (h, w) each
    angles = [axis.reshape(-1, 1) * omega for axis in (x, y)]  # (N, D / 4) each
    patches = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)  # (N, D)
    positions = nn.functional.pad(patches, (0, 0, int(config.use_cls_token), 0))  # a row of zeros for the class token
    return positions.unsqueeze(0).to(torch.get_default_dtype())


def resize_positions(positions: torch.Tensor, old_hw, new_hw, how: str) -> torch.Tensor:
    """Positions for another grid, as `position_interpolation` says: (1, 1 + N, D) -> (1, 1 + N', D). ViT, sec. 3.2."""
    cls, patches = positions.tensor_split([positions.shape[1] - old_hw[0] * old_hw[1]], dim=1)
    patches = patches.to(torch.promote_types(cls.dtype, torch.float32)).unflatten(1, old_hw).permute(0, 3, 1, 2)
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
    # (1, D, h', w') -> (1, N', D); flatten(2).transpose(1, 2) would be computed wrongly by ExecuTorch at dynamic sizes
    return torch.cat([cls, patches.to(cls.dtype).permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class ViTScratchEmbeddings(nn.Module):
    """Patches, positions, class token, registers: (B, C, H, W) -> (B, T, D). ViT, eq. 1.

    Positions cover the class token and the patches; registers have none (Darcet et al., 2024).
    """

    def __init__(self, config: ViTScratchConfig, use_mask_token: bool = False):
        super().__init__()
        D, R = config.hidden_size, config.num_register_tokens
        self.num_channels, self.num_cls_tokens = config.num_channels, int(config.use_cls_token)
        self.image_hw, self.patch_hw, self.grid_hw = config.image_hw, config.patch_hw, config.grid_hw
        self.position_interpolation = config.position_interpolation
        self.patch_embeddings = ViTScratchPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, D)) if config.use_cls_token else None
        self.register_tokens = nn.Parameter(torch.empty(1, R, D)) if R else None
        self.mask_token = nn.Parameter(torch.empty(1, 1, D)) if use_mask_token else None
        if config.position_embedding_type == "learned":
            N = self.grid_hw[0] * self.grid_hw[1]
            self.position_embeddings = nn.Parameter(torch.empty(1, self.num_cls_tokens + N, D))
        else:
            self.register_buffer("position_embeddings", sincos_positions(config), persistent=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def interpolate_pos_encoding(self, grid_hw: tuple[int, int]) -> torch.Tensor:
        """Positions for another grid, as the config says: (1, 1 + N, D) -> (1, 1 + N', D)."""
        if not torch.jit.is_tracing() and not torch.compiler.is_exporting() and grid_hw == self.grid_hw:
            return self.position_embeddings
        return resize_positions(self.position_embeddings, self.grid_hw, grid_hw, self.position_interpolation)

    def forward(self, pixel_values: torch.Tensor, bool_masked_pos, interpolate_pos_encoding: bool) -> torch.Tensor:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(f"pixel_values must be (B, {self.num_channels}, H, W), got {tuple(pixel_values.shape)}.")
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values are {pixel_values.dtype}, not floating point; use the image processor.")
        (B, _, H, W), (height, width), (patch_height, patch_width) = pixel_values.shape, self.image_hw, self.patch_hw
        if (H % patch_height or W % patch_width) if interpolate_pos_encoding else (H, W) != (height, width):
            raise ValueError(
                f"pixel_values are {H}x{W}, but the model was made for {height}x{width}; resize them, or pass "
                f"interpolate_pos_encoding=True for a size that patches of {patch_height}x{patch_width} divide."
            )
        patches = self.patch_embeddings(pixel_values.to(self.position_embeddings.dtype))  # (B, N, D)
        if bool_masked_pos is not None:
            if self.mask_token is None or bool_masked_pos.numel() != B * patches.shape[1]:
                raise ValueError(
                    f"bool_masked_pos of shape {tuple(bool_masked_pos.shape)} must be ({B}, {patches.shape[1]}), and "
                    "needs a mask token: make the model with use_mask_token=True."
                )
            patches = torch.where(bool_masked_pos.reshape(B, -1, 1).bool(), self.mask_token, patches)
        positions = self.position_embeddings
        if interpolate_pos_encoding:
            positions = self.interpolate_pos_encoding((H // patch_height, W // patch_width))
        patches = patches + positions[:, self.num_cls_tokens :]
        cls = None if self.cls_token is None else self.cls_token + positions[:, :1]
        prefix = [token.expand(B, -1, -1) for token in (cls, self.register_tokens) if token is not None]
        return self.dropout(torch.cat([*prefix, patches], dim=1))  # (B, T, D)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(q k^T * scaling) v: q, k, v (B, A, T, d) -> (B, T, A, d) and the maps (B, A, T, T). ViT, app. A."""
    scores = query @ key.transpose(-2, -1) * scaling
    scores = scores if attention_mask is None else scores + attention_mask
    maps = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    maps = nn.functional.dropout(maps, p=dropout, training=module.training)
    return (maps @ value).transpose(1, 2), maps


class ViTScratchAttention(nn.Module):
    """Multi-head self-attention with one fused projection: (B, T, D) -> (B, T, D). ViT, app. A, eq. 5 to 8.

    Runs on the implementation that the config names (eager, sdpa, flash, flex); a call that asks for the maps is
    computed eagerly, since no other implementation has them.
    """

    def __init__(self, config: ViTScratchConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, output_attentions: bool, num_queries: int | None = None, **kwargs):
        B, T, D = hidden_states.shape
        qkv = self.qkv(hidden_states).reshape(B, T, 3, -1, self.head_dim)  # (B, T, 3, A, d)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, A, T, d) each
        query = query[:, :, :num_queries]  # all of them if None
        implementation = "eager" if output_attentions else self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        kwargs = {"attention_mask": None, "scaling": self.scaling, "dropout": dropout, **kwargs}
        context, maps = attend(self, query, key, value, **kwargs)
        hidden_states = self.dropout(self.proj(context.reshape(B, -1, D)))  # (B, T, A, d) -> (B, T, D)
        return hidden_states, maps if output_attentions else None


class ViTScratchMLP(nn.Module):
    """Two dense layers with an activation between: (B, T, D) -> (B, T, D). ViT, eq. 3."""

    def __init__(self, config: ViTScratchConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, pool=None) -> torch.Tensor:
        hidden_states = self.dropout(self.activation(self.fc1(hidden_states)))  # (B, T, intermediate size)
        hidden_states = hidden_states if pool is None else pool(hidden_states)  # fc2 of a mean is the mean of fc2
        return self.dropout(self.fc2(hidden_states))


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


class ViTScratchLayer(GradientCheckpointingLayer):
    """One block: (B, T, D) -> (B, T, D) and, on request, its attention maps (B, A, T, T). ViT, eq. 2 and 3.

    All tokens are attended to; with `num_queries` only the first so many come out, with `pool` only their mean.
    """

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

    def forward(self, hidden_states: torch.Tensor, output_attentions: bool, num_queries=None, pool=None, **kwargs):
        residual = hidden_states[:, :num_queries]
        hidden_states, maps = self.attention(self.norm1(hidden_states), output_attentions, num_queries, **kwargs)
        hidden_states = residual + self.drop_path(self.layer_scale1(hidden_states))
        residual = hidden_states if pool is None else pool(hidden_states)
        hidden_states = self.mlp(self.norm2(hidden_states), pool)
        return residual + self.drop_path(self.layer_scale2(hidden_states)), maps


class ViTScratchPreTrainedModel(PreTrainedModel):
    """What every model here shares: initialisation, and what the library may do with them."""

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

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Start values. r is `initializer_range`, p is `position_initializer_range` (r if None, 0.02 under "fan_in").

        | tensor                                            | start                                    |
        |---------------------------------------------------|------------------------------------------|
        | weight of a linear or convolutional layer         | truncated N(0, r^2) in [-2, 2]           |
        | the same, `initializer_range="fan_in"`            | N(0, 1 / fan_in)                         |
        | weight of `classifier`                            | 0 (as in the paper's code)               |
        | bias                                              | 0                                        |
        | LayerNorm                                         | weight 1, bias 0                         |
        | `cls_token`, `register_tokens`, learned positions | truncated N(0, p^2) in [-2, 2] * max(p, 1) |
        | sincos positions                                  | `sincos_positions`                       |
        | `mask_token`                                      | 0                                        |
        | LayerScale                                        | `layerscale_value`                       |
        """
        fan_in = self.config.initializer_range == "fan_in"
        r = 0.02 if fan_in else self.config.initializer_range
        p = r if self.config.position_initializer_range is None else self.config.position_initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            if module is getattr(self, "classifier", None):
                init.zeros_(module.weight)
            elif fan_in:
                init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            else:
                init.trunc_normal_(module.weight, std=r)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ViTScratchLayerScale):
            init.constant_(module.scale, self.config.layerscale_value)
        elif isinstance(module, ViTScratchEmbeddings):
            cut = 2.0 * max(p, 1.0)
            for name, tensor in module.named_parameters(recurse=False):  # tokens and, where they are learned, positions
                init.zeros_(tensor) if name == "mask_token" else init.trunc_normal_(tensor, std=p, a=-cut, b=cut)
            if self.config.position_embedding_type == "sincos":
                init.copy_(module.position_embeddings, sincos_positions(self.config))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone: biases, norms, scales, tokens, positions."""
        own = {"cls_token", "register_tokens", "mask_token", "position_embeddings"}
        return {name for name, p in self.named_parameters() if p.ndim < 2 or name.rsplit(".", 1)[-1] in own}


class ViTScratchModel(ViTScratchPreTrainedModel):
    """The encoder: pixels (B, C, H, W) -> `last_hidden_state` (B, T, D) and `pooler_output` (B, D). ViT, eq. 1 to 4.

    Heads that read the tokens alone leave the pooling out: parameters without a gradient would stop a parallel run.
    """

    _auto_class = "AutoModel"

    def __init__(self, config: ViTScratchConfig, use_mask_token: bool = False, add_pooling_layer: bool = True):
        super().__init__(config)
        self.add_pooling_layer = add_pooling_layer
        self.embeddings = ViTScratchEmbeddings(config, use_mask_token)
        self.layers = nn.ModuleList([ViTScratchLayer(config, i) for i in range(config.num_hidden_layers)])
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm = norm if config.use_final_norm and not config.norm_after_pooling else nn.Identity()
        self.pooled_norm = norm if config.norm_after_pooling and add_pooling_layer else nn.Identity()
        self.post_init()

    def pool(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The token the classifier sees: (B, T, D) -> (B, 1, D)."""
        if self.config.pooling == "cls":
            return hidden_states[:, :1]
        return hidden_states[:, self.config.num_prefix_tokens :].mean(dim=1, keepdim=True)

    def patch_map(self, hidden_states: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """The patch tokens at their places in the picture: (B, T, D) -> (B, h, w, D)."""
        (H, W), (patch_height, patch_width) = pixel_values.shape[2:], self.config.patch_hw
        return hidden_states[:, self.config.num_prefix_tokens :].unflatten(1, (H // patch_height, W // patch_width))

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
        """Encode pictures.

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
        hidden_states = self.embeddings(pixel_values, bool_masked_pos, interpolate_pos_encoding)  # (B, T, D)
        all_states = [hidden_states if 0 in want_states else None]
        all_maps, early = [], {}
        if pooled_only and L - 1 not in want_maps and L not in want_states:
            if self.config.pooling == "cls" and kwargs.get("attention_mask") is None:
                early = {"num_queries": 1}
            elif self.config.pooling == "mean" and isinstance(self.norm, nn.Identity):
                early = {} if self.training and self.config.hidden_dropout_prob else {"pool": self.pool}
        for i, layer in enumerate(self.layers):
            hidden_states, maps = layer(hidden_states, i in want_maps, **(early if i == L - 1 else {}), **kwargs)
            all_states.append(hidden_states if i + 1 in want_states else None)
            all_maps.append(maps)
        hidden_states = self.norm(hidden_states)
        pooled = hidden_states if early else self.pool(hidden_states)  # (B, 1, D)
        pooled = self.pooled_norm(pooled[:, 0]) if self.add_pooling_layer else None  # (B, D)
        states, maps = tuple(all_states) if want_states else None, tuple(all_maps) if want_maps else None
        return BaseModelOutputWithPooling(hidden_states, pooled, states, maps)


class ViTScratchForImageClassification(ViTScratchPreTrainedModel):
    """The encoder and a linear classifier: pixels (B, C, H, W) -> `logits` (B, classes) and, given labels, `loss`."""

    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: ViTScratchConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = ViTScratchModel(config)
        R = config.representation_size
        self.pre_logits = nn.Sequential(nn.Linear(config.hidden_size, R), nn.Tanh()) if R else nn.Identity()
        self.classifier = nn.Linear(R or config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """Classify pictures.

        Args:
            pixel_values: As in `ViTScratchModel.forward`, like the other arguments not listed here.
            labels: As in `image_classification_loss`.
            **kwargs: `label_smoothing` and `num_items_in_batch` go to the loss, all else to the encoder.
        """
        # No named parameters: Trainer takes every parameter with "label" in its name for a column of the batch.
        label_smoothing = kwargs.pop("label_smoothing", 0.0)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        kwargs |= {"interpolate_pos_encoding": interpolate_pos_encoding, "return_dict": True, "pooled_only": True}
        outputs = self.vit(pixel_values, **kwargs)
        logits = self.classifier(self.pre_logits(outputs.pooler_output))  # (B, classes)
        loss = None
        if labels is not None:
            loss = image_classification_loss(logits, labels, self.config, label_smoothing, num_items_in_batch)
        return ImageClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


def image_classification_loss(
    logits, labels, config: ViTScratchConfig, label_smoothing: float = 0.0, num_items_in_batch=None
) -> torch.Tensor:
    """The loss that `config.problem_type` names; without one, regression for one class and else cross-entropy.

    Args:
        logits: (B, classes).
        labels: Single label: class indices (B,), integers, or class probabilities (B, classes), as mixup makes them.
            Multi label: 0 or 1 for each class (B, classes). Regression: (B, classes), or (B,) for one.
        label_smoothing: In [0, 1]; the share of each label spread evenly over all classes; single label only.
        num_items_in_batch: Pictures in the whole accumulated batch; the loss is then their share of its mean.

    Raises:
        ValueError: The labels do not fit the problem type or the number of classes.
    """
    logits, labels = logits.float(), labels.to(logits.device)
    B, classes = logits.shape
    problem_type = config.problem_type or ("regression" if classes == 1 else "single_label_classification")
    if problem_type != "single_label_classification":
        labels = labels.reshape(logits.shape).to(logits.dtype) if labels.numel() == logits.numel() else labels
    elif not labels.is_floating_point():
        labels = labels.reshape(-1)
    elif labels.shape == logits.shape and config.problem_type is None and not torch.compiler.is_compiling():
        total = labels.detach().sum(dim=1)
        if not torch.allclose(total, torch.ones_like(total), atol=1e-2):
            raise ValueError(
                "labels are taken for class probabilities, but a row does not sum to 1; set "
                "config.problem_type = 'multi_label_classification' if a picture can have several classes."
            )
    if labels.is_floating_point() and labels.shape != logits.shape:
        raise ValueError(
            f"labels of {labels.dtype} and shape {tuple(labels.shape)} are neither class indices (integers, shape "
            f"({B},)) nor numbers for each class (shape {(B, classes)})."
        )
    if problem_type == "single_label_classification":
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    elif problem_type == "regression":
        loss = nn.functional.mse_loss(logits, labels)
    else:
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
    return loss if num_items_in_batch is None else loss * B / num_items_in_batch


class ViTScratchForMaskedImageModeling(ViTScratchPreTrainedModel):
    """SimMIM (Xie et al., 2022): hide patches behind a mask token, and predict the pixels of each token."""

    _auto_class = "AutoModelForMaskedImageModeling"

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
        """Reconstruct pictures: `reconstruction` (B, C, H, W) and, given a mask, `loss`, the mean L1 error under it.

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
        pixels = self.decoder(self.vit.patch_map(outputs.last_hidden_state, pixel_values))  # (B, h, w, C * stride^2)
        pixels = pixels.unflatten(3, (-1, *stride_hw)).permute(0, 3, 1, 4, 2, 5)  # (B, C, h, stride, w, stride)
        reconstruction = pixels.flatten(4, 5).flatten(2, 3)  # (B, C, H, W)
        loss = None
        if bool_masked_pos is not None:
            error = (reconstruction.float() - pixel_values.to(reconstruction.device)).abs().mean(dim=1)  # (B, H, W)
            error = nn.functional.avg_pool2d(error, patch_hw)  # (B, h, w)
            mask = bool_masked_pos.to(error.device).bool().reshape(error.shape)
            loss = (error * mask).sum() / mask.sum().clamp(min=1)
        return MaskedImageModelingOutput(loss, reconstruction, outputs.hidden_states, outputs.attentions)


class ViTScratchBackbone(BackboneMixin, ViTScratchPreTrainedModel):
    """The encoder for dense prediction: for each of `out_features`, patch tokens (B, D, h, w) after the final norm."""

    _auto_class = "AutoBackbone"

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
        """Encode pictures of any size that the patch divides; arguments as in `ViTScratchModel.forward`."""
        L = self.config.num_hidden_layers
        stages = [index % (L + 1) for index in self.out_indices]
        want_states = self.config.selected("output_hidden_states", output_hidden_states, L + 1)
        kwargs |= {"interpolate_pos_encoding": interpolate_pos_encoding, "return_dict": True}
        outputs = self.vit(pixel_values, output_hidden_states=[*stages, *want_states], **kwargs)
        maps = [self.vit.patch_map(self.vit.norm(outputs.hidden_states[i]), pixel_values) for i in stages]
        maps = tuple(feature_map.permute(0, 3, 1, 2) for feature_map in maps)  # (B, D, h, w) each
        states = tuple(state if i in want_states else None for i, state in enumerate(outputs.hidden_states))
        return BackboneOutput(maps, states if want_states else None, outputs.attentions)
