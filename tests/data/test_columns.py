"""Columns that hold images and labels, class names, and hidden labels."""

import datasets
import numpy as np
import pytest
from made_data import CLASSES, make_dataset, make_image, make_processor, with_labels, write_hub_layout

from modeling_vit_scratch.data import load_splits
from modeling_vit_scratch.data import splits as splits_module
from modeling_vit_scratch.data.records import load_records


@pytest.mark.parametrize(("image", "label"), [("image", "label"), ("img", "labels"), ("photo", "kind"), ("a", "b")])
def test_columns_are_found(image, label):
    raw = datasets.DatasetDict(train=make_dataset(12, image=image, label=label))
    records, names = load_records(raw, train_val_split=0.25)
    assert names == CLASSES
    assert records["train"].image(0, 3).size == (32, 32)


def test_usual_columns_come_before_others_of_their_type():
    """image before mask, fine_label before coarse_label (CIFAR-100)."""
    part = make_dataset(12, image="mask", label="coarse_label", seed=500)
    images = make_dataset(12).cast_column("image", datasets.Image(decode=False))["image"]
    part = part.add_column("image", list(images), feature=datasets.Image())
    part = part.add_column("fine_label", [0, 1] * 6, feature=datasets.ClassLabel(names=["x", "y"]))
    records, names = load_records(datasets.DatasetDict(train=part), train_val_split=0.25)
    assert names == ["x", "y"]
    row = int(records["train"].rows[0])
    assert np.array_equal(records["train"].image(0, 3), make_image(row))
    records, names = load_records(datasets.DatasetDict(train=part), "mask", "coarse_label", train_val_split=0.25)
    assert names == CLASSES
    assert np.array_equal(records["train"].image(0, 3), make_image(500 + int(records["train"].rows[0])))


def with_columns(**columns) -> datasets.DatasetDict:
    """Twelve images, without their label, and these columns: values, in turn, and their feature."""
    part = make_dataset(12).remove_columns("label")
    for name, (values, feature) in columns.items():
        part = part.add_column(name, [values[i % len(values)] for i in range(12)], feature=feature)
    return datasets.DatasetDict(train=part)


DOMAINS = ([0, 1, 2], datasets.ClassLabel(names=["photo", "sketch", "painting"]))
NAMED = (["x", "y"], datasets.Value("string"))


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        ({"domain": DOMAINS, "label": NAMED}, ["x", "y"]),
        ({"domain": DOMAINS, "target": ([3, 4], datasets.Value("int64"))}, ["3", "4"]),
        ({"label": ([0.5, 1.5], datasets.Value("float32")), "domain": DOMAINS}, DOMAINS[1].names),  # a score
        ({"caption": NAMED, "domain": DOMAINS}, DOMAINS[1].names),
    ],
    ids=["names called label", "numbers called target", "a label that is none", "no usual name"],
)
def test_a_usual_name_wins(columns, names):
    assert load_records(with_columns(**columns), train_val_split=0.25)[1] == names


def test_a_file_name_called_image_is_no_image(tmp_path):
    part = make_dataset(12, image="scan").add_column("image", ["a.png"] * 12)
    splits = load_splits(write_hub_layout(tmp_path, train=part), make_processor(), train_val_split=0.25)
    assert splits.columns == ("scan", "label")


def test_several_columns_of_no_usual_name_are_refused():
    with pytest.raises(ValueError, match=r"columns a, b could each be the labels; name one with --label_column_name\."):
        load_records(with_columns(a=DOMAINS, b=DOMAINS))
    assert load_records(with_columns(a=DOMAINS, b=DOMAINS), label_column="b", train_val_split=0.25)[1]
    scans = list(make_dataset(12).cast_column("image", datasets.Image(decode=False))["image"])
    part = make_dataset(12, image="left").add_column("right", scans, feature=datasets.Image())
    with pytest.raises(ValueError, match=r"left, right could each be the images; name one with --image_column_name\."):
        load_records(datasets.DatasetDict(train=part))


@pytest.mark.parametrize("lazy", [False, True])
def test_the_columns_are_told(tmp_path, monkeypatch, lazy):
    if lazy:
        monkeypatch.setattr(splits_module, "MAX_DECODED_BYTES", 0)
    folder = write_hub_layout(tmp_path, train=make_dataset(12, image="scan", label="kind"))
    assert load_splits(folder, make_processor(), train_val_split=0.25).columns == ("scan", "kind")
    unlabelled = load_splits(folder, make_processor(), train_val_split=0.25, labelled=False)
    assert unlabelled.columns == ("scan", None)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["dog", "cat", "eel"], ["cat", "dog", "eel"]),
        ([3, 1, 2], ["1", "2", "3"]),
        ([20, 3, 100], ["3", "20", "100"]),  # numbers sort as numbers
        (["20", "3", "100"], ["100", "20", "3"]),
        (["Köln", "Ørsta", "北京"], ["Köln", "Ørsta", "北京"]),
    ],
)
def test_classes_from_plain_values(values, names):
    def part(n):
        return make_dataset(n).remove_columns("label").add_column("label", [values[i % 3] for i in range(n)])

    records, found = load_records(datasets.DatasetDict(train=part(12), test=part(5)), train_val_split=0.25)
    assert found == names
    assert [names[label] for label in records["test"].labels] == [str(values[i % 3]) for i in range(5)]


HIDDEN = {
    "-1 of class labels": ([-1], datasets.ClassLabel(names=CLASSES), "-1"),
    "-1 of numbers": ([-1], datasets.Value("int64"), "-1"),
    "none of class labels": ([None], datasets.ClassLabel(names=CLASSES), "None"),
    "none of names": ([None], datasets.Value("string"), "None"),
    "none of nothing": ([None], datasets.Value("null"), "None"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_test_split_whose_labels_are_hidden_is_not_measured(name, caplog):
    """As ImageNet-1k's on the Hub."""
    values, feature, said = HIDDEN[name]
    train = with_labels(12, CLASSES, datasets.Value("string")) if "names" in name else make_dataset(12, (8, 8))
    train = with_labels(12, [3, 4], feature) if "numbers" in name else train
    raw = datasets.DatasetDict(train=train, test=with_labels(6, values, feature))
    records, _ = load_records(raw, train_val_split=0.25)
    assert set(records) == {"train", "validation"}
    assert caplog.messages == [f"Split 'test' is not measured: its labels are hidden ({said} everywhere)."]


@pytest.mark.parametrize("values", [[-1, 0], [0, -1, 1], [None, 2]])
def test_labels_that_are_hidden_in_part_are_an_error(values):
    raw = datasets.DatasetDict(train=make_dataset(12), test=with_labels(6, values, datasets.ClassLabel(names=CLASSES)))
    with pytest.raises(ValueError, match=r"row \d of split 'test'.*(label -1 is none of|has no label)"):
        load_records(raw, train_val_split=0.25)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_hidden_labels_of_other_splits_are_an_error(split):
    parts = {"train": make_dataset(12), "validation": make_dataset(6)}
    parts[split] = with_labels(6, [-1], datasets.ClassLabel(names=CLASSES))
    with pytest.raises(ValueError, match=f"row 0 of split '{split}': label -1 is none of"):
        load_records(datasets.DatasetDict(parts))
