"""Positions for images of another size, as the source's own code resizes them; and new heads."""

import math
from functools import partial

import pytest
import scipy.ndimage
import torch
from foreign import (
    CLASSES,
    HEADS,
    assert_logits,
    images,
    jax_arrays,
    needs_timm,
    needs_torchvision,
    of_transformers,
    timm,
    timm_folder,
    timm_logits,
    timm_tensors,
    to_export,
    torchvision,
    torchvision_tensors,
)

from modeling_vit_scratch.conversion import convert_checkpoint, export_checkpoint


def test_a_grid_that_is_no_square():
    tensors = timm_tensors(patches=10)
    with pytest.raises(ValueError, match="no square grid"):
        convert_checkpoint(tensors, **HEADS)
    ours = convert_checkpoint(tensors, grid_size=(2, 5), **HEADS)
    assert ours.config.image_size == (16, 40)
    assert_logits(ours, lambda image: timm_logits(tensors, image))


@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "DeiTForImageClassification", "Dinov2Model", "Dinov2WithRegistersModel"]
)
@pytest.mark.parametrize("size", [40, (16, 48)])
def test_positions_are_resized_as_the_family_does(name, size, tmp_path, caplog):
    _, theirs = of_transformers(name)
    theirs.save_pretrained(tmp_path)
    ours = convert_checkpoint(tmp_path, image_size=size)
    assert ours.config.image_hw == (size if isinstance(size, tuple) else (size, size))
    assert "Resized the positions from 3x3 to" in caplog.text
    extra = {} if name.startswith("Dinov2") else {"interpolate_pos_encoding": True}
    pixels = images(ours).float()
    with torch.no_grad():  # in single precision, in which DINOv2 resizes
        expected, actual = theirs(pixels, output_hidden_states=True, **extra), ours(pixels, output_hidden_states=True)
    for state, wanted in zip(actual.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state, wanted, atol=1e-6, rtol=1e-4)


def positions_of(kind: str, side: int = 6, D: int = 32) -> torch.Tensor:
    """(1, 1 + side * side, D): a class token's, and those of a square grid, as in a trained model or of white noise."""
    generator = torch.Generator().manual_seed(2)
    positions = torch.randn(1, 1 + side * side, D, generator=generator)
    if kind == "smooth":
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        waves = torch.rand(2, D, 1, 1, generator=generator) / side * 3
        positions[0, 1:] = torch.sin(waves[0] * x + waves[1] * y).flatten(1).T
    return positions


def resized_as_torch_does(positions: torch.Tensor, **how) -> torch.Tensor:
    """As `torch.nn.functional.interpolate` does it, with what the library passes to it."""
    side = math.isqrt(positions.shape[1] - 1)
    patches = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(patches, mode="bicubic", **how)
    return torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def resized_by_meta(positions: torch.Tensor, grid: tuple[int, int], offset: float, antialias: bool) -> torch.Tensor:
    """The arithmetic of interpolate_pos_encoding in facebookresearch/dinov2, dinov2/models/vision_transformer.py.

    hub/backbones.py makes the models with offset 0.1 and no antialiasing, those with registers with 0.0 and with it;
    facebookresearch/dino, vision_transformer.py, has 0.1 written into it.
    """
    side = math.isqrt(positions.shape[1] - 1)
    if not offset:
        return resized_as_torch_does(positions, size=grid, antialias=antialias)
    scales = tuple((count + offset) / side for count in grid)
    return resized_as_torch_does(positions, scale_factor=scales, antialias=antialias)


