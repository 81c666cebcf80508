"""Signals: a flag that is looked at after each step."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from dino.runtime.processes import place


class Interrupted(BaseException):
    """A signal asked for the end; the checkpoint is written. As KeyboardInterrupt, no fault that others catch."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StopSignal:
    """Turns SIGTERM, SIGINT and SIGUSR2 into a flag. In a single process a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._raises_in: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside this block a signal (or one already pending) raises Interrupted immediately. Use it for work that can
        be redone.

        It has no effect with several processes: a signal may reach one of them, and the others would wait for it.
        """
        self._raises_in = os.getpid() if place().world_size == 1 else None
        try:
            if self._raises_in is not None and self.signum is not None:
                raise Interrupted(self.signum)
            yield
        finally:
            self._raises_in = None

    def hand_on(self) -> None:
        """Calls the handler that SIGUSR2 had before: submitit's, which asks SLURM to requeue the job."""
        handler = self._before.get(signal.SIGUSR2)
        if callable(handler):
            handler(signal.SIGUSR2, None)

    def _note(self, signum: int, _: FrameType | None) -> None:
        self.signum = signum
        if place().world_size == 1:  # torchrun passes on the terminal's SIGINT, which its processes have had already
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait for whatever hangs
        if self._raises_in == os.getpid():  # data workers, which are forks, have this handler too
            raise Interrupted(signum)
