"""push_to_hub.py --space: the page of a model as a Space, and images for the model's card."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import TOKEN
from huggingface_hub import HfApi, ModelCard, SpaceCard, snapshot_download
from packaging.requirements import Requirement
from PIL import Image
from runs import ROOT, free_port, load_script

from modeling_vit_scratch.hub import push_folder

# The Space's folder alone: neither the checkout, nor the link to it that an editable installation makes.
START = """
import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path = [place for place in sys.path if place != {root!r}]
sys.path.insert(0, "")
import demo, modeling_vit_scratch
assert modeling_vit_scratch.__file__.startswith({space!r}), modeling_vit_scratch.__file__
main = demo.main
demo.main = lambda arguments: main(["{port}" if word == "7860" else word for word in arguments])
runpy.run_path("app.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def script():
    return load_script("push_to_hub")


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.new("RGB", (20, 30), "red").save(tmp_path / "a red one.png")
    return tmp_path / "a red one.png"


def test_a_model_and_its_page(script, hub, folder, photo, capsys):
    """One commit each; a second push makes none; images that are no longer shown go."""
    command = [str(folder), "me/x", "--space", "page"]
    assert script.main([*command, "--examples", str(photo)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"{hub.url}/spaces/me/page"
    assert "me/page: " in err and hub.commits("me/page", repo_type="space") == ["Upload page"]
    space = hub.files("me/page", repo_type="space")
    code = {file.relative_to(ROOT).as_posix() for file in (ROOT / "modeling_vit_scratch").rglob("*.py")}
    own = {"README.md", "app.py", "cli.py", "demo.py", "requirements.txt", "examples/a red one.png", ".gitattributes"}
    assert set(space) == code | own
    assert space["demo.py"] == (ROOT / "scripts" / "demo.py").read_bytes()
    assert Image.open(io.BytesIO(space["examples/a red one.png"])).size == (20, 30)

    card = SpaceCard(space["README.md"].decode())
    assert (card.data.sdk, card.data.app_file, card.data.models) == ("gradio", "app.py", ["me/x"])
    assert card.data.python_version == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert len(card.data.short_description) <= 60  # the Hub's limit
    lines = space["requirements.txt"].decode().split("\n")
    assert lines[0].startswith("--extra-index-url") and lines[-1] == ""
    names = {Requirement(line).name for line in lines[1:-1]}
    assert {"torch", "transformers", "gradio", "matplotlib"} <= names and "pytest" not in names

    assert hub.files("me/x")["widget/a red one.png"] == photo.read_bytes()
    widget = [{"src": f"{hub.url}/me/x/resolve/main/widget/a%20red%20one.png", "example_title": "a red one"}]
    assert ModelCard(hub.files("me/x")["README.md"].decode()).data["widget"] == widget

    assert script.main([*command, "--examples", str(photo)]) == 0
    assert "me/page is up to date" in capsys.readouterr().err
    assert script.main(command) == 0
    assert not [name for name in hub.files("me/page", repo_type="space") if name.startswith("examples/")]
    assert not [name for name in hub.files("me/x") if name.startswith("widget/")]
    assert "widget" not in hub.files("me/x")["README.md"].decode()
    assert hub.commits("me/page", repo_type="space") == ["Upload page"] * 2


@pytest.mark.slow
def test_it_starts_without_the_checkout(script, hub, folder, photo, tmp_path):
    """What the Hub does: the Space's files in a folder, and `python app.py` there."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")
    from gradio_client import Client, handle_file

    assert script.main([str(folder), "me/x", "--space", "me/page", "--private", "--examples", str(photo)]) == 0
    space = snapshot_download("me/page", repo_type="space", local_dir=tmp_path / "space")
    port = free_port()
    code = START.format(root=str(ROOT), space=space, port=port)
    environment = hub.env() | {"PYTHONSAFEPATH": "1"}
    environment.pop("PYTHONPATH", None)
    with open(tmp_path / "log", "w") as log:
        page = subprocess.Popen(
            [sys.executable, "-c", code], cwd=space, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        for _ in range(600):
            assert page.poll() is None, (tmp_path / "log").read_text()
            if f":{port}" in (tmp_path / "log").read_text():
                break
            time.sleep(0.2)
        client = Client(f"http://127.0.0.1:{port}", verbose=False, httpx_kwargs={"timeout": 120})
        answer = client.predict(handle_file(str(photo)), 1, 1, api_name="/classify")
        assert {row["label"] for row in answer[0]["confidences"]} == {"airplane", "cat", "dog"}
        assert os.path.exists(answer[1])  # the rollout
    finally:
        page.terminate()
        page.wait(30)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--space", "me/page", "--create_pr"], 2, "--space reads the model's main branch"),
        (["--space", "me/page", "--revision", "dev"], 2, "--space reads the model's main branch"),
        (["--examples", "no/such.png"], 2, "--examples no/such.png: there is no such file."),
        (["--space", "somebody/page"], 1, "somebody/page was not pushed: it does not exist, or this token may not"),
    ],
)
def test_what_cannot_be(script, hub, folder, capsys, options, status, message):
    try:
        assert script.main([str(folder), "me/x", *options]) == status
    except SystemExit as stop:  # argparse's
        assert stop.code == status
    assert message in capsys.readouterr().err
    assert ("space", "me/page") not in hub.repos


def test_two_examples_of_one_name(hub, folder, photo, tmp_path):
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / photo.name
    twin.write_bytes(photo.read_bytes())
    with pytest.raises(RuntimeError, match="2 examples have only 1 different file names"):
        push_folder(folder, "me/x", examples=[photo, twin], token=TOKEN)
    assert hub.commits("me/x") == []


def test_examples_are_images_and_stand_on_their_branch(hub, folder, photo, tmp_path):
    text = tmp_path / "notes.png"
    text.write_text("no image")
    with pytest.raises(RuntimeError, match=r"notes\.png cannot be read as an image"):
        push_folder(folder, "me/x", examples=[photo, text], token=TOKEN)
    twin = photo.with_suffix(".jpg")
    Image.open(photo).save(twin)
    push_folder(folder, "me/x", examples=[photo, twin], token=TOKEN, revision="try/1")
    card = ModelCard(hub.files("me/x", "try/1")["README.md"].decode())
    place = f"{hub.url}/me/x/resolve/try%2F1/widget"
    addresses = [image["src"] for image in card.data["widget"]]
    assert addresses == [f"{place}/a%20red%20one.png", f"{place}/a%20red%20one.jpg"]


def test_files_of_the_owner_stay(hub, folder, photo):
    """Of a repository, a push removes what pushes write, and nothing else."""
    push_folder(folder, "me/x", examples=[photo], token=TOKEN)
    HfApi(token=TOKEN).upload_file(path_or_fileobj=b"{}", path_in_repo="examples/mine.ipynb", repo_id="me/x")
    push_folder(folder, "me/x", token=TOKEN)
    assert "examples/mine.ipynb" in hub.files("me/x") and "widget/a red one.png" not in hub.files("me/x")


def test_a_page_of_a_model_that_is_private_already(script, hub, folder, capsys):
    push_folder(folder, "me/x", private=True, token=TOKEN)
    assert script.main([str(folder), "me/x", "--space", "me/page"]) == 0
    assert "secret HF_TOKEN" in capsys.readouterr().err
