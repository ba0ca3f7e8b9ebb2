"""Each choice beyond the ViT of 2021, and all together, wherever a plain model works."""

import copy
import math
import warnings

import pytest
import torch
from small_models import (
    CHOICES,
    CLASSES,
    SIZES,
    TINY,
    Resized,
    all_together,
    dynamic,
    equal,
    every_choice,
    every_class,
    every_head,
    exported_for_any_size,
    images,
    inputs,
    main_output,
    make,
)
from test_states_and_maps import uncompiled

from modeling_vit_scratch import (
    ViTScratchBackbone,
    ViTScratchConfig,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchModel,
)
from modeling_vit_scratch.conversion import convert_checkpoint

LARGER = (24, 32)  # pixels (height, width), where the models are made for 16 x 16, in patches of 4 x 4


def prefix(cls):
    return "" if cls is ViTScratchModel else "vit."


# Sizes, maps, implementations


@every_choice
@every_class
def test_images_of_other_sizes(cls, choice):
    """Without embeddings of positions, as with rotary ones alone, nothing has to be interpolated."""
    model = make(cls, **choice)
    x = torch.randn(2, 3, *LARGER)
    with torch.no_grad():
        outputs = main_output(model(x, interpolate_pos_encoding=True))
        assert outputs.isfinite().all()
        if "learned" in model.config.position_embedding_type:
            with pytest.raises(ValueError, match="24x32, but the model was made for 16x16"):
                model(x, interpolate_pos_encoding=False)
        else:
            equal(main_output(model(x, interpolate_pos_encoding=False)), outputs)
            with pytest.raises(ValueError, match="patches of 4x4 do not divide"):
                model(torch.randn(2, 3, 24, 30))


@every_choice
def test_maps_and_states_under_every_implementation(choice):
    cls, outputs = ViTScratchForImageClassification, {}
    with torch.no_grad(), uncompiled():
        for implementation in ("eager", "sdpa", "flex_attention"):
            model = make(cls, **choice, attn_implementation=implementation)
            outputs[implementation] = model(images(model), output_attentions=True, output_hidden_states=True)
            equal(main_output(model(images(model))), main_output(outputs[implementation]), 1e-4)
    tokens = model.config.num_prefix_tokens + 16
    for result in outputs.values():
        assert [maps.shape for maps in result.attentions] == [(3, 4, tokens, tokens)] * 2
        assert [state.shape for state in result.hidden_states] == [(3, tokens, 32)] * 3
        for maps, expected in zip(result.attentions, outputs["eager"].attentions, strict=True):
            equal(maps.sum(-1), torch.ones(3, 4, tokens), 1e-5)
            equal(maps, expected, 1e-5)


@every_choice
def test_the_last_block_of_a_classifier_may_pool_early(choice):
    for more in ({}, {"pooling": "mean", "use_final_norm": False, "norm_after_pooling": False}):
        model = make(ViTScratchModel, **{**choice, **more})
        with torch.no_grad():
            early, whole = (model(images(model), pooled_only=only) for only in (True, False))
        equal(early.pooler_output, whole.pooler_output, 1e-5)
        assert early.pooler_output.shape == (3, model.config.pooled_size)
        pools = model.config.pooling in ("cls", "mean")
        assert (early.last_hidden_state.shape[1] < whole.last_hidden_state.shape[1]) == pools


# Precision, gradients, activation checkpointing


