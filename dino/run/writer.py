"""What is written beside training: one job at a time, in a thread."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Writer:
    """Runs jobs in one thread, each after the one before. What a job raises is raised in the thread that asks here.

    A job draws nothing from the global random generators, calls no collective and reads nothing that training changes.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._job: Future[None] | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Begins a job. Waits while the one before is under way, and raises what that raised."""
        self.wait()
        self._job = self._thread.submit(job)

    def check(self) -> None:
        """Raises what the last job raised, once. Waits for nothing."""
        if self._job is not None and self._job.done():
            self.wait()

    def wait(self) -> None:
        """Returns when the last job is done; raises what it raised, once."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> None:
        """Returns when the last job and the thread have ended, whatever the job raised."""
        self._thread.shutdown()
