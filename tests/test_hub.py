"""hub.py, model_card.py and scripts/push_to_hub.py: the real huggingface_hub client and hub_server.py's small Hub."""

import hashlib
import importlib.util
import json
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from hub_server import OTHER_TOKEN, TOKEN, WRONG_TOKEN
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTImageProcessorPil
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch import hub as hub_module
from modeling_vit_scratch.configuration_vit_scratch import AUTO_MAP
from modeling_vit_scratch.hub import push as push_module
from modeling_vit_scratch.hub import write_model_card
from modeling_vit_scratch.hub.model_card import REPO_PLACEHOLDER

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


def load_script():
    path = Path(__file__).parents[1] / "scripts" / "push_to_hub.py"
    spec = importlib.util.spec_from_file_location("push_to_hub", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digest(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


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
    for name in ("training_args.bin", "trainer_state.json", "run.log", ".secret"):
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


# The card


def test_card_says_what_the_files_say(folder):
    card = ModelCard.load(write_model_card(folder))
    head = yaml.safe_load(card.content.split("---")[1])
    assert head["license"] == "apache-2.0" and head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "image-classification" and "image-classification" in head["tags"]
    assert head["datasets"] == ["uoft-cs/cifar10"]
    (result,) = head["model-index"][0]["results"]
    assert result["dataset"] == {"name": "uoft-cs/cifar10", "type": "uoft-cs/cifar10", "split": "test"}
    assert [(m["type"], m["value"]) for m in result["metrics"]] == [("accuracy", 0.6184), ("top5_accuracy", 0.9534)]
    for text in (
        "| test | 10,000 | 61.84 % | 95.34 % | 1.2345 |",
        "| validation | 5,000 | 61.23 % | 95.12 % | 1.2500 |",
        "847,626", "12,345,678", "45,000 train, 5,000 validation, 10,000 test images", "airplane, cat, dog",
        "| `augmentation.horizontal_flip` | 0.5 |", "5 min 0 s", "4 min 50 s", "A processor, 2 cores", "2.13.0",
        "python scripts/finetune.py --num_train_epochs 8", "trust_remote_code=True", "revision=revision",
        "38.16 % of the test images", "71.00 % of airplane is recognised, but 42.00 % of cat",
    ):  # fmt: skip
        assert text in card.text, text
    shown = re.findall(r"\]\(plots/(\w+)\.png\)", card.text)
    assert shown == ["training_curves", "confusion_matrix", "another"]


def test_card_code_runs_where_the_config_says_tuples(folder):
    edit_json("config.json", return_dict=False)(folder)
    code = re.search(r"```python\n(.*?)```", ModelCard.load(write_model_card(folder)).text, re.S)[1]
    code = re.sub("repo = .*", f"repo = {str(folder)!r}", re.sub("revision = .*", "revision = None", code))
    # Some versions of transformers export it only beside torchvision.
    code = code.replace("import AutoImageProcessor, ", "import ")
    names = {"AutoImageProcessor": AutoImageProcessor}
    exec(code, names)
    assert {answer["label"] for answer in names["classify"](Image.new("RGB", (20, 20)))} == set(CLASSES)


def test_card_invents_nothing(folder):
    shutil.rmtree(folder / "plots")
    write_metrics(folder, test=None, training={}, time=None, model=None, environment=None, command=None)
    card = ModelCard.load(write_model_card(folder))
    assert "model-index" not in card.content and "metrics" not in card.data.to_dict()
    assert "not measured on a test split" in card.text and "61.23 %" in card.text
    for text in ("| test |", "parameters", "FLOPs", "plots/", "## Training", "None", "nan"):
        assert text not in card.text, text
    (folder / "metrics.json").unlink()
    card = ModelCard.load(write_model_card(folder))
    assert "No results were saved" in card.text and "datasets" not in card.data.to_dict()
    assert not re.search(r"\d %", card.text)


@pytest.mark.parametrize(
    "name", ["/home/zoe9/secret client/cifar10", "../secret client/cifar10", "~/secret client/cifar10"]
)
def test_card_leaks_no_path_and_no_token(folder, name):
    command = (
        f"/home/zoe9/venv/bin/python scripts/finetune.py --dataset_name '{name}' --hub_token {TOKEN} --token=abc "
        f"--output_dir=/home/zoe9/runs/x --note {WRONG_TOKEN}"
    )
    write_metrics(folder, command=command, dataset={**METRICS["dataset"], "name": name}, training={"hub_token": TOKEN})
    text = write_model_card(folder).read_text()
    for secret in ("zoe9", "secret", TOKEN, WRONG_TOKEN, "abc", "datasets:", "huggingface.co/datasets"):
        assert secret not in text, secret
    assert "trained on cifar10" in text and "--dataset_name cifar10" in text and "--output_dir=x" in text
    assert yaml.safe_load(text.split("---")[1])["model-index"][0]["results"][0]["dataset"]["type"] == "cifar10"


def test_card_of_a_local_folder_that_looks_like_a_hub_id(folder, monkeypatch):
    (folder / "data" / "cifar10").mkdir(parents=True)
    monkeypatch.chdir(folder)
    write_metrics(folder, dataset={"name": "data/cifar10"}, command="python finetune.py --dataset_name data/cifar10")
    text = write_model_card(folder).read_text()
    assert "datasets:" not in text and "data/cifar10" not in text and "--dataset_name cifar10" in text


# What is refused


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
    "pickle disguised": (pickle_as("plots/picture.png"), "plots/picture.png is a pickle"),
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
    with pytest.raises(hub_module.FolderError) as refusal:
        hub_module.push_folder(folder, "me/x", token="my-odd-token")
    assert text in str(refusal.value)
    assert "my-odd-token" not in str(refusal.value) and WRONG_TOKEN not in str(refusal.value)
    assert not [path for method, path in hub.requests if method != "GET"] and not hub.repos


def test_a_refusal_lists_everything(folder):
    for name in ("README.md", "preprocessor_config.json", "modeling_vit_scratch.py", "model.safetensors"):
        (folder / name).unlink()
    with pytest.raises(hub_module.FolderError) as refusal:
        hub_module.check_folder(folder)
    assert len(refusal.value.problems) == 4
    with pytest.raises(hub_module.FolderError, match="not a folder"):
        hub_module.check_folder(folder / "nowhere")


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
    assert set(hub_module.check_folder(tmp_path).files) == MODEL_FILES | {"README.md"}


def test_sharded_weights_are_accepted(folder):
    model = make_model()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert not (folder / "model.safetensors").exists()
    assert len([name for name in hub_module.check_folder(folder).files if name.endswith(".safetensors")]) > 1


# Pushing


def test_push_is_one_commit_with_everything(folder, hub):
    before = digest(folder)
    pushed = hub_module.push_folder(folder, "x", commit_message="First")
    assert hub.commits("me/x") == ["First"] and pushed.repo_id == "me/x"
    assert pushed.changed and pushed.commit == hub.head("me/x") and pushed.url.endswith(f"me/x/commit/{pushed.commit}")
    plots = {f"plots/{name}.png" for name in ("confusion_matrix", "another", "training_curves")}
    files = hub.files("me/x")
    assert set(files) == MODEL_FILES | plots | {"README.md", "metrics.json", "history.csv", ".gitattributes"}
    assert set(pushed.left_out) == {"checkpoint-10/", "training_args.bin", "trainer_state.json", "run.log", ".secret"}
    for name in set(files) - {"README.md", ".gitattributes"}:
        assert files[name] == (folder / name).read_bytes(), name
    assert 'repo = "me/x"' in files["README.md"].decode() and REPO_PLACEHOLDER not in files["README.md"].decode()
    assert digest(folder) == before


def test_push_again_makes_no_commit_and_changes_make_one(folder, hub):
    first = hub_module.push_folder(folder, "me/x")
    again = hub_module.push_folder(folder, "me/x")
    assert not again.changed and again.commit == first.commit and len(hub.commits("me/x")) == 1

    make_model(seed=1).save_pretrained(folder)
    (folder / "plots" / "another.png").unlink()
    hub_module.push_folder(folder, "me/x", commit_message="Second")
    assert hub.commits("me/x") == ["Upload model", "Second"]
    assert hub.files("me/x")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert "plots/another.png" not in hub.files("me/x")


def test_weights_of_an_earlier_push_do_not_stay_beside_new_ones(folder, hub):
    hub_module.push_folder(folder, "me/x")
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="me/x")
    (folder / "model.safetensors").unlink()
    make_model(seed=1).save_pretrained(folder, max_shard_size="20KB")
    hub_module.push_folder(folder, "me/x")
    files = hub.files("me/x")
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files
    assert files["notes.txt"] == b"mine"  # what others put there stays
    assert not hub_module.push_folder(folder, "me/x").changed


def test_branch_and_pull_request(folder, hub):
    main = hub_module.push_folder(folder, "me/x").commit
    make_model(seed=1).save_pretrained(folder)
    on_branch = hub_module.push_folder(folder, "me/x", revision="experiment/2")
    assert hub.head("me/x") == main and hub.head("me/x", "experiment/2") == on_branch.commit != main
    assert not hub_module.push_folder(folder, "me/x", revision="experiment/2").changed

    proposed = hub_module.push_folder(folder, "me/x", create_pr=True, commit_message="Better")
    assert proposed.pr_url.endswith("me/x/discussions/1") and hub.head("me/x") == main
    assert hub.commits("me/x", "refs/pr/1") == ["Upload model", "Better"]
    assert hub.files("me/x", "refs/pr/1")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    # Somebody who may not write there may still propose.
    stranger = hub_module.push_folder(folder, "me/x", create_pr=True, token=OTHER_TOKEN)
    assert stranger.pr_url.endswith("me/x/discussions/2") and hub.head("me/x") == main


def test_private_repository_and_wrong_tokens(folder, hub):
    hub_module.push_folder(folder, "me/hidden", private=True)
    assert hub.repos["model", "me/hidden"].private
    head = hub.head("me/hidden")
    make_model(seed=1).save_pretrained(folder)
    for token in (WRONG_TOKEN, OTHER_TOKEN):
        with pytest.raises(hub_module.HubError, match=r"me/hidden was not pushed: .*hf auth login") as refusal:
            hub_module.push_folder(folder, "me/hidden", token=token)
        assert token not in str(refusal.value)
        with pytest.raises(hub_module.HubError, match="me/hidden was not prepared"):
            hub_module.prepare_repo("me/hidden", token=token)
        with pytest.raises(hub_module.HubError, match="me/hidden was not verified"):
            hub_module.verify_repo("me/hidden", token=token)
    assert hub.head("me/hidden") == head
    assert hub_module.prepare_repo("hidden", private=True) == "me/hidden"

    hub_module.push_folder(folder, "me/open")
    head, sent = hub.head("me/open"), len(hub.lfs)
    make_model(seed=2).save_pretrained(folder)
    with pytest.raises(hub_module.HubError, match="me/open exists and is public"):
        hub_module.push_folder(folder, "me/open", private=True)
    assert hub.head("me/open") == head and len(hub.lfs) == sent
    with pytest.raises(hub_module.HubError, match="Repo id must"):
        hub_module.push_folder(folder, "me//x")


def test_a_commit_of_somebody_else_meanwhile_is_not_mixed_in(folder, hub, monkeypatch):
    """What did not change is not sent; if it changes on the server before the commit, it must be sent after all."""
    hub_module.push_folder(folder, "me/x")
    config = (folder / "config.json").read_bytes()
    make_model(seed=1).save_pretrained(folder)
    preupload, meddle = HfApi.preupload_lfs_files, [True]

    def and_then_somebody_commits(self, *args, **kwargs):
        preupload(self, *args, **kwargs)
        if meddle and meddle.pop():
            HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="me/x")

    monkeypatch.setattr(HfApi, "preupload_lfs_files", and_then_somebody_commits)
    hub_module.push_folder(folder, "me/x", commit_message="Mine")
    assert hub.commits("me/x")[-1] == "Mine" and len(hub.commits("me/x")) == 3
    assert hub.files("me/x")["config.json"] == config


