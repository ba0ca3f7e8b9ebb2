"""scripts/benchmark.py: its arithmetic by hand-made timings, its peers, and every section at a tiny size."""

import functools
import json
import math
import os
import re
import sys
import threading
import time

import benchmark
import numpy as np
import pytest
import torch
from benchmarking import (
    attention,
    cases,
    data,
    inference,
    measuring,
    memory,
    merging,
    model,
    peers,
    photos,
    race,
    scale,
    step,
    streams,
    trainer,
)
from benchmarking.measuring import OURS, PEAK
from colours import BLUE, GREEN, RED, colour_model, paint_folder, save_trained

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, modeling_vit_scratch
from modeling_vit_scratch.evaluation import Predictor
from modeling_vit_scratch.evaluation.tables import text_table

CPU = torch.device("cpu")
SMALL = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
TINY = cases.Case("tiny, inference", "showcase", 2, fields=SMALL)
TINY_TRAINING = cases.Case("tiny + class token, training", "showcase", 2, True, {**SMALL, **cases.CLASS_TOKEN})


@pytest.fixture
def args(tmp_path, monkeypatch):
    """Arguments so small that every section runs in a moment, most of them without new processes."""

    def in_this_process(jobs, title, method="fork"):
        return [function(*arguments) for function, arguments in jobs]

    for section in (model, memory, scale):
        monkeypatch.setattr(section, "in_fresh_processes", in_this_process)
    for section in (model, scale):
        monkeypatch.setattr(section, "matrix_product", functools.partial(measuring.matrix_product, n=64))
    monkeypatch.setattr(data, "DATA_BATCH", 8)
    monkeypatch.setattr(streams, "PHOTOS", 24)
    args = benchmark.parse(["--quick", "--device", "cpu", "--dataset_name", "digits", "--output", str(tmp_path / "o")])
    args.cases, args.rounds, args.least, args.steps, args.large = [TINY, TINY_TRAINING], 2, 1e-4, 8, "tiny"
    args.batch_sizes, args.image_sizes, args.depths, args.processes = [1, 2], [32, 48], [1, 2], 2
    args.race_options = ["--max_train_samples", "64", "--max_eval_samples", "30", "--num_train_epochs", "2"]
    monkeypatch.setattr(scale, "ARRANGEMENTS", {})
    monkeypatch.setattr(memory, "keep_freed_memory", lambda threshold: None)  # it is of the whole process
    monkeypatch.setattr(memory, "TRAINING", {"plain": (1, False), "checkpointing": (1, True)})
    monkeypatch.setattr(memory, "together", lambda processes, function, *arguments: [function(*arguments)])
    return args


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_medians_spread_and_ratios():
    # The machine is half as fast in the second round and a quarter as fast in the fifth; one sample is an outlier.
    samples = {
        OURS: [1.0, 2.0, 1.0, 1.0, 4.0],
        "near": [1.1, 2.2, 1.1, 9.9, 4.4],
        "far": [3.0, 6.0, 3.0, 3.0, 12.0],
        PEAK: [0.5, 1.0, 0.5, 0.5, 2.0],
    }
    rows = measuring.compare(samples)
    assert {name: row["seconds"] for name, row in rows.items()} == {OURS: 1.0, "near": 2.2, "far": 3.0, PEAK: 0.5}
    assert rows[OURS]["spread"] == pytest.approx((2.0 - 1.0) / 1.0)
    assert rows["near"]["spread"] == pytest.approx((4.4 - 1.1) / 2.2)
    # The matrix product is no peer; the nearest is 1.1 times slower in every round but one.
    assert rows[OURS]["vs_fastest_peer"] == pytest.approx(1.1)
    assert rows["far"]["vs_fastest_peer"] == pytest.approx(1.1 / 3)
    assert rows["near"]["vs_fastest_peer"] == 1
    assert rows["far"]["ours_is"] == pytest.approx(3)
    assert rows[PEAK]["ours_is"] == pytest.approx(0.5)


def test_without_peers_there_are_no_ratios():
    rows = measuring.compare({OURS: [1.0, 3.0, 2.0], PEAK: [1.0, 1.0, 1.0]})
    assert rows[OURS] == {"seconds": 2.0, "spread": 0.5, "samples": [1.0, 3.0, 2.0]}


def test_stopwatch_warms_up_and_repeats_short_steps(monkeypatch):
    now, calls = [0.0], [0]

    def step():
        calls[0] += 1
        now[0] += 5.0 if calls[0] == 1 else 0.03  # the first is slow, as with torch.compile

    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])
    measure = measuring.stopwatch(step, CPU, least=0.1)
    before = calls[0]
    assert measure() == pytest.approx(0.03)
    assert calls[0] - before == 4  # 0.1 s


