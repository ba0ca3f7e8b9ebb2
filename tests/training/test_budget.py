"""A time budget: how many steps it allows, and whether they are compiled."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import RANDOM, fork_run, history, load_script, options, wait_all, weights

from modeling_vit_scratch.evaluation import devices
from modeling_vit_scratch.training import ImageTrainer, ImageTrainingArguments, checkpoints, optimization
from modeling_vit_scratch.training import budget as budget_module
from modeling_vit_scratch.training.arguments import parse_duration

finetune = load_script("finetune")


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """The same numbers on every machine."""
    monkeypatch.setattr(optimization, "has_fast_bfloat16", lambda device: False)


def test_durations():
    for text, seconds in (("90", 90), ("90s", 90), ("10m", 600), ("1h30m", 5400), ("0.5h", 1800), ("1m5s", 65)):
        assert parse_duration(text) == seconds
    for text in ("", "soon", "0", "-3m", "10 m m", "1.2.3s"):
        with pytest.raises(ValueError, match="time_budget"):
            parse_duration(text)


class Compiled(torch.nn.Module):
    """In place of what `torch.compile` makes."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model

    def forward(self, *args, **kwargs):
        return self._orig_mod(*args, **kwargs)


@pytest.fixture
def clock(monkeypatch):
    """A run's clock, in place of the machine's: a training batch takes `step` seconds, any other `measure`.

    Compiled, it takes `compiled`, and the first one `compiling` more; `takes` notes how steps were computed.
    """
    clock = SimpleNamespace(now=0.0, step=10.0, measure=1.0, compiled=5.0, compiling=50.0, takes=[])
    compute_loss = ImageTrainer.compute_loss

    def slow_compute_loss(trainer, model, *args, **kwargs):
        compiles = isinstance(model, Compiled)
        if compiles and True not in clock.takes:
            clock.now += clock.compiling
        if model.training:
            clock.takes.append(compiles)
        clock.now += (clock.compiled if compiles else clock.step) if model.training else clock.measure
        return compute_loss(trainer, model, *args, **kwargs)

    monkeypatch.setattr(ImageTrainer, "compute_loss", slow_compute_loss)
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: Compiled(model))
    monkeypatch.setattr(devices.shutil, "which", lambda name: name)
    monkeypatch.setattr(budget_module, "TRIED_SHARE", 0.5)  # a run of few steps, which are slow
    monkeypatch.setattr(budget_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def budgeted(folder, budget: str, **changes) -> list[str]:
    """A run under a budget, with little that is saved."""
    rarely = {"eval_strategy": "steps", "eval_steps": 0.5, "save_strategy": "steps", "save_steps": 0.5}
    return options(folder, num_train_epochs=None, time_budget=budget, **(rarely | changes))


def option_of(folder, name="torch_compile"):
    """As the last checkpoint's record has it."""
    return json.loads((checkpoints.list_checkpoints(folder)[0] / checkpoints.RUN).read_text())["changeable"][name]


def steps_of(folder) -> int:
    return json.loads((folder / "metrics.json").read_text())["training"]["steps"]


def test_a_time_budget_settles_the_steps_and_a_resumed_run_keeps_them(tmp_path, capsys, clock):
    argv = options(tmp_path, num_train_epochs=None, time_budget="10m", lr_scheduler_type="linear", logging_steps=1)
    assert finetune.main(argv) == 0
    steps = steps_of(tmp_path)
    assert 0.85 * 600 < clock.now <= 600  # rehearsal, training, validation and the last measurements
    rates = [float(row["learning_rate"]) for row in history(tmp_path) if row["loss"]]
    assert len(rates) == steps and rates[-1] == pytest.approx(1e-3 / steps, rel=1e-3)  # annealed to its end
    for checkpoint in checkpoints.list_checkpoints(tmp_path)[:1]:
        checkpoint.rename(tmp_path / "set aside")
    clock.step = 30.0  # would change the number of a new run
    assert finetune.main([*argv, "--resume_from_checkpoint", "last"]) == 0
    assert steps_of(tmp_path) == steps
    clock.now = 0.0
    assert finetune.main([*argv, "--output_dir", str(tmp_path / "slow")]) == 0
    assert 1 < steps_of(tmp_path / "slow") < steps / 2 and clock.now <= 600
    assert finetune.main(options(tmp_path / "b", num_train_epochs=None, time_budget="1s")) == 2
    assert "time_budget" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("compiled", "compiling", "images", "chosen"),
    [(30, 50, 320, True), (45, 50, 320, False), (38, 100, 600, False)],
    ids=["faster", "slower", "faster, but has the last, smaller batch to compile"],
)
def test_a_long_budget_settles_whether_steps_are_compiled(tmp_path, capsys, clock, compiled, compiling, images, chosen):
    clock.step, clock.compiled, clock.compiling = 40, compiled, compiling
    assert finetune.main(budgeted(tmp_path, "30m", max_train_samples=images)) == 0
    output = capsys.readouterr()
    assert 0.85 * 1800 < clock.now <= 1800
    line = f"Compiled steps take {compiled} s, after a first one of {compiling + compiled} s, others 40 s: "
    assert f"{line}training with --torch_compile {str(chosen).lower()}.\n" in output.err
    assert output.err.count("Compiled steps") == 1 and (", compiled\n" in output.out) == chosen
    steps = steps_of(tmp_path)
    assert clock.takes[-steps:] == [chosen] * steps and clock.takes[-steps - 1] is True  # the last rehearsal
    assert option_of(tmp_path) is chosen
    assert option_of(tmp_path, "torch_compile_backend") == ("inductor" if chosen else None)
    assert json.loads((tmp_path / "metrics.json").read_text())["training"]["torch_compile"] is chosen
    assert f"| `torch_compile` | {chosen} |" in (tmp_path / "README.md").read_text()


