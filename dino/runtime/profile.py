"""A profile of five steps of a run: a trace for Perfetto (or chrome://tracing), and a table of the operations."""

import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from dino.runtime.files import atomic_write
from dino.runtime.refused import one_line

T = TypeVar("T")
log = logging.getLogger(__name__)
WARM_UP, PROFILED = 10, 5  # steps; compiling, autotuning and the allocator's cache settle in the first ones
ROWS = 60  # of the table: what stands below them takes next to nothing


def profiled(steps: Iterable[T], directory: Path | None) -> Iterable[T]:
    """The very `steps`, for a loop over them; the PROFILED that come after WARM_UP are profiled. None: none are.

    A step is all that the loop does from one step to the next: data, update, recording. Writes trace.json and
    operations.txt to `directory`; a failure of the profiler is a warning, and the loop goes on.
    """
    return steps if directory is None else _profiled(iter(steps), directory)


def _profiled(steps: Iterator[T], directory: Path) -> Iterator[T]:
    yield from itertools.islice(steps, WARM_UP)
    profiler, seen = _start(), 0
    try:
        for step in itertools.islice(steps, PROFILED):
            seen += 1
            yield step
    finally:
        if profiler is not None:
            _write(profiler, directory, seen)
    yield from steps


def _start() -> profile | None:
    on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    try:
        _finish_queued_work()
        profiler = profile(activities=[ProfilerActivity.CPU, *on_gpu], record_shapes=True)
        profiler.start()
    except Exception as error:  # of a foreign library; training needs none of it
        log.warning("profile=true: the profiler does not start (%s); training goes on without it", one_line(error))
        return None
    return profiler


def _write(profiler: profile, directory: Path, seen: int) -> None:
    try:
        _finish_queued_work()
        profiler.stop()
        if seen == 0:
            log.warning("profile=true: nothing is profiled, since the run ends before step %d", WARM_UP + 1)
            return
        directory.mkdir(exist_ok=True)
        with atomic_write(directory / "trace.json") as partial:
            profiler.export_chrome_trace(str(partial))
        by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=100)
        with atomic_write(directory / "operations.txt") as partial:
            partial.write_text(f"{seen} steps\n{table}\n")
        log.info("profiled %d steps: trace.json (for ui.perfetto.dev) and operations.txt in %s", seen, directory)
    except Exception as error:
        log.warning("profile=true: the profile is not written (%s); training goes on", one_line(error))


def _finish_queued_work() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
