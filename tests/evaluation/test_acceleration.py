"""load_for_inference: what is chosen on which device, that it computes the same, and what is said where it does not."""

import importlib.util
import json
import logging
import shutil
import sys
import time

import pytest
import torch
from colours import BLUE, GREEN, RED, colour_model, paint, paint_folder, save_trained
from runs import load_script
from transformers import TorchAoConfig

from modeling_vit_scratch import ViTScratchForImageClassification
from modeling_vit_scratch.data import load_split
from modeling_vit_scratch.evaluation import Predictor, acceleration, devices, evaluate_model, load_for_inference
from modeling_vit_scratch.evaluation.programs import missing_for_onnx
from modeling_vit_scratch.export import export_model
from modeling_vit_scratch.hub.folder import FolderError, check_folder
from modeling_vit_scratch.training.arguments import ModelArguments
from modeling_vit_scratch.training.models import load_trained

needs_onnx = pytest.mark.skipif(bool(missing_for_onnx()), reason="pip install 'modeling_vit_scratch[export]'")
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="pip install 'modeling_vit_scratch[quantize]'"
)
UNITS = {
    "none": {},
    "bfloat16": {"avx512_bf16": True, "cpu_name": "AMD EPYC"},
    "Intel without AMX": {"avx512_bf16": True, "avx512_vnni": True, "cpu_name": "Intel Xeon"},
    "AMX": {"avx512_bf16": True, "amx_bf16": True, "amx_int8": True, "cpu_name": "Intel Xeon"},
}
AUTO = {"none": "float32", "bfloat16": "bfloat16", "Intel without AMX": "float32", "AMX": "bfloat16"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A model with something in its block, so that 16 and 8 bits round."""
    torch.manual_seed(0)
    model = colour_model()
    for parameter in model.vit.layers.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return save_trained(model, tmp_path_factory.mktemp("model"))


def without_classes() -> ViTScratchForImageClassification:
    config = colour_model().config
    config.num_labels = 0
    return ViTScratchForImageClassification(config)


@pytest.fixture
def images(folder) -> torch.Tensor:
    return Predictor(folder, "cpu").pixels([paint(colour) for colour in (RED, GREEN, BLUE)])


def units(monkeypatch, name: str):
    """As on a CPU that has these units."""
    monkeypatch.setattr(devices, "cpu_capabilities", lambda: UNITS[name])


@pytest.mark.parametrize(("name", "expected"), AUTO.items())
def test_auto_takes_what_the_cpu_has_fast_units_for(name, expected, folder, images, monkeypatch):
    units(monkeypatch, name)
    predictor = load_for_inference(folder, "cpu")
    assert predictor.computes_in == expected
    assert predictor.model.dtype == getattr(torch, expected)
    pooled, logits = predictor.classify(images)
    assert pooled.dtype == logits.dtype == torch.float32
    plain = Predictor(folder, "cpu").classify(images)
    torch.testing.assert_close((pooled, logits), plain, atol=0, rtol=0 if expected == "float32" else 0.02)
    assert torch.equal(logits, plain[1]) == (expected == "float32")  # bfloat16 rounds, or it was not used


@pytest.mark.parametrize(("dtype", "patches", "has", "expected"), [
    ("bfloat16", 4, "bfloat16", "eager"), ("bfloat16", 3, "bfloat16", "sdpa"), ("float32", 4, "bfloat16", "sdpa"),
    ("bfloat16", 4, "AMX", "sdpa"),
])  # fmt: skip
def test_attention_is_eager_in_bfloat16_of_few_patches(dtype, patches, has, expected, folder, images, monkeypatch):
    """Of the 4 patches that the model has; the copy in float32 stays what it was."""
    units(monkeypatch, has)
    monkeypatch.setattr(acceleration, "EAGER_PATCHES", patches)
    predictor = load_for_inference(folder, "cpu", dtype=dtype)
    assert predictor.model.config._attn_implementation == expected
    if dtype == "bfloat16":
        assert predictor.engine.reference.model.config._attn_implementation == "sdpa"
    predictor.classify(images)


def test_int8_units(monkeypatch):
    cpu = torch.device("cpu")
    for name, expected in {"none": False, "bfloat16": False, "Intel without AMX": True, "AMX": True}.items():
        units(monkeypatch, name)
        assert devices.has_fast_int8(cpu) == expected
    assert not devices.has_fast_int8(torch.device("meta"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "half"}, ["'half'", "auto, float32, bfloat16, float16"]),
        ({"dtype": "float16"}, ["float16 needs a GPU", "bfloat16 or auto"]),
        ({"quantize": "int4"}, ["'int4'", "'int8'"]),
        ({"quantize": "int8", "dtype": "bfloat16"}, ["bfloat16", "int8", "float32"]),
        ({"quantize": "int8", "compile": True}, ["compile", "int8", "exclude"]),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_refused(options, words, folder, monkeypatch):
    units(monkeypatch, "none")
    with pytest.raises(ValueError) as error:
        load_for_inference(folder, "cpu", **options)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("options", "name", "missing", "words"),
    [
        ({"quantize": "int8"}, "none", "onnxruntime", "modeling_vit_scratch[export]"),
        ({"quantize": "int8"}, "AMX", "torchao", "modeling_vit_scratch[quantize]"),
    ],
)
def test_a_missing_package_is_named(options, name, missing, words, folder, monkeypatch):
    units(monkeypatch, name)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == missing else find(wanted))
    with pytest.raises(ValueError, match=missing) as error:
        load_for_inference(folder, "cpu", **options)
    assert words in str(error.value)


def test_a_missing_compiler_is_named(folder, monkeypatch):
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"C\+\+ compiler"):
        load_for_inference(folder, "cpu", compile=True)


@pytest.mark.slow
@pytest.mark.skipif(devices.shutil.which("g++") is None, reason="no g++")
def test_compiled_it_computes_the_same_for_any_batch(folder, images):
    predictor = load_for_inference(folder, "cpu", dtype="float32", compile=True)
    assert predictor.computes_in == "float32, compiled"
    for batch in (images, images.repeat(3, 1, 1, 1), images[:1]):
        torch.testing.assert_close(predictor.classify(batch), Predictor(folder, "cpu").classify(batch))


@needs_onnx
def test_int8_by_onnx_runtime(folder, images, monkeypatch):
    units(monkeypatch, "none")
    predictor = load_for_inference(folder, "cpu", quantize="int8")
    assert predictor.computes_in == "8-bit integers, by ONNX Runtime"
    found, expected = predictor.classify(images), Predictor(folder, "cpu").classify(images)
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.02)
    assert not torch.equal(found[1], expected[1])  # it was quantised
    assert predictor(images, output_attentions=True).attentions[0].dtype == torch.float32


@needs_onnx
def test_int8_by_onnx_runtime_needs_a_classifier(tmp_path, monkeypatch):
    units(monkeypatch, "none")
    folder = save_trained(without_classes(), tmp_path)
    with pytest.raises(ValueError, match="needs a classifier"):
        load_for_inference(folder, "cpu", quantize="int8")


@needs_torchao
def test_int8_by_torchao(folder, images, monkeypatch):
    units(monkeypatch, "AMX")
    predictor = load_for_inference(folder, "cpu", quantize="int8", dtype="float32")
    assert predictor.computes_in == "8-bit integers, by torchao, and float32"
    found, expected = predictor.classify(images), Predictor(folder, "cpu").classify(images)
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.02)
    assert not torch.equal(found[1], expected[1])


QUANTIZED = {
    "quant_method": "torchao",
    "quant_type": {"default": {"_type": "Int8DynamicActivationInt8WeightConfig", "_version": 2, "_data": {}}},
}


@needs_torchao
def test_a_folder_that_was_saved_quantised(folder, images, tmp_path, capsys):
    """transformers quantises, saves and loads; here it predicts as it did, and is used for nothing else."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    way = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    model = ViTScratchForImageClassification.from_pretrained(folder, quantization_config=way)
    saved = save_trained(model, tmp_path / "int8")
    predictor = load_for_inference(saved, "cpu")
    assert predictor.computes_in == "quantised weights (torchao)" and predictor.can_classify
    found = predictor.classify(images)
    assert torch.equal(found[1], model(predictor.normalise(images)).logits)
    torch.testing.assert_close(found, Predictor(folder, "cpu").classify(images), atol=0.1, rtol=0.02)
    assert load_for_inference(saved, "cpu", dtype="float32").computes_in == predictor.computes_in  # plot.py asks so
    for options in ({"dtype": "bfloat16"}, {"quantize": "int8"}):
        with pytest.raises(ValueError, match=r"saved in quantised weights \(torchao\): leave out dtype and quantize"):
            load_for_inference(saved, "cpu", **options)
    with pytest.raises(ValueError, match="quantised weights, which only predict"):
        export_model(predictor, tmp_path / "out", ["onnx"])
    with pytest.raises(FolderError, match="the weights are quantised"):
        check_folder(saved)
    with pytest.raises(ValueError, match="quantised weights, which only predict"):
        load_trained(ModelArguments(model_name_or_path=saved))
    assert load_script("convert").main([saved, str(tmp_path / "converted")]) == 2
    assert "quantised weights, which only predict" in capsys.readouterr().err


def test_a_folder_whose_quantiser_is_missing(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "int8")
    config = json.loads((tmp_path / "int8/config.json").read_text())
    (tmp_path / "int8/config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZED}))
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.core.config", None)
    with pytest.raises(ValueError, match=r"cannot be loaded: .*torchao.*modeling_vit_scratch\[quantize\]"):
        Predictor(tmp_path / "int8", "cpu")


def test_another_model_is_warned_of_once(folder, images, monkeypatch, caplog):
    units(monkeypatch, "bfloat16")
    with caplog.at_level(logging.WARNING, acceleration.__name__):
        predictor = load_for_inference(folder, "cpu")
        predictor.classify(images)
        assert not caplog.records  # the same model
        predictor = load_for_inference(folder, "cpu")
        with torch.no_grad():
            predictor.model.classifier.weight.copy_(predictor.model.classifier.weight.roll(1, 0))
        predictor.classify(images)
        predictor.classify(images)
    assert len(caplog.records) == 1
    text = caplog.text
    assert "differs from float32" in text and "of the first 3 images, 0 have the same likeliest class" in text
    assert predictor.engine.reference is None  # its memory is free


def test_only_the_first_images_are_compared(folder, images):
    predictor = load_for_inference(folder, "cpu", dtype="bfloat16")
    seen = []
    predictor.engine.reference.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    predictor.classify(images.repeat(7, 1, 1, 1))
    assert seen == [acceleration.COMPARED_IMAGES]


def test_a_model_without_classes_gives_features(tmp_path, images):
    folder = save_trained(without_classes(), tmp_path)
    pooled, _ = load_for_inference(folder, "cpu", dtype="bfloat16").classify(images)
    torch.testing.assert_close(pooled, Predictor(folder, "cpu").classify(images)[0], atol=0.02, rtol=0.02)


def test_the_first_call_is_not_timed(folder, tmp_path, monkeypatch):
    """It compiles and compares, which no later one does."""
    data = load_split(paint_folder(tmp_path, red=[RED] * 3, green=[GREEN] * 2, blue=[BLUE]))
    predictor = load_for_inference(folder, "cpu", dtype="bfloat16")
    predictor.processor  # noqa: B018  found before
    compare = predictor.engine._say_if_different
    monkeypatch.setattr(predictor.engine, "_say_if_different", lambda *args: (time.sleep(0.5), compare(*args)))
    assert predictor.answers(data.records, data.class_names).seconds < 0.5


def test_files_are_not_made_of_another_type(folder, tmp_path):
    with pytest.raises(ValueError, match=r"computes in bfloat16, but files are of float32"):
        export_model(load_for_inference(folder, "cpu", dtype="bfloat16"), tmp_path / "out", formats="program")
    assert not (tmp_path / "out").exists()


def test_a_copy_is_made_only_of_what_is_changed(folder):
    changed = load_for_inference(folder, "cpu", dtype="bfloat16")
    assert changed.engine.reference.model is not changed.model
    assert all(p.dtype == torch.float32 for p in changed.engine.reference.parameters())
    compiled = load_for_inference(folder, "cpu", dtype="float32", compile=True)
    assert compiled.engine.reference.model is compiled.model


# -- in the scripts --------------------------------------------------------------------------------------------------


def test_predict_says_how_it_computes(folder, tmp_path, capsys):
    script = load_script("predict")
    paint(RED).save(tmp_path / "red.png")
    for dtype, line in (("bfloat16", True), ("float32", False)):
        assert script.main([str(tmp_path / "red.png"), "--model", folder, "--dtype", dtype]) == 0
        output, errors = capsys.readouterr()
        assert "red" in output
        assert (f"predict.py: {folder} computes in bfloat16.\n" in errors) == line


def test_validate_counts_in_any_type(folder, tmp_path, capsys):
    data = paint_folder(tmp_path / "data", red=[RED] * 3, green=[GREEN] * 2, blue=[BLUE])
    script = load_script("validate")
    for dtype in ("float32", "bfloat16"):
        assert script.main([folder, data, "--dtype", dtype]) == 0
        assert "100.00" in capsys.readouterr().out
    [report] = evaluate_model(load_for_inference(folder, "cpu", dtype="bfloat16"), data)["models"]
    assert (report["accuracy"], report["computes_in"]) == (1, "bfloat16")
