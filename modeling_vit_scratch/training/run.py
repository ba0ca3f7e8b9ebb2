"""A run, settled once from its options: folder, data, model, trainer and number of steps.

Fine-tuning and pre-training share it. Both fill it in the same order, from `Run(...)` to `settle_steps`, and then
`train`; what differs between them (which model, which trainer, what is measured) stands in their own files.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import ViTImageProcessorPil, set_seed

from ..configuration_vit_scratch import ViTScratchConfig
from ..data import Augmentation, ImageSplits, load_splits, load_streaming
from ..data.augmentation import check_padding, parse_sizes, parse_until
from ..data.doctor import fingerprint
from ..data.sources import DIGITS, public_name
from ..data.splits import DecodedImages, LazyImages
from ..data.streaming import StreamedImages
from ..evaluation.acceleration import suit_attention
from ..evaluation.devices import can_compile
from ..modeling_vit_scratch import ViTScratchPreTrainedModel
from . import checkpoints
from .arguments import DataArguments, ImageTrainingArguments, ModelArguments, check_options
from .budget import steps_in_budget
from .callbacks import OwnNoise, ResumeLoss, StopOnSignal, TellEpoch
from .output import check_space, replace_run, settle_output
from .processes import found_by_main, how_to_continue
from .recorded import default_options, run_options
from .schedule import settle_crops, settle_schedule
from .trainer import ImageTrainer

# Smallest share of an image's area that a random crop keeps, where nothing else is given.
CROP_SCALE = 0.35


class Run:
    """What a run is made of; each method settles a part of it and needs those before.

    Args:
        model_args: Which model.
        data_args: Which data, and how they are augmented.
        args: All else. What is settled is written into it: `output_dir`, `max_steps` and others.

    Attributes:
        data_name: Of the dataset, as it was given.
        splits: After `load_data`; `parts` are those that there are, by name.
        model, processor, augmentation, facts: After `settle_model`. `facts` are what a checkpoint must share with the
            run that continues it.
        trainer: After `make_trainer`.
        batches, steps, last_rate: After `settle_steps`: batches of an epoch (None of a stream), optimizer steps, and
            the learning rate of the last one (None where validation sets it).

    Raises:
        ValueError: An option is wrong, or the output folder is taken or cannot be written.
    """

    def __init__(self, model_args: ModelArguments, data_args: DataArguments, args: ImageTrainingArguments):
        self.started = time.monotonic()
        check_options(model_args, data_args, args)
        args.recorded, args.changeable = run_options(model_args, data_args, args)
        self.model_args, self.data_args, self.args = model_args, data_args, args
        self.is_main = args.process_index == 0
        self.data_name = data_args.dataset_name or data_args.train_dir
        args.output_dir, args.resume_from_checkpoint = found_by_main(
            args, lambda: settle_output(args, model_args, self.data_name)
        )
        set_seed(args.seed)
        transformers.utils.logging.disable_progress_bar()  # of reading and writing files; training keeps its own

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.args.output_dir)

    @property
    def parts(self) -> dict[str, torch.utils.data.Dataset]:
        """The datasets of train, validation and, where there is one, test."""
        parts = {"train": self.splits.train, "validation": self.splits.validation, "test": self.splits.test}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def streamed(self) -> bool:
        return isinstance(self.splits.train, StreamedImages)

    @property
    def sizes(self) -> dict[str, int]:
        """Images of each split; a stream has no known number."""
        return {name: len(part) for name, part in self.parts.items() if not isinstance(part, StreamedImages)}

    def load_data(self, processor: ViTImageProcessorPil, num_channels: int, labelled: bool = True):
        """Load the splits, as the options say.

        Args:
            processor: Whose size the images are brought to.
            num_channels: 1 or 3.
            labelled: False for images alone.
        """
        model_args, data_args, args = self.model_args, self.data_args, self.args
        folders = {"train": data_args.train_dir, "validation": data_args.validation_dir, "test": data_args.test_dir}
        settings = {
            "num_channels": num_channels,
            "config_name": data_args.dataset_config_name,
            "data_files": {split: folder for split, folder in folders.items() if folder},
            "image_column": data_args.image_column_name,
            "label_column": data_args.label_column_name,
            "train_val_split": data_args.train_val_split,
            "max_eval_samples": data_args.max_eval_samples,
            "crop_scale": CROP_SCALE if data_args.crop_scale is None else data_args.crop_scale,
            "seed": args.seed,
            "cache_dir": model_args.cache_dir,
            "token": model_args.token,
        }
        with args.main_process_first(desc="loading the data"):
            if data_args.streaming:
                ranks = {"rank": args.process_index, "world_size": args.world_size}
                self.splits = load_streaming(self.data_name, processor, **settings, **ranks)
            else:
                settings |= {"max_train_samples": data_args.max_train_samples, "labelled": labelled}
                settings |= {"crop_all": data_args.crop_scale is not None}
                self.splits = load_splits(self.data_name, processor, **settings)

    def settle_model(self, model: ViTScratchPreTrainedModel, processor: ViTImageProcessorPil, **facts):
        """Take the model, and settle what follows from it and the data; refuse a checkpoint of another run.

        Args:
            model: On the CPU.
            processor: With the data's mean and standard deviation, or those that the model was trained with.
            **facts: That a checkpoint must share beside those of every run.
        """
        args, splits = self.args, self.splits
        self.model, self.processor = model, processor
        self.augmentation = make_augmentation(self.data_args, args, processor, splits)
        if self.data_args.flip_mode == "alternating":
            splits.train.alternate_flips(args.seed)
        check_sizes(self.augmentation.sizes, model.config)
        suit_device(args, model, splits)
        self.facts = {**facts, **self._facts(), **facts}  # given ones come first, and hold
        if args.resume_from_checkpoint:
            checkpoint = Path(args.resume_from_checkpoint)
            if args.torch_compile_is_open:  # a rehearsal settled it, where there is a compiler still
                settled = checkpoints.fact(checkpoint, "changeable", {}).get("torch_compile")
                args.settle_compiling(bool(settled) and can_compile(args.device))
            fields = {name: field.default for name, field in ViTScratchConfig.__dataclass_fields__.items()}
            self.facts["changes"] = checkpoints.check_run(checkpoint, self.facts, {**fields, **default_options()})
            if self.streamed:  # what was trained on before is read, but not decoded
                done = trainer_state(checkpoint)["global_step"] * args.gradient_accumulation_steps
                splits.train.skip_decoding(done, args.per_device_train_batch_size)
        check_space(model, args)

    def _facts(self) -> dict:
        """What a checkpoint must share with the run that continues it; and, below "changeable", what it need not."""
        args, options = self.args, self.args.recorded
        if self.streamed:  # which worker reads what decides the order
            options = options | {"stream_workers": args.dataloader_num_workers}
        return {
            **{name: getattr(self.model.config, name) for name in ViTScratchConfig.__annotations__},
            "dataset": public_name(self.splits.name),
            "classes": self.splits.class_names,
            "images": self.sizes,
            "processes": args.world_size,
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            **options,
            "cut": asdict(self.splits.cut),
            "fingerprint": fingerprint(self.splits),  # last: what else differs says more
            "changeable": args.changeable,
            "changes": [],
        }

    def make_trainer(self, trainer_class: type[ImageTrainer] = ImageTrainer, callbacks=(), **kwargs):
        """The trainer of the run; `kwargs` are those that its class has beside ImageTrainer's."""
        self.stop = StopOnSignal()
        self.trainer = trainer_class(
            self.augmentation,
            self.facts,
            model=self.model,
            args=self.args,
            train_dataset=self.splits.train,
            eval_dataset=self.splits.validation,
            processing_class=self.processor,
            callbacks=[self.stop, TellEpoch(), OwnNoise(), *callbacks],
            **kwargs,
        )
        self.trainer.add_callback(ResumeLoss(self.trainer))

    def settle_steps(self):
        """Steps of the run, within its time budget if it has one.

        Raises:
            ValueError: No batch is full, the time is too short, or a checkpoint is past the end.
        """
        args, resumed = self.args, self.args.resume_from_checkpoint
        self.batches = None if self.streamed else len(self.trainer.get_train_dataloader())
        if self.batches == 0:
            raise ValueError(
                f"no batch is full: {len(self.splits.train)} images for training, per_device_train_batch_size "
                f"{args.per_device_train_batch_size}; lower it, or leave out dataloader_drop_last."
            )
        if args.time_budget_seconds is not None and resumed:
            args.max_steps = trainer_state(resumed)["max_steps"]
        elif args.time_budget_seconds is not None:
            left = args.time_budget_seconds - (time.monotonic() - self.started)
            at_end = sum(len(part) for name, part in self.parts.items() if name != "train")
            args.max_steps = steps_in_budget(self.trainer, left, self.batches, at_end)
        self.steps, self.last_rate = settle_schedule(args, self.batches)
        settle_crops(self.trainer, self.steps, self.batches)
        done = trainer_state(resumed)["global_step"] if resumed else 0
        if self.steps < done:
            raise ValueError(
                f"{resumed} is past the end: it has taken {done:,} steps, and this run has {self.steps:,}; "
                "give max_steps or num_train_epochs of that many or more."
            )

    def train(self) -> bool:
        """Train and save the model; False if a signal stopped it, once the command that continues it was said."""
        if self.args.device.type == "cuda":
            move_small_data(self.parts, self.args)
        replace_run(self.args)
        self.trainer.train(resume_from_checkpoint=self.args.resume_from_checkpoint)
        if not self.stop.stopping:
            self.trainer.save_model()
            return True
        if self.is_main:
            print(f"Stopped at step {self.trainer.state.global_step}. {how_to_continue(self.args)}")
        return False


