"""When micro-batches are made: CUDA's streams are stood in for by streams that know which work they come after."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from test_batches import TRANSFORM, Noise, assert_same, views_of
from test_views import Photos

from dino.loading.batches import Steps
from dino.loading.broken import TooManyBroken
from dino.loading.prefetch import OneAhead, SideStream, prefetch_on
from dino.loading.sampler import Batching
from dino.loading.views import Loading

CUDA = torch.device("cuda", 0)


class Stream:
    """`before`: all that is done when work begins that this stream is given now."""

    def __init__(self, device):
        assert device == CUDA
        self.before = set()

    def wait_stream(self, other):
        self.before |= other.before


class Streams:
    """In place of torch.cuda: `work(name)` is given to the current stream."""

    def __init__(self, monkeypatch):
        self.current, self.after = Stream(CUDA), {}
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)

    @contextmanager
    def stream(self, other):
        before, self.current = self.current, other
        yield
        self.current = before

    def work(self, name):
        self.after[name] = set(self.current.before)
        self.current.before.add(name)


def made(count, log, fails_at=None):
    for number in range(count):
        if number == fails_at:
            raise OSError(f"item {number}")
        log.append(("made", number))
        yield number


def test_the_next_item_is_made_before_one_is_handed_over():
    log = []
    for number in OneAhead(nullcontext)(made(3, log)):
        log.append(("used", number))
    assert log == [("made", 0), ("made", 1), ("used", 0), ("made", 2), ("used", 1), ("used", 2)]
    assert list(OneAhead(nullcontext)(iter(()))) == []


def test_an_error_comes_at_the_turn_of_its_item():
    for fails_at in (0, 1, 2):
        used = []
        with pytest.raises(OSError, match=f"^item {fails_at}$"):
            for number in OneAhead(nullcontext)(made(5, [], fails_at)):
                used.append(number)
        assert used == [*range(fails_at)]


def test_an_interrupt_is_raised_at_once():
    def items():
        yield 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(OneAhead(nullcontext)(items()))


def test_on_the_device_an_item_is_made_while_the_one_before_is_used(monkeypatch):
    streams = Streams(monkeypatch)

    def items():
        for number in range(5):
            streams.work(f"make {number}")
            yield number

    training = streams.current
    for number in prefetch_on(CUDA)(items()):
        assert streams.current is training
        streams.work(f"use {number}")
    for number in range(5):
        assert f"make {number}" in streams.after[f"use {number}"]
        assert f"use {number - 1}" not in streams.after[f"make {number}"]  # which runs at the same time
        if number > 1:  # what it used may be written anew
            assert f"use {number - 2}" in streams.after[f"make {number}"]


def test_on_a_cpu_an_item_is_made_when_it_is_asked_for():
    log = []
    items = prefetch_on(torch.device("cpu"))(made(3, log))
    assert next(items) == 0 and log == [("made", 0)]


def steps(prefetched, dataset=None, accumulation=1, workers=0):
    given = Steps(dataset or Noise(), TRANSFORM, Batching(3, accumulation), 0, 5, Loading(num_workers=workers))
    if prefetched:
        given.prefetch = OneAhead(nullcontext)
    return given


@pytest.mark.parametrize("accumulation", [1, 3])
def test_micro_batches_that_are_made_ahead_are_those_that_are_not(accumulation):
    state = torch.get_rng_state()
    with_it, without = steps(True, accumulation=accumulation), steps(False, accumulation=accumulation)
    assert_same(views_of(with_it), views_of(without))
    assert_same(views_of(steps(True, accumulation=accumulation, workers=1)), views_of(without))
    flags = [[(part.last, part.per_step, part.labels.tolist()) for part in parts] for _, parts in with_it]
    assert flags == [[(part.last, part.per_step, part.labels.tolist()) for part in parts] for _, parts in without]
    assert [[last for last, *_ in step] for step in flags] == [[False] * (accumulation - 1) + [True]] * 5
    assert torch.equal(torch.get_rng_state(), state)


def test_a_broken_image_is_told_of_at_its_turn():
    def told(prefetched):
        some = steps(prefetched, Photos(images=400, broken=tuple(range(0, 400, 40))))
        return [len(some.broken) for _, parts in some for _ in parts]

    assert told(True) == told(False)
    assert told(True)[0] < told(True)[-1]


def test_a_disk_that_is_gone_ends_the_run_at_the_turn_of_its_images():
    class Vanishing(Photos):
        """Whose images are gone after some look-ups."""

        def __getitem__(self, index):
            self.left = getattr(self, "left", 8) - 1
            self.broken = range(self.images) if self.left < 0 else ()
            return super().__getitem__(index)

    for prefetched in (True, False):
        seen = []
        with pytest.raises(TooManyBroken, match="in a row cannot be read"):
            for step, parts in steps(prefetched, Vanishing()):
                seen += [step for _ in parts]
        assert seen == [0, 1]


def test_the_side_stream_begins_when_the_current_one_has_done_what_it_was_given(monkeypatch):
    streams = Streams(monkeypatch)
    aside = SideStream(CUDA)
    streams.work("training")
    with aside():
        streams.work("made")
    assert streams.after["made"] == {"training"}
    streams.work("not waiting")
    assert streams.after["not waiting"] == {"training"}
