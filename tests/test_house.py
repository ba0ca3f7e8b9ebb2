"""The house itself: who imports whom, what scripts are called, and what CI runs."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "modeling_vit_scratch"
# The floors of the house, from the ground: a wing, or a room outside of them, imports from the floors below its own.
FLOORS = [
    {"configuration_vit_scratch"},
    {"modeling_vit_scratch"},
    {"data"},
    {"conversion", "hub"},
    {"evaluation"},
    {"plots"},
    {"export"},
    {"training"},
]
# Inside a wing, a room imports from those that stand before it.
WINGS = {
    "data": ["rand_augment", "augmentation", "sources", "columns", "records", "splits", "streaming", "doctor", "cuts"],
    "conversion": [
        "layouts", "families", "reading", "architectures", "recognition", "planning", "loading", "processors",
        "targets", "exporting", "proof", "catalogue",
    ],
    "hub": ["masking", "model_card", "folder", "push", "space", "callback", "probe", "proof"],
    "evaluation": [
        "tables", "metrics", "devices", "token_merging", "inference", "programs", "acceleration", "reports",
    ],
    "plots": ["drawing", "analysis", "model", "runs", "speed", "views", "figures"],
    "training": [
        "optimization", "checkpoints", "processes", "arguments", "recorded", "defaults", "lora", "callbacks",
        "progress", "trainer", "output", "models", "schedule", "budget", "run", "report", "finetuning", "pretraining",
    ],
}  # fmt: skip
SEALED = {"configuration_vit_scratch", "modeling_vit_scratch"}


def rooms() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def doors(wing: str) -> list[str]:
    """What a wing's `__all__` names."""
    for node in ast.parse((PACKAGE / wing / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{wing} names no doors")


def imports(path: Path) -> tuple[list[tuple[str, str | None, str]], set[str]]:
    """What a file imports anywhere: (wing or room at the door, room of that wing or None, name), and other packages."""
    found, others = [], set()
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            where = [*here[: len(here) + 1 - node.level], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                steps = [*where, alias.name]
                is_room = len(steps) > 1 and (PACKAGE / steps[0] / f"{steps[1]}.py").exists()
                found.append((steps[0], steps[1] if is_room else None, alias.name))
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.partition(".")[0])
    return found, others


def is_attribute_of(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name


def test_every_room_has_its_place():
    for wing, names in WINGS.items():
        assert {path.stem for path in (PACKAGE / wing).glob("*.py")} - {"__init__"} == set(names), wing
    at_the_door = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert at_the_door | set(WINGS) == set().union(*FLOORS)


@pytest.mark.parametrize("room", rooms(), ids=lambda path: str(path.relative_to(PACKAGE).with_suffix("")))
def test_arrows_point_down(room):
    """To lower floors, and inside a wing to rooms before this one; through a wing's doors where it has one for it."""
    wing = room.parent.name if room.parent != PACKAGE else room.stem
    floor = next(i for i, names in enumerate(FLOORS) if wing in names)
    below = set().union(*FLOORS[:floor])
    found, others = imports(room)
    assert "modeling_vit_scratch" not in others, "it imports the package by its name"
    for target, part, name in found:
        if target == wing:
            assert part in WINGS[wing][: WINGS[wing].index(room.stem)], f"imports {name} of {part}"
            continue
        assert target in below, f"imports {name} of {target}"
        assert target in SEALED or not name.startswith("_"), f"imports {name}, which is {target}'s own"
        if target == name and name in WINGS:  # the wing itself: through its doors
            used = {node.attr for node in ast.walk(ast.parse(room.read_text())) if is_attribute_of(node, name)}
            assert used <= set(doors(name)), f"{used - set(doors(name))} are no doors of {name}"
        elif target in WINGS and name != part:
            assert (name in doors(target)) == (part is None), f"imports {name} of {target} by another way than its door"


def test_no_name_of_one_room_that_begins_with_an_underscore_is_used_in_another():
    for room in rooms():
        for target, part, name in imports(room)[0]:
            assert not name.startswith("_"), f"{room.stem} imports {name} of {part or target}"


def test_rooms_and_functions_are_of_a_size_to_read():
    for room in rooms():
        text = room.read_text()
        # The sealed pair cannot be split; tests/model/test_the_file.py looks at the one.
        if room.stem not in ("modeling_vit_scratch", "configuration_vit_scratch"):
            assert len(text.splitlines()) <= 450, f"{room.name} is {len(text.splitlines())} lines long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 90, f"{node.name} in {room.name} is longer than 90 lines"


def test_each_wing_says_how_data_flow_through_it():
    for wing, names in WINGS.items():
        text = ast.get_docstring(ast.parse((PACKAGE / wing / "__init__.py").read_text()))
        assert sorted(re.findall(r"^    (\w+)  ", text, re.MULTILINE)) == sorted(names), wing


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
    assert len(written) == 3
    reports = " ".join(f'"{path}"' for path in written)
    assert f"python .ci/skips.py README.md docs/*.md {reports}" in text.splitlines()[-1]


def test_peers_that_do_not_import_stop_the_tests(monkeypatch, pytestconfig):
    """Where CI says that they are there, no test may skip for want of them."""
    conftest = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    monkeypatch.setattr(conftest, "PEERS", "somewhere")
    monkeypatch.setattr(conftest.peers, "REASONS", {"timm": "No module named 'timm'"})
    with pytest.raises(pytest.UsageError, match=r"VIT_SCRATCH_PEERS=somewhere, but from there.*timm"):
        conftest.pytest_configure()
    monkeypatch.setattr(conftest, "PEERS", None)
    conftest.pytest_configure()
