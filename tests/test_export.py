"""scripts/export.py: every file computes what the model does, for any batch, and the table says what it costs."""

import json
import math
import shutil

import pytest
import torch
from made_data import write_image_folder
from runs import load_script
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from modeling_vit_scratch import (
    ViTScratchConfig,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    export,
)
from modeling_vit_scratch.conversion import convert_checkpoint
from modeling_vit_scratch.data import load_split
from modeling_vit_scratch.evaluation import Predictor, programs

script = load_script("export")
FIELDS = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16,
    "patch_size": 8, "num_channels": 1,
}  # fmt: skip
needs_onnx = pytest.mark.skipif(
    bool(programs.missing_for_onnx()),
    reason="pip install 'modeling_vit_scratch[export]'",
)


def save(model, folder):
    """With every parameter large and random, and an image processor."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    model.eval().save_pretrained(folder)
    hw = {"height": 16, "width": 16}
    ViTImageProcessorPil(size=hw, image_mean=[0.3], image_std=[0.4]).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(model, its folder)."""
    folder = tmp_path_factory.mktemp("model")
    names = {i: str(i) for i in range(10)}
    return save(ViTScratchForImageClassification(ViTScratchConfig(**FIELDS, id2label=names)), folder), folder


def images(count):
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(count))


def run(capsys, *argv):
    """(exit status, standard output, standard error)."""
    status = script.main([str(word) for word in argv])
    return status, *capsys.readouterr()


def test_program_of_torch_export_takes_any_batch(trained, tmp_path, capsys):
    model, folder = trained
    status, output, _ = run(capsys, folder, tmp_path, "--formats", "program", "--repeats", 1, "--json")
    assert status == 0
    assert [row["format"] for row in json.loads(output)["rows"]] == ["PyTorch", "torch.export"]
    program = torch.export.load(tmp_path / "model.pt2").module()
    for count in (1, 2, 7):
        torch.testing.assert_close(program(images(count)), model(images(count)).logits, atol=1e-5, rtol=0)
    assert {path.name for path in tmp_path.iterdir()} >= {"model.pt2", "config.json", "preprocessor_config.json"}


@needs_onnx
def test_onnx_takes_any_batch_at_the_opset_that_is_named(trained, tmp_path, capsys):
    """Another than the default, of which the table below is."""
    model, folder = trained
    argv = [folder, tmp_path, "--formats", "onnx", "--opset", 18, "--repeats", 1]
    status, output, _ = run(capsys, *argv)
    assert status == 0
    assert "opset 18" in output
    check_onnx(tmp_path / "model.onnx", model, 18)


