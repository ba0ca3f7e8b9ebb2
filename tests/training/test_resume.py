"""SIGKILL at any moment, then resume: weights, history and metrics are those of the run that was never stopped."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from runs import RANDOM, fork_run, history, options, wait_all, weights

from modeling_vit_scratch.training import ImageTrainer, checkpoints

KILLS = ("step", "saving", "evaluating")  # for each number of workers and processes


def settings(output: Path, workers: int, schedule: str) -> list[str]:
    """All augmentations, dropout, stochastic depth, a schedule, Muon, averaged weights; logging out of step."""
    return options(
        output, config_overrides=RANDOM, max_train_samples=160, per_device_train_batch_size=8, num_train_epochs=3,
        save_strategy="steps", eval_strategy="steps", save_steps=5, eval_steps=5, logging_steps=3,
        lr_scheduler_type=schedule, warmup_steps=0.1, label_smoothing_factor=0.1, crop_padding=2,
        dataloader_num_workers=workers, muon_learning_rate=0.02, ema_decay=0.9, rand_augment=1, random_erasing=0.3,
        mixup_alpha=0.2, cutmix_alpha=1.0, augment_until="mixup=0.7,cutmix=0.7",
    )  # fmt: skip


def finish(argv: list[str], processes: int, log: Path):
    assert wait_all(fork_run(argv, processes, log)) == [0] * processes, Path(f"{log}.0").read_text()[-3000:]


def kill(argv: list[str], processes: int, log: Path, moment: str, marker: Path, rng: random.Random):
    """Start a run, and kill all its processes in mid-step, mid-save or mid-evaluation."""
    output = Path(argv[argv.index("--output_dir") + 1])
    ids = fork_run(argv, processes, log)
    due = rng.randrange(1, 5)  # which save or evaluation, of five or more
    deadline = time.monotonic() + 100
    seen = set()
    while time.monotonic() < deadline:
        if moment == "saving" and (output / checkpoints.STAGING).exists():
            if len(checkpoints.list_checkpoints(output)) + len(seen) >= min(due, 2):
                time.sleep(rng.uniform(0, 0.02))
                break
            seen.add(len(seen))
        elif moment == "evaluating" and marker.exists() and marker.stat().st_size >= due:
            time.sleep(rng.uniform(0, 0.02))
            break
        elif moment == "step" and any(int(path.name[11:]) >= 5 * due for path in checkpoints.list_checkpoints(output)):
            time.sleep(rng.uniform(0, 0.05))
            break
        time.sleep(0.0005)
    for child in ids:
        os.kill(child, signal.SIGKILL)
    return wait_all(ids)


def outcome(folder: Path) -> tuple:
    metrics = json.loads((folder / "metrics.json").read_text())
    return history(folder), metrics["validation"], metrics["test"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_six_kills_six_identical(tmp_path, monkeypatch):
    marker = tmp_path / "evaluations"
    evaluate = ImageTrainer.evaluate

    def marked(self, *args, **kwargs):
        with open(marker, "a") as file:
            file.write(".")
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(ImageTrainer, "evaluate", marked)
    totals = [0, 0]
    for workers, processes, schedule in ((0, 1, "linear"), (2, 2, "warmup_stable_decay")):
        folder = tmp_path / f"workers{workers}-processes{processes}"
        folder.mkdir()
        for position, count in enumerate(kills_and_identical(folder, marker, workers, processes, schedule)):
            totals[position] += count
    print("{} kills, {} identical".format(*totals))
    assert totals == [6, 6]


def kills_and_identical(tmp_path: Path, marker: Path, workers: int, processes: int, schedule: str) -> tuple[int, int]:
    """Kill, resume and compare once for each of `KILLS`; how often that killed, and gave the same."""
    reference = tmp_path / "reference"
    finish(settings(reference, workers, schedule), processes, tmp_path / "log")
    expected, expected_weights = outcome(reference), weights(reference)
    rng = random.Random(workers * 10 + processes)
    identical = killed = 0
    for number, moment in enumerate(KILLS):
        output = tmp_path / f"run{number}"
        argv = settings(output, workers, schedule)
        marker.unlink(missing_ok=True)
        codes = kill(argv, processes, tmp_path / "log", moment, marker, rng)
        killed += -signal.SIGKILL in codes
        last, notes = checkpoints.last_good_checkpoint(output)
        assert notes == [], "a checkpoint became visible before it was whole"
        if last is None:
            shutil.rmtree(output, ignore_errors=True)
        finish(argv if last is None else [*argv, "--resume_from_checkpoint", "last"], processes, tmp_path / "log")
        same = all(torch.equal(tensor, weights(output)[name]) for name, tensor in expected_weights.items())
        assert same and outcome(output) == expected, f"{moment} kill, resumed from {last and last.name}"
        identical += 1
    return killed, identical
