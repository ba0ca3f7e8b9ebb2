"""Low-rank adaptation (LoRA, Hu et al., 2022) by the PEFT library: W + (alpha / r) B A, with W frozen, A and B trained.

A run keeps two things: the adapter, A, B and the trained head in PEFT's format, and the model with them merged in.
"""

import copy
from pathlib import Path

from ..conversion.exporting import open_to_others
from ..modeling_vit_scratch import ViTScratchForImageClassification

# The adapter's folder, in each folder that holds the merged model.
FOLDER = "adapter"
# Attention (q, k and v as one matrix) and MLP (gate and value as one) of every block.
ADAPTED_LAYERS = r".*\.layers\.\d+\.(attention\.(qkv|proj)|mlp\.(fc1|fc2))"


def add_adapter(model: ViTScratchForImageClassification, rank: int, base: str):
    """Freeze a model's weights, and put trained matrices beside those of its blocks; the head is trained whole.

    Attention pooling belongs to the head: it may be as new as the classifier, and then has nothing to be adapted.

    B starts at zero: the model computes what it did (sec. 4.1). alpha is twice the rank.

    Args:
        model: Changed in place.
        rank: r, at least 1.
        base: Name of the model that is adapted, for whoever loads the adapter.

    Returns:
        A `peft.PeftModel` around the model.

    Raises:
        ValueError: The rank is not positive; or PEFT is not installed, with the extra to install.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError("lora_rank needs PEFT: pip install 'modeling_vit_scratch[lora]'.") from error
    if rank < 1:
        raise ValueError(f"lora_rank ({rank}) must be at least 1, e.g. 8.")
    model.name_or_path = base  # PEFT writes it down
    parts = {"attention_pooling": model.config.pooling == "attention", "pre_logits": model.config.representation_size}
    head = [*(name for name, there in parts.items() if there), "classifier"]
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ADAPTED_LAYERS, modules_to_save=head)
    return peft.get_peft_model(model, settings)


# Whoever loads it has the merged model at hand, and nothing would fail.
README = """A LoRA adapter in PEFT's format: what was trained on top of `{base}`.
`peft.PeftModel.from_pretrained(model, "adapter")` takes for `model` that one, with a head for as many classes.
The model in the folder above has the adapter merged in already: on it, it would be applied twice.
"""


def save_adapter(adapter, folder: Path):
    """Write the trained matrices and head; `peft.PeftModel.from_pretrained(base_model, folder)` reads them."""
    adapter.save_pretrained(str(folder), save_embedding_layers=False)  # else it asks the Hub about the base model
    # In place of PEFT's template, which has paths of this machine.
    readme = README.format(base=adapter.active_peft_config.base_model_name_or_path)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    open_to_others(folder)


def load_adapter(adapter, folder: Path):
    """Take the trained matrices and head of a folder that `save_adapter` wrote."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(adapter, load_peft_weights(str(folder), device="cpu"))


def merged_weights(adapter) -> dict:
    """The state dict of a plain model that computes the same; the adapter stays as it is."""
    return copy.deepcopy(adapter).merge_and_unload().state_dict()
