"""Files, our own folders, and the Hub."""

import json
import logging
import os
import pickle

import numpy as np
import pytest
import torch
import transformers
from foreign import (
    HEADS,
    SIZES,
    assert_logits,
    assert_same,
    jax_arrays,
    of_transformers,
    randomised,
    timm_folder,
    timm_logits,
    timm_tensors,
)
from hub_server import put_on_hub
from safetensors.torch import load_file, save_file

from modeling_vit_scratch import (
    ViTScratchBackbone,
    ViTScratchConfig,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchModel,
    conversion,
)
from modeling_vit_scratch.conversion import convert_checkpoint, image_processor_for
from modeling_vit_scratch.conversion import reading as reading_module


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin", "legacy .bin", ".npz", "sharded"])
def test_every_kind_of_file(suffix, tmp_path):
    tensors = timm_tensors()
    path = tmp_path / f"weights{suffix.removeprefix('legacy ')}"
    if suffix == ".safetensors":
        save_file(tensors, path)
    elif suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif suffix == "sharded":
        names = list(tensors)
        halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, part in halves.items():
            save_file({name: tensors[name] for name in part}, tmp_path / file)
        index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        path = tmp_path
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=not suffix.startswith("legacy"))
    ours = convert_checkpoint(str(path), **HEADS)
    assert_logits(ours, lambda image: timm_logits(tensors, image))


def test_half_precision_becomes_float32(caplog):
    tensors = {name: tensor.bfloat16() for name, tensor in timm_tensors().items()}
    ours = convert_checkpoint(tensors, **HEADS)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert "Weights of bfloat16 became float32" in caplog.text
    assert_logits(ours, lambda image: timm_logits({n: t.float() for n, t in tensors.items()}, image))


def test_the_model_does_not_share_memory_with_the_state_dict():
    tensors = timm_tensors()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    ours = convert_checkpoint(tensors, **HEADS)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert all(parameter.requires_grad for parameter in ours.parameters())
    assert all(torch.equal(tensors[name], before[name]) for name in before)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": timm_tensors(), "args": Evil()}, "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth.*nothing else is unpickled"):
        convert_checkpoint("evil.pth")
    with open("evil.bin", "wb") as file:
        pickle.dump(Evil(), file)
    with pytest.raises(ValueError, match=r"evil\.bin"):
        convert_checkpoint("evil.bin")
    np.savez("evil.npz", **{"embedding/kernel": np.array([Evil()], dtype=object)}, allow_pickle=True)
    with pytest.raises(ValueError, match=r"evil\.npz"):
        convert_checkpoint("evil.npz")
    assert not os.path.exists("evil")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"\x00" * 64, b"PK\x03\x04 torn", b"{}"])
def test_a_file_that_is_no_checkpoint(suffix, content, tmp_path):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\."):
        convert_checkpoint(path)


def test_torn_files(tmp_path):
    save_file(timm_tensors(), tmp_path / "whole.safetensors")
    np.savez(tmp_path / "whole.npz", **jax_arrays())
    torch.save(timm_tensors(), tmp_path / "whole.pt")
    for whole in list(tmp_path.iterdir()):
        torn = whole.with_stem("torn")
        torn.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        with pytest.raises(ValueError, match=r"torn\."):
            convert_checkpoint(torn, **HEADS)


@pytest.mark.parametrize("kind", ["V2", ">f4", "object"])  # V2: bfloat16, as numpy saves it
def test_arrays_that_torch_cannot_hold_are_named(kind, tmp_path):
    np.savez(tmp_path / "odd.npz", **{name: array.astype(kind) for name, array in jax_arrays().items()})
    with pytest.raises(ValueError, match="embedding/kernel cannot be read"):
        convert_checkpoint(tmp_path / "odd.npz")


def test_a_damaged_array_is_named(tmp_path):
    np.savez(tmp_path / "whole.npz", **jax_arrays())
    content = bytearray((tmp_path / "whole.npz").read_bytes())
    content[content.index(jax_arrays()["cls"].tobytes())] ^= 1
    (tmp_path / "damaged.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"cls cannot be read: Bad CRC-32"):
        convert_checkpoint(tmp_path / "damaged.npz")


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({}, "holds no named tensors"),
        ({"a": 1}, "no state dict"),
        ({"model": {}}, "holds no named tensors"),
        ({"layer1.0.conv1.weight": torch.ones(3)}, "was not recognised"),
        ({"patch_embed.proj.weight": torch.ones(4, 3, 2, 2)}, "no blocks"),
        ("no/such/file.safetensors", "no file or folder"),
        ("weights.npz", "no file or folder"),
        ("no/such/folder", "no file or folder"),
    ],
    ids=str,
)
def test_what_is_no_checkpoint(checkpoint, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(checkpoint)


def test_a_folder_without_or_with_two_files_of_weights(tmp_path):
    with pytest.raises(ValueError, match="must hold one file of weights, found none"):
        convert_checkpoint(tmp_path)
    for name in ("a.pth", "b.pth"):
        torch.save(timm_tensors(), tmp_path / name)
    with pytest.raises(ValueError, match=r"found a\.pth, b\.pth"):
        convert_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="by its name"):
        convert_checkpoint(tmp_path / "notes.txt")