def test_every_contestant_runs_once_a_round_and_the_order_changes():
    ran = []

    def contestant(name):
        return lambda: ran.append(name) or len(ran)

    samples = measuring.interleave({name: contestant(name) for name in "abc"}, 6, "test")
    rounds = [tuple(ran[start : start + 3]) for start in range(0, 18, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1
    for name in "abc":
        assert samples[name] == [3 * i + order.index(name) + 1 for i, order in enumerate(rounds)]


def test_table_aligns_and_sets_titles_apart():
    text = text_table([["", "ms", "ratio"], "a title", ["first", "1.5", "1.00 x"], ["second one", "12", ""]])
    assert text.splitlines() == [
        "             ms   ratio",
        "",
        "a title",
        "first       1.5  1.00 x",
        "second one   12",
    ]
    assert [measuring.number(value) for value in (0.01234, 12.34, 1234.5)] == ["0.0123", "12.3", "1,234"]
    assert measuring.megabytes(2_500_000_000) == "2,500"


# -- memory ------------------------------------------------------------------------------------------------------------


def test_peak_memory_is_the_most_that_was_seen(monkeypatch):
    now, looked = [1000], threading.Event()

    def memory_now():
        looked.set()
        return now[0]

    monkeypatch.setattr(measuring, "memory_now", memory_now)
    memory = measuring.PeakMemory()
    now[0] = 1100  # before `with`: counts
    with memory:
        now[0] = 1500
        looked.clear()
        assert looked.wait(60)
        looked.clear()
        assert looked.wait(60)  # begun after 1500 was set
        now[0] = 1200
    assert memory.bytes == 500


def test_mapped_files_are_no_memory_of_the_process(tmp_path, monkeypatch):
    status = tmp_path / "status"
    status.write_text("VmRSS:\t    900 kB\nRssAnon:\t    300 kB\nRssFile:\t    600 kB\n")
    monkeypatch.setattr(measuring, "Path", lambda name: status if name == "/proc/self/status" else None)
    assert (measuring.memory_now(), measuring.memory_now("VmRSS")) == (300 * 1024, 900 * 1024)
    status.unlink()
    assert measuring.memory_now() is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_from_disk_in_a_fresh_process(args, monkeypatch):
    monkeypatch.setattr(memory, "in_fresh_processes", measuring.in_fresh_processes)
    result = memory.measure(args)
    assert result["parameters"] == 5_717_416
    assert [row["name"] for row in result["rows"]] == [OURS, "transformers"]
    for row in result["rows"]:
        assert row["seconds"] > 0
        assert row["of_size"] == row["memory_bytes"] / result["float32_bytes"]
        assert row["resident_bytes"] > result["float32_bytes"]  # all of the model was used
    for row in result["training"]:
        assert len(row["samples"]) == memory.STEPS
        assert row["tokens_per_second"] == pytest.approx(197 / np.median(row["samples"]))
        assert row["of_size"] == row["memory_bytes"] / result["float32_bytes"] > 4  # weights, gradients, two moments
    text = memory.show(result)
    assert "5,717,416 parameters, 23 MB" in text
    assert max(map(len, text.splitlines())) <= 80
    assert len(memory.draw(result).axes) == 2


def test_training_in_processes_is_as_slow_as_the_slowest_and_as_large_as_the_largest(monkeypatch):
    asked = []

    def together(processes, function, *arguments):
        asked.append((processes, *arguments))
        return [([1.0, 3.0, 2.0], 100), ([2.0, 1.0, 2.0], 300)][:processes]

    monkeypatch.setattr(memory, "together", together)
    monkeypatch.setattr(memory, "available_memory", lambda device: 1000)
    rows = {row["name"]: row for row in memory.measure_training("tiny", 200, CPU)["training"]}
    assert asked == [(n, "tiny", CPU, n, checkpointing) for n in (1, 2) for checkpointing in (False, True)]
    assert list(rows) == ["plain", "checkpointing", "FSDP2", "FSDP2, checkpointing"]
    assert (rows["plain"]["seconds"], rows["plain"]["memory_bytes"]) == (2.0, 100)
    assert (rows["FSDP2"]["samples"], rows["FSDP2"]["memory_bytes"]) == ([2.0, 3.0, 2.0], 300)
    assert rows["FSDP2"]["tokens_per_second"] == 2 * 197 / 2.0  # an image each
    on_gpu = memory.measure_training("tiny", 200, torch.device("cuda"))["training"]
    assert [row["name"] for row in on_gpu] == ["plain", "checkpointing"]

    monkeypatch.setattr(memory, "available_memory", lambda device: 800_000_000)
    result = memory.measure_training("tiny", 200_000_000, CPU)
    assert result == {"training": [], "no_training": "about 900 MB, and 800 MB are free"}
    result |= {"rows": [], "preset": "tiny", "parameters": 5, "float32_bytes": 20}
    assert "Not trained: a step takes about 900 MB, and 800 MB are free." in memory.show(result)


def test_large_models_can_be_checkpointed():
    for checkpointing in (False, True):
        model = memory.random_model("tiny", CPU, checkpointing=checkpointing)
        assert all(layer.gradient_checkpointing == checkpointing for layer in model.vit.layers)
        assert 0.01 < model.classifier.weight.std() < 0.02
        assert "gradient_checkpointing" not in model.config.to_dict()


def held(processes):
    """Parameters that this process holds of a sharded model, and how many modules are gathered one by one."""
    model = memory.random_model("tiny", CPU, processes)
    gathered = sum(isinstance(module, torch.distributed.fsdp.FSDPModule) for module in model.modules())
    return sum(parameter.to_local().numel() for parameter in model.parameters()), gathered


@pytest.mark.slow
def test_two_processes_share_a_model():
    (first, blocks), (second, _) = measuring.together(2, held, 2)
    assert first + second == 5_717_416 and abs(first - second) < 0.02 * first  # positions are not split
    assert blocks == 12 + 1
    for seconds, _ in measuring.together(2, memory.train, "tiny", CPU, 2, True):
        assert len(seconds) == memory.STEPS and min(seconds) > 0


@pytest.mark.slow
def test_a_process_that_is_ended_from_outside_is_told():
    with pytest.raises(OSError, match="ended from outside, as happens where memory is short"):
        measuring.together(1, os._exit, 1)


def test_memory_refuses_a_full_disk(args, monkeypatch):
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1e6}))
    with pytest.raises(ValueError, match=r"GB free, but two models take 0\.0 GB; name another"):
        memory.measure(args)


