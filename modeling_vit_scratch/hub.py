"""A trained folder on the Hub and back: checks before a push, one commit for everything, and proof.

A folder is pushed whole or not at all: what would not load on the other side is refused before anything is sent, and
what is sent becomes visible in a single commit. A token is never shown, and never sent in a file.
"""

import ast
import contextlib
import fnmatch
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_session,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 exports it only with torchvision

from . import modeling_vit_scratch as modeling
from .configuration_vit_scratch import AUTO_MAP, ViTScratchConfig
from .model_card import REPO_PLACEHOLDER, read_json, redact, write_model_card

# Seconds without one byte from the server before a push gives up; huggingface_hub itself would wait forever.
TIMEOUT_SECONDS = 120.0

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# Left out of a push, by name of a folder or a file, with the reason that is shown.
LEFT_OUT_FOLDERS = {
    "*checkpoint-*": "a checkpoint", "runs": "logs", "logs": "logs", "wandb": "logs", "__pycache__": "bytecode",
}  # fmt: skip
LEFT_OUT_FILES = {
    "training_args.bin": "training state", "trainer_state.json": "training state", "optimizer*": "training state",
    "scheduler.pt": "training state", "scaler.pt": "training state", "rng_state*": "training state",
    "*.log": "a log", "events.out.tfevents*": "a log", "*.pyc": "bytecode", "*.tmp": "a temporary file",
    "*.lock": "a temporary file",
}  # fmt: skip
# Files of a run that describe its weights: those of an earlier push go when they are not in the new one.
OWNED = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*", "metrics.json", "history.csv", "predictions*",
    "plots/*",
)  # fmt: skip
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}
TEXT_SUFFIXES = {".json", ".jsonl", ".md", ".csv", ".txt", ".py", ".yaml", ".yml"}


class HubError(RuntimeError):
    """A push or a check that failed on the way to the Hub or back; its text holds no token."""


class FolderError(ValueError):
    """A folder that must not be pushed; `problems` lists every reason."""

    def __init__(self, folder: Path, problems: list[str]):
        self.problems = problems
        super().__init__(
            f"{folder} was not pushed; nothing was sent. To mend:\n" + "\n".join(f"  - {p}" for p in problems)
        )


@dataclass(frozen=True)
class Contents:
    """What a push of a folder sends, and what it leaves out with the reason; paths relative to the folder."""

    files: list[str]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Pushed:
    """A finished push: `commit` is the full hash, `changed` is False if the repository was up to date already."""

    repo_id: str
    commit: str
    changed: bool
    url: str
    pr_url: str | None = None
    files: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verified:
    """A repository that loads and computes, away from the package, what its weights compute here."""

    repo_id: str
    commit: str
    reference: str
    shapes: dict[str, list[int]]


def list_folder(folder: str | Path) -> Contents:
    """The files of a folder that a push sends, and those it leaves out: checkpoints, training state, logs, hidden."""
    folder = Path(folder)
    files, left_out = [], {}
    for root, folders, names in os.walk(folder):
        base = Path(root).relative_to(folder)
        for name in sorted(folders):
            if reason := _left_out(name, LEFT_OUT_FOLDERS):
                left_out[f"{(base / name).as_posix()}/"] = reason
        folders[:] = sorted(name for name in folders if not _left_out(name, LEFT_OUT_FOLDERS))
        for name in sorted(names):
            path = (base / name).as_posix()
            if reason := _left_out(name, LEFT_OUT_FILES):
                left_out[path] = reason
            else:
                files.append(path)
    return Contents(files, left_out)


def _left_out(name: str, patterns: dict[str, str]) -> str | None:
    if name.startswith("."):
        return "hidden"
    return next((reason for pattern, reason in patterns.items() if fnmatch.fnmatch(name, pattern)), None)


