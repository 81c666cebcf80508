"""What a run says: to the terminal, around the bar, and to its log file."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger(__name__)


class LogFile(logging.FileHandler):
    """A log file. Where it cannot be written, one warning on the terminal says so, and training goes on."""

    warned = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # of the first one, which opens the file
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.warned:
            self.warned = True
            log.warning("%s is not written: %s", self.baseFilename, sys.exception())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the warning has been given
            super().close()


@contextlib.contextmanager
def log_to(path: Path, first: bool) -> Iterator[None]:
    """What the first process says goes to the terminal, around the bar, and with UTC times to `path`."""
    package = logging.getLogger("dino")
    terminal, file = logging.StreamHandler(sys.stderr), LogFile(path, delay=True)
    formatter = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    file.setFormatter(formatter)
    before = package.level, package.propagate
    package.setLevel(logging.DEBUG if first else logging.CRITICAL)
    terminal.setLevel(logging.INFO)
    package.propagate = False
    for handler in (terminal, file):
        package.addHandler(handler)
    try:
        with logging_redirect_tqdm([package]):
            yield
    except Exception as error:
        if path.exists():  # a run that was refused leaves nothing; the terminal has it from whoever handles it
            file.handle(logging.makeLogRecord({"msg": f"{type(error).__name__}: {error}"}))
        raise
    finally:
        package.level, package.propagate = before
        for handler in (terminal, file):
            package.removeHandler(handler)
        file.close()
