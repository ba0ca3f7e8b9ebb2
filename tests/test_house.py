"""The house itself: who imports whom, what scripts are called, and what the README says."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "modeling_vit_scratch"
MODEL = {"modeling_vit_scratch", "configuration_vit_scratch"}
# Which rooms a room may import; arrows point one way.
# fmt: off
ARROWS = {
    "configuration_vit_scratch": set(),
    "modeling_vit_scratch": {"configuration_vit_scratch"},
    "augmentation": set(),
    "metrics": set(),
    "inference": {"conversion", "cuts", "data", "metrics"},
    "cli": {"conversion", "cuts", "inference", "layouts"},
    "checkpoints": set(),
    "optimization": set(),
    "plots": {"metrics"},
    "sources": set(),
    "data": {"augmentation", "sources"},
    "streaming": {"augmentation", "data", "sources"},
    "inspection": {"augmentation", "data", "streaming"},
    "cuts": {"checkpoints", "data", "inspection", "sources", "streaming"},
    "model_card": set(),
    "hub": {"model_card", *MODEL},
    "layouts": set(),
    "conversion": {"checkpoints", "layouts", *MODEL},
    "lora": {"checkpoints", *MODEL},
    "pretraining": {
        "arguments", "augmentation", "checkpoints", "data", "model_card", "plots", "trainer", "training", *MODEL,
    },
    "arguments": {"configuration_vit_scratch", "layouts", "optimization"},
    "defaults": {"arguments", "data", "optimization"},
    "trainer": {"augmentation", "checkpoints", "data", "lora", "metrics", "optimization", "streaming", *MODEL},
    "training": {
        "arguments", "augmentation", "checkpoints", "conversion", "data", "hub", "inspection", "lora", "metrics",
        "model_card", "optimization", "plots", "streaming", "trainer", *MODEL,
    },
}
# fmt: on


def imports(path: Path) -> tuple[set[str], set[str]]:
    """(rooms of this package, other top-level packages) that a file imports anywhere."""
    rooms, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            rooms |= {node.module.partition(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.partition(".")[0])
    return rooms, others


def test_arrows_point_one_way():
    rooms = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert rooms == set(ARROWS)
    for room in rooms:
        used, others = imports(PACKAGE / f"{room}.py")
        assert used <= ARROWS[room], f"{room} imports {used - ARROWS[room]}"
        assert "modeling_vit_scratch" not in others, f"{room} imports the package by its name"


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_no_script_shadows_a_package(script):
    """Python puts the script's folder first on the path: scripts/evaluate.py would be `import evaluate`."""
    assert importlib.util.find_spec(script.stem) is None or importlib.util.find_spec(script.stem).origin == str(script)


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_importing_a_script_does_nothing(script):
    """Only definitions, imports and constants at the top level, and a guarded call."""
    for node in ast.parse(script.read_text()).body:
        call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        assert not call, f"{script.name}:{node.lineno} runs something on import"


def test_files_that_the_readme_names_exist():
    named = re.findall(
        r"(?:scripts|modeling_vit_scratch|tests)/[\w./-]+\.(?:py|yaml|png|svg)", (ROOT / "README.md").read_text()
    )
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_tests_that_the_readme_names_exist():
    named = re.findall(r"`(test_\w+)`", (ROOT / "README.md").read_text())
    defined = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert named
    assert [name for name in named if f"def {name}(" not in defined] == []
