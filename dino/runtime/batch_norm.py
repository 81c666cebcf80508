"""Batch norms that see the batches of all processes."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino.runtime.processes import all_reduce_mean, is_single_process


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Gives the batch norms below `model` the statistics of all processes' batches, as one batch of all would have."""
    if is_single_process():
        return
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = SyncBatchNorm  # the same parameters and buffers


class _Mean(torch.autograd.Function):
    """The mean over all processes, through which gradients flow: each process's loss has a part in every statistic."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return all_reduce_mean(x.clone())

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return all_reduce_mean(gradient.clone())


class SyncBatchNorm(_BatchNorm):
    """On the CPU, for which torch has none."""

    def forward(self, x: Float[Tensor, "batch channels *pixels"]) -> Float[Tensor, "batch channels *pixels"]:
        if not self.training:
            return super().forward(x)
        dims = [dim for dim in range(x.ndim) if dim != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        wide = x if x.dtype == torch.float64 else x.float()
        mean = _Mean.apply(wide.mean(dims))  # of means, since every process has as many rows
        variance = _Mean.apply((wide - mean.view(shape)).square().mean(dims))
        with torch.no_grad():
            count = dist.get_world_size() * x.numel() // x.shape[1]
            tracked = self.get_buffer("num_batches_tracked").add_(1)
            weight = 1 / tracked.item() if self.momentum is None else self.momentum
            self.get_buffer("running_mean").lerp_(mean, weight)
            self.get_buffer("running_var").lerp_(variance * count / (count - 1), weight)
        normal = (wide - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        out: Tensor = normal * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)

    def _check_input_dim(self, x: Tensor) -> None:
        pass
