"""The options of a run, beside those of transformers' `TrainingArguments`."""

import logging
import math
import re
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from ..configuration_vit_scratch import PRESETS
from ..conversion.families import FAMILIES
from ..evaluation.devices import can_compile, has_fast_bfloat16
from .processes import refuse_engines, require_joined

logger = logging.getLogger(__name__)

# What a validation measures, and can choose the best model by.
BEST_METRICS = ("loss", "accuracy", "top5_accuracy")
# Options of Trainer's that batches of bytes, metrics of whole splits, and the run's own `Clock` leave no choice of.
FIXED = {
    "remove_unused_columns": False, "label_names": None, "prediction_loss_only": False, "batch_eval_metrics": False,
    "eval_do_concat_batches": True, "restore_callback_states_from_checkpoint": False,
}  # fmt: skip

# The --task of `pretrain`.
MASKED = "masked-image-modeling"


def parse_duration(text: str) -> float:
    """Seconds of a time such as "90", "90s", "10m" or "1h30m".

    Raises:
        ValueError: The text has another form, or is no time at all.
    """
    match = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?", text.strip())
    try:
        seconds = sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True))
    except (AttributeError, ValueError):
        seconds = 0
    if seconds <= 0:
        raise ValueError(f"time_budget ({text!r}) must be a time above zero such as 90s, 10m or 1h30m.")
    return seconds


