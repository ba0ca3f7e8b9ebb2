"""Recipes, options and output folders that are wrong."""

import os
import re

import pytest
from bad_files import write
from made_data import write_image_folder
from runs import load_script

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def finetune():
    return load_script("finetune")


BAD_RECIPES = {
    "unknown key": ("dataset_name: digits\nfrobnicate: 1", "unknown key 'frobnicate'; the nearest is '"),
    "misspelt key": ("lerning_rate: 1e-3", "unknown key 'lerning_rate'; the nearest is 'learning_rate'"),
    "abbreviated key": ("learning_rat: 1e-3", "unknown key 'learning_rat'; the nearest is 'learning_rate'"),
    "dashes for underscores": ("learning-rate: 1e-3", "the nearest is 'learning_rate'"),
    "number for a key": ("1: 2", "unknown key 1"),
    "duplicated key": ("seed: 1\nseed: 2", "key 'seed' stands there twice; keep one"),
    "duplicated key of a mapping": (
        "config_overrides: {hidden_size: 8, hidden_size: 16}",
        "key 'hidden_size' stands there twice",
    ),
    "text for a number": ("num_train_epochs: many", "num_train_epochs.*invalid float value: 'many'"),
    "fraction for a whole number": ("max_steps: 1.5", "max_steps.*invalid int value: '1.5'"),
    "list for a number": ("seed: [1, 2]", "2"),
    "neither yes nor no": ("bf16: maybe", "bf16.*maybe"),
    "no mapping": ("- preset\n- showcase", "must hold lines of the form 'option: value'"),
    "empty file": ("", "must hold lines of the form 'option: value'"),
    "no YAML": ("preset: [", "recipe .*while parsing"),
    "tabs": ("preset:\n\tshowcase", "recipe .*cannot start any token"),
    "no text": (b"\xff\xfe\x00", "recipe .*can't decode byte 0xff"),
    "a Python object": ("seed: !!python/object/apply:os.system ['touch pwned']", "could not determine a constructor"),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_bad_recipes_are_refused(name, finetune, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text, message = BAD_RECIPES[name]
    recipe = write(tmp_path / "a recipe.yaml", text)
    with pytest.raises(SystemExit) as left:
        finetune.parse([str(recipe), "--dataset_name", "digits"])
    assert left.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("key", ["help", "help_all"])
def test_help_is_no_key_of_a_recipe(key, finetune, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        finetune.parse([str(write(tmp_path / "x.yaml", f"{key}: true")), "--dataset_name", "digits"])
    assert left.value.code == 2


def test_a_recipe_that_is_not_there(finetune, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        finetune.parse([str(tmp_path / "nothing.yaml")])
    assert left.value.code == 2
    assert "nothing.yaml" in capsys.readouterr().err


GOOD_RECIPES = {
    "scientific notation, which YAML reads as text": ("learning_rate: 1e-3", "learning_rate", 1e-3),
    "number in quotes": ("seed: '7'", "seed", 7),
    "null keeps the default": ("weight_decay: null", "weight_decay", 0.0),
    "the command line wins": ("num_train_epochs: 5", "num_train_epochs", 3),
    "space and unicode in a path": ("output_dir: a b/ü", "output_dir", "a b/ü"),
}


@pytest.mark.parametrize("name", GOOD_RECIPES)
def test_odd_recipes_are_read(name, finetune, tmp_path):
    text, field, value = GOOD_RECIPES[name]
    recipe = write(tmp_path / "a recipe ü.yaml", text)
    arguments = finetune.parse([str(recipe), "--dataset_name", "digits", "--num_train_epochs", "3"])
    assert getattr(arguments[2], field) == value


@pytest.mark.parametrize("options", [["--learning_rat", "1"], ["--nonsense", "1"], ["--preset"], ["stray"]])
def test_bad_options_are_refused(options, finetune, capsys):
    with pytest.raises(SystemExit) as left:
        finetune.parse(["--dataset_name", "digits", *options])
    assert left.value.code == 2
    assert options[0].lstrip("-") in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_made(finetune, tmp_path, capsys):
    """A file stands in its way: refused before the data is loaded, for root too."""
    write(tmp_path / "file", "")
    folder = tmp_path / "file" / "run"
    assert finetune.main(["--dataset_name", "digits", "--output_dir", str(folder), "--use_cpu", "true"]) == 2
    error = capsys.readouterr().err
    assert f"cannot write to {folder}" in error
    assert "--output_dir" in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output_folder(finetune, tmp_path, capsys):
    (tmp_path / "run").mkdir(mode=0o555)
    assert finetune.main(["--dataset_name", "digits", "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"]) == 2
    assert "cannot write to" in capsys.readouterr().err


def test_the_tables_of_recipes_are_long_enough():
    assert len(BAD_RECIPES) + len(GOOD_RECIPES) >= 21


@pytest.mark.parametrize(
    ("option", "right"),
    [
        ("--learning_rat", "the nearest is --learning_rate"),
        ("--train_batch_size", "the nearest is --per_device_train_batch_size"),
        ("--batch_size", "there are --per_device_train_batch_size, "),
    ],
)
def test_an_unknown_option_is_told_its_nearest(option, right, finetune, capsys):
    with pytest.raises(SystemExit) as stop:
        finetune.parse(["--dataset_name", "digits", f"{option}=1e-3"])
    assert stop.value.code == 2
    assert f"unknown option {option}; {right}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("per_device_train_batch_size", "at least 1"),
        ("per_device_eval_batch_size", "at least 1"),
        ("num_train_epochs", "above 0"),
    ],
)
def test_what_cannot_be_zero(name, bound, finetune, capsys):
    with pytest.raises(SystemExit):
        finetune.parse(["--dataset_name", "digits", f"--{name}", "0"])
    assert f"{name} (0) must be {bound}" in capsys.readouterr().err


def test_a_run_that_fails_leaves_no_folder(finetune, tmp_path, monkeypatch, capsys):
    """The next one would be called showcase-digits-2."""
    monkeypatch.chdir(tmp_path)
    wrong = ["--preset", "showcase", "--config_overrides", "num_labels=3", "--use_cpu", "true"]
    assert finetune.main(["--dataset_name", "digits", *wrong]) == 2
    assert not list(tmp_path.glob("runs/*"))


def test_a_folder_of_images_is_no_output_folder(finetune, tmp_path, capsys):
    write_image_folder(tmp_path, 20)
    argv = ["--dataset_name", str(tmp_path), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    for overwrite in ("false", "true"):
        assert finetune.main([*argv, "--overwrite_output_dir", overwrite]) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path} is a folder of images" in error and error.rstrip().endswith("choose one to write to.")
    assert all(path.is_dir() or path.suffix == ".png" for path in tmp_path.rglob("*"))


def test_help_shows_the_defaults(finetune, capsys):
    with pytest.raises(SystemExit):
        finetune.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Highest learning rate. Default: 0.001." in text and "Images per step and process. Default: 64." in text
    assert text.count("Default: 3") == 1, "where the text says it, it stands there once"
