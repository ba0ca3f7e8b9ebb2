"""Labels and image processors."""

import json

import numpy as np
import pytest
import torch
import transformers
from foreign import CLASSES, HEADS, SIZES, of_transformers, timm_tensors

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.conversion import convert_checkpoint, image_processor_for
from modeling_vit_scratch.conversion.families import FAMILIES
from modeling_vit_scratch.conversion.processors import read_labels


def test_labels(tmp_path, caplog):
    names = {i: f"class {i}" for i in range(CLASSES)}
    ours = convert_checkpoint(timm_tensors(), id2label=names, **HEADS)
    assert ours.config.id2label == names and ours.config.label2id["class 2"] == 2 and ours.classifier.weight.any()
    with pytest.raises(ValueError, match=r"id2label names 2 classes, but there are 6.*num_labels=2"):
        convert_checkpoint(timm_tensors(), id2label={0: "a", 1: "b"}, **HEADS)
    two = convert_checkpoint(timm_tensors(), id2label={0: "a", 1: "b"}, num_labels=2, **HEADS)
    assert two.config.id2label == {0: "a", 1: "b"} and not two.classifier.weight.any()
    headless = convert_checkpoint(timm_tensors(classes=None), id2label={0: "a", 1: "b", 2: "c"}, **HEADS)
    assert headless.config.num_labels == 3

    _, theirs = of_transformers("ViTForImageClassification", id2label=names)
    theirs.save_pretrained(tmp_path)
    assert convert_checkpoint(tmp_path).config.id2label == names
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": {0: "a", 1: "b"}}))
    assert convert_checkpoint(tmp_path).config.id2label == {i: f"LABEL_{i}" for i in range(CLASSES)}
    assert "names 2 classes, the head has 6" in caplog.text


def test_label_files(tmp_path):
    (tmp_path / "labels.txt").write_text("cat\ndog\n\n")
    (tmp_path / "list.json").write_text('["cat", "dog"]')
    (tmp_path / "object.json").write_text('{"1": "dog", "0": "cat"}')
    for name in ("labels.txt", "list.json", "object.json"):
        assert read_labels(tmp_path / name) == {0: "cat", 1: "dog"}
    for name, content in {"a.json": '{"1": "dog"}', "b.json": "[", "c.txt": "", "d.json": '"cat"'}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            read_labels(tmp_path / name)
    with pytest.raises(ValueError, match="cannot be read"):
        read_labels(tmp_path / "none.txt")


def test_processors_of_the_families():
    model = ViTScratchForImageClassification(ViTScratchConfig(**{**SIZES, "image_size": 224}, intermediate_size=48))
    for family in FAMILIES:
        processor = image_processor_for(family, model)
        pixels = processor(np.full((300, 400, 3), 255, np.uint8), return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 224, 224)
        expected = (1 - torch.tensor(processor.image_mean)) / torch.tensor(processor.image_std)
        torch.testing.assert_close(pixels[0, :, 100, 100], expected)
    by_family = {family: image_processor_for(family, model) for family in FAMILIES}
    assert list(by_family["transformers"].image_mean) == [0.5, 0.5, 0.5] and by_family["transformers"].resample == 2
    assert dict(by_family["transformers"].size) == {"height": 224, "width": 224}
    assert by_family["timm"].size["shortest_edge"] == 248 and by_family["timm"].resample == 3
    assert by_family["torchvision"].size["shortest_edge"] == 256 and by_family["torchvision"].resample == 2
    assert by_family["dinov2"].size["shortest_edge"] == 256 and by_family["dinov2"].image_mean[0] == 0.485


def test_processor_of_the_checkpoint(tmp_path, caplog):
    _, theirs = of_transformers("ViTForImageClassification")
    theirs.save_pretrained(tmp_path)
    own = transformers.ViTImageProcessorPil(size={"height": 24, "width": 24}, image_mean=[0.1, 0.2, 0.3], resample=3)
    own.save_pretrained(tmp_path)
    processor = image_processor_for(tmp_path, convert_checkpoint(tmp_path))
    assert list(processor.image_mean) == [0.1, 0.2, 0.3] and processor.resample == 3
    assert "resizes to" not in caplog.text
    larger = image_processor_for(tmp_path, convert_checkpoint(tmp_path, image_size=48))
    assert (larger.size["height"], larger.size["width"]) == (48, 48) and "resizes to 48x48 now" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is no JSON file"),
        ({"image_processor_type": "NoSuchProcessor"}, "no image processor can be made of"),
        (
            {"image_processor_type": "ViTImageProcessor", "image_mean": "x"},
            "image_mean .*a number for each of 3 channels",
        ),
        ({"image_processor_type": "ViTImageProcessor", "image_std": [1, 2]}, "image_std .*1, 2.* must be a number"),
    ],
)
def test_a_processor_that_cannot_be_read_is_refused_in_a_line(own, content, message, tmp_path):
    own.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        image_processor_for(tmp_path, own)
    text = str(caught.value).replace(str(tmp_path), "")
    assert file.name in text and len(text) < 300 and "\n" not in text


def test_a_processor_with_one_mean_for_all_channels(own, tmp_path):
    own.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}, "image_mean": 0.25}'
    )
    assert list(image_processor_for(tmp_path, own).image_mean) == [0.25] * 3


def test_cropping_processor_grows_with_the_model(tmp_path, caplog):
    _, theirs = of_transformers("Dinov2Model", image_size=48)
    theirs.save_pretrained(tmp_path)
    transformers.BitImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 24, "width": 24}, image_mean=[0.5] * 3
    ).save_pretrained(tmp_path)
    processor = image_processor_for(tmp_path, convert_checkpoint(tmp_path))  # as DINOv2's: made for 518, cropped to 224
    assert processor.size["shortest_edge"] == 64 and processor.crop_size["height"] == 48
    assert "crops to 48x48 now" in caplog.text
    assert processor(np.zeros((50, 90, 3), np.uint8), return_tensors="pt")["pixel_values"].shape == (1, 3, 48, 48)
