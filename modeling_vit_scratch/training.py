"""Training: data and model meet in transformers' Trainer.

`finetune` is a whole run: it loads the data, makes the model, says what will happen, trains, measures, and leaves a
folder that is a Hub repository. `ImageTrainer` adds to Trainer what image batches need and nothing else.
"""

import copy
import csv
import ctypes
import itertools
import json
import logging
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import accelerate
import numpy as np
import torch
import transformers
import yaml
from accelerate.utils import broadcast_object_list
from PIL import Image
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTImageProcessorPil, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from . import checkpoints, conversion, hub, lora, model_card, plots
from .augmentation import Augmentation, normalize, parse_until
from .configuration_vit_scratch import PRESETS, ViTScratchConfig
from .data import DIGITS, DecodedImages, ImageSplits, LazyImages, collate, load_splits
from .inspection import fingerprint, inspect_splits, sample_sheet
from .metrics import ImageClassificationMetrics
from .modeling_vit_scratch import ViTScratchForImageClassification, image_classification_loss
from .optimization import Muon, WeightAverage, describe_groups, has_fast_bfloat16, parameter_groups
from .streaming import StreamedImages, load_streaming

logger = logging.getLogger(__name__)

# In a checkpoint of a run that averages weights: those that are trained; `model.safetensors` has the average.
TRAINED_WEIGHTS = "trained_weights.safetensors"
# Of a time budget: what saving a checkpoint, and pictures and the card at the end, take at most on a slow machine.
SAVE_SECONDS, FINISH_SECONDS = 0.5, 6.0


# What a validation measures, and can choose the best model by.
BEST_METRICS = ("loss", "accuracy", "top5_accuracy")
# Options of Trainer's that batches of bytes, metrics of whole splits, and the run's own `Clock` leave no choice of.
FIXED = {
    "remove_unused_columns": False, "label_names": None, "prediction_loss_only": False, "batch_eval_metrics": False,
    "eval_do_concat_batches": True, "restore_callback_states_from_checkpoint": False,
}  # fmt: skip

# The --task of pretraining.py.
MASKED = "masked-image-modeling"


