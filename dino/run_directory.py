"""A run's directory: one process at a time, one configuration for ever."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dino.refused import Refused

CONFIG = "config.yaml"

# Keys that change no result: with other values of these it is the same run, in the same directory.
FREE = (
    "hydra",
    "name",
    "device",
    "logger",
    "log_every_steps",
    "evaluate_every_epochs",
    "checkpoint",
    "training.num_workers",
    "evaluator.batch_size",
)


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Holds `directory` for this process until the block or the process ends, however it ends.

    Raises Refused where another process holds it, naming its host and pid. A directory in which nothing was written (a
    run that was refused) is taken away again.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ".lock"
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise Refused(
                f"{directory} is in use by {holder}; wait for it, stop it, or give this run another name=."
            ) from None
        file.truncate(0)
        file.write(f"{socket.gethostname()} pid {os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            if [*directory.iterdir()] == [path]:
                path.unlink()
                directory.rmdir()


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
    temporary = directory / f".{CONFIG}.tmp"
    temporary.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    temporary.replace(directory / CONFIG)


def changes_no_result(key: str) -> bool:
    return any(key == free or key.startswith((f"{free}.", f"{free}/")) for free in FREE)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value before, value now) of every setting that differs, but for those that change no result."""
    old, new = dict(_flat(before)), dict(_flat(now))
    return [
        (key, old.get(key, "unset"), new.get(key, "unset"))
        for key in sorted(old.keys() | new.keys())
        if old.get(key, "unset") != new.get(key, "unset") and not changes_no_result(key)
    ]


def _flat(node: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in node.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [(prefix + key, value)]
    return pairs
