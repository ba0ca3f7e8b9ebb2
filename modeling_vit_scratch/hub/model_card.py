"""The model card of a trained folder, from its own files, with nothing in it that is private."""

import json
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .masking import is_token_flag, public_command, public_dataset, public_text

TAGS = ["image-classification", "vision", "vit", "vit_scratch", "custom_code"]
REPO_PLACEHOLDER = "OWNER/REPO"  # stands in a card until it is pushed; then the repository's id
_PLOTS_FIRST = ("training_curves", "per_class_accuracy", "confusion_matrix")


def write_model_card(folder: str | Path, status: str | None = None) -> Path:
    """Write `README.md` for a trained folder from its `config.json`, `metrics.json` and `plots/`.

    What the files do not say, the card does not say: a missing metric is left out, never guessed. Paths of this
    machine are cut to their last component, and tokens in the command are masked.

    Args:
        folder: A folder as `save_pretrained` and the training write it; `metrics.json` may be missing.
        status: A sentence to stand above the results, e.g. that training is still going on.

    Returns:
        The path of the card.

    Raises:
        ValueError: `config.json` is missing, or one of the two is not JSON.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    metrics = read_json(folder / "metrics.json") if (folder / "metrics.json").is_file() else {}
    card = ModelCard(f"---\n{_card_data(metrics).to_yaml()}\n---\n\n{_card_text(folder, config, metrics, status)}")
    path = folder / "README.md"
    card.save(path)
    return path


def _card_data(metrics: dict) -> ModelCardData:
    """The card's YAML: what the Hub's search, widgets and leaderboards read."""
    name, hub_id = public_dataset((metrics.get("dataset") or {}).get("name"))
    test = metrics.get("test") or {}
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=hub_id or name,
            dataset_name=name,
            dataset_split="test",
            metric_type=metric_type,
            metric_name=metric_name,
            metric_value=test[key],
        )
        for key, metric_type, metric_name in (
            ("accuracy", "accuracy", "Top-1 accuracy"),
            ("top5_accuracy", "top5_accuracy", "Top-5 accuracy"),
        )
        if name and _is_number(test.get(key))
    ]
    return ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=TAGS,
        datasets=[hub_id] if hub_id else None,
        metrics=["accuracy"] if results else None,
        model_name=f"vit_scratch-{name.rsplit('/', 1)[-1]}" if results else None,
        eval_results=results or None,
    )


def _card_text(folder: Path, config: dict, metrics: dict, status: str | None) -> str:
    name, hub_id = public_dataset((metrics.get("dataset") or {}).get("name"))
    link = f"[{name}](https://huggingface.co/datasets/{hub_id})" if hub_id else name and _escape(name)
    sections = [
        _card_head(config, metrics, link, name),
        status,
        _card_results(metrics),
        _card_plots(folder),
        _card_training(metrics),
        _card_use(config),
        _card_limits(config, metrics, link),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _card_head(config: dict, metrics: dict, link: str | None, name: str | None) -> str:
    parameters = (metrics.get("model") or {}).get("parameters")
    flops = (metrics.get("model") or {}).get("flops_per_image")
    layers, hidden, heads = (config.get(k) for k in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    title = "# Vision Transformer" + (f", {parameters:,} parameters" if _is_number(parameters) else "")
    title += f", trained on {_escape(name)}" if name else ""
    text = "An image classifier after [An Image is Worth 16x16 Words](https://arxiv.org/abs/2010.11929), "
    text += "written from scratch and native to transformers: the two Python files here are all of its code."
    facts = []
    classes = _class_names(config, metrics)
    if classes:
        shown = ", ".join(_escape(c) for c in classes[:20])
        more = f" and {len(classes) - 20} more" if len(classes) > 20 else ""
        facts.append(f"**Classes ({len(classes)}):** {shown}{more}")
    if config.get("image_size") is not None and config.get("patch_size") is not None:
        image, patch = _pixels(config["image_size"]), _pixels(config["patch_size"])
        facts.append(f"**Input:** {image} pixels, in patches of {patch}, {config.get('num_channels', 3)} channels")
    if layers and hidden and heads:
        stages = len(config.get("stem_channels") or ())
        stem = f", {stages} convolutional stage{'s' * (stages > 1)} before them" if stages else ""
        facts.append(f"**Architecture:** {layers} blocks, hidden size {hidden}, {heads} heads{stem}")
    if _is_number(parameters):
        facts.append(f"**Parameters:** {parameters:,}")
    if _is_number(flops):
        facts.append(f"**FLOPs per image:** {flops:,}")
    dataset = metrics.get("dataset") or {}
    if link:
        splits = dataset.get("splits") or {}
        images = ", ".join(f"{count:,} {_escape(split)}" for split, count in splits.items() if _is_number(count))
        facts.append(f"**Data:** {link}" + (f": {images} images" if images else ""))
    if dataset.get("fingerprint"):
        facts.append(f"**Data fingerprint:** `{public_text(str(dataset['fingerprint']))}`")
    return "\n\n".join([title, text, "\n".join(f"- {fact}" for fact in facts)])


def _card_results(metrics: dict) -> str:
    columns = {"examples": "images", "accuracy": "top-1", "top5_accuracy": "top-5", "loss": "loss"}
    if any("flip_tta_accuracy" in (metrics.get(split) or {}) for split in ("test", "validation")):
        columns["flip_tta_accuracy"] = "top-1, mean with the mirror image"
    rows = []
    for split in ("test", "validation"):
        values = metrics.get(split) or {}
        if not any(_is_number(values.get(key)) for key in columns):
            continue
        cells = [split]
        for key in columns:
            value = values.get(key)
            if not _is_number(value):
                cells.append("–")
            elif key == "examples":
                cells.append(f"{value:,}")
            else:
                cells.append(f"{value:.4f}" if key == "loss" else _percent(value))
        rows.append(cells)
    if not rows:
        return "## Results\n\nNo results were saved with this model."
    return "## Results\n\n" + _table(["split", *columns.values()], rows)


def _card_plots(folder: Path) -> str | None:
    plots = [p for p in (folder / "plots").glob("*") if p.suffix in (".png", ".svg", ".jpg") and p.is_file()]
    order = {stem: i for i, stem in enumerate(_PLOTS_FIRST)}
    plots.sort(key=lambda p: (order.get(p.stem, len(order)), p.name))
    if not plots:
        return None
    return "\n\n".join(f"![{p.stem.replace('_', ' ').capitalize()}](plots/{p.name})" for p in plots)


def _card_training(metrics: dict) -> str | None:
    rows = _settings(metrics.get("training") or {})
    time, environment = metrics.get("time") or {}, dict(metrics.get("environment") or {})
    for key, label in (("train_seconds", "training time"), ("train_cpu_seconds", "processor time")):
        if _is_number(time.get(key)):
            rows.append([label, _duration(time[key])])
    rows += _settings(environment)
    parts = [_table(["setting", "value"], rows)] if rows else []
    if metrics.get("command"):
        command = public_command(str(metrics["command"]), (metrics.get("dataset") or {}).get("name"))
        parts.append(f"The command:\n\n```bash\n{command}\n```")
    return "\n\n".join(["## Training", *parts]) if parts else None


def _card_use(config: dict) -> str:
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

`classify("picture.jpg")` then gives the most likely classes with their probabilities. From a folder on disk, leave
`revision` out. `AutoConfig`, `AutoModel` (features without the classifier) and
`pipeline("image-feature-extraction")` load in the same way."""


