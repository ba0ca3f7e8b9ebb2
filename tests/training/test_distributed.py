"""Two processes (gloo, CPU) compute what one does; sharded training (FSDP2) too; a signal or a death is noticed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from made_data import write_image_folder
from runs import CIFAR10_COPY, SCRIPTS, fork_run, history, load_script, options, wait_all, weights
from small_models import CHOICES

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.data import Augmentation
from modeling_vit_scratch.data.streaming import StreamedImages
from modeling_vit_scratch.training import ImageTrainer, checkpoints
from modeling_vit_scratch.training.callbacks import keep_workers
from modeling_vit_scratch.training.processes import require_joined, say_lost

PLAIN = {
    "horizontal_flip": 0, "crop_padding": 0, "max_grad_norm": 0, "max_train_samples": 384, "num_train_epochs": 9,
    "save_strategy": "no", "eval_strategy": "no",
}  # fmt: skip


def train(folder: Path, processes: int, accumulate: int = 1, **changes) -> Path:
    """A run on so many processes, and micro-batches, with the same global batch of 64; its output folder."""
    changes = PLAIN | changes | {"gradient_accumulation_steps": accumulate}
    argv = options(folder, **changes, per_device_train_batch_size=64 // processes // accumulate)
    log = folder.with_suffix(".log")
    assert wait_all(fork_run(argv, processes, log)) == [0] * processes, Path(f"{log}.0").read_text()[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_two_processes_end_with_the_weights_of_one(tmp_path, optim):
    """54 steps. Adam amplifies the rounding of gradients that are truly zero (the key bias): compare logits there."""
    changes = {"optim": optim, "learning_rate": 0.1 if optim == "sgd" else 1e-3}
    one, two = (train(tmp_path / str(n), n, **changes) for n in (1, 2))
    for folder in (one, two):
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["training"]["steps"] == 54 and metrics["training"]["global_batch_size"] == 64
    rates = [[row["learning_rate"] for row in history(folder)] for folder in (one, two)]
    assert rates[0] == rates[1]
    if optim == "sgd":
        a, b = weights(one), weights(two)
        assert all(torch.allclose(a[name], b[name], atol=1e-5, rtol=0) for name in a)
        assert a["classifier.weight"].abs().max() > 0.001
    else:
        pixels = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        logits = [ViTScratchForImageClassification.from_pretrained(folder)(pixels).logits for folder in (one, two)]
        assert torch.allclose(*logits, atol=1e-4, rtol=0) and logits[0].std() > 0.01


@pytest.mark.slow
def test_two_processes_that_accumulate_end_with_the_weights_of_one_batch(tmp_path):
    """Each of 18 steps is of two micro-batches of 16 images in each of two processes, or of one batch of 64."""
    changes = {"optim": "sgd", "learning_rate": 0.1, "num_train_epochs": 3}
    one, two = (train(tmp_path / str(n), n, accumulate=n, **changes) for n in (1, 2))
    a, b = weights(one), weights(two)
    assert all(torch.allclose(a[name], b[name], atol=1e-5, rtol=0) for name in a)
    assert a["classifier.weight"].abs().max() > 0.001
    assert json.loads((two / "metrics.json").read_text())["training"]["steps"] == 18


@pytest.mark.slow
@pytest.mark.parametrize("size", [1_000, 999])
def test_evaluation_counts_each_image_once(tmp_path, size):
    if not CIFAR10_COPY.is_dir():
        pytest.skip(f"needs {CIFAR10_COPY}")
    changes = {
        "dataset_name": CIFAR10_COPY,
        "max_eval_samples": size,
        "max_steps": 2,
        "per_device_eval_batch_size": 50,
    }
    results = []
    for n in (1, 2):
        folder = train(tmp_path / str(n), n, **changes)
        metrics = json.loads((folder / "metrics.json").read_text())
        rows = [row.split(",")[0] for row in (folder / "predictions_test.csv").read_text().splitlines()[1:]]
        assert metrics["test"]["examples"] == len(rows) == len(set(rows)) == size
        results.append(metrics["test"])
    assert results[0]["accuracy"] == pytest.approx(results[1]["accuracy"], abs=2 / size)
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-4)


def test_each_rank_draws_other_augmentations():
    images = torch.arange(2 * 3 * 32 * 32).view(2, 3, 32, 32).remainder(251).byte()
    augment = Augmentation([0.0] * 3, [1.0] * 3, crop_padding=4, horizontal_flip=0.5, seed=1)
    assert torch.equal(augment(images, step=5, rank=0), augment(images, step=5, rank=0))
    assert not torch.equal(augment(images, step=5, rank=0), augment(images, step=5, rank=1))


@pytest.mark.slow
def test_only_the_first_process_writes(tmp_path):
    """And what is wrong with its folder, which the first alone looks at, each says: none is lost."""
    train(tmp_path / "run", 2, num_train_epochs=1)
    texts = [Path(f"{tmp_path / 'run.log'}.{rank}").read_text() for rank in (0, 1)]
    assert "everything is in" in texts[0] and "parameters" in texts[0]
    assert "everything is in" not in texts[1] and "parameters" not in texts[1]
    assert wait_all(fork_run(options(tmp_path / "run"), 2, tmp_path / "taken")) == [2, 2]
    for rank in (0, 1):
        said = (tmp_path / f"taken.{rank}").read_text()
        assert f"finetune.py: {tmp_path / 'run'} already holds a run" in said
        assert "another process" not in said and "Traceback" not in said


def torchrun(script: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), *arguments]
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=180)


SHARDED = """
import os, sys, torch
from transformers.distributed import DistributedConfig
from modeling_vit_scratch import ViTScratchForImageClassification
from modeling_vit_scratch.training import ImageTrainingArguments, optimization