@dataclass
class ModelArguments:
    """Which model to train."""

    _argument_group_name = "model"

    preset: str = field(
        default="showcase", metadata={"help": f"Architecture to train from scratch: {', '.join(PRESETS)}."}
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
            f"timm's: {', '.join(conversion.FAMILIES)}."
        },
    )
    task: Literal["image-classification", "masked-image-modeling"] = field(
        default="image-classification",
        metadata={"help": f"'image-classification', or '{MASKED}': pre-training without labels."},
    )
    freeze_backbone: bool = field(default=False, metadata={"help": "Train the head only (linear probe)."})
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
    """Which pictures to train on, and how."""

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
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column of the pictures; found if not given."}
    )
    label_column_name: str | None = field(default=None, metadata={"help": "Column of the labels; found if not given."})
    streaming: bool = field(
        default=False, metadata={"help": "Read training pictures while training, for data larger than the disk."}
    )
    train_val_split: float = field(
        default=0.1, metadata={"help": "Share of train that becomes validation where the dataset has none."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many pictures only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Validate and test on so many only."})
    crop_padding: int | None = field(
        default=None, metadata={"help": "Random shifts by up to so many pixels. Default: an eighth of the picture."}
    )
    crop_mode: str = field(
        default="constant", metadata={"help": "What shifts uncover: 'constant' (black) or 'reflect'."}
    )
    crop_scale: float = field(
        default=0.35,
        metadata={"help": "Smallest share of the area that a random crop keeps; for pictures of different sizes."},
    )
    horizontal_flip: float | None = field(
        default=None, metadata={"help": "Probability of mirroring a picture. Default: 0.5; 0 for digits."}
    )
    mask_ratio: float = field(
        default=0.6, metadata={"help": f"Share of a picture that is hidden, with --task {MASKED}."}
    )
    mask_patch_size: int | None = field(
        default=None, metadata={"help": "Pixels of the squares that are hidden. Default: the model's patches."}
    )
    rand_augment: int = field(
        default=0, metadata={"help": "Random operations of RandAugment that each picture goes through; 0 for none."}
    )
    rand_augment_magnitude: float = field(default=5.0, metadata={"help": "Their strength, from 0 to 10."})
    random_erasing: float = field(default=0.0, metadata={"help": "Probability of erasing a rectangle of a picture."})
    mixup_alpha: float = field(
        default=0.0, metadata={"help": "Mixes pictures in pairs, by shares from Beta(alpha, alpha); 0 for none."}
    )
    cutmix_alpha: float = field(
        default=0.0, metadata={"help": "Pastes a part of one picture into another, likewise; 0 for none."}
    )
    mix_probability: float = field(default=1.0, metadata={"help": "Probability that a picture is mixed, either way."})
    augment_until: str | None = field(
        default=None,
        metadata={
            "help": "Share of the training after which augmentation stops, for all of it (0.9) or by name "
            "(mixup=0.8,rand_augment=0.9)."
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
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Pictures per step and process."})
    per_device_eval_batch_size: int = field(default=250, metadata={"help": "Pictures per evaluation step and process."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Highest learning rate."})
    head_learning_rate: float | None = field(default=None, metadata={"help": "Another one for the classifier."})
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
            "help": "Validate and keep a moving average of the weights, e.g. 0.999 (at most (1 + n) / (10 + n))."
        },
    )
    time_budget: str | None = field(
        default=None,
        metadata={"help": "Choose the number of steps so that the whole run ends in this time, e.g. 10m or 1h30m."},
    )
    flip_tta: bool = field(
        default=False, metadata={"help": "Also measure the mean logits of each picture and its mirror image."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "bfloat16 mixed precision; ignored on a CPU that emulates it. Default: on a GPU that has it."
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
        self.output_dir_is_default = self.output_dir is None
        gpu = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 is None:
            self.bf16 = gpu and torch.cuda.is_bf16_supported() and not self.fp16
        elif self.bf16 and not gpu and not has_fast_bfloat16(torch.device("cpu")):
            logger.warning("This CPU has no units for bfloat16, which would be slower here: training in float32.")
            self.bf16 = False
        elif self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # TrainingArguments refuses bfloat16 to a CPU that is not asked for by name
        if str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no" or (
            str(getattr(self.save_strategy, "value", self.save_strategy)) == "no"
        ):
            self.load_best_model_at_end = False
        best = (self.metric_for_best_model or "loss").removeprefix("eval_")
        if best not in BEST_METRICS:
            raise ValueError(f"metric_for_best_model ({best!r}) is unknown; use one of {', '.join(BEST_METRICS)}.")
        self.metric_for_best_model = best
        super().__post_init__()
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
        if self.gradient_accumulation_steps < 1:
            raise ValueError(f"gradient_accumulation_steps ({self.gradient_accumulation_steps}) must be at least 1.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay ({self.layer_decay}) must be in (0, 1]; 1 switches it off.")
        if self.muon_learning_rate is not None and not self.optim.value.startswith("adamw_torch"):
            raise ValueError(f"muon_learning_rate goes with AdamW for the other parameters, not {self.optim.value}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay ({self.ema_decay}) must be in (0, 1), e.g. 0.999.")
        self.time_budget_seconds = None if self.time_budget is None else parse_duration(self.time_budget)

    @property
    def device(self) -> torch.device:
        """Of this process; a CPU has no index, with which transformers 5.17 could not resume several processes."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


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


class ImageTrainer(Trainer):
    """Trainer for batches of bytes: augments and normalises on the device, and splits the loss exactly.

    Args:
        augmentation: Applied to training batches; evaluation only normalises, with the same mean and std.
        run_facts: What a run must share with a checkpoint to continue it; saved with each (`checkpoints.check_run`).
        adapter: Of `lora.add_adapter`, around the model; folders then hold the merged model, and the adapter in it.
        **kwargs: As for Trainer.
    """

    def __init__(self, augmentation: Augmentation, run_facts: dict, adapter=None, **kwargs):
        super().__init__(data_collator=collate, compute_metrics=self._metrics, compute_loss_func=self._loss, **kwargs)
        self.adapter = adapter
        self.augmentation = augmentation
        self.run_facts = run_facts
        self.average = None if self.args.ema_decay is None else WeightAverage(self.model, self.args.ema_decay)
        self.mirrored = False  # whether predictions are made of the pictures' mirror images
        self._micro_step = 0
        if self.average is not None:
            self.add_callback(UpdateAverage(self.average))

    def _metrics(self, prediction) -> dict[str, float]:
        result = ImageClassificationMetrics().compute(
            predictions=prediction.predictions, references=prediction.label_ids
        )
        return {name: result[name] for name in ("accuracy", "top5_accuracy")}

    def _loss(self, outputs, labels, num_items_in_batch=None):
        # Evaluation reports the plain cross-entropy, so that losses compare across settings.
        smoothing = self.args.label_smoothing_factor if torch.is_grad_enabled() else 0.0
        return image_classification_loss(outputs.logits, labels, self.model.config, smoothing, num_items_in_batch)

    def training_inputs(self, batch: dict, step: int, progress: float) -> dict:
        """What the model is trained on: augmented and normalised.

        Args:
            batch: As `collate` makes it, on the device.
            step: Batches this process has trained on before.
            progress: Share of the training that is done, in [0, 1].
        """
        images, labels = self.augmentation.with_labels(
            batch["pixel_values"], batch["labels"], step, self.args.process_index, progress=progress
        )
        return {"pixel_values": images, "labels": labels}

    def training_step(self, model, inputs, num_items_in_batch=None):
        step = self.state.global_step * self.args.gradient_accumulation_steps + self._micro_step
        progress = self.state.global_step / max(self.state.max_steps, 1)
        inputs = self.training_inputs(self._prepare_inputs(inputs), step, progress)
        self._micro_step = 0 if self.accelerator.sync_gradients else self._micro_step + 1
        return super().training_step(model, inputs, num_items_in_batch)

    def _maybe_log_save_evaluate(self, tr_loss, *args, learning_rate=None, **kwargs):
        """As Trainer does, if the loss since the last log entry is finite."""
        control = self.control
        # A GPU is asked only where it is waited for anyway; at each step, it would stand still between two of them.
        asked = control.should_log or control.should_evaluate or control.should_save or control.should_training_stop
        if (asked or tr_loss.device.type == "cpu") and not torch.isfinite(tr_loss):
            good, _ = checkpoints.last_good_checkpoint(Path(self.args.output_dir))
            raise FloatingPointError(
                f"the loss is {tr_loss.item()} at step {self.state.global_step}, learning rate {learning_rate:.3g}; "
                f"last good checkpoint: {good or 'none'}. Lower the learning rate, lengthen the warm-up, or clip "
                "gradients with --max_grad_norm."
            )
        super()._maybe_log_save_evaluate(tr_loss, *args, learning_rate=learning_rate, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        images = inputs["pixel_values"].flip(-1) if self.mirrored else inputs["pixel_values"]
        inputs["pixel_values"] = normalize(images, self.augmentation.mean, self.augmentation.std)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    @contextmanager
    def _averaged(self):
        """Within it the model has the averaged weights, if an average is kept."""
        if self.average is not None:
            self.average.swap()
        try:
            yield
        finally:
            if self.average is not None:
                self.average.swap()

    def evaluation_loop(self, *args, **kwargs):
        with self._averaged():
            return super().evaluation_loop(*args, **kwargs)

    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        if self.average is not None:  # what the run ends with is what was measured
            if self.state.best_model_checkpoint is None or not self.args.load_best_model_at_end:
                self.average.swap()
            self.average = None
        return result

    def _run_epoch(self, **kwargs):
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(**kwargs)
        self.control.should_training_stop = True  # resumed after the last step; Trainer would take one more

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.adapter is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            lora.load_adapter(self.adapter, Path(resume_from_checkpoint) / lora.FOLDER)
        if self.average is not None:
            self.average.load(Path(resume_from_checkpoint) / TRAINED_WEIGHTS)

    def _load_best_model(self):
        if self.adapter is None:
            super()._load_best_model()
        else:
            lora.load_adapter(self.adapter, Path(self.state.best_model_checkpoint) / lora.FOLDER)

    def _save(self, output_dir=None, state_dict=None):
        folder = Path(output_dir or self.args.output_dir)
        if self.adapter is not None:
            lora.save_adapter(self.adapter, folder / lora.FOLDER)
            state_dict = lora.merged_weights(self.adapter)
        super()._save(output_dir, state_dict)
        # A pickle of the arguments, the Hub token among them, that nothing reads back.
        (folder / "training_args.bin").unlink(missing_ok=True)

    def _save_checkpoint(self, model, trial):
        """As Trainer does, but aside; the folder takes its name once it is whole."""
        folder = Path(self.args.output_dir)
        staging, name = folder / checkpoints.STAGING, f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)  # what a killed process left
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(staging)
        try:
            with self._averaged():
                super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(folder)
        if self.average is not None and self.args.should_save:
            save_file(self.average.trained(), staging / name / TRAINED_WEIGHTS)
        pending = {"loss": self._tr_loss.item(), "last_logged": self._globalstep_last_logged}
        (staging / name / f"pending_loss_{self.args.process_index}.json").write_text(json.dumps(pending))
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(folder / f"checkpoint-{self.state.best_global_step}")
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(staging / name / "trainer_state.json")
            (staging / name / checkpoints.RUN).write_text(json.dumps(self.run_facts, indent=1) + "\n")
            checkpoints.publish(staging / name, folder / name)
            shutil.rmtree(staging, ignore_errors=True)
            rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _determine_best_metric(self, metrics, trial):
        # Of equally good epochs the last is kept: the learning rate has come down further.
        if metrics.get(f"eval_{self.args.metric_for_best_model}") == self.state.best_metric:
            self.state.best_metric = None
        return super()._determine_best_metric(metrics, trial)

    def get_train_dataloader(self):
        if not isinstance(self.train_dataset, StreamedImages):
            return super().get_train_dataloader()
        # Each process already reads its own part of the stream; accelerate would divide that once more.
        return torch.utils.data.DataLoader(
            self.train_dataset,
            batch_size=self.args.train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _get_dataloader(self, *args, is_training=False, **kwargs):
        """As Trainer does, but `dataloader_drop_last` is for training: every picture is measured."""
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = self.make_optimizer(model or self.model)
        return self.optimizer

    def make_optimizer(self, model) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, for this model's parameters."""
        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
        if self.args.muon_learning_rate is not None:
            optimizer_class = Muon
        return optimizer_class(parameter_groups(model, self.args), **settings)


class UpdateAverage(TrainerCallback):
    """Takes the weights of each step into the average."""

    def __init__(self, average: WeightAverage):
        self.average = average

    def on_step_end(self, args, state, control, **kwargs):
        self.average.update(state.global_step)


class Clock(TrainerCallback, ExportableState):
    """Wall and CPU seconds of the training steps, over all parts of a run that was resumed.

    What lies between two steps is left out: evaluation, saving, and gathering a batch (a hundredth of a step).
    """

    def __init__(self):
        self.wall = self.cpu = 0.0
        self._started = None

    def on_train_begin(self, args, state, control, **kwargs):
        # Trainer restores callbacks on request only. Other processes took about the CPU time of the main one.
        vars(self).update(state.stateful_callbacks[type(self).__name__]["attributes"])

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.wall += time.perf_counter() - self._started[0]
        self.cpu += time.process_time() - self._started[1]

    def on_log(self, args, state, control, **kwargs):
        state.log_history[-1] |= {"train_seconds": round(self.wall, 3), "train_cpu_seconds": round(self.cpu, 3)}

    def state(self) -> dict:
        return {"args": {}, "attributes": {"wall": self.wall, "cpu": self.cpu}}


class ResumeLoss(TrainerCallback):
    """Restores the loss summed since the last log entry: a resumed run's history is that of one never stopped."""

    def __init__(self, trainer: ImageTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        path = Path(args.resume_from_checkpoint or "") / f"pending_loss_{args.process_index}.json"
        if args.resume_from_checkpoint and path.is_file():
            pending = json.loads(path.read_text())
            self.trainer._tr_loss += pending["loss"]
            self.trainer._globalstep_last_logged = pending["last_logged"]


class CropEpoch(TrainerCallback):
    """Tells photos their epoch: accelerate forgets to after resuming in mid-epoch, and in several processes."""

    def on_epoch_begin(self, args, state, control, train_dataloader, **kwargs):
        if isinstance(train_dataloader.dataset, LazyImages):  # a stream counts its own
            train_dataloader.dataset.set_epoch(int(state.epoch or 0))


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM: finish the step, save a checkpoint, and leave. A second Ctrl-C leaves at once."""

    def __init__(self):
        self.signal = None
        self._previous = {}

    def on_train_begin(self, args, state, control, **kwargs):
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)

    def _note(self, number, frame):
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        print("\nStopping after this step and saving a checkpoint; once more to leave at once.", file=sys.stderr)

    def on_step_end(self, args, state, control, **kwargs):
        stop = self.signal is not None
        if args.world_size > 1:  # all processes have to leave at the same step
            flag = torch.tensor(float(stop), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            stop = bool(flag.item())
            self.signal = self.signal or (signal.SIGTERM if stop else None)
        if stop:
            control.should_training_stop = True
            # At an epoch's end the evaluation comes first, as it does in a run that is not stopped.
            control.should_save = control.should_save or not state.epoch.is_integer()

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.signal is not None:
            finished = state.epoch.is_integer()
            control.should_save = finished
            control.should_evaluate = control.should_evaluate and finished

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def config_overrides(arguments: ModelArguments) -> dict:
    """The fields that `--config_overrides` names, with their values."""
    overrides = {}
    for item in filter(None, re.split(r",(?![^\[]*\])", arguments.config_overrides or "")):  # no comma of a list
        name, separator, value = item.partition("=")
        if not separator:
            raise ValueError(f"config_overrides: {item!r} is not of the form field=value.")
        overrides[name.strip()] = yaml.safe_load(value)
    return overrides


def make_config(arguments: ModelArguments, class_names: list[str]) -> ViTScratchConfig:
    """The preset's config with its overrides, for these classes."""
    overrides = config_overrides(arguments)
    if arguments.image_size is not None:
        overrides["image_size"] = arguments.image_size
    labels = dict(enumerate(class_names))
    return ViTScratchConfig.preset(
        arguments.preset,
        **{"problem_type": "single_label_classification", **overrides},
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )


def make_processor(
    config: ViTScratchConfig, mean: list[float] | None = None, std: list[float] | None = None
) -> ViTImageProcessorPil:
    """transformers' image processor for this model's size and pixels of this mean and standard deviation."""
    height, width = config.image_hw
    return ViTImageProcessorPil(
        size={"height": height, "width": width}, image_mean=mean, image_std=std, resample=Image.Resampling.BICUBIC
    )


def load_trained(arguments: ModelArguments) -> tuple[ViTScratchForImageClassification, ViTImageProcessorPil]:
    """A trained classifier, ours or converted from another library, and an image processor with its mean and std."""
    name, fields = arguments.model_name_or_path, config_overrides(arguments)
    where = {"source": arguments.source, "cache_dir": arguments.cache_dir, "token": arguments.token}
    model = conversion.convert_checkpoint(name, image_size=arguments.image_size, replace_head=True, **where, **fields)
    processor = conversion.image_processor_for(name, model, **where)
    return model, make_processor(model.config, processor.image_mean, processor.image_std)


def with_classes(model: ViTScratchForImageClassification, class_names: list[str]) -> ViTScratchForImageClassification:
    """The model for these classes: unchanged if it knows them already, else with a new head (all zero)."""
    config = model.config
    if [config.id2label[index] for index in range(config.num_labels)] != class_names:
        logger.warning("The head is new: %d classes instead of %d.", len(class_names), config.num_labels)
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: index for index, name in enumerate(class_names)}
        width = config.representation_size or config.hidden_size
        model.num_labels, model.classifier = config.num_labels, torch.nn.Linear(width, config.num_labels)
        model.classifier.apply(model._init_weights)
    config.problem_type = "single_label_classification"
    return model


def flops_per_image(model: ViTScratchForImageClassification) -> int:
    """Floating-point operations (a multiplication and an addition are two) of a forward pass on one picture."""
    config = model.config
    pixels = torch.zeros(1, config.num_channels, *config.image_hw, device=model.device)
    training = model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(pixels, output_attentions=True)  # eager attention: the counter knows matrix products
    model.train(training)
    return counter.get_total_flops()


def _settle_schedule(arguments: ImageTrainingArguments, batches: int | None) -> tuple[int, float | None]:
    """Optimizer steps of the run, and the learning rate of its last one (None where it depends on validation).

    Args:
        arguments: Of the run; `num_decay_steps` of a warmup-stable-decay schedule becomes a number of steps where it
            is a share of them (0.2 if not given), and schedules that follow a metric are told its direction.
        batches: In an epoch; None for a stream, which has `max_steps`.

    Raises:
        ValueError: The schedule does not take the given settings.
    """
    steps = arguments.max_steps
    if steps <= 0:
        per_epoch = max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)
        steps = math.ceil(arguments.num_train_epochs * per_epoch)
    if arguments.lr_scheduler_type == "warmup_stable_decay":
        settings = {"num_decay_steps": 0.2, **(arguments.lr_scheduler_kwargs or {})}
        decay = settings["num_decay_steps"]
        settings["num_decay_steps"] = round(decay * steps) if decay < 1 else decay
        arguments.lr_scheduler_kwargs = settings
    if arguments.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):  # they take every metric for a loss
        mode = "max" if arguments.greater_is_better else "min"
        arguments.lr_scheduler_kwargs = {"mode": mode, **(arguments.lr_scheduler_kwargs or {})}
    try:
        scheduler = transformers.get_scheduler(
            arguments.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)], lr=arguments.learning_rate),
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )
    except TypeError as error:
        raise ValueError(f"lr_scheduler_kwargs ({arguments.lr_scheduler_kwargs}): {error}") from error
    factors = getattr(scheduler, "lr_lambdas", None)
    return steps, None if factors is None else arguments.learning_rate * factors[0](steps - 1)


