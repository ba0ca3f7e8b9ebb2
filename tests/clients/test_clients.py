"""Software that nobody here wrote, on a saved folder, and what it says to its user; conftest.py runs it."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import WITHOUT_PACKAGE
from runs import ROOT
from transformers import AutoModelForImageClassification, PreTrainedModel

import modeling_vit_scratch
from modeling_vit_scratch import ViTScratchForImageClassification
from modeling_vit_scratch.configuration_vit_scratch import MODEL_FILE_SHA256

pytestmark = pytest.mark.clients
# What loading says where a folder has too much or too little for a class; docs/weights.md tells of it.
REPORT = ("LOAD REPORT", "^Key ", "^---", "^Notes:")
CLASSIFIER_UNREAD = (*REPORT, r"^classifier\.\w+ *\| UNEXPECTED", "^- UNEXPECTED:")
DECODER_NEW = (*CLASSIFIER_UNREAD, r"^(decoder\.\w+|vit\.embeddings\.mask_token) *\| MISSING", "^- MISSING:")
CLASSIFIER_NEW = (*REPORT, r"^classifier\.\w+ *\| MISMATCH", "^- MISMATCH:")
PAGE = (ROOT / "docs" / "clients.md").read_text()


def blocks(heading: str) -> str:
    """The Python of this section of the page."""
    sections = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
    return "\n".join(re.findall(r"^```python\n(.*?)^```", sections[heading], re.M | re.S))


@pytest.fixture
def program(tmp_path):
    """A function that writes the Python of sections of the page to a program; `then` comes after each of them."""

    def write(*headings: str, first: str = "", then: str = "") -> Path:
        path = tmp_path / "program.py"
        path.write_text("\n".join([first, *(f"{blocks(heading)}\n{then}\n" for heading in headings)]))
        return path

    return write


def test_pipelines(place, client):
    offloaded = "Some parameters are on the meta device because they were offloaded to the "
    flex = ("flex_attention called without torch.compile", "^SOLUTION", "^If you want to debug", "^torch.nn.attention")
    says = (*CLASSIFIER_UNREAD, offloaded, *flex, "^This will allow you")
    client("with_pipelines.py", place / "runs" / "mine", place / "modes", says=says)


def test_quantised_by_torchao(place, client):
    pytest.importorskip("torchao")
    client("with_quantisation.py", place / "runs" / "mine", says=CLASSIFIER_NEW)


def test_adapters_of_peft(place, client):
    pytest.importorskip("peft")
    client("with_adapters.py", place / "runs" / "mine", says=["`is_gradient_checkpointing` is deprecated"])


def test_exporter_to_onnx(place, client):
    pytest.importorskip("onnxruntime")
    client("with_onnx.py", place / "runs" / "mine", says=(*DECODER_NEW, "OnnxExporter is experimental"))


@pytest.mark.needs("executorch")
def test_exporter_to_executorch(place, client):
    of_one_block = r"^vit\.layers\.1\.[\w.]+ *\| UNEXPECTED"
    says = (*DECODER_NEW, of_one_block, "ExecutorchExporter is experimental")
    client("with_executorch.py", place / "runs" / "mine", says=says)


def test_dense_heads(place, client, hub):
    ViTScratchForImageClassification.from_pretrained(place / "runs" / "mine").push_to_hub("me/mine")
    variables = {name: value for name, value in hub.env().items() if name.startswith(("HF_", "NO_PROXY", "no_proxy"))}
    block = r"^vit\.layers\.\{2, 3\}\.[\w.]+ *\| MISSING"
    says = (*CLASSIFIER_UNREAD, block, "^- MISSING:", "A new version of the following files", r"^- \w+\.py$")
    says = (*says, "Make sure to double-check they do not contain")
    client("with_dense_heads.py", place, "me/mine", says=says, environment={**variables, "HF_HUB_OFFLINE": "0"})


@pytest.mark.needs("captum", "torchinfo")
def test_explainers(place, client):
    client("with_explainers.py", place / "runs" / "mine", says=CLASSIFIER_UNREAD)


HEAT = """
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

with GradCAM(Logits(model), [model.vit.layers[-1].norm1], reshape_transform=reshape) as cam:
    heats = [heat, *(cam(pixels, [ClassifierOutputTarget(label)])[0] for label in range(3))]
assert {heat.shape for heat in heats} == {(16, 16)}
assert max(heat.max() for heat in heats) > 0.9  # negative heat is cut off, of some classes all
assert max(heat.std() for heat in heats) > 0.1
"""


@pytest.mark.needs("pytorch_grad_cam", "cv2", "ttach", "torchvision")
def test_grad_cam(place, client, program):
    client(program("Grad-CAM", then=HEAT), peers=True)


LOAD = """
from transformers import AutoModelForImageClassification as Auto

