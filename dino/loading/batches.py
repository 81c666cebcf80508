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
from dino.loading.prefetch import Prefetch, prefetch_on
from dino.loading.sampler import PHOTOMETRY, Batching, StepSampler
from dino.loading.views import Loading, Samples, crops_of
from dino.loading.workers import Loader


class Steps:
    """`for step, micro_batches in Steps(...)`: one optimizer update each, of `accumulation` micro-batches.

    A micro-batch's views move to the device, and photometry is done there in one batch: when the loop asks for it, or
    on CUDA while the micro-batch before it trains. One loader serves all epochs: no worker starts anew between two
    epochs, and the first batch of an epoch is ready when the epoch before ends.
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
        self.crops = crops_of(dataset, transform, loading)
        samples = Samples(self.crops, batching.seed, len(dataset))
        self.loader = Loader(
            samples,
            batch_sampler=self.sampler,
            collate_fn=samples.collate,
            num_workers=loading.num_workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else starting the loader would draw from the run's own generator
        )
        self.prefetch: Prefetch[tuple[MicroBatch, list[str]]] = prefetch_on(self.device)

    def __len__(self) -> int:
        return self.sampler.end - self.sampler.start

    def __iter__(self) -> Iterator[tuple[int, Iterator[MicroBatch]]]:
        parts = self.prefetch(self._prepared())
        for step in range(self.sampler.start, self.sampler.end):
            yield step, self._micro_batches(parts)

    def _micro_batches(self, parts: Iterator[tuple[MicroBatch, list[str]]]) -> Iterator[MicroBatch]:
        for micro_batch, broken in itertools.islice(parts, self.batching.accumulation):
            note(broken, self.broken)
            yield micro_batch

    def _prepared(self) -> Iterator[tuple[MicroBatch, list[str]]]:
        """Each micro-batch of all steps, and a sentence for each image that was passed over for it."""
        batches, passes = iter(self.loader), self.batching.accumulation
        for step in range(self.sampler.start, self.sampler.end):
            for part in range(passes):
                batch, broken = _next(batches)
                cropped = self.crops.views(batch, self.device)
                seed, start = (self.batching.seed, PHOTOMETRY, step), self.batching.position(part)
                augmented = self.transform.augment(cropped.views, seed=seed, start=start)
                micro_batch = MicroBatch(augmented, cropped.labels, passes, last=part + 1 == passes)
                yield micro_batch, [*broken, *cropped.broken]


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
