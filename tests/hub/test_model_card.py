"""The model card: everything that the files say, nothing else, and nothing private."""

import re
import shutil

import numpy as np
import pytest
import yaml
from hub_folders import CLASSES, METRICS, edit_json, write_metrics
from hub_server import TOKEN, WRONG_TOKEN
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from modeling_vit_scratch.data.sources import load_image, public_name
from modeling_vit_scratch.hub import public_command, write_model_card


def test_card_says_what_the_files_say(folder):
    card = ModelCard.load(write_model_card(folder))
    head = yaml.safe_load(card.content.split("---")[1])
    assert head["license"] == "apache-2.0" and head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "image-classification" and "image-classification" in head["tags"]
    assert head["datasets"] == ["uoft-cs/cifar10"]
    (result,) = head["model-index"][0]["results"]
    assert result["dataset"] == {"name": "uoft-cs/cifar10", "type": "uoft-cs/cifar10", "split": "test"}
    assert [(m["type"], m["value"]) for m in result["metrics"]] == [("accuracy", 0.6184)]
    for text in (
        "| test | 10,000 | 61.84 % | 1.2345 |",
        "| validation | 5,000 | 61.23 % | 1.2500 |",
        "847,626", "12,345,678", "45,000 train, 5,000 validation, 10,000 test images", "airplane, cat, dog",
        "| `augmentation.horizontal_flip` | 0.5 |", "5 min 0 s", "4 min 50 s", "A processor, 2 cores", "2.13.0",
        "python scripts/finetune.py --num_train_epochs 8", "trust_remote_code=True", "revision=revision",
        "38.16 % of the test images", "71.00 % of airplane is recognised, but 42.00 % of cat",
    ):  # fmt: skip
        assert text in card.text, text
    shown = re.findall(r"\]\(plots/(\w+)\.png\)", card.text)
    assert shown == ["training_curves", "confusion_matrix", "another"]


@pytest.mark.parametrize("classes", [5, 6])
def test_card_has_top_5_where_there_are_more_than_five_classes(folder, classes):
    write_metrics(folder, dataset={**METRICS["dataset"], "class_names": [f"c{i}" for i in range(classes)]})
    card = ModelCard.load(write_model_card(folder))
    types = [result.metric_type for result in card.data.eval_results]
    if classes > 5:
        assert types == ["accuracy", "top5_accuracy"]
        assert "| split | images | top-1 | top-5 | loss |" in card.text
        assert "| test | 10,000 | 61.84 % | 95.34 % | 1.2345 |" in card.text
    else:
        assert types == ["accuracy"] and "| split | images | top-1 | loss |" in card.text
        assert "top-5" not in card.text and "95.34 %" not in card.text


def test_card_code_runs_where_the_config_says_tuples(folder):
    edit_json("config.json", return_dict=False)(folder)
    code = re.search(r"```python\n(.*?)```", ModelCard.load(write_model_card(folder)).text, re.S)[1]
    code = re.sub("repo = .*", f"repo = {str(folder)!r}", re.sub("revision = .*", "revision = None", code))
    # Some versions of transformers export it only beside torchvision.
    code = code.replace("import AutoImageProcessor, ", "import ")
    names = {"AutoImageProcessor": AutoImageProcessor}
    exec(code, names)
    assert {answer["label"] for answer in names["classify"](Image.new("RGB", (20, 20)))} == set(CLASSES)


def test_card_says_how_images_that_pipelines_read_otherwise_are_converted(folder):
    """By each of its lines the image becomes what training makes of it, which the pipeline's own reading is not."""
    [line] = [line for line in write_model_card(folder).read_text().splitlines() if "clips 16 bits" in line]
    of_alpha, of_16_bits = re.findall("`(.*?)`", line)
    alpha = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8))
    deep = Image.fromarray(np.arange(1 << 16, dtype=np.uint16).reshape(256, 256))
    for expression, image in ((of_alpha, alpha), (of_alpha, alpha.convert("LA")), (of_16_bits, deep)):
        seen = np.asarray(load_image(image))
        assert not np.array_equal(seen, np.asarray(image.convert("RGB")))
        converted = eval(expression, {"Image": Image, "image": image}).convert("RGB")
        np.testing.assert_array_equal(np.asarray(converted), seen)


