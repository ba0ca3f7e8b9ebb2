"""Configuration of the Vision Transformer of "An Image is Worth 16x16 Words" (Dosovitskiy et al., 2021).

Fields carry the names of transformers' `ViTConfig` wherever they mean the same thing. A wrong value is refused with a
plain `ValueError` when the config is made, when a model is built from it, and when it is saved.
"""

import difflib
import math

from transformers import BackboneConfigMixin, PreTrainedConfig
from transformers.activations import ACT2FN

# Every auto class that a saved folder serves. `save_pretrained` alone would only write the class that was saved.
AUTO_MAP = {
    "AutoConfig": "configuration_vit_scratch.ViTScratchConfig",
    "AutoModel": "modeling_vit_scratch.ViTScratchModel",
    "AutoModelForImageClassification": "modeling_vit_scratch.ViTScratchForImageClassification",
    "AutoModelForMaskedImageModeling": "modeling_vit_scratch.ViTScratchForMaskedImageModeling",
    "AutoBackbone": "modeling_vit_scratch.ViTScratchBackbone",
}

# The model file that this one goes with, so that another comes with another configuration file. transformers finds the
# model's class by the configuration's, and of two folders that share one would run the first one's model for both.
MODEL_FILE_SHA256 = "048dce9a4ed9d807f5694d715c305e3d9b3579ab9a4d557dfcbb22569f9399ef"

# ViT table 1; Ti and S from "Training data-efficient image transformers" (Touvron et al., 2021), table 1.
PRESETS = {
    "showcase": {
        "image_size": 32, "patch_size": 8, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 256, "layer_norm_eps": 1e-5, "pooling": "mean", "use_cls_token": False,
        "use_final_norm": False, "num_labels": 10,
    },
    "tiny": {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768},
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "huge": {
        "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120,
        "patch_size": 14,
    },
}  # fmt: skip

POOLINGS = ("cls", "mean", "cls+mean", "attention")
POSITION_EMBEDDING_TYPES = ("learned", "sincos", "rope", "learned+rope", "none")
ROPE_COORDINATES = ("centered", "index")
ROPE_FREQUENCIES = ("axial", "mixed")
POSITION_INTERPOLATIONS = (
    "bicubic", "bicubic_antialias", "bicubic_align_corners", "bicubic_offset", "bilinear", "bilinear_align_corners",
)  # fmt: skip

# Keywords that are no field of ours, yet legitimate: transformers writes them to config.json or takes them on load.
TRANSFORMERS_KEYWORDS = {
    "model_type", "auto_map", "num_labels", "name_or_path", "torch_dtype", "attn_implementation", "output_attentions",
    "experts_implementation", "per_layer_config", "quantization_config", "custom_pipelines", "task_specific_params",
    "finetuning_task", "use_cache", "tie_word_embeddings", "tie_last_hidden_states", "pruned_heads", "is_decoder",
    "add_cross_attention", "gradient_checkpointing", "torchscript",
}  # fmt: skip


