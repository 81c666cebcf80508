"""history.json on the disk: valid JSON after every save, and a save writes what is new.

The file has three parts; in the lists there is one entry per line:

    {"iteration_metrics": [     the head only grows: `offset` bytes, up to the end of the last entry
    {...},
    {...}
    ]                           the gap: spaces, over which the next entries are written
    ,"epoch_metrics": [         the tail: written anew where it changed, moved where the gap is too small
    {...}
    ],
    "metadata": {...}}

A moved tail gets a gap of at least its own length before it. So a save writes three times the length of its new entries
on average, however many epochs and settings there are.
"""

import copy
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dino.runtime.files import atomic_write

Entries = list[dict[str, Any]]

HEAD = b'{"iteration_metrics": ['
END = b"\n]"  # of the iterations
LEAST_GAP = 4096  # bytes: some ten entries


class HistoryFile:
    """A history.json as the last `write` left it."""

    def __init__(self, path: Path | None = None, offset: int = 0, iterations: int = 0) -> None:
        """With a path: a file of which only the head is known, its length and the number of entries in it."""
        self.path, self.offset, self.iterations = path, offset, iterations
        self._tail_at, self._size = 0, 0
        self._in_tail: tuple[int, dict[str, Any], dict[str, Any]] | None = None

    def write(self, path: Path, iterations: Entries, epochs: Entries, metadata: Mapping[str, Any]) -> None:
        """Writes what the file at `path` does not hold yet; a file there that is not the last written is replaced.

        Raises OSError where the disk is full; the file is then as it was.
        """
        size = path.stat().st_size if path == self.path and path.is_file() else 0
        known = self.iterations > 0 and size >= self.offset
        at = self.offset if known else 0
        new = _head(iterations[self.iterations :], at) if known else _head(iterations, 0)
        end = at + len(new)
        fits = known and size == self._size and end + len(END) <= self._tail_at
        in_tail = (len(epochs), dict(epochs[-1]) if epochs else {}, dict(metadata))
        if fits and in_tail == self._in_tail:
            _write_at(path, at, new + END)
        else:
            tail = _tail(epochs, metadata)
            tail_at = self._tail_at if fits else end + len(END) + max(LEAST_GAP, len(tail))
            content = (new + END).ljust(tail_at - at) + tail
            if known:
                _write_at(path, at, content, to_end=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as partial:
                    partial.write_bytes(content)
            self._tail_at, self._size, self._in_tail = tail_at, tail_at + len(tail), copy.deepcopy(in_tail)
        self.path, self.offset, self.iterations = path, end, len(iterations)

    @classmethod
    def cut_back(cls, path: Path, offset: int, iterations: int) -> tuple["HistoryFile", Entries]:
        """The file as it was when its head had this length and so many entries, and the entries. It is cut by `write`.

        Raises FileNotFoundError or ValueError where it no longer holds them.
        """
        what_to_do = "Put the run's own history.json back, or start in another directory with init_from=<this run>."
        if not path.is_file():
            raise FileNotFoundError(f"history: {path} is gone, but the checkpoint goes on from it. {what_to_do}")
        with path.open("rb") as file:
            head = file.read(offset)
        try:
            entries = json.loads(head + b"]}")["iteration_metrics"]
        except (ValueError, KeyError, TypeError):
            entries = []
        if len(entries) != iterations:
            raise ValueError(
                f"history: the first {offset} bytes of {path} should hold {iterations} iterations, as they did when "
                f"the checkpoint was written, but do not. {what_to_do}"
            )
        return cls(path, offset, iterations), nan_for_null(entries)


def read(path: Path) -> tuple[dict[str, Any], Entries, Entries]:
    """(metadata, iterations, epochs). Raises FileNotFoundError, and ValueError for what is no complete history."""
    if not path.is_file():
        raise FileNotFoundError(f"history: no file at {path}; expected the history.json of a run.")
    try:
        content = json.loads(path.read_bytes())
        metadata, iterations, epochs = (content[key] for key in ("metadata", "iteration_metrics", "epoch_metrics"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"history: {path} is not a complete history ({error}); give the history.json of a run. "
            "If the run was killed while writing it, start the run again: it mends the file."
        ) from error
    return metadata, nan_for_null(iterations), nan_for_null(epochs)


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a history.json, which are its last line: the file itself may be large. {} where it has none."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            for tail in (65536, size):
                file.seek(max(0, size - tail))
                if found := re.search(rb'^"metadata": (.*)\}\s*\Z', file.read(), re.MULTILINE):
                    metadata = json.loads(found[1])
                    return metadata if isinstance(metadata, dict) else {}
    except (OSError, ValueError):  # none yet, or being written at this moment
        pass
    return {}


def nan_for_null(entries: Entries) -> Entries:
    return [{key: math.nan if value is None else value for key, value in entry.items()} for entry in entries]


def _head(entries: Entries, at: int) -> bytes:
    """Entries as they follow on byte `at` of the head."""
    lines = [_json(entry) for entry in entries]
    return b"".join(b",\n" + line for line in lines) if at else HEAD + b"\n" + b",\n".join(lines)


def _tail(epochs: Entries, metadata: Mapping[str, Any]) -> bytes:
    lines = b",\n".join(_json(entry) for entry in epochs)
    return b'\n,"epoch_metrics": [\n' + lines + b'\n],\n"metadata": ' + _json(metadata) + b"}\n"


def _write_at(path: Path, at: int, content: bytes, to_end: bool = False) -> None:
    """Writes `content` from byte `at` on; to_end: the file ends there. OSError (a full disk) leaves what was there."""
    with path.open("r+b", buffering=0) as file:  # unbuffered: one write, so that a kill can hardly fall in it
        file.seek(at)
        before = file.read() if to_end else file.read(len(content))
        try:
            _write(file, at, content, to_end)
        except OSError:
            _write(file, at, before, to_end)  # over what it had room for
            raise


def _write(file: Any, at: int, content: bytes, to_end: bool) -> None:
    file.seek(at)
    while content:  # a raw file may take less than it is given
        content = content[file.write(content) :]
    if to_end:
        file.truncate()


def _json(value: Any) -> bytes:
    return json.dumps(_null_for_nan(value), allow_nan=False, default=str).encode()


def _null_for_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _null_for_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_null_for_nan(item) for item in value]
    return value
