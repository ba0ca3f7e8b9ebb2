"""Each choice beyond the ViT of 2021 in training: who learns how, adapters, heads, counts, and runs from end to end."""

import json

import pytest
import torch
from runs import fork_run, history, load_script, options, wait_all, weights
from small_models import CHOICES, TINY, all_together, equal, every_choice, images, make

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchForMaskedImageModeling
from modeling_vit_scratch.training import ImageTrainingArguments, lora
from modeling_vit_scratch.training.models import flops_per_image, with_classes
from modeling_vit_scratch.training.optimization import parameter_groups

finetune = load_script("finetune")
SIZE = "hidden_size=16,num_attention_heads=2,intermediate_size=16"


def groups_of(model, **settings):
    """Name -> its group, of each parameter that is trained."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, ImageTrainingArguments("unused", use_cpu=True, weight_decay=0.1, **settings))
    return {names[id(p)]: group for group in groups for p in group["params"]}


@every_choice
@pytest.mark.parametrize("cls", [ViTScratchForImageClassification, ViTScratchForMaskedImageModeling])
def test_who_learns_how(cls, choice):
    """Blocks and their own frequencies decay with depth; tokens, vectors and frequencies have no weight decay."""
    model = make(cls, **choice)
    found = groups_of(model, learning_rate=1.0, muon_learning_rate=1.0, layer_decay=0.5)
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, group in found.items():
        parts = name.split(".")
        depth = 2
        if parts[1] in ("embeddings", "embedding_norm"):
            depth = 0
        elif parts[1] in ("layers", "rotary_positions"):
            depth = int(parts[2]) + 1
        assert group["lr"] == 0.5 ** (2 - depth), name
        free = parts[-1] in (
            "query",
            "frequencies",
            "cls_token",
            "register_tokens",
            "mask_token",
            "position_embeddings",
        )
        vector = parts[-1] in ("bias", "q_bias", "v_bias", "scale") or "norm" in parts[-2]
        assert (group["weight_decay"] == 0) == (free or vector), name
        expected = None
        if parts[1] in ("layers", "attention_pooling") and not free and not vector:
            expected = {"qkv": 3, "kv": 2, "fc1": 1 + model.config.use_gated_mlp}.get(parts[-2], 1)
        assert group.get("parts") == expected, name
    if model.config.use_gated_mlp:
        assert found["vit.layers.0.mlp.fc1.weight"]["parts"] == 2
    if model.config.pooling == "attention" and cls is ViTScratchForImageClassification:
        assert found["vit.attention_pooling.kv.weight"]["parts"] == 2
        assert found["vit.attention_pooling.q.weight"]["parts"] == 1


@every_choice
def test_new_classes_read_what_is_pooled(choice):
    model = with_classes(make(ViTScratchForImageClassification, **choice), ["cat", "dog", "owl"])
    assert model.classifier.in_features == model.config.representation_size or model.config.pooled_size
    assert model(images(model)).logits.shape == (3, 3)


@every_choice
def test_adapters_of_the_blocks_and_the_whole_head(choice):
    peft = pytest.importorskip("peft")
    model = make(ViTScratchForImageClassification, **choice)
    before = model(images(model)).logits.detach()
    adapter = lora.add_adapter(model, 2, "somewhere").eval()
    equal(model(images(model)).logits, before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    head = ("classifier.", "pre_logits.", "vit.attention_pooling.")
    assert all((".lora_" in name and ".layers." in name) or name.startswith(head) for name in trained)
    parts = {name.split(".lora_")[0].partition("layers.")[2] for name in trained if ".lora_" in name}
    assert parts == {
        f"{i}.{part}" for i in range(2) for part in ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
    }
    pooling = {name for name in trained if name.startswith("vit.attention_pooling.")}
    assert bool(pooling) == (model.config.pooling == "attention")
    for name, group in groups_of(model, muon_learning_rate=0.1).items():
        if "fc1.lora_B" in name:
            assert group["parts"] == 1 + model.config.use_gated_mlp
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    after = model(images(model)).logits.detach()
    assert (after - before).abs().max() > 1e-2
    merged = make(ViTScratchForImageClassification, **choice)
    merged.load_state_dict(lora.merged_weights(adapter))
    equal(merged(images(merged)).logits, after, 1e-4)
    assert isinstance(adapter, peft.PeftModel)


def test_operations_counted_by_hand():
    """Two for each multiplication of a matrix product; rotations, norms and gates are none."""
    D, T, inner, K = 32, 17, 48, 5
    patches = 2 * 16 * 48 * D
    block = 2 * T * D * (3 * D + D) + 2 * 2 * T * T * D + 2 * T * 2 * D * inner
    gate = 2 * T * D * inner
    expected = {
        "rope": patches + 2 * block + 2 * D * K,
        "gated-mlp": patches + 2 * (block + gate) + 2 * D * K,
        "cls+mean": patches + 2 * block + 2 * 2 * D * K,
    }
    T = 16
    block = 2 * T * D * (3 * D + D) + 2 * 2 * T * T * D + 2 * T * 2 * D * inner
    pooling = 2 * D * D + 2 * T * D * 2 * D + 2 * 2 * T * D + 2 * D * D + 2 * 2 * D * inner
    expected["attention-pooling"] = patches + 2 * block + pooling + 2 * D * K
    for name, flops in expected.items():
        model = ViTScratchForImageClassification(ViTScratchConfig(**{**TINY, **CHOICES[name]}))
        assert flops_per_image(model) == flops, name


# Runs


def overrides(choice):
    """`--config_overrides` of a choice; the preset has other defaults than the config."""
    fields = {"use_cls_token": True, "pooling": "cls", "use_final_norm": True, **choice}
    return ",".join([SIZE, *(f"{name}={value}" for name, value in fields.items())])


TOGETHER = ["all", "all-attention-pooling"]


@pytest.mark.slow
@all_together
def test_a_run_from_scratch_and_the_next_from_it(choice, tmp_path):
    first = options(tmp_path / "a", config_overrides=overrides(choice))
    assert finetune.main([*first, "--num_train_epochs", "1"]) == 0
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert {name: config[name] for name in choice} == choice
    second = options(tmp_path / "b", config_overrides=None, model_name_or_path=tmp_path / "a", num_train_epochs=1)
    assert finetune.main(second) == 0
    metrics = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert metrics["test"]["examples"] == 64


@pytest.mark.parametrize("name", TOGETHER)
def test_stopped_and_resumed_is_bit_identical_to_never_stopping(name, tmp_path, interrupt):
    settings = {"config_overrides": overrides(CHOICES[name]), "muon_learning_rate": 0.02, "layer_decay": 0.8}
    assert finetune.main(options(tmp_path / "whole", **settings, ema_decay=0.9)) == 0
    argv = options(tmp_path / "parts", **settings, ema_decay=0.9)
    interrupt["at"] = 7
    assert finetune.main(argv) == 130
    assert finetune.main([*argv, "--resume_from_checkpoint", "last"]) == 0
    assert history(tmp_path / "parts") == history(tmp_path / "whole")
    resumed = weights(tmp_path / "parts")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights(tmp_path / "whole").items())


@pytest.mark.parametrize("name", TOGETHER)
def test_pre_training_then_probe_and_adapter(name, tmp_path):
    """The encoder stays as pre-training left it; attention pooling, which that did not have, is trained."""
    start = options(tmp_path / "a", config_overrides=overrides(CHOICES[name]), num_train_epochs=1, horizontal_flip=0)
    assert finetune.main([*start, "--task", "masked-image-modeling"]) == 0
    encoder = {name: tensor for name, tensor in weights(tmp_path / "a").items() if name.startswith("vit.layers.")}
    base = {"config_overrides": None, "model_name_or_path": tmp_path / "a", "num_train_epochs": 1}
    assert finetune.main(options(tmp_path / "probe", **base, freeze_backbone=True, learning_rate=0.01)) == 0
    probe = weights(tmp_path / "probe")
    assert all(torch.equal(probe[name], tensor) for name, tensor in encoder.items())
    query = "vit.attention_pooling.norm.bias"
    assert query not in probe or probe[query].abs().max() > 1e-4
    pytest.importorskip("peft")
    assert finetune.main(options(tmp_path / "adapted", **base, lora_rank=2, learning_rate=0.01)) == 0
    adapted = weights(tmp_path / "adapted")
    assert adapted.keys() == probe.keys()
    assert query not in adapted or adapted[query].abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_learn_as_one_does(name, tmp_path):
    settings = {"config_overrides": overrides(CHOICES[name]), "optim": "sgd", "learning_rate": 0.1, "max_steps": 10}
    settings |= {"horizontal_flip": 0, "crop_padding": 0, "max_grad_norm": 0, "eval_strategy": "no"}
    for processes in (1, 2):
        batch = {"per_device_train_batch_size": 32 // processes}
        argv, log = options(tmp_path / str(processes), **settings, **batch), tmp_path / f"log{processes}"
        codes = wait_all(fork_run(argv, processes, log))
        assert codes == [0] * processes, (tmp_path / f"log{processes}.0").read_text()[-2000:]
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    for tensor_name, tensor in one.items():
        torch.testing.assert_close(two[tensor_name], tensor, atol=1e-4, rtol=0)
