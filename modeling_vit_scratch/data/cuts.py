"""Which images a run held out: read back from its folder, cut again, and proved by the fingerprint.

A run writes how it cut its dataset (`Cut`), and the fingerprint of what came out, into `metrics.json` and into
each checkpoint's `run.json`. `load_split` gives a trained model the split that it is asked for: that of its run where
the fingerprint proves it, and never one that passes for validation and was trained on.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from .columns import find_class_names, find_columns, hidden_labels
from .doctor import fingerprint
from .records import Cut, Records, check_split, draw, load_records, load_unlabelled
from .sources import DIGITS, VALIDATION_SPLITS, load_raw, public_name
from .streaming import open_streams

# What finetune.py cuts by if it is not told.
SHARE, SEED = 0.1, 42
HELD_OUT = ("train", "validation")
# What a run, or the run of a checkpoint, was: its file beside the weights.
RUN = "run.json"


@dataclass(frozen=True)
class RunRecord:
    """What a run wrote of its data; None for what it did not write.

    Args:
        dataset: Its name, without a path.
        fingerprint: Of the dataset as the run cut it; see `doctor.fingerprint`.
        cut: How that was.
    """

    dataset: str | None = None
    fingerprint: str | None = None
    cut: Cut | None = None


class Trained(Protocol):
    """A trained model, e.g. an `evaluation.Predictor`; `record` is None if it is not one of this package."""

    name: str
    image_hw: tuple[int, int]
    record: RunRecord | None


@dataclass
class Split:
    """One split of a dataset, to use a trained model on.

    Args:
        name: "train" or "validation" if it was cut from train, else as the dataset calls it.
        records: Its images and labels.
        class_names: By label.
        cut: How it was cut from train; None if it is one of the dataset's own, whole.
        of_the_run: Whether the fingerprint proves that the model's run cut so.
        line: What was done, in words, if there is something to say.
        dataset: The dataset's name, as it was given.
    """

    name: str
    records: Records
    class_names: list[str]
    cut: Cut | None = None
    of_the_run: bool = False
    line: str | None = None
    dataset: str | None = None

    def to_dict(self) -> dict:
        """What a script's JSON says of it: "split", and "cut" with its settings."""
        cut = None if self.cut is None else {**asdict(self.cut), "of_the_run": self.of_the_run}
        return {"split": self.name, "cut": cut}


def read_record(folder: Path) -> RunRecord:
    """What the run that a folder of ours is from wrote of its data: in metrics.json, else in run.json.

    Raises:
        ValueError: One of the two cannot be read.
    """
    found = []
    for file in (folder / "metrics.json", folder / RUN):
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            facts = content.get("dataset") if file.name != RUN else {**content, "name": content.get("dataset")}
            facts = facts or {}
            texts = [facts.get(name) for name in ("name", "fingerprint")]
            if not all(text is None or (isinstance(text, str) and text.isprintable()) for text in texts):
                raise ValueError(f"the dataset's name and fingerprint are {texts}")
            found.append(RunRecord(*texts, None if facts.get("cut") is None else Cut.read(facts["cut"])))
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"{file} is no record of a run: {error}; mend or remove it.") from error
    return next((record for record in found if record.cut), (found or [RunRecord()])[0])


class _Settled:
    """The splits that a cut gives, not decoded.

    Args:
        records: Split -> images and labels.
        class_names: By label.
        run_records: Likewise, as the run saw them, if it saw them without labels.
    """

    def __init__(self, records: dict[str, Records], class_names: list[str], run_records: dict | None = None):
        self.records, self.class_names = records, class_names
        self.run = self if run_records is None else _Settled(run_records, [])

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.run)


