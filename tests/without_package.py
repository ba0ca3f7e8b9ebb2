"""What a process runs first in which the package must not be found, wherever it is installed; tests start it so.

Not to be imported: it would keep the package from the tests as well.
"""

import sys


class Blocked:
    """Refuses the package."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_vit_scratch":
            raise ImportError(f"{name} is blocked")


sys.meta_path.insert(0, Blocked())
for name in ("modeling_vit_scratch", "modeling_vit_scratch.configuration_vit_scratch"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} can be imported: this proves nothing")
