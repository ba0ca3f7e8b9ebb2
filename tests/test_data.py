"""data.py and sources.py: every source, columns, splits, statistics, and the two paths from files to batches."""

import io
import json
import random
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import runs
import torch
from hub_server import TOKEN, HubServer
from huggingface_hub import HfApi
from PIL import Image
from transformers import ViTImageProcessorPil

from modeling_vit_scratch.data import augmentation as augmentation_module
from modeling_vit_scratch.data import load_splits, sources
from modeling_vit_scratch.data import records as records_module
from modeling_vit_scratch.data import splits as splits_module
from modeling_vit_scratch.data.augmentation import normalize
from modeling_vit_scratch.data.records import load_records
from modeling_vit_scratch.data.splits import DecodedImages, LazyImages, collate, pixel_statistics

CIFAR10_COPY = Path(__file__).parents[2] / "shared" / "cifar10"
SCRIPTS = Path(__file__).parents[1] / "scripts"
CLASSES = ["cat", "dog", "eel"]


def make_processor(size=(32, 32), channels=3, mean=None, std=None) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(
        size={"height": size[0], "width": size[1]},
        image_mean=mean or [0.5, 0.4, 0.3][:channels],
        image_std=std or [0.2, 0.25, 0.3][:channels],
        resample=Image.Resampling.BICUBIC,
    )


def make_image(seed: int, size=(32, 32), mode="RGB") -> Image.Image:
    """Noise; size is (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image: Image.Image, file_format: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def make_dataset(
    n: int, size=(32, 32), image="image", label="label", seed=0, classes=CLASSES, sizes=None, mode="RGB"
) -> datasets.Dataset:
    """n pictures, their classes in turn."""
    pictures = [encode(make_image(seed + i, sizes[i % len(sizes)] if sizes else size, mode)) for i in range(n)]
    columns = {
        image: [{"bytes": picture, "path": None} for picture in pictures],
        label: [i % len(classes) for i in range(n)],
    }
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=list(classes))})
    return datasets.Dataset.from_dict(columns, features=features)


def write_hub_layout(folder: Path, **splits: datasets.Dataset) -> str:
    (folder / "data").mkdir(parents=True)
    for split, dataset in splits.items():
        dataset.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def write_image_folder(folder: Path, per_class: int, seed: int = 0, classes=CLASSES, size=(32, 32)) -> str:
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            make_image(seed + 100 * label + i, size).save(folder / name / f"{i:03}.png")
    return str(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """What `datasets` prepares goes to a temporary folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def all_of(dataset, workers: int = 0) -> dict:
    loader = torch.utils.data.DataLoader(dataset, batch_size=len(dataset), collate_fn=collate, num_workers=workers)
    return next(iter(loader))


# Sources


def test_folder_in_hub_layout(tmp_path):
    folder = write_hub_layout(tmp_path, train=make_dataset(60), test=make_dataset(9, seed=1000))
    splits = load_splits(folder, make_processor())
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (54, 6, 9)
    assert splits.class_names == CLASSES
    assert splits.name == folder
    expected = torch.stack([torch.from_numpy(np.array(make_image(1000 + i))).permute(2, 0, 1) for i in range(9)])
    batch = all_of(splits.test)
    assert torch.equal(batch["pixel_values"], expected)
    assert batch["labels"].tolist() == [i % 3 for i in range(9)]


