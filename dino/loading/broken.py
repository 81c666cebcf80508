"""Images that cannot be read: passed over, counted and listed; more than a few, and the run ends."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from dino.dataset.encoded import BrokenImage
from dino.runtime.files import atomic_write

T = TypeVar("T")
log = logging.getLogger(__name__)
LIST = "broken_images.txt"  # in the run directory, a sentence a line
MOST = 0.01  # of a data set: above it something is wrong with the disk or the copy, not with some files


class TooManyBroken(RuntimeError):
    """More of the images are broken than can be passed over."""

    exit_status = 5


def too_many(broken: int, images: int) -> bool:
    return broken > MOST * images


def refusal(broken: int, images: int, directory: Path) -> TooManyBroken:
    return TooManyBroken(
        f"{broken:,} of {images:,} images cannot be read, more than {MOST:.0%}; they are listed in "
        f"{directory / LIST}. Repair them and run the same command, or start anew without them."
    )


def first_readable(load: Callable[[int], T], index: int, images: int) -> tuple[T, list[str]]:
    """`load(index)`, or that of the first after it that can be read, and a sentence for each broken one passed over.

    The same in every process and on resume, as long as the files are.
    """
    broken: list[str] = []
    while True:
        try:
            return load((index + len(broken)) % images), broken
        except BrokenImage as error:
            broken.append(str(error))
            if len(broken) > 1 and too_many(len(broken), images):
                raise TooManyBroken(f"{len(broken)} images in a row cannot be read; the last: {error}") from error


def note(sentences: Iterable[str], broken: set[str]) -> None:
    """Adds to `broken` what it does not have yet, and says it."""
    for sentence in {*sentences} - broken:
        log.warning("passed over: %s", sentence)
        broken.add(sentence)


def write_list(directory: Path, broken: set[str]) -> None:
    """directory/broken_images.txt: those that it listed before, from another start of the run, and `broken`."""
    path = directory / LIST
    before = path.read_text().splitlines() if path.exists() else []
    if broken - {*before}:
        with atomic_write(path) as partial:
            partial.write_text("".join(f"{sentence}\n" for sentence in sorted({*before, *broken})))
