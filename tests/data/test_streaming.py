"""streaming.py: every image exactly once per epoch over processes and workers, in an order that is a function."""

import collections
import io
import itertools
import random
import warnings
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from benchmarking.streams import write_shard
from PIL import Image
from runs import CIFAR10_COPY
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTImageProcessorPil

from modeling_vit_scratch.data import Augmentation, inspect_splits, load_splits, load_streaming, streaming
from modeling_vit_scratch.data import sources as sources_module
from modeling_vit_scratch.data import splits as splits_module
from modeling_vit_scratch.data.doctor import fingerprint, sample_images
from modeling_vit_scratch.data.splits import DecodedImages, LazyImages, as_batch
from modeling_vit_scratch.data.streaming import StreamedImages, is_held_out

PROCESSOR = ViTImageProcessorPil(size={"height": 4, "width": 4}, resample=Image.Resampling.BICUBIC)
CLASSES = ["cat", "dog", "eel"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """What `datasets` prepares goes to a temporary folder; it warns of idle workers, which are meant here."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # after each pass of each reader
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded.*fork.*")
        yield


def numbered(number: int, size=(4, 4)) -> bytes:
    """An image that says its number."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (number // 256, number % 256, 0)).save(buffer, "png")
    return buffer.getvalue()


def number_of(image: torch.Tensor) -> int:
    return int(image[0, 0, 0]) * 256 + int(image[1, 0, 0])


def table(numbers, feature=None, size=(4, 4), labels=None) -> datasets.Dataset:
    feature = feature or datasets.ClassLabel(names=CLASSES)
    features = datasets.Features({"img": datasets.Image(), "label": feature})
    images = [{"bytes": numbered(number, size), "path": None} for number in numbers]
    labels = [number % 3 for number in numbers] if labels is None else labels
    return datasets.Dataset.from_dict({"img": images, "label": labels}, features=features)


def write(folder: Path, n: int, files: int, validation: int = 12, test: int = 9) -> str:
    """Train images 0 ... n - 1 in so many parquet files; validation from 10,000 on, test from 20,000 on."""
    (folder / "data").mkdir(parents=True)
    for i, part in enumerate(np.array_split(np.arange(n), files)):
        table(part.tolist()).to_parquet(folder / "data" / f"train-{i:05}-of-{files:05}.parquet")
    for split, start, count in (("validation", 10_000, validation), ("test", 20_000, test)):
        if count:
            table(range(start, start + count)).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def write_shards(folder: Path, n: int, files: int) -> str:
    """The same in WebDataset's layout: .tar files, in which an image and its class have the same name."""
    folder.mkdir(parents=True)
    parts = {f"train-{i:05}": part for i, part in enumerate(np.array_split(np.arange(n), files))}
    for name, numbers in {**parts, "validation-00000": np.arange(10_000, 10_012)}.items():
        examples = {number: {"png": numbered(number), "cls": str(number % 3).encode()} for number in numbers.tolist()}
        write_shard(folder / f"{name}.tar", examples)
    return str(folder)


def one_pass(folder: str, rank=0, world_size=1, workers=0, epoch=0, batch_size=4, **options) -> list[int]:
    """The numbers of one epoch of one process, as a DataLoader gives them."""
    images = load_streaming(folder, PROCESSOR, rank=rank, world_size=world_size, **options).train
    images.endless = False
    images.set_epoch(epoch)
    loader = torch.utils.data.DataLoader(images, batch_size=batch_size, num_workers=workers, collate_fn=as_batch)
    numbers = []
    for batch in loader:
        assert batch["pixel_values"].dtype == torch.uint8
        assert [int(label) for label in batch["labels"]] == [number_of(i) % 3 for i in batch["pixel_values"]]
        numbers += [number_of(image) for image in batch["pixel_values"]]
    return numbers


# Once per epoch


@pytest.mark.parametrize(
    ("files", "world_size", "workers"),
    [(4, 2, 2), (3, 2, 2), (1, 2, 2), (8, 2, 2), (5, 1, 2), (5, 2, 0), (2, 3, 0), (1, 1, 0)],
)
def test_every_image_exactly_once(tmp_path, files, world_size, workers):
    """More files than readers, fewer, a number that does not divide: 101 images, 101 numbers."""
    folder = write(tmp_path, 101, files)
    for epoch in (0, 3):
        parts = [one_pass(folder, rank, world_size, workers, epoch) for rank in range(world_size)]
        assert sorted(itertools.chain(*parts)) == list(range(101))
        assert all(parts), "no process is idle"


def test_an_endless_stream_is_pass_after_pass(tmp_path):
    folder = write(tmp_path, 30, 3)
    images = load_streaming(folder, PROCESSOR, buffer_size=5).train
    stream = iter(images)
    passes = [[number_of(next(stream)["pixel_values"]) for _ in range(30)] for _ in range(3)]
    assert all(sorted(numbers) == list(range(30)) for numbers in passes)
    assert len({tuple(numbers) for numbers in passes}) == 3, "each in an order of its own"
    assert passes[2] == one_pass(folder, epoch=2, buffer_size=5)


def test_readers_share_no_epoch(tmp_path, monkeypatch):
    """`datasets` keeps a stream's epoch in memory that processes share, and counts it up there, not atomically."""
    folder, known = write(tmp_path, 12, 2), []
    set_epoch = datasets.IterableDataset.set_epoch
    monkeypatch.setattr(
        datasets.IterableDataset, "set_epoch", lambda stream, epoch: known.append(stream) or set_epoch(stream, epoch)
    )
    images = load_streaming(folder, PROCESSOR).train
    for _ in zip(images, range(40), strict=False):
        pass
    assert len(known) == len(set(map(id, known))) == 4
    assert not any(stream is images.stream for stream in known)


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_stay_in_step(tmp_path, workers):
    """With parts of different sizes, each has as many batches as are asked for: nobody waits for nobody."""
    folder = write(tmp_path, 31, 3)
    for rank in range(2):
        images = load_streaming(folder, PROCESSOR, rank=rank, world_size=2).train
        loader = torch.utils.data.DataLoader(images, batch_size=4, num_workers=workers, collate_fn=as_batch)
        sizes = [len(batch["labels"]) for batch, _ in zip(loader, range(20), strict=False)]
        assert sizes == [4] * 20


def test_a_worker_without_a_file_stops(tmp_path):
    """It must not spin: the other one goes on alone."""
    images = load_streaming(write(tmp_path, 12, 1), PROCESSOR).train
    assert images.stream.num_shards == 1
    loader = torch.utils.data.DataLoader(images, batch_size=4, num_workers=2, collate_fn=as_batch, timeout=60)
    counts = collections.Counter()
    for batch, _ in zip(loader, range(9), strict=False):
        counts.update(map(number_of, batch["pixel_values"]))
    assert set(counts.values()) == {3}


def test_shards_of_webdataset_are_read_as_they_are(tmp_path):
    """Without a name for their label column; over processes and workers each image once."""
    folder = write_shards(tmp_path / "data", 50, 5)
    parts = [one_pass(folder, rank, 2, 2) for rank in range(2)]
    assert sorted(itertools.chain(*parts)) == list(range(50)) and all(parts)
    assert load_streaming(folder, PROCESSOR).class_names == ["0", "1", "2"]


def test_a_process_without_an_image_is_an_error(tmp_path):
    """Three processes and two images: it would leave the others waiting for it."""
    streams = [load_streaming(write(tmp_path / str(n), 2, 1), PROCESSOR, rank=n, world_size=3).train for n in range(3)]
    assert sorted(number_of(next(iter(stream))["pixel_values"]) for stream in streams[:2]) == [0, 1]
    words = r"process 2 of 3 finds no image in its part of the stream \(worker 0 of 1\); train in fewer processes.$"
    with pytest.raises(ValueError, match=words):
        next(iter(streams[2]))


def test_a_worker_whose_files_are_all_held_out_goes_on(tmp_path, monkeypatch):
    """With other files in the next epoch, and still each image once per epoch; one that never has any says so."""
    images = load_streaming(write(tmp_path, 12, 4), PROCESSOR).train
    number = {numbered(n): n for n in range(12)}
    first_held_out = 9  # those of the last file
    monkeypatch.setattr(streaming, "is_held_out", lambda encoded, share: number[encoded] >= first_held_out)
    monkeypatch.setattr(images, "_sample", lambda example, key, *_: (key[1], number[example["image"]["bytes"]]))
    images.held_out, seen = 0.25, collections.Counter()
    for worker in range(4):
        info = SimpleNamespace(id=worker, num_workers=4, seed=0)
        monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda info=info: info)
        seen.update(itertools.takewhile(lambda sample: sample[0] < 6, images))
    assert seen == collections.Counter(itertools.product(range(6), range(9)))
    first_held_out = 0
    with pytest.raises(ValueError, match=r"; give fewer --dataloader_num_workers, or lower --train_val_split.$"):
        next(iter(images))


