"""transformers' exporter to ONNX, for images of any number and size, on ONNX Runtime: and masks too."""

import sys

import torch
from transformers import AutoModelForImageClassification, AutoModelForMaskedImageModeling
from transformers.exporters import OnnxConfig, OnnxExporter

[folder] = sys.argv[1:]
trust = {"trust_remote_code": True}
Dim = torch.export.Dim
batch, h, w = Dim("batch", min=1, max=32), Dim("h", min=2, max=32), Dim("w", min=2, max=32)
example = {"pixel_values": torch.randn(2, 3, 20, 24), "interpolate_pos_encoding": True}
shapes = {"pixel_values": {0: batch, 2: 4 * h, 3: 4 * w}, "interpolate_pos_encoding": None}
for auto in (AutoModelForImageClassification, AutoModelForMaskedImageModeling):
    model = auto.from_pretrained(folder, **trust)
    exported = OnnxExporter().export(model, example, OnnxConfig(dynamic=True, dynamic_shapes=shapes))
    exported.save_pretrained(auto.__name__)
    for size in ((1, 3, 16, 16), (3, 3, 32, 8), (2, 3, 20, 24)):
        pixels = torch.randn(size)
        with torch.no_grad():
            expected = model(pixels, interpolate_pos_encoding=True)[0]
        found = exported(pixel_values=pixels)
        found = next(iter(found.values())) if hasattr(found, "values") else found[0]
        torch.testing.assert_close(torch.as_tensor(found), expected, atol=1e-4, rtol=0)

# The mask as a second input.
mask = torch.arange(32).reshape(2, 16) % 3 == 0
example = {"pixel_values": torch.randn(2, 3, 16, 16), "bool_masked_pos": mask}
exported = OnnxExporter().export(model, example, OnnxConfig())
found = exported(**example)
with torch.no_grad():
    expected = model(**example)
torch.testing.assert_close(torch.as_tensor(found["reconstruction"]), expected.reconstruction, atol=1e-4, rtol=0)
torch.testing.assert_close(torch.as_tensor(found["loss"]), expected.loss, atol=1e-4, rtol=0)
