"""timm's whole registry of Vision Transformers: each entry computes the same here, or is refused with the reason."""

import math
import re

import pytest
import torch
from foreign import needs_timm, timm
from transformers.activations import ACT2FN

from modeling_vit_scratch.conversion.architectures import REFUSED_ARCHITECTURES, family_of
from modeling_vit_scratch.conversion.families import REFUSED
from modeling_vit_scratch.conversion.loading import convert
from modeling_vit_scratch.conversion.planning import make_plan
from modeling_vit_scratch.conversion.reading import Checkpoint
from modeling_vit_scratch.conversion.recognition import recognise

PATTERNS = ["vit_*", "deit*", "flexivit*", "eva*", "beit*", "naflexvit*", "samvit*", "test_vit*"]
ENTRIES = [] if timm is None else timm.list_models(PATTERNS)
# The shares of the registry that a test looks at, so that processes can share them.
SHARES = 8
REASONS = {*REFUSED.values(), *REFUSED_ARCHITECTURES.values()}
# Of the largest output, in single precision.
TOLERANCE = 1e-5
POOL = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0))


def random_tensor(number: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Normal numbers, a stretch of the pool for each `number`: quicker than to draw them anew for each model."""
    size = math.prod(shape)
    start = number * 7919 % len(POOL)
    return POOL.repeat(2 + (start + size) // len(POOL))[start : start + size].view(shape)


def of_timm(name: str) -> tuple[torch.nn.Module, Checkpoint]:
    """timm's model without memory, and its checkpoint beside a config.json as timm writes it.

    Small ones are as they are; others have two blocks, the widest one, and images of 10 x 10 patches, for the sake of
    time.
    """
    arguments = {}
    if not re.search("tiny|test_", name):
        arguments = {"depth": 1 if re.search("huge|giant|gigantic|7b", name) else 2}
        if "naflexvit" not in name:
            patch = int(re.search(r"patch(\d+)", name)[1]) if "_patch" in name else 16
            arguments["img_size"] = 10 * patch
        elif "radio" in name:
            arguments["pos_embed_grid_size"] = (16, 16)  # its own 128 x 128 are for images of 2048 pixels
    if re.search("sapiens|samvit|_r(26|50)?_s|resnet|mci", name):
        arguments = {}  # whose stem or attention needs its own size
    with torch.device("meta"):
        model = timm.create_model(name, **arguments).eval()
    config = {"architecture": name, "global_pool": getattr(model, "global_pool", None), "model_args": arguments}
    pixels = [3, 256, 256] if "naflexvit" in name else list(model.pretrained_cfg["input_size"])
    return model, Checkpoint(model.state_dict(), name, {**config, "pretrained_cfg": {"input_size": pixels}})


@torch.no_grad()
def filled(model: torch.nn.Module) -> torch.nn.Module:
    """With memory, and random: weights keep their inputs' variance, and the residual stream is small, so that another
    epsilon changes it."""
    stored = set(model.state_dict())
    computed = [name for name, _ in model.named_buffers() if name not in stored]
    model = model.to_empty(device="cpu")
    for start, module in model.named_modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
            computed = [name for name in computed if name.rpartition(".")[0] != start]
    assert not computed, f"timm does not compute {computed} anew"
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        noise = random_tensor(number, tuple(tensor.shape))
        if re.search("norm", name):
            noise = 0.3 * noise + (0 if name.endswith("bias") else 1)
        elif re.search("token|pos_embed|patch_embed|embeds|attn.proj|mlp.(fc2|w3)", name):
            noise = noise * 0.01 / math.sqrt(math.prod(tensor.shape[1:]) if tensor.ndim in (2, 4) else 1)
        elif tensor.ndim > 1 and "freqs" not in name:
            noise = noise / math.sqrt(tensor.shape[-1])
        tensor.copy_(noise)
    return model


def planned(opened: Checkpoint):
    family, named = recognise(opened, None)
    return family, named, make_plan(opened, family, named, {}, new_head=False)


@torch.no_grad()
def assert_same_as_timm(name: str):
    model, opened = of_timm(name)
    theirs = filled(model)
    opened.tensors = theirs.state_dict()
    ours, headless = convert(opened, *planned(opened))
    assert headless == (theirs.num_classes == 0), name
    images = random_tensor(1, (1, 3, *ours.config.image_hw))
    expected = theirs(images)
    actual = ours.vit(images).pooler_output if headless else ours(images).logits
    assert expected.shape == actual.shape and expected.isfinite().all(), name
    difference, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert difference <= TOLERANCE * largest, f"{name}: {difference:.1e}, where the largest output is {largest:.1e}"
    # Two that change little of the output.
    assert ours.config.layer_norm_eps == theirs.blocks[0].norm1.eps, name
    wide = torch.linspace(-5, 5, 101)
    activation = ACT2FN[ours.config.hidden_act](wide)
    torch.testing.assert_close(activation, theirs.blocks[0].mlp.act(wide), msg=lambda text: f"{name}: {text}")


def assert_refused(name: str):
    with pytest.raises(ValueError, match="which this model has not") as caught:
        planned(of_timm(name)[1])
    assert any(f"has {reason}, " in str(caught.value) or f"with {reason}, " in str(caught.value) for reason in REASONS)


@needs_timm
@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
def test_each_vit_of_timm_that_the_catalogue_claims_computes_the_same(share):
    for name in [name for name in ENTRIES if family_of(name)][share::SHARES]:
        assert_same_as_timm(name)


@needs_timm
@pytest.mark.slow
def test_each_other_vit_of_timm_is_refused_with_the_reason():
    for name in ENTRIES:
        if not family_of(name):
            assert_refused(name)


@needs_timm
def test_the_catalogue_claims_most_of_timm():
    claimed = [name for name in ENTRIES if family_of(name)]
    assert len(claimed) >= 205 and len(ENTRIES) >= 285
    assert not [name for name in claimed if any(re.fullmatch(pattern, name) for pattern in REFUSED_ARCHITECTURES)]