@pytest.mark.skipif(not CIFAR10_COPY.exists(), reason=f"the JPEG copy of CIFAR-10 is not at {CIFAR10_COPY}")
def test_a_large_file_is_shared(monkeypatch):
    """CIFAR-10's train is one file of several row groups: each process and worker reads some of them."""
    splits = load_streaming(str(CIFAR10_COPY), ViTImageProcessorPil(size={"height": 32, "width": 32}),
                            max_eval_samples=20, world_size=2)  # fmt: skip
    assert splits.train.stream.num_shards > 1
    assert splits.class_names[0] == "airplane"
    assert len(splits.validation) == len(splits.test) == 20


# Order and crops


def test_the_order_is_a_function_of_seed_and_epoch(tmp_path):
    folder = write(tmp_path, 60, 3)
    first = one_pass(folder, seed=1, epoch=2)
    assert one_pass(folder, seed=1, epoch=2) == first
    assert one_pass(folder, seed=1, epoch=3) != first
    assert one_pass(folder, seed=2, epoch=2) != first
    assert first != sorted(first)


def test_files_are_mixed(tmp_path):
    """Files are often sorted by class: the first images come from all of them, and neighbours are torn apart."""
    numbers = one_pass(write(tmp_path, 120, 3), buffer_size=60)
    assert {number // 40 for number in numbers[:20]} == {0, 1, 2}
    assert np.mean([b - a == 1 for a, b in itertools.pairwise(numbers)]) < 0.1


def sample_stream(folder: str, **options) -> list[torch.Tensor]:
    options = {"crop_scale": 0.3, "buffer_size": 4, **options}
    images = load_streaming(folder, PROCESSOR, **options).train
    images.endless = False
    return [sample["pixel_values"] for sample in images]


def write_photos(folder: Path, n: int = 16) -> str:
    (folder / "data").mkdir(parents=True)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    images = []
    for i in range(n):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i % 3, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "png")
        images.append({"bytes": buffer.getvalue(), "path": None})
    part = datasets.Dataset.from_dict({"img": images, "label": [i % 3 for i in range(n)]}, features=features)
    part.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    part.select(range(6)).to_parquet(folder / "data" / "validation-00000-of-00001.parquet")
    return str(folder)