def steps_in_budget(trainer: ImageTrainer, seconds: float, last_pictures: int) -> int:
    """Optimizer steps after which training, validation, saving and the last measurements end in so many seconds.

    A copy of the model rehearses some steps and two validation batches, in the same time. The main process decides for
    all.

    Args:
        trainer: Of the run, before training.
        seconds: That are left.
        last_pictures: Predicted once more after training.

    Raises:
        ValueError: There is no time for a single step.
    """
    args, entered = trainer.args, time.monotonic()
    if args.process_index == 0:
        print("Timing some steps, to see how many fit into the time budget.", file=sys.stderr)
    model = copy.deepcopy(trainer.model).train()
    optimizer = trainer.make_optimizer(model)
    forward = torch.compile(model) if args.torch_compile else model
    loader = trainer.get_train_dataloader()
    ends, times, evaluations = time.monotonic() + min(0.02 * seconds, 30), [], []
    with torch.random.fork_rng():
        begun = time.monotonic()
        for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
            inputs = trainer.training_inputs(trainer._prepare_inputs(batch), 0, 0.0)
            with trainer.accelerator.autocast():
                loss = trainer.compute_loss(forward, inputs)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # waits for a GPU
            begun, duration = time.monotonic(), time.monotonic() - begun
            times.append(duration)
            if len(times) >= 6 and begun > ends:
                break
        # The first ones warm up; and compiling anew for a last, smaller batch is no ordinary step.
        average = statistics.median if args.torch_compile else statistics.mean
        step = average(times[2:]) * args.gradient_accumulation_steps
        batch = next(iter(trainer.get_eval_dataloader()))
        forward.eval()
        for _ in range(2):
            begun = time.monotonic()
            trainer.prediction_step(forward, dict(batch), prediction_loss_only=False)[0].item()
            evaluations.append(time.monotonic() - begun)
        picture = evaluations[1] / len(batch["labels"])
    # What the rehearsal took is gone, and the model itself has to be compiled and warmed up as its copy was.
    seconds -= time.monotonic() - entered + times[0] + evaluations[0]
    last = picture * last_pictures * (2 if args.flip_tta else 1) + FINISH_SECONDS
    evaluates = args.eval_strategy.value, args.eval_steps, picture * len(trainer.eval_dataset)
    saves = args.save_strategy.value, args.save_steps, SAVE_SECONDS
    if args.save_strategy.value == "best":  # at most
        saves = *evaluates[:2], SAVE_SECONDS
    for strategy, every, cost in (evaluates, saves):
        if strategy == "epoch":
            step += cost / max(len(loader) // args.gradient_accumulation_steps, 1)
        elif strategy == "steps" and every < 1:  # a share of all steps
            last += cost / every
        elif strategy == "steps":
            step += cost / every
    # A twentieth for what else a machine does meanwhile.
    steps = int((0.95 * seconds - last) / step)
    if args.world_size > 1:
        steps = broadcast_object_list([steps])[0]
    if steps < 1:
        raise ValueError(
            f"time_budget ({args.time_budget}) leaves {seconds:.0f} s for training, but the last measurements take "
            f"{last:.0f} s and a step {step:.2g} s; give it more."
        )
    return steps


def hardware(device: torch.device) -> str:
    """What this run computes on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def table(rows: dict[str, object]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())


def _summary(trainer: ImageTrainer, splits: ImageSplits, steps: int, last_rate: float | None) -> str:
    args, config = trainer.args, trainer.model.config
    sizes = [f"{count:,} {name}" for name, count in split_sizes(splits).items()]
    if isinstance(splits.train, StreamedImages):
        sizes.insert(0, "streamed train")
    global_batch = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    classes = f"{len(splits.class_names)} classes, " if splits.class_names else ""
    rate = "set by validation" if last_rate is None else f"{last_rate:.3g}"
    height, width = config.image_hw
    epochs = ""
    if not isinstance(splits.train, StreamedImages):
        epochs = f" ({steps * args.gradient_accumulation_steps / len(trainer.get_train_dataloader()):g} epochs)"
    rows = {
        "model": f"ViT, {config.num_hidden_layers} blocks, width {config.hidden_size}, {config.num_attention_heads} "
        f"heads, MLP {config.intermediate_size}, patch {config.patch_hw[0]}x{config.patch_hw[1]}",
        "parameters": f"{trainer.model.num_parameters():,}{_frozen(trainer.model)}",
        "FLOPs per image": f"{flops_per_image(trainer.model):,} (forward)",
        "data": f"{splits.name}: {', '.join(sizes)} images, {classes}{height}x{width} px",
        "global batch": f"{global_batch} = {args.per_device_train_batch_size} per device x {args.world_size} "
        f"process{'es' * (args.world_size > 1)} x {args.gradient_accumulation_steps} accumulated",
        "steps": f"{steps:,}{epochs}",
        "learning rate": f"{args.learning_rate:.3g}, {args.lr_scheduler_type.value}, last step {rate}",
        "optimizer": describe_groups(parameter_groups(trainer.model, args), args.optim.value),
        "device": f"{hardware(args.device)}, {_precision(args)}",
        "output": args.output_dir,
    }
    return table(rows)


def _public_name(name: str) -> str:
    """A data set's name as others may see it: no path of this machine."""
    return Path(name).resolve().name if Path(name).exists() else name


def _frozen(model: ViTScratchForImageClassification) -> str:
    trained = model.num_parameters(only_trainable=True)
    return "" if trained == model.num_parameters() else f", of which {trained:,} are trained"


def move_small_data(splits: ImageSplits, args: TrainingArguments):
    """Pictures that take less than a tenth of the GPU's free memory live there: no batch is copied while training."""
    decoded = [part for part in _parts(splits).values() if isinstance(part, DecodedImages)]
    free, _ = torch.cuda.mem_get_info(args.device)
    if args.dataloader_num_workers == 0 and sum(part.images.nbytes for part in decoded) < free / 10:
        args.dataloader_pin_memory = False
        for part in decoded:
            part.to(args.device)


def _trainer_state(checkpoint: str) -> dict:
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text())


