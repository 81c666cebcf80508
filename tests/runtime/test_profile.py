"""A profile of five steps, in files that others read; the steps themselves are the same."""

import json
import logging

import pytest
import torch

from dino.runtime import profile
from dino.runtime.profile import profiled

WORK = "aten::cumsum"  # what no step does but those below


def loop(steps, directory):
    seen = []
    for step in profiled(steps, directory):
        torch.ones(4).cumsum(0)
        seen.append(step)
    return seen


def test_the_trace_and_the_table_hold_five_steps(tmp_path):
    assert loop(range(40), tmp_path / "profile") == [*range(40)]
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == WORK for event in events) == 5
    table = (tmp_path / "profile" / "operations.txt").read_text()
    assert table.startswith("5 steps\n")
    (row,) = [line for line in table.splitlines() if line.split()[:1] == [WORK]]
    assert row.split()[-1] == "5"  # calls


def test_the_first_of_them_is_the_eleventh(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(profile, "_start", lambda: begun.append(len(seen)))
    seen = []
    for step in profiled(iter(range(30)), tmp_path):
        seen.append(step)
    assert begun == [10] and seen == [*range(30)]


def test_a_loop_that_is_broken_off_leaves_what_it_did(tmp_path):
    steps = profiled(range(40), tmp_path / "profile")
    for step in steps:
        torch.ones(4).cumsum(0)
        if step == 11:
            break
    steps.close()
    assert (tmp_path / "profile" / "operations.txt").read_text().startswith("2 steps\n")


def test_off_it_is_the_steps_themselves(tmp_path):
    steps = range(3)
    assert profiled(steps, None) is steps


def test_a_run_that_is_too_short_is_told_so(tmp_path, caplog):
    assert loop(range(7), tmp_path / "profile") == [*range(7)]
    assert caplog.messages == ["profile=true: nothing is profiled, since the run ends before step 11"]
    assert not (tmp_path / "profile").exists()


class Broken(torch.profiler.profile):
    def start(self):
        raise RuntimeError("CUPTI_ERROR\nof a driver")


class Unwritable(torch.profiler.profile):
    def export_chrome_trace(self, path):
        raise OSError("no room")


@pytest.mark.parametrize(
    ("profiler", "words"),
    [(Broken, "does not start (CUPTI_ERROR of a driver)"), (Unwritable, "the profile is not written (no room)")],
)
def test_a_profiler_that_fails_is_one_warning_and_the_loop_goes_on(profiler, words, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(profile, "profile", profiler)
    assert loop(range(20), tmp_path) == [*range(20)]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and words in record.getMessage()
