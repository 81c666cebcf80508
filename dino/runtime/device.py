"""Which device and which number format a run uses."""

import contextlib
import functools
import os
import re
import resource
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from dino.runtime.processes import place
from dino.runtime.refused import Refused

DEVICES = r"auto|cpu|mps|cuda(:\d{1,3})?"
FIRST_TENSOR_CORES = (7, 0)  # compute capability: V100; T4 has 7.5, the first with bf16 (A100) 8.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str = "auto") -> torch.device:
    """auto: CUDA, else Apple's MPS, else the CPU. Of several processes on one machine, each takes its own GPU.

    Raises Refused for what is no device, or is not in this machine.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if found else "mps" if mps else "cpu"
    kind, _, index = name.partition(":")
    if not re.fullmatch(DEVICES, name):
        raise Refused(f"device={name}: expected auto, cpu, cuda, cuda:N or mps.")
    if (kind == "mps" and not mps) or (kind == "cuda" and found <= int(index or 0)):
        seen = f"{found} CUDA devices" if found else "no CUDA device" if kind == "cuda" else "no MPS"
        raise Refused(f"device={name}: this machine has {seen} that torch can use; use device=auto or cpu.")
    if name == "cuda" and place().world_size > 1:
        # SLURM may show each process its own GPU alone, which is then the first.
        return torch.device("cuda", place().local_rank % found)
    return torch.device(name)


def use_device(name: str = "auto") -> torch.device:
    """`choose_device`, and makes a GPU the current one: what is asked of "cuda", such as its random state, is of it."""
    device = choose_device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """auto: bf16 where the processor computes in it; fp16 on GPUs whose tensor cores know no other; else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        return "fp16" if torch.cuda.get_device_capability(device) >= FIRST_TENSOR_CORES else "fp32"
    return "bf16" if _cpu_has_bf16(device) else "fp32"


def choose_kernels(deterministic: bool, device: torch.device) -> None:
    """On CUDA the fastest kernels, TF32 in fp32 products; or those whose results are the same to the bit each time.

    torch warns of an operation that has no such kernel, and the run goes on with the one that there is.
    """
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if device.type != "cuda":
        return
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch refuses to multiply without it
    torch.backends.cudnn.benchmark = not deterministic  # by measurement, which may choose another the next time
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = not deterministic


def autocast_for(device: torch.device, precision: str) -> Callable[[], AbstractContextManager[Any]]:
    """A context for forward passes; fp32 is a context that does nothing."""
    if precision == "fp32":
        return nullcontext
    return functools.partial(torch.autocast, device.type, dtype=DTYPES[precision])


def usable_cores() -> int:
    """Cores that this process may run on: fewer than the machine's under SLURM or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(device: torch.device) -> int:
    """Data workers of each process: its share of the cores, less one for the process itself, which must never be late
    with the device's work. None where the CPU trains: its threads wait for each other at every operation, so that a
    core taken from one stalls all (on two cores, one worker beside two threads: 75 images/s, where none gave 101)."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's; SLURM gives each process cores of its own
    return 0 if device.type == "cpu" else max(1, usable_cores() // processes - 1)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had: of a GPU, or of this machine within what SLURM or a container allows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo, own = Path("/proc/meminfo"), Path("/proc/self/cgroup")
    if not meminfo.exists():  # macOS: all that is built in
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = [1024 * int(lines["MemAvailable"].split()[0])]
    groups = [line.split(":", 2)[2] for line in own.read_text().splitlines() if line.startswith("0::")]
    for group in [Path("/sys/fs/cgroup", path.lstrip("/")) for path in groups]:
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # "max": without a limit; or no such file
                limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                free.append(max(0, limit - used + int(statistics["inactive_file"])))  # what the disk's cache gives back
    return min(free)


def peak_memory(device: torch.device) -> int:
    """Bytes at most so far: of the tensors on a GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says may be the parent's peak
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes


def describe(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )


def _cpu_has_bf16(device: torch.device) -> bool:
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())