world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
torch.set_num_threads(1)
optimization.has_fast_bfloat16 = lambda device: False


def train(folder, method):
    sharded = {"distributed_config": DistributedConfig(fsdp_size=2)} if world == 2 else {}
    model = ViTScratchForImageClassification.from_pretrained(f"{folder}/start", **sharded).train()
    assert (world == 2) == type(model).__name__.startswith("FSDP")
    args = ImageTrainingArguments("unused", use_cpu=True, muon_learning_rate=0.02, weight_decay=0.1)
    groups = optimization.parameter_groups(model, args)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if method == "sgd" else optimization.Muon(groups, eps=1e-4)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        pixels = torch.randn(8, 3, 32, 32, generator=generator)[rank::world]
        labels = torch.randint(10, (8,), generator=generator)[rank::world]
        model(pixels, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(f"{folder}/{'one' if world == 1 else 'two'}")


for folder in sys.argv[1:]:
    train(folder, os.path.basename(folder).partition("-")[0])
"""
SHARDED_CASES = [("sgd", None), ("muon", None), ("muon", "all"), ("sgd", "rope-mixed")]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """For each case a folder: where it started, and where one and two processes ended, each started once for all."""
    root = tmp_path_factory.mktemp("sharded")
    for method, choice in SHARDED_CASES:
        fields = {"hidden_size": 16, "intermediate_size": 16, "num_register_tokens": 1}
        if choice is not None:
            fields |= {"use_cls_token": True, "pooling": "cls", "use_final_norm": True, **CHOICES[choice]}
        torch.manual_seed(0)
        model = ViTScratchForImageClassification(ViTScratchConfig.preset("showcase", **fields))
        torch.nn.init.normal_(model.classifier.weight)
        model.save_pretrained(root / f"{method}-{choice}" / "start")
    folders = sorted(str(path) for path in root.iterdir())
    script = root / "sharded.py"
    script.write_text(SHARDED)
    subprocess.run([sys.executable, str(script), *folders], check=True, capture_output=True, timeout=180)
    done = torchrun(script, *folders)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("method", "choice"), SHARDED_CASES)
def test_fsdp2_trains_to_the_same_weights_and_saves_the_same_folder(sharded, method, choice):
    start, one, two = (sharded / f"{method}-{choice}" / name for name in ("start", "one", "two"))
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    assert not torch.equal(a["classifier.weight"], weights(start)["classifier.weight"])
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    assert (two / "config.json").read_text() == (one / "config.json").read_text()


# --- started together, and apart --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "use_cpu", "words"),
    [
        ({}, None, "WORLD_SIZE is 2, but each process would train alone on its cpu: give --use_cpu True"),
        ({"ACCELERATE_USE_FSDP": "true"}, None, "give --use_cpu True"),
        ({"ACCELERATE_USE_FSDP": "true"}, True, "accelerate gives each process a whole model on a CPU"),
    ],
)
def test_processes_that_would_train_apart_are_refused(environment, use_cpu, words, tmp_path, monkeypatch):
    """Else both write into one folder; or each holds the model whole that was to be shared."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    codes = wait_all(fork_run(options(tmp_path / "out", use_cpu=use_cpu, num_train_epochs=1), 2, tmp_path / "log"))
    assert 0 not in codes
    for rank in (0, 1):
        assert words in (tmp_path / f"log.{rank}").read_text()
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_tasks_of_a_cluster_that_would_train_apart_are_refused(variable, monkeypatch):
    """Of srun or mpirun alone; a step of one task, also of a larger job, goes on, and so do processes that joined."""
    args = SimpleNamespace(world_size=1, device=torch.device("cpu"))
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv(variable, "1")
    require_joined(args)
    monkeypatch.setenv(variable, "4")
    require_joined(SimpleNamespace(world_size=4, device=torch.device("cpu")))
    with pytest.raises(ValueError, match=f"{variable} is 4, .* start them by torchrun or accelerate, or, .* unset"):
        require_joined(args)


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "deepspeed is not supported"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM is not supported"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "tensor, context and sequence parallelism) is not supported"),
    ],
)
def test_engines_that_were_never_run_are_refused(variable, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(SystemExit) as left:
        load_script("finetune").main(options(tmp_path))
    text = capsys.readouterr().err
    assert left.value.code == 2 and words in text and "fsdp2.yaml" in text and not list(tmp_path.iterdir())


# --- signals and deaths -----------------------------------------------------------------------------------------------


def whole(folder: Path) -> list[str]:
    """Names of the checkpoints, all of which must be whole."""
    found = checkpoints.list_checkpoints(folder)
    assert [checkpoints.damage(path) for path in found] == [None] * len(found)
    return [path.name for path in found]


def test_a_signal_to_one_process_stops_both(tmp_path, interrupt):
    """With one checkpoint, and the command that goes on as it was started, which does so; at whatever moment it comes.

    At the end of an epoch, where the processes have just agreed that none stops, and again after the last step.
    """
    changes = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 100, "save_steps": 100}
    argv = options(tmp_path / "out", num_train_epochs=3, **changes)
    interrupt |= {"at": 3, "late": True, "signal": signal.SIGUSR1, "process": 1}
    assert wait_all(fork_run(argv, 2, tmp_path / "log")) == [130, 130]
    assert whole(tmp_path / "out") == ["checkpoint-4"]
    first, second = ((tmp_path / f"log.{rank}").read_text() for rank in (0, 1))
    assert "Stopped at step 4. To continue:\n  torchrun --nproc_per_node 2 " in first and "To continue" not in second
    assert "Stopping after this step" in second
    interrupt["at"] = 9
    assert wait_all(fork_run([*argv, "--resume_from_checkpoint", "last"], 2, tmp_path / "log")) == [0, 0]
    assert whole(tmp_path / "out")[0] == "checkpoint-9"
    assert "The last step is done" in (tmp_path / "log.1").read_text()
    command = json.loads((tmp_path / "out" / "metrics.json").read_text())["command"]
    assert command.startswith("torchrun --nproc_per_node 2 ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_spares_those_that_read_images(number, tmp_path, interrupt):
    """As a batch system or a terminal sends it; a worker that ends by it would end the run before it is saved."""
    write_image_folder(tmp_path / "photos", 40, size=(40, 36))

    def from_outside(number: int):  # from its own run, a worker takes SIGTERM as the end of its work
        for _ in range(2 if number == signal.SIGTERM else 1):  # a second Ctrl-C means to leave at once
            subprocess.run(["kill", f"-{int(number)}", "--", f"-{os.getpgrp()}"], start_new_session=True)

    interrupt |= {"at": 4, "signal": number, "send": from_outside}
    argv = options(
        tmp_path / "out", dataset_name=tmp_path / "photos", dataloader_num_workers=2, per_device_train_batch_size=8,
        image_size=32, max_train_samples=None,
    )  # fmt: skip
    assert wait_all(fork_run(argv, 1, tmp_path / "log")) == [130]
    assert whole(tmp_path / "out") == ["checkpoint-4"]
    assert (tmp_path / "log.0").read_text().count("Stopping after this step") == 1


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system cannot tell who sent a signal")
def test_a_reader_listens_to_its_run_alone():
    """Also where another process starts it (forkserver), from which it has no handlers, and which is not the run."""
    loader = keep_workers(torch.utils.data.DataLoader([0], num_workers=1))
    ours, theirs = os.pipe()
    server = os.fork()
    if server == 0:
        reader = os.fork()
        if reader == 0:
            for number in (signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            loader.worker_init_fn(0)
            os.write(theirs, b"%d" % os.getpid())
            time.sleep(20)
            os._exit(70)
        os._exit(abs(os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1])))
    reader = int(os.read(ours, 20))
    for number in (signal.SIGINT, signal.SIGUSR1):
        os.kill(reader, number)
    subprocess.run(["kill", "-TERM", str(reader)], check=True)
    time.sleep(0.1)
    assert os.waitpid(server, os.WNOHANG) == (0, 0)  # it waits for its reader
    os.kill(reader, signal.SIGTERM)
    assert wait_all([server], 10) == [0]


