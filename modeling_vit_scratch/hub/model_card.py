"""The model card of a trained folder, from its own files, with nothing in it that is private."""

import json
import re
from collections import defaultdict
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_vit_scratch import ViTScratchConfig
from .masking import PATH_PLACEHOLDER, is_token_flag, public_command, public_dataset, public_text

REPO_PLACEHOLDER = "OWNER/REPO"  # stands in a card until it is pushed; then the repository's id
# Fields of the config that make another model of the same size.
CHOICES = (
    "hidden_act", "use_gated_mlp", "qkv_bias", "key_bias", "use_qk_norm", "use_embedding_norm", "layerscale_value",
    "position_embedding_type", "rope_theta", "rope_coordinates", "rope_grid_size", "rope_offset", "rope_frequencies",
    "use_cls_token", "num_cls_tokens", "num_register_tokens", "pooling", "use_final_norm", "norm_after_pooling",
    "representation_size",
)  # fmt: skip
_PLOTS_FIRST = ("reconstructions", "training_curves", "per_class_accuracy", "confusion_matrix")


def with_examples(card: str, sources: list[tuple[str, str]]) -> str:
    """The card with images for the Hub's widget, each a title and an address."""
    card = ModelCard(card)
    card.data["widget"] = [{"src": address, "example_title": title} for title, address in sources]
    return str(card)


def write_model_card(folder: str | Path, status: str | None = None, base_model: str | None = None) -> Path:
    """Write `README.md` for a trained folder from its `config.json`, `metrics.json` and `plots/`.

    What the files do not say, the card does not say: a missing metric is left out, never guessed. Paths of this
    machine are cut to their last component, a placeholder before it in the command, where tokens are masked too.

    Args:
        folder: A classifier or a model pre-trained without labels, as `save_pretrained` and the training write it;
            `metrics.json` may be missing.
        status: A sentence to stand above the results, e.g. that training is still going on.
        base_model: Hub id or name of the model that the weights come from, where no `metrics.json` says it.

    Returns:
        The path of the card.

    Raises:
        ValueError: `config.json` is missing, or one of the two is not JSON.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    metrics = read_json(folder / "metrics.json") if (folder / "metrics.json").is_file() else {}
    metrics = defaultdict(dict, {key: value for key, value in metrics.items() if value is not None})
    name, hub_id = public_dataset(metrics["dataset"].get("name"))
    link = f"[{name}](https://huggingface.co/datasets/{hub_id})" if hub_id else name and _escape(name)
    base, base_id = public_dataset(metrics["model"].get("base_model") or base_model)
    if "ViTScratchForMaskedImageModeling" in (config.get("architectures") or ()):
        data = _data("image-feature-extraction", hub_id, base=(base, base_id))
        head, results, end = _pretrained_head(metrics, name), _pretrained_results(metrics), [_PRETRAINED_USE]
        classes = []
    else:
        classes = [*(metrics["dataset"].get("class_names") or (config.get("id2label") or {}).values())]
        accuracies = {"accuracy": "top-1"}
        if len(classes) > 5:  # else the right one is always among five
            accuracies["top5_accuracy"] = "top-5"
        evaluations = _evaluations(metrics, accuracies, name, hub_id)
        data = _data("image-classification", hub_id, evaluations, (base, base_id))
        head, results = _head(metrics, name), _results(metrics, accuracies)
        end = [_use(config), _limits(config, metrics)]
    origin = f"[{base_id}](https://huggingface.co/{base_id})" if base_id else base and _escape(base)
    facts = _facts(config, metrics, link, classes, origin)
    sections = [*head, facts, status, results, _plots(folder), _training(metrics), *end, _licence(link, origin)]
    text = "\n\n".join(section for section in sections if section)
    path = folder / "README.md"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(path)
    return path


def _data(
    task: str,
    dataset: str | None,
    evaluations: list[EvalResult] | None = None,
    base: tuple[str | None, str | None] = (None, None),
) -> ModelCardData:
    """The card's YAML: what the Hub's search, widgets and leaderboards read. `base` is a model's name and Hub id."""
    return ModelCardData(
        license=None if base[0] else "apache-2.0",  # of weights from elsewhere, it is not ours to say
        base_model=base[1],
        library_name="transformers",
        pipeline_tag=task,
        tags=[task, "vision", "vit", "vit_scratch", "custom_code"],
        datasets=[dataset] if dataset else None,
        metrics=["accuracy"] if evaluations else None,
        model_name=f"vit_scratch-{evaluations[0].dataset_name.rsplit('/', 1)[-1]}" if evaluations else None,
        eval_results=evaluations or None,
    )


def _evaluations(metrics: dict, accuracies: dict[str, str], name: str | None, hub_id: str | None) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=hub_id or name,
            dataset_name=name,
            dataset_split="test",
            metric_type=key,
            metric_name=f"{label.capitalize()} accuracy",
            metric_value=metrics["test"][key],
        )
        for key, label in accuracies.items()
        if name and _is_number(metrics["test"].get(key))
    ]


