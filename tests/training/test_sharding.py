"""FSDP2 by accelerate, as scripts/launch/fsdp2.yaml asks for it, on two CPU processes that stand in for two GPUs.

accelerate shards on accelerators alone, and gives each CPU process a whole model without a word. Here it is told that
the processes have one each, whose device is the CPU; all else is what it does on GPUs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType, TorchDynamoPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from runs import ROOT, SCRIPTS, fork_run, free_port, history, options, wait_all, weights
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from modeling_vit_scratch import ViTScratchConfig
from modeling_vit_scratch.modeling_vit_scratch import ViTScratchLayer
from modeling_vit_scratch.training import checkpoints, processes

# Adam amplifies the rounding of gradients that are truly zero.
ADAM = 1e-3
CONFIG = SCRIPTS / "launch" / "fsdp2.yaml"
STAND_IN = """
import sys
from accelerate.state import PartialState
from accelerate.utils import DistributedType
PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
sys.path.insert(0, {scripts!r})
import finetune
from modeling_vit_scratch.evaluation import devices
devices.cpu_capabilities = dict  # Muon computes in float32 here too, as in the tests' own process
sys.exit(finetune.main())
"""


def settings(folder: Path, **changes) -> list[str]:
    """Six steps by Muon and AdamW, with an epoch's smaller batch, clipping and validations."""
    settings = {"muon_learning_rate": 0.02, "num_train_epochs": 2, "save_total_limit": 9, "use_cpu": None}
    return options(folder, **settings | changes)


SGD = {"optim": "sgd", "muon_learning_rate": None, "learning_rate": 0.1, "save_strategy": "no"}


@pytest.fixture
def sharding(monkeypatch):
    """What `accelerate launch --config_file scripts/launch/fsdp2.yaml` puts into the environment of each process."""
    argv = ["--config_file", str(CONFIG), "--num_processes", "2", "--main_process_port", "0", "finetune.py"]
    launched, _, _ = _validate_launch_command(launch_command_parser().parse_args(argv))
    for name, value in prepare_multi_gpu_env(launched).items():
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    monkeypatch.setattr(PartialState, "_prepare_backend", lambda self, *args: ("gloo", DistributedType.MULTI_GPU))
    return monkeypatch


def run(argv: list[str], processes: int = 2, codes=(0, 0)):
    log = Path(argv[argv.index("--output_dir") + 1]).with_suffix(".log")
    assert wait_all(fork_run(argv, processes, log)) == list(codes), Path(f"{log}.0").read_text()[-3000:]


