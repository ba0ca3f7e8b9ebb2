"""`finetune.py --task masked-image-modeling`: what is hidden, what is measured, and that fine-tuning starts from it."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from runs import RANDOM, history, load_script, options, weights
from transformers import AutoModelForMaskedImageModeling

from modeling_vit_scratch import ViTScratchForMaskedImageModeling
from modeling_vit_scratch.data import load_splits
from modeling_vit_scratch.data.augmentation import draw_mask, normalize
from modeling_vit_scratch.training import ModelArguments, pretraining
from modeling_vit_scratch.training.models import make_processor

finetune = load_script("finetune")


# Masks


def test_masks_hide_their_share_of_units_in_every_image_and_each_unit_as_often():
    mask = draw_mask(4000, (4, 6), (2, 3), 0.6, (1, 2))
    assert mask.shape == (4000, 4, 6) and mask.dtype == torch.bool
    units = mask.unflatten(2, (2, 3)).unflatten(1, (2, 2))  # (B, down, 2, across, 3)
    assert (units.all(dim=(2, 4)) == units.any(dim=(2, 4))).all()  # hidden whole or not at all
    hidden = units.all(dim=(2, 4)).flatten(1).float()
    assert (hidden.sum(1) == 3).all()  # 0.6 of 4, rounded up
    assert (hidden.mean(0) - 0.75).abs().max() < 0.03


def test_masks_are_a_function_of_the_key_and_end_with_the_image():
    assert torch.equal(draw_mask(3, (8, 8), (1, 1), 0.5, (1, 2)), draw_mask(3, (8, 8), (1, 1), 0.5, (1, 2)))
    assert not torch.equal(draw_mask(3, (8, 8), (1, 1), 0.5, (1, 2)), draw_mask(3, (8, 8), (1, 1), 0.5, (1, 3)))
    assert draw_mask(2, (3, 5), (2, 2), 0.5, (0,)).shape == (2, 3, 5)


# A whole run


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """150 images without classes, some of them in folders."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more" / "deep").mkdir(parents=True)
    places = [folder, folder / "more", folder / "more" / "deep"]
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(32), np.arange(32))
    for i in range(150):  # a bar of one colour on another: what is hidden can be told from what is seen
        (a, b), wave = rng.integers(0, 256, (2, 3)), np.sin((x if i % 2 else y) / 4 + rng.uniform(0, 6)) > 0
        Image.fromarray(np.where(wave[..., None], a, b).astype(np.uint8)).save(places[i % 3] / f"{i}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def settings(output, images, **changes):
    return options(
        output,
        **{
            "task": "masked-image-modeling", "dataset_name": images, "max_train_samples": None, "mask_patch_size": 8,
            "max_eval_samples": None, "config_overrides": f"{RANDOM},patch_size=4", "train_val_split": 0.2,
            "learning_rate": 1e-2, **changes,
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """A finished run: (folder, its options)."""
    folder = tmp_path_factory.mktemp("run") / "output"
    argv = settings(folder, images, num_train_epochs=6, per_device_train_batch_size=16)
    assert finetune.main(argv) == 0
    return folder, argv


def test_folder_holds_a_masked_image_model_and_its_numbers(run, images):
    folder, _ = run
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["dataset"]["splits"] == {"train": 120, "validation": 30}
    assert metrics["dataset"]["cut"] == {
        "method": "random", "train_val_split": 0.2, "seed": 42, "max_train_samples": None, "max_eval_samples": None,
    }  # fmt: skip
    assert metrics["training"]["mask_ratio"] == 0.6 and metrics["training"]["mask_patch_size"] == [8, 8]
    assert {path.name for path in (folder / "plots").iterdir()} == {"reconstructions.png", "training_curves.png"}
    assert "without labels" in (folder / "README.md").read_text()

    model = AutoModelForMaskedImageModeling.from_pretrained(folder)
    assert type(model) is ViTScratchForMaskedImageModeling
    assert metrics["model"]["parameters"] == model.num_parameters() == sum(t.numel() for t in weights(folder).values())
    processor = make_processor(model.config)
    splits = load_splits(str(images), processor, train_val_split=0.2, labelled=False)
    pixels = normalize(splits.validation.images, splits.mean, splits.std)
    with torch.no_grad():
        loss = model(pixels, bool_masked_pos=draw_mask(30, (8, 8), (2, 2), 0.6, (42, 0, 0, 4))).loss
    assert metrics["validation"] == {"examples": 30, "loss": pytest.approx(loss.item(), abs=1e-5)}


def test_it_learns_and_keeps_the_best(run):
    folder, _ = run
    losses = [float(row["eval_loss"]) for row in history(folder) if row["eval_loss"]]
    assert len(losses) == 6 and losses[-1] < 0.97 * losses[0]
    kept = json.loads((folder / "metrics.json").read_text())["validation"]["loss"]
    assert kept == pytest.approx(min(losses), abs=1e-6)


def test_fine_tuning_starts_from_the_encoder(run, tmp_path, caplog):
    argv = options(tmp_path, config_overrides=None, model_name_or_path=run[0], freeze_backbone=True)
    assert finetune.main(argv) == 0
    assert "Left out the pre-training decoder" in caplog.text
    before, after = weights(run[0]), weights(tmp_path)
    encoder = {name for name in before if name.startswith("vit.") and "mask_token" not in name}
    assert encoder == {name for name in after if name.startswith("vit.")}
    assert all(torch.equal(before[name], after[name]) for name in encoder)
    assert after["classifier.weight"].shape == (10, 16) and after["classifier.weight"].any()


def test_stopped_and_resumed_is_bit_identical_to_never_stopping(run, tmp_path, interrupt, capsys):
    reference, argv = run
    argv = [*argv, "--output_dir", str(tmp_path)]
    interrupt["at"] = 13
    assert finetune.main(argv) == 130
    assert "--resume_from_checkpoint last" in capsys.readouterr().out
    assert finetune.main([*argv, "--resume_from_checkpoint", "last", "--mask_ratio", "0.5"]) == 2
    assert "mask_ratio = 0.6, but this run has 0.5" in capsys.readouterr().err
    assert finetune.main([*argv, "--resume_from_checkpoint", "last"]) == 0
    resumed = weights(tmp_path)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights(reference).items())
    losses = [
        [row[name] for row in history(folder) for name in ("loss", "eval_loss")] for folder in (reference, tmp_path)
    ]
    assert losses[0] == losses[1]


def test_accumulated_gradients_equal_those_of_one_batch(images, tmp_path):
    plain = {
        "config_overrides": "hidden_size=16,num_attention_heads=2,intermediate_size=16,patch_size=4", "optim": "sgd",
        "horizontal_flip": 0, "crop_padding": 0, "max_grad_norm": 0, "mask_ratio": 0.99, "num_train_epochs": 1,
    }  # fmt: skip
    for name, batch, steps in (("one", 120, 1), ("four", 30, 4)):
        changes = plain | {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        assert finetune.main(settings(tmp_path / name, images, **changes)) == 0
    one, four = weights(tmp_path / "one"), weights(tmp_path / "four")  # all is hidden: the masks are the same
    assert all(torch.allclose(one[name], four[name], atol=1e-6) for name in one)


def test_a_dry_run_tries_a_batch(images, tmp_path, capsys):
    assert finetune.main(settings(tmp_path, images, dry_run=True)) == 0
    text = capsys.readouterr().out
    assert "120 train, 30 validation images, 32x32 px, column image\n" in text and "in order" in text


def test_a_trained_encoder_is_gone_on_with(run):
    model, processor = pretraining.make_model(ModelArguments(model_name_or_path=str(run[0])))
    before = weights(run[0])
    for name, tensor in model.vit.state_dict().items():
        if "mask_token" not in name:
            assert torch.equal(tensor, before[f"vit.{name}"]), name
    assert list(processor.image_mean) == json.loads((run[0] / "preprocessor_config.json").read_text())["image_mean"]


def test_an_encoder_is_gone_on_with_whose_heads_the_model_has_not(tmp_path):
    config = transformers.DeiTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    theirs = transformers.DeiTForImageClassificationWithTeacher(config)
    torch.nn.init.normal_(theirs.deit.layernorm.weight)
    theirs.save_pretrained(tmp_path)
    model, _ = pretraining.make_model(ModelArguments(model_name_or_path=str(tmp_path)))
    assert torch.equal(model.vit.norm.weight, theirs.deit.layernorm.weight)


# Images without labels


def test_labels_do_not_matter_and_a_test_split_is_left_alone(tmp_path):
    processor = make_processor(ViTScratchForMaskedImageModeling.config_class.preset("showcase"))
    splits = load_splits("digits", processor, train_val_split=0.25, max_eval_samples=20, labelled=False)
    assert (len(splits.train), len(splits.validation), splits.test) == (1078, 20, None)
    assert splits.class_names == [] and not splits.train.labels.any()
    for folder in ("train/a", "train/b/c", "validation"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8), (i * 40, 0, 0)).save(tmp_path / folder / f"{i}.png")
    splits = load_splits(str(tmp_path), processor, labelled=False)
    assert (len(splits.train), len(splits.validation)) == (6, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio (1.0) must be in (0, 1)"),
        ({"mask_patch_size": 6}, "mask_patch_size (6) must be a multiple of the patch's height (4)"),
        ({"mask_patch_size": 64}, "at most the image's (32)"),
        ({"mixup_alpha": 0.2, "freeze_backbone": True}, "freeze_backbone, mixup_alpha: not with --task"),
        ({"streaming": True, "max_steps": 3}, "streaming: not with --task"),
        ({"metric_for_best_model": "top5_accuracy"}, "metric_for_best_model: not with --task"),
        ({"head_learning_rate": 0.1, "label_column_name": "x"}, "label_column_name, head_learning_rate: not with"),
        ({"train_val_split": 0.001}, "0.001 of 150 images cannot be held out"),
        ({"dataset_name": "EMPTY"}, "holds no images"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(images, tmp_path, capsys, changes, words):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    if changes.get("dataset_name"):
        changes = {"dataset_name": tmp_path / "empty"}
    assert finetune.main(settings(tmp_path / "out", images, **changes)) == 2
    assert words in capsys.readouterr().err


def test_an_unknown_task_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        finetune.main(options(tmp_path, task="masked-image-modelling"))
    assert stop.value.code == 2
    assert "--task" in capsys.readouterr().err