def _card_limits(config: dict, metrics: dict, link: str | None) -> str:
    limits = ["It gives every picture one of its classes, however little the picture resembles any of them."]
    if config.get("image_size") is not None:
        limits.append(f"Pictures are resized to {_pixels(config['image_size'])} pixels; finer detail is lost.")
    test = metrics.get("test") or {}
    if _is_number(test.get("accuracy")):
        wrong = f"It is wrong on {_percent(1 - test['accuracy'])} of the test images"
        limits.append(f"{wrong}; on pictures from elsewhere expect more.")
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
    terms = f" The data it learned from ({link}) has terms of its own." if link else ""
    return (
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits) + "\n\n## Licence\n\n"
        f"Code and weights: Apache-2.0.{terms}"
    )


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


def _class_names(config: dict, metrics: dict) -> list[str]:
    names = (metrics.get("dataset") or {}).get("class_names")
    return [str(n) for n in names or (config.get("id2label") or {}).values()]


def _settings(settings: dict, prefix: str = "") -> list[list[str]]:
    """Rows (name, value) of a dictionary of settings, nested ones as `outer.inner`; a missing value gives no row."""
    rows = []
    for key, value in settings.items():
        if isinstance(value, dict):
            rows += _settings(value, f"{prefix}{key}.")
        elif value is not None and not is_token_flag(f"-{key}"):
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
