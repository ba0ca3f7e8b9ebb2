"""What was pushed loads in child processes that cannot import the package, and `verify_repo` proves it."""

import hashlib
import json
import re
import subprocess
import sys

import pytest
import torch
import transformers
import yaml
from hub_folders import MODEL_FILES, edit_json, make_model, make_processor
from hub_server import OTHER_TOKEN, TOKEN
from huggingface_hub import HfApi
from PIL import Image
from runs import SCRIPTS, load_script
from safetensors.torch import load_file, save_file

from modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchForMaskedImageModeling
from modeling_vit_scratch.configuration_vit_scratch import AUTO_MAP
from modeling_vit_scratch.hub import HubError, proof, push_folder, verify_repo, write_model_card

PULL = """
import hashlib, io, json, re, sys
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification,
                          pipeline)

torch.set_num_threads(1)
image = Image.frombytes("RGB", (9, 7), bytes(range(189)))
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
            "image": model(**processor(image, return_tensors="pt")).logits,
        }
        backbone = AutoBackbone.from_pretrained(repo, trust_remote_code=True)
        assert backbone(pixels).feature_maps[-1].shape == (2, 32, 2, 2)
    answers[repo] = {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in answer.items()}
    classify = pipeline("image-classification", model=repo, trust_remote_code=True)
    answers[repo]["best"] = classify(image)[0]["label"]
    features = pipeline("image-feature-extraction", model=repo, trust_remote_code=True)
    expected = base(**processor(image, return_tensors="pt")).last_hidden_state
    assert torch.equal(torch.tensor(features(image)), expected)
    if card:
        code = re.search(r"```python\\n(.*?)```", ModelCard.load(repo).text, re.S)[1]
        names = {}
        exec(code, names)
        assert names["repo"] == repo and len(names["revision"]) == 40
        assert names["classify"](image)[0]["label"] == answers[repo]["best"]
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
    push_folder(folder, "me/folder")
    push_folder(folder, "me/hidden", private=True)

    done = hub.run(PULL, without_package=True, token=OTHER_TOKEN)
    answers = json.loads(re.search("ANSWER (.*)", done.stdout)[1])

    def sha(tensor):
        return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()

    image = Image.frombytes("RGB", (9, 7), bytes(range(189)))
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loaded = ViTScratchForImageClassification.from_pretrained(folder)  # one row's product depends on where weights lie
    with torch.no_grad():
        logits = loaded(**processor(image, return_tensors="pt")).logits
        torch.testing.assert_close(logits, model(**processor(image, return_tensors="pt")).logits)
        expected = {
            "logits": sha(model(pixels).logits),
            "hidden": sha(model.vit(pixels).last_hidden_state),
            "image": sha(logits),
            "best": model.config.id2label[logits.argmax().item()],
        }
    torch.set_num_threads(threads)
    assert answers == {"me/plain": expected, "me/folder": expected, "hidden": "refused"}
    copy = hub.files("somebody/copy")
    assert set(copy) >= MODEL_FILES and json.loads(copy["config.json"])["auto_map"] == AUTO_MAP
    assert all(copy[name] == hub.files("me/folder")[name] for name in MODEL_FILES - {"config.json"})
    assert TOKEN not in done.stdout + done.stderr and OTHER_TOKEN not in done.stdout + done.stderr


@pytest.mark.slow
def test_verify(folder, hub, capsys, monkeypatch):
    outputs, run_probe = [], proof._run_probe

    def run_once(*args):
        if not outputs:
            outputs.append(run_probe(*args))
        return outputs[0]

    monkeypatch.setattr(proof, "_run_probe", run_once)
    pushed = push_folder(folder, "me/x", private=True)
    assert load_script("push_to_hub").main([str(folder), "--verify", "me/x"]) == 0
    out = capsys.readouterr().out
    assert f"me/x@{pushed.commit} loads without this package" in out and "logits [4, 3]: every bit equals" in out

    # One weight here differs in its last bit; the repository computes what it did.
    tensors = load_file(folder / "model.safetensors")
    tensors["vit.norm.weight" if "vit.norm.weight" in tensors else "classifier.weight"].view(torch.int32)[0] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HubError, match=r"logits differs from .*run \(by up to"):
        verify_repo("me/x", folder=folder)


@pytest.mark.slow
def test_verify_runs_no_code_but_ours_and_notices_a_repository_that_needs_the_package(folder, hub):
    path = folder / "modeling_vit_scratch.py"
    path.write_text("import modeling_vit_scratch\n" + path.read_text())
    push_folder(folder, "me/x")
    with pytest.raises(HubError, match=r"modeling_vit_scratch\.py is not the code that stands here"):
        verify_repo("me/x")
    with pytest.raises(HubError, match=r"does not load without this package: .*is blocked"):
        verify_repo("me/x", trust_remote_code=True)
    edit_json("config.json", auto_map={**AUTO_MAP, "AutoModel": "you/evil--evil.Model"})(folder)
    HfApi().upload_file(path_or_fileobj=folder / "config.json", path_in_repo="config.json", repo_id="me/x")
    with pytest.raises(HubError, match="its auto_map names other classes than ours"):
        verify_repo("me/x")


@pytest.mark.slow
def test_verify_where_the_config_says_tuples(folder, hub):
    edit_json("config.json", return_dict=False)(folder)
    push_folder(folder, "me/x")
    assert set(verify_repo("me/x", folder=folder).shapes) == {
        "last_hidden_state",
        "logits",
        "image_logits",
    }


@pytest.mark.slow
def test_verify_a_pretrained_model(folder, hub):
    config = make_model().config
    config.encoder_stride = config.patch_size
    ViTScratchForMaskedImageModeling(config).save_pretrained(folder)
    write_model_card(folder)
    push_folder(folder, "me/x")
    assert b"pre-trained" in hub.files("me/x")["README.md"]
    assert set(verify_repo("me/x", folder=folder).shapes) == {"last_hidden_state"}


DATA = """
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
import numpy as np
import PIL.Image

