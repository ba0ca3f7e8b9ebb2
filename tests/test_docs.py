"""README and the pages of docs/: what they say is what the code does, and nothing is said twice."""

import ast
import configparser
import json
import os
import re
import shlex
import sys
from collections import Counter
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
import yaml
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from runs import ROOT, SCRIPTS, load_script
from torch.distributed.run import get_args_parser as torchrun_parser
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import modeling_vit_scratch as package
from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, modeling_vit_scratch
from modeling_vit_scratch.configuration_vit_scratch import PRESETS
from modeling_vit_scratch.conversion import export_checkpoint
from modeling_vit_scratch.data.cuts import SEED, SHARE
from modeling_vit_scratch.data.doctor import fingerprint
from modeling_vit_scratch.data.records import Cut, load_records
from modeling_vit_scratch.data.sources import load_raw
from modeling_vit_scratch.export import TOLERANCE
from modeling_vit_scratch.plots import figures
from modeling_vit_scratch.training import DataArguments
from modeling_vit_scratch.training.arguments import check_options
from modeling_vit_scratch.training.defaults import SIZES

DOCS = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = {f"docs/{name}.md": text for name, text in DOCS.items()}
PAGES |= {f"{name}.md": (ROOT / f"{name}.md").read_text() for name in ("README", "CONTRIBUTING", "CHANGELOG")}
ON_EACH_PAGE = pytest.mark.parametrize("page", PAGES)
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
MODEL_FILE = "modeling_vit_scratch/modeling_vit_scratch.py"
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<![`$])`([^`\n]+)`(?![`$])")


def test_readme_is_one_screen_that_leads_everywhere():
    readme = PAGES["README.md"]
    assert len(readme.splitlines()) <= 80
    for command in ("pip install -e . && python scripts/finetune.py", 'pip install -e ".[test]" && pytest'):
        assert f"\n    {command}\n" in readme
    linked = re.findall(r"\]\(docs/(\w+)\.md\)", readme.partition("| I want to")[2])
    assert sorted(linked) == sorted(DOCS)


@pytest.mark.parametrize("name", DOCS)
def test_each_page_begins_with_a_command(name):
    """Or with the Python that does it."""
    assert re.match(r"# [\w ]+\n\n(## [\w ]+\n\n(.+\n)+\n```python\n|    (python|accelerate|pytest)\b)", DOCS[name])


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """Of blocks, indented by four spaces, and of code in a sentence that begins with a program's name."""
    text = FENCED.sub("", text)
    blocks = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    programs = ("python ", "pip ", "pytest ", "torchrun ", "accelerate ", "ruff ")
    return [*blocks, *(code for code in CODE.findall(text) if code.startswith(programs))]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with what the pages speak of: the scripts, images by class, trained models, a photo."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "scripts").symlink_to(SCRIPTS)
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "path" / "to" / "folder" / name).mkdir(parents=True)
        for i in range(12):
            image = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
            image.save(folder / "path" / "to" / "folder" / name / f"{i}.jpg")
    image.save(folder / "photo.jpg")
    tiny = {"hidden_size": 192, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 192}
    size = {"height": 28, "width": 28}

    def save(model, where: str):
        model.eval().save_pretrained(folder / where)
        ViTImageProcessorPil(size=size).save_pretrained(folder / where)

    config = ViTScratchConfig(
        **tiny, image_size=28, patch_size=14, layerscale_value=1.0, id2label={0: "cat", 1: "dog", 2: "eel"}
    )
    model = ViTScratchForImageClassification(config)
    torch.nn.init.normal_(model.classifier.weight)  # else it counts as untrained
    records, class_names = load_records(load_raw(str(folder / "path" / "to" / "folder")))
    run = {"name": "folder", "cut": asdict(Cut("stratified", SHARE, SEED))}
    run["fingerprint"] = fingerprint(SimpleNamespace(records=records, class_names=class_names))
    for name in ("runs/mine", "runs/other"):
        save(model, name)
        (folder / name / "metrics.json").write_text(json.dumps({"dataset": run}))
    tensors = {name: tensor for name, tensor in export_checkpoint(model, "timm").items() if "head" not in name}
    torch.save({**tensors, "mask_token": torch.zeros(1, 192)}, folder / "dinov2_vits14.pth")
    google = "google/vit-base-patch16-224"
    save(ViTForImageClassification(ViTConfig(**tiny, image_size=28, patch_size=14)), google)
    return folder


@pytest.fixture
def there(place, monkeypatch):
    """In that folder, with an environment that TrainingArguments may change."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return place


def read_by_its_program(words: list[str]):
    """Have the program's own parser read a command; a wrong one raises, or ends it with a status of 2."""
    program, *rest = words
    if program == "python":
        path, *argv = rest
        script = load_script(Path(path).stem)
        assert (ROOT / path).samefile(script.__file__)
        if path.endswith("finetune.py"):
            script.default_dataset = lambda: "digits"  # asks the Hub
            check_options(*script.parse(argv))
        else:
            script.parse(argv)
    elif program == "torchrun" or words[:2] == ["accelerate", "launch"]:
        parser, argv = (torchrun_parser(), rest) if program == "torchrun" else (launch_command_parser(), rest[1:])
        launched = parser.parse_args(argv)
        read_by_its_program(["python", launched.training_script, *launched.training_script_args])
    elif words[:2] == ["pip", "install"]:
        extras = {extra for word in rest for names in re.findall(r"^\.\[(.+)\]$", word) for extra in names.split(",")}
        assert extras <= set(SETUP["options.extras_require"])
        assert extras or rest[1:] == ["-e", "."] or rest[1:3] == ["torch", "--index-url"]
    elif program == "pytest":
        markers = [line.partition(":")[0] for line in SETUP["tool:pytest"]["markers"].split("\n")]
        if rest[:1] == ["-n"]:  # as CI does
            assert f'"{" ".join(["--numprocesses", *rest[1:]])}"' in (ROOT / ".ci" / "run").read_text()
        else:
            assert not rest or (rest[0] == "-m" and rest[1].removeprefix("not ") in markers)
    else:
        anew = "jupyter nbconvert --to notebook --execute --inplace notebooks/vit_from_scratch.ipynb"
        assert words in [line.split() for line in ("accelerate config", "ruff check .", "ruff format --check .", anew)]


@pytest.mark.parametrize(
    "command", sorted({part for text in PAGES.values() for line in commands(text) for part in line.split(" && ")})
)
def test_commands_are_read_by_their_programs(command, there):
    read_by_its_program(shlex.split(command))


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """Of each script, those that its help names."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for path in {*SCRIPTS.glob("*.py")} - {SCRIPTS / "cli.py"}:
            said = []
            patch.setattr(sys, "stdout", type("Ear", (), {"write": lambda _, text, said=said: said.append(text)})())
            with pytest.raises(SystemExit):
                load_script(path.stem).parse(["--help_all" if path.stem == "finetune" else "--help"])
            found[path.stem] = set(re.findall(r"(?<![\w-])--\w+", "".join(said)))
    return found


@ON_EACH_PAGE
def test_options_are_those_of_a_script_that_the_page_runs(page, options):
    scripts = re.findall(r"scripts/(\w+)\.py|`(\w+)\.py`", PAGES[page])
    known = set().union(*(options.get(name, ()) for names in scripts for name in names))
    named = {code.split()[0].partition("=")[0] for code in CODE.findall(PAGES[page]) if code.startswith("--")}
    assert named <= known


def test_options_of_the_table_are_taken(there):
    rows = re.findall(r"^\| (`--.*?) \|", DOCS["training"], re.MULTILINE)
    assert len(rows) > 8
    for row in rows:
        for words in CODE.findall(row):
            read_by_its_program(["python", "scripts/finetune.py", "--dataset_name", "digits", *shlex.split(words)])


def test_kinds_of_plots():
    kinds = re.findall(r"^\| `([\w-]+)` \|.*\| (.*?) ?\|$", DOCS["inside"], re.MULTILINE)
    assert {kind for kind, _ in kinds} == set(figures.KINDS)
    assert {kind for kind, need in kinds if need == "images"} == figures.NEED_IMAGES
    assert {kind for kind, need in kinds if need == "labels"} == figures.NEED_LABELS
    assert {kind for kind, need in kinds if "the run's own" in need} == figures.SAVED


# --- Python -----------------------------------------------------------------------------------------------------------


def test_python_of_readme_weights_and_how_it_works(there, copied_code):
    run_python(["README.md", "docs/weights.md", "docs/how_it_works.md"])


@pytest.mark.skipif(
    not all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="pip install 'modeling_vit_scratch[export]'",
)
def test_python_of_export(there, copied_code):
    names = run_python(["docs/export.md"])
    session, program = names["session"], names["program"]
    [expected] = session.run(["logits"], {"pixel_values": names["pixels"]})
    exported = program(torch.from_numpy(names["pixels"]))
    torch.testing.assert_close(exported, torch.from_numpy(expected), atol=1e-4, rtol=1e-4)


def test_python_of_evaluation_and_inside(there, copied_code):
    names = run_python(["docs/inside.md", "docs/evaluation.md"])
    assert names["report"]["comparison"]["difference"] == 0  # the same model twice
    assert names["report"]["cut"]["of_the_run"]
    assert {path.name for path in (there / "plots").iterdir()} >= {"patch_filters.png", "attention_rollout.svg"}


def test_python_of_today(there, copied_code):
    """It makes encoders of the sizes that timm's have, and draws the picture that stands on the page."""
    names = run_python(["docs/today.md"])
    D = 768
    timm = {  # parameters of timm 1.0.31's models, and what ours have more
        "ViT": (85_798_656, 0),  # vit_base_patch16_224
        "DeiT, distilled": (85_800_192, 0),  # deit_base_distilled_patch16_224
        "CLIP": (85_799_424, D),  # vit_base_patch16_clip_224: its patches have no bias
        "EVA": (1_011_146_112, 0),  # eva_giant_patch14_224
        "SigLIP": (92_884_224, 0),  # vit_base_patch16_siglip_224
        "EVA-02": (21_621_120, 0),  # eva02_small_patch14_224
        "DINOv2": (86_582_016, D),  # vit_base_patch14_reg4_dinov2: the class token's position is in the token
        "RoPE-ViT": (85_675_008, 0),  # vit_base_patch16_rope_mixed_224
        "Perception Encoder": (86_433_792, D),  # vit_pe_spatial_base_patch16_512: as CLIP
        "DINOv3": (85_659_648, 0),  # vit_base_patch16_dinov3_qkvb
    }
    assert set(names["configs"]) == set(timm)
    for name, (count, more) in timm.items():
        with torch.device("meta"):
            encoder = ViTScratchForImageClassification(names["configs"][name]).vit
        assert encoder.num_parameters() == count + more, name
    folders = ROOT / "docs" / "images", there / "plots"
    told, drawn = (Image.open(folder / "rotary_positions.png") for folder in folders)
    assert told.size == drawn.size
    told, drawn = (np.asarray(image.convert("RGB"), float) for image in (told, drawn))
    assert np.abs(told - drawn).mean() < 5


def test_choices_of_today_are_fields_and_classes():
    """A paragraph or item names the field that switches a choice on, or several, and the class that computes it."""
    named = [code for code in CODE.findall(FENCED.sub("", DOCS["today"])) if re.match(r"\w+(=|$)", code)]
    fields = {tuple(code.split("=")) for code in named if "=" in code}
    assert len(fields) > 15
    for name, value in fields:
        default = name in ("rope_coordinates", "rope_theta")  # of which the page tells all that are in use
        assert default or getattr(ViTScratchConfig(), name) != ast.literal_eval(value), name
        together = {"use_cls_token": False} if value == '"attention"' else {}
        ViTScratchConfig(**{name: ast.literal_eval(value)}, **together)  # or it is refused
    classes = {code for code in named if code.startswith("ViTScratch")}
    assert len(classes) > 7 and all(hasattr(modeling_vit_scratch, name) for name in classes)


def test_python_of_scaling(there, monkeypatch, copied_code):
    """But for the two processes, which tests/test_distributed.py has."""
    given = []
    monkeypatch.setattr(ViTScratchForImageClassification, "from_pretrained", lambda *a, **kw: given.append((a, kw)))
    run_python(["docs/scaling.md"])
    [(_, arguments)] = given
    assert arguments["distributed_config"].fsdp_size == 2


def test_no_page_has_python_that_is_not_run():
    ran = {"README.md"} | {
        f"docs/{page}.md" for page in ("weights", "how_it_works", "today", "export", "scaling", "evaluation", "inside")
    }
    ran.add("docs/clients.md")  # tests/clients/test_clients.py, where the package cannot be imported
    assert {page for page, text in PAGES.items() if FENCED.search(text)} == ran
    assert {language for text in PAGES.values() for language, _ in FENCED.findall(text)} == {"python"}


def has_processors() -> bool:
    """Without torchvision, transformers 5.17 has something in place of AutoImageProcessor that raises."""
    try:
        return callable(transformers.AutoImageProcessor.from_pretrained)
    except ImportError:
        return False


def run_python(pages: list[str]) -> dict:
    """Run the blocks of pages, those of a page in one namespace; the last one's is returned."""
    for page in pages:
        source = "\n".join(code for _, code in FENCED.findall(PAGES[page]))
        if "AutoImageProcessor" in source and not has_processors():
            pytest.skip("this version of transformers has AutoImageProcessor only with torchvision")
        names = {}
        exec(compile(source, page, "exec"), names)
    return names


# --- links and names --------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@ON_EACH_PAGE
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^()\s]+)\)|src=\"([^\"]+)\"", PAGES[page])
    for target in ("".join(pair) for pair in links):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = ROOT / Path(page).parent / path
        assert file.exists(), f"{page} links {target}"
        if anchor and not re.fullmatch(r"L\d+", anchor):
            assert anchor in anchors(file.read_text()), f"{page} links {target}"


