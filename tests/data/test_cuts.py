"""cuts.py: a trained model gets the split that its run made, proved by the fingerprint, or a refusal that says why."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from colours import colour_model, processor
from hub_server import put_on_hub
from made_data import CLASSES, make_dataset, make_processor, with_labels, write_hub_layout, write_image_folder
from runs import CIFAR10_COPY, load_script, options

from modeling_vit_scratch.conversion import PACKAGED_MODEL
from modeling_vit_scratch.data import cuts, load_split, load_splits, load_streaming
from modeling_vit_scratch.data.cuts import RunRecord, read_record
from modeling_vit_scratch.data.doctor import fingerprint
from modeling_vit_scratch.data.records import Cut
from modeling_vit_scratch.data.sources import public_name
from modeling_vit_scratch.evaluation import Predictor

FOREIGN = SimpleNamespace(name="theirs", image_hw=(32, 32), record=None)
UNRECORDED = SimpleNamespace(name="older", image_hw=(32, 32), record=RunRecord())


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """What `datasets` prepares goes to a temporary folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def trained_on(splits, name="ours", image_hw=(32, 32)) -> SimpleNamespace:
    """A model as `load_split` sees it, whose run had these splits."""
    record = RunRecord(public_name(splits.name), fingerprint(splits), splits.cut)
    return SimpleNamespace(name=name, image_hw=image_hw, record=record)


def contents(records) -> list[bytes]:
    return list(records.encoded())


@pytest.fixture
def folder(tmp_path) -> str:
    """60 images to learn from and 9 to test on."""
    parts = {"train": make_dataset(60, (8, 8)), "test": make_dataset(9, (8, 8), seed=1000)}
    return write_hub_layout(tmp_path / "animals", **parts)


# What a run writes


def test_a_cut_goes_through_json():
    for cut in (Cut("stratified", 0.04, 42), Cut("given", None, 7, 100, 5), Cut("by content", 0.1, 0, None, 10)):
        assert Cut.read(json.loads(json.dumps(asdict(cut)))) == cut
    assert str(Cut("stratified", 0.04, 42)) == "stratified, share 0.04, seed 42"
    assert str(Cut("given", None, 7, 1000, 5)) == "given, seed 7, max_train_samples 1,000, max_eval_samples 5"


