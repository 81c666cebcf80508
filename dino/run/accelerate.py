"""Makes the steps of a run fast before the first one: compiled, and recorded as a CUDA graph."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dino.augmentation import DINOTransform
from dino.run.learner import Learner
from dino.run.parts import Parts
from dino.run.step import Distilled
from dino.runtime.compile import compile_regions
from dino.runtime.graph import Captured, Replay, cuda_graph
from dino.runtime.memory import is_out_of_memory
from dino.runtime.processes import all_reduce_max, is_single_process
from dino.runtime.refused import one_line
from dino.runtime.rng import preserve_rng

log = logging.getLogger(__name__)
Record = Callable[[Callable[[], Distilled]], tuple[Replay, Distilled]]


def accelerate(parts: Parts, compile: bool, graph: bool) -> None:
    """`parts.learner.distil` and the photometry compiled, and `distil` recorded as a CUDA graph.

    What cannot be is one warning, and the run goes on without it. Weights, statistics, gradients and random states are
    afterwards as they were.
    """
    if not (compile or graph):
        return
    torch.compiler.set_stance("default")
    with preserve_rng(), _left_as_it_was(parts.learner):
        views = _views(parts)
        if compile:
            log.info("compiling, once for a network and its image sizes: this may take a minute")
            problem = _compile(parts, views)
            # All processes go on alike: the numbers of compiled and eager steps differ by rounding.
            if all_reduce_max(problem is not None) != [0]:
                torch.compiler.set_stance("force_eager")
                _warn("compiled", problem or "the compiler failed in another process", "compile=false")
        if graph and (problem := _capture(parts, views)):
            _warn("recorded as a CUDA graph", problem, "graph=false")


def captured(
    learner: Learner, views: Sequence[Tensor], micro_batches: int, record: Record = cuda_graph
) -> Callable[[Sequence[Tensor], int], Distilled]:
    """`learner.forward_backward` as a recording, for views and a number of micro-batches such as these."""

    def passes(inputs: Sequence[Tensor]) -> Distilled:
        return learner.forward_backward(inputs, micro_batches)

    recording = Captured(passes, views, learner.student.parameters(), record)
    return lambda inputs, _: recording(inputs)


def _compile(parts: Parts, views: Sequence[Tensor]) -> str | None:
    """By a pass forward and backward; returns what went wrong."""
    learner, transform = parts.learner, parts.transform
    try:
        for model in (learner.student, learner.teacher):
            compile_regions(model.backbone)
            model.projection_head.compile(dynamic=False)
        learner.loss.compile(dynamic=False)
        if isinstance(transform, DINOTransform):
            transform.compile()
            transform.augment([torch.zeros_like(view, dtype=torch.uint8) for view in views], seed=(0,))
        learner.forward_backward(views, parts.data.batching.accumulation)
    except Exception as error:  # the compiler's, a missing Triton or C compiler, what a foreign network makes of it
        if is_out_of_memory(error):
            raise
        return one_line(error)
    return None


def _capture(parts: Parts, views: Sequence[Tensor]) -> str | None:
    """Returns what went wrong."""
    learner = parts.learner
    if parts.device.type != "cuda":
        return f"the device is {parts.device.type}"
    if not is_single_process():
        return "several processes train, and it would have to hold what they send each other"
    try:
        learner.passes = captured(learner, views, parts.data.batching.accumulation)
    except Exception as error:  # whatever CUDA says of an operation that no graph can hold
        return one_line(error)
    return None


def _views(parts: Parts) -> list[Tensor]:
    """Noise in the shapes of a batch; of an augmentation of one's own, its first batch."""
    if not isinstance(parts.transform, DINOTransform):
        _, micro_batches = next(iter(parts.steps(0, 1)))
        return next(iter(micro_batches)).views
    batch = parts.data.batching.batch_size
    return [torch.rand(batch, 3, size, size, device=parts.device) for size in parts.transform.sizes]


@contextmanager
def _left_as_it_was(learner: Learner) -> Iterator[None]:
    """Puts back what passes leave behind: statistics of batch norms, gradients."""
    buffers = [buffer for model in (learner.student, learner.teacher, learner.loss) for buffer in model.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        learner.student.zero_grad(set_to_none=True)


def _warn(what: str, problem: str, override: str) -> None:
    log.warning(
        "a step cannot be %s here (%s); the run goes on without, more slowly, as with %s", what, problem[:300], override
    )
