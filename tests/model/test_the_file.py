"""The model file itself: what it imports, its order, its shapes, its words."""

import ast
import hashlib
import inspect
import math
import re
from pathlib import Path

import torch
from small_models import TINY, equal, images, make
from transformers import AutoModel, AutoModelForImageClassification, ViTModel

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchModel
from modeling_vit_scratch import modeling_vit_scratch as modeling
from modeling_vit_scratch.configuration_vit_scratch import MODEL_FILE_SHA256

SOURCE = Path(modeling.__file__).read_text()


def test_the_file_imports_torch_transformers_and_its_configuration_alone():
    found = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module if node.level else node.module.split(".")[0]))
    assert found == {"torch", "transformers", ".configuration_vit_scratch"}
    # The library reads annotations as objects, and takes import-looking lines in docstrings for imports.
    assert "from __future__" not in SOURCE
    assert len(re.findall(r"^\s*from\s+\.", SOURCE, re.MULTILINE)) == 1


def test_the_configuration_imports_transformers_and_the_standard_library_alone():
    import sys

    source = Path(inspect.getfile(ViTScratchConfig)).read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= sys.stdlib_module_names
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module.split(".")[0] in {"transformers", *sys.stdlib_module_names}


def test_the_configuration_names_the_model_file_that_it_goes_with():
    """Else transformers runs one folder's model code for another of the same name; after each change, write it anew."""
    assert MODEL_FILE_SHA256 == hashlib.sha256(Path(modeling.__file__).read_bytes()).hexdigest()


def test_definitions_stand_in_reading_order():
    """Bottom up, and what the paper has before what is optional."""
    order = re.findall(r"^class ViTScratch(\w+)", SOURCE, re.MULTILINE)
    assert order == [
        "PatchEmbeddings", "StemStage", "StemPatchEmbeddings", "Embeddings", "RotaryPositions", "Attention", "MLP",
        "DropPath", "LayerScale", "Block", "Layer", "AttentionPooling", "PreTrainedModel", "Model",
        "ForImageClassification", "ForMaskedImageModeling", "Backbone",
    ]  # fmt: skip


def forward_references(source: str) -> list[str]:
    """Where a top-level definition of the file is named above its place."""
    tree = ast.parse(source)
    places = {node.name: node.lineno for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    named = [(node.id, node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return [f"{name} in line {line}" for name, line in named if places.get(name, 0) > line]


def bare_reshapes(source: str) -> list[str]:
    """Statements that rearrange a tensor, and whose lines have no comment with a shape."""
    rearranging = {"reshape", "view", "permute", "transpose", "unfold", "flatten", "unflatten"}
    lines, found = source.splitlines(), []
    for statement in ast.walk(ast.parse(source)):
        if not isinstance(statement, ast.stmt) or hasattr(statement, "body"):
            continue
        called = {
            node.func.attr for node in ast.walk(statement) if isinstance(node, ast.Call) and hasattr(node.func, "attr")
        }
        text = "\n".join(lines[statement.lineno - 1 : statement.end_lineno])
        if called & rearranging and not re.search(r"# .*\([A-Z1][^()]*,[^()]*\)", text):
            found.append(f"line {statement.lineno}: {text.strip()}")
    return found


def undocumented(source: str) -> list[str]:
    """Classes whose docstring names neither an equation or section of the paper nor another source."""
    known = r"ViT, (eq|sec|app)\. |et al\., 20\d\d|transformers' `Dinov2Backbone`"
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return [node.name for node in classes if not re.search(known, ast.get_docstring(node) or "")]


def test_nothing_is_named_before_it_is_defined():
    assert forward_references(SOURCE) == []
    assert forward_references("class A:\n    def f(self):\n        return B()\n\nclass B:\n    pass\n") == [
        "B in line 3"
    ]


def test_every_rearrangement_says_its_shapes():
    assert bare_reshapes(SOURCE) == []
    assert len(re.findall(r"\.(?:unfold|permute|flatten|unflatten|reshape|transpose)\(", SOURCE)) > 15
    assert bare_reshapes("y = f(\n    x.permute(0, 2, 1)\n)  # turned\n") == [
        "line 1: y = f(\n    x.permute(0, 2, 1)\n)  # turned"
    ]
    assert bare_reshapes("y = x.flatten(2)  # (B, C, h, w) -> (B, C, N)\n") == []


def test_every_class_names_its_equation_or_source():
    assert undocumented(SOURCE) == ["ViTScratchPreTrainedModel"]  # it computes nothing
    assert undocumented('class A:\n    """Something."""\n') == ["A"]


def test_letters_of_shapes_are_those_of_the_legend():
    """No letter in a shape comment or an assignment of one capital that the module docstring does not explain."""
    legend = modeling.__doc__.split("Letters")[1].split("Where this file")[0]
    letters = set(re.findall(r"\w", " ".join(re.findall(r"  (\w(?:, \w)?)  +(?=\S)", legend))))
    used = set()
    for comment in re.findall(r"#(.*)$", SOURCE, re.MULTILINE):
        for shape in re.findall(r"\(([^()]*,[^()]*)\)", comment):
            used |= set(re.findall(r"\b([A-Za-z])\b", shape))
    assert {"B", "C", "H", "W", "N", "T", "D", "A", "d", "h", "w"} <= used <= letters
    assigned = {
        node.id
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and re.fullmatch("[A-Z]", node.id)
    }
    assert assigned <= letters


def test_what_the_docstring_says_of_other_code():
    """The deviations that this model's own code can show."""
    config = ViTScratchConfig()
    assert (config.hidden_act, config.position_interpolation, config.hidden_dropout_prob) == ("gelu", "bicubic", 0.0)
    assert config.initializer_range == 0.02
    gelu = modeling.ACT2FN[config.hidden_act]
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    equal(gelu(x), x * (1 + torch.erf(x / math.sqrt(2))) / 2, 1e-12)
    tanh = x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    equal(modeling.ACT2FN["gelu_pytorch_tanh"](x), tanh, 1e-12)
    model = make(ViTScratchModel)
    outputs = model(images(model))
    equal(outputs.pooler_output, outputs.last_hidden_state[:, 0])


def test_every_parameter_of_forward_is_documented():
    doc = inspect.getdoc(ViTScratchModel.forward)
    for name in list(inspect.signature(ViTScratchModel.forward).parameters)[1:]:
        assert f"{name}:" in doc


def test_base_classes_are_equal_to_the_auto_classes():
    config = ViTScratchConfig(**TINY)
    assert type(AutoModel.from_config(config)) is ViTScratchModel
    assert type(AutoModelForImageClassification.from_config(config)) is ViTScratchForImageClassification
    assert issubclass(ViTModel, modeling.PreTrainedModel)
