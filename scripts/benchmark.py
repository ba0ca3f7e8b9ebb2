"""Measure this package's speed and memory side by side with its peers'.

python scripts/benchmark.py --quick                 small sizes, few rounds
python scripts/benchmark.py --sections model,memory
python scripts/benchmark.py --sections model --cases inference
python scripts/benchmark.py --sections race --dataset_name path/to/cifar10

SECTION is one or more of
  model     inference and training step against the libraries that import
  data      images per second of the data path, on one core or on the GPU;
            seconds of a look at a whole data set (--dataset_name)
  photos    JPEGs decoded, resized and normalised on one core, beside a model
  step      where a training step's time goes, beside timm's
  trainer   what ImageTrainer adds to a bare training loop
  memory    loading a 632 M-parameter model from disk, and training it: plain,
            with activation checkpointing, and sharded over two processes
  scale     time and memory against images, tokens, depth and processes
  inference bfloat16, compiled, 8-bit integers: accuracy of the packaged model
            (--dataset_name) against speed, and speed of ViT-B/16 (long)
  merging   token merging: likewise (long)
  attention eager attention beside PyTorch's fused one (long)
  race      training: the teaching protocol, our default recipe and the
            speedrun's record (long: an hour)
  speedrun  the record of a track of speedrun/README.md, run again (long)

Peers take turns, each round in another order, so that what else the machine
does strikes all alike; ratios are medians over the rounds. Models are timed in
several fresh processes; lines say whether ours and the fastest peer are told
apart. Tables go to the standard output; numbers and charts (JSON, PNG, SVG)
into a folder. A race that was interrupted goes on, and one that was run is not
run again.

Exit status: 0; 1 if a section could not be measured; 2 if an option is wrong;
130 after Ctrl-C.
"""

import argparse
import json
import os
import sys
import textwrap
from pathlib import Path

import cli

with cli.importing("benchmark.py"):
    import torch
    from benchmarking import (
        attention,
        cases,
        data,
        inference,
        memory,
        merging,
        model,
        peers,
        photos,
        race,
        scale,
        speedrun,
        step,
        trainer,
    )

    from modeling_vit_scratch import plots
    from modeling_vit_scratch.training.report import hardware

PROGRAM = "benchmark.py"
SECTIONS = {
    "model": model,
    "data": data,
    "photos": photos,
    "step": step,
    "trainer": trainer,
    "memory": memory,
    "scale": scale,
}
LONG = {"inference": inference, "merging": merging, "attention": attention, "race": race, "speedrun": speedrun}
SECTIONS |= LONG


def sections(text: str) -> list[str]:
    names = list(SECTIONS) if text == "all" else text.split(",")
    for name in names:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SECTIONS)}")
    return names


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, and the sizes that follow from them."""
    parser = cli.Parser(__doc__, f"{PROGRAM} [--sections SECTION,...] [--quick] [--option value ...]")
    what = parser.add_argument_group("what")
    what.add_argument(
        "--sections", type=sections, metavar="SECTION,...", help="or 'all'; default: all that are not long"
    )
    what.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    what.add_argument("--cases", default="", metavar="TEXT", help="of model: those with this text in their titles")
    what.add_argument("--device", metavar="NAME", help="cpu or cuda; default: cuda if there is one")
    what.add_argument(
        "--dataset_name",
        metavar="NAME",
        help="of race, speedrun, inference and merging, as in finetune.py, and inspected by data; default: CIFAR-10, "
        "offline digits; for data digits; speedrun has none",
    )
    what.add_argument("--track", choices=speedrun.TRACKS, default="cpu80", help="of speedrun; default: %(default)s")
    what.add_argument("--seeds", type=int, default=5, metavar="N", help="of speedrun, from 42; default: %(default)s")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", type=Path, default=Path("runs/benchmark"), metavar="DIR", help="default: %(default)s"
    )
    output.add_argument("--json", action="store_true", help="JSON instead of tables")
    args = parser.parse_args(argv)
    args.sections = args.sections or [name for name in SECTIONS if name not in LONG]
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] not in cases.WORK:
        parser.error(f"--device ({device}) must be cpu or cuda")
    if device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device ({device}) is not there; use cpu")
    args.device = torch.device(device)
    titles = cases.cases_for(args.device, args.quick)
    args.cases = [case for case in titles if args.cases in case.title]
    if not args.cases:
        parser.error(f"--cases is in none of the titles: {'; '.join(case.title for case in titles)}")
    if args.seeds < 1:
        parser.error(f"--seeds ({args.seeds}) must be at least 1")
    args.processes, args.rounds_each = (2, 2) if args.quick else (6, 3)
    args.rounds, args.least, args.steps, args.process_rounds = (3, 0.05, 30, 1) if args.quick else (15, 0.2, 100, 3)
    args.images = 500 if args.quick else None  # None: all
    args.large = "base" if args.quick else "huge"
    args.batch_sizes = [1, 8, 64, 256] if args.quick else [1, 4, 16, 64, 256, 1024]
    args.image_sizes = [64, 224, 384] if args.quick else [64, 112, 160, 224, 320, 448, 640, 1024]
    args.depths = [1, 4, 16] if args.quick else [1, 2, 4, 8, 16]
    tiny = ["--max_train_samples", "400", "--max_eval_samples", "200", "--num_train_epochs", "3"]
    args.race_options = tiny if args.quick else []
    return args


def environment(device: torch.device) -> dict:
    """Where this is measured."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"hardware": hardware(device), "cores": os.cpu_count(), "load": load, "versions": peers.versions()}


def headline(section: str, where: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    load = "" if where["load"] is None else f"; load before the start {where['load']:.1f} on {where['cores']} cores"
    return textwrap.fill(f"{section}: {where['hardware']}{load}; {versions}", 80)


def run(args: argparse.Namespace) -> int:
    """Measure and report each section; 1 if one could not be measured."""
    args.output.mkdir(parents=True, exist_ok=True)
    for library, reason in peers.REASONS.items():
        cli.say(PROGRAM, f"no {library} ({reason}); pip install -e '.[benchmark]' has it.")
    failed, results, where = False, {}, environment(args.device)
    for section in args.sections:
        part = SECTIONS[section]
        try:
            result = {"environment": where, "quick": args.quick, **part.measure(args)}
        except (ValueError, OSError, RuntimeError) as error:  # a compiler's, or for want of memory
            cli.say(PROGRAM, f"{section}: {error}")
            failed = True
            continue
        except KeyboardInterrupt:
            cli.say(PROGRAM, "stopped; a race goes on where it was when it is started again.")
            return 130
        results[section] = result
        (args.output / f"{section}.json").write_text(json.dumps(result, indent=1) + "\n")
        plots.save_figure(part.draw(result), args.output / section)
        if not args.json:
            print(f"{headline(section, where)}\n\n{part.show(result)}\n", flush=True)
    if args.json:
        print(json.dumps(results, indent=1))
    cli.say(PROGRAM, f"numbers and charts are in {args.output}.")
    return int(failed)


def main(argv: list[str] | None = None) -> int:
    return cli.run(PROGRAM, parse, run, argv)


if __name__ == "__main__":
    sys.exit(main())