def test_own_weights_without_their_config_are_refused():
    own = ViTScratchForImageClassification(ViTScratchConfig(**SIZES, intermediate_size=48))
    with pytest.raises(ValueError, match=r"this package's own.*config\.json beside them, and no source"):
        convert_checkpoint(own.state_dict())


def test_own_folder(own, tmp_path, caplog):
    own.save_pretrained(tmp_path)
    same = convert_checkpoint(tmp_path)
    fields = ViTScratchConfig.__dataclass_fields__
    assert all(getattr(same.config, name) == getattr(own.config, name) for name in fields if name in SIZES)
    assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in same.state_dict().items())
    other = convert_checkpoint(tmp_path / "model.safetensors", image_size=(16, 48), num_labels=3, drop_path_rate=0.2)
    assert other.config.image_size == (16, 48) and other.config.num_labels == 3
    assert other.vit.layers[-1].drop_path.p == 0.2
    assert "Resized the positions" in caplog.text and "Made a new head for 3 classes" in caplog.text
    pixels = torch.randn(1, 3, 16, 48)
    expected = own.vit(pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(other.vit(pixels).last_hidden_state, expected)
    with pytest.raises(ValueError, match="'drop_path' is not a field"):
        convert_checkpoint(tmp_path, drop_path=0.2)
    with pytest.raises(ValueError, match="of another shape"):
        convert_checkpoint(tmp_path, intermediate_size=64)


def test_outputs_have_names_even_if_the_config_says_tuples(own, tmp_path):
    pixels = torch.randn(1, 3, 24, 24)
    expected = own(pixels).logits
    own.config.return_dict = False
    own.save_pretrained(tmp_path)
    torch.testing.assert_close(convert_checkpoint(tmp_path)(pixels).logits, expected)
    assert convert_checkpoint(tmp_path).vit(pixels).pooler_output.shape == (1, 32)
    for model in (
        ViTScratchForImageClassification.from_pretrained(tmp_path),
        convert_checkpoint(tmp_path, return_dict=False),
    ):
        assert isinstance(model(pixels), tuple)


def test_own_fixed_positions(tmp_path):
    config = ViTScratchConfig(**SIZES, intermediate_size=48, position_embedding_type="sincos")
    model = randomised(ViTScratchForImageClassification(config))
    model.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 24, 24)
    torch.testing.assert_close(convert_checkpoint(tmp_path)(pixels).logits, model(pixels).logits)
    larger = convert_checkpoint(tmp_path, image_size=40)
    assert larger.vit.embeddings.position_embeddings.shape == (1, 26, 32)
    fresh = ViTScratchForImageClassification(larger.config).vit.embeddings.position_embeddings
    torch.testing.assert_close(larger.vit.embeddings.position_embeddings, fresh)


