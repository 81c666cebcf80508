"""When a micro-batch is prepared: as it is asked for; on a GPU one ahead, on a CUDA stream beside that of training."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
# Wraps an iterator whose items are made on the device; the same items come in the same order.
Prefetch = Callable[[Iterator[T]], Iterator[T]]


class SideStream:
    """A CUDA stream for what is made ahead: `with side():` the device works there, beside the current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """What was made in the block before is ready for the current stream from here on.

        Work in the block begins when the current stream has done all that it was given until here. So memory that was
        freed until here may be used anew in the block, whichever of the two streams used it last, and `record_stream`
        is not needed: with it, memory would stay taken for as many steps as the host is ahead of the device.
        """
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield


class OneAhead:
    """Makes item n + 1 before it hands over item n, so that the device makes it while item n is used.

    An error of item n + 1 is raised when that is asked for. `beside`: a context in which the items are made.
    """

    def __init__(self, beside: Callable[[], AbstractContextManager[None]]) -> None:
        self.beside = beside

    def __call__(self, items: Iterator[T]) -> Iterator[T]:
        following = self._made(items)
        while (item := following.result()) is not None:
            following = self._made(items)
            yield item

    def _made(self, items: Iterator[T]) -> "Future[T | None]":
        """The next item; None after the last."""
        made: Future[T | None] = Future()
        try:
            with self.beside():
                made.set_result(next(items, None))
        except Exception as error:
            made.set_exception(error)
        return made


def prefetch_on(device: torch.device) -> Prefetch[T]:
    """One ahead on CUDA. On a CPU each item is made when it is asked for: there nothing is made beside a step."""
    return OneAhead(SideStream(device)) if device.type == "cuda" else iter
