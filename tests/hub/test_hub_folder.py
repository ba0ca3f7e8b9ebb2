"""What a folder must hold before it is pushed."""

import pytest
import torch
from hub_folders import MODEL_FILES, edit_json, edit_text, edit_weights, make_model, pickle_as
from hub_server import WRONG_TOKEN
from transformers import ViTImageProcessorPil

from modeling_vit_scratch.configuration_vit_scratch import AUTO_MAP
from modeling_vit_scratch.hub import FolderError, check_folder, push_folder, write_model_card

DAMAGES = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "another model": (edit_json("config.json", model_type="vit"), "model_type is 'vit'"),
    "config field": (edit_json("config.json", patch_size=5), "image_size (height 16) must be divisible by patch_size"),
    "part of auto_map": (
        edit_json("config.json", auto_map={"AutoConfig": "configuration_vit_scratch.ViTScratchConfig"}),
        "auto_map lacks AutoModel",
    ),
    "code elsewhere": (
        edit_json("config.json", auto_map={**AUTO_MAP, "AutoModel": "you/y--modeling_vit_scratch.X"}),
        "not a file of this folder",
    ),
    "class elsewhere": (
        edit_json("config.json", auto_map={**AUTO_MAP, "AutoModel": "modeling_vit_scratch.Nobody"}),
        "there is no class Nobody",
    ),
    "unknown architecture": (edit_json("config.json", architectures=["Nobody"]), "names 'Nobody'"),
    "no model code": (lambda f: (f / "modeling_vit_scratch.py").unlink(), "modeling_vit_scratch.py is missing"),
    "no config code": (
        lambda f: (f / "configuration_vit_scratch.py").unlink(),
        "configuration_vit_scratch.py is missing",
    ),
    "code no Python": (lambda f: (f / "modeling_vit_scratch.py").write_text("def ("), "is not Python"),
    "import outside": (
        edit_text("modeling_vit_scratch.py", "import torch\n", "import torch\nfrom .helpers import x\n"),
        "the import finds nothing in this folder",
    ),
    "no processor": (lambda f: (f / "preprocessor_config.json").unlink(), "preprocessor_config.json is missing"),
    "unknown processor": (
        edit_json("preprocessor_config.json", image_processor_type="Nobody"),
        "preprocessor_config.json:",
    ),
    "other size": (
        edit_json("preprocessor_config.json", size={"height": 24, "width": 24}),
        "an image becomes (1, 3, 24, 24), but the model takes (1, 3, 16, 16)",
    ),
    "no card": (lambda f: (f / "README.md").unlink(), "README.md is missing"),
    "card without head": (lambda f: (f / "README.md").write_text("# Model"), "README.md has no YAML head"),
    "card head no YAML": (lambda f: (f / "README.md").write_text("---\na: [\n---\n# M"), "README.md: its YAML head"),
    "tensor missing": (edit_weights(lambda t: t.pop("classifier.bias")), "classifier.bias (3,) is missing"),
    "tensor too many": (edit_weights(lambda t: t.update(extra=torch.ones(2))), "extra (2,) has no place"),
    "tensor misshapen": (
        edit_weights(lambda t: t.update({"classifier.bias": torch.ones(4)})),
        "classifier.bias is (4,), but config.json says (3,)",
    ),
    "weights cut short": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]),
        "model.safetensors is not a readable safetensors file",
    ),
    "pickle as weights": (pickle_as("model.safetensors"), "model.safetensors is not a readable safetensors file"),
    "pickle beside": (pickle_as("pytorch_model.bin"), "pytorch_model.bin is a pickle"),
    "pickle disguised": (pickle_as("plots/image.png"), "plots/image.png is a pickle"),
    "shard missing": (
        lambda f: (
            (f / "model.safetensors").unlink(),
            (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1-of-1.safetensors"}}'),
        ),
        "model-1-of-1.safetensors is not a readable",
    ),
    "token in a file": (
        edit_json("metrics.json", command=f"finetune.py --hub_token {WRONG_TOKEN}"),
        "metrics.json, line 1",
    ),
    "token of the login": (lambda f: (f / "notes.txt").write_text("x\nmy-odd-token"), "notes.txt, line 2"),
}  # fmt: skip


@pytest.mark.parametrize("damage, text", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_folder_that_would_not_load_is_refused_before_anything_is_sent(folder, hub, damage, text):
    damage(folder)
    with pytest.raises(FolderError) as refusal:
        push_folder(folder, "me/x", token="my-odd-token")
    assert text in str(refusal.value)
    assert "my-odd-token" not in str(refusal.value) and WRONG_TOKEN not in str(refusal.value)
    assert not [path for method, path in hub.requests if method != "GET"] and not hub.repos


def test_a_refusal_lists_everything(folder):
    for name in ("README.md", "preprocessor_config.json", "modeling_vit_scratch.py", "model.safetensors"):
        (folder / name).unlink()
    with pytest.raises(FolderError) as refusal:
        check_folder(folder)
    assert len(refusal.value.problems) == 4
    with pytest.raises(FolderError, match="not a folder"):
        check_folder(folder / "nowhere")


@pytest.mark.parametrize(
    "fields",
    [
        {"image_size": (16, 24)},
        {"num_channels": 1},
        {"position_embedding_type": "sincos", "use_cls_token": True, "num_register_tokens": 2},
        {"representation_size": 8, "layerscale_value": 0.1, "use_final_norm": True},
    ],
)
def test_every_kind_of_model_is_accepted(tmp_path, fields):
    model = make_model(**fields)
    model.save_pretrained(tmp_path)
    height, width = model.config.image_hw
    mean = [0.5] * model.config.num_channels
    size = {"height": height, "width": width}
    ViTImageProcessorPil(size=size, image_mean=mean, image_std=mean).save_pretrained(tmp_path)
    write_model_card(tmp_path)
    assert set(check_folder(tmp_path).files) == MODEL_FILES | {"README.md"}


def test_sharded_weights_are_accepted(folder):
    model = make_model()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert not (folder / "model.safetensors").exists()
    assert len([name for name in check_folder(folder).files if name.endswith(".safetensors")]) > 1
