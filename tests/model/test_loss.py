"""The loss of each problem type, and under Trainer."""

import warnings

import pytest
import torch
from small_models import TINY, equal, images, make
from torch import nn
from transformers import Trainer, TrainingArguments

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch import modeling_vit_scratch as modeling


def loss_of(logits, labels, problem_type=None, **kwargs):
    config = ViTScratchConfig(**{**TINY, "num_labels": max(logits.shape[1], 2)}, problem_type=problem_type)
    return modeling.image_classification_loss(labels, logits, config, **kwargs)


def test_loss_from_class_indices():
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    expected = -logits.log_softmax(-1)[range(6), labels].mean()
    for problem in (None, "single_label_classification"):
        equal(loss_of(logits, labels, problem), expected, 1e-6)
        equal(loss_of(logits, labels.reshape(6, 1), problem), expected, 1e-6)
        equal(loss_of(logits, labels.to(torch.uint8).long(), problem), expected, 1e-6)


def test_loss_from_class_probabilities():
    logits, labels = torch.randn(6, 5), torch.rand(6, 5).softmax(-1)
    equal(loss_of(logits, labels), -(labels * logits.log_softmax(-1)).sum(-1).mean(), 1e-6)
    indices = torch.arange(6) % 5
    one_hot = nn.functional.one_hot(indices, 5).float()
    equal(loss_of(logits, one_hot), loss_of(logits, indices), 1e-6)
    mixed = 0.3 * one_hot + 0.7 * one_hot.flip(0)
    expected = 0.3 * loss_of(logits, indices) + 0.7 * loss_of(logits, indices.flip(0))
    equal(loss_of(logits, mixed), expected, 1e-6)
    equal(loss_of(logits, mixed.to(torch.bfloat16)), expected, 2e-2)


def test_loss_of_several_labels():
    logits, labels = torch.randn(6, 5), (torch.rand(6, 5) > 0.5).float()
    p = logits.sigmoid()
    expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    equal(loss_of(logits, labels, "multi_label_classification"), expected, 1e-6)
    equal(loss_of(logits, labels.long(), "multi_label_classification"), expected, 1e-6)


def test_loss_of_regression():
    logits, labels = torch.randn(6, 5), torch.randn(6, 5)
    equal(loss_of(logits, labels, "regression"), (logits - labels).square().mean(), 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no broadcasting of (B,) against (B, 1)
        for problem in (None, "regression"):
            for target in (labels[:, 0], labels[:, :1]):
                loss = loss_of(logits[:, :1], target, problem)
                equal(loss, (logits[:, 0] - labels[:, 0]).square().mean(), 1e-6)


def test_loss_refuses_labels_that_do_not_fit():
    logits = torch.randn(6, 5)
    for labels, problem in [
        (torch.randn(6), None),
        (torch.rand(6, 4).softmax(-1), None),
        (torch.rand(6, 4), "multi_label_classification"),
        (torch.rand(6), "regression"),
    ]:
        with pytest.raises(ValueError, match=r"shape .* neither class indices .*\(6,\)\) nor .*\(6, 5\)"):
            loss_of(logits, labels, problem)
    with pytest.raises(ValueError, match="multi_label_classification"):
        loss_of(logits, torch.ones(6, 5))
    equal(
        loss_of(logits, torch.ones(6, 5), "single_label_classification"), -logits.log_softmax(-1).sum(-1).mean(), 1e-5
    )


def test_loss_in_half_precision_is_computed_in_float32():
    logits, labels = torch.randn(6, 5), torch.arange(6) % 5
    half = loss_of(logits.to(torch.bfloat16), labels)
    assert half.dtype == torch.float32
    equal(half, loss_of(logits.to(torch.bfloat16).float(), labels))


def test_the_loss_can_be_replaced_and_gets_what_forward_was_given():
    """As transformers' own models hand it on, so that a loss written for them fits."""
    model, given = make(ViTScratchForImageClassification), {}

    def loss(labels, logits, config, num_items_in_batch=None, **kwargs):
        given.update(labels=labels, config=config, num_items_in_batch=num_items_in_batch)
        return logits.sum()

    model.loss_function = loss
    labels = torch.tensor([1, 2, 3])
    outputs = model(images(model), labels=labels, num_items_in_batch=12)
    equal(outputs.loss, outputs.logits.sum())
    assert given == {"labels": labels, "config": model.config, "num_items_in_batch": 12}


def test_problem_types_through_the_model():
    for problem, count, dtype in [
        ("multi_label_classification", 2, torch.float),
        ("regression", 1, torch.float),
        ("regression", 3, torch.float),
        (None, 1, torch.float),
        (None, 4, torch.long),
    ]:
        model = make(ViTScratchForImageClassification, num_labels=count, problem_type=problem).train()
        shape = (3,) if dtype == torch.long else (3, count)
        outputs = model(images(model), labels=torch.ones(shape, dtype=dtype))
        assert outputs.logits.shape == (3, count)
        outputs.loss.backward()


class SixteenImages(torch.utils.data.Dataset):
    """The same ones each time, with class indices or probabilities."""

    def __init__(self, soft=False):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(16, 3, 16, 16, generator=generator)
        self.labels = torch.randint(5, (16,), generator=generator)
        if soft:
            self.labels = torch.randn(16, 5, generator=generator).softmax(-1)

    def __len__(self):
        return 16

    def __getitem__(self, i):
        return {"pixel_values": self.pixels[i], "labels": self.labels[i]}


def trained(output, batch, accumulate, soft=False, **arguments):
    """Weights after the stock Trainer's SGD over the sixteen images, in order."""
    model = make(ViTScratchForImageClassification)
    arguments = TrainingArguments(
        output_dir=output,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=2,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="sgd",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1,
        **arguments,
    )
    trainer = Trainer(model, arguments, train_dataset=SixteenImages(soft))
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {name: p.detach() for name, p in model.named_parameters()}, losses


@pytest.mark.parametrize("soft", [False, True])
def test_trainer_gives_the_same_weights_with_1_and_4_accumulation_steps(soft, tmp_path):
    one, one_losses = trained(tmp_path, 8, 1, soft)
    four, four_losses = trained(tmp_path, 2, 4, soft)
    start = dict(make(ViTScratchForImageClassification).named_parameters())
    assert len(one_losses) == len(four_losses) == 4
    for name in one:
        equal(four[name], one[name], 2e-5)
    assert max((one[name] - start[name]).abs().max() for name in one) > 1e-2
    assert one_losses == pytest.approx(four_losses, abs=1e-4)
    data = SixteenImages(soft)
    with torch.no_grad():
        first = make(ViTScratchForImageClassification)(data.pixels[:8], labels=data.labels[:8]).loss
    assert one_losses[0] == pytest.approx(first.item(), abs=1e-4)  # not divided by the number of classes


def test_trainer_takes_only_labels_for_labels(tmp_path):
    arguments = TrainingArguments(output_dir=tmp_path, report_to="none", use_cpu=True)
    assert Trainer(make(ViTScratchForImageClassification), arguments).label_names == ["labels"]
