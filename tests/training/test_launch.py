"""scripts/launch/: each file begins with its command and says what was run; what can be run on two CPU processes is."""

import configparser
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from packaging.requirements import Requirement
from runs import ROOT, SCRIPTS, free_port, load_script, options
from torch.distributed.run import get_args_parser as torchrun_parser

from modeling_vit_scratch.training import checkpoints, processes

LAUNCH = SCRIPTS / "launch"
FILES = sorted(path.name for path in LAUNCH.iterdir() if path.is_file())
PROGRAMS = {"yaml": ("accelerate launch", "sky jobs launch"), "sh": ("sbatch",), "py": ("hf jobs uv run",)}


def head(name: str) -> str:
    """What a file says before anything else, without comment signs."""
    text = (LAUNCH / name).read_text().removeprefix("#!/bin/bash\n").removeprefix('"""Train on Hugging Face Jobs.\n\n')
    return re.sub(r"^#( |$)", "", text, flags=re.MULTILINE)


def parse_as_finetune(words: list[str]):
    """The script's own parser reads its part of a command."""
    script = load_script("finetune")
    script.default_dataset = lambda: "digits"
    return script.parse(words)


def write_script(path: Path, text: str):
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("name", FILES)
def test_each_file_begins_with_its_command_and_says_what_was_run(name):
    text = head(name)
    assert text.startswith(PROGRAMS[name.rpartition(".")[2]]) and f"scripts/launch/{name} " in text.partition("\n\n")[0]
    assert "Run here: " in text and "Not run: " in text.partition("Run here: ")[2]


@pytest.mark.parametrize("name", ["multi_gpu.yaml", "several_machines.yaml", "fsdp2.yaml"])
def test_accelerate_reads_its_configurations(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(head(name).partition("\n")[0])
    parsed = launch_command_parser().parse_args(words[2:])
    launched, defaults, _ = _validate_launch_command(parsed)
    given = yaml.safe_load((LAUNCH / name).read_text())
    assert launched.num_processes == given["num_processes"] == 8 * given["num_machines"]
    assert launched.num_machines == defaults.num_machines and not launched.use_cpu
    assert (launched.use_fsdp, launched.multi_gpu) == (name == "fsdp2.yaml", name != "fsdp2.yaml")
    for option, value in given.get("fsdp_config", {}).items():
        assert str(getattr(launched, option)).lower() == str(value).lower(), option
    folder = words.index("path/to/folder")
    assert launched.training_script == "scripts/finetune.py"
    parse_as_finetune([*words[words.index("scripts/finetune.py") + 1 : folder], "digits"])


def test_the_launcher_of_a_command_starts_the_same_processes(monkeypatch):
    """As it was typed, where it can be asked; else in general, sharded where the run is."""
    for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    assert processes.common_launcher() == ["python"]
    monkeypatch.setattr(processes.torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.torch.distributed, "get_world_size", lambda: 8)
    assert processes.common_launcher() == ["torchrun", "--nproc_per_node", "8"]
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert processes.common_launcher() == ["torchrun", "--nnodes", "2", "--nproc_per_node", "4"]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    sharded = "accelerate launch --config_file scripts/launch/fsdp2.yaml --num_machines 2 --num_processes 8"
    sharded = sharded.split(" ")
    assert processes.common_launcher() == sharded == processes.launcher()
    launched, _, _ = _validate_launch_command(launch_command_parser().parse_args([*sharded[2:], "finetune.py"]))
    assert launched.use_fsdp and (launched.num_machines, launched.num_processes) == (2, 8)
    for typed in ("/bin/accelerate launch --cpu", "/bin/python -m accelerate.commands.accelerate_cli launch --cpu"):
        words = [*typed.split(), sys.argv[0], "--option"]
        monkeypatch.setattr(processes.psutil.Process, "parent", lambda self, words=words: self)
        monkeypatch.setattr(processes.psutil.Process, "cmdline", lambda self, words=words: words)
        assert processes.launcher() == typed.replace("/bin/", "").split()


@pytest.fixture
def cluster(tmp_path) -> dict:
    """An environment with stand-ins for what a cluster brings; `scontrol` notes what it is told."""
    programs = tmp_path / "bin"
    programs.mkdir()
    write_script(programs / "srun", 'test "$SRUN_CPUS_PER_TASK" = 32 && exec "$@"')
    write_script(programs / "hostname", "echo localhost")
    write_script(programs / "scontrol", f'echo "$@" >> {shlex.quote(str(tmp_path / "told"))}')
    write_script(programs / "torchrun", f'exec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"')
    return os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "7",
        "PORT": str(free_port()), "OMP_NUM_THREADS": "1", "SLURM_CPUS_PER_TASK": "32",
    }  # fmt: skip


