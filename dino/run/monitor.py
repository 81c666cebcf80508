"""What a step is measured by, beside its loss, to see whether learning goes well; and the warning of a collapse."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dino.evaluator.unsupervised import rankme
from dino.head import Factors
from dino.loss.dino import DinoLoss
from dino.runtime.processes import all_reduce_mean, place
from dino.runtime.sharding import full_tensor

MOST_ROWS = 256  # of the features for RankMe, which takes some milliseconds of them; more rows could give a higher one

# Figures below these show collapse. "Healthy" are the default run and the small ResNet on ImageNette.
LEAST_INFORMATION = (
    0.05  # nats that an output says of its image: healthy 0.5 or more at every step; collapsed, soon under 0.01
)
SPREAD = 0.05  # `feature_std`: healthy 0.2 to 0.7, untrained 0.28 to 0.78; collapsed, it goes on falling towards 0
DIRECTIONS = 2.0  # RankMe of features along one line beside a common offset; healthy 4.3 and 34, of 64 and 128 outputs
LEAST_DIRECTIONS = 16  # outputs and dimensions, for RankMe to say anything: of 4 outputs it is at most 4, and soon 2
PATIENCE = 50  # steps for which a mode must show before it is named, or be away before it is over

MODES = {
    "uniform": (
        "collapse to uniform: whatever the image, the teacher gives all prototypes alike (entropy of its outputs "
        "{teacher_entropy:.3f} ln K, loss {loss_over_ln_k:.3f} ln K), so there is nothing to learn from it. Try a "
        "teacher.temp and teacher.warmup_temp below {teacher_temp:g}, batch norm in the head (head=small or "
        "head.use_bn=true), a lower optimizer.lr, or fewer prototypes (dataset.out_dim) for few images."
    ),
    "constant": (
        "collapse to a constant: whatever the image, the teacher gives the same (entropy of its outputs "
        "{teacher_entropy:.3f} ln K, of their mean {teacher_entropy_of_mean:.3f} ln K, {prototypes_in_use:.1%} of the "
        "prototypes in use, standard deviation of the features {feature_std:.3f}). Try batch norm in the head "
        "(head=small or head.use_bn=true), a lower optimizer.lr, a teacher.momentum above {momentum:g}, a teacher.temp "
        "and teacher.warmup_temp above {teacher_temp:g}, or loss.center_momentum=0.9."
    ),
    "dimensional": (
        "collapse of dimensions: the features lie along few directions (RankMe {rankme:.1f} of {directions:g}, "
        "standard deviation {feature_std:.3f}). Try more prototypes (dataset.out_dim: 1024 for up to 20 k images, "
        "2048 for 50 k, 4096 for 100 k), a lower optimizer.lr, or a lower optimizer.weight_decay and "
        "scheduler.final_weight_decay."
    ),
}


def diagnose(figures: Mapping[str, float], ln_k: float, images: int, directions: int) -> str | None:
    """The mode of collapse that `figures` show: "uniform", "constant" or "dimensional"; None for none of them.

    figures: those of `Monitor.measure`. images: of the step, in all processes. directions: the most that RankMe can be.
    The entropy of the mean output, less the mean entropy of the outputs, is the mutual information of an output and its
    image. It is near 0 in the first two modes, and the mean entropy tells these two apart: it is ln K where centering
    beats sharpening, and can have any value where all outputs are the same (Sec. 5.3).
    """
    information = (figures["teacher_entropy_of_mean"] - figures["teacher_entropy"]) * ln_k
    if images > 1 and (1 - figures["teacher_entropy"]) * ln_k < LEAST_INFORMATION:  # which is at least `information`
        return "uniform"
    if images > 1 and (information < LEAST_INFORMATION or figures["feature_std"] < SPREAD):
        return "constant"
    if directions >= LEAST_DIRECTIONS and figures["rankme"] < DIRECTIONS:
        return "dimensional"
    return None


class Monitor:
    """Takes the figures of a step, and says once when they begin to show collapse.

    `see` is called after every step, `remember_weights` before those that are measured. They wait for no device;
    `measure` does. With several processes all must call it, and get the same: figures of all or means over them.
    quiet_steps: the first ones, in which nothing is said: while the rate warms up, outputs may still be nearly uniform.
    """

    def __init__(self, student: nn.Module, loss: DinoLoss, quiet_steps: int = 0) -> None:
        self.loss, self.quiet_steps = loss, quiet_steps
        self.ln_k = math.log(loss.out_dim)
        self.weights = [p for p in student.parameters() if p.requires_grad]
        self.weights_before: list[Tensor] = []
        self.in_use = torch.zeros(loss.out_dim, device=loss.center.device)  # 1: chosen for an image since `measure`
        self.outputs = 0  # of the teacher since then, in all processes
        self.named: str | None = None  # the mode that was last said
        self.shown: str | None = None  # the mode that the figures show, since step:
        self.since = 0

    @torch.no_grad()
    def see(self, teacher: Float[Tensor, "globals_x_batch out_dim"]) -> None:
        self.in_use.index_fill_(0, self._chosen(teacher), 1.0)
        self.outputs += len(teacher) * place().world_size

    @torch.no_grad()
    def remember_weights(self) -> None:
        self.weights_before = [p.clone() for p in self.weights]

    @torch.no_grad()
    def measure(
        self,
        teacher: Float[Tensor, "globals_x_batch out_dim"],
        student: Factors,
        features: Float[Tensor, "globals_x_batch dim"],
        teacher_temp: float,
    ) -> dict[str, float]:
        """What the teacher and the student gave (where a step is in parts, in its last), and the teacher's features.

        teacher_entropy, teacher_entropy_of_mean: see DinoLoss.entropies.
        kl_to_uniform: of the mean output, in nats.
        agreement: see `agreement`.
        prototypes_in_use: those that were the teacher's first choice for any view since the last `measure`, of those
            that can have been: K, or the views where they are fewer.
        feature_std, rankme: see `feature_std`, `dino.evaluator.unsupervised.rankme`; of each process's features.
        center_norm: L2.
        update_to_weight: norm of what the step changed the student's weights by, over their norm.
        """
        entropy, entropy_of_mean = self.loss.entropies(teacher, teacher_temp)
        views = student.bottleneck.chunk(self.loss.ncrops)
        in_use = (all_reduce_mean(self.in_use) > 0).sum() / min(self.loss.out_dim, self.outputs)
        some = features[:MOST_ROWS].cpu()
        means = all_reduce_mean(
            torch.stack(
                [
                    agreement(
                        torch.stack([F.linear(view, student.weight).argmax(dim=-1) for view in views]),
                        self._chosen(teacher).view(self.loss.n_global_crops, -1),
                    ),
                    feature_std(features),
                    # The same of the transpose: as many singular values, of the smaller of two products.
                    features.new_tensor(rankme(some.T if len(some) < some.shape[1] else some), dtype=torch.float32),
                ]
            )
        )
        changes = [now - before for now, before in zip(self.weights, self.weights_before, strict=True)]
        change = _norm(changes) / _norm(self.weights)
        self.weights_before, self.outputs = [], 0
        self.in_use.zero_()
        names = ("teacher_entropy", "teacher_entropy_of_mean", "prototypes_in_use", "center_norm", "update_to_weight")
        numbers = torch.stack([entropy, entropy_of_mean, in_use, self.loss.center.norm(), change, *means]).tolist()
        figures = dict(zip((*names, "agreement", "feature_std", "rankme"), numbers, strict=True))
        return figures | {"kl_to_uniform": max(0.0, (1 - figures["teacher_entropy_of_mean"]) * self.ln_k)}

    def news(self, step: int, figures: Mapping[str, float], features: Float[Tensor, "rows dim"]) -> str | None:
        """A sentence where a mode of collapse has shown for PATIENCE steps, or has been away for as many; once each.

        figures: of `measure`, with loss_over_ln_k, momentum and teacher_temp.
        """
        rows, dim = features.shape
        images, directions = rows // self.loss.n_global_crops * place().world_size, min(rows, dim, MOST_ROWS)
        mode = diagnose(figures, self.ln_k, images, directions) if step > self.quiet_steps else None
        if mode != self.shown:
            self.shown, self.since = mode, step
        if mode == self.named or step - self.since < PATIENCE:
            return None
        before, self.named = self.named, mode
        if mode is None:
            return f"step {step}: the collapse ({before}) is over"
        return f"step {step}: {MODES[mode].format(**figures, directions=directions)}"

    def state_dict(self) -> dict[str, Any]:
        """Of all processes, all of which must ask: any number of them can go on from it."""
        return {
            "in_use": all_reduce_mean(self.in_use.clone()).nonzero().flatten().cpu(),
            "outputs": self.outputs,
            "named": self.named,
            "shown": self.shown,
            "since": self.since,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.in_use.zero_().index_fill_(0, state["in_use"].to(self.in_use.device), 1.0)
        self.outputs, self.since = state["outputs"], state["since"]
        self.named, self.shown = state["named"], state["shown"]

    def _chosen(self, teacher: Tensor) -> Tensor:
        return (teacher - self.loss.center).argmax(dim=-1)


def agreement(student: Int[Tensor, "crops batch"], teacher: Int[Tensor, "globals batch"]) -> Float[Tensor, ""]:
    """Of the pairs of different views that the loss compares, the share in which both chose the same prototype.

    The arguments are these choices, of the highest outputs; the first crops are the global ones.
    """
    same = (teacher[:, None] == student).float().mean(dim=-1)
    return same[~torch.eye(len(teacher), len(student), dtype=torch.bool, device=same.device)].mean()


def feature_std(features: Float[Tensor, "rows dim"]) -> Float[Tensor, ""]:
    """Mean over the dimensions of the standard deviation of L2-normalised features, times sqrt(dim): 1 where they point
    everywhere alike, 0 where they are all the same (as in Chen and He 2021, Sec. 4.1).
    """
    directions = F.normalize(features.float(), dim=-1)
    return directions.std(dim=0, correction=0).mean() * math.sqrt(features.shape[1])


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    norm: Tensor = torch.stack([full_tensor(norm) for norm in torch._foreach_norm([*tensors])]).norm()
    return norm
