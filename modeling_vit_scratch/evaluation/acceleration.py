"""The fastest way in which this device runs a model, and a look at whether it is still the same model."""

import copy
import importlib.util
import logging
import tempfile
from pathlib import Path

import torch
from torch import nn

from .devices import can_compile, has_amx, has_fast_bfloat16, has_fast_int8
from .inference import COMPARED_IMAGES, Classify, Predictor
from .programs import FILES, missing_for_onnx, open_file, write_files

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE, INT8_TOLERANCE = 0.05, 0.2  # of a probability
# Of as many (384 pixels a side in patches of 16), maps of attention are a third of what a training step of ViT-B/16
# takes in memory; they grow with the square.
EAGER_PATCHES = 576


def load_for_inference(
    checkpoint: str | Path, *args, dtype: str = "auto", compile: bool = False, quantize: str | None = None, **kwargs
) -> Predictor:
    """A `Predictor` that runs as fast as its device allows.

        load_for_inference("runs/mine").classify(pixels)

    The first images also go through the model in float32, as many as `COMPARED_IMAGES`: a warning says if a
    probability differs by more than `TOLERANCE` (`INT8_TOLERANCE` of int8). Then the copy in float32 is dropped. A
    folder that was saved quantised is taken as it is, and there is nothing to compare it with.

    Args:
        checkpoint: As for `Predictor`, like `args` and `kwargs`.
        dtype: A key of `DTYPES`, or "auto": bfloat16 where the device has fast units for it (CPUs with AMX, or with
            AVX-512 BF16 that is not Intel's, and GPUs), float32 elsewhere. See `suit_attention`, too.
        compile: Whether `torch.compile` makes the model into one program, in the first call, which takes up to a
            minute. It pays on GPUs, and on CPUs beside the 8-bit integers of torchao.
        quantize: "int8": weights in 8 bits, what they multiply rounded to 8 bits as it comes. By torchao where PyTorch
            has units for it (CPUs with AVX-512 VNNI or AMX, and GPUs), of the blocks; by ONNX Runtime on other CPUs, of
            the whole model, which maps and hidden states are then not of: `__call__` gives those in float32.

    Raises:
        ValueError: As of `Predictor`; or the device has no such type, options exclude each other, or a package or a
            compiler is missing (the text names the extra).
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype ({dtype!r}) must be one of auto, {', '.join(DTYPES)}.")
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize ({quantize!r}) must be 'int8' or None.")
    predictor = Predictor(checkpoint, *args, **kwargs)
    device, model = predictor.device, predictor.model
    if predictor.computes_in != "float32":  # quantised when it was saved
        if dtype not in ("auto", "float32") or quantize is not None:
            raise ValueError(f"{predictor.name} was saved in {predictor.computes_in}: leave out dtype and quantize.")
        if compile:
            _require_compiler(device)
            predictor.engine = torch.compile(predictor.engine, dynamic=True)
            predictor.computes_in += ", compiled"
        return predictor
    by_onnx = quantize is not None and not has_fast_int8(device)
    _refuse(device, dtype, compile, quantize, by_onnx)
    chosen = DTYPES[dtype] if dtype != "auto" else torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    if by_onnx:
        chosen = torch.float32
    if chosen == torch.float32 and not compile and quantize is None:
        return predictor
    name = str(chosen).removeprefix("torch.")
    changed = chosen != torch.float32 or (quantize is not None and not by_onnx)
    reference = Classify(copy.deepcopy(model) if changed else model)
    model.to(chosen)
    if chosen == torch.bfloat16:
        suit_attention(model, device, training=False)
    if by_onnx:
        engine, name = _onnx_int8(predictor), "8-bit integers, by ONNX Runtime"
    else:
        if quantize is not None:
            _torchao_int8(model)
            name = f"8-bit integers, by torchao, and {name}"
        engine = torch.compile(predictor.engine, dynamic=True) if compile else predictor.engine
    predictor.computes_in = f"{name}, compiled" if compile else name
    predictor.engine = Compared(engine, reference, predictor, TOLERANCE if quantize is None else INT8_TOLERANCE)
    return predictor


def suit_attention(model: nn.Module, device: torch.device, training: bool):
    """Take the attention that is fastest in bfloat16 on this device.

    On a CPU that is eager attention (docs/results.md), although it keeps its maps, and rounds scores to bfloat16 too.
    Models made for more than `EAGER_PATCHES` patches stay as they are, and so does inference with AMX, where it was not
    measured. In float32 PyTorch's fused attention is faster.
    """
    h, w = model.config.grid_hw
    if device.type == "cpu" and h * w <= EAGER_PATCHES and (training or not has_amx(device)):
        model.set_attn_implementation("eager")


def _refuse(device: torch.device, dtype: str, compile: bool, quantize: str | None, by_onnx: bool):
    """Raise a ValueError for what cannot be had, or not together."""
    if dtype == "float16" and device.type == "cpu":
        raise ValueError("dtype float16 needs a GPU; on a CPU use bfloat16 or auto.")
    if by_onnx and device.type != "cpu":
        raise ValueError(f"quantize int8 needs a CPU, or a GPU of NVIDIA's since Ampere, not {device.type}.")
    if by_onnx and dtype not in ("auto", "float32"):
        raise ValueError(f"dtype {dtype} and quantize int8 exclude each other here: ONNX Runtime takes float32.")
    if by_onnx and compile:
        raise ValueError("compile and quantize int8 exclude each other on this CPU, where ONNX Runtime computes.")
    if by_onnx and missing_for_onnx():
        raise ValueError(
            f"quantize int8 needs {', '.join(missing_for_onnx())} on this CPU: pip install "
            "'modeling_vit_scratch[export]'."
        )
    if quantize and not by_onnx and importlib.util.find_spec("torchao") is None:
        raise ValueError("quantize int8 needs torchao here: pip install 'modeling_vit_scratch[quantize]'.")
    if compile:
        _require_compiler(device)


def _require_compiler(device: torch.device):
    if not can_compile(device):
        raise ValueError("compile needs a C++ compiler on a CPU: install g++, or leave it out.")


def _torchao_int8(model: nn.Module):
    """Make the blocks' matrices integers, with a scale for each output, and what they multiply, for each token."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model.vit.layers, Int8DynamicActivationInt8WeightConfig())


