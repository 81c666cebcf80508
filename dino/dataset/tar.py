"""Images in tar files ("shards"), laid out as WebDataset lays them out, each read where it lies."""

import glob
import json
import os
import re
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from dino.dataset import check_split, part_of
from dino.dataset.encoded import EXTENSIONS, BrokenImage, EncodedImages
from dino.dataset.index import RACY, Names, load, store

MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # a sample's key, up to the first dot of the file's name; what it is
PRIVATE = re.compile(r"(.*/)?__[^/]*__(/.*)?")  # WebDataset's notes on the shard
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class Member(NamedTuple):
    """A file in a shard: bytes `start` to `start + size`."""

    name: str
    key: str
    kind: str  # "jpg", "cls", ...
    start: int
    size: int


class Tar(EncodedImages):
    """The samples of all shards, as a map: any of them can be read at any time, so shuffling, processes and resuming
    are what they are for files.

    `shards` is below `root`: a pattern (`train-*.tar`), a range (`train-{000000..000146}.tar`) or a folder of them.
    `val_shards` alike; where it is None, val is made of `shards`, as the folder data set does it: every tenth sample,
    which labelled train then does without.

    A sample is the files whose names agree up to the first dot: the image (the one with an image's extension, or the
    extension `image` where there are several) and its label, a number, in `.cls` or under "label" or "cls" in `.json`.
    `classes.txt` or `classnames.txt` beside the shards or in `root`, a line each, names the classes. Members are found
    by reading the shards' headers once; the index is used as long as path, size and time of every shard are the same.

    Raises FileNotFoundError for shards that are not there, ValueError for those that cannot be used, naming the place.
    """

    def __init__(
        self, root: str | Path | None, split: str, shards: str, val_shards: str | None = None, image: str | None = None
    ) -> None:
        check_split(split)
        if root is None:
            raise ValueError("Tar: no folder given. Set dataset.root to the folder that holds the shards.")
        root = Path(root).expanduser()
        own = val_shards is not None
        self.shards = find_shards(root, val_shards if val_shards is not None and split == "val" else shards)
        self.stamps = [stamp(shard) for shard in self.shards]
        arrays = indexed(self.shards, self.stamps, image)
        if not len(arrays["labels"]):
            raise ValueError(f"Tar: no samples in {self.shards[0]} and the other shards. Make them again.")
        labels = arrays["labels"]
        some = labels >= 0
        if some.any() and not some.all():
            without = Names(arrays["names"])[int(np.flatnonzero(~some)[0])]
            raise ValueError(
                f"Tar: {some.sum():,} of {len(some):,} samples have a label, {without} has none. Label all or none."
            )
        self.classes = class_names(root, self.shards[0].parent, int(labels.max()) + 1) if some.any() else None
        chosen = np.arange(len(labels)) if own else part_of(len(labels), split, labelled=self.classes is not None)
        self.names, self.chosen, self.labels = Names(arrays["names"]), chosen, labels[chosen]
        self.shard, self.start, self.size = (arrays[key][chosen] for key in ("shard", "start", "size"))
        self.inside = [str(s.relative_to(root) if s.is_relative_to(root) else s.name) for s in self.shards]

    def name(self, index: int) -> str:
        return f"{self.shards[self.shard[index]]}/{self.names[int(self.chosen[index])]}"

    def encoded(self, index: int) -> bytes:
        number = int(self.shard[index])
        try:  # opened anew: nothing that a forked or spawned worker, or a thread, could share by mistake
            with open(self.shards[number], "rb", buffering=0) as file:
                if stamp(file.fileno()) == self.stamps[number]:
                    return os.pread(file.fileno(), int(self.size[index]), int(self.start[index]))
        except FileNotFoundError:
            pass
        message = f"{self.name(index)}: the shard has gone or changed since it was indexed. Restore it, or start again."
        raise BrokenImage(message, self.name(index))

    def listed(self) -> Iterator[bytes | memoryview]:
        yield os.fsencode("\0".join(self.inside))
        for array in (self.shard, self.chosen):
            yield np.ascontiguousarray(array, np.int64).tobytes()
        yield self.names.text.tobytes()


def find_shards(root: Path, pattern: str) -> list[Path]:
    if (root / pattern).is_dir():
        pattern = os.path.join(pattern, "*.tar")  # noqa: PTH118 - a pattern
    paths: list[Path] = []
    for name in in_braces(pattern):  # below the root, whose own name may look like a pattern
        found = sorted(glob.glob(name, root_dir=root)) if glob.has_magic(pattern) else [name]  # noqa: PTH207 - may be absolute
        paths += [root / path for path in found]
    if not paths:
        raise FileNotFoundError(
            f"Tar: no shards {root / pattern}. Set dataset.root, or the shards or val_shards of dataset.train."
        )
    if missing := [path for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"Tar: {len(missing)} of {len(paths)} shards are missing, the first: {missing[0]}. Copy them, or set "
            "dataset.root, or the shards or val_shards of dataset.train, to those that are there."
        )
    return paths


