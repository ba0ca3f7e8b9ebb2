"""Statistics, and the two paths from files to batches."""

import io
import random
import threading
import time
from collections import Counter

import datasets
import numpy as np
import pytest
import runs
import torch
from made_data import all_of, make_dataset, make_image, make_processor, write_hub_layout, write_image_folder

from modeling_vit_scratch.data import augmentation as augmentation_module
from modeling_vit_scratch.data import load_splits, sources
from modeling_vit_scratch.data import records as records_module
from modeling_vit_scratch.data import splits as splits_module
from modeling_vit_scratch.data.augmentation import normalize
from modeling_vit_scratch.data.records import load_records
from modeling_vit_scratch.data.splits import DecodedImages, LazyImages, as_batch, pixel_statistics


def test_mean_and_std():
    rng = np.random.default_rng(0)
    images = np.clip(rng.normal([[[[60]], [[120]], [[200]]]], [[[[5]], [[40]], [[80]]]], (500, 3, 9, 7)), 0, 255)
    images = images.astype(np.uint8)
    mean, std = pixel_statistics(torch.from_numpy(images))
    reference = images.astype(np.float64) / 255
    np.testing.assert_allclose(mean, reference.mean((0, 2, 3)), atol=5.1e-5)  # four decimals
    np.testing.assert_allclose(std, reference.std((0, 2, 3)), atol=5.1e-5)
    assert pixel_statistics(torch.full((4, 1, 2, 2), 51, dtype=torch.uint8)) == ([0.2], [1.0])


def test_mean_and_std_are_those_of_train_only(tmp_path, monkeypatch):
    folder = write_hub_layout(tmp_path, train=make_dataset(30), test=make_dataset(300, seed=999))
    splits = load_splits(folder, make_processor())
    assert (splits.mean, splits.std) == pixel_statistics(splits.train.images)
    monkeypatch.setattr(splits_module, "MAX_DECODED_BYTES", 0)
    lazy = load_splits(folder, make_processor())
    assert isinstance(lazy.train, LazyImages)
    assert (lazy.mean, lazy.std) == (splits.mean, splits.std)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (40, 50), (20, 9)])
def test_decoded_and_lazy_and_the_processor_agree(tmp_path, monkeypatch, size, channels):
    mode = "RGB" if channels == 3 else "L"
    folder = write_hub_layout(tmp_path, train=make_dataset(24, size, mode=mode), test=make_dataset(7, size, mode=mode))
    processor = make_processor((32, 24), channels)
    decoded = load_splits(folder, processor, channels)
    monkeypatch.setattr(splits_module, "MAX_DECODED_BYTES", 0)
    lazy = load_splits(folder, processor, channels)
    assert isinstance(decoded.test, DecodedImages)
    assert isinstance(lazy.test, LazyImages)
    for split in ("train", "validation", "test"):
        one, other = all_of(getattr(decoded, split)), all_of(getattr(lazy, split))
        assert one.keys() == other.keys() == {"pixel_values", "labels"}
        assert torch.equal(one["labels"], other["labels"])
        assert one["labels"].dtype == other["labels"].dtype == torch.int64
        assert one["pixel_values"].dtype == other["pixel_values"].dtype == torch.uint8
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        item, lazy_item = getattr(decoded, split)[1], getattr(lazy, split)[1]
        assert torch.equal(item["pixel_values"], lazy_item["pixel_values"])
        assert item["labels"] == lazy_item["labels"]
    pixels = normalize(all_of(lazy.test)["pixel_values"], processor.image_mean, processor.image_std)
    images = [make_image(i, size, mode) for i in range(7)]
    expected = processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


def test_images_of_different_sizes_are_lazy(tmp_path):
    sizes = [(32, 32), (40, 20), (1, 60), (300, 10)]
    folder = write_hub_layout(tmp_path, train=make_dataset(24, sizes=sizes), test=make_dataset(6))
    splits = load_splits(folder, make_processor(), crop_scale=0.5)
    assert isinstance(splits.train, LazyImages)
    assert isinstance(splits.test, DecodedImages)
    assert splits.train.crop_scale == 0.5
    assert splits.validation.crop_scale is None
    expected = make_processor()(make_image(3, (300, 10)), do_rescale=False, do_normalize=False, return_tensors="pt")
    position = next(
        (split, list(splits.records[split].rows).index(3))
        for split in ("train", "validation")
        if 3 in splits.records[split].rows
    )
    lazy = LazyImages(splits.records[position[0]], make_processor(), 3)
    assert torch.equal(lazy[position[1]]["pixel_values"], expected["pixel_values"][0].to(torch.uint8))


