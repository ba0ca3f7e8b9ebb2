"""Both pipelines: a folder, images of every mode in every form, and each implementation of attention."""

import base64
import sys
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from transformers import AttentionInterface, AutoModel, AutoModelForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 exports it only with torchvision

folder, modes = sys.argv[1:]
trust = {"trust_remote_code": True}
paths = sorted(map(str, Path(modes).iterdir()))
files = [Path(path).read_bytes() for path in paths]
images = [Image.open(path) for path in paths]
assert [image.mode for image in images] == ["L", "P", "RGB", "RGBA"]

processor = AutoImageProcessor.from_pretrained(folder)
pixels = processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
model = AutoModelForImageClassification.from_pretrained(folder, **trust)
with torch.no_grad():
    expected = model(pixels).logits.softmax(-1)
    tokens = AutoModel.from_pretrained(folder, **trust)(pixels).last_hidden_state


def near(found, wanted, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(found), wanted, atol=tolerance, rtol=0)


def scores(answers):
    """Of each class, in the order of the classes."""
    labels = model.config.id2label.values()
    return [[{one["label"]: one["score"] for one in answer}[label] for label in labels] for answer in answers]


classify = pipeline("image-classification", model=folder, **trust)
extract = pipeline("image-feature-extraction", model=folder, **trust)
forms = {
    "paths": paths,
    "images": images,
    "base64": [base64.b64encode(data).decode() for data in files],
    "bytes": [Image.open(BytesIO(data)) for data in files],
}
for form in forms.values():
    for batch_size in (1, 3):
        near(scores(classify(form, batch_size=batch_size)), expected)
        near(torch.cat([torch.tensor(one) for one in extract(form, batch_size=batch_size)]), tokens)
near(scores(classify(image for image in images)), expected)
assert classify(paths[0], top_k=1)[0]["label"] == model.config.id2label[expected[0].argmax().item()]
near(scores(classify(paths, function_to_apply="none")), model(pixels).logits.detach())
near(extract(paths[0], return_tensors=True), tokens[:1])
near(extract(paths[0], pool=True), model.vit(pixels[:1]).pooler_output.detach())

# Numbers of another type, and devices.
model.to(torch.bfloat16).save_pretrained("half")
processor.save_pretrained("half")
for task in ("image-classification", "image-feature-extraction"):
    assert pipeline(task, model="half", **trust).model.dtype == torch.bfloat16  # dtype="auto" is the default
    assert pipeline(task, model="half", dtype=torch.float32, **trust).model.dtype == torch.float32
near(scores(pipeline("image-classification", model="half", **trust)(paths)), expected, 0.05)
for device_map in ("auto", "cpu"):
    near(scores(pipeline("image-classification", model=folder, device_map=device_map, **trust)(paths)), expected)
parts = {"vit.embeddings": "cpu", "vit.layers.0": "cpu", "vit.layers.1": "disk", "vit.norm": "cpu", "classifier": "cpu"}
split = AutoModelForImageClassification.from_pretrained(folder, device_map=parts, offload_folder="disk", **trust)
with torch.no_grad():
    near(split(pixels).logits.softmax(-1), expected)

# Attention. Flex attention has no backward pass on a CPU, and is not compiled here, which takes a minute.
torch.compiler.set_stance("force_eager")
assert set(AttentionInterface.valid_keys(AttentionInterface())) >= {"sdpa", "flex_attention"}
for implementation in ("eager", "sdpa", "flex_attention"):
    options = {"model_kwargs": {"attn_implementation": implementation}, **trust}
    attending = pipeline("image-classification", model=folder, **options)
    assert attending.model.config._attn_implementation == implementation
    near(scores(attending(paths, batch_size=4)), expected)
