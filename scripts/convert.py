"""Bring another library's Vision Transformer in, or one of ours out, and prove it.

python scripts/convert.py google/vit-base-patch16-224 vit --verify
python scripts/convert.py vit_b_16-c867db91.pth vit --labels imagenet.txt
python scripts/convert.py dinov2_vits14.pth dino --image_size 224 --num_labels 9
python scripts/convert.py vit vit-timm --to timm --verify
python scripts/convert.py --list
python scripts/convert.py --list timm/vit_small_patch16_dinov3.lvd1689m

OUT becomes a folder that is a Hub repository: weights, config, image processor,
code and card (with --to, the weights and the config of that library). What was
recognised, assumed and changed is said on the standard error; the table of
differences goes to the standard output.

Exit status: 0; 1, nothing written, if the proof fails or cannot be had; 2 if
the checkpoint or an option is wrong.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import cli

if TYPE_CHECKING:
    from modeling_vit_scratch.conversion.proof import Verification

PROGRAM = "convert.py"
TARGETS = ("transformers", "timm", "torchvision", "jax")
POOLINGS = ("cls", "mean", "cls+mean", "attention")
SUFFIXES = (".safetensors", ".npz", ".pt", ".pth", ".bin")
TOLERANCE = 1e-4


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__, f"{PROGRAM} CHECKPOINT OUT [--option value ...] | --list [CHECKPOINT]")
    what = parser.add_argument_group("what and where")
    kinds = ", ".join(SUFFIXES)
    what.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help=f"file ({kinds}), folder or Hub id")
    what.add_argument("out", metavar="OUT", type=Path, nargs="?", help="folder to write")
    what.add_argument(
        "--list",
        action="store_true",
        help="write nothing; say which families are understood, or what CHECKPOINT is",
    )
    cli.add_source_options(what)
    what.add_argument(
        "--to", choices=TARGETS, metavar="NAME", help=f"write another library's layout: {', '.join(TARGETS)}"
    )
    untold = parser.add_argument_group("what the tensors do not tell (default: config.json, then the published value)")
    untold.add_argument(
        "--num_attention_heads", type=int, metavar="N", help="default: those of the family's model of that width"
    )
    untold.add_argument("--layer_norm_eps", type=float, metavar="EPSILON", help="of the LayerNorms")
    untold.add_argument("--architecture", metavar="NAME", help="timm's name of the model, for a bare file of its")
    untold.add_argument("--hidden_act", metavar="NAME", help="default: the family's, e.g. 'gelu'; 'silu' where gated")
    untold.add_argument(
        "--pooling", choices=POOLINGS, metavar="NAME", help=f"{', '.join(POOLINGS)}: what is classified"
    )
    untold.add_argument(
        "--config_overrides",
        metavar="FIELDS",
        help="any field of the config, e.g. 'position_embedding_type=rope,rope_theta=100'",
    )
    untold.add_argument(
        "--grid_size", type=int, nargs=2, metavar=("DOWN", "ACROSS"), help="patches, where they are no square"
    )
    change = parser.add_argument_group("changes")
    change.add_argument(
        "--image_size", type=int, nargs="+", metavar="PIXELS", help="resize the positions: one number, or two (h w)"
    )
    change.add_argument("--num_labels", type=int, metavar="N", help="classes; another number makes the head anew")
    change.add_argument(
        "--labels", type=Path, metavar="FILE", help="names of its classes: text, one a line, or a JSON list"
    )
    proof = parser.add_argument_group("proof")
    proof.add_argument(
        "--verify",
        action="store_true",
        help="run the source library's own model on the same random images; fail where an output differs by more than "
        f"{TOLERANCE:g}, or than that share of its largest number",
    )
    proof.add_argument("--num_images", type=cli.at_least_one, default=2, metavar="N", help="random images; default: 2")
    arguments = parser.parse_args(argv)
    if arguments.list and arguments.out is not None:
        parser.error(f"--list writes nothing; leave out OUT ({arguments.out})")
    if not arguments.list and arguments.out is None:
        parser.error("CHECKPOINT and OUT are needed, or --list")
    if arguments.image_size is not None and len(arguments.image_size) > 2:
        parser.error(f"--image_size takes one number or two, got {len(arguments.image_size)}")
    return arguments


def table(proof: "Verification") -> str:
    """The differences, and what they prove."""
    from modeling_vit_scratch.evaluation.tables import text_table

    agree = "no classifier to compare" if proof.top5 is None else f"agree on {proof.top5} of {proof.num_images}"
    differences = ((name, f"{difference:.1e}") for name, difference in proof.differences.items())
    rows = [("output", "largest difference"), *differences, ("top-5", agree)]
    verdict = "the same function" if proof.passed else "NOT the same function"
    return (
        f"{proof.reference}\non {proof.num_images} random images, in double precision\n\n{text_table(rows, left=2)}\n\n"
        f"{verdict}: {proof.largest:.1e}, where {TOLERANCE:g} is allowed\n"
    )


def hints_of(arguments: argparse.Namespace) -> dict:
    """What was said that tensors do not tell."""
    from modeling_vit_scratch.conversion.loading import config_fields

    names = ("architecture", "num_attention_heads", "layer_norm_eps", "hidden_act", "pooling")
    hints = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.grid_size is not None:
        hints["grid_size"] = tuple(arguments.grid_size)
    fields = config_fields(arguments.config_overrides)
    if "image_size" in fields:
        raise ValueError("config_overrides: image_size has an option of its own, --image_size.")
    return {**hints, **fields}


def show(arguments: argparse.Namespace) -> int:
    """Which families are understood, or what a checkpoint is."""
    from modeling_vit_scratch.conversion.catalogue import architectures, describe_checkpoint, families, refused
    from modeling_vit_scratch.evaluation.tables import text_table

    if arguments.checkpoint is not None:
        origin = {"source": arguments.source, "revision": arguments.revision}
        facts = describe_checkpoint(arguments.checkpoint, **origin, **hints_of(arguments))
        print(text_table(list(facts.items()), left=2))
        return 0
    tables = (
        text_table([("--source", "transformers' model_type", "names of the tensors"), *families()], left=3),
        text_table([("family", "architectures of timm"), *architectures()], left=2),
        text_table([("refused", "for"), *refused()], left=2),
    )
    print("\n\n".join(tables))
    return 0


def convert(arguments: argparse.Namespace) -> int:
    from modeling_vit_scratch.conversion import (
        convert_checkpoint,
        export_checkpoint,
        image_processor_for,
        verify_checkpoint,
        verify_export,
    )
    from modeling_vit_scratch.conversion.exporting import open_to_others
    from modeling_vit_scratch.conversion.layouts import WEIGHT_FILES
    from modeling_vit_scratch.conversion.loading import is_own, require_unquantized
    from modeling_vit_scratch.conversion.processors import read_labels
    from modeling_vit_scratch.conversion.reading import one_line
    from modeling_vit_scratch.data.sources import public_name, refuse_image_folder
    from modeling_vit_scratch.hub import write_model_card

    out, checkpoint = arguments.out, arguments.checkpoint
    if arguments.list:
        return show(arguments)
    if out.exists() and not out.is_dir():
        raise ValueError(f"OUT {out} is a file; name a folder.")
    refuse_image_folder(out)
    if Path(checkpoint).exists() and out.resolve() in (Path(checkpoint).resolve(), Path(checkpoint).resolve().parent):
        raise ValueError(f"OUT {out} holds the checkpoint itself; name another folder.")
    written = "model.npz" if arguments.to == "jax" else "model.safetensors"
    others = {*WEIGHT_FILES, "preprocessor_config.json" if arguments.to == "timm" else "metrics.json"} - {written}
    others = sorted(name for name in others if (out / name).exists())  # which would be read beside the new weights
    if others:
        raise ValueError(f"OUT {out} holds {' and '.join(others)} of another model; name another folder.")
    size = arguments.image_size
    size = None if size is None else size[0] if len(size) == 1 else tuple(size)
    labels = None if arguments.labels is None else read_labels(arguments.labels)
    hints, origin = hints_of(arguments), {"source": arguments.source, "revision": arguments.revision}

    model = convert_checkpoint(
        checkpoint, image_size=size, num_labels=arguments.num_labels, id2label=labels, **origin, **hints
    )
    require_unquantized(model, checkpoint)
    own = arguments.source is None and is_own(checkpoint, revision=arguments.revision)
    processor = None
    try:
        processor = image_processor_for(checkpoint, model, **origin)
    except ValueError as error:
        if not own:
            raise
        print(f"No image processor was written: {error}", file=sys.stderr)

    proofs = []
    if arguments.verify and not own:
        proofs.append(
            lambda: verify_checkpoint(
                checkpoint, num_images=arguments.num_images, num_labels=arguments.num_labels, **origin, **hints
            )
        )
    if arguments.verify and arguments.to:
        proofs.append(lambda: verify_export(model, arguments.to, num_images=arguments.num_images))
    if arguments.verify and not proofs:
        raise ValueError(f"{checkpoint} is this package's own: there is nothing to verify without --to.")
    for prove in proofs:
        try:
            proof = prove()
        except (ImportError, NotImplementedError, RuntimeError) as error:
            print(f"convert.py: not verified, nothing written: {one_line(error)}", file=sys.stderr)
            return 1
        print(table(proof))
        if not proof.passed:
            print("convert.py: the proof failed, nothing written.", file=sys.stderr)
            return 1

    if arguments.to:
        export_checkpoint(model, arguments.to, out, processor)
    else:
        model.save_pretrained(out)
        open_to_others(out)
        if processor is not None:
            processor.save_pretrained(out)
        if (out / "README.md").exists():
            print(f"{out / 'README.md'} was there and is kept; no model card was written.", file=sys.stderr)
        else:
            write_model_card(out, base_model=public_name(checkpoint))
    print(f"Wrote {out}.", file=sys.stderr)
    return 0


def main(argv: list[str] | None = None) -> int:
    return cli.run(PROGRAM, parse, convert, argv)


if __name__ == "__main__":
    sys.exit(main())
