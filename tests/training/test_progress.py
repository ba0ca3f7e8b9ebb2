"""What a run shows while it trains: lines that fit a terminal, and plain ones in a file."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest
from runs import ROOT, history, load_script, options

from modeling_vit_scratch.training import progress
from modeling_vit_scratch.training.progress import COLUMNS, Progress

HEADER = "epoch       step  train loss  validation loss   accuracy        best   seconds"


def lines_of(text: str) -> list[str]:
    """The table's lines, without what comes before and after."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == ["epoch", "step"])
    end = next(i for i, line in enumerate(lines) if re.match(r"  validation (accuracy|loss) ", line))
    return lines[start:end]


def test_one_line_for_each_evaluation(tmp_path, capsys, interrupt):
    """In a file (pytest's) no control characters, none of Trainer's dictionaries, and numbers that agree.

    The training loss is that of the five steps of an epoch, whenever it is logged, and resumed or not.
    """
    finetune, changes = load_script("finetune"), {"num_train_epochs": 3, "disable_tqdm": False, "learning_rate": 0.01}
    assert finetune.main(options(tmp_path / "run", logging_steps=1, **changes)) == 0
    out, err = capsys.readouterr()
    header, *rows = lines_of(out)
    assert header.strip() == HEADER and len(rows) == 3
    assert not re.search(r"[\r\x1b]|it/s|\{'", out + err)
    assert len({len(line) for line in (header, *rows)}) == 1 and len(header) < 80
    cells = [row.replace(",", "").replace("%", "").split() for row in rows]
    assert [(cell[0], cell[1]) for cell in cells] == [("1.00", "5"), ("2.00", "10"), ("3.00", "15")]
    accuracies, best = [[float(cell[column]) for cell in cells] for column in (4, 5)]
    assert best == [max(accuracies[: i + 1]) for i in range(3)]
    validation = re.search(r"validation accuracy +([\d.]+)%", out)[1]
    assert float(validation) == pytest.approx(best[-1])
    losses = [float(row["loss"]) for row in history(tmp_path / "run") if row["loss"]]
    for i, cell in enumerate(cells):
        assert float(cell[2]) == pytest.approx(sum(losses[5 * i : 5 * i + 5]) / 5, abs=1e-4)
    interrupt["at"] = 8
    parts = options(tmp_path / "parts", logging_steps=7, **changes)
    assert finetune.main(parts) == 130 and finetune.main([*parts, "--resume_from_checkpoint", "last"]) == 0
    said = re.findall(r"^ +\d\.00 +\d+ .*", capsys.readouterr().out, re.MULTILINE)
    for cell, line in zip(cells, said, strict=True):  # all but the seconds
        numbers = [float(word) for word in line.replace("%", "").split()[:-1]]
        assert numbers == pytest.approx([float(word) for word in cell[:-1]], abs=2e-4)


def test_pre_training_has_a_loss_to_choose_by(tmp_path, capsys):
    changes = {"task": "masked-image-modeling", "config_overrides": None, "horizontal_flip": None}
    assert load_script("finetune").main(options(tmp_path / "run", **changes)) == 0
    header, *rows = lines_of(capsys.readouterr().out)
    assert "best loss" in header and len(rows) == 2
    losses = [[float(cell) for cell in row.split()] for row in rows]
    assert [len(row) for row in losses] == [6, 6]  # no accuracy
    assert losses[1][4] == min(losses[0][3], losses[1][3])


def test_in_a_terminal(tmp_path, columns=80):
    """The bar never wraps, is gone at the end, and lines stand above it."""
    command = [sys.executable, str(ROOT / "scripts" / "finetune.py"), *options(tmp_path / "run", disable_tqdm=False)]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    run = subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=tmp_path, env=os.environ | {"COLUMNS": ""})
    os.close(theirs)
    written = b""
    while True:
        try:
            written += os.read(ours, 65536)
        except OSError:  # closed
            break
    assert run.wait(60) == 0
    text = written.decode()
    drawn = [part for part in re.split(r"[\r\n]", text) if " steps/s" in part]
    assert drawn and all(len(part) <= columns for part in drawn)
    assert re.search(r"\d+%\|.*\| \d+/10 steps, [\d.?]+ steps/s, [\d:?]+ left", text)
    rows = [line for line in re.split(r"[\r\n]+", text) if re.fullmatch(r" +\d\.00 +\d+  .*", line)]
    assert len(rows) == 2 and "{'" not in text
    last = text.index("everything is in")  # after it, nothing of the bar; before it, the bar's line was wiped
    assert not re.search("steps/s|batches|█", text[last:])
    assert re.search(r"\r +\r", text[text.rindex(" steps/s", 0, last) : last])


def test_silence_is_broken(capsys, monkeypatch):
    """Where no evaluation comes for long, and there is no bar, a line says where the training is."""
    clock, losses = SimpleNamespace(wall=61.7), []
    args = SimpleNamespace(disable_tqdm=True, metric_for_best_model="accuracy", greater_is_better=True)
    state = SimpleNamespace(global_step=0, max_steps=100, epoch=0.0, is_world_process_zero=True, best_metric=None)
    shown = Progress(clock, lambda: sum(losses))
    shown.on_train_begin(args, state, None)

    def step(loss: float):
        losses.append(loss)
        state.global_step += 1
        shown.on_step_end(args, state, None)

    step(2.0)
    step(1.0)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(progress, "SILENCE", -1.0)
    state.epoch = 0.5
    step(1.5)
    header, row = capsys.readouterr().out.splitlines()
    assert row.split() == ["0.50", "3", "1.5000", "62"]
    assert header.index("train loss") + len("train loss") == row.index("1.5000") + 6
    state.is_world_process_zero = False  # another process asks no GPU
    losses.append("not a number")
    shown.on_step_end(args, state, None)


def test_a_line_has_room():
    assert sum(COLUMNS.values()) + 2 * (len(COLUMNS) - 1) <= 80
    assert all(len(name) <= width for name, width in COLUMNS.items())