# Servers that fail


def assert_untouched_then_retry(folder, hub, before, head):
    """After a failed push: nothing of it shows on the server or here, and the same call completes it."""
    assert digest(folder) == before
    assert hub.head("me/x") == head
    hub.heal()
    pushed = hub_module.push_folder(folder, "me/x")
    assert pushed.changed and hub.files("me/x")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert MODEL_FILES <= set(hub.files("me/x"))


@pytest.mark.parametrize("where", [("PUT", "/lfs/"), ("POST", "/preupload/"), ("POST", "/commit/")], ids=str)
def test_a_server_that_dies_in_mid_upload(folder, hub, no_waiting, where):
    hub_module.push_folder(folder, "me/x")
    make_model(seed=1).save_pretrained(folder)
    before, head = digest(folder), hub.head("me/x")
    hub.fault(*where, "die")
    with pytest.raises(hub_module.HubError, match=r"me/x was not pushed: .*does not answer as it should"):
        hub_module.push_folder(folder, "me/x")
    hub.start()
    assert_untouched_then_retry(folder, hub, before, head)


@pytest.mark.parametrize("action", ["reset", 503])
def test_short_failures_are_ridden_out(folder, hub, no_waiting, action):
    hub.fault("PUT", "/lfs/", action, times=3)
    hub.fault("POST", "/preupload/", action, times=3)
    assert hub_module.push_folder(folder, "me/x").changed and len(hub.commits("me/x")) == 1


