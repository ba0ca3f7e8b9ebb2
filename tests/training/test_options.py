"""Every option is honoured or refused, whatever is trained on; and a resumed run keeps them or says what changed."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import TINY, history, load_script, options
from transformers.utils import logging as transformers_logging

from modeling_vit_scratch.training import (
    DataArguments,
    ImageTrainingArguments,
    ModelArguments,
    checkpoints,
    finetuning,
    pretraining,
)
from modeling_vit_scratch.training import run as run_module
from modeling_vit_scratch.training.arguments import MASKED
from modeling_vit_scratch.training.recorded import (
    CHANGEABLE,
    OF_THE_CALL,
    RECORDED_OTHERWISE,
    default_options,
    run_options,
)

finetune = load_script("finetune")
GROUPS = ModelArguments, DataArguments, ImageTrainingArguments
OURS = [
    field.name
    for group in GROUPS
    for field in fields(group)
    if group is not ImageTrainingArguments or field.name in ImageTrainingArguments.__annotations__
]


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_every_option_is_kept_or_may_change_on_resuming():
    """Each option is in one place; one that nobody thought of is kept, which is the safe side."""
    kept = set(default_options())
    places = kept, set(CHANGEABLE), set(OF_THE_CALL), set(RECORDED_OTHERWISE)
    names = {field.name for group in GROUPS for field in fields(group)}
    assert names <= set.union(*places) | {"logging_dir"}
    assert sum(map(len, places)) == len(set.union(*places))
    assert {"learning_rate", "weight_decay", "mixup_alpha", "label_smoothing_factor", "warmup_steps"} <= kept
    assert {"max_steps", "num_train_epochs", "logging_steps", "save_steps", "use_cpu", "torch_compile"} <= CHANGEABLE


def other(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else "another"


def written(folder: Path, args: ImageTrainingArguments) -> tuple[Path, dict]:
    """A checkpoint as a run with these options writes it, as far as resuming looks at it; and its facts."""
    kept, changeable = run_options(ModelArguments(), DataArguments(), args)
    facts = {**kept, "changeable": changeable, "changes": []}
    folder.mkdir(exist_ok=True)
    (folder / checkpoints.RUN).write_text(json.dumps(facts))
    (folder / "trainer_state.json").write_text('{"global_step": 7}')
    (folder / "optimizer.pt").touch()
    return folder, facts


@pytest.mark.parametrize("name", sorted(default_options()))
def test_a_kept_option_is_refused_with_both_values(name, tmp_path):
    checkpoint, facts = written(tmp_path, ImageTrainingArguments("unused", use_cpu=True))
    assert checkpoints.check_run(checkpoint, facts, default_options()) == []
    changed = facts | {name: other(facts[name])}
    with pytest.raises(ValueError) as error:
        checkpoints.check_run(checkpoint, changed, default_options())
    assert f"{name} = {facts[name]!r}" in str(error.value) and repr(changed[name]) in str(error.value)
    # Given now, and unknown to the version that wrote the checkpoint: refused unless it is the default.
    (checkpoint / checkpoints.RUN).write_text(json.dumps({key: facts[key] for key in facts if key != name}))
    assert checkpoints.check_run(checkpoint, facts, default_options()) == []
    with pytest.raises(ValueError, match=name):
        checkpoints.check_run(checkpoint, changed, default_options())


@pytest.mark.parametrize("name", sorted(run_options(ImageTrainingArguments("unused", use_cpu=True))[1]))
def test_an_option_that_may_change_is_recorded_at_its_step(name, tmp_path):
    checkpoint, facts = written(tmp_path, ImageTrainingArguments("unused", use_cpu=True))
    before = facts["changeable"][name]
    changed = facts | {"changeable": facts["changeable"] | {name: other(before)}}
    changes = checkpoints.check_run(checkpoint, changed, default_options())
    assert changes == [{"step": 7, name: [before, other(before)]}]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two epochs of five steps, all of whose checkpoints are there: its folder."""
    folder = tmp_path_factory.mktemp("run") / "output"
    assert finetune.main(options(folder, save_total_limit=9)) == 0
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 5e-2}, ["learning_rate = 0.001", "0.05"]),
        ({"weight_decay": 0.1}, ["weight_decay = 0.0", "0.1"]),
        ({"mixup_alpha": 0.2}, ["mixup_alpha = 0.0", "0.2"]),
        ({"label_smoothing_factor": 0.1}, ["label_smoothing_factor = 0.0", "0.1"]),
    ],
)
def test_resuming_with_other_settings_is_refused(run, capsys, change, words):
    before = (run / "metrics.json").read_bytes()
    assert finetune.main([*options(run, **change), "--resume_from_checkpoint", "last"]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert (run / "metrics.json").read_bytes() == before


def test_what_may_change_is_honoured_and_recorded(run, tmp_path, capsys):
    """Longer, logged and saved more often, from step 5 on; the schedule is that of the longer run at once."""
    import shutil

    shutil.copytree(run / "checkpoint-5", tmp_path / "checkpoint-5")
    changes = {"num_train_epochs": 4, "logging_steps": 1, "save_strategy": "steps", "save_steps": 10}
    changes |= {"eval_strategy": "steps", "eval_steps": 10, "save_total_limit": 9}
    argv = [*options(tmp_path, **changes), "--resume_from_checkpoint", "last"]
    assert finetune.main(argv) == 0
    output = capsys.readouterr().out
    assert "from step 5" in output and "num_train_epochs 2.0 -> 4.0" in output and "logging_steps 3 -> 1" in output
    rows = history(tmp_path)
    logged = {int(row["step"]): row for row in rows if row["loss"]}
    assert set(range(6, 21)) <= set(logged)
    rates = [float(logged[step]["learning_rate"]) for step in range(6, 21)]
    assert rates == pytest.approx([1e-3 * (1 - (step - 1) / 20) for step in range(6, 21)])
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == [
        "checkpoint-20", "checkpoint-10", "checkpoint-5",
    ]  # fmt: skip
    (recorded,) = json.loads((tmp_path / "metrics.json").read_text())["training"]["changed_on_resuming"]
    assert recorded["step"] == 5 and recorded["num_train_epochs"] == [2.0, 4.0]
    assert recorded["save_steps"] == [500, 10]
    # Resumed once more, as it is now: what changed before is still known.
    assert finetune.main(argv) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["training"]["changed_on_resuming"] == [recorded]


def test_fewer_steps_than_are_done_are_refused(run, capsys):
    assert finetune.main([*options(run, max_steps=3), "--resume_from_checkpoint", "last"]) == 2
    assert "is past the end: it has taken 10 steps, and this run has 3" in capsys.readouterr().err


def test_the_loss_of_a_resumed_part_is_the_mean_of_its_steps(run, tmp_path, monkeypatch):
    import shutil

    from transformers import Trainer

    logged, log = [], Trainer.log
    monkeypatch.setattr(Trainer, "log", lambda self, logs, *rest: (logged.append(logs), log(self, logs, *rest))[1])

    shutil.copytree(run / "checkpoint-5", tmp_path / "checkpoint-5")  # two steps after the last log entry
    assert finetune.main([*options(tmp_path), "--resume_from_checkpoint", "last"]) == 0
    [mean] = [logs["train_loss"] for logs in logged if "train_loss" in logs]
    # The first ten steps of ten classes: nothing is far from ln 10, and three epochs' sum would be.
    losses = [float(row["loss"]) for row in history(tmp_path) if row["loss"]]
    assert min(losses) - 0.1 < mean < max(losses) + 0.1
    logged.clear()
    assert finetune.main([*options(tmp_path), "--resume_from_checkpoint", "last"]) == 0  # nothing left to train
    assert not [logs for logs in logged if "train_loss" in logs]


def test_a_checkpoint_of_an_older_version_resumes(run, tmp_path, caplog):
    """One without a record of most options: what it has is compared, and a line says what could not be."""
    import shutil

    shutil.copytree(run / "checkpoint-5", tmp_path / "checkpoint-5")
    path = tmp_path / "checkpoint-5" / checkpoints.RUN
    facts = json.loads(path.read_text())
    older = set(facts) - set(default_options()) - {"changeable", "changes", "cut"}
    older |= {"per_device_train_batch_size", "gradient_accumulation_steps", "seed", "optim", "muon_learning_rate"}
    path.write_text(json.dumps({name: facts[name] for name in facts if name in older}))
    digests = tmp_path / "checkpoint-5" / checkpoints.DIGESTS
    content = json.loads(digests.read_text()) | {checkpoints.RUN: hashlib.sha256(path.read_bytes()).hexdigest()}
    digests.write_text(json.dumps(content))
    assert finetune.main([*options(tmp_path, learning_rate=2e-3), "--resume_from_checkpoint", "last"]) == 0
    assert "of an older version, which did not record all options" in caplog.text
    assert finetune.main([*options(tmp_path, seed=3), "--resume_from_checkpoint", str(tmp_path / "checkpoint-5")]) == 2


# --- each option of ours does something, or is refused ----------------------------------------------------------------

# What else has to be given for an option to mean something.
BESIDE = {
    "rand_augment_magnitude": {"rand_augment": 2},
    "mix_probability": {"mixup_alpha": 0.5},
    "crop_mode": {"crop_padding": 2},
    "load_best_model_at_end": {  # a rate that grows from 0 until the model is lost: the first step is the best
        "learning_rate": 9.0, "warmup_steps": 9, "metric_for_best_model": "loss", "eval_steps": 1, "save_steps": 1,
    },
    "num_train_epochs": {"max_steps": None, "eval_strategy": "epoch", "save_strategy": "epoch"},
    "save_total_limit": {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1},
}  # fmt: skip
VALUES = {
    "preset": "tiny", "config_overrides": f"{TINY},drop_path_rate=0.5", "source": "timm", "freeze_backbone": True,
    "lora_rank": 4, "image_size": 16, "dataset_config_name": "some", "train_dir": "IMAGES", "validation_dir": "IMAGES",
    "test_dir": "IMAGES", "image_column_name": "picture", "label_column_name": "kind", "streaming": True,
    "train_val_split": 0.4, "max_train_samples": 40, "max_eval_samples": 12, "crop_padding": 3, "crop_mode": "reflect",
    "crop_scale": 0.2, "horizontal_flip": 1.0, "flip_mode": "alternating", "mask_ratio": 0.3, "mask_patch_size": 16,
    "rand_augment": 2, "rand_augment_magnitude": 9.0, "random_erasing": 1.0, "mixup_alpha": 0.5, "cutmix_alpha": 0.5,
    "mix_probability": 0.1, "augment_until": "0.4", "progressive_resizing": "16=0.5",
    "num_train_epochs": 1, "per_device_train_batch_size": 8,
    "learning_rate": 0.1, "head_learning_rate": 0.5, "layer_decay": 0.1, "muon_learning_rate": 0.1, "ema_decay": 0.5,
    "time_budget": "1h", "flip_tta": True, "bf16": True, "eval_strategy": "no", "save_strategy": "no",
    "save_total_limit": 1, "load_best_model_at_end": False, "metric_for_best_model": "top5_accuracy",
    "logging_steps": 1,
    "report_to": "tensorboard", "remove_unused_columns": True, "dataset_name": "FOLDER", "task": MASKED,
    "model_name_or_path": "TRAINED", "dry_run": True,
}  # fmt: skip
NOT_HERE = {
    "cache_dir": "of the Hub's files",
    "token": "of the Hub's files",
    "output_dir": "each run here has its own",
    "overwrite_output_dir": "test_replacing_a_run_leaves_nothing_of_it",
    "per_device_eval_batch_size": "how fast, not what",
    "torch_compile": "how fast, not what: test_budget.py",
    "dataloader_num_workers": "how fast, not what; the order of a stream: test_training.py",
    "ddp_find_unused_parameters": "of several processes: how fast, not what",
}
MODES = ("decoded", "photos", "stream", "pre-training", "LoRA")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder of images of different sizes in three classes, and a trained folder."""
    pytest.importorskip("peft", reason="PEFT is not installed")
    root = tmp_path_factory.mktemp("places")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 6)):
        for label in range(3):
            folder = root / "images" / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                size = (rng.integers(34, 60), rng.integers(34, 60), 3)
                pixels = rng.integers(0, 80, size) + 80 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    settings = {"num_train_epochs": 1, "config_overrides": TINY, "dataset_name": root / "images"}
    assert finetune.main(options(root / "trained", **settings)) == 0
    return {"IMAGES": str(root / "images" / "train"), "TRAINED": str(root / "trained"), "FOLDER": str(root / "images")}


def mode_options(mode: str, places: dict) -> dict:
    steps = {"max_steps": 4, "num_train_epochs": None, "per_device_train_batch_size": 16, "logging_steps": 2}
    intervals = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    small = {"max_train_samples": 64, "max_eval_samples": 30}
    images = {"dataset_name": places["FOLDER"], "max_train_samples": None, "max_eval_samples": None}
    return steps | {
        "decoded": {**intervals, **small},
        "photos": {**intervals, **images, "max_steps": 9},  # three epochs
        "stream": {**intervals, **images, "streaming": True},
        "pre-training": {**intervals, **small, "task": MASKED},
        "LoRA": {**intervals, **images, "model_name_or_path": places["TRAINED"], "lora_rank": 2,
                 "config_overrides": None},
    }[mode]  # fmt: skip


@pytest.fixture
def outcome(monkeypatch, caplog, capsys, tmp_path):
    """A function of options: all that a run left but time, or what it said when it refused."""
    seen = {}
    for task in (finetuning, pretraining):
        monkeypatch.setattr(
            task, "report", lambda run, metrics: seen.update(metrics=metrics, rows=run.trainer.state.log_history)
        )
    suit_device = run_module.suit_device

    def without_workers(args, *rest):  # starting processes would take longer than decoding these few images
        suit_device(args, *rest)
        args.dataloader_num_workers = 0

    monkeypatch.setattr(run_module, "suit_device", without_workers)
    counter = iter(range(100))

    def run(settings: dict) -> str | tuple:
        seen.clear()
        caplog.clear()
        transformers_logging.warning_once.cache_clear()  # each of these runs is a process of its own to its user
        capsys.readouterr()
        folder = tmp_path / str(next(counter))
        try:
            code = finetune.main(options(folder, **settings))
        except SystemExit as stop:
            code = stop.code
        output = capsys.readouterr()
        if code == 2:
            return output.err
        assert code == 0, output.err
        kept = {k: v for k, v in seen.get("metrics", {}).items() if k not in ("time", "environment", "command")}
        timed = ("seconds", "per_second", "runtime")
        rows = [{k: v for k, v in row.items() if not k.endswith(timed)} for row in seen.get("rows", [])]
        weights = folder / "model.safetensors"
        digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else None
        states = [
            [json.loads((path / "trainer_state.json").read_text())[k] for k in ("best_metric", "best_global_step")]
            for path in checkpoints.list_checkpoints(folder)
        ]
        files = sorted(path.name for path in folder.iterdir())
        said = [line for line in caplog.text.splitlines() if "bfloat16" in line]
        return json.dumps(kept, sort_keys=True), json.dumps(rows), digest, json.dumps(states), files, said

    return run


def test_every_option_of_ours_is_looked_at():
    assert set(OURS) == set(VALUES) | set(NOT_HERE)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", MODES)
def test_every_option_changes_something_or_is_refused(mode, places, outcome):
    """Otherwise it would be dropped without a word."""
    base = mode_options(mode, places)
    plain = {}
    wrong = []
    for name in VALUES:
        value = places.get(VALUES[name], VALUES[name]) if isinstance(VALUES[name], str) else VALUES[name]
        beside = base | BESIDE.get(name, {})
        key = json.dumps(beside, default=str)
        if key not in plain:
            plain[key] = outcome(beside)
        if isinstance(plain[key], str):  # what has to be given beside it is refused, and so the option is
            assert any(word in plain[key] for word in (name, *BESIDE[name])), f"{name}: {plain[key]}"
            continue
        if base.get(name) == value:
            continue
        given = outcome(beside | {name: value})
        if isinstance(given, str):
            if given.count("\n") != 1 or (name not in given and repr(value) not in given):
                wrong.append(f"{name} = {value!r} is refused without its name, or in more than one line: {given}")
        elif given == plain[key]:
            wrong.append(f"{name} = {value!r} is dropped without a word")
    assert not wrong, "\n".join(wrong)