def test_decoding_is_parallel_and_shows_progress(tmp_path, monkeypatch):
    bars, threads = [], set()

    class Bar(splits_module.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, file=io.StringIO())
            bars.append((self, kwargs["total"], kwargs["disable"]))

    def slow_load_image(*args):
        threads.add(threading.get_ident())
        time.sleep(1e-4)
        return sources.load_image(*args)

    monkeypatch.setattr(splits_module, "tqdm", Bar)
    monkeypatch.setattr(records_module, "load_image", slow_load_image)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    raw = datasets.DatasetDict(train=make_dataset(1500, (8, 8)))
    records, _ = load_records(raw)
    decoded = splits_module.decode(records["train"], make_processor((8, 8)), 3)
    assert len(threads - {threading.get_ident()}) > 1
    bar, total, disabled = bars[0]
    assert (total, bar.n, disabled) == (1350, 1350, False)
    expected = torch.stack([torch.from_numpy(np.array(make_image(i, (8, 8)))) for i in records["train"].rows.tolist()])
    assert torch.equal(decoded.images, expected.permute(0, 3, 1, 2))
    monkeypatch.setenv("LOCAL_RANK", "1")
    splits_module.decode(records["validation"], make_processor((8, 8)), 3)
    assert bars[1][2], "only one process of a machine shows progress"


def test_decoding_stops_at_the_first_odd_size(monkeypatch):
    """A large dataset of photos is not decoded in full before it turns out to be one."""
    count = []
    monkeypatch.setattr(records_module, "load_image", lambda *args: count.append(1) or sources.load_image(*args))
    raw = datasets.DatasetDict(train=make_dataset(6000, (4, 4), sizes=[(4, 4)] * 299 + [(5, 4)]))
    records, _ = load_records(raw)
    assert splits_module.decode(records["train"], make_processor((4, 4)), 3) is None
    assert len(count) < 3000


def test_gathering_a_batch():
    images = torch.randint(256, (50, 3, 4, 4), dtype=torch.uint8)
    dataset = DecodedImages(images, torch.arange(50))
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, collate_fn=as_batch)
    batches = list(loader)
    assert [len(batch["labels"]) for batch in batches] == [8] * 6 + [2]
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), images)
    assert torch.equal(as_batch([dataset[3], dataset[1]])["pixel_values"], images[[3, 1]])


def global_states():
    return torch.get_rng_state().numpy().tobytes(), str(np.random.get_state()), random.getstate()


def test_global_randomness_is_neither_read_nor_moved(tmp_path, monkeypatch):
    folder = write_hub_layout(tmp_path, train=make_dataset(24, sizes=[(32, 32), (40, 20)]), test=make_dataset(5))

    def everything(seed):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = global_states()
        splits = load_splits(folder, make_processor(), crop_scale=0.3, max_train_samples=15, seed=3)
        items = [splits.train[i]["pixel_values"] for i in range(15)]
        assert global_states() == before
        return torch.stack(items), splits.mean, splits.records["validation"].rows.tolist()

    first, second = everything(1), everything(2)
    assert torch.equal(first[0], second[0])
    assert first[1:] == second[1:]


def make_lazy(seed=0, crop_scale=0.3) -> LazyImages:
    records, _ = load_records(datasets.DatasetDict(train=make_dataset(24, sizes=[(32, 32), (40, 20)])))
    return LazyImages(records["train"], make_processor(), 3, crop_scale, seed)


def test_crops_are_a_function_of_seed_epoch_and_index():
    lazy = make_lazy()
    first = all_of(lazy)["pixel_values"]
    assert torch.equal(lazy[5]["pixel_values"], first[5]), "the order in which images are asked for does not matter"
    assert torch.equal(all_of(lazy)["pixel_values"], first)
    lazy.set_epoch(1)
    second = all_of(lazy)["pixel_values"]
    changed = (first != second).flatten(1).any(1)
    assert changed.float().mean() > 0.8
    lazy.set_epoch(0)
    assert torch.equal(all_of(lazy)["pixel_values"], first)
    assert not torch.equal(all_of(make_lazy(seed=1))["pixel_values"], first)


