"""Every source: the Hub, folders, digits; and the default dataset."""

import json
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import TOKEN, HubServer
from huggingface_hub import HfApi
from made_data import CLASSES, all_of, make_dataset, make_image, make_processor, write_hub_layout, write_image_folder
from PIL import Image
from runs import CIFAR10_COPY, SCRIPTS

from modeling_vit_scratch.data import load_splits, sources
from modeling_vit_scratch.data.records import load_records


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
    # The figures that everybody uses for CIFAR-10, within the error of 2,000 images.
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
    np.testing.assert_allclose(splits.mean, mean, atol=3e-3)  # of 8,192 of the images
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
        (tmp_path / "cat" / litter).write_text("not an image")
    (tmp_path / ".git").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    splits = load_splits(str(tmp_path), make_processor(), train_val_split=0.2)
    assert (len(splits.train), len(splits.validation), splits.test) == (24, 6, None)
    assert splits.class_names == CLASSES


def test_image_folder_of_nested_directories(tmp_path):
    """Images may lie deeper below their class."""
    write_image_folder(tmp_path, 4)
    (tmp_path / "cat" / "indoors").mkdir()
    (tmp_path / "cat" / "000.png").rename(tmp_path / "cat" / "indoors" / "000.png")
    assert load_records(sources.load_raw(str(tmp_path)), train_val_split=0.25)[1] == CLASSES
    assert len(sources.load_raw(str(tmp_path))["train"]) == 12


def test_other_files_beside_images_are_left_out_and_said(tmp_path, caplog):
    """By their names: one without a suffix may be an image, and is read."""
    write_image_folder(tmp_path, 4)
    for number in range(7):
        (tmp_path / "cat" / f"notes{number}.txt").write_text("of 2019")
    (tmp_path / "cat" / "000.png").rename(tmp_path / "cat" / "000")
    (train,) = sources.load_raw(str(tmp_path)).values()
    assert len(train) == 12 and not any(image["path"].endswith(".txt") for image in train["image"])
    assert "notes0.txt" in caplog.text and "and 2 more" in caplog.text
    sources.load_raw(str(tmp_path))  # as a run does that looks at its data first
    assert caplog.text.count("notes0.txt") == 1
    for path in (tmp_path / "dog").iterdir():
        path.rename(path.with_suffix(".doc"))
    with pytest.raises(ValueError, match="class 'dog' has no images"):
        sources.load_raw(str(tmp_path))


def test_a_folder_of_images_is_not_written_to(tmp_path):
    run = tmp_path / "run"
    for name in ("plots/confusion_matrix.png", "widget/0.jpg", "samples.png", "model.onnx"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    sources.refuse_image_folder(run)
    sources.refuse_image_folder(tmp_path / "new")
    write_image_folder(tmp_path / "photos", 1)
    with pytest.raises(ValueError, match=r"photos is a folder of images \(.*\.png\); choose one to write to"):
        sources.refuse_image_folder(tmp_path / "photos")


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
        api.create_repo("me/images", repo_type="dataset", exist_ok=True)
        api.upload_file(
            path_or_fileobj=tmp_path / f"{split}.parquet",
            path_in_repo=f"data/{split}-00000-of-00001.parquet",
            repo_id="me/images",
            repo_type="dataset",
        )
    code = """
    import json
    from transformers import ViTImageProcessorPil
    from modeling_vit_scratch.data import load_splits
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    splits = load_splits("me/images", processor, train_val_split=0.25)
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

sources.threading = types.SimpleNamespace(Thread=Thread)
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


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path):
    """`datasets` would ask six times; and this process may ask again, for another dataset or to push."""
    code = """
    try:
        sources.load_raw("me/images")
    except ValueError as error:
        print(error)
    print(huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    """
    listener = Listener()
    try:
        waited, said, offline = ask_default(listener.url, tmp_path, code)
    finally:
        listener.close()
    assert (waited, offline, len(listener.connections)) == ("10.0 True", "False False", 1)
    assert said.startswith("dataset 'me/images' could not be loaded: ") and "; the Hub was not reached. Give" in said


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
    load = (
        ASKED.format(seconds=100) + "sources.HUB_SECONDS = 90\nprint(len(sources.load_raw('uoft-cs/cifar10')['train']))"
    )
    (tmp_path / "home").mkdir(exist_ok=True)
    *_, waited, name, offline, again, length = ask_default(hub.url, tmp_path / "home", load, at_most=90)
    assert (waited, name, offline, again, length) == ("90.0 False", "uoft-cs/cifar10", "False False", "90 False", "30")
    hub.stop()
    listener = Listener()
    try:
        *_, waited, name, offline, _, length = ask_default(listener.url, tmp_path / "home", load)
        # Without a look at the default before it: from the cache too, since the Hub does not answer; and what the cache
        # lacks is said as `datasets` says it.
        again = """
        print(len(sources.load_raw('uoft-cs/cifar10')['train']))
        try:
            sources.load_raw('uoft-cs/cifar10', 'other')
        except ValueError as error:
            print(" ".join(str(error).split()))
        """
        *said, error = ask_default(listener.url, tmp_path / "home", again)
    finally:
        listener.close()
    assert (waited, name, offline, length) == ("90.0 True", "uoft-cs/cifar10", "True True", "30")
    assert "30" in said and "config 'other'" in error and "the Hub was not reached" in error


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