@every_choice
@every_head
def test_bfloat16(cls, choice, tmp_path):
    model = make(cls, **choice)
    full = main_output(model(images(model))).detach()
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert main_output(half(images(model))).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = main_output(model(images(model)))
    for result in (main_output(half(images(model))), mixed):
        assert (result.float() - full).abs().max() < 0.1 * full.abs().max()
    new = cls._from_config(model.config, dtype=torch.bfloat16)  # made in that type, start values too
    assert {tensor.dtype for tensor in new.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    equal(cls.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict(), half.state_dict())


def test_angles_are_computed_in_float32_whatever_the_model_is_in():
    """In bfloat16, a place of 100 times a frequency would be off by up to 0.25 radians and more."""
    for name in ("rope-index", "rope-mixed"):
        fields = {**TINY, **CHOICES[name], "rope_grid_size": None, "image_size": (400, 4)}
        rotary = make(ViTScratchModel, fields).rotary_positions[0].bfloat16()
        exact = copy.deepcopy(rotary).float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rotation = rotary((100, 1), torch.device("cpu"))
        equal(rotation, exact((100, 1), torch.device("cpu")))
        assert rotation.dtype == torch.float32


@every_choice
@every_class
def test_every_parameter_gets_a_gradient(cls, choice):
    """DistributedDataParallel stops at one that does not."""
    model = make(cls, **choice).train()
    outputs = model(**inputs(model, targets=True))
    loss = outputs.get("loss")
    if loss is None:
        loss = (outputs.pooler_output if cls is ViTScratchModel else main_output(outputs)).square().sum()
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    zero = [name for name, p in model.named_parameters() if (p.grad == 0).all()]
    assert zero == []


@every_choice
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_equal_gradients(choice, reentrant):
    model = make(ViTScratchForImageClassification, **choice).train()
    x = inputs(model, targets=True)
    model(**x).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model(**x).loss.backward()
    equal([p.grad for p in model.parameters()], expected, 1e-6)


# Compilers and exporters


@pytest.mark.slow
@all_together
def test_compile_without_graph_breaks(choice):
    torch.compiler.reset()
    model = make(ViTScratchForImageClassification, **choice)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for x in (images(model), torch.randn(3, 3, *LARGER)):
            ours, theirs = (m(x, interpolate_pos_encoding=True, output_attentions=True) for m in (compiled, model))
            equal(ours.logits, theirs.logits, 1e-4)
            equal(ours.attentions, theirs.attentions, 1e-5)


@pytest.mark.slow
@all_together
@pytest.mark.parametrize("cls", [ViTScratchForImageClassification, ViTScratchBackbone])
def test_export_with_dynamic_batch_and_size(cls, choice):
    model = make(cls, **choice)
    program = exported_for_any_size(model)
    with torch.no_grad():
        for size in SIZES:
            x = {"pixel_values": torch.randn(size), "interpolate_pos_encoding": True}
            equal(main_output(program(**x)), main_output(model(**x)), 1e-4)


@all_together
def test_jit_trace_with_dynamic_sizes(choice):
    program = Resized(make(ViTScratchForImageClassification, **choice)).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(program, torch.randn(2, 3, 16, 16))
        for size in SIZES:
            x = torch.randn(size)
            equal(traced(x), program(x), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all", "all-attention-pooling"])
def test_onnx_with_dynamic_batch_and_size(name, tmp_path):
    pytest.importorskip("onnxscript", reason="pip install 'modeling_vit_scratch[export]'")
    runtime = pytest.importorskip("onnxruntime", reason="pip install 'modeling_vit_scratch[export]'")
    program = Resized(make(ViTScratchForImageClassification, **CHOICES[name])).eval()
    options = {"dynamo": True, "dynamic_shapes": (dynamic(),), "opset_version": 20, "verbose": False}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(program, (torch.randn(2, 3, 20, 24),), tmp_path / "model.onnx", **options)
        session = runtime.InferenceSession(tmp_path / "model.onnx")
        for size in SIZES:
            x = torch.randn(size)
            logits = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
            equal(torch.from_numpy(logits), program(x), 1e-4)


@pytest.mark.parametrize("name", ["rope", "all"])
def test_int8_weights_of_torchao(name):
    quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    model = make(ViTScratchForImageClassification, **CHOICES[name])
    with torch.no_grad():
        full = model(images(model)).logits
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        difference = (model(images(model)).logits - full).abs().max()
    assert 0 < difference < 0.2 * full.abs().max()


# Saving and loading


@every_choice
@every_class
def test_saved_and_loaded(cls, choice, tmp_path):
    model = make(cls, **choice)
    model.save_pretrained(tmp_path)
    loaded, report = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    equal(loaded.state_dict(), model.state_dict())
    assert {name: getattr(loaded.config, name) for name in choice} == choice
    with torch.no_grad():
        equal(main_output(loaded(images(model))), main_output(model(images(model))), 1e-5)


@all_together
@pytest.mark.parametrize("first", CLASSES, ids=lambda cls: cls.__name__.removeprefix("ViTScratch"))
def test_one_class_loads_what_another_saved(first, choice, tmp_path):
    """Only what a class has of its own is new: a head, the mask token, or what pools."""
    model = make(first, **choice)
    model.save_pretrained(tmp_path)
    for second in CLASSES:
        loaded, report = second.from_pretrained(tmp_path, output_loading_info=True)
        own = ("classifier.", "pre_logits.", "decoder.", "vit.embeddings.mask_token")
        own = tuple(name.removeprefix("vit.") if second is ViTScratchModel else name for name in own)
        if first in (ViTScratchForMaskedImageModeling, ViTScratchBackbone):
            own += (f"{prefix(second)}attention_pooling.", f"{prefix(second)}pooled_norm.")
        assert all(name.startswith(own) for name in report["missing_keys"]), report["missing_keys"]
        before = {name.removeprefix(prefix(first)): tensor for name, tensor in model.state_dict().items()}
        after = {name.removeprefix(prefix(second)): tensor for name, tensor in loaded.state_dict().items()}
        new = {name.removeprefix(prefix(second)) for name in report["missing_keys"]}
        assert all(tensor.isfinite().all() for tensor in after.values())
        equal({name: after[name] for name in after if name not in new}, {n: before[n] for n in after if n not in new})


@all_together
@every_class
def test_a_folder_of_any_class_becomes_a_classifier(cls, choice, tmp_path):
    model = make(cls, **choice)
    model.save_pretrained(tmp_path)
    classifier = convert_checkpoint(tmp_path, num_labels=7)
    assert classifier(images(model)).logits.shape == (3, 7)
    before = {name.removeprefix(prefix(cls)): tensor for name, tensor in model.state_dict().items()}
    after = classifier.vit.state_dict()
    pooling = {name for name in after if name.startswith(("attention_pooling.", "pooled_norm."))}
    new = pooling if cls in (ViTScratchForMaskedImageModeling, ViTScratchBackbone) else set()
    assert after.keys() - before.keys() == new
    equal({name: after[name] for name in after if name not in new}, {n: before[n] for n in after if n not in new})


@all_together
def test_modules_on_the_disk(choice, tmp_path):
    model = make(ViTScratchForImageClassification, **choice)
    model.save_pretrained(tmp_path / "model")
    device_map = dict.fromkeys([name for name, _ in model.named_children() if name != "vit"], "cpu")
    device_map |= {f"vit.{name}": "disk" for name, _ in model.vit.named_children() if name != "layers"}
    device_map |= {"vit.layers.0": "cpu", "vit.layers.1": "disk"}
    options = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    placed = ViTScratchForImageClassification.from_pretrained(tmp_path / "model", **options)
    with torch.no_grad():
        equal(placed(images(model)).logits, model(images(model)).logits, 1e-5)


@all_together
@every_class
def test_meta_device(cls, choice):
    with torch.device("meta"):
        model = cls(ViTScratchConfig(**{**TINY, **choice}))
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(math.nan)
    model.init_weights()
    assert all(tensor.isfinite().all() for tensor in (*model.parameters(), *model.buffers()))
