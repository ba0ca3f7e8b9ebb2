"""A folder becomes one commit on the Hub, or nothing does.

`HfApi.create_commit` does the work. Why not `upload_folder`: where hf_xet is installed it cuts a large folder into
several commits, and nobody can ask between its upload and its commit whether the push is still wanted.
"""

import contextlib
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import _http
from PIL import Image

from .folder import FolderError, check_folder
from .masking import redact
from .model_card import REPO_PLACEHOLDER, with_examples

# Seconds without one byte from the server before a push gives up; huggingface_hub itself would wait forever.
TIMEOUT_SECONDS = 120.0
# Files of a run that describe its weights: those of an earlier push go when they are not in the new one.
OWNED = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*", "metrics.json", "history.csv", "predictions*",
    "plots/*", "widget/*", "adapter/*",
)  # fmt: skip


class HubError(RuntimeError):
    """A push or a check that failed on the way to the Hub or back; its text holds no token."""


@dataclass(frozen=True)
class Pushed:
    """A finished push.

    `commit` is the full hash; `changed` is False if the repository was up to date already; `needs_token` says that a
    Space's model is private, so that it needs a token to read it.
    """

    repo_id: str
    commit: str
    changed: bool
    url: str
    pr_url: str | None = None
    files: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    needs_token: bool = False


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
    with hub_errors(repo_id, token, "was not prepared"):
        return create_repo(HfApi(token=token), repo_id, private)


def create_repo(api: HfApi, repo_id: str, private: bool, repo_type: str = "model") -> str:
    """The repository's full id; it is made if there is none, a Space for gradio."""
    sdk = "gradio" if repo_type == "space" else None
    made = api.create_repo(repo_id, private=private or None, repo_type=repo_type, space_sdk=sdk, exist_ok=True)
    repo_id = made.repo_id
    if private and not api.repo_info(repo_id, repo_type=repo_type).private:
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
    wanted: Callable[[], bool] = lambda: True,
    examples: Sequence[Path] = (),
) -> Pushed:
    """Push a folder to the Hub in one commit, or not at all; without changes no commit is made.

    The repository and, if named, the branch are created if there are none. Weights, metrics, plots and images of the
    widget that an earlier push brought and this one does not go in the same commit. In the pushed card the repository's
    id takes its place.

    Args:
        folder: A folder that `check_folder` accepts.
        repo_id: `owner/name`, or `name` for one of the token's owner.
        private: Whether nobody else may see a new repository. An existing public one is then refused.
        revision: Branch to push to; None for the default one.
        create_pr: Whether to open a pull request instead of committing.
        token: None for the saved login.
        commit_message: First line of the commit.
        wanted: Asked when all is uploaded; if the answer is no, nothing is committed.
        examples: Images for the card's widget; they are pushed into `widget/`, where anybody sees them.

    Raises:
        FolderError: The folder would not load; nothing was sent.
        HubError: The server refused or was not reached, or the push was no longer wanted. The repository is unchanged
            or, if only the last answer was lost, complete; the folder is untouched. Pushing again is safe.
    """
    folder = Path(folder)
    contents = check_folder(folder, token or get_token())
    with hub_errors(repo_id, token, "was not pushed"):
        api = HfApi(token=token)
        repo_id = create_repo(api, repo_id, private)

        files = {name: folder / name for name in contents.files} | example_files("widget", examples)
        card = (folder / "README.md").read_text(encoding="utf-8").replace(REPO_PLACEHOLDER, repo_id)
        if examples:
            place = f"{api.endpoint}/{repo_id}/resolve/{quote(revision or 'main', safe='')}/widget"
            card = with_examples(card, [(image.stem, f"{place}/{quote(image.name)}") for image in examples])
        files["README.md"] = card.encode()
        options = {"revision": revision, "create_pr": create_pr, "commit_message": commit_message}
        commit, changed = commit_files(api, repo_id, files, OWNED, wanted=wanted, **options)
    return Pushed(repo_id, commit.oid, changed, str(commit.commit_url), commit.pr_url, [*files], contents.left_out)