def _parts(splits: ImageSplits) -> dict[str, torch.utils.data.Dataset]:
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    return {name: part for name, part in parts.items() if part is not None}


def split_sizes(splits: ImageSplits) -> dict[str, int]:
    """Pictures of each split; a stream has no known number."""
    return {name: len(part) for name, part in _parts(splits).items() if not isinstance(part, StreamedImages)}


def _precision(args: TrainingArguments) -> str:
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"


def _settle_output(arguments: ImageTrainingArguments, model: ModelArguments, dataset: str):
    """Name the output folder and the checkpoint to resume; refuse a folder that is taken, or not writable."""
    if arguments.output_dir_is_default:
        stem = f"{Path(model.model_name_or_path or model.preset).name}-{Path(dataset).name}"
        candidates = (Path("runs") / f"{stem}{f'-{n}' if n > 1 else ''}" for n in range(1, 10_000))
        arguments.output_dir = str(next(folder for folder in candidates if not folder.exists()))
    folder, resume = Path(arguments.output_dir), arguments.resume_from_checkpoint
    if resume is not None and resume.lower() in ("true", "last", "latest"):
        last, notes = checkpoints.last_good_checkpoint(folder)
        for note in notes:
            print(note, file=sys.stderr)
        if last is None:
            raise ValueError(f"there is no good checkpoint in {folder}; name one with --resume_from_checkpoint FOLDER.")
        arguments.resume_from_checkpoint = str(last)
    elif resume is not None:
        wrong = checkpoints.damage(Path(resume)) if Path(resume).is_dir() else "there is no such folder"
        if wrong is not None:
            raise ValueError(
                f"cannot resume from {resume}: {wrong}; --resume_from_checkpoint last takes the last good one."
            )
    elif checkpoints.list_checkpoints(folder) or (folder / "model.safetensors").exists():
        if not arguments.overwrite_output_dir:
            raise ValueError(
                f"{folder} already holds a run; continue it with --resume_from_checkpoint last, choose another "
                "--output_dir, or replace it with --overwrite_output_dir."
            )
        for checkpoint in checkpoints.list_checkpoints(folder) if not arguments.dry_run else ():
            shutil.rmtree(checkpoint)
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}); choose another --output_dir.") from error


