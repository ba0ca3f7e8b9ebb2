"""Proof that a repository loads anywhere: a clean process pulls it and computes, and every bit is compared."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi, get_token, snapshot_download
from PIL import Image
from safetensors.torch import load_file, save_file

from .. import modeling_vit_scratch as modeling
from ..configuration_vit_scratch import AUTO_MAP, ViTScratchConfig
from . import probe
from .masking import redact
from .model_card import read_json
from .push import HubError, hub_errors

LOADING_SECONDS = 600


@dataclass(frozen=True)
class Verified:
    """A repository that loads and computes, away from the package, what its weights compute here."""

    repo_id: str
    commit: str
    reference: str
    shapes: dict[str, list[int]]


def verify_repo(
    repo_id: str,
    revision: str | None = None,
    folder: str | Path | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> Verified:
    """Prove that a repository loads anywhere: pull it in a process that cannot import this package, compare every bit.

    The repository's own code then runs. It must be the code of this package (or of `folder`), byte for byte, unless
    `trust_remote_code` is given.

    Args:
        repo_id: `owner/name`.
        revision: Branch, tag or commit; None for the default branch.
        folder: What to compare with; None compares with the server's weights in this package's model.
        token: None for the saved login.
        trust_remote_code: Whether to run code that differs from ours.

    Raises:
        HubError: It cannot be pulled or loaded, its code is not ours, or a number differs.
    """
    with tempfile.TemporaryDirectory() as temporary, hub_errors(repo_id, token, "was not verified"):
        temporary, pulled = Path(temporary), Path(temporary) / "pulled"
        api = HfApi(token=token)
        commit = api.model_info(repo_id, revision=revision).sha
        snapshot_download(
            repo_id, revision=commit, token=token, local_dir=pulled, ignore_patterns="*/*",
            allow_patterns=["*.py", "*.json", "*.safetensors"],
        )  # fmt: skip
        if not trust_remote_code:
            _require_own_code(f"{repo_id}@{commit}", pulled, Path(folder or Path(modeling.__file__).parent))
        source = Path(folder or pulled)
        job = _job(temporary, ViTScratchConfig.from_pretrained(source))
        theirs = _run_probe({**job, "repo": repo_id, "revision": commit}, temporary, api.endpoint, token or get_token())
        ours = probe.compute(str(source), **job, trust_remote_code=False)  # by the classes that this package registers
    reference = str(folder) if folder else "the same weights in this package"
    for key, tensor in ours.items():
        if tensor.dtype != theirs[key].dtype or not torch.equal(tensor, theirs[key]):
            gap = (tensor.double() - theirs[key].double()).abs().max() if tensor.shape == theirs[key].shape else "shape"
            raise HubError(f"{repo_id}@{commit}: {key} differs from {reference} (by up to {gap}).")
    return Verified(repo_id, commit, reference, {key: list(tensor.shape) for key, tensor in ours.items()})


def _require_own_code(repo: str, pulled: Path, own: Path):
    modules = {reference.split(".")[0] for reference in AUTO_MAP.values()}
    auto_map = read_json(pulled / "config.json").get("auto_map")
    if not isinstance(auto_map, dict) or not set(auto_map.values()) <= set(AUTO_MAP.values()):
        raise HubError(f"{repo}: its auto_map names other classes than ours: {auto_map}.")
    for name in sorted({f"{module}.py" for module in modules} | {path.name for path in pulled.glob("*.py")}):
        theirs, ours = pulled / name, own / name
        if not theirs.is_file():
            raise HubError(f"{repo}: {name} is missing there.")
        if not ours.is_file() or theirs.read_bytes() != ours.read_bytes():
            raise HubError(
                f"{repo}: {name} is not the code that stands here, and verifying would run it; "
                "read it first, then say trust_remote_code."
            )


def _job(folder: Path, config: ViTScratchConfig) -> dict:
    """What to compute on: pixels in [-1, 1], and an image of another size if images can have the model's channels."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(4, config.num_channels, *config.image_hw, generator=generator) * 2 - 1
    job = {"pixels": str(folder / "pixels.safetensors"), "image": None}
    save_file({"pixels": pixels}, job["pixels"])
    if config.num_channels in (1, 3):
        job["image"] = str(folder / "image.png")
        shape = (61, 83, 3) if config.num_channels == 3 else (61, 83)
        Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).save(job["image"])
    return job | {"classifier": str((config.architectures or [""])[0]).endswith("ForImageClassification")}


def _run_probe(job: dict, temporary: Path, endpoint: str, token: str | None) -> dict[str, torch.Tensor]:
    """Compute in a fresh process with fresh caches, where this package cannot be imported."""
    out = temporary / "out.safetensors"
    job |= {"trust_remote_code": True, "threads": torch.get_num_threads(), "out": str(out)}
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_HUB_CACHE", "HF_HUB_OFFLINE")}
    environment |= {
        "HF_HOME": str(temporary / "home"),
        "HF_HUB_CACHE": str(temporary / "home" / "hub"),
        "HF_MODULES_CACHE": str(temporary / "modules"),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if token:
        environment["HF_TOKEN"] = token
    (temporary / "elsewhere").mkdir()
    try:
        done = subprocess.run(
            [sys.executable, "-c", Path(probe.__file__).read_text(encoding="utf-8")],
            input=json.dumps(job), text=True, capture_output=True, env=environment, cwd=temporary / "elsewhere",
            timeout=LOADING_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise HubError(f"{job['repo']} did not load within {LOADING_SECONDS // 60} minutes.") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = redact(lines[-1] if lines else f"exit status {done.returncode}", token)
        raise HubError(f"{job['repo']}@{job['revision']} does not load without this package: {reason}")
    return load_file(out)
