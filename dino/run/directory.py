"""A run's directory: one process at a time, one configuration for ever."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import yaml

from dino.history.file import read_metadata
from dino.runtime.files import atomic_write
from dino.runtime.nested import flat
from dino.runtime.refused import Refused

CONFIG = "config.yaml"
HYDRAS = ".hydra"  # what hydra writes of a command: its config, its overrides
SWEEP = "sweep.json"  # which runs a sweep's directory has or will have, by dino.config.sweep

# A resume may change these keys: they change no result, or only its rounding.
KEYS_FREE_TO_CHANGE = (
    "hydra",
    "name",
    "device",
    "compile",
    "graph",
    "deterministic",
    "logger",
    "trust",
    "log_every_steps",
    "evaluate_every_epochs",
    "profile",
    "checkpoint",
    "training.num_workers",
    "training.skip_nonfinite_steps",  # so that a run which a NaN stopped can go on with it
    "evaluator.batch_size",
)

# A resume may change these keys if their product, the effective batch in the checkpoint, stays the same.
KEYS_OF_EFFECTIVE_BATCH = (
    "training.batch_size",
    "training.gradient_accumulation_steps",
    "training.effective_batch",
)

# A resume may change these keys: they say where the images lie. The fingerprint of the train images must stay the same.
KEYS_OF_PLACE = tuple(f"dataset.{key}" for key in ("root", "train.root", "val.root", "train.download", "val.download"))


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Holds `directory` for this process until the block or the process ends, however it ends.

    Raises Refused where another process holds it, naming its host and pid, and where it cannot be written to. A
    directory in which nothing was written (a run that was refused) is taken away again.
    """
    path = directory / ".lock"
    with contextlib.ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "a+b", buffering=0))
            _take(file)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "another process"
            raise Refused(
                f"{directory} is in use by {holder}; wait for it, stop it, or give this run another name=."
            ) from None
        except OSError as error:
            raise Refused(
                f"{directory} cannot be written to ({error.strerror}); make it writable, or give another hydra.run.dir="
            ) from error
        try:
            yield
        finally:
            if {each.name for each in directory.iterdir()} <= {path.name, HYDRAS}:
                path.unlink()
                with contextlib.suppress(OSError):  # hydra's folder is hydra's to take away
                    directory.rmdir()


class DiskFull(OSError):
    """A disk that took a run so far takes no more of it."""

    exit_status = 8


@contextlib.contextmanager
def full_disk_in_a_sentence(directory: Path) -> Iterator[None]:
    """Raises DiskFull, with what to do, where something cannot be written in the block for want of room or rights."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        last = max((directory / "checkpoints").glob("step_*.pt"), default=None)
        kept = "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
        raise DiskFull(
            f"{directory} takes no more ({error.strerror}); {kept}. Make room, and the same command goes on."
        ) from error


def check_writable(directory: Path) -> None:
    """Raises Refused where `directory` could not be made or written to. Only looks."""
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        wrong = "Permission denied, or a read-only disk" if there.is_dir() else f"Not a directory: {there}"
        raise Refused(f"{directory} cannot be written to ({wrong}); make it writable, or give another hydra.run.dir=")


def check_claim(directory: Path, config: dict[str, Any]) -> None:
    """Raises Refused where `directory` holds a run of other settings, listing the keys that differ."""
    path = directory / CONFIG
    if not path.exists():
        return
    try:
        before = yaml.safe_load(path.read_text())
    except yaml.YAMLError:
        before = None
    if not isinstance(before, dict):
        raise Refused(f"{path} cannot be read as YAML; mend it or move the directory away.")
    if differing := differences(before, config):
        listed = "; ".join(f"{key} was {old!r}, now {new!r}" for key, old, new in differing)
        raise Refused(f"{directory} holds a run of other settings ({listed}); set them back, or give another name=.")


def claim(directory: Path, config: dict[str, Any]) -> None:
    """Writes what this run is made of, whole or not at all."""
    with atomic_write(directory / CONFIG) as partial:
        partial.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def changes_no_result(key: str) -> bool:
    return any(key == free or key.startswith((f"{free}.", f"{free}/")) for free in KEYS_FREE_TO_CHANGE)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value before, value now) of every setting that differs, but for those that a resume may change.

    A key that is new is no difference: the run began without it, in an older version of this program, say.
    """
    old, new = dict(flat(before)), dict(flat(now))
    return [
        (key, old[key], new.get(key, "unset"))
        for key in sorted(old)
        if old[key] != new.get(key, "unset")
        and not changes_no_result(key)
        and key not in KEYS_OF_EFFECTIVE_BATCH
        and key not in KEYS_OF_PLACE
    ]


@dataclass(frozen=True)
class State:
    """Where a run stands. `step`: of its newest checkpoint, 0 where there is none; `total_steps`: None if not known."""

    name: Literal["finished", "running", "died", "not started"]
    step: int = 0
    total_steps: int | None = None

    def __str__(self) -> str:
        if self.name == "running" and self.total_steps is not None:
            return f"running, {self.step} of {self.total_steps}"
        return f"died at step {self.step}" if self.name == "died" else self.name


def state_of(directory: Path) -> State:
    """Where the run in `directory` stands, from the names of a few files and the end of one: quick for thousands.

    Died: it was begun, is not at its last step, and no process holds it. That is also said of a run that a signal
    stopped, and of one that waits for its requeue.
    """
    steps = [int(path.stem[5:]) for path in (directory / "checkpoints").glob("step_*.pt") if path.stem[5:].isdecimal()]
    step, total = max(steps, default=0), read_metadata(directory / "history.json").get("total_steps")
    if not isinstance(total, int):
        total = None
    if steps and step == total:
        return State("finished", step, total)
    if is_held(directory):
        return State("running", step, total)
    return State("died" if steps or (directory / CONFIG).exists() else "not started", step, total)


def is_held(directory: Path) -> bool:
    """Whether a process holds the directory's lock. Only looks: creates nothing, keeps nobody out.

    For an instant it shares the lock, so `lock` tries more than once before it refuses.
    """
    try:
        with open(directory / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # none there, or not ours to read, or a disk without locks: nobody is known to hold it
        pass
    return False


def _take(file: IO[bytes]) -> None:
    """Locks `file` for this process alone, and says so in it.

    Raises BlockingIOError where another holds it for a second: no mere look, then.
    """
    for attempt in range(100):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if attempt == 99:
                raise
            time.sleep(0.01)
    file.truncate(0)
    file.write(f"{socket.gethostname()} pid {os.getpid()}\n".encode())
