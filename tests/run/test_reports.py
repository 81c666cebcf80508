import logging
import time
from types import SimpleNamespace

import pytest

from dino.evaluator.knn import NOTHING
from dino.run.report import Report
from dino.run.run import Run


@pytest.fixture
def written(monkeypatch):
    pages = []
    monkeypatch.setattr(Report, "_write_plots", lambda self: None)
    monkeypatch.setattr(Report, "_write_page", lambda self, measured: pages.append(len(pages)))
    return pages


def report(rank=0):
    run = object.__new__(Run)
    run.parts = SimpleNamespace(place=SimpleNamespace(rank=rank))
    return Report(run, every_minutes=5.0)


def test_the_first_report_is_written_others_not_before_their_time_and_the_last_one_always(written, monkeypatch):
    show, now = report(), time.monotonic()
    for minutes, last, pages in [(0, False, 1), (4.9, False, 1), (5.1, False, 2), (10, False, 2), (10, True, 3)]:
        monkeypatch.setattr(time, "monotonic", lambda minutes=minutes: now + 60 * minutes)
        show(NOTHING, last)
        assert len(written) == pages, minutes


def test_only_rank_zero_writes_a_report(written):
    report(rank=1)(NOTHING, True)
    assert written == []


@pytest.mark.parametrize("part", ["_write_plots", "_write_page"])
def test_whatever_a_report_raises_is_a_warning(part, written, monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("a colour map has no such name")

    monkeypatch.setattr(Report, part, fails)
    with caplog.at_level(logging.WARNING):
        report()(NOTHING, True)
    assert caplog.text.count("a colour map has no such name") == 1
