"""The notebook: it reads well as it is committed, it runs, and its text states what comes out."""

import ast
import base64
import inspect
import itertools
import json
import re

import checks
import pytest
import solutions
from runs import ROOT

HERE = ROOT / "notebooks"
NOTEBOOK = json.loads((HERE / "vit_from_scratch.ipynb").read_text())
# Accuracies differ from one CPU to another, since rounding does, and from seed to seed; so many points are allowed.
POINTS = 8
# What a number may stand in without being a result.
NAMED = re.compile(
    r'\$\$.*?\$\$|\$[^$]+\$|`[^`]+`|\]\([^)]+\)|^#+ \d+\.|^\*\*\d\. .*?\*\*|"[^"\n]+"|et al\., \d{4}|Zuidema, \d{4}'
    r"|^\| [a-z][\w ]+ \| \d+ to \d+ % \|"  # compared by their names
    r"|\b(?:[Pp]arts?|[Ee]xercises?|[Ff]igures?|[Ss]ections?|[Ee]quations?) [\d.]+(?: (?:to|and) \d+)?",
    re.DOTALL | re.MULTILINE,
)
PART = re.compile(r"(?:^## ([^\n]+)\n)?(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?: ?%)?")


def source(cell: dict) -> str:
    return "".join(cell["source"])


def printed(cell: dict) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def parts(notebook: dict) -> dict[str, tuple[str, str, str]]:
    """Heading -> its text, its code and what that printed."""
    found = {"": ["", "", ""]}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            for heading, text in PART.findall(source(cell)):
                if heading:
                    found[heading] = ["", "", ""]
                found[[*found][-1]][0] += text + "\n"
        else:
            found[[*found][-1]][1] += source(cell) + "\n"
            found[[*found][-1]][2] += printed(cell)
    return {heading: tuple(texts) for heading, texts in found.items()}


def accuracies(output: str) -> dict[str, float]:
    """What was changed -> per cent of validation, of the lines that part 11 prints."""
    return {name: float(value) for name, value in re.findall(r"^([a-z][\w ]+?) +([\d.]+)% of validation", output, re.M)}


def check_numbers(notebook: dict):
    """Each number of the text stands in the code so far, in what that printed, or on the page that is linked."""
    there = set()
    for heading, (text, code, output) in parts(notebook).items():
        pages = "".join((HERE / link).read_text() for link in re.findall(r"\]\((\.\./docs/\w+\.md)\)", text))
        there |= {number.replace(",", "") for number in NUMBER.findall(code + output + pages)}
        measured = [float(number) for number in re.findall(r"([\d.]+)%", output)]
        rows = re.findall(r"^\| ([a-z][\w ]+) \| (\d+) to (\d+) % \|", text, re.MULTILINE)
        if rows:
            results = accuracies(output)
            assert [name for name, *_ in rows] == [*results]
            for name, lowest, highest in rows:
                assert float(lowest) - POINTS <= results[name] <= float(highest) + POINTS, (name, results[name])
        for number in NUMBER.findall(re.sub(r"(\d+) to (\d+) %", r"\1 % to \2 %", NAMED.sub("", text))):
            plain = number.replace(",", "").rstrip(" %")
            near = number.endswith("%") and any(abs(float(plain) - value) <= POINTS for value in measured)
            known = near or {plain, f"{plain} %", f"{plain}%"} & there
            assert known, f"{heading}: {number} is nowhere in the code so far or in what that printed"


def test_committed_outputs():
    count = 0
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            assert cell["execution_count"] == count, "run all cells from the top and save"
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error" and output.get("name") != "stderr", output
            for image in [data for kind, data in output.get("data", {}).items() if kind.startswith("image/")]:
                assert len(base64.b64decode("".join(image))) < 150_000
    text = json.dumps(NOTEBOOK)
    assert len(text) < 1_000_000 and not re.search(r"/(?:home|root|tmp|work|Users)/", text)


def test_the_text_states_what_the_committed_run_gave():
    check_numbers(NOTEBOOK)


def test_a_number_that_nothing_gave_is_noticed():
    changed = json.loads(json.dumps(NOTEBOOK))
    cell = next(cell for cell in changed["cells"] if source(cell).startswith("## 9."))
    cell["source"] = source(cell).replace("1,797", "1,798")
    with pytest.raises(AssertionError, match="1,798 is nowhere"):
        check_numbers(changed)


def test_links_lead_somewhere():
    for cell in NOTEBOOK["cells"]:
        for link in re.findall(r"\]\(([^)#]+)", source(cell)) if cell["cell_type"] == "markdown" else []:
            assert link.startswith("https://") or (HERE / link).is_file(), link


def test_the_model_has_at_most_a_hundred_lines_of_pytorch():
    cells = [source(cell) for cell in NOTEBOOK["cells"] if source(cell).startswith("# The model")]
    assert len(cells) == 8
    assert sum(bool(line.strip()) for cell in cells for line in cell.splitlines()) <= 100
    used = {node.id for cell in cells for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Name)}
    assert not used & {"package", "ViTScratchConfig", "compare"}


def test_each_part_of_the_model_is_compared_with_the_package():
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    for cell, proof in itertools.pairwise(cells):
        if source(cell).startswith("# The model"):
            following = source(proof) + source(cells[cells.index(proof) + 1])
            assert re.search(r"^compare\(|^ *assert torch\.(equal|allclose)\(", following, re.MULTILINE), source(cell)


def test_stubs_are_those_of_the_exercises():
    cells = [source(cell) for cell in NOTEBOOK["cells"] if "raise NotImplementedError" in source(cell)]
    stubs = [ast.parse(cell).body[0] for cell in cells]
    assert [stub.name for stub in stubs] == list(checks.EXERCISES)
    for stub in stubs:
        wanted = list(inspect.signature(getattr(solutions, stub.name)).parameters)
        assert [argument.arg for argument in stub.args.args] == wanted


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_runs_and_gives_what_it_states():
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install -e '.[notebook]'")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install -e '.[notebook]'")
    notebook = nbformat.read(HERE / "vit_from_scratch.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(HERE)}}).execute()
    check_numbers(notebook)
    ran = [printed(cell) for cell in notebook.cells if cell.cell_type == "code"]
    assert sum("yours to write" in text for text in ran) == 8