@pytest.mark.skipif(not CIFAR10_COPY.exists(), reason=f"the JPEG copy of CIFAR-10 is not at {CIFAR10_COPY}")
def test_cifar10():
    splits = load_splits(str(CIFAR10_COPY), make_processor(), max_train_samples=2000, max_eval_samples=300)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (2000, 300, 300)
    assert splits.class_names == [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    # The figures that everybody uses for CIFAR-10, within the error of 2,000 pictures.
    np.testing.assert_allclose(splits.mean, [0.4914, 0.4822, 0.4465], atol=0.01)
    np.testing.assert_allclose(splits.std, [0.2470, 0.2435, 0.2616], atol=0.01)
    assert torch.bincount(splits.train.labels).min() > 150


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10_COPY.exists(), reason=f"the JPEG copy of CIFAR-10 is not at {CIFAR10_COPY}")
def test_cifar10_in_full():
    splits = load_splits(str(CIFAR10_COPY), make_processor())
    assert torch.bincount(splits.train.labels).tolist() == [4500] * 10
    assert torch.bincount(splits.validation.labels).tolist() == [500] * 10
    assert torch.bincount(splits.test.labels).tolist() == [1000] * 10
    pixels = splits.train.images.numpy()
    mean = [pixels[:, c].mean(dtype=np.float64) / 255 for c in range(3)]
    std = [pixels[:, c].std(dtype=np.float64) / 255 for c in range(3)]
    np.testing.assert_allclose(splits.mean, mean, atol=3e-3)  # of 8,192 of the pictures
    np.testing.assert_allclose(splits.std, std, atol=3e-3)


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize(
    "names", [("train", "validation", "test"), ("training", "val", "testing"), ("train", "dev", "test")]
)
def test_image_folder_with_splits(tmp_path, names, upper):
    for i, (name, n) in enumerate(zip(names, (4, 2, 3), strict=True)):
        write_image_folder(tmp_path / (name.title() if upper else name), n, seed=1000 * i)
    splits = load_splits(str(tmp_path), make_processor())
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (12, 6, 9)
    assert splits.class_names == CLASSES
    expected = np.array(make_image(2000 + 100 + 2)).transpose(2, 0, 1)  # test/dog/002.png
    assert np.array_equal(splits.test[5]["pixel_values"], expected)


def test_image_folder_without_splits(tmp_path):
    write_image_folder(tmp_path, 10)
    for litter in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / "cat" / litter).write_text("not a picture")
    (tmp_path / ".git").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    splits = load_splits(str(tmp_path), make_processor(), train_val_split=0.2)
    assert (len(splits.train), len(splits.validation), splits.test) == (24, 6, None)
    assert splits.class_names == CLASSES


def test_image_folder_of_nested_directories(tmp_path):
    """Pictures may lie deeper below their class."""
    write_image_folder(tmp_path, 4)
    (tmp_path / "cat" / "indoors").mkdir()
    (tmp_path / "cat" / "000.png").rename(tmp_path / "cat" / "indoors" / "000.png")
    assert load_records(sources.load_raw(str(tmp_path)), train_val_split=0.25)[1] == CLASSES
    assert len(sources.load_raw(str(tmp_path))["train"]) == 12


def test_a_class_may_be_named_like_a_split(tmp_path):
    write_image_folder(tmp_path, 4, classes=["car", "train", "test"])
    splits = load_splits(str(tmp_path), make_processor(), train_val_split=0.25)
    assert splits.class_names == ["car", "test", "train"]


def test_what_lies_beside_the_splits_is_said(tmp_path, caplog):
    write_image_folder(tmp_path / "train", 4)
    write_image_folder(tmp_path / "backup", 4)
    raw = sources.load_raw(str(tmp_path))
    assert list(raw) == ["train"]
    assert "backup" in caplog.text


def test_folders_by_split(tmp_path):
    files = {
        "train": write_image_folder(tmp_path / "a", 4),
        "validation": write_image_folder(tmp_path / "b", 2),
        "test": write_image_folder(tmp_path / "c", 3),
    }
    splits = load_splits("whatever", make_processor(), data_files=files)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (12, 6, 9)


@pytest.mark.parametrize(("size", "channels"), [((32, 32), 3), ((8, 8), 1), ((16, 24), 3)])
def test_digits(size, channels):
    splits = load_splits("digits", make_processor(size, channels), channels)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1293, 144, 360)
    assert splits.class_names == [str(n) for n in range(10)]
    assert splits.train.images.shape[1:] == (channels, *size)
    assert torch.bincount(splits.test.labels).min() >= 34
    from sklearn.datasets import load_digits

    drawn = set()
    for digit in load_digits().images:
        image = Image.fromarray(np.rint(digit * (255 / 16)).astype(np.uint8))  # as it is in scikit-learn, at 8 px
        drawn.add(np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)).tobytes())
    assert all(image[0].numpy().tobytes() in drawn for image in splits.test.images)


