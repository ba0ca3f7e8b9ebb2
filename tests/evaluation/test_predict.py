"""scripts/predict.py: every kind of image and model, what is said of unreadable ones, and the exit status."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from colours import NAMES, colour_model, paint, processor
from PIL import Image
from runs import load_script

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.evaluation import inference


@pytest.fixture(scope="module")
def script():
    return load_script("predict")


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    paint((200, 30, 30)).save(folder / "a red.png")
    paint((30, 200, 30), (40, 40)).save(folder / "b green.jpg")
    paint((30, 30, 200), (7, 90)).save(folder / "below" / "c blue.bmp")
    (folder / "notes.txt").write_text("no image, and not taken for one")
    return folder


def results(script, capsys, *arguments: str, status: int = 0) -> list[dict]:
    assert script.main([*map(str, arguments), "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_table(script, model, photos, capsys):
    assert script.main([str(photos / "a red.png"), "--model", model]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["image", "class", "probability"]
    assert len(lines) == 4 and lines[1].partition("  ")[0].endswith("a red.png")
    assert lines[1].split()[-2] == "red"
    probabilities = [float(line.split()[-1]) for line in lines[1:]]
    assert probabilities == sorted(probabilities, reverse=True) and abs(sum(probabilities) - 1) < 1e-3


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_folders_patterns_and_batches_in_the_order_given(script, model, photos, capsys, batch_size):
    found = results(
        script, capsys, f"{photos}/*.jpg", photos, "--model", model, "--batch_size", batch_size, "--top_k", 1
    )
    assert [Path(result["picture"]).name for result in found] == [
        "b green.jpg",
        "a red.png",
        "b green.jpg",
        "c blue.bmp",
    ]
    assert [result["predictions"][0]["label"] for result in found] == ["green", "red", "green", "blue"]
    assert all(len(result["predictions"]) == 1 for result in found)


def test_table_fits_80_columns(script, tmp_path, capsys):
    colour_model(id2label={0: "r" * 60, 1: "g", 2: "b"}).save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    path = tmp_path / f"{'a' * 90}.png"
    paint((200, 30, 30)).save(path)
    assert script.main([str(path), "--model", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) == 80
    assert lines[1].startswith("…aaa") and "aaa.png  rrr" in lines[1] and "r…" in lines[1]


def test_probabilities_are_those_of_the_model(script, model, photos, capsys):
    [result] = results(script, capsys, photos / "a red.png", "--model", model)
    pixels = processor()(images=Image.open(photos / "a red.png"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = colour_model()(pixels).logits.softmax(dim=1)[0]
    for best in result["predictions"]:
        assert best["label"] == NAMES[best["index"]]
        assert best["probability"] == pytest.approx(expected[best["index"]].item(), rel=1e-4)


def test_images_that_cannot_be_read(script, model, photos, capsys):
    (photos / "broken.png").write_bytes(b"no image")
    whole = (photos / "a red.png").read_bytes()
    (photos / "torn.png").write_bytes(whole[: len(whole) // 2])
    (photos / "empty").mkdir()
    missing = [str(photos / "gone.png"), str(photos / "*.tif"), str(photos / "empty"), str(photos / "notes.txt")]
    assert script.main([str(photos), *missing, "--model", model, "--json", "--batch_size", "2"]) == 1
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert len(found) == 9 and sum("predictions" in result for result in found) == 3
    bad = [result["picture"] for result in found if "error" in result]
    assert bad == [str(photos / "broken.png"), str(photos / "torn.png"), *missing]
    for name, text in zip(missing, ["no such file", "nothing matches", "no images", "unreadable image"], strict=True):
        assert any(name in line and text in line for line in printed.err.splitlines())
    assert script.main([missing[0], "--model", model]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "0%" not in printed.err  # no bar is left behind


def test_what_lies_beside_the_images_of_a_folder_is_none(script, model, photos, capsys):
    """What systems leave behind, hidden folders, and kinds of files that Pillow writes but cannot read."""
    (photos / "._a red.png").write_bytes(b"a resource fork")
    (photos / ".thumbnails").mkdir()
    paint((30, 30, 200)).save(photos / ".thumbnails" / "c.png")
    paint((30, 30, 200)).save(photos / "album.pdf")
    found = results(script, capsys, photos, "--model", model)
    assert [Path(result["picture"]).name for result in found] == ["a red.png", "b green.jpg", "c blue.bmp"]


def test_every_mode(script, model, tmp_path, capsys):
    red = paint((210, 20, 20))
    cmyk = red.convert("CMYK")
    images = {
        "rgba.png": red.convert("RGBA"), "palette.png": red.convert("P"), "palette.gif": red.convert("P"),
        "cmyk.jpg": cmyk, "cmyk.tif": cmyk, "jpeg.jpeg": red, "webp.webp": red,
    }  # fmt: skip
    for name, image in images.items():
        image.save(tmp_path / name)
    transparent = red.convert("P")
    transparent.save(tmp_path / "transparent.png", transparency=bytes([255] * 256))
    found = results(script, capsys, tmp_path, "--model", model)
    assert len(found) == 8 and {result["predictions"][0]["label"] for result in found} == {"red"}
    for mode in ("L", "1", "I;16", "LA"):
        path = tmp_path / f"grey {mode.replace(';', '')}.png"
        Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(path) if mode == "I;16" else paint(
            (150, 150, 150)
        ).convert(mode).save(path)
        [result] = results(script, capsys, path, "--model", model)
        assert [best["probability"] for best in result["predictions"]] == pytest.approx([1 / 3] * 3, abs=0.01)


def test_exif_rotation_is_applied(script, tmp_path, capsys):
    # An image whose left half is red: the model sees the patch kernels of the left half alone.
    model = colour_model()
    with torch.no_grad():  # only the first patch column of an image counts: the others' positions drown the channels
        model.vit.embeddings.position_embeddings.zero_()
        kernel = model.vit.embeddings.patch_embeddings.projection.weight.view(4, 3, 8, 8)
        kernel.zero_()
        kernel[0, 0, :4] = 1.0  # red is strong in the upper half of each patch
        kernel[1, 0, 4:] = 1.0  # or in the lower half
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[[0, 1, 2, 3, 8, 9, 10, 11]] = (255, 0, 0)
    upright = Image.fromarray(pixels)
    upright.save(tmp_path / "upright.png")
    for orientation, transpose in {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        upright.transpose(transpose).save(tmp_path / f"turned {orientation}.png", exif=exif)
    found = results(script, capsys, f"{tmp_path}/*.png", "--model", folder)
    assert len(found) == 3
    first = found[-1]["predictions"]
    assert first[0]["index"] == 0 and first[0]["probability"] > 0.9
    assert all(result["predictions"] == first for result in found)


def test_a_grey_model(script, photos, tmp_path, capsys):
    config = ViTScratchConfig(
        num_channels=1, image_size=16, patch_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=4, num_labels=3,
    )  # fmt: skip
    model = ViTScratchForImageClassification(config)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path / "grey")
    processor(image_mean=[0.5], image_std=[0.5]).save_pretrained(tmp_path / "grey")
    found = results(script, capsys, photos, "--model", tmp_path / "grey")
    assert [len(result["predictions"]) for result in found] == [3, 3, 3]
    assert {best["label"] for best in found[0]["predictions"]} == {"0", "1", "2"}  # no names: indices


def test_a_model_of_transformers(script, photos, tmp_path, capsys):
    """The same answers as transformers' own pipeline."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8,
        id2label={i: f"class {i}" for i in range(7)}, label2id={f"class {i}": i for i in range(7)},
    )  # fmt: skip
    theirs = transformers.ViTForImageClassification(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "vit")
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessorPil(size=size, do_convert_rgb=True).save_pretrained(tmp_path / "vit")
    found = results(script, capsys, photos, "--model", tmp_path / "vit")
    pipeline = transformers.pipeline("image-classification", model=str(tmp_path / "vit"))
    for result in found:
        expected = pipeline(result["picture"], top_k=5)
        assert [best["label"] for best in result["predictions"]] == [best["label"] for best in expected]
        for best, other in zip(result["predictions"], expected, strict=True):
            assert best["probability"] == pytest.approx(other["score"], rel=1e-3)


