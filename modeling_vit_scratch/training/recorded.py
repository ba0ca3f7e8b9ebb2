"""What a run records of its options, and which of them it may change when it is resumed."""

import json
from dataclasses import MISSING, fields
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from .arguments import DataArguments, ImageTrainingArguments, ModelArguments

# Options that a resumed run may change: its length, what it runs on, what is measured, logged, saved and sent. Every
# other option is part of what the run computes, and resuming with another value is refused (`run_options`).
CHANGEABLE = frozenset({
    "max_steps", "num_train_epochs", "load_best_model_at_end", "flip_tta", "use_cpu", "bf16", "fp16", "tf32",
    "bf16_full_eval", "fp16_full_eval", "torch_compile", "torch_compile_backend", "torch_compile_mode",
    "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "use_liger_kernel", "liger_kernel_config", "use_cache", "torch_empty_cache_steps",
    "full_determinism", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout",
    "per_device_eval_batch_size", "eval_accumulation_steps", "eval_use_gather_object", "eval_strategy", "eval_steps",
    "eval_delay", "eval_on_start", "logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter",
    "log_on_each_node",
    "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id",
    "trackio_bucket_id", "trackio_static_space_id", "skip_memory_metrics", "include_num_input_tokens_seen", "debug",
    "save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit", "enable_jit_checkpoint",
    "push_to_hub", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision", "do_train",
    "do_eval", "do_predict",
})  # fmt: skip
# Options of one call alone, of which no run keeps a record.
OF_THE_CALL = frozenset({
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run", "cache_dir", "token", "hub_token",
    "local_rank",
})  # fmt: skip
# Options recorded in another form: the architecture that comes of them, and the data's fingerprint.
RECORDED_OTHERWISE = frozenset({
    "preset", "config_overrides", "image_size", "dataset_name", "train_dir", "validation_dir", "test_dir",
    "dataset_config_name", "image_column_name", "label_column_name", "streaming",
})  # fmt: skip


def run_options(*groups) -> tuple[dict, dict]:
    """The options of a run, as JSON has them: (those that it must keep when it is resumed, those that it may change).

    Paths of models are cut to their last component: a folder may have moved.

    Args:
        *groups: `ModelArguments`, `DataArguments`, `ImageTrainingArguments`, or some of them.
    """
    values = {}
    for group in groups:  # TrainingArguments masks its tokens
        values |= group.to_dict() if isinstance(group, TrainingArguments) else dict(vars(group))
    values = {name: value for name, value in values.items() if name not in OF_THE_CALL | RECORDED_OTHERWISE}
    if values.get("model_name_or_path"):
        values["model_name_or_path"] = Path(values["model_name_or_path"]).name
    values = json.loads(json.dumps(values, default=str))
    kept = {name: value for name, value in values.items() if name not in CHANGEABLE}
    return kept, {name: value for name, value in values.items() if name in CHANGEABLE}


def default_options() -> dict:
    """What `run_options` must keep, where nothing was given.

    From the fields alone: to make a TrainingArguments would take the process out of its process group.
    """
    accelerator = AcceleratorConfig().to_dict()
    del accelerator["use_configured_state"]  # as `TrainingArguments` does
    values = {"accelerator_config": accelerator, "greater_is_better": True, "include_for_metrics": []}
    for group in (ModelArguments, DataArguments, ImageTrainingArguments):
        for option in fields(group):
            default = option.default if option.default_factory is MISSING else option.default_factory()
            values.setdefault(option.name, getattr(default, "value", default))
    return {name: value for name, value in values.items() if name not in CHANGEABLE | OF_THE_CALL | RECORDED_OTHERWISE}