def test_a_lost_answer_is_no_second_commit(folder, hub, no_waiting):
    hub.fault("POST", "/commit/", "lose")
    with pytest.raises(hub_module.HubError):
        hub_module.push_folder(folder, "me/x")
    assert not hub_module.push_folder(folder, "me/x").changed and len(hub.commits("me/x")) == 1


@pytest.mark.parametrize("where", [("POST", "/api/repos/create"), ("POST", "/commit/")], ids=str)
def test_a_server_that_accepts_and_never_answers(folder, hub, no_waiting, where, monkeypatch):
    hub_module.push_folder(folder, "me/x")
    make_model(seed=1).save_pretrained(folder)
    before, head = digest(folder), hub.head("me/x")
    give_up_after(monkeypatch, 1.0)
    silent = hub.fault(*where, "hang")
    with pytest.raises(hub_module.HubError, match="Timeout"):
        hub_module.push_folder(folder, "me/x")
    assert silent.hits == 1  # given up at the first, while the server still holds it
    give_up_after(monkeypatch, 60)
    assert_untouched_then_retry(folder, hub, before, head)


def test_clients_made_anew_give_up_too_and_keep_what_the_user_set(monkeypatch):
    """huggingface_hub makes a new client when a connection fails; proxies and certificates are set by a factory."""
    http = push_module._http
    push_module.give_up_on_silence()
    for _ in range(2):
        assert huggingface_hub.get_session().timeout.read == push_module.TIMEOUT_SECONDS
        assert http.hf_request_event_hook in huggingface_hub.get_session().event_hooks["request"]
        huggingface_hub.close_session()

    def own(seconds):
        def make():
            client = http.default_client_factory()
            client.headers["x-own"], client.timeout = "yes", seconds
            return client

        return make

    for seconds, expected in ((None, push_module.TIMEOUT_SECONDS), (7.0, 7.0)):
        monkeypatch.setattr(http, "_GLOBAL_CLIENT_FACTORY", own(seconds))
        push_module.give_up_on_silence.__wrapped__()
        session = huggingface_hub.get_session()
        assert session.headers["x-own"] == "yes" and session.timeout.read == expected
    monkeypatch.undo()
    huggingface_hub.close_session()


