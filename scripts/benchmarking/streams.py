"""Photos of a folder, of parquet files and of WebDataset's shards: what streaming costs where there is a disk."""

import argparse
import io
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch

from modeling_vit_scratch.data import load_splits, load_streaming
from modeling_vit_scratch.data.splits import as_batch
from modeling_vit_scratch.evaluation.tables import text_table
from modeling_vit_scratch.training.models import make_processor

from .cases import SHOWCASE
from .measuring import compare, faster, interleave, number, one_thread, ratio, stopwatch
from .photos import jpeg, photo

FOLDER = "files of a folder"
# Photos, of two shapes, in so many files where a file holds many.
PHOTOS, FILES, BATCH = 512, 8, 64
SHAPES = (240, 160), (160, 240)
CLASSES = ["a", "b"]


def write(root: Path) -> dict[str, str]:
    """The same photos, of two classes, in three ways: what it is -> the folder."""
    encoded = [jpeg(photo(*SHAPES[index % 2], seed=index)) for index in range(PHOTOS)]
    places = {kind: root / kind for kind in ("files", "parquet", "tar")}
    parts = {f"train-{part:05}-of-{FILES:05}": range(part, PHOTOS, FILES) for part in range(FILES)}
    for name, members in {**parts, "validation-00000-of-00001": range(4)}.items():
        for kind, write_part in (("files", _write_files), ("parquet", _write_parquet), ("tar", _write_shard)):
            places[kind].mkdir(exist_ok=True)
            write_part(places[kind], name, {index: encoded[index] for index in members})
    return {kind: str(folder) for kind, folder in places.items()}


def _write_files(folder: Path, name: str, images: dict[int, bytes]):
    for index, content in images.items():
        directory = folder / name.partition("-")[0] / CLASSES[index % 2]
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{index:06}.jpg").write_bytes(content)


def _write_parquet(folder: Path, name: str, images: dict[int, bytes]):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    encoded = [{"bytes": content, "path": None} for content in images.values()]
    columns = {"image": encoded, "label": [index % 2 for index in images]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{name}.parquet")


def _write_shard(folder: Path, name: str, images: dict[int, bytes]):
    write_shard(folder / f"{name}.tar", {i: {"jpg": image, "cls": str(i % 2).encode()} for i, image in images.items()})


def write_shard(path: Path, examples: dict[int, dict[str, bytes]]):
    """A .tar file in WebDataset's layout: the parts of an example have one name, and each its own suffix."""
    with tarfile.open(path, "w") as shard:
        for number, parts in examples.items():
            for suffix, content in parts.items():
                member = tarfile.TarInfo(f"{number:06}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


@contextmanager
def no_waiting():
    """Within it `datasets` does not wait for five seconds after a pass over parquet files, nor shows its progress.

    It waits because of a fault of Arrow's (apache/arrow, issue 45214); beside a pass over many images that is nothing.
    """
    before, datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN, 0
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = before
        if shown:
            datasets.enable_progress_bars()


def passes(train: torch.utils.data.Dataset, shuffle: bool) -> Callable[[], int]:
    """A pass over all images of a split, in batches, as a run reads them; it gives their number."""
    loader = torch.utils.data.DataLoader(train, batch_size=BATCH, shuffle=shuffle or None, collate_fn=as_batch)
    return lambda: sum(len(batch["labels"]) for batch in loader)


def measure(args: argparse.Namespace) -> list[dict]:
    """Rows of images per second, read, decoded, cropped and resized in one process, from each kind of file."""
    processor = make_processor(SHOWCASE.config)
    with tempfile.TemporaryDirectory() as root, one_thread(), no_waiting():
        folders, settings = write(Path(root)), {"crop_scale": 0.35, "cache_dir": str(Path(root) / "cache")}
        readers = {FOLDER: passes(load_splits(folders["files"], processor, **settings).train, shuffle=True)}
        for kind in ("parquet", "tar"):
            train = load_streaming(folders[kind], processor, **settings).train
            train.endless = False
            readers[f"streamed from .{kind} files"] = passes(train, shuffle=False)
        assert {read() for read in readers.values()} == {PHOTOS}
        watches = {name: stopwatch(read, torch.device("cpu"), args.least) for name, read in readers.items()}
        samples = interleave(watches, args.rounds, "streams")
    rows = compare(samples)
    for name, row in rows.items():
        row |= {"name": name, "images_per_second": PHOTOS / row["seconds"]}
        row["of_the_folder"] = faster(samples, name, FOLDER)
    return list(rows.values())


def show(rows: list[dict]) -> str:
    cells = [
        [row["name"], number(row["images_per_second"]), f"{row['spread']:.0%}", ratio(row["of_the_folder"])]
        for row in rows
    ]
    title = f"{PHOTOS} photos of {SHAPES[0][0]} x {SHAPES[0][1]}, read, cropped and resized, one process"
    return f"{title}\n" + text_table([["", "images/s", "spread", "of the folder's"], *cells])
