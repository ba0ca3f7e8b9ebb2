"""The model that comes with the package: small, and the same function to the hundredth of a percent."""

import json

import pytest
import torch
from runs import CIFAR10_COPY, load_script
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images

from modeling_vit_scratch import ViTScratchConfig
from modeling_vit_scratch.conversion import PACKAGED_MODEL, convert_checkpoint, image_processor_for
from modeling_vit_scratch.data import records as records_module
from modeling_vit_scratch.data import sources as sources_module

TEST_ACCURACY = 86.77  # in float32, of 10,000 images of the JPEG copy
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module")
def packaged():
    model = convert_checkpoint(PACKAGED_MODEL)
    return model, image_processor_for(PACKAGED_MODEL, model)


def test_it_is_small_and_in_half_precision(packaged):
    model, _ = packaged
    assert sum(path.stat().st_size for path in PACKAGED_MODEL.iterdir()) <= 2e6
    assert {tensor.dtype for tensor in load_file(PACKAGED_MODEL / "model.safetensors").values()} == {torch.float16}
    assert model.num_parameters() <= 847_626 and model.dtype == torch.float32
    assert list(model.config.id2label.values()) == CLASSES
    assert {path.name for path in PACKAGED_MODEL.iterdir()} == {
        "config.json", "metrics.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip


def test_its_numbers_on_two_photographs(packaged):
    """Where the dataset is not at hand, no change bends the numerics unseen either."""
    model, processor = packaged
    with torch.no_grad():
        logits = model(**processor(load_sample_images().images, return_tensors="pt")).logits
    expected = [
        [0.2560, -0.6013, 0.2906, -0.7661, -0.7482, -0.3392, -1.1136, 0.7490, -0.2674, 3.6678],
        [-1.0879, -1.4904, 2.4592, 1.2255, -0.6657, 2.0843, -0.7242, -1.1320, -1.3785, -1.2227],
    ]
    torch.testing.assert_close(logits, torch.tensor(expected), atol=2e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10_COPY.exists(), reason="the JPEG copy of CIFAR-10 does not lie beside the checkout")
def test_accuracy_to_the_hundredth(packaged):
    model, processor = packaged
    records, names = records_module.load_records(sources_module.load_raw(str(CIFAR10_COPY)))
    assert names == CLASSES
    right = 0
    for start in range(0, 10_000, 500):
        images = records["test"].images(range(start, start + 500), 3)
        with torch.no_grad():
            logits = model(**processor(images, return_tensors="pt")).logits
        right += int((logits.argmax(1) == torch.from_numpy(records["test"].labels[start : start + 500])).sum())
    assert round(right / 100, 2) == TEST_ACCURACY


def test_predicting_needs_no_model_named(tmp_path, capsys):
    from PIL import Image

    Image.fromarray(load_sample_images().images[1]).save(tmp_path / "flower.jpg")
    assert load_script("predict").main([str(tmp_path / "flower.jpg"), "--json"]) == 0
    [result] = json.loads(capsys.readouterr().out)
    assert len(result["predictions"]) == 5
    assert {best["label"] for best in result["predictions"]} < set(CLASSES)
    assert ViTScratchConfig.from_pretrained(PACKAGED_MODEL).stem_channels
