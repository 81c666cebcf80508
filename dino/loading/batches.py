"""From a dataset to the steps of a run: which images, in which order, from which step on."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dino.augmentation import DINOTransform
from dino.dataset.cache import Pairs
from dino.loading.broken import TooManyBroken, note
from dino.loading.micro_batch import MicroBatch
from dino.loading.sampler import PHOTOMETRY, Batching, StepSampler
from dino.loading.views import Loading, Samples, crops_of
from dino.loading.workers import Loader


class Steps:
    """`for step, micro_batches in Steps(...)`: one optimizer update each, of `accumulation` micro-batches.

    When the loop asks for a micro-batch, its views move to the device, and photometry is done there in one batch. One
    loader serves all epochs: no worker starts anew between two epochs, and the first batch of an epoch is ready when
    the epoch before ends.
    `broken` fills with a sentence for each image that could not be read and was passed over.
    """

    def __init__(
        self,
        dataset: Pairs,
        transform: DINOTransform,
        batching: Batching,
        start: int = 0,
        end: int | None = None,
        loading: Loading | None = None,
        broken: set[str] | None = None,
    ) -> None:
        """The steps from `start` to `end`; None: one epoch."""
        loading = loading or Loading()
        self.transform, self.batching, self.device = transform, batching, loading.device
        end = batching.steps_per_epoch(len(dataset)) if end is None else end
        self.sampler = StepSampler(len(dataset), batching, start, end)
        self.broken = set() if broken is None else broken
        self.crops = crops_of(dataset, transform, loading.device_does, self.broken)
        samples = Samples(self.crops, batching.seed, len(dataset))
        self.loader = Loader(
            samples,
            batch_sampler=self.sampler,
            collate_fn=samples.collate,
            num_workers=loading.num_workers,
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
        for part in range(self.batching.accumulation):
            batch, broken = _next(batches)
            note(broken, self.broken)
            views, labels = self.crops.views(batch, self.device)
            seed, start = (self.batching.seed, PHOTOMETRY, step), self.batching.position(part)
            augmented = self.transform.augment(views, seed=seed, start=start)
            yield MicroBatch(augmented, labels, self.batching.accumulation, last=part + 1 == self.batching.accumulation)


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
