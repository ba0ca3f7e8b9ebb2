"""A model, ours or a peer's, and what is done with it: inference or a training step."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.evaluation.acceleration import suit_attention
from modeling_vit_scratch.evaluation.devices import can_compile, has_fast_bfloat16

from . import peers
from .measuring import OURS, PeakMemory


@dataclass(frozen=True)
class Case:
    """A model, and what is done with it: inference, or a training step (forward, backward, AdamW).

    Args:
        title: In words.
        preset: Of `ViTScratchConfig`.
        batch: Number of images.
        training: A training step instead of inference.
        fields: Of the config, where they differ from the preset's.
        bf16: bfloat16 instead of float32: of the weights too in inference, by autocast in training.
        compiled: By `torch.compile`.
        quick: Whether it is measured in quick mode too.
    """

    title: str
    preset: str
    batch: int
    training: bool = False
    fields: dict = field(default_factory=dict)
    bf16: bool = False
    compiled: bool = False
    quick: bool = True

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def config(self) -> ViTScratchConfig:
        # N(0, 1 / fan_in) is drawn faster than the default, and the outputs are larger.
        return ViTScratchConfig.preset(self.preset, initializer_range="fan_in", **self.fields)


CLASS_TOKEN = {"use_cls_token": True, "pooling": "cls", "use_final_norm": True}
SHOWCASE = Case("showcase, training, batch 64", "showcase", 64, training=True)
WORK = {
    "cpu": [
        Case("ViT-B/16, inference, batch 1", "base", 1),
        Case("ViT-B/16, inference, batch 8", "base", 8, quick=False),
        Case("ViT-Ti/16, inference, batch 64", "tiny", 64, quick=False),
        Case("ViT-B/16, training, batch 8", "base", 8, training=True, quick=False),
        SHOWCASE,
        Case("showcase + class token, training, batch 64", "showcase", 64, True, CLASS_TOKEN),
    ],
    "cuda": [
        *(Case(f"ViT-B/16, inference, batch {batch}", "base", batch) for batch in (1, 8, 64, 256)),
        *(Case(f"ViT-B/16, training, batch {batch}", "base", batch, training=True) for batch in (8, 64, 256)),
        Case("showcase, training, batch 256", "showcase", 256, training=True),
    ],
}
# On a CPU compiling takes longer than what it gains; two cases show it.
COMPILED_ON_CPUS = ("ViT-B/16, inference, batch 8", SHOWCASE.title)


def cases_for(device: torch.device, quick: bool) -> list[Case]:
    """What is measured on a device, in the types that are fast there.

    On CPUs in float32 and, where they have units for it, in bfloat16, and two of these compiled too; on GPUs in
    bfloat16, compiled and not. In quick mode nothing is compiled on a CPU.
    """
    on_gpu, cases = device.type == "cuda", []
    for case in (case for case in WORK[device.type] if case.quick or not quick):
        types = [True] if on_gpu else [False, True] if has_fast_bfloat16(device) else [False]
        compile_too = on_gpu or (case.title in COMPILED_ON_CPUS and not quick and can_compile(device))
        for compiled, bf16 in itertools.product([False, True] if compile_too else [False], types):
            title = f"{case.title}, {'bfloat16' if bf16 else 'float32'}{', compiled' if compiled else ''}"
            cases.append(replace(case, title=title, bf16=bf16, compiled=compiled))
    return cases


def make_model(case: Case, name: str) -> torch.nn.Module:
    """The model of a contestant, in evaluation mode, with the same weights for all that can have them.

    Raises:
        ImportError, ValueError: As `peers.make_peer`.
    """
    torch.manual_seed(0)
    ours = ViTScratchForImageClassification(case.config).eval()
    torch.nn.init.normal_(ours.classifier.weight, std=0.1)  # from zero, as it starts, all outputs would agree
    return ours if name == OURS else peers.make_peer(name, ours).eval()


def make_models(case: Case) -> tuple[dict[str, torch.nn.Module], dict[str, str]]:
    """Our model and those of the peers that have its geometry, and why others do not import."""
    models, reasons = {OURS: make_model(case, OURS)}, {}
    for name in tqdm(peers.PEERS, desc=f"{case.title}: making models", unit="model", delay=2, leave=False):
        try:
            models[name] = peers.make_peer(name, models[OURS]).eval()
        except ImportError as error:
            reasons[name] = str(error)
        except ValueError:  # another geometry
            continue
    return models, reasons


def logits_of(output) -> torch.Tensor:
    return getattr(output, "logits", output)


@torch.inference_mode()
def difference(case: Case, model: torch.nn.Module, other: torch.nn.Module) -> float:
    """The largest difference of two models' logits on two images, over the largest logit."""
    pixels = torch.randn(2, case.config.num_channels, *case.config.image_hw)
    ours, theirs = (logits_of(m(pixels)) for m in (model, other))
    return float((ours - theirs).abs().max() / ours.abs().max())


def make_step(case: Case, model: torch.nn.Module, device: torch.device) -> Callable[[], object]:
    """What is timed: one inference, or one training step, on random images."""
    config = case.config
    pixels = torch.randn(case.batch, config.num_channels, *config.image_hw, device=device)
    labels = torch.randint(config.num_labels, (case.batch,), device=device)
    model = model.to(device, torch.float32 if case.training else case.dtype).train(case.training)
    if case.bf16 and isinstance(model, ViTScratchForImageClassification):
        suit_attention(model, device, case.training)  # as a run and `load_for_inference` do
    forward = torch.compile(model) if case.compiled else model
    if not case.training:
        pixels = pixels.to(case.dtype)

        def infer():
            with torch.inference_mode():
                forward(pixels)

        return infer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def train():
        with torch.autocast(device.type, torch.bfloat16, enabled=case.bf16):
            logits = logits_of(forward(pixels))
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return train


def peak_memory(case: Case, name: str) -> int | None:
    """Most memory, in bytes, of a contestant's model and what it computes; on the CPU, in a fresh process."""
    memory = PeakMemory()
    step = make_step(case, make_model(case, name), torch.device("cpu"))
    with memory:
        started, steps = time.perf_counter(), 0
        while steps < 2 or time.perf_counter() < started + 0.3:
            step()
            steps += 1
    return memory.bytes
