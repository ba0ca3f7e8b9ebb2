"""A whole run as a user starts it, its options and recipes, and what it refuses."""

import csv
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from foreign import timm_tensors
from made_data import write_image_folder
from runs import RANDOM, SCRIPTS, history, load_script, options, weights
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification, TrainerControl
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 exports it only with torchvision

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.conversion import PACKAGED_MODEL, convert_checkpoint
from modeling_vit_scratch.plots.runs import read_history
from modeling_vit_scratch.training import (
    DataArguments,
    ImageTrainer,
    ImageTrainingArguments,
    ModelArguments,
    checkpoints,
)
from modeling_vit_scratch.training import arguments as arguments_module
from modeling_vit_scratch.training import models as models_module
from modeling_vit_scratch.training import optimization as optimization_module
from modeling_vit_scratch.training import output as output_module
from modeling_vit_scratch.training import run as run_module
from modeling_vit_scratch.training import trainer as trainer_module

finetune = load_script("finetune")
IN_FOLDER = {
    "model.safetensors", "config.json", "preprocessor_config.json",
    "configuration_vit_scratch.py", "modeling_vit_scratch.py",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished tiny run: (folder, its options)."""
    folder = tmp_path_factory.mktemp("run") / "output"
    argv = options(folder, config_overrides=RANDOM)
    assert finetune.main(argv) == 0
    return folder, argv


def test_output_folder_is_a_hub_repository(run):
    folder, _ = run
    names = {path.name for path in folder.iterdir()}
    assert names >= {*IN_FOLDER, "README.md", "metrics.json", "history.csv", "predictions_test.csv", "plots"}
    assert {path.name for path in (folder / "plots").iterdir()} == {
        "training_curves.png", "per_class_accuracy.png", "confusion_matrix.png",
    }  # fmt: skip
    for checkpoint in checkpoints.list_checkpoints(folder):
        assert {path.name for path in checkpoint.iterdir()} >= IN_FOLDER
        assert set(json.loads((checkpoint / "config.json").read_text())["auto_map"]) >= {
            "AutoConfig", "AutoModel", "AutoModelForImageClassification",
        }  # fmt: skip
    assert not list(folder.rglob("training_args.bin"))


def test_metrics_count_the_whole_split_and_agree_with_the_saved_model(run):
    folder, _ = run
    metrics = json.loads((folder / "metrics.json").read_text())
    predictions = (folder / "predictions_test.csv").read_text().splitlines()[1:]
    assert metrics["test"]["examples"] == len(predictions) == 64
    right = sum(row.split(",")[1] == row.split(",")[2] for row in predictions)
    assert metrics["test"]["accuracy"] == pytest.approx(right / 64)
    assert sum(map(sum, metrics["test"]["confusion_matrix"])) == 64
    assert metrics["model"]["parameters"] == sum(tensor.numel() for tensor in weights(folder).values())
    best = max(float(row["eval_accuracy"]) for row in history(folder) if row["eval_accuracy"])
    assert metrics["validation"]["accuracy"] == pytest.approx(best)


def test_the_step_that_is_kept_is_written(run, tmp_path):
    _, argv = run
    everything = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    everything += ["--learning_rate", "1", "--metric_for_best_model", "loss", "--num_train_epochs", "1"]
    for best in ("true", "false"):
        output = tmp_path / best
        last = ["--output_dir", str(output), "--load_best_model_at_end", best]
        assert finetune.main([*argv, *everything, *last]) == 0
        metrics = json.loads((output / "metrics.json").read_text())
        rows = [row for row in history(output) if row["eval_loss"]]
        lowest = min(rows, key=lambda row: float(row["eval_loss"]))
        assert lowest is not rows[-1]  # of so high a rate
        kept = lowest if best == "true" else rows[-1]
        assert metrics["training"]["kept_step"] == int(kept["step"])
        assert metrics["validation"]["loss"] == pytest.approx(float(kept["eval_loss"]), abs=1e-5)


def test_saved_folder_predicts_what_the_run_reported(run):
    """Model and processor from disk, on the original image, against the row the run wrote for it."""
    from modeling_vit_scratch.data.records import load_records
    from modeling_vit_scratch.data.sources import load_raw

    folder, _ = run
    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    records, names = load_records(load_raw("digits"), max_eval_samples=64)
    assert [model.config.id2label[index] for index in range(10)] == names
    images = [records["test"].image(index, 3) for index in range(64)]
    with torch.no_grad():
        probabilities = model(**processor(images, return_tensors="pt")).logits.softmax(-1)
    for row, p in zip((folder / "predictions_test.csv").read_text().splitlines()[1:], probabilities, strict=True):
        assert row.split(",")[2] == names[int(p.argmax())]
        assert float(row.split(",")[3]) == pytest.approx(p.max().item(), abs=1e-5)


@pytest.mark.parametrize("way", ["dataset_name", "validation cut from train_dir", "test_dir"])
def test_predictions_name_the_images_files(tmp_path, way):
    """From the folder that was named, whichever class and row they have."""
    write_image_folder(tmp_path / "data" / "train", 12)
    write_image_folder(tmp_path / "data" / "test", 3, seed=1000)
    (tmp_path / "data" / "test" / "cat" / "000.png").rename(tmp_path / "data" / "test" / "cat" / "a, é.png")
    folders = {"train_dir": tmp_path / "data" / "train"}
    if way == "test_dir":
        folders["test_dir"] = tmp_path / "data" / "test"
    settings = {"dataset_name": tmp_path / "data"} if way == "dataset_name" else {"dataset_name": None, **folders}
    argv = options(tmp_path / "out", num_train_epochs=1, max_train_samples=None, max_eval_samples=None, **settings)
    assert finetune.main(argv) == 0
    split = "validation" if way.startswith("validation") else "test"
    root = tmp_path / "data" if way == "dataset_name" else folders["train_dir" if split == "validation" else "test_dir"]
    with open(tmp_path / "out" / f"predictions_{split}.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len({row["file"] for row in rows}) == len(rows) > 3
    for row in rows:
        assert (root / row["file"]).is_file() and Path(row["file"]).parent.name == row["label"]
        assert list(row)[:5] == ["row", "label", "predicted", "confidence", "label_probability"]
    assert split == "validation" or any("é" in row["file"] for row in rows)


def test_predictions_of_images_that_are_no_files_name_none(run):
    head = (run[0] / "predictions_test.csv").read_text().splitlines()[0]
    assert head == "row,label,predicted,confidence,label_probability"


@pytest.mark.parametrize(("step", "number"), [(4, signal.SIGINT), (5, signal.SIGUSR1)])
def test_stopped_and_resumed_is_bit_identical_to_never_stopping(run, tmp_path, interrupt, capsys, step, number):
    """Stopped between two log entries (every 3 steps), and at the end of an epoch (of 5 steps)."""
    reference, argv = run
    argv = [str(tmp_path) if word == str(reference) else word for word in argv]
    interrupt |= {"at": step, "signal": number}
    assert finetune.main(argv) == 130
    assert "--resume_from_checkpoint last" in capsys.readouterr().out
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == [f"checkpoint-{step}"]
    assert finetune.main([*argv, "--resume_from_checkpoint", "last"]) == 0
    assert history(tmp_path) == history(reference)
    assert all(torch.equal(tensor, weights(tmp_path)[name]) for name, tensor in weights(reference).items())
    for split in ("validation", "test"):
        a, b = (json.loads((folder / "metrics.json").read_text())[split] for folder in (tmp_path, reference))
        assert a == b
    # The clock goes on where it was stopped.
    seconds = read_history(tmp_path)["train_seconds"]
    assert (seconds[1:] >= seconds[:-1]).all()
    assert json.loads((tmp_path / "metrics.json").read_text())["time"]["train_seconds"] >= seconds[-1] - 0.001


def test_damaged_checkpoint_is_named_and_passed_over(run, tmp_path, capsys):
    _, argv = run
    argv = options(tmp_path, num_train_epochs=3)
    assert finetune.main(argv) == 0
    newest, before = checkpoints.list_checkpoints(tmp_path)[:2]
    path = newest / "optimizer.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert checkpoints.last_good_checkpoint(tmp_path)[0] == before
    assert finetune.main([*argv, "--resume_from_checkpoint", "last"]) == 0
    note = capsys.readouterr().err
    assert f"{newest.name} is passed over: optimizer.pt is damaged" in note
    assert checkpoints.damage(newest) is None  # trained again from the one before it
    (newest / "model.safetensors").unlink()
    assert checkpoints.damage(newest) == "model.safetensors is missing"
    assert finetune.main([*argv, "--resume_from_checkpoint", str(newest)]) == 2


def test_a_disk_that_is_full_leaves_no_visible_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "publish", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert finetune.main(options(tmp_path, num_train_epochs=1)) == 1
    text = capsys.readouterr().err
    assert (
        "checkpoint-5 could not be saved (OSError: [Errno 28] No space left). There is no whole checkpoint yet" in text
    )
    assert checkpoints.list_checkpoints(tmp_path) == []


def test_a_checkpoint_that_cannot_be_removed_is_not_taken_for_one_that_is_not_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        trainer_module, "rotate_checkpoints", lambda *args: (_ for _ in ()).throw(OSError(13, "Denied"))
    )
    assert finetune.main(options(tmp_path, num_train_epochs=1)) == 1
    text = capsys.readouterr().err
    assert "a checkpoint before checkpoint-5 could not be removed (PermissionError: [Errno 13] Denied)." in text
    assert f"The last whole checkpoint is {tmp_path / 'checkpoint-5'}. To continue:" in text and "saved" not in text


def test_a_disk_too_small_is_noticed_before_training(tmp_path, monkeypatch, capsys):
    """Of a sharded run too, whose checkpoints have the weights twice."""
    monkeypatch.setattr(output_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert finetune.main(options(tmp_path)) == 2
    assert "0.00 GB free" in capsys.readouterr().err
    assert checkpoints.list_checkpoints(tmp_path) == []
    model = torch.nn.Linear(10, 10, bias=False)  # 400 bytes, in three checkpoints
    args = ImageTrainingArguments(str(tmp_path), use_cpu=True, bf16=False, save_total_limit=1)
    for free, sharded, enough in ((3600, "", True), (3599, "", False), (3600, "true", False), (4800, "true", True)):
        monkeypatch.setattr(output_module.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        monkeypatch.setenv("ACCELERATE_USE_FSDP", sharded)
        with nullcontext() if enough else pytest.raises(ValueError, match="GB free"):
            output_module.check_space(model, args)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"config_overrides": "hidden_size=32,num_attention_heads=2,intermediate_size=16"},
            ["hidden_size", "16", "32"],
        ),
        ({"per_device_train_batch_size": 16}, ["per_device_train_batch_size", "64", "16"]),
        ({"max_train_samples": 300}, ["images", "320", "300"]),
        ({"seed": 7}, ["seed", "42", "7"]),
    ],
)
def test_resuming_another_run_is_refused_with_both_values(run, capsys, change, words):
    folder, _ = run
    argv = options(folder, **({"config_overrides": RANDOM} | change))
    assert finetune.main([*argv, "--resume_from_checkpoint", "last"]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


def test_weights_alone_are_not_resumed(run, tmp_path, capsys):
    folder, argv = run
    shutil.copytree(folder / "checkpoint-5", tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / "optimizer.pt").unlink()  # as after --save_only_model
    digests = json.loads((tmp_path / "checkpoint-5" / checkpoints.DIGESTS).read_text())
    (tmp_path / "checkpoint-5" / checkpoints.DIGESTS).write_text(
        json.dumps({name: digest for name, digest in digests.items() if name != "optimizer.pt"})
    )
    argv = [str(tmp_path) if word == str(folder) else word for word in argv]
    assert finetune.main([*argv, "--resume_from_checkpoint", "last"]) == 2
    assert "has weights alone (save_only_model)" in capsys.readouterr().err


def test_taken_output_folder_is_refused(run, capsys):
    folder, argv = run
    before = (folder / "metrics.json").read_text()
    assert finetune.main(argv) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (folder / "metrics.json").read_text() == before


def test_infinite_loss_stops_the_run_within_the_step(tmp_path, capsys):
    argv = options(tmp_path, learning_rate=1e30, max_grad_norm=0, optim="sgd")
    assert finetune.main(argv) == 1
    message = capsys.readouterr().err
    assert "learning rate 8e+29" in message and "last good checkpoint: none" in message
    assert "at step 3" in message  # the first step moves the zero classifier only


def test_a_gpu_is_asked_for_its_loss_only_where_it_is_waited_for(monkeypatch):
    """A meta tensor is on another device, too, and to ask it is an error."""
    reached = []
    monkeypatch.setattr(transformers.Trainer, "_maybe_log_save_evaluate", lambda self, *args, **kw: reached.append(kw))
    trainer = ImageTrainer.__new__(ImageTrainer)
    trainer.control = TrainerControl()
    loss = torch.zeros((), device="meta")
    trainer._maybe_log_save_evaluate(loss, learning_rate=0.1)
    assert reached == [{"learning_rate": 0.1}]
    for name in ("should_log", "should_evaluate", "should_save", "should_training_stop"):
        trainer.control = TrainerControl(**{name: True})
        with pytest.raises(RuntimeError, match="meta"):
            trainer._maybe_log_save_evaluate(loss, learning_rate=0.1)


def test_a_cpu_has_no_index(monkeypatch):
    """transformers 5.17 loads an optimizer's state onto this device; torch cannot onto "cpu:1"."""
    monkeypatch.setattr(transformers.TrainingArguments, "device", property(lambda self: torch.device("cpu", 1)))
    assert ImageTrainingArguments("unused", use_cpu=True).device == torch.device("cpu")
    monkeypatch.setattr(transformers.TrainingArguments, "device", property(lambda self: torch.device("cuda", 1)))
    assert ImageTrainingArguments("unused", use_cpu=True).device == torch.device("cuda", 1)


def test_one_process_uses_one_gpu_and_a_cpu_its_own_precision(monkeypatch):
    """Of eight GPUs; and asked to use the CPU beside one, one without units for bfloat16."""
    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", lambda self: setattr(self, "_n_gpu", 8))
    assert ImageTrainingArguments("unused").n_gpu == 1
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(arguments_module, "has_fast_bfloat16", lambda device: False)
    for cuda in (True, False):  # a GPU of another kind (MPS, XPU) is none of CUDA's, and no CPU either
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert ImageTrainingArguments("unused", bf16=True).bf16
        assert not ImageTrainingArguments("unused", bf16=True, use_cpu=True).bf16
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert not ImageTrainingArguments("unused", bf16=True).bf16
    assert not ImageTrainingArguments("unused").bf16
    monkeypatch.setattr(arguments_module, "has_fast_bfloat16", lambda device: device.type == "cpu")
    args = ImageTrainingArguments("unused")
    assert args.bf16 and args.use_cpu
    assert not ImageTrainingArguments("unused", bf16=False).bf16


def test_a_cpu_with_units_for_bfloat16_trains_in_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(arguments_module, "has_fast_bfloat16", lambda device: True)
    for bf16, precision in ((None, "bfloat16"), (False, "float32")):
        assert finetune.main(options(tmp_path / precision, num_train_epochs=1, bf16=bf16)) == 0
        metrics = json.loads((tmp_path / precision / "metrics.json").read_text())
        assert metrics["training"]["precision"] == precision
    assert ", bfloat16" in capsys.readouterr().out
    one, other = (weights(tmp_path / precision) for precision in ("bfloat16", "float32"))
    key = "vit.layers.0.mlp.fc1.weight"
    assert one[key].dtype == torch.float32 and not torch.equal(one[key], other[key])


@pytest.mark.parametrize(("side", "expected"), [(24 * 8, "eager"), (25 * 8, "sdpa")])
def test_attention_maps_are_kept_only_of_few_patches(side, expected, tmp_path, monkeypatch):
    """Eager attention is the faster one in bfloat16 on a CPU, and needs memory by the square of the patches."""
    model = ViTScratchForImageClassification(ViTScratchConfig.preset("showcase", image_size=side))
    args = SimpleNamespace(device=torch.device("cpu"), bf16=True, workers_are_open=False)
    run_module.suit_device(args, model, SimpleNamespace(train=None))
    assert model.config._attn_implementation == expected


def test_images_that_fill_no_batch_are_left_out_of_training_alone(tmp_path, capsys):
    """330 images in batches of 64; the validation and test images are fewer than one batch."""
    changes = {"dataloader_drop_last": True, "max_train_samples": 330, "num_train_epochs": 1}
    assert finetune.main(options(tmp_path / "run", **changes)) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["training"]["steps"] == 5
    assert metrics["validation"]["examples"] == metrics["test"]["examples"] == 64
    assert finetune.main(options(tmp_path / "none", **changes, per_device_train_batch_size=331)) == 2
    assert "no batch is full: 330 images for training" in capsys.readouterr().err


def test_dry_run_checks_the_data_and_draws_samples(tmp_path, capsys):
    folder = tmp_path / "new"
    assert finetune.main([*options(folder, preset="showcase", config_overrides=None), "--dry_run", "True"]) == 0
    text = capsys.readouterr().out
    for words in (
        "847,626",
        "27,268,096",
        "fingerprint",
        "320 train, 64 validation, 64 test",
        "columns image and label",
        "64 = 64 per device x 1 process x 1",
    ):
        assert words in text
    assert [path.name for path in folder.iterdir()] == ["samples.png"]


@pytest.mark.parametrize(("name", "told", "flip"), [("digits", None, 0.0), ("photos", None, 0.5), ("digits", 0.2, 0.2)])
def test_digits_are_not_mirrored_unless_told(name, told, flip):
    processor = SimpleNamespace(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    splits = SimpleNamespace(train=None, class_names=["0", "1"])
    data = DataArguments(dataset_name=name, horizontal_flip=told)
    augmentation = run_module.make_augmentation(data, SimpleNamespace(seed=0), processor, splits)
    assert augmentation.horizontal_flip == flip


KEPT_MEMORY = """
import resource, torch
from modeling_vit_scratch.training.run import keep_freed_memory

def new_pages():
    counts = []  # the fewest of eight: now and then something small takes the place that a tensor left
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(25_000_000).add_(1)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts)

returned = new_pages()
keep_freed_memory()
print(returned, new_pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_for_the_next_step():
    """100 MB, more than glibc keeps by itself: each is new pages (of 4 kB or of 2 MB) until they are kept."""
    output = subprocess.run([sys.executable, "-c", KEPT_MEMORY], capture_output=True, text=True, check=True).stdout
    returned, kept = map(int, output.split())
    assert returned > 20 * max(kept, 1)


def test_printed_steps_and_last_learning_rate_are_those_of_the_run(tmp_path, capsys):
    argv = options(tmp_path, warmup_steps=0.2, lr_scheduler_type="cosine", logging_steps=1, max_train_samples=330)
    assert finetune.main([*argv, "--gradient_accumulation_steps", "4"]) == 0
    text = capsys.readouterr().out
    rates = [float(row["learning_rate"]) for row in history(tmp_path) if row["learning_rate"]]
    assert len(rates) == 4 and "steps            4 (" in text  # 6 batches: 2 steps an epoch
    assert f"last step {rates[-1]:.3g}" in text


def test_accumulated_gradients_equal_those_of_one_batch(tmp_path):
    """330 images: the last group of micro-batches is short, and uneven."""
    plain = {
        "horizontal_flip": 0, "crop_padding": 0, "optim": "sgd", "learning_rate": 0.1, "max_train_samples": 330,
        "label_smoothing_factor": 0.1, "max_grad_norm": 0,
    }  # fmt: skip
    for name, batch, steps in (("one", 64, 1), ("four", 16, 4)):
        changes = plain | {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        assert finetune.main(options(tmp_path / name, **changes)) == 0
    one, four = weights(tmp_path / "one"), weights(tmp_path / "four")
    assert all(torch.allclose(one[name], four[name], atol=1e-6) for name in one)
    assert any(tensor.abs().max() > 0 for name, tensor in one.items() if name == "classifier.weight")


def test_trained_folder_starts_another_run_with_other_classes(run, tmp_path, caplog):
    folder, _ = run
    images = tmp_path / "pictures"
    from modeling_vit_scratch.data.records import load_records
    from modeling_vit_scratch.data.sources import load_raw

    records, _ = load_records(load_raw("digits"))
    for index in range(60):
        name = "even" if records["train"].labels[index] % 2 == 0 else "odd"
        (images / name).mkdir(parents=True, exist_ok=True)
        records["train"].image(index, 3).save(images / name / f"{index}.png")
    argv = options(tmp_path / "out", dataset_name=images, config_overrides=None, model_name_or_path=folder)
    assert finetune.main([*argv, "--train_val_split", "0.2"]) == 0
    assert "The head is new: 2 classes instead of 10" in caplog.text
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "even", 1: "odd"} and model.classifier.weight.abs().max() > 0


def test_the_source_of_a_trained_model_can_be_named(tmp_path):
    save_file(timm_tensors(classes=None), tmp_path / "dino.safetensors")
    arguments = {"model_name_or_path": str(tmp_path / "dino.safetensors"), "config_overrides": "num_attention_heads=4"}
    for source, mean in ((None, 0.5), ("dino", 0.485)):
        _, processor = models_module.load_trained(ModelArguments(**arguments, source=source))
        assert processor.image_mean[0] == mean
    with pytest.raises(ValueError, match="source 'keras' is unknown"):
        models_module.load_trained(ModelArguments(**arguments, source="keras"))


@pytest.mark.parametrize("name", ["DeiTForImageClassificationWithTeacher", "Dinov2ForImageClassification"])
def test_a_head_on_two_tokens_goes_on_learning(tmp_path, caplog, name):
    """Distilled DeiT's two heads and DINOv2's on class token and mean are one head of twice the width."""
    config = getattr(transformers, name.partition("For")[0] + "Config")(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        id2label={index: str(index) for index in range(10)}, label2id={str(index): index for index in range(10)},
    )  # fmt: skip
    theirs = getattr(transformers, name)(config)
    theirs.save_pretrained(tmp_path / "theirs")
    argv = options(tmp_path / "out", model_name_or_path=tmp_path / "theirs", config_overrides=None, learning_rate=0)
    assert finetune.main([*argv, "--head_learning_rate", "0.1", "--num_train_epochs", "1"]) == 0
    assert "new head" not in caplog.text and "head is new" not in caplog.text
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(model.vit.norm.weight, theirs.base_model.layernorm.weight)
    kernel = theirs.base_model.embeddings.patch_embeddings.projection.weight
    assert torch.equal(model.vit.embeddings.patch_embeddings.projection.weight, kernel.flatten(1))
    assert model.classifier.weight.shape == (10, 32) and model.classifier.weight.abs().max() > 0.01


def test_streaming_stops_and_resumes_as_if_it_had_not(tmp_path, interrupt, capsys, monkeypatch):
    """Images of a folder, read while they are trained on; twelve steps, stopped after three and after seven."""
    from modeling_vit_scratch.data.records import load_records
    from modeling_vit_scratch.data.sources import load_raw

    records, _ = load_records(load_raw("digits"))
    for index in range(120):
        folder = tmp_path / "pictures" / f"class{records['train'].labels[index] % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        records["train"].image(index, 3).save(folder / f"{index}.png")
    changes = {
        "dataset_name": tmp_path / "pictures", "streaming": True, "max_train_samples": None, "max_steps": 12,
        "per_device_train_batch_size": 8, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 6,
        "save_steps": 6, "config_overrides": RANDOM,
    }  # fmt: skip
    whole, parts = (options(tmp_path / name, **changes) for name in ("whole", "parts"))
    monkeypatch.setattr(run_module, "usable_cores", lambda: 3)
    assert finetune.main(whole) == 0
    interrupt["at"] = 3
    assert finetune.main(parts) == 130
    other = [*parts, "--resume_from_checkpoint", "last", "--dataloader_num_workers", "0"]
    assert finetune.main(other) == 2  # which would read in another order
    assert "dataloader_num_workers = 2, but this run has 0" in capsys.readouterr().err
    interrupt["at"] = 7
    monkeypatch.setattr(run_module, "usable_cores", lambda: 64)  # of another machine: without the option, no change
    assert finetune.main([*parts, "--resume_from_checkpoint", "last"]) == 130
    assert finetune.main([*parts, "--resume_from_checkpoint", "last"]) == 0
    assert history(tmp_path / "parts") == history(tmp_path / "whole")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    assert "streamed train" in capsys.readouterr().out
    assert finetune.main([*parts, "--resume_from_checkpoint", "last"]) == 0  # killed after its last checkpoint
    assert history(tmp_path / "parts") == history(tmp_path / "whole")


def test_resuming_after_the_last_step_trains_no_more(tmp_path):
    argv = options(
        tmp_path, max_steps=3, save_steps=3, eval_steps=3, save_strategy="steps", eval_strategy="steps",
        lr_scheduler_type="constant",
    )  # fmt: skip
    assert finetune.main(argv) == 0
    before, rows = weights(tmp_path), history(tmp_path)
    assert finetune.main([*argv, "--resume_from_checkpoint", "last"]) == 0
    assert history(tmp_path) == rows and rows[-1]["step"] == "3"
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path).items())


def test_processes_that_read_are_for_the_cores_that_there_are(monkeypatch):
    """Shared with the other processes of a machine; a number that is given holds, 0 too."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(33)), raising=False)
    photos, stream = object.__new__(run_module.LazyImages), object.__new__(run_module.StreamedImages)
    monkeypatch.setattr(run_module.StreamedImages, "num_shards", 5)
    counts = []
    for given, images in ((None, photos), (None, stream), (0, photos), (0, stream), (3, stream)):
        args = ImageTrainingArguments("unused", use_cpu=True, bf16=False, dataloader_num_workers=given)
        for processes in ("1", "4", "64"):
            args.workers_are_open = given is None
            monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
            run_module.suit_device(args, None, SimpleNamespace(train=images))
            counts.append(args.dataloader_num_workers)
    assert counts == [32, 7, 1, 5, 5, 1, *[0] * 6, 3, 3, 3]
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert run_module.usable_cores() == 6


def test_streaming_needs_max_steps(tmp_path, capsys):
    argv = options(tmp_path, streaming=True, max_train_samples=None)
    assert finetune.main(argv) == 2
    assert "--max_steps" in capsys.readouterr().err


def groups(model, **settings):
    args = ImageTrainingArguments("unused", use_cpu=True, learning_rate=1.0, weight_decay=0.1, **settings)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimization_module.parameter_groups(model, args)
        for parameter in group["params"]
    }


def test_parameter_groups_follow_layer_decay_head_rate_and_decay_exclusions():
    config = ViTScratchConfig.preset("showcase", num_hidden_layers=3, use_final_norm=True, num_register_tokens=1)
    model = ViTScratchForImageClassification(config)
    found = groups(model, layer_decay=0.5, head_learning_rate=7.0)
    assert set(found) == {name for name, _ in model.named_parameters()}
    expected = {
        "vit.embeddings.patch_embeddings.projection.weight": (0.125, 0.1),
        "vit.embeddings.position_embeddings": (0.125, 0),
        "vit.embeddings.register_tokens": (0.125, 0),
        "vit.layers.0.attention.qkv.weight": (0.25, 0.1),
        "vit.layers.1.mlp.fc1.bias": (0.5, 0),
        "vit.layers.2.mlp.fc2.weight": (1, 0.1),
        "vit.norm.weight": (1, 0),
        "classifier.weight": (7, 0.1),
        "classifier.bias": (7, 0),
    }
    assert {name: found[name] for name in expected} == expected
    assert set(groups(model).values()) == {(1, 0.1), (1, 0)}
    model.vit.requires_grad_(False)
    assert set(groups(model)) == {"classifier.weight", "classifier.bias"}


def test_frozen_backbone_does_not_move_and_higher_resolution_interpolates(run, tmp_path, capsys):
    folder = tmp_path / "source"  # of a model that came from timm, say
    shutil.copytree(run[0], folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((folder / "config.json").read_text()) | {"position_interpolation": "bicubic_antialias"}
    (folder / "config.json").write_text(json.dumps(config))
    tmp_path /= "run"
    argv = options(tmp_path, config_overrides=None, model_name_or_path=folder, freeze_backbone=True, image_size=64)
    assert finetune.main(argv) == 0
    assert json.loads((tmp_path / "config.json").read_text())["position_interpolation"] == "bicubic_antialias"
    before, after = weights(folder), weights(tmp_path)
    moved = {name for name in before if before[name].shape != after[name].shape or not before[name].equal(after[name])}
    assert moved == {"vit.embeddings.position_embeddings", "classifier.weight", "classifier.bias"}
    larger = convert_checkpoint(folder, image_size=64).vit.embeddings.position_embeddings
    assert larger.shape == (1, 64, 16) and torch.equal(after["vit.embeddings.position_embeddings"], larger)
    assert "of which 170 are trained" in capsys.readouterr().out


# --- options and recipes ---


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_command_line_wins_over_the_recipe(tmp_path):
    path = write(tmp_path, "dataset_name: digits\nlearning_rate: 3e-3\nseed: 1\nconfig_overrides: {hidden_size: 64}\n")
    model, data, args = finetune.parse([str(path), "--seed", "2", "--output_dir", str(tmp_path)])
    assert (data.dataset_name, args.learning_rate, args.seed) == ("digits", 3e-3, 2)
    assert models_module.make_config(model, ["a", "b"]).hidden_size == 64
    model.config_overrides = "stem_channels=[4, 8],patch_size=[4,8], hidden_size=32"
    config = models_module.make_config(model, ["a", "b"])
    assert (config.stem_channels, config.patch_size, config.hidden_size) == ((4, 8), (4, 8), 32)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat: 1", ["learning_rat", "learning_rate"]),
        ("seed: 1\nseed: 2", ["seed", "twice"]),
        ("seed: one", ["--seed", "one"]),
        ("seed: 1.5", ["--seed", "1.5"]),
        ("use_cpu: 7", ["--use_cpu"]),
        ("lr_scheduler_type: linaer", ["--lr_scheduler_type", "linaer"]),
        ("- 1", ["option: value"]),
        ("seed: [", ["recipe"]),
    ],
)
def test_bad_recipes_are_refused(tmp_path, capsys, text, words):
    with pytest.raises(SystemExit) as stop:
        finetune.parse([str(write(tmp_path, text)), "--dataset_name", "digits"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


def test_abbreviated_options_are_refused(capsys):
    with pytest.raises(SystemExit):
        finetune.parse(["--dataset_name", "digits", "--learning", "1"])
    assert "--learning" in capsys.readouterr().err


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("recipe", sorted((SCRIPTS / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_names_its_command(recipe, fast, tmp_path, monkeypatch):
    """As the command has it, on a CPU with units for bfloat16 and on one without."""
    monkeypatch.setattr(arguments_module, "has_fast_bfloat16", lambda device: fast)
    text = recipe.read_text()
    assert text.startswith("#") and f"scripts/finetune.py scripts/recipes/{recipe.name}" in text
    model, _, args = finetune.parse([str(recipe), "--output_dir", str(tmp_path), "--dataset_name", "digits"])
    models_module.make_config(model, ["a", "b"])
    if not torch.accelerator.is_available():
        assert args.bf16 == (fast and "\nbf16: false" not in text)


def test_help_shows_the_usual_options_and_help_all_the_rest(capsys):
    for flag, rare in (("--help", False), ("--help_all", True)):
        with pytest.raises(SystemExit) as stop:
            finetune.parse([flag])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert "--dataset_name" in text and "--learning_rate" in text and "--preset" in text
        assert ("--adam_beta1" in text) == rare


def test_preset_and_overrides_are_checked(tmp_path, capsys):
    for change, words in (
        ({"preset": "bse"}, ["bse", "base"]),
        ({"config_overrides": "hidden_sise=3"}, ["hidden_sise", "hidden_size"]),
        ({"config_overrides": "hidden_size"}, ["field=value"]),
        ({"config_overrides": "num_labels=5"}, ["num_labels", "classes of the data"]),
        *(
            ({"config_overrides": f"{name}={value}"}, [f"training decides {name}"])
            for name, value in (("return_dict", "false"), ("output_attentions", "true"), ("problem_type", "regression"))
        ),
        ({"config_overrides": "image_size=16", "image_size": 8}, ["image_size (8) is 16 in config_overrides"]),
    ):
        assert finetune.main(options(tmp_path / "x", **change)) == 2
        message = capsys.readouterr().err
        assert all(word in message for word in words), message


def test_overrides_beside_a_trained_model(tmp_path, capsys):
    trained = {"model_name_or_path": str(PACKAGED_MODEL)}
    for wrong in ("num_labels=5", "source=timm", "token=x", "cache_dir=x", "replace_head=true"):
        assert finetune.main(options(tmp_path / "x", **trained, config_overrides=wrong)) == 2
        assert wrong.partition("=")[0] in capsys.readouterr().err.splitlines()[-1]
    model, processor = models_module.load_trained(
        ModelArguments(**trained, config_overrides="image_size=64,drop_path_rate=0.1")
    )
    assert (model.config.image_hw, model.config.drop_path_rate) == ((64, 64), 0.1)
    assert processor.size["height"] == 64


def test_reports_to_tensorboard(tmp_path):
    """The curves that `--report_to` sends are those of the history, and no token goes with them."""
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    from tensorboardX.proto.event_pb2 import Event

    run = tmp_path / "run"
    settings = {"report_to": "tensorboard", "num_train_epochs": 1, "hub_token": "hf_secret"}
    assert finetune.main(options(run, **settings)) == 0
    (file,) = run.glob("runs/*/events*")
    content, sent = file.read_bytes(), {}
    assert b"hf_secret" not in content
    while content:  # records: length (8 bytes), its checksum (4), an event, its checksum (4)
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        sent |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        content = content[16 + length :]
    rows = [row for row in history(run) if row["loss"] or row["eval_accuracy"]]
    assert rows
    for row in rows:
        for column, tag in (("loss", "train/loss"), ("eval_accuracy", "eval/accuracy")):
            if row[column]:
                assert sent[tag, int(row["step"])] == pytest.approx(float(row[column]), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "text"), [("wandb", "pip install wandb"), ("tensorbord", "tensorbord is not supported, only")]
)
def test_a_report_that_cannot_be_sent_is_refused_at_once(name, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        finetune.main(options(tmp_path / "run", report_to=name))
    err = capsys.readouterr().err
    assert text in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_an_optimizer_that_is_not_installed_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    assert finetune.main(options(tmp_path, optim="adamw_bnb_8bit")) == 2
    assert "finetune.py: You need to install `bitsandbytes`" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["", "some.module."])
def test_an_error_of_a_reader_keeps_all_its_lines(module):
    """As torch passes it on: what led there is cut off, and what it says is whole."""
    said = "two files are bad:\n  a.png: not an image\n  b.png: empty"
    passed_on = (
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "worker.py", line 1, in _worker_loop\nValueError: what came first\n\nDuring handling of the above '
        f"exception, another exception occurred:\n\n  raise error\n{module}ValueError: {said}\n"
    )
    for text in (said, passed_on):
        assert finetune.without_traceback(ValueError(text)) == said


def test_the_command_line_that_reports_send_has_no_token(tmp_path, monkeypatch):
    words = options(tmp_path / "out", model_name_or_path="no/such/folder", hub_token="secret")
    monkeypatch.setattr(sys, "argv", ["finetune.py", *words, "--token=secret"])
    assert finetune.main() == 2
    assert sys.argv == ["finetune.py", *("***" if word == "secret" else word for word in words), "--token=***"]
