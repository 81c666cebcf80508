"""The classes that a configuration names: how such a name looks, and where a command finds them."""

import sys
from pathlib import Path


def find_in_current_folder() -> None:
    """Lets a console script import packages of the current folder, as `python -m` does."""
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)


def dotted(name: str) -> bool:
    """Whether that is the name of a package, a module or a class: identifiers with dots between them."""
    return all(part.isidentifier() for part in name.split("."))