def check_space(model: ViTScratchForImageClassification, args: ImageTrainingArguments):
    """Refuse a disk that the checkpoints would fill: weights and two moments each, one more than are kept."""
    needed = 3 * sum(p.numel() * p.element_size() for p in model.parameters()) * ((args.save_total_limit or 2) + 2)
    free = shutil.disk_usage(args.output_dir).free
    if args.save_strategy.value != "no" and free < needed:
        raise ValueError(
            f"{args.output_dir} has {free / 1e9:.2f} GB free, but its checkpoints take {needed / 1e9:.2f} GB; "
            "free some, lower --save_total_limit, or choose another --output_dir."
        )


def run_facts(config: ViTScratchConfig, splits: ImageSplits, args: ImageTrainingArguments) -> dict:
    """What a checkpoint must share with the run that continues it."""
    return {
        **{name: getattr(config, name) for name in ViTScratchConfig.__annotations__},
        "dataset": _public_name(splits.name),
        "classes": splits.class_names,
        "images": split_sizes(splits),
        "processes": args.world_size,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "seed": args.seed,
        "optim": args.optim.value,
        "muon_learning_rate": args.muon_learning_rate,
        "ema_decay": args.ema_decay,
        "fingerprint": fingerprint(splits),  # last: what else differs says more
    }


