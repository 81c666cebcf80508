"""What goes through the networks at once."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """One of the equal parts in which a step's images go through the networks."""

    views: list[Tensor]  # [batch, 3, size, size] each, in view order
    labels: Tensor | None = None  # [batch] on the CPU, -1 where there is none
    per_step: int = 1  # micro-batches of the step, in this process
    last: bool = True  # gradients are averaged over the processes in its backward pass
