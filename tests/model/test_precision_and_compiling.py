"""Precision, activation checkpointing, compilers, exporters, devices."""

import copy
import warnings

import pytest
import torch
from small_models import (
    CLASSES,
    FIXED,
    RICH,
    SIZES,
    TINY,
    Resized,
    equal,
    every_class,
    every_config,
    every_head,
    exported_for_any_size,
    images,
    inputs,
    main_output,
    make,
)
from transformers import initialization as init
from transformers import set_seed
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchModel
from modeling_vit_scratch.configuration_vit_scratch import POSITION_INTERPOLATIONS
from modeling_vit_scratch.modeling_vit_scratch import eager_attention_forward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fields", [TINY, FIXED])
@every_class
def test_half_precision_weights_take_float32_pixels(cls, fields, dtype, tmp_path):
    model = make(cls, fields)
    x = inputs(model, targets=True)
    full = main_output(model(**x)).detach()
    model.save_pretrained(tmp_path)
    for half in (copy.deepcopy(model).to(dtype), cls.from_pretrained(tmp_path, dtype=dtype)):
        assert {t.dtype for t in (*half.parameters(), *half.buffers())} == {dtype}
        outputs = half(**x)
        assert main_output(outputs).dtype == dtype
        assert (main_output(outputs).float() - full).abs().max() < 0.1 * full.abs().max()
        equal(main_output(half(**{**x, "pixel_values": x["pixel_values"].to(dtype)})), main_output(outputs))
        if "loss" in outputs:
            assert outputs.loss.dtype == torch.float32
            outputs.loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eager_attention_takes_its_softmax_in_float32(dtype):
    query, key, value = torch.randn(3, 2, 2, 65, 8, dtype=dtype)
    _, maps = eager_attention_forward(torch.nn.Module(), query, key, value, None, scaling=1 / 8)
    scores = (query / 8) @ key.transpose(-2, -1)
    expected = scores.double().softmax(dim=-1)
    torch.testing.assert_close(maps.double(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-7)


def test_double_precision():
    model = make(ViTScratchForImageClassification).double()
    assert model(images(model)).logits.dtype == torch.float64


@every_head
def test_autocast(cls):
    model = make(cls).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**inputs(model, targets=True))
    assert outputs.loss.dtype == torch.float32
    outputs.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("fields", [TINY, {**RICH, "drop_path_rate": 0.5, "hidden_dropout_prob": 0.2}])
