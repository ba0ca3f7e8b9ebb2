"""Fixtures that several test files use, and what has to be imported first."""

import sys
from pathlib import Path

from hub_server import hub  # noqa: F401

# Behind all else, so that a script named like a package would be found out (tests/test_house.py).
sys.path.append(str(Path(__file__).parent.parent / "scripts"))

from benchmarking import peers  # noqa: F401  beside a torchvision that does not import, transformers does only after this