def test_labels_from_a_file(script, photos, model, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("rot\ngrün\nblau\n", encoding="utf-8")
    [result] = results(script, capsys, photos / "b green.jpg", "--model", model, "--labels", tmp_path / "labels.txt")
    assert result["predictions"][0]["label"] == "grün"
    (tmp_path / "labels.txt").write_text("one\n")
    assert script.main([str(photos), "--model", model, "--labels", str(tmp_path / "labels.txt")]) == 2
    assert "names 1 classes, but there are 3" in capsys.readouterr().err


def test_a_model_whose_config_says_tuples(script, model, photos, tmp_path, capsys):
    colour_model(return_dict=False).save_pretrained(tmp_path / "tuples")
    processor().save_pretrained(tmp_path / "tuples")
    named = results(script, capsys, photos, "--model", model)
    assert results(script, capsys, photos, "--model", tmp_path / "tuples") == named


def test_several_classes_at_once(script, photos, tmp_path, capsys):
    colour_model(problem_type="multi_label_classification").save_pretrained(tmp_path / "several")
    processor().save_pretrained(tmp_path / "several")
    [result] = results(script, capsys, photos / "a red.png", "--model", tmp_path / "several")
    probabilities = [best["probability"] for best in result["predictions"]]
    assert probabilities[0] > 0.9 and probabilities[1] < 0.1  # each by itself: they do not sum to 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "no file or folder"),
        (["--device", "toaster"], "--device 'toaster' cannot be used"),
        (["--labels", "none.txt"], "labels cannot be read from none.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options(script, model, photos, capsys, arguments, message):
    assert script.main([str(photos), "--model", model, *arguments]) == 2
    printed = capsys.readouterr()
    assert f"predict.py: {message}" in printed.err.replace("there is ", "") and not printed.out


def test_a_model_without_a_classifier_or_a_processor(script, photos, tmp_path, capsys):
    untrained = ViTScratchForImageClassification(colour_model().config)
    untrained.save_pretrained(tmp_path / "untrained")
    assert script.main([str(photos), "--model", str(tmp_path / "untrained")]) == 2
    assert "no trained classifier" in capsys.readouterr().err
    colour_model().save_pretrained(tmp_path / "bare")
    assert script.main([str(photos), "--model", str(tmp_path / "bare")]) == 2
    assert "no preprocessor_config.json" in capsys.readouterr().err


def test_progress_is_shown_when_it_takes_long(script, model, photos, capsys, monkeypatch):
    now, fast = [0.0], inference.load_image

    def load_image(*arguments):
        now[0] += 0.8
        return fast(*arguments)

    monkeypatch.setattr("tqdm.std.time", lambda: now[0])

    assert script.main([str(photos), "--model", model]) == 0
    assert "image/s" not in capsys.readouterr().err
    monkeypatch.setattr(inference, "load_image", load_image)
    assert script.main([str(photos), "--model", model, "--batch_size", "1"]) == 0
    assert "image" in capsys.readouterr().err