def resized_by_google(positions: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The call of load_pretrained in google-research/vision_transformer, vit_jax/checkpoint.py."""
    side = math.isqrt(positions.shape[1] - 1)
    patches = positions[0, 1:].numpy().reshape(side, side, -1)
    patches = scipy.ndimage.zoom(patches, (grid[0] / side, grid[1] / side, 1), order=1)
    return torch.cat([positions[:, :1], torch.from_numpy(patches).reshape(1, grid[0] * grid[1], -1)], dim=1)


def resized_by_torchvision(positions: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    state = {"encoder.pos_embedding": positions}
    return torchvision.models.vision_transformer.interpolate_embeddings(8 * grid[0], 8, state)["encoder.pos_embedding"]


def meta_tensors(registers: int, **changes) -> dict[str, torch.Tensor]:
    tensors = timm_tensors(registers=registers, scale="ls{}.gamma", classes=None, register="register_tokens", **changes)
    return {**tensors, "mask_token": torch.ones(1, 32)}


# By source: a checkpoint of 6 x 6 patches, the name of its positions, and the library's own resizing.
RESIZED = {
    "timm": (timm_tensors, "pos_embed", lambda p, grid: timm.layers.resample_abs_pos_embed(p, list(grid))),
    "torchvision": (torchvision_tensors, "encoder.pos_embedding", resized_by_torchvision),
    "jax": (jax_arrays, "Transformer/posembed_input/pos_embedding", resized_by_google),
    "dino": (partial(timm_tensors, classes=None), "pos_embed", partial(resized_by_meta, offset=0.1, antialias=False)),
    "dinov2": (partial(meta_tensors, 0), "pos_embed", partial(resized_by_meta, offset=0.1, antialias=False)),
    "dinov2_with_registers": (
        partial(meta_tensors, 4), "pos_embed", partial(resized_by_meta, offset=0.0, antialias=True),
    ),
    # interpolate_pos_embed in facebookresearch/mae, util/pos_embed.py, and main.py of facebookresearch/deit
    "mae": (timm_tensors, "pos_embed", lambda p, grid: resized_as_torch_does(p, size=grid, align_corners=False)),
    "deit": (timm_tensors, "pos_embed", lambda p, grid: resized_as_torch_does(p, size=grid, align_corners=False)),
}  # fmt: skip
OWN_LIBRARY = {"timm": [needs_timm], "torchvision": [needs_torchvision]}


@pytest.mark.parametrize("size", [32, 80, (24, 96), (48, 40)], ids=str)
@pytest.mark.parametrize("kind", ["smooth", "random"])
@pytest.mark.parametrize("source", [pytest.param(source, marks=OWN_LIBRARY.get(source, ())) for source in RESIZED])
def test_positions_are_resized_by_the_library_of_the_source(source, kind, size):
    """At load, and at run time, to the bit the same."""
    if source == "torchvision" and isinstance(size, tuple):
        size = 56  # its function knows squares alone
    make, name, resize = RESIZED[source]
    positions = positions_of(kind)
    tensors = {**make(patches=36), name: positions}
    if source == "jax":
        tensors[name] = positions.numpy()
    ours, resized = (convert_checkpoint(tensors, source, **HEADS, **more) for more in ({}, {"image_size": size}))
    grid = resized.config.grid_hw
    there = resized.vit.embeddings.position_embeddings
    torch.testing.assert_close(there, resize(positions.clone(), grid), atol=2e-5, rtol=0)
    assert torch.equal(ours.vit.embeddings.interpolate_pos_encoding(grid), there)
    pixels = images(resized).float()
    with torch.no_grad():
        assert torch.equal(ours(pixels, interpolate_pos_encoding=True).logits, resized(pixels).logits)
    assert ours.config.position_interpolation == resized.config.position_interpolation
    others = {"bicubic", "bicubic_antialias", "bicubic_align_corners", "bicubic_offset", "bilinear_align_corners"}
    for other in others - {ours.config.position_interpolation}:
        hints = {**HEADS, "image_size": size, "position_interpolation": other}
        elsewhere = convert_checkpoint(tensors, source, **hints).vit.embeddings.position_embeddings
        if not ("antialias" in ours.config.position_interpolation + other and 80 == size):
            assert (elsewhere - there).abs().max() > 1e-3, other  # the comparison could tell


@needs_timm
@pytest.mark.parametrize("size", [(32, 32), (24, 80)], ids=str)
def test_timm_computes_the_same_at_another_size(size):
    """timm resizes at run time too, and its file of the larger model is what it resizes at load."""
    tensors = {**timm_tensors(patches=36), "pos_embed": positions_of("random")}
    shared = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 1.5, "num_classes": CLASSES}
    dynamic = timm.models.VisionTransformer(img_size=48, dynamic_img_size=True, **shared).eval()
    dynamic.load_state_dict(tensors)
    larger = timm.models.VisionTransformer(img_size=size, **shared).eval()
    larger.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(dict(tensors), larger))
    ours = convert_checkpoint(tensors, image_size=size, **HEADS)
    pixels = images(ours).float()
    with torch.no_grad():
        for theirs in (dynamic, larger):
            torch.testing.assert_close(ours(pixels).logits, theirs(pixels), atol=1e-3, rtol=1e-4)


@needs_torchvision
def test_torchvision_computes_the_same_at_another_size():
    tensors = {**torchvision_tensors(patches=36), "encoder.pos_embedding": positions_of("random")}
    theirs = torchvision.models.VisionTransformer(32, 8, 3, 4, 32, 48, num_classes=CLASSES).eval()
    theirs.load_state_dict(torchvision.models.vision_transformer.interpolate_embeddings(32, 8, dict(tensors)))
    ours = convert_checkpoint(tensors, **HEADS)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = ours(pixels, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(logits, theirs(pixels), atol=1e-3, rtol=1e-4)


def test_transformers_classes_resize_their_own_way():
    """facebook's DINO and DINOv2 as transformers' classes have no offset, which Meta's code has."""
    for name, source, how in [
        ("ViTForImageClassification", "dino", "bicubic"),
        ("Dinov2Model", "dinov2", "bicubic"),
        ("Dinov2WithRegistersModel", "dinov2_with_registers", "bicubic_antialias"),
        ("ViTMAEModel", "mae", "bicubic"),
        ("DeiTModel", "deit", "bicubic"),
    ]:
        ours = convert_checkpoint(of_transformers(name)[1].state_dict(), source, **HEADS)
        assert ours.config.position_interpolation == how


@pytest.mark.parametrize(
    ("architecture", "how"),
    [
        ("vit_base_patch16_224", "bicubic_antialias"),
        ("flexivit_small", "bilinear"),
        ("vit_base_patch16_radio_v3_224", "bilinear_align_corners"),
    ],
)
def test_timm_architectures_that_resize_another_way(architecture, how, tmp_path):
    ours = convert_checkpoint(timm_folder(tmp_path, architecture=architecture), use_final_norm=True)
    assert ours.config.position_interpolation == how


def test_a_library_that_resizes_another_way_is_named(caplog):
    _, model = to_export("timm")
    export_checkpoint(model, "timm")
    assert "For images of another size timm resizes positions as 'bicubic_antialias', this model as" in caplog.text
    model.config.position_interpolation = "bicubic_antialias"
    caplog.clear()
    export_checkpoint(model, "timm")
    assert "resizes positions" not in caplog.text


def test_own_folder_keeps_the_way_of_its_source(tmp_path):
    """A folder that was saved after fine-tuning goes on as it began."""
    tensors = {**timm_tensors(patches=36), "pos_embed": positions_of("random")}
    convert_checkpoint(tensors, num_labels=3, image_size=32, **HEADS).save_pretrained(tmp_path)
    ours, resized = convert_checkpoint(tmp_path), convert_checkpoint(tmp_path, image_size=80)
    assert ours.config.position_interpolation == resized.config.position_interpolation == "bicubic_antialias"
    there = resized.vit.embeddings.position_embeddings
    assert torch.equal(ours.vit.embeddings.interpolate_pos_encoding((10, 10)), there)


def test_the_same_resolution_is_no_change(caplog):
    convert_checkpoint(timm_tensors(), image_size=24, num_labels=CLASSES, **HEADS)
    assert "Resized" not in caplog.text and "new head" not in caplog.text
    with pytest.raises(ValueError, match="must be divisible by patch_size"):
        convert_checkpoint(timm_tensors(), image_size=30, **HEADS)


def test_other_classes_make_the_head_anew(caplog):
    tensors = timm_tensors()
    old, new = convert_checkpoint(tensors, **HEADS), convert_checkpoint(tensors, num_labels=3, **HEADS)
    assert "Made a new head for 3 classes" in caplog.text
    assert new.classifier.weight.shape == (3, 32) and not new.classifier.weight.any() and not new.classifier.bias.any()
    assert new.classifier.weight.requires_grad and new.config.id2label == {i: f"LABEL_{i}" for i in range(3)}
    for name, tensor in old.vit.state_dict().items():
        assert torch.equal(tensor, new.vit.state_dict()[name])
    with pytest.raises(ValueError, match=r"num_labels \(-3\) must be at least 0"):
        convert_checkpoint(tensors, num_labels=-3, **HEADS)