@pytest.mark.parametrize(
    "change",
    [
        {"method": "by guess"}, {"method": "given"}, {"train_val_split": None}, {"train_val_split": 1.5},
        {"train_val_split": "0.1"}, {"seed": None}, {"seed": True}, {"max_eval_samples": 0}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_cut_is_refused(change):
    with pytest.raises(ValueError, match="cut"):
        Cut.read(asdict(Cut("stratified", 0.1, 42)) | change)


def test_splits_know_their_cut(folder, tmp_path):
    limits = {"max_train_samples": 12, "max_eval_samples": 6}
    assert load_splits(folder, make_processor(), train_val_split=0.2, seed=7, **limits).cut == Cut(
        "stratified", 0.2, 7, 12, 6
    )
    assert load_splits(folder, make_processor(), labelled=False).cut == Cut("random", 0.1, 42)
    assert load_streaming(folder, make_processor(), max_eval_samples=6).cut == Cut("by content", 0.1, 42, None, 6)
    given = write_hub_layout(tmp_path / "given", train=make_dataset(12), dev=make_dataset(6))
    for load in (load_splits, load_streaming):
        assert load(given, make_processor(), train_val_split=0.3).cut == Cut("given", None, 42)


def write_record(folder: Path, file: str, content):
    folder.mkdir(exist_ok=True)
    (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))


def test_a_record_is_read_from_the_metrics_or_the_checkpoint(tmp_path):
    cut = Cut("stratified", 0.04, 42)
    assert read_record(tmp_path) == RunRecord()
    facts = {"dataset": "pets", "fingerprint": "f" * 32, "cut": asdict(cut), "classes": ["a"]}
    write_record(tmp_path, "run.json", facts)
    assert read_record(tmp_path) == RunRecord("pets", "f" * 32, cut)
    write_record(tmp_path, "metrics.json", {"dataset": {"name": "birds", "fingerprint": "e" * 32}})  # of an older run
    assert read_record(tmp_path) == RunRecord("pets", "f" * 32, cut)
    other = Cut("random", 0.1, 7)
    write_record(tmp_path, "metrics.json", {"dataset": {"name": "birds", "fingerprint": "e", "cut": asdict(other)}})
    assert read_record(tmp_path) == RunRecord("birds", "e", other)
    write_record(tmp_path, "metrics.json", {"validation": {}})
    (tmp_path / "run.json").unlink()
    assert read_record(tmp_path) == RunRecord()


@pytest.mark.parametrize(
    "content",
    [
        "no JSON",
        "[]",
        {"dataset": []},
        {"dataset": {"name": 3}},
        {"dataset": {"fingerprint": "\x1b[2J"}},
        {"dataset": {"cut": {"seed": 1}}},
    ],
    ids=str,
)
def test_a_record_that_cannot_be_read_is_refused_by_name(tmp_path, content):
    write_record(tmp_path, "metrics.json", content)
    if content == {"dataset": []}:  # nothing
        assert read_record(tmp_path) == RunRecord()
        return
    with pytest.raises(ValueError, match=r"metrics\.json is no record of a run: .*mend or remove it"):
        read_record(tmp_path)


# The split that a model gets


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    "settings",
    [
        {"train_val_split": 0.2, "seed": 7},
        {"train_val_split": 0.3, "max_train_samples": 20, "max_eval_samples": 6, "seed": 3},
        {"train_val_split": 0.25, "labelled": False},
    ],
    ids=["another cut", "limits", "without labels"],
)
def test_the_run_s_own_split(folder, settings, split):
    splits = load_splits(folder, make_processor(), **settings)
    found = load_split(folder, split, models=[trained_on(splits)])
    assert contents(found.records) == contents(splits.records[split])
    assert (found.name, found.cut, found.of_the_run, found.class_names) == (split, splits.cut, True, CLASSES)
    whole = load_split(folder, "test").records
    assert len(whole) == 9
    labels = {content: i % 3 for i, content in enumerate(row["bytes"] for row in encoded(folder))}
    assert found.records.labels.tolist() == [labels[content] for content in contents(found.records)]
    count, what = len(splits.records[split]), "held out of train" if split == "validation" else "was trained on"
    assert found.line == (
        f"split {split}: the {count} images that the run {what} ({splits.cut}); the fingerprint is the run's"
    )
    few = load_split(folder, split, models=[trained_on(splits)], max_samples=3)
    assert few.of_the_run and len(few.records) == 3 and set(contents(few.records)) < set(contents(found.records))
    assert few.line == f"{found.line}; 3 of them are taken"


def encoded(folder: str):
    part = datasets.load_dataset(folder, split="train")
    return part.cast_column("image", datasets.Image(decode=False))["image"]


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("kind", ["table", "folder"])
def test_the_split_of_a_streamed_run(tmp_path, folder, kind, limit):
    if kind == "folder":
        folder = write_image_folder(tmp_path / "birds", 20, size=(8, 8))
    splits = load_streaming(folder, make_processor(), train_val_split=0.3, max_eval_samples=limit, seed=5)
    found = load_split(folder, "validation", models=[trained_on(splits)])
    assert contents(found.records) == contents(splits.records["validation"])
    assert found.of_the_run and "by content, share 0.3, seed 5" in found.line
    with pytest.raises(ValueError, match=r"train was a stream, which has no end .* take --split validation"):
        load_split(folder, "train", models=[trained_on(splits)])


def test_a_streamed_dataset_is_not_prepared_for_its_validation(folder, monkeypatch):
    """It may be larger than the disk."""
    model, streamed = trained_on(load_streaming(folder, make_processor())), []
    load_raw = cuts.load_raw
    monkeypatch.setattr(cuts, "load_raw", lambda *a, **kw: streamed.append(kw.get("streaming")) or load_raw(*a, **kw))
    load_split(folder, "validation", models=[model])
    assert streamed == [True]


