"""Images that are read while they are needed: for a dataset larger than the disk.

`load_streaming` gives what `load_splits` gives, but its train split is a `StreamedImages`, which has no length and
no end. Validation and test are read at the start, since they are measured image by image, and stay encoded in
memory.
"""

import functools
import hashlib
import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import datasets
import torch
from datasets.distributed import split_dataset_by_node

from .augmentation import crop_box
from .columns import all_hidden, find_columns
from .records import Cut, Records, check_limits, check_split, train_of
from .sources import VALIDATION_SPLITS, load_image, load_raw
from .splits import ImageSplits, LazyImages, decode_all, pixel_statistics, to_tensor

logger = logging.getLogger(__name__)

# Training images that are read at the start: for mean and standard deviation, the fingerprint, and the doctor.
HEAD_IMAGES = 512
# Validation images that are held out of train where the dataset has none of its own, where no number is given.
MAX_HELD_OUT = 5_000
# Test labels that tell whether all of them are hidden.
FIRST_LABELS = 16
# Files for each process below which files are split further, so that worker processes share them.
MIN_SHARDS = 8
# Epochs without an image after which a worker gives up. Files change hands with each: of a few that are all held out,
# it has others in the next.
EMPTY_EPOCHS = 10


class StreamedImages(torch.utils.data.IterableDataset):
    """Training images without an end: each pass is one epoch, in which every image comes exactly once.

    Of `world_size` processes, each reads its own part, and of that each of its worker processes its own. The order, by
    files and by a buffer, is a function of (seed, epoch); the random crop of an image one of (seed, epoch, process,
    worker, position). An endless stream keeps processes in step that have parts of different sizes: each begins its
    next epoch when its part is through.

    Args:
        stream: Of encoded images and labels.
        columns: Names of (image, label).
        class_names: By label.
        processor: The image processor that resizes images.
        num_channels: 1 or 3.
        crop_scale: See `LazyImages`.
        seed: Of order and crops.
        rank: Of this process.
        world_size: Number of processes.
        buffer_size: Images, encoded, that each worker draws the next one from.
        held_out: Share of images that are never given, because they are validation's; see `is_held_out`.
        endless: False for a single pass.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        columns: tuple[str, str],
        class_names: list[str],
        processor,
        num_channels: int,
        crop_scale: float | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        buffer_size: int = 1000,
        held_out: float = 0.0,
        endless: bool = True,
    ):
        self.image_column, self.label_column = columns
        self.class_names, self.processor, self.num_channels = class_names, processor, num_channels
        self.crop_scale, self.seed, self.rank, self.held_out, self.endless = crop_scale, seed, rank, held_out, endless
        self.stream, self.world_size, self.buffer_size = stream, world_size, buffer_size
        self._first_epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # as in LazyImages
        self._blank = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._cropped = torch.tensor([torch.iinfo(torch.int64).max, 1]).share_memory_()

    def set_epoch(self, epoch: int):
        """Begin with this epoch the next time that the stream is iterated."""
        self._first_epoch.fill_(epoch)

    def skip_decoding(self, batches: int, batch_size: int):
        """Give blanks for so many batches, which a resumed run throws away: skipping them costs only their reading.

        Args:
            batches: That this process has taken before.
            batch_size: Of each.
        """
        self._blank.copy_(torch.tensor([batches, batch_size]))

    def crop_until(self, batches: int, batch_size: int):
        """Crop no more after so many batches.

        Args:
            batches: Of this process, over the whole run.
            batch_size: Of each.
        """
        self._cropped.copy_(torch.tensor([batches, batch_size]))

    @property
    def num_shards(self) -> int:
        """Files, or parts of files, that this process reads of: more workers would have none."""
        return split_dataset_by_node(self.stream, self.rank, self.world_size).num_shards

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        worker, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # Those without a file end at once, and leave their turns to the others.
        workers = min(workers, self.num_shards)
        if worker >= workers:
            return
        batches, batch_size = self._blank.tolist()
        blanks = max(-(-(batches - worker) // workers), 0) * batch_size  # workers take turns, batch by batch
        batches, batch_size = self._cropped.tolist()
        uncropped_from = max(-(-(batches - worker) // workers), 0) * batch_size  # likewise
        given = empty = 0
        size = self.num_channels, self.processor.size["height"], self.processor.size["width"]
        blank = {"pixel_values": torch.zeros(size, dtype=torch.uint8), "labels": torch.tensor(-100)}
        for epoch in itertools.count(int(self._first_epoch)):
            empty += 1
            for position, example in enumerate(self._examples(epoch)):
                empty = 0
                if given < blanks:
                    yield blank
                else:
                    key = (self.seed, epoch, self.rank, worker, position)
                    yield self._sample(example, key, self.crop_scale if given < uncropped_from else None)
                given += 1
            if not self.endless:
                return
            if empty == EMPTY_EPOCHS:  # it would end early, and the other processes wait for it
                advice = {
                    "train in fewer processes": self.world_size > 1,
                    "give fewer --dataloader_num_workers": workers > 1,
                    "lower --train_val_split": self.held_out > 0,
                }
                raise ValueError(
                    f"process {self.rank} of {self.world_size} finds no image in its part of the stream (worker "
                    f"{worker} of {workers}); {', or '.join(text for text, helps in advice.items() if helps)}."
                )

    def _examples(self, epoch: int) -> Iterator[dict]:
        # A stream of this pass alone: a stream's epoch lies in memory that worker processes share, and they are not at
        # the same epoch all the time.
        stream = self.stream.shuffle(seed=self.seed, buffer_size=self.buffer_size)
        stream = split_dataset_by_node(stream, self.rank, self.world_size)
        stream.set_epoch(epoch)
        for example in stream:
            example = {"image": _with_bytes(example[self.image_column]), "label": example[self.label_column]}
            if not (self.held_out and is_held_out(example["image"]["bytes"], self.held_out)):
                yield example

    def _sample(self, example: dict, key: tuple[int, ...], crop_scale: float | None) -> dict:
        where = f"image {example['image']['path'] or key[-1]} of the stream"
        if not example["image"]["bytes"]:
            raise ValueError(f"{where}: there is no image; remove it.")
        try:
            image = load_image(example["image"]["bytes"], self.num_channels)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; repair or remove it.") from error
        if crop_scale is not None:
            image = image.crop(crop_box(image.size, crop_scale, key))
        label = label_index(example["label"], self.class_names, self.stream.features[self.label_column], where)
        return {"pixel_values": to_tensor(image, self.processor), "labels": torch.tensor(label)}


def _with_bytes(value: dict | None) -> dict:
    """An encoded image whose bytes are here, wherever its file is."""
    value = value or {"bytes": None, "path": None}
    if value["bytes"] is None and value["path"]:
        with datasets.utils.file_utils.xopen(value["path"], "rb") as file:
            return {**value, "bytes": file.read()}
    return value


def is_held_out(encoded: bytes | None, share: float) -> bool:
    """Whether an image belongs to validation; a function of its bytes, so that no process has to ask another."""
    digest = hashlib.blake2b(encoded or b"", digest_size=8, person=b"held out").digest()
    return int.from_bytes(digest, "little") < share * 2**64


def label_index(value, class_names: list[str], feature, where: str) -> int:
    """A label as an index into `class_names`."""
    known = isinstance(feature, datasets.ClassLabel) and isinstance(value, int) and 0 <= value < len(class_names)
    if known:
        return value
    if isinstance(feature, datasets.ClassLabel) or str(value) not in class_names:
        raise ValueError(f"{where}: label {value!r} is none of the {len(class_names)} classes; correct or remove it.")
    return class_names.index(str(value))


@dataclass
class Streams:
    """A dataset whose train is a stream, and whose other splits were read.

    Args:
        train: Encoded images and labels, also those that are held out.
        records: Of train its first images; of validation and test, where their labels are not hidden, all that is used.
        class_names: By label.
        columns: Names of (image, label).
        cut: How the splits were made.
    """

    train: datasets.IterableDataset
    records: dict[str, Records]
    class_names: list[str]
    columns: tuple[str, str]
    cut: Cut


def open_streams(
    name: str,
    image_size: tuple[int, int],
    config_name: str | None = None,
    data_files: dict[str, str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    train_val_split: float = 0.1,
    max_eval_samples: int | None = None,
    seed: int = 42,
    cache_dir: str | None = None,
    token: str | None = None,
) -> Streams:
    """What `load_streaming` gives, not decoded; arguments as there, and (height, width) at which digits are drawn."""
    raw = load_raw(name, config_name, data_files, cache_dir, token, image_size, streaming=True)
    train_of(raw)
    streams = {split: _as_stream(raw[split], split) for split in raw}
    columns = find_columns(streams["train"], image_column, label_column)
    given = next((split for split in VALIDATION_SPLITS if split in streams), None)
    used = ["train", *filter(None, [given]), *(["test"] if "test" in streams else [])]
    streams = {split: _undecoded(streams[split], columns, split) for split in used}
    if "test" in streams:
        first = [example[columns[1]] for example in itertools.islice(streams["test"], FIRST_LABELS)]
        hidden = all_hidden(first)
        if hidden:
            del streams["test"]
            logger.warning(
                "Split 'test' is not measured: its labels are hidden (%s in the first %d).", hidden, len(first)
            )
    if given:
        cut = Cut("given", None, seed, None, max_eval_samples)
    else:
        cut = Cut("by content", float(train_val_split), seed, None, max_eval_samples)
    held = functools.partial(is_held_out, share=cut.train_val_split or 0.0)
    tables = {
        "train": _read(streams["train"], columns, HEAD_IMAGES, seed, lambda encoded: not held(encoded)),
        "validation": _read(streams[given], columns, max_eval_samples, seed)
        if given
        else _read(streams["train"], columns, max_eval_samples or MAX_HELD_OUT, seed, held),
    }
    if "test" in streams:
        tables["test"] = _read(streams["test"], columns, max_eval_samples, seed)
    # Of classes that are no ClassLabel, validation is more likely to have them all than the first of train.
    _, class_names = check_split(tables["validation"], columns, None, given or "train")
    if len(class_names) < 2:
        raise ValueError(f"there is only one class ({class_names[0]!r}); classification needs at least two.")
    names = {"train": "train, the first of the stream", "validation": given or "train, held out", "test": "test"}
    records = {split: check_split(table, columns, class_names, names[split])[0] for split, table in tables.items()}
    return Streams(streams["train"], records, class_names, columns, cut)


def load_streaming(
    name: str,
    processor,
    num_channels: int = 3,
    config_name: str | None = None,
    data_files: dict[str, str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    train_val_split: float = 0.1,
    max_eval_samples: int | None = None,
    crop_scale: float | None = None,
    seed: int = 42,
    cache_dir: str | None = None,
    token: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    buffer_size: int = 1000,
) -> ImageSplits:
    """Like `load_splits`, for a dataset that is read over the network while it is trained on.

    Validation and test are read whole, or `max_eval_samples` of their first images. Where there is no validation split,
    images of train are held out by a digest of their bytes, about `train_val_split` of them, and `max_eval_samples`
    (5,000 if None) of the first of these are validated on. Neither looks at labels: classes give the same share by
    chance only. Mean and standard deviation are those of the first 512 training images.

    Args:
        rank: Of this process.
        world_size: Number of processes.
        buffer_size: See `StreamedImages`.
        name: This, and what is not named here, as in `load_splits`.

    Raises:
        ValueError: Says what is wrong, and the mend.
    """
    check_limits(train_val_split, max_eval_samples=max_eval_samples)
    size = processor.size["height"], processor.size["width"]
    opened = open_streams(
        name, size, config_name, data_files, image_column, label_column,
        train_val_split, max_eval_samples, seed, cache_dir, token,
    )  # fmt: skip
    records, class_names, cut = opened.records, opened.class_names, opened.cut
    head = LazyImages(records["train"], processor, num_channels)
    mean, std = pixel_statistics(torch.stack([head[index]["pixel_values"] for index in range(len(head))]))
    measured = {split: part for split, part in records.items() if split != "train"}
    parts = {
        split: images or LazyImages(measured[split], processor, num_channels)
        for split, images in decode_all(measured, processor, num_channels).items()
    }
    train = opened.train
    if train.num_shards < MIN_SHARDS * world_size:
        train = train.reshard()
    images = StreamedImages(
        train,
        opened.columns, class_names, processor, num_channels, crop_scale, seed, rank, world_size, buffer_size,
        cut.train_val_split or 0.0,
    )  # fmt: skip
    parts = images, parts["validation"], parts.get("test")
    return ImageSplits(name, *parts, class_names, mean, std, records, opened.columns, cut)


def _as_stream(dataset: datasets.Dataset | datasets.IterableDataset, split: str) -> datasets.IterableDataset:
    if isinstance(dataset, datasets.Dataset):  # an image folder is read from where it is anyway
        if len(dataset) == 0:
            raise ValueError(f"split {split!r} is empty; remove it, or add images.")
        return dataset.to_iterable_dataset(num_shards=min(64, len(dataset)))
    return dataset if dataset.features is not None else dataset._resolve_features()


def _undecoded(stream: datasets.IterableDataset, columns: tuple[str, str], split: str) -> datasets.IterableDataset:
    for column in columns:
        if column not in stream.column_names:
            raise ValueError(f"split {split!r} has no column {column!r}; it has {', '.join(stream.column_names)}.")
    kind = stream.features[columns[0]]
    if not isinstance(kind, datasets.Image):
        raise ValueError(f"column {columns[0]!r} does not hold images but {kind}; name another, or cast it to Image.")
    return stream.select_columns(list(columns)).cast_column(columns[0], datasets.Image(decode=False))


def _read(
    stream: datasets.IterableDataset, columns: tuple[str, str], limit: int | None, seed: int, keep=lambda encoded: True
) -> datasets.Dataset:
    """The first images of a stream that are to be kept, still encoded, in memory; all of them without a limit."""
    if limit is not None:  # files are often sorted by class: not the first images, but some of the first
        stream = stream.shuffle(seed=seed, buffer_size=2 * min(limit, 5_000), max_buffer_input_shards=1)
    images, labels = [], []
    for example in stream:
        value = _with_bytes(example[columns[0]])
        if keep(value["bytes"]):
            images.append(value if value["bytes"] else None)
            labels.append(example[columns[1]])
        if len(labels) == limit:
            break
    return datasets.Dataset.from_dict({columns[0]: images, columns[1]: labels}, features=stream.features)