before = dict(Auto.from_pretrained("runs/mine", trust_remote_code=True).named_parameters())
"""
LEARNED = """
now = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
same = [name for name, tensor in now.items() if tensor.equal(before[name])]
assert not same, same
before = now
"""


@pytest.mark.needs("lightning")
def test_loops(place, client, program):
    says = ("GPU available", "TPU available", "Tip: ", "training batches .* logging interval", "`max_epochs=1` reached")
    says += (r"^  super\(\)\.__init__\(loader\)",)  # the line below a warning of memory that is not pinned
    loops = "A plain loop", "transformers' Trainer", "accelerate", "Lightning"
    there, _ = client(program(*loops, first=LOAD, then=LEARNED), says=says)
    assert (there / "runs" / "again" / "model.safetensors").is_file()


def other_code(folder: Path) -> Path:
    """Another version's: it gives the logits with their sign turned, and its configuration names it."""
    model, configuration = folder / "modeling_vit_scratch.py", folder / "configuration_vit_scratch.py"
    text = model.read_text()
    model.write_text(text.replace("logits = self.classifier(", "logits = -self.classifier("))
    assert model.read_text() != text
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    configuration.write_text(configuration.read_text().replace(MODEL_FILE_SHA256, digest))
    return folder


def test_two_folders_with_different_code(place, client, tmp_path):
    folders = [Path(shutil.copytree(place / "runs" / "mine", tmp_path / name / "run")) for name in "ab"]
    released = Path(shutil.copytree(ROOT / "tests" / "released" / "0.1.0" / "classifier", tmp_path / "c" / "run"))
    shutil.copytree(ROOT / "tests" / "released" / "0.1.0" / "code", released, dirs_exist_ok=True)
    client("with_two_folders.py", folders[0], other_code(folders[1]), released, says=CLASSIFIER_UNREAD)


def test_the_package_wins_where_it_is_installed(place, tmp_path):
    """Whatever `trust_remote_code` says; so an old folder runs the code that is here."""
    folder = other_code(Path(shutil.copytree(place / "runs" / "mine", tmp_path / "run")))
    pixels = torch.ones(1, 3, 16, 16)
    with torch.no_grad():
        expected = ViTScratchForImageClassification.from_pretrained(place / "runs" / "mine")(pixels).logits
        for trust in (True, False):
            model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=trust)
            assert type(model) is modeling_vit_scratch.ViTScratchForImageClassification
            assert isinstance(model, PreTrainedModel) and torch.equal(model(pixels).logits, expected)


# --- transformers' example scripts ------------------------------------------------------------------------------------


def test_calls_of_example_scripts(place, client):
    """The scripts themselves want torchvision, and their text is not kept here."""
    client("with_calls_of_examples.py", place / "runs" / "mine", says=DECODER_NEW)


EXAMPLES = os.environ.get("TRANSFORMERS_EXAMPLES")
LENGTH = ["--num_train_epochs", "1", "--per_device_train_batch_size", "8"]
SCRIPTS = {
    "image-classification/run_image_classification.py": ["--do_train", "--do_eval", "--remove_unused_columns", "False"],
    "image-classification/run_image_classification_no_trainer.py": [],
    "image-pretraining/run_mim.py": ["--do_train", "--remove_unused_columns", "False", "--mask_patch_size", "8"],
}


@pytest.mark.skipif(
    not EXAMPLES, reason="TRANSFORMERS_EXAMPLES names no folder examples/pytorch of transformers' sources"
)
@pytest.mark.needs("torchvision")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: Path(script).stem)
def test_example_scripts_of_transformers(script, place, client):
    """On a folder with as many classes as the data has."""
    data = ["--dataset_name", "imagefolder"] if script.endswith("run_mim.py") else []
    options = [*data, "--train_dir", "path/to/folder", "--model_name_or_path", "runs/mine", "--output_dir", "out"]
    options += ["--trust_remote_code", "True", *LENGTH, *SCRIPTS[script]]
    there, _ = client(Path(EXAMPLES) / script, *options, peers=True, listen=False)
    config = (there / "out" / "config.json").read_text()
    assert "modeling_vit_scratch.ViTScratch" in config and (there / "out" / "modeling_vit_scratch.py").exists()


def test_a_process_that_can_import_the_package_is_noticed(tmp_path):
    """Else these tests prove nothing."""
    start = WITHOUT_PACKAGE.read_text().replace("sys.meta_path.insert(0, Blocked())", "")
    (tmp_path / "start.py").write_text(start)
    (tmp_path / "modeling_vit_scratch").mkdir()
    for name in ("__init__.py", "configuration_vit_scratch.py"):
        (tmp_path / "modeling_vit_scratch" / name).touch()
    done = subprocess.run([sys.executable, "start.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "can be imported: this proves nothing" in done.stderr
