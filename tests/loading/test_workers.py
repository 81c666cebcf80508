import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dino.augmentation import DINOTransform, EvalTransform
from dino.evaluator.features import features_of
from dino.loading import workers
from dino.loading.batches import Steps
from dino.loading.sampler import Batching
from dino.loading.views import Loading
from dino.loading.workers import WorkerLost

TRANSFORM = DINOTransform(num_local_views=1, global_size=16, local_size=8)


@pytest.fixture(autouse=True)
def no_worker_of_another_test():
    yield
    gc.collect()  # a traceback holds the loader, and so its workers
    assert multiprocessing.active_children() == []


class Gray:
    """Gray images; `misbehave(index)` first."""

    classes = None

    def __init__(self, misbehave=lambda index: None):
        self.misbehave = misbehave

    def __len__(self):
        return 64

    def __getitem__(self, index):
        self.misbehave(index)
        return torch.full((3, 20, 24), 128, dtype=torch.uint8), index


def torch_handler():
    """torch sets its handler once in a process: another test may have taken it away."""
    from torch.utils.data._utils import signal_handling

    before = signal.getsignal(signal.SIGCHLD)
    signal_handling._SIGCHLD_handler_set = False
    signal_handling._set_SIGCHLD_handler()
    handler = signal.signal(signal.SIGCHLD, before)
    assert handler.__module__ == signal_handling.__name__
    return handler


def steps(images, count=2):
    return Steps(images, TRANSFORM, Batching(4), end=16, loading=Loading(num_workers=count))


def sleep_for_ever_at(index):
    def misbehave(asked):
        while asked == index:
            time.sleep(1)

    return misbehave


def die_at(index):
    def misbehave(asked):
        if asked == index:
            os.kill(os.getpid(), signal.SIGKILL)

    return misbehave


def test_a_worker_that_is_killed_is_named_with_its_signal():
    with pytest.raises(WorkerLost, match=r"a data worker \(pid \d+\) was killed by SIGKILL.*training.num_workers"):
        for _, parts in steps(Gray(die_at(17))):
            list(parts)
    with pytest.raises(WorkerLost, match=r"a data worker \(pid \d+\) ended with status 3;"):
        for _, parts in steps(Gray(lambda index: os._exit(3) if index == 17 else None)):
            list(parts)


def test_a_dying_worker_interrupts_nothing_that_the_process_does_meanwhile():
    batches = iter(steps(Gray()))
    list(next(batches)[1])
    before = time.monotonic()
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    while time.monotonic() - before < 0.5:
        sum(range(1000))  # torch's handler would raise here
    with pytest.raises(WorkerLost):
        for _, parts in batches:
            list(parts)


def test_neither_does_it_where_a_loader_of_torchs_own_was_used_before():
    handler = signal.signal(signal.SIGCHLD, torch_handler())
    try:
        test_a_dying_worker_interrupts_nothing_that_the_process_does_meanwhile()
    finally:
        signal.signal(signal.SIGCHLD, handler)


def test_a_worker_that_hangs_is_named_and_killed_after_the_patience(monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 1.0)
    started = time.monotonic()
    with pytest.raises(
        WorkerLost, match=r"the data workers \(pids [\d, ]+\) have handed over nothing for 1 s: the disk"
    ):
        for _, parts in steps(Gray(sleep_for_ever_at(17)), count=1):
            list(parts)
    assert time.monotonic() - started < 20
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_worker_that_no_signal_but_kill_reaches_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 6.0)  # a start on a busy machine takes two
    for stopped in (0, 1):
        batches = iter(steps(Gray()))
        list(next(batches)[1])
        pid = sorted(child.pid for child in multiprocessing.active_children())[stopped]
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(WorkerLost, match=rf"the data workers \(pids [\d, ]*{pid}[\d, ]*\)"):
            for _, parts in batches:
                list(parts)
        assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_worker_of_the_evaluation_is_not_waited_for_either(monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 6.0)  # a start on a busy machine takes two
    images = Gray(sleep_for_ever_at(40))
    with pytest.raises(WorkerLost, match="have handed over nothing for 6 s"):
        features_of(torch.nn.Flatten(), images, EvalTransform(8), batch_size=16, num_workers=1)
    with pytest.raises(WorkerLost, match="was killed by SIGKILL"):
        features_of(torch.nn.Flatten(), Gray(die_at(40)), EvalTransform(8), batch_size=16, num_workers=1)