def test_tokens_appear_nowhere(folder, hub, no_waiting, caplog, capfd, monkeypatch):
    """Not in errors, logs or output, not even if the server sends it back."""
    caplog.set_level("INFO")
    caplog.set_level("DEBUG", logger="huggingface_hub")
    tokens, texts = (TOKEN, WRONG_TOKEN, OTHER_TOKEN, "a-token-unlike-others"), []
    for token in tokens:
        monkeypatch.setenv("HF_TOKEN", token)
        for where in ("/api/repos/create", "/commit/"):
            make_model(seed=len(texts)).save_pretrained(folder)
            hub.fault("POST", where, 400)
            with pytest.raises(hub_module.HubError) as failure:
                hub_module.push_folder(folder, "me/x")
            texts.append(str(failure.value))
            assert failure.value.__cause__ is None and failure.value.__suppress_context__
        hub.heal()
    assert sum("fault 400 for Bearer ***" in text for text in texts) == 5  # only one of the users gets to the commit
    callback = hub_module.HubPushCallback("me/x", token=WRONG_TOKEN, retry_seconds=())
    assert callback.push_final(folder) is None and callback.errors
    out, err = capfd.readouterr()
    everything = "\n".join([*texts, *callback.errors, caplog.text, out, err, *map(str, hub.files("me/x").values())])
    for token in tokens:
        assert token not in everything


