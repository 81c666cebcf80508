"""Data workers that die or hang: named and stopped, not waited for for ever. Signals that stop a run pass them by."""

import atexit
import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

from torch.utils.data import DataLoader

# In seconds. No disk that a run can do with takes ten minutes for one batch; a network file system that is back within
# them is waited for, and a run that hangs over night loses ten minutes of it.
PATIENCE = 600.0
GRACE = 1.0  # seconds for the workers of a closed loader to end by themselves
# How workers start; None: as Python starts processes. On Linux that is a fork server from Python 3.14 on: each worker
# would import torch anew, and a data set that is kept in memory would be pickled and copied to shared memory, of which
# a container may have 64 MB. A fork shares the memory as it is.
START = "fork" if sys.platform == "linux" else None
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)  # those of dino.run.stop.StopSignal
HANGS = "the data workers (pids {}) have handed over nothing for {:g} s: the disk, or what reads the images, hangs"
END = object()


class WorkerLost(RuntimeError):
    """A data worker died, or hands nothing over."""

    exit_status = 7


class Loader(DataLoader[Any]):
    """torch's DataLoader that raises WorkerLost where a worker has died, or takes longer than PATIENCE for a batch.

    torchrun, `timeout`, systemd and clusters send SIGTERM to every process of a run. The run still needs the batches
    that it waits for, to end its step and save. So workers ignore the signals in STOPS, and end with the loader or
    with their parent. A process group of their own would not do: a cgroup's signals would still reach them.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options = {"worker_init_fn": _outlive_signals} | options
        if options.get("num_workers"):
            options["multiprocessing_context"] = options.get("multiprocessing_context") or START
        super().__init__(*arguments, **options)

    def __iter__(self) -> Any:
        if not self.num_workers:
            yield from super().__iter__()
            return
        batches: Any = None
        workers: list[Any] = []
        kill = functools.partial(_kill, workers)
        atexit.register(kill)  # before multiprocessing's own, which sends SIGTERM and waits
        if (self.multiprocessing_context or multiprocessing).get_start_method() != "fork":
            resource_tracker.ensure_running()  # it would start with the first worker, and unblock the signals
        try:
            with _signals_blocked():
                others, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
                batches = super().__iter__()
                workers += [child for child in multiprocessing.active_children() if child not in others]
                _keep_handler(handler)
            while (batch := _next(batches, workers)) is not END:
                yield batch
        finally:
            grace = threading.Timer(GRACE, kill)
            grace.daemon = True
            if any(worker.is_alive() for worker in workers):
                grace.start()
            batches = None  # torch tells the workers to end, and waits for them
            grace.cancel()
            kill()
            atexit.unregister(kill)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """A worker that starts in this block inherits the mask: no signal ends it before it ignores them itself."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outlive_signals(_: int) -> None:
    """In a worker, before its first batch."""
    for signum in STOPS:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    threading.Thread(target=_end_with_parent, args=[os.getppid()], daemon=True).start()


def _end_with_parent(started_by: int) -> None:
    """torch looks for the parent only between two batches, and with a fork server not at all.

    `started_by`: the pid of the parent, or of the fork server.
    """
    parent: Any = multiprocessing.parent_process()
    while parent.is_alive() and os.getppid() == started_by:
        parent.join(timeout=1.0)
    os._exit(1)


def _keep_handler(before: Any) -> None:
    """Takes away torch's handler of SIGCHLD: it raises wherever the process is when a worker dies, in a checkpoint too.

    Any loader sets it, and the first one of a process may have been torch's own.
    """
    if threading.current_thread() is threading.main_thread():
        of_torch = getattr(before, "__module__", None) == "torch.utils.data._utils.signal_handling"
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if of_torch or before is None else before)


def _next(batches: Any, workers: list[Any]) -> Any:
    """The next batch; END after the last."""
    # In place of the loader's timeout: to open what a worker handed over may hang too, and there it has none.
    watch, asked = threading.Timer(PATIENCE, _kill, [workers]), time.monotonic()
    watch.daemon = True
    watch.start()
    try:
        return next(batches, END)
    except (RuntimeError, OSError, EOFError) as error:
        hung = time.monotonic() - asked >= PATIENCE
        for worker in workers:
            worker.join(timeout=0.2)  # it may be dying just now
        dead = [worker for worker in workers if worker.exitcode is not None]
        if not dead:
            raise  # what a worker raised
        all_of_them = ", ".join(str(worker.pid) for worker in workers)
        one = f"a data worker (pid {dead[0].pid}) {_end(dead[0].exitcode)}"
        _kill(workers)
        raise WorkerLost(
            f"{HANGS.format(all_of_them, PATIENCE) if hung else one}; the same command goes on from the last checkpoint"
        ) from error
    finally:
        watch.cancel()


def _kill(workers: list[Any]) -> None:
    """By SIGKILL: for one that is stopped the program would wait at its exit."""
    for worker in workers:
        worker.kill()
        worker.join(timeout=5.0)


def _end(status: int | None) -> str:
    if status is None or status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    memory = ", by the system if memory was short: lower training.num_workers or training.batch_size"
    return f"was killed by {name}{memory if name == 'SIGKILL' else ''}"
