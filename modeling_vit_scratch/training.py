"""Training: data and model meet in transformers' Trainer.

`finetune` is a whole run: it loads the data, makes the model, says what will happen, trains, measures, and leaves a
folder that is a Hub repository.
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
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import accelerate
import numpy as np
import torch
import transformers
import yaml
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainingArguments, ViTImageProcessorPil, set_seed

from . import checkpoints, conversion, hub, lora, plots
from .arguments import (
    DataArguments,
    ImageTrainingArguments,
    ModelArguments,
    check_options,
    default_options,
    run_options,
)
from .augmentation import Augmentation, check_padding, parse_until
from .configuration_vit_scratch import ViTScratchConfig
from .data import DIGITS, DecodedImages, ImageSplits, load_splits, public_name
from .inspection import fingerprint, inspect_splits, sample_sheet
from .metrics import ImageClassificationMetrics
from .modeling_vit_scratch import ViTScratchForImageClassification
from .optimization import describe_groups, parameter_groups
from .streaming import StreamedImages, load_streaming
from .trainer import CropEpoch, ImageTrainer, OwnNoise, ResumeLoss, StopOnSignal

logger = logging.getLogger(__name__)

# Smallest share of an image's area that a random crop keeps, where nothing else is given.
CROP_SCALE = 0.35
# Of a time budget: what saving a checkpoint, and pictures and the card at the end, take at most on a slow machine.
SAVE_SECONDS, FINISH_SECONDS = 0.5, 6.0


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
        arguments.preset or "showcase",
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
    next_line = "\n" + " " * (width + 4)  # of a value of several lines
    return "\n".join(f"  {name:<{width}}  {str(value).replace(chr(10), next_line)}" for name, value in rows.items())


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
        per_epoch = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
        epochs = f" ({steps / per_epoch:g} epochs)"
    rows = {
        "model": f"ViT, {config.num_hidden_layers} blocks, width {config.hidden_size}, {config.num_attention_heads} "
        f"heads, MLP {config.intermediate_size}, patch {config.patch_hw[0]}x{config.patch_hw[1]}",
        "parameters": f"{trainer.model.num_parameters():,}{_frozen(trainer.model)}",
        "FLOPs per image": f"{flops_per_image(trainer.model):,} (forward)",
        "data": f"{splits.name}: {', '.join(sizes)} images, {classes}{height}x{width} px, "
        f"column{'s' * (splits.columns[1] is not None)} {' and '.join(filter(None, splits.columns))}",
        "global batch": f"{global_batch} = {args.per_device_train_batch_size} per device x {args.world_size} "
        f"process{'es' * (args.world_size > 1)} x {args.gradient_accumulation_steps} accumulated",
        "steps": f"{steps:,}{epochs}",
        "learning rate": f"{args.learning_rate:.3g}, {args.lr_scheduler_type.value}, last step {rate}",
        "optimizer": describe_groups(parameter_groups(trainer.model, args), args.optim.value),
        "device": f"{hardware(args.device)}, {_precision(args)}",
        "settings": args.settings_from,
        "output": args.output_dir,
    }
    for change in trainer.run_facts["changes"]:
        options = (f"{name} {values[0]} -> {values[1]}" for name, values in change.items() if name != "step")
        rows[f"from step {change['step']:,}"] = ", ".join(options)
    return table(rows)


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
        stem = f"{Path(model.model_name_or_path or model.preset or 'vit').name}-{Path(dataset).name}"
        candidates = (Path("runs") / f"{stem}{f'-{n}' if n > 1 else ''}" for n in range(1, 10_000))
        arguments.output_dir = str(next(folder for folder in candidates if not folder.exists()))
    folder, resume = Path(arguments.output_dir), arguments.resume_from_checkpoint
    checkpoints.recover(folder)
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
        trained = model.model_name_or_path
        if trained and Path(trained).resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{folder} is to be overwritten, but model_name_or_path ({trained}) lies in it; choose another."
            )
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}); choose another --output_dir.") from error


# What a run writes into its output folder. Logs of `--report_to` carry the time of their run, and stay.
RUN_FILES = (
    "checkpoint-*", checkpoints.STAGING, ".hub_push-*", "model*.safetensors", "model.safetensors.index.json",
    "config.json", "preprocessor_config.json", "configuration_vit_scratch.py", "modeling_vit_scratch.py", "README.md",
    "metrics.json", "history.csv", "predictions_*.csv", "samples.png", lora.FOLDER, "plots/training_curves.png",
    "plots/per_class_accuracy.png", "plots/confusion_matrix.png", "plots/reconstructions.png",
)  # fmt: skip


def replace_run(args: ImageTrainingArguments):
    """Remove what the run before left in the output folder, if that is what the options say; all else was in order."""
    if args.overwrite_output_dir and not args.resume_from_checkpoint and args.process_index == 0:
        remove_run(Path(args.output_dir))


def remove_run(folder: Path):
    """Remove what an earlier run left in a folder, and nothing else: no number of it may speak for another run."""
    for path in [path for pattern in RUN_FILES for path in folder.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


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
    """What a checkpoint must share with the run that continues it; and, below "changeable", what it need not."""
    options = args.recorded
    if isinstance(splits.train, StreamedImages):  # which worker reads what decides the order
        options = options | {"stream_workers": args.dataloader_num_workers}
    return {
        **{name: getattr(config, name) for name in ViTScratchConfig.__annotations__},
        "dataset": public_name(splits.name),
        "classes": splits.class_names,
        "images": split_sizes(splits),
        "processes": args.world_size,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        **options,
        "cut": asdict(splits.cut),
        "fingerprint": fingerprint(splits),  # last: what else differs says more
        "changeable": args.changeable,
        "changes": [],
    }


def check_resuming(args: ImageTrainingArguments, facts: dict):
    """Refuse a checkpoint of another run, or note in `facts` what this run does otherwise from here on."""
    if args.resume_from_checkpoint:
        fields = {name: field.default for name, field in ViTScratchConfig.__dataclass_fields__.items()}
        checkpoint = Path(args.resume_from_checkpoint)
        facts["changes"] = checkpoints.check_run(checkpoint, facts, {**fields, **default_options()})


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
    """Check and note the options, settle the output folder, seed everything; the dataset's name."""
    check_options(model_args, data_args, args)
    args.recorded, args.changeable = run_options(model_args, data_args, args)
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
        "crop_scale": CROP_SCALE if data_args.crop_scale is None else data_args.crop_scale,
        "seed": args.seed,
        "cache_dir": model_args.cache_dir,
        "token": model_args.token,
    }


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


