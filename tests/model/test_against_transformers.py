"""The same weights in transformers' ViT give the same numbers."""

import re

import pytest
import torch
from small_models import OBLONG, TINY, equal, images, make
from transformers import ViTConfig, ViTForImageClassification

from modeling_vit_scratch import ViTScratchForImageClassification

NAMES_IN_TRANSFORMERS = {
    "vit.embeddings.cls_token": "vit.embeddings.cls_token",
    "vit.embeddings.mask_token": "vit.embeddings.mask_token",
    "vit.embeddings.position_embeddings": "vit.embeddings.position_embeddings",
    "vit.embeddings.patch_embeddings.projection": "vit.embeddings.patch_embeddings.projection",
    "vit.layers.{}.norm1": "vit.layers.{}.layernorm_before",
    "vit.layers.{}.attention.proj": "vit.layers.{}.attention.o_proj",
    "vit.layers.{}.norm2": "vit.layers.{}.layernorm_after",
    "vit.layers.{}.mlp.fc1": "vit.layers.{}.mlp.fc1",
    "vit.layers.{}.mlp.fc2": "vit.layers.{}.mlp.fc2",
    "vit.norm": "vit.layernorm",
    "classifier": "classifier",
    "decoder": "decoder.0",
}


def weights_for_transformers(model):
    """Our state dict under the names and in the shapes of transformers' ViT."""
    state = {}
    for name, tensor in model.state_dict().items():
        module, kind = (name, "") if name.endswith(("token", "embeddings")) else name.rsplit(".", 1)
        kind = kind and f".{kind}"
        number = "".join(re.findall(r"layers\.(\d+)", module))
        module = re.sub(r"layers\.\d+", "layers.{}", module)
        if module.endswith("qkv"):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[f"vit.layers.{number}.attention.{letter}_proj{kind}"] = part
            continue
        if module.endswith("projection") and kind == ".weight":
            tensor = tensor.reshape(tensor.shape[0], model.config.num_channels, *model.config.patch_hw)
        if module == "decoder" and kind == ".weight":
            tensor = tensor[:, :, None, None]
        state[NAMES_IN_TRANSFORMERS[module].format(number) + kind] = tensor
    return state


def oracle(model, cls=ViTForImageClassification):
    """transformers' own model with the same weights."""
    shared = {name: value for name, value in model.config.to_dict().items() if hasattr(ViTConfig(), name)}
    for name in ("auto_map", "model_type", "architectures", "output_attentions"):
        shared.pop(name, None)
    if isinstance(shared["encoder_stride"], list):  # theirs is one number
        del shared["encoder_stride"]
    theirs = cls(ViTConfig(**shared, attn_implementation="eager")).eval()
    theirs.load_state_dict(weights_for_transformers(model), strict=True)
    return theirs


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