def test_compiling_is_left_open_by_a_budget_without_the_option():
    for given, value, left_open in (
        ({}, False, False),
        ({"time_budget": "30m"}, False, True),
        ({"time_budget": "30m", "torch_compile": False}, False, False),
        ({"time_budget": "30m", "torch_compile": True}, True, False),
        ({"time_budget": "30m", "torch_compile_backend": "inductor"}, True, False),
    ):
        args = ImageTrainingArguments("unused", use_cpu=True, **given)
        assert (args.torch_compile, args.torch_compile_is_open) == (value, left_open)


@pytest.mark.parametrize(
    ("budget", "compiler", "share"), [("29m", True, 0.2), ("30m", False, 0.2), ("30m", True, 0.03)]
)
def test_compiling_is_not_tried_in_a_short_time_or_without_a_compiler(
    tmp_path, capsys, clock, monkeypatch, budget, compiler, share
):
    monkeypatch.setattr(budget_module, "TRIED_SHARE", share)  # 7 batches of 10 s are more than 3 % of 30 minutes
    monkeypatch.setattr(devices.shutil, "which", lambda name: name if compiler else None)
    seen, make_optimizer = [], ImageTrainer.make_optimizer
    monkeypatch.setattr(
        ImageTrainer, "make_optimizer",
        lambda trainer, model: seen.append(model.is_gradient_checkpointing) or make_optimizer(trainer, model),
    )  # fmt: skip
    assert finetune.main(budgeted(tmp_path, budget, dry_run=True, gradient_checkpointing=True)) == 0
    output = capsys.readouterr()
    assert set(clock.takes) == {False} and "ompil" not in output.err and ", compiled\n" not in output.out
    assert seen == [True]  # rehearsed once, and with activation checkpointing, as it would train


def test_compiling_that_is_asked_for_needs_a_compiler(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit):
        finetune.main(options(tmp_path, torch_compile=True))
    assert "torch_compile needs a C++ compiler on a CPU" in capsys.readouterr().err
    assert finetune.main(options(tmp_path, torch_compile=True, torch_compile_backend="eager", dry_run=True)) == 0


def test_a_compiler_that_fails_is_named_and_done_without(tmp_path, capsys, clock, monkeypatch):
    def fails(model, **kwargs):
        def compile_and_run(*inputs, **named):
            raise RuntimeError("no headers\nand more")

        compiled = Compiled(model)
        compiled.forward = compile_and_run
        return compiled

    monkeypatch.setattr(torch, "compile", fails)
    clock.step = 40.0
    assert finetune.main(budgeted(tmp_path, "30m")) == 0
    error = capsys.readouterr().err
    assert "Compiling fails here (RuntimeError: no headers): training with --torch_compile false.\n" in error
    assert "Traceback" not in error and "and more" not in error
    assert option_of(tmp_path) is False and 0.85 * 1800 < clock.now <= 1800


