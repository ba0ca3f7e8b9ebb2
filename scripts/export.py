"""Export a model to ONNX and torch.export, and measure what came out.

python scripts/export.py runs/mine exported
python scripts/export.py runs/mine exported --int8 --dataset uoft-cs/cifar10
python scripts/export.py google/vit-base-patch16-224 vit --formats onnx

MODEL is a folder, file or Hub id: of this package, or what convert.py reads.
OUT becomes a folder of model.onnx, model.pt2 (a torch.export program),
model_int8.onnx (with --int8), and the config.json and preprocessor_config.json
of the model: the names of its classes, and how it takes pictures. Of an earlier
export into OUT nothing stays.

Each takes `pixel_values`, float32 (batch, channels, height, width), any batch,
and gives `logits` (batch, classes), or `features` (batch, width) if the model
has no classes. Each is run on random pictures beside the model: a difference
above 1e-4 is an error, save for int8, whose price is what --dataset shows.
Times are medians of calls that take turns, on the CPU.

Exit status: 0; 1, nothing written, if a file does not compute what the model
does; 2 if the model, the dataset or an option is wrong.
"""

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from modeling_vit_scratch import cli
from modeling_vit_scratch.conversion.layouts import FAMILIES
from modeling_vit_scratch.data.records import Records
from modeling_vit_scratch.data.splits import progress_bar
from modeling_vit_scratch.evaluation import Predictor
from modeling_vit_scratch.evaluation.inference import match_classes

PROGRAM = "export.py"
TOLERANCE = 1e-4
FILES = {"torch.export": "model.pt2", "ONNX": "model.onnx", "ONNX int8": "model_int8.onnx"}
FORMATS = {"onnx": "ONNX", "program": "torch.export"}
# ONNX files are protocol buffers, which end at 2 GiB; weights beyond that lie beside them.
MAX_ONNX_BYTES = 1.9e9
Runtime = Callable[[torch.Tensor], torch.Tensor]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__, f"{PROGRAM} MODEL OUT [--option value ...]")
    parser.add_argument("model", metavar="MODEL", help="what to export")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    what = parser.add_argument_group("what is written")
    what.add_argument(
        "--formats", nargs="+", choices=tuple(FORMATS), default=list(FORMATS), metavar="NAME",
        help="onnx, program (of torch.export); default: both",
    )  # fmt: skip
    what.add_argument("--opset", type=int, default=20, help="version of ONNX's operators; default: 20")
    what.add_argument("--int8", action="store_true", help="also ONNX with weights and products in 8 bits")
    what.add_argument("--source", choices=tuple(FAMILIES), metavar="NAME", help="where it comes from; default: told")
    what.add_argument("--revision", help="branch, tag or commit of a Hub id")
    data = parser.add_argument_group("accuracy on labelled pictures")
    data.add_argument("--dataset", metavar="NAME", help="Hub id, folder with one directory per class, or 'digits'")
    cli.add_split_options(data)
    output = parser.add_argument_group("timing and output")
    output.add_argument(
        "--batch_size", type=cli.at_least_one, default=1, metavar="N", help="pictures at once when timed; default: 1"
    )
    output.add_argument(
        "--repeats", type=cli.at_least_one, default=30, metavar="N", help="timed calls of each; default: 30"
    )
    output.add_argument("--json", action="store_true", help="JSON instead of a table")
    arguments = parser.parse_args(argv)
    arguments.formats = [FORMATS[name] for name in FORMATS if name in arguments.formats]
    if arguments.int8:
        if "ONNX" not in arguments.formats:
            parser.error("--int8 is made of the ONNX file: add onnx to --formats.")
        arguments.formats.append("ONNX int8")
    return arguments


def require(formats: list[str]):
    """Raise a ValueError that names the extra if a package is missing."""
    needed = ("onnx", "onnxscript", "onnxruntime") if "ONNX" in formats else ()
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"ONNX needs {', '.join(missing)}: pip install 'modeling_vit_scratch[export]', or choose --formats program."
        )


class Logits(nn.Module):
    """The model as a function of one tensor: (B, C, H, W) -> (B, classes)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


@contextlib.contextmanager
def quiet(level: int):
    """No records of this level or below: the exporter and the quantiser warn of what does not concern a ViT."""
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def write_files(module: Logits, example: torch.Tensor, folder: Path, formats: list[str], opset: int):
    """Trace once, and write each format."""
    output = "logits" if module.model.config.num_labels else "features"
    batch = {"pixel_values": {0: torch.export.Dim("batch", min=1)}}
    with torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes=batch)
    if "torch.export" in formats:
        torch.export.save(program, folder / FILES["torch.export"])
    if "ONNX" in formats:
        exported = torch.onnx.export(
            program, (example,), dynamo=True, opset_version=opset, input_names=["pixel_values"], output_names=[output],
            dynamic_shapes=batch, verbose=False,
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
        quantize_dynamic(
            whole, folder / FILES["ONNX int8"], per_channel=True, weight_type=QuantType.QInt8,
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
        raise ValueError(f"onnxruntime cannot run {path.name}, maybe for its --opset: {error}") from error
    return lambda pixels: torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])


def largest_difference(runtime: Runtime, module: Logits, shape: tuple[int, ...]) -> float:
    """Between the logits of a file and of the model, on random pictures in batches of 1 and 3."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(count, *shape, generator=generator) for count in (1, 3)]
    return max((runtime(pixels) - module(pixels)).abs().max().item() for pixels in batches)