# -- peers -------------------------------------------------------------------------------------------------------------


def test_teaching_layout_has_the_size_of_showcase():
    parameters = sum(p.numel() for p in peers.TeachingViT().parameters())
    assert parameters == 847_626
    assert parameters == ViTScratchForImageClassification(ViTScratchConfig.preset("showcase")).num_parameters()


@pytest.mark.peers
@pytest.mark.parametrize("name", peers.PEERS)
def test_peers_compute_what_we_do(name):
    compared = 0
    for case in (TINY, TINY_TRAINING):
        try:
            peer = cases.make_model(case, name)
        except ImportError as error:
            pytest.skip(f"{name} does not import: {error}")
        except ValueError:
            continue  # another geometry
        if peers.PEERS[name][1]:
            assert cases.difference(case, cases.make_model(case, OURS), peer) < 1e-5
        assert cases.logits_of(peer(torch.randn(2, 3, 16, 16))).shape == (2, 10)
        compared += 1
    assert compared == (2 if name == "timm" else 1)


def test_no_peer_is_compared_with_a_model_whose_choices_it_lacks(monkeypatch):
    monkeypatch.setattr(peers, "REASONS", {})
    monkeypatch.setattr(
        peers, "PEERS", {name: (lambda ours: ours, shared) for name, (_, shared) in peers.PEERS.items()}
    )
    no_class_token = {"use_cls_token": False}
    for fields in [
        {"position_embedding_type": "rope"}, {"position_embedding_type": "learned+rope"}, {"num_cls_tokens": 2},
        {"position_embedding_type": "none"}, {"use_gated_mlp": True}, {"use_embedding_norm": True},
        {"use_qk_norm": True}, {"key_bias": False}, {"pooling": "cls+mean"}, {"pooling": "attention", **no_class_token},
    ]:  # fmt: skip
        name, value = next(iter(fields.items()))
        case = cases.Case("of today", "tiny", 1, fields={"num_hidden_layers": 1, **fields})
        for peer in peers.PEERS:
            with pytest.raises(ValueError, match=re.escape(f"no model with {name}={value!r}")):
                cases.make_model(case, peer)
        models, reasons = cases.make_models(case)
        assert (list(models), reasons) == ([OURS], {})
    plain = cases.Case("plain", "tiny", 1, fields={"num_hidden_layers": 1})
    assert list(cases.make_models(plain)[0]) == [OURS, *peers.PEERS]


def test_what_does_not_import_is_named(monkeypatch):
    monkeypatch.setattr(peers, "REASONS", {"timm": "No module named 'timm'"})
    with pytest.raises(ImportError, match="No module named 'timm'"):
        peers.make_peer("timm", None)


def test_libraries_are_found_or_excused(monkeypatch):
    """torchvision is tried again once its operators are declared; what fails then is excused with its reason."""
    tried, declared = [], []

    def import_module(name):
        tried.append(name)
        if name == "torchvision" and not declared:
            raise RuntimeError("operator torchvision::nms does not exist\nand more")
        if name == "timm":
            raise ImportError("No module named 'timm'")
        return name

    monkeypatch.setattr(peers.importlib, "import_module", import_module)
    monkeypatch.setattr(peers, "declare_operators", lambda: declared.append(1) or "operators")
    modules, reasons, operators = peers.import_libraries()
    assert tried == ["torchvision", "torchvision", "timm", "vit_pytorch"]
    assert modules == {"torchvision": "torchvision", "vit_pytorch": "vit_pytorch"}
    assert reasons == {"timm": "No module named 'timm'"}
    assert operators == "operators"


# -- sections ----------------------------------------------------------------------------------------------------------


