"""Several processes: whether they found each other, how they may share a model, and what is said when one dies."""

import os
import shlex
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from accelerate.utils import DynamoBackend, broadcast_object_list
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from ..modeling_vit_scratch import ViTScratchLayer
from . import checkpoints

FSDP2 = "scripts/launch/fsdp2.yaml"
# The weights of a sharded run, in its checkpoints.
SHARDED_WEIGHTS = "pytorch_model_fsdp.bin"
# Set by `accelerate launch` where its configuration shards.
_USE_FSDP = "ACCELERATE_USE_FSDP"
# Programs that start the processes of a run, and those of them that are modules.
_LAUNCHERS = ("torchrun", "accelerate", "accelerate-launch")
_LAUNCHER_MODULES = (
    "torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli",
)  # fmt: skip
# What torchrun or accelerate, srun, and mpirun (Open MPI's; MPICH's and Intel's) tell each process of their number. A
# job of many tasks can have a step of one, or none yet: SLURM_NTASKS is not the step's.
_STARTED_TOGETHER = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# How gloo, NCCL and torch's stores say that another process no longer answers: what each says of other things has none
# of these phrases.
_LOST = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "Wait timeout",
    "Connection was likely closed", "remote process exit",
)  # fmt: skip


class RunLost(RuntimeError):
    """Training cannot go on here; the text says why, what is kept, and how to go on."""


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def asks_for_sharding(args: TrainingArguments) -> bool:
    """Whether the options, or accelerate's environment, ask for weights of which each process has a part (FSDP)."""
    return bool(args.fsdp) or _is_set(_USE_FSDP)


def refuse_engines(args: TrainingArguments):
    """Refuse what would share a model between processes in a way that was never run here.

    Raises:
        ValueError: Names it, and what there is in its place.
    """
    asked = {
        "deepspeed": args.deepspeed or _is_set("ACCELERATE_USE_DEEPSPEED"),
        "Megatron-LM": _is_set("ACCELERATE_USE_MEGATRON_LM"),
        "parallelism_config (tensor, context and sequence parallelism)": (
            args.parallelism_config is not None or _is_set("ACCELERATE_USE_PARALLELISM_CONFIG")
        ),
    }
    for name, holds in asked.items():
        if holds:
            raise ValueError(f"{name} is not supported: for a model that outgrows one GPU there is {FSDP2}.")


def require_joined(args: TrainingArguments):
    """Refuse processes that were started together, but of which each would train alone, into the same folder.

    Raises:
        ValueError: Names what joins them.
    """
    for variable in _STARTED_TOGETHER:
        started = os.environ.get(variable, "1")
        if not started.isdecimal() or int(started) == 1 or args.world_size > 1:
            continue
        device = args.device.type
        if variable != "WORLD_SIZE":
            advice = f"start them by torchrun or accelerate, or, if they are runs of their own, unset {variable}"
        elif device in ("cpu", "mps"):
            advice = "give --use_cpu True"
        else:
            advice = "start them by torchrun, which sets LOCAL_RANK too"
        raise ValueError(f"{variable} is {started}, but each process would train alone on its {device}: {advice}.")


def found_by_main(args: TrainingArguments, find: Callable):
    """What the main process finds, in all processes; so too its error, if what the options name is wrong.

    Args:
        args: Of the run.
        find: Called without arguments, in the main process alone.

    Raises:
        ValueError: Of `find`; likewise OSError.
    """
    found = error = None
    if args.process_index == 0:
        try:
            found = find()
        except (ValueError, OSError) as caught:
            error = caught
    if args.world_size > 1:
        found, error = broadcast_object_list([found, error])
    if error is not None:
        raise error
    return found


def is_compiled(trainer) -> bool:
    """Whether the steps of the run will be compiled: because of an option, or of what accelerate was launched with."""
    return trainer.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO


def settle_sharding(trainer):
    """Refuse what does not go with weights of which each process has a part (FSDP2, by accelerate); name the parts.

    Args:
        trainer: An `ImageTrainer`, made.

    Raises:
        ValueError: Names the option, and what to do.
    """
    args, plugin = trainer.args, getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()):
        raise ValueError(
            f"the model is sharded already (distributed_config): load it whole, and have accelerate shard it ({FSDP2})."
        )
    sharded = trainer.is_fsdp_enabled
    if not sharded and asks_for_sharding(args):
        raise ValueError(
            "sharding (FSDP) was asked for, but accelerate gives each process a whole model on a CPU: leave it out, or "
            "train on GPUs."
        )
    resumed = args.resume_from_checkpoint
    if resumed and sharded != (Path(resumed) / SHARDED_WEIGHTS).is_file():
        how, other = ("without", "with") if sharded else ("with", "without")
        raise ValueError(f"{resumed} was saved {how} sharding (FSDP), and cannot be resumed {other} it.")
    if not sharded:
        return
    refused = {
        "ema_decay follows whole weights": args.ema_decay is not None,
        "lora_rank merges whole weights": trainer.adapter is not None,
        "time_budget rehearses with a whole model": args.time_budget is not None,
        "torch_compile (accelerate's dynamo_backend) was never tried": args.torch_compile or is_compiled(trainer),
    }
    for text, holds in refused.items():
        if holds:
            raise ValueError(f"{text}, and sharding (FSDP) takes weights apart: leave it out.")
    if args.optim == "sgd" and (args.save_strategy != "no" or resumed):  # torch loads no empty state into shards
        raise ValueError("optim (sgd) cannot be resumed with sharding (FSDP): take adamw_torch, or --save_strategy no.")
    kind = getattr(plugin.state_dict_type, "name", str(plugin.state_dict_type))
    by_blocks = getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy) is transformer_auto_wrap_policy
    policy = "TRANSFORMER_BASED_WRAP" if by_blocks else "another"
    settings = {
        "fsdp_version": (getattr(plugin, "fsdp_version", 1), 2),
        "fsdp_state_dict_type": (kind, "FULL_STATE_DICT"),
        "fsdp_auto_wrap_policy": (policy, "TRANSFORMER_BASED_WRAP"),
        "fsdp_cpu_ram_efficient_loading": (bool(plugin.cpu_ram_efficient_loading), False),
    }
    for name, (value, supported) in settings.items():
        if value != supported:
            raise ValueError(f"{name} is {value}, but only {supported} is supported, as in {FSDP2}.")
    # The model's own list has its embeddings too. accelerate shards the patches' projection in any case: twice then,
    # which fails.
    plugin.transformer_cls_names_to_wrap = [ViTScratchLayer.__name__]
    # Patches are a view, and torch warns of it in each run; nothing is done to them in place.
    view = r"FSDP2-wrapped module \(FSDPViTScratch\w*PatchEmbeddings\) returned a view"
    warnings.filterwarnings("ignore", message=view, category=UserWarning)


def launcher() -> list[str]:
    """The words before the script in the command that started this process, as they were typed.

    Without torchrun or accelerate it is python; where these started it, but cannot be asked, `common_launcher`.
    """
    with suppress(psutil.Error, ValueError, AttributeError):
        words = psutil.Process().parent().cmdline()
        before = words[: words.index(sys.argv[0])]
        names = [Path(word).name for word in before]
        for position, (name, word) in enumerate(zip(names, before, strict=True)):
            if name in _LAUNCHERS:
                return [name, *before[position + 1 :]]
            if word in _LAUNCHER_MODULES:
                return ["python", "-m", *before[position:]]
    return common_launcher()


def common_launcher() -> list[str]:
    """A launcher that starts as many processes as there are, sharded if they are, without names of machines."""
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    several = [] if machines == 1 else [str(machines)]
    if _is_set(_USE_FSDP):
        several = [word for count in several for word in ("--num_machines", count)]
        return ["accelerate", "launch", "--config_file", FSDP2, *several, "--num_processes", str(processes)]
    if not torch.distributed.is_initialized():
        return ["python"]
    several = [word for count in several for word in ("--nnodes", count)]
    return ["torchrun", *several, "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", str(processes // machines))]


def how_to_continue(args: TrainingArguments) -> str:
    """The command that goes on from the last whole checkpoint, on a line of its own."""
    options = ["--output_dir", args.output_dir, "--resume_from_checkpoint", "last"]
    command = shlex.join([*launcher(), *_without_resuming(sys.argv), *options])
    where = " (on each machine, with its own rank)" if os.environ.get("GROUP_WORLD_SIZE", "1") != "1" else ""
    return f"To continue{where}:\n  {command}"


def _without_resuming(command: list[str]) -> list[str]:
    """A command without the options that are about to be added to it."""
    kept, skip = [], False
    for word in command:
        if not skip and word.partition("=")[0] not in ("--output_dir", "--resume_from_checkpoint"):
            kept.append(word)
        skip = word in ("--output_dir", "--resume_from_checkpoint")
    return kept


def what_is_kept(args: TrainingArguments) -> str:
    """The last whole checkpoint, and how to go on from it, in words."""
    good, _ = checkpoints.last_good_checkpoint(Path(args.output_dir))
    if good is None:
        return "There is no whole checkpoint yet: begin anew."
    return f"The last whole checkpoint is {good}. {how_to_continue(args)}"


def say_lost(error: RuntimeError, args: TrainingArguments) -> str | None:
    """What to tell of an error by which a process notices that another one has ended; None of any other error."""
    text = str(error).lower()
    reason = next((phrase for phrase in _LOST if phrase.lower() in text), None)
    if args.world_size == 1 or reason is None or "dataloader" in text:  # which has processes of its own
        return None
    return f"another process of the run has ended or does not answer ({reason}). {what_is_kept(args)}"
