"""Files that are whole or not there at all."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Another name to write to: what stands there when the block ends becomes `path`, over what that was.

    Where it fails nothing is left of it. It is one name a folder, so that what a killed process leaves goes with the
    next write; the lock of a run's directory keeps others from it.
    """
    partial = path.with_name(".partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
