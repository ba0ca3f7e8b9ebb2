"""Predicting many files: read in threads while the model computes, in order, and large photos at a smaller scale."""

import threading

import numpy as np
import pytest
import torch
from benchmarking.photos import jpeg, photo
from colours import BLUE, GREEN, NAMES, RED, colour_model, paint, processor
from PIL import Image

from modeling_vit_scratch.data import load_split
from modeling_vit_scratch.evaluation import Predictor, inference
from modeling_vit_scratch.evaluation.inference import predict_files


@pytest.fixture(scope="module")
def predictor(tmp_path_factory) -> Predictor:
    folder = tmp_path_factory.mktemp("colours")
    colour_model().save_pretrained(folder)
    processor().save_pretrained(folder)
    return Predictor(folder, "cpu")


@pytest.fixture
def files(tmp_path) -> list[tuple[str, str | None]]:
    """Of three colours in turns, the fifth of ten no image and the eighth not there."""
    found = []
    for i in range(10):
        path = tmp_path / f"{i}.png"
        paint((RED, GREEN, BLUE)[i % 3]).save(path)
        found.append((str(path), "there is no such file" if i == 7 else None))
    (tmp_path / "4.png").write_bytes(b"no image")
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_answers_and_errors_come_in_order(predictor, files, batch_size, monkeypatch):
    load, second_read = inference.load_image, threading.Event()

    def slow_first(name, *arguments):
        if name == files[0][0]:
            assert second_read.wait(60), "one file is read after the other"
        elif name == files[1][0]:
            second_read.set()
        return load(name, *arguments)

    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr(inference, "load_image", slow_first)
    results = list(predict_files(predictor, files, 1, batch_size))
    assert [result["picture"] for result in results] == [name for name, _ in files]
    assert {i: result["error"] for i, result in enumerate(results) if "error" in result}.keys() == {4, 7}
    assert results[7]["error"] == "there is no such file" and "unreadable image" in results[4]["error"]
    for i in {*range(10)} - {4, 7}:
        [best] = results[i]["predictions"]
        assert best["label"] == NAMES[i % 3]


def test_files_are_read_while_the_model_computes_but_not_all_of_them(predictor, files, monkeypatch):
    read, load = [], inference.load_image
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr(inference, "load_image", lambda *arguments: read.append(1) or load(*arguments))
    results = predict_files(predictor, [files[0]] * 100, batch_size=8)
    for _ in range(20):
        next(results)
    seen = len(read)
    assert 24 <= seen <= 24 + 8
    results.close()  # as Ctrl-C does
    assert len(read) <= 24 + 8, "the rest is not read"


def test_no_files():
    model = type("Model", (), {"class_names": [], "processor": processor()})
    assert list(predict_files(model, [])) == []


def test_large_photos_are_decoded_smaller_for_predictions_and_in_full_to_be_measured(predictor, tmp_path, monkeypatch):
    sizes, load = [], inference.load_image

    def watched(*arguments):
        image = load(*arguments)
        sizes.append(image.size)
        return image

    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo.jpg").write_bytes(jpeg(photo(800, 600, len(sizes))))
    monkeypatch.setattr(inference, "load_image", watched)
    monkeypatch.setattr("modeling_vit_scratch.data.records.load_image", watched)
    path = str(tmp_path / "cat" / "photo.jpg")
    [result] = predict_files(predictor, [(path, None)], 3)
    assert sizes == [(100, 75)]  # 16 pixels a side, three for each: 48
    with Image.open(path) as whole, torch.inference_mode():
        logits = predictor(predictor.pixels([whole.convert("RGB")])).logits
    expected = predictor.probabilities(logits)[0]
    found = {best["index"]: best["probability"] for best in result["predictions"]}
    np.testing.assert_allclose([found[i] for i in range(3)], expected, atol=2e-3)
    sizes.clear()
    monkeypatch.setattr(predictor, "can_classify", False)
    predictor.answers(load_split(str(tmp_path)).records, ["cat", "dog"])
    assert sizes == [(800, 600)] * 2
