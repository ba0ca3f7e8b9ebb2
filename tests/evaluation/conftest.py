"""Models that know three colours, and images to measure them on."""

import pytest
import torch
from colours import BLUE, GREEN, RED, colour_model, paint_folder, save_trained


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_trained(colour_model(), tmp_path_factory.mktemp("knows colours"))


@pytest.fixture(scope="module")
def biased(tmp_path_factory) -> str:
    """Says red of everything."""
    model = colour_model()
    with torch.no_grad():
        model.classifier.bias[0] = 1000
    return save_trained(model, tmp_path_factory.mktemp("says red"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """10 images, one of them blue among the red ones."""
    folder = tmp_path_factory.mktemp("data") / "colours"
    return paint_folder(folder, red=[RED, RED, RED, BLUE], green=[GREEN] * 3, blue=[BLUE] * 3)
