"""Checkpoints are pushed in the background, and training neither waits nor fails."""

import shlex
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_folders import MODEL_FILES, give_up_after, make_model, make_processor
from runs import load_script
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_vit_scratch.hub import HubPushCallback, prepare_repo


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
    callback = HubPushCallback("me/t", private=True, report=lambda line: None, base_model="some/base")
    folder = tmp_path / "out"
    train(folder, callback, save_total_limit=1)
    assert hub.commits("me/t") == ["Training in progress, step 1 of 2", "Training in progress, step 2 of 2"]
    assert hub.repos["model", "me/t"].private and not callback.errors
    commit = hub.repos["model", "me/t"].find("main")
    weights = []
    for _ in range(2):
        assert set(commit.files) - {".gitattributes"} == MODEL_FILES | {"README.md"}
        card = commit.files["README.md"]
        assert b"Training is still going on: this is step" in card
        assert b"base_model: some/base" in card and b"license" not in card.partition(b"\n---")[0]
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
    callback = HubPushCallback("me/t", retry_seconds=(), report=shown.append)
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
        assert load_script("push_to_hub").main(command[2:]) == 0
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
    callback = HubPushCallback("me/t", report=lambda line: None)
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
    callback = HubPushCallback("me/t", wait_seconds=0.05, report=lambda line: None)
    prepare_repo("me/t")
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
    callback = HubPushCallback("me/t")
    args, state = saved(tmp_path, 1, seed=1)
    state.is_world_process_zero = False
    for event in (callback.on_train_begin, callback.on_save, callback.on_train_end):
        event(args, state, None)
    assert not hub.requests and not pushing()