def check_folder(folder: str | Path, token: str | None = None) -> Contents:
    """Refuse a folder that would not load from the Hub, or that must not be seen there. Sends nothing.

    Args:
        folder: A folder as `save_pretrained` and the training write it, with its model card.
        token: A token that must not stand in any of the files; whatever looks like one is refused too.

    Returns:
        What a push sends and what it leaves out.

    Raises:
        FolderError: Everything that is missing or wrong, each with the mend.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FolderError(folder, ["it is not a folder."])
    contents = list_folder(folder)
    config, problems = _check_config(folder)
    problems += _check_code(folder, config)
    problems += _check_weights(folder, config)
    problems += _check_processor(folder, config)
    problems += _check_card(folder)
    problems += _check_contents(folder, contents.files, token)
    if problems:
        raise FolderError(folder, problems)
    return contents


def _check_config(folder: Path) -> tuple[ViTScratchConfig | None, list[str]]:
    try:
        content = read_json(folder / "config.json")
    except ValueError as error:
        return None, [str(error)]
    problems = []
    if content.get("model_type") != ViTScratchConfig.model_type:
        return None, [f"config.json: model_type is {content.get('model_type')!r}, not {ViTScratchConfig.model_type!r}."]
    auto_map = content.get("auto_map")
    auto_map = auto_map if isinstance(auto_map, dict) else {}
    missing = [key for key in AUTO_MAP if key not in auto_map]
    if missing:
        problems.append(f"config.json: auto_map lacks {', '.join(missing)}; save the model anew with save_pretrained.")
    architecture = (content.get("architectures") or [None])[0]
    if not (isinstance(architecture, str) and hasattr(modeling, architecture)):
        problems.append(f"config.json: architectures names {architecture!r}, which is no model of this package.")
    try:
        return ViTScratchConfig.from_pretrained(folder), problems
    except Exception as error:
        return None, [*problems, f"config.json: {error}"]


def _check_code(folder: Path, config: ViTScratchConfig | None) -> list[str]:
    """Every class of the auto_map stands in a file of the folder, which parses and finds its relative imports there."""
    problems, trees = [], {}
    for key, reference in (config.auto_map if config is not None else AUTO_MAP).items():
        if not isinstance(reference, str) or reference.count(".") != 1 or "--" in reference:
            problems.append(
                f"config.json: auto_map's {key} is {reference!r}, not a file of this folder and a class in it; "
                "save the model anew with save_pretrained."
            )
            continue
        module, class_name = reference.split(".")
        if module not in trees:
            trees[module], found = _parse(folder, module)
            problems += found
        tree = trees[module]
        if tree is not None and class_name not in {n.name for n in tree.body if isinstance(n, ast.ClassDef)}:
            problems.append(f"{module}.py: there is no class {class_name}, which auto_map's {key} names.")
    return problems


def _parse(folder: Path, module: str) -> tuple[ast.Module | None, list[str]]:
    path = folder / f"{module}.py"
    if not path.is_file():
        return None, [f"{path.name} is missing: the model's code; save the model anew with save_pretrained."]
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        return None, [f"{path.name} is not Python: {error}."]
    problems = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            name = (node.module or "").split(".")[0]
            if node.level > 1 or not name or not (folder / f"{name}.py").is_file():
                problems.append(f"{path.name}, line {node.lineno}: the import finds nothing in this folder.")
    return tree, problems


def _check_weights(folder: Path, config: ViTScratchConfig | None) -> list[str]:
    index = folder / WEIGHTS_INDEX
    shards = [WEIGHTS]
    problems = []
    if not (folder / WEIGHTS).is_file():
        if not index.is_file():
            return [f"{WEIGHTS} is missing: the weights; save the model with save_pretrained."]
        try:
            shards = sorted(set(read_json(index)["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            return [f"{index.name}: no usable weight_map ({error})."]
    elif index.is_file():
        problems.append(f"{WEIGHTS} and {index.name} are both here; loading would use the first: remove one.")
    found = {}
    for shard in shards:
        try:
            with safe_open(folder / shard, framework="pt") as tensors:
                found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            problems.append(f"{shard} is not a readable safetensors file: {error}.")
    if problems or config is None:
        return problems
    model_class = getattr(modeling, (config.architectures or [""])[0], None)
    if model_class is None:
        return []  # told by the check of the config
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in model_class(config).state_dict().items()}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            problems.append(f"weights: {name} {expected[name]} is missing.")
        elif name not in expected:
            problems.append(f"weights: {name} {found[name]} has no place in the model that config.json describes.")
        elif found[name] != expected[name]:
            problems.append(f"weights: {name} is {found[name]}, but config.json says {expected[name]}.")
    return problems[:8] + ([f"weights: {len(problems) - 8} more tensors do not fit."] if len(problems) > 8 else [])


def _check_processor(folder: Path, config: ViTScratchConfig | None) -> list[str]:
    """The processor loads, and makes of a picture what the model takes."""
    name = "preprocessor_config.json"
    if not (folder / name).is_file():
        return [f"{name} is missing: how pictures become pixels; save it with processor.save_pretrained."]
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
    except Exception as error:
        return [f"{name}: {' '.join(str(error).split())[:300]}"]
    if config is None or config.num_channels not in (1, 3):
        return []
    picture = Image.new("L" if config.num_channels == 1 else "RGB", (57, 43))
    expected = (1, config.num_channels, *config.image_hw)
    try:
        shape = tuple(processor(picture, return_tensors="pt")["pixel_values"].shape)
    except Exception as error:
        return [f"{name}: the processor fails on a picture: {' '.join(str(error).split())[:300]}"]
    if shape != expected:
        return [f"{name}: a picture becomes {shape}, but the model takes {expected}; set the processor's size."]
    return []


def _check_card(folder: Path) -> list[str]:
    path = folder / "README.md"
    if not path.is_file():
        return ["README.md is missing: the model card; make one with write_model_card."]
    try:
        card = ModelCard.load(path)
    except Exception as error:
        return [f"README.md: its YAML head cannot be read: {' '.join(str(error).split())[:300]}"]
    if not card.data.to_dict() or not card.text.strip():
        return ["README.md has no YAML head, or no text below it; make one with write_model_card."]
    return []


def _check_contents(folder: Path, files: list[str], token: str | None) -> list[str]:
    """No pickle, no token, nothing unreadable among what would be sent."""
    problems = []
    for name in files:
        path = folder / name
        try:
            content = path.read_bytes() if path.suffix in TEXT_SUFFIXES else path.open("rb").read(2)
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}.")
            continue
        pickled = path.suffix in PICKLE_SUFFIXES or (
            path.suffix != ".safetensors" and content[:1] == b"\x80" and content[1:2] in b"\x02\x03\x04\x05"
        )
        if pickled:
            problems.append(
                f"{name} is a pickle, which can run code on loading; save tensors as safetensors, or move it."
            )
        if path.suffix in TEXT_SUFFIXES:
            text = content.decode("utf-8", errors="replace")
            if redact(text, token) != text:
                line = next(i for i, line in enumerate(text.split("\n"), 1) if redact(line, token) != line)
                problems.append(
                    f"{name}, line {line}: this looks like a token; remove it, and revoke it if it was real."
                )
    return problems


def prepare_repo(repo_id: str, private: bool = False, token: str | None = None) -> str:
    """Create the repository if there is none, and find out early whether this token may write to it.

    Args:
        repo_id: `owner/name`, or `name` for one of the token's owner.
        private: Whether nobody else may see it. An existing public repository is then refused.
        token: None for the saved login.

    Returns:
        The full id.

    Raises:
        HubError: No access, no connection, or a public repository where a private one was asked for.
    """
    with _hub_errors(repo_id, token, "was not prepared"), _timeouts():
        return _prepare_repo(HfApi(token=token), repo_id, private)


def _prepare_repo(api: HfApi, repo_id: str, private: bool) -> str:
    repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise HubError(f"{repo_id} exists and is public; make it private in its settings, or push without private.")
    return repo_id


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str = "Upload model",
) -> Pushed:
    """Push a folder to the Hub in one commit, or not at all; without changes no commit is made.

    The repository and, if named, the branch are created if there are none. Weights, metrics and plots of an earlier
    push that are not in this folder go in the same commit. In the pushed card the repository's id takes its place.

    Args:
        folder: A folder that `check_folder` accepts.
        repo_id: `owner/name`, or `name` for one of the token's owner.
        private: Whether nobody else may see a new repository. An existing public one is then refused.
        revision: Branch to push to; None for the default one.
        create_pr: Whether to open a pull request instead of committing.
        token: None for the saved login.
        commit_message: First line of the commit.

    Raises:
        FolderError: The folder would not load; nothing was sent.
        HubError: The server refused or was not reached. The repository is unchanged or, if only the last answer was
            lost, complete; the folder is untouched. Pushing again is safe.
    """
    return _push(Path(folder), repo_id, private, revision, create_pr, token, commit_message)


def _push(
    folder: Path,
    repo_id: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    token: str | None,
    commit_message: str,
    wanted: Callable[[], bool] = lambda: True,
) -> Pushed:
    """`push_folder`, given up with a HubError if it is no longer `wanted` when it comes to committing."""
    contents = check_folder(folder, token or get_token())
    with _hub_errors(repo_id, token, "was not pushed"), _timeouts():
        api = HfApi(token=token)
        repo_id = _prepare_repo(api, repo_id, private)
        for attempt in range(3):
            head = _head(api, repo_id, revision, create_branch=not create_pr)
            operations = _operations(folder, contents.files, repo_id, [f.rfilename for f in head.siblings or []])
            api.preupload_lfs_files(
                repo_id, [o for o in operations if isinstance(o, CommitOperationAdd)],
                revision=revision, create_pr=create_pr, free_memory=False,
            )  # fmt: skip
            ignored = [o.path_in_repo for o in operations if getattr(o, "_should_ignore", False)]
            if ignored:
                raise HubError(f"{repo_id} was not pushed: its .gitignore leaves out {', '.join(ignored)}.")
            if not wanted():
                raise HubError(f"{repo_id} was not pushed: a newer push came first.")
            try:
                commit = api.create_commit(
                    repo_id,
                    operations,
                    commit_message=commit_message,
                    revision=revision,
                    create_pr=create_pr,
                    parent_commit=head.sha,  # what did not change is not sent, so nothing else may change meanwhile
                )
                break
            except HfHubHTTPError as error:
                if _status(error) not in (409, 412) or attempt == 2:
                    raise
    return Pushed(
        repo_id=repo_id,
        commit=commit.oid,
        changed=commit.oid != head.sha,
        url=str(commit.commit_url),
        pr_url=commit.pr_url,
        files=contents.files,
        left_out=contents.left_out,
    )


def _head(api: HfApi, repo_id: str, revision: str | None, create_branch: bool):
    """The commit that a push builds on; a branch that is missing is made from the default one."""
    try:
        return api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        if not create_branch or revision.startswith("refs/"):
            raise
    api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.model_info(repo_id, revision=revision)


def _operations(folder: Path, files: list[str], repo_id: str, remote: list[str]) -> list:
    operations = []
    for name in files:
        content = folder / name
        if name == "README.md":
            content = content.read_text(encoding="utf-8").replace(REPO_PLACEHOLDER, repo_id).encode()
        operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content))
    stale = [name for name in remote if name not in files and any(fnmatch.fnmatch(name, p) for p in OWNED)]
    return operations + [CommitOperationDelete(path_in_repo=name) for name in stale]


_TIMEOUTS = threading.Lock()
_timeouts_open: list = []  # what the session had before, once for each push under way


@contextlib.contextmanager
def _timeouts() -> Iterator[None]:
    """A server that accepts and never answers must not hold us: huggingface_hub's client has no timeout."""
    session = get_session()
    with _TIMEOUTS:
        _timeouts_open.append(_timeouts_open[0] if _timeouts_open else session.timeout)
        session.timeout = TIMEOUT_SECONDS
    try:
        yield
    finally:
        with _TIMEOUTS:
            before = _timeouts_open.pop()
            if not _timeouts_open:
                session.timeout = before


