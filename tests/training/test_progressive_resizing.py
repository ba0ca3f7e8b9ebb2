"""Progressive resizing: smaller images first."""

import re
import shutil

import pytest
import torch
from runs import history, load_script, options, weights

from modeling_vit_scratch.data import Augmentation
from modeling_vit_scratch.data.augmentation import parse_sizes
from modeling_vit_scratch.training import ImageTrainer

finetune = load_script("finetune")
EARLY = {"progressive_resizing": "16=0.3,24=0.6", "num_train_epochs": 2}  # ten steps


def test_parse_sizes():
    assert parse_sizes(None) == parse_sizes("") == {}
    assert parse_sizes("16=0.4, 24=0.75") == {16: 0.4, 24: 0.75}
    for text in ("16", "16=", "=0.5", "big=0.5", "16=half", "16:0.4", "1.5=0.4"):
        with pytest.raises(ValueError, match=re.escape(f"{text!r} is not of the form side=share")):
            parse_sizes(text)


def test_images_are_smaller_until_their_share():
    """What is smaller is the augmented image: the same crop and flip as without."""
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fields = {"mean": [0.5] * 3, "std": [0.25] * 3, "crop_padding": 4, "horizontal_flip": 0.5}
    plain = Augmentation(**fields)(images, 7, 0)
    small = Augmentation(**fields, sizes={8: 0.25, 16: 0.5})
    for progress, side in ((0.0, 8), (0.2499, 8), (0.25, 16), (0.4999, 16), (0.5, 32), (1.0, 32)):
        result = small(images, 7, 0, progress)
        assert result.shape == (5, 3, side, side)
        pools = torch.nn.functional.avg_pool2d(plain, 32 // side)
        middle = slice(1, -1) if side < 32 else slice(None)  # at the border, the filter has less to read
        gap = (result - pools)[..., middle, middle].abs().mean()
        assert gap < (0.5 if side < 32 else 1e-6) * pools.std(), (side, gap)


@pytest.mark.parametrize("sizes", [{16: 0.5, 24: 0.4}, {16: 0.5, 24: 0.5}, {16: 0.0}, {16: 1.5}, {16: -0.1}])
def test_shares_rise(sizes):
    with pytest.raises(ValueError, match=r"progressive_resizing \(16=.*: shares of the training must rise"):
        Augmentation([0.5], [0.5], sizes=sizes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"progressive_resizing": "20=0.5"}, "20 pixels must be less than the image's 32x32, which has to be a square, "
         "and a multiple of the patch's 8x8"),
        ({"progressive_resizing": "32=0.5"}, "32 pixels must be less than the image's 32x32"),
        ({"progressive_resizing": "0=0.5"}, "0 pixels"),
        ({"progressive_resizing": "16=0.5", "num_train_epochs": None, "time_budget": "1m"}, "does not go with --time"),
        ({"progressive_resizing": "16=0.5", "task": "masked-image-modeling"}, "does not go with --task"),
    ],
)  # fmt: skip
def test_what_cannot_be(changes, message, tmp_path, capsys):
    assert finetune.main(options(tmp_path / "run", **changes)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


def test_a_run_sees_them_and_is_resumed_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    seen, inputs = [], ImageTrainer.training_inputs

    def noted(self, batch, step, progress):
        made = inputs(self, batch, step, progress)
        seen.append((made["pixel_values"].shape[-1], made.get("interpolate_pos_encoding", False)))
        return made

    monkeypatch.setattr(ImageTrainer, "training_inputs", noted)
    whole = options(tmp_path / "whole", **EARLY, mixup_alpha=0.2, save_total_limit=5)
    assert finetune.main(whole) == 0
    assert seen == [(16, True)] * 3 + [(24, True)] * 3 + [(32, False)] * 4
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "again" / "checkpoint-5")
    seen.clear()
    again = options(tmp_path / "again", **EARLY, mixup_alpha=0.2, save_total_limit=5)
    assert finetune.main([*again, "--resume_from_checkpoint", "last"]) == 0
    assert seen == [(24, True)] + [(32, False)] * 4
    assert history(tmp_path / "whole") == history(tmp_path / "again")
    expected, resumed = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())
    other = [word.replace("16=0.3", "16=0.2") for word in again]
    assert finetune.main([*other, "--resume_from_checkpoint", "last"]) == 2
