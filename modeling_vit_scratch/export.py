"""A model as ONNX and as a program of torch.export: written, proved to compute what the model does, and timed.

`export_model` is what `scripts/export.py` calls. ONNX needs the packages of the extra "export".
"""

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .conversion.loading import require_unquantized
from .data.cuts import Split
from .data.records import Records
from .data.sources import refuse_image_folder
from .data.splits import progress_bar
from .evaluation import Predictor
from .evaluation.inference import as_predictor, find_split, match_classes
from .evaluation.programs import FILES, Logits, Runtime, missing_for_onnx, open_file, write_files
from .evaluation.tables import text_table

TOLERANCE = 1e-4
FORMATS = {"onnx": "ONNX", "program": "torch.export"}


class ExportDifferenceError(ValueError):
    """A file does not compute what the model does; a line for each such file."""


def export_model(
    model: Predictor | str | Path,
    folder: str | Path,
    formats: str | Sequence[str] = tuple(FORMATS),
    *,
    opset: int = 20,
    int8: bool = False,
    dataset: str | Split | None = None,
    split: str | None = None,
    batch_size: int = 1,
    repeats: int = 30,
    **options,
) -> dict:
    """Write a model as ONNX and as a program of torch.export, and measure what came out, on the CPU.

        export_model("runs/mine", "exported", formats=["program"])

    Each file takes `pixel_values`, float32 (batch, channels, height, width), any batch, and gives `logits` (batch,
    classes), or `features` (batch, width) if `num_labels` is 0. Beside them lie the model's config.json and
    preprocessor_config.json. Nothing is written unless all files are right; of an earlier export nothing stays.

    Args:
        model: A folder, file or Hub id, of this package or of a library that `convert_checkpoint` reads; or a
            `Predictor` on the CPU.
        folder: Where to write; it is made.
        formats: "onnx" (model.onnx), "program" (model.pt2), or both.
        opset: Version of ONNX's operators.
        int8: Whether to write ONNX with weights and products in 8 bits too (model_int8.onnx); no bound is set to its
            difference.
        dataset: Labelled images to count each file's right answers on, as for `evaluate_model`; None for no count.
        split: Of the dataset, as for `evaluate_model`.
        batch_size: Images at once when a file is timed.
        repeats: Timed calls of each file.
        **options: Of `load_split`, as for `evaluate_model`.

    Returns:
        The report, which JSON can hold and `report_text` makes readable: "model"; "opset"; "threads"; "batch_size";
        "repeats"; with a dataset also "dataset", "split", "cut" and "examples"; and "rows", first of the model and then
        of each file: "format", "file" (None of the model), "bytes", "milliseconds" (the median of the calls), "ratio"
        (to the model's), "largest_difference" (of logits, on random images), and with a dataset "accuracy" and
        "accuracy_change", in [0, 1].

    Raises:
        ExportDifferenceError: A file differs from the model by more than `TOLERANCE`; nothing was written.
        ValueError: A package is missing (the text names the extra); the formats, the opset, the folder, the model or
            the dataset is wrong; the model has classes, but no trained classifier.
    """
    names = check_formats(formats, int8)
    for name, number in (("batch_size", batch_size), ("repeats", repeats)):
        if number < 1:
            raise ValueError(f"{name} ({number}) must be at least 1.")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"OUT {folder} is a file; name a folder.")
    refuse_image_folder(folder)
    predictor = as_predictor(model, "cpu")
    require_unquantized(predictor.model, predictor.name)
    if predictor.device.type != "cpu":
        raise ValueError(f"the model is on {predictor.device}, but is exported on the CPU: Predictor(..., 'cpu').")
    if predictor.computes_in != "float32":
        raise ValueError(
            f"the model computes in {predictor.computes_in}, but files are of float32: Predictor(..., 'cpu')."
        )
    if predictor.config.num_labels or dataset is not None:
        predictor.require_classifier()
    if dataset is not None:
        dataset = find_split(dataset, [predictor], split, **options)
    settings = {"opset": opset, "threads": torch.get_num_threads(), "batch_size": batch_size, "repeats": repeats}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as temporary:
        rows = _write_and_measure(predictor, Path(temporary), names, dataset, opset, batch_size, repeats)
        for name in FILES.values():  # those of an earlier export may be of another model
            (folder / name).unlink(missing_ok=True)
            (folder / f"{name}.data").unlink(missing_ok=True)
        for file in sorted(Path(temporary).iterdir()):
            os.replace(file, folder / file.name)
    labelled = {}
    if dataset is not None:
        labelled = {"dataset": dataset.dataset, **dataset.to_dict(), "examples": len(dataset.records)}
    return {"model": predictor.name, **settings, **labelled, "rows": rows}