def test_model(args, monkeypatch):
    monkeypatch.setattr(peers, "REASONS", {"timm": "No module named 'timm'", **peers.REASONS})

    def interleave(contestants, rounds, title, seed):
        assert list(contestants)[:1] + list(contestants)[-1:] == [OURS, PEAK]
        ours = [2.0, 5.0] if seed == 0 else [3.0, 9.0]  # in the second process the peers are no slower
        return {name: [4.0, 8.0] for name in contestants} | {OURS: ours, PEAK: [1.0, 3.0]}

    monkeypatch.setattr(model, "interleave", interleave)
    monkeypatch.setattr(model, "FEWEST", 2)
    result = model.measure(args)
    names = {case.title: [row["name"] for row in result["rows"] if row["case"] == case.title] for case in args.cases}
    assert names[TINY.title] == [OURS, "teaching layout"]
    assert names[TINY_TRAINING.title][:2] == [OURS, "transformers"]
    assert "timm" in result["absent"]
    for row, group in zip(result["rows"], [g for g in result["cases"] for _ in names[g["case"]]], strict=True):
        assert row["seconds"] == (4 if row["name"] == OURS else 6)
        assert row["images_per_second"] == 2 / row["seconds"]
        if row["name"] == OURS:  # 4/2, 8/5, 4/3 and 8/9
            assert row["vs_fastest_peer"] == pytest.approx((4 / 3 + 8 / 5) / 2)
        else:
            assert row["vs_fastest_peer"] == 1
            assert row["ours_is_range"] == pytest.approx(((4 / 3 + 8 / 9) / 2, (4 / 2 + 8 / 5) / 2))
        assert group["peak_flops_per_second"] == 2 * 64**3 / 2
        rounds = (1 / 3 + 1 / 2) / 2 if row["name"] == OURS else (1 / 4 + 3 / 8) / 2
        assert row["of_peak"] == pytest.approx(rounds * 2 * group["flops_per_image"] / (2 * 64**3))
        assert row["memory_bytes"] is not None or sys.platform != "linux"
    forward, training = (group["flops_per_image"] for group in result["cases"])
    # N = 4 patches of 192 numbers, D = 16, MLP 24, 2 blocks, 10 classes; a training step is three times inference.
    block = 2 * (4 * (4 * 16 * 16 + 2 * 16 * 24) + 2 * 4 * 4 * 16)
    assert forward == 2 * 4 * 192 * 16 + 2 * block + 2 * 16 * 10
    assert training % 3 == 0 and training > 3 * forward
    text = model.show(result)
    assert "Not compared, as it does not import here: timm (No module named 'timm')" in text
    assert f"{TINY.title}: faster (1.47 x teaching layout)" in text
    assert max(map(len, text.splitlines())) <= 80


def test_what_is_not_told_apart():
    parts = [{OURS: [1.0, 1.0, 1.0], "peer": [1.1, 1.2, 9.0]}, {OURS: [2.0, 2.0, 2.0], "peer": [2.1, 2.0, 1.0]}]
    assert measuring.lowest_and_highest(parts, OURS, "peer") == pytest.approx((1.0, 1.2))
    for limits, words in [((1.01, 1.2), "faster"), ((0.99, 1.2), "not told apart"), ((0.8, 0.99), "slower")]:
        assert model.verdict({"ours_is_range": limits}) == words


@pytest.mark.parametrize("change", [0.1, math.nan])
def test_model_refuses_peers_that_compute_something_else(change, args, monkeypatch):
    make_peer = peers.make_peer

    def broken(name, ours):
        peer = make_peer(name, ours)
        with torch.no_grad():
            next(peer.parameters()).add_(change)
        return peer

    monkeypatch.setattr(peers, "make_peer", broken)
    args.cases = [TINY]
    with pytest.raises(ValueError, match=r"logits of .* differ from ours by .* although the weights are the same"):
        model.measure(args)


def every_case(device, monkeypatch):
    """As on a device with units for bfloat16."""
    monkeypatch.setattr(cases, "has_fast_bfloat16", lambda device: True)
    return cases.cases_for(torch.device(device), quick=False)


def test_cases_of_a_device(monkeypatch):
    plain = cases.cases_for(CPU, quick=False)
    assert {case.bf16 for case in plain} == {False}
    assert {case.title for case in plain if case.compiled} == {
        f"{t}, float32, compiled" for t in cases.COMPILED_ON_CPUS
    }
    assert not any(case.compiled for case in cases.cases_for(CPU, quick=True))
    with_units = every_case("cpu", monkeypatch)
    assert len(with_units) == 2 * len(plain) and sum(case.bf16 for case in with_units) == len(plain)
    on_gpu = every_case("cuda", monkeypatch)
    assert {(case.bf16, case.compiled) for case in on_gpu} == {(True, False), (True, True)}
    assert len({case.title for case in on_gpu}) == len(on_gpu) == 2 * len(cases.WORK["cuda"])


def test_widest_model_table_fits(monkeypatch):
    titles = {case.title for device in ("cpu", "cuda") for case in every_case(device, monkeypatch)}
    row = {"seconds": 12.345678, "spread": 1.2, "images_per_second": 123456.7, "vs_fastest_peer": 12.34, "samples": []}
    row |= {"ours_is": 9.87, "ours_is_range": (9.51, 9.95), "of_peak": 1.0, "memory_bytes": 12_345_678_901}
    sizes = {"flops_per_image": 105.4e9, "peak_flops_per_second": 789e12, "fastest": "torchvision"}
    groups = [{"case": case, **sizes} for case in titles]
    rows = [{"case": case, "name": name, **row} for case in titles for name in (OURS, *peers.PEERS)]
    text = model.show({"rows": rows, "cases": groups, "absent": {"timm": "no " * 60}, "processes": 6, "rounds": 3})
    assert max(map(len, text.splitlines())) <= 80
    assert len(model.draw({"rows": rows[:12], "cases": groups[:2]}).axes) == 2


@pytest.mark.parametrize("training", [False, True])
def test_bf16_and_compiled_steps(training, monkeypatch):
    """What a GPU is asked for, here on the CPU and with a compiler that only notes that it was called."""
    compiled, dtypes = [], []

    def compile_(model):
        compiled.append(model)
        model.vit.layers[0].mlp.fc1.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
        return model

    monkeypatch.setattr(torch, "compile", compile_)
    case = cases.Case("", "showcase", 2, training, SMALL, bf16=True, compiled=True)
    model = cases.make_model(case, OURS)
    weight = model.classifier.weight.clone()
    cases.make_step(case, model, CPU)()
    assert compiled == [model]
    assert dtypes == [torch.bfloat16]
    # Autocast keeps the weights that are trained in float32.
    assert (model.classifier.weight.dtype, model.training) == (torch.float32 if training else torch.bfloat16, training)
    assert torch.equal(weight.to(model.classifier.weight), model.classifier.weight) != training


