"""The DINO loss: cross-entropy between teacher and student over all pairs of different views (Sec. 3.1, Eq. 3)."""

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dino.head import Factors
from dino.runtime.processes import all_reduce_mean

# Logits of the student at a time. On a CPU 17 MB in fp32: of 65,536 prototypes and 10 views those of 6 images. A GPU
# wants few large kernels: those of 100 images.
MOST_LOGITS, MOST_LOGITS_ON_A_GPU = 2**22, 2**26


class DinoLoss(nn.Module):
    """Mean cross-entropy of every student view against every *other* global view of the teacher.

    `center` is a buffer [1, out_dim]: checkpoints hold it. In train mode each call moves it, after the loss (Eq. 4,
    Algorithm 1). Whoever splits a step into micro-batches says `move_center=False` and calls `update_center` once a
    step, so that the parts of a batch give the loss and the center of the batch whole. Softmax and loss are in fp32
    (fp64 stays fp64) whatever autocast says, of some images at a time and with their gradients; given as factors, the
    student's logits are never whole (of 10 views, 64 images and 65,536 prototypes 168 MB in fp32, and the gradient as
    much).

    Raises ValueError for values that cannot work; warns where the teacher would not be sharper than the student.
    """

    center: Tensor

    def __init__(
        self,
        out_dim: int,
        ncrops: int = 8,
        n_global_crops: int = 2,
        student_temp: float = 0.1,
        teacher_temp: float = 0.04,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if out_dim < 2:
            raise ValueError(f"out_dim must be at least 2 prototypes, got {out_dim}.")
        if not 1 <= n_global_crops <= ncrops or ncrops < 2:
            raise ValueError(
                f"ncrops must be at least 2 and hold n_global_crops, got ncrops={ncrops}, "
                f"n_global_crops={n_global_crops}."
            )
        check_temperature("student_temp", student_temp)
        check_temperature("teacher_temp", teacher_temp)
        if student_temp <= teacher_temp:
            warnings.warn(
                f"DinoLoss: student_temp={student_temp} is not above teacher_temp={teacher_temp}: the teacher should "
                "be sharper (the paper has 0.1 and 0.04), or the outputs drift to uniform.",
                stacklevel=2,
            )
        if not 0 <= center_momentum < 1:
            raise ValueError(f"center_momentum must be in [0, 1), got {center_momentum}; the authors use 0.9.")
        self.out_dim, self.ncrops, self.n_global_crops = out_dim, ncrops, n_global_crops
        self.student_temp, self.teacher_temp, self.center_momentum = student_temp, teacher_temp, center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.cross_entropy = cross_entropy

    def compile(self, **options: Any) -> None:
        self.cross_entropy = torch.compile(cross_entropy, **options)

    def forward(
        self,
        student: Float[Tensor, "ncrops_x_batch out_dim"] | Factors,
        teacher: Float[Tensor, "globals_x_batch out_dim"],
        *,
        teacher_temp: float | Tensor | None = None,
        move_center: bool = True,
    ) -> Float[Tensor, ""]:
        """Logits in view order (all images of view 1, then of view 2, ...; global views first) to a scalar >= 0.

        The student's logits may be given as their factors (`DinoModel(views, factored=True)`). `teacher_temp`: the
        schedule's value for this step, in (0, 1]; a tensor on the device is not looked at, so that a step in a CUDA
        graph can change it; None: the one of the constructor. In train mode the center moves after the loss, unless
        `move_center` is False.
        """
        if isinstance(teacher_temp, float | int):
            check_temperature("teacher_temp", teacher_temp)
        temp = self.teacher_temp if teacher_temp is None else teacher_temp
        outputs, weight = student if isinstance(student, Factors) else (student, None)
        images = len(outputs) // self.ncrops
        of_views, of_globals = outputs.view(self.ncrops, images, -1), teacher.view(self.n_global_crops, images, -1)
        with torch.autocast(outputs.device.type, enabled=False):
            total: Tensor = _CrossEntropy.apply(self, of_views, weight, of_globals, temp)
        if self.training and move_center:
            self.update_center(teacher)
        return total / (self.n_global_crops * (self.ncrops - 1) * images)

    @torch.no_grad()
    def update_center(self, teacher: Float[Tensor, "rows out_dim"]) -> None:
        """Eq. 4, over all processes. `teacher`: their logits of a step, or the means of its equal parts, one a row."""
        mean = all_reduce_mean(_at_least_fp32(teacher).mean(dim=0, keepdim=True).to(self.center))
        mean = torch.where(mean.isfinite().all(), mean, self.center)  # of a step that is left out (dino/run/finite.py)
        self.center.lerp_(mean, 1 - self.center_momentum)

    @torch.no_grad()
    def entropies(
        self, teacher: Float[Tensor, "rows out_dim"], teacher_temp: float | None = None
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """(mean entropy of the teacher's outputs, entropy of their mean), both over ln K: 1 is uniform.

        `teacher` holds this process's outputs; the figures are of all processes'.
        Collapse to uniform: the first is at 1. Collapse to one prototype: the second is at 0 (Sec. 5.3).
        """
        p = probabilities(teacher, self.center, self.teacher_temp if teacher_temp is None else teacher_temp)
        mean = all_reduce_mean(p.mean(dim=0))
        of_each = all_reduce_mean(-torch.xlogy(p, p).sum(dim=-1).mean())
        return of_each / math.log(self.out_dim), -torch.xlogy(mean, mean).sum() / math.log(self.out_dim)


def probabilities(teacher: Tensor, center: Tensor, teacher_temp: float | Tensor) -> Tensor:
    """Centered and sharpened (Sec. 3.1)."""
    p: Tensor = ((_at_least_fp32(teacher) - center) / teacher_temp).softmax(dim=-1)
    return p


def cross_entropy(
    logits: Float[Tensor, "ncrops images out_dim"],
    teacher: Float[Tensor, "globals images out_dim"],
    center: Float[Tensor, "1 out_dim"],
    teacher_temp: float | Tensor,
    student_temp: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, "ncrops images out_dim"]]:
    """The sum over all images and pairs of different views, and its gradient with respect to `logits`.

    A cross-entropy is linear in its target: each view is compared once, with the sum of its targets.
    """
    p = probabilities(teacher, center, teacher_temp)
    others = [torch.cat([p[:view], p[view + 1 :]]).sum(dim=0) for view in range(len(p))]
    targets = torch.stack(others + [p.sum(dim=0)] * (len(logits) - len(p)))
    log_p = (_at_least_fp32(logits) / student_temp).log_softmax(dim=-1)
    total = -(targets * log_p).sum()
    of_scaled = log_p.exp_().mul_(targets.sum(dim=-1, keepdim=True)).sub_(targets)
    return total, of_scaled.div_(student_temp).to(logits.dtype)


class _CrossEntropy(torch.autograd.Function):
    """The sum over all images and pairs of views, of some images at a time, and its gradients.

    The gradients are computed with the sum, so that nothing of one part is needed any more when the next begins.
    """

    @staticmethod
    def forward(
        ctx: Any,
        loss: DinoLoss,
        outputs: Float[Tensor, "ncrops images _"],
        weight: Float[Tensor, "out_dim _"] | None,
        teacher: Float[Tensor, "globals images out_dim"],
        teacher_temp: float | Tensor,
    ) -> Float[Tensor, ""]:
        of_outputs, of_weight = torch.empty_like(outputs), None if weight is None else torch.zeros_like(weight)
        total = torch.zeros((), device=outputs.device)
        most = MOST_LOGITS if outputs.device.type == "cpu" else MOST_LOGITS_ON_A_GPU
        parts = math.ceil(outputs.shape[:2].numel() * loss.out_dim / most)
        for output, gradient, of_globals in zip(
            *(tensor.chunk(parts, dim=1) for tensor in (outputs, of_outputs, teacher)), strict=True
        ):
            logits = output if weight is None else F.linear(output, weight)
            of_part, of_logits = loss.cross_entropy(logits, of_globals, loss.center, teacher_temp, loss.student_temp)
            total = total + of_part
            gradient.copy_(of_logits if weight is None else of_logits @ weight)
            if of_weight is not None:
                of_weight.addmm_(of_logits.flatten(0, 1).T, output.flatten(0, 1))
        ctx.save_for_backward(of_outputs, of_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Float[Tensor, ""]) -> tuple[Tensor | None, ...]:
        of_outputs, of_weight = (None if of is None else of * factor for of in ctx.saved_tensors)
        return None, of_outputs, of_weight, None, None


def check_temperature(name: str, temp: float) -> None:
    """Raises ValueError where a softmax cannot be sharpened by `temp`. An epoch given for it is mostly above 1."""
    if not 0 < temp <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {temp}; the paper has 0.1 (student) and 0.04 (teacher).")


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
