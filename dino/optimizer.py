"""Which parameters get decay, the clipping of gradients, and LARS; AdamW and SGD are torch's own."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dino.runtime.sharding import full_tensor, local_shard


def parameter_groups(student: nn.Module, last_layer: nn.Module) -> list[dict[str, Any]]:
    """Groups for any torch optimizer: with and without decay, the head's last layer apart so that it can freeze.

    Biases and the gains of norms (everything with one dimension) get no decay, as in the authors' code; class tokens
    and position embeddings do, as there.
    """
    last = {id(p) for p in last_layer.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in student.parameters():
        if parameter.requires_grad:
            groups.setdefault((parameter.ndim > 1, id(parameter) in last), []).append(parameter)
    return [{"params": p, "decay": decay, "last_layer": last} for (decay, last), p in groups.items()]


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float = math.inf) -> Tensor:
    """Scales each parameter's gradient to a norm of at most `max_norm`, as the authors' code does: one by one, so that
    the last layer's large gradients don't shrink everybody's. Returns the norm of the whole gradient before clipping,
    a tensor: nothing waits for the device.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack([full_tensor(norm) for norm in torch._foreach_norm(grads)])
    if max_norm < math.inf:
        factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)  # of all at once: a GPU takes as long for one as for all
        torch._foreach_mul_([local_shard(grad) for grad in grads], list(factors.unbind()))
    norm: Tensor = norms.norm()
    return norm


class LARS(Optimizer):
    """SGD with momentum and a rate per parameter: trust_coefficient x |weight| / |gradient| (You et al., 2017, Alg. 1).

    Parameters without decay (biases, norms) take the plain rate, as is usual and as in the authors' code.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {value}.")
        if not 0 < trust_coefficient < math.inf:
            raise ValueError(f"trust_coefficient must be above 0, got {trust_coefficient}; the LARS paper has 0.001.")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "decay": True})
        self.trust_coefficient = trust_coefficient

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        value = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if group["decay"]:
                    update = update.add(p, alpha=group["weight_decay"])
                    weight_norm, update_norm = p.norm(), update.norm()
                    trust = self.trust_coefficient * weight_norm / update_norm
                    update = update * torch.where((weight_norm > 0) & (update_norm > 0), trust, 1.0)
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                velocity = state["momentum_buffer"]
                velocity.mul_(group["momentum"]).add_(update)
                p.add_(velocity, alpha=-group["lr"])
        return value
