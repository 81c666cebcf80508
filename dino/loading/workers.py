"""Data workers that die or hang: named and stopped, not waited for for ever."""

import multiprocessing
import signal
import threading
import time
from typing import Any

from torch.utils.data import DataLoader

# In seconds. No disk that a run can do with takes ten minutes for one batch; a network file system that is back within
# them is waited for, and a run that hangs over night loses ten minutes of it.
PATIENCE = 600.0
HANGS = "the data workers (pids {}) have handed over nothing for {:g} s: the disk, or what reads the images, hangs"


class WorkerLost(RuntimeError):
    """A data worker died, or hands nothing over."""

    exit_status = 7


class Loader(DataLoader[Any]):
    """torch's DataLoader that raises WorkerLost where a worker has died, or takes longer than PATIENCE for a batch."""

    def __iter__(self) -> Any:
        others, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
        batches = super().__iter__()
        workers = [child for child in multiprocessing.active_children() if child not in others]
        if workers and threading.current_thread() is threading.main_thread():
            # torch's handler raises wherever the process is when a worker dies, in the middle of a checkpoint too. Any
            # loader sets it, and the first one of a process may have been torch's own.
            of_torch = getattr(handler, "__module__", None) == "torch.utils.data._utils.signal_handling"
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if of_torch or handler is None else handler)
        while True:
            # In place of the loader's timeout: to open what a worker handed over may hang too, and there it has none.
            watch, asked = threading.Timer(PATIENCE, _kill, [workers]), time.monotonic()
            watch.daemon = True
            if workers:
                watch.start()
            try:
                batch = next(batches)
            except StopIteration:
                return
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
                    f"{HANGS.format(all_of_them, PATIENCE) if hung else one}; "
                    "the same command goes on from the last checkpoint"
                ) from error
            finally:
                watch.cancel()
            yield batch


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
