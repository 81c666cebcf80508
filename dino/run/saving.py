"""Checkpoints of a run: when one is due, what is in it, and that it is written beside training."""

import time
from typing import Any

from dino.loading.broken import write_list
from dino.run.checkpoint import check_read_back, write_step
from dino.run.epochs import Epochs
from dino.run.finite import check_finite
from dino.run.run import Run
from dino.run.snapshot import Snapshot
from dino.run.writer import Writer
from dino.runtime.processes import all_gather_objects
from dino.runtime.rng import rng_state
from dino.weights import save_teacher


class Saving:
    """Saves the run and its teacher, in a thread. All processes call it; rank zero writes.

    every_minutes: what a crash may cost at most.
    every_epochs: also saves at the end of each n-th epoch; None: by the clock alone.
    keep: newest checkpoints that stay; the best by k-NN stays beside them.
    """

    def __init__(
        self, run: Run, epochs: Epochs, every_minutes: float = 5.0, every_epochs: int | None = None, keep: int = 2
    ) -> None:
        self.run, self.epochs, self.keep = run, epochs, keep
        self.every_minutes, self.every_epochs = every_minutes, every_epochs
        self.writer = Writer()
        self.saved_at = time.monotonic()

    def is_overdue(self) -> bool:
        """By this process's clock."""
        return (time.monotonic() - self.saved_at) / 60 >= self.every_minutes

    def is_due(self, done: int, best: bool) -> bool:
        """best: the teacher is the best so far by k-NN."""
        if best or self._is_waited_for(done):
            return True
        every = self.every_epochs
        return every is not None and self.epochs.end_at(done) and self.epochs.number(done) % every == 0

    def __call__(self, done: int, best: bool, after_step: dict[str, Any]) -> None:
        """Takes a snapshot and returns; the first and the last checkpoint are waited for.

        `after_step`: the state of those that act after a step. Raises NonFiniteLoss where weights are not finite, and
        what the writing of the checkpoint before raised.
        """
        run, data = self.run, self.run.data
        self.writer.wait()  # before the snapshot: two would take twice the memory
        rng, state = all_gather_objects(rng_state()), run.learner.state_dict()
        check_finite(state, done)
        data.broken.update(*all_gather_objects(sorted(data.broken)))
        if run.parts.place.rank == 0:
            content = state | {
                "iteration": done,
                "epoch": done // self.epochs.steps_per_epoch,
                "total_steps": self.epochs.total_steps,
                "effective_batch": data.batching.effective_batch,
                "images": data.identity,
                "images_by_class": data.images_by_class,
                "rng": rng,
                "config": run.config,
                "metrics": run.history.newest("epoch"),
                "after_step": after_step,
                "history": run.history.state_dict(),
                "wandb_run_id": run.loggers.run_id,
            }
            snapshot, broken = Snapshot(content), set(data.broken)
            self.writer.submit(lambda: self._write(snapshot, broken, best))
            if self._is_waited_for(done):
                self.writer.wait()
        self.saved_at = time.monotonic()

    def _is_waited_for(self, done: int) -> bool:
        """The first checkpoint of a start, so that a full or odd disk shows at once, and the last one of the run."""
        return self.epochs.is_over(done) or done <= self.epochs.start + 1

    def _write(self, snapshot: Snapshot, broken: set[str], best: bool) -> None:
        """In the writer's thread."""
        run, content = self.run, snapshot.content()
        write_list(run.directory, broken)
        path = write_step(run.directory, content, self.keep, best)
        if content["iteration"] == self.epochs.start + 1:
            check_read_back(path, content)  # an odd disk shows now, not after ten hours
        prepared = run.data.eval_transform
        preprocessing = {"size": prepared.size, "mean": prepared.mean, "std": prepared.std}
        save_teacher(run.directory, content["teacher_state_dict"], run.config, preprocessing)
