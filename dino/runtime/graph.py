"""A function recorded once as a CUDA graph: a replay launches its thousands of kernels as one."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
Replay = Callable[[], object]
WARM_UP = 3  # calls before the recording, in which cuDNN and cuBLAS choose their kernels and take their memory


def cuda_graph(function: Callable[[], T]) -> tuple[Replay, T]:
    """(replay, the outputs of `function`, which each replay writes anew). As torch's notes on CUDA graphs ask."""
    torch.cuda.empty_cache()  # what eager passes left cached, the graph's own memory pool could not use
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # thread_local: what other threads ask of CUDA meanwhile (pinned memory of a data loader) does no harm.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = function()
    return graph.replay, outputs


class Captured(Generic[T]):
    """`function(inputs)`, which adds gradients to those of `parameters`, as a recording.

    Inputs must have the shapes of the recording. Outputs and gradients lie where the recording writes them: read them,
    or copy them, before the next call. A call finds the gradients as a step leaves them: set to None where a new step
    begins, else to be added to.
    record: `cuda_graph`; a test on a CPU records differently.
    """

    def __init__(
        self,
        function: Callable[[Sequence[Tensor]], T],
        inputs: Sequence[Tensor],
        parameters: Iterable[nn.Parameter],
        record: Callable[[Callable[[], T]], tuple[Replay, T]] = cuda_graph,
    ) -> None:
        self.inputs = [value.clone() for value in inputs]
        function(self.inputs)
        self.parameters = [p for p in parameters if p.grad is not None]  # the others take no part
        self.gradients = [torch.zeros_like(p) for p in self.parameters]
        self._begin_step()
        self.replay, self.outputs = record(partial(function, self.inputs))

    def __call__(self, inputs: Sequence[Tensor]) -> T:
        if self.parameters[0].grad is None:
            self._begin_step()
        torch._foreach_copy_(self.inputs, list(inputs))
        self.replay()
        return self.outputs

    def _begin_step(self) -> None:
        torch._foreach_zero_(self.gradients)
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