class _Dataset:
    """A dataset that one split is wanted of.

    Args:
        name: See `load_raw`, also for `config_name` and `image_size`.
        columns: Names of (image, label); found where None.
        streamed: Whether to tell its splits without preparing it.
    """

    def __init__(self, name: str, config_name: str | None, columns: tuple, image_size: tuple[int, int], streamed: bool):
        self.name, self.config_name, self.wanted, self.image_size = name, config_name, columns, image_size
        self.streamed = streamed
        keys = self._load(streaming=True) if streamed else self.raw
        self.keys = {"validation" if key in VALIDATION_SPLITS else key: key for key in keys}  # by what they are for
        self._settled = {}

    def _load(self, **changes):
        return load_raw(self.name, self.config_name, **{"image_size": self.image_size, **changes})

    @cached_property
    def raw(self):
        return self._load()

    @cached_property
    def hidden(self) -> str | None:
        """What every label of test is where they are hidden (see `hidden_labels`); None where it is not looked up."""
        if "test" not in self.keys or self.streamed:
            return None
        return hidden_labels(self.raw["test"], find_columns(self.raw[self.keys.get("train", "test")], *self.wanted)[1])

    def whole(self, split: str) -> tuple[Records, list[str]]:
        """A split of the dataset's own, with train's classes where there is a train."""
        first = self.keys.get("train", self.keys[split])
        columns = find_columns(self.raw[first], *self.wanted)
        class_names = find_class_names(self.raw[first], columns[1], first)
        return check_split(self.raw[self.keys[split]], columns, class_names, self.keys[split])

    def settle(self, cut: Cut, image_size: tuple[int, int] | None = None) -> _Settled:
        """What a cut gives; of digits, drawn at `image_size`.

        Raises:
            ValueError: This dataset cannot be cut so.
        """
        size = image_size if image_size and self.name == DIGITS else self.image_size
        if (cut, size) not in self._settled:
            self._settled[cut, size] = self._settle(cut, size)
        return self._settled[cut, size]

    def _settle(self, cut: Cut, size: tuple[int, int]) -> _Settled:
        limits = cut.train_val_split, cut.max_train_samples, cut.max_eval_samples, cut.seed
        if cut.method == "given":
            raise ValueError(f"the run had a validation split, but {self.name} has none")
        if cut.method == "by content":
            settings = {"train_val_split": cut.train_val_split, "max_eval_samples": cut.max_eval_samples}
            streams = open_streams(self.name, size, self.config_name, None, *self.wanted, **settings, seed=cut.seed)
            return _Settled(streams.records, streams.class_names)
        raw = self.raw if size == self.image_size else self._load(image_size=size)
        if self.hidden:
            raw = {split: part for split, part in raw.items() if split != "test"}
        columns = find_columns(raw["train"], *self.wanted)
        if cut.method == "stratified":
            return _Settled(*load_records(raw, *columns, *limits))
        seen = load_unlabelled(self._load(image_size=size, labelled=False), columns[0], *limits)
        labelled, class_names = check_split(raw["train"], columns, None, "train")
        if _files(labelled) != _files(seen["train"]):
            raise ValueError("the run read images without labels that here lie in no directory of a class")
        return _Settled({split: labelled.select(part.rows) for split, part in seen.items()}, class_names, seen)


def _files(records: Records) -> list[str] | int:
    """The paths of all images of the dataset behind a split; their number where they are no files."""
    dataset, column = records.dataset, records.image_column
    return len(dataset) if dataset[0][column]["bytes"] else [value["path"] for value in dataset[column]]


def load_split(
    name: str,
    split: str | None = None,
    config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    max_samples: int | None = None,
    image_size: tuple[int, int] = (32, 32),
    models: Sequence[Trained] = (),
    train_val_split: float | None = None,
    seed: int | None = None,
) -> Split:
    """One split of a dataset, to use trained models on; the dataset need not have others.

    A validation split that the dataset has is taken whole. Where there is none, "train" and "validation" are what a run
    made of train: the run of `models` if the fingerprint proves that its cut was found again, or a cut by
    `train_val_split` and `seed`.

    Args:
        name: Hub id, folder, or "digits"; see `load_raw`, also for `config_name` and `image_size`.
        split: None for test; where there is none, or its labels are hidden, for validation; or else for the dataset's
            first one, whole.
        image_column: Name of the image column; found if None.
        label_column: Name of the label column; found if None.
        max_samples: So many images only, drawn with `seed`, the same share of each class; see `draw`.
        models: Those that the split is for.
        train_val_split: Share of train that was held out, where the models' folders do not say; 0.1 if None.
        seed: Likewise, of the cut; 42 if None.

    Raises:
        ValueError: There is no such split, its labels are hidden, or it was trained on for all that is known; or as
            `load_records`.
    """
    streamed = split in HELD_OUT and any(
        model.record is not None
        and model.record.cut is not None
        and model.record.cut.method == "by content"
        and model.record.dataset == public_name(name)
        for model in models
    )
    data = _Dataset(name, config_name, (image_column, label_column), image_size, streamed)
    lines, asked = [], split is not None
    if split in (None, "test") and "test" in data.keys and data.hidden:
        says = f"the labels of split 'test' are hidden ({data.hidden} everywhere)"
        others = set(HELD_OUT) & set(data.keys)
        if asked or not others:
            mend = "take --split validation" if others else "choose data with labels"
            raise ValueError(f"{says}, so nothing can be measured on it; {mend}.")
        split, asked = "validation", True
        lines.append(f"{says}: split 'validation' is taken")
    split = split or next((key for key in ("test", "validation") if key in data.keys), next(iter(data.keys)))
    if asked and split in HELD_OUT and "train" in data.keys and "validation" not in data.keys:
        found = _found_again(data, split, models, train_val_split, seed)
        lines.append(found.line)
    elif split not in data.keys:
        raise ValueError(f"there is no split {split!r}; {name} has {', '.join(data.keys.values())}.")
    else:
        found = Split(data.keys[split], *data.whole(split))
        lines += _said_of_a_whole_split(data, split, asked, models, (train_val_split, seed) != (None, None))
    if max_samples is not None and max_samples < len(found.records):
        found.records = found.records.select(draw(found.records.labels, max_samples, SEED if seed is None else seed))
        lines += [f"{max_samples:,} of them are taken"] if lines else []
    found.line, found.dataset = "; ".join(lines) or None, name
    return found