# During training


class Joined(TrainerCallback):
    """Waits for each push, so that the order of requests is the same in every run of the test."""

    def __init__(self, pushes):
        self.pushes = pushes

    def on_save(self, args, state, control, **kwargs):
        self.pushes.wait()


def train(folder: Path, callback: TrainerCallback, steps: int = 2, **options) -> Trainer:
    args = TrainingArguments(
        str(folder), max_steps=steps, save_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        disable_tqdm=True, **options,
    )  # fmt: skip
    data = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 3} for i in range(4)]
    callbacks = [callback, Joined(callback)]
    trainer = Trainer(
        make_model(), args, train_dataset=data, processing_class=make_processor(), callbacks=callbacks
    )  # fmt: skip
    trainer.train()
    return trainer


def test_every_checkpoint_is_pushed_whole_and_the_end_once_more(made, tmp_path, hub):
    callback = hub_module.HubPushCallback("me/t", private=True, report=lambda line: None)
    folder = tmp_path / "out"
    train(folder, callback, save_total_limit=1)
    assert hub.commits("me/t") == ["Training in progress, step 1 of 2", "Training in progress, step 2 of 2"]
    assert hub.repos["model", "me/t"].private and not callback.errors
    commit = hub.repos["model", "me/t"].find("main")
    weights = []
    for _ in range(2):
        assert set(commit.files) - {".gitattributes"} == MODEL_FILES | {"README.md"}
        assert b"Training is still going on: this is step" in commit.files["README.md"]
        weights.append(commit.files["model.safetensors"])
        commit = hub.repos["model", "me/t"].commits[commit.parent]
    assert weights[0] != weights[1]
    shutil.copytree(made, folder, dirs_exist_ok=True)
    pushed = callback.push_final(folder)
    assert (
        pushed.changed and hub.commits("me/t")[-1] == "End of training" and b"61.84" in hub.files("me/t")["README.md"]
    )
    assert not list(folder.glob(".hub_push-*"))


@pytest.mark.parametrize("action", [500, "hang", "die"])
def test_training_goes_on_without_the_server_and_the_push_is_retried_at_the_end(
    made, tmp_path, hub, no_waiting, monkeypatch, action
):
    shown = []
    callback = hub_module.HubPushCallback("me/t", retry_seconds=(), report=shown.append)
    give_up_after(monkeypatch, 2.0)
    hub.fault("POST", "/commit/", action, after=1)  # the first checkpoint arrives, the second does not
    folder = tmp_path / "out"
    trainer = train(folder, callback)
    assert trainer.state.global_step == 2
    assert any("step 2 of 2" in line and "was not pushed" in line and "Training goes on" in line for line in shown)
    if action == "die":
        assert hub.commits("me/t") == ["Training in progress, step 1 of 2"]
        shutil.copytree(made, folder, dirs_exist_ok=True)
        assert callback.push_final(folder) is None
        command = shlex.split(shown[-1].partition("push it later: ")[2])
        hub.start()
        assert load_script().main(command[2:]) == 0
        assert hub.commits("me/t")[-1] == "Upload model" and b"61.84" in hub.files("me/t")["README.md"]
    else:
        assert hub.commits("me/t") == ["Training in progress, step 1 of 2", "Training in progress, step 2 of 2"]
    assert not list(folder.glob(".hub_push-*"))


def pushing() -> list[threading.Thread]:
    """The threads that push in the background."""
    return [thread for thread in threading.enumerate() if thread.name == "hub-push"]


