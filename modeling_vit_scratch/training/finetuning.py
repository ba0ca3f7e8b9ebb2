"""Fine-tuning: a whole run, from the arguments to the model card."""

import shlex
import sys
import time
from pathlib import Path

from .. import hub, model_card
from ..data import inspect_splits, load_splits, load_streaming
from ..data.doctor import sample_sheet
from ..data.sources import public_name
from ..evaluation import ImageClassificationMetrics
from ..modeling_vit_scratch import ViTScratchForImageClassification
from . import lora
from .arguments import DataArguments, ImageTrainingArguments, ModelArguments
from .output import check_space, replace_run
from .report import (
    describe_machine,
    describe_training,
    finish,
    flops_per_image,
    parts_of,
    say_how_to_resume,
    split_sizes,
    write_predictions,
)
from .run import (
    begin_run,
    check_resuming,
    data_settings,
    load_trained,
    make_augmentation,
    make_config,
    make_processor,
    move_small_data,
    run_facts,
    settle_steps,
    suit_device,
    trainer_state,
    with_classes,
)
from .trainer import CropEpoch, ImageTrainer, OwnNoise, ResumeLoss, StopOnSignal


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
    if args.push_to_hub:  # by hub.py, which sends everything in one commit, code files included
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
        step = trainer_state(args.resume_from_checkpoint)["global_step"]
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
    for split in [name for name in ("validation", "test") if name in parts_of(splits)]:
        prediction = trainer.predict(parts_of(splits)[split], metric_key_prefix=split)
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
            mirrored = trainer.predict(parts_of(splits)[split], metric_key_prefix=split).predictions
            trainer.mirrored = False
            both = ImageClassificationMetrics().compute(
                predictions=prediction.predictions + mirrored, references=prediction.label_ids
            )
            metrics[split]["flip_tta_accuracy"] = both["accuracy"]
        if is_main:
            rows = splits.records[split].rows
            write_predictions(folder, split, prediction.predictions, prediction.label_ids, rows, splits.class_names)
    metrics |= describe_machine(trainer)
    metrics["command"] = model_card.public_command(shlex.join(["python", *sys.argv]), data_name)
    if is_main:
        finish(folder, metrics, trainer.state.log_history)
        pushed = pushes and pushes.push_final(folder)
        if pushed:
            print(f"Pushed to {pushed.url}")
    return metrics
