"""Start values, saving and loading."""

import contextlib
import copy
import inspect
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import (
    CLASSES,
    FIXED,
    HEADS,
    RICH,
    TINY,
    equal,
    every_class,
    every_config,
    images,
    inputs,
    main_output,
    make,
)
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, set_seed

from modeling_vit_scratch import (
    ViTScratchBackbone,
    ViTScratchConfig,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchModel,
)
from modeling_vit_scratch import modeling_vit_scratch as modeling


def statistics(tensor):
    return tensor.mean().item(), tensor.std().item()


BIG = {**TINY, "hidden_size": 128, "intermediate_size": 192, "image_size": 40}


def init_table():
    """(tensor, start) of each row of the table in `_init_weights`."""
    doc = inspect.getdoc(modeling.ViTScratchPreTrainedModel._init_weights)
    rows = [line.strip("| ").split("|") for line in doc.splitlines() if line.startswith("|")]
    return [(row[0].strip(), row[1].strip()) for row in rows[2:]]


def rows_of(name):
    """The row of the table that a parameter or buffer belongs to, by its name alone."""
    last = name.rsplit(".", 1)[-1]
    if last in ("cls_token", "register_tokens", "position_embeddings"):
        return "`cls_token`, `register_tokens`, learned positions"
    if last == "mask_token":
        return "`mask_token`"
    if last == "scale":
        return "LayerScale"
    if "norm" in name.rsplit(".", 2)[-2]:
        return "LayerNorm"
    if last in ("bias", "q_bias", "v_bias"):
        return "bias, `q_bias`, `v_bias`"
    if last in ("query", "frequencies"):
        return {"query": "`query` of attention pooling", "frequencies": "`frequencies` of rotary positions"}[last]
    return "weight of `classifier`" if name == "classifier.weight" else "weight of a linear or convolutional layer"


FULL = {**BIG, "num_register_tokens": 4, "layerscale_value": 0.25, "representation_size": 96, "stem_channels": [32]}
# What came after the ViT of 2021.
MODERN = {
    "position_embedding_type": "learned+rope", "rope_frequencies": "mixed", "use_gated_mlp": True, "key_bias": False,
    "use_qk_norm": True, "use_embedding_norm": True, "pooling": "attention", "use_cls_token": False,
}  # fmt: skip


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("cls", [*HEADS, ViTScratchModel])
def test_every_tensor_starts_as_the_table_says(cls, modern):
    table = dict(init_table())
    assert list(table) == [
        "weight of a linear or convolutional layer",
        'the same, `initializer_range="fan_in"`',
        "weight of `classifier`",
        "bias, `q_bias`, `v_bias`",
        "LayerNorm",
        "`cls_token`, `register_tokens`, learned positions",
        "`query` of attention pooling",
        "`frequencies` of rotary positions",
        "sincos positions",
        "`mask_token`",
        "LayerScale",
    ]
    set_seed(0)
    fields = {**FULL, **(MODERN if modern else {})}
    model = cls(ViTScratchConfig(**fields, initializer_range=0.03, position_initializer_range=0.5))
    seen = set()
    for name, p in model.named_parameters():
        row = rows_of(name)
        seen.add(row)
        mean, std = statistics(p)
        noise = 4 / math.sqrt(p.numel())
        if row == "weight of a linear or convolutional layer":
            assert table[row] == "truncated N(0, std^2) in [-2, 2]"
            assert abs(mean) < 0.03 * noise
            assert std == pytest.approx(0.03, rel=noise)
        elif row in ("weight of `classifier`", "bias, `q_bias`, `v_bias`", "`mask_token`"):
            assert table[row].startswith("0")
            assert (p == 0).all(), name
        elif row == "LayerNorm":
            assert table[row] == "weight 1, bias 0"
            assert (p == (1 if name.endswith("weight") else 0)).all(), name
        elif row == "LayerScale":
            assert table[row] == "`layerscale_value`"
            assert (p == 0.25).all(), name
        elif row == "`frequencies` of rotary positions":
            assert table[row] == "the axial ones, turned by a random angle for a head"
            size, axial = p.norm(dim=1), model.get_submodule(name.rpartition(".")[0]).axial().norm(dim=0)
            assert torch.allclose(size, axial.expand_as(size), atol=1e-5)
            assert len({round(angle, 3) for angle in torch.atan2(p[:, 0, 0], p[:, 1, 0]).tolist()}) == len(p)
            quarter = p.shape[2] // 2
            assert (p[..., :quarter] * p[..., quarter:]).sum(dim=1).abs().max() < 1e-5  # a right angle between the two
        else:
            same = "truncated N(0, std'^2) in [-2, 2] * max(std', 1)"
            assert table[row] == ("the same" if row.startswith("`query`") else same)
            assert abs(mean) < 0.5 * noise
            assert std == pytest.approx(0.5, rel=noise)
    expected = set(table) - {'the same, `initializer_range="fan_in"`', "sincos positions"}
    absent = {
        ViTScratchForImageClassification: {"`mask_token`"},
        ViTScratchForMaskedImageModeling: {"weight of `classifier`", "`query` of attention pooling"},
        ViTScratchModel: {"`mask_token`", "weight of `classifier`"},
    }
    if not modern:
        expected -= {"`query` of attention pooling", "`frequencies` of rotary positions"}
    assert seen == expected - absent[cls]


