"""Modules with shapes and no memory: to learn what a node of a config describes before any memory is taken for it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

TENSORS, PARAMETERS = 5_000, 10**11  # more than any model that this is for; stops depth=1000000000 within a second


@contextlib.contextmanager
def weightless() -> Iterator[None]:
    """Modules made in this block are on torch's meta device, and draw nothing from the random generators.

    Raises ValueError inside the block where a module has more than TENSORS tensors or PARAMETERS parameters.
    """
    tensors = parameters = 0

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal tensors, parameters
        tensors += 1
        parameters += parameter.numel() if parameter is not None else 0
        if tensors > TENSORS or parameters > PARAMETERS:
            raise ValueError(f"more than {TENSORS:,} tensors or {PARAMETERS:,} parameters; make it smaller")

    handle = register_module_parameter_registration_hook(registered)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            yield
    finally:
        handle.remove()


def needs_weights(error: BaseException) -> bool:
    """Whether torch complains of an operation that a tensor without memory cannot do: nothing is known then."""
    return isinstance(error, RuntimeError) and "meta" in str(error).lower()