def test_what_a_worker_raises_is_nobody_elses():
    def broken(index):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug") as raised:
        for _, parts in steps(Gray(broken), count=1):
            list(parts)
    assert not isinstance(raised.value, WorkerLost)


class Slow:
    """An image takes `seconds`."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return 64

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return index


CONTEXTS = [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("spawn", "forkserver"))]


@pytest.mark.parametrize("context", CONTEXTS)
def test_workers_outlive_the_signals_that_stop_a_run(context):
    batches = iter(workers.Loader(Slow(0.01), batch_size=4, num_workers=2, multiprocessing_context=context))
    seen = [next(batches)]
    for worker in multiprocessing.active_children():
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            os.kill(worker.pid, signum)
    seen += batches
    assert torch.equal(torch.cat(seen), torch.arange(64))


def test_a_signal_in_the_moment_in_which_workers_start_reaches_none_of_them(monkeypatch):
    """Each fork is followed by the signals, before the worker has run a line of Python."""
    fork, pids = os.fork, []

    def fork_and_signal():
        if pid := fork():
            pids.append(pid)
            for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
                os.kill(pid, signum)
        return pid

    monkeypatch.setattr(os, "fork", fork_and_signal)
    loader = workers.Loader(Slow(0.01), batch_size=4, num_workers=2)
    assert torch.equal(torch.cat(list(loader)), torch.arange(64))
    assert len(pids) == 2


def test_the_process_itself_gets_signals_as_before():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    batches = iter(workers.Loader(Slow(0.01), batch_size=4, num_workers=1))
    next(batches)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.skipif(sys.platform != "linux", reason="macOS spawns")
def test_workers_are_forks_whatever_this_python_starts_processes_by():
    images = Gray(lambda index: None)  # which cannot be pickled
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)  # Python 3.14's
    try:
        assert len([list(parts) for _, parts in steps(images)]) == 16
    finally:
        multiprocessing.set_start_method(before, force=True)


class SlowAfter(Slow):
    """Image 4 and those after it take `seconds`."""

    def __getitem__(self, index):
        time.sleep(self.seconds if index >= 4 else 0)
        return index


def test_a_loader_that_is_closed_ends_workers_that_are_in_the_middle_of_an_image():
    batches = iter(workers.Loader(SlowAfter(1000), batch_size=4, num_workers=2))
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    started = time.monotonic()
    batches.close()
    assert multiprocessing.active_children() == []
    assert time.monotonic() - started < 25  # torch waits 5 s for each


PARENT = """
import multiprocessing, sys
from dino.loading.workers import Loader
from test_workers import SlowAfter
if __name__ == "__main__":
    context = sys.argv[1] if len(sys.argv) > 1 else None
    batches = iter(Loader(SlowAfter(1000), batch_size=4, num_workers=2, multiprocessing_context=context))
    next(batches)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    sys.stdin.readline()
    sys.modules["kept"] = batches  # the end of the program closes it, if anything does
"""


def alive(pids):
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("killed", [True, False])
def test_no_worker_outlives_its_parent(tmp_path, killed, context):
    program = tmp_path / "parent.py"
    program.write_text(PARENT)
    folders = f"{Path(__file__).parents[2]}:{Path(__file__).parent}"
    with subprocess.Popen(
        [sys.executable, program, *([context] if context else [])],
        env={**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(alive(pids)) == 2
        if killed:
            parent.kill()
        else:
            parent.stdin.write("\n")
            parent.stdin.flush()
        parent.wait(timeout=60)
    ends = time.monotonic() + 20
    while alive(pids) and time.monotonic() < ends:
        time.sleep(0.1)
    assert alive(pids) == []