def test_crops_are_stateless(tmp_path):
    folder = write_photos(tmp_path)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    first = sample_stream(folder)
    torch.manual_seed(2), np.random.seed(2), random.seed(2)
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    assert all(torch.equal(a, b) for a, b in zip(first, sample_stream(folder), strict=True))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (str(np.random.get_state()), random.getstate()) == before[1:]
    whole = sample_stream(folder, crop_scale=None)
    assert np.mean([torch.equal(a, b) for a, b in zip(first, whole, strict=True)]) < 0.2


def test_each_crop_is_drawn_anew(tmp_path, monkeypatch):
    """Over epochs, processes, seeds and positions, no key of randomness comes twice."""
    folder, keys = write_photos(tmp_path), []
    monkeypatch.setattr(streaming, "crop_box", lambda size, scale, key: keys.append(key) or (0, 0, 5, 5))
    for seed in range(2):
        for rank in range(2):
            images = load_streaming(folder, PROCESSOR, rank=rank, world_size=2, crop_scale=0.3, seed=seed).train
            for _ in zip(images, range(24), strict=False):
                pass
    assert len(set(keys)) == len(keys) >= 2 * 2 * 24
    assert {len(key) for key in keys} == {5}


def test_uncropped_images_are_those_of_the_other_paths(tmp_path):
    folder = write_photos(tmp_path)
    streamed = {image.numpy().tobytes() for image in sample_stream(folder, crop_scale=None)}
    splits = load_splits(folder, PROCESSOR)
    assert streamed == {splits.train[i]["pixel_values"].numpy().tobytes() for i in range(len(splits.train))}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batches", [0, 1, 5, 12])
