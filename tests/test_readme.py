"""README's explanation of the architecture: its shapes, equations, classes and pictures are those of the code."""

import ast
import re
from pathlib import Path

import pytest
import torch
from runs import ROOT, load_script

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, modeling_vit_scratch

TEXT = (ROOT / "README.md").read_text()
SECTION = re.search(r"^## How it works\n(.*?)^## ", TEXT, re.MULTILINE | re.DOTALL).group(1)
STEPS = re.findall(r"^\| \*\*(\d)\. (\w+)\.\*\* (.*) \| <img (.*)> \|$", SECTION, re.MULTILINE)
MODEL_FILE = "modeling_vit_scratch/modeling_vit_scratch.py"


@pytest.fixture(scope="module")
def shapes() -> dict[str, list[tuple[int, ...]]]:
    """What each step makes of one picture, measured on the showcase model."""
    model = ViTScratchForImageClassification(ViTScratchConfig.preset("showcase")).eval()
    seen = {}

    def note(name, module):
        def hook(_, inputs, output):
            seen.setdefault(name, (inputs[0], output))

        module.register_forward_hook(hook)

    embeddings = model.vit.embeddings
    note("projection", embeddings.patch_embeddings.projection)
    note("patches", embeddings.patch_embeddings)
    note("embeddings", embeddings)
    note("block", model.vit.layers[-1])
    note("encoder", model.vit)
    note("head", model)
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32), output_attentions=True)
    block, encoder = seen["block"], seen["encoder"][1]
    steps = {
        "Patches": [seen["patches"][0], seen["projection"][0]],
        "Tokens": [seen["projection"][0], seen["projection"][1]],
        "Positions": [seen["patches"][1], seen["embeddings"][1]],
        "Blocks": [block[0], block[1][0], block[1][1]],
        "Head": [encoder.last_hidden_state, encoder.pooler_output, seen["head"][1].logits],
    }
    return {step: [tuple(tensor.shape) for tensor in tensors] for step, tensors in steps.items()}


def test_the_steps_are_those_of_the_paper():
    assert [number for number, *_ in STEPS] == ["1", "2", "3", "4", "5"]
    assert [name for _, name, *_ in STEPS] == ["Patches", "Tokens", "Positions", "Blocks", "Head"]
    assert len(SECTION.splitlines()) < 40  # and five pictures: two screens


@pytest.mark.parametrize(("name", "text"), [(name, text) for _, name, text, _ in STEPS])
def test_shapes(name, text, shapes):
    told = [ast.literal_eval(shape) for shape in re.findall(r"`(\([\d, ]+\))`", text)]
    assert told == shapes[name]


@pytest.mark.parametrize(("name", "text"), [(name, text) for _, name, text, _ in STEPS])
def test_classes_and_their_equations(name, text):
    """Each link leads to the line where the class begins; its docstring names the equations of the step."""
    lines = (ROOT / MODEL_FILE).read_text().splitlines()
    links = re.findall(r"\[`(\w+)`\]\(([\w/.]+)#L(\d+)\)", text)
    assert links
    described = ""
    for class_name, path, line in links:
        begins = next(i for i, code in enumerate(lines, 1) if code.startswith(f"class {class_name}("))
        assert (path, int(line)) == (MODEL_FILE, begins), f"README links {class_name} at line {line}"
        described += getattr(modeling_vit_scratch, class_name).__doc__
    named = {int(number) for found in re.findall(r"eq\. ([\d, toand]+)", described) for number in _numbers(found)}
    for equation in re.findall(r"\(eq\. (\d)\)", text):
        assert int(equation) in named, f"no docstring of step {name} names eq. {equation}"


def _numbers(text: str) -> list[int]:
    """Of "2 and 3" or "5 to 8"."""
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    return list(range(numbers[0], numbers[-1] + 1)) if "to" in text else numbers


def test_pictures_are_those_that_one_command_draws():
    plot = load_script("plot")
    explained, named = (set(re.findall(r"docs/images/(\w+)\.png", text)) for text in (SECTION, TEXT))
    assert explained == {plot.FILES[kind] for kind in plot.README}
    committed = {path.stem: path.stat().st_size for path in (ROOT / "docs" / "images").glob("*.png")}
    assert set(committed) == named == explained | {"race", "reconstructions"}  # those two are of long runs
    assert max(committed.values()) < 150_000
    assert "scripts/plot.py readme" in SECTION
    assert all(Path(path).is_file() for path in plot.EXAMPLES)
