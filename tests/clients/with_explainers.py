"""captum, torchinfo and scikit-learn: what a block attends to, a summary, and a classifier of features."""

import sys

import torch
import torchinfo
from captum.attr import IntegratedGradients, LayerGradCam, LayerIntegratedGradients
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoModelForImageClassification

[folder] = sys.argv[1:]
trust = {"trust_remote_code": True}
pixels = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
model = AutoModelForImageClassification.from_pretrained(folder, **trust)


def logits(pixel_values):
    return model(pixel_values).logits


# Integrated gradients sum to what the logit changes between the baseline and the image.
change = (logits(pixels) - logits(torch.zeros_like(pixels)))[:, 1]
for method in (IntegratedGradients(logits), LayerIntegratedGradients(logits, model.vit.layers[0])):
    found = method.attribute(pixels, target=1, n_steps=100)
    torch.testing.assert_close(found.flatten(1).sum(1).float(), change.detach(), atol=0.02, rtol=0.02)
assert found.shape == (12, 17, 32)  # tokens: the class token, then 4 x 4 patches
found = LayerGradCam(logits, model.vit.layers[-1].norm1).attribute(pixels, target=1, attr_dim_summation=True)
assert found.shape[0] == 12 and found.abs().max() > 0

summary = torchinfo.summary(model, input_data={"pixel_values": pixels[:1]}, verbose=0)
assert summary.total_params == sum(p.numel() for p in model.parameters())
assert "ViTScratchLayer" in str(summary)

with torch.no_grad():
    features = AutoModel.from_pretrained(folder, **trust)(pixels).pooler_output.numpy()
labels = [i % 3 for i in range(12)]
assert LogisticRegression(C=1e3, max_iter=1000).fit(features, labels).score(features, labels) == 1