def test_skipping_without_decoding(tmp_path, monkeypatch, workers, batches):
    """Resuming in the middle, also beyond the first epoch: blanks, and then what would have come next."""
    folder = write(tmp_path, 30, 4)

    def take(blanks, count):
        images = load_streaming(folder, PROCESSOR, buffer_size=7).train
        images.skip_decoding(blanks, 3)
        loader = torch.utils.data.DataLoader(images, batch_size=3, num_workers=workers, collate_fn=as_batch)
        return [batch for batch, _ in zip(loader, range(count), strict=False)]

    whole = take(0, batches + 6)
    decoded = []
    monkeypatch.setattr(streaming, "load_image", lambda *a: decoded.append(1) or sources_module.load_image(*a))
    resumed = take(batches, batches + 6)
    for batch in resumed[:batches]:
        assert batch["labels"].tolist() == [-100] * 3
        assert not batch["pixel_values"].any()
    for batch, expected in zip(resumed[batches:], whole[batches:], strict=True):
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        assert torch.equal(batch["labels"], expected["labels"])
    if workers == 0:
        assert len(decoded) <= 7 * 3


# Splits


def test_given_splits_are_read_whole(tmp_path):
    splits = load_streaming(write(tmp_path, 40, 2), PROCESSOR)
    assert isinstance(splits.validation, DecodedImages)
    assert sorted(number_of(image) for image in splits.validation.images) == list(range(10_000, 10_012))
    assert sorted(number_of(image) for image in splits.test.images) == list(range(20_000, 20_009))
    assert splits.class_names == CLASSES
    assert splits.columns == ("img", "label")
    mean, std = splits_module.pixel_statistics(torch.stack([sample_pixels(n) for n in range(40)]))
    np.testing.assert_allclose(splits.mean, mean, atol=1e-4)  # fewer than 512: all of them
    np.testing.assert_allclose(splits.std, std, atol=1e-4)
    limited = load_streaming(str(tmp_path), PROCESSOR, max_eval_samples=5)
    assert len(limited.validation) == len(limited.test) == 5


