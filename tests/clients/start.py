"""Run a program where the package cannot be imported: python -I start.py FOLDERS PROGRAM [ARGUMENT ...]

FOLDERS are where other software is found, joined as those of PATH are.
"""

import os
import runpy
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def main():
    runpy.run_path(str(TESTS / "without_package.py"))
    _, folders, *sys.argv = sys.argv
    sys.path += filter(None, folders.split(os.pathsep))
    if any(Path(folder, "torchvision").is_dir() for folder in sys.path):
        sys.path.append(str(TESTS.parent / "scripts"))
        from benchmarking import peers  # noqa: F401  torchvision does not import beside a CPU build of torch without it
    runpy.run_path(sys.argv[0], run_name="__main__")
    assert "modeling_vit_scratch" not in sys.modules


if __name__ == "__main__":
    main()