@pytest.mark.peers
def test_data_paths(args):
    dataset = data.random_images(32, CPU)
    paths = [data.our_data_path]
    if "torchvision" in peers.MODULES:
        paths.append(data.torchvision_data_path)
    for title, settings in data.DATA_CASES.items():
        for path in paths:
            images, labels = path(dataset, settings)()
            assert (images.shape, images.dtype) == ((8, 3, 32, 32), torch.float32)
            assert labels.shape == ((8, 10) if "mixup" in title else (8,))
            mean, std = torch.tensor(data.MEAN), torch.tensor(data.STD)
            low, high = (-mean / std).min(), ((1 - mean) / std).max()  # bytes, normalised
            assert low - 1e-5 <= images.min() < -1 and 1 < images.max() <= high + 1e-5

    threads = torch.get_num_threads()
    result = data.measure(args)
    assert torch.get_num_threads() == threads
    assert [row["case"] for row in result["rows"] if row["name"] == OURS] == list(data.DATA_CASES)
    for row in result["rows"]:
        assert row["images_per_second"] == 8 / row["seconds"]
        assert 0 < row["share_of_step"] < 1
    files, *streamed = result["streams"]
    assert files["name"] == streams.FOLDER and files["of_the_folder"] == 1
    assert [row["name"] for row in streamed] == ["streamed from .parquet files", "streamed from .tar files"]
    for row in result["streams"]:
        assert row["images_per_second"] == 24 / row["seconds"]
    look = result["inspection"]
    assert (look["dataset"], look["images"]) == ("digits", 1797)
    assert look["fingerprint_seconds"] > 0 and look["seconds"] > 0
    assert data.show(result).splitlines()[-1].startswith("digits, 1,797 images: fingerprint ")


@pytest.mark.peers
def test_photos(args, monkeypatch):
    """Every contestant makes the same of a photo, and only those who decode all of it are compared."""
    monkeypatch.setattr(photos, "SIZES", {"500 x 400": (500, 400), "1600 x 1360": (1600, 1360)})
    monkeypatch.setattr(photos, "Case", lambda title, preset, *more, **fields: cases.Case(title, "tiny", *more))
    encoded = photos.jpeg(photos.photo(1600, 1360, 0))
    processor = photos.make_processor(cases.Case("", "tiny", 1).config, photos.MEAN, photos.STD)
    expected = photos.read_transformers(encoded, processor)
    assert expected.shape == (1, 3, 224, 224) and expected.std() > 0.5
    readers = photos.readers(processor)
    assert set(readers) - {OURS, photos.PREDICTING, "transformers, Pillow"} == {"timm", "torchvision"} & set(
        peers.MODULES
    )
    for name, read in readers.items():
        far = (read(encoded) - expected).abs() * 255 * torch.tensor(photos.STD).view(-1, 1, 1)
        assert far.max() < (8.5 if name == photos.PREDICTING else 1.5), name
        assert (far.max() > 1.5) == (name == photos.PREDICTING), "it decodes in full"

    result = photos.measure(args)
    assert len(result["cases"]) == 4 and len(result["rows"]) == 4 * len(readers)
    for row in result["rows"]:
        assert row["images_per_second"] == 1 / row["seconds"] and 0 < row["share"] < 1
        assert ("ours_is" in row) == (row["name"] != photos.PREDICTING)
    for case in result["cases"]:
        case["model_images_per_second"] = 123456.7
    assert max(map(len, photos.show(result).splitlines())) <= 80
    assert len(photos.draw(result).axes) == 4


def test_batches_cover_all_images():
    torch.manual_seed(0)
    indices = data.batches(10, 4)
    epochs = [[next(indices), next(indices)] for _ in range(2)]
    for first, second in epochs:
        assert len(first) == len(second) == 4
        assert len({*first, *second}) == 8 and {*first, *second} < set(range(10))
    assert epochs[0] != epochs[1]


def test_each_attention_is_measured(args, monkeypatch):
    """Where eager attention is slowed down, it is found to be slow: in both types, in training too."""

    def slow(*arguments, eager=modeling_vit_scratch.eager_attention_forward, **kwargs):
        time.sleep(0.05)
        return eager(*arguments, **kwargs)

    monkeypatch.setattr(modeling_vit_scratch, "eager_attention_forward", slow)
    monkeypatch.setattr(attention, "CASES", [TINY, TINY_TRAINING])
    monkeypatch.setattr(attention, "has_fast_bfloat16", lambda device: True)
    result = attention.measure(args)
    works = ["inference, float32", "training, float32", "inference, bfloat16", "training, bfloat16"]
    assert [row["work"] for row in result["rows"]] == 2 * works
    for row in result["rows"]:
        assert row["eager_speed"] < 0.7
        assert row["images_per_second"]["eager"] < 2 / 0.05
    assert max(map(len, attention.show(result).splitlines())) <= 80
    attention.draw(result)


