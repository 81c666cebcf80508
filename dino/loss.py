"""The DINO loss: cross-entropy between teacher and student over all pairs of different views (Sec. 3.1, Eq. 3)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dino.distributed import averaged


class DinoLoss(nn.Module):
    """Mean cross-entropy of every student view against every *other* global view of the teacher.

    `center` is a buffer: checkpoints hold it. It moves by `update_center` alone, once a step, so that `forward` changes
    nothing and a batch in parts gives the loss of the batch whole. Softmax and loss are in fp32 (fp64 stays fp64)
    whatever autocast says, a view at a time and computed again in the backward pass: logits in half precision are
    never whole in fp32 (of 10 views, 64 images and 65,536 prototypes that would be 168 MB).
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
        for name, temp in (("student_temp", student_temp), ("teacher_temp", teacher_temp)):
            if not 0 < temp < math.inf:
                raise ValueError(f"{name} must be above 0, got {temp}; the paper has 0.1 (student) and 0.04 (teacher).")
        if not 0 <= center_momentum < 1:
            raise ValueError(f"center_momentum must be in [0, 1), got {center_momentum}; the authors use 0.9.")
        self.out_dim, self.ncrops, self.n_global_crops = out_dim, ncrops, n_global_crops
        self.student_temp, self.teacher_temp, self.center_momentum = student_temp, teacher_temp, center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(
        self,
        student: Float[Tensor, "ncrops_x_batch out_dim"],
        teacher: Float[Tensor, "globals_x_batch out_dim"],
        teacher_temp: float | None = None,
    ) -> Float[Tensor, ""]:
        """Logits in view order (all images of view 1, then of view 2, ...; global views first) to a scalar >= 0.

        `teacher_temp` is the schedule's value for this step; None: the one of the constructor.
        """
        with torch.autocast(student.device.type, enabled=False):
            targets = self._probabilities(teacher, teacher_temp).chunk(self.n_global_crops)
            of_all = sum(targets)
            total = torch.zeros((), device=student.device)
            for view, logits in enumerate(student.chunk(self.ncrops)):
                # A cross-entropy is linear in its target: one with the sum of the targets is all pairs of this view.
                others = [target for i, target in enumerate(targets) if i != view]
                target = of_all if len(others) == len(targets) else sum(others)
                if others:
                    total = total + checkpoint(
                        self._cross_entropy, logits, target, len(others), use_reentrant=False, preserve_rng_state=False
                    )
            pairs = self.n_global_crops * (self.ncrops - 1)
            return total * self.ncrops / (pairs * len(student))

    @torch.no_grad()
    def update_center(self, teacher: Float[Tensor, "rows out_dim"]) -> None:
        """Eq. 4, over all processes. `teacher`: their logits of a step, or the means of its equal parts, one a row."""
        mean = averaged(_at_least_fp32(teacher).mean(dim=0, keepdim=True).to(self.center))
        mean = torch.where(mean.isfinite().all(), mean, self.center)  # of a step that is left out (dino/finite.py)
        self.center.lerp_(mean, 1 - self.center_momentum)

    @torch.no_grad()
    def entropies(
        self, teacher: Float[Tensor, "rows out_dim"], teacher_temp: float | None = None
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """(mean entropy of the teacher's outputs, entropy of their mean), both over ln K: 1 is uniform.

        `teacher` holds this process's outputs; the figures are of all processes'.
        Collapse to uniform: the first is at 1. Collapse to one prototype: the second is at 0 (Sec. 5.3).
        """
        p = self._probabilities(teacher, teacher_temp)
        mean = averaged(p.mean(dim=0))
        of_each = averaged(-torch.xlogy(p, p).sum(dim=-1).mean())
        return of_each / math.log(self.out_dim), -torch.xlogy(mean, mean).sum() / math.log(self.out_dim)

    def _cross_entropy(self, logits: Tensor, target: Tensor, weight: int) -> Tensor:
        """Sum over the batch for a target that sums to `weight`. Less the maximum no term is below zero."""
        scaled = _at_least_fp32(logits) / self.student_temp
        scaled = scaled - scaled.detach().amax(dim=-1, keepdim=True)
        return weight * scaled.logsumexp(dim=-1).sum() - (target * scaled).sum()

    def _probabilities(self, teacher: Tensor, teacher_temp: float | None) -> Tensor:
        """Centered and sharpened (Sec. 3.1)."""
        temp = self.teacher_temp if teacher_temp is None else teacher_temp
        p: Tensor = ((_at_least_fp32(teacher) - self.center) / temp).softmax(dim=-1)
        return p


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