@ON_EACH_PAGE
def test_files_that_a_page_names_exist(page):
    named = re.findall(
        r"(?<![\w/])(?:scripts|modeling_vit_scratch|tests|docs|\.ci)/[\w./-]+\.(?:py|yaml|png|svg|md)", PAGES[page]
    )
    assert named or page not in ("README.md", "docs/promises.md")
    assert [name for name in named if not (ROOT / name).exists()] == []


@ON_EACH_PAGE
def test_tests_that_a_page_names_exist(page):
    named = re.findall(r"`(test_\w+)`", PAGES[page])
    defined = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert named or page not in ("docs/promises.md", "docs/weights.md")
    assert [name for name in named if f"def {name}(" not in defined] == []


@pytest.mark.parametrize("heading", ["promise", "source"])
def test_each_promise_has_a_test(heading):
    """So has each source of weights."""
    table = re.search(rf"^\| {heading} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", "\n".join(DOCS.values()), re.MULTILINE)[1]
    assert all(re.search(r"\| `(tests/(\w+/)?)?test_\w+[^|]*\|$", row) for row in table.splitlines())


# --- figures ----------------------------------------------------------------------------------------------------------


def parameters(config: ViTScratchConfig) -> int:
    with torch.device("meta"):
        return ViTScratchForImageClassification(config).num_parameters()