def test_fan_in_initialisation():
    set_seed(0)
    model = ViTScratchForImageClassification(ViTScratchConfig(**FULL, initializer_range="fan_in"))
    linears = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    del linears["classifier"]
    fan_in = {name: m.weight[0].numel() for name, m in linears.items()}
    assert set(fan_in.values()) == {3 * 3 * 3, 32 * 2 * 2, 128, 192}
    for name, linear in linears.items():
        mean, std = statistics(linear.weight)
        noise = 4 / math.sqrt(linear.weight.numel())
        assert std == pytest.approx(fan_in[name] ** -0.5, rel=noise), name
        assert abs(mean) < noise * std
        assert linear.bias is None or (linear.bias == 0).all()
    assert statistics(model.vit.embeddings.position_embeddings)[1] == pytest.approx(0.02, rel=0.1)
    assert (model.classifier.weight == 0).all()


def test_positions_follow_the_range_or_have_their_own():
    for fields, expected in [
        ({}, 0.02),
        ({"initializer_range": 0.1}, 0.1),
        ({"position_initializer_range": 1.0}, 0.8796),  # N(0, 1) cut at 2 standard deviations
        ({"position_initializer_range": 3.0}, 3 * 0.8796),
    ]:
        set_seed(0)
        embeddings = ViTScratchModel(ViTScratchConfig(**BIG, **fields)).embeddings
        assert statistics(embeddings.position_embeddings)[1] == pytest.approx(expected, rel=0.04)
        assert embeddings.position_embeddings.abs().max() <= 2 * max(1, fields.get("position_initializer_range", 1))


def test_truncation():
    set_seed(0)
    model = ViTScratchModel(ViTScratchConfig(**BIG, initializer_range=1.5))
    weights = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, nn.Linear)])
    assert 1.99 < weights.abs().max() <= 2.0


def test_same_seed_same_weights():
    for cls in CLASSES:
        states = []
        for seed in (0, 0, 1):
            set_seed(seed)
            states.append(cls(ViTScratchConfig(**RICH)).state_dict())
        equal(states[0], states[1])
        assert any((states[0][name] != states[2][name]).any() for name in states[0])


@every_class
def test_tiny_ranges_leave_means_of_zero_and_one(cls):
    config = ViTScratchConfig(**{**RICH, "layerscale_value": 1.0})
    for name in list(vars(config)):
        if "_range" in name or "_std" in name:
            setattr(config, name, 1e-10)
    for name, p in cls(config).named_parameters():
        assert round(p.mean().item() * 1e9) / 1e9 in (0.0, 1.0), name


