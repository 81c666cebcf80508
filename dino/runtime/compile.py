"""torch.compile, of the regions of a network that are worth a graph of their own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# Of one function. Its blocks ask for a few each of the student, the teacher, their first and their last block; at the
# limit of 8 that torch sets, the rest would stay eager without a word.
MOST_GRAPHS = 64


def compile_regions(network: nn.Module) -> None:
    """Has the blocks of a transformer compiled, which share their graphs, or else the whole of `network`.

    It compiles when it is first called. Names of parameters stay, and a copy of the network is not compiled.
    """
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    for region in repeated_blocks(network) or [network]:
        region.compile(dynamic=False)


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The members of lists of blocks alike (of one class and one set of shapes), where most parameters lie in such."""
    blocks = [
        member
        for members in network.modules()
        if isinstance(members, nn.ModuleList | nn.Sequential)
        if len({_kind(member) for member in members}) == 1 and _size(members[0])
        for member in members
    ]
    return blocks if 2 * sum(map(_size, blocks)) > _size(network) else []


@contextmanager
def eager() -> Iterator[None]:
    """What is compiled runs as if it were not: for evaluation and report, whose shapes would each be compiled anew."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _kind(module: nn.Module) -> tuple[object, ...]:
    return (type(module), *(p.shape for p in module.parameters()))


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