@every_head
def test_activation_checkpointing_gives_equal_gradients(cls, fields, reentrant):
    model = make(cls, fields).train()
    calls = []
    for layer in model.vit.layers:
        layer.attention.register_forward_hook(lambda module, args, output: calls.append(module))

    def run():
        calls.clear()
        model.zero_grad()
        set_seed(0)
        loss = model(**inputs(model, targets=True)).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters()], len(calls)

    loss, gradients, count = run()
    assert count == 2
    model.gradient_checkpointing_enable(None if reentrant is None else {"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    if reentrant:
        model.enable_input_require_grads()
    again, other_gradients, count = run()
    assert count == 4  # each block's forward twice, and no more
    equal(again, loss)
    equal(other_gradients, gradients)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert run()[2] == 2
    model.eval()
    model.gradient_checkpointing_enable()
    calls.clear()
    model(**inputs(model, targets=True)).loss.backward()
    assert len(calls) == 2  # only in training


@every_class
def test_activation_checkpointing_reaches_every_block(cls):
    model = make(cls)
    assert not model.is_gradient_checkpointing
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert len(layers) == 2
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in layers)
    model.train()
    outputs = model(images(model), output_attentions=True, output_hidden_states=True)
    assert len(outputs.attentions) == 2
    main_output(outputs).sum().backward()


def test_activation_checkpointing_by_the_config():
    config = ViTScratchConfig(**TINY)
    config.gradient_checkpointing = True
    assert ViTScratchModel(config).is_gradient_checkpointing


@every_class
def test_compile_without_graph_breaks(cls):
    torch.compiler.reset()
    model = make(cls, RICH)
    x = inputs(model, targets=True)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for more in ({}, {"output_hidden_states": True, "output_attentions": True}):
            ours, theirs = compiled(**x, **more), model(**x, **more)
            equal(main_output(ours), main_output(theirs), 1e-5)
            for name in ("hidden_states", "attentions"):
                assert len(ours.get(name) or ()) == len(theirs.get(name) or ())
        sized = {**x, "pixel_values": torch.randn(3, 3, 24, 32)}
        sized.pop("bool_masked_pos", None)
        equal(
            main_output(compiled(**sized, interpolate_pos_encoding=True)),
            main_output(model(**sized, interpolate_pos_encoding=True)),
            1e-5,
        )


@every_head
def test_compile_for_training(cls):
    torch.compiler.reset()
    model = make(cls, RICH, drop_path_rate=0.0).train()
    x = inputs(model, targets=True)
    model(**x).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(**x, output_hidden_states=True).loss.backward()
    equal([p.grad for p in model.parameters()], expected, 1e-4)


def test_compile_with_class_probabilities_and_every_problem_type():
    torch.compiler.reset()
    for problem in (None, "single_label_classification", "multi_label_classification", "regression"):
        model = make(ViTScratchForImageClassification, problem_type=problem)
        labels = torch.rand(3, 5).softmax(-1)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        equal(compiled(images(model), labels=labels).loss, model(images(model), labels=labels).loss, 1e-5)


@pytest.mark.slow
def test_compile_with_inductor():
    torch.compiler.reset()
    model = make(ViTScratchForImageClassification)
    x = images(model)
    with torch.no_grad():
        outputs = torch.compile(model, fullgraph=True)(x, output_hidden_states=True)
        equal(outputs.logits, model(x).logits, 1e-4)
        assert len(outputs.hidden_states) == 3


@pytest.mark.parametrize("fields", [RICH, FIXED])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@every_class
def test_jit_trace(cls, fields, implementation, tmp_path):
    model = make(cls, fields, attn_implementation=implementation, return_dict=False)
    x, y = images(model), images(model, batch=5, seed=2)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x)
        torch.jit.save(traced, tmp_path / "traced.pt")
        loaded = torch.jit.load(tmp_path / "traced.pt")
        for pixels in (x, y):
            ours, theirs = model(pixels)[0], loaded(pixels)[0]
            equal(theirs, ours, 1e-5)
    assert set(loaded.state_dict()) >= set(model.state_dict())


@pytest.mark.parametrize("fields", [RICH, FIXED])
@every_class
def test_export_with_a_dynamic_batch(cls, fields):
    model = make(cls, fields)
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (), {"pixel_values": images(model)}, dynamic_shapes=shapes)
    for batch in (1, 3, 7):
        x = images(model, batch)
        with torch.no_grad():
            equal(main_output(program.module()(pixel_values=x)), main_output(model(x)), 1e-5)


@every_class
def test_export_with_dynamic_sizes(cls):
    model = make(cls, num_register_tokens=2)
    program = exported_for_any_size(model)
    for size in SIZES:
        x = {"pixel_values": torch.randn(size), "interpolate_pos_encoding": True}
        with torch.no_grad():
            equal(main_output(program(**x)), main_output(model(**x)), 1e-5)


class OfEachInterpolation(torch.nn.Module):
    """The logits of a model for each way to resize positions, as one tensor: (ways, B, classes)."""

    def __init__(self):
        super().__init__()
        cls, fields = ViTScratchForImageClassification, {"num_hidden_layers": 1}
        models = (make(cls, position_interpolation=how, **fields) for how in POSITION_INTERPOLATIONS)
        self.programs = torch.nn.ModuleList(map(Resized, models))

    def forward(self, pixel_values):
        return torch.stack([program(pixel_values) for program in self.programs])