def saved(folder: Path, step: int, seed: int) -> tuple[SimpleNamespace, SimpleNamespace]:
    """A checkpoint, and the args and state that Trainer passes when it is saved."""
    checkpoint = folder / f"checkpoint-{step}"
    make_model(seed=seed).save_pretrained(checkpoint)
    make_processor().save_pretrained(checkpoint)
    state = SimpleNamespace(is_world_process_zero=True, global_step=step, max_steps=9)
    return SimpleNamespace(output_dir=str(folder)), state


def test_training_does_not_wait_and_a_checkpoint_may_be_deleted_meanwhile(tmp_path, hub):
    callback = hub_module.HubPushCallback("me/t", report=lambda line: None)
    slow = hub.fault("POST", "/preupload/", "delay", times=9, seconds=60)
    pushes = [saved(tmp_path, step, seed=step) for step in (1, 2, 3)]
    for args, state in pushes:
        callback.on_save(args, state, None)
        while not slow.hits:
            time.sleep(0.01)
    assert not hub.commits("me/t")
    weights = [(tmp_path / f"checkpoint-{step}" / "model.safetensors").read_bytes() for step in (1, 2, 3)]
    for step in (1, 2, 3):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    slow.seconds = 0
    callback.on_train_end(*pushes[-1], None)
    # The second was overtaken by the third while the first was under way.
    assert hub.commits("me/t") == ["Training in progress, step 1 of 9", "Training in progress, step 3 of 9"]
    assert hub.files("me/t")["model.safetensors"] == weights[2] and not callback.errors
    assert not list(tmp_path.iterdir())


def test_a_late_checkpoint_never_lands_on_the_finished_model(folder, tmp_path, hub):
    callback = hub_module.HubPushCallback("me/t", wait_seconds=0.05, report=lambda line: None)
    hub_module.prepare_repo("me/t")
    slow = hub.fault("PUT", "/lfs/", "delay", seconds=60)
    args, state = saved(tmp_path / "out", 1, seed=1)
    callback.on_save(args, state, None)
    while not slow.hits:
        time.sleep(0.01)
    (worker,) = pushing()
    assert worker.daemon  # a program that ends here does not wait for the server
    callback.on_train_end(args, state, None)
    assert "still under way" in callback.errors[-1]
    callback.push_final(folder)
    slow.seconds = 0
    worker.join(20)
    assert hub.commits("me/t") == ["End of training"]
    assert hub.files("me/t")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_only_the_main_process_pushes(tmp_path, hub):
    callback = hub_module.HubPushCallback("me/t")
    args, state = saved(tmp_path, 1, seed=1)
    state.is_world_process_zero = False
    for event in (callback.on_train_begin, callback.on_save, callback.on_train_end):
        event(args, state, None)
    assert not hub.requests and not pushing()


# The script


@pytest.fixture(scope="module")
def script():
    return load_script()


