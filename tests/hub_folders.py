"""Helpers for tests of the Hub: a small model's folder as a finished run leaves it, and ways to damage it."""

import hashlib
import json
import pickle
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTImageProcessorPil

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.hub import push as push_module
from modeling_vit_scratch.hub import write_model_card

CLASSES = ["airplane", "cat", "dog"]
CODE = {"configuration_vit_scratch.py", "modeling_vit_scratch.py"}
MODEL_FILES = CODE | {"config.json", "model.safetensors", "preprocessor_config.json"}
METRICS = {
    "task": "image-classification",
    "dataset": {
        "name": "uoft-cs/cifar10",
        "splits": {"train": 45000, "validation": 5000, "test": 10000},
        "class_names": CLASSES,
    },
    "model": {"parameters": 847626, "flops_per_image": 12345678},
    "training": {
        "epochs": 8.0,
        "optimizer": "adamw_torch",
        "learning_rate": 0.001,
        "augmentation": {"crop_padding": 4, "horizontal_flip": 0.5},
    },
    "validation": {"examples": 5000, "loss": 1.25, "accuracy": 0.6123, "top5_accuracy": 0.9512},
    "test": {
        "examples": 10000,
        "loss": 1.2345,
        "accuracy": 0.6184,
        "top5_accuracy": 0.9534,
        "per_class_accuracy": {"airplane": 0.71, "cat": 0.42, "dog": 0.55},
        "confusion_matrix": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    },
    "time": {"train_seconds": 300.0, "train_cpu_seconds": 290.0},
    "environment": {"hardware": "A processor, 2 cores", "python": "3.11.7", "torch": "2.13.0"},
    "command": "python scripts/finetune.py --num_train_epochs 8",
}


def make_model(seed: int = 0, **fields) -> ViTScratchForImageClassification:
    """A classifier small enough for tests, whose logits depend on everything."""
    torch.manual_seed(seed)
    names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    fields = {"image_size": 16, "hidden_size": 32, "intermediate_size": 32, **names, **fields}
    model = ViTScratchForImageClassification(ViTScratchConfig.preset("showcase", **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def make_processor(size: int = 16) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": size, "width": size})


def write_metrics(folder: Path, **changes):
    metrics = {key: value for key, value in {**METRICS, **changes}.items() if value is not None}
    (folder / "metrics.json").write_text(json.dumps(metrics))


def digest(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def edit_json(name, **changes):
    def damage(folder):
        content = json.loads((folder / name).read_text())
        content.update(changes)
        (folder / name).write_text(json.dumps(content))

    return damage


def edit_weights(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def edit_text(name, old, new):
    def damage(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return damage


def pickle_as(name):
    return lambda folder: (folder / name).write_bytes(pickle.dumps({"weights": [1.0]}))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """An output folder as a finished training leaves it."""
    folder = tmp_path_factory.mktemp("made") / "run"
    make_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    write_metrics(folder)
    (folder / "history.csv").write_text("step,loss\n1,2.3\n")
    (folder / "plots").mkdir()
    for name in ("confusion_matrix", "another", "training_curves"):
        Image.new("RGB", (4, 4)).save(folder / "plots" / f"{name}.png")
    write_model_card(folder)
    checkpoint = folder / "checkpoint-10"
    checkpoint.mkdir()
    (checkpoint / "optimizer.pt").write_bytes(b"\x80\x02.")
    for name in ("training_args.bin", "trainer_state.json", "run.log", ".secret", "samples.png"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture
def no_waiting(monkeypatch):
    """The client's pauses between its retries take no time."""
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))


def give_up_after(monkeypatch, seconds: float):
    """The next client, which is made on the next request, waits this long for a byte."""
    monkeypatch.setattr(push_module, "TIMEOUT_SECONDS", seconds)
    huggingface_hub.close_session()