def check_formats(formats: str | Sequence[str], int8: bool = False) -> list[str]:
    """The names of the formats in a report, in the order in which they are written.

    Raises:
        ValueError: A format is unknown, there is none, or int8 is asked for without ONNX; or a package is missing,
            and the text names the extra.
    """
    formats = [formats] if isinstance(formats, str) else list(formats)
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ValueError(f"formats ({', '.join(formats) or 'none'}) must be some of {', '.join(FORMATS)}.")
    names = [FORMATS[name] for name in FORMATS if name in formats]
    if int8 and "ONNX" not in names:
        raise ValueError("int8 is made of the ONNX file: add onnx to formats.")
    missing = missing_for_onnx()
    if missing and "ONNX" in names:
        raise ValueError(
            f"ONNX needs {', '.join(missing)}: pip install 'modeling_vit_scratch[export]', or choose --formats program."
        )
    return [*names, *(["ONNX int8"] if int8 else [])]


def _write_and_measure(
    predictor: Predictor,
    folder: Path,
    names: list[str],
    split: Split | None,
    opset: int,
    batch_size: int,
    repeats: int,
) -> list[dict]:
    """Write the files, the config and the image processor; the rows of the report.

    Raises:
        ExportDifferenceError: A file does not compute what the model does.
    """
    config, module = predictor.config, Logits(predictor.model)
    example = torch.zeros(2, config.num_channels, *config.image_hw)
    write_files(module, example, folder, names, opset, ["logits" if config.num_labels else "features"])
    rows = _measure(predictor, module, folder, names, split, batch_size, repeats)
    wrong = [row for row in rows if row["format"] != "ONNX int8" and not row["largest_difference"] <= TOLERANCE]
    if wrong:
        lines = (
            f"{row['format']} differs from the model by {row['largest_difference']:.1e}, where {TOLERANCE:g} is "
            "allowed; nothing was written."
            for row in wrong
        )
        raise ExportDifferenceError("\n".join(lines))
    config.save_pretrained(folder)
    predictor.processor.save_pretrained(folder)
    return rows


@torch.inference_mode()
def _measure(
    predictor: Predictor,
    module: Logits,
    folder: Path,
    names: list[str],
    split: Split | None,
    batch_size: int,
    repeats: int,
) -> list[dict]:
    """One row for the model, and one for each file."""
    shape = (module.model.config.num_channels, *module.model.config.image_hw)
    runtimes = {"PyTorch": module, **{name: open_file(folder / FILES[name]) for name in names}}
    sizes = {"PyTorch": sum(p.numel() * p.element_size() for p in module.parameters())}
    for name in names:
        sizes[name] = sum(file.stat().st_size for file in folder.glob(f"{FILES[name]}*"))
    pixels = torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(0))
    times = median_milliseconds(runtimes, pixels, repeats)
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
    if split is not None:
        labels = torch.from_numpy(match_classes(split.class_names, predictor.class_names)[split.records.labels])
        shares = accuracies(runtimes, predictor, split.records, labels)
        for row in rows:
            row["accuracy"] = shares[row["format"]]
            row["accuracy_change"] = shares[row["format"]] - shares["PyTorch"]
    return rows


def largest_difference(runtime: Runtime, module: Logits, shape: tuple[int, ...]) -> float:
    """Between the logits of a file and of the model, on random images in batches of 1 and 3."""
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
    """The share of images that each gets right, all on the same pixels."""
    right = dict.fromkeys(runtimes, 0)
    with progress_bar(len(records), "Classifying") as bar:
        for start in range(0, len(records), 64):
            chunk = range(start, min(start + 64, len(records)))
            pixels = predictor.normalise(predictor.pixels(records.images(chunk, predictor.config.num_channels)))
            for name, runtime in runtimes.items():
                right[name] += (runtime(pixels).argmax(dim=1) == labels[start : chunk.stop]).sum().item()
            bar.update(len(chunk))
    return {name: count / len(records) for name, count in right.items()}


def report_text(report: dict) -> str:
    """What `export_model` gave, as a table of at most 80 columns; only names above it can be longer."""

    def some(count: int, noun: str) -> str:
        return f"{count} {noun}{'s' * (count > 1)}"

    labelled = "dataset" in report
    lines = [
        f"{report['model']}, opset {report['opset']}, {some(report['threads'], 'thread')}",
        f"milliseconds: {some(report['batch_size'], 'image')} at once, median of {report['repeats']}; ratio: to "
        "PyTorch's",
    ]
    if labelled:
        lines.append(f"accuracy: {report['dataset']}, split {report['split']}, {report['examples']:,} images")
    # Padded, so that tables of several models stand alike.
    header = [" " * 12, "      MB", "       ms", "ratio", "difference"] + [" accuracy", " change"] * labelled
    rows = []
    for row in report["rows"]:
        cells = [row["format"], f"{row['bytes'] / 1e6:,.2f}", f"{row['milliseconds']:,.3f}", f"{row['ratio']:.2f}"]
        cells.append(f"{row['largest_difference']:.1e}")
        if labelled:
            cells += [f"{100 * row['accuracy']:.2f} %", f"{100 * row['accuracy_change']:+.2f}"]
        rows.append(cells)
    return "\n".join([*lines, "", text_table([header, *rows])])
