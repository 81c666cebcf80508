"""Where a command finds the classes that its configuration names."""

import sys
from pathlib import Path


def find_in_current_folder() -> None:
    """Lets a console script import packages of the current folder, as `python -m` does."""
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)
