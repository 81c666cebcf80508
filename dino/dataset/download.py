"""A download that ends whole or not at all."""

import contextlib
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path


def download(name: str, root: Path, folder: str, fetch: Callable[[str], object]) -> None:
    """Let `fetch(directory)` make `directory/folder`, then move that to `root/folder`.

    A relative `root` is created where its parent exists; a missing absolute one is an error at once, since it is more
    often a disk that is not mounted, or a typing error, than a wish. Killed at any moment, this leaves no half
    `root/folder`, and of two processes that download at the same time the first to end provides the data for both.

    Raises:
        FileNotFoundError: `root` can't be used, or the download failed.
    """
    advice = f"set dataset.root to the folder that holds {folder}"
    if not root.is_dir() and (root.is_absolute() or not root.parent.is_dir()):
        raise FileNotFoundError(
            f"{name}: dataset.root={root} is not a folder. Create it to download there, or {advice}."
        )
    created = not root.exists()
    try:
        root.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{folder}-") as directory:
            with data_filter():
                fetch(directory)
            try:
                Path(directory, folder).rename(root / folder)
            except OSError:
                if not (root / folder).is_dir():  # else another process was quicker
                    raise
    except (OSError, HTTPException, tarfile.TarError, RuntimeError) as error:  # RuntimeError: a wrong checksum
        raise FileNotFoundError(
            f"{name}: no {folder} in dataset.root={root}, and downloading it failed ({error}). "
            f"Download it by hand, or {advice}."
        ) from error
    finally:
        if created and root.is_dir() and not any(root.iterdir()):
            root.rmdir()


@contextlib.contextmanager
def data_filter() -> Iterator[None]:
    """Archives opened in this block are extracted with tarfile's data filter (PEP 706), whoever extracts them.

    It refuses what lies outside the folder, links that lead there, and devices. torchvision names no filter, so that it
    depends on the Python: none before 3.12, none and a warning up to 3.13.
    """
    before = tarfile.TarFile.extraction_filter
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    finally:
        tarfile.TarFile.extraction_filter = before
