"""How validation is cut, and how images are drawn."""

import datasets
import numpy as np
import pytest
from made_data import make_dataset

from modeling_vit_scratch.data import records as records_module
from modeling_vit_scratch.data.records import load_records


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_given_validation_is_used(name):
    raw = datasets.DatasetDict({"train": make_dataset(12), name: make_dataset(6, seed=100), "test": make_dataset(3)})
    records, _ = load_records(raw)
    assert {split: len(part) for split, part in records.items()} == {"train": 12, "validation": 6, "test": 3}


def test_validation_is_cut_stratified_and_seeded():
    labels = np.repeat(np.arange(4), [400, 200, 100, 40])
    np.random.default_rng(0).shuffle(labels)

    def cut(seed, share=0.1):
        return records_module._stratified_cut(labels, share, seed)

    kept, held = cut(1)
    assert np.bincount(labels[held]).tolist() == [40, 20, 10, 4]
    assert np.array_equal(np.sort(np.concatenate([kept, held])), np.arange(740))
    assert all(np.array_equal(a, b) for a, b in zip(cut(1), (kept, held), strict=True))
    assert not np.array_equal(cut(2)[1], held)
    assert np.bincount(labels[cut(1, 0.25)[1]]).tolist() == [100, 50, 25, 10]


def test_samples_are_drawn_by_seed():
    raw = datasets.DatasetDict(train=make_dataset(60), test=make_dataset(30))

    def rows(seed, **limits):
        records, _ = load_records(raw, seed=seed, train_val_split=0.2, **limits)
        return {split: part.rows.tolist() for split, part in records.items()}

    drawn = rows(0, max_train_samples=10, max_eval_samples=5)
    assert {split: len(part) for split, part in drawn.items()} == {"train": 10, "validation": 5, "test": 5}
    assert drawn == rows(0, max_train_samples=10, max_eval_samples=5)
    assert drawn != rows(1, max_train_samples=10, max_eval_samples=5)
    assert set(drawn["train"]) <= set(rows(0)["train"])
    assert rows(0, max_train_samples=1000) == rows(0)


@pytest.mark.parametrize(
    ("counts", "limit", "expected"),
    [
        ([500, 500, 500, 500], 40, [10, 10, 10, 10]),
        ([400, 200, 100, 40], 74, [40, 20, 10, 4]),
        ([300, 100], 7, [5, 2]),
        ([1000, 10, 5], 30, [28, 1, 1]),  # at least one of each
        ([1000, 1, 0, 1], 3, [1, 1, 0, 1]),
        ([50, 3], 100, [50, 3]),
    ],
)
def test_samples_are_drawn_alike_from_each_class(counts, limit, expected):
    labels = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng(0).shuffle(labels)
    drawn = records_module.draw(labels, limit, 0)
    assert np.bincount(labels[drawn], minlength=len(counts)).tolist() == expected
    assert np.array_equal(drawn, np.unique(drawn)) and len(drawn) == min(limit, len(labels))
    assert np.array_equal(records_module.draw(labels, limit, 0), drawn)


def test_whole_images_go_round_by_chance():
    """Of what cannot be shared alike, no class gets more over many draws, and no image either."""
    labels = np.repeat(np.arange(4), 5)
    drawn = np.concatenate([records_module.draw(labels, 2, seed) for seed in range(2000)])
    classes, images = np.bincount(labels[drawn]), np.bincount(drawn, minlength=20)
    assert abs(classes - 1000).max() < 4.5 * 1000**0.5 and abs(images - 200).max() < 4.5 * 200**0.5
    assert all(len(set(labels[records_module.draw(labels, 2, seed)])) == 2 for seed in range(20))


def test_limits_of_a_run_are_shared_alike():
    raw = datasets.DatasetDict(train=make_dataset(600, (4, 4)), test=make_dataset(300, (4, 4)))
    records, _ = load_records(raw, max_train_samples=90, max_eval_samples=30)
    shares = {split: np.bincount(part.labels).tolist() for split, part in records.items()}
    assert shares == {"train": [30] * 3, "validation": [10] * 3, "test": [10] * 3}
    with pytest.raises(
        ValueError, match=r"max_train_samples \(2\) must be at least the number of classes \(3\).*use 3"
    ):
        load_records(raw, max_train_samples=2)
    assert len(load_records(raw, max_eval_samples=2)[0]["validation"]) == 2
