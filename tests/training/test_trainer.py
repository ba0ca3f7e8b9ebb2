"""What ours adds to Trainer: a clock, checkpoints that no kill loses, and processes that differ where they should."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from runs import RANDOM, fork_run, load_script, options, wait_all
from transformers import Trainer

from modeling_vit_scratch import ViTScratchConfig
from modeling_vit_scratch.hub.callback import take_snapshot
from modeling_vit_scratch.plots.runs import read_history
from modeling_vit_scratch.training import ImageTrainer, callbacks, checkpoints
from modeling_vit_scratch.training import output as output_module
from modeling_vit_scratch.training.callbacks import OwnNoise, cpu_seconds
from modeling_vit_scratch.training.trainer import TRAINED_WEIGHTS, training_loss

finetune = load_script("finetune")


# --- the clock --------------------------------------------------------------------------------------------------------


def test_the_clock_counts_batches_and_steps_but_no_evaluation_and_no_saving(tmp_path, monkeypatch):
    """On a clock that stands still but for what is done: 1 s a batch that is read, 100 s a step, 10,000 s the rest."""
    now = {"wall": 0.0, "cpu": 0.0}

    def takes(name, seconds):
        original = getattr(ImageTrainer, name)

        def slow(self, *args, **kwargs):
            now["wall"] += seconds
            now["cpu"] += 2 * seconds
            return original(self, *args, **kwargs)

        monkeypatch.setattr(ImageTrainer, name, slow)

    takes("get_batch_samples", 1)
    takes("training_step", 100)
    for name in ("evaluate", "_save_checkpoint", "predict"):
        takes(name, 10_000)
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(callbacks, "cpu_seconds", lambda: now["cpu"])
    assert finetune.main(options(tmp_path)) == 0  # two epochs of five steps
    recorded = json.loads((tmp_path / "metrics.json").read_text())["time"]
    assert recorded == {"train_seconds": 1010.0, "train_cpu_seconds": 2020.0}
    table = read_history(tmp_path)
    assert table["train_seconds"][np.isfinite(table["loss"])].tolist() == [303, 606, 909]  # logged every three steps


BUSY = "import time\nwhile time.process_time() < 0.5: pass\n"


def test_cpu_seconds_count_children_that_run_and_that_have_ended():
    before = cpu_seconds()
    subprocess.run([sys.executable, "-c", BUSY], check=True)
    ended = cpu_seconds() - before
    assert ended >= 0.48  # the system counts user and system time in hundredths, and cuts both
    child = subprocess.Popen([sys.executable, "-c", BUSY + "print(flush=True)\ninput()"], **dict.fromkeys(
        ("stdin", "stdout"), subprocess.PIPE))  # fmt: skip
    child.stdout.readline()
    assert cpu_seconds() - before >= ended + 0.45  # while it waits
    child.communicate(b"\n")
    assert cpu_seconds() - before >= ended + 0.45  # and now that it is gone


def test_workers_that_read_images_are_counted(tmp_path, monkeypatch):
    """Each image takes 10 ms of a worker's CPU time."""
    from modeling_vit_scratch.data.splits import LazyImages

    original = LazyImages.__getitem__

    def slow(self, index):
        until = time.process_time() + 0.01
        while time.process_time() < until:
            pass
        return original(self, index)

    monkeypatch.setattr(LazyImages, "__getitem__", slow)
    settings = {"crop_scale": 0.5, "num_train_epochs": 1, "max_train_samples": 100, "dataloader_num_workers": 1}
    assert finetune.main(options(tmp_path, **settings)) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["time"]["train_cpu_seconds"] >= 1.0


# --- the loss ---------------------------------------------------------------------------------------------------------


def loss_of(logits, labels, problem_type=None, **kwargs):
    return training_loss(labels, logits, ViTScratchConfig(num_labels=5, problem_type=problem_type), **kwargs)


def test_label_smoothing():
    logits, indices = torch.randn(6, 5), torch.arange(6) % 5
    smooth = torch.nn.functional.one_hot(indices, 5) * 0.9 + 0.1 / 5
    expected = -(smooth * logits.log_softmax(-1)).sum(-1).mean()
    one_hot = torch.nn.functional.one_hot(indices, 5).float()
    for problem in (None, "single_label_classification"):
        for labels in (indices, one_hot):
            loss = loss_of(logits, labels, problem, label_smoothing=0.1)
            torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
            assert abs(loss - loss_of(logits, labels, problem)) > 1e-3
    for problem in ("multi_label_classification", "regression"):
        assert loss_of(logits, one_hot, problem, label_smoothing=0.1) == loss_of(logits, one_hot, problem)


