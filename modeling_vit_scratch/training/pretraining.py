"""Pre-training without labels: SimMIM (Xie et al., 2022) hides parts of an image, and the model paints them.

`pretrain` is a whole run, as `finetune` is; the folder it leaves is one that `finetune` starts from
(`--model_name_or_path`): the encoder is taken, the decoder left out.
"""

import torch
from torch.utils.data import default_collate
from transformers import ViTImageProcessorPil

from .. import plots
from ..configuration_vit_scratch import ViTScratchConfig
from ..data.augmentation import draw_mask, normalize
from ..modeling_vit_scratch import ViTScratchForMaskedImageModeling
from .arguments import MASKED, DataArguments, ImageTrainingArguments, ModelArguments
from .models import load_trained, make_config, make_processor
from .report import describe, describe_machine, finish, say_what_will_happen, write_numbers
from .run import Run
from .trainer import ImageTrainer

# The held-out images are hidden in the same places each time, whatever the step.
_HELD_OUT = 4
SHOWN = 8


class MaskedImageTrainer(ImageTrainer):
    """ImageTrainer that hides patches and measures the error of what the model paints there.

    Args:
        mask_ratio: Share of the image that is hidden, in (0, 1).
        mask_hw: Pixels (height, width) of a square that is hidden or shown whole.
        **kwargs: As for ImageTrainer.
    """

    def __init__(self, *args, mask_ratio: float, mask_hw: tuple[int, int], **kwargs):
        super().__init__(*args, **kwargs)
        self.mask_ratio, self.mask_hw = mask_ratio, mask_hw
        self.compute_metrics = self.compute_loss_func = None  # the model has its loss, and there is nothing to count

    def mask(self, batch: int, *key: int) -> torch.Tensor:
        """Where images are hidden: bool (batch, h, w), a function of the seed and the key."""
        config = self.model.config
        units = [max(side // patch, 1) for side, patch in zip(self.mask_hw, config.patch_hw, strict=True)]
        drawn = draw_mask(batch, config.grid_hw, units, self.mask_ratio, (self.args.seed, *key))
        return drawn.to(self.args.device)

    def training_inputs(self, batch, step, progress):
        rank = self.args.process_index
        images = self.augmentation(batch["pixel_values"], step, rank, progress, self._flips(batch))
        return {"pixel_values": images, "bool_masked_pos": self.mask(len(images), step, rank)}

    def held_out_inputs(self, images: torch.Tensor) -> dict:
        """uint8 (B, C, H, W), normalised and hidden in places that depend on the seed alone."""
        images = normalize(images.to(self.args.device), self.augmentation.mean, self.augmentation.std)
        return {"pixel_values": images, "bool_masked_pos": self.mask(len(images), 0, 0, _HELD_OUT)}

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**self.held_out_inputs(inputs["pixel_values"])).loss
        return loss.detach(), None, None


def make_model(
    model_args: ModelArguments,
) -> tuple[ViTScratchForMaskedImageModeling, ViTImageProcessorPil | None]:
    """A new model, or one with a trained encoder and a new decoder; and the trained one's image processor."""
    if model_args.model_name_or_path is None:
        config = make_config(model_args, ["0", "1"])
        config.problem_type = None
        return ViTScratchForMaskedImageModeling(config), None
    trained, processor = load_trained(model_args)
    trained.config.encoder_stride = trained.config.patch_size
    model = ViTScratchForMaskedImageModeling(trained.config)
    model.vit.load_state_dict(trained.vit.state_dict(), strict=False)  # all but the mask token
    return model, processor


def _check(model_args: ModelArguments, data_args: DataArguments, args: ImageTrainingArguments):
    """Refuse options that pre-training does not read."""
    unread = {
        "label_column_name": data_args.label_column_name,
        "test_dir": data_args.test_dir,
        "head_learning_rate": args.head_learning_rate,
        "freeze_backbone": model_args.freeze_backbone,
        "lora_rank": model_args.lora_rank,
        "streaming": data_args.streaming,
        "mixup_alpha": data_args.mixup_alpha,
        "cutmix_alpha": data_args.cutmix_alpha,
        "label_smoothing_factor": args.label_smoothing_factor,
        "flip_tta": args.flip_tta,
        "push_to_hub": args.push_to_hub,
        "metric_for_best_model": args.metric_for_best_model == "top5_accuracy",
    }
    given = [name for name, value in unread.items() if value]
    if given:
        raise ValueError(f"{', '.join(given)}: not with --task {MASKED}, which knows no labels.")
    if not 0 < data_args.mask_ratio < 1:
        raise ValueError(f"mask_ratio ({data_args.mask_ratio}) must be in (0, 1), e.g. 0.6.")
    if args.metric_for_best_model == "accuracy":
        args.metric_for_best_model, args.greater_is_better = "loss", False


def _mask_hw(config: ViTScratchConfig, pixels: int | None) -> tuple[int, int]:
    """Pixels (height, width) of the squares that are hidden."""
    if pixels is None:
        return config.patch_hw
    for name, patch, image in zip(("height", "width"), config.patch_hw, config.image_hw, strict=True):
        if pixels % patch or pixels > image:
            raise ValueError(
                f"mask_patch_size ({pixels}) must be a multiple of the patch's {name} ({patch}), and at most the "
                f"image's ({image}); use {patch}."
            )
    return pixels, pixels


def pretrain(model_args: ModelArguments, data_args: DataArguments, args: ImageTrainingArguments) -> dict | None:
    """Pre-train an encoder as the arguments say, and leave a folder that fine-tuning starts from.

    Returns:
        What `metrics.json` holds; empty after a dry run, None if a signal stopped the run.

    Raises:
        ValueError: Something is wrong with the data, the options or the output folder; said before training.
        FloatingPointError: The loss is no longer finite.
    """
    run = set_up(model_args, data_args, args)
    say_what_will_happen(run)
    if args.dry_run:
        look(run)
        return {}
    if not run.train():
        return None
    metrics = describe(run) | measure(run) | describe_machine(run)
    metrics["training"] |= {"mask_ratio": data_args.mask_ratio, "mask_patch_size": run.facts["mask_patch_size"]}
    if run.is_main:
        report(run, metrics)
    return metrics


def set_up(model_args: ModelArguments, data_args: DataArguments, args: ImageTrainingArguments) -> Run:
    """The run, ready to train."""
    _check(model_args, data_args, args)
    run = Run(model_args, data_args, args)
    model, processor = make_model(model_args)
    mask_hw = _mask_hw(model.config, data_args.mask_patch_size)
    run.load_data(processor or make_processor(model.config), model.config.num_channels, labelled=False)
    processor = processor or make_processor(model.config, run.splits.mean, run.splits.std)
    run.settle_model(model, processor, mask_patch_size=list(mask_hw))
    run.make_trainer(MaskedImageTrainer, mask_ratio=data_args.mask_ratio, mask_hw=mask_hw)
    run.settle_steps()
    return run


def look(run: Run):
    """The dry run: one batch."""
    batch = run.trainer._prepare_inputs(next(iter(run.trainer.get_train_dataloader())))
    run.model(**run.trainer.training_inputs(batch, 0, 0.0)).loss.backward()
    if run.is_main:
        print("Dry run: one batch and the output folder are in order.")


def measure(run: Run) -> dict:
    """The error on the images held out."""
    held_out = run.splits.validation
    loss = run.trainer.evaluate(held_out, metric_key_prefix="validation")["validation_loss"]
    return {"validation": {"examples": len(held_out), "loss": loss}}


@torch.no_grad()
def report(run: Run, metrics: dict):
    """Write what people look at: numbers, curve, reconstructions, card; say the result."""
    trainer, dataset = run.trainer, run.splits.validation
    logged = write_numbers(run, metrics)
    images = default_collate([dataset[i] for i in range(min(SHOWN, len(dataset)))])["pixel_values"]
    inputs = trainer.held_out_inputs(images)
    # Of the folder: where the run's own model is sharded, each process would have to take part.
    model = ViTScratchForMaskedImageModeling.from_pretrained(run.folder).to(run.args.device)
    painted = model.eval()(**inputs).reconstruction.cpu()
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (run.augmentation.mean, run.augmentation.std))
    mask = inputs["bool_masked_pos"].cpu()
    figure = plots.plot_reconstructions(images.cpu(), mask, (painted * std + mean).clamp(0, 1))
    loss = f"{metrics['validation']['loss']:.4f} standard deviations from each hidden pixel, {len(dataset):,} images"
    further = f"python scripts/finetune.py --model_name_or_path {run.folder} --dataset_name ..."
    finish(run, metrics, {"reconstructions": figure}, logged, {"validation loss": loss}, {"fine-tune it": further})
