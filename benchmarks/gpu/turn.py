"""Whose turn it is on the GPU: processes compile side by side, and are timed one at a time."""

import fcntl
import time
from pathlib import Path


class Turn:
    """A lock that all parts share while they warm up, and that one of them has for itself while it is timed."""

    def __init__(self, path: Path) -> None:
        """Waits until nobody is being timed. `begun`: when that was, by time.monotonic."""
        self.file = path.open("w")
        fcntl.flock(self.file, fcntl.LOCK_SH)
        self.begun = time.monotonic()

    def alone(self) -> None:
        """Waits until nobody else warms up or is timed; until this process ends the others wait."""
        fcntl.flock(self.file, fcntl.LOCK_EX)