def test_parts_of_a_step(args, monkeypatch):
    """The model learns, an operator that is slow shows, and parts add up to the step."""
    gelu = torch.nn.functional.gelu
    large = torch.ones(1 << 22)

    class Slow(torch.nn.Module):
        def forward(self, x):
            for _ in range(10):
                gelu(large)
            return gelu(x)

    def make(case, name, make=cases.make_model):
        model = make(case, name)
        if name == OURS:
            model.vit.layers[0].mlp.activation = Slow()
            models.append(model)
        return model

    models = []
    monkeypatch.setattr(step, "make_model", make)
    monkeypatch.setattr(step, "STEP_CASES", [TINY_TRAINING])
    args.rounds = 3
    start = make(TINY_TRAINING, OURS).state_dict()
    result = step.measure(args)
    assert any(not torch.equal(p, start[name]) for name, p in models[-1].state_dict().items())
    row = result["rows"][0]
    assert row["name"] == OURS and set(row["parts"]) == set(step.PARTS) and min(row["parts"].values()) > 0
    assert sum(row["operators"].values()) == pytest.approx(1)
    assert next(iter(row["operators"])) == "gelu"
    text = step.show(result)
    assert "gelu" in text and max(map(len, text.splitlines())) <= 80
    assert row["parts"]["forward"] == max(row["parts"].values())
    step.draw(result)


def test_trainer(args, capsys):
    result = trainer.measure(args)
    for row in result["rows"]:
        samples = {name: np.array(values) for name, values in row["samples"].items()}
        assert row["cost_seconds"] == pytest.approx(np.median(samples["trainer"] - samples["bare"]))
        assert row["cost_share"] == pytest.approx(np.median(samples["trainer"] / samples["bare"]) - 1)
    assert capsys.readouterr().out == ""  # Trainer's own log would stand between the tables
    assert "2 blocks, width 64" in trainer.show(result)


def test_trainer_and_bare_loop_do_the_same_work(monkeypatch):
    """Both see the same number of batches of the same shape, and move every weight."""
    models, seen = [], []
    make = ViTScratchForImageClassification

    def watched(config):
        torch.manual_seed(0)
        models.append(make(config))
        models[-1].register_forward_pre_hook(
            lambda model, inputs, kwargs: seen.append((kwargs.get("pixel_values", *inputs).shape, model.training)),
            with_kwargs=True,
        )
        return models[-1]

    monkeypatch.setattr(trainer, "ViTScratchForImageClassification", watched)
    config = ViTScratchConfig.preset("showcase", **{**SMALL, "image_size": 32})
    start, images = watched(config).state_dict(), data.random_images(128, CPU)
    for seconds in (trainer.bare_seconds, trainer.trainer_seconds):
        assert seconds(config, images, 8, CPU) > 0
        assert seen == [((64, 3, 32, 32), True)] * 8
        seen.clear()
        moved = [name for name, p in models[-1].state_dict().items() if not torch.equal(p, start[name])]
        assert len(moved) == len(start)


def test_power_laws_are_of_the_upper_half():
    x = [1, 2, 4, 8, 16]
    law = scale.power_law(x, [5.0, 5.0, 3 * 4**1.5, 3 * 8**1.5, 3 * 16**1.5])
    assert law == {"exponent": pytest.approx(1.5), "factor": pytest.approx(3), "from": 4, "to": 16}
    assert scale.power_law(x[::-1], [16.0, 8.0, 4.0, 9.0, 9.0])["exponent"] == pytest.approx(1)
    assert scale.power_law([1, 2], [1.0, 4.0])["exponent"] == pytest.approx(2)
    assert scale.power_law(x, [None] * 5) is None
    assert scale.power_law([4], [1.0]) is None


def test_scale(args, monkeypatch):
    monkeypatch.setattr(scale, "ARRANGEMENTS", {"1 process, 1 thread": (1, 1), "2 processes, 1 thread": (2, 1)})
    monkeypatch.setattr(scale, "train_in_processes", lambda processes, threads, steps: 0.5 / processes)
    result = scale.measure(args)
    found = {(row["axis"], row["x"]): row for row in result["rows"]}
    assert [found["pixels a side", size]["tokens"] for size in (32, 48)] == [5, 10]
    assert found["images per batch", 1]["flops_per_image"] == found["images per batch", 2]["flops_per_image"]
    assert found["blocks", 1]["flops_per_image"] < found["blocks", 2]["flops_per_image"]
    assert found["blocks", 2]["flops_per_image"] == found["images per batch", 1]["flops_per_image"]
    assert found["images per batch", 2]["images_per_second"] == 2 / found["images per batch", 2]["seconds"]
    assert found["processes", "2 processes, 1 thread"]["images_per_second"] == 64 / 0.25
    assert found["processes", "2 processes, 1 thread"]["speed"] == 2
    law = result["growth"]["pixels a side"]
    seconds = [found["pixels a side", size]["seconds"] for size in (32, 48)]
    assert law["seconds"]["exponent"] == pytest.approx(math.log(seconds[1] / seconds[0]) / math.log(10 / 5))
    assert (law["memory_bytes"] is None) == (sys.platform != "linux")
    text = scale.show(result)
    assert max(map(len, text.splitlines())) <= 80
    assert "showcase, training, batch 64 in all\ntimes as fast as 1 process, 1 thread: 2.00\n" in text
    assert f"seconds grow as tokens^{law['seconds']['exponent']:.2f}, memory as tokens^" in text
    assert ", from 5 to 10 tokens\n" in text
    assert [axes.get_xlabel() for axes in scale.draw(result).axes[:3]] == ["images", "tokens", "blocks"]


