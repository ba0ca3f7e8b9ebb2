"""Fixtures that several test files use, and what has to be imported first."""

import functools
import gc
import os
import sys
import tempfile
from pathlib import Path

import datasets
import pytest

# The helpers that tests in every folder import: runs, colours, hub_server, hub_folders.
sys.path.insert(0, str(Path(__file__).parent))
# Behind all else, so that a script named like a package would be found out (tests/test_house.py).
sys.path.append(str(Path(__file__).parent.parent / "scripts"))
sys.path.append(str(Path(__file__).parent.parent / "notebooks"))  # what the notebook imports

# The folder into which CI installs the other libraries (.ci/run). It is no part of the environment, since the processes
# that tests start would see it there, and a torchvision that does not import stops transformers.
PEERS = os.environ.get("VIT_SCRATCH_PEERS")
if PEERS:
    sys.path.append(PEERS)

# Processes that test side by side (pytest-xdist, in CI) keep apart what transformers copies of repositories' code and
# what PyTorch compiles: of two that compile the same, one has found the other's half-written work.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf_modules-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="torchinductor-")

from benchmarking import peers  # noqa: E402  beside a torchvision that does not import, transformers does only after this
from hub_folders import folder, made, no_waiting  # noqa: E402, F401
from hub_server import hub  # noqa: E402, F401

from modeling_vit_scratch.data import sources  # noqa: E402
from modeling_vit_scratch.evaluation import devices  # noqa: E402


def pytest_configure():
    if PEERS and peers.REASONS:
        raise pytest.UsageError(f"VIT_SCRATCH_PEERS={PEERS}, but from there {peers.REASONS} do not import.")


def pytest_collection_finish():
    """What the imports made lasts, so it is not looked through again: each training run of a test collects garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def a_cpu_without_units():
    """Float32 is the default on every machine, one with units for bfloat16 too; tests of those say what there is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "cpu_capabilities", dict)
        yield


@pytest.fixture(scope="session", autouse=True)
def digits_drawn_once():
    """The bundled digits, drawn at a size, are kept for the next test that asks for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_digits", functools.cache(sources._digits))
        yield


@pytest.fixture
def copied_code(tmp_path, monkeypatch):
    """Where transformers copies repositories' code for this test alone; tests after it find theirs where it was."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    others = [path for path in sys.path if (Path(path) / "transformers_modules").is_dir()]  # would be found before it
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in others])
    kept = {name: sys.modules.pop(name) for name in [*sys.modules] if name.startswith("transformers_modules")}
    yield
    for name in [*sys.modules]:
        if name.startswith("transformers_modules"):
            del sys.modules[name]
    sys.modules.update(kept)


@pytest.fixture
def offline(tmp_path_factory, monkeypatch):
    """What `datasets` prepares goes to a temporary folder, and nothing is asked of the Hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