def _head(metrics: dict, name: str | None) -> list[str]:
    parameters = metrics["model"].get("parameters")
    title = "# Vision Transformer" + (f", {parameters:,} parameters" if _is_number(parameters) else "")
    text = "An image classifier after [An Image is Worth 16x16 Words](https://arxiv.org/abs/2010.11929), "
    text += "written from scratch and native to transformers: the two Python files here are all of its code."
    return [title + (f", trained on {_escape(name)}" if name else ""), text]


def _pretrained_head(metrics: dict, name: str | None) -> list[str]:
    training = metrics["training"]
    share = f"{training['mask_ratio']:.0%}" if _is_number(training.get("mask_ratio")) else "a part"
    squares = f", in squares of {_pixels(training['mask_patch_size'])} pixels," if "mask_patch_size" in training else ""
    title = "# Vision Transformer, pre-trained" + (f" on {_escape(name)}" if name else "") + " without labels"
    text = "Masked image modelling after [SimMIM](https://arxiv.org/abs/2111.09886): "
    return [title, f"{text}{share} of an image is hidden{squares} and the model paints it."]


def choices_of(config: dict) -> str:
    """The fields in which an architecture is not that of the paper, sizes aside: "pooling=mean, use_qk_norm=True"."""
    chosen = {name: config[name] for name in CHOICES if name in config}
    return ", ".join(f"{n}={value}" for n, value in chosen.items() if value != getattr(ViTScratchConfig, n))