def test_a_folder_that_was_read_without_labels(tmp_path):
    folder = write_image_folder(tmp_path / "birds", 10, size=(8, 8))
    splits = load_splits(folder, make_processor(), labelled=False, seed=3)
    found = load_split(folder, "validation", models=[trained_on(splits)])
    assert contents(found.records) == contents(splits.records["validation"]) and found.of_the_run
    names = [Path(found.records.where(i)[:-1].partition("(")[2]).parent.name for i in range(len(found.records))]
    assert [CLASSES[label] for label in found.records.labels] == names
    (tmp_path / "birds" / "cat" / "notes").write_text("an image of its class, but none without classes")
    with pytest.raises(ValueError, match=r"no fingerprint .the run read images without labels that here lie in no"):
        load_split(folder, "validation", models=[trained_on(splits)])


def test_other_data_of_the_same_name_are_refused(folder, tmp_path):
    model = trained_on(load_splits(folder, make_processor(), train_val_split=0.2))
    other = write_hub_layout(tmp_path / "elsewhere" / "animals", train=make_dataset(61, (8, 8)))
    with pytest.raises(ValueError, match="these are not the data that it was trained on") as caught:
        load_split(other, "validation", models=[model])
    assert len(set(re.findall(r"fingerprint ([0-9a-f]{32})", str(caught.value)))) == 2
    assert model.record.fingerprint in str(caught.value) and "--split test" not in str(caught.value)
    found = load_split(other, "validation", models=[model], train_val_split=0.2)
    assert not found.of_the_run and found.cut == Cut("stratified", 0.2, 42)
    assert "as the options say (stratified, share 0.2, seed 42); it is not known whether ours was trained" in found.line
    # A run whose dataset had a validation split of its own.
    given = write_hub_layout(tmp_path / "given" / "animals", train=make_dataset(12), validation=make_dataset(6))
    with pytest.raises(ValueError, match=r"no fingerprint .the run had a validation split, but .* has none"):
        load_split(folder, "validation", models=[trained_on(load_splits(given, make_processor()))])


def test_a_model_without_a_record_is_refused_unless_told(folder):
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match="older does not say how its run cut validation from train") as caught:
            load_split(folder, split, models=[UNRECORDED])
        assert "measure on --split test" in str(caught.value)
        assert "--train_val_split SHARE and --seed N (finetune.py's own are 0.1 and 42)" in str(caught.value)
    splits = load_splits(folder, make_processor(), train_val_split=0.2, seed=7)
    found = load_split(folder, "validation", models=[UNRECORDED], train_val_split=0.2, seed=7)
    assert contents(found.records) == contents(splits.records["validation"])
    assert found.line == (
        "split validation: 12 images, cut from train as the options say (stratified, share 0.2, seed 7); it is not "
        "known whether older was trained on them"
    )
    assert load_split(folder, "test", models=[UNRECORDED]).line is None
    assert load_split(folder, models=[UNRECORDED]).line is None


def test_the_fingerprint_of_an_older_run_proves_a_cut_too(folder):
    older = trained_on(load_splits(folder, make_processor(), train_val_split=0.2))
    older.record = RunRecord(older.record.dataset, older.record.fingerprint)
    with pytest.raises(ValueError, match="does not say how"):
        load_split(folder, "validation", models=[older])
    assert load_split(folder, "validation", models=[older], train_val_split=0.2).of_the_run
    assert not load_split(folder, "validation", models=[older], train_val_split=0.3).of_the_run


