"""Several processes that train as one, started by torchrun or SLURM. With one process all of this does nothing."""

import contextlib
import itertools
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from dino.runtime.refused import Refused, first_line

CONNECTED = itertools.count()


class PeerLost(RuntimeError):
    """Another process is gone or out of reach: nothing can be computed together any more."""

    exit_status = 4


class Place(NamedTuple):
    """Which of the processes this one is. `local_rank` counts the processes of one machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def place() -> Place:
    """As torchrun says in the environment, else as srun does for the tasks of a step, else one process alone."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return Place(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # set in a step alone, not in a batch script or beside salloc
        return Place(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]))
    return Place()


def is_single_process() -> bool:
    return not (dist.is_available() and dist.is_initialized())


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Connects the processes for as long as the block runs; raises PeerLost in it where one of them dies.

    Gloo carries what is on the CPU (agreements, objects), NCCL what is on a GPU.
    """
    here = place()
    if here.world_size == 1:
        yield
        return
    if "MASTER_ADDR" not in os.environ:
        os.environ |= _slurm_rendezvous()
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
    store, *_ = next(rendezvous("env://", here.rank, here.world_size))
    # A store outlives a run of a sweep, and torchrun's a restart, with the addresses of those who are gone. Agents
    # count their own restarts, so where there are several the count is no name that all processes know.
    restarts = os.environ["TORCHELASTIC_RESTART_COUNT"] if os.environ.get("GROUP_WORLD_SIZE") == "1" else ""
    store = dist.PrefixStore(f"{restarts}.{next(CONNECTED)}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.world_size)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise PeerLost(
                f"process {here.rank} of {here.world_size} lost another, which failed or was killed; the last "
                f"checkpoint is kept, and the same command resumes from it ({first_line(error)[:160]})"
            ) from error
        raise
    finally:
        if not isinstance(sys.exception(), PeerLost):  # NCCL would wait for the dead
            dist.destroy_process_group()


def _slurm_rendezvous() -> dict[str, str]:
    """Where rank 0 listens: the address by which SLURM itself reaches the first node, and a port of the job's own."""
    nodes = os.environ["SLURM_STEP_NODELIST"]
    first = subprocess.check_output(["scontrol", "show", "hostnames", nodes], text=True).split()[0]
    words = subprocess.check_output(["scontrol", "show", "node", first], text=True).split()
    address = next(word.removeprefix("NodeAddr=") for word in words if word.startswith("NodeAddr="))
    return {"MASTER_ADDR": address, "MASTER_PORT": str(20_000 + int(os.environ["SLURM_JOB_ID"]) % 40_000)}


# ---- agreeing -------------------------------------------------------------------------------------------------------


def all_reduce_max(*values: int) -> list[int]:
    """Of each value, the largest that any process gave: how all learn of one's signal at the same step."""
    if is_single_process():
        return list(values)
    tensor = torch.tensor(values)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def all_gather_objects(thing: Any) -> list[Any]:
    """What each process gave, by rank. For small things: they are pickled, and go over gloo."""
    if is_single_process():
        return [thing]
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


@contextlib.contextmanager
def barrier_refusals() -> Iterator[None]:
    """What is refused on one process is refused on all, in its words. No process may skip a collective in the block."""
    problems: tuple[str, ...] = ()
    try:
        yield
    except Refused as refused:
        problems = refused.problems
        if is_single_process():
            raise
    found = dict.fromkeys(itertools.chain(*all_gather_objects(problems)))
    if found:
        raise Refused(*found)


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """Runs the block on rank 0, then on one process of each machine, then on the rest.

    So that one downloads and the others find the files, on disks that are shared and on those that are not.
    """
    here = place()
    turn = 0 if here.rank == 0 else 1 if here.local_rank == 0 else 2
    for _ in range(turn):
        all_gather_objects(None)
    try:
        yield
    finally:
        for _ in range(2 - turn):
            all_gather_objects(None)


# ---- reducing -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The mean of `tensor` over all processes, in place."""
    if not is_single_process():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def rank_indices(total: int) -> list[int]:
    """The rows, of `total`, that this process computes and `all_gather_rows` joins: strided shards of equal length, the
    last of which may wrap around."""
    rank, size = (0, 1) if is_single_process() else (dist.get_rank(), dist.get_world_size())
    return [index % total for index in range(rank, -(-total // size) * size, size)]


@torch.no_grad()
def all_gather_rows(rows: Shaped[Tensor, "mine ..."], total: int, chunk: int = 65536) -> Shaped[Tensor, "{total} ..."]:
    """All `total` rows, in order and on every process, each of which gives those of `rank_indices(total)`.

    Moves at most `chunk` rows a process at a time.
    """
    if is_single_process():
        return rows
    joined = []
    for piece in torch.split(rows.contiguous(), chunk):
        pieces = [torch.empty_like(piece) for _ in range(dist.get_world_size())]
        dist.all_gather(pieces, piece)
        joined.append(torch.stack(pieces, dim=1).flatten(0, 1))
    return torch.cat(joined)[:total]  # what was repeated is last


@torch.no_grad()
def broadcast_buffers(module: nn.Module) -> None:
    """Gives every process the buffers of rank 0 (the statistics of batch norms that are not synchronised)."""
    if not is_single_process():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


# ---- what is printed at the start -----------------------------------------------------------------------------------


def topology(device: torch.device) -> tuple[str, int]:
    """The processes and their machines in words, and how many are on this one.

    Raises Refused, on all of them, where two would share one GPU.
    """
    machine = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    places = all_gather_objects((machine, gpu))
    machines = Counter(name for name, _ in places)
    for (name, _), count in Counter(place for place in places if place[1]).items():
        if count > 1:
            raise Refused(f"{count} processes of {name} would share one GPU; start as many as it has GPUs.")
    words = f"{len(places)} on {', '.join(f'{name} ({count})' for name, count in machines.items())}"
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if gpus > machines[machine]:
        words += (
            f"; {gpus - machines[machine]} of {gpus} GPUs here are not used: "
            f"torchrun --nproc-per-node {gpus} -m dino.train ... takes all"
        )
    return words, machines[machine]
