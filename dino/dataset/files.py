"""Image files on disk with a label each: what every data set that reads folders comes down to."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from dino.dataset.encoded import BrokenImage, EncodedImages
from dino.dataset.index import Files

log = logging.getLogger(__name__)


def subfolders(*folders: Path) -> list[str]:
    """Names of the folders in `folders`, each once, sorted, without the hidden ones (.ipynb_checkpoints, ...). A folder
    that does not exist has none."""
    entries = [entry for folder in folders if folder.is_dir() for entry in os.scandir(folder)]
    return sorted({entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()})


def images_by_class(files: Files) -> dict[str, int]:
    """How many images each class folder has, classes sorted; "" stands for those that lie in none. A class may be
    spread over several of the folders searched."""
    images: dict[str, int] = {}
    for name, count in zip(files.heads(), files.counts.tolist(), strict=True):
        images[name] = images.get(name, 0) + count
    return dict(sorted(images.items()))


def labelled(files: Files, classes: Sequence[str]) -> tuple[Int[ndarray, " images"], Int[ndarray, " images"]]:
    """Which of the files are of `classes`, sorted by class, and the label of each, the place of its class in `classes`.

    Class folders without images, as an unfinished copy leaves them, are warned of.
    """
    if empty := [name for name, count in images_by_class(files).items() if name and not count]:
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        where = " and ".join(str(files.root / top) for top in dict.fromkeys(top for top, _ in files.folders))
        log.warning(
            f"Class folders without images in {where}: {', '.join(empty[:3])}{more}. Copy them again or remove them."
        )
    label = {name: i for i, name in enumerate(classes)}
    labels = np.repeat(np.array([label.get(name, -1) for name in files.heads()], np.int64), files.counts)
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    return order, labels[order]


class ImageFiles(EncodedImages):
    """Those of `files` that `chosen` counts, in its order."""

    def __init__(
        self,
        files: Files,
        chosen: Int[ndarray, " images"],
        labels: Int[ndarray, " images"],
        classes: list[str] | None,
    ) -> None:
        self.files, self.chosen, self.labels, self.classes = files, chosen, labels, classes
        self.starts = np.cumsum(files.counts) - files.counts  # of each folder, in the order of the files

    def name(self, index: int) -> str:
        place = int(self.chosen[index])
        top, path = self.files.folders[np.searchsorted(self.starts, place, "right") - 1]
        return os.path.join(self.files.root, top, path, self.files.names[place])  # noqa: PTH118 - once an image

    def encoded(self, index: int) -> bytes:
        path = self.name(index)
        try:
            return Path(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            message = f"{path} is gone, though it was there when the images were listed. Restore it, or start again."
            raise BrokenImage(message, path) from error

    def listed(self) -> Iterator[bytes | memoryview]:
        some = self.files.counts > 0
        folders = [f"{top}/{path}" for (top, path), images in zip(self.files.folders, some, strict=True) if images]
        yield os.fsencode("\0".join(folders))
        yield np.ascontiguousarray(self.files.counts[some]).tobytes()
        yield self.files.names.text.tobytes()
        yield np.ascontiguousarray(self.chosen, np.int64).tobytes()
