"""One model on several processes: gradients averaged (DDP), or parameters sharded (FSDP2)."""

import contextlib
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import ParametrizationList

from dino.runtime.processes import is_single_process


def data_parallel(model: nn.Module, accumulation: int) -> nn.Module:
    """`model`, its gradients averaged over all processes in each backward pass outside of no_sync(model)."""
    if is_single_process() or is_sharded(model):
        return model
    # A static graph lets torch plan the reductions once, but its first backward pass must not be inside no_sync.
    return DistributedDataParallel(model, static_graph=accumulation == 1, gradient_as_bucket_view=True)


@contextlib.contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """For forward and backward passes whose gradients need not be averaged yet, since more of the step follow."""
    if is_sharded(model):
        model.set_requires_gradient_sync(False)  # type: ignore[operator]
        yield
        model.set_requires_gradient_sync(True)  # type: ignore[operator]
    else:
        with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
            yield


def shard(model: nn.Module, device: torch.device) -> None:
    """Leaves each process its share of every parameter (FSDP2), and so of gradients and optimizer state.

    A block's parameters are whole only while it computes. Does nothing to one process alone.
    """
    if is_single_process():
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model.to(memory_format=torch.contiguous_format)  # all that FSDP takes
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in reversed(blocks_of(model)):  # the inner ones first: each takes what they leave
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The members of lists, and those of sequences that are made of more than one layer; the outer ones first.

    These are the blocks of ViTs and ResNets, and the stages of networks that have stages of blocks.
    """
    found = [
        member
        for members in model.modules()
        if isinstance(members, nn.ModuleList | nn.Sequential) and not isinstance(members, ParametrizationList)
        for member in members
        if not isinstance(member, nn.ModuleList | nn.ModuleDict)  # which compute nothing themselves
        and (isinstance(members, nn.ModuleList) or len([*member.children()]) > 1)
        and any(True for _ in member.parameters())
    ]
    return list(dict.fromkeys(found))


def is_sharded(thing: nn.Module | Tensor) -> bool:
    """By what FSDP2 gives it: to import its classes takes most of a second, and most runs have no use for them."""
    return hasattr(thing, "set_requires_gradient_sync") or hasattr(thing, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor in one piece: all processes must ask. Any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_shard(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded tensor, to be changed in place. Any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shard_like(tensor: Tensor, like: Any) -> Tensor:
    """The share of a whole `tensor` that `like` is of its own."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
