"""A stand-in for a data set whose images lie on a GPU."""

import torch

from dino.dataset.cache import Cached

aten = torch.ops.aten
VIEWS = (aten.slice.Tensor, aten.view.default, aten.permute.default, aten.detach.default, aten.alias.default)


class Elsewhere(torch.Tensor):
    """A tensor of another device than the CPU, which can be viewed and copied to the CPU; all else raises, as much does
    for uint8 on CUDA."""

    @staticmethod
    def __new__(cls, values):
        form = {"strides": values.stride(), "dtype": values.dtype, "device": "meta"}
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, **form)

    def __init__(self, values):
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        given, kwargs = [arg.values if isinstance(arg, cls) else arg for arg in args], kwargs or {}
        if function in VIEWS:
            return cls(function(*given, **kwargs))
        if function == aten._to_copy.default and kwargs["device"].type == "cpu":
            return given[0].clone()
        raise NotImplementedError(f"{function} is not implemented for this device")


def cached_elsewhere(dataset, tensor=Elsewhere):
    """A Cached whose images are one tensor on another device; `tensor`: what makes that of one on the CPU."""
    cached = Cached(dataset)
    cached.device, cached.images_per_block = torch.device("meta"), len(dataset)
    cached.blocks = [tensor(torch.cat(cached.blocks))]
    return cached