def test_hub_id(hub, tmp_path):
    """The real client, in a process of its own, against a Hub on a loopback port."""
    for split, part in {"train": make_dataset(40), "test": make_dataset(9, seed=1000)}.items():
        part.to_parquet(tmp_path / f"{split}.parquet")
        api = HfApi(endpoint=hub.url, token=TOKEN)
        api.create_repo("me/pictures", repo_type="dataset", exist_ok=True)
        api.upload_file(
            path_or_fileobj=tmp_path / f"{split}.parquet",
            path_in_repo=f"data/{split}-00000-of-00001.parquet",
            repo_id="me/pictures",
            repo_type="dataset",
        )
    code = """
    import json
    from transformers import ViTImageProcessorPil
    from modeling_vit_scratch.data import load_splits
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    splits = load_splits("me/pictures", processor, train_val_split=0.25)
    print(json.dumps([len(splits.train), len(splits.validation), splits.test.images.sum().item(), splits.class_names]))
    try:
        load_splits("me/nothing", processor)
    except ValueError as error:
        print(error)
    """
    *_, result, error = hub.run(textwrap.dedent(code)).stdout.splitlines()
    pixels = sum(int(np.array(make_image(1000 + i)).sum()) for i in range(9))
    assert json.loads(result) == [30, 10, pixels, CLASSES]
    assert "dataset 'me/nothing' could not be loaded" in error
    assert "'digits'" in error


# The dataset of a run that names none


class Listener:
    """A server that accepts and never answers, or only dribbles."""

    def __init__(self, dribble: bool = False):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.dribble, self.connections = dribble, []
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.connections.append(connection)
            if self.dribble:
                threading.Thread(target=self.send, args=(connection,), daemon=True).start()

    def send(self, connection):
        try:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Slow: ")
            while True:
                connection.sendall(b"z")
                time.sleep(0.1)
        except OSError:
            pass

    def close(self):
        for connection in (*self.connections, self.socket):
            connection.close()


def run_default(url: str, home: Path, code: str) -> list[str]:
    env = HubServer(home).env(token=None) | {"HF_ENDPOINT": url}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=120, cwd=home
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# Says for how long the Hub's answer is waited for, and whether there was none by then; waits a second at most.
WATCHED = """
import threading, types, datasets, huggingface_hub
from modeling_vit_scratch.data import sources

class Thread(threading.Thread):
    def join(self, timeout=None):
        super().join(min(timeout, {at_most}))
        print(timeout, self.is_alive())

sources.threading = types.SimpleNamespace(Event=threading.Event, Thread=Thread)
"""
ASKED = """
print(sources.default_dataset({seconds}))
print(huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
"""


def ask_default(url: str, home: Path, then: str = ASKED.format(seconds=10), at_most: float = 1) -> list[str]:
    return run_default(url, home, WATCHED.format(at_most=at_most) + textwrap.dedent(then))


