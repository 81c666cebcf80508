"""What features say without a label: how many directions they use, how fast these fade, and whether two views of an
image stay together. They hint at how well features will serve; an accuracy is the measure where there are labels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dino.evaluator.neighbours import BLOCK, nearest

PART = 2**16  # images whose features are fp64 at a time
RANKS = (
    11,
    100,
)  # eigenvalues of the fit: the first ones lie off the power law (Stringer et al. 2019), the tail is noise

FIGURES: dict[str, tuple[str, Callable[[float], float]]] = {  # how each is said, and how good it is
    "rankme": ("the highest RankMe ({:.1f})", float),
    "alpha": ("the alpha nearest to 1 ({:.2f})", lambda alpha: -abs(alpha - 1)),
    "view_neighbours": ("most neighbours shared by two views ({:.1%})", float),
}


def rankme(features: Float[Tensor, "images dim"]) -> float:
    """exp(entropy) of the singular values over their sum (Garrido et al. 2023, Eq. 1): from 1, all features along one
    line, to min(images, dim), all directions alike. Not centred, as there: a common offset counts as a direction.

    It cannot exceed the number of images, and the paper takes 25 600; compare on the same images alone.
    """
    variances = _spectrum(features, centred=False)
    if not variances.sum() > 0:
        return math.nan
    p = variances.sqrt() / variances.sqrt().sum() + 1e-7  # the paper's epsilon
    return float(torch.exp(-(p * p.log()).sum()))


def alpha_req(features: Float[Tensor, "images dim"], ranks: tuple[int, int] = RANKS) -> float:
    """alpha of the power law rank^-alpha of the covariance's eigenvalues (Agrawal et al. 2022): the slope of their
    least squares line in log-log over `ranks`, the first and the last, counted from 1 and cut to the spectrum.

    There, features near 1 served best: well above it few directions carry all, well below all carry noise. NaN with
    fewer than ten eigenvalues in the range.
    """
    first, last = ranks
    if not 1 <= first < last:
        raise ValueError(f"alpha_req: ranks must be two rising numbers from 1 up, got {ranks}.")
    variances = _spectrum(features, centred=True)
    variances = variances[variances > 1e-12 * variances.max()]  # what lies below is rounding
    y = variances[first - 1 : last].log()
    if len(y) < 10:
        return math.nan
    x = torch.arange(first, first + len(y), dtype=torch.float64).log()
    x = x - x.mean()
    return float(-(x @ y) / (x @ x))


def view_consistency(
    features_a: Float[Tensor, "images dim"],
    features_b: Float[Tensor, "images dim"],
    k: int = 20,
    seed: int = 0,
    block: int = BLOCK,
) -> dict[str, float]:
    """Of two views of each image, row by row, by cosine; all in [0, 1].

    "view_neighbours": share of the k images nearest to an image among the first views that are so among the second
    views too. k / (images - 1) where the two know nothing of each other. "view_match": share of the first views whose
    nearest second view is of the same image. 1 / images by chance. The first asks for stable surroundings, the
    second for telling images apart (as contrastive learning does: Wu et al. 2018). Larger data sets make both harder.
    """
    n = len(features_a)
    if not 1 <= k < n:
        raise ValueError(f"view_consistency: k must be in [1, images={n}), got {k}.")
    # The second views are searched in another order, so that among equal features, as after a collapse, the same
    # images are not found twice for no other reason than their place.
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(features_b.device)
    shuffled = features_b[order]
    around_a = _others(nearest(features_a, features_a, k + 1, block)[1])
    around_b = _others(order[nearest(shuffled, features_b, k + 1, block)[1]]).to(around_a.device)
    both = torch.cat([around_a, around_b], dim=1).sort(dim=1).values
    shared = (both[:, 1:] == both[:, :-1]).sum(dim=1)  # no image is twice in one of the two lists
    match = order.to(features_a.device)[nearest(shuffled, features_a, 1, block)[1][:, 0]]
    return {
        "view_neighbours": (shared.double().mean() / k).item(),
        "view_match": (match == torch.arange(n, device=match.device)).double().mean().item(),
    }


def preferred(rows: Mapping[str, Mapping[str, float | int]]) -> str:
    """One sentence: which checkpoint the figures prefer, and why. `rows`: {its name: {"rankme", "alpha",
    "view_neighbours": as the functions above give them; what is missing or not finite does not count}}.

    Fair only between checkpoints of one architecture on the same images.
    """
    reasons: dict[str, list[str]] = {}
    for figure, (words, goodness) in FIGURES.items():
        known = {name: row[figure] for name, row in rows.items() if math.isfinite(row.get(figure, math.nan))}
        if known:
            best = max(known, key=lambda name: goodness(known[name]))
            reasons.setdefault(best, []).append(words.format(known[best]))
    if len(rows) < 2 or not reasons:
        return f"No checkpoint is preferred: {'there is only one' if len(rows) == 1 else 'none has a finite figure'}."
    first, *others = sorted(reasons, key=lambda name: -len(reasons[name]))
    rest = "".join(f"; {name} has {_listed(reasons[name])}" for name in others)
    if others and len(reasons[first]) == len(reasons[others[0]]):
        return f"None of {len(rows)} is preferred: {first} has {_listed(reasons[first])}{rest}. Labels would decide."
    return f"{first} is preferred of {len(rows)}: it has {_listed(reasons[first])}{rest}. A hint, not an accuracy."


def _listed(reasons: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(reasons[:-1]), reasons[-1]]))


def _spectrum(features: Float[Tensor, "images dim"], centred: bool) -> Float[Tensor, " values"]:
    """Squared singular values, largest first, in fp64, from dim x dim sums: no memory for more images."""
    if not len(features):
        raise ValueError("expected the features of at least one image, got none.")
    dim = features.shape[1]
    options: Any = {"dtype": torch.float64, "device": "cpu" if features.device.type == "mps" else features.device}
    mean, gram = torch.zeros(dim, **options), torch.zeros(dim, dim, **options)
    if centred:
        for part in torch.split(features, PART):
            mean += part.to(**options).sum(dim=0) / len(features)
    for part in torch.split(features, PART):
        centred_part = part.to(**options) - mean
        gram += centred_part.T @ centred_part
    if not gram.isfinite().all():
        return gram.new_full((1,), torch.nan)
    variances: Tensor = torch.linalg.eigvalsh(gram).flip(0)[: min(features.shape)].clamp(min=0)
    return variances


def _others(index: Int[Tensor, "images more"]) -> Int[Tensor, "images k"]:
    """Row i without i, of lists of k + 1; where i is not in it (equal features), without the last."""
    keep = index != torch.arange(len(index), device=index.device)[:, None]
    keep[keep.all(dim=1), -1] = False
    return index[keep].view(len(index), -1)