def same(one: Path, two: Path, tolerance: float = 1e-5) -> bool:
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    return all(torch.allclose(a[name], b[name], atol=tolerance, rtol=0) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    """Where two processes end that have the whole model each, by SGD and by Muon."""
    root = tmp_path_factory.mktemp("whole")
    run(settings(root / "sgd", use_cpu=True, **SGD))
    run(settings(root / "muon", use_cpu=True))
    return {name: root / name for name in ("sgd", "muon")}


@pytest.mark.slow
def test_the_launch_file_shards_and_a_run_of_it_is_resumed(whole, sharding, tmp_path, interrupt):
    """Stopped at step 4, and resumed: the weights, history and files of a run that is not sharded."""
    interrupt |= {"at": 4, "process": 1}
    run(settings(tmp_path / "out"), codes=(130, 130))
    interrupt.clear()
    last, notes = checkpoints.last_good_checkpoint(tmp_path / "out")
    assert last.name == "checkpoint-4" and notes == [] and (last / processes.SHARDED_WEIGHTS).is_file()
    run([*settings(tmp_path / "out"), "--resume_from_checkpoint", "last"])
    assert same(whole["muon"], tmp_path / "out", ADAM)
    (files, rows), (their_files, their_rows) = (
        (sorted(path.name for path in folder.iterdir() if path.is_file()), history(folder))
        for folder in (tmp_path / "out", whole["muon"])
    )
    assert files == their_files
    for name in ("step", "learning_rate", "eval_accuracy"):
        assert [row[name] for row in rows] == [row[name] for row in their_rows]


@pytest.mark.slow
def test_checkpointed_activations(whole, sharding, tmp_path):
    """By the option, and in accelerate's own way: each block is computed once more in a step, with the same weights."""
    forward, count = ViTScratchLayer.forward, tmp_path / "count"

    def counted(self, *args, **kwargs):
        if self.training:
            with open(count, "a") as file:
                file.write("1")
        return forward(self, *args, **kwargs)

    sharding.setattr(ViTScratchLayer, "forward", counted)
    blocks = 2 * 6 * ViTScratchConfig.preset("showcase").num_hidden_layers  # in two processes, and as many steps
    for name, changes in (("out", {"gradient_checkpointing": True}), ("wrapped", SGD)):
        sharding.setenv("FSDP_ACTIVATION_CHECKPOINTING", str(name == "wrapped").lower())
        run(settings(tmp_path / name, **changes))
        assert len(count.read_text()) == 2 * blocks
        count.unlink()
    assert same(whole["muon"], tmp_path / "out", ADAM)
    assert same(whole["sgd"], tmp_path / "wrapped")


@pytest.mark.slow
def test_pre_training_and_a_head_alone(sharding, tmp_path):
    """Where only some weights are trained, and where the main process paints images at the end."""
    run(settings(tmp_path / "encoder", task="masked-image-modeling", num_train_epochs=1))
    assert (tmp_path / "encoder" / "plots" / "reconstructions.png").is_file()
    start = {"model_name_or_path": tmp_path / "encoder", "config_overrides": None, "num_train_epochs": 1}
    run(settings(tmp_path / "head", **start, freeze_backbone=True))
    a, b = weights(tmp_path / "encoder"), weights(tmp_path / "head")
    assert all(torch.equal(tensor, a[name]) for name, tensor in b.items() if name.startswith("vit."))
    assert b["classifier.weight"].abs().max() > 1e-4


@pytest.mark.slow
def test_accelerate_launch_starts_it(whole, tmp_path):
    """The command at the head of the file, with two processes; the summary of one, and one folder."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN.format(scripts=str(SCRIPTS)))
    words = CONFIG.read_text().splitlines()[0].removeprefix("# accelerate launch ").split()
    argv = [
        *words[: words.index("scripts/finetune.py")],
        "--num_processes",
        "2",
        "--main_process_port",
        str(free_port()),
    ]
    argv += [str(script), *settings(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *argv],
        cwd=ROOT, env=os.environ | {"ACCELERATE_TORCH_DEVICE": "cpu"}, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("everything is in") == 1 and "returned a view" not in done.stderr
    assert (tmp_path / "out" / "checkpoint-6" / processes.SHARDED_WEIGHTS).is_file()
    assert same(whole["muon"], tmp_path / "out", ADAM)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["environment"]["processes"] == 2
    assert metrics["command"].startswith("accelerate launch --config_file scripts/launch/fsdp2.yaml --num_processes 2 ")


# --- what does not go with it -----------------------------------------------------------------------------------------


def trainer(sharded=True, adapter=None, resume=None, plugin=(), **arguments):
    """As far as it is looked at."""
    arguments = {"fsdp": None, "ema_decay": None, "time_budget": None, "torch_compile": False} | arguments
    arguments = {"optim": "adamw_torch", "save_strategy": "epoch"} | arguments
    settings = {"state_dict_type": "FULL_STATE_DICT", "fsdp_version": 2, "cpu_ram_efficient_loading": False}
    settings |= {"auto_wrap_policy": transformer_auto_wrap_policy}
    state = {"fsdp_plugin": SimpleNamespace(**settings | dict(plugin)), "dynamo_plugin": TorchDynamoPlugin()}
    return SimpleNamespace(
        args=SimpleNamespace(resume_from_checkpoint=resume, **arguments),
        accelerator=SimpleNamespace(state=SimpleNamespace(**state)),
        model=torch.nn.Linear(2, 2), is_fsdp_enabled=sharded, adapter=adapter,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ema_decay": 0.9}, "ema_decay follows whole weights"),
        ({"adapter": "adapter"}, "lora_rank merges whole weights"),
        ({"time_budget": "10m"}, "time_budget rehearses with a whole model"),
        ({"torch_compile": True}, "was never tried"),
        ({"optim": "sgd"}, "cannot be resumed with sharding"),
        ({"plugin": {"fsdp_version": 1}}, "fsdp_version is 1, but only 2 is supported"),
        ({"plugin": {"state_dict_type": "SHARDED_STATE_DICT"}}, "only FULL_STATE_DICT is supported"),
        ({"plugin": {"auto_wrap_policy": None}}, "fsdp_auto_wrap_policy is another, but only TRANSFORMER_BASED_WRAP"),
        ({"plugin": {"cpu_ram_efficient_loading": True}}, "fsdp_cpu_ram_efficient_loading is True"),
        ({"sharded": False, "fsdp": True}, "a whole model on a CPU"),
    ],
)
def test_what_does_not_go_with_sharding_is_refused(changes, words):
    processes.settle_sharding(trainer())
    with pytest.raises(ValueError, match=words):
        processes.settle_sharding(trainer(**changes))


def test_compiling_that_accelerate_was_launched_with_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    with pytest.raises(ValueError, match=r"dynamo_backend.* was never tried, and sharding"):
        processes.settle_sharding(trainer())


def test_a_model_that_is_sharded_already_is_refused(monkeypatch):
    monkeypatch.setattr(processes, "DTensor", torch.nn.Parameter)
    with pytest.raises(ValueError, match="sharded already"):
        processes.settle_sharding(trainer(sharded=False))


def test_a_checkpoint_is_resumed_as_it_was_saved(tmp_path):
    with pytest.raises(ValueError, match=r"was saved without sharding .* cannot be resumed with it"):
        processes.settle_sharding(trainer(resume=str(tmp_path)))
    processes.settle_sharding(trainer(resume=str(tmp_path), sharded=False))
    (tmp_path / processes.SHARDED_WEIGHTS).touch()
    processes.settle_sharding(trainer(resume=str(tmp_path)))
    with pytest.raises(ValueError, match=r"was saved with sharding .* cannot be resumed without it"):
        processes.settle_sharding(trainer(resume=str(tmp_path), sharded=False))
