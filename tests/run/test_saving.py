"""Checkpoints are written beside training, and lose nothing by it."""

import concurrent.futures
import errno
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from test_train import ROOT, TINY, final

import dino.run.saving
from dino.config import CONF, compose
from dino.history import History
from dino.run.checkpoint import write_step
from dino.run.directory import DiskFull
from dino.run.epochs import Epochs
from dino.run.recorder import Recorder
from dino.run.run import Run
from dino.run.saving import Saving
from dino.run.snapshot import Snapshot
from dino.run.stop import Interrupted, StopSignal
from dino.run.writer import Writer
from dino.train import run
from dino.weights import save_teacher

SHORT = [
    *TINY,
    "evaluator=none",
    "dataset.train.images=32",
    "training.epochs=2",
    "checkpoint.keep=3",
]  # 8 steps, 4 an epoch


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("dino.report.write_report", lambda *_, **__: None)
    monkeypatch.setattr(History, "plot_all", lambda *_, **__: None)


def train(directory, *overrides):
    return run(compose([*SHORT, *overrides], "train", CONF), directory)


def before_writing(monkeypatch, act):
    """Calls act(step) in the thread that writes, before the checkpoint of that step."""

    def write(directory, content, *rest):
        act(content["iteration"])
        return write_step(directory, content, *rest)

    monkeypatch.setattr(dino.run.saving, "write_step", write)


def after_steps(monkeypatch, act=lambda done: None):
    """The steps that were done; act(step) is called after each, before anything is saved."""
    record, steps = Recorder.__call__, []

    def recorded(self, step):
        record(self, step)
        steps.append(step.done)
        act(step.done)

    monkeypatch.setattr(Recorder, "__call__", recorded)
    return steps


def flat(state):
    for key, value in state.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", inner) for name, inner in flat(value))
        elif isinstance(value, torch.Tensor):
            yield key, value.clone()


# ---- when -----------------------------------------------------------------------------------------------------------


def due(every_minutes=5.0, every_epochs=None, start=0, best=()):
    saving = Saving(object.__new__(Run), Epochs(start, 12, 3), every_minutes, every_epochs)
    return [done for done in range(start, 13) if saving.is_due(done, best=done in best)]


def test_the_first_and_the_last_step_and_a_new_best_are_due_and_the_end_of_an_epoch_only_where_asked_for():
    assert due() == [0, 1, 12]
    assert due(best=[6]) == [0, 1, 6, 12]
    assert due(every_epochs=2) == [0, 1, 6, 12]
    assert due(every_epochs=1, start=4) == [4, 5, 6, 9, 12]


def test_a_checkpoint_is_overdue_after_so_many_minutes_of_the_last(monkeypatch):
    saving = Saving(object.__new__(Run), Epochs(0, 12, 3), every_minutes=2.0)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 119)
    assert not saving.is_overdue()
    monkeypatch.setattr(time, "monotonic", lambda: now + 121)
    assert saving.is_overdue()


def test_a_run_by_the_clock_alone_saves_its_first_and_last_step(tmp_path):
    train(tmp_path / "a", "checkpoint.every_epochs=null")
    names = sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir())
    assert names == ["step_000000001.pt", "step_000000008.pt"]


# ---- beside training ------------------------------------------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_written_which_holds_its_own_step(tmp_path, monkeypatch):
    path, go_on, of_step, teachers = tmp_path / "a" / "checkpoints" / "step_000000004.pt", threading.Event(), {}, []
    take, there = Saving.__call__, []

    def taken(self, done, *rest):
        of_step[done] = dict(flat(self.run.learner.state_dict()))
        take(self, done, *rest)

    def write_teacher(directory, weights, *rest):
        teachers.append({f"teacher_state_dict.{name}": value.clone() for name, value in weights.items()})
        save_teacher(directory, weights, *rest)

    def act(done):
        if done == 7:
            there.append(path.exists())
            go_on.set()

    monkeypatch.setattr(Saving, "__call__", taken)
    monkeypatch.setattr(dino.run.saving, "save_teacher", write_teacher)
    before_writing(monkeypatch, lambda step: step != 4 or go_on.wait(60))
    after_steps(monkeypatch, act)
    train(tmp_path / "a")
    assert there == [False]
    saved, expected = dict(flat(torch.load(path, weights_only=True))), of_step[4]
    for name, value in expected.items():
        assert torch.equal(saved[name], value), name
        assert not name.startswith("teacher") or torch.equal(teachers[1][name], value), name
    assert not torch.equal(
        saved["student_state_dict.projection_head.mlp.0.weight"],
        of_step[8]["student_state_dict.projection_head.mlp.0.weight"],
    )