@pytest.mark.slow
def test_a_job_that_is_warned_saves_goes_back_into_the_queue_and_goes_on(tmp_path, cluster):
    """SIGUSR1 to the batch shell, as Slurm sends it; torchrun waits for the checkpoint, and the next job takes it."""
    output = tmp_path / "out"
    argv = options(output, num_train_epochs=25)
    place = argv.index("--output_dir")
    command = ["bash", str(LAUNCH / "slurm.sh"), str(output), *argv[:place], *argv[place + 2 :]]
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(command, cwd=ROOT, env=cluster, stdout=log, stderr=subprocess.STDOUT)
        ends = time.monotonic() + 120
        while not checkpoints.list_checkpoints(output) and time.monotonic() < ends and job.poll() is None:
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        status = job.wait(timeout=60)
    text = (tmp_path / "log").read_text()
    assert status == 0, text[-3000:]
    assert (tmp_path / "told").read_text() == "requeue 7\n"
    stopped = int(re.search(r"Stopped at step (\d+)\. To continue:\n  (.+)", text)[1])
    last = checkpoints.list_checkpoints(output)[0]
    assert last.name == f"checkpoint-{stopped}" and checkpoints.damage(last) is None and 0 < stopped < 75
    continued = shlex.split(re.search(r"To continue:\n  (.+)", text)[1])
    assert continued[:7] == ["python", "-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", "2"]
    assert continued[continued.index("scripts/finetune.py") - 2] == "--signals-to-handle"
    assert continued[-4:] == ["--output_dir", str(output), "--resume_from_checkpoint", "last"]
    write_script(tmp_path / "bin" / "torchrun", 'printf "%s\\n" "$@"')
    done = subprocess.run(command, cwd=ROOT, env=cluster, capture_output=True, text=True, timeout=60)
    launched = torchrun_parser().parse_args(done.stdout.splitlines())
    assert done.returncode == 0 and (tmp_path / "told").read_text() == "requeue 7\n"
    assert parse_as_finetune(launched.training_script_args)[2].resume_from_checkpoint == "last"


def test_the_commands_of_skypilot(tmp_path, cluster):
    """What torchrun would be told, before there is a checkpoint and after, is what it and the script understand."""
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "resources", "workdir", "envs", "file_mounts", "setup", "run"}
    assert any(task["envs"]["OUTPUT"].startswith(f"{place}/") for place in task["file_mounts"])
    write_script(tmp_path / "bin" / "torchrun", 'printf "%s\\n" "$@"')
    given = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    given |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "DATASET": "digits", "OUTPUT": str(tmp_path / "out")}
    for checkpoint, resume in ((None, None), ("checkpoint-5", "last")):
        if checkpoint:
            (tmp_path / "out" / checkpoint).mkdir(parents=True)
        done = subprocess.run(["bash", "-euc", task["run"]], env=cluster | given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        launched = torchrun_parser().parse_args(done.stdout.splitlines())
        assert (launched.nnodes, launched.node_rank, launched.nproc_per_node) == ("2", 1, "8")
        assert launched.master_addr == "10.0.0.1" and (ROOT / launched.training_script).is_file()
        _, data, training = parse_as_finetune(launched.training_script_args)
        assert data.dataset_name == "digits" and training.resume_from_checkpoint == resume


@pytest.fixture
def hf_job():
    spec = importlib.util.spec_from_file_location("hf_job", LAUNCH / "hf_job.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_requirements_of_the_job_are_those_of_the_package():
    """By the reference reading of PEP 723."""
    pattern = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    blocks = list(re.finditer(pattern, (LAUNCH / "hf_job.py").read_text()))
    assert [block["type"] for block in blocks] == ["script"]
    lines = blocks[0]["content"].splitlines()
    header = tomllib.loads("\n".join(line[2:] if line.startswith("# ") else line[1:] for line in lines))
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = setup["options"]["install_requires"].strip().splitlines()
    assert set(map(Requirement, header["dependencies"])) == set(map(Requirement, wanted))
    assert header["requires-python"] == setup["options"]["python_requires"]


def test_the_hub_client_accepts_the_job(hf_job):
    """A dry run, which sends nothing; the place that it would send to is not there."""
    words = shlex.split(hf_job.__doc__.partition("\n\n")[2].partition("\n\n")[0])
    assert words[:4] == ["hf", "jobs", "uv", "run"]
    program = "from huggingface_hub.cli.hf import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *words[1:4], "--dry-run", "--namespace", "user", *words[4:]],
        cwd=ROOT, env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_none"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and "Job not submitted" in done.stdout, done.stderr[-2000:]
    assert re.search(r"script +scripts/launch/hf_job\.py", done.stdout)


def test_what_the_job_starts(hf_job, tmp_path):
    """One process, or torchrun for several GPUs; a further attempt goes on. The package comes from the mount alone."""
    argv = options(tmp_path / "out", num_train_epochs=1, max_train_samples=64)
    one, several = (hf_job.command(argv, gpus, ROOT) for gpus in (0, 4))
    assert one == [sys.executable, str(ROOT / "scripts" / "finetune.py"), *argv]
    launched = torchrun_parser().parse_args(several[3:])
    assert launched.nproc_per_node == "4" and launched.training_script_args == argv
    code = tmp_path / "code"
    for folder in ("modeling_vit_scratch", "scripts"):
        (code / folder).mkdir(parents=True)
    (code / "modeling_vit_scratch" / "__init__.py").touch()
    (code / "scripts" / "finetune.py").write_text(
        "import sys, modeling_vit_scratch\nprint(modeling_vit_scratch.__file__, *sys.argv[1:])"
    )
    program = f"import sys; sys.path.insert(0, {str(LAUNCH)!r}); import hf_job; from pathlib import Path\n"
    program += f"hf_job.main(sys.argv[1:], Path({str(code)!r}))"
    done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True)
    assert done.stdout.split() == [str(code / "modeling_vit_scratch" / "__init__.py"), *argv], done.stderr
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    assert hf_job.command(argv, 0, ROOT)[-2:] == ["--resume_from_checkpoint", "last"]
    given = [*argv, "--resume_from_checkpoint", "elsewhere"]
    assert hf_job.command(given, 0, ROOT)[-2:] == given[-2:]