def write_history(folder: Path, log_history: list[dict]) -> bool:
    """One row per logged event, in the order of steps; empty where an event has no such number. False if none was."""
    names = ["step", "epoch", "learning_rate", "loss", "grad_norm", "eval_loss", "eval_accuracy", "eval_top5_accuracy"]
    names += ["train_seconds", "train_cpu_seconds"]
    rows = [row for row in log_history if "loss" in row or "eval_loss" in row]
    with open(folder / "history.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return bool(rows)


def _write_predictions(folder: Path, split: str, logits: np.ndarray, labels: np.ndarray, rows: np.ndarray, names):
    """One row per picture: its row in the split, its class, the predicted class, and the model's confidence."""
    probabilities = torch.from_numpy(logits).float().softmax(-1)
    confidence, predicted = probabilities.max(-1)
    with open(folder / f"predictions_{split}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "label", "predicted", "confidence", "label_probability"])
        own = probabilities[torch.arange(len(labels)), torch.from_numpy(labels)]
        for row, label, guess, p, q in zip(rows, labels, predicted.tolist(), confidence, own, strict=True):
            writer.writerow([row, names[label], names[guess], f"{p:.6f}", f"{q:.6f}"])


def _without_resuming(command: list[str]) -> list[str]:
    """A command without the options that are about to be added to it."""
    kept, skip = [], False
    for word in command:
        if not skip and word.partition("=")[0] not in ("--output_dir", "--resume_from_checkpoint"):
            kept.append(word)
        skip = word in ("--output_dir", "--resume_from_checkpoint")
    return kept


def begin_run(model_args: ModelArguments, data_args: DataArguments, args: ImageTrainingArguments) -> str:
    """Settle the output folder, seed everything, and return the dataset's name."""
    data_name = data_args.dataset_name or data_args.train_dir
    if args.process_index == 0:
        _settle_output(args, model_args, data_name)
    if args.world_size > 1:  # one process decides, before any of them makes a folder
        args.output_dir, args.resume_from_checkpoint = broadcast_object_list(
            [args.output_dir, args.resume_from_checkpoint]
        )
    set_seed(args.seed)
    transformers.utils.logging.disable_progress_bar()  # of reading and writing files; training keeps its own
    return data_name


def data_settings(
    model_args: ModelArguments, data_args: DataArguments, args: ImageTrainingArguments, num_channels: int
) -> dict:
    """What `load_splits` and `load_streaming` have in common, as the options say."""
    folders = {"train": data_args.train_dir, "validation": data_args.validation_dir, "test": data_args.test_dir}
    return {
        "num_channels": num_channels,
        "config_name": data_args.dataset_config_name,
        "data_files": {split: folder for split, folder in folders.items() if folder},
        "image_column": data_args.image_column_name,
        "label_column": data_args.label_column_name,
        "train_val_split": data_args.train_val_split,
        "max_eval_samples": data_args.max_eval_samples,
        "crop_scale": data_args.crop_scale,
        "seed": args.seed,
        "cache_dir": model_args.cache_dir,
        "token": model_args.token,
    }


def make_augmentation(data_args: DataArguments, args: ImageTrainingArguments, processor, splits: ImageSplits):
    """The augmentation of a run, as the options say."""
    padding = data_args.crop_padding
    if not isinstance(splits.train, DecodedImages):  # those are cropped when they are read
        padding = 0
    elif padding is None:
        padding = min(processor.size["height"], processor.size["width"]) // 8
    flip = data_args.horizontal_flip
    if flip is None:
        flip = 0.0 if data_args.dataset_name == DIGITS else 0.5  # mirrored digits are other signs
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
        until=parse_until(data_args.augment_until),
    )


def keep_freed_memory():
    """Let the C library keep the memory that a step frees, for the next step, where it can (glibc).

    On a CPU, pages that went back to the system and are touched anew took 4 to 9 % of a step.
    """
    trim_threshold, mmap_threshold, one_gib = -1, -3, 1 << 30
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(trim_threshold, one_gib)
        mallopt(mmap_threshold, one_gib)


def suit_device(args: ImageTrainingArguments, model, splits: ImageSplits):
    """Set what the options leave open as the device and the data want it."""
    if not isinstance(splits.train, DecodedImages) and args.dataloader_num_workers == 0:
        args.dataloader_num_workers = max((os.cpu_count() or 1) - 1, 1)
    if args.device.type == "cpu":
        keep_freed_memory()
        args.dataloader_pin_memory = False
        if args.bf16:  # torch's fused attention has a slow backward pass in bfloat16 on CPUs
            model.set_attn_implementation("eager")


def settle_steps(trainer: ImageTrainer, splits: ImageSplits, started: float) -> tuple[int, float | None]:
    """Steps of the run, within its time budget if it has one, and the learning rate of the last; say what will happen.

    Args:
        trainer: Of the run.
        splits: Its pictures.
        started: `time.monotonic()` when the run began.
    """
    args, streamed = trainer.args, isinstance(splits.train, StreamedImages)
    batches = None if streamed else len(trainer.get_train_dataloader())
    if batches == 0:
        raise ValueError(
            f"no batch is full: {len(splits.train)} pictures for training, per_device_train_batch_size "
            f"{args.per_device_train_batch_size}; lower it, or leave out dataloader_drop_last."
        )
    if args.time_budget_seconds is not None:
        if args.resume_from_checkpoint:
            args.max_steps = _trainer_state(args.resume_from_checkpoint)["max_steps"]
        else:
            left = args.time_budget_seconds - (time.monotonic() - started)
            measured = (len(part) for name, part in _parts(splits).items() if name != "train")
            args.max_steps = steps_in_budget(trainer, left, sum(measured))
    steps, last_rate = _settle_schedule(args, batches)
    if args.process_index == 0:
        print(_summary(trainer, splits, steps, last_rate), flush=True)
    return steps, last_rate


def say_how_to_resume(trainer: ImageTrainer):
    """Print the command that continues a run that was stopped."""
    if trainer.args.process_index == 0:
        options = ["--output_dir", trainer.args.output_dir, "--resume_from_checkpoint", "last"]
        command = shlex.join(["python", *_without_resuming(sys.argv), *options])
        print(f"Stopped at step {trainer.state.global_step}. To continue:\n  {command}")


def describe_training(trainer: ImageTrainer, steps: int, data_args: DataArguments, lora_rank: int | None) -> dict:
    """The settings of a run, for `metrics.json`."""
    args, augmentation = trainer.args, trainer.augmentation
    lazy = not isinstance(trainer.train_dataset, DecodedImages)
    return {
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "optimizer": args.optim.value,
        "learning_rate": args.learning_rate,
        "muon_learning_rate": args.muon_learning_rate,
        "lora_rank": lora_rank,
        "ema_decay": args.ema_decay,
        "lr_scheduler_type": args.lr_scheduler_type.value,
        "warmup_steps": args.get_warmup_steps(steps),
        "weight_decay": args.weight_decay,
        "global_batch_size": args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps,
        "label_smoothing": args.label_smoothing_factor,
        "seed": args.seed,
        "precision": _precision(args),
        "augmentation": {
            "crop_padding": augmentation.crop_padding,
            "crop_mode": augmentation.crop_mode,
            "crop_scale": data_args.crop_scale if lazy else None,
            "horizontal_flip": augmentation.horizontal_flip,
            "rand_augment": augmentation.rand_augment_ops,
            "rand_augment_magnitude": augmentation.rand_augment_magnitude if augmentation.rand_augment_ops else None,
            "random_erasing": augmentation.erasing,
            "mixup_alpha": augmentation.mixup_alpha,
            "cutmix_alpha": augmentation.cutmix_alpha,
            "mix_probability": augmentation.mix_probability,
            "until": dict(augmentation.until),
        },
    }


def describe_machine(trainer: ImageTrainer, clock: Clock) -> dict:
    """Time and environment of a run, for `metrics.json`."""
    args, cpu = trainer.args, torch.tensor(clock.cpu, dtype=torch.float64)
    if args.world_size > 1:
        cpu = trainer.accelerator.gather(cpu.to(args.device).view(1)).sum()
    return {
        "time": {"train_seconds": clock.wall, "train_cpu_seconds": cpu.item()},
        "environment": {
            "hardware": hardware(args.device),
            "processes": args.world_size,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
    }


def finetune(model_args: ModelArguments, data_args: DataArguments, args: ImageTrainingArguments) -> dict | None:
    """Train a classifier as the arguments say, and leave an output folder that is a Hub repository.

    Returns:
        What `metrics.json` holds; empty after a dry run, None if a signal stopped the run.

    Raises:
        ValueError: Something is wrong with the data, the options or the output folder; said before training.
        FloatingPointError: The loss is no longer finite.
    """
    started = time.monotonic()
    is_main = args.process_index == 0
    if model_args.lora_rank is not None and (model_args.model_name_or_path is None or model_args.freeze_backbone):
        raise ValueError("lora_rank adapts a trained model: it needs --model_name_or_path, and no --freeze_backbone.")
    data_name = begin_run(model_args, data_args, args)

    # A new model takes mean and std from the data; a trained one comes with the processor it was trained with.
    trained = None if model_args.model_name_or_path is None else load_trained(model_args)
    config = make_config(model_args, ["0", "1"]) if trained is None else trained[0].config
    processor = make_processor(config) if trained is None else trained[1]
    settings = data_settings(model_args, data_args, args, config.num_channels)
    with args.main_process_first(desc="loading the data"):
        if data_args.streaming:
            if args.max_steps <= 0:
                raise ValueError("a stream has no known end: give --max_steps with --streaming.")
            if args.time_budget is not None:
                raise ValueError("time_budget does not go with streaming; --max_steps says how much is read.")
            if data_args.max_train_samples is not None:
                raise ValueError("max_train_samples does not go with streaming; --max_steps says how much is read.")
            ranks = {"rank": args.process_index, "world_size": args.world_size}
            splits = load_streaming(data_name, processor, **settings, **ranks)
        else:
            splits = load_splits(data_name, processor, **settings, max_train_samples=data_args.max_train_samples)
    if trained is None:
        model = ViTScratchForImageClassification(make_config(model_args, splits.class_names))
        processor = make_processor(config, splits.mean, splits.std)
    else:
        model = with_classes(trained[0], splits.class_names)
    if model_args.freeze_backbone:
        model.vit.requires_grad_(False)
    adapter = None
    if model_args.lora_rank is not None:
        adapter = lora.add_adapter(model, model_args.lora_rank, _public_name(model_args.model_name_or_path))
    augmentation = make_augmentation(data_args, args, processor, splits)
    suit_device(args, model, splits)
    clock, stop = Clock(), StopOnSignal()
    pushes = None
    if args.push_to_hub:  # by hub.py, which sends everything in one commit, code files included
        args.push_to_hub = False
        repo_id = args.hub_model_id or Path(args.output_dir).name
        pushes = hub.HubPushCallback(repo_id, bool(args.hub_private_repo), args.hub_revision, args.hub_token)
        if is_main:
            hub.prepare_repo(pushes.repo_id, pushes.private, pushes.token)
    facts = run_facts(model.config, splits, args)
    if model_args.freeze_backbone:
        facts = {"freeze_backbone": True, **facts}
    if adapter is not None:  # a checkpoint has the adapter, and the base comes from where it came from
        facts = {"lora": [model_args.lora_rank, _public_name(model_args.model_name_or_path)], **facts}
    if args.resume_from_checkpoint:
        checkpoints.check_run(Path(args.resume_from_checkpoint), facts)
        if data_args.streaming:  # what was trained on before is passed over, not decoded again
            step = _trainer_state(args.resume_from_checkpoint)["global_step"]
            splits.train.skip_decoding(step * args.gradient_accumulation_steps, args.per_device_train_batch_size)
    check_space(model, args)
    trainer = ImageTrainer(
        augmentation,
        facts,
        adapter,
        model=model,
        args=args,
        train_dataset=splits.train,
        eval_dataset=splits.validation,
        processing_class=processor,
        callbacks=[clock, stop, CropEpoch(), *([pushes] if pushes and args.hub_strategy.value != "end" else [])],
    )
    trainer.add_callback(ResumeLoss(trainer))
    steps, _ = settle_steps(trainer, splits, started)
    if args.dry_run:
        batch = next(iter(trainer.get_train_dataloader()))
        images = augmentation(batch["pixel_values"][:2].to(args.device), 0, args.process_index)
        model(images, labels=batch["labels"][:2]).loss.backward()
        if is_main:
            print(inspect_splits(splits))
            sheet = sample_sheet(splits, augmentation, Path(args.output_dir) / "samples.png")
            print(f"Pictures as the model sees them: {sheet}\nDry run: one batch and the output folder are in order.")
        return {}

    if args.device.type == "cuda":
        move_small_data(splits, args)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if stop.signal is not None:
        say_how_to_resume(trainer)
        return None

    trainer.save_model()
    if adapter is not None:
        adapter.merge_and_unload()  # in place: what is measured is what the folder holds
    folder = Path(args.output_dir)
    metrics = {
        "task": "image-classification",
        "dataset": {
            "name": facts["dataset"],
            "fingerprint": facts["fingerprint"],
            "splits": split_sizes(splits),
            "class_names": splits.class_names,
        },
        "model": {"parameters": model.num_parameters(), "flops_per_image": flops_per_image(model)},
        "training": describe_training(trainer, steps, data_args, model_args.lora_rank),
    }
    for split in [name for name in ("validation", "test") if name in _parts(splits)]:
        prediction = trainer.predict(_parts(splits)[split], metric_key_prefix=split)
        result = ImageClassificationMetrics().compute(
            predictions=prediction.predictions, references=prediction.label_ids
        )
        metrics[split] = {
            "examples": result["examples"],
            "loss": prediction.metrics[f"{split}_loss"],
            "accuracy": result["accuracy"],
            "top5_accuracy": result["top5_accuracy"],
            "per_class_accuracy": dict(zip(splits.class_names, result["per_class_accuracy"], strict=True)),
            "confusion_matrix": result["confusion_matrix"],
        }
        if args.flip_tta:
            trainer.mirrored = True
            mirrored = trainer.predict(_parts(splits)[split], metric_key_prefix=split).predictions
            trainer.mirrored = False
            both = ImageClassificationMetrics().compute(
                predictions=prediction.predictions + mirrored, references=prediction.label_ids
            )
            metrics[split]["flip_tta_accuracy"] = both["accuracy"]
        if is_main:
            rows = splits.records[split].rows
            _write_predictions(folder, split, prediction.predictions, prediction.label_ids, rows, splits.class_names)
    metrics |= describe_machine(trainer, clock)
    metrics["command"] = model_card.public_command(shlex.join(["python", *sys.argv]), data_name)
    if is_main:
        _finish(folder, metrics, trainer.state.log_history)
        pushed = pushes and pushes.push_final(folder)
        if pushed:
            print(f"Pushed to {pushed.url}")
    return metrics


def _finish(folder: Path, metrics: dict, log_history: list[dict]):
    """Write what people look at: numbers, curves, card; say the result."""
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    logged = write_history(folder, log_history)
    final = "test" if "test" in metrics else "validation"
    names, result = metrics["dataset"]["class_names"], metrics[final]
    figures = {
        "per_class_accuracy": plots.plot_per_class_accuracy(list(result["per_class_accuracy"].values()), names),
        "confusion_matrix": plots.plot_confusion_matrix(result["confusion_matrix"], names),
    }
    if logged:
        figures["training_curves"] = plots.plot_training_curves(folder / "history.csv")
    (folder / "plots").mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / "plots" / f"{name}.png", dpi=110)
    model_card.write_model_card(folder)
    flipped = "flip_tta_accuracy" in result
    shown = {
        f"{split} accuracy": f"{metrics[split]['accuracy']:.2%}  (top-5 {metrics[split]['top5_accuracy']:.2%}, "
        f"loss {metrics[split]['loss']:.4f}, {metrics[split]['examples']:,} images)"
        + (f"; with mirror images {metrics[split]['flip_tta_accuracy']:.2%}" if flipped else "")
        for split in ("validation", "test")
        if split in metrics
    }
    shown["training time"] = (
        f"{metrics['time']['train_seconds']:.0f} s ({metrics['time']['train_cpu_seconds']:.0f} CPU s)"
    )
    shown["everything is in"] = folder
    print(table(shown))
