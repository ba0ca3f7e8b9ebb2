"""The house itself: who imports whom, what scripts are called, and what CI runs."""

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


def test_ci_fails_where_a_test_that_a_page_names_never_runs(tmp_path, capsys):
    skips, readme, page = load_skips(), tmp_path / "README.md", tmp_path / "promises.md"
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
        ("`--test_dir`", [first, second], []),
    ]:
        readme.write_text("No test.")
        page.write_text(text)
        assert skips.main([str(readme), str(page), *runs]) == bool(broken), text
        printed = capsys.readouterr()
        assert re.findall(r"promises\.md names (\w+), which did not run", printed.err) == broken
    assert printed.out.splitlines() == ["3 tests ran, 3 did not:", "  1 x no GPU", "  1 x no jax", "  1 x no peft"]


def test_ci_checks_the_runs_that_it_makes():
    text = (ROOT / ".ci" / "run").read_text()
    written = re.findall(r'pytest --junitxml "(\S+)"', text)
    assert len(written) == 2
    assert f'python .ci/skips.py README.md docs/*.md "{written[0]}" "{written[1]}"' in text.splitlines()[-1]


def test_peers_that_do_not_import_stop_the_tests(monkeypatch):
    """Where CI says that they are there, no test may skip for want of them."""
    monkeypatch.setattr(conftest, "PEERS", "somewhere")
    monkeypatch.setattr(conftest.peers, "REASONS", {"timm": "No module named 'timm'"})
    with pytest.raises(pytest.UsageError, match=r"VIT_SCRATCH_PEERS=somewhere, but from there.*timm"):
        conftest.pytest_configure()
    monkeypatch.setattr(conftest, "PEERS", None)
    conftest.pytest_configure()
