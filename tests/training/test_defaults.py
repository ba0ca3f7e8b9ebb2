"""Which settings a run has that names none: a recipe's, those that suit its data, or the plain defaults."""

import numpy as np
import pytest
import torch
from PIL import Image
from runs import TINY, load_script, options

from modeling_vit_scratch import ViTScratchForImageClassification
from modeling_vit_scratch.data import augmentation as augmentation_module
from modeling_vit_scratch.data.records import Records
from modeling_vit_scratch.data.sources import CIFAR10, DIGITS
from modeling_vit_scratch.data.splits import LazyImages
from modeling_vit_scratch.training import defaults
from modeling_vit_scratch.training import models as models_module
from modeling_vit_scratch.training import run as run_module
from modeling_vit_scratch.training.defaults import Look, advice, choose_settings

finetune = load_script("finetune")


@pytest.fixture
def folder(tmp_path):
    """Ten images of each of two classes, 70 to 80 pixels high and 100 wide."""
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(10):
            pixels = np.full((70 + index, 100, 3), 20 * index, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{index}.png")
    return tmp_path / "images"


def parse(*argv):
    return finetune.parse([*map(str, argv), "--output_dir", "unused", "--use_cpu", "True"])


def test_a_dataset_with_a_recipe_gets_it_however_it_is_named(monkeypatch):
    """By its name, or as what is found where none is named."""
    for name, epochs in ((CIFAR10, 10), (DIGITS, 36)):
        monkeypatch.setattr(finetune, "default_dataset", lambda name=name: name)
        for argv in ([], ["--dataset_name", name]):
            model, data, args = parse(*argv)
            assert (data.dataset_name, args.num_train_epochs) == (name, epochs)
            assert f"scripts/recipes/{finetune.RECIPE_OF[name]}" in args.settings_from
            assert model.preset == "showcase"


@pytest.mark.parametrize(
    "words",
    [
        ["--preset", "tiny"],
        ["--config_overrides", TINY],
        ["--image_size", "64"],
        ["--model_name_or_path", "somewhere"],
        ["--task", "masked-image-modeling"],
        ["--task=masked-image-modeling"],
    ],
)
def test_who_chooses_a_model_gets_the_defaults_and_nothing_of_a_recipe(words, monkeypatch):
    monkeypatch.setattr(finetune, "default_dataset", lambda: CIFAR10)
    model, data, args = parse(*words)
    assert data.dataset_name == CIFAR10 and args.settings_from.endswith("defaults of --help_all")
    assert (args.num_train_epochs, args.learning_rate, args.muon_learning_rate) == (3, 1e-3, None)
    assert args.label_smoothing_factor == 0
    assert model.config_overrides == (TINY if words[0] == "--config_overrides" else None)


def test_settings_that_nobody_named_are_never_the_users_fault(monkeypatch):
    """What contradicts an option on the command line goes."""
    monkeypatch.setattr(finetune, "default_dataset", lambda: CIFAR10)
    _, _, args = parse("--optim", "sgd", "--time_budget", "10m")
    assert args.optim.value == "sgd" and args.muon_learning_rate is None and args.time_budget_seconds == 600
    _, _, args = parse("--max_steps", "7")
    assert args.max_steps == 7 and args.num_train_epochs == 3


def test_the_command_line_puts_a_recipes_length_and_architecture_out_of_force(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dataset_name: digits\nmax_steps: 900\npreset: tiny\nconfig_overrides: {hidden_size: 64}\n")
    _, _, args = parse(recipe, "--num_train_epochs", "2")
    assert (args.max_steps, args.num_train_epochs) == (-1, 2)
    model, _, args = parse(recipe, "--model_name_or_path", "somewhere", "--time_budget", "5m")
    assert (model.preset, model.config_overrides, args.max_steps) == (None, None, -1)


def test_own_images_get_settings_that_suit_them(folder, capsys):
    model, _, args = parse("--dataset_name", folder)
    config = models_module.make_config(model, ["cat", "dog"])
    assert (config.image_hw, config.patch_hw, config.stem_channels) == ((64, 64), (8, 8), (16, 32, 64))
    assert (args.num_train_epochs, args.per_device_train_batch_size) == (defaults.MOST_EPOCHS, 32)
    assert "by the data: 18 training images of 2 classes, 75x100 pixels in the median" in args.settings_from
    assert "--model_name_or_path google/vit" in args.settings_from
    # Given options win, one by one.
    _, _, args = parse("--dataset_name", folder, "--num_train_epochs", "4", "--save_strategy", "epoch")
    assert (args.num_train_epochs, args.eval_strategy.value, args.learning_rate) == (4, "epoch", 2e-3)
    # And the summary says it.
    argv = ["--dataset_name", str(folder), "--output_dir", str(folder.parent / "run"), "--dry_run", "True"]
    assert finetune.main([*argv, "--use_cpu", "True"]) == 0
    assert "settings         by the data: 18 training images" in capsys.readouterr().out
    assert finetune.main(["--dataset_name", str(folder / "cat"), *argv[2:]]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_stream_has_no_size_and_says_so(folder):
    _, _, args = parse("--dataset_name", folder, "--streaming", "--max_steps", "9")
    assert "a stream does not tell its size" in args.settings_from and args.learning_rate == 1e-3


@pytest.mark.parametrize("images", [3, 270, 1_999, 2_000, 45_000, 1_200_000])
@pytest.mark.parametrize("side", [8, 47, 48, 95, 96, 4_000])
def test_every_choice_is_a_run(images, side):
    """All settings are options that can be given, of a model with 64 tokens and at most 900,000 parameters."""
    look = Look(images, 10, (side, side + 7))
    settings = choose_settings(look)
    model, _, args = finetune.parse([*finetune.as_options(settings), "--dataset_name", "digits", "--use_cpu", "True"])
    config = models_module.make_config(model, [str(i) for i in range(10)])
    assert config.grid_hw == (8, 8) and defaults.FEWEST_EPOCHS <= args.num_train_epochs <= defaults.MOST_EPOCHS
    with torch.device("meta"):
        parameters = ViTScratchForImageClassification(config).num_parameters()
    assert parameters < 900_000
    assert ("pretrained" in advice(look)) == (images < defaults.WORTH_PRETRAINED and side >= 48)


# --- random crops end when they are told to ---------------------------------------------------------------------------


def crops_of(monkeypatch):
    """Notes which calls of a data set cut a random part out."""
    keys = []

    def note(size, scale, key):
        keys.append(key)
        return 0, 0, *size

    for module in ("splits", "streaming"):
        monkeypatch.setattr(f"modeling_vit_scratch.data.{module}.crop_box", note)
    return keys


def run_settings(folder, **changes) -> dict:
    return {
        "dataset_name": folder, "max_train_samples": None, "max_eval_samples": None, "per_device_train_batch_size": 6,
        "num_train_epochs": 4, "augment_until": "crop=0.5", **changes,
    }  # fmt: skip


def test_crops_of_photos_end_with_an_epoch(folder, tmp_path, monkeypatch, capsys):
    """18 images, four epochs, of which the first two are cropped; with workers or without, resumed or not."""
    monkeypatch.setattr(run_module.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", _without_workers(torch.utils.data.DataLoader.__init__))
    keys = crops_of(monkeypatch)
    assert finetune.main(options(tmp_path / "run", **run_settings(folder, save_total_limit=9))) == 0
    assert {key[1] for key in keys} == {0, 1} and len(keys) == 2 * 18
    keys.clear()
    argv = options(tmp_path / "run", **run_settings(folder, save_total_limit=9))
    assert finetune.main([*argv, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-6")]) == 0
    assert keys == []
    capsys.readouterr()
    refused = options(tmp_path / "refused", **run_settings(folder, augment_until="0.9"))
    assert finetune.main(refused) == 2
    assert "no epoch begins after 0.9 of 4 epochs" in capsys.readouterr().err
    # Accumulated over two of three batches, an epoch has two steps; the crops end with the second epoch all the same.
    keys.clear()
    changes = {"gradient_accumulation_steps": 2, "eval_strategy": "no", "save_strategy": "no"}
    assert finetune.main(options(tmp_path / "accumulated", **run_settings(folder, **changes))) == 0
    assert {key[1] for key in keys} == {0, 1}
    assert "steps            8 (4 epochs)" in capsys.readouterr().out
    argv = options(tmp_path / "allowed", **run_settings(folder, augment_until="0.9,crop=1"))
    assert finetune.main(argv) == 0


def _without_workers(original):
    """Images are read in this process, where the test can see it."""

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs | {"num_workers": 0, "prefetch_factor": None, "persistent_workers": False})

    return init


def test_crops_of_a_stream_end_with_a_batch(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", _without_workers(torch.utils.data.DataLoader.__init__))
    keys = crops_of(monkeypatch)
    changes = {"streaming": True, "max_steps": 10, "eval_strategy": "no", "save_strategy": "no"}
    assert finetune.main(options(tmp_path / "run", **run_settings(folder, **changes))) == 0
    assert len(keys) == 5 * 6  # the first five of ten batches of six, whatever was read ahead


def test_images_of_one_size_are_cropped_where_that_is_asked_for(tmp_path):
    lazy = []
    original = LazyImages.__init__

    def note(self, records: Records, processor, num_channels, crop_scale=None, seed=0):
        lazy.append(crop_scale)
        original(self, records, processor, num_channels, crop_scale, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LazyImages, "__init__", note)
        assert finetune.main([*options(tmp_path / "plain"), "--dry_run", "True"]) == 0
        assert [scale for scale in lazy if scale] == []
        assert finetune.main([*options(tmp_path / "crops", crop_scale=0.2), "--dry_run", "True"]) == 0
        assert 0.2 in lazy


def test_more_padding_than_can_be_reflected_is_refused(tmp_path, capsys):
    assert finetune.main(options(tmp_path, crop_padding=32, crop_mode="reflect")) == 2
    assert "crop_padding (32) must be below the image's shorter side (32 pixels)" in capsys.readouterr().err
    images = torch.zeros(2, 3, 8, 12, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"crop_padding \(8\).*\(8 pixels\)"):
        augmentation_module.random_crop(images, 8, "reflect", torch.Generator())
    assert augmentation_module.random_crop(images, 8, "constant", torch.Generator()).shape == images.shape


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"crop_scale": 2}, "crop_scale (2.0) must be a share in (0, 1]"),
        ({"eval_steps": 3}, "eval_steps (3.0) goes with --eval_strategy steps"),
        ({"save_steps": 3}, "save_steps (3.0) goes with --save_strategy steps"),
        ({"train_val_split": 1.5, "config_overrides": None}, "train_val_split (1.5) must be in (0, 1)"),
    ],
)
def test_options_without_meaning_are_refused(change, words, tmp_path, capsys):
    assert finetune.main(options(tmp_path, **change)) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1, message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"time_budget": "5m", "max_steps": 7, "num_train_epochs": None}, ["time_budget (5m)", "max_steps (7)"]),
        ({"time_budget": "5m"}, ["time_budget (5m)", "2 epochs"]),
        ({"fp16": True}, ["fp16 needs a GPU"]),
        ({"dataset_name": None, "validation_dir": "x"}, ["validation_dir goes with --train_dir"]),
    ],
)
def test_options_against_each_other_are_refused(change, words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        finetune.main(options(tmp_path, **change))
    message = capsys.readouterr().err
    assert all(word in message for word in words) and message.count("\n") == 1