def test_table_of_presets():
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", DOCS["how_it_works"], re.MULTILINE)
    assert [name for name, _ in rows] == list(PRESETS)
    for name, cells in rows:
        config = ViTScratchConfig.preset(name)
        told = [int(cell.replace(",", "").split("(")[0]) for cell in cells.split("|")]
        assert told == [
            config.patch_size, config.image_size, config.hidden_size, config.num_hidden_layers,
            config.num_attention_heads, config.intermediate_size, parameters(config),
        ]  # fmt: skip
        assert f"({config.num_labels}" in cells or config.num_labels == 1000
    assert "parameters (1000 classes)" in DOCS["how_it_works"]


def test_fields_that_can_be_overridden():
    [fields] = re.findall(r"can be overridden, e\.g\. (.*?);", DOCS["how_it_works"], re.DOTALL)
    for name, value in re.findall(r"`(\w+)=([^`]+)`", fields):
        changed = ViTScratchConfig(**{"pooling": "mean", "use_cls_token": False} | {name: ast.literal_eval(value)})
        assert getattr(changed, name) != ViTScratchConfig.__dataclass_fields__[name].default


def recipe(name: str) -> tuple[str, dict]:
    text = (SCRIPTS / "recipes" / name).read_text()
    return text, yaml.safe_load(text)


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d[\d,]*(?:\.\d+)?", text))


