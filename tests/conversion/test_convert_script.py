"""scripts/convert.py."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from foreign import NEAR, assert_same, needs_timm, of_transformers, timm, timm_folder, timm_tensors, torchvision
from made_data import write_image_folder
from runs import load_script
from safetensors.torch import save_file

from modeling_vit_scratch import ViTScratchConfig, conversion
from modeling_vit_scratch.conversion import convert_checkpoint
from modeling_vit_scratch.conversion.architectures import REFUSED_ARCHITECTURES, UNDERSTOOD
from modeling_vit_scratch.conversion.catalogue import architectures, refused
from modeling_vit_scratch.conversion.families import FAMILIES, MODEL_TYPES


@pytest.fixture(scope="module")
def script():
    return load_script("convert")


@pytest.fixture
def vit_folder(tmp_path):
    """A folder of transformers' ViT; its epsilon is one that tests can deny."""
    _, theirs = of_transformers("ViTForImageClassification", layer_norm_eps=1e-12)
    theirs.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit", theirs


def test_convert_script(script, vit_folder, tmp_path, capsys, caplog):
    folder, theirs = vit_folder
    assert script.main([str(folder), str(tmp_path / "out"), "--verify", "--num_images", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["transformers' ViTForImageClassification", "on 3 random images, in double precision"]
    table = {line[:10].strip(): line[10:].strip() for line in lines[4:-3]}
    assert list(table) == ["embeddings", "block 1", "block 2", "block 3", "final norm", "logits", "top-5"]
    assert all(float(difference) < NEAR for name, difference in table.items() if name != "top-5")
    assert table["top-5"] == "agree on 3 of 3" and lines[-2].startswith("the same function:")
    assert "Recognised transformers' names" in caplog.text
    ours = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert_same(ours, theirs)
    assert transformers.ViTImageProcessorPil.from_pretrained(tmp_path / "out").size["height"] == 24
    assert (tmp_path / "out" / "modeling_vit_scratch.py").is_file()


@needs_timm
@pytest.mark.parametrize("target", [None, "timm", "jax"])
def test_convert_script_says_everything_once(script, target, tmp_path, caplog):
    """With a proof of what comes in and one of what goes out."""
    tensors = timm_tensors(D=192, classes=None) | {"mask_token": torch.ones(1, 1, 8)}
    decoder = {"decoder_embed.weight": torch.ones(8, 192), "decoder_pos_embed": torch.ones(1, 10, 8)}
    torch.save({"model": tensors | decoder, "epoch": 3}, tmp_path / "mae.pth")
    argv = [str(tmp_path / "mae.pth"), str(tmp_path / "out"), "--verify", "--num_labels", "3", "--image_size", "32"]
    assert script.main([*argv, *(["--to", target] if target else [])]) == 0
    said = [record.getMessage() for record in caplog.records if record.name.startswith(conversion.__name__)]
    assert len(said) == len(set(said))
    for beginning in ("Took 'model'", "Recognised timm's names (mae)", "Assumed 3 heads", "Left out the pre-training"):
        assert sum(line.startswith(beginning) for line in said) == 1, said
    assert ("Google's code has" in "".join(said)) == (target == "jax")


def test_convert_script_fails_where_the_proof_does(script, vit_folder, tmp_path, capsys):
    folder, _ = vit_folder
    assert script.main([str(folder), str(tmp_path / "out"), "--verify", "--layer_norm_eps", "1e-5"]) == 1
    printed = capsys.readouterr()
    assert "NOT the same function" in printed.out and "the proof failed, nothing written" in printed.err
    assert not (tmp_path / "out").exists()


def test_convert_script_with_changes(script, vit_folder, tmp_path):
    folder, _ = vit_folder
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    changes = ["--image_size", "16", "32", "--num_labels", "2", "--labels", str(tmp_path / "labels.txt")]
    assert script.main([str(folder), str(tmp_path / "out"), *changes, "--verify"]) == 0
    config = ViTScratchConfig.from_pretrained(tmp_path / "out")
    assert config.image_size == (16, 32) and config.id2label == {0: "cat", 1: "dog"}
    processor = transformers.ViTImageProcessorPil.from_pretrained(tmp_path / "out")
    assert (processor.size["height"], processor.size["width"]) == (16, 32)


@pytest.mark.parametrize("target", ["transformers", "timm", "torchvision", "jax"])
def test_convert_script_out_again(script, vit_folder, tmp_path, capsys, target):
    folder, theirs = vit_folder
    arguments = [str(folder), str(tmp_path / "out"), "--to", target]
    available = {"timm": timm, "torchvision": torchvision, "jax": timm}.get(target, transformers)
    if available is None:
        assert script.main([*arguments, "--verify"]) == 1
        assert "not verified, nothing written" in capsys.readouterr().err and not (tmp_path / "out").exists()
    else:
        assert script.main([*arguments, "--verify"]) == 0
        assert capsys.readouterr().out.count("the same function") == 2  # in, and out
    assert script.main(arguments) == 0
    assert_same(convert_checkpoint(tmp_path / "out"), theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pth", "out"], "no file or folder none.pth"),
        (["{vit}", "{vit}"], "holds the checkpoint itself"),
        (["{vit}/model.safetensors", "{vit}"], "holds the checkpoint itself"),
        (["{vit}", "{vit}/config.json"], "is a file"),
        (["{vit}", "out", "--image_size", "1", "2", "3"], "one number or two"),
        (["{vit}", "out", "--image_size", "25"], "must be divisible by patch_size"),
        (["{vit}", "out", "--num_images", "0"], "must be at least 1"),
        (["{vit}", "out", "--labels", "none.txt"], "labels cannot be read"),
        (["{vit}", "out", "--source", "torchvision"], "source='torchvision'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_convert_script_usage(script, vit_folder, arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = script.main([argument.format(vit=vit_folder[0]) for argument in arguments])
    except SystemExit as end:
        status = end.code
    assert status == 2
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out and not Path("out").exists()


def test_convert_script_on_our_own(script, own, tmp_path, capsys):
    own.save_pretrained(tmp_path / "own")
    assert script.main([str(tmp_path / "own"), str(tmp_path / "out"), "--verify"]) == 2
    assert "nothing to verify without --to" in capsys.readouterr().err
    assert script.main([str(tmp_path / "own"), str(tmp_path / "out"), "--image_size", "40"]) == 0
    assert "No image processor was written" in capsys.readouterr().err
    assert ViTScratchConfig.from_pretrained(tmp_path / "out").image_size == 40


def test_convert_script_leaves_no_two_models_in_a_folder(script, vit_folder, tmp_path, capsys):
    folder, out = str(vit_folder[0]), tmp_path / "out"
    assert script.main([folder, str(out)]) == script.main([folder, str(out)]) == 0
    before = sorted(out.iterdir())
    for target, left in (("jax", "model.safetensors"), ("timm", "preprocessor_config.json")):
        assert script.main([folder, str(out), "--to", target]) == 2
        assert f"holds {left} of another model; name another folder" in capsys.readouterr().err
    assert sorted(out.iterdir()) == before
    (out / "README.md").write_text("mine")
    assert script.main([folder, str(out)]) == 0
    assert "README.md was there and is kept" in capsys.readouterr().err and (out / "README.md").read_text() == "mine"
    (out / "metrics.json").write_text("{}")  # of a run
    assert script.main([folder, str(out)]) == 2
    assert "holds metrics.json of another model; name another folder" in capsys.readouterr().err
    photos = write_image_folder(tmp_path / "photos", 1)
    assert script.main([folder, photos]) == 2
    assert "photos is a folder of images" in capsys.readouterr().err


def test_convert_script_help_begins_with_an_example(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("python scripts/convert.py google/vit-base-patch16-224")
    for group in ("what and where:", "changes:", "proof:"):
        assert group in lines
    with pytest.raises(SystemExit, match="2"):
        script.main([])
    assert "CHECKPOINT and OUT are needed, or --list" in capsys.readouterr().err


def test_list_says_what_is_understood(script, capsys):
    assert script.main(["--list"]) == 0
    printed = capsys.readouterr().out
    for source in FAMILIES:
        assert re.search(rf"^{source} ", printed, re.MULTILINE), source
    for model_type in MODEL_TYPES:
        assert re.search(rf"\b{model_type}\b", printed), model_type
    for family in UNDERSTOOD:
        assert f"\n{family} " in printed, family
    assert "vit_{small,base,large}_patch16_rope{,_mixed}{,_ape}_224" in printed
    assert all(what in printed for what in REFUSED_ARCHITECTURES.values())
    assert not re.search(r"[\\?|()]", "".join(architecture for _, architecture in [*architectures(), *refused()]))


def test_list_says_what_a_checkpoint_is(script, vit_folder, own, tmp_path, capsys):
    def facts(*arguments) -> dict[str, str]:
        assert script.main(["--list", *map(str, arguments)]) == 0
        return dict(
            line.split(maxsplit=1) for line in capsys.readouterr().out.replace("left out", "left_out").splitlines()
        )

    of_vit = facts(vit_folder[0])
    assert of_vit["is"] == "transformers" and of_vit["names"] == "transformers'" and of_vit["head"] == "6 classes"
    assert of_vit["hidden_size"] == "32" and of_vit["layer_norm_eps"] == "1e-12" and "pooling" not in of_vit
    own.save_pretrained(tmp_path / "own")
    assert facts(tmp_path / "own")["is"] == "this package's own"
    assert facts(tmp_path / "own")["num_register_tokens"] == "2"
    folder = timm_folder(tmp_path / "timm", global_pool="avg")
    of_timm = facts(folder)
    assert of_timm["is"] == "timm (timm's vit_base_patch16_224: ViT)" and of_timm["pooling"] == "mean"
    assert "layer_norm_eps" not in of_timm  # as by default
    assert facts(folder, "--config_overrides", "layer_norm_eps=1e-3,drop_path_rate=0.1")["layer_norm_eps"] == "0.001"
    save_file(timm_tensors() | {"mask_token": torch.ones(1, 1, 32)}, folder / "model.safetensors")
    assert facts(folder)["left_out"] == "the mask token"


def test_list_exits_with_2_where_a_checkpoint_is_refused(script, tmp_path, capsys):
    for changes, message in (
        ({"architecture": "vit_base_patch16_rpn_224"}, "norms after the branches, which this model has not"),
        ({"global_pool": "max"}, "global_pool='max', which this model has not"),
    ):
        assert script.main(["--list", str(timm_folder(tmp_path / "timm", **changes))]) == 2
        printed = capsys.readouterr()
        assert message in printed.err and not printed.out
    with pytest.raises(SystemExit, match="2"):
        script.main(["--list", str(tmp_path / "timm"), str(tmp_path / "out")])
    assert "--list writes nothing; leave out OUT" in capsys.readouterr().err


def test_any_field_can_be_told(script, tmp_path, capsys):
    tensors = timm_tensors()
    del tensors["pos_embed"]
    save_file(tensors, tmp_path / "rotary.safetensors")
    arguments = [str(tmp_path / "rotary.safetensors"), str(tmp_path / "out"), "--num_attention_heads", "4"]
    assert script.main(arguments) == 2
    assert "pass architecture=, timm's name of the model" in capsys.readouterr().err
    arguments += ["--architecture", "vit_base_patch16_rope_224"]
    assert script.main([*arguments, "--config_overrides", "rope_theta=50"]) == 0
    config = ViTScratchConfig.from_pretrained(tmp_path / "out")
    assert config.position_embedding_type == "rope" and config.rope_theta == 50
    for wrong, message in (
        ("rope_teta=50", "the nearest is 'rope_theta'"),
        ("rope_theta", "is not of the form field=value"),
        ("hidden_size=64", "hidden_size=64, but the tensors say 32"),
        ("image_size=64", "image_size has an option of its own"),
        ("source=timm", "source is no field of the config"),
    ):
        assert script.main([*arguments, "--config_overrides", wrong]) == 2
        assert message in capsys.readouterr().err
