"""The Vision Transformer of "An Image is Worth 16x16 Words" (Dosovitskiy et al., 2021), from scratch.

Read it top to bottom: patches, embeddings, attention, MLP, block, then the models that put them together. Equation
numbers are those of the paper's section 3.1.

    z0 = [x_class; x1 E; ...; xN E] + E_pos      (eq. 1)  ViTScratchPatchEmbeddings, ViTScratchEmbeddings
    z' = MSA(LN(z)) + z                          (eq. 2)  ViTScratchAttention, ViTScratchLayer
    z  = MLP(LN(z')) + z'                        (eq. 3)  ViTScratchMLP, ViTScratchLayer
    y  = LN(z_L[class])                          (eq. 4)  ViTScratchModel

Letters in shape comments: B batch, C channels, H height and W width in pixels, h x w patch grid, N = h * w patches,
T tokens (class token, registers, patches), D hidden size, A attention heads, d = D / A.

Beyond the paper, each off by default: mean pooling, no class token, registers, LayerScale, stochastic depth, fixed
2-D sine-cosine positions.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_vit_scratch import ViTScratchConfig


class ViTScratchPatchEmbeddings(nn.Module):
    """Cut pictures into patches and project each: (B, C, H, W) -> (B, N, D). ViT, eq. 1, the matrix E.

    A linear layer on flattened patches; its weight, viewed as (D, C, patch height, patch width), is the kernel of the
    strided convolution that computes the same.
    """

    def __init__(self, config: ViTScratchConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_height, self.patch_width = config.patch_hw
        self.projection = nn.Linear(config.num_channels * self.patch_height * self.patch_width, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        B, C, H, W = pixel_values.shape
        if C != self.num_channels:
            raise ValueError(f"pixel_values have {C} channels, but the model was made for {self.num_channels}.")
        if H % self.patch_height or W % self.patch_width:
            raise ValueError(
                f"pixel_values of {H}x{W} cannot be cut into patches of {self.patch_height}x{self.patch_width}; "
                "resize or crop to multiples of the patch."
            )
        h, w = H // self.patch_height, W // self.patch_width
        patches = pixel_values.reshape(B, C, h, self.patch_height, w, self.patch_width)
        patches = patches.permute(0, 2, 4, 1, 3, 5)  # (B, h, w, C, patch height, patch width)
        patches = patches.reshape(B, h * w, -1)  # (B, N, C * patch height * patch width)
        return self.projection(patches)


class ViTScratchEmbeddings(nn.Module):
    """Patches, class token, positions, registers: (B, C, H, W) -> (B, T, D). ViT, eq. 1.

    Positions cover the class token and the patches; registers have none (Darcet et al., 2024).
    """

    def __init__(self, config: ViTScratchConfig):
        super().__init__()
        D, N = config.hidden_size, config.grid_hw[0] * config.grid_hw[1]
        self.image_hw, self.grid_hw = config.image_hw, config.grid_hw
        self.patch_embeddings = ViTScratchPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, D)) if config.use_cls_token else None
        self.register_tokens = (
            nn.Parameter(torch.empty(1, config.num_register_tokens, D)) if config.num_register_tokens else None
        )
        positions = torch.empty(1, int(config.use_cls_token) + N, D)
        if config.position_embedding_type == "learned":
            self.position_embeddings = nn.Parameter(positions)
        else:
            self.register_buffer("position_embeddings", positions, persistent=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def sincos_positions(self) -> torch.Tensor:
        """Fixed 2-D positions (1, 1 + N, D) or (1, N, D): sine and cosine of x, then y (MAE); class token 0."""
        _, length, D = self.position_embeddings.shape
        h, w = self.grid_hw
        omega = 10000 ** -(torch.arange(D // 4, dtype=torch.float64) / (D // 4))
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")  # (h, w) each
        angles = [axis.reshape(-1, 1) * omega for axis in (x, y)]  # (N, D / 4) each
        patches = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)  # (N, D)
        cls = patches.new_zeros(length - h * w, D)
        return torch.cat([cls, patches]).unsqueeze(0).float()

    def interpolate_pos_encoding(self, grid_hw: tuple[int, int]) -> torch.Tensor:
        """Positions resized (bicubic) from the training grid to another: (1, T, D) -> (1, T', D). ViT, sec. 3.2."""
        h, w = self.grid_hw
        cls, patches = self.position_embeddings.tensor_split([self.position_embeddings.shape[1] - h * w], dim=1)
        patches = patches.reshape(1, h, w, -1).permute(0, 3, 1, 2)  # (1, D, h, w)
        patches = nn.functional.interpolate(patches, size=grid_hw, mode="bicubic", align_corners=False)
        return torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        if pixel_values.ndim != 4:
            raise ValueError(f"pixel_values must be (B, C, H, W), got {pixel_values.ndim} dimensions.")
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values must be floating point, got {pixel_values.dtype}; "
                "the image processor rescales and normalises integer pixels."
            )
        B, _, H, W = pixel_values.shape
        hidden_states = self.patch_embeddings(pixel_values.to(self.position_embeddings.dtype))  # (B, N, D)
        if self.cls_token is not None:
            hidden_states = torch.cat([self.cls_token.expand(B, -1, -1), hidden_states], dim=1)  # (B, 1 + N, D)
        if interpolate_pos_encoding:
            grid_hw = H // self.patch_embeddings.patch_height, W // self.patch_embeddings.patch_width
            same = not torch.jit.is_tracing() and grid_hw == self.grid_hw
            hidden_states = hidden_states + (
                self.position_embeddings if same else self.interpolate_pos_encoding(grid_hw)
            )
        elif (H, W) != self.image_hw:
            raise ValueError(
                f"pixel_values are {H}x{W}, but the model was made for {self.image_hw[0]}x{self.image_hw[1]}; "
                "resize them, or pass interpolate_pos_encoding=True."
            )
        else:
            hidden_states = hidden_states + self.position_embeddings
        if self.register_tokens is not None:
            cls, patches = hidden_states.tensor_split([int(self.cls_token is not None)], dim=1)
            hidden_states = torch.cat([cls, self.register_tokens.expand(B, -1, -1), patches], dim=1)  # (B, T, D)
        return self.dropout(hidden_states)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(q k^T * scaling) v: q, k, v (B, A, T, d) -> (B, T, A, d) and the maps (B, A, T, T). ViT, app. A."""
    scores = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
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

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        B, T, D = hidden_states.shape
        qkv = self.qkv(hidden_states).reshape(B, T, 3, -1, self.head_dim)  # (B, T, 3, A, d)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, A, T, d) each
        implementation = "eager" if output_attentions else self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        context, maps = attend(self, query, key, value, None, scaling=self.scaling, dropout=dropout, **kwargs)
        hidden_states = self.dropout(self.proj(context.reshape(B, T, D)))  # (B, T, A, d) -> (B, T, D)
        return hidden_states, maps if output_attentions else None


class ViTScratchMLP(nn.Module):
    """Two dense layers with an activation between: (B, T, D) -> (B, T, D). ViT, eq. 3."""

    def __init__(self, config: ViTScratchConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.dropout(self.activation(self.fc1(hidden_states)))  # (B, T, intermediate size)
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

    def extra_repr(self) -> str:
        return f"p={self.p}"


class ViTScratchLayerScale(nn.Module):
    """A learned factor per channel on a residual branch (Touvron et al., 2021b, "Going deeper", eq. 4)."""

    def __init__(self, config: ViTScratchConfig):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.scale


class ViTScratchLayer(GradientCheckpointingLayer):
    """One block: (B, T, D) -> (B, T, D) and, on request, its attention maps (B, A, T, T). ViT, eq. 2 and 3."""

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

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, maps = self.attention(self.norm1(hidden_states), output_attentions, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.layer_scale1(attended))
        hidden_states = hidden_states + self.drop_path(self.layer_scale2(self.mlp(self.norm2(hidden_states))))
        return hidden_states, maps


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
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: ViTScratchConfig, *args, **kwargs):
        config.validate()  # fields may have changed since it was made, e.g. by from_pretrained(..., field=)
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Start values. r is `initializer_range`, p is `position_initializer_range` (r if None, 0.02 under "fan_in").

        | tensor                                            | start                                    |
        |---------------------------------------------------|------------------------------------------|
        | weight of a linear layer                          | truncated N(0, r^2) in [-2, 2]           |
        | the same, `initializer_range="fan_in"`            | N(0, 1 / fan_in)                         |
        | weight of `classifier`                            | 0 (as in the paper's code)               |
        | bias                                              | 0                                        |
        | LayerNorm                                         | weight 1, bias 0                         |
        | `cls_token`, `register_tokens`, learned positions | truncated N(0, p^2) in [-2, 2] * max(p, 1) |
        | sincos positions                                  | `ViTScratchEmbeddings.sincos_positions`  |
        | LayerScale                                        | `layerscale_value`                       |
        """
        fan_in = self.config.initializer_range == "fan_in"
        if isinstance(module, nn.Linear):
            if module is getattr(self, "classifier", None):
                init.zeros_(module.weight)
            elif fan_in:
                init.normal_(module.weight, std=module.in_features**-0.5)
            else:
                init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ViTScratchLayerScale):
            init.constant_(module.scale, self.config.layerscale_value)
        elif isinstance(module, ViTScratchEmbeddings):
            std = self.config.position_initializer_range
            if std is None:
                std = 0.02 if fan_in else self.config.initializer_range
            cut = 2.0 * max(std, 1.0)
            for token in (module.cls_token, module.register_tokens):
                if token is not None:
                    init.trunc_normal_(token, std=std, a=-cut, b=cut)
            if self.config.position_embedding_type == "learned":
                init.trunc_normal_(module.position_embeddings, std=std, a=-cut, b=cut)
            else:
                init.copy_(module.position_embeddings, module.sincos_positions())

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone: biases, norms, scales, tokens, positions."""
        own = {"cls_token", "register_tokens", "position_embeddings"}
        return {name for name, p in self.named_parameters() if p.ndim < 2 or name.rsplit(".", 1)[-1] in own}


class ViTScratchModel(ViTScratchPreTrainedModel):
    """The encoder: pixels (B, C, H, W) -> `last_hidden_state` (B, T, D) and `pooler_output` (B, D). ViT, eq. 1 to 4."""

    _auto_class = "AutoModel"

    def __init__(self, config: ViTScratchConfig):
        super().__init__(config)
        self.embeddings = ViTScratchEmbeddings(config)
        self.layers = nn.ModuleList([ViTScratchLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.use_final_norm else nn.Identity()
        )
        self.post_init()

    def pool(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The token the classifier sees: (B, T, D) -> (B, D)."""
        if self.config.pooling == "cls":
            return hidden_states[:, 0]
        return hidden_states[:, self.config.num_prefix_tokens :].mean(dim=1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | int | list[int] | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode pictures.

        Args:
            pixel_values: (B, C, H, W), floating point, normalised as the image processor does.
            interpolate_pos_encoding: Resize the positions where (H, W) is not the config's `image_size`.
            output_attentions: Whether to return each layer's maps (B, A, T, T), under every attention implementation;
                or the layers to return, e.g. [0, -1], with None for the others. None follows the config.
            output_hidden_states: Likewise for the L + 1 states (B, T, D): the embeddings, then each layer's output,
                all before the final norm.
            **kwargs: Passed to the attention implementation.

        Raises:
            ValueError: Pixels are missing, of integer type, or of a size or channel count the model was not made for;
                or a layer is asked for that is not there.
        """
        if pixel_values is None:
            raise ValueError("pixel_values are missing.")
        L = len(self.layers)
        want_maps = _selected("output_attentions", output_attentions, self.config, L)
        want_states = _selected("output_hidden_states", output_hidden_states, self.config, L + 1)

        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding)  # (B, T, D)
        all_states = [hidden_states if 0 in want_states else None]
        all_maps = []
        for i, layer in enumerate(self.layers):
            hidden_states, maps = layer(hidden_states, i in want_maps, **kwargs)
            all_states.append(hidden_states if i + 1 in want_states else None)
            all_maps.append(maps)
        hidden_states = self.norm(hidden_states)

        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=self.pool(hidden_states),
            hidden_states=tuple(all_states) if want_states else None,
            attentions=tuple(all_maps) if want_maps else None,
        )


def _selected(name: str, value: bool | int | list[int] | None, config: ViTScratchConfig, count: int) -> list[int]:
    """The indices below `count` that a flag, a number or a list of numbers (negative ones from the end) asks for."""
    value = getattr(config, name) if value is None else value
    if isinstance(value, bool) or value is None:
        return list(range(count)) if value else []
    indices = [value] if isinstance(value, int) else list(value)
    for index in indices:
        if not -count <= index < count:
            raise ValueError(f"{name} asks for index {index}, but there are {count}: use {-count} to {count - 1}.")
    return [index % count for index in indices]


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
        pixel_values: torch.Tensor | None = None,
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
        outputs = self.vit(pixel_values, interpolate_pos_encoding, **kwargs)
        logits = self.classifier(self.pre_logits(outputs.pooler_output))  # (B, classes)
        loss = None
        if labels is not None:
            loss = image_classification_loss(logits, labels, self.config, label_smoothing, num_items_in_batch)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def image_classification_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    config: ViTScratchConfig,
    label_smoothing: float = 0.0,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """The loss that `config.problem_type` names; without one, regression for one class and else cross-entropy.

    Args:
        logits: (B, classes).
        labels: Single label: class indices (B,), integer, or class probabilities (B, classes), as mixup makes them.
            Multi label: 0 or 1 for each class (B, classes). Regression: (B, classes), or (B,) for one.
        label_smoothing: In [0, 1]; single label only.
        num_items_in_batch: Pictures in the whole accumulated batch; the loss is then their share of its mean.

    Raises:
        ValueError: The labels do not fit the problem type or the number of classes.
    """
    logits, labels = logits.float(), labels.to(logits.device)
    B, classes = logits.shape
    problem_type = config.problem_type or ("regression" if classes == 1 else "single_label_classification")
    reduction = "mean" if num_items_in_batch is None else "sum"
    if problem_type == "single_label_classification":
        if not labels.is_floating_point():
            labels = labels.reshape(-1)
        elif labels.shape != logits.shape:
            raise ValueError(
                f"labels of {labels.dtype} and shape {tuple(labels.shape)} are neither class indices (integers, "
                f"shape ({B},)) nor class probabilities (shape {(B, classes)})."
            )
        elif config.problem_type is None and not torch.compiler.is_compiling():
            total = labels.detach().sum(dim=1)
            if not torch.allclose(total, torch.ones_like(total), atol=1e-2):
                worst = total[(total - 1).abs().argmax()].item()
                raise ValueError(
                    f"labels are taken for class probabilities, but a row sums to {worst:g}, not 1; set "
                    "config.problem_type = 'multi_label_classification' if a picture can have several classes."
                )
        loss = nn.functional.cross_entropy(logits, labels, reduction=reduction, label_smoothing=label_smoothing)
        return loss if num_items_in_batch is None else loss / num_items_in_batch
    labels = labels.reshape(logits.shape).to(logits.dtype) if labels.numel() == logits.numel() else labels
    if labels.shape != logits.shape:
        raise ValueError(f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}.")
    if problem_type == "regression":
        loss = nn.functional.mse_loss(logits, labels, reduction=reduction)
    else:
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction=reduction)
    return loss if num_items_in_batch is None else loss / (num_items_in_batch * classes)


__all__ = ["ViTScratchForImageClassification", "ViTScratchModel", "ViTScratchPreTrainedModel"]
