"""Backbone and head as one network, and the teacher: an exponential moving average (EMA) of the student."""

import copy
from collections.abc import Sequence
from typing import Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino.backbone.transformer import joined
from dino.head import Factors
from dino.runtime.sharding import full_tensor


class DinoModel(nn.Module):
    """g = h(f(x)): a backbone (images to [B, D]) and a head ([B, D] to [B, K]; in training its `factors`)."""

    def __init__(self, backbone: nn.Module, projection_head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection_head = projection_head

    @overload
    def forward(self, views: Tensor | Sequence[Tensor], return_backbone_features: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(
        self, views: Tensor | Sequence[Tensor], return_backbone_features: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(self, views: Tensor | Sequence[Tensor], *, factored: Literal[True]) -> Factors: ...
    def forward(
        self,
        views: Float[Tensor, "batch 3 height width"] | Sequence[Float[Tensor, "_ 3 _ _"]],
        return_backbone_features: bool = False,
        *,
        factored: bool = False,
    ) -> (
        Float[Tensor, "samples outputs"]
        | tuple[Float[Tensor, "samples features"], Float[Tensor, "samples outputs"]]
        | Factors
    ):
        """Outputs of one view or of a list of views, in the order of the views: view 0's batch, view 1's, ...

        A list costs one pass of the backbone for each *resolution* in it, wherever in the list its views stand (one in
        all for a ViT on a GPU), and one pass of the head. So batch norm in the backbone sees the views of one
        resolution together, and in the head all views together, as in the authors' MultiCropWrapper.
        With return_backbone_features the answer is (features, outputs), both in that order. With factored it is the
        two factors of the outputs: what the loss takes so that the outputs are never whole.
        """
        views = [views] if isinstance(views, Tensor) else list(views)
        if not views:
            raise ValueError("DinoModel: expected at least one view, got an empty list.")
        of_size: dict[torch.Size, list[int]] = {}
        for i, view in enumerate(views):
            of_size.setdefault(view.shape[-2:], []).append(i)

        images = [joined([views[i] for i in indices]) for indices in of_size.values()]
        at_once = getattr(type(self.backbone).forward, "several_sizes", False)
        features_of_size = self.backbone(images) if at_once else [self.backbone(of_one_size) for of_one_size in images]
        features_of_view: list[Tensor] = [torch.empty(0)] * len(views)
        for indices, of_one_size in zip(of_size.values(), features_of_size, strict=True):
            for i, part in zip(indices, of_one_size.split([len(views[i]) for i in indices]), strict=True):
                features_of_view[i] = part
        features = joined(features_of_view)
        if factored:
            factors: Factors = self.projection_head.factors(features)  # type: ignore[operator]
            return factors
        outputs: Tensor = self.projection_head(features)
        return (features, outputs) if return_backbone_features else outputs


def make_teacher(student: DinoModel) -> DinoModel:
    """A copy of the student as it is now, without gradients, in teacher_mode."""
    teacher = copy.deepcopy(student).requires_grad_(False)
    teacher_mode(teacher)
    return teacher


def teacher_mode(teacher: nn.Module) -> None:
    """Drop path and dropout off, batch norms in train mode: normalising by the batch and counting their statistics.

    Call it again after anything that used the teacher in eval mode (an evaluation).
    """
    teacher.eval()
    for module in teacher.modules():
        if isinstance(module, _BatchNorm):
            module.train()


@torch.no_grad()
def update_teacher_EMA(student: nn.Module, teacher: nn.Module, alpha: float = 0.99) -> None:
    """teacher = alpha * teacher + (1 - alpha) * student, for every parameter, in place; once a step (Algorithm 1).

    Parameters only (of a sharded student made whole). The buffers of batch norm are left alone: the teacher's
    statistics are its own, counted in its own forward passes on the global views, as in the authors' code.
    Raises ValueError for an alpha outside [0, 1].
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"update_teacher_EMA: alpha must be in [0, 1], got {alpha}. Check teacher.momentum.")
    # lerp, since teacher + w * (student - teacher) leaves equal weights exactly equal (the fixed norms of the last
    # layer), where alpha * teacher + (1 - alpha) * student would drift by rounding.
    torch._foreach_lerp_(list(teacher.parameters()), [full_tensor(p) for p in student.parameters()], 1.0 - alpha)
