"""A model made by hand that knows three colours, and images of them."""

from pathlib import Path

import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification

NAMES = {0: "red", 1: "green", 2: "blue"}
RED, GREEN, BLUE = (200, 30, 30), (30, 200, 30), (30, 30, 200)


def colour_model(**fields) -> ViTScratchForImageClassification:
    """A model that says which channel is the strongest."""
    config = ViTScratchConfig(
        **{
            "image_size": 16, "patch_size": 8, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1,
            "intermediate_size": 4, "use_cls_token": False, "pooling": "mean", "use_final_norm": False,
            "id2label": NAMES, **fields,
        }
    )  # fmt: skip
    model = ViTScratchForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        kernel = model.vit.embeddings.patch_embeddings.projection.weight.view(4, 3, 8, 8)
        for channel in range(3):
            kernel[channel, channel] = 8 / 64
            model.classifier.weight[channel, channel] = 4
    return model.eval()


def processor(**fields) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": 16, "width": 16}, **fields)


def paint(colour: tuple[int, int, int], size: tuple[int, int] = (20, 30)) -> Image.Image:
    return Image.new("RGB", size, colour)


def paint_folder(folder, **classes):
    """A folder with a directory of one-coloured images for each class."""
    for name, colours in classes.items():
        (folder / name).mkdir(parents=True)
        for i, colour in enumerate(colours):
            paint(colour).save(folder / name / f"{i}.png")
    return str(folder)


def save_trained(model: ViTScratchForImageClassification, folder: Path) -> str:
    """As a run leaves it: the model and an image processor."""
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    return str(folder)