def killed(trainer, *args):
    os.kill(os.getpid(), signal.SIGKILL)


def full(trainer, *args):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("rank", "method", "at", "happens", "codes"),
    [
        (1, "training_step", 7, killed, [1, -signal.SIGKILL]),
        (1, "_save_rng_state", 6, killed, [1, -signal.SIGKILL]),
        (0, "_save_rng_state", 6, full, [1, 1]),
    ],
    ids=["killed in a step", "killed while saving", "disk full"],
)
def test_a_process_that_ends_early_loses_no_whole_checkpoint(rank, method, at, happens, codes, tmp_path, monkeypatch):
    """The other one notices within a minute, and says what is kept; torchrun is not needed for it."""
    original = getattr(ImageTrainer, method)

    def ends(self, *args, **kwargs):
        if self.args.process_index == rank and self.state.global_step == at:
            happens(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ImageTrainer, method, ends)
    begun = time.monotonic()
    argv = options(tmp_path / "out", num_train_epochs=4, save_total_limit=1)
    assert wait_all(fork_run(argv, 2, tmp_path / "log")) == codes
    assert time.monotonic() - begun < 60
    kept = f"checkpoint-{3 * ((at - 1) // 3)}"
    assert kept in whole(tmp_path / "out")
    other = (tmp_path / f"log.{1 - rank}").read_text()
    assert "finetune.py: another process of the run has ended or does not answer" in other
    assert f"The last whole checkpoint is {tmp_path / 'out' / kept}. To continue:\n  torchrun" in other
    if happens is full:
        own = (tmp_path / f"log.{rank}").read_text()
        assert "checkpoint-6 could not be saved (OSError: [Errno 28] No space left on device)" in own
        assert "Traceback" not in own + other


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[/x/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3", "Connection closed by peer"),
        ("[/x/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete", "Timed out waiting"),
        ("NCCL error in: X.cpp, remote process exited or there was a network error", "remote process exit"),
        ("NCCL Error 6: a network error or a remote process exiting prematurely", "remote process exit"),
        ("failed to recv, got 0 bytes. Connection was likely closed.", "Connection was likely closed"),
        ("wait timeout after 60000ms, keys: /worker_info", "Wait timeout"),
        ("NCCL Error 5: invalid usage", None),
        ("NCCL Error 1: unhandled cuda error", None),
        ("CUDA out of memory. NCCL holds 2 GiB of it", None),
        ("DataLoader timed out after 5 seconds", None),
        ("Caught RuntimeError in DataLoader worker process 0.\n... Broken pipe", None),
    ],
)
def test_what_tells_that_a_process_is_lost(text, reason, tmp_path):
    """By a phrase, without the paths of a library's build; every other error is shown as it is."""
    one, two = (SimpleNamespace(world_size=n, output_dir=str(tmp_path)) for n in (1, 2))
    assert say_lost(RuntimeError(text), one) is None
    said = say_lost(RuntimeError(text), two)
    assert (
        (said is None)
        if reason is None
        else said.startswith(
            f"another process of the run has ended or does not answer ({reason}). There is no whole checkpoint yet"
        )
    )


