"""The scripts on a terminal: one look and feel, help that is true, streams, and exit statuses."""

import os
import re
import shlex
import subprocess
import sys

import cli
import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from runs import ROOT, SCRIPTS, load_script

from modeling_vit_scratch.configuration_vit_scratch import POOLINGS, nearest
from modeling_vit_scratch.conversion import PACKAGED_MODEL, proof
from modeling_vit_scratch.conversion.families import FAMILIES, TARGETS
from modeling_vit_scratch.conversion.layouts import SUFFIXES
from modeling_vit_scratch.data import cuts
from modeling_vit_scratch.evaluation.acceleration import DTYPES
from modeling_vit_scratch.export import FORMATS
from modeling_vit_scratch.plots.figures import KINDS

# The names of the scripts; and those whose options are made of the package's classes and sections.
NAMES = sorted(path.stem for path in SCRIPTS.glob("*.py") if "\ndef main(" in path.read_text())
WITH_THE_PACKAGES_OPTIONS = ("benchmark", "finetune")
# A command line with nothing wrong but its input, and the exit status.
MISSING = "no/such/folder"
BAD_INPUT = {
    "benchmark": (["--device", MISSING], 2),
    "convert": ([MISSING, "OUT"], 2),
    "demo": (["--model", MISSING], 2),
    "export": ([MISSING, "OUT", "--formats", "program"], 2),
    "finetune": (["--dataset_name", "digits", "--model_name_or_path", MISSING, "--output_dir", "OUT"], 2),
    "plot": (["filters", MISSING, "--output", "OUT"], 2),
    "predict": (["photo.png", "--model", MISSING], 2),
    "push_to_hub": ([MISSING, "me/model"], 1),
    "validate": ([MISSING, "digits"], 2),
}


def run(name: str, words: list[str], capsys) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    capsys.readouterr()
    try:
        status = load_script(name).main(words)
    except SystemExit as end:
        status = end.code
    return (status, *capsys.readouterr())


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # the help keeps to 80 all the same


@pytest.mark.parametrize("name", NAMES)
def test_help(name, capsys):
    status, out, err = run(name, ["--help"], capsys)
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(f"usage: {name}.py ") and lines[1] == ""
    assert lines[2].startswith(f"python scripts/{name}.py")  # an example comes first
    assert "Exit status: 0; " in out
    groups = [line for line in lines if re.fullmatch(r"[a-z][^.]*:", line) and line != "options:"]
    assert groups, "options stand in groups"
    described, _, options = "\n".join(lines[1:]).partition("\noptions:\n")
    assert options
    for option in set(re.findall(r"--\w+", described)):  # what the text names is there
        assert re.search(rf"^ +(-\w, )?{option}\b", options, re.MULTILINE), option


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITH_THE_PACKAGES_OPTIONS])
@pytest.mark.parametrize("option", ["--help", "--no_such_option"])
def test_help_waits_for_nothing(name, option):
    """Importing PyTorch and transformers takes seconds."""
    words = [*BAD_INPUT[name][0], option]
    program = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
import {name}
try:
    {name}.main({words})
finally:
    print(*sys.modules, file=sys.stderr)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == (0 if option == "--help" else 2), ended.stderr
    assert option == "--help" or f"{name}.py: unknown option --no_such_option; the nearest is --" in ended.stderr
    imported = set(ended.stderr.splitlines()[-1].split())
    assert {name, "argparse"} <= imported
    assert not imported & {"torch", "transformers", "modeling_vit_scratch", "numpy", "matplotlib", "gradio", "datasets"}


def test_what_options_may_be_is_what_the_package_knows():
    """The scripts say it once more, so that their help need not import it."""
    convert, export = load_script("convert"), load_script("export")
    assert cli.SOURCES == tuple(FAMILIES)
    assert cli.DTYPES == tuple(DTYPES)
    assert (cli.SHARE, cli.SEED) == (cuts.SHARE, cuts.SEED)
    assert convert.TARGETS == tuple(TARGETS)
    assert (convert.POOLINGS, convert.SUFFIXES, convert.TOLERANCE) == (POOLINGS, SUFFIXES, proof.TOLERANCE)
    assert export.FORMATS == tuple(FORMATS)
    assert load_script("plot").KINDS == tuple(KINDS)
    options = ["image_column_name", "label_column_name", "split", "train_val_split", "token_merging", "top_k"]
    for name in ("column_image_name", "split_val", "token", "tok_k", "x"):
        assert cli.nearest(name, options) == nearest(name, options)
    predict = load_script("predict")
    loaded = cli.load_predictor("predict.py", predict.parse(["photo.jpg", "--device", "cpu"]), None)
    assert loaded.name == str(PACKAGED_MODEL)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "finetune"])  # which would look for its data
