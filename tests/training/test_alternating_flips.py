"""Flips that alternate: every image is mirrored in one of two epochs, whatever happens to the run."""

import pytest
import torch
from runs import fork_run, history, load_script, options, wait_all, weights

from modeling_vit_scratch.data import augmentation
from modeling_vit_scratch.data.augmentation import draw_first_flips
from modeling_vit_scratch.training import checkpoints

finetune = load_script("finetune")
ALTERNATING = {"flip_mode": "alternating", "crop_padding": 0, "num_train_epochs": 4}
MODES = {"classes": {}, "pre-training": {"task": "masked-image-modeling"}}


@pytest.fixture
def views(monkeypatch) -> dict[bytes, list[bool]]:
    """Of each image, whether it was mirrored, view by view."""
    seen, flip = {}, augmentation.flip

    def noted(images, mirrored):
        for image, turned in zip(images, mirrored.tolist(), strict=True):
            seen.setdefault(image.numpy().tobytes(), []).append(turned)
        return flip(images, mirrored)

    monkeypatch.setattr(augmentation, "flip", noted)
    return seen


def test_half_of_the_images_are_mirrored_first():
    first = draw_first_flips(10_000, 1)
    assert first.dtype == torch.bool and 4_800 < first.sum() < 5_200
    assert torch.equal(first, draw_first_flips(10_000, 1)) and not torch.equal(first, draw_first_flips(10_000, 2))


@pytest.mark.parametrize("mode", MODES)
def test_each_image_is_seen_both_ways(mode, tmp_path, views):
    assert finetune.main(options(tmp_path, **ALTERNATING, **MODES[mode])) == 0
    seen = [turns for turns in views.values() if len(turns) >= 4]  # no sample that was drawn or rehearsed
    assert len(seen) > 250  # of 320 less those held out
    for turns in seen:
        assert all(one != next_one for one, next_one in zip(turns[-4:], turns[-3:], strict=False))
    assert 0.3 < sum(turns[-1] for turns in seen) / len(seen) < 0.7


def test_chance_does_not_alternate(tmp_path, views):
    assert finetune.main(options(tmp_path, **ALTERNATING | {"flip_mode": "random"})) == 0
    alternate = [turns[-4] != turns[-3] != turns[-2] != turns[-1] for turns in views.values() if len(turns) >= 4]
    assert sum(alternate) / len(alternate) < 0.3  # one in eight


def test_resumed_in_an_epoch_it_is_as_if_it_had_not_stopped(tmp_path, interrupt):
    whole, parts = (options(tmp_path / name, **ALTERNATING) for name in ("whole", "parts"))
    assert finetune.main(whole) == 0
    interrupt["at"] = 8  # in the second of four epochs of five steps
    assert finetune.main(parts) == 130
    assert finetune.main([*parts, "--resume_from_checkpoint", "last"]) == 0
    assert history(tmp_path / "parts") == history(tmp_path / "whole")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    assert checkpoints.fact(tmp_path / "parts" / "checkpoint-20", "flip_mode") == "alternating"
    assert finetune.main([*options(tmp_path / "parts", num_train_epochs=4), "--resume_from_checkpoint", "last"]) == 2


def test_two_processes_end_with_the_weights_of_one(tmp_path):
    settings = ALTERNATING | {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "num_train_epochs": 2}
    one = options(tmp_path / "one", **settings, per_device_train_batch_size=64)
    two = options(tmp_path / "two", **settings, per_device_train_batch_size=32)
    assert finetune.main(one) == 0
    assert wait_all(fork_run(two, 2, tmp_path / "log")) == [0, 0]
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(tensor, b[name], atol=1e-5) for name, tensor in a.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip_mode": "other"}, "flip_mode ('other') must be 'random' or 'alternating'"),
        ({"horizontal_flip": 0.3}, "mirrors half of the views, not 0.3: omit horizontal_flip"),
        ({"horizontal_flip": 0}, "mirrors half of the views, not 0: omit horizontal_flip"),
    ],
    ids=str,
)
def test_what_cannot_be(changes, message, tmp_path, capsys):
    assert finetune.main(options(tmp_path / "run", **ALTERNATING | changes)) == 2
    assert message in capsys.readouterr().err
