"""Checkpoints of a run: when one is due, and what is in it."""

import time
from typing import Any

from dino.loading.broken import write_list
from dino.run.checkpoint import check_read_back, write_step
from dino.run.epochs import Epochs
from dino.run.finite import check_finite
from dino.run.run import Run
from dino.runtime.processes import all_gather_objects
from dino.runtime.rng import rng_state
from dino.weights import save_teacher


class Saving:
    """Writes a checkpoint and the teacher. All processes call it; rank zero writes.

    keep: newest checkpoints that stay; the best by k-NN stays beside them.
    """

    def __init__(
        self, run: Run, epochs: Epochs, every_epochs: int = 1, every_minutes: float = 15.0, keep: int = 2
    ) -> None:
        self.run, self.epochs, self.keep = run, epochs, keep
        self.every_epochs, self.every_minutes = every_epochs, every_minutes
        self.saved_at = time.monotonic()

    def is_overdue(self) -> bool:
        """By this process's clock."""
        return (time.monotonic() - self.saved_at) / 60 >= self.every_minutes

    def is_due(self, done: int, best: bool) -> bool:
        if self.epochs.is_over(done) or done <= self.epochs.start + 1:  # a full or odd disk shows at once
            return True
        number = self.epochs.number(done)
        return self.epochs.end_at(done) and (best or number % self.every_epochs == 0)

    def __call__(self, done: int, best: bool, after_step: dict[str, Any]) -> None:
        """`after_step`: the state of those that act after a step. Raises NonFiniteLoss where weights are not finite."""
        run, data = self.run, self.run.data
        rng, state = all_gather_objects(rng_state()), run.learner.state_dict()
        check_finite(state, done)
        data.broken.update(*all_gather_objects(sorted(data.broken)))
        if run.parts.place.rank == 0:
            write_list(run.directory, data.broken)
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
            path = write_step(run.directory, content, self.keep, best)
            if done == self.epochs.start + 1:
                check_read_back(path, content)  # an odd disk shows now, not after ten hours
            prepared = data.eval_transform
            preprocessing = {"size": prepared.size, "mean": prepared.mean, "std": prepared.std}
            save_teacher(run.directory, run.learner.teacher, run.config, preprocessing)
        self.saved_at = time.monotonic()
