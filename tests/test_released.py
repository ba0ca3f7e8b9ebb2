"""What a released version wrote keeps loading and resuming: folders of runs on digits, made by 0.1.0.

Each is a whole output folder, as it would lie on the Hub, with its first checkpoint; plots are left out, and the two
code files that lay in every folder are kept once, in `code`.
"""

import shutil
from pathlib import Path

import pytest
import torch
from runs import RANDOM, load_script, options, weights
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_vit_scratch import modeling_vit_scratch as modeling
from modeling_vit_scratch.conversion import convert_checkpoint
from modeling_vit_scratch.data.cuts import read_record

RELEASED = Path(__file__).parent / "released" / "0.1.0"
SETTINGS = {"max_train_samples": 128, "max_eval_samples": 32, "save_total_limit": 5, "logging_steps": 1}
RUNS = {
    "classifier": {"config_overrides": RANDOM, "ema_decay": 0.9, "muon_learning_rate": 0.02},
    "pretrained": {"task": "masked-image-modeling"},
}
# Of what the resumed steps change of a weight, the share that rounding changes between machines: Muon computes in
# bfloat16 where there are units for it, else in float32.
NEAR = 0.1
CLASSES = {"classifier": "ViTScratchForImageClassification", "pretrained": "ViTScratchForMaskedImageModeling"}


@pytest.fixture
def released(tmp_path):
    """A function of a run's name: its folder, as the version left it."""

    def copy(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(RELEASED / name, folder)
        for place in (folder, folder / "checkpoint-2"):
            shutil.copytree(RELEASED / "code", place, dirs_exist_ok=True)
        return folder

    return copy


@pytest.mark.parametrize("name", RUNS)
def test_it_computes_what_its_own_code_computes(name, released):
    """The two code files beside the weights are that version's."""
    folder = released(name)
    theirs = get_class_from_dynamic_module(f"modeling_vit_scratch.{CLASSES[name]}", str(folder))
    assert theirs is not getattr(modeling, CLASSES[name])
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    key = "logits" if name == "classifier" else "reconstruction"
    with torch.no_grad():
        expected = theirs.from_pretrained(folder).eval()(pixels)[key]
        found = getattr(modeling, CLASSES[name]).from_pretrained(folder).eval()(pixels)[key]
    assert torch.allclose(found, expected, atol=1e-6, rtol=1e-5)
    assert expected.std() > 1e-4


def test_an_encoder_that_was_pretrained_is_taken():
    model = convert_checkpoint(RELEASED / "pretrained", replace_head=True)
    stored = load_file(RELEASED / "pretrained" / "model.safetensors")
    assert torch.equal(model.vit.layers[0].mlp.fc1.weight, stored["vit.layers.0.mlp.fc1.weight"])


@pytest.mark.parametrize("name", RUNS)
def test_its_checkpoint_is_resumed(name, released):
    """To the weights that the version itself ended with."""
    folder = released(name)
    (folder / "model.safetensors").unlink()
    argv = options(folder, **SETTINGS, **RUNS[name], resume_from_checkpoint="last")
    assert load_script("finetune").main(argv) == 0
    expected, found = weights(RELEASED / name), weights(folder)
    before = load_file(RELEASED / name / "checkpoint-2" / "model.safetensors")
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        moved = (tensor - before[key]).norm().item()
        assert moved > 1e-4, key
        assert (found[key] - tensor).norm().item() < NEAR * moved, key


def test_its_cut_is_known():
    record = read_record(RELEASED / "classifier")
    assert record.cut.method == "stratified" and record.fingerprint is not None