def test_widest_scale_table_fits():
    row = {"tokens": 4097, "flops_per_image": 199.4e9, "seconds": 1234.5, "images_per_second": 12345.6, "of_peak": 1.0}
    row |= {"memory_bytes": 12_345_678_901, "work": "ViT-Ti/16, inference, batch 4"}
    rows = [{**row, "axis": axis, "x": x} for axis in scale.AGAINST for x in (1024, 1)]
    rows += [{"axis": "processes", "x": x, "work": "", "seconds": 1.2345, "images_per_second": 12345.6, "speed": 1.81}
             for x in scale.ARRANGEMENTS]  # fmt: skip
    law = {"exponent": -1.23, "factor": 1.0, "from": 1024, "to": 4097}
    growth = {axis: {"against": x, "seconds": law, "memory_bytes": law} for axis, x in scale.AGAINST.items()}
    assert max(map(len, scale.show({"rows": rows, "growth": growth}).splitlines())) <= 80


@pytest.mark.slow
def test_two_processes_train_together():
    assert 0 < scale.train_in_processes(2, 1, steps=2) < 60


def test_merging(args, tmp_path, monkeypatch):
    """Accuracy and speed of a model of three colours, and speed of another; which of its tokens merge shows nowhere."""
    folder = save_trained(colour_model(image_size=32), tmp_path / "model")
    pictures = {"red": [RED] * 5, "green": [GREEN, RED], "blue": [BLUE] * 3}  # one is named wrongly
    for split in ("train", "test"):
        paint_folder(tmp_path / "data" / split, **pictures)
    monkeypatch.setattr(merging, "PACKAGED_MODEL", folder)
    monkeypatch.setattr(merging, "BATCH", 4)
    other = cases.Case("other", "tiny", 2, fields={**SMALL, "image_size": 32})
    monkeypatch.setattr(merging, "CASES", [other, cases.Case("long", "base", 2, quick=False)])
    args.dataset_name = str(tmp_path / "data")
    result, threads = merging.measure(args), torch.get_num_threads()
    assert torch.get_num_threads() == threads
    ours = [row for row in result["rows"] if row["case"] == merging.PACKAGED]
    assert [(row["r"], row["patches_left"]) for row in ours] == [(0, 16), (2, 14), (4, 12), (6, 10), (8, 8)]
    for row in ours:
        assert row["accuracy"] == 0.9 and row["change"] == 0.0
        assert row["images_per_second"] == pytest.approx(4 / np.median(row["samples"]))
        assert row["speed"] == pytest.approx(np.median(np.divide(ours[0]["samples"], row["samples"])))
    assert {row["case"] for row in result["rows"]} == {merging.PACKAGED, "other"}
    assert not any("accuracy" in row for row in result["rows"] if row["case"] == "other")
    text = merging.show(result)
    assert max(map(len, text.splitlines())) <= 80
    assert "90.00%" in text and "Accuracy on 10 images of" in text
    assert merging.draw(result).axes[0].get_ylabel() == "accuracy (%)"

    args.dataset_name = "digits"  # which the model does not know
    result = merging.measure(args)
    assert "Accuracy was not measured: the model does not know 10 of" in " ".join(merging.show(result).split())
    assert merging.draw(result).axes[-1].get_xlabel() == "speed over that without merging"


def test_inference(args, tmp_path, monkeypatch):
    """Accuracy and speed of a model of three colours in each way, and why others are missing."""
    folder = save_trained(colour_model(image_size=32), tmp_path / "model")
    for split in ("train", "test"):
        paint_folder(tmp_path / "data" / split, red=[RED] * 5, green=[GREEN, RED], blue=[BLUE] * 3)

    def load(checkpoint, device, quantize=None, **options):
        predictor = Predictor(checkpoint, device)
        if quantize:  # a way that says green of red, blue of green and red of blue
            weight = predictor.model.classifier.weight
            weight.data = weight.data.roll(1, 0)
        return predictor

    monkeypatch.setattr(inference, "PACKAGED_MODEL", folder)
    monkeypatch.setattr(inference, "BATCH", 4)
    monkeypatch.setattr(inference, "load_for_inference", load)
    args.dataset_name = str(tmp_path / "data")
    result = inference.measure(args)
    ways = [row["name"] for row in result["rows"] if row["case"] == inference.PACKAGED]
    assert ways == ["float32", "int8"]
    assert result["absent"]["bfloat16"] == "this device has no fast units for it"
    assert result["absent"]["int8, compiled"] == "left out of quick runs"
    ours = dict(zip(ways, result["rows"], strict=False))
    assert (ours["float32"]["accuracy"], ours["float32"]["change"]) == (0.9, 0.0)
    # Only of the red image among the greens it is right now.
    assert (ours["int8"]["accuracy"], ours["int8"]["change"]) == (0.1, pytest.approx(-0.8))
    for row in result["rows"]:
        first = next(other for other in result["rows"] if other["case"] == row["case"])
        assert row["speed"] == pytest.approx(np.median(np.divide(first["samples"], row["samples"])))
    text = inference.show(result)
    assert max(map(len, text.splitlines())) <= 80
    assert "-80.00%" in text and "Not measured: bfloat16 (this device has no fast units for it)" in text
    assert inference.draw(result).axes[-1].get_xlabel() == "speed over that of float32"


