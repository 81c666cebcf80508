"""What a run needs to go on exactly where it was."""

import contextlib
import logging
import os
import pickletools
import random
import re
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dino.refused import Refused
from dino.whole import whole, write_durably

log = logging.getLogger(__name__)
FOLDER = "checkpoints"
BEST = "best.pt"
CONSTRUCTORS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch [A-Z][A-Za-z0-9]*Storage")


def save_checkpoint(directory: Path, state: dict[str, Any], keep: int = 2, best: bool = False) -> Path:
    """Writes `state` (tensors and plain values; `iteration` names the file) below directory/checkpoints.

    Complete or not there at all: written under another name, synced, renamed. Then all but this one and the `keep` - 1
    before it go: one of a later step was passed over as broken. With `best`, this one is kept as best.pt too (a second
    name of the same file, no second copy).
    """
    path = directory / FOLDER / f"step_{state['iteration']:09d}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, lambda file: torch.save({**state, "timestamp": datetime.now(UTC).isoformat()}, file))
    if best:
        with whole(path.with_name(BEST)) as link:
            link.unlink(missing_ok=True)
            os.link(path, link)
    paths = _newest_first(directory)
    kept = paths[paths.index(path) :][:keep]
    for other in paths:
        if other not in kept:
            other.unlink()
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint in this file, on the CPU. It may come from a stranger: nothing in it is executed, and it takes no
    more memory than the file has bytes.

    Each part is compared with the checksum beside it, which torch.load ignores. Raises where anything is wrong with the
    file, be it one bit, and it can be any exception.
    """
    with zipfile.ZipFile(path) as parts:
        entries = parts.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, as no checkpoint of this project is")
        if (claimed := sum(entry.file_size for entry in entries)) > path.stat().st_size:
            raise ValueError(f"its parts claim {claimed:,} bytes, and the file has {path.stat().st_size:,}")
        if (part := parts.testzip()) is not None:
            raise ValueError(f"{part} in it is not what was written")
        for entry in entries:
            if entry.filename.endswith("/data.pkl"):
                _check_constructors(parts.read(entry))
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _check_constructors(program: bytes) -> None:
    """Raises ValueError where the pickle in a checkpoint calls more than dicts and tensors of the file's parts need.

    torch.load with weights_only=True executes no code, but allows some more calls: torch.Tensor(10**12), for one, which
    takes as much memory as the file asks for.
    """
    for opcode, name, _ in pickletools.genops(program):
        if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST") and not CONSTRUCTORS.fullmatch(str(name)):
            raise ValueError(f"it calls {name}, as no checkpoint of this project does")


def check_read_back(path: Path, state: dict[str, Any]) -> None:
    """Raises Refused where the file at `path` does not give the student's weights of `state` back, bit for bit."""
    try:
        student = read_checkpoint(path)["student"]
        written = {name: value.cpu() for name, value in state["student"].items()}
        same = all(torch.allclose(student[name], written[name], 0, 0, equal_nan=True) for name in written)
    except Exception as error:
        raise Refused(f"{path} was written and cannot be read back ({error}); use another disk.") from error
    if not same:
        raise Refused(f"{path} was written and reads back other weights; use another disk.")


def load_checkpoint(directory: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint below `directory`, on the CPU; None where there is none yet.

    A broken one is passed over, saying so; after all others comes the best. Raises Refused where all are broken: to
    start afresh without a word would throw the run away.
    """
    paths = [*_newest_first(directory), *(directory / FOLDER).glob(BEST)]
    for path in paths:
        try:
            return read_checkpoint(path)
        except Exception as error:
            log.warning("%s cannot be read (%s); trying the one before.", path, str(error).split("\n")[0])
    if paths:
        raise Refused(
            f"none of the {len(paths)} checkpoints in {directory / FOLDER} can be read; restore one from a backup, "
            "or move the directory away to start afresh."
        )
    return None


def seed_all(seed: int) -> None:
    """Seeds the generators that `rng_state` saves."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """Every global random generator of this process and its device, as plain values and tensors."""
    numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))
    return {
        "python": random.getstate(),
        "numpy": {
            **numpy,
            "state": {**numpy["state"], "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64))},
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    inner = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {**inner, "key": inner["key"].numpy().astype(np.uint32)}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """What the block draws is not drawn from the run: an import may draw too (that of rich), at each start."""
    before = rng_state()
    try:
        yield
    finally:
        set_rng_state(before)


def _newest_first(directory: Path) -> list[Path]:
    return sorted((directory / FOLDER).glob("step_*.pt"), reverse=True)
