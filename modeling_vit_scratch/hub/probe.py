"""What a saved model computes: `proof` asks here, and runs this file's text where the package cannot be imported."""

import json
import sys


class Blocked:
    """Stands in for a process in which the package is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_vit_scratch":
            raise ImportError(f"{name} is blocked: the repository must load without the package")


def compute(repo: str, pixels: str, image: str | None, classifier: bool, **where) -> dict:
    """Load a model by the Auto classes and compute on examples, in eval mode.

    Args:
        repo: Hub id or folder.
        pixels: A safetensors file with `pixels` (B, C, H, W), already normalised.
        image: An image file that goes through the repository's own processor; None for none.
        classifier: Whether the model has a classifier, whose logits are wanted as well.
        **where: `revision` and `trust_remote_code`.
    """
    import torch
    from PIL import Image
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoModelForImageClassification
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    inputs, out = load_file(pixels)["pixels"], {}
    with torch.no_grad():
        model = AutoModel.from_pretrained(repo, return_dict=True, **where).eval()
        out["last_hidden_state"] = model(inputs.to(model.dtype)).last_hidden_state
        processor = AutoImageProcessor.from_pretrained(repo, revision=where.get("revision"))
        if classifier:
            model = AutoModelForImageClassification.from_pretrained(repo, return_dict=True, **where).eval()
            out["logits"] = model(inputs.to(model.dtype)).logits
            if image:
                processed = processor(Image.open(image), return_tensors="pt")["pixel_values"]
                out["image_logits"] = model(processed.to(model.dtype)).logits
    return {name: tensor.contiguous() for name, tensor in out.items()}


def main():
    """Compute as the JSON on standard input says, and save what comes out."""
    sys.meta_path.insert(0, Blocked())
    job = json.load(sys.stdin)
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(job.pop("threads"))
    path = job.pop("out")
    save_file(compute(**job), path)
    assert "modeling_vit_scratch" not in sys.modules


if __name__ == "__main__":
    main()