def test_a_resumed_run_compiles_as_it_did(tmp_path, capsys, clock, monkeypatch):
    clock.step, clock.compiled = 40.0, 20.0
    argv = budgeted(tmp_path, "30m")
    assert finetune.main(argv) == 0
    steps = steps_of(tmp_path)
    checkpoints.list_checkpoints(tmp_path)[0].rename(tmp_path / "set aside")
    clock.compiled = 80.0  # would be refused by a new run
    for compiler in (True, False):
        monkeypatch.setattr(devices.shutil, "which", lambda name, there=compiler: name if there else None)
        clock.takes = []
        capsys.readouterr()
        assert finetune.main([*argv, "--resume_from_checkpoint", "last"]) == 0
        output = capsys.readouterr()
        assert "Timing" not in output.err and "Compil" not in output.err
        assert steps_of(tmp_path) == steps and option_of(tmp_path) is compiler
        assert clock.takes and set(clock.takes) == {compiler}
        assert ("torch_compile True -> False" in output.out) == (not compiler)
        checkpoints.list_checkpoints(tmp_path)[0].rename(tmp_path / f"set aside {compiler}")


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_processes_settle_it_together(tmp_path, clock, monkeypatch, fails):
    """The second process measures the contrary, or cannot compile."""

    def compile_(model, **kwargs):
        if os.environ.get("RANK") == "1":
            clock.step, clock.compiled = 40.0, 80.0
            if fails:
                raise RuntimeError("no headers")
        return Compiled(model)

    monkeypatch.setattr(torch, "compile", compile_)
    clock.step, clock.compiled = 80.0, 40.0
    argv, log = budgeted(tmp_path / "run", "30m"), tmp_path / "log"
    assert wait_all(fork_run(argv, 2, log)) == [0, 0], Path(f"{log}.0").read_text()[-3000:]
    first, second = (Path(f"{log}.{rank}").read_text() for rank in (0, 1))
    line = "Compiling fails here (RuntimeError: no headers)" if fails else "Compiled steps take 40 s"
    assert line in first and "ompil" not in second
    assert option_of(tmp_path / "run") is not fails and steps_of(tmp_path / "run") > 1


@pytest.mark.slow
def test_what_was_compiled_in_the_rehearsal_need_not_be_compiled_again(tmp_path, capsys, monkeypatch):
    """The one with a true compiler; nothing is trained."""
    rehearsed, rehearse = [], budget_module.rehearse

    def noted(trainer, seconds):
        rehearsed.append(rehearse(trainer, min(seconds, 0.1)))
        return rehearsed[-1]

    monkeypatch.setattr(budget_module, "rehearse", noted)
    assert finetune.main(budgeted(tmp_path, "30m", dry_run=True)) == 0
    assert "Compiled steps take" in capsys.readouterr().err
    _, compiled = rehearsed
    assert compiled.first < 0.5 * compiled.compiling


@pytest.mark.parametrize(
    ("settings", "evaluations", "saves"),
    [
        ({"eval_strategy": "no", "save_strategy": "no"}, lambda n: 0, lambda n: 0),
        ({}, lambda n: n // 7, lambda n: n // 7),
        ({"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "no"}, lambda n: n // 3, lambda n: 0),
        ({"eval_strategy": "steps", "eval_steps": 0.1, "save_strategy": "steps", "save_steps": 0.2},
         lambda n: 10, lambda n: 5),
        ({"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "best"}, lambda n: n // 4, lambda n: n // 4),
    ],
)  # fmt: skip
def test_a_time_budget_holds_all_that_a_run_does(settings, evaluations, saves):
    """The arithmetic alone: 100 images are measured, 7 steps make an epoch."""
    args = ImageTrainingArguments("unused", use_cpu=True, load_best_model_at_end=False, **settings)
    step, image, last = 1.0, 0.05, 26.0
    recurring = budget_module.recurring_parts(args, 100 * image)
    steps, _, _ = budget_module.steps_that_fit(600.0, step, last, recurring, steps_per_epoch=7)
    measured = evaluations(steps) * 100 * image + saves(steps) * budget_module.SAVE_SECONDS
    assert 0.92 * 600 < steps * step + measured + last <= 600


def test_no_step_fits_into_the_time_of_the_last_measurements():
    steps, step, last = budget_module.steps_that_fit(20.0, 1.0, 26.0, [], steps_per_epoch=7)
    assert steps < 1 and (step, last) == (1.0, 26.0)


def test_a_rehearsal_leaves_no_trace(tmp_path, clock):
    """With the number of steps it would choose, a run under a budget is the run without one."""
    argv = options(
        tmp_path / "budget", config_overrides=RANDOM, num_train_epochs=None, time_budget="5m", muon_learning_rate=0.02
    )
    assert finetune.main(argv) == 0
    steps = steps_of(tmp_path / "budget")
    plain = options(tmp_path / "plain", config_overrides=RANDOM, max_steps=steps, muon_learning_rate=0.02)
    assert finetune.main(plain) == 0
    a, b = weights(tmp_path / "budget"), weights(tmp_path / "plain")
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
