"""A Vision Transformer written from scratch that works with everything in transformers."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
)

from .configuration_vit_scratch import ViTScratchConfig
from .modeling_vit_scratch import (
    ViTScratchBackbone,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchModel,
    ViTScratchPreTrainedModel,
)

__version__ = "0.2.0"

AutoConfig.register("vit_scratch", ViTScratchConfig)
AutoModel.register(ViTScratchConfig, ViTScratchModel)
AutoModelForImageClassification.register(ViTScratchConfig, ViTScratchForImageClassification)
AutoModelForMaskedImageModeling.register(ViTScratchConfig, ViTScratchForMaskedImageModeling)
AutoBackbone.register(ViTScratchConfig, ViTScratchBackbone)

__all__ = [
    "ViTScratchBackbone",
    "ViTScratchConfig",
    "ViTScratchForImageClassification",
    "ViTScratchForMaskedImageModeling",
    "ViTScratchModel",
    "ViTScratchPreTrainedModel",
]
