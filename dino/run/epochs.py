"""How steps make epochs."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Epochs:
    """A run of `total_steps`, of which `start` are done when this process begins. Steps are counted when done."""

    start: int
    total_steps: int
    steps_per_epoch: int

    def end_at(self, done: int) -> bool:
        """Whether an epoch ends here; the last one may be cut short by training.max_steps."""
        return done % self.steps_per_epoch == 0 or self.is_over(done)

    def is_over(self, done: int) -> bool:
        return done == self.total_steps

    def number(self, done: int) -> int:
        """The epoch that `done` lies in or ends, counted from 1."""
        return math.ceil(done / self.steps_per_epoch)
