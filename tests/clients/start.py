"""Run a program where the package cannot be imported: python -I start.py FOLDERS PROGRAM [ARGUMENT ...]

FOLDERS are where other software is found, joined as those of PATH are.
"""

import os
import runpy
import sys
from pathlib import Path


class Blocked:
    """Refuses the package, wherever it is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_vit_scratch":
            raise ImportError(f"{name} is blocked")


def main():
    sys.meta_path.insert(0, Blocked())
    for name in ("modeling_vit_scratch", "modeling_vit_scratch.configuration_vit_scratch"):
        try:
            __import__(name)
        except ImportError:
            continue
        sys.exit(f"{name} can be imported: this proves nothing")
    _, folders, *sys.argv = sys.argv
    sys.path += filter(None, folders.split(os.pathsep))
    if any(Path(folder, "torchvision").is_dir() for folder in sys.path):
        sys.path.append(str(Path(__file__).parents[2] / "scripts"))
        from benchmarking import peers  # noqa: F401  torchvision does not import beside a CPU build of torch without it
    runpy.run_path(sys.argv[0], run_name="__main__")
    assert "modeling_vit_scratch" not in sys.modules


if __name__ == "__main__":
    main()