def test_results_are_those_of_the_recipes():
    """Accuracies, times, epochs and parameters; a recipe's head has what was measured."""
    rows = re.findall(r"^\| (.*`.*finetune\.py.*`) \|$", DOCS["results"], re.MULTILINE)
    assert len(rows) == 7
    for run, _, accuracy, seconds, command in (row.split("|") for row in rows):
        name = re.search(r"recipes/(\w+\.yaml)", command)
        text, settings = recipe(name[1] if name else "digits.yaml")
        seeds = re.search(r" \((\d) seeds\)", accuracy)
        assert seeds is None or len(re.search(r"seeds (\d+(?:, \d+)*)", text)[1].split(",")) == int(seeds[1])
        told = numbers(accuracy.partition(" (")[0]) | numbers(seconds) - {"2"}  # cores
        assert told <= numbers(text), f"{run}: {told - numbers(text)} is not in its recipe"
        for epochs in re.findall(r"(\d+) epochs", run):
            assert int(epochs) == settings.get("num_train_epochs") or f"{epochs} epochs" in text
        config = ViTScratchConfig.preset(settings["preset"], **settings["config_overrides"])
        for count in re.findall(r"([\d,]+) parameters", run):
            assert count == f"{parameters(config):,}"
        for millions in re.findall(r"([\d.]+) M parameters", run):
            assert float(millions) == round(parameters(config) / 1e6, 1)


