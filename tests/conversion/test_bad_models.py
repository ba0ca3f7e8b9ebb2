"""Configs and weights that are damaged or do not fit."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from bad_files import write
from safetensors.torch import load_file, save_file

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.conversion import convert_checkpoint

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def good_model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = ViTScratchConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        num_labels=3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("good") / "model"
    ViTScratchForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def model_folder(good_model, tmp_path) -> Path:
    return Path(shutil.copytree(good_model, tmp_path / "a model"))


def config_with(**changes):
    """... for a value removes the field."""

    def edit(folder: Path):
        fields = json.loads((folder / "config.json").read_text())
        fields = {name: value for name, value in {**fields, **changes}.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(fields))

    return edit


def weights_with(change):
    def edit(folder: Path):
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def bytes_with(change):
    def edit(folder: Path):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return edit


class Evil:
    """A pickle that writes a file when it is read."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def only_pickle(content: bytes | dict):
    def edit(folder: Path):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        if isinstance(content, bytes):
            (folder / "pytorch_model.bin").write_bytes(content)
        else:
            torch.save(tensors, folder / "pytorch_model.bin")

    return edit


QKV = "vit.layers.0.attention.qkv.weight"
BAD_MODELS = {
    # config.json
    "misspelt field": (
        config_with(hiden_size=8, hidden_size=...),
        "'hiden_size' is not a field .* the nearest is 'hidden_size'",
    ),
    "text for a number": (config_with(hidden_size="8"), "hidden_size must be a whole number, got '8' .str."),
    "fraction for a whole number": (config_with(num_hidden_layers=1.0), "num_hidden_layers must be a whole number"),
    "truth value for a number": (config_with(num_attention_heads=True), "num_attention_heads must be a whole number"),
    "text for a truth value": (config_with(qkv_bias="yes"), "qkv_bias must be True or False, got 'yes'"),
    "null": (config_with(hidden_size=None), "hidden_size must be a whole number, got None"),
    "negative": (config_with(hidden_size=-8), r"hidden_size \(-8\) must be at least 1"),
    "NaN": (config_with(hidden_dropout_prob=float("nan")), r"hidden_dropout_prob \(nan\) must be in"),
    "three sizes": (config_with(image_size=[8, 8, 8]), "image_size must be one number or .height, width."),
    "unknown pooling": (config_with(pooling="max"), "pooling .'max'. is unknown"),
    "another model type": (config_with(model_type="vit"), "config.json"),
    "no model type": (config_with(model_type=...), "config.json"),
    "size missing": (config_with(hidden_size=...), "of another shape"),
    "too few class names": (config_with(id2label={"0": "a"}), "of another shape"),
    "class names in a list": (config_with(id2label=["a", "b", "c"]), "id2label"),
    "no JSON": (lambda at: write(at / "config.json", "{"), "config.json is no JSON file"),
    "JSON, but no object": (lambda at: write(at / "config.json", "[]"), "config.json holds no JSON object"),
    "empty config": (lambda at: write(at / "config.json", ""), "config.json is no JSON file"),
    "no config": (lambda at: (at / "config.json").unlink(), "config.json"),
    # weights
    "missing tensor": (weights_with(lambda t: t.pop(QKV)), f"missing .*{QKV}"),
    "missing head": (
        weights_with(lambda t: t.pop("classifier.weight")),
        "missing .*classifier.weight",
    ),
    "extra tensor": (weights_with(lambda t: t.update(bogus=torch.zeros(2))), "left over .*bogus"),
    "misshapen tensor": (
        weights_with(lambda t: t.update({QKV: torch.zeros(3, 3)})),
        QKV,
    ),
    "NaN weights": (weights_with(lambda t: t[QKV].fill_(float("nan"))), f"NaN.*{QKV}"),
    "infinite weights": (weights_with(lambda t: t[QKV].fill_(float("inf"))), QKV),
    "empty file": (bytes_with(lambda content: b""), "cannot be loaded"),
    "truncated file": (bytes_with(lambda content: content[:-100]), "cannot be loaded"),
    "truncated header": (bytes_with(lambda content: content[:50]), "cannot be loaded"),
    "endless header": (bytes_with(lambda content: (2**60).to_bytes(8, "little") + b"{}"), "cannot be loaded"),
    "a pickle named safetensors": (bytes_with(lambda content: pickle.dumps(Evil())), "cannot be loaded"),
    "a pickle instead": (only_pickle(pickle.dumps(Evil())), "safetensors"),
    "an honest pickle instead": (only_pickle({}), "safetensors"),
    "no weights": (lambda at: (at / "model.safetensors").unlink(), "model.safetensors"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models_are_refused(name, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edit, message = BAD_MODELS[name]
    edit(model_folder)
    try:
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(str(model_folder))
    finally:
        if (tmp_path / "pwned").exists():
            os._exit(3)  # code of a checkpoint was run: no test result is worth anything any more


GOOD_MODELS = {
    "a field of somebody else": config_with(my_note="trained on Tuesday"),
    "a field with its default missing": config_with(layer_norm_eps=...),
    "half precision": weights_with(lambda t: t.update({name: tensor.half() for name, tensor in t.items()})),
}


@pytest.mark.parametrize("name", GOOD_MODELS)
def test_odd_models_are_loaded(name, model_folder, good_model):
    GOOD_MODELS[name](model_folder)
    pixels = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        logits = convert_checkpoint(str(model_folder)).float()(pixels).logits
        expected = ViTScratchForImageClassification.from_pretrained(good_model)(pixels).logits
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-2)


def test_the_tables_of_models_are_long_enough():
    assert len(BAD_MODELS) + len(GOOD_MODELS) >= 33
