"""Hidden states and attention maps under every implementation."""

import contextlib
import warnings

import pytest
import torch
from small_models import CLASSES, OBLONG, RICH, equal, every_class, images, main_output, make

from modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchModel
from modeling_vit_scratch import modeling_vit_scratch as modeling


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@every_class
def test_attention_maps_under_every_implementation(cls, implementation):
    model = make(cls, RICH, attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    x = images(model)
    with torch.no_grad():
        plain = model(x)
        outputs = model(x, output_attentions=True)
    assert plain.attentions is None
    assert len(outputs.attentions) == 2
    for maps in outputs.attentions:
        assert maps.shape == (3, 4, 16, 16)
        equal(maps.sum(-1), torch.ones(3, 4, 16), 1e-5)
    equal(main_output(plain), main_output(outputs), 1e-4)


@contextlib.contextmanager
def uncompiled():
    """Flex attention without its kernel, which takes many seconds to compile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compiler.set_stance("force_eager")
        try:
            yield
        finally:
            torch.compiler.set_stance("default")


def test_flex_attention():
    model = make(ViTScratchForImageClassification, OBLONG, attn_implementation="flex_attention")
    assert model.config._attn_implementation == "flex_attention"
    x = images(model)
    with torch.no_grad(), uncompiled():
        flex = model(x)
        maps = model(x, output_attentions=True).attentions
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(x, output_attentions=True)
    equal(flex.logits, eager.logits, 1e-5)
    for a, b in zip(maps, eager.attentions, strict=True):
        equal(a, b, 1e-5)


@pytest.mark.slow
def test_flex_attention_compiled():
    model = make(ViTScratchForImageClassification, hidden_size=64, attn_implementation="flex_attention")
    x = images(model)
    with torch.no_grad():
        flex = model(x)
        model.set_attn_implementation("eager")
        equal(flex.logits, model(x).logits, 1e-5)


def test_flash_attention_is_declared():
    for cls in CLASSES:
        assert cls._supports_flash_attn
        assert cls._supports_sdpa
        assert cls._supports_flex_attn
        assert cls._supports_attention_backend
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="FlashAttention2"):
            make(ViTScratchModel, attn_implementation="flash_attention_2")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention runs on a GPU only")
def test_flash_attention():
    pytest.importorskip("flash_attn")
    model = make(ViTScratchForImageClassification, OBLONG, hidden_size=64).to("cuda", torch.bfloat16)
    x = images(model).cuda()
    logits = []
    for implementation in ("eager", "flash_attention_2"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits.append(model(x).logits.float())
    equal(logits[1], logits[0], 5e-2 * logits[0].abs().max().item())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_maps_and_states_of_selected_layers(implementation):
    model = make(ViTScratchForImageClassification, num_hidden_layers=4, attn_implementation=implementation)
    x = images(model)
    with torch.no_grad():
        every = model(x, output_attentions=True, output_hidden_states=True)
        for wanted, present in [([0, -1], {0, 3}), (2, {2}), ([1], {1}), (0, {0}), (-1, {3}), ((1, 2), {1, 2})]:
            some = model(x, output_attentions=wanted)
            assert {i for i, maps in enumerate(some.attentions) if maps is not None} == present
            assert len(some.attentions) == 4
            for i in present:
                equal(some.attentions[i], every.attentions[i], 1e-5)
        for wanted, present in [([0, -1], {0, 4}), (2, {2}), ([4], {4})]:
            some = model(x, output_hidden_states=wanted)
            assert {i for i, state in enumerate(some.hidden_states) if state is not None} == present
            assert len(some.hidden_states) == 5
            for i in present:
                equal(some.hidden_states[i], every.hidden_states[i], 1e-4)
    assert model(x, output_attentions=[]).attentions is None
    assert model(x, output_attentions=False, output_hidden_states=False).hidden_states is None


def test_only_the_selected_layers_compute_maps(monkeypatch):
    model = make(ViTScratchModel, num_hidden_layers=4)
    calls = []
    eager = modeling.eager_attention_forward
    monkeypatch.setattr(modeling, "eager_attention_forward", lambda *a, **k: calls.append(a[0]) or eager(*a, **k))
    model(images(model), output_attentions=[1, 3])
    assert calls == [model.layers[1].attention, model.layers[3].attention]


def test_layers_that_are_not_there_are_refused():
    model = make(ViTScratchModel)
    with pytest.raises(ValueError, match=r"output_attentions asks for 2, but there are 2: use -2 to 1"):
        model(images(model), output_attentions=2)
    with pytest.raises(ValueError, match=r"output_hidden_states asks for \[-4\], but there are 3: use -3 to 2"):
        model(images(model), output_hidden_states=[-4])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@every_class
def test_outputs_by_the_config(cls, implementation, tmp_path):
    model = make(cls, attn_implementation=implementation, output_attentions=True, output_hidden_states=True)
    outputs = model(images(model))
    assert len(outputs.attentions) == 2
    assert len(outputs.hidden_states) == 3
    assert model(images(model), output_attentions=False).attentions is None
    model.save_pretrained(tmp_path)
    assert len(cls.from_pretrained(tmp_path)(images(model)).attentions) == 2
    later = make(cls, attn_implementation=implementation)
    later.config.output_attentions = later.config.output_hidden_states = True
    assert len(later(images(later)).attentions) == 2
    loaded = cls.from_pretrained(tmp_path, attn_implementation=implementation, output_attentions=True)
    assert loaded.config._attn_implementation == implementation
    assert len(loaded(images(loaded)).attentions) == 2


@every_class
def test_gradients_reach_hidden_states_and_maps(cls):
    model = make(cls)
    outputs = model(images(model), output_hidden_states=True, output_attentions=True)
    kept = [*outputs.hidden_states[:2], *outputs.attentions]
    for tensor in kept:
        tensor.retain_grad()
    main_output(outputs).square().sum().backward()
    for tensor in kept:
        assert tensor.grad.abs().sum() > 0


def test_an_additive_mask_reaches_every_implementation():
    model = make(ViTScratchModel)
    mask = torch.zeros(3, 1, 17, 17)
    mask[..., 5:] = float("-inf")
    x = images(model)
    results = []
    for implementation in ("eager", "sdpa", "flex_attention"):
        model.set_attn_implementation(implementation)
        with torch.no_grad(), uncompiled():
            results.append(model(x, attention_mask=mask).last_hidden_state)
    equal(results[1], results[0], 1e-4)
    equal(results[2], results[0], 1e-4)
    assert (model(x, output_attentions=True, attention_mask=mask).attentions[0][..., 5:] == 0).all()


DTYPES = {"float32": (torch.float32, 1e-5), "bfloat16": (torch.bfloat16, 5e-2), "float16": (torch.float16, 1e-2)}


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.values(), ids=DTYPES)
@every_class
def test_implementations_agree_at_load_and_when_switched(cls, dtype, tolerance, tmp_path):
    make(cls, OBLONG).save_pretrained(tmp_path)
    eager = cls.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager")
    sdpa = cls.from_pretrained(tmp_path, dtype=dtype)
    assert (eager.config._attn_implementation, sdpa.config._attn_implementation) == ("eager", "sdpa")
    x = images(eager)
    with torch.no_grad():
        first, second = main_output(eager(x)), main_output(sdpa(x))
        eager.set_attn_implementation("sdpa")
        equal(main_output(eager(x)), second)
        sdpa.set_attn_implementation("flex_attention")
        with uncompiled():
            third = main_output(sdpa(x))
    assert first.dtype == second.dtype == third.dtype == dtype
    scale = first.float().abs().max()
    assert (first.float() - second.float()).abs().max() <= tolerance * scale
    assert (first.float() - third.float()).abs().max() <= tolerance * scale


def test_an_unknown_implementation_is_refused():
    model = make(ViTScratchModel)
    with pytest.raises(ValueError, match='Specified `attn_implementation="foo"` is not supported'):
        model.set_attn_implementation("foo")
    assert model.config._attn_implementation == "sdpa"
