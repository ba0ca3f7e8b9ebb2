"""Fixtures that several of these files use."""

import pytest
from foreign import CLASSES, SIZES, randomised

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification


@pytest.fixture
def own():
    config = ViTScratchConfig(
        **SIZES, intermediate_size=48, num_labels=CLASSES, num_register_tokens=2, layerscale_value=0.1
    )
    return randomised(ViTScratchForImageClassification(config))