def median_milliseconds(runtimes: dict[str, Runtime], pixels: torch.Tensor, repeats: int) -> dict[str, float]:
    """Of one call of each. They take turns, so that whatever else the machine does meets all of them alike."""
    times = {name: [] for name in runtimes}
    for _ in range(repeats):
        for name, runtime in runtimes.items():
            runtime(pixels)  # the caches and threads are this runtime's again
            started = time.perf_counter()
            runtime(pixels)
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def accuracies(runtimes: dict[str, Runtime], predictor: Predictor, records: Records, labels: torch.Tensor) -> dict:
    """The share of pictures that each gets right, all on the same pixels."""
    right = dict.fromkeys(runtimes, 0)
    with progress_bar(len(records), "Classifying") as bar:
        for start in range(0, len(records), 64):
            chunk = range(start, min(start + 64, len(records)))
            pixels = predictor.normalise(predictor.pixels(records.images(chunk, predictor.config.num_channels)))
            for name, runtime in runtimes.items():
                right[name] += (runtime(pixels).argmax(dim=1) == labels[start : chunk.stop]).sum().item()
            bar.update(len(chunk))
    return {name: count / len(records) for name, count in right.items()}


def print_table(report: dict):
    """At most 80 columns."""
    labelled = "dataset" in report
    print(f"{report['model']}, opset {report['opset']}, {report['threads']} thread{'s' * (report['threads'] > 1)}")
    print(f"milliseconds: {report['batch_size']} picture{'s' * (report['batch_size'] > 1)} at once, median", end="")
    print(f" of {report['repeats']}; ratio: to PyTorch's")
    if labelled:
        print(f"accuracy: {report['dataset']}, split {report['split']}, {report['examples']:,} pictures")
    header = f"\n{'':12}  {'MB':>8}  {'ms':>9}  {'ratio':>5}  {'difference':>10}"
    print(header + f"  {'accuracy':>9}  {'change':>7}" * labelled)
    for row in report["rows"]:
        line = f"{row['format']:12}  {row['bytes'] / 1e6:8,.2f}  {row['milliseconds']:9,.3f}  {row['ratio']:5.2f}"
        line += f"  {row['largest_difference']:10.1e}"
        if labelled:
            line += f"  {100 * row['accuracy']:7.2f} %  {100 * row['accuracy_change']:+7.2f}"
        print(line)


@torch.inference_mode()
def measure(
    module: Logits, folder: Path, arguments: argparse.Namespace, predictor: Predictor, records: Records | None, labels
) -> list[dict]:
    """One row for the model, and one for each file."""
    shape = (module.model.config.num_channels, *module.model.config.image_hw)
    runtimes = {"PyTorch": module, **{name: open_file(folder / FILES[name]) for name in arguments.formats}}
    sizes = {"PyTorch": sum(p.numel() * p.element_size() for p in module.parameters())}
    for name in arguments.formats:
        sizes[name] = sum(file.stat().st_size for file in folder.glob(f"{FILES[name]}*"))
    times = median_milliseconds(runtimes, torch.randn(arguments.batch_size, *shape), arguments.repeats)
    rows = [
        {
            "format": name,
            "file": FILES.get(name),
            "bytes": sizes[name],
            "milliseconds": times[name],
            "ratio": times[name] / times["PyTorch"],
            "largest_difference": largest_difference(runtime, module, shape),
        }
        for name, runtime in runtimes.items()
    ]
    if records is not None:
        shares = accuracies(runtimes, predictor, records, labels)
        for row in rows:
            row["accuracy"] = shares[row["format"]]
            row["accuracy_change"] = shares[row["format"]] - shares["PyTorch"]
    return rows


def export(arguments: argparse.Namespace) -> int:
    require(arguments.formats)
    out = arguments.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"OUT {out} is a file; name a folder.")
    where = {"source": arguments.source, "revision": arguments.revision}
    predictor = Predictor(arguments.model, "cpu", **where)
    config = predictor.config
    if config.num_labels:
        predictor.require_classifier()
    split = records = labels = None
    if arguments.dataset is not None:
        predictor.require_classifier()
        split = cli.read_split(PROGRAM, arguments, [predictor])
        records = split.records
        labels = torch.from_numpy(match_classes(split.class_names, predictor.class_names)[records.labels])

    module = Logits(predictor.model)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as folder:
        folder = Path(folder)
        example = torch.randn(2, config.num_channels, *config.image_hw)
        with warnings.catch_warnings(action="ignore"), quiet(logging.WARNING):
            write_files(module, example, folder, arguments.formats, arguments.opset)
        rows = measure(module, folder, arguments, predictor, records, labels)
        wrong = [row for row in rows if row["format"] != "ONNX int8" and not row["largest_difference"] <= TOLERANCE]
        for row in wrong:
            cli.say(
                PROGRAM,
                f"{row['format']} differs from the model by {row['largest_difference']:.1e}, where {TOLERANCE:g} is "
                "allowed; nothing was written.",
            )
        if wrong:
            return 1
        config.save_pretrained(folder)
        predictor.processor.save_pretrained(folder)
        for name in FILES.values():  # those of an earlier export may be of another model
            (out / name).unlink(missing_ok=True)
            (out / f"{name}.data").unlink(missing_ok=True)
        for file in sorted(folder.iterdir()):
            os.replace(file, out / file.name)
    report = {
        "model": arguments.model,
        "opset": arguments.opset,
        "threads": torch.get_num_threads(),
        "batch_size": arguments.batch_size,
        "repeats": arguments.repeats,
        **({} if records is None else {"dataset": arguments.dataset, **split.to_dict(), "examples": len(records)}),
        "rows": rows,
    }
    if arguments.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print_table(report)
    cli.say(PROGRAM, f"wrote {out}: {', '.join(sorted(row['file'] for row in rows if row['file']))}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return cli.run(PROGRAM, export, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
