"""Nearest neighbours in the space of frozen features: what a backbone has learned, without training anything on it."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.data import Subset

from dino.augmentation import IMAGENET_MEAN, IMAGENET_STD, EvalTransform
from dino.dataset.cache import Images, Pairs
from dino.evaluator.features import UNREAD, Features, RawPixels, batches, calibrate, features_of
from dino.evaluator.neighbours import knn_predictions
from dino.runtime.memory import oom_advice_on_all_ranks
from dino.runtime.processes import all_gather_rows, place, rank_indices

log = logging.getLogger(__name__)


class Measured(NamedTuple):
    """`figures` by name and, on rank zero, what they were computed from: whole data sets, in their order.

    bank, queries: features of the training and the validation images. predicted: the k-NN label of each query.
    """

    figures: dict[str, float]
    bank: Features | None = None
    queries: Features | None = None
    predicted: Int[Tensor, " images"] | None = None


NOTHING = Measured({})


@runtime_checkable  # for the type checks of the test run
class Evaluator(Protocol):
    """Measures a backbone on the images of a run, and what the backbone must beat; see KNN for the arguments."""

    def measure(
        self,
        backbone: nn.Module,
        train: Images,
        val: Images,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        num_workers: int,
        broken: set[str],
    ) -> Measured: ...

    def baselines(
        self,
        backbone: nn.Module,
        train: Images,
        val: Images,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        num_workers: int,
        broken: set[str],
    ) -> dict[str, float]: ...


class KNN:
    """Weighted k-NN on a backbone's features (Wu et al. 2018; DINO, Sec. 3.2): cosine, weights exp(similarity / T)."""

    def __init__(self, size: int, k: int = 20, temperature: float = 0.07, batch_size: int = 256) -> None:
        for name, value in (("size", size), ("k", k), ("temperature", temperature), ("batch_size", batch_size)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}.")
        self.size, self.k, self.temperature, self.batch_size = size, k, temperature, batch_size
        EvalTransform(size)  # refuses a size that cannot be

    def __call__(self, backbone: nn.Module, train: Images, val: Images, **how: Any) -> dict[str, float]:
        """The figures of `measure`, which takes the same arguments."""
        return self.measure(backbone, train, val, **how).figures

    def measure(
        self,
        backbone: nn.Module,
        train: Images,
        val: Images,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        device: torch.device | str = "cpu",
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        num_workers: int = 0,
        broken: set[str] | None = None,
    ) -> Measured:
        """{"knn": accuracy in [0, 1] of `val` by its neighbours in `train`}. The backbone is used in eval mode.

        mean, std: how images of `size` pixels are normalised, as in training.
        Images that cannot be read are left out, with a sentence each in the log and in `broken`.
        """
        if train.classes is None or val.classes is None:
            return NOTHING
        transform = EvalTransform(self.size, mean, std)
        rest = (transform, device, autocast, self.batch_size, num_workers, broken)
        advice = f"in k-NN; an evaluator.batch_size below {self.batch_size} takes less"
        with oom_advice_on_all_ranks(advice):
            parts: list[Pairs] = [Subset(data, rank_indices(len(data))) for data in (train, val)]  # type: ignore[arg-type]
            mine, share = (features_of(backbone, part, *rest) for part in parts)
        bank = Features(*(all_gather_rows(part, len(train)) for part in mine))
        with oom_advice_on_all_ranks(advice):
            predicted = knn_predictions(bank.read(), share.rows, [self.k], self.temperature)[self.k]
        queries = Features(*(all_gather_rows(part, len(val)) for part in share))
        predicted = all_gather_rows(predicted, len(val))
        read = queries.labels != UNREAD
        hits = (predicted == queries.labels) & read
        figures = {"knn": hits.sum().item() / max(1, read.sum().item())}
        return Measured(figures, bank, queries, predicted) if place().rank == 0 else Measured(figures)

    def baselines(
        self,
        backbone: nn.Module,
        train: Images,
        val: Images,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        device: torch.device | str = "cpu",
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        num_workers: int = 0,
        broken: set[str] | None = None,
    ) -> dict[str, float]:
        """What must be beaten: k-NN on raw pixels, and on the untrained `backbone` with calibrated batch norms."""
        if train.classes is None or val.classes is None:
            return {}
        log.info("measuring raw pixels and the untrained backbone, %d images each", len(train) + len(val))
        transform = EvalTransform(self.size, mean, std)
        rest = (train, val, mean, std, device, autocast, num_workers, broken)
        shuffled = batches(train, transform, self.batch_size, device, num_workers, shuffle=True)
        calibrated = calibrate(backbone, (transform.normalise(images) for images, *_ in shuffled), autocast)
        networks = {"raw_pixels": RawPixels(), "untrained": calibrated}
        return {name: self.measure(network, *rest).figures["knn"] for name, network in networks.items()}


class NoEvaluator:
    """Measures nothing: for data without labels, or a user in a hurry."""

    def __call__(self, *_: Any, **__: Any) -> dict[str, float]:
        return {}

    def measure(self, *_: Any, **__: Any) -> Measured:
        return NOTHING

    def baselines(self, *_: Any, **__: Any) -> dict[str, float]:
        return {}