@pytest.mark.parametrize("exporter", ["export", "trace", pytest.param("onnx", marks=pytest.mark.slow)])
def test_every_interpolation_can_be_exported_with_dynamic_sizes(exporter, tmp_path):
    """Of models for 16 x 16 pixels, whose positions stay as they are where the size is that."""
    h, w = (torch.export.Dim(name, min=2, max=32) for name in "hw")
    program, x, shapes = OfEachInterpolation().eval(), torch.randn(2, 3, 20, 24), ({2: 4 * h, 3: 4 * w},)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "trace":
            run = torch.jit.trace(program, x)
        elif exporter == "export":
            run = torch.export.export(program, (x,), dynamic_shapes=shapes).module()
        else:
            pytest.importorskip("onnxscript", reason="pip install 'modeling_vit_scratch[export]'")
            runtime = pytest.importorskip("onnxruntime", reason="pip install 'modeling_vit_scratch[export]'")
            options = {"dynamo": True, "dynamic_shapes": shapes, "opset_version": 20, "verbose": False}
            torch.onnx.export(program, (x,), tmp_path / "model.onnx", **options)
            session = runtime.InferenceSession(tmp_path / "model.onnx")

            def run(x):
                return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])

        for size in [(2, 3, 16, 16), (2, 3, 32, 8), (2, 3, 24, 16), (2, 3, 20, 28)]:
            x = torch.randn(size)
            equal(run(x), program(x), 1e-4)


@pytest.mark.parametrize("cls", CLASSES[:3])
def test_jit_trace_with_dynamic_sizes(cls):
    model = Resized(make(cls, num_register_tokens=2))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, torch.randn(2, 3, 16, 16))
        for size in SIZES:
            x = torch.randn(size)
            equal(traced(x), model(x), 1e-5)


def test_export_with_hidden_states_and_maps():
    model = make(ViTScratchForImageClassification)
    x = images(model)
    program = torch.export.export(
        model, (), {"pixel_values": x, "output_hidden_states": True, "output_attentions": True}
    )
    outputs = program.module()(pixel_values=x, output_hidden_states=True, output_attentions=True)
    assert (len(outputs.hidden_states), len(outputs.attentions)) == (3, 2)


@every_class
def test_device_map_auto(cls, tmp_path):
    model = make(cls, RICH)
    model.save_pretrained(tmp_path)
    placed = cls.from_pretrained(tmp_path, device_map="auto")
    assert all(p.device.type != "meta" for p in placed.parameters())
    with torch.no_grad():
        equal(main_output(placed(images(model))).cpu(), main_output(model(images(model))), 1e-5)


@pytest.mark.parametrize("fields", [RICH, FIXED])
@every_class
def test_offloading_any_module_to_the_disk(cls, fields, tmp_path):
    """Embeddings and blocks are indivisible: each may lie elsewhere, and is fetched when it runs."""
    model = make(cls, fields)
    model.save_pretrained(tmp_path / "model")
    prefix = "" if cls is ViTScratchModel else "vit."
    names = [name for name, _ in model.named_children()] if prefix else []
    device_map = dict.fromkeys([name for name in names if name != "vit"], "cpu")
    device_map |= {f"{prefix}embeddings": "disk", f"{prefix}layers.0": "cpu"}
    device_map |= {f"{prefix}layers.1": "disk", f"{prefix}norm": "disk"}
    placed = cls.from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload")
    assert all(p.device.type == "meta" for name, p in placed.named_parameters() if "layers.1" in name)
    x = inputs(model, targets=True)
    with torch.no_grad():
        equal(main_output(placed(**x)), main_output(model(**x)), 1e-5)


@every_class
def test_indivisible_modules_exist(cls):
    model = make(cls)
    present = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) == {"ViTScratchEmbeddings", "ViTScratchLayer"} <= present


@every_class
@every_config
def test_meta_device(cls, fields):
    config = ViTScratchConfig(**fields)
    with torch.device("meta"):
        model = cls(config)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan"))
    model.init_weights()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.isfinite().all(), name
    main_output(model.eval()(images(model)))
    buffers = dict(cls(config).named_buffers())
    for name, buffer in model.named_buffers():
        equal(buffer, buffers[name])


def test_buffers_are_right_before_initialisation():
    with init.no_init_weights():
        raw = ViTScratchModel(ViTScratchConfig(**FIXED))
    equal(raw.embeddings.position_embeddings, ViTScratchModel(raw.config).embeddings.position_embeddings)


def test_loading_under_a_meta_device_is_refused(tmp_path):
    make(ViTScratchModel).save_pretrained(tmp_path)
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta device context manager"):
        ViTScratchModel.from_pretrained(tmp_path)