def test_a_foreign_model_and_other_data_are_cut_by_default(folder, tmp_path):
    splits = load_splits(folder, make_processor())
    other = trained_on(load_splits(write_image_folder(tmp_path / "birds", 10), make_processor()))
    for model in (FOREIGN, other):
        found = load_split(folder, "validation", models=[model])
        assert contents(found.records) == contents(splits.records["validation"]) and not found.of_the_run
        assert found.line == (
            "split validation: 6 images, cut from train by default (stratified, share 0.1, seed 42); it is not known "
            f"whether {model.name} was trained on them"
        )
    assert len(load_split(folder, "validation", models=[FOREIGN], train_val_split=0.5).records) == 30
    assert load_split(folder, "validation").line.endswith("(stratified, share 0.1, seed 42)")


def test_renamed_data_are_known_by_their_fingerprint(folder, tmp_path):
    splits = load_splits(folder, make_processor(), train_val_split=0.2)
    Path(folder).rename(tmp_path / "renamed")
    found = load_split(str(tmp_path / "renamed"), "validation", models=[trained_on(splits)])
    assert found.of_the_run and len(found.records) == 12


def test_options_that_contradict_the_record_are_refused(folder):
    model = trained_on(load_splits(folder, make_processor(), train_val_split=0.2, seed=7))
    for given, message in (
        ({"train_val_split": 0.1}, r"--train_val_split \(0.1\) is not the run's \(0.2\)"),
        ({"seed": 42}, r"--seed \(42\) is not the run's \(7\), which its folder tells; leave it out"),
    ):
        with pytest.raises(ValueError, match=message):
            load_split(folder, "validation", models=[model], **given)
    assert load_split(folder, "validation", models=[model], train_val_split=0.2, seed=7).of_the_run


def test_two_models(folder, tmp_path):
    ours, same, other = (
        trained_on(load_splits(folder, make_processor(), train_val_split=share), name)
        for name, share in (("ours", 0.2), ("same", 0.2), ("other", 0.3))
    )
    with pytest.raises(ValueError, match="each in its own way") as caught:
        load_split(folder, "validation", models=[ours, other])
    assert "ours stratified, share 0.2, seed 42 and other stratified, share 0.3, seed 42" in str(caught.value)
    assert len(load_split(folder, "test", models=[ours, other]).records) == 9
    assert load_split(folder, "validation", models=[ours, same]).line.endswith("the fingerprint is the run's")
    for models in ([ours, FOREIGN], [FOREIGN, ours]):
        found = load_split(folder, "validation", models=models)
        assert found.of_the_run and len(found.records) == 12
        assert found.line.endswith("the fingerprint is the run's; it is not known whether theirs was trained on them")
    with pytest.raises(ValueError, match="older does not say how"):
        load_split(folder, "validation", models=[ours, UNRECORDED])
    assert load_split(folder, "validation", models=[ours, UNRECORDED], seed=42).of_the_run


def test_digits_are_the_same_data_in_every_size():
    """They are drawn at the model's size, and so is what the fingerprint is of."""
    small, large = (
        trained_on(load_splits("digits", make_processor(size), train_val_split=0.2), f"{size}", size)
        for size in ((8, 8), (16, 16))
    )
    found = load_split("digits", "validation", models=[small, large], image_size=(8, 8))
    assert found.of_the_run and "not known" not in found.line and len(found.records) == 288


@pytest.mark.parametrize("name", ["validation", "dev"])
def test_a_validation_split_of_its_own_is_taken_whole(tmp_path, name):
    folder = write_hub_layout(tmp_path, **{"train": make_dataset(12), name: make_dataset(6, seed=100)})
    run = load_splits(folder, make_processor(), max_eval_samples=3)
    for models in ([], [trained_on(run)], [FOREIGN], [UNRECORDED]):
        for split, count in (("validation", 6), ("train", 12)):
            found = load_split(folder, split, models=models)
            assert (len(found.records), found.cut) == (count, None)
            assert found.line == f"split {split}: the dataset's own, whole"
    assert load_split(folder, "validation", seed=3).line.endswith(
        "is not cut: --train_val_split and --seed change nothing"
    )


