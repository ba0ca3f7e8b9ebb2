"""The same weights in transformers' ViT give the same numbers."""

import pytest
import torch
from small_models import OBLONG, TINY, equal, images, make, oracle, weights_for_transformers

from modeling_vit_scratch import ViTScratchForImageClassification


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("fields", [TINY, OBLONG, {**TINY, "qkv_bias": False, "num_channels": 1}])
def test_equals_transformers(fields, implementation):
    model = make(ViTScratchForImageClassification, fields, attn_implementation=implementation)
    x = images(model)
    with torch.no_grad():
        ours = model(x, output_hidden_states=True, output_attentions=True)
        theirs = oracle(model)(x, output_hidden_states=True, output_attentions=True)
        plain = model(x)
    equal(ours.logits, theirs.logits, 1e-5)
    equal(plain.logits, theirs.logits, 1e-5)
    for name in ("hidden_states", "attentions"):
        assert len(ours[name]) == len(theirs[name]) > 0
        for a, b in zip(ours[name], theirs[name], strict=True):
            equal(a, b, 2e-5)
    # The comparison means something: attention is far from uniform, and images differ.
    tokens = ours.attentions[0].shape[-1]
    assert ours.attentions[0].amax(-1).mean() > 3 / tokens
    assert ours.logits.std(dim=0).mean() > 0.1


def test_gradients_equal_transformers():
    model = make(ViTScratchForImageClassification)
    theirs = oracle(model)
    x, labels = images(model), torch.tensor([0, 3, 4])
    ours_loss, theirs_loss = model(x, labels=labels).loss, theirs(x, labels=labels).loss
    equal(ours_loss, theirs_loss, 1e-5)
    ours_loss.backward()
    theirs_loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.grad)
    for name, gradient in weights_for_transformers(model).items():
        equal(gradient, gradients[name], 2e-5)


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (8, 20), (4, 4)])
def test_interpolation_equals_transformers(size):
    model = make(ViTScratchForImageClassification)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        ours = model(x, interpolate_pos_encoding=True).logits
        equal(ours, oracle(model)(x, interpolate_pos_encoding=True).logits, 1e-5)