@contextlib.contextmanager
def seeded_initialisation(monkeypatch):
    """The same random numbers for each module, whatever the order of initialisation."""
    original = modeling.PreTrainedModel._initialize_weights
    with monkeypatch.context() as patch:
        patch.setattr(
            modeling.PreTrainedModel, "_initialize_weights", lambda *a, **k: set_seed(42) or original(*a, **k)
        )
        yield


@every_class
@every_config
def test_nothing_is_left_uninitialised_without_any_weights(cls, fields, monkeypatch):
    config = ViTScratchConfig(**fields)
    with seeded_initialisation(monkeypatch):
        made = cls(copy.deepcopy(config))
        loaded = cls.from_pretrained(None, config=copy.deepcopy(config), state_dict={})
    tensors = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}
    for name, tensor in (*made.named_parameters(), *made.named_buffers()):
        equal(tensors[name], tensor)


@every_class
@every_config
def test_save_and_load(cls, fields, tmp_path):
    model = make(cls, fields)
    x = inputs(model, targets=True)
    for i in range(2):
        model.save_pretrained(tmp_path / str(i))
        names = {path.name for path in (tmp_path / str(i)).iterdir()}
        assert names >= {"config.json", "model.safetensors", "modeling_vit_scratch.py", "configuration_vit_scratch.py"}
        loaded, report = cls.from_pretrained(tmp_path / str(i), output_loading_info=True)
        assert not any(report.values())
        assert not loaded.training
        assert loaded.config.architectures == [cls.__name__]
        equal(loaded.state_dict(), model.state_dict())
        equal(dict(loaded.named_buffers()), dict(model.named_buffers()))
        assert all(p.is_contiguous() for p in loaded.parameters())
        with torch.no_grad():
            equal(main_output(loaded(**x)), main_output(model(**x)))
        model = loaded