def _onnx_int8(predictor: Predictor):
    """The model as a program of ONNX Runtime's, with its matrices in 8 bits."""
    config = predictor.config
    outputs = ["features", "logits"]
    if not config.num_labels:  # without a classifier both are one tensor, which a program cannot return twice
        raise ValueError(f"quantize int8 needs a classifier on this CPU, and {predictor.name} has none.")
    example = torch.zeros(2, config.num_channels, *config.image_hw)
    with tempfile.TemporaryDirectory() as folder:
        write_files(Classify(predictor.model), example, Path(folder), ["ONNX", "ONNX int8"], 20, outputs)
        return open_file(Path(folder) / FILES["ONNX int8"])


class Compared:
    """An engine whose first images are given to the model in float32 too.

    Args:
        engine: Pixels -> what the classifier reads, and logits.
        reference: Likewise, in float32.
        predictor: Whose they are.
        tolerance: Of a probability.
    """

    def __init__(self, engine, reference: nn.Module, predictor: Predictor, tolerance: float):
        self.engine, self.reference, self.predictor, self.tolerance = engine, reference, predictor, tolerance

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled, logits = self.engine(pixels)
        predictor, self.predictor = self.predictor, None  # asked once; both may free memory
        if predictor is not None:
            reference, self.reference = self.reference, None
            if predictor.can_classify:
                expected = reference(pixels[:COMPARED_IMAGES])[1]
                self._say_if_different(predictor, logits[:COMPARED_IMAGES], expected)
        return pooled, logits

    def _say_if_different(self, predictor: Predictor, logits: torch.Tensor, expected: torch.Tensor):
        found, expected = map(predictor.probabilities, (logits.to(expected.device), expected))
        difference = (found - expected).abs().max().item()
        if not difference <= self.tolerance:  # NaN too
            same = (found.argmax(dim=1) == expected.argmax(dim=1)).sum().item()
            logger.warning(
                f"{predictor.name} in {predictor.computes_in} differs from float32: of the first "
                f"{len(found)} images, {same} have the same likeliest class, and a probability is off by "
                f"{difference:.2f}, where {self.tolerance:g} is expected; use float32, neither compiled nor quantised."
            )