def sample_pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def sample_pixels(number: int) -> torch.Tensor:
    return torch.tensor([number // 256, number % 256, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4)


def test_validation_is_held_out_of_train(tmp_path):
    """By content: whatever the number of processes, workers and files, train and validation share no image."""
    folder = write(tmp_path, 400, 4, validation=0)
    splits = load_streaming(folder, PROCESSOR, train_val_split=0.2)
    held = {number_of(image) for image in splits.validation.images}
    assert abs(len(held) - 80) < 4 * (400 * 0.2 * 0.8) ** 0.5
    trained = [one_pass(folder, rank, 2, 2, train_val_split=0.2) for rank in range(2)]
    assert sorted(itertools.chain(*trained)) == sorted(set(range(400)) - held)
    head = splits.records["train"]
    assert not held & {number_of(sample_pixels_of(head.image(i, 3))) for i in range(len(head))}, "nor mean and std"
    few = load_streaming(folder, PROCESSOR, train_val_split=0.2, max_eval_samples=10)
    assert {number_of(image) for image in few.validation.images} < held
    assert len(few.validation) == 10


@pytest.mark.parametrize("label", [-1, None])
def test_a_test_split_whose_labels_are_hidden_is_not_read(tmp_path, monkeypatch, caplog, label):
    """A look at the first of them tells: it may be large."""
    folder = write(tmp_path, 60, 2, test=0)
    table(range(20_000, 20_200), labels=[label] * 200).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    read, with_bytes = [], streaming._with_bytes
    monkeypatch.setattr(streaming, "_with_bytes", lambda value: read.append(value) or with_bytes(value))
    splits = load_streaming(folder, PROCESSOR)
    assert splits.test is None and set(splits.records) == {"train", "validation"}
    assert len(read) == 60 + 12, "train and validation"
    assert caplog.messages == [f"Split 'test' is not measured: its labels are hidden ({label} in the first 16)."]


def test_labels_of_a_stream_that_are_hidden_in_part_are_an_error(tmp_path):
    folder = write(tmp_path, 60, 2, test=0)
    labels = [-1] * 3 + [1] * 17
    table(range(20_000, 20_020), labels=labels).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="row 0 of split 'test': label -1 is none of"):
        load_streaming(folder, PROCESSOR)


def test_held_out_by_frequency():
    for share in (0.0, 0.3, 1.0):
        hits = sum(is_held_out(str(i).encode(), share) for i in range(1000))
        assert abs(hits - 1000 * share) <= 4.5 * (1000 * share * (1 - share)) ** 0.5
    assert {i for i in range(1000) if is_held_out(bytes([i % 256]), 0.1)} < {
        i for i in range(1000) if is_held_out(bytes([i % 256]), 0.2)
    }


def test_images_of_different_sizes(tmp_path):
    splits = load_streaming(write_photos(tmp_path), PROCESSOR)
    assert isinstance(splits.validation, LazyImages)
    assert splits.validation[0]["pixel_values"].shape == (3, 4, 4)


def test_plain_labels_are_those_of_validation(tmp_path):
    (tmp_path / "data").mkdir()
    for split, n in (("train", 20), ("validation", 9)):
        part = table(range(n), datasets.Value("string"), labels=[CLASSES[i % 3] for i in range(n)])
        part.to_parquet(tmp_path / "data" / f"{split}.parquet")
    assert load_streaming(str(tmp_path), PROCESSOR).class_names == CLASSES
    assert sorted(one_pass(str(tmp_path))) == list(range(20))


@pytest.mark.parametrize("source", ["folder", "digits"])
def test_other_sources_are_streams_too(tmp_path, source):
    name = "digits"
    if source == "folder":
        name = str(tmp_path)
        for i in range(24):
            (tmp_path / CLASSES[i % 3]).mkdir(exist_ok=True)
            (tmp_path / CLASSES[i % 3] / f"{i}.png").write_bytes(numbered(i))
    splits = load_streaming(name, PROCESSOR, train_val_split=0.25)
    splits.train.endless = False
    count = sum(1 for _ in splits.train)
    if source == "folder":
        assert count + len(splits.validation) == 24
        assert splits.class_names == CLASSES
    else:
        assert count + len(splits.validation) == 1437
        assert len(splits.test) == 360


def test_the_fingerprint_of_a_stream(tmp_path):
    """Over validation, test and the first of train; for every process the same."""
    folder = write(tmp_path, 40, 2)
    first = fingerprint(load_streaming(folder, PROCESSOR))
    assert fingerprint(load_streaming(folder, PROCESSOR, rank=1, world_size=2)) == first
    assert fingerprint(load_streaming(write(tmp_path / "b", 40, 2, test=8), PROCESSOR)) != first


def test_the_doctor_looks_at_the_first_of_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "HEAD_IMAGES", 20)
    splits = load_streaming(write(tmp_path, 60, 2), PROCESSOR)
    report = inspect_splits(splits)
    assert report.inspected == {"train": 20, "validation": 12, "test": 9}
    assert any("only the first 20 images of the stream" in warning for warning in report.warnings)
    pixels, texts = sample_images(splits, Augmentation(splits.mean, splits.std), 8)
    assert texts == [CLASSES[number_of(image) % 3] for image in pixels]


# In a Trainer


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(48, 3)
        self.numbers = []  # of the images that it has seen

    def forward(self, pixel_values, labels=None):
        self.numbers += map(number_of, pixel_values)
        logits = self.linear(pixel_values.flatten(1).float() / 255)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


class StreamTrainer(Trainer):
    """What a trainer needs: accelerate must not split the stream again."""

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            num_workers=self.args.dataloader_num_workers,
            collate_fn=as_batch,
        )


class Seen(TrainerCallback):
    """Images of each step, which the model notes; and an end before the last step, if there is to be one."""

    def __init__(self, stop: int | None):
        self.steps, self.stop = {}, stop

    def on_step_end(self, args, state, control, model, **kwargs):
        self.steps[state.global_step], model.numbers = model.numbers, []
        control.should_training_stop |= state.global_step == self.stop


