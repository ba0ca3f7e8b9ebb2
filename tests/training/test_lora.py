"""`finetune.py --lora_rank`: what is trained, what is saved, and that both forms of it compute the same."""

import csv
import sys

import pytest
import torch
from runs import RANDOM, history, load_script, options, weights
from transformers import AutoModelForImageClassification

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, hub
from modeling_vit_scratch.training import ImageTrainingArguments, lora
from modeling_vit_scratch.training.optimization import Muon, parameter_groups

peft = pytest.importorskip("peft")
finetune = load_script("finetune")
RANK = 2


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    assert finetune.main(options(folder, config_overrides=RANDOM, num_train_epochs=1)) == 0
    return folder


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    """A finished run of two epochs: (folder, its options)."""
    folder = tmp_path_factory.mktemp("adapted") / "output"
    argv = options(folder, config_overrides=None, model_name_or_path=base, lora_rank=RANK, learning_rate=1e-2)
    assert finetune.main(argv) == 0
    return folder, argv


def images(count=4):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_matrices_of_attention_and_mlp_move_by_the_rank_and_the_head_freely(base, adapted):
    before, after = weights(base), weights(adapted[0])
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    targets = {
        f"vit.layers.{layer}.{part}.weight"
        for layer in range(2)
        for part in ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
    }
    assert moved == {*targets, "classifier.weight", "classifier.bias"}
    for name in targets:
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) == RANK, name


