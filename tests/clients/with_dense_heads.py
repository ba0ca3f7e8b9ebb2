"""transformers' dense heads on the backbone, by `backbone_config` and by a Hub id, at other sizes; and DETR."""

import sys

import torch
from transformers import (
    AutoBackbone,
    AutoConfig,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    DetrConfig,
    DetrForObjectDetection,
    DPTConfig,
    DPTForDepthEstimation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

folder, repository = sys.argv[1:]
trust = {"trust_remote_code": True}
# Once: transformers then builds the backbone of a config, and reads the config of a saved model.
tokens = AutoBackbone.from_pretrained(repository, out_indices=[0, 1, 2], reshape_hidden_states=False, **trust)
AutoConfig.register("vit_scratch", type(tokens.config))
assert type(tokens).__module__.startswith("transformers_modules")
assert tokens(torch.randn(2, 3, 20, 24)).feature_maps[0].shape == (2, 1 + 5 * 6, 32)

# Four stages, which these heads want, of a model of four blocks; the two that the folder lacks are new.
four = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], **trust}
necks = {"neck_hidden_sizes": [8, 12, 16, 16], "fusion_hidden_size": 8}


def backbone_config(**options):
    return AutoConfig.from_pretrained(repository, **four, **options)


as_tokens = backbone_config(reshape_hidden_states=False)
models = {
    "dpt": DPTForDepthEstimation(
        DPTConfig(**necks, hidden_size=32, reassemble_factors=[4, 2, 1, 0.5], backbone_config=as_tokens)
    ),
    "depth_anything": DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            **necks, patch_size=4, reassemble_hidden_size=32, head_hidden_size=8, backbone_config=as_tokens
        )
    ),
    "upernet": UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone_config(),
            hidden_size=16,
            pool_scales=[1, 2],
            auxiliary_in_channels=32,
            auxiliary_channels=8,
            num_labels=3,
        )
    ),
}
for name, model in models.items():
    assert type(model.backbone) is type(tokens)
    pretrained = AutoBackbone.from_pretrained(repository, reshape_hidden_states=name == "upernet", **four)
    model.backbone.load_state_dict(pretrained.state_dict())
    pixels = torch.randn(2, 3, 32, 48)  # the config says 16 x 16
    if name == "dpt":  # which takes the grid of patches for a square
        pixels = torch.randn(2, 3, 32, 32)
    outputs = model.train()(pixels)
    answer = outputs.logits if name == "upernet" else outputs.predicted_depth
    answer.square().mean().backward()
    assert all(p.grad is not None for p in model.backbone.parameters()), name
    model.eval().save_pretrained(name)
    loaded = type(model).from_pretrained(name)
    with torch.no_grad():
        for one, other in zip(loaded(pixels).to_tuple(), model(pixels).to_tuple(), strict=True):
            assert torch.equal(one, other), name

detr = DetrForObjectDetection(
    DetrConfig(
        backbone_config=AutoConfig.from_pretrained(repository, **trust),
        use_timm_backbone=False,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
    )
).eval()
assert detr(torch.randn(1, 3, 60, 92)).pred_boxes.shape == (1, 5, 4)
try:
    detr(torch.randn(1, 3, 60, 90))
except ValueError as error:
    assert "60x90, which patches of 4x4 do not divide; resize them, or pad them to 60x92" in str(error), error
else:
    raise AssertionError("60x90 was taken")
