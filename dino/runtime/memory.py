"""Out-of-memory errors: say which settings need less. Running out of memory in k-NN is only a warning."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from dino.runtime.processes import all_reduce_max

T = TypeVar("T")
log = logging.getLogger(__name__)


class OutOfMemory(RuntimeError):
    """The device, or this machine, has too little memory."""

    exit_status = 6


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OutOfMemory | torch.OutOfMemoryError | MemoryError):
        return True  # the caching allocator's, and Python's and numpy's
    words = ("DefaultCPUAllocator: ", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


@contextlib.contextmanager
def oom_advice(advice: str) -> Iterator[None]:
    """Raises OutOfMemory in place of what torch, numpy and Python raise where memory runs out in the block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory ({_asked(error)}) {advice}") from error


@contextlib.contextmanager
def oom_advice_on_all_ranks(advice: str) -> Iterator[None]:
    """`said`, on all processes where it is on one. No process may skip a collective in the block."""
    problem: OutOfMemory | None = None
    try:
        with oom_advice(advice):
            yield
    except OutOfMemory as error:
        problem = error
    (any_ran_out,) = all_reduce_max(problem is not None)
    if any_ran_out:
        raise problem or OutOfMemory(f"another process is out of memory {advice}")


def skip_when_out_of_memory(measure: Callable[[], T], instead: T) -> T:
    """What `measure` gives; `instead`, with a warning, where memory runs out."""
    try:
        return measure()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        log.warning("not measured: %s; training goes on", error)
        return instead


def smaller_batch_overrides(batch_size: int, accumulation: int, derived: bool) -> str:
    """Overrides that halve the batch of a forward pass (or divide it by its smallest divisor) and keep the effective
    batch.

    derived: the accumulation follows from training.effective_batch.
    """
    if batch_size == 1:
        return "less takes only a smaller backbone, fewer or smaller views, precision=bf16, or training.sharded=true"
    fits = next(size for size in range(batch_size // 2, 0, -1) if batch_size % size == 0)
    passes = accumulation * batch_size // fits
    settings = f"training.batch_size={fits}" + ("" if derived else f" training.gradient_accumulation_steps={passes}")
    return f"the same steps in parts of 1/{batch_size // fits} take less: {settings}"


def _asked(error: BaseException) -> str:
    """How much was asked for, as far as the allocator says."""
    words = " ".join(str(error).split()).partition("DefaultCPUAllocator: ")[2] or " ".join(str(error).split())
    return ". ".join(words.split(". ")[:3]).rstrip(".")[:240] or type(error).__name__