def test_examples_of_the_help_are_understood(name, capsys):
    script = load_script(name)
    examples = re.sub(r"\\\n *", "", script.__doc__.split("\n\n")[1]).splitlines()
    assert examples
    for example in examples:
        python, path, *words = shlex.split(example.partition("  ")[0].partition(">")[0])
        assert (python, path) == ("python", f"scripts/{name}.py")
        script.parse(words)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_usage_is_one_line(name, capsys):
    words = [*BAD_INPUT[name][0], "--no_such_option", "1"]
    status, out, err = run(name, words, capsys)
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"{name}\.py: .*no_such_option.*\n", err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "a.png", "--top_k", "x"], "argument --top_k: 'x' is no whole number"),
        (["predict", "a.png", "--top_k", "0"], "argument --top_k: 0 must be at least 1"),
        (["predict", "a.png", "--batch_sise", "3"], "unknown option --batch_sise; the nearest is --batch_size"),
        (["demo", "--port", "99999"], "--port (99999) must be at most 65535"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_numbers_that_cannot_be(words, message, capsys):
    assert run(words[0], words[1:], capsys) == (2, "", f"{words[0]}.py: {message}; --help shows how\n")


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_named(name, tmp_path, capsys):
    words, expected = BAD_INPUT[name]
    status, out, err = run(name, [str(tmp_path / "out") if word == "OUT" else word for word in words], capsys)
    assert (status, out) == (expected, "")
    assert err.startswith(f"{name}.py: ") and (expected == 1 or err.count("\n") == 1)
    assert MISSING in err or "pip install" in err  # the page's extra may be missing


def test_downloads_show_their_progress(monkeypatch):
    """transformers' switch, for the reading of weights, is the Hub's as well."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", None)
    seen = []
    assert cli.run("a.py", list, lambda words: seen.append(are_progress_bars_disabled()) or 3, ["a", "b"]) == 3
    assert seen == [False]


@pytest.mark.parametrize("lines", [1, 100_000])  # that are written at the end, or on the way
def test_results_that_nobody_reads_are_no_error(lines):
    program = (
        f"import cli; raise SystemExit(cli.run('x', lambda argv: {lines}, lambda n: print('a line\\n' * n), None))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(SCRIPTS)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    child.stdout.close()
    with child.stderr:
        assert b"roken" not in child.stderr.read()
    assert child.wait() == 141


def test_another_broken_pipe_is_an_error(capsys):
    def fail(arguments):
        raise BrokenPipeError("the server is gone")

    assert cli.run("x", lambda argv: None, fail, None) == 2
    assert capsys.readouterr().err == "x: the server is gone\n"


@pytest.mark.parametrize("name", ["benchmark", "finetune", "predict", None])
def test_a_torchvision_of_another_build_is_said(name, tmp_path):
    """By a script in one line, and else below the traceback; transformers tells only of a module that failed."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        'raise RuntimeError("operator torchvision::nms does not exist")'
    )
    (tmp_path / "torchvision-0.1.dist-info").mkdir()
    (tmp_path / "torchvision-0.1.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.1\n")
    found = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    words = (
        ["-c", "import modeling_vit_scratch"] if name is None else [str(SCRIPTS / f"{name}.py"), *BAD_INPUT[name][0]]
    )
    ended = subprocess.run([sys.executable, *words], env=found, capture_output=True, text=True, cwd=tmp_path)
    *before, line = ended.stderr.splitlines()
    who = "ImportError" if name is None else f"{name}.py"
    assert line.startswith(f"{who}: torchvision does not fit this PyTorch (operator torchvision::nms does not exist)")
    assert ended.returncode == (1 if name is None else 2)
    assert any("Traceback" in each for each in before) == (name is None), ended.stderr