def check_onnx(path, model, opset):
    """A file of that opset, which computes what the model does for any batch."""
    import onnx
    import onnxruntime

    assert onnx.load(path).opset_import[0].version == opset
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape == ["batch", 1, 16, 16]
    assert session.get_outputs()[0].name == "logits"
    for count in (1, 2, 7):
        logits = session.run(None, {"pixel_values": images(count).numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(logits), model(images(count)).logits, atol=1e-4, rtol=0)


@needs_onnx
def test_an_opset_that_cannot_be_written_or_run_is_refused(trained, tmp_path, capsys, monkeypatch):
    import onnxruntime

    argv = [trained[1], tmp_path, "--formats", "onnx", "--repeats", 1]
    status, output, said = run(capsys, *argv, "--opset", 10)
    assert (status, output) == (2, "")
    assert "cannot write --opset 10, but 18" in said

    def newer(*args, **kwargs):
        raise RuntimeError("opset 20 is under development\nand more")

    monkeypatch.setattr(onnxruntime, "InferenceSession", newer)
    monkeypatch.setattr(export, "write_files", lambda *args: None)  # nothing reads the file now
    status, output, said = run(capsys, *argv)
    assert (status, output) == (2, "")
    assert "onnxruntime cannot run model.onnx, maybe for its --opset: opset 20 is under" in said
    assert list(tmp_path.iterdir()) == []


@needs_onnx
def test_table_of_every_format_with_accuracy(trained, tmp_path, capsys, monkeypatch):
    model, folder = trained
    settings = ["--int8", "--dataset", "digits", "--max_samples", 90, "--repeats", 2]
    status, output, _ = run(capsys, folder, tmp_path, *settings, "--json")
    assert status == 0
    report = json.loads(output)
    check_onnx(tmp_path / "model.onnx", model, 20)

    def copy_files(module, example, target, *rest):  # the same again, which takes seconds to write
        for name in programs.FILES.values():
            shutil.copy(tmp_path / name, target)

    monkeypatch.setattr(export, "write_files", copy_files)
    status, text, said = run(capsys, folder, tmp_path / "again", *settings)
    assert status == 0
    assert all(len(line) <= 80 for line in text.splitlines()[1:])  # the first line has a path
    assert "90 images" in text
    assert "model_int8.onnx" in said
    rows = {row["format"]: row for row in report["rows"]}
    assert list(rows) == ["PyTorch", "ONNX", "torch.export", "ONNX int8"]
    assert (report["opset"], report["examples"], rows["PyTorch"]["ratio"]) == (20, 90, 1)

    records = load_split("digits", "test", max_samples=90, image_size=(16, 16)).records
    processor = ViTImageProcessorPil.from_pretrained(folder)
    pixels = processor(records.images(range(90), 1), return_tensors="pt")["pixel_values"]
    right = (model(pixels).logits.argmax(1).numpy() == records.labels).mean()
    assert 0 < right < 1
    for name in ("PyTorch", "ONNX", "torch.export"):
        assert rows[name]["accuracy"] == pytest.approx(right, abs=1e-9)
        assert rows[name]["accuracy_change"] == 0
        assert rows[name]["largest_difference"] <= 1e-4
    int8 = rows["ONNX int8"]
    assert 1e-4 < int8["largest_difference"] < 0.2 * model(images(3)).logits.abs().max()
    assert int8["accuracy_change"] == pytest.approx(int8["accuracy"] - right, abs=1e-9)
    for name, row in rows.items():
        size = sum(p.numel() * 4 for p in model.parameters())
        assert row["bytes"] == (size if row["file"] is None else (tmp_path / row["file"]).stat().st_size), name


def test_nothing_of_an_earlier_export_stays(trained, tmp_path, capsys):
    for name in ("model.onnx", "model.onnx.data", "model.pt2", "model_int8.onnx", "notes.txt"):
        (tmp_path / name).write_text("of another model")
    assert run(capsys, trained[1], tmp_path, "--formats", "program", "--repeats", 1)[0] == 0
    assert not list(tmp_path.glob("*.onnx*"))
    assert torch.export.load(tmp_path / "model.pt2") and (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize("formats", [["program"], pytest.param(["onnx"], marks=needs_onnx)])
def test_a_file_that_computes_something_else_is_not_kept(trained, formats, tmp_path, capsys, monkeypatch):
    _, folder = trained
    other = save(ViTScratchForImageClassification(ViTScratchConfig(**FIELDS, num_labels=10)), tmp_path / "other")
    with torch.no_grad():
        other.classifier.bias += 2e-4
    write = export.write_files
    monkeypatch.setattr(export, "write_files", lambda module, *rest: write(export.Logits(other), *rest))
    status, output, said = run(capsys, folder, tmp_path / "out", "--formats", *formats, "--repeats", 1)
    assert (status, output) == (1, "")
    assert "2.0e-04, where 0.0001 is allowed; nothing was written" in said
    assert list((tmp_path / "out").iterdir()) == []


def test_a_model_whose_config_says_tuples(trained, tmp_path, capsys):
    model = trained[0]
    (tmp_path / "tuples").mkdir()
    config = {**json.loads((trained[1] / "config.json").read_text()), "return_dict": False}
    for file in trained[1].iterdir():
        (tmp_path / "tuples" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tuples" / "config.json").write_text(json.dumps(config))
    words = [tmp_path / "tuples", tmp_path / "out", "--formats", "program", "--repeats", 1, "--dataset", "digits"]
    assert run(capsys, *words, "--max_samples", 9)[0] == 0
    logits = torch.export.load(tmp_path / "out" / "model.pt2").module()(images(2))
    torch.testing.assert_close(logits, model(images(2)).logits, atol=1e-4, rtol=0)


@needs_onnx
def test_a_model_of_another_library_and_one_without_classes(tmp_path, capsys):
    fields = {name: value for name, value in FIELDS.items() if name != "num_channels"}
    save(ViTForImageClassification(ViTConfig(**fields, num_labels=3)), tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    assert run(capsys, tmp_path / "vit", tmp_path / "out", "--repeats", 1)[0] == 0
    assert (tmp_path / "out" / "model.onnx").is_file()

    import onnxruntime

    model = save(ViTScratchForImageClassification(ViTScratchConfig(**FIELDS, num_labels=0)), tmp_path / "features")
    assert run(capsys, tmp_path / "features", tmp_path / "out", "--formats", "onnx", "--repeats", 1)[0] == 0
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    features = session.run(["features"], {"pixel_values": images(3).numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(features), model.vit(images(3)).pooler_output, atol=1e-4, rtol=0)


def test_without_the_extra(trained, tmp_path, capsys, monkeypatch):
    _, folder = trained
    find = programs.importlib.util.find_spec
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    status, _, said = run(capsys, folder, tmp_path / "out")
    assert status == 2
    assert "onnxscript" in said and "modeling_vit_scratch[export]" in said and len(said.splitlines()) == 1
    assert run(capsys, folder, tmp_path / "out", "--formats", "program", "--repeats", 1)[0] == 0


def test_wrong_usage(trained, tmp_path, capsys):
    _, folder = trained
    (tmp_path / "file").write_text("")
    write_image_folder(tmp_path / "photos", 1)
    untrained = ViTScratchForImageClassification(ViTScratchConfig(**FIELDS, num_labels=10))
    untrained.save_pretrained(tmp_path / "untrained")
    program = ["--formats", "program"]
    for argv, words in [
        ([folder, tmp_path / "file", *program], "is a file; name a folder"),
        ([folder, tmp_path / "photos", *program], "photos is a folder of images"),
        ([tmp_path / "untrained", tmp_path / "out", *program], "no trained classifier"),
        ([tmp_path / "nothing", tmp_path / "out", *program], "nothing"),
    ]:
        status, output, said = run(capsys, *argv)
        assert (status, output) == (2, ""), said
        assert words in said
    with pytest.raises(SystemExit) as stop:
        script.main([str(folder), str(tmp_path / "out"), *program, "--int8"])
    assert stop.value.code == 2
    assert "add onnx to --formats" in capsys.readouterr().err


def test_a_model_that_was_only_pre_trained_is_refused_without_talk_of_a_new_head(tmp_path, capsys, caplog):
    save(ViTScratchForMaskedImageModeling(ViTScratchConfig(**FIELDS)), tmp_path / "masked")
    status, output, said = run(capsys, tmp_path / "masked", tmp_path / "out", "--formats", "program")
    assert (status, output) == (2, "") and "no trained classifier" in said.splitlines()[-1]
    assert "head" not in said + caplog.text and not (tmp_path / "out").exists()
    convert_checkpoint(tmp_path / "masked", num_labels=3)  # which may be trained
    assert "Made a new head for 3 classes." in caplog.text


def test_help_begins_with_an_example_and_fits(capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert text.split("\n\n")[1].startswith("python scripts/export.py")
    assert all(len(line) <= 80 for line in text.splitlines())


# -- from Python -------------------------------------------------------------------------------------------------------


def test_export_model_gives_the_report_that_the_script_prints(trained, tmp_path, capsys):
    model, folder = trained
    settings = {"batch_size": 2, "repeats": 1}
    state = torch.get_rng_state()
    report = export.export_model(folder, tmp_path / "a", "program", dataset="digits", max_samples=90, **settings)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's randomness is left alone
    words = ["--formats", "program", "--dataset", "digits", "--max_samples", 90, "--batch_size", 2, "--repeats", 1]
    status, output, _ = run(capsys, folder, tmp_path / "b", *words, "--json")
    assert status == 0
    printed = json.loads(output)
    for row in (*report["rows"], *printed["rows"]):
        assert row.pop("milliseconds") > 0 and row.pop("ratio") > 0
    assert printed == report
    assert (report["model"], report["split"], report["examples"]) == (str(folder), "test", 90)
    assert {file.name for file in (tmp_path / "a").iterdir()} == {file.name for file in (tmp_path / "b").iterdir()}
    program = torch.export.load(tmp_path / "a" / "model.pt2").module()
    torch.testing.assert_close(program(images(2)), model(images(2)).logits, atol=1e-5, rtol=0)


def test_export_model_takes_a_predictor_and_a_loaded_split(trained, tmp_path):
    predictor = Predictor(trained[1], "cpu")
    split = load_split("digits", "test", max_samples=20, image_size=predictor.image_hw, models=[predictor])
    report = export.export_model(predictor, tmp_path / "out", ["program"], dataset=split, repeats=1)
    assert (report["dataset"], report["examples"], report["rows"][1]["file"]) == ("digits", 20, "model.pt2")
    text = export.report_text(report)
    assert max(map(len, text.splitlines()[1:])) <= 80  # the first line has a path
    assert "accuracy: digits, split test, 20 images" in text


@pytest.mark.parametrize("difference", [2e-4, math.nan])
def test_export_model_raises_where_a_file_is_wrong(trained, difference, tmp_path, monkeypatch):
    found = {True: 0.0, False: difference}
    monkeypatch.setattr(export, "largest_difference", lambda runtime, module, shape: found[runtime is module])
    with pytest.raises(export.ExportDifferenceError, match=r"^torch\.export differs from the model by .*written\.$"):
        export.export_model(trained[1], tmp_path / "out", "program", repeats=1)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"formats": "pdf"}, "formats (pdf) must be some of onnx, program"),
        ({"formats": []}, "formats (none) must be some of onnx, program"),
        ({"formats": "program", "int8": True}, "int8 is made of the ONNX file: add onnx to formats"),
        ({"formats": "program", "repeats": 0}, "repeats (0) must be at least 1"),
        ({"formats": "program", "batch_size": 0}, "batch_size (0) must be at least 1"),
        ({"formats": "program", "dataset": "digits", "split": "dev"}, "no split 'dev'"),
    ],
)
def test_export_model_names_bad_input_in_a_line(trained, tmp_path, settings, message):
    with pytest.raises(ValueError) as error:
        export.export_model(trained[1], tmp_path / "out", **settings)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