def test_figures_outside_the_table():
    """In README the race and the best result; what pre-training gave; the recipes say the same."""
    readme, training = (" ".join(text.split()) for text in (PAGES["README.md"], DOCS["training"]))
    soon, late = re.search(r"after (\d+) CPU-seconds instead of ([\d,]+)\.", readme).groups()
    [times] = re.findall(r"(\d+) times sooner", readme)
    assert late in recipe("teaching_adamw.yaml")[0] and round(int(late.replace(",", "")) / int(soon)) == int(times)
    assert re.search(r"goes on to ([\d.]+ %) on the test split", readme)[1] in DOCS["results"]
    took, accuracy = re.search(r"(\d+ min \d+ s) on two cores reaches ([\d.]+ %)", readme).groups()
    assert took in recipe("hour.yaml")[0] and accuracy in recipe("hour.yaml")[0]
    text, settings = recipe("few_labels.yaml")
    config = ViTScratchConfig.preset(settings["preset"], **settings["config_overrides"])
    assert f"{settings['max_train_samples']:,} labels" in training and f"{parameters(config):,} parameters" in training
    assert re.search(r"ended alike, at ([\d.]+ %)", training)[1] in text
    assert "847,626 parameters" in readme and parameters(ViTScratchConfig.preset("showcase")) == 847_626


def test_ratios_of_the_table_of_speed():
    """Medians of ratios are not ratios of medians, but near; and each lies in its range."""
    rows = re.findall(r"^\| (?:ViT|showcase|the same).*?\| (.*) \| (.* to .*\)) \|$", DOCS["results"], re.MULTILINE)
    assert len(rows) == 7
    for speeds, ratios in rows:
        ours, *peers = [float(cell.replace(",", "").strip() or "nan") for cell in speeds.split("|")]
        ratio, least, most = map(float, re.fullmatch(r"([\d.]+) \(([\d.]+) to ([\d.]+)\)", ratios).groups())
        assert least <= ratio <= most and abs(ours / np.nanmax(peers) - ratio) < 0.06


