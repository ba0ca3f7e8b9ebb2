"""A trained model at work: what it is given, what it says, whose classes those are, and how its answers are counted."""

import io
import math

import datasets
import numpy as np
import pytest
import torch
from colours import BLUE, GREEN, NAMES, RED, colour_model, paint, paint_folder, processor
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.data import load_split, load_splits
from modeling_vit_scratch.data.sources import load_image
from modeling_vit_scratch.evaluation import Predictor
from modeling_vit_scratch.evaluation.devices import find_device
from modeling_vit_scratch.evaluation.inference import match_classes
from modeling_vit_scratch.evaluation.metrics import paired_difference_interval, wilson_interval
from modeling_vit_scratch.evaluation.reports import compare, measure


@pytest.fixture(scope="module")
def predictor(tmp_path_factory) -> Predictor:
    return save(colour_model(), tmp_path_factory.mktemp("colours"))


def save(model, folder, image_processor=None) -> Predictor:
    model.save_pretrained(folder)
    (image_processor or processor()).save_pretrained(folder)
    return Predictor(str(folder), "cpu")


def encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def noise(seed: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


# -- images in -------------------------------------------------------------------------------------------------------


PROCESSORS = {
    "resize": processor(image_mean=[0.1, 0.5, 0.9], image_std=[0.2, 0.3, 0.4]),
    "crop": BitImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}),
    "crop of a square": BitImageProcessorPil(size={"height": 20, "width": 20}, crop_size={"height": 16, "width": 16}),
    "bytes": processor(do_normalize=False, do_rescale=False),
}


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("size", [(16, 16), (20, 20), (40, 23)])
def test_images_become_what_the_processor_makes_of_them(kind, size, tmp_path):
    own = save(colour_model(), tmp_path, PROCESSORS[kind])
    images = [noise(0, size), noise(1, size)]
    pixels = own.pixels(images)
    assert pixels.shape == (2, 3, 16, 16) and pixels.dtype == torch.uint8
    expected = PROCESSORS[kind](images, return_tensors="pt")["pixel_values"].float()
    torch.testing.assert_close(own.normalise(pixels), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["resize", "crop"])
def test_enlarged_images_show_the_same_part(kind, tmp_path):
    own = save(colour_model(), tmp_path, PROCESSORS[kind])
    slope = np.linspace(0, 255, 120)[None, :, None] * np.ones((90, 1, 3))
    image = Image.fromarray(slope.astype(np.uint8))
    small, large = own.pixels([image])[0].float(), own.pixels([image], enlarge=4)[0].float()
    assert large.shape == (3, 64, 64)
    assert (torch.nn.functional.avg_pool2d(large, 4) - small).abs().max() < 4  # 16 columns of 255 / 16


def test_a_grey_model_gets_grey_images(tmp_path):
    config = ViTScratchConfig(
        num_channels=1, image_size=16, patch_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=4,
    )  # fmt: skip
    own = save(ViTScratchForImageClassification(config), tmp_path, processor(image_mean=[0.5], image_std=[0.5]))
    pixels = own.pixels([load_image(noise(0, (9, 30)), 1)])
    assert pixels.shape == (1, 1, 16, 16)
    assert own(pixels).logits.shape == (1, 2)


def test_devices():
    assert find_device("cpu") == torch.device("cpu")
    assert find_device().type in ("cpu", "cuda", "mps", "xpu")
    with pytest.raises(ValueError, match="--device 'toaster' cannot be used"):
        find_device("toaster")


# -- splits ------------------------------------------------------------------------------------------------------------


def rows(records) -> list[int]:
    return records.rows.tolist()


def test_splits_are_those_of_training():
    splits = load_splits("digits", processor())
    for split in ("train", "validation"):
        found = load_split("digits", split)
        assert rows(found.records) == rows(splits.records[split])
        assert found.class_names == splits.class_names and found.cut == splits.cut
    assert rows(load_split("digits").records) == rows(splits.records["test"])
    few = load_split("digits", max_samples=5).records
    assert len(few) == 5 and set(rows(few)) <= set(rows(splits.records["test"]))
    assert (few.labels == splits.records["test"].labels[rows(few)]).all()
    with pytest.raises(ValueError, match="no split 'dev'; digits has train, test"):
        load_split("digits", "dev")