@pytest.mark.parametrize(("layout", "workers"), [("parquet", 0), ("parquet", 2), ("webdataset", 2)])
def test_a_run_that_is_resumed_twice_sees_each_image_once_per_epoch(tmp_path, monkeypatch, layout, workers):
    """Twelve steps of two batches of four images, in three parts: two epochs of 48 images, in the order of one part."""
    folder = write(tmp_path / "data", 48, 4) if layout == "parquet" else write_shards(tmp_path / "data", 48, 4)

    def train(resume: int, stop: int | None = None):
        images = load_streaming(folder, PROCESSOR, buffer_size=9).train
        args = TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=12, per_device_train_batch_size=4, learning_rate=0.1,
            gradient_accumulation_steps=2, save_steps=1, logging_steps=7, report_to="none", use_cpu=True,
            dataloader_num_workers=workers, disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        seen = Seen(stop)
        trainer = StreamTrainer(Model(), args, train_dataset=images, data_collator=as_batch, callbacks=[seen])
        if resume:
            images.skip_decoding(resume * 2, 4)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{resume}") if resume else None)
        return seen.steps, trainer.model.linear.weight.detach()

    whole, weight = train(0)
    for epoch in (range(1, 7), range(7, 13)):
        assert sorted(itertools.chain(*(whole[step] for step in epoch))) == list(range(48))
    decoded = []
    monkeypatch.setattr(streaming, "load_image", lambda *a: decoded.append(1) or sources_module.load_image(*a))
    parts = {}
    for resume, stop in ((0, 3), (3, 8), (8, None)):
        decoded.clear()
        steps, resumed = train(resume, stop)
        assert list(steps) == list(range(resume + 1, (stop or 12) + 1))
        parts |= steps
    assert parts == whole and torch.equal(resumed, weight)
    if workers == 0:
        assert len(decoded) <= (12 - 8) * 2 * 4 + 8, "what was trained on before is not decoded again"


# Errors


def edited(edit, **splits):
    """`load_streaming` of tables that were changed."""
    parts = {"train": table(range(12)), "validation": table(range(100, 106)), **splits}
    edit(parts)
    raw = datasets.DatasetDict({name: part for name, part in parts.items() if part is not None})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "load_raw", lambda *args, **kwargs: raw)
        splits = load_streaming("tables", PROCESSOR)
    splits.train.endless = False
    return list(splits.train)


def with_picture(content: bytes | None, path: str | None = None):
    images = [{"bytes": numbered(i), "path": None} for i in range(600)]
    images[-1] = None if content is None else {"bytes": content, "path": path}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    return datasets.Dataset.from_dict({"img": images, "label": [i % 3 for i in range(600)]}, features=features)


BAD_STREAMS = {
    "no train": (lambda parts: parts.update(train=None), "there is no 'train' split; the dataset has validation"),
    "no column": (
        lambda parts: parts.update(validation=parts["validation"].rename_column("label", "x")),
        "split 'validation' has no column 'label'; it has img, x",
    ),
    "no images": (
        lambda parts: parts.update(train=table(range(3)).remove_columns("img").add_column("image", ["a", "b", "c"])),
        "column 'image' does not hold images but",
    ),
    "empty validation": (lambda parts: parts.update(validation=table([])), "split 'validation' is empty"),
    "negative label": (
        lambda parts: parts.update(train=table(range(600), labels=[0] * 599 + [-1])),
        "label -1 is none of",
    ),
    "other classes": (
        lambda parts: parts.update(validation=table(range(6), datasets.ClassLabel(names=["a", "b", "c"]))),
        "other classes",
    ),
    "unreadable image": (
        lambda parts: parts.update(train=with_picture(b"nothing", "x/599.png")),
        r"x/599.png.*: unreadable image .* repair or remove",
    ),
    "missing image": (lambda parts: parts.update(train=with_picture(None)), "there is no image; remove"),
}


@pytest.mark.parametrize("name", BAD_STREAMS)
def test_bad_streams_are_refused(name):
    edit, message = BAD_STREAMS[name]
    with pytest.raises(ValueError, match=message):
        edited(edit)


def test_a_worker_passes_its_error_on(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "HEAD_IMAGES", 10)
    (tmp_path / "data").mkdir()
    with_picture(b"nothing", "599.png").to_parquet(tmp_path / "data" / "train.parquet")
    table(range(6)).to_parquet(tmp_path / "data" / "validation.parquet")
    images = load_streaming(str(tmp_path), PROCESSOR, seed=3).train
    loader = torch.utils.data.DataLoader(images, batch_size=100, num_workers=1, collate_fn=as_batch)
    with pytest.raises(ValueError, match=r"599\.png of the stream: unreadable image"):
        for batch, _ in zip(loader, range(10), strict=False):
            assert len(batch["labels"])


def test_the_share_of_validation_is_checked():
    with pytest.raises(ValueError, match=r"train_val_split \(2\)"):
        load_streaming("digits", PROCESSOR, train_val_split=2)


def test_it_is_a_torch_dataset():
    assert issubclass(StreamedImages, torch.utils.data.IterableDataset)
    assert not hasattr(StreamedImages, "__len__")
