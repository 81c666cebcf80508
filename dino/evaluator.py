"""Nearest neighbours in the space of frozen features: what a backbone has learned, without training anything on it."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset

from dino.augmentation import EvalTransform
from dino.distributed import gathered, my_share
from dino.features import UNREAD, Features, RawPixels, batches, calibrate, features_of

log = logging.getLogger(__name__)
Bank = tuple[Float[Tensor, "bank dim"], Int[Tensor, " bank"]]
Queries = tuple[Float[Tensor, "images dim"], Int[Tensor, " images"]]


class KNN:
    """Weighted k-NN on a backbone's features (Wu et al. 2018; DINO, Sec. 4.1): cosine, weights exp(similarity / T)."""

    def __init__(self, size: int, k: int = 20, temperature: float = 0.07, batch_size: int = 256) -> None:
        for name, value in (("size", size), ("k", k), ("temperature", temperature), ("batch_size", batch_size)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}.")
        self.k, self.temperature, self.batch_size = k, temperature, batch_size
        self.transform = EvalTransform(size)

    def __call__(
        self,
        backbone: nn.Module,
        train: Any,
        val: Any,
        device: torch.device | str = "cpu",
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        num_workers: int = 0,
        broken: set[str] | None = None,
    ) -> dict[str, float]:
        """{"knn": accuracy in [0, 1] of `val` by its neighbours in `train`}. The backbone is used in eval mode.

        Images that cannot be read are left out, with a sentence each in the log and in `broken`.
        """
        if train.classes is None or val.classes is None:
            return {}
        rest = (self.transform, device, autocast, self.batch_size, num_workers, broken)
        mine, queries = (features_of(backbone, Subset(data, my_share(len(data))), *rest) for data in (train, val))
        bank = Features(gathered(mine.rows, len(train)), gathered(mine.labels, len(train))).read()
        hits = knn_hits(bank, queries, self.k, self.temperature)
        hit, read = (gathered(which.to(torch.uint8), len(val)).sum().item() for which in (hits, queries[1] != UNREAD))
        return {"knn": hit / max(1, read)}

    def baselines(
        self,
        backbone: nn.Module,
        train: Any,
        val: Any,
        device: torch.device | str = "cpu",
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        num_workers: int = 0,
        broken: set[str] | None = None,
    ) -> dict[str, float]:
        """What must be beaten: k-NN on raw pixels, and on the untrained `backbone` with calibrated batch norms."""
        if train.classes is None or val.classes is None:
            return {}
        log.info("measuring raw pixels and the untrained backbone, %d images each", len(train) + len(val))
        rest = (train, val, device, autocast, num_workers, broken)
        images = (views for views, *_ in batches(train, self.transform, self.batch_size, num_workers, shuffle=True))
        calibrated = calibrate(backbone, (self.transform.normalise(batch.to(device)) for batch in images), autocast)
        return {"raw_pixels": self(RawPixels(), *rest)["knn"], "untrained": self(calibrated, *rest)["knn"]}


class NoEvaluator:
    """Measures nothing: for data without labels, or a user in a hurry."""

    def __call__(self, *_: Any, **__: Any) -> dict[str, float]:
        return {}

    def baselines(self, *_: Any, **__: Any) -> dict[str, float]:
        return {}


def knn_hits(
    bank: Bank, queries: Queries, k: int = 20, temperature: float = 0.07, chunk: int = 1024
) -> Bool[Tensor, " images"]:
    """Of which `queries` the label wins the weighted vote of their k nearest in `bank`; in chunks of queries.

    Ties go to the smaller label. `k` is cut to the size of the bank.
    """
    bank_features, bank_labels = F.normalize(bank[0], dim=1), bank[1]
    classes = int(torch.maximum(bank_labels.max(), queries[1].max())) + 1
    hits = []
    for features, labels in zip(torch.split(queries[0], chunk), torch.split(queries[1], chunk), strict=True):
        similarity, neighbour = (F.normalize(features, dim=1) @ bank_features.T).topk(min(k, len(bank_features)), dim=1)
        votes = torch.zeros(len(features), classes, device=features.device)
        votes.scatter_add_(1, bank_labels[neighbour], (similarity / temperature).exp())
        hits.append(votes.argmax(dim=1) == labels)
    return torch.cat(hits)