def test_a_dataset_needs_no_other_split(tmp_path):
    classes = {"blue": [BLUE] * 3, "red": [RED] * 9}
    whole = load_split(paint_folder(tmp_path / "whole", **classes))
    assert (len(whole.records), whole.class_names) == (12, ["blue", "red"])
    only_test = paint_folder(tmp_path / "only" / "test", **classes)
    assert len(load_split(str(tmp_path / "only")).records) == 12
    assert len(load_split(str(tmp_path / "only"), "test").records) == 12
    with pytest.raises(ValueError, match="no split 'train'"):
        load_split(str(tmp_path / "only"), "train")
    assert only_test.endswith("test")


def test_classes_of_a_split_are_those_of_train(tmp_path):
    paint_folder(tmp_path / "train", blue=[BLUE], green=[GREEN], red=[RED])
    paint_folder(tmp_path / "val", blue=[BLUE], green=[GREEN], red=[RED, RED])
    found = load_split(str(tmp_path), "validation")
    assert found.class_names == ["blue", "green", "red"] and found.records.labels.tolist() == [0, 1, 2, 2]
    assert rows(load_split(str(tmp_path)).records) == rows(found.records)  # there is no test


def test_names_as_labels_are_those_of_train(tmp_path):
    """A test split that lacks a class does not shift the others."""
    for split, names in (("train", ["red", "green", "blue"]), ("test", ["red", "green"])):
        images = [{"bytes": encode(paint(RED)), "path": None} for _ in names]
        table = datasets.Dataset.from_dict({"image": images, "label": names})
        table.cast_column("image", datasets.Image()).to_parquet(tmp_path / f"{split}.parquet")
    found = load_split(str(tmp_path))
    assert found.class_names == ["blue", "green", "red"] and found.records.labels.tolist() == [2, 1]


# -- classes -----------------------------------------------------------------------------------------------------------


def test_classes_are_matched_by_name():
    assert match_classes(["a", "b"], ["a", "b"]).tolist() == [0, 1]
    assert match_classes(["b", "a"], ["a", "c", "b"]).tolist() == [2, 0]
    twins = ["crane", "crane", "swan"]
    assert match_classes(twins, twins).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="several of the model's classes are called 'crane'"):
        match_classes(["swan", "crane"], twins)
    with pytest.raises(ValueError) as error:
        match_classes(["frog", "ship", "lorry"], ["frog", "ship", "truck", "lory", "cat", "dog"])
    words = ("1 of the data's 3 classes: lorry", "knows 6: frog, ship, truck, lory, ...", "'lory'", "--labels FILE")
    assert all(word in str(error.value) for word in words), error.value


def test_names_of_classes(tmp_path):
    assert save(colour_model(), tmp_path / "a").class_names == ["red", "green", "blue"]
    unnamed = save(colour_model(id2label=None, num_labels=3), tmp_path / "b")
    assert unnamed.class_names == ["0", "1", "2"]
    named = Predictor(str(tmp_path / "b"), "cpu", {0: "x", 1: "y", 2: "z"})
    assert named.class_names == ["x", "y", "z"]


def images_of(folder: str):
    """The records and class names of a folder's only split."""
    split = load_split(folder)
    return split.records, split.class_names


# -- answers -----------------------------------------------------------------------------------------------------------


def test_answers_of_a_split(predictor, tmp_path):
    """Labels are turned into the model's, whatever the order of the data's classes."""
    folder = paint_folder(tmp_path, blue=[BLUE, GREEN], red=[RED])
    records, names = images_of(folder)
    answers = predictor.answers(records, names, batch_size=2)
    assert answers.labels.tolist() == [2, 2, 0]
    assert answers.probabilities.argmax(1).tolist() == [2, 1, 0]
    assert answers.flipped is None and answers.features.shape == (3, 4) and answers.seconds > 0
    with pytest.raises(ValueError, match="does not know 1 of the data's 2 classes: pink"):
        predictor.answers(records, ["blue", "pink"])


