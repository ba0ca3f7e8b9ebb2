"""A Space on the Hub with the page of scripts/demo.py for one model.

It holds the page, the `cli.py` that it imports, this package, and the names of the packages that these need. So it runs
where none of them is installed, and reads the model from its own repository.
"""

import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, SpaceCard, SpaceCardData
from packaging.requirements import Requirement

from .push import HubError, Pushed, commit_files, create_repo, example_files, hub_errors

PACKAGE = Path(__file__).parent.parent
# A Space without a GPU needs no CUDA.
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
# Files of an earlier push that go when they are not in the new one.
OWNED = (f"{PACKAGE.name}/*", "examples/*")
APP = '''"""The page of {model_id}: demo.py, which lies beside this file, and reads the model from the Hub."""

import sys

from demo import main

sys.exit(main({arguments}))
'''
TEXT = """# What {name} sees

Drop an image, and see the likeliest classes, where the attention goes, and the patches that
[{model_id}]({url}) reads. The page is `scripts/demo.py` of the package that lies beside it here, `{package}`.
"""


def push_space(
    page: str | Path,
    space_id: str,
    model_id: str,
    examples: Sequence[Path] = (),
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload page",
) -> Pushed:
    """Push a Space with the page for a model that is on the Hub, in one commit; without changes no commit is made.

    Args:
        page: scripts/demo.py, beside which cli.py lies.
        space_id: `owner/name`, or `name` for one of the token's owner; made if there is none.
        model_id: Whose weights it reads, each time that it starts.
        examples: Images to click on; anybody who sees the Space sees them.
        private: Whether nobody else may see a new Space. An existing public one is then refused.
        token: None for the saved login.
        commit_message: First line of the commit.

    Raises:
        HubError: The server refused or was not reached, or the package is not installed; the Space is unchanged.
    """
    with hub_errors(space_id, token, "was not pushed"):
        api = HfApi(token=token)
        files = _files(Path(page), model_id, f"{api.endpoint}/{model_id}", examples)
        space_id = create_repo(api, space_id, private, repo_type="space")
        commit, changed = commit_files(api, space_id, files, OWNED, repo_type="space", commit_message=commit_message)
        needs_token = api.model_info(model_id).private
    url = f"{api.endpoint}/spaces/{space_id}"
    return Pushed(space_id, commit.oid, changed, url, files=[*files], needs_token=needs_token)


def _files(page: Path, model_id: str, url: str, examples: Sequence[Path]) -> dict[str, bytes | Path]:
    """What the Space holds, by path."""
    arguments = ["--model", model_id, "--host", "0.0.0.0", "--port", "7860"]
    arguments += ["--examples", "examples"] if examples else []
    package = {f"{PACKAGE.name}/{file.relative_to(PACKAGE).as_posix()}": file for file in PACKAGE.rglob("*.py")}
    return (
        example_files("examples", examples)
        | package
        | {
            "README.md": str(_card(model_id, url)).encode(),
            "app.py": APP.format(model_id=model_id, arguments=arguments).encode(),
            "demo.py": page,
            "cli.py": page.with_name("cli.py"),
            "requirements.txt": "\n".join([f"--extra-index-url {CPU_WHEELS}", *requirements("demo"), ""]).encode(),
        }
    )


def _card(model_id: str, url: str) -> SpaceCard:
    """Its head is what the Hub builds the Space by."""
    name = model_id.rpartition("/")[2]
    data = SpaceCardData(
        title=f"What {name} sees",
        emoji="🔍",
        colorFrom="indigo",
        colorTo="yellow",
        sdk="gradio",
        python_version=".".join(platform.python_version_tuple()[:2]),
        app_file="app.py",
        models=[model_id],
        license="apache-2.0",
        short_description="Classes, attention and patches of a Vision Transformer",
    )
    text = TEXT.format(name=name, model_id=model_id, url=url, package=PACKAGE.name)
    return SpaceCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def requirements(extra: str) -> list[str]:
    """What this package needs with an extra, as setup.cfg says.

    Raises:
        HubError: It runs from a folder and was never installed, so nobody knows.
    """
    try:
        stated = [Requirement(line) for line in importlib.metadata.requires(PACKAGE.name) or []]
    except importlib.metadata.PackageNotFoundError:
        raise HubError(f"{PACKAGE.name} is not installed, so what it needs is unknown: pip install -e .") from None
    needed = [each for each in stated if each.marker is None or each.marker.evaluate({"extra": extra})]
    for each in needed:
        each.marker = None
    return [*map(str, needed)]
