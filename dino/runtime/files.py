"""Files that are whole or not there at all, and whether one is there."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Another name to write to: what stands there when the block ends becomes `path`, over what that was.

    Where it fails nothing is left of it. It is one name per folder and suffix: what a killed process leaves goes with
    the next write, and two threads that write files of two kinds do not meet. The lock of a run's directory keeps other
    processes out.
    """
    partial = path.with_name(f".partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_durably(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """`path` as `write` writes it into a file: whole or not at all, and on the disk when this returns.

    Raises OSError, in the disk's words, where it cannot be written.
    """
    with atomic_write(path) as partial, open(partial, "wb") as file:
        try:
            write(file)
        except RuntimeError as error:  # torch.save's own, of a file that it could not end
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself survives a power cut
    finally:
        os.close(folder)


def path_exists(path: str) -> bool:
    """Whether there is such a file or folder, of any text: one that no path can be is none."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, no such user's home
        return False