def commit_files(
    api: HfApi,
    repo_id: str,
    files: dict[str, Path | bytes],
    owned: tuple[str, ...],
    repo_type: str = "model",
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload",
    wanted: Callable[[], bool] = lambda: True,
) -> tuple[CommitInfo, bool]:
    """Commit files in one commit, and whether anything changed; `push_folder` says what other arguments are.

    Args:
        files: Path in the repository -> file or content.
        owned: Patterns of files that go if they are there and not among the new ones.

    Raises:
        HubError: They were ignored, or are no longer wanted.
    """
    place = {"repo_type": repo_type, "revision": revision}
    for attempt in range(3):
        head = _head(api, repo_id, **place, create_branch=not create_pr)
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
        remote = {sibling.rfilename for sibling in head.siblings or []} - set(files)
        stale = [name for name in sorted(remote) if any(fnmatch.fnmatch(name, pattern) for pattern in owned)]
        api.preupload_lfs_files(repo_id, added, **place, create_pr=create_pr, free_memory=False)
        ignored = [addition.path_in_repo for addition in added if getattr(addition, "_should_ignore", False)]
        if ignored:
            raise HubError(f"{repo_id} was not pushed: its .gitignore leaves out {', '.join(ignored)}.")
        if not wanted():
            raise HubError(f"{repo_id} was not pushed: a newer push came first.")
        try:
            commit = api.create_commit(
                repo_id,
                added + [CommitOperationDelete(path_in_repo=name) for name in stale],
                commit_message=commit_message,
                create_pr=create_pr,
                parent_commit=head.sha,  # what did not change is not sent, so nothing else may change meanwhile
                **place,
            )
            break
        except HfHubHTTPError as error:
            if _status(error) not in (409, 412) or attempt == 2:
                raise
    return commit, commit.oid != head.sha


def _head(api: HfApi, repo_id: str, repo_type: str, revision: str | None, create_branch: bool):
    """The commit that a push builds on; a branch that is missing is made from the default one."""
    try:
        return api.repo_info(repo_id, repo_type=repo_type, revision=revision)
    except RevisionNotFoundError:
        if not create_branch or revision.startswith("refs/"):
            raise
    api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
    return api.repo_info(repo_id, repo_type=repo_type, revision=revision)


def example_files(folder: str, images: Sequence[Path]) -> dict[str, Path]:
    """Where images go in a folder of a repository; refused if two have one name, or one is no image."""
    files = {f"{folder}/{image.name}": image for image in images}
    if len(files) < len(images):
        raise HubError(f"{len(images)} examples have only {len(files)} different file names; rename some.")
    for path in images:
        try:
            with Image.open(path) as image:
                image.verify()
        except Exception as error:  # Pillow's readers raise many kinds
            raise HubError(f"{path} cannot be read as an image: {_one_line(error)}.") from None
    return files


def give_up_on_silence():
    """Have this process's clients give up on a server that accepts and never answers.

    It is set where clients are made, since huggingface_hub makes a new one when a connection fails. A factory that the
    user has set, with proxies or certificates, goes on making them, and a time-out that it sets stays. Not by
    `set_client_factory`, which closes the client that other threads may be using.
    """
    make_client = _http._GLOBAL_CLIENT_FACTORY
    if not hasattr(make_client, "made_by"):

        def make_client_with_timeout():
            return _with_timeout(make_client())

        make_client_with_timeout.made_by = __name__
        _http._GLOBAL_CLIENT_FACTORY = make_client_with_timeout
    _with_timeout(get_session())


def _with_timeout(client):
    if client.timeout.read is None:
        client.timeout = TIMEOUT_SECONDS
    return client


@contextlib.contextmanager
def hub_errors(repo_id: str, token: str | None, what: str) -> Iterator[None]:
    """Talk to the Hub: whatever goes wrong becomes one HubError, without tokens and the chain that may hold one.

    Args:
        repo_id: Begins the error's text.
        token: Masked in it, like the saved login's.
        what: Follows the id, e.g. "was not pushed".
    """
    give_up_on_silence()
    try:
        yield
    except (HubError, FolderError):
        raise
    except Exception as error:
        text = f"{repo_id} {what}: "
        if _status(error) in (401, 403) or isinstance(error, RepositoryNotFoundError):
            text += "it does not exist, or this token may not do that; check the id, and log in with `hf auth login`. "
        elif _status(error) is None and not isinstance(error, ValueError):
            text += f"{HfApi().endpoint} does not answer as it should; nothing is lost, and calling again is safe. "
        raise HubError(redact(text + _one_line(error), token or get_token())[:1000]) from None


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _one_line(error: BaseException | None) -> str:
    """An error and its causes, five at most, in one line."""
    texts = []
    while error is not None and len(texts) < 5:
        texts.append(f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": "))
        error = error.__cause__
    return " <- ".join(texts)
