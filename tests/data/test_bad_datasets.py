"""Tables and folders that are wrong are refused in words that help."""

import os
from pathlib import Path

import datasets
import pytest
from bad_files import PHOTO, PROCESSOR, encode, load, make_table, write

from modeling_vit_scratch.data import load_splits

pytestmark = pytest.mark.usefixtures("offline")


def plain(kind: str) -> datasets.Value:
    return datasets.Value(kind)


BAD_TABLES = {
    # labels
    "label missing, class labels": (
        lambda: load(make_table(labels=[0, 1, None, 1])),
        "row 2 of split 'train' has no label; label or remove it",
    ),
    "label missing, numbers": (
        lambda: load(make_table(labels=[3, None, 4], feature=plain("int64"))),
        "row 1 of split 'train' has no label",
    ),
    "label missing, names": (
        lambda: load(make_table(labels=["a", "b", None], feature=plain("string"))),
        "row 2 of split 'train' has no label",
    ),
    "label missing first in test": (
        lambda: load(
            make_table(labels=["a", "b"] * 6, feature=plain("string")),
            test=make_table(labels=[None, "a"], feature=plain("string")),
        ),
        "row 0 of split 'test' has no label",
    ),
    "label negative, class labels": (
        lambda: load(make_table(), test=make_table(labels=[0, -1, 1])),
        "row 1 of split 'test': label -1 is none of train's 2 classes .cat, dog.",
    ),
    "label negative, numbers": (
        lambda: load(make_table(labels=[0, 1, -1, 0], feature=plain("int64"))),
        "row 2 of split 'train': label -1 is negative, which usually means that it is not known",
    ),
    "label too large": (
        lambda: load(
            make_table(labels=[0, 1] * 6, feature=plain("int32")),
            test=make_table(labels=[0, 1, 2], feature=plain("int32")),
        ),
        "row 2 of split 'test': label '2' is none of train's 2 classes",
    ),
    "label a float": (
        lambda: load(make_table(labels=[0.0, 1.5] * 6, feature=plain("float32"))),
        "column 'label' of split 'train' holds .*float32.*, e.g. 0.0; labels are whole numbers or names",
    ),
    "label NaN": (
        lambda: load(make_table(labels=[float("nan"), 1.0] * 6, feature=plain("float32"))),
        "holds .*float32.*, e.g. nan",
    ),
    "label a truth value": (
        lambda: load(make_table(labels=[True, False] * 6, feature=plain("bool"))),
        "holds .*bool.*, e.g. True; labels are whole numbers or names",
    ),
    "label a list": (
        lambda: load(make_table(labels=[[0], [1]] * 6, feature=datasets.List(plain("int64")))),
        "holds List.*, e.g. .0.; labels are whole numbers or names",
    ),
    "label of another type in test": (
        lambda: load(
            make_table(labels=["a", "b"] * 6, feature=plain("string")),
            test=make_table(labels=[0, 1], feature=plain("int64")),
        ),
        "row 0 of split 'test': label '0' is none of train's 2 classes .a, b.",
    ),
    "label unknown in test": (
        lambda: load(
            make_table(labels=["a", "b"] * 6, feature=plain("string")),
            test=make_table(labels=["a", "A"], feature=plain("string")),
        ),
        "row 1 of split 'test': label 'A' is none of train's 2 classes",
    ),
    "one class only": (
        lambda: load(make_table(labels=[0] * 6, names=["cat"])),
        "there is only one class .'cat'.; classification needs at least two",
    ),
    "one value only": (lambda: load(make_table(labels=["x"] * 6, feature=plain("string"))), "only one class .'x'."),
    "class without images": (
        lambda: load(make_table(labels=[0, 2] * 6, names=["cat", "dog", "eel"])),
        "class 'dog' has no images in split 'train'; add some, or remove it",
    ),
    "class of one image": (
        lambda: load(make_table(labels=[0] * 11 + [1])),
        "0.25 of 12 training images cannot be cut off with every class on both sides .*--train_val_split",
    ),
    # columns
    "no image column": (
        lambda: (
            load(make_table().rename_column("image", "x").cast_column("x", datasets.Value("string")))
            if False
            else load(make_table().remove_columns("image").add_column("text", ["a"] * 12))
        ),
        "no image column was found among label, text; name it with --image_column_name",
    ),
    "no label column": (
        lambda: load(make_table().remove_columns("label").add_column("text", ["a"] * 12)),
        "no label column was found among image, text; name it with --label_column_name",
    ),
    "image column misspelt": (
        lambda: load(make_table(), {"image_column": "imgae"}),
        "there is no column 'imgae'; the dataset has image, label: did you mean 'image'",
    ),
    "label column misspelt": (
        lambda: load(make_table(), {"label_column": "lable"}),
        "there is no column 'lable'; the dataset has image, label: did you mean 'label'",
    ),
    "image column of text": (
        lambda: load(make_table().add_column("img", ["a.png"] * 12), {"image_column": "img"}),
        "column 'img' does not hold images but Value.*cast it to Image",
    ),
    "image column of numbers": (
        lambda: load(make_table().remove_columns("image").add_column("pixel_values", [[[1, 2], [3, 4]]] * 12)),
        "column 'pixel_values' does not hold images but List",
    ),
    "label column of images": (
        lambda: load(make_table(), {"label_column": "image"}),
        "column 'image' of split 'train' holds Image.*; labels are",
    ),
    "column missing in test": (
        lambda: load(make_table(), test=make_table().remove_columns("label")),
        "split 'test' has no column 'label'; it has image",
    ),
    "image missing": (
        lambda: load(make_table([encode(PHOTO[:8, :8])] * 5 + [None] * 3, n=8)),
        "3 images cannot be used; repair or remove them:\n  row . of split 'train': there is no image",
    ),
    "one image missing": (
        lambda: load(make_table([encode(PHOTO[:8, :8])] * 7 + [None], n=8)),
        "row 7 of split 'train': there is no image; remove the row",
    ),
    # splits
    "no train": (
        lambda: load(None, test=make_table(), extra=make_table()),
        "there is no 'train' split; the dataset has test, extra",
    ),
    "train is empty": (lambda: load(make_table(labels=[])), "split 'train' is empty; remove it, or add images"),
    "validation is empty": (
        lambda: load(make_table(), validation=make_table(labels=[])),
        "split 'validation' is empty",
    ),
    "test is empty": (lambda: load(make_table(), test=make_table(labels=[])), "split 'test' is empty"),
    "test has a class more": (
        lambda: load(make_table(), test=make_table(names=["cat", "dog", "eel"])),
        "split 'test' has other classes than train: extra eel; give every split the same classes",
    ),
    "test has a class less": (
        lambda: load(make_table(names=["cat", "dog", "eel"]), test=make_table()),
        "split 'test' has other classes than train: missing eel",
    ),
    "test has the classes in another order": (
        lambda: load(make_table(), test=make_table(names=["dog", "cat"])),
        "the same names in another order",
    ),
    "validation share of 0": (lambda: load(make_table(), {"train_val_split": 0}), r"train_val_split \(0\) must be in"),
    "validation share of 1.5": (lambda: load(make_table(), {"train_val_split": 1.5}), r"train_val_split \(1.5\)"),
    "validation share too small": (
        lambda: load(make_table(), {"train_val_split": 0.01}),
        "0.01 of 12 training images cannot be cut off",
    ),
    "no training samples": (lambda: load(make_table(), {"max_train_samples": 0}), r"max_train_samples \(0\) must be"),
    "negative evaluation samples": (lambda: load(make_table(), {"max_eval_samples": -1}), r"max_eval_samples \(-1\)"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_are_refused(name):
    run, message = BAD_TABLES[name]
    with pytest.raises(ValueError, match=message):
        run()


def class_folder(folder: Path, *classes: str, n: int = 4) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            (folder / name / f"{i}.png").write_bytes(encode(PHOTO[i : i + 8, :8]))
    return folder


BAD_FOLDERS = {
    "no folder": (lambda at: at / "nothing", "dataset '.*nothing' could not be loaded: .*'digits'"),
    "relative path that is no Hub id": (lambda at: Path("./no thing"), "dataset 'no thing' could not be loaded"),
    "no name": (lambda at: "", "dataset '' could not be loaded"),
    "an empty folder": (lambda at: (at / "x").mkdir() or at / "x", "could not be loaded: .*any data files"),
    "a file": (lambda at: write(at / "x.zip", b"no zip"), "could not be loaded"),
    "images without classes": (
        lambda at: write(at / "x" / "1.png", encode(PHOTO)).parent,
        "split 'train': .*x has no directories; put the images into one per class",
    ),
    "images beside classes": (
        lambda at: write(class_folder(at / "x", "cat", "dog") / "1.png", encode(PHOTO)).parent,
        "1.png lies in .*x beside the classes; move it into one of them",
    ),
    "a class without images": (
        lambda at: (class_folder(at / "x", "cat", "dog") / "eel").mkdir() or at / "x",
        "class 'eel' has no images; add some or remove .*eel",
    ),
    "one class": (lambda at: class_folder(at / "x", "cat"), "only one class .'cat'."),
    "other classes in test": (
        lambda at: [class_folder(at / "x" / n, "cat", c) for n, c in (("train", "dog"), ("test", "fox"))][-1].parent,
        "split 'test' has other classes than train: extra fox; missing dog",
    ),
    "test only": (
        lambda at: class_folder(at / "x" / "test", "cat", "dog").parent,
        "there is no 'train' split; the dataset has test",
    ),
    "two folders for one split": (
        lambda at: [class_folder(at / "x" / n, "cat", "dog") for n in ("train", "val", "valid")][-1].parent,
        "val and .*valid are both 'validation'; keep one of them",
    ),
    "splits without classes": (
        lambda at: [write(at / "x" / n / "1.png", encode(PHOTO)) for n in ("train", "test")] and at / "x",
        "has no directories; put the images into one per class",
    ),
    "text in a file without a suffix": (
        lambda at: write(class_folder(at / "x", "cat", "dog") / "cat" / "notes", "hello").parents[1],
        "cat/notes.*unreadable image.*repair or remove it",
    ),
    "a damaged parquet file": (
        lambda at: write(at / "x" / "train.parquet", b"PAR1 no table").parent,
        "could not be loaded: Parquet",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = BAD_FOLDERS[name]
    folder = str(make(tmp_path))
    with pytest.raises(ValueError, match=message):
        load_splits(folder, PROCESSOR, train_val_split=0.25)


def test_a_folder_given_by_option_that_is_not_there(tmp_path):
    files = {"train": str(class_folder(tmp_path / "a", "cat", "dog")), "test": str(tmp_path / "b")}
    with pytest.raises(ValueError, match=r"split 'test': there is no folder .*b"):
        load_splits("x", PROCESSOR, data_files=files)


@pytest.mark.parametrize("name", ["with space", "Ünïcödé", "北京 🐈", "-dash", "per%20cent", "[ab]*?", "a'quote\""])
def test_any_path_will_do(name, tmp_path):
    """Of the folder, of classes and of files, in both layouts."""
    folder = class_folder(tmp_path / name, name, "other one")
    (folder / name / "0.png").rename(folder / name / f"{name}.png")
    splits = load_splits(str(folder), PROCESSOR, train_val_split=0.25)
    assert sorted(splits.class_names) == sorted([name, "other one"])
    assert len(splits.train) == 6


@pytest.mark.parametrize("name", ["with space", "Ünïcödé", "北京 🐈"])
def test_any_path_will_do_in_hub_layout(name, tmp_path):
    (tmp_path / name / "data").mkdir(parents=True)
    make_table(names=[name, "other"]).to_parquet(tmp_path / name / "data" / "train-00000-of-00001.parquet")
    splits = load_splits(str(tmp_path / name), PROCESSOR, train_val_split=0.25)
    assert splits.class_names == [name, "other"]


def test_a_read_only_data_folder_is_enough(tmp_path):
    folder = class_folder(tmp_path / "x", "cat", "dog")
    before = sorted(path for path in tmp_path.rglob("*"))
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555)
    try:
        assert len(load_splits(str(folder), PROCESSOR, train_val_split=0.25).train) == 6
        assert sorted(path for path in tmp_path.rglob("*")) == before, "nothing is written beside the images"
    finally:
        for path in (folder, *folder.iterdir()):
            path.chmod(0o755)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_image_is_named(tmp_path):
    folder = class_folder(tmp_path / "x", "cat", "dog")
    (folder / "cat" / "2.png").chmod(0)
    with pytest.raises(ValueError, match=r"cat/2\.png.*Permission"):
        load_splits(str(folder), PROCESSOR, train_val_split=0.25)


def test_the_tables_of_datasets_are_long_enough():
    assert len(BAD_TABLES) + len(BAD_FOLDERS) >= 50
