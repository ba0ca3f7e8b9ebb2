"""What transformers' example scripts ask of a folder, call for call: both of image classification, and run_mim.py."""

import sys

import torch
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForMaskedImageModeling

[folder] = sys.argv[1:]
options = {"trust_remote_code": True, "cache_dir": None, "revision": "main", "token": None}
names = {str(i): name for i, name in enumerate("abc")}
labels = {
    "num_labels": 3,
    "label2id": {name: i for i, name in names.items()},
    "finetuning_task": "image-classification",
}
# The script without Trainer misspells the second; the folder's own names stay.
for keyword, found in (("id2label", ["a", "b", "c"]), ("i2label", ["cat", "dog", "owl"])):
    config = AutoConfig.from_pretrained(folder, **{keyword: names}, **labels, **options)
    model = AutoModelForImageClassification.from_pretrained(
        folder, from_tf=False, config=config, ignore_mismatched_sizes=False, **options
    )
    model(torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 1])).loss.backward()
    model.save_pretrained("saved")
    loaded = AutoModelForImageClassification.from_pretrained("saved", trust_remote_code=True)
    assert list(loaded.config.id2label.values()) == found

config = AutoConfig.from_pretrained(folder, **options)
config.update({name: getattr(config, name) for name in ("image_size", "patch_size", "encoder_stride")})
model = AutoModelForMaskedImageModeling.from_pretrained(folder, from_tf=False, config=config, **options)
mask = torch.arange(32).reshape(2, 16) % 3 == 0
assert model(torch.randn(2, 3, 16, 16), bool_masked_pos=mask.long()).loss > 0  # whole numbers, in a row
config.update_from_string("hidden_size=64")
assert AutoModelForMaskedImageModeling.from_config(config, trust_remote_code=True).config.hidden_size == 64