@contextlib.contextmanager
def _hub_errors(repo_id: str, token: str | None, what: str) -> Iterator[None]:
    """Turn whatever goes wrong on the way into one HubError, without tokens and without the chain that may hold one."""
    try:
        yield
    except (HubError, FolderError):
        raise
    except Exception as error:
        status = _status(error)
        if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
            reason = "it does not exist, or this token may not do that; check the id, and log in with `hf auth login`."
            reason += f" {_one_line(error)}"
        elif status is not None or isinstance(error, ValueError):
            reason = _one_line(error)
        else:
            reason = (
                f"{HfApi().endpoint} does not answer as it should; nothing is lost, and the same call again is safe."
            )
            reason += f" {_one_line(error)}"
        raise HubError(redact(f"{repo_id} {what}: {reason}", token or get_token())[:1000]) from None


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _one_line(error: BaseException) -> str:
    """An error and its causes in one line."""
    texts, seen = [], set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = " ".join(str(error).split())
        texts.append(f"{type(error).__name__}: {text}" if text else type(error).__name__)
        error = error.__cause__
    return " <- ".join(texts)


# Run by `python -c` where this package cannot be imported; the job comes as JSON on standard input.
_PROBE = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_vit_scratch":
            raise ImportError(f"{name} is blocked: the repository must load without the package")