def test_mirror_images(tmp_path):
    torch.manual_seed(0)
    model = colour_model()
    torch.nn.init.normal_(model.vit.embeddings.patch_embeddings.projection.weight, std=0.3)
    torch.nn.init.normal_(model.classifier.weight)
    own = save(model, tmp_path / "model")
    (tmp_path / "data" / "red").mkdir(parents=True)
    (tmp_path / "data" / "blue").mkdir()
    images = [noise(i, (16, 16)) for i in range(4)]
    for i, image in enumerate(images):
        image.save(tmp_path / "data" / ("blue", "red")[i // 2] / f"{i}.png")
    answers = own.answers(*images_of(str(tmp_path / "data")), flip=True)
    pixels = processor()(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        plain, mirrored = (model(x).logits for x in (pixels, pixels.flip(3)))
    assert (plain - mirrored).abs().max() > 0.01
    torch.testing.assert_close(answers.probabilities, plain.softmax(1), atol=1e-5, rtol=1e-4)
    both = ((plain + mirrored) / 2).softmax(1)  # the mean that finetune.py's flip_tta takes
    torch.testing.assert_close(answers.flipped, both, atol=1e-5, rtol=1e-4)


def test_an_encoder_has_features_only(tmp_path):
    own = save(colour_model().vit, tmp_path / "encoder")
    with pytest.raises(ValueError, match="no trained classifier"):
        own.require_classifier()
    answers = own.answers(*images_of(paint_folder(tmp_path / "data", cat=[RED], dog=[BLUE])))
    assert answers.probabilities is None and answers.features.shape == (2, 4)


def test_a_model_whose_config_says_tuples(predictor, tmp_path):
    own = save(colour_model(return_dict=False), tmp_path / "tuples")
    split = images_of(paint_folder(tmp_path / "data", red=[RED], blue=[BLUE, GREEN]))
    for result, expected in zip(
        vars(own.answers(*split)).items(), vars(predictor.answers(*split)).items(), strict=True
    ):
        assert result[0] == "seconds" or result[1] is expected[1] is None or torch.equal(result[1], expected[1])
    assert own(own.pixels([paint(RED)]), output_attentions=True).attentions[0].shape == (1, 1, 4, 4)
    assert own.throughput(batch_size=2, seconds=0.0) > 0


def test_throughput_is_counted(predictor):
    assert 0 < predictor.throughput(batch_size=2, seconds=0.0) < math.inf


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_measure_by_hand():
    """Four images of two of three classes: right, right (second class), wrong, wrong."""
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    result = measure(probabilities, torch.tensor([0, 1, 0, 1]), ["a", "b", "c"])
    assert (result["examples"], result["accuracy"], result["top5_accuracy"]) == (4, 0.5, 1.0)
    assert result["accuracy_interval"] == wilson_interval(2, 4)
    assert result["top5_accuracy_interval"] == wilson_interval(4, 4)
    assert result["loss"] == pytest.approx(-sum(math.log(p) for p in (0.7, 0.6, 0.2, 0.1)) / 4)
    assert result["mean_confidence"] == pytest.approx(2.6 / 4)
    assert result["expected_calibration_error"] == pytest.approx((0.3 + 0.4 + 0.5 + 0.8) / 4)  # 4 bins of one each
    assert result["per_class"] == {
        "a": {"examples": 2, "accuracy": 0.5, "interval": wilson_interval(1, 2)},
        "b": {"examples": 2, "accuracy": 0.5, "interval": wilson_interval(1, 2)},
    }
    assert result["confusion_matrix"] == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert str(measure(torch.ones(1, 1), torch.tensor([0]), ["a"])["loss"]) == "0.0"  # and not -0.0


def test_compare_by_hand(predictor, tmp_path):
    """A knows colours; B says red of everything. An image of the wrong colour lies among the red ones."""
    biased = colour_model()
    with torch.no_grad():
        biased.classifier.bias[0] = 1000
    other = save(biased, tmp_path / "biased")
    split = images_of(paint_folder(tmp_path / "data", red=[RED, RED, RED, BLUE], green=[GREEN] * 3, blue=[BLUE] * 3))
    test = compare(predictor.answers(*split), other.answers(*split))
    assert {key: test[key] for key in ("only_a", "only_b", "examples")} == {"only_a": 6, "only_b": 1, "examples": 10}
    assert test["p_value"] == pytest.approx(2 * (1 + 7) / 2**7)
    assert test["difference"] == pytest.approx(0.5)
    assert test["difference_interval"] == paired_difference_interval(6, 1, 10)
    same = compare(predictor.answers(*split), predictor.answers(*split))
    assert (same["p_value"], same["difference"]) == (1.0, 0.0)
    low, high = same["difference_interval"]  # ten images on which they do not differ are no proof that they never do
    assert low == -high and high > 0.2
    assert NAMES[0] == "red"