def make_augmentation(data_args: DataArguments, args: ImageTrainingArguments, processor, splits: ImageSplits):
    """The augmentation of a run, as the options say."""
    size, padding = (processor.size["height"], processor.size["width"]), data_args.crop_padding
    if padding is None:  # other images than decoded ones are cropped when they are read
        padding = min(size) // 8 if isinstance(splits.train, DecodedImages) else 0
    if data_args.crop_mode != "constant" and padding == 0:
        raise ValueError(
            f"crop_mode ({data_args.crop_mode!r}) goes with --crop_padding, which is 0: images are not shifted."
        )
    check_padding(padding, data_args.crop_mode, size)
    flip, alternating = data_args.horizontal_flip, data_args.flip_mode == "alternating"
    if flip is None:
        flip = 0.0 if data_args.dataset_name == DIGITS and not alternating else 0.5  # mirrored digits are other signs
    if data_args.flip_mode not in ("random", "alternating"):
        raise ValueError(f"flip_mode ({data_args.flip_mode!r}) must be 'random' or 'alternating'.")
    if alternating and isinstance(splits.train, StreamedImages):
        raise ValueError("flip_mode ('alternating') must know an image again, which a stream does not; leave it out.")
    if alternating and flip != 0.5:
        raise ValueError(f"flip_mode ('alternating') mirrors half of the views, not {flip:g}: omit horizontal_flip.")
    return Augmentation(
        mean=processor.image_mean,
        std=processor.image_std,
        crop_padding=padding,
        crop_mode=data_args.crop_mode,
        horizontal_flip=flip,
        seed=args.seed,
        rand_augment_ops=data_args.rand_augment,
        rand_augment_magnitude=data_args.rand_augment_magnitude,
        erasing=data_args.random_erasing,
        mixup_alpha=data_args.mixup_alpha,
        cutmix_alpha=data_args.cutmix_alpha,
        mix_probability=data_args.mix_probability,
        num_labels=len(splits.class_names),
        sizes=parse_sizes(data_args.progressive_resizing),
        until=parse_until(data_args.augment_until),
    )


