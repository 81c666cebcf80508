"""Which images lie below a folder: found once, kept in `$XDG_CACHE_HOME/dino-train`, and looked up from then on."""

import hashlib
import os
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray

from dino.dataset.encoded import EXTENSIONS

VERSION = 1  # of what an index holds: another version is built anew
RACY = 2.0  # seconds; the coarsest clock of a file system. What changed so lately may change again unseen
WORTH = 10_000  # images; fewer are found as quickly as an index is read


class Names:
    """Many strings in one array: a list of a million takes ten times the memory, and every worker copies its pages."""

    def __init__(self, text: UInt8[ndarray, " bytes"]) -> None:
        self.text = text  # each name with a zero byte after it
        self.ends = np.flatnonzero(text == 0)

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        text = b"".join(os.fsencode(name) + b"\0" for name in names)
        return cls(np.frombuffer(text, np.uint8))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        end = self.ends[index]
        start = self.ends[index - 1] + 1 if index % len(self) else 0
        return os.fsdecode(self.text[start:end].tobytes())


@dataclass(frozen=True)
class Files:
    """The images below `root`, folder by folder."""

    root: Path
    folders: list[tuple[str, str]]  # (the one of `below` that it lies in, its path there), also those without images
    counts: Int[ndarray, " folders"]  # images in each
    names: Names  # of the images, in the order of the folders

    def heads(self) -> list[str]:
        """Of each folder: the first step of its path, "" for those that were asked for."""
        return [path.split(os.sep, 1)[0] for _, path in self.folders]


def find_images(root: Path, *below: str) -> Files:
    """Image files in the folders `below` root ("" is root itself) at any depth, each folder's sorted by name. A folder
    that does not exist has none.

    Folders come in the order of their paths, part by part. Links are followed, but not to a folder above; what begins
    with a dot is passed over. An index made before is used while the time of change of every folder in it is the same:
    adding, removing or renaming a file changes its folder's. (Where a file system keeps no such times, remove the
    index.) Raises OSError for a folder that cannot be read.
    """
    below = tuple(top for top in below if (root / top).is_dir())
    key = "\0".join(["files", *(os.path.realpath(root / top) for top in below)])
    if (kept := load(key)) and (files := unchanged(root, below, kept)):
        return files
    now = time.time()
    found = [(top, *folder) for top in below for folder in walk(os.path.join(root, top), "", ())]  # noqa: PTH118
    files = Files(
        root,
        [(top, path) for top, path, _, _ in found],
        np.array([len(names) for *_, names in found], np.int64),
        Names.of(name for *_, names in found for name in names),
    )
    if len(files.names) >= WORTH and all(changed < (now - RACY) * 1e9 for _, _, changed, _ in found):
        arrays = {
            "tops": np.array([below.index(top) for top, *_ in found]),
            "paths": Names.of(path for _, path, _, _ in found).text,
            "changed": np.array([changed for _, _, changed, _ in found]),
            "counts": files.counts,
            "names": files.names.text,
        }
        store(key, arrays)
    return files


def unchanged(root: Path, below: tuple[str, ...], kept: Mapping[str, Any]) -> Files | None:
    paths = Names(kept["paths"])
    folders = [(below[top], paths[i]) for i, top in enumerate(kept["tops"].tolist())]
    try:
        for (top, path), changed in zip(folders, kept["changed"].tolist(), strict=True):
            if os.stat(os.path.join(root, top, path)).st_mtime_ns != changed:  # noqa: PTH116, PTH118
                return None
    except OSError:
        return None
    return Files(root, folders, kept["counts"], Names(kept["names"]))


def walk(top: str, path: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, int, list[str]]]:
    """(path below `top`, time of its change in ns, its images) of a folder and all that lie in it."""
    here = os.path.join(top, path) if path else top  # noqa: PTH118 - a million Paths take seconds
    status = os.stat(here)  # noqa: PTH116 - before it is read: a change meanwhile makes the index invalid
    if (status.st_dev, status.st_ino) in above:
        return
    names, folders = [], []
    with os.scandir(here) as entries:
        for entry in entries:
            if not entry.name.startswith("."):  # "._x.jpg" and the like are an operating system's notes
                if entry.is_dir():
                    folders.append(entry.name)
                elif is_image(entry.name):
                    names.append(entry.name)
    yield path, status.st_mtime_ns, sorted(names)
    for name in sorted(folders):
        inside = f"{path}{os.sep}{name}" if path else name
        yield from walk(top, inside, (*above, (status.st_dev, status.st_ino)))


def is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)


def kept_at(key: str) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    name = hashlib.sha256(f"{VERSION}\0{key}".encode(errors="surrogateescape")).hexdigest()[:32]
    return Path(cache).expanduser() / "dino-train" / f"{name}.npz"


def load(key: str) -> dict[str, Any] | None:
    """The arrays stored under this key; None where there are none, or they cannot be read."""
    try:
        with kept_at(key).open("rb") as file, np.load(file) as arrays:  # opened here: np.load leaves a torn one open
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, RuntimeError):  # RuntimeError: no home
        return None


def store(key: str, arrays: Mapping[str, ndarray]) -> None:
    """Whole or not at all; in silence where it cannot be written: an index is a convenience."""
    try:
        path = kept_at(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                np.savez(file, **arrays)  # type: ignore[arg-type] # numpy takes them for its own options
                file.close()
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except (OSError, RuntimeError):
        pass
