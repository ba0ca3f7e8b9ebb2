"""A classifier's run, from scratch or fine-tuned: from the options to a folder that is a Hub repository."""

from .. import hub, plots
from ..data import inspect_splits
from ..data.doctor import sample_sheet
from ..data.sources import public_name
from ..evaluation import ImageClassificationMetrics
from ..modeling_vit_scratch import ViTScratchForImageClassification
from . import lora
from .arguments import DataArguments, ImageTrainingArguments, ModelArguments
from .models import load_trained, make_config, make_processor, with_classes
from .report import describe, describe_machine, finish, say_what_will_happen, write_numbers, write_predictions
from .run import Run


def finetune(model_args: ModelArguments, data_args: DataArguments, args: ImageTrainingArguments) -> dict | None:
    """Train a classifier as the arguments say, and leave an output folder that is a Hub repository.

    Returns:
        What `metrics.json` holds; empty after a dry run, None if a signal stopped the run.

    Raises:
        ValueError: Something is wrong with the data, the options or the output folder; said before training.
        FloatingPointError: The loss is no longer finite.
    """
    run, pushes = set_up(model_args, data_args, args)
    say_what_will_happen(run)
    if args.dry_run:
        look(run)
        return {}
    if not run.train():
        return None
    if run.trainer.adapter is not None:
        run.trainer.adapter.merge_and_unload()  # in place: what is measured is what the folder holds
    metrics = describe(run) | measure(run) | describe_machine(run)
    if run.is_main:
        report(run, metrics)
        pushed = pushes and pushes.push_final(run.folder)
        if pushed:
            print(f"Pushed to {pushed.url}")
    return metrics


def set_up(
    model_args: ModelArguments, data_args: DataArguments, args: ImageTrainingArguments
) -> tuple[Run, hub.HubPushCallback | None]:
    """The run, ready to train; and what pushes it to the Hub."""
    run = Run(model_args, data_args, args)
    # A new model takes mean and std from the data; a trained one comes with the processor it was trained with.
    trained, processor = (None, None) if model_args.model_name_or_path is None else load_trained(model_args)
    # Two classes stand in for those of the data until they are read.
    config = make_config(model_args, ["0", "1"]) if trained is None else trained.config
    run.load_data(processor or make_processor(config), config.num_channels)
    splits = run.splits
    if trained is None:
        model = ViTScratchForImageClassification(make_config(model_args, splits.class_names))
        processor = make_processor(config, splits.mean, splits.std)
    else:
        model = with_classes(trained, splits.class_names)
    if model_args.freeze_backbone:
        model.vit.requires_grad_(False)
        if model.config.pooling == "attention":  # of the head, and as new as it after masked image modelling
            model.vit.attention_pooling.requires_grad_(True)
    adapter, facts = None, {}
    base = None if trained is None else public_name(model_args.model_name_or_path)
    if model_args.lora_rank is not None:
        adapter = lora.add_adapter(model, model_args.lora_rank, base)
        facts = {"lora": [model_args.lora_rank, base]}  # a checkpoint has the adapter alone, not the base
    run.settle_model(model, processor, **facts)
    pushes = None
    if args.push_to_hub:  # by hub/, which sends everything in one commit, code files included
        args.push_to_hub = False
        repo_id = args.hub_model_id or run.folder.name
        options = {"revision": args.hub_revision, "token": args.hub_token, "base_model": base}
        pushes = hub.HubPushCallback(repo_id, bool(args.hub_private_repo), **options)
        if run.is_main:
            hub.prepare_repo(pushes.repo_id, pushes.private, pushes.token)
    run.make_trainer(adapter=adapter, callbacks=[pushes] if pushes and args.hub_strategy.value != "end" else [])
    run.settle_steps()
    return run, pushes


def look(run: Run):
    """The dry run: one batch, what is wrong with the data, and a sheet of images as the model sees them."""
    batch = next(iter(run.trainer.get_train_dataloader()))
    images = run.augmentation(batch["pixel_values"][:2].to(run.args.device), 0, run.args.process_index)
    run.model(images, labels=batch["labels"][:2].to(run.args.device)).loss.backward()
    if run.is_main:
        print(inspect_splits(run.splits))
        sheet = sample_sheet(run.splits, run.augmentation, run.folder / "samples.png")
        print(f"Images as the model sees them: {sheet}\nDry run: one batch and the output folder are in order.")


def measure(run: Run) -> dict:
    """Numbers of validation and test, by split; each image's prediction goes into `predictions_*.csv`."""
    return {split: _measure_split(run, split) for split in run.parts if split != "train"}


def _measure_split(run: Run, split: str) -> dict:
    trainer, names, part = run.trainer, run.splits.class_names, run.parts[split]
    prediction = trainer.predict(part, metric_key_prefix=split)
    result = ImageClassificationMetrics().compute(predictions=prediction.predictions, references=prediction.label_ids)
    numbers = {
        "examples": result["examples"],
        "loss": prediction.metrics[f"{split}_loss"],
        "accuracy": result["accuracy"],
        "top5_accuracy": result["top5_accuracy"],
        "per_class_accuracy": dict(zip(names, result["per_class_accuracy"], strict=True)),
        "confusion_matrix": result["confusion_matrix"],
    }
    if run.args.flip_tta:
        trainer.mirrored = True
        both = prediction.predictions + trainer.predict(part, metric_key_prefix=split).predictions
        trainer.mirrored = False
        flipped = ImageClassificationMetrics().compute(predictions=both, references=prediction.label_ids)
        numbers["flip_tta_accuracy"] = flipped["accuracy"]
    if run.is_main:
        records = run.splits.records[split]
        # Validation may be cut from train: the records know where they lie.
        files = records.files(getattr(run.data_args, f"{records.split}_dir", None) or run.data_name)
        write_predictions(run.folder, split, prediction.predictions, prediction.label_ids, records.rows, names, files)
    return numbers


def report(run: Run, metrics: dict):
    """Write what people look at: numbers, curves, card; say the result."""
    logged = write_numbers(run, metrics)
    measured = {split: metrics[split] for split in ("validation", "test") if split in metrics}
    names, result = metrics["dataset"]["class_names"], list(measured.values())[-1]
    figures = {
        "per_class_accuracy": plots.plot_per_class_accuracy(list(result["per_class_accuracy"].values()), names),
        "confusion_matrix": plots.plot_confusion_matrix(result["confusion_matrix"], names),
    }
    shown = {}
    for split, part in measured.items():
        flipped = f"; with mirror images {part['flip_tta_accuracy']:.2%}" if "flip_tta_accuracy" in part else ""
        top5 = f"top-5 {part['top5_accuracy']:.2%}, " if len(names) > 5 else ""  # else the right class is always there
        shown[f"{split} accuracy"] = (
            f"{part['accuracy']:.2%}  ({top5}loss {part['loss']:.4f}, {part['examples']:,} images){flipped}"
        )
    finish(run, metrics, figures, logged, shown)
