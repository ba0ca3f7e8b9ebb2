"""A Vision Transformer written from scratch that works with everything in transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_vit_scratch import ViTScratchConfig
from .modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchModel, ViTScratchPreTrainedModel

__version__ = "0.1.0"

AutoConfig.register("vit_scratch", ViTScratchConfig)
AutoModel.register(ViTScratchConfig, ViTScratchModel)
AutoModelForImageClassification.register(ViTScratchConfig, ViTScratchForImageClassification)

__all__ = [
    "ViTScratchConfig",
    "ViTScratchForImageClassification",
    "ViTScratchModel",
    "ViTScratchPreTrainedModel",
]