@pytest.mark.parametrize("problem", [None, "single_label_classification", "multi_label_classification", "regression"])
def test_loss_is_a_share_of_the_accumulated_batch(problem):
    logits, labels = torch.randn(8, 5), torch.rand(8, 5).softmax(-1)
    whole = loss_of(logits, labels, problem)
    for sizes in ([2, 6], [4, 4], [1, 2, 5]):
        parts = zip(logits.split(sizes), labels.split(sizes), strict=True)
        total = sum(loss_of(a, b, problem, num_items_in_batch=torch.tensor(8)) for a, b in parts)
        torch.testing.assert_close(total, whole, atol=1e-6, rtol=0)


# --- checkpoints and folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_a_kill_between_two_renames_loses_no_checkpoint(tmp_path, whole, monkeypatch):
    """A checkpoint is saved anew under its old name, and the process dies when the old one is out of the way."""
    folder = tmp_path / "run"
    assert finetune.main(options(folder)) == 0
    final, staged = folder / "checkpoint-10", folder / checkpoints.STAGING / "checkpoint-10"
    shutil.copytree(final, staged)
    (staged / checkpoints.DIGESTS).unlink()
    (staged / "mark").touch()
    if not whole:
        (staged / "optimizer.pt").write_bytes(b"torn")
    rename = type(staged).rename

    def killed(self, target):
        if self == staged:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(staged), "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.publish(staged, final)
    if not whole:
        (staged / "optimizer.pt").write_bytes(b"torn once more")
    assert not final.exists()
    assert finetune.main([*options(folder), "--resume_from_checkpoint", "last", "--dry_run", "True"]) == 0
    assert checkpoints.damage(final) is None and (final / "mark").exists() == whole


def test_replacing_a_run_leaves_nothing_of_it(tmp_path, monkeypatch):
    """What a run writes goes, all of it and nothing else, before the new run trains."""
    folder = tmp_path / "run"
    assert finetune.main(options(folder, num_train_epochs=1)) == 0
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").touch()
    for name in ("samples.png", "notes.txt", "plots/mine.png", "model-00001-of-00002.safetensors"):
        (folder / name).touch()
    (folder / "model.safetensors.index.json").touch()
    assert finetune.main(options(folder, overwrite_output_dir=True, dry_run=True)) == 0
    assert (folder / "metrics.json").exists()  # a dry run replaces nothing

    before = sorted(folder.rglob("*"))
    elsewhere = {"overwrite_output_dir": True, "dataset_name": tmp_path / "nothing"}
    assert finetune.main(options(folder, **elsewhere)) == 2  # what is refused replaces nothing either
    itself = {"overwrite_output_dir": True, "model_name_or_path": folder, "config_overrides": None}
    assert finetune.main(options(folder, **itself)) == 2
    assert sorted(folder.rglob("*")) == before

    class Stopped(Exception):
        pass

    def stop(*args, **kwargs):
        raise Stopped

    monkeypatch.setattr(ImageTrainer, "train", stop)
    with pytest.raises(Stopped):
        finetune.main(options(folder, overwrite_output_dir=True))
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert left == ["notes.txt", "plots/mine.png"]


def test_every_file_of_a_run_is_one_that_replacing_removes(tmp_path):
    pytest.importorskip("peft", reason="PEFT is not installed")
    for name, settings in (
        ("run", {}),
        ("adapted", {"model_name_or_path": tmp_path / "run", "config_overrides": None, "lora_rank": 2}),
        ("pretrained", {"task": "masked-image-modeling"}),
    ):
        folder = tmp_path / name
        assert finetune.main(options(folder, num_train_epochs=1, **settings)) == 0
    for folder in tmp_path.iterdir():
        output_module.remove_run(folder)
        assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_weights_can_be_read_by_whoever_can_read_their_config(tmp_path):
    before = os.umask(0o022)
    try:
        assert finetune.main(options(tmp_path, ema_decay=0.9)) == 0
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o644, path