def test_crops_differ_between_images():
    """The same image in two rows is cropped in two ways."""
    part = datasets.concatenate_datasets([make_dataset(1, classes=["a", "b"])] * 2)
    part = part.remove_columns("label").add_column("label", [0, 1], feature=datasets.ClassLabel(names=["a", "b"]))
    records, _ = load_records(datasets.DatasetDict(train=part, validation=part))
    lazy = LazyImages(records["train"], make_processor(), 3, 0.3, 0)
    assert not torch.equal(lazy[0]["pixel_values"], lazy[1]["pixel_values"])


@pytest.mark.parametrize("persistent", [False, True])
def test_crops_in_worker_processes(persistent):
    """Workers crop as the main process does, in the next epoch too, also where they outlive the epoch."""
    lazy, here = make_lazy(), make_lazy()
    loader = torch.utils.data.DataLoader(
        lazy, batch_size=4, collate_fn=as_batch, num_workers=2, persistent_workers=persistent
    )
    for epoch in range(2):
        lazy.set_epoch(epoch)
        here.set_epoch(epoch)
        pixels = torch.cat([batch["pixel_values"] for batch in loader])
        assert torch.equal(pixels, all_of(here)["pixel_values"])


@pytest.mark.parametrize(
    ("processes", "changes", "steps"),
    [
        (1, {}, (8, 10)),  # of 5 steps an epoch: its middle, and its end
        (1, {"gradient_accumulation_steps": 2, "dataloader_persistent_workers": True}, (4,)),  # of 3
        pytest.param(2, {}, (4,), marks=pytest.mark.slow),  # of 3
    ],
    ids=["one process", "accumulation and lasting workers", "two processes"],
)
def test_photos_are_cropped_anew_in_each_epoch(tmp_path, monkeypatch, processes, changes, steps):
    """Also after resuming in mid-epoch or at its end, which gives the weights of the run that was never stopped."""
    write_image_folder(tmp_path / "photos", 8, size=(40, 30))
    make_image(0, (25, 31)).save(tmp_path / "photos" / "cat" / "odd.png")
    log, crop = tmp_path / "epochs", augmentation_module.crop_box

    def noted(size, scale, key):
        with open(log, "a") as file:
            file.write(f"{key[1]}\n")
        return crop(size, scale, key)

    monkeypatch.setattr(splits_module, "crop_box", noted)
    argv = runs.options(
        tmp_path / "run", dataset_name=tmp_path / "photos", num_train_epochs=3, per_device_train_batch_size=4,
        max_train_samples=None, max_eval_samples=None, train_val_split=0.2, dataloader_num_workers=1,
        save_strategy="steps", save_steps=2, eval_strategy="no", load_best_model_at_end=False, save_total_limit=20,
        **changes,
    )  # fmt: skip

    def train(*more):
        log.unlink(missing_ok=True)
        assert runs.wait_all(runs.fork_run([*argv, *more], processes, tmp_path / "log")) == [0] * processes
        return runs.weights(tmp_path / "run"), Counter(log.read_text().split())

    whole, epochs = train()
    assert set(epochs) == {"0", "1", "2"}
    assert len(set(epochs.values())) == 1
    for step in steps:
        resumed, epochs = train("--resume_from_checkpoint", str(tmp_path / "run" / f"checkpoint-{step}"))
        assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
        assert "0" not in epochs


def test_decoded_images_are_gathered_where_they_live():
    dataset = splits_module.DecodedImages(torch.zeros(5, 3, 4, 4, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64))
    batch = dataset.to(torch.device("meta")).__getitems__([3, 1])
    assert {tensor.device.type for tensor in batch.values()} == {"meta"}
    assert batch["pixel_values"].shape == (2, 3, 4, 4) and batch["labels"].shape == (2,)


@pytest.mark.slow
def test_lazy_images_survive_a_spawned_worker():
    """Where processes are spawned (macOS, Windows), the dataset is pickled."""
    lazy, here = make_lazy(), make_lazy()
    for dataset in (lazy, here):
        dataset.set_epoch(3)
    loader = torch.utils.data.DataLoader(
        lazy, batch_size=24, collate_fn=as_batch, num_workers=1, multiprocessing_context="spawn"
    )
    assert torch.equal(next(iter(loader))["pixel_values"], all_of(here)["pixel_values"])