def in_braces(pattern: str) -> list[str]:
    """`a{08..10}` -> a08, a09, a10; `{a,b}` -> a, b; as a shell reads them."""
    if not (braces := re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)):
        return [pattern]
    first, last, names = braces.groups()
    if names is None:
        width = max(len(end) for end in (first, last)) if "0" in (first[0], last[0]) else 0
        choices = [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]
    else:
        choices = names.split(",")
    return [
        done for choice in choices for done in in_braces(pattern[: braces.start()] + choice + pattern[braces.end() :])
    ]


def stamp(shard: Path | int) -> tuple[int, int]:
    status = os.stat(shard)  # noqa: PTH116 - an open file, too
    return status.st_size, status.st_mtime_ns


def indexed(shards: list[Path], stamps: list[tuple[int, int]], image: str | None) -> dict[str, Any]:
    """Of every sample: `shard` (its number), `start` and `size` (bytes) of its image in it, `labels` (-1: none) and
    `names`, the image's in the shard."""
    key = "\0".join(["tar", image or "", *map(os.path.realpath, shards)])
    if (kept := load(key)) and kept["stamps"].tolist() == [list(pair) for pair in stamps]:
        return kept
    now = time.time()
    with ThreadPoolExecutor() as pool:  # threads: to wait for several at a time where the disk is a network away
        found = list(pool.map(lambda shard: samples_in(shard, image), shards))
    arrays: dict[str, Any] = {
        "stamps": np.array(stamps),
        "shard": np.repeat(np.arange(len(shards), dtype=np.int32), [len(names) for names, _ in found]),
        "names": Names.of(name for names, _ in found for name in names).text,
    }
    arrays |= zip(("start", "size", "labels"), np.concatenate([numbers for _, numbers in found]).T, strict=True)
    if all(changed < (now - RACY) * 1e9 for _, changed in stamps):
        store(key, arrays)
    return arrays


def samples_in(shard: Path, image: str | None) -> tuple[list[str], Int[ndarray, "samples 3"]]:
    """Names of the images in a shard, and of each start, size and label."""
    names, numbers = [], []
    with shard.open("rb", buffering=0) as file:
        for key, group in groupby(members(shard, file), key=lambda member: member.key):
            files = list(group)
            images = [m for m in files if (m.kind == image if image else f".{m.kind}" in EXTENSIONS)]
            if len(images) != 1:
                raise ValueError(
                    f"Tar: {shard}/{key}: expected one image in a sample, got {len(images)}, in the files "
                    f"{', '.join(m.name for m in files)}. Make the shard again with the files of a sample side by "
                    "side, or set the `image` of dataset.train and val to the extension that is meant."
                )
            names.append(images[0].name)
            numbers.append((images[0].start, images[0].size, label(shard, file.fileno(), files)))
    return names, np.array(numbers, np.int64).reshape(-1, 3)


def members(shard: Path, file: Any) -> Iterator[Member]:
    begin = os.pread(file.fileno(), 2, 0)
    if begin in COMPRESSED:
        raise ValueError(
            f"Tar: {shard} is compressed ({COMPRESSED[begin]}), so that an image in it cannot be read without all "
            "before it. Unpack it to a plain tar, which is hardly larger: images are compressed already."
        )
    size = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined] # else all of them are kept
                if info.offset_data + info.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                if info.isreg() and (parts := MEMBER.fullmatch(info.name)) and not PRIVATE.fullmatch(info.name):
                    yield Member(info.name, parts[1], parts[2].lower(), info.offset_data, info.size)
            if os.pread(file.fileno(), 512, tar.offset).strip(b"\0"):
                raise tarfile.ReadError("no header where one was expected")
            if tar.offset + 512 > size:
                raise tarfile.ReadError("no end marker")
    except tarfile.TarError as error:
        raise ValueError(f"Tar: {shard} is cut short or broken ({error}). Copy it again.") from error


def label(shard: Path, file: int, files: list[Member]) -> int:
    """From the sample's `.cls`, else its `.json`; -1 where neither has one."""
    text = {m.kind: os.pread(file, m.size, m.start) for m in files if m.kind in ("cls", "json")}
    value: Any = None
    try:
        if "cls" in text:
            value = int(text["cls"])
        elif "json" in text:
            notes = json.loads(text["json"])
            value = notes.get("label", notes.get("cls")) if isinstance(notes, dict) else None
    except ValueError:
        value = (text.get("cls") or text["json"])[:40]
    if value is None:
        return -1
    if type(value) is not int or value < 0:
        raise ValueError(
            f"Tar: {shard}/{files[0].key}: the label must be a number from 0 on, got {value!r}. Correct it."
        )
    return value


def class_names(root: Path, folder: Path, classes: int) -> list[str]:
    """From classes.txt or classnames.txt, else the numbers."""
    for path in (place / name for place in (folder, root) for name in ("classes.txt", "classnames.txt")):
        if path.is_file():
            names = path.read_text().splitlines()
            if len(names) < classes:
                raise ValueError(
                    f"Tar: {path} has {len(names)} lines, but the labels go to {classes - 1}. Add a line each."
                )
            return names
    return [str(number) for number in range(classes)]