sys.meta_path.insert(0, Blocked())
job = json.load(sys.stdin)

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

torch.set_num_threads(job["threads"])
where = dict(revision=job["revision"], trust_remote_code=True, return_dict=True)
AutoConfig.from_pretrained(job["repo"], **where)
processor = AutoImageProcessor.from_pretrained(job["repo"], revision=job["revision"])
pixels = load_file(job["pixels"])["pixels"]
out = {}
with torch.no_grad():
    model = AutoModel.from_pretrained(job["repo"], **where).eval()
    out["last_hidden_state"] = model(pixels.to(model.dtype)).last_hidden_state
    if job["classifier"]:
        model = AutoModelForImageClassification.from_pretrained(job["repo"], **where).eval()
        out["logits"] = model(pixels.to(model.dtype)).logits
        if job["picture"]:
            picture = processor(Image.open(job["picture"]), return_tensors="pt")["pixel_values"]
            out["picture_logits"] = model(picture.to(model.dtype)).logits
assert "modeling_vit_scratch" not in sys.modules
save_file({name: tensor.contiguous() for name, tensor in out.items()}, job["out"])
"""


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
    with tempfile.TemporaryDirectory() as temporary, _hub_errors(repo_id, token, "was not verified"), _timeouts():
        temporary = Path(temporary)
        api = HfApi(token=token)
        info = api.model_info(repo_id, revision=revision)
        pull = functools.partial(
            hf_hub_download, repo_id, revision=info.sha, token=token, local_dir=temporary / "pulled"
        )
        remote = [sibling.rfilename for sibling in info.siblings or []]
        wanted = [n for n in remote if "/" not in n and n.endswith((".py", ".json", ".safetensors"))]
        for name in wanted:
            pull(name)
        pulled = temporary / "pulled"
        if not trust_remote_code:
            _require_own_code(repo_id, info.sha, pulled, Path(folder) if folder else Path(modeling.__file__).parent)
        source = Path(folder) if folder else pulled
        config = ViTScratchConfig.from_pretrained(source)
        classifier = str((config.architectures or [""])[0]).endswith("ForImageClassification")
        generator = torch.Generator().manual_seed(0)
        pixels = torch.rand(4, config.num_channels, *config.image_hw, generator=generator) * 2 - 1
        save_file({"pixels": pixels}, temporary / "pixels.safetensors")
        picture = None
        if config.num_channels in (1, 3):
            shape = (61, 83, 3) if config.num_channels == 3 else (61, 83)
            picture = temporary / "picture.png"
            Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).save(picture)
        job = {
            "repo": repo_id,
            "revision": info.sha,
            "threads": torch.get_num_threads(),
            "classifier": classifier,
            "pixels": str(temporary / "pixels.safetensors"),
            "picture": picture and str(picture),
            "out": str(temporary / "out.safetensors"),
        }
        _run_probe(job, temporary, api.endpoint, token or get_token())
        theirs = load_file(temporary / "out.safetensors")
        ours = _reference(source, config, classifier, pixels, picture)
    name = str(folder) if folder else "the same weights in this package"
    for key, tensor in ours.items():
        if tensor.dtype != theirs[key].dtype or not torch.equal(tensor, theirs[key]):
            gap = (tensor.double() - theirs[key].double()).abs().max() if tensor.shape == theirs[key].shape else "shape"
            raise HubError(f"{repo_id}@{info.sha}: {key} differs from {name} (by up to {gap}).")
    return Verified(repo_id, info.sha, name, {key: list(tensor.shape) for key, tensor in ours.items()})


def _require_own_code(repo_id: str, commit: str, pulled: Path, own: Path):
    modules = {reference.split(".")[0] for reference in AUTO_MAP.values()}
    auto_map = read_json(pulled / "config.json").get("auto_map")
    if not isinstance(auto_map, dict) or not set(auto_map.values()) <= set(AUTO_MAP.values()):
        raise HubError(f"{repo_id}@{commit}: its auto_map names other classes than ours: {auto_map}.")
    for name in sorted({f"{module}.py" for module in modules} | {path.name for path in pulled.glob("*.py")}):
        theirs, ours = pulled / name, own / name
        if not theirs.is_file():
            raise HubError(f"{repo_id}@{commit}: {name} is missing there.")
        if not ours.is_file() or theirs.read_bytes() != ours.read_bytes():
            raise HubError(
                f"{repo_id}@{commit}: {name} is not the code that stands here, and verifying would run it; "
                "read it first, then say trust_remote_code."
            )


def _run_probe(job: dict, temporary: Path, endpoint: str, token: str | None):
    """Load and run the repository in a fresh process with fresh caches, where this package cannot be imported."""
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
            [sys.executable, "-c", _PROBE],
            input=json.dumps(job),
            text=True,
            capture_output=True,
            env=environment,
            cwd=temporary / "elsewhere",
            timeout=600,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise HubError(f"{job['repo']} did not load within 10 minutes.") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = redact(lines[-1] if lines else f"exit status {done.returncode}", token)
        raise HubError(f"{job['repo']}@{job['revision']} does not load without this package: {reason}")


def _reference(
    source: Path, config: ViTScratchConfig, classifier: bool, pixels: torch.Tensor, picture: Path | None
) -> dict[str, torch.Tensor]:
    """What the probe computes, here and by this package's own classes."""
    out = {}
    with torch.no_grad():
        model = getattr(modeling, config.architectures[0]).from_pretrained(source, return_dict=True).eval()
        out["last_hidden_state"] = model.base_model(pixels.to(model.dtype)).last_hidden_state
        if classifier:
            out["logits"] = model(pixels.to(model.dtype)).logits
            if picture:
                processed = AutoImageProcessor.from_pretrained(source)(Image.open(picture), return_tensors="pt")
                out["picture_logits"] = model(processed["pixel_values"].to(model.dtype)).logits
    return out