def test_script(folder, hub, script, capsys):
    assert script.main([str(folder), "me/x", "--private", "--revision", "b", "--commit_message", "By script"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{hub.url}/me/x/commit/{hub.head('me/x', 'b')}\n"
    assert "left out: checkpoint-10/ (a checkpoint)" in err
    assert hub.commits("me/x", "b") == ["By script"] and hub.repos["model", "me/x"].private
    assert script.main([str(folder), "me/x", "--revision", "b"]) == 0
    assert "up to date" in capsys.readouterr().err
    assert script.main([str(folder), "me/x", "--create_pr"]) == 0
    assert capsys.readouterr().out == f"{hub.url}/me/x/discussions/1\n"

    (folder / "README.md").unlink()
    assert script.main([str(folder), "me/x"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "README.md is missing" in err
    hub.stop()
    assert script.main(["--verify", "me/x"]) == 1
    assert "me/x was not verified" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [[], ["folder"], ["a", "b", "c"], ["a", "b", "--trust_remote_code"], ["--verify"], ["a", "b", "--verify", "c"],
     ["--verify", "c", "--private"], ["a", "b", "--priv"]],
    ids=" ".join,
)  # fmt: skip
def test_script_refuses_wrong_arguments(script, argv, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(argv)
    assert end.value.code == 2 and capsys.readouterr().out == ""


# Pulled elsewhere: child processes


PULL = """
import hashlib, io, json, re, sys
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification,
                          pipeline)

torch.set_num_threads(1)
picture = Image.frombytes("RGB", (9, 7), bytes(range(189)))
pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
answers = {}
for repo, card in (("me/plain", False), ("me/folder", True)):
    assert AutoConfig.from_pretrained(repo, trust_remote_code=True).hidden_size == 32
    processor = AutoImageProcessor.from_pretrained(repo)
    with torch.no_grad():
        model = AutoModelForImageClassification.from_pretrained(repo, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
        base = AutoModel.from_pretrained(repo, trust_remote_code=True)
        answer = {
            "logits": model(pixels).logits,
            "hidden": base(pixels).last_hidden_state,
            "picture": model(**processor(picture, return_tensors="pt")).logits,
        }
        backbone = AutoBackbone.from_pretrained(repo, trust_remote_code=True)
        assert backbone(pixels).feature_maps[-1].shape == (2, 32, 2, 2)
    answers[repo] = {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in answer.items()}
    classify = pipeline("image-classification", model=repo, trust_remote_code=True)
    answers[repo]["best"] = classify(picture)[0]["label"]
    features = pipeline("image-feature-extraction", model=repo, trust_remote_code=True)
    expected = base(**processor(picture, return_tensors="pt")).last_hidden_state
    assert torch.equal(torch.tensor(features(picture)), expected)
    if card:
        code = re.search(r"```python\\n(.*?)```", ModelCard.load(repo).text, re.S)[1]
        names = {}
        exec(code, names)
        assert names["repo"] == repo and len(names["revision"]) == 40
        assert names["classify"](picture)[0]["label"] == answers[repo]["best"]
try:
    AutoModel.from_pretrained("me/hidden", trust_remote_code=True)
except OSError:
    answers["hidden"] = "refused"
model.push_to_hub("somebody/copy")  # a loaded model takes its code along
processor.push_to_hub("somebody/copy")
assert "modeling_vit_scratch" not in sys.modules
print("ANSWER", json.dumps(answers))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    isinstance(transformers.AutoImageProcessor, transformers.utils.DummyObject),
    reason="this transformers exports AutoImageProcessor only beside torchvision",
)
def test_pushed_from_plain_python_it_loads_anywhere(folder, hub):
    model, processor = make_model(seed=3), make_processor()
    model.push_to_hub("me/plain")
    processor.push_to_hub("me/plain")
    assert len(hub.commits("me/plain")) == 2
    model.push_to_hub("me/plain")
    assert len(hub.commits("me/plain")) == 2 and set(hub.files("me/plain")) >= MODEL_FILES
    model.save_pretrained(folder)
    hub_module.push_folder(folder, "me/folder")
    hub_module.push_folder(folder, "me/hidden", private=True)

    done = hub.run(PULL, without_package=True, token=OTHER_TOKEN)
    answers = json.loads(re.search("ANSWER (.*)", done.stdout)[1])

    def sha(tensor):
        return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()

    picture = Image.frombytes("RGB", (9, 7), bytes(range(189)))
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loaded = ViTScratchForImageClassification.from_pretrained(folder)  # one row's product depends on where weights lie
    with torch.no_grad():
        logits = loaded(**processor(picture, return_tensors="pt")).logits
        torch.testing.assert_close(logits, model(**processor(picture, return_tensors="pt")).logits)
        expected = {
            "logits": sha(model(pixels).logits),
            "hidden": sha(model.vit(pixels).last_hidden_state),
            "picture": sha(logits),
            "best": model.config.id2label[logits.argmax().item()],
        }
    torch.set_num_threads(threads)
    assert answers == {"me/plain": expected, "me/folder": expected, "hidden": "refused"}
    copy = hub.files("somebody/copy")
    assert set(copy) >= MODEL_FILES and json.loads(copy["config.json"])["auto_map"] == AUTO_MAP
    assert all(copy[name] == hub.files("me/folder")[name] for name in MODEL_FILES - {"config.json"})
    assert TOKEN not in done.stdout + done.stderr and OTHER_TOKEN not in done.stdout + done.stderr


@pytest.mark.slow
def test_verify(folder, hub, script, capsys):
    pushed = hub_module.push_folder(folder, "me/x", private=True)
    assert script.main([str(folder), "--verify", "me/x"]) == 0
    out = capsys.readouterr().out
    assert f"me/x@{pushed.commit} loads without this package" in out and "logits [4, 3]: every bit equals" in out

    # One weight differs in its last bit.
    tensors = load_file(folder / "model.safetensors")
    tensors["vit.norm.weight" if "vit.norm.weight" in tensors else "classifier.weight"].view(torch.int32)[0] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(hub_module.HubError, match=r"logits differs from .*run \(by up to"):
        hub_module.verify_repo("me/x", folder=folder)


@pytest.mark.slow
def test_verify_runs_no_code_but_ours_and_notices_a_repository_that_needs_the_package(folder, hub):
    path = folder / "modeling_vit_scratch.py"
    path.write_text("import modeling_vit_scratch\n" + path.read_text())
    hub_module.push_folder(folder, "me/x")
    with pytest.raises(hub_module.HubError, match=r"modeling_vit_scratch\.py is not the code that stands here"):
        hub_module.verify_repo("me/x")
    with pytest.raises(hub_module.HubError, match=r"does not load without this package: .*is blocked"):
        hub_module.verify_repo("me/x", trust_remote_code=True)
    edit_json("config.json", auto_map={**AUTO_MAP, "AutoModel": "you/evil--evil.Model"})(folder)
    HfApi().upload_file(path_or_fileobj=folder / "config.json", path_in_repo="config.json", repo_id="me/x")
    with pytest.raises(hub_module.HubError, match="its auto_map names other classes than ours"):
        hub_module.verify_repo("me/x")


@pytest.mark.slow
def test_verify_where_the_config_says_tuples(folder, hub):
    edit_json("config.json", return_dict=False)(folder)
    hub_module.push_folder(folder, "me/x")
    assert set(hub_module.verify_repo("me/x", folder=folder).shapes) == {
        "last_hidden_state",
        "logits",
        "image_logits",
    }


DATA = """
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
import numpy as np
import PIL.Image

def split(n, seed):
    rng = np.random.default_rng(seed)
    pictures = [PIL.Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(n)]
    features = Features({"img": Image(), "label": ClassLabel(names=["airplane", "cat", "dog"])})
    return Dataset.from_dict({"img": pictures, "label": [i % 3 for i in range(n)]}, features=features)

data = DatasetDict(train=split(30, 0), test=split(9, 1))
data.push_to_hub("me/pictures")

from datasets import load_dataset
back = load_dataset("me/pictures")
assert {name: len(part) for name, part in back.items()} == {"train": 30, "test": 9}
assert np.array_equal(np.asarray(back["train"][3]["img"]), np.asarray(data["train"][3]["img"]))
assert back["train"].features["label"].names == ["airplane", "cat", "dog"]
"""


@pytest.mark.slow
def test_a_data_set_is_pushed_and_trained_from_by_its_id(hub, tmp_path):
    hub.run(DATA)
    assert any(name.endswith(".parquet") for name in hub.files("me/pictures", repo_type="dataset"))
    options = {
        "dataset_name": "me/pictures", "output_dir": tmp_path / "run", "image_size": 16, "num_train_epochs": 1,
        "config_overrides": "hidden_size=32,intermediate_size=32", "per_device_train_batch_size": 4, "use_cpu": True,
        "train_val_split": 0.3, "push_to_hub": True, "hub_model_id": "me/trained",
    }  # fmt: skip
    script = Path(__file__).parents[1] / "scripts" / "finetune.py"
    done = subprocess.run(
        [sys.executable, script, *(str(word) for key, value in options.items() for word in (f"--{key}", value))],
        env=hub.env(), cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = hub.files("me/trained")
    assert set(files) >= MODEL_FILES | {"README.md", "metrics.json", "history.csv", "plots/training_curves.png"}
    assert yaml.safe_load(files["README.md"].decode().split("---")[1])["datasets"] == ["me/pictures"]
    assert TOKEN not in done.stdout + done.stderr + str(files)
