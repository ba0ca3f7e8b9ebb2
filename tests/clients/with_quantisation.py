"""torchao through `quantization_config`: loaded, saved, and loaded again, with the folder's classes and with others."""

import sys

import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForImageClassification, TorchAoConfig

[folder] = sys.argv[1:]
trust = {"trust_remote_code": True}
pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ways = {
    "int8": Int8WeightOnlyConfig(),
    "int8_and_activations": Int8DynamicActivationInt8WeightConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
}


@torch.no_grad()
def check(name, model):
    """The logits; they and the features are the same of the folder that it saves."""
    assert "torchao" in type(model.vit.layers[0].mlp.fc1.weight).__module__
    logits, features = model(pixels).logits, model.vit(pixels).pooler_output
    assert features.std() > 0.1
    model.save_pretrained(name)
    loaded = AutoModelForImageClassification.from_pretrained(name, **trust)
    assert torch.equal(loaded(pixels).logits, logits), name
    assert torch.equal(loaded.vit(pixels).pooler_output, features), name
    return logits


with torch.no_grad():
    expected = AutoModelForImageClassification.from_pretrained(folder, **trust)(pixels).logits
for name, way in ways.items():
    options = {"quantization_config": TorchAoConfig(way), **trust}
    logits = check(name, AutoModelForImageClassification.from_pretrained(folder, **options))
    difference = (logits - expected).abs().max() / expected.abs().max()
    assert 0 < difference < (0.5 if name == "int4" else 0.1), (name, difference)
    # A new classifier is not quantised: transformers would keep the old one's rows.
    options["quantization_config"] = TorchAoConfig(way, modules_to_not_convert=["classifier"])
    names = {i: str(i) for i in range(7)}
    options |= {"id2label": names, "label2id": {name: i for i, name in names.items()}, "ignore_mismatched_sizes": True}
    logits = check(f"{name}_of_7", AutoModelForImageClassification.from_pretrained(folder, **options))
    assert logits.shape == (4, 7) and (logits == 0).all()  # which starts at 0