class HubPushCallback(TrainerCallback):
    """Push every checkpoint's model in the background, each a repository that loads; training never waits or fails.

    A push that is still under way when the next checkpoint is saved is followed by the newest one. A failure is shown
    in one line and made good by the next checkpoint's push, or at the end of training. `push_final` then pushes the
    finished folder.

    Args:
        repo_id: `owner/name`, or `name` for one of the token's owner.
        private: As in `push_folder`, like `revision` and `token`.
        wait_seconds: How long the end of training waits for a push that is under way.
        retry_seconds: Pauses between the tries of `push_final`.
        report: Takes each line that is shown; None prints it to standard error.
    """

    def __init__(
        self,
        repo_id: str,
        private: bool = False,
        revision: str | None = None,
        token: str | None = None,
        wait_seconds: float = 600.0,
        retry_seconds: tuple[float, ...] = (5.0, 30.0),
        report: Callable[[str], None] | None = None,
    ):
        self.repo_id, self.private, self.revision, self.token = repo_id, private, revision, token
        self.wait_seconds, self.retry_seconds = wait_seconds, retry_seconds
        self.report = report or functools.partial(print, file=sys.stderr, flush=True)
        self.errors: list[str] = []
        self._lock = threading.Lock()
        self._waiting: tuple[Path, str] | None = None  # the newest snapshot that nobody pushes yet, with its message
        self._worker: threading.Thread | None = None
        self._gave_up = False  # waiting took too long once: never wait again
        self._final = False  # the finished folder is on its way: nothing older may come after it

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            for left_over in Path(args.output_dir).glob(".hub_push-*"):  # of a run that was killed
                shutil.rmtree(left_over, ignore_errors=True)

    def on_save(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        steps = f"step {state.global_step}" + (f" of {state.max_steps}" if state.max_steps > 0 else "")
        try:
            snapshot = _snapshot(checkpoint, f"Training is still going on: this is {steps}.")
        except (OSError, ValueError) as error:
            self._show(f"checkpoint-{state.global_step} was not pushed: {error}")
            return
        self._enqueue(snapshot, f"Training in progress, {steps}")
        self._start()

    def on_train_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self._join()
        self._start()  # once more, if the last push failed
        self._join()
        self._discard()

    def push_final(self, folder: str | Path, commit_message: str = "End of training") -> Pushed | None:
        """Push the finished folder, trying again after each pause; a failure is shown with the command that mends it.

        Returns:
            The push, or None if it failed.
        """
        self._join()
        self._final = True
        self._discard()
        for pause in (*self.retry_seconds, None):
            try:
                pushed = push_folder(
                    folder, self.repo_id, self.private, self.revision, token=self.token, commit_message=commit_message
                )
            except FolderError as error:
                self._show(str(error))
                return None
            except Exception as error:
                self._show(str(error))
                if pause is not None:
                    time.sleep(pause)
            else:
                self.report(f"pushed to {pushed.url}" if pushed.changed else f"{pushed.url} is up to date")
                return pushed
        command = ["python", "scripts/push_to_hub.py", str(folder), self.repo_id] + ["--private"] * self.private
        command += ["--revision", self.revision] if self.revision else []
        self._show(f"the folder is complete; push it later: {shlex.join(command)}")
        return None

    def _enqueue(self, snapshot: Path, message: str):
        self._discard()
        with self._lock:
            self._waiting = (snapshot, message)

    def _discard(self):
        with self._lock:
            waiting, self._waiting = self._waiting, None
        if waiting:
            shutil.rmtree(waiting[0], ignore_errors=True)

    def _start(self):
        with self._lock:
            if self._waiting is not None and self._worker is None:
                # A daemon: a program that ends must not wait for a dead server, and a push cut short is no commit.
                self._worker = threading.Thread(target=self._work, name="hub-push", daemon=True)
                self._worker.start()

    def _join(self):
        worker = self._worker
        if worker is not None and not self._gave_up:
            worker.join(self.wait_seconds)
            if worker.is_alive():
                self._gave_up = True
                self._show(f"a push to {self.repo_id} is still under way after {self.wait_seconds:g} s; going on.")

    def _work(self):
        """Push what waits until nothing does; what failed waits again, unless something newer has come."""
        while True:
            with self._lock:
                job, self._waiting = self._waiting, None
                if job is None:
                    self._worker = None
                    return
            snapshot, message = job
            try:
                _push(
                    snapshot, self.repo_id, self.private, self.revision, False, self.token, message,
                    wanted=lambda: not self._final,
                )  # fmt: skip
                failed = False
            except Exception as error:
                failed = not self._final
                if failed:
                    self._show(f"{message}: {redact(str(error), self.token)} Training goes on.")
            with self._lock:
                if failed and self._waiting is None:
                    self._waiting, self._worker = job, None
                    return
            shutil.rmtree(snapshot, ignore_errors=True)

    def _show(self, text: str):
        self.errors.append(text)
        self.report(text)


def _snapshot(checkpoint: Path, status: str) -> Path:
    """A checkpoint's model files and a card, linked aside: the checkpoint may be deleted before they are pushed."""
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint.name} is not there.")
    snapshot = Path(tempfile.mkdtemp(prefix=".hub_push-", dir=checkpoint.parent))
    try:
        for path in sorted(checkpoint.iterdir()):
            model_file = path.suffix == ".py" or path.name in ("config.json", "preprocessor_config.json", WEIGHTS_INDEX)
            # Not every .safetensors: a run that averages its weights keeps those that are trained beside the model's.
            model_file = model_file or fnmatch.fnmatch(path.name, "model*.safetensors")
            if model_file and path.is_file():
                try:
                    os.link(path, snapshot / path.name)
                except OSError:
                    shutil.copy2(path, snapshot / path.name)
        write_model_card(snapshot, status)
    except BaseException:
        shutil.rmtree(snapshot, ignore_errors=True)
        raise
    return snapshot


__all__ = [
    "FolderError",
    "HubError",
    "HubPushCallback",
    "Pushed",
    "Verified",
    "check_folder",
    "list_folder",
    "prepare_repo",
    "push_folder",
    "verify_repo",
]