@dataclass
class ModelArguments:
    """Which model to train."""

    _argument_group_name = "model"

    preset: str | None = field(
        default=None,
        metadata={"help": f"Architecture to train from scratch: {', '.join(PRESETS)}. Default: showcase."},
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Fields of the config to change, e.g. 'num_hidden_layers=4,pooling=mean'."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Trained model to start from instead of a preset: folder, file or Hub id, also of transformers, "
            "timm, torchvision, Google, DINO, DINOv2, DeiT, MAE."
        },
    )
    source: str | None = field(
        default=None,
        metadata={
            "help": "Whose that model is, where its names do not tell, e.g. 'dino' for files of DINO, which look like "
            f"timm's: {', '.join(FAMILIES)}."
        },
    )
    task: Literal["image-classification", "masked-image-modeling"] = field(
        default="image-classification",
        metadata={"help": f"'image-classification', or '{MASKED}': pre-training without labels."},
    )
    freeze_backbone: bool = field(
        default=False, metadata={"help": "Train the head only (linear probe), with attention pooling."}
    )
    lora_rank: int | None = field(
        default=None, metadata={"help": "Train the head, and LoRA matrices of this rank in each block, e.g. 8."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Pixels; a trained model's positions are interpolated to it."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where models and datasets from the Hub are kept."})
    token: str | None = field(
        default=None, metadata={"help": "Hub token; the one `hf auth login` stored if not given."}
    )


@dataclass
class DataArguments:
    """Which images to train on, and how."""

    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, folder in the Hub's layout, folder with one directory per class, or 'digits'. "
            "Default: CIFAR-10 from the Hub or its cache, else 'digits'."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which configuration of a Hub dataset."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with one directory per class to train on."})
    validation_dir: str | None = field(default=None, metadata={"help": "Likewise, to choose the best model by."})
    test_dir: str | None = field(default=None, metadata={"help": "Likewise, to measure the best model on at the end."})
    image_column_name: str | None = field(default=None, metadata={"help": "Column of the images; found if not given."})
    label_column_name: str | None = field(default=None, metadata={"help": "Column of the labels; found if not given."})
    streaming: bool = field(
        default=False, metadata={"help": "Read training images while training, for data larger than the disk."}
    )
    train_val_split: float = field(
        default=0.1,
        metadata={
            "help": "Share of train that becomes validation where the dataset has none: the same of each class, or, "
            "of images that are streamed or have no labels, any."
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this number of images only, the same share of each class."}
    )
    max_eval_samples: int | None = field(
        default=None,
        metadata={"help": "Validate and test on so many images only, likewise; of a stream, on its first ones."},
    )
    crop_padding: int | None = field(
        default=None,
        metadata={
            "help": "Random shifts by up to this number of pixels. Default: an eighth of the image; 0 where images are "
            "cropped at random when they are read."
        },
    )
    crop_mode: str = field(
        default="constant", metadata={"help": "What shifts uncover: 'constant' (black) or 'reflect'."}
    )
    crop_scale: float | None = field(
        default=None,
        metadata={
            "help": "Smallest share of the area that a random crop keeps. Default: 0.35 for images of different sizes "
            "and streams; no such crop for images of one size."
        },
    )
    horizontal_flip: float | None = field(
        default=None, metadata={"help": "Probability of mirroring an image. Default: 0.5; 0 for digits."}
    )
    flip_mode: str = field(
        default="random", metadata={"help": "Mirror at 'random', or each image in every second epoch: 'alternating'."}
    )
    mask_ratio: float = field(
        default=0.6, metadata={"help": f"Share of an image that is hidden, with --task {MASKED}."}
    )
    mask_patch_size: int | None = field(
        default=None, metadata={"help": "Pixels of the squares that are hidden. Default: the model's patches."}
    )
    rand_augment: int = field(
        default=0, metadata={"help": "Random operations of RandAugment that each image goes through; 0 for none."}
    )
    rand_augment_magnitude: float = field(default=5.0, metadata={"help": "Their strength, from 0 to 10."})
    random_erasing: float = field(default=0.0, metadata={"help": "Probability of erasing a rectangle of an image."})
    mixup_alpha: float = field(
        default=0.0, metadata={"help": "Mixes images in pairs, by shares from Beta(alpha, alpha); 0 for none."}
    )
    cutmix_alpha: float = field(
        default=0.0, metadata={"help": "Pastes a part of one image into another, likewise; 0 for none."}
    )
    mix_probability: float = field(default=1.0, metadata={"help": "Probability that an image is mixed, either way."})
    augment_until: str | None = field(
        default=None,
        metadata={
            "help": "Share of the training after which augmentation stops, for all of it (0.9) or by name "
            "(mixup=0.8,rand_augment=0.9). Random crops of images of different sizes stop between two epochs."
        },
    )
    progressive_resizing: str | None = field(
        default=None,
        metadata={
            "help": "Trains on smaller images first, which have fewer patches: sides in pixels, and until which share "
            "of the training, e.g. 16=0.4,24=0.7."
        },
    )


@dataclass
class ImageTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with the defaults of an image classifier that keeps its best epoch."""

    _argument_group_name = "training"

    output_dir: str | None = field(
        default=None, metadata={"help": "Where everything goes. Default: a new folder below runs/."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train into a folder that already holds a run, replacing it."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Check everything, show the summary, and stop."})
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Passes over the training images. Default: 3; max_steps overrides it."}
    )
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images per step and process."})
    per_device_eval_batch_size: int = field(default=250, metadata={"help": "Images per evaluation step and process."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Highest learning rate."})
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the classifier, where it has one of its own."}
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "Factor on the learning rate for each block further from the head, e.g. 0.75."}
    )
    muon_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Train the blocks' weight matrices with Muon at this rate, all else with AdamW. Try 0.02."},
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Validate and keep a moving average of the weights, e.g. 0.999; after n steps "
            "(1 + n) / (10 + n) at most."
        },
    )
    time_budget: str | None = field(
        default=None,
        metadata={
            "help": "Choose the number of steps so that the whole run ends in this time, e.g. 10m or 1h30m; in place "
            "of max_steps and num_train_epochs."
        },
    )
    flip_tta: bool = field(
        default=False, metadata={"help": "Also measure the mean logits of each image and its mirror image."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "bfloat16 mixed precision. Default: where the device has fast units for it; a CPU without them "
            "stays in float32 all the same, and says so."
        },
    )
    torch_compile: bool | None = field(
        default=None,
        metadata={
            "help": "Train by torch.compile. Default: under a time budget of 30 minutes or more, where trying it shows "
            "that more steps fit in; else not."
        },
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes that read images, for each that trains; 0: it reads them itself. Default: 0 for images "
            "decoded before training; else one for each other core that it may use, its share of the machine's, but of "
            "a stream no more than there are files for."
        },
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to validate: 'no', 'steps' or 'epoch'."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: 'no', 'steps', 'epoch' or 'best'."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep, the best one besides."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best model by validation."})
    metric_for_best_model: str | None = field(default="accuracy", metadata={"help": "What 'best' means."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between two entries of the history."})
    report_to: None | str | list[str] = field(  # noqa: RUF036 - the parser understands this order only
        default="none", metadata={"help": "'none', or 'trackio', 'tensorboard', 'wandb', ..."}
    )
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Has no use here: all are used."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Has no use here: a batch has no others."})

    def __post_init__(self):
        refuse_engines(self)
        self.output_dir_is_default = self.output_dir is None
        if self.time_budget is not None and (self.max_steps > 0 or self.num_train_epochs is not None):
            given = f"max_steps ({self.max_steps})" if self.max_steps > 0 else f"{self.num_train_epochs:g} epochs"
            raise ValueError(f"time_budget ({self.time_budget}) chooses the number of steps itself: leave out {given}.")
        if self.num_train_epochs is None:
            self.num_train_epochs = 3.0
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise ValueError(f"num_train_epochs ({self.num_train_epochs:g}) must be above 0.")
        self.workers_are_open = self.dataloader_num_workers is None  # the data settle them
        self.dataloader_num_workers = self.dataloader_num_workers or 0
        on_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            fast = has_fast_bfloat16(torch.device("cpu" if on_cpu else torch.accelerator.current_accelerator()))
            self.bf16 = fast and not self.fp16
        elif self.bf16 and on_cpu and not has_fast_bfloat16(torch.device("cpu")):
            logger.warning_once(
                "This CPU has no fast units for bfloat16, which would be slower here: training in float32."
            )
            self.bf16 = False
        if self.bf16 and on_cpu:
            self.use_cpu = True  # TrainingArguments refuses bfloat16 to a CPU that is not asked for by name
        if self.fp16 and on_cpu:
            raise ValueError("fp16 needs a GPU; on a CPU use --bf16 true, or leave it out.")
        # Where the options that were not given have their values from, in words; scripts/finetune.py may know better.
        self.settings_from = "as given; the rest are the defaults of --help_all"
        if str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no" or (
            str(getattr(self.save_strategy, "value", self.save_strategy)) == "no"
        ):
            self.load_best_model_at_end = False
        best = (self.metric_for_best_model or "loss").removeprefix("eval_")
        if best not in BEST_METRICS:
            raise ValueError(f"metric_for_best_model ({best!r}) is unknown; use one of {', '.join(BEST_METRICS)}.")
        self.metric_for_best_model = best
        super().__post_init__()  # a backend or a mode of torch_compile switches it on
        require_joined(self)
        self.torch_compile_is_open = self.torch_compile is None and self.time_budget is not None
        self.torch_compile = bool(self.torch_compile)
        if self.torch_compile_backend == "inductor" and on_cpu and not can_compile(torch.device("cpu")):
            raise ValueError("torch_compile needs a C++ compiler on a CPU: install g++, or give --torch_compile false.")
        for name, value in FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} ({getattr(self, name)}) does not go with this training; leave it out.")
        for make_callback in get_reporting_integration_callbacks(self.report_to):  # a ValueError for an unknown name
            try:
                make_callback()
            except (ImportError, RuntimeError) as error:  # said now, not when the data are loaded
                raise ValueError(f"report_to ({', '.join(self.report_to)}): {error}") from error
        # One GPU for each process: Trainer would take all n that it sees, with batches and a loss n times as large.
        self._n_gpu = min(self.n_gpu, 1)
        self.logging_nan_inf_filter = False  # a loss that is not finite ends the run
        for name in ("learning_rate", "head_learning_rate", "muon_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < math.inf:
                raise ValueError(f"{name} ({rate}) must be a number, 0 or above.")
        for name in ("gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay ({self.layer_decay}) must be in (0, 1]; 1 switches it off.")
        if self.muon_learning_rate is not None and not self.optim.value.startswith("adamw_torch"):
            raise ValueError(f"muon_learning_rate goes with AdamW for the other parameters, not {self.optim.value}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay ({self.ema_decay}) must be in (0, 1), e.g. 0.999.")
        self.time_budget_seconds = None if self.time_budget is None else parse_duration(self.time_budget)

    def settle_compiling(self, chosen: bool):
        """Settle `torch_compile` where it was left open, as if it had been given, also in the run's record.

        Unlike what is given, it leaves TF32 alone: a choice by speed does not change what is computed in.
        """
        self.torch_compile_is_open = False
        self.torch_compile, self.torch_compile_backend = chosen, "inductor" if chosen else None
        self.changeable |= {name: getattr(self, name) for name in ("torch_compile", "torch_compile_backend")}

    @property
    def device(self) -> torch.device:
        """Of this process; a CPU has no index, with which transformers 5.17 could not resume several processes."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


def check_options(model: ModelArguments, data: DataArguments, args: ImageTrainingArguments):
    """Refuse options that have no effect beside the others.

    Raises:
        ValueError: Names the option, what it has no effect on, and the mend.
    """
    trained, masked = model.model_name_or_path is not None, model.task == MASKED
    folders = [name for name in ("train_dir", "validation_dir", "test_dir") if getattr(data, name)]
    idle = {
        "preset: a trained model has its architecture; give --preset or --model_name_or_path": trained and model.preset,
        "source goes with --model_name_or_path": model.source and not trained,
        "freeze_backbone trains the head of a trained model: it needs --model_name_or_path": (
            model.freeze_backbone and not trained
        ),
        "lora_rank adapts a trained model: it needs --model_name_or_path, and no --freeze_backbone": (
            model.lora_rank is not None and (model.freeze_backbone or not trained)
        ),
        f"{', '.join(folders)}: give folders, or --dataset_name, not both": data.dataset_name and folders,
        f"mask_ratio goes with --task {MASKED}": data.mask_ratio != DataArguments.mask_ratio and not masked,
        f"mask_patch_size goes with --task {MASKED}": data.mask_patch_size is not None and not masked,
        "rand_augment_magnitude goes with --rand_augment": (
            data.rand_augment_magnitude != DataArguments.rand_augment_magnitude and not data.rand_augment
        ),
        "mix_probability goes with --mixup_alpha or --cutmix_alpha": (
            data.mix_probability != 1 and not (data.mixup_alpha or data.cutmix_alpha)
        ),
        "max_train_samples does not go with --streaming; --max_steps says how much is read": (
            data.streaming and data.max_train_samples is not None
        ),
        "time_budget does not go with --streaming; --max_steps says how much is read": (
            data.streaming and args.time_budget is not None
        ),
        f"progressive_resizing does not go with --task {MASKED}": masked and data.progressive_resizing,
        "progressive_resizing does not go with --time_budget, whose steps take as long as the first ones": (
            data.progressive_resizing and args.time_budget is not None
        ),
        "a stream has no known end: give --max_steps with --streaming": data.streaming and args.max_steps <= 0,
        f"crop_scale ({data.crop_scale}) must be a share in (0, 1], e.g. 0.35": (
            data.crop_scale is not None and not 0 < data.crop_scale <= 1
        ),
        f"eval_steps ({args.eval_steps}) goes with --eval_strategy steps, and --save_strategy steps beside it": (
            args.eval_steps is not None and args.eval_strategy.value != "steps"
        ),
        f"save_steps ({args.save_steps}) goes with --save_strategy steps, and --eval_strategy steps beside it": (
            args.save_steps != TrainingArguments.save_steps and args.save_strategy.value != "steps"
        ),
    }
    for text, holds in idle.items():
        if holds:
            raise ValueError(f"{text}.")
