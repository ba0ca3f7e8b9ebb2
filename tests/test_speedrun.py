"""The speedrun: its rules are what the records keep to, and a record can be run again by one command."""

import json
import re
import statistics
from types import SimpleNamespace

import pytest
import yaml
from benchmarking import speedrun
from runs import ROOT, load_script

FOLDER = ROOT / "speedrun"
PAGE = (FOLDER / "README.md").read_text()
RECIPES = sorted(FOLDER.glob("*.yaml"))
finetune = load_script("finetune")
RECIPE = """# A recipe, as one of the race begins.
#
#   OMP_NUM_THREADS=1 python scripts/finetune.py speedrun/cpu80.yaml --dataset_name ../shared/cifar10 --use_cpu True
#
preset: showcase
config_overrides: {hidden_size: 16, num_attention_heads: 2, intermediate_size: 16}
bf16: false
"""


def records(track: str) -> list[dict]:
    """The rows of the track's table, the record last."""
    title = f"{track[:3].upper()}-{track[3:]}"
    table = re.search(rf"^### {title}\n.*?\n(\| date .*?)\n\n", PAGE, re.MULTILINE | re.DOTALL)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()] if table else []
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


@pytest.fixture
def args(tmp_path):
    small = ["--max_train_samples", "64", "--max_eval_samples", "30", "--num_train_epochs", "1"]
    return SimpleNamespace(track="cpu80", seeds=2, output=tmp_path, dataset_name="digits", race_options=small)


@pytest.fixture
def started(monkeypatch, tmp_path):
    """The commands that would be started, each run in this process, of a recipe that is made here."""
    found = []
    recipe = tmp_path / "cpu80.yaml"
    recipe.write_text(RECIPE)
    monkeypatch.setattr(speedrun, "recipe_of", lambda track: recipe)

    def run(words, cwd, env, stdout):
        script = words.index("scripts/finetune.py")
        found.append(words)
        assert words[script + 1] == "speedrun/cpu80.yaml" and env["OMP_NUM_THREADS"] == "1"
        return SimpleNamespace(returncode=finetune.main([str(recipe), *words[script + 2 :]]))

    monkeypatch.setattr(speedrun, "subprocess", SimpleNamespace(run=run))
    return found


def test_a_record_is_run_again_with_each_seed(args, started):
    result = speedrun.measure(args)
    row = result["row"]
    assert row["seeds"] == [42, 43] and [words[words.index("--seed") + 1] for words in started] == ["42", "43"]
    found = [json.loads(path.read_text()) for path in sorted(args.output.glob("speedrun/cpu80-*/metrics.json"))]
    assert row["accuracies"] == [metrics["test"]["accuracy"] for metrics in found]
    assert row["seconds"] == [metrics["time"]["train_cpu_seconds"] for metrics in found]
    assert row["accuracy"] == statistics.mean(row["accuracies"])
    text = speedrun.show(result)
    assert "the goal of 80% is missed, and a record has at least 5 seeds" in " ".join(text.split())
    cells = text.splitlines()[-1].strip("|").split("|")
    assert len(cells) == 6 and cells[3].strip() == "2" and row["command"] in cells[5]
    (axes,) = speedrun.draw(result).axes
    assert axes.get_xlabel() == "CPU seconds of training" and len(axes.lines) == 2  # a curve for each seed
    assert speedrun.measure(args) == result and len(started) == 2  # what is there is not run again
    speedrun.recipe_of("cpu80").write_text(RECIPE + "seed: 1\n")
    speedrun.measure(args)
    assert len(started) == 4  # it was of another recipe


def test_what_is_no_record(args, started, monkeypatch):
    args.race_options.clear()
    (args.output / "metrics.json").write_text('{"test": {"examples": 360}}')
    monkeypatch.setattr(speedrun, "run_seed", lambda *_: args.output)
    with pytest.raises(ValueError, match=r"the whole test split of CIFAR-10, 10,000 images"):
        speedrun.measure(args)
    args.dataset_name = None
    with pytest.raises(ValueError, match=r"--dataset_name is missing"):
        speedrun.measure(args)


@pytest.mark.parametrize("track", [track for track in speedrun.TRACKS if not (FOLDER / f"{track}.yaml").exists()])
def test_a_track_without_a_record_is_open(track, args):
    args.track = track
    with pytest.raises(ValueError, match=f"track {track} is open: there is no {track}.yaml yet"):
        speedrun.measure(args)


def test_a_run_that_fails_or_is_stopped(args, started, monkeypatch):
    for status, error in ((1, ValueError), (130, KeyboardInterrupt), (-2, KeyboardInterrupt)):
        ended = SimpleNamespace(returncode=status)
        monkeypatch.setattr(speedrun, "subprocess", SimpleNamespace(run=lambda *_, ended=ended, **__: ended))
        with pytest.raises(error):
            speedrun.measure(args)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_keep_the_rules(recipe):
    """At most two early convolutions, no other weights, no mirror images."""
    variables, words = speedrun.words_of(speedrun.command_of(recipe))
    assert words[words.index("scripts/finetune.py") + 1] == f"speedrun/{recipe.name}"
    assert set(variables) <= {"OMP_NUM_THREADS"}
    settings = yaml.safe_load(recipe.read_text())
    assert not {"model_name_or_path", "flip_tta", "dataset_name", "seed"} & set(settings)
    assert len(settings.get("config_overrides", {}).get("stem_channels", [])) <= 2
    finetune.parse([str(recipe), "--dataset_name", "digits"])


@pytest.mark.parametrize("track", speedrun.TRACKS)
def test_records_are_what_their_recipes_and_logs_say(track):
    rows, recipe = records(track), FOLDER / f"{track}.yaml"
    assert bool(rows) == recipe.is_file()
    times = [float(row["seconds"].split()[0].replace(",", "")) for row in rows]
    assert times == sorted(times, reverse=True), "a record is faster than the one before"
    for row in rows:
        log = json.loads((FOLDER / re.search(r"\((logs/[\w.-]+)\)", row["log"])[1]).read_text())["row"]
        assert int(row["seeds"]) == len(log["seeds"]) >= 5 and row["date"] == log["date"]
        assert log["accuracy"] >= speedrun.TRACKS[track].goal
        shown = [cell.strip() for cell in speedrun.show({"row": log}).splitlines()[-1].strip("|").split("|")]
        assert [row[name] for name in ("seconds", "test", "seeds", "parameters")] == shown[1:5]
    if rows:
        assert rows[-1]["seconds"].split()[0] in recipe.read_text() and rows[-1]["test"] in recipe.read_text()
