"""Nearest neighbours by cosine in bounded memory, and their weighted vote (Wu et al. 2018; DINO, Sec. 3.2)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

BLOCK = 2**26  # similarities held at a time: 256 MB
WIDTH = 2**16  # rows of the bank in a block: wide, as each block costs every query a merge with its best so far
Bank = tuple[Float[Tensor, "bank dim"], Int[Tensor, " bank"]]
Queries = tuple[Float[Tensor, "queries dim"], Int[Tensor, " queries"]]
OFFICIAL = (10, 20, 100, 200)  # k in the authors' code


def nearest(
    bank: Float[Tensor, "bank dim"], queries: Float[Tensor, "queries dim"], k: int, block: int = BLOCK
) -> tuple[Float[Tensor, "queries k"], Int[Tensor, "queries k"]]:
    """(cosine similarities, rows of the bank) of the k most similar, best first; exact. `k` is cut to the bank.

    On the queries' device, to which the bank goes a part at a time: it may stay where there is more memory. Beyond the
    answer this takes `block` similarities, and a normalised copy of as much of the bank as is in them.
    Which of equally similar rows come is not defined.
    """
    if k < 1 or not len(bank):
        raise ValueError(f"k and the bank must be 1 or more, got k={k} and a bank of {len(bank)} images.")
    k = min(k, len(bank))
    width = min(len(bank), max(k, min(WIDTH, block)))
    step = max(1, block // width)
    similarity = queries.new_full((len(queries), k), -torch.inf)
    index = torch.zeros(len(queries), k, dtype=torch.long, device=queries.device)
    for first in range(0, len(bank), width):
        part = F.normalize(bank[first : first + width].to(queries.device), dim=1).T
        for at in range(0, len(queries), step):
            rows = slice(at, at + step)
            new, where = (F.normalize(queries[rows], dim=1) @ part).topk(min(k, part.shape[1]), dim=1)
            new, where = torch.cat([similarity[rows], new], 1), torch.cat([index[rows], where + first], 1)
            similarity[rows], best = new.topk(k, dim=1)
            index[rows] = where.gather(1, best)
    return similarity, index


def knn_predictions(
    bank: Bank,
    queries: Float[Tensor, "queries dim"],
    ks: Sequence[int] = OFFICIAL,
    temperature: float | int = 0.07,
    block: int = BLOCK,
) -> dict[int, Int[Tensor, " queries"]]:
    """{k: the label with the largest sum of exp(similarity / temperature) over the k nearest}, from one search.

    Ties go to the smaller label; a k beyond the bank is the whole bank.
    """
    features, labels = bank
    if not ks or min(ks) < 1 or not temperature > 0:
        raise ValueError(f"ks must be 1 or more and the temperature above 0, got ks={ks}, temperature={temperature}.")
    if len(labels) and labels.min() < 0:
        raise ValueError(
            f"the bank must be labelled, got {int((labels < 0).sum())} of {len(labels)} images with a label below 0. "
            "Leave them out: they were not read, or have no label."
        )
    similarity, index = nearest(features, queries, max(ks), block)
    labels = labels.to(queries.device)
    classes = int(labels.max()) + 1
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    rows = max(1, block // classes)
    for near, where in zip(torch.split(similarity, rows), torch.split(index, rows), strict=True):
        weights = ((near - near[:, :1]) / temperature).exp()  # of the nearest 1: any temperature without overflow
        votes, counted = torch.zeros(len(near), classes, device=near.device, dtype=near.dtype), 0
        for k in sorted(found):
            votes.scatter_add_(1, labels[where[:, counted:k]], weights[:, counted:k])
            found[k].append(votes.argmax(dim=1))
            counted = k
    return {k: torch.cat(parts) for k, parts in found.items()}


def knn_accuracies(
    bank: Bank,
    queries: Queries,
    ks: Sequence[int] = OFFICIAL,
    temperature: float | int = 0.07,
    block: int = BLOCK,
) -> dict[str, float]:
    """{"knn_<k>": accuracy in [0, 1]} of the queries' labels, for each k."""
    features, labels = queries
    if not len(labels):
        raise ValueError("k-NN: expected at least one image to classify, got none.")
    predicted = knn_predictions(bank, features, ks, temperature, block)
    truth = labels.to(features.device)
    return {f"knn_{k}": (of_k == truth).double().mean().item() for k, of_k in predicted.items()}
