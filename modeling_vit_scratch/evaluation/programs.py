"""A model as a file that runs without its code: ONNX and programs of torch.export."""

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

FILES = {"torch.export": "model.pt2", "ONNX": "model.onnx", "ONNX int8": "model_int8.onnx"}
# ONNX files are protocol buffers, which end at 2 GiB; weights beyond that lie beside them.
MAX_ONNX_BYTES = 1.9e9
Runtime = Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, ...]]


class Logits(nn.Module):
    """The model as a function of one tensor: (B, C, H, W) -> (B, classes)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


def missing_for_onnx() -> list[str]:
    """The packages of the extra "export" that are not installed."""
    return [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]


@contextlib.contextmanager
def _quiet():
    """No warnings: the exporter and the quantiser warn of what does not concern a ViT."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


@_quiet()
def write_files(
    module: nn.Module, example: torch.Tensor, folder: Path, formats: list[str], opset: int, outputs: Sequence[str]
):
    """Trace once, and write each format.

    Args:
        module: Takes pixels (B, C, H, W), and returns a tensor or a tuple of them.
        example: Such pixels, B > 1.
        folder: Where the files are written.
        formats: Keys of `FILES`; "ONNX int8" is made of "ONNX".
        opset: Version of ONNX's operators.
        outputs: The name of each tensor that the module returns.
    """
    batch = {"pixel_values": {0: torch.export.Dim("batch", min=1)}}
    with torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes=batch)
    if "torch.export" in formats:
        torch.export.save(program, folder / FILES["torch.export"])
    if "ONNX" in formats:
        exported = torch.onnx.export(
            program, (example,), dynamo=True, opset_version=opset, input_names=["pixel_values"],
            output_names=list(outputs), dynamic_shapes=batch, verbose=False,
        )  # fmt: skip
        found = exported.model.opset_imports[""]
        if found != opset:
            raise ValueError(f"the exporter cannot write --opset {opset}, but {found}; use that, or the default.")
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        exported.save(folder / FILES["ONNX"], external_data=size > MAX_ONNX_BYTES)
    if "ONNX int8" in formats:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        whole = onnx.load(folder / FILES["ONNX"])
        del whole.graph.value_info[:]  # shapes of weights, which the quantiser transposes
        # Unsigned: of 1,000 images, the packaged model gives 996 the class that it gives them in float32, signed 991.
        quantize_dynamic(
            whole, folder / FILES["ONNX int8"], per_channel=True, weight_type=QuantType.QUInt8,
            use_external_data_format=size > MAX_ONNX_BYTES,
        )  # fmt: skip


def open_file(path: Path) -> Runtime:
    """An exported file as a function of pixels."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # they have no class in common
        text = " ".join(str(error).split())
        raise ValueError(f"onnxruntime cannot run {path.name}, maybe for its --opset: {text}") from error

    def run(pixels: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        outputs = tuple(map(torch.from_numpy, session.run(None, {"pixel_values": pixels.numpy()})))
        return outputs if len(outputs) > 1 else outputs[0]

    return run
