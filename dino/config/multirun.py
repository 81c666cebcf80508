"""Around the runs of a sweep: what is left by one that dies, how a signal stops them all, the table at the end.

A run may have a process of its own, on another machine. What the program must know of it stands in two files in the
sweep's directory for as long as the sweep goes on.
"""

import contextlib
import gc
import math
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig

from dino.config.sweep import IN_WORKERS, Sweep
from dino.runtime.refused import Refused, one_line

DIED = ".died"  # a line for each run that died
STOPPED = ".stopped"  # the exit status that a signal asks for; no further run starts

TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1"  # hydra's switch


class NoResult(Exception):
    """A run ended without the number that the sweeper goes by."""


def one_of_a_sweep(run: Callable[[], Any], name: str) -> Any:
    """What `run` returns; where it dies, says why and returns NaN, so that the others run. An exit ends the sweep.

    A sweeper that goes by results gets NoResult in place of NaN, hydra's way to tell it of a failure: Optuna's plugin
    notes the trial as failed then, whereas a NaN would end its study.
    """
    words = "the sweep is stopped"
    if not _shared(STOPPED).exists():
        try:
            result = run()
            if not (_goes_by_results() and math.isnan(result)):
                return result
            words = "it measured no k-NN, which the sweeper goes by; give images with classes"
            _note_death(name, words)
        except SystemExit as stop:
            if not str(HydraConfig.get().launcher.get("_target_")).endswith(IN_WORKERS):
                raise
            if not _shared(STOPPED).exists():  # joblib would kill the other runs where one raises an exit
                _shared(STOPPED).write_text(str(stop.code if isinstance(stop.code, int) else 1))
        except Exception as error:
            status, sentences = described(error)
            if TRACEBACKS or status is None:
                say([traceback.format_exc()])
            words = " ".join(sentences)
            _note_death(name, words)
        gc.collect()  # the memory of the dead run, which the next one wants
    if _goes_by_results():
        raise NoResult(words)  # out here, where no traceback holds that memory
    return math.nan


def described(error: Exception) -> tuple[int | None, list[str]]:
    """(exit status, None where the traceback is wanted; what to say of the error)."""
    if isinstance(error, Refused):
        return 2, [*error.problems]
    status = getattr(error, "exit_status", None)
    return status, [one_line(error) if status is not None else f"{type(error).__name__}: {one_line(error)}"]


def say(sentences: Iterable[str], by_all: bool = False) -> None:
    """On stderr, a line each; from the first of the processes that train together, for all find the same.

    `by_all`: from each, where the first may be gone.
    """
    if by_all or _is_first():
        for text in sentences:
            print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def of_a_sweep(sweep: Sweep) -> Iterator[None]:
    """Around hydra's multirun: exits with status 1 where runs died, or with a signal's where one stopped the sweep;
    shows the table before.
    """
    stopped, died = sweep.directory / STOPPED, sweep.directory / DIED
    if _is_first():
        sweep.record()
        for left in (stopped, died):
            left.unlink(missing_ok=True)
    failed = False
    with _signals_passed_on(sweep, stopped):
        try:
            yield
        except SystemExit as ended:
            if ended.code != 1:
                raise
            failed = True  # hydra has reported it: an error of the sweeper, say, when Optuna has no trial to choose
    if stopped.exists():
        sys.exit(int(stopped.read_text()))
    if not _is_first():
        return
    lines = died.read_text().splitlines() if died.exists() else []
    died.unlink(missing_ok=True)
    _show_table(sweep)
    if lines:
        say([*lines, f"{len(lines)} died; the same command tries again, and passes over what is finished."])
    if lines or failed:
        sys.exit(1)


@contextlib.contextmanager
def _signals_passed_on(sweep: Sweep, stopped: Path) -> Iterator[None]:
    """A signal to this process stops the runs in its workers, which save and end, and then this process.

    While a run is in this process itself, dino.run.stop.StopSignal has the signals.
    """

    def pass_on(signum: int, _: FrameType | None) -> None:
        if not sweep.in_workers:
            sys.exit(128 + signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one stops at once
        stopped.write_text(str(128 + signum))
        for worker in multiprocessing.active_children():
            worker.terminate()  # by SIGTERM; SIGINT the terminal has sent them, and a second would stop them unsaved

    # SIGUSR2 that comes while a run is in this process is handed on to its former handler: none, here.
    signals = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR2] if sweep.in_workers else []))
    before = {signum: signal.signal(signum, pass_on) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _show_table(sweep: Sweep) -> None:
    from dino.run.comparison import compare

    try:
        print(compare([sweep.directory]), flush=True)
    except (Refused, OSError) as error:  # nothing has begun, or a full disk: no reason to call the sweep a failure
        say([f"no table of the sweep: {error}"])


def _note_death(name: str, words: str) -> None:
    say([f"{name} died: {words}"])
    if _is_first():
        with open(_shared(DIED), "a") as file:
            file.write(f"{name} died: {words}\n")


def _goes_by_results() -> bool:
    """Whether the sweeper, such as Optuna's, chooses runs by what the last ones returned. Hydra's own does not."""
    return not str(HydraConfig.get().sweeper.get("_target_")).endswith("BasicSweeper")


def _shared(name: str) -> Path:
    settings = HydraConfig.get()
    return Path(settings.runtime.cwd, settings.sweep.dir, name)


def _is_first() -> bool:
    from dino.runtime.processes import place

    return place().rank == 0