def split(n, seed):
    rng = np.random.default_rng(seed)
    images = [PIL.Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(n)]
    features = Features({"img": Image(), "label": ClassLabel(names=["airplane", "cat", "dog"])})
    return Dataset.from_dict({"img": images, "label": [i % 3 for i in range(n)]}, features=features)

data = DatasetDict(train=split(30, 0), test=split(9, 1))
data.push_to_hub("me/images")

from datasets import load_dataset
back = load_dataset("me/images")
assert {name: len(part) for name, part in back.items()} == {"train": 30, "test": 9}
assert np.array_equal(np.asarray(back["train"][3]["img"]), np.asarray(data["train"][3]["img"]))
assert back["train"].features["label"].names == ["airplane", "cat", "dog"]
"""


@pytest.mark.slow
def test_a_data_set_is_pushed_and_trained_from_by_its_id(hub, tmp_path):
    hub.run(DATA)
    assert any(name.endswith(".parquet") for name in hub.files("me/images", repo_type="dataset"))
    options = {
        "dataset_name": "me/images", "output_dir": tmp_path / "run", "image_size": 16, "num_train_epochs": 1,
        "config_overrides": "hidden_size=32,intermediate_size=32", "per_device_train_batch_size": 4, "use_cpu": True,
        "train_val_split": 0.3, "push_to_hub": True, "hub_model_id": "me/trained",
    }  # fmt: skip
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    done = subprocess.run(
        [sys.executable, SCRIPTS / "finetune.py", *words],
        env=hub.env(), cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = hub.files("me/trained")
    assert set(files) >= MODEL_FILES | {"README.md", "metrics.json", "history.csv", "plots/training_curves.png"}
    assert yaml.safe_load(files["README.md"].decode().split("---")[1])["datasets"] == ["me/images"]
    assert TOKEN not in done.stdout + done.stderr + str(files)