def test_patches_left_by_the_rule_of_each_block():
    config = ViTScratchConfig.preset("base")
    assert merging.merged_a_block(config) == [0, 4, 8, 12, 16]
    assert [merging.patches_left(config, r) for r in (0, 16, 98)] == [196, 10, 1]  # of 20, and of 2, half


def test_race_is_run_once_and_goes_on_where_it_stopped(args, monkeypatch):
    import finetune

    started, main = [], finetune.main
    monkeypatch.setattr(finetune, "main", lambda argv: started.append(argv) or main(argv))
    result = race.measure(args)
    teaching, ours, record = result["rows"]
    names = ["teaching_adamw.yaml", "showcase.yaml", "cpu80.yaml"]
    assert [argv[0].rpartition("/")[2] for argv in started] == names
    assert [row["name"] for row in result["rows"]] == list(race.RACE)
    assert teaching["parameters"] == ours["parameters"] == 847_626 > record["parameters"] and teaching["epochs"] == 2
    for row in result["rows"]:
        seconds, accuracy = result["curves"][row["name"]].values()
        assert len(seconds) == len(accuracy) == 2
        assert 0 < seconds[0] < seconds[1] <= row["seconds"] + 1e-3
    assert teaching["seconds_to_goal"] in result["curves"]["teaching protocol"]["seconds"]
    assert race.draw(result).axes[0].get_xlabel() == "CPU seconds of training"

    assert race.measure(args) == result
    assert len(started) == 3

    folder = race.run_recipe("teaching protocol", args)
    (folder / "metrics.json").unlink()  # as if it had been interrupted at the end
    again = race.measure(args)
    assert started[3][-2:] == ["--resume_from_checkpoint", "last"]
    assert again["curves"] == result["curves"]

    args.race_options = [*args.race_options, "--seed", "1"]
    monkeypatch.setattr(finetune, "main", lambda argv: 130)
    with pytest.raises(KeyboardInterrupt):  # another run, not the one that lies there
        race.measure(args)


def test_race_says_who_is_sooner():
    rows = [{"name": name, "dataset": "CIFAR-10", "parameters": 847_626, "accuracy": 0.66} for name in race.RACE]
    rows[0] |= {"epochs": 50.0, "seconds": 2791.4, "seconds_to_goal": 2700.0}
    rows[1] |= {"epochs": 8.0, "seconds": 302.0, "seconds_to_goal": 300.0}
    rows[2] |= {"epochs": 8.0, "seconds": 500.0, "seconds_to_goal": 270.0}
    text = race.show({"rows": rows, "goal": 0.67, "unit": "CPU seconds"})
    flat = " ".join(text.split())
    assert "The default recipe is there 9.0 times sooner. The record of CPU-80 is there 10.0 times sooner." in flat
    assert max(map(len, text.splitlines())) <= 80
    rows[1]["seconds_to_goal"] = rows[2]["seconds_to_goal"] = None
    text = race.show({"rows": rows, "goal": 0.67, "unit": "CPU seconds"})
    assert "sooner" not in text and "never" in text


# -- the command -------------------------------------------------------------------------------------------------------


def test_command_writes_tables_numbers_and_charts(args, monkeypatch, capsys):
    def fails(args):
        raise ValueError("there is no such thing.")

    monkeypatch.setattr(benchmark, "parse", lambda argv: args)
    monkeypatch.setattr(scale, "measure", fails)
    args.sections = ["scale", "model", "data"]
    assert benchmark.main([]) == 1  # scale failed, the others were measured
    output = capsys.readouterr()
    assert "benchmark.py: scale: there is no such thing." in output.err
    assert f"torch {torch.__version__}" in output.out.replace("\n", " ")
    assert "of a training step" in output.out
    assert max(map(len, output.out.splitlines())) <= 80
    assert {path.name for path in args.output.iterdir()} == {
        f"{section}.{suffix}" for section in ("model", "data") for suffix in ("json", "png", "svg")
    }
    saved = json.loads((args.output / "data.json").read_text())
    assert saved["environment"]["versions"]["torch"] == torch.__version__
    assert saved["quick"] is True

    args.json, args.sections = True, ["data"]
    assert benchmark.main([]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == ["data"]
    assert all(math.isfinite(row["images_per_second"]) for row in printed["data"]["rows"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sections", "model,moddel"], "'moddel' is none of model, data"),
        (["--device", "toaster"], "--device (toaster) must be cpu or cuda;"),
        (["--device", "cuda:0"], "--device (cuda:0) is not there; use cpu;"),
    ],
)
def test_usage_errors(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        benchmark.main(argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_unwritable_output(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert benchmark.main(["--device", "cpu", "--output", str(tmp_path / "file")]) == 2
    assert re.fullmatch(r"benchmark.py: .*File exists.*\n", capsys.readouterr().err)


def test_help_describes_every_section():
    assert [name for name in benchmark.SECTIONS if f"\n  {name} " not in benchmark.__doc__] == []


def test_default_sections_are_all_but_the_long_one():
    assert benchmark.parse([]).sections == ["model", "data", "photos", "step", "trainer", "memory", "scale"]
    assert benchmark.parse(["--sections", "all"]).sections == list(benchmark.SECTIONS)
    assert len(benchmark.parse(["--quick", "--device", "cpu"]).cases) < len(cases.WORK["cpu"])