@pytest.mark.parametrize("dribble", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_default_without_an_answer(tmp_path, dribble):
    """The wait ends at its deadline, with a tenth of the time left for the cache, and nothing more is asked."""
    listener = Listener(dribble)
    try:
        waited, name, offline = ask_default(listener.url, tmp_path)
    finally:
        listener.close()
    assert len(listener.connections) == 1
    assert (waited, name, offline) == ("9.0 True", "digits", "True True")


@pytest.mark.slow
def test_default_without_a_network(tmp_path):
    """Nobody listens: the wait ends before its deadline."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    waited, name, _ = ask_default(url, tmp_path, ASKED.format(seconds=100), at_most=90)
    assert (waited, name) == ("90.0 False", "digits")


@pytest.mark.slow
def test_default_from_the_hub_and_then_from_the_cache(hub, tmp_path):
    hub.tokens[TOKEN] = "uoft-cs"
    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo("uoft-cs/cifar10", repo_type="dataset")
    make_dataset(30, image="img").to_parquet(tmp_path / "train.parquet")
    api.upload_file(
        path_or_fileobj=tmp_path / "train.parquet",
        path_in_repo="plain_text/train-00000-of-00001.parquet",
        repo_id="uoft-cs/cifar10",
        repo_type="dataset",
    )
    load = ASKED.format(seconds=100) + "print(len(sources.load_raw('uoft-cs/cifar10')['train']))"
    (tmp_path / "home").mkdir(exist_ok=True)
    *_, waited, name, offline, length = ask_default(hub.url, tmp_path / "home", load, at_most=90)
    assert (waited, name, offline, length) == ("90.0 False", "uoft-cs/cifar10", "False False", "30")
    hub.stop()
    listener = Listener()
    try:
        *_, waited, name, offline, length = ask_default(listener.url, tmp_path / "home", load)
    finally:
        listener.close()
    assert (waited, name, offline, length) == ("90.0 True", "uoft-cs/cifar10", "True True", "30")


@pytest.mark.slow
def test_finetune_falls_back_after_nine_seconds(tmp_path):
    code = f"""
    import sys
    sys.path.insert(0, {str(SCRIPTS)!r})
    import finetune
    model, data, training = finetune.parse([])
    print(data.dataset_name)
    """
    listener = Listener()
    try:
        waited, said, name = ask_default(listener.url, tmp_path, code)
    finally:
        listener.close()
    assert (waited, name) == ("9.0 True", "digits")
    assert "digits" in said


# Columns, classes, splits


@pytest.mark.parametrize(("image", "label"), [("image", "label"), ("img", "labels"), ("photo", "kind"), ("a", "b")])
def test_columns_are_found(image, label):
    raw = datasets.DatasetDict(train=make_dataset(12, image=image, label=label))
    records, names = load_records(raw, train_val_split=0.25)
    assert names == CLASSES
    assert records["train"].image(0, 3).size == (32, 32)


def test_usual_columns_come_before_others_of_their_type():
    """image before mask, fine_label before coarse_label (CIFAR-100)."""
    part = make_dataset(12, image="mask", label="coarse_label", seed=500)
    pictures = make_dataset(12).cast_column("image", datasets.Image(decode=False))["image"]
    part = part.add_column("image", list(pictures), feature=datasets.Image())
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


def with_labels(n: int, values: list, feature) -> datasets.Dataset:
    part = make_dataset(n, (8, 8)).remove_columns("label")
    return part.add_column("label", [values[i % len(values)] for i in range(n)], feature=feature)


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


# Two paths to a batch


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
    pictures = [make_image(i, size, mode) for i in range(7)]
    expected = processor(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


def test_pictures_of_different_sizes_are_lazy(tmp_path):
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
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, collate_fn=collate)
    batches = list(loader)
    assert [len(batch["labels"]) for batch in batches] == [8] * 6 + [2]
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), images)
    assert torch.equal(collate([dataset[3], dataset[1]])["pixel_values"], images[[3, 1]])


# Randomness without a state


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
    assert torch.equal(lazy[5]["pixel_values"], first[5]), "the order in which pictures are asked for does not matter"
    assert torch.equal(all_of(lazy)["pixel_values"], first)
    lazy.set_epoch(1)
    second = all_of(lazy)["pixel_values"]
    changed = (first != second).flatten(1).any(1)
    assert changed.float().mean() > 0.8
    lazy.set_epoch(0)
    assert torch.equal(all_of(lazy)["pixel_values"], first)
    assert not torch.equal(all_of(make_lazy(seed=1))["pixel_values"], first)


def test_crops_differ_between_pictures():
    """The same picture in two rows is cropped in two ways."""
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
        lazy, batch_size=4, collate_fn=collate, num_workers=2, persistent_workers=persistent
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
        max_train_samples=None, max_eval_samples=None, train_val_split=0.2, dataloader_num_workers=0,
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
        lazy, batch_size=24, collate_fn=collate, num_workers=1, multiprocessing_context="spawn"
    )
    assert torch.equal(next(iter(loader))["pixel_values"], all_of(here)["pixel_values"])