def _facts(config: dict, metrics: dict, link: str | None, classes: list[str], origin: str | None) -> str:
    """A line for each thing that is known of the model and its data."""
    facts, dataset, model = {}, metrics["dataset"], metrics["model"]
    if classes:
        more = f" and {len(classes) - 20} more" if len(classes) > 20 else ""
        facts[f"Classes ({len(classes)})"] = ", ".join(map(_escape, classes[:20])) + more
    if config.get("image_size") is not None and config.get("patch_size") is not None:
        image, patch = _pixels(config["image_size"]), _pixels(config["patch_size"])
        facts["Input"] = f"{image} pixels, in patches of {patch}, {config.get('num_channels', 3)} channels"
    layers, hidden, heads = (config.get(k) for k in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    if layers and hidden and heads:
        stages = len(config.get("stem_channels") or ())
        stem = f", {stages} convolutional stage{'s' * (stages > 1)} before them" if stages else ""
        facts["Architecture"] = f"{layers} blocks, hidden size {hidden}, {heads} heads{stem}"
    if choices_of(config):
        facts["Other than in the paper"] = _escape(choices_of(config))
    for key, label in (("parameters", "Parameters"), ("flops_per_image", "FLOPs per image")):
        if _is_number(model.get(key)):
            facts[label] = f"{model[key]:,}"
    if origin:
        facts["Weights from"] = origin
    if link:
        counts = (dataset.get("splits") or {}).items()
        images = ", ".join(f"{count:,} {_escape(split)}" for split, count in counts if _is_number(count))
        facts["Data"] = link + (f": {images} images" if images else "")
    if dataset.get("fingerprint"):
        facts["Data fingerprint"] = f"`{public_text(str(dataset['fingerprint']))}`"
    return "\n".join(f"- **{label}:** {fact}" for label, fact in facts.items())


def _results(metrics: dict, accuracies: dict[str, str]) -> str:
    columns = {"examples": "images", **accuracies, "loss": "loss"}
    if any("flip_tta_accuracy" in metrics[split] for split in ("test", "validation")):
        columns["flip_tta_accuracy"] = "top-1, mean with the mirror image"
    shown = defaultdict(lambda: _percent, examples="{:,}".format, loss="{:.4f}".format)
    rows = []
    for split in ("test", "validation"):
        values = {key: metrics[split][key] for key in columns if _is_number(metrics[split].get(key))}
        if values:
            rows.append([split, *(shown[key](values[key]) if key in values else "–" for key in columns)])
    if not rows:
        return _NO_RESULTS
    return "## Results\n\n" + _table(["split", *columns.values()], rows)


def _pretrained_results(metrics: dict) -> str:
    loss, examples = (metrics["validation"].get(key) for key in ("loss", "examples"))
    if not _is_number(loss):
        return _NO_RESULTS
    images = f"{examples:,} images" if _is_number(examples) else "images"
    return f"## Results\n\nMean error of hidden pixels on {images} held out: {loss:.4f} standard deviations."


def _plots(folder: Path) -> str | None:
    plots = [p for p in (folder / "plots").glob("*") if p.suffix in (".png", ".svg", ".jpg") and p.is_file()]
    order = {stem: i for i, stem in enumerate(_PLOTS_FIRST)}
    plots.sort(key=lambda p: (order.get(p.stem, len(order)), p.name))
    if not plots:
        return None
    return "\n\n".join(f"![{p.stem.replace('_', ' ').capitalize()}](plots/{p.name})" for p in plots)


def _training(metrics: dict) -> str | None:
    rows = _settings(metrics["training"])
    for key, label in (("train_seconds", "training time"), ("train_cpu_seconds", "processor time")):
        if _is_number(metrics["time"].get(key)):
            rows.append([label, _duration(metrics["time"][key])])
    rows += _settings(metrics["environment"])
    parts = [_table(["setting", "value"], rows)] if rows else []
    if metrics["command"]:
        command = public_command(str(metrics["command"]), metrics["dataset"].get("name"))
        parts.append(f"The command:\n\n```bash\n{command}\n```")
        if PATH_PLACEHOLDER in command:
            parts.append(f"What begins with `{PATH_PLACEHOLDER}` is a placeholder: put a path of yours there.")
    return "\n\n".join(["## Training", *parts]) if parts else None


def _use(config: dict) -> str:
    where = "repo, revision=revision, trust_remote_code=True"
    if config.get("return_dict") is False:  # the pipeline looks outputs up by name
        where += ", return_dict=True"
    return f"""## Use

The model's code is in this repository, and `trust_remote_code=True` runs it: remote code is code. Read the two Python
files, then pin the commit you have read, so that nobody can change under you what runs.

```python
from huggingface_hub import HfApi
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

repo = "{REPO_PLACEHOLDER}"
revision = HfApi().model_info(repo).sha  # better: the 40 characters themselves, of the commit you have read

model = AutoModelForImageClassification.from_pretrained({where})
processor = AutoImageProcessor.from_pretrained(repo, revision=revision)
classify = pipeline("image-classification", model=model, image_processor=processor)
```

`classify("image.jpg")` then gives the most likely classes with their probabilities. From a folder on disk, leave
`revision` out. `AutoConfig`, `AutoModel` (features without the classifier) and
`pipeline("image-feature-extraction")` load in the same way."""


_PRETRAINED_USE = """## Use

Fine-tune it on images with labels:

```bash
python scripts/finetune.py --model_name_or_path FOLDER --dataset_name ...
```"""
# What `data.sources.load_image` does and transformers' `load_image` does not.
_CONVERT_FIRST = """modeling_vit_scratch, in training too, lays transparent pixels on white and scales 16-bit grey to \
8 bits; transformers' pipeline drops transparency and clips 16 bits, so that the same file can get another class. \
Convert it first, by `Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))\
.convert("RGB")` or, of 16 bits, by `image.convert("I").point(lambda v: v / 257 + 0.5).convert("L")`."""
_NO_RESULTS = "## Results\n\nNo results were saved with this model."


def _limits(config: dict, metrics: dict) -> str:
    limits = ["It gives every image one of its classes, however little the image resembles any of them."]
    if config.get("image_size") is not None:
        limits.append(f"Images are resized to {_pixels(config['image_size'])} pixels; finer detail is lost.")
    limits.append(_CONVERT_FIRST)
    test = metrics["test"]
    if _is_number(test.get("accuracy")):
        wrong = f"It is wrong on {_percent(1 - test['accuracy'])} of the test images"
        limits.append(f"{wrong}; on images from elsewhere expect more.")
    else:
        limits.append("It was not measured on a test split.")
    per_class = {k: v for k, v in (test.get("per_class_accuracy") or {}).items() if _is_number(v)}
    if len(per_class) > 1:
        worst, best = min(per_class, key=per_class.get), max(per_class, key=per_class.get)
        limits.append(
            f"Classes differ: {_percent(per_class[best])} of {_escape(best)} is recognised, "
            f"but {_percent(per_class[worst])} of {_escape(worst)}."
        )
    limits.append("Its probabilities were not calibrated, and it was not examined for bias or against attacks.")
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _licence(link: str | None, origin: str | None) -> str:
    terms = f" The data it learned from ({link}) has terms of its own." if link else ""
    ours = f"Code: Apache-2.0. The weights come from {origin}, whose terms hold for them." if origin else None
    return f"## Licence\n\n{ours or 'Code and weights: Apache-2.0.'}{terms}"


def read_json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path.name} is missing in {path.parent}; save the model there first.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} must hold a JSON object, got {type(content).__name__}.")
    return content


def _settings(settings: dict, prefix: str = "") -> list[list[str]]:
    """Rows (name, value) of a dictionary of settings, nested ones as `outer.inner`; none for a missing value."""
    rows = []
    for key, value in settings.items():
        if isinstance(value, dict):
            rows += _settings(value, f"{prefix}{key}.")
        elif value not in (None, []) and not is_token_flag(f"-{key}"):
            text = f"{value:g}" if isinstance(value, float) else str(value)
            rows.append([f"`{_escape(prefix + key)}`", _escape(public_text(text))])
    return rows


def _escape(text) -> str:
    return re.sub(r"([|`<>\[\]])", r"\\\1", " ".join(str(text).split()))


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _pixels(size) -> str:
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return f"{height}x{width}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