def test_a_push_of_a_checkpoint_has_the_averaged_weights_alone(tmp_path):
    assert finetune.main(options(tmp_path, ema_decay=0.9)) == 0
    checkpoint = tmp_path / "checkpoint-10"
    assert (checkpoint / TRAINED_WEIGHTS).is_file()
    snapshot = take_snapshot(checkpoint, "Training is still going on.")
    assert [path.name for path in snapshot.glob("*.safetensors")] == ["model.safetensors"]


# --- processes --------------------------------------------------------------------------------------------------------


def test_each_process_draws_its_own_masks(tmp_path, monkeypatch):
    """Two processes note what torch's generator gives before each step; the first draws what one process draws."""
    step = ImageTrainer.training_step

    def noted(self, *args, **kwargs):
        state = torch.get_rng_state()
        with open(tmp_path / f"drawn{self.args.world_size}.{self.args.process_index}", "a") as file:
            print(torch.rand(1).item(), file=file)
        torch.set_rng_state(state)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ImageTrainer, "training_step", noted)
    settings = {"config_overrides": RANDOM, "num_train_epochs": 1}
    assert wait_all(fork_run(options(tmp_path / "two", **settings), 2, tmp_path / "log")) == [0, 0]
    first, second = ((tmp_path / f"drawn2.{rank}").read_text().split() for rank in (0, 1))
    assert len(first) == len(second) == 3 and not set(first) & set(second)
    assert wait_all(fork_run(options(tmp_path / "one", **settings), 1, tmp_path / "log")) == [0]
    assert (tmp_path / "drawn1.0").read_text().split()[0] == first[0]
    assert OwnNoise in [type(callback) for callback in _callbacks(monkeypatch, tmp_path)]


def _callbacks(monkeypatch, tmp_path) -> list:
    found = []

    def keep(self, *args, **kwargs):
        found.extend(self.callback_handler.callbacks)
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageTrainer, "train", keep)
    with pytest.raises(KeyboardInterrupt):
        finetune.main(options(tmp_path / "pre-trained", task="masked-image-modeling"))
    return found


def test_two_processes_stay_together_when_they_resume(tmp_path):
    settings = {"num_train_epochs": 2, "save_total_limit": 9}
    assert wait_all(fork_run(options(tmp_path / "run", **settings), 2, tmp_path / "log")) == [0, 0]
    first = min(checkpoints.list_checkpoints(tmp_path / "run"), key=lambda path: int(path.name[11:]))
    argv = [*options(tmp_path / "run", **settings), "--resume_from_checkpoint", str(first)]
    assert wait_all(fork_run(argv, 2, tmp_path / "log")) == [0, 0]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["environment"]["processes"] == 2 and metrics["training"]["steps"] == 6
    assert metrics["training"]["changed_on_resuming"] == []


def test_averaging_sharded_weights_is_refused(tmp_path, monkeypatch, capsys):
    original = Trainer.create_accelerator_and_postprocess

    def sharded(self):
        original(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharded)
    assert finetune.main(options(tmp_path, ema_decay=0.9)) == 2
    assert "ema_decay follows whole weights" in capsys.readouterr().err


def test_smoothing_takes_every_label_that_the_plain_loss_takes():
    """Ignored ones (-100), columns, bytes; and it leaves a regression alone."""
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    config, smooth = ViTScratchConfig(num_labels=5), {"label_smoothing": 0.1}
    labels = torch.tensor([1, 4, 2])
    expected = torch.nn.functional.cross_entropy(logits, labels, **smooth)
    for same in (labels, labels.unsqueeze(1)):
        assert torch.equal(training_loss(same, logits, config, **smooth), expected)
    ignored = torch.tensor([1, -100, 2])
    assert torch.equal(
        training_loss(ignored, logits, config, **smooth), torch.nn.functional.cross_entropy(logits, ignored, **smooth)
    )
    soft = torch.nn.functional.one_hot(labels, 5).float()
    assert torch.allclose(training_loss(soft, logits, config, **smooth), expected)
    one, target = torch.randn(3, 1), torch.tensor([0.5, 1.0, 2.0])
    regression = ViTScratchConfig(num_labels=1)
    assert torch.equal(training_loss(target, one, regression, **smooth), training_loss(target, one, regression))
