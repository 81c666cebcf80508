"""What learns or is averaged: the one object of a run that has weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dino.head import Factors
from dino.loss.dino import DinoLoss
from dino.model import DinoModel
from dino.run.checkpoint import restore, training_state
from dino.run.step import Distilled
from dino.scheduler import Values


@dataclass
class Learner:
    """Student, teacher and loss, with what one update of them needs.

    schedule: the scheduled values of a step, counted from 0.
    max_norm: the norm to which each parameter's gradient is clipped.
    parallel: the student as forward passes call it: wrapped by DDP where several processes train it, else itself.
    passes: `forward_backward`, or the CUDA graph that was made of it (dino/run/accelerate.py).
    """

    student: DinoModel
    teacher: DinoModel
    loss: DinoLoss
    optimizer: Optimizer
    schedule: Callable[[int], Values]
    max_norm: float = math.inf
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler(enabled=False))
    parallel: nn.Module = field(init=False)
    passes: Callable[[Sequence[Tensor], int], Distilled] = field(init=False)

    def __post_init__(self) -> None:
        self.parallel, self.passes = self.student, self.forward_backward
        self.teacher_temp = torch.zeros_like(self.loss.center[0, 0])

    def distil(self, views: Sequence[Tensor], teacher_temp: float, micro_batches: int = 1) -> Distilled:
        """Forward, loss and backward of one of a step's `micro_batches` equal parts: eager, compiled or captured.

        views: [batch, 3, size, size] each, in view order, the global ones first.
        """
        self.teacher_temp.fill_(teacher_temp)  # on the device: a CUDA graph replays with whatever it holds
        return self.passes(views, micro_batches)

    def forward_backward(self, views: Sequence[Tensor], micro_batches: int) -> Distilled:
        """Waits for nothing on the device and takes no decision on data, so that a CUDA graph can hold it."""
        with self.autocast(), torch.no_grad():
            features, teacher = self.teacher(views[: self.loss.n_global_crops], return_backbone_features=True)  # t1, t2
        with self.autocast():
            student = self.parallel(views, factored=True)  # s1, s2 and the local views, before the last product
        loss = self.loss(student, teacher, teacher_temp=self.teacher_temp, move_center=False) / micro_batches
        self.scaler.scale(loss).backward()
        return Distilled(loss.detach(), teacher, Factors(*(factor.detach() for factor in student)), features)

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors, however the student is sharded: all processes must ask."""
        state = training_state(self.student, self.teacher, self.optimizer, self.loss)
        return state | {"scaler_state_dict": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        restore(state, self.student, self.teacher, self.optimizer, self.loss)
        if state["scaler_state_dict"]:  # a scaler that is off saves nothing
            self.scaler.load_state_dict(state["scaler_state_dict"])