def test_defaults_are_those_of_the_code():
    for name, words in (
        ("training", "{}, {} or {} pixels".format(*(size for _, size, *_ in SIZES))),
        ("training", f"where {DataArguments.mask_ratio * 100:g} % of an image is hidden"),
        ("training", {0.1: "a tenth of train"}[DataArguments.train_val_split]),
        ("evaluation", {5: "the five likeliest"}[load_script("predict").parse(["x"]).top_k]),
        ("export", f"more than {TOLERANCE:.0e} is".replace("e-0", "e-")),
    ):
        assert words in " ".join(DOCS[name].split())


def test_versions():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == SETUP["metadata"]["version"] == package.__version__
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"]
    assert citation["license"] == SETUP["metadata"]["license"] and citation["title"] == SETUP["metadata"]["name"]
    assert f"next release will be {package.__version__}." in PAGES["CHANGELOG.md"]


# --- nothing twice ----------------------------------------------------------------------------------------------------


def sentences(text: str) -> list[list[str]]:
    """The words of each sentence, heading, item and cell of a table, without code."""
    text = re.sub(r"^    .*$", "", FENCED.sub("", text), flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)|<[^>]*>", " ", CODE.sub(" ", text))
    parts = re.split(r"[.!?:;]\s|\||\n\n|\n- |\n#", text)
    return [re.findall(r"\w+", part.lower()) for part in parts]


def test_no_sentence_stands_twice():
    """Nor do seven words in a row of one."""
    counts = Counter()
    for text in PAGES.values():
        for words in sentences(text):
            counts.update(" ".join(words[i : i + 7]) for i in range(len(words) - 6))
    assert [words for words, count in counts.items() if count > 1] == []


# --- how it works -----------------------------------------------------------------------------------------------------

SECTION = re.search(r"^## Step by step\n(.*?)^## ", DOCS["how_it_works"], re.MULTILINE | re.DOTALL).group(1)
STEPS = re.findall(r"^\| \*\*(\d)\. (\w+)\.\*\* (.*) \| <img (.*)> \|$", SECTION, re.MULTILINE)


@pytest.fixture(scope="module")
def shapes() -> dict[str, list[tuple[int, ...]]]:
    """What each step makes of one image, measured on the showcase model."""
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
    assert len(SECTION.splitlines()) < 40  # and five images: two screens


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
        assert (path, int(line)) == (f"../{MODEL_FILE}", begins), f"the page links {class_name} at line {line}"
        described += getattr(modeling_vit_scratch, class_name).__doc__
    named = {int(number) for found in re.findall(r"eq\. ([\d, toand]+)", described) for number in _numbers(found)}
    for equation in re.findall(r"\(eq\. (\d)\)", text):
        assert int(equation) in named, f"no docstring of step {name} names eq. {equation}"


def _numbers(text: str) -> list[int]:
    """Of "2 and 3" or "5 to 8"."""
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    return list(range(numbers[0], numbers[-1] + 1)) if "to" in text else numbers


def test_images_are_those_that_one_command_draws():
    plot = load_script("plot")
    explained = set(re.findall(r"images/(\w+)\.png", SECTION))
    named = {name for text in PAGES.values() for name in re.findall(r"images/(\w+)\.png", text)}
    assert explained == {figures.KINDS[kind] for kind in plot.DOCS}
    committed = {path.stem: path.stat().st_size for path in (ROOT / "docs" / "images").glob("*.png")}
    others = {"race", "reconstructions", "rotary_positions"}  # two of long runs; what docs/today.md draws
    assert set(committed) == named == explained | others
    assert max(committed.values()) < 150_000
    assert "scripts/plot.py docs" in DOCS["how_it_works"]
    assert all(Path(path).is_file() for path in plot.EXAMPLES)
