"""A checkpoint's content as it was at one step, while training goes on."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Snapshot:
    """A copy of `content`, nested dicts, lists and tuples of tensors and plain values, with all tensors on the CPU.

    From a GPU they are copied into pinned memory, in the order of the current stream: before the next step changes
    them, and without the host waiting.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content: dict[str, Any] = _copied(content)
        self._done: torch.cuda.Event | None = None
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._device = torch.cuda.current_device()
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def content(self) -> dict[str, Any]:
        """The copy, complete. May be called in another thread, which waits for the GPU."""
        if self._done is not None:
            with torch.cuda.device(self._device):  # a thread's own is GPU 0, where this process may have no context
                self._done.synchronize()
        return self._content


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach()
        if value.device.type != "cuda":
            return value.to("cpu", copy=True)
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value))
    return value
