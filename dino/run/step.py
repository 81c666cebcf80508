"""What one step knows when it is done."""

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from dino.head import Factors
from dino.scheduler import Values


class Distilled(NamedTuple):
    """What one micro-batch gives; its gradients are added to those of the student's parameters."""

    loss: Float[Tensor, ""]  # this micro-batch's part of the step's loss, detached
    teacher: Float[Tensor, "globals_x_batch out_dim"]  # logits
    student: Factors  # of the logits of all views
    features: Float[Tensor, "globals_x_batch dim"]  # of the teacher's backbone


@dataclass(frozen=True)
class Step:
    """`done` counts the updates, this one included. Tensors stay on the device: nobody has waited for them."""

    done: int
    now: Values  # the scheduled values that held during the step
    loss: Float[Tensor, ""]
    gradient_norm: Float[Tensor, ""]  # before clipping
    last: Distilled  # of the last micro-batch