def check_sizes(sizes: Iterable[int], config: ViTScratchConfig):
    """Raise a ValueError if images of one of these sides, in pixels, are no smaller ones for the model."""
    (H, W), (P, Q) = config.image_hw, config.patch_hw
    for side in sizes:
        if H != W or side >= H or side % P or side % Q or side <= 0:
            raise ValueError(
                f"progressive_resizing: {side} pixels must be less than the image's {H}x{W}, which has to be a square, "
                f"and a multiple of the patch's {P}x{Q}."
            )


def suit_device(args: ImageTrainingArguments, model, splits: ImageSplits):
    """Set what the options leave open as the device and the data want it."""
    if args.workers_are_open and not isinstance(splits.train, DecodedImages):
        args.dataloader_num_workers = settle_workers(args, splits.train)
    if args.device.type == "cpu":
        keep_freed_memory()
        args.dataloader_pin_memory = False
        if args.bf16:
            suit_attention(model, args.device, training=True)


def settle_workers(args: ImageTrainingArguments, images: LazyImages | StreamedImages) -> int:
    """Processes that read images for each that trains, where no number is given: one for each other core of its share.

    Of a stream they decide the order: then it is the number of the run that is resumed, and the same for all processes,
    on whatever machine they are; and no more than there are files for.
    """
    workers = max(usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1, 1)
    if not isinstance(images, StreamedImages):
        return workers
    workers = min(workers, images.num_shards)
    if args.resume_from_checkpoint:
        workers = checkpoints.fact(Path(args.resume_from_checkpoint), "stream_workers", workers)
    return found_by_main(args, lambda: workers)


def usable_cores() -> int:
    """Cores that this process may use; a cluster gives a job some of its machine's, where the system can tell."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory(threshold: int = 1 << 30):
    """Let the C library keep the memory that a step frees, for the next step, where it can (glibc).

    On a CPU, pages that went back to the system and are touched anew took 4 to 9 % of a step.

    Args:
        threshold: Bytes; larger blocks go back to the system.
    """
    trim_threshold, mmap_threshold = -1, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(trim_threshold, threshold)
        mallopt(mmap_threshold, threshold)


def move_small_data(parts: dict[str, torch.utils.data.Dataset], args: ImageTrainingArguments):
    """Images that take less than a tenth of the GPU's free memory live there: no batch is copied while training."""
    decoded = [part for part in parts.values() if isinstance(part, DecodedImages)]
    free, _ = torch.cuda.mem_get_info(args.device)
    if args.dataloader_num_workers == 0 and sum(part.images.nbytes for part in decoded) < free / 10:
        args.dataloader_pin_memory = False
        for part in decoded:
            part.to(args.device)


def trainer_state(checkpoint: str | Path) -> dict:
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text())