def test_merged_folder_and_adapter_compute_the_same_and_what_the_run_measured(base, adapted):
    folder, _ = adapted
    merged = AutoModelForImageClassification.from_pretrained(folder)
    plain = ViTScratchForImageClassification.from_pretrained(base)
    x = images()
    with torch.no_grad():
        before = plain(x).logits
        beside = peft.PeftModel.from_pretrained(plain, folder / "adapter").eval()
        torch.testing.assert_close(beside(x).logits, merged(x).logits, atol=1e-5, rtol=0)
        assert (merged(x).logits - before).abs().max() > 1e-2
        again = beside.merge_and_unload()
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, merged.state_dict()[name], atol=1e-6, rtol=0)

    from modeling_vit_scratch.conversion import image_processor_for
    from modeling_vit_scratch.data.records import load_records
    from modeling_vit_scratch.data.sources import load_raw

    records, names = load_records(load_raw("digits"), max_eval_samples=64)
    processor = image_processor_for(folder, merged)
    pixels = processor(records["test"].images(range(64), 3), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        confidence, guess = merged(pixels).logits.softmax(-1).max(-1)
    with open(folder / "predictions_test.csv") as file:
        for row, p, index in zip(csv.DictReader(file), confidence, guess, strict=True):
            assert row["predicted"] == names[index]
            assert float(row["confidence"]) == pytest.approx(p.item(), abs=1e-5)


def test_adapters_readme_says_which_model_it_is_for(base, adapted):
    """The one that was fine-tuned: onto the merged model PEFT loads it too, and it acts twice."""
    folder, _ = adapted
    text = (folder / "adapter" / "README.md").read_text()
    assert len(text.splitlines()) == 3 and "on top of `base`." in text and "applied twice" in text
    assert str(base) not in text and str(folder) not in text
    assert "adapter/README.md" in hub.check_folder(folder).files
    merged = AutoModelForImageClassification.from_pretrained(folder)
    x = images()
    with torch.no_grad():
        once = merged(x).logits
        twice = peft.PeftModel.from_pretrained(merged, folder / "adapter").eval()(x).logits
    assert (twice - once).abs().max() > 1e-3


def test_checkpoints_hold_both_forms_too(adapted):
    for checkpoint in adapted[0].glob("checkpoint-*"):
        assert AutoModelForImageClassification.from_pretrained(checkpoint)(images()).logits.isfinite().all()
        assert (checkpoint / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("more", [{}, {"ema_decay": 0.9}], ids=str)
def test_stopped_and_resumed_is_bit_identical_to_never_stopping(adapted, more, tmp_path, interrupt, capsys):
    reference, argv = adapted
    if more:
        reference = tmp_path / "whole"
        argv = [*argv, "--output_dir", str(reference), "--ema_decay", "0.9"]
        assert finetune.main(argv) == 0
    argv = [*argv, "--output_dir", str(tmp_path / "parts")]
    interrupt["at"] = 7
    assert finetune.main(argv) == 130
    assert finetune.main([*argv, "--resume_from_checkpoint", "last"]) == 0
    assert history(tmp_path / "parts") == history(reference)
    resumed = weights(tmp_path / "parts")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights(reference).items())
    capsys.readouterr()
    argv[argv.index("--lora_rank") + 1] = "3"
    checkpoint = next((tmp_path / "parts").glob("checkpoint-*"))
    assert finetune.main([*argv, "--resume_from_checkpoint", str(checkpoint)]) == 2
    assert "lora = [2, 'base'], but this run has [3, 'base']" in capsys.readouterr().err


def test_summary_counts_what_is_trained(base, tmp_path, capsys):
    argv = options(tmp_path, config_overrides=None, model_name_or_path=base, lora_rank=RANK, dry_run=True)
    assert finetune.main(argv) == 0
    # For each block, inputs and outputs of qkv, proj, fc1, fc2 at width 16; and the head of 10 classes.
    trained = RANK * 2 * (16 + 48 + 3 * (16 + 16)) + 170
    assert f"of which {trained:,} are trained" in capsys.readouterr().out


def test_adapter_begins_where_the_model_was_and_takes_the_pre_training_head():
    fields = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTScratchConfig(**fields, num_hidden_layers=2, representation_size=12, num_labels=3)
    model = ViTScratchForImageClassification(config).eval()
    with torch.no_grad():
        model.classifier.weight.normal_()
        before = model(images()).logits
        lora.add_adapter(model, 4, "somewhere")
        torch.testing.assert_close(model(images()).logits, before, atol=0, rtol=0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(
        "lora_" in name or name.startswith(("classifier.modules_to_save", "pre_logits.modules")) for name in trained
    )
    assert any(name.startswith("pre_logits") for name in trained)


def test_muon_takes_what_is_added_and_q_k_and_v_of_it_on_their_own():
    model = ViTScratchForImageClassification(ViTScratchConfig.preset("showcase"))
    lora.add_adapter(model, RANK, "somewhere")
    groups = parameter_groups(model, ImageTrainingArguments("unused", use_cpu=True, muon_learning_rate=0.02))
    parts = {id(p): group.get("parts") for group in groups for p in group["params"]}
    found = {name: parts[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert len(parts) == len(found)
    for name, value in found.items():
        expected = 3 if "qkv.lora_B" in name else 1 if "lora_" in name else None
        assert value == expected, name

    optimizer = Muon(groups)
    for group in groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        if "qkv.lora_B" in name:  # it was zero
            for part in p.detach().chunk(3):
                values = torch.linalg.svdvals(part) / 0.02 / (part.shape[0] / part.shape[1]) ** 0.5
                assert values.min() > 0.3 and values.max() < 1.3, name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_name_or_path": None}, "needs --model_name_or_path"),
        ({"freeze_backbone": True}, "no --freeze_backbone"),
        ({"lora_rank": 0}, "lora_rank (0) must be at least 1"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(base, changes, words, tmp_path, capsys):
    settings = {"config_overrides": None, "model_name_or_path": base, "lora_rank": RANK, "dry_run": True}
    assert finetune.main(options(tmp_path, **{**settings, **changes})) == 2
    assert words in capsys.readouterr().err


def test_an_adapters_checkpoint_is_not_resumed_without_the_adapter(base, adapted, tmp_path, capsys):
    last = max(adapted[0].glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    settings = {"config_overrides": None, "model_name_or_path": base, "resume_from_checkpoint": last}
    assert finetune.main(options(tmp_path, **settings)) == 2
    assert "lora = [" in capsys.readouterr().err


def test_without_the_extra(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    argv = options(tmp_path, config_overrides=None, model_name_or_path=base, lora_rank=RANK)
    assert finetune.main(argv) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "finetune.py: lora_rank needs PEFT: pip install 'modeling_vit_scratch[lora]'."
