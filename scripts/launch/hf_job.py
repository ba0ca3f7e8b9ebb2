"""Train on Hugging Face Jobs.

hf jobs uv run --flavor a10g-small --timeout 4h --secrets HF_TOKEN -v ./modeling_vit_scratch:/code/modeling_vit_scratch
  -v ./scripts:/code/scripts scripts/launch/hf_job.py --dataset_name uoft-cs/cifar10 --output_dir runs/mine
  --push_to_hub true --hub_model_id user/mine

This is one line. It mounts the package and the scripts of this checkout; uv installs what the header below names.
Options are those of scripts/finetune.py. All GPUs of the flavor are used. A job's disk is gone with it: push the model,
or write to a bucket (`-v hf://buckets/user/runs:/runs`, `--output_dir /runs/mine`), from which a further attempt goes
on.

Run here: the header's requirements are those of setup.cfg, the hub's client accepts the command (`--dry-run`), and what
this file starts was started. Not run: on Hugging Face Jobs, on a GPU, or with a bucket in place of a disk.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.11",
#     "transformers>=5.17,<6",
#     "datasets>=4.0",
#     "accelerate>=1.1",
#     "evaluate>=0.4.6",
#     "safetensors>=0.4",
#     "huggingface-hub>=1.0",
#     "numpy",
#     "pillow",
#     "matplotlib",
#     "pyyaml",
#     "scikit-learn",
#     "psutil",
#     "scipy",
#     "tqdm",
#     "packaging",
# ]
# ///

import argparse
import os
import sys
from pathlib import Path

CODE = Path("/code")


def command(argv: list[str], gpus: int, code: Path = CODE) -> list[str]:
    """The command that trains: on each GPU a process, and from the last checkpoint where there is one.

    Args:
        argv: Options of scripts/finetune.py.
        gpus: Of this machine.
        code: Folder with the package and the scripts.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--resume_from_checkpoint")
    known, _ = parser.parse_known_args(argv)
    begun = known.output_dir is not None and any(known.output_dir.glob("checkpoint-*"))
    resume = ["--resume_from_checkpoint", "last"] if begun and known.resume_from_checkpoint is None else []
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)] if gpus > 1 else []
    return [sys.executable, *launcher, str(code / "scripts" / "finetune.py"), *argv, *resume]


def main(argv: list[str], code: Path = CODE):
    import torch

    words = command(argv, torch.cuda.device_count(), code)
    os.execve(words[0], words, os.environ | {"PYTHONPATH": str(code)})


if __name__ == "__main__":
    main(sys.argv[1:])
