"""Whole programs: how fast a run is from files to weights, whether a killed one ends the same, how fast it learns."""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.turn import Turn
from dino.history import History

ROOT = Path(__file__).parents[2]
EVALUATIONS = 8  # of the learning run


def end_to_end(turn: Turn, overrides: Sequence[str]) -> dict[str, float]:
    """Images per second from files to moved weights in the second half of a run, and what an epoch takes beside."""
    turn.alone()
    history, begun, seconds = finished("end_to_end", overrides)
    speeds = history.get_metric("images_per_second")
    epochs = history.to_dataframe("epoch")
    ends, trained = [stamp.timestamp() for stamp in epochs["timestamp"]], epochs["training_seconds"].tolist()
    half = max(1, len(ends) // 2)
    wall = [later - earlier for earlier, later in pairwise(ends)][-half:]
    of_steps = [later - earlier for earlier, later in pairwise(trained)][-half:]
    found = {
        # As many steps to each entry: the harmonic mean is all images by all seconds.
        "images_per_second": statistics.harmonic_mean(speeds[len(speeds) // 2 :]),
        "epoch_s": statistics.fmean(wall),
        "epoch_over_steps": sum(wall) / sum(of_steps),
        "first_step_s": datetime.fromisoformat(history.get_metric("timestamp")[0]).timestamp() - begun,
        "seconds": seconds,
    }
    if "mfu" in history.newest("iteration"):
        found["mfu"] = statistics.fmean(history.get_metric("mfu")[len(speeds) // 2 :])
    return found


def resume(turn: Turn, overrides: Sequence[str]) -> dict[str, float]:
    """Tensors of the last checkpoint of a run that was killed and started again, and how many of them are those of a
    run that was never interrupted, to the bit."""
    overrides = [*overrides, "deterministic=true", "checkpoint.every_epochs=1"]  # to be killed between two
    whole, cut = program("whole", overrides), program("cut", overrides)
    folder = Path("outputs", "cut", "checkpoints")
    while cut.poll() is None and not any(step_of(path) > 1 for path in folder.glob("step_*.pt")):
        time.sleep(0.02)
    cut.send_signal(signal.SIGKILL)
    if cut.wait() != -signal.SIGKILL:
        raise RuntimeError(f"the run was not killed: it ended with status {cut.returncode} before")
    killed_at = max(map(step_of, folder.glob("step_*.pt")))
    check("cut", program("cut", overrides))
    check("whole", whole)
    one, other = (tensors(last_checkpoint(Path("outputs", name))) for name in ("whole", "cut"))
    if one.keys() != other.keys():
        raise RuntimeError("the two checkpoints hold other tensors")
    equal = [name for name, value in one.items() if torch.equal(value, other[name])]
    return {"tensors": len(one), "equal": len(equal), "killed_at": killed_at, "steps": step_of(newest(folder))}


def learning(turn: Turn, measured: dict[str, float], minutes: float, overrides: Sequence[str]) -> dict[str, Any]:
    """k-NN against minutes since the process began, of a run of as many epochs as there is time for.

    measured: what `end_to_end` returned.
    """
    turn.alone()
    epochs = epochs_in(60 * minutes, measured)
    every = max(1, epochs // EVALUATIONS)
    history, begun, seconds = finished(
        "learning", [f"training.epochs={epochs}", f"evaluate_every_epochs={every}", *overrides]
    )
    frame = history.to_dataframe("epoch").dropna(subset=["knn"])
    curve = [
        {"epoch": int(epoch), "minutes": (stamp.timestamp() - begun) / 60, "knn": float(knn)}
        for epoch, stamp, knn in zip(frame["epoch"], frame["timestamp"], frame["knn"], strict=True)
    ]
    return {
        "epochs": epochs,
        "curve": curve,
        "knn": curve[-1]["knn"],
        "minutes": curve[-1]["minutes"],
        "baselines": history.metadata.get("baselines"),
        "seconds": seconds,
    }


def epochs_in(seconds: float, measured: dict[str, float]) -> int:
    """Epochs for which there is time after the start, with a tenth to spare."""
    return max(2, int(0.9 * (seconds - measured["first_step_s"]) / measured["epoch_s"]))


def program(name: str, overrides: Sequence[str]) -> subprocess.Popen[bytes]:
    """`python -m dino.train` in outputs/<name> below the current folder, with what it says in <name>.log."""
    command = [sys.executable, "-m", "dino.train", *overrides, f"name={name}"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with Path(f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": paths})


def check(name: str, running: subprocess.Popen[bytes]) -> None:
    """Waits for its end. Raises RuntimeError, with what it said last, where that is not well."""
    if status := running.wait():
        said = Path(f"{name}.log").read_text(errors="replace").strip().splitlines() or ["nothing"]
        raise RuntimeError(f"{name} ended with status {status}: {said[-1]}")


def finished(name: str, overrides: Sequence[str]) -> tuple[History, float, float]:
    """(history, when it began in seconds since 1970, seconds that it took) of a run that ends well."""
    begun = time.time()
    check(name, program(name, overrides))
    return History.load(Path("outputs", name, "history.json")), begun, time.time() - begun


def last_checkpoint(directory: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(newest(directory / "checkpoints"), map_location="cpu", weights_only=True)
    return state


def newest(folder: Path) -> Path:
    return max(folder.glob("step_*.pt"), key=step_of)


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors of nested dicts and lists, by dotted name."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {key: found for k, v in items for key, found in tensors(v, f"{name}.{k}").items()}