def test_the_only_split_is_whole_and_said_to_be_what_was_trained_on(tmp_path):
    folder = write_image_folder(tmp_path / "birds", 10, size=(8, 8))
    model = trained_on(load_splits(folder, make_processor()))
    found = load_split(folder, models=[model])
    assert len(found.records) == 30
    assert found.line == "split train: all of it, trained on or not; --split validation takes what the run held out"
    assert load_split(folder, models=[FOREIGN]).line is None


def test_hidden_labels_of_test(tmp_path):
    hidden = with_labels(6, [-1], datasets.ClassLabel(names=CLASSES))
    folder = write_hub_layout(tmp_path / "a", train=make_dataset(60, (8, 8)), test=hidden)
    model = trained_on(load_splits(folder, make_processor(), train_val_split=0.2))
    with pytest.raises(ValueError, match=r"labels of split 'test' are hidden \(-1 everywhere\).*--split validation"):
        load_split(folder, "test", models=[model])
    found = load_split(folder, models=[model])
    assert (found.name, len(found.records), found.of_the_run) == ("validation", 12, True)
    assert found.line.startswith("the labels of split 'test' are hidden (-1 everywhere): split 'validation' is taken; ")
    given = write_hub_layout(tmp_path / "b", train=make_dataset(12), validation=make_dataset(6), test=hidden)
    assert len(load_split(given).records) == 6
    with pytest.raises(ValueError, match="nothing can be measured on it; choose data with labels"):
        load_split(write_hub_layout(tmp_path / "c", test=hidden))


# The scripts


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict]:
    """A finished run with a cut of its own: its folder and its metrics."""
    folder = tmp_path_factory.mktemp("run") / "output"
    argv = options(
        folder, max_train_samples=None, max_eval_samples=None, train_val_split=0.04, seed=7, num_train_epochs=1
    )
    assert load_script("finetune").main(argv) == 0
    return folder, json.loads((folder / "metrics.json").read_text())


def test_a_run_records_its_cut(run):
    folder, metrics = run
    cut = {
        "method": "stratified", "train_val_split": 0.04, "seed": 7, "max_train_samples": None, "max_eval_samples": None,
    }  # fmt: skip
    assert metrics["dataset"]["cut"] == cut
    [checkpoint] = folder.glob("checkpoint-*")
    assert json.loads((checkpoint / "run.json").read_text())["cut"] == cut
    assert (
        read_record(checkpoint)
        == read_record(folder)
        == RunRecord("digits", metrics["dataset"]["fingerprint"], Cut(**cut))
    )