@every_class
def test_sharded_save(cls, tmp_path):
    model = make(cls, RICH)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").is_file()
    equal(cls.from_pretrained(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_class
def test_half_precision_save(cls, dtype, tmp_path):
    model = make(cls, FIXED).to(dtype)
    model.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    same = cls.from_pretrained(tmp_path, dtype="auto")
    assert same.dtype == same.config.dtype == dtype
    equal(same.state_dict(), model.state_dict())
    full = cls.from_pretrained(tmp_path, dtype=torch.float32)
    assert {t.dtype for t in (*full.parameters(), *full.buffers())} == {torch.float32}
    sincos = [b for name, b in full.named_buffers() if name.endswith("position_embeddings")]
    equal(sincos, [modeling.sincos_positions(full.config)])


@every_class
def test_dtype_arguments(cls, tmp_path):
    make(cls).save_pretrained(tmp_path)
    for dtype in ("float16", "bfloat16", torch.float16, "float32", "auto"):
        loaded = cls.from_pretrained(tmp_path, dtype=dtype)
        expected = torch.float32 if dtype == "auto" else getattr(torch, str(dtype).removeprefix("torch."))
        assert loaded.dtype == expected
        assert cls.from_pretrained(tmp_path, torch_dtype=dtype).dtype == expected


@every_class
def test_torch_save(cls, tmp_path):
    model = make(cls, RICH)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = make(cls, RICH, seed=1)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    equal(other.state_dict(), model.state_dict())
    torch.save(model, tmp_path / "model.pt")
    whole = torch.load(tmp_path / "model.pt", weights_only=False)
    equal(main_output(whole(images(model))), main_output(model(images(model))))


@every_class
def test_load_without_a_folder(cls):
    model = make(cls)
    loaded = cls.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    equal(loaded.state_dict(), model.state_dict())


@every_class
def test_a_file_without_our_weights_lacks_them_all(cls, tmp_path):
    model = make(cls, FIXED)
    model.save_pretrained(tmp_path)
    save_file({"stranger": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == set(model.state_dict())
    assert set(report["unexpected_keys"]) == {"stranger"}
    for name, p in loaded.named_parameters():
        assert p.isfinite().all(), name


def test_weights_that_a_checkpoint_lacks_are_initialised(tmp_path):
    model = make(ViTScratchForImageClassification)
    model.save_pretrained(tmp_path)
    more = {"num_register_tokens": 3, "layerscale_value": 0.5, "representation_size": 12}
    loaded, report = ViTScratchForImageClassification.from_pretrained(
        tmp_path, **more, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert set(report["missing_keys"]) == {
        "vit.embeddings.register_tokens",
        "pre_logits.0.weight",
        "pre_logits.0.bias",
        *(f"vit.layers.{i}.layer_scale{j}.scale" for i in range(2) for j in (1, 2)),
    }
    assert 0.005 < loaded.vit.embeddings.register_tokens.std() < 0.04
    assert 0.01 < loaded.pre_logits[0].weight.std() < 0.03
    assert (loaded.pre_logits[0].bias == 0).all()
    assert (loaded.vit.layers[1].layer_scale2.scale == 0.5).all()
    assert (loaded.classifier.weight == 0).all()  # 12 features instead of 32: another size
    kept = {k: v for k, v in model.state_dict().items() if k != "classifier.weight"}
    equal({name: loaded.state_dict()[name] for name in kept}, kept)


def test_another_number_of_classes(tmp_path):
    model = make(ViTScratchForImageClassification)
    model.save_pretrained(tmp_path)
    for cls in (ViTScratchForImageClassification, AutoModelForImageClassification):
        with pytest.raises(RuntimeError, match="size"):
            cls.from_pretrained(tmp_path, num_labels=42)
        loaded = cls.from_pretrained(tmp_path, num_labels=42, ignore_mismatched_sizes=True)
        assert loaded(images(model)).logits.shape == (3, 42)
        assert (loaded.classifier.weight == 0).all()
        assert (loaded.classifier.bias == 0).all()
        equal(loaded.vit.state_dict(), model.vit.state_dict())


def test_another_image_size_is_refused_or_ignored_on_request(tmp_path):
    model = make(ViTScratchForImageClassification)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size"):
        ViTScratchForImageClassification.from_pretrained(tmp_path, image_size=32)
    loaded = ViTScratchForImageClassification.from_pretrained(tmp_path, image_size=32, ignore_mismatched_sizes=True)
    assert loaded.vit.embeddings.position_embeddings.shape == (1, 65, 32)
    assert 0.015 < loaded.vit.embeddings.position_embeddings.std() < 0.025
    equal(loaded.vit.embeddings.cls_token, model.vit.embeddings.cls_token)


@pytest.mark.parametrize("cls", CLASSES[1:])
@every_config
def test_base_weights_into_a_head_and_back(cls, fields, tmp_path):
    base = make(ViTScratchModel, fields)
    base.save_pretrained(tmp_path / "base")
    model, report = cls.from_pretrained(tmp_path / "base", output_loading_info=True)
    equal({k: v for k, v in model.vit.state_dict().items() if "mask_token" not in k}, base.state_dict())
    own = {name for name, _ in model.named_parameters() if not name.startswith("vit.") or "mask_token" in name}
    assert set(report["missing_keys"]) == own
    assert not report["unexpected_keys"]
    model.save_pretrained(tmp_path / "head")
    for loader in (ViTScratchModel, AutoModel):
        again, report = loader.from_pretrained(tmp_path / "head", output_loading_info=True)
        equal(again.state_dict(), base.state_dict())
        assert not report["missing_keys"]
        assert set(report["unexpected_keys"]) == own


def test_number_of_layers_can_be_cut_on_loading(tmp_path):
    model = make(ViTScratchBackbone, num_hidden_layers=3)
    model.save_pretrained(tmp_path)
    for cls in CLASSES:
        loaded, report = cls.from_pretrained(tmp_path, num_hidden_layers=2, output_loading_info=True)
        assert len([m for m in loaded.modules() if isinstance(m, modeling.ViTScratchLayer)]) == 2
        assert all("layers.2" in key for key in report["unexpected_keys"])
