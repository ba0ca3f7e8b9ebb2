"""Fixtures that several of these files use."""

import pytest
from foreign import CLASSES, SIZES, randomised

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification


def pytest_collection_modifyitems(items):
    """What is skipped where another library does not import is for the run that has it."""
    for item in items:
        if any("not import here" in mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif")):
            item.add_marker("peers")


@pytest.fixture
def own():
    config = ViTScratchConfig(
        **SIZES, intermediate_size=48, num_labels=CLASSES, num_register_tokens=2, layerscale_value=0.1
    )
    return randomised(ViTScratchForImageClassification(config))