def test_card_names_what_is_not_as_in_the_paper(folder):
    edit_json(
        "config.json", pooling="attention", use_qk_norm=True, position_embedding_type="learned", hidden_act="`a`"
    )(folder)
    [line] = [line for line in write_model_card(folder).read_text().splitlines() if "Other than in the paper" in line]
    assert "use_qk_norm=True" in line and "pooling=attention" in line and r"hidden_act=\`a\`" in line
    assert "position_embedding_type" not in line and "use_gated_mlp" not in line


def test_card_invents_nothing(folder):
    shutil.rmtree(folder / "plots")
    write_metrics(folder, test=None, training={}, time=None, model=None, environment=None, command=None)
    card = ModelCard.load(write_model_card(folder))
    assert "model-index" not in card.content and "metrics" not in card.data.to_dict()
    assert "not measured on a test split" in card.text and "61.23 %" in card.text
    for text in ("| test |", "parameters", "FLOPs", "plots/", "## Training", "None", "nan"):
        assert text not in card.text, text
    (folder / "metrics.json").unlink()
    card = ModelCard.load(write_model_card(folder))
    assert "No results were saved" in card.text and "datasets" not in card.data.to_dict()
    assert not re.search(r"\d %", card.text)


@pytest.mark.parametrize(
    "name", ["/home/zoe9/secret client/cifar10", "../secret client/cifar10", "~/secret client/cifar10"]
)
def test_card_leaks_no_path_and_no_token(folder, name):
    command = (
        f"/home/zoe9/venv/bin/python scripts/finetune.py --dataset_name '{name}' --hub_token {TOKEN} --token=abc "
        f"--output_dir=/home/zoe9/runs/x --note {WRONG_TOKEN}"
    )
    write_metrics(folder, command=command, dataset={**METRICS["dataset"], "name": name}, training={"hub_token": TOKEN})
    text = write_model_card(folder).read_text()
    for secret in ("zoe9", "secret", TOKEN, WRONG_TOKEN, "abc", "datasets:", "huggingface.co/datasets"):
        assert secret not in text, secret
    assert "trained on cifar10" in text and "python scripts/finetune.py --dataset_name path/to/cifar10 " in text
    assert "--output_dir=path/to/x" in text and "begins with `path/to/` is a placeholder" in text
    assert yaml.safe_load(text.split("---")[1])["model-index"][0]["results"][0]["dataset"]["type"] == "cifar10"


@pytest.mark.parametrize(
    ("dataset", "given", "shown"),
    [
        ("/a/zoe9/few", "python scripts/finetune.py --dataset_name /a/zoe9/few --output_dir ~/zoe9/runs/mine",
         "python scripts/finetune.py --dataset_name path/to/few --output_dir path/to/mine"),
        ("../zoe9/few", "/zoe9/torchrun --nproc_per_node 2 /zoe9/vit/scripts/finetune.py --dataset_name ../zoe9/few",
         "torchrun --nproc_per_node 2 scripts/finetune.py --dataset_name path/to/few"),
        ("digits", "python /zoe9/scripts/finetune.py /zoe9/scripts/recipes/digits.yaml --dataset_name digits",
         "python scripts/finetune.py scripts/recipes/digits.yaml --dataset_name digits"),
        ("uoft-cs/cifar10",
         "python 'C:\\zoe9\\scripts\\finetune.py' --dataset_name uoft-cs/cifar10 --output_dir runs/mine",
         "python scripts/finetune.py --dataset_name uoft-cs/cifar10 --output_dir runs/mine"),
        ("cifar10", "python scripts/finetune.py --dataset_name cifar10 --model_name_or_path=/zoe9/scripts/secret/base",
         "python scripts/finetune.py --dataset_name cifar10 --model_name_or_path=path/to/base"),
        (None, "accelerate launch /zoe9/mine.py --dataset_name . --output_dir '/zoe9/my runs'",
         "accelerate launch path/to/mine.py --dataset_name path/to/folder --output_dir 'path/to/my runs'"),
    ],
)  # fmt: skip
def test_commands_paths_become_placeholders(folder, dataset, given, shown):
    """And stay so when the command is made public again: the run's metrics.json has it as the card shows it."""
    assert public_command(given, dataset) == public_command(shown, dataset) == shown
    write_metrics(folder, command=shown, dataset={**METRICS["dataset"], "name": public_name(dataset or "few")})
    text = write_model_card(folder).read_text()
    assert f"```bash\n{shown}\n```" in text and ("is a placeholder" in text) == ("path/to/" in shown)


