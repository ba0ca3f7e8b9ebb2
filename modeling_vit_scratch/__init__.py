"""A Vision Transformer written from scratch that works with everything in transformers."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
)

try:
    from .configuration_vit_scratch import ViTScratchConfig
    from .modeling_vit_scratch import (
        ViTScratchBackbone,
        ViTScratchForImageClassification,
        ViTScratchForMaskedImageModeling,
        ViTScratchModel,
        ViTScratchPreTrainedModel,
    )
except ImportError as error:  # transformers imports torchvision where there is one
    if "torchvision" not in str(error.__cause__):
        raise
    raise ImportError(
        f"torchvision does not fit this PyTorch ({error.__cause__}): install the build that belongs to it, or "
        "uninstall it; this package does not need it."
    ) from None

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
