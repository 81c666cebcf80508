"""Nearest neighbours in the space of frozen features: what a backbone has learned, without training anything on it."""

import copy
import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

from dino.augmentation import EvalTransform
from dino.broken import first_readable, note
from dino.distributed import gathered, my_share

log = logging.getLogger(__name__)
Features = tuple[Float[Tensor, "images dim"], Int[Tensor, " images"]]
UNREAD = -1  # label of an image that is left out
Bank = tuple[Float[Tensor, "bank dim"], Int[Tensor, " bank"]]


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
        broken = set() if broken is None else broken
        was_training = {module: module.training for module in backbone.modules()}
        backbone.eval()
        try:
            mine, queries = (
                self._features(backbone, data, device, autocast, num_workers, broken) for data in (train, val)
            )
        finally:
            for module, training in was_training.items():
                module.training = training
        features, labels = gathered(mine[0], len(train)), gathered(mine[1], len(train))
        hits = knn_hits((features[labels != UNREAD], labels[labels != UNREAD]), queries, self.k, self.temperature)
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
        images = (views for views, *_ in self._batches(train, num_workers, shuffle=True))
        calibrated = calibrate(backbone, (self.transform.normalise(batch.to(device)) for batch in images), autocast)
        return {"raw_pixels": self(RawPixels(), *rest)["knn"], "untrained": self(calibrated, *rest)["knn"]}

    @torch.inference_mode()
    def _features(
        self,
        backbone: nn.Module,
        data: Any,
        device: Any,
        autocast: Callable[[], Any],
        num_workers: int,
        broken: set[str],
    ) -> Features:
        """Of this process's share of `data`."""
        features, labels = [], []
        for images, targets, sentences in self._batches(Subset(data, my_share(len(data))), num_workers):
            with autocast():
                out = backbone(self.transform.normalise(images.to(device, non_blocking=True)))
            features.append(out.float())
            labels.append(targets.to(device))
            note(sentences, broken)
        return torch.cat(features), torch.cat(labels)

    def _batches(
        self, data: Any, num_workers: int, shuffle: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        return iter(
            DataLoader(
                _Prepared(data, self.transform),
                batch_size=self.batch_size,
                shuffle=shuffle,
                num_workers=num_workers,
                collate_fn=_collate,
                generator=torch.Generator().manual_seed(0),  # the run's own generator stays where it is
            )
        )


class NoEvaluator:
    """Measures nothing: for data without labels, or a user in a hurry."""

    def __call__(self, *_: Any, **__: Any) -> dict[str, float]:
        return {}

    def baselines(self, *_: Any, **__: Any) -> dict[str, float]:
        return {}


class RawPixels(nn.Module):
    """Images of 32 x 32 pixels as they are, their mean removed: what a backbone must beat to have learned anything."""

    output_dim = 3 * 32 * 32

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch {self.output_dim}"]:
        small = F.interpolate(images, size=(32, 32), mode="bilinear", antialias=True, align_corners=False).flatten(1)
        return small - small.mean(dim=1, keepdim=True)


def knn_hits(
    bank: Bank, queries: Features, k: int = 20, temperature: float = 0.07, chunk: int = 1024
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


@torch.no_grad()
def calibrate(
    backbone: nn.Module,
    batches: Iterator[Tensor],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    passes: int = 20,
) -> nn.Module:
    """A copy of `backbone` whose batch norms hold the plain mean of their statistics over `passes` batches of images.

    An untrained network scores several points higher so: the honest figure to beat. Nothing is learned.
    """
    calibrated = copy.deepcopy(backbone).train()
    norms = [module for module in calibrated.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
    for images in itertools.islice(batches if norms else (), passes):
        with autocast():
            calibrated(images)
    return calibrated.eval()


class _Prepared(Dataset[tuple[Tensor, int, list[str]]]):
    """(image, label, what could not be read): in place of a broken image stands another, without a label."""

    def __init__(self, data: Any, transform: EvalTransform) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int, list[str]]:
        (image, label), broken = first_readable(self.data.__getitem__, index, len(self.data))
        return self.transform(image), UNREAD if broken else label, broken


def _collate(samples: list[tuple[Tensor, int, list[str]]]) -> tuple[Tensor, Tensor, list[str]]:
    images, labels, broken = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels), [sentence for sentences in broken for sentence in sentences]