def test_one_checkpoint_is_written_at_a_time_and_training_waits_for_it_with_the_next(tmp_path, monkeypatch):
    ahead, snapshots, steps = [], [], after_steps(monkeypatch)

    def taken(content):
        snapshots.append(content["iteration"])
        return Snapshot(content)

    def slow(step):
        if 1 < step < 8:  # the first and the last one are waited for anyway
            asked = time.monotonic()
            while steps[-1] == step and time.monotonic() < asked + 60:
                time.sleep(0.01)
            time.sleep(0.5)  # in which training could go further
        ahead.append((step, steps[-1] - step))
        assert snapshots[-1] == step  # two would take twice the memory

    monkeypatch.setattr(dino.run.saving, "Snapshot", taken)
    before_writing(monkeypatch, slow)
    train(tmp_path / "a", "checkpoint.every_minutes=1e-9")
    assert ahead == [(1, 0), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (7, 1), (8, 0)]


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "raised_at", "code"), [(1, 1, errno.ENOSPC), (4, 5, errno.ENOSPC), (4, 5, errno.EROFS), (8, 8, errno.ENOSPC)]
)
def test_a_disk_that_takes_no_more_ends_the_run_at_the_next_step_and_at_once_with_the_first_and_the_last(
    tmp_path, monkeypatch, at, raised_at, code
):
    def full(step):
        if step == at:
            raise OSError(code, os.strerror(code))

    check = Writer.check

    def checked_when_done(self):
        concurrent.futures.wait([self._job] if self._job else [])
        check(self)

    before_writing(monkeypatch, full)
    monkeypatch.setattr(Writer, "check", checked_when_done)
    steps = after_steps(monkeypatch)
    kept = {1: "there is no checkpoint yet", 4: "the last good .*step_000000001.pt", 8: "the last .*000000004.pt"}[at]
    with pytest.raises(DiskFull, match=rf"takes no more \({os.strerror(code)}\); {kept}\. Make room, and"):
        train(tmp_path / "a")
    assert steps[-1] == raised_at


FULL = """
import errno, runpy
import dino.run.saving
write = dino.run.saving.write_step

def full(directory, content, *rest):
    if content["iteration"] == 4:
        raise OSError(errno.ENOSPC, "No space left on device")
    return write(directory, content, *rest)

dino.run.saving.write_step = full
runpy.run_module("dino.train", run_name="__main__", alter_sys=True)
"""


def test_a_full_disk_that_the_thread_meets_ends_the_program_in_a_sentence_with_status_8(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, *SHORT, "name=a"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 8, done.stderr
    assert done.stderr.count("a takes no more (No space left on device); the last good checkpoint is") == 1
    assert "Traceback" not in done.stderr
    assert final(tmp_path / "outputs" / "a")["iteration"] == 1


# ---- the end --------------------------------------------------------------------------------------------------------


def test_the_last_checkpoint_and_its_teacher_are_on_the_disk_when_the_run_ends(tmp_path, monkeypatch):
    before_writing(monkeypatch, lambda step: time.sleep(0.5) if step == 8 else None)
    assert math.isnan(train(tmp_path / "a"))
    assert final(tmp_path / "a")["iteration"] == 8


def test_a_signal_while_a_checkpoint_is_written_waits_for_it_and_for_its_own(tmp_path, monkeypatch):
    at_the_requeue = []

    def act(done):
        if done == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    before_writing(monkeypatch, lambda step: time.sleep(0.5) if step > 1 else None)
    after_steps(monkeypatch, act)
    monkeypatch.setattr(StopSignal, "hand_on", lambda self: at_the_requeue.append(final(tmp_path / "a")["iteration"]))
    with pytest.raises(Interrupted, match="SIGTERM"):
        train(tmp_path / "a")
    assert at_the_requeue == [6]
    names = sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir())
    assert names == ["step_000000001.pt", "step_000000004.pt", "step_000000006.pt"]
