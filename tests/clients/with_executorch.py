"""transformers' exporter to ExecuTorch, for images of any size, on its runtime: masked image modelling.

A classifier was tried by hand, and is as near; each export takes most of a minute.
"""

import sys

import torch
from transformers import AutoModelForMaskedImageModeling
from transformers.exporters import ExecutorchConfig, ExecutorchExporter

[folder] = sys.argv[1:]
h, w = torch.export.Dim("h", min=2, max=16), torch.export.Dim("w", min=2, max=16)
shapes = {"pixel_values": {2: 4 * h, 3: 4 * w}, "interpolate_pos_encoding": None}
resize = {"interpolate_pos_encoding": True}
model = AutoModelForMaskedImageModeling.from_pretrained(folder, num_hidden_layers=1, trust_remote_code=True)
config = ExecutorchConfig(dynamic=True, dynamic_shapes=shapes)
exported = ExecutorchExporter().export(model, {"pixel_values": torch.randn(2, 3, 20, 24), **resize}, config)
for height, width in ((16, 16), (32, 8), (24, 20)):
    pixels = torch.randn(2, 3, height, width)
    with torch.no_grad():
        expected = model(pixels, **resize).reconstruction
    found = exported(pixel_values=pixels, **resize)[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)  # wrong where positions are moved another way