@pytest.mark.parametrize("norm_after_pooling", [False, True])
def test_own_folder_without_a_classifier(tmp_path, caplog, monkeypatch, norm_after_pooling):
    """A new classifier; and a new norm before it, where the class has none."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # its reports would be in caplog, too
    fields = {**SIZES, "intermediate_size": 48, "encoder_stride": 8, "norm_after_pooling": norm_after_pooling}
    for cls in (ViTScratchModel, ViTScratchForMaskedImageModeling, ViTScratchBackbone):
        model = randomised(cls(ViTScratchConfig(**fields)))
        model.save_pretrained(tmp_path / cls.__name__)
        ours = convert_checkpoint(tmp_path / cls.__name__, num_labels=3)
        encoder = getattr(model, "vit", model).state_dict()
        new = {"pooled_norm.weight": torch.ones(32), "pooled_norm.bias": torch.zeros(32)}
        for key, tensor in ours.vit.state_dict().items():
            assert torch.equal(tensor, encoder[key] if key in encoder else new[key])
        assert not ours.classifier.weight.any()
    assert "Left out the pre-training decoder" in caplog.text and "Made a new head for 3 classes" in caplog.text
    assert all(record.name.startswith(conversion.__name__) for record in caplog.records)


def test_a_file_of_its_own_beside_our_config(own, tmp_path):
    own.save_pretrained(tmp_path)
    torch.save(timm_tensors(), tmp_path / "other.pth")
    (tmp_path / "config.json").rename(tmp_path / "ours.json")
    ours = convert_checkpoint(tmp_path / "other.pth", **HEADS)
    assert_logits(ours, lambda image: timm_logits(timm_tensors(), image))
    (tmp_path / "ours.json").rename(tmp_path / "config.json")
    ours = convert_checkpoint(tmp_path / "other.pth")  # the file that was named, not ours
    assert_logits(ours, lambda image: timm_logits(timm_tensors(), image))


def test_own_encoder_that_lost_its_norm_after_pooling(tmp_path):
    config = ViTScratchConfig(**SIZES, intermediate_size=48, norm_after_pooling=True)
    ViTScratchModel(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["pooled_norm.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing are 1 \(vit\.pooled_norm\.bias\)"):
        convert_checkpoint(tmp_path)


def test_own_folder_with_missing_tensors(own, tmp_path):
    own.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["vit.layers.1.mlp.fc1.bias"]
    save_file(tensors | {"odd": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing are 1 \(vit\.layers\.1\.mlp\.fc1\.bias\); left over are 1 \(odd\)"):
        convert_checkpoint(tmp_path)


def test_hub_id_of_transformers(hub, tmp_path):
    _, theirs = of_transformers("ViTForImageClassification")
    theirs.save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessorPil(size={"height": 24, "width": 24}, resample=3).save_pretrained(tmp_path / "vit")
    put_on_hub(hub, "google/vit", tmp_path / "vit")
    ours = convert_checkpoint("google/vit")
    assert_same(ours, theirs)
    assert image_processor_for("google/vit", ours).resample == 3
    assert not any("pytorch_model.bin" in path for _, path in hub.requests)


def test_a_download_shows_its_progress(hub, tmp_path, monkeypatch):
    """Where transformers' own bars are switched off, as the scripts do, too."""
    folder = timm_folder(tmp_path / "timm")
    put_on_hub(hub, "timm/vit", folder)
    loaded = {}

    def update(bar, n=1):
        assert not bar.disable and bar.delay == 2 and bar.total
        loaded[bar.total] = loaded.get(bar.total, 0) + n

    monkeypatch.setattr(reading_module._DownloadBar, "update", update)
    transformers.utils.logging.disable_progress_bar()
    try:
        convert_checkpoint("timm/vit")
    finally:
        transformers.utils.logging.enable_progress_bar()
    size = (folder / "model.safetensors").stat().st_size
    assert loaded[size] == size


def test_hub_id_of_timm_on_a_branch(hub, tmp_path):
    put_on_hub(hub, "timm/vit", timm_folder(tmp_path / "timm"), ref="v2")
    ours = convert_checkpoint("timm/vit", revision="v2")
    assert_logits(ours, lambda image: timm_logits(timm_tensors(), image))
    assert image_processor_for("timm/vit", ours, revision="v2").crop_size["height"] == 24


def test_hub_id_with_shards_or_torch_files(hub, tmp_path):
    for name, limit in {"shards": "20KB", "bin": None}.items():
        _, theirs = of_transformers("ViTForImageClassification")
        theirs.save_pretrained(tmp_path / name, max_shard_size=limit or "5GB")
        if name == "bin":
            torch.save(load_file(tmp_path / "bin" / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
            (tmp_path / "bin" / "model.safetensors").unlink()
        put_on_hub(hub, f"google/{name}", tmp_path / name)
        assert_same(convert_checkpoint(f"google/{name}"), theirs)


def test_hub_id_of_our_own(hub, own, tmp_path):
    own.save_pretrained(tmp_path / "own")
    put_on_hub(hub, "me/own", tmp_path / "own")
    ours = convert_checkpoint("me/own", num_labels=3)
    assert torch.equal(ours.vit.norm.weight, own.vit.norm.weight) and ours.config.num_labels == 3


def test_what_the_hub_does_not_have(hub, tmp_path):
    with pytest.raises(ValueError, match=r"nobody/nothing is no file or folder here, and the Hub did not .*404"):
        convert_checkpoint("nobody/nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    put_on_hub(hub, "me/empty", tmp_path / "empty")
    with pytest.raises(ValueError, match=r"the Hub's me/empty holds none of model\.safetensors"):
        convert_checkpoint("me/empty")


def test_without_the_hub_the_cache_is_used(hub, tmp_path, monkeypatch):
    put_on_hub(hub, "timm/vit", timm_folder(tmp_path / "timm"))
    convert_checkpoint("timm/vit")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    count = len(hub.requests)
    ours = convert_checkpoint("timm/vit")
    assert image_processor_for("timm/vit", ours).crop_size["height"] == 24 and len(hub.requests) == count
    with pytest.raises(ValueError, match="me/other is no file or folder here, and the Hub did not give it"):
        convert_checkpoint("me/other")


def test_a_hub_that_cannot_be_reached_is_asked_once(hub, tmp_path, monkeypatch):
    """A download would ask again and again, for half a minute."""
    put_on_hub(hub, "timm/vit", timm_folder(tmp_path / "timm"))
    convert_checkpoint("timm/vit")
    hub.stop()

    def wait(seconds):
        raise AssertionError("asked again")

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", wait)
    assert_logits(convert_checkpoint("timm/vit"), lambda image: timm_logits(timm_tensors(), image))
    with pytest.raises(ValueError, match=r"me/other is no file or folder here, .*: .*refused"):
        convert_checkpoint("me/other")