def test_card_of_a_local_folder_that_looks_like_a_hub_id(folder, monkeypatch):
    (folder / "data" / "cifar10").mkdir(parents=True)
    monkeypatch.chdir(folder)
    write_metrics(folder, dataset={"name": "data/cifar10"}, command="python finetune.py --dataset_name data/cifar10")
    text = write_model_card(folder).read_text()
    assert "datasets:" not in text and "data/cifar10" not in text and "--dataset_name path/to/cifar10" in text


@pytest.mark.parametrize(
    ("base", "hub_id", "origin"),
    [
        ("google/vit-base-patch16-224", "google/vit-base-patch16-224",
         "[google/vit-base-patch16-224](https://huggingface.co/google/vit-base-patch16-224)"),
        ("/home/zoe9/secret/mine", None, "mine"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("converted", [False, True])
def test_card_of_a_model_that_came_from_another(folder, base, hub_id, origin, converted):
    """Fine-tuned or converted: the Hub links the two, and no licence is given to weights of others."""
    if converted:
        card = ModelCard.load(write_model_card(folder, base_model=base))
    else:
        write_metrics(folder, model={"parameters": 847626, "base_model": base})
        card = ModelCard.load(write_model_card(folder))
    assert card.data.base_model == hub_id and card.data.license is None
    assert f"**Weights from:** {origin}" in card.text and f"The weights come from {origin}, whose terms" in card.text
    assert "Apache-2.0. The weights" in card.text and "weights: Apache-2.0" not in card.text and "zoe9" not in card.text
    if hub_id:
        validate_repo_id(card.data.base_model)


def test_the_hub_client_reads_the_card_without_a_complaint(folder, caplog):
    """huggingface_hub's own checks: a strict reading, and results that make the round trip."""
    path = write_model_card(folder)
    card = ModelCard.load(path, ignore_metadata_errors=False)
    index = card.data.to_dict()["model-index"]
    name, results = model_index_to_eval_results(index)
    assert name == card.data.model_name and [result.metric_value for result in results] == [0.6184]
    assert eval_results_to_model_index(name, results) == index
    assert all(
        result.is_equal_except_value(given) for result, given in zip(results, card.data.eval_results, strict=True)
    )
    for repo_id in card.data.datasets:
        validate_repo_id(repo_id)
    assert not caplog.records
    damaged = path.read_text().replace("model-index:\n- name:", "model-index:\n- title:")
    with pytest.raises(ValueError, match=r"name"):
        ModelCard(damaged, ignore_metadata_errors=False)


def test_card_of_a_pretrained_model(folder):
    """It says what pre-training measured, and nothing of classes, which the model does not know."""
    edit_json("config.json", architectures=["ViTScratchForMaskedImageModeling"])(folder)
    write_metrics(
        folder,
        task="masked-image-modeling",
        dataset={"name": "/home/zoe9/secret/images", "splits": {"train": 1200}, "fingerprint": "f00"},
        training={"epochs": 8.0, "mask_ratio": 0.6, "mask_patch_size": [8, 8]},
        validation={"examples": 300, "loss": 0.51237},
        test=None,
        command=f"python scripts/finetune.py --dataset_name /home/zoe9/secret/images --hub_token {TOKEN}",
    )
    Image.new("RGB", (4, 4)).save(folder / "plots" / "reconstructions.png")
    card = ModelCard.load(write_model_card(folder))
    assert card.data.pipeline_tag == "image-feature-extraction" and "image-classification" not in card.data.tags
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers" and not card.data.eval_results
    for text in (
        "# Vision Transformer, pre-trained on images without labels",
        "60% of an image is hidden, in squares of 8x8 pixels, and the model paints it",
        "**Parameters:** 847,626", "**Data:** images: 1,200 train images", "`f00`",
        "hidden pixels on 300 images held out: 0.5124 standard deviations", "| `mask_ratio` | 0.6 |", "5 min 0 s",
        "scripts/finetune.py --model_name_or_path FOLDER", "--dataset_name path/to/images --hub_token ***",
    ):  # fmt: skip
        assert text in card.text, text
    assert re.findall(r"\]\(plots/(\w+)\.png\)", card.text)[0] == "reconstructions"
    for text in ("zoe9", TOKEN, "Classes", "AutoModelForImageClassification", "top-1"):
        assert text not in card.content, text
    (folder / "metrics.json").unlink()
    card = ModelCard.load(write_model_card(folder))
    assert "No results were saved" in card.text and "a part of an image is hidden and the model paints it" in card.text
