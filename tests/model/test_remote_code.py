"""A saved folder in a process that cannot import the package: another directory, no cached modules, no network."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hub_server import WITHOUT_PACKAGE
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import CHOICES
from transformers import ViTImageProcessorPil

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchForMaskedImageModeling
from modeling_vit_scratch.configuration_vit_scratch import AUTO_MAP

FILES = {
    "config.json",
    "configuration_vit_scratch.py",
    "model.safetensors",
    "modeling_vit_scratch.py",
    "preprocessor_config.json",
}

# Arguments, four for each model: its folder, the pixels, where to write outputs, where to save the model again.
SCRIPT = """
import sys

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    pipeline,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 exports it only with torchvision

trust = {"trust_remote_code": True}


def load_and_save(folder, data, output, again):
    data = load_file(data)
    image = Image.fromarray(data["picture"].numpy())

    config = AutoConfig.from_pretrained(folder, **trust)
    assert type(config).__module__.startswith("transformers_modules."), type(config)
    processor = AutoImageProcessor.from_pretrained(folder, **trust)
    classifier = AutoModelForImageClassification.from_pretrained(folder, **trust)
    encoder = AutoModel.from_pretrained(folder, **trust)
    reconstructor = AutoModelForMaskedImageModeling.from_pretrained(folder, **trust)
    backbone = get_class_from_dynamic_module("modeling_vit_scratch.ViTScratchBackbone", folder)
    backbone = backbone.from_pretrained(folder, out_indices=[0, -1])
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        outputs = {
            "pixels": pixels,
            "logits": classifier(data["pixels"]).logits,
            "features": encoder(data["pixels"]).pooler_output,
            "maps": backbone(data["pixels"]).feature_maps[1],
            "maps_0": backbone(data["pixels"]).feature_maps[0],
            "reconstruction": reconstructor(data["pixels"]).reconstruction,
        }

    scores = pipeline("image-classification", model=folder, top_k=5, **trust)(image)
    outputs["scores"] = torch.tensor([{s["label"]: s["score"] for s in scores}[n] for n in config.id2label.values()])
    tokens = pipeline("image-feature-extraction", model=folder, **trust)(image)
    outputs["tokens"] = torch.tensor(tokens)
    save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, output)

    classifier.save_pretrained(again)
    processor.save_pretrained(again)


arguments = iter(sys.argv[1:])
for four in zip(arguments, arguments, arguments, arguments):
    load_and_save(*four)
assert "modeling_vit_scratch" not in sys.modules
"""


# With positions of another kind, and with every choice of today's ViTs; of all, three tokens before the patches.
KINDS = {"sincos": {"position_embedding_type": "sincos"}, "today": {**CHOICES["all"], "num_register_tokens": 1}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Of each kind a model and its folder, as a run leaves it; and an image."""
    models = {kind: make_and_save(tmp_path_factory.mktemp("run") / f"my-{kind}", kind) for kind in KINDS}
    return models, Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def make_and_save(folder, kind):
    torch.manual_seed(0)
    config = ViTScratchConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=(16, 24),
        patch_size=4,
        encoder_stride=4,
        id2label={0: "cat", 1: "dog", 2: "owl"},
        label2id={"cat": 0, "dog": 1, "owl": 2},
        **{"num_register_tokens": 2, **KINDS[kind]},
    )
    model = ViTScratchForImageClassification(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    model.save_pretrained(folder)
    size = {"height": 16, "width": 24}
    ViTImageProcessorPil(size=size, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25]).save_pretrained(folder)
    return model, folder


def run_elsewhere(folders, image, pixels, tmp_path):
    """For each folder the script's outputs, and the folder it saved; all from one process."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "script.py").write_text(WITHOUT_PACKAGE.read_text() + SCRIPT)
    save_file({"picture": torch.from_numpy(np.array(image)), "pixels": pixels}, elsewhere / "data.safetensors")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "code"),
    }
    results = [(elsewhere / f"{folder.name}.safetensors", tmp_path / "again" / folder.name) for folder in folders]
    command = [sys.executable, "-I", "script.py"]
    for folder, (output, again) in zip(folders, results, strict=True):
        command += [folder, "data.safetensors", output, again]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [(load_file(output), again) for output, again in results]


def check_folder(folder):
    assert {path.name for path in folder.iterdir()} == FILES
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["architectures"] == ["ViTScratchForImageClassification"]
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["image_processor_type"] == "ViTImageProcessor"


def test_folder_is_complete(saved):
    for _, folder in saved[0].values():
        check_folder(folder)


def test_every_name_of_the_auto_map_exists():
    import modeling_vit_scratch

    assert set(AUTO_MAP) == {
        "AutoBackbone",
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageClassification",
        "AutoModelForMaskedImageModeling",
    }
    for auto_class, name in AUTO_MAP.items():
        cls = getattr(modeling_vit_scratch, name.split(".")[1])
        assert cls._auto_class == auto_class


@pytest.mark.slow
def test_folder_works_and_is_saved_again_where_the_package_is_unknown(saved, tmp_path):
    """Twice: the second time from the folders that the first process saved."""
    models, image = saved
    pixels = torch.randn(4, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    folders = [folder for _, folder in models.values()]
    from_picture = ViTImageProcessorPil.from_pretrained(folders[0])(image, return_tensors="pt")["pixel_values"]
    for number in ("first", "second"):
        (tmp_path / number).mkdir()
        results = run_elsewhere(folders, image, pixels, tmp_path / number)
        for (model, _), (outputs, again) in zip(models.values(), results, strict=True):
            check_outputs(outputs, model, pixels, from_picture)
            check_folder(again)
        folders = [again for _, again in results]


def check_outputs(outputs, model, pixels, from_picture):
    with torch.no_grad():
        encoded, of_picture = model.vit(pixels), model(from_picture)
        assert torch.equal(outputs["logits"], model(pixels).logits)  # bit for bit
        picture_tokens = model.vit(from_picture).last_hidden_state
    assert torch.equal(outputs["features"], encoded.pooler_output)
    assert torch.equal(outputs["pixels"], from_picture)
    tokens = encoded.last_hidden_state[:, 3:]
    assert torch.equal(outputs["maps"], tokens.reshape(4, 4, 6, 32).permute(0, 3, 1, 2))
    assert outputs["maps_0"].shape == outputs["maps"].shape
    assert outputs["reconstruction"].shape == pixels.shape
    torch.testing.assert_close(outputs["scores"], of_picture.logits.softmax(-1)[0])
    torch.testing.assert_close(outputs["tokens"], picture_tokens, atol=1e-5, rtol=1e-5)


def test_other_heads_save_the_same_files(tmp_path):
    ViTScratchForMaskedImageModeling(ViTScratchConfig.preset("tiny", num_hidden_layers=1)).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"preprocessor_config.json"}
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
