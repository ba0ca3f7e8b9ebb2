"""transformers' exporter to ONNX, on ONNX Runtime: a classifier of images of any number and size, and masked images."""

import sys

import torch
from transformers import AutoModelForImageClassification, AutoModelForMaskedImageModeling
from transformers.exporters import OnnxConfig, OnnxExporter

[folder] = sys.argv[1:]
trust = {"trust_remote_code": True}
Dim = torch.export.Dim
batch, h, w = Dim("batch", min=1, max=32), Dim("h", min=2, max=32), Dim("w", min=2, max=32)


def near(found, expected):
    torch.testing.assert_close(torch.as_tensor(found), expected, atol=1e-4, rtol=0)


model = AutoModelForImageClassification.from_pretrained(folder, **trust)
example = {"pixel_values": torch.randn(2, 3, 20, 24), "interpolate_pos_encoding": True}
shapes = {"pixel_values": {0: batch, 2: 4 * h, 3: 4 * w}, "interpolate_pos_encoding": None}
exported = OnnxExporter().export(model, example, OnnxConfig(dynamic=True, dynamic_shapes=shapes))
for size in ((1, 3, 16, 16), (3, 3, 32, 8), (2, 3, 20, 24)):
    pixels = torch.randn(size)
    with torch.no_grad():
        near(exported(pixel_values=pixels)["logits"], model(pixels, interpolate_pos_encoding=True).logits)

model = AutoModelForMaskedImageModeling.from_pretrained(folder, **trust)
example = {"pixel_values": torch.randn(2, 3, 16, 16), "bool_masked_pos": torch.arange(32).reshape(2, 16) % 3 == 0}
shapes = {"pixel_values": {0: batch}, "bool_masked_pos": {0: batch}}
exported = OnnxExporter().export(model, example, OnnxConfig(dynamic=True, dynamic_shapes=shapes))
example = {"pixel_values": torch.randn(5, 3, 16, 16), "bool_masked_pos": torch.arange(80).reshape(5, 16) % 7 == 0}
found = exported(**example)
with torch.no_grad():
    expected = model(**example)
near(found["reconstruction"], expected.reconstruction)
near(found["loss"], expected.loss)
