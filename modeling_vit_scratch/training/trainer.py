"""transformers' Trainer with augmentation on the device, exact resuming, averaged weights and a clock."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from ..conversion.exporting import open_to_others
from ..data import Augmentation
from ..data.augmentation import normalize
from ..data.splits import as_batch
from ..data.streaming import StreamedImages
from ..evaluation import ImageClassificationMetrics
from ..modeling_vit_scratch import image_classification_loss
from . import checkpoints, lora
from .callbacks import Clock, UpdateAverage, keep_workers
from .optimization import Muon, WeightAverage, parameter_groups
from .processes import RunLost, settle_sharding, what_is_kept
from .progress import Progress

# In a checkpoint of a run that averages weights: those that are trained; `model.safetensors` has the average.
TRAINED_WEIGHTS = "trained_weights.safetensors"


class ImageTrainer(Trainer):
    """Trainer for batches of bytes: augments and normalises on the device, and splits the loss exactly.

    Args:
        augmentation: Applied to training batches; evaluation only normalises, with the same mean and std.
        run_facts: What a run must share with a checkpoint to continue it; saved with each (`checkpoints.check_run`).
        adapter: Of `lora.add_adapter`, around the model; folders then hold the merged model, and the adapter in it.
        **kwargs: As for Trainer.
    """

    def __init__(self, augmentation: Augmentation, run_facts: dict, adapter=None, **kwargs):
        super().__init__(data_collator=as_batch, compute_metrics=self._metrics, compute_loss_func=self._loss, **kwargs)
        self.adapter = adapter
        self.augmentation = augmentation
        self.run_facts = run_facts
        settle_sharding(self)
        self.average = None if self.args.ema_decay is None else WeightAverage(self.model, self.args.ema_decay)
        self.clock = Clock(self.args.device)
        self.add_callback(self.clock)
        self.progress = Progress(self.clock, self._summed_loss)
        if self.pop_callback(ProgressCallback) or self.pop_callback(PrinterCallback):  # a notebook keeps its table
            self.add_callback(self.progress)
        self.mirrored = False  # whether predictions are made of the images' mirror images
        self.resumed_at = 0  # steps that earlier parts of the run have taken
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
        return training_loss(labels, outputs.logits, self.model.config, smoothing, num_items_in_batch)

    def training_inputs(self, batch: dict, step: int, progress: float) -> dict:
        """What the model is trained on: augmented and normalised.

        Args:
            batch: As `as_batch` makes it, on the device.
            step: Batches this process has trained on before.
            progress: Share of the training that is done, in [0, 1].
        """
        images, labels = self.augmentation.with_labels(
            batch["pixel_values"], batch["labels"], step, self.args.process_index, progress, self._flips(batch)
        )
        inputs = {"pixel_values": images, "labels": labels}
        resized = images.shape[2:] != batch["pixel_values"].shape[2:]  # progressive resizing
        return {**inputs, "interpolate_pos_encoding": True} if resized else inputs

    def _flips(self, batch: dict) -> torch.Tensor | None:
        """Which images are mirrored, where that alternates from epoch to epoch."""
        first = batch.get("first_flips")
        return None if first is None else first ^ bool(int(self.state.epoch or 0) % 2)

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
        if asked:
            self.clock.stop()
        super()._maybe_log_save_evaluate(tr_loss, *args, learning_rate=learning_rate, **kwargs)
        if asked and not self.control.should_training_stop:
            self.clock.start()

    def _summed_loss(self) -> float:
        """Of the steps since the run was begun or resumed, in this process: those logged, whose loss is that of all
        processes, and those that are not yet.
        """
        return self._total_loss_scalar + self._tr_loss.item()

    def log(self, logs, *args, **kwargs):
        if "train_loss" in logs:  # of this part of a run; Trainer counts its steps otherwise in each version
            steps = self.state.global_step - self.resumed_at
            if steps == 0:  # resumed after the last step: nothing was measured
                return
            logs["train_loss"] = self._total_loss_scalar / steps
        super().log(logs, *args, **kwargs)

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
        try:
            result = super().train(*args, **kwargs)
        finally:
            self.progress.close()
        if self.average is not None:  # what the run ends with is what was measured
            if not self._ends_with_best:
                self.average.swap()
            self.average = None
        return result

    @property
    def _ends_with_best(self) -> bool:
        return self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None

    @property
    def kept_step(self) -> int:
        """The step whose weights the trained model has."""
        return self.state.best_global_step if self._ends_with_best else self.state.global_step

    def _run_epoch(self, **kwargs):
        if self.state.global_step < self.state.max_steps:
            if self.state.global_step > self.resumed_at or self.resumed_at == 0:
                self.clock.start()  # else with the first step: what was trained on before is only passed over
            return super()._run_epoch(**kwargs)
        self.control.should_training_stop = True  # resumed after the last step; Trainer would take one more

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.adapter is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            lora.load_adapter(self.adapter, Path(resume_from_checkpoint) / lora.FOLDER)
        if self.average is not None:
            self.average.load(Path(resume_from_checkpoint) / TRAINED_WEIGHTS)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler = self.lr_scheduler
        if checkpoint is not None and isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            # Of another number of steps, the schedule is another: the checkpoint has the old one's rates.
            factors = (factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas)
            scheduler._last_lr = [rate * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)]
            for group, rate in zip(self.optimizer.param_groups, scheduler._last_lr, strict=True):
                group["lr"] = rate

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
        open_to_others(folder)
        # A pickle of the arguments, the Hub token among them, that nothing reads back.
        (folder / "training_args.bin").unlink(missing_ok=True)

    def _save_checkpoint(self, model, trial):
        """As Trainer does, but aside; the folder takes its name once it is whole.

        Raises:
            RunLost: A file cannot be written, or an older checkpoint not removed; what is kept, and how to go on.
        """
        try:
            self._stage_and_publish(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            name = f"checkpoint-{self.state.global_step}"
            raise RunLost(f"{name} could not be saved ({reason}). {what_is_kept(self.args)}") from error

    def _stage_and_publish(self, model, trial):
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
            open_to_others(staging / name)
        pending = {"loss": self._tr_loss.item(), "last_logged": self._globalstep_last_logged}
        if self.progress.training:
            pending |= {"since": self.progress.since, "loss_since": self._summed_loss() - self.progress.before}
        (staging / name / f"pending_loss_{self.args.process_index}.json").write_text(json.dumps(pending))
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(folder / f"checkpoint-{self.state.best_global_step}")
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(staging / name / "trainer_state.json")
            (staging / name / checkpoints.RUN).write_text(json.dumps(self.run_facts, indent=1) + "\n")
            checkpoints.publish(staging / name, folder / name)
            shutil.rmtree(staging, ignore_errors=True)
            try:
                rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint)
            except OSError as error:  # the checkpoint itself is whole
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                kept = what_is_kept(self.args)
                raise RunLost(f"a checkpoint before {name} could not be removed ({reason}). {kept}") from error
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
        return keep_workers(
            torch.utils.data.DataLoader(
                self.train_dataset,
                batch_size=self.args.train_batch_size,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
            )
        )

    def _get_dataloader(self, *args, is_training=False, **kwargs):
        """As Trainer does, but `dataloader_drop_last` is for training: every image is measured."""
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            return keep_workers(super()._get_dataloader(*args, is_training=is_training, **kwargs))
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


def training_loss(
    labels: torch.Tensor, logits: torch.Tensor, config, label_smoothing: float = 0.0, num_items_in_batch=None
) -> torch.Tensor:
    """The model's loss, with what Trainer adds to it.

    Args:
        labels: As in `image_classification_loss`.
        logits: (B, K).
        config: The model's.
        label_smoothing: In [0, 1]; the share of each label spread evenly over all classes; single label only.
        num_items_in_batch: Number of examples in the whole accumulated batch; the loss is then scaled to it.
    """
    B, K = logits.shape
    single = config.problem_type == "single_label_classification" or (config.problem_type is None and K > 1)
    if label_smoothing and single and not labels.is_floating_point():
        loss = torch.nn.functional.cross_entropy(
            logits.float(), labels.to(logits.device).reshape(-1), label_smoothing=label_smoothing
        )
    else:
        if label_smoothing and single:
            labels = (1 - label_smoothing) * labels + label_smoothing / K
        loss = image_classification_loss(labels, logits, config)
    return loss if num_items_in_batch is None else loss * B / num_items_in_batch
