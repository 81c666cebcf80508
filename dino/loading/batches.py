"""From a dataset to the steps of a run: which images, in which order, from which step on."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor
from torch.utils.data import Sampler

from dino.augmentation import DINOTransform
from dino.loading.broken import TooManyBroken, note
from dino.loading.micro_batch import MicroBatch
from dino.loading.views import Samples, crops_of
from dino.loading.workers import Loader
from dino.runtime.refused import Refused

# One stream of random numbers for each use, so that no two uses ever share one. 2 is dino.loading.views.GEOMETRY.
ORDER, PHOTOMETRY = 1, 3


class StepSampler(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) keys of this process's forward passes from step `start` to step `end`.

    Each epoch is a permutation made of (seed, epoch); the images that do not fill a step are left out of that epoch.
    A step takes the next accumulation x world_size x batch_size of them, whoever they go to: the processes take turns.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        accumulation: int,
        seed: int,
        start: int,
        end: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.images, self.batch_size, self.accumulation = images, batch_size, accumulation
        self.seed, self.start, self.end, self.rank, self.world_size = seed, start, end, rank, world_size
        self.steps_per_epoch = steps_in_epoch(images, batch_size, accumulation * world_size)

    def __len__(self) -> int:
        return (self.end - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.end):
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            if step == self.start or step_of_epoch == 0:
                order = self._order(epoch)
            first = step_of_epoch * self.accumulation * self.world_size * self.batch_size
            for part in range(self.accumulation):
                at = first + self.position(part)
                yield [(epoch, int(index)) for index in order[at : at + self.batch_size]]

    def position(self, part: int) -> int:
        """Where in its step this process's part begins."""
        return (part * self.world_size + self.rank) * self.batch_size

    def of_step(self, step: int) -> list[int]:
        """The images of a step, those of the other processes too."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        whole = self.accumulation * self.world_size * self.batch_size
        return [int(index) for index in self._order(epoch)[step_of_epoch * whole :][:whole]]

    def _order(self, epoch: int) -> Int[ndarray, " images"]:
        return np.random.default_rng([self.seed, ORDER, epoch]).permutation(self.images)


class Steps:
    """`for step, micro_batches in Steps(...)`: one optimizer update each, of `accumulation` micro-batches.

    A micro-batch becomes views on the device, and photometry is done there in one batch, when the loop asks for it. One
    loader serves all epochs: no worker starts anew between two, and the first batch of an epoch is there when the last
    ends.
    `broken` fills with a sentence for each image that could not be read and was passed over.
    """

    def __init__(
        self,
        dataset: Any,
        transform: DINOTransform,
        batch_size: int,
        accumulation: int = 1,
        seed: int = 0,
        start: int = 0,
        end: int | None = None,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device_does: str = "photometry",
        broken: set[str] | None = None,
    ) -> None:
        self.transform, self.accumulation, self.seed, self.device = transform, accumulation, seed, torch.device(device)
        end = steps_in_epoch(len(dataset), batch_size, accumulation * world_size) if end is None else end
        self.sampler = StepSampler(len(dataset), batch_size, accumulation, seed, start, end, rank, world_size)
        self.broken = set() if broken is None else broken
        self.crops = crops_of(dataset, transform, device_does, self.broken)
        samples = Samples(self.crops, seed, len(dataset))
        self.loader = Loader(
            samples,
            batch_sampler=self.sampler,
            collate_fn=samples.collate,
            num_workers=num_workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else starting the loader would draw from the run's own generator
        )

    def __len__(self) -> int:
        return self.sampler.end - self.sampler.start

    def __iter__(self) -> Iterator[tuple[int, Iterator[MicroBatch]]]:
        batches = iter(self.loader)
        for step in range(self.sampler.start, self.sampler.end):
            yield step, self._micro_batches(step, batches)

    def _micro_batches(self, step: int, batches: Iterator[tuple[Any, list[str]]]) -> Iterator[MicroBatch]:
        for part in range(self.accumulation):
            batch, broken = _next(batches)
            note(broken, self.broken)
            views, labels = self.crops.views(batch, self.device)
            augmented = self.transform.augment(
                views, seed=(self.seed, PHOTOMETRY, step), start=self.sampler.position(part)
            )
            yield MicroBatch(augmented, labels, self.accumulation, last=part + 1 == self.accumulation)


class TrainLoader:
    """`for views, labels in loader`: one epoch in micro-batches, the very ones that a run trains on.

    views: a list of tensors [batch, 3, size, size] on the device, in view order; labels: [batch] on the CPU. `epoch` is
    the one that the next pass yields: a pass that ends adds 1 to it, and one that is broken off begins again.

    steps: the Steps from a given one on, without end. passes: forward passes of this process to one step.
    """

    def __init__(self, steps: Callable[[int], Steps], steps_per_epoch: int, passes: int) -> None:
        self.steps, self.steps_per_epoch, self.passes = steps, steps_per_epoch, passes
        self.epoch = 0
        self._next: tuple[int, Iterator[tuple[int, Iterator[MicroBatch]]]] | None = (
            None  # its workers are at work already
        )

    def __len__(self) -> int:
        return self.steps_per_epoch * self.passes

    def __iter__(self) -> Iterator[tuple[list[Tensor], Tensor | None]]:
        waiting, self._next = self._next, None
        first = self.epoch * self.steps_per_epoch
        steps = waiting[1] if waiting is not None and waiting[0] == first else iter(self.steps(first))
        for _, micro_batches in itertools.islice(steps, self.steps_per_epoch):
            for micro_batch in micro_batches:
                yield micro_batch.views, micro_batch.labels
        self.epoch += 1
        self._next = (first + self.steps_per_epoch, steps)


def _next(batches: Iterator[tuple[Any, list[str]]]) -> tuple[Any, list[str]]:
    try:
        return next(batches)
    except TooManyBroken as error:  # from a worker it comes with the traceback there; its own words are last
        words = str(error).splitlines()[-1].removeprefix(f"{TooManyBroken.__module__}.TooManyBroken: ")
        raise TooManyBroken(words) from error


def steps_in_epoch(images: int, batch_size: int, passes: int) -> int:
    """`passes`: forward passes of a step, by all processes. Raises Refused where the images do not fill one step."""
    if images < batch_size * passes:
        raise Refused(
            f"one step takes {batch_size * passes} images (batch_size {batch_size} x {passes} passes), "
            f"and the dataset has {images}: lower training.batch_size, "
            "training.gradient_accumulation_steps or training.effective_batch."
        )
    return images // (batch_size * passes)


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