def test_a_stream_keeps_two_processes_together(tmp_path, monkeypatch):
    """Whose parts are of different sizes, three passes; where one has no image at all, both end, and say why."""
    write_image_folder(tmp_path / "photos", 11)
    changes = {
        "dataset_name": tmp_path / "photos", "streaming": True, "max_train_samples": None, "max_steps": 12,
        "per_device_train_batch_size": 4, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 6,
        "save_steps": 6, "image_size": 32,
    }  # fmt: skip
    assert wait_all(fork_run(options(tmp_path / "out", **changes), 2, tmp_path / "log")) == [0, 0]
    assert whole(tmp_path / "out") == ["checkpoint-12", "checkpoint-6"]
    examples = StreamedImages._examples
    monkeypatch.setattr(StreamedImages, "_examples", lambda self, epoch: () if self.rank else examples(self, epoch))
    assert wait_all(fork_run(options(tmp_path / "empty", **changes), 2, tmp_path / "second")) == [1, 2]
    first, second = ((tmp_path / f"second.{rank}").read_text() for rank in (0, 1))
    assert "another process of the run has ended" in first
    assert "finetune.py: process 1 of 2 finds no image in its part of the stream" in second
    assert "Traceback" not in first + second


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_down(tmp_path):
    """Under torchrun, as a user starts it: the launcher must not wait for the survivors."""
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(SCRIPTS)!r})\n"
        "import finetune\n"
        "from modeling_vit_scratch.training import trainer\n"
        "step = trainer.ImageTrainer.training_step\n"
        "def dies(self, *args, **kwargs):\n"
        "    if self.state.global_step == 6 and self.args.process_index == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, *args, **kwargs)\n"
        "trainer.ImageTrainer.training_step = dies\n"
        "sys.exit(finetune.main())\n"
    )
    done = torchrun(script, *options(tmp_path / "out", num_train_epochs=4))
    assert done.returncode != 0 and "exitcode  : -9" in done.stderr
    good, notes = checkpoints.last_good_checkpoint(tmp_path / "out")
    assert good is not None and notes == []