class ViTScratchConfig(BackboneConfigMixin, PreTrainedConfig):
    """Everything that defines the architecture; `ViTScratchConfig()` is ViT-B/16 at 224 px.

    Args:
        hidden_size: Width D of a token.
        num_hidden_layers: Number of blocks L.
        num_attention_heads: Heads A; must divide `hidden_size`.
        intermediate_size: Width of the MLP's hidden layer.
        hidden_act: Name of an activation of transformers' `ACT2FN`; "gelu" is the exact GELU.
        hidden_dropout_prob: In [0, 1]; after every dense layer but qkv, and after adding positions (ViT, app. B.1).
        attention_probs_dropout_prob: In [0, 1]; on the attention maps.
        drop_path_rate: In [0, 1]; stochastic depth (Huang et al., 2016) of the last block, growing linearly from 0.
        initializer_range: Standard deviation of the truncated normal that weights start from, or "fan_in" for
            N(0, 1 / fan_in).
        position_initializer_range: Standard deviation of positions, class and register tokens; None follows
            `initializer_range` (0.02 under "fan_in").
        layer_norm_eps: Epsilon of every LayerNorm.
        image_size: Pixels, one number or (height, width).
        patch_size: Pixels, one number or (height, width); must divide `image_size`.
        num_channels: Channels C of an image.
        stem_channels: Channels of each stage of early convolutions (Xiao et al., 2021) before the patches; empty for
            none. Each halves height and width, so `patch_size` must be a multiple of 2 ** stages.
        qkv_bias: Whether the query, key and value projections have biases.
        key_bias: Whether, where these have biases, the key's has one, too (not so in BEiT and DINOv3).
        use_qk_norm: Whether a LayerNorm over each head's channels normalises queries and keys (Dehghani et al., 2023).
        use_gated_mlp: Whether the MLP is gated (Shazeer, 2020): with hidden_act="silu" SwiGLU; has half as many weights
            again at the same `intermediate_size`.
        encoder_stride: Pixels that one token decodes to in masked image modelling, one number or (height, width).
        use_cls_token: Whether a learned class token leads the sequence (ViT, eq. 1).
        num_cls_tokens: How many there are, each with a position of its own; DeiT's distillation token is a second one.
        num_register_tokens: Learned tokens without a position, after the class token (Darcet et al., 2024).
        pooling: What the classifier sees: "cls", the class token (ViT, eq. 4), of several their concatenation; "mean",
            the mean of the patch tokens; "cls+mean", both, one after the other (DINOv2's linear heads); or "attention",
            what a learned query gathers from the patch tokens, and an MLP (Zhai et al., 2022; SigLIP).
        use_embedding_norm: Whether a LayerNorm comes before the first block (CLIP, Radford et al., 2021).
        use_final_norm: Whether a LayerNorm follows the last block (ViT, eq. 4).
        norm_after_pooling: Whether that LayerNorm follows the pooling instead, so that `last_hidden_state` is not
            normalised (He et al., 2022, fine-tuning; timm's `fc_norm`).
        position_embedding_type: "learned" (ViT, eq. 1); "sincos", fixed, 2-D (MoCo v3; MAE); "rope", rotary positions
            in attention (Su et al., 2021) and none in the embeddings; "learned+rope"; or "none".
        rope_theta: Base of the frequencies of rotary positions: they fall from 1 to nearly 1 / rope_theta.
        rope_coordinates: Where rotary positions put the patches of an axis: "centered", from -2 pi to 2 pi whatever
            their number (DINOv3); or "index", their numbers, from 0 (EVA-02).
        rope_grid_size: Patches a side that "index" is scaled to, so that larger images do not leave the places learned
            (EVA-02: 16); None for no scaling.
        rope_offset: Number of the first patch for "index"; 1 in Perception Encoder.
        rope_frequencies: "axial", a pair of channels turns by y or by x; or "mixed", by both, with frequencies learned
            for each head and layer (Heo et al., 2024).
        position_interpolation: How positions are resized to images of another size (ViT, sec. 3.2): "bicubic" (as
            transformers, DeiT and MAE do), "bicubic_antialias" (timm; DINOv2 with registers), "bicubic_align_corners"
            (torchvision), "bicubic_offset" (DINO's and DINOv2's own code, which adds 0.1 patches to the new height and
            width before it divides by the old ones), "bilinear_align_corners" (Google's code), or "bilinear" (timm's
            FlexiViT).
        representation_size: Width of the pre-training head's linear + tanh before the classifier (ViT, sec. 3.1), or
            None for a single linear layer.
        layerscale_value: Starting value of LayerScale (Touvron et al., 2021b), or None for none.
        reshape_hidden_states: Whether a backbone's feature maps are the patch tokens in their places, (B, D, h, w), or
            all tokens, (B, T, D), as transformers' DPT and Depth Anything read them: a class token, then patches.
        apply_layernorm: Whether a backbone's feature maps are after the final norm.
        out_features: Stages that a backbone returns, of "stem" (the embeddings), "stage1" to "stageL" (the blocks), in
            that order; None for the last. `stage_names` lists them.
        out_indices: The same by number, negative ones from the end.

    Raises:
        ValueError: A field is unknown, of a wrong type, out of range, or at odds with another.
    """

    model_type = "vit_scratch"
    _auto_class = "AutoConfig"
    base_model_fsdp_plan = {"layers.*": "free_full_weight"}

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float | int | str = 0.02
    position_initializer_range: float | int | None = None
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    stem_channels: list[int] | tuple[int, ...] = ()
    qkv_bias: bool = True
    key_bias: bool = True
    use_qk_norm: bool = False
    use_gated_mlp: bool = False
    encoder_stride: int | list[int] | tuple[int, int] = 16
    use_cls_token: bool = True
    num_cls_tokens: int = 1
    num_register_tokens: int = 0
    pooling: str = "cls"
    use_embedding_norm: bool = False
    use_final_norm: bool = True
    norm_after_pooling: bool = False
    position_embedding_type: str = "learned"
    position_interpolation: str = "bicubic"
    rope_theta: float | int = 100.0
    rope_coordinates: str = "centered"
    rope_grid_size: int | None = None
    rope_offset: float | int = 0
    rope_frequencies: str = "axial"
    representation_size: int | None = None
    layerscale_value: float | int | None = None
    reshape_hidden_states: bool = True
    apply_layernorm: bool = True

    def __new__(cls, **kwargs):
        # Here, since older transformers assign these two by an error of their own before __post_init__ runs.
        for name in ("id2label", "label2id"):
            if not isinstance(kwargs.get(name), (dict, type(None))):
                raise ValueError(f"{name} must be a mapping, got {type(kwargs[name]).__name__}.")
        return super().__new__(cls)

    def __post_init__(self, **kwargs):
        added = kwargs.pop("_added", {})
        for name in kwargs:
            if not self._is_known(name):
                raise ValueError(
                    f"{name!r} is not a field of {type(self).__name__}; the nearest is {self._nearest(name)!r}."
                )
        if kwargs.get("num_labels") is not None:
            _require_int("num_labels", kwargs["num_labels"], minimum=0)
        kwargs["auto_map"] = {**AUTO_MAP, **(kwargs.get("auto_map") or {})}
        # JSON has no tuples: one type in memory keeps save -> load the identity.
        for name in ("image_size", "patch_size", "encoder_stride", "stem_channels"):
            setattr(
                self, name, tuple(getattr(self, name)) if isinstance(getattr(self, name), list) else getattr(self, name)
            )
        stages = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        super().__post_init__(**kwargs, **added)
        self.set_output_features_output_indices(*stages)
        self.validate()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """The library's, save that names resembling no field stay attributes: users and libraries may have set them.

        So does a name whose like is there too: it is no misspelling of that.
        """
        added = {}
        for name, value in config_dict.items():
            near = cls._nearest(name)
            likeness = difflib.SequenceMatcher(None, name, near).ratio()
            if not cls._is_known(name) and (near in config_dict or likeness < 0.8):
                added[name] = value
        known = {name: value for name, value in config_dict.items() if name not in added}
        return super().from_dict({**known, "_added": added}, **kwargs)

    @classmethod
    def _is_known(cls, name: str) -> bool:
        fields = {*cls.__dataclass_fields__, *TRANSFORMERS_KEYWORDS, "out_features", "out_indices"}
        return name in fields or name.startswith("_")

    @classmethod
    def _nearest(cls, name: str) -> str:
        fields = [field for field in cls.__dataclass_fields__ if not field.startswith("_")]
        return nearest(name, [*fields, "num_labels", "out_features", "out_indices"])

    @classmethod
    def preset(cls, name: str, **overrides) -> "ViTScratchConfig":
        """A named architecture, any field of which can be overridden: `preset("base", patch_size=32)`.

        Args:
            name: "showcase" (32 px, 10 classes), or "tiny", "small", "base", "large", "huge" (224 px, 1000 classes).
            **overrides: Fields of the config.

        Raises:
            ValueError: No preset has that name.
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown; use one of {', '.join(PRESETS)}.")
        fields = {"num_labels": 1000, **PRESETS[name], **overrides}
        fields.setdefault("encoder_stride", fields.get("patch_size", cls.patch_size))
        if overrides.get("id2label") is not None:
            fields.pop("num_labels")
        return cls(**fields)

    @property
    def image_hw(self) -> tuple[int, int]:
        """Image (height, width) in pixels."""
        return _pair(self.image_size)

    @property
    def patch_hw(self) -> tuple[int, int]:
        """Patch (height, width) in pixels."""
        return _pair(self.patch_size)

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Patches (down, across) at `image_size`."""
        (height, width), (patch_height, patch_width) = self.image_hw, self.patch_hw
        return height // patch_height, width // patch_width

    @property
    def stride_hw(self) -> tuple[int, int]:
        """Pixels (height, width) that one token decodes to in masked image modelling."""
        return _pair(self.encoder_stride)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the first patch: class tokens and registers."""
        return self.cls_tokens + self.num_register_tokens

    @property
    def cls_tokens(self) -> int:
        """Class tokens: `num_cls_tokens`, or 0 where there are none."""
        return self.num_cls_tokens if self.use_cls_token else 0

    @property
    def pooled_size(self) -> int:
        """Width of what the classifier sees: D for each of the tokens that are pooled."""
        tokens = {"cls": self.cls_tokens, "cls+mean": self.cls_tokens + 1}
        return self.hidden_size * tokens.get(self.pooling, 1)

    # The stages of a backbone. The library's mixin stores the names of all stages and of the last, and writes them to
    # config.json, which then cannot be loaded with another number of layers. Here only a choice is stored.
    @property
    def stage_names(self) -> list[str]:
        """Names of a backbone's feature maps: the embeddings, then each block."""
        return ["stem", *(f"stage{i}" for i in range(1, self.num_hidden_layers + 1))]

    @property
    def _out_indices(self) -> list[int]:
        return [self.num_hidden_layers] if self._out_stages is None else self._out_stages

    @property
    def _out_features(self) -> list[str]:
        return [self.stage_names[index] for index in self._out_indices]

    def set_output_features_output_indices(self, out_features: list[str] | None, out_indices: list[int] | None):
        """Choose the stages that a backbone returns, by name or number; None for both is the last."""
        if out_features is None and out_indices is None:
            self._out_stages = None
            return
        names = self.stage_names
        for feature in out_features or ():
            _require_choice("out_features", feature, tuple(names))
        by_name = [names.index(feature) for feature in out_features or ()]
        self._out_stages = by_name if out_indices is None else list(out_indices)
        self._validate_stages()
        if out_features is not None and self._out_features != list(out_features):
            raise ValueError(f"out_features {out_features} and out_indices {out_indices} differ; give one of them.")

    def to_dict(self) -> dict:
        """All fields; those of a backbone only where somebody chose them."""
        output = super().to_dict()
        for name in ("reshape_hidden_states", "apply_layernorm"):
            if output[name]:
                del output[name]
        stages = output.pop("_out_stages")
        del output["out_features"], output["out_indices"]
        return output if stages is None else {**output, "out_indices": stages}

    # transformers refuses `output_attentions` under any implementation but "eager"; this model has maps under each.
    @property
    def output_attentions(self):
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value):
        self._output_attentions = value

    def selected(self, name: str, value: bool | int | list[int] | None, count: int) -> list[int]:
        """The indices below `count` that a flag, a number or a list of numbers (negative ones from the end) asks for.

        Args:
            name: Of the field that decides where `value` is None.
        """
        value = getattr(self, name) if value is None else value
        if isinstance(value, bool) or value is None:
            return list(range(count)) if value else []
        indices = [value] if isinstance(value, int) else value
        if any(not -count <= index < count for index in indices):
            raise ValueError(f"{name} asks for {value}, but there are {count}: use {-count} to {count - 1}.")
        return [index % count for index in indices]

    def save_pretrained(self, save_directory, **kwargs):
        """Save `config.json` and this file; `auto_map` then names the files saved, not another repository."""
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)

    def validate(self):
        """Raise a ValueError that says what is wrong, both numbers, and the mend."""
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels")
        for name in (*sizes, "num_cls_tokens"):
            _require_int(name, getattr(self, name), minimum=1)
        _require_int("num_register_tokens", self.num_register_tokens, minimum=0)
        for name in ("representation_size", "rope_grid_size"):
            if getattr(self, name) is not None:
                _require_int(name, getattr(self, name), minimum=1)
        _require_number("rope_theta", self.rope_theta, minimum=1)
        _require_number("rope_offset", self.rope_offset, minimum=0)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            _require_number(name, getattr(self, name), minimum=0, maximum=1)
        _require_number("layer_norm_eps", self.layer_norm_eps, minimum=0)
        if self.layerscale_value is not None:
            _require_number("layerscale_value", self.layerscale_value, minimum=0)
        if self.position_initializer_range is not None:
            _require_number("position_initializer_range", self.position_initializer_range, minimum=1e-12)
        if isinstance(self.initializer_range, str):
            _require_choice("initializer_range", self.initializer_range, ("fan_in",))
        else:
            _require_number("initializer_range", self.initializer_range, minimum=1e-12)
        flags = ("qkv_bias", "key_bias", "use_qk_norm", "use_gated_mlp", "use_cls_token", "use_embedding_norm")
        for name in (*flags, "use_final_norm", "norm_after_pooling", "reshape_hidden_states", "apply_layernorm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        _require_choice("hidden_act", self.hidden_act, tuple(ACT2FN))
        _require_choice("pooling", self.pooling, POOLINGS)
        _require_choice("position_embedding_type", self.position_embedding_type, POSITION_EMBEDDING_TYPES)
        _require_choice("position_interpolation", self.position_interpolation, POSITION_INTERPOLATIONS)
        _require_choice("rope_coordinates", self.rope_coordinates, ROPE_COORDINATES)
        _require_choice("rope_frequencies", self.rope_frequencies, ROPE_FREQUENCIES)
        self._validate_geometry()
        self._validate_stages()

    def _validate_geometry(self):
        for name in ("image_size", "patch_size", "encoder_stride"):
            size = getattr(self, name)
            if isinstance(size, (tuple, list)) and len(size) != 2:
                raise ValueError(f"{name} must be one number or (height, width), got {len(size)} numbers: {size}.")
            for number in size if isinstance(size, (tuple, list)) else (size,):
                _require_int(name, number, minimum=1)
        if not isinstance(self.stem_channels, (tuple, list)):
            raise ValueError(
                f"stem_channels must be a list of numbers, one for each stage, got {self.stem_channels!r}."
            )
        for channels in self.stem_channels:
            _require_int("stem_channels", channels, minimum=1)
        stride = 2 ** len(self.stem_channels)
        for axis, patch in zip(("height", "width"), self.patch_hw, strict=True):
            if patch % stride:
                raise ValueError(
                    f"patch_size ({axis} {patch}) must be divisible by {stride}, which {len(self.stem_channels)} "
                    f"stem_channels halve an image to; use {math.ceil(patch / stride) * stride}, or fewer stages."
                )
        for axis, image, patch in zip(("height", "width"), self.image_hw, self.patch_hw, strict=True):
            if image % patch:
                fits = sorted({image // patch * patch or patch, (image // patch + 1) * patch})
                raise ValueError(
                    f"image_size ({axis} {image}) must be divisible by patch_size ({patch}); "
                    f"use {' or '.join(map(str, fits))}."
                )
        if self.hidden_size % self.num_attention_heads:
            fits = [h for h in range(1, self.hidden_size + 1) if self.hidden_size % h == 0]
            near = min(fits, key=lambda h: abs(h - self.num_attention_heads))
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads "
                f"({self.num_attention_heads}); the nearest number of heads that divides it is {near}."
            )
        if self.position_embedding_type == "sincos" and self.hidden_size % 4:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be divisible by 4 for position_embedding_type='sincos'; "
                f"use {math.ceil(self.hidden_size / 4) * 4}."
            )
        head_dim = self.hidden_size // self.num_attention_heads
        if self.position_embedding_type.endswith("rope") and head_dim % 4:
            raise ValueError(
                f"the width of a head ({self.hidden_size} / {self.num_attention_heads} = {head_dim}) must be divisible "
                f"by 4 for rotary positions; use hidden_size={math.ceil(head_dim / 4) * 4 * self.num_attention_heads}."
            )
        if self.pooling.startswith("cls") and not self.use_cls_token:
            raise ValueError(
                f"pooling={self.pooling!r} needs use_cls_token=True; use pooling='mean' without a class token."
            )
        if self.pooling == "attention" and self.use_cls_token:
            raise ValueError("pooling='attention' reads the patch tokens alone; use use_cls_token=False.")
        if self.num_cls_tokens > 1 and not self.use_cls_token:
            raise ValueError(f"num_cls_tokens ({self.num_cls_tokens}) needs use_cls_token=True.")
        if self.norm_after_pooling and not self.use_final_norm:
            raise ValueError("norm_after_pooling=True moves the final norm, so it needs use_final_norm=True.")

    def _validate_stages(self):
        count = self.num_hidden_layers + 1
        for index in self._out_indices:
            _require_int("out_indices", index, minimum=-count)
            if index >= count:
                raise ValueError(
                    f"out_indices asks for stage {index}, but there are {count}: use {-count} to {count - 1}."
                )
        positions = [index % count for index in self._out_indices]
        if positions != sorted(set(positions)):
            fits = sorted(set(positions))
            raise ValueError(f"out_indices {self._out_indices} must name each stage once, in order; use {fits}.")


def nearest(name: str, choices) -> str:
    """The choice that shares most words, then most letters, with a name nobody knows."""

    def likeness(choice):
        words = len(set(name.split("_")) & set(choice.split("_")))
        return words, difflib.SequenceMatcher(None, name, choice).ratio()

    return max(choices, key=likeness)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _require_int(name: str, value, minimum: int):
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {value!r} ({type(value).__name__}).")
    if value < minimum:
        raise ValueError(f"{name} ({value}) must be at least {minimum}.")


def _require_number(name: str, value, minimum: float, maximum: float = math.inf):
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {value!r} ({type(value).__name__}).")
    if not minimum <= value <= maximum or math.isinf(value):
        bounds = f"at least {minimum} and finite" if math.isinf(maximum) else f"in [{minimum}, {maximum}]"
        raise ValueError(f"{name} ({value}) must be {bounds}.")


def _require_choice(name: str, value, choices: tuple[str, ...]):
    if value not in choices:
        raise ValueError(
            f"{name} ({value!r}) is unknown; the nearest is {nearest(str(value), choices)!r}. "
            f"Known: {', '.join(choices)}."
        )


__all__ = ["ViTScratchConfig"]