def _said_of_a_whole_split(
    data: _Dataset, split: str, asked: bool, models: Sequence[Trained], stated: bool
) -> list[str]:
    lines = []
    if asked and split in HELD_OUT:
        lines.append(f"split {split}: the dataset's own, whole")
    elif split == "train" and any(m.record is not None and m.record.dataset == public_name(data.name) for m in models):
        lines.append("split train: all of it, trained on or not; --split validation takes what the run held out")
    if stated:
        lines.append(f"split {split} is not cut: --train_val_split and --seed change nothing")
    return lines


def _found_again(
    data: _Dataset, split: str, models: Sequence[Trained], train_val_split: float | None, seed: int | None
) -> Split:
    """What was held out of train, or the rest; see `load_split`."""
    stated = train_val_split is not None or seed is not None
    cut = Cut("stratified", SHARE if train_val_split is None else train_val_split, SEED if seed is None else seed)
    recorded = [model.record.cut for model in models if model.record is not None and model.record.cut is not None]
    proved, unknown = {}, []  # cut -> the first model with it; names
    for model in models:
        own = None if model.record is None else model.record.cut
        tried = dict.fromkeys([*proved, own] if own else [*proved, *recorded, cut])
        which = next((cut for cut in tried if _proves(data, cut, model)), None)
        if which is not None:
            proved.setdefault(which, model.name)
        elif stated or model.record is None or (own and model.record.dataset != public_name(data.name)):
            unknown.append(model.name)
        else:
            _refuse(data, split, model)
    if len(proved) > 1:
        both = " and ".join(f"{name} {cut}" for cut, name in proved.items())
        raise ValueError(
            f"the runs cut {data.name} each in its own way, {both}: what one held out, the other was trained on; "
            "compare them on --split test."
        )
    if proved:
        [cut] = proved
        for option, value, own in (("train_val_split", train_val_split, cut.train_val_split), ("seed", seed, cut.seed)):
            if value not in (None, own):
                raise ValueError(
                    f"--{option} ({value}) is not the run's ({own}), which its folder tells; leave it out."
                )
    if cut.method == "by content" and split == "train":
        raise ValueError("the run's train was a stream, which has no end to be measured to; take --split validation.")
    settled = data.settle(cut)
    records = settled.records[split]
    if proved:
        what = "held out of train" if split == "validation" else "was trained on"
        line = f"split {split}: the {len(records):,} images that the run {what} ({cut}); the fingerprint is the run's"
    else:
        how = "as the options say" if stated else "by default"
        line = f"split {split}: {len(records):,} images, cut from train {how} ({cut})"
    if unknown:
        line += (
            f"; it is not known whether {' and '.join(unknown)} {'were' if len(unknown) > 1 else 'was'} trained on them"
        )
    return Split(split, records, settled.class_names, cut, bool(proved), line)


def _proves(data: _Dataset, cut: Cut, model: Trained) -> bool:
    """Whether the dataset, cut so, has the fingerprint that the model's run wrote."""
    if model.record is None or model.record.fingerprint is None:
        return False
    try:
        return data.settle(cut, model.image_hw).fingerprint == model.record.fingerprint
    except ValueError:  # this dataset cannot be cut so
        return False


def _refuse(data: _Dataset, split: str, model: Trained):
    """Raise the ValueError of a model of ours for which what its run held out cannot be found."""
    test = "measure on --split test, " if "test" in data.keys and not data.hidden else ""
    record = model.record
    if record.cut is None:
        raise ValueError(
            f"{model.name} does not say how its run cut validation from train (it is of an older version, or its "
            f"metrics.json is gone), so split {split!r} of {data.name} may not be its run's: {test}or say how it "
            f"was cut, by --train_val_split SHARE and --seed N (finetune.py's own are {SHARE:g} and {SEED})."
        )
    try:
        found = f"the fingerprint {data.settle(record.cut, model.image_hw).fingerprint}"
    except ValueError as error:
        found = f"no fingerprint ({str(error).removesuffix('.')})"
    raise ValueError(
        f"{model.name} was trained on a dataset {record.dataset!r} of fingerprint {record.fingerprint}; {data.name}, "
        f"cut as its run cut ({record.cut}), has {found}: these are not the data that it was trained on. Name those "
        "(the same files, configuration and columns; what a run took from several folders in one, as train and test), "
        f"{test}or, if these are others, say how to cut them, by --train_val_split SHARE and --seed N."
    )
