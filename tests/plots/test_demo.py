"""scripts/demo.py: what the page answers, to 20 users at once and to odd files, and what it looks like in a browser."""

import json
import os
import re
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from colours import BLUE, GREEN, RED, colour_model, paint, processor
from PIL import Image
from runs import free_port, load_script

from modeling_vit_scratch import plots
from modeling_vit_scratch.evaluation import Predictor
from modeling_vit_scratch.plots.views import view_image

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def script():
    return load_script("demo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model that knows colours, whose heads look each its own way, to no avail: their values count nothing."""
    torch.manual_seed(0)
    model = colour_model(num_hidden_layers=3, num_attention_heads=2)
    for layer in model.vit.layers:
        torch.nn.init.ones_(layer.norm1.weight)
        torch.nn.init.normal_(layer.attention.qkv.weight)
    torch.nn.init.normal_(model.vit.embeddings.position_embeddings, std=0.1)
    folder = tmp_path_factory.mktemp("colours")
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("photos")
    paths = {name: folder / f"{name}.png" for name in ("red", "green", "blue")}
    for (_, path), colour in zip(paths.items(), (RED, GREEN, BLUE), strict=True):
        paint(colour, (60, 40)).save(path)
    return paths


@pytest.fixture(scope="module")
def address(script, folder, photos):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")
    port = free_port()
    examples = ["--examples", str(photos["green"])]
    page = script.serve(script.parse(["--model", str(folder), "--port", str(port), *examples]), block=False)
    yield f"http://127.0.0.1:{port}"
    page.close()


def test_look(folder, photos):
    predictor = Predictor(str(folder), "cpu")
    found = view_image(predictor, str(photos["blue"]))
    assert next(iter(found.answers)) == "blue" and sum(found.answers.values()) == pytest.approx(1, abs=1e-4)
    assert found.pixels.shape == (3, 16, 16) and found.shown.shape == (3, 448, 448)
    assert found.rollout.shape == (2, 2) and found.heads.shape == (3, 2, 2, 2)
    with torch.no_grad():
        maps = predictor(found.pixels[None], output_attentions=True).attentions
    torch.testing.assert_close(found.heads[1, 1], plots.attention_on_grid(maps[1][0, 1], (2, 2), 0, "mean"))
    assert 0 < found.seconds[0] < found.seconds[1]
    assert len({tuple(heat.flatten().tolist()) for heat in found.heads.flatten(0, 1)}) == 6


def test_a_missing_extra_is_named(script, folder, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert script.main(["--model", str(folder)]) == 2
    assert capsys.readouterr().err == 'demo.py: gradio is missing: pip install -e ".[demo]"\n'


def test_examples_that_are_not_there(script, folder, capsys):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")
    assert script.main(["--model", str(folder), "--examples", "no/such.png"]) == 2
    assert "--examples no/such.png: there is no such file" in capsys.readouterr().err


def test_an_address_of_another_computer(script, folder, capsys):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")
    assert script.main(["--model", str(folder), "--host", "192.0.2.1"]) == 2  # of documentation only (RFC 5737)
    assert capsys.readouterr().err.startswith("demo.py: --host 192.0.2.1 is no address of this computer: ")


def test_the_examples_are_images(script):
    files = sorted(script.EXAMPLES.iterdir())
    assert len(files) >= 4
    for file in files:
        Image.open(file).verify()


# -- the server --------------------------------------------------------------------------------------------------------


def ask(address: str, path: Path):
    """Upload a file and have it answered, as the page does."""
    from gradio_client import Client, handle_file

    return Client(address, verbose=False, httpx_kwargs={"timeout": 120}).predict(
        handle_file(str(path)), 1, 1, api_name="/classify"
    )


def test_it_listens_on_this_computer_only(address):
    port = int(address.rpartition(":")[2])
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if " 0A " in line]
    assert [place for place in listening if int(place.partition(":")[2], 16) == port] == [f"0100007F:{port:04X}"]


def test_twenty_users_at_once(address, folder, tmp_path):
    """Each gets the answer to their own image."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (20, 3))
    paths = [tmp_path / f"{i}.png" for i in range(20)]
    for path, colour in zip(paths, colours, strict=True):
        paint(tuple(map(int, colour))).save(path)
    with ThreadPoolExecutor(20) as users:
        answers = list(users.map(lambda path: ask(address, path), paths))
    model = Predictor(str(folder), "cpu")
    for path, (label, *_) in zip(paths, answers, strict=True):
        expected = model.probabilities(model(model.pixels([Image.open(path)])).logits)[0]
        told = {entry["label"]: entry["confidence"] for entry in label["confidences"]}
        assert told == pytest.approx(dict(zip(model.class_names, expected.tolist(), strict=True)), abs=1e-4)


def test_odd_files_get_an_answer_or_a_message_and_it_goes_on(address, photos, tmp_path):
    Image.new("RGB", (8660, 5774), GREEN).save(tmp_path / "50 megapixels.jpg")
    assert ask(address, tmp_path / "50 megapixels.jpg")[0]["label"] == "green"
    Image.new("L", (30, 30), 128).save(tmp_path / "grey.gif")
    assert len(ask(address, tmp_path / "grey.gif")[0]["confidences"]) == 3
    (tmp_path / "text.png").write_text("no image")
    *nothing, message = ask(address, tmp_path / "text.png")
    assert len(nothing) == 4 and not any(nothing)
    assert "cannot be read as an image: unreadable image" in message and str(tmp_path) not in message
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(100_000_000)
    with pytest.raises(Exception, match=r"413|[Ff]ile size|[Tt]oo [Ll]arge"):
        ask(address, tmp_path / "large.png")
    assert ask(address, photos["red"])[0]["label"] == "red"


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    selenium = pytest.importorskip("selenium", reason="selenium is not installed")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium and chromium-driver are not installed")
    assert selenium
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page as a user sees it."""

    def __init__(self, driver, address: str):
        self.driver = driver
        driver.get(address)
        self.wait(lambda: self.find("#picture input[type=file]"), "the page")

    def find(self, selector: str):
        found = self.driver.find_elements("css selector", selector)
        return found[0] if found else None

    def wait(self, condition, what: str, seconds: float = 60):
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, f"{what} did not come"
            time.sleep(0.05)
        return value

    def upload(self, path: Path):
        self.find("#picture input[type=file]").send_keys(str(path))

    def top1(self) -> str:
        found = self.find("#answer h2")
        return found.text.strip().lower() if found else ""

    def source(self, name: str) -> str | None:
        found = self.find(f"#{name} img")
        return found.get_attribute("src") if found else None

    def screenshot(self, name: str):
        folder = os.environ.get("DEMO_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            height = self.driver.execute_script("return document.documentElement.scrollHeight")
            size = self.driver.execute_script("return [innerWidth, innerHeight]")
            self.resize(size[0], height)
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))

    def resize(self, width: int, height: int):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        time.sleep(0.3)

    def hosts(self) -> set[str]:
        """Every host that was asked for anything so far."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        assert urls
        return {re.sub(r"^\w+://([^/]*)/.*$", r"\1", url) for url in urls if not url.startswith(("data:", "blob:"))}


def test_in_a_browser(address, browser, photos, tmp_path):
    page = Page(browser, address)
    page.resize(1280, 1000)
    page.upload(photos["blue"])
    page.wait(lambda: page.top1() == "blue", "the answer")
    page.wait(lambda: page.source("rollout") and page.source("patches") and page.source("head"), "the images")
    assert re.search(r"\d+ ms", page.find("#took").text)
    bars = browser.find_elements("css selector", "#answer .confidence-set, #answer .bar, #answer meter")
    assert len(bars) >= 3

    # The slider moves, the overlay changes; the rollout is that of all layers and stays.
    before, rollout = page.source("head"), page.source("rollout")
    page.find("#layer input[type=range]").send_keys("\ue012")  # the left arrow key
    after = page.wait(lambda: page.source("head") not in (before, None) and page.source("head"), "another overlay")
    page.find("#which input[type=range]").send_keys("\ue014")
    page.wait(lambda: page.source("head") not in (before, after, None), "another head")
    assert page.source("rollout") == rollout
    page.screenshot("wide")

    page.resize(390, 844)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390  # nothing to scroll to
    top = browser.find_element("css selector", "#rollout").rect["y"]
    assert top < 844  # the picture, the answer and the examples fill the first screen
    page.screenshot("phone")
    assert page.hosts() == {address.partition("//")[2]}
    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []


def test_messages_in_a_browser(address, browser, photos, tmp_path):
    page = Page(browser, address)
    page.resize(1280, 1000)
    (tmp_path / "text.png").write_text("no image")
    page.upload(tmp_path / "text.png")
    page.wait(lambda: "cannot be read as an image" in page.find("#took").text, "the message")
    page.screenshot("message")
    page = Page(browser, address)
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(100_000_000)
    page.upload(tmp_path / "large.png")
    page.wait(lambda: re.search("50|too large|maximum", browser.find_element("css selector", "body").text), "a message")
    page.screenshot("large")
    page = Page(browser, address)
    page.upload(photos["red"])
    page.wait(lambda: page.top1() == "red", "the answer")


def test_it_is_bound_to_this_computer_unless_told(script):
    assert script.parse(["--model", "x"]).host == "127.0.0.1"
    assert script.parse(["--model", "x", "--host", "0.0.0.0"]).host == "0.0.0.0"
    assert socket.gethostbyname("localhost").startswith("127.")
