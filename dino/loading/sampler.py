"""Which images, in which order, make the steps of a run."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from torch.utils.data import Sampler

from dino.runtime.refused import Refused

# One stream of random numbers for each use, so that no two uses ever share one. 2 is dino.loading.views.GEOMETRY.
ORDER, PHOTOMETRY = 1, 3


@dataclass(frozen=True)
class Batching:
    """Which images make a step."""

    batch_size: int  # images of one process in one forward pass
    accumulation: int = 1  # forward passes of one process per step
    seed: int = 0  # of the order, crops and photometry
    rank: int = 0
    world_size: int = 1

    @property
    def effective_batch(self) -> int:
        """Images per step, over all processes."""
        return self.batch_size * self.accumulation * self.world_size

    def position(self, part: int) -> int:
        """Where in its step the `part`-th micro-batch of this process begins."""
        return (part * self.world_size + self.rank) * self.batch_size

    def steps_per_epoch(self, images: int) -> int:
        """Raises Refused where the images do not fill one step."""
        if images < self.effective_batch:
            passes = self.accumulation * self.world_size
            raise Refused(
                f"one step takes {self.effective_batch} images (batch_size {self.batch_size} x {passes} passes), "
                f"and the dataset has {images}: lower training.batch_size, "
                "training.gradient_accumulation_steps or training.effective_batch."
            )
        return images // self.effective_batch


class StepSampler(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) keys of this process's forward passes from step `start` to step `end`.

    Each epoch is a permutation made of (seed, epoch); the images that do not fill a step are left out of that epoch.
    A step takes the next accumulation x world_size x batch_size of them, whoever they go to: the processes take turns.
    """

    def __init__(self, images: int, batching: Batching, start: int, end: int) -> None:
        self.images, self.batching, self.start, self.end = images, batching, start, end
        self.steps_per_epoch = batching.steps_per_epoch(images)

    def __len__(self) -> int:
        return (self.end - self.start) * self.batching.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.end):
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            if step == self.start or step_of_epoch == 0:
                order = self._order(epoch)
            first = step_of_epoch * self.batching.effective_batch
            for part in range(self.batching.accumulation):
                at = first + self.batching.position(part)
                yield [(epoch, int(index)) for index in order[at : at + self.batching.batch_size]]

    def of_step(self, step: int) -> list[int]:
        """The images of a step, those of the other processes too."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        size = self.batching.effective_batch
        return [int(index) for index in self._order(epoch)[step_of_epoch * size :][:size]]

    def _order(self, epoch: int) -> Int[ndarray, " images"]:
        return np.random.default_rng([self.batching.seed, ORDER, epoch]).permutation(self.images)


def accumulation_for(batch_size: int, passes: int, effective_batch: int | None, world_size: int = 1) -> int:
    """Forward passes of each process to one update: `passes`, or what makes up `effective_batch` where that is set."""
    if effective_batch is None:
        return passes
    if effective_batch % (batch_size * world_size):
        nearest = batch_size * world_size * max(1, round(effective_batch / (batch_size * world_size)))
        raise Refused(
            f"training.effective_batch must be a multiple of batch_size x processes = {batch_size} x {world_size}, "
            f"got {effective_batch}; {nearest} would do, or another training.batch_size."
        )
    return effective_batch // (batch_size * world_size)


def steps_of(images: int, effective_batch: int, epochs: int, max_steps: int | None) -> tuple[int, int]:
    """(steps an epoch, steps of the run)."""
    steps_per_epoch = images // effective_batch
    total = epochs * steps_per_epoch
    return steps_per_epoch, total if max_steps is None else min(total, max_steps)
