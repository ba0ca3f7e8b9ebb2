"""Helpers for tests that train: scripts/finetune.py as a module, and tiny settings."""

import csv
import importlib.util
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
CIFAR10_COPY = ROOT.parent / "shared" / "cifar10"  # CIFAR-10 as JPEG, in the Hub's layout; not part of the repository
TINY = "hidden_size=16,num_attention_heads=2,intermediate_size=16"
RANDOM = f"{TINY},hidden_dropout_prob=0.1,attention_probs_dropout_prob=0.1,drop_path_rate=0.2"


def load_script(name: str):
    """A script as a module, without running it."""
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(output: Path, **changes) -> list[str]:
    """The command line of a tiny run on digits."""
    settings = {
        "dataset_name": "digits", "config_overrides": TINY, "max_train_samples": 320, "max_eval_samples": 64,
        "num_train_epochs": 2, "logging_steps": 3, "horizontal_flip": 0.5, "disable_tqdm": True, "use_cpu": True,
        "bf16": False, "output_dir": output,
    } | changes  # fmt: skip
    return [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]


def weights(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


def history(folder: Path) -> list[dict]:
    """The rows of a run's history, without its times, which differ from run to run."""
    with open(folder / "history.csv") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork_run(argv: list[str], processes: int = 1, log: Path | None = None) -> list[int]:
    """Start a run in forked processes, as torchrun would, but without importing everything again.

    Returns:
        The process ids; each is the leader of its own process group.
    """
    port, ids = free_port(), []
    for rank in range(processes):
        child = os.fork()
        if child:
            ids.append(child)
            continue
        code = 70
        try:
            os.setpgid(0, 0)
            torch.set_num_threads(1)  # the OpenMP threads of the parent do not survive the fork
            if log is not None:
                descriptor = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            if processes > 1:
                os.environ |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                    "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
            code = load_script("finetune").main(argv)
        except BaseException:  # also SystemExit: a forked test process must not run pytest's own clean-up
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return ids


def wait_all(ids: list[int], seconds: float = 240) -> list[int]:
    """Exit status of each process, negative for a signal.

    After so many seconds they are killed: two that wait for each other do so for longer than a test may take.
    """
    ends, codes = time.monotonic() + seconds, {}
    while len(codes) < len(ids):
        for child in set(ids) - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > ends:
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in ids]
