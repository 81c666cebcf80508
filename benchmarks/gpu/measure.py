"""How long a call takes on a device, and what the device does in it."""

import statistics
from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.step import clock, finish, seconds

WARM_UP, PROFILED = 3, 2  # calls


def times(call: Callable[[], object], rounds: int, device: torch.device) -> dict[str, float]:
    """Milliseconds a call: the median of `rounds` with a synchronisation after each, the mean of as many without."""
    for _ in range(WARM_UP):
        call()
    synchronised = [seconds(call, device) for _ in range(rounds)]
    finish(device)
    begin = clock(device)
    for _ in range(rounds):
        call()
    finish(device)
    mean = (clock(device) - begin) / rounds
    return {"ms": 1e3 * statistics.median(synchronised), "ms_unsynchronised": 1e3 * mean}


def work(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Milliseconds a call in which the GPU works, and its kernels and copies; {} where there is no GPU."""
    if device.type != "cuda":
        return {}
    finish(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            call()
        finish(device)
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    kernels = {span for span in spans if span[2] > span[1]}  # the profiler may report one twice
    busy = covered((start, end) for _, start, end in kernels)  # microseconds
    return {"gpu_ms": busy / 1e3 / PROFILED, "kernels": len(kernels) / PROFILED}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of them lasts: kernels on two streams work at the same time."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
