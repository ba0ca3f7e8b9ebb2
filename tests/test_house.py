"""The house itself: who imports whom, what scripts are called, and what the README says."""

import ast
import importlib.util
import re
from pathlib import Path

import conftest
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
    "hub": MODEL,
    "layouts": set(),
    "conversion": {"checkpoints", "layouts", *MODEL},
    "lora": {"checkpoints", *MODEL},
    "pretraining": {
        "arguments", "augmentation", "checkpoints", "data", "hub", "plots", "trainer", "training", *MODEL,
    },
    "arguments": {"configuration_vit_scratch", "layouts", "optimization"},
    "defaults": {"arguments", "data", "optimization"},
    "trainer": {"augmentation", "checkpoints", "data", "lora", "metrics", "optimization", "streaming", *MODEL},
    "training": {
        "arguments", "augmentation", "checkpoints", "conversion", "data", "hub", "inspection", "lora", "metrics",
        "optimization", "plots", "streaming", "trainer", *MODEL,
    },
}
# Inside a wing; from outside, it is entered by its doors (`from .hub import ...`).
WINGS = {
    "hub": {
        "masking": set(),
        "model_card": {"masking"},
        "folder": {"masking", "model_card"},
        "push": {"folder", "masking", "model_card"},
        "callback": {"folder", "masking", "model_card", "push"},
        "probe": set(),
        "proof": {"masking", "model_card", "probe", "push"},
    },
}
# fmt: on


def imports(path: Path, level: int = 1) -> tuple[set[str], set[str]]:
    """(rooms beside the file, or `level - 1` folders above it; other top-level packages) that a file imports."""
    rooms, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == level:
            assert "." not in (node.module or ""), f"{path.name} enters {node.module}, which has doors"
            rooms |= {node.module.partition(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            others.add(node.module.partition(".")[0])
    return rooms, others


def test_arrows_point_one_way():
    rooms = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert rooms | set(WINGS) == set(ARROWS)
    for room in rooms:
        used, others = imports(PACKAGE / f"{room}.py")
        assert used <= ARROWS[room], f"{room} imports {used - ARROWS[room]}"
        assert "modeling_vit_scratch" not in others, f"{room} imports the package by its name"


@pytest.mark.parametrize("wing", WINGS)
def test_arrows_inside_a_wing_point_one_way(wing):
    assert {path.stem for path in (PACKAGE / wing).glob("*.py")} - {"__init__"} == set(WINGS[wing])
    for room, allowed in WINGS[wing].items():
        path = PACKAGE / wing / f"{room}.py"
        used, others = imports(path)
        assert used <= allowed, f"{wing}/{room} imports {used - allowed}"
        above, _ = imports(path, level=2)
        assert above <= ARROWS[wing], f"{wing}/{room} imports {above - ARROWS[wing]}"
        assert "modeling_vit_scratch" not in others, f"{wing}/{room} imports the package by its name"


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
    defined = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert named
    assert [name for name in named if f"def {name}(" not in defined] == []


def load_skips():
    spec = importlib.util.spec_from_file_location("skips", ROOT / ".ci" / "skips.py")
    skips = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(skips)
    return skips


def report(path: Path, tests: dict[tuple[str, str], str | None]) -> str:
    """A file as `pytest --junitxml` writes it: (module, name) -> why it was skipped, or None."""
    cases = []
    for (module, name), reason in tests.items():
        skipped = "" if reason is None else f'<skipped message="{reason}"/>'
        cases.append(f'<testcase classname="{module}" name="{name}">{skipped}</testcase>')
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    return str(path)


def test_ci_fails_where_a_test_that_the_readme_names_never_runs(tmp_path, capsys):
    skips, readme = load_skips(), tmp_path / "README.md"
    first = report(
        tmp_path / "first.xml",
        {
            ("tests.test_a", "test_timm[x]"): "no timm",
            ("tests.test_a", "test_gpu"): "no GPU",
            ("tests.test_a", "b"): None,
        }
        | {("tests.test_a", f"test_jax[{case}]"): "no timm" for case in "xy"}
        | {("", "tests.test_whole"): "no peft"},
    )
    second = report(
        tmp_path / "second.xml",
        {("tests.test_a", "test_timm[x]"): None, ("tests.test_a", "test_jax[x]"): None}
        | {("tests.test_a", "test_jax[y]"): "no jax"},
    )
    for text, runs, broken in [
        ("`test_timm`", [first], ["test_timm"]),
        ("`test_timm`, `tests/test_a.py`", [first, second], []),  # skipped once, but not in both
        ("`test_timm`", [second, first], []),
        ("`test_jax`", [first, second], ["test_jax"]),  # one of its cases
        ("`test_gpu`, `test_timm`", [first, second], ["test_gpu"]),
        ("`tests/test_whole.py`", [first], ["test_whole"]),
        ("`test_renamed`", [first, second], ["test_renamed"]),
    ]:
        readme.write_text(text)
        assert skips.main([str(readme), *runs]) == bool(broken), text
        printed = capsys.readouterr()
        assert re.findall(r"names (\w+), which did not run", printed.err) == broken
    assert printed.out.splitlines() == ["3 tests ran, 3 did not:", "  1 x no GPU", "  1 x no jax", "  1 x no peft"]


def test_ci_checks_the_runs_that_it_makes():
    text = (ROOT / ".ci" / "run").read_text()
    written = re.findall(r'pytest --junitxml "(\S+)"', text)
    assert len(written) == 2
    assert f'python .ci/skips.py README.md "{written[0]}" "{written[1]}"' in text.splitlines()[-1]


def test_peers_that_do_not_import_stop_the_tests(monkeypatch):
    """Where CI says that they are there, no test may skip for want of them."""
    monkeypatch.setattr(conftest, "PEERS", "somewhere")
    monkeypatch.setattr(conftest.peers, "REASONS", {"timm": "No module named 'timm'"})
    with pytest.raises(pytest.UsageError, match=r"VIT_SCRATCH_PEERS=somewhere, but from there.*timm"):
        conftest.pytest_configure()
    monkeypatch.setattr(conftest, "PEERS", None)
    conftest.pytest_configure()
