"""PEFT's adapters: trained for a step, saved, loaded onto a fresh model, and merged into a folder without adapters."""

import sys

import torch
from peft import IA3Config, LoraConfig, OFTConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageClassification

[folder] = sys.argv[1:]
trust = {"trust_remote_code": True}
generator = torch.Generator().manual_seed(0)
pixels, labels = torch.randn(6, 3, 16, 16, generator=generator), torch.arange(6) % 3
whole = {"modules_to_save": ["classifier"]}
ways = {
    "lora": LoraConfig(r=4, target_modules=["qkv", "proj", "fc1", "fc2"], **whole),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=["qkv", "proj"], **whole),
    "ia3": IA3Config(target_modules=["qkv", "fc2"], feedforward_modules=["fc2"], **whole),
    "oft": OFTConfig(oft_block_size=8, target_modules=["qkv", "fc1"], **whole),
}


def base():
    return AutoModelForImageClassification.from_pretrained(folder, **trust)


before = base()(pixels).logits.detach()
for name, way in ways.items():
    model = get_peft_model(base(), way).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(pixel_values=pixels, labels=labels).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(name)
    with torch.no_grad():
        adapted = model(pixels).logits
        assert (adapted - before).abs().max() > 0.01, name
        loaded = PeftModel.from_pretrained(base(), name)
        torch.testing.assert_close(loaded(pixels).logits, adapted, atol=1e-6, rtol=0)
        merged = loaded.merge_and_unload()
        merged.save_pretrained(f"{name}-merged")
        alone = AutoModelForImageClassification.from_pretrained(f"{name}-merged", **trust)
        torch.testing.assert_close(alone(pixels).logits, adapted, atol=1e-4, rtol=0)

# transformers' own way to the same adapters.
model = base()
model.load_adapter("lora")
with torch.no_grad():
    adapted = PeftModel.from_pretrained(base(), "lora")(pixels).logits
    torch.testing.assert_close(model(pixels).logits, adapted, atol=1e-6, rtol=0)
