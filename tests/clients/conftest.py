"""Other software on a saved folder, each in a process that cannot import the package, and what it says to its user.

The software is in the environment, or in the folders that VIT_SCRATCH_CLIENTS names (.ci/run installs it into one).
Those that want torchvision find it in the folder of VIT_SCRATCH_PEERS.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import TINY, make
from transformers import ViTImageProcessorPil

from modeling_vit_scratch import ViTScratchForImageClassification

HERE = Path(__file__).parent
FOLDERS = [name for name in os.environ.get("VIT_SCRATCH_CLIENTS", "").split(os.pathsep) if name]
PEERS = [name for name in [os.environ.get("VIT_SCRATCH_PEERS")] if name]
NAMES = {0: "cat", 1: "dog", 2: "owl"}


def pytest_runtest_setup(item):
    """`needs` skips a test whose software is not there, unless CI says that it is."""
    for marker in item.iter_markers("needs"):
        places = [*sys.path, *FOLDERS, *PEERS]
        missing = [name for name in marker.args if PathFinder.find_spec(name, places) is None]
        if missing and not FOLDERS:
            pytest.skip(f"{', '.join(missing)} is not installed: pip install -e '.[clients]'")
        assert not missing, f"VIT_SCRATCH_CLIENTS={FOLDERS}, but {missing} is in none of these"


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with runs/mine, a classifier and its image processor as a run leaves them, and images of each mode."""
    folder = tmp_path_factory.mktemp("place")
    fields = {name: value for name, value in TINY.items() if name != "num_labels"}
    names = {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}
    make(ViTScratchForImageClassification, fields, **names).save_pretrained(folder / "runs" / "mine")
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.4, 0.5, 0.6])
    processor.save_pretrained(folder / "runs" / "mine")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "owl"):
        (folder / "path" / "to" / "folder" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "path" / "to" / "folder" / name / f"{i}.png")
    Image.fromarray(pixels).save(folder / "photo.jpg")
    (folder / "modes").mkdir()
    for mode in ("L", "RGBA", "P", "RGB"):
        image = Image.fromarray(rng.integers(0, 256, (20, 30, 4), dtype=np.uint8))  # of every transparency
        (image if mode == "RGBA" else image.convert("RGB").convert(mode)).save(folder / "modes" / f"{mode}.png")
    return folder


# Lines that are not compared: progress bars, and what libraries warn of in themselves or in their installation.
IDLE = re.compile(
    r"\d+%\||Failed to load .*torchao|Enum subclass and is now natively|cpuinfo_utils\.cpp|^\[torch\.onnx\]"
    r"|torch/onnx/_internal|isinstance\(treespec, LeafSpec\)|return cls\.__new__\(cls|^ *warnings\.warn\($"
    r"|^ *_warn_once\($|^Generating \w+ split|does not have many workers"
)


@pytest.fixture
def client(place, tmp_path):
    """A function that runs a program of this folder in a process of its own, in a folder that is thrown away.

    What the process says on standard error has to be what `says` expects: each of these regular expressions is found in
    a line, and each line but those of IDLE has one of them. Paths in `arguments` are taken as they are.
    """

    def run(program, *arguments, says=(), environment=None, peers=False, listen=True):
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        variables |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        variables |= {"HF_MODULES_CACHE": str(tmp_path / "code"), "TQDM_MININTERVAL": "60", **(environment or {})}
        there = tmp_path / "there"
        there.mkdir()
        for name in ("runs", "path", "photo.jpg"):  # what the pages speak of
            copy = shutil.copytree if (place / name).is_dir() else shutil.copy
            copy(place / name, there / name)
        folders = os.pathsep.join([*FOLDERS, *(PEERS if peers else [])])
        command = [sys.executable, "-I", HERE / "start.py", folders, HERE / program, *arguments]
        done = subprocess.run(command, cwd=there, env=variables, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        if not listen:
            return there, done.stdout
        lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip() and not IDLE.search(line)]
        unexpected = [line for line in lines if not any(re.search(pattern, line) for pattern in says)]
        assert unexpected == [], "\n".join(unexpected)
        assert [pattern for pattern in says if not any(re.search(pattern, line) for line in lines)] == []
        return there, done.stdout

    return run


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