@pytest.mark.parametrize("place", ["folder", "checkpoint"])
def test_validate_measures_what_the_run_validated_on(run, place, capsys):
    folder, metrics = run
    model = folder if place == "folder" else next(folder.glob("checkpoint-*"))
    capsys.readouterr()
    assert load_script("validate").main([str(model), "digits", "--split", "validation", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    [result] = report["models"]
    assert result["examples"] == metrics["validation"]["examples"] == 58
    assert result["accuracy"] == pytest.approx(metrics["validation"]["accuracy"])
    assert result["loss"] == pytest.approx(metrics["validation"]["loss"], abs=1e-4)
    assert (report["split"], report["cut"]) == ("validation", {**metrics["dataset"]["cut"], "of_the_run": True})
    assert "validate.py: split validation: the 58 images that the run held out of train" in err
    assert load_script("validate").main([str(model), "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cut"] is None


def test_export_and_plot_take_the_same_images(run, tmp_path, capsys):
    folder, metrics = run
    words = ["--dataset", "digits", "--split", "validation"]
    argv = [str(folder), str(tmp_path / "out"), *words, "--formats", "program", "--repeats", "1", "--json"]
    assert load_script("export").main(argv) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["split"], report["examples"]) == ("validation", 58)
    assert report["rows"][0]["accuracy"] == pytest.approx(metrics["validation"]["accuracy"])
    assert "export.py: split validation: the 58 images that the run held out" in err
    plot = load_script("plot")
    view, _ = plot.load_view(plot.parse(["mistakes", str(folder), *words]))
    assert len(view.records) == 58
    assert "plot.py: split validation: the 58 images that the run held out" in capsys.readouterr().err


def test_validate_measures_what_a_streamed_run_validated_on(tmp_path, capsys):
    argv = options(
        tmp_path, streaming=True, max_train_samples=None, max_eval_samples=50, train_val_split=0.2, max_steps=4,
        eval_strategy="steps", save_strategy="steps", eval_steps=4, save_steps=4,
    )  # fmt: skip
    assert load_script("finetune").main(argv) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["dataset"]["cut"]["method"] == "by content"
    capsys.readouterr()
    assert load_script("validate").main([str(tmp_path), "digits", "--split", "validation", "--json"]) == 0
    out, err = capsys.readouterr()
    [result] = json.loads(out)["models"]
    assert result["examples"] == 50 and result["accuracy"] == pytest.approx(metrics["validation"]["accuracy"])
    assert result["loss"] == pytest.approx(metrics["validation"]["loss"], abs=1e-4)
    assert "(by content, share 0.2, seed 42, max_eval_samples 50); the fingerprint is the run's" in err


def test_an_older_folder_is_refused_in_a_line(run, tmp_path, capsys):
    folder, metrics = run
    for file in folder.iterdir():
        if file.is_file() and file.name != "metrics.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    validate = load_script("validate").main
    capsys.readouterr()
    assert validate([str(tmp_path), "digits", "--split", "validation"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "does not say how its run cut validation from train" in err
    told = [str(tmp_path), "digits", "--split", "validation", "--train_val_split", "0.04", "--seed", "7", "--json"]
    assert validate(told) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["models"][0]["accuracy"] == pytest.approx(metrics["validation"]["accuracy"])
    assert json.loads(out)["cut"]["of_the_run"] is False and "it is not known whether" in err
    with pytest.raises(SystemExit, match="2"):
        validate([str(tmp_path), "digits", "--train_val_split", "1"])
    assert "must be in (0, 1)" in capsys.readouterr().err


def test_a_checkpoint_of_an_earlier_version_is_resumed(run, tmp_path, capsys):
    """Its run.json names neither cut nor options; the fingerprint, which it has, knows the cut."""
    newer = ("cut", "changeable", "changes")
    from modeling_vit_scratch.training import checkpoints

    [saved] = run[0].glob("checkpoint-*")
    facts = json.loads((saved / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({name: value for name, value in facts.items() if name not in newer}))
    (tmp_path / "optimizer.pt").touch()
    checkpoints.check_run(tmp_path, facts, {})
    (tmp_path / "run.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"was saved with cut = .*0\.04.*, but this run has .*0\.1"):
        checkpoints.check_run(tmp_path, {**facts, "cut": {**facts["cut"], "train_val_split": 0.1}}, {})


def test_a_pushed_model_brings_its_record(hub, tmp_path):
    colour_model().save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    put_on_hub(hub, "me/bare", tmp_path)
    assert Predictor("me/bare", "cpu").record == RunRecord()
    cut = Cut("stratified", 0.04, 42)
    write_record(tmp_path, "metrics.json", {"dataset": {"name": "pets", "fingerprint": "f", "cut": asdict(cut)}})
    put_on_hub(hub, "me/pets", tmp_path)
    assert Predictor("me/pets", "cpu").record == RunRecord("pets", "f", cut)


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10_COPY.exists(), reason=f"the JPEG copy of CIFAR-10 is not at {CIFAR10_COPY}")
def test_the_packaged_model_was_not_trained_on_its_validation():
    """Its accuracy there is that of the test split, and far below that of the images beside them."""
    model = Predictor(str(PACKAGED_MODEL), "cpu")
    accuracies = {}
    for split in ("validation", "train"):
        found = load_split(str(CIFAR10_COPY), split, max_samples=2000, models=[model])
        assert found.of_the_run
        answers = model.answers(found.records, found.class_names)
        accuracies[split] = np.mean((answers.probabilities.argmax(1) == answers.labels).numpy())
    assert accuracies["validation"] == 0.868
    assert accuracies["train"] > 0.97
