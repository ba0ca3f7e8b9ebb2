"""Muon against plain references, parameter groups, the weight average, and all of it in a run."""

import json

import pytest
import torch
from runs import fork_run, history, load_script, options, wait_all, weights
from safetensors.torch import load_file, save_file
from transformers import get_scheduler

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.data import splits as splits_module
from modeling_vit_scratch.data.augmentation import normalize
from modeling_vit_scratch.training import ImageTrainer, ImageTrainingArguments, checkpoints, optimization
from modeling_vit_scratch.training import models as models_module
from modeling_vit_scratch.training import schedule as schedule_module
from modeling_vit_scratch.training.optimization import Muon, WeightAverage, orthogonalize, parameter_groups
from modeling_vit_scratch.training.trainer import TRAINED_WEIGHTS

finetune = load_script("finetune")


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """The same numbers on every machine."""
    monkeypatch.setattr(optimization, "has_fast_bfloat16", lambda device: False)


def one_matrix(matrix: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz on one matrix, written out."""
    if matrix.shape[0] > matrix.shape[1]:
        return one_matrix(matrix.T).T
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8)])
def test_orthogonalized_matrices_keep_their_directions_and_lose_their_scales(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1)
    result = orthogonalize(matrices)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.3 and values.max() < 1.3
    for matrix, found in zip(matrices, result, strict=True):
        torch.testing.assert_close(found, one_matrix(matrix), atol=1e-4, rtol=1e-4)
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        turned = u.T @ found @ vh.T  # diagonal where the singular vectors are the matrix's own
        assert (turned - turned.diagonal().diag()).abs().max() < 1e-3


def test_muon_steps_are_the_written_out_ones_with_q_k_and_v_on_their_own():
    torch.manual_seed(0)
    fused, kernel, bias = torch.randn(12, 4), torch.randn(8, 2, 3, 3), torch.randn(5)
    ours = [torch.nn.Parameter(tensor.clone()) for tensor in (fused, kernel, bias)]
    adamw = torch.nn.Parameter(bias.clone())
    optimizer = Muon(
        [
            {"params": [ours[0]], "lr": 0.1, "weight_decay": 0.5, "parts": 3},
            {"params": [ours[1]], "lr": 0.2, "weight_decay": 0.0, "parts": 1},
            {"params": [ours[2]], "lr": 0.3, "weight_decay": 0.1},
        ],
        momentum=0.9,
    )
    reference = torch.optim.AdamW([adamw], lr=0.3, weight_decay=0.1)
    momenta = [torch.zeros(12, 4), torch.zeros(8, 18)]
    for _ in range(3):
        gradients = [torch.randn_like(p) for p in ours]
        for p, gradient in zip([*ours, adamw], [*gradients, gradients[2]], strict=True):
            p.grad = gradient.clone()
        optimizer.step()
        reference.step()
        for i, (parts, rate, decay) in enumerate(((3, 0.1, 0.5), (1, 0.2, 0.0))):
            gradient = gradients[i].flatten(1)
            momenta[i] = 0.9 * momenta[i] + 0.1 * gradient
            update = torch.cat([one_matrix(part) for part in (0.9 * momenta[i] + 0.1 * gradient).chunk(parts)])
            wide = max(1, update.shape[0] / parts / update.shape[1]) ** 0.5
            if i == 0:
                fused = (1 - rate * decay) * fused - rate * wide * update
            else:
                kernel = kernel - rate * wide * update.view_as(kernel)
        torch.testing.assert_close(ours[0].data, fused, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours[1].data, kernel, atol=1e-4, rtol=1e-4)
        assert torch.equal(ours[2], adamw)


def test_muon_goes_on_from_its_saved_state():
    def start():
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(4))]
        return parameters, Muon([{"params": parameters[:1], "parts": 1}, {"params": parameters[1:]}], lr=0.1)

    def steps(parameters, optimizer, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            for p in parameters:
                p.grad = torch.randn_like(p)
            optimizer.step()

    whole, optimizer = start()
    steps(whole, optimizer, range(4))
    first, optimizer = start()
    steps(first, optimizer, range(2))
    second, resumed = start()
    resumed.load_state_dict(optimizer.state_dict())
    for p, q in zip(second, first, strict=True):
        p.data.copy_(q.data)
    steps(second, resumed, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(second, whole, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_with_infinite_gradients_is_skipped_in_float16(fused):
    """The fused AdamW would leave that to itself; Muon's weights would be lost."""
    matrix, bias = torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(4))
    optimizer = Muon([{"params": [matrix], "parts": 1}, {"params": [bias]}], lr=0.1, fused=fused)
    before, scaler = [p.detach().clone() for p in (matrix, bias)], torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(matrix.sum() * float("inf") + bias.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(matrix, before[0]) and torch.equal(bias, before[1])
    optimizer.zero_grad()
    scaler.scale(matrix.sum() + bias.sum()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(bias.detach(), before[1] * (1 - 0.1 * 0.01) - 0.1)  # AdamW's first step is its rate
    assert not torch.equal(matrix, before[0]) and matrix.isfinite().all()


def test_muon_takes_the_matrices_of_blocks_and_nothing_else():
    model = ViTScratchForImageClassification(ViTScratchConfig.preset("showcase", use_final_norm=True))
    args = ImageTrainingArguments("unused", use_cpu=True, muon_learning_rate=0.02, layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, args)
    found = {names[id(p)]: (group.get("parts"), group["lr"]) for group in groups for p in group["params"]}
    assert set(found) == set(names.values())
    muon = {name: value for name, value in found.items() if value[0] is not None}
    assert muon == {
        f"vit.layers.{i}.{part}.weight": (3 if part == "attention.qkv" else 1, 0.02 * 0.5 ** (1 - i))
        for i in range(2)
        for part in ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
    }
    text = optimization.describe_groups(groups, "adamw_torch")
    assert "Muon, 0.01 to 0.02" in text and "8 tensors" in text and f"{len(found) - 8} tensors" in text


def test_weight_average_is_the_recurrence_and_swaps(tmp_path):
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    average = WeightAverage(model, decay=0.3)
    expected = model.weight.detach().clone()
    for step, decay in ((1, 2 / 11), (2, 3 / 12), (3, 0.3), (4, 0.3)):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        average.update(step)
        expected = decay * expected + (1 - decay) * model.weight.detach()
    trained = model.weight.detach().clone()
    save_file(average.trained(), tmp_path / "trained")
    average.swap()
    torch.testing.assert_close(model.weight.detach(), expected)
    other = torch.nn.Linear(3, 2)
    other.bias.requires_grad_(False)
    other.load_state_dict(model.state_dict())  # as from a checkpoint, whose main file has the average
    resumed = WeightAverage(other, decay=0.3)
    resumed.load(tmp_path / "trained")
    assert torch.equal(other.weight, trained)
    average.swap()
    assert torch.equal(model.weight, trained)
    resumed.swap()
    torch.testing.assert_close(other.weight.detach(), expected)


def test_the_average_is_what_is_measured_saved_and_kept(tmp_path):
    """A decay of almost 1 keeps weights that hardly move, and a run's files and numbers are of these."""
    argv = options(tmp_path / "a", ema_decay=0.5, eval_strategy="epoch", learning_rate=0.05)
    assert finetune.main(argv) == 0
    last = checkpoints.list_checkpoints(tmp_path / "a")[0]
    average, trained = weights(last), load_file(last / TRAINED_WEIGHTS)
    assert any(not torch.equal(average[name], tensor) for name, tensor in trained.items())
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    again = options(
        tmp_path / "b", model_name_or_path=tmp_path / "a", config_overrides=None, learning_rate=1e-12, max_steps=1
    )
    assert finetune.main(again) == 0
    measured = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert measured["validation"]["accuracy"] == metrics["validation"]["accuracy"]
    assert measured["validation"]["loss"] == pytest.approx(metrics["validation"]["loss"], abs=1e-5)


def test_without_validation_the_run_ends_with_the_average(tmp_path):
    assert finetune.main(options(tmp_path, ema_decay=0.9, eval_strategy="no", learning_rate=0.05)) == 0
    last = weights(checkpoints.list_checkpoints(tmp_path)[0])
    assert all(torch.equal(tensor, last[name]) for name, tensor in weights(tmp_path).items())


AVERAGED = {"ema_decay": 0.9, "muon_learning_rate": 0.02, "num_train_epochs": 1}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """The folder of a finished run with Muon and averaged weights."""
    folder = tmp_path_factory.mktemp("averaged")
    assert finetune.main(options(folder, **AVERAGED)) == 0
    return folder


@pytest.mark.parametrize(
    "other", [{"ema_decay": None}, {"muon_learning_rate": None}, {"optim": "adamw_torch"}, {"freeze_backbone": True}]
)
def test_resuming_with_another_optimiser_or_average_is_refused(averaged, capsys, other):
    assert finetune.main(options(averaged, **{**AVERAGED, **other}, resume_from_checkpoint="last")) == 2
    assert next(iter(other)) in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_learn_with_muon_as_one_does(tmp_path):
    """Equal but for rounding, in float32 and without dropout."""
    settings = {"muon_learning_rate": 0.02, "ema_decay": 0.9, "horizontal_flip": 0, "crop_padding": 0, "max_steps": 6}
    one = options(tmp_path / "one", **settings, per_device_train_batch_size=16, optim="adamw_torch")
    two = options(tmp_path / "two", **settings, per_device_train_batch_size=8, optim="adamw_torch")
    assert wait_all(fork_run(one, 1, tmp_path / "log1")) == [0]
    assert wait_all(fork_run(two, 2, tmp_path / "log2")) == [0, 0], (tmp_path / "log2.0").read_text()[-2000:]
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in a.items():
        if "qkv.bias" not in name:  # a key's bias has no true gradient, and AdamW amplifies the rounding
            torch.testing.assert_close(tensor, b[name], atol=2e-4, rtol=0)


def test_augmentations_reach_the_model_and_stop_when_they_are_told(tmp_path, monkeypatch):
    """Mixed labels until half of the run, then plain images and class numbers."""
    seen = []
    compute_loss = ImageTrainer.compute_loss

    def noted(self, model, inputs, *args, **kwargs):
        seen.append(inputs)
        return compute_loss(self, model, dict(inputs), *args, **kwargs)

    monkeypatch.setattr(ImageTrainer, "compute_loss", noted)
    argv = options(
        tmp_path, rand_augment=2, random_erasing=0.5, mixup_alpha=0.4, cutmix_alpha=1.0, augment_until=0.5,
        eval_strategy="no", num_train_epochs=2, horizontal_flip=0.5, crop_padding=1,
    )  # fmt: skip
    assert finetune.main(argv) == 0
    steps = 10
    del seen[steps:]  # of the measurements at the end
    assert all(batch["labels"].is_floating_point() for batch in seen[: steps // 2])
    assert not any(batch["labels"].is_floating_point() for batch in seen[steps // 2 :])
    written = json.loads((tmp_path / "metrics.json").read_text())["training"]["augmentation"]
    assert written["rand_augment"] == 2 and written["until"]["mixup"] == 0.5
    processor = models_module.make_processor(ViTScratchConfig.preset("showcase"))
    splits = splits_module.load_splits("digits", processor, num_channels=3, max_train_samples=320)
    plain = normalize(splits.train.images, splits.mean, splits.std).flatten(1)
    last = seen[-1]["pixel_values"].flatten(1)
    nearest = [(plain - image).abs().amax(1).min() for image in last]
    assert max(nearest) < 1e-5  # each is one of the images as it is
    assert min((plain - image).abs().amax(1).min() for image in seen[0]["pixel_values"].flatten(1)) > 0.1


def test_flip_tta_stands_beside_the_plain_accuracy(tmp_path, capsys):
    assert finetune.main(options(tmp_path, num_train_epochs=1, flip_tta=True)) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    plain = [line.split(",") for line in (tmp_path / "predictions_test.csv").read_text().splitlines()[1:]]
    assert metrics["test"]["accuracy"] == pytest.approx(sum(row[1] == row[2] for row in plain) / 64)
    model = ViTScratchForImageClassification.from_pretrained(tmp_path).eval()
    splits = splits_module.load_splits(
        "digits", models_module.make_processor(model.config), num_channels=3, max_eval_samples=64
    )
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    images = normalize(splits.test.images, processor["image_mean"], processor["image_std"])
    with torch.no_grad():
        both = (model(images).logits + model(images.flip(-1)).logits).argmax(1)
    assert metrics["test"]["flip_tta_accuracy"] == pytest.approx((both == splits.test.labels).float().mean().item())
    assert f"{metrics['test']['flip_tta_accuracy']:.2%}" in capsys.readouterr().out


def test_warmup_stable_decay_takes_shares_of_the_training(tmp_path):
    argv = options(
        tmp_path, lr_scheduler_type="warmup_stable_decay", warmup_steps=0.2, logging_steps=1, learning_rate=1e-2,
        lr_scheduler_kwargs='{"num_decay_steps": 0.4, "decay_type": "linear"}',
    )  # fmt: skip
    assert finetune.main(argv) == 0
    rates = [float(row["learning_rate"]) for row in history(tmp_path) if row["loss"]]
    assert rates == pytest.approx([0, 0.005, 0.01, 0.01, 0.01, 0.01, 0.01, 0.0075, 0.005, 0.0025])


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_schedules_that_follow_a_metric_know_which_way_is_better(name, metric):
    args = ImageTrainingArguments(
        "unused", use_cpu=True, lr_scheduler_type=name, metric_for_best_model=metric,
        lr_scheduler_kwargs={"patience": 1, "factor": 0.5},
    )  # fmt: skip
    schedule_module.settle_schedule(args, 5)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    schedule = get_scheduler(name, optimizer, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    for step in range(4):  # better each time
        schedule.step(0.1 * step if metric == "accuracy" else -0.1 * step)
    assert optimizer.param_groups[0]["lr"] >= 0.1


def test_bad_settings_are_refused():
    for settings, words in (
        ({"muon_learning_rate": 0.02, "optim": "sgd"}, "sgd"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"time_budget": "never"}, "time_budget"),
        ({"muon_learning_rate": -0.02}, r"muon_learning_rate \(-0.02\)"),
        ({"head_learning_rate": float("nan")}, "head_learning_rate"),
        ({"gradient_accumulation_steps": 0}, r"gradient_accumulation_steps \(0\) must be at least 1"),
        ({"metric_for_best_model": "f1"}, r"metric_for_best_model \('f1'\) is unknown; use one of loss, accuracy"),
        ({"eval_do_concat_batches": False}, r"eval_do_concat_batches \(False\) does not go with"),
        ({"restore_callback_states_from_checkpoint": True}, "restore_callback_states_from_checkpoint"),
    ):
        with pytest.raises(ValueError, match=words):
            ImageTrainingArguments("unused", use_cpu=True, **settings)
    args = ImageTrainingArguments("unused", use_cpu=True, lr_scheduler_kwargs={"power_of": 2})
    with pytest.raises(ValueError, match=r"lr_scheduler_kwargs .*power_of"):
        schedule_module.settle_schedule(args, 5)
    # The library's own prefix is taken, and means the same.
    args = ImageTrainingArguments("unused", use_cpu=True, metric_for_best_model="eval_accuracy")
    assert (args.metric_for_best_model, args.greater_is_better) == ("accuracy", True)