def _settle_crops(trainer: ImageTrainer, steps: int, batches: int | None):
    """Tell images that are cropped when they are read when that ends (`augment_until`).

    Args:
        trainer: Of the run.
        steps: Of the run.
        batches: In an epoch; None for a stream.

    Raises:
        ValueError: No epoch begins after that share of the training, and crops can end between two epochs only.
    """
    args, images = trainer.args, trainer.train_dataset
    until = trainer.augmentation.until.get("crop", 1.0)
    if until == 1 or isinstance(images, DecodedImages):
        return
    if isinstance(images, StreamedImages):
        trained = steps * args.gradient_accumulation_steps  # batches
        images.crop_until(math.ceil(until * trained), args.per_device_train_batch_size)
        return
    epochs = steps / math.ceil(batches / args.gradient_accumulation_steps)
    epoch = math.ceil(until * epochs)
    if epoch >= epochs:
        raise ValueError(
            f"augment_until: no epoch begins after {until:g} of {epochs:g} epochs, and random crops of "
            f"images of different sizes end between epochs: train for {math.ceil(1 / (1 - until) - 1e-6)} or more, or "
            "add crop=1 to augment_until."
        )
    images.crop_until(epoch)


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
    _settle_crops(trainer, steps, batches)
    done = _trainer_state(args.resume_from_checkpoint)["global_step"] if args.resume_from_checkpoint else 0
    if steps < done:
        raise ValueError(
            f"{args.resume_from_checkpoint} is past the end: it has taken {done:,} steps, and this run has {steps:,}; "
            "give max_steps or num_train_epochs of that many or more."
        )
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
        "changed_on_resuming": trainer.run_facts["changes"],
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
            "crop_scale": trainer.train_dataset.crop_scale if lazy else None,
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


def describe_machine(trainer: ImageTrainer) -> dict:
    """Time and environment of a run, for `metrics.json`."""
    args, clock = trainer.args, trainer.clock
    cpu = torch.tensor(clock.cpu, dtype=torch.float64)
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
    data_name = begin_run(model_args, data_args, args)

    # A new model takes mean and std from the data; a trained one comes with the processor it was trained with.
    trained = None if model_args.model_name_or_path is None else load_trained(model_args)
    config = make_config(model_args, ["0", "1"]) if trained is None else trained[0].config
    processor = make_processor(config) if trained is None else trained[1]
    settings = data_settings(model_args, data_args, args, config.num_channels)
    with args.main_process_first(desc="loading the data"):
        if data_args.streaming:
            ranks = {"rank": args.process_index, "world_size": args.world_size}
            splits = load_streaming(data_name, processor, **settings, **ranks)
        else:
            settings |= {"max_train_samples": data_args.max_train_samples, "crop_all": data_args.crop_scale is not None}
            splits = load_splits(data_name, processor, **settings)
    if trained is None:
        model = ViTScratchForImageClassification(make_config(model_args, splits.class_names))
        processor = make_processor(config, splits.mean, splits.std)
    else:
        model = with_classes(trained[0], splits.class_names)
    if model_args.freeze_backbone:
        model.vit.requires_grad_(False)
    adapter = None
    if model_args.lora_rank is not None:
        adapter = lora.add_adapter(model, model_args.lora_rank, public_name(model_args.model_name_or_path))
    augmentation = make_augmentation(data_args, args, processor, splits)
    suit_device(args, model, splits)
    stop = StopOnSignal()
    pushes = None
    if args.push_to_hub:  # by the hub wing, which sends everything in one commit, code files included
        args.push_to_hub = False
        repo_id = args.hub_model_id or Path(args.output_dir).name
        pushes = hub.HubPushCallback(repo_id, bool(args.hub_private_repo), args.hub_revision, args.hub_token)
        if is_main:
            hub.prepare_repo(pushes.repo_id, pushes.private, pushes.token)
    facts = run_facts(model.config, splits, args)
    if adapter is not None:  # a checkpoint has the adapter, and the base comes from where it came from
        facts = {"lora": [model_args.lora_rank, public_name(model_args.model_name_or_path)], **facts}
    check_resuming(args, facts)
    if args.resume_from_checkpoint and data_args.streaming:  # what was trained on before is read, but not decoded
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
        callbacks=[stop, CropEpoch(), OwnNoise(), *([pushes] if pushes and args.hub_strategy.value != "end" else [])],
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
    replace_run(args)
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
            "cut": facts["cut"],
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
    metrics |= describe_machine(trainer)
    metrics["command"] = hub.public_command(shlex.join(["python", *sys.argv]), data_name)
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
    hub.write_model_card(folder)
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
