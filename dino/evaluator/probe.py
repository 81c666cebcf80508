"""Linear classifiers on frozen, cached features: the official probe by SGD, logistic regression, and a few labels."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F

from dino.scheduler import cosine

Train = tuple[Float[Tensor, "train dim"], Int[Tensor, " train"]]
Val = tuple[Float[Tensor, "val dim"], Int[Tensor, " val"]]
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)  # a batch of 256; the authors choose theirs for each backbone
PENALTIES = (0.1, 1.0, 10.0, 100.0)  # C
HELD_OUT = 5  # a fifth of train, to choose a learning rate or C on


def linear_probe(
    train: Train,
    val: Val,
    classes: int,
    lrs: Sequence[float | int] = RATES,
    epochs: int = 100,
    batch_size: int = 256,
    momentum: float | int = 0.9,
    weight_decay: float | int = 0.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """The official linear evaluation (DINO, Sec. 3.2), on cached features.

    "linear": accuracy in [0, 1] on val after the last epoch, at the rate that does best on a fifth of train held out
    for that; training is then on all of train. "linear_lr": that rate, for a batch of 256. "linear_best": the highest
    of all rates on val, which is what the literature reports, and optimistic: val chose it. "linear_lr_<rate>": each.

    As there: SGD with momentum, no decay, rates x batch_size / 256 and annealed to 0 by a cosine once an epoch. Unlike
    there: features of one central crop, where the authors draw a random one in each epoch; and standardised over train
    (as by MAE's batch norm, He et al. 2022), for their common mean, which can be far larger than what tells images
    apart, leaves no rate that suits both: on a few thousand images SGD then ends far from the best linear classifier.
    """
    _require_labels(train, val, classes)
    if not lrs or not min(lrs) > 0 or epochs < 1 or batch_size < 1:
        raise ValueError(
            "linear probe: lrs must be above 0, epochs and batch_size 1 or more, "
            f"got lrs={list(lrs)}, epochs={epochs}, batch_size={batch_size}."
        )
    spread, mean = torch.std_mean(train[0], dim=0, correction=0)
    spread = torch.where(spread > 0, spread, 1)  # what never varies is 0 then
    train, val = (((features - mean.to(features)) / spread.to(features), labels) for features, labels in (train, val))
    held_out = torch.from_numpy(folds(train[1].cpu().numpy(), HELD_OUT, seed) == 0).to(train[1].device)
    heads = functools.partial(
        train_heads,
        classes=classes,
        lrs=lrs,
        epochs=epochs,
        batch_size=batch_size,
        momentum=momentum,
        weight_decay=weight_decay,
        seed=seed,
        device=device,
    )
    of_held_out = [0.0] * len(lrs)
    if held_out.any():
        rest, apart = ((train[0][part], train[1][part]) for part in (~held_out, held_out))
        of_held_out = accuracies(*heads(*rest), *apart)
    chosen, of_val = int(np.argmax(of_held_out)), accuracies(*heads(*train), *val)
    return {
        "linear": of_val[chosen],
        "linear_lr": float(lrs[chosen]),
        "linear_best": max(of_val),
        **{f"linear_lr_{lr:g}": accuracy for lr, accuracy in zip(lrs, of_val, strict=True)},
    }


def train_heads(
    features: Float[Tensor, "train dim"],
    labels: Int[Tensor, " train"],
    classes: int,
    lrs: Sequence[float | int],
    epochs: int,
    batch_size: int,
    momentum: float | int = 0.9,
    weight_decay: float | int = 0.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Float[Tensor, "lrs classes dim"], Float[Tensor, "lrs classes"]]:
    """(weights, biases) of a linear classifier for each rate, all trained in one pass over the features.

    Each ends where torch.optim.SGD would bring it alone: same start, same batches.
    """
    generator = torch.Generator().manual_seed(seed)
    start = 0.01 * torch.randn(classes, features.shape[1], generator=generator)
    weight = start.to(device).repeat(len(lrs), 1, 1).requires_grad_()
    bias = torch.zeros(len(lrs), classes, device=device, requires_grad=True)
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    peak = torch.tensor(lrs, device=device) * batch_size / 256
    for epoch in range(epochs):
        rate = peak * cosine(epoch, 1.0, 0.0, epochs)
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for rows in torch.split(order, batch_size):
            target = labels[rows].to(device).repeat_interleave(len(lrs))
            logits = _logits(weight, bias, features[rows].to(device))
            # The sum over the rates of their means over the batch: no rate sees another's gradient.
            loss = F.cross_entropy(logits.flatten(0, 1), target) * len(lrs)
            for parameter, v, gradient in zip(
                (weight, bias), velocity, torch.autograd.grad(loss, (weight, bias)), strict=True
            ):
                with torch.no_grad():
                    v.mul_(momentum).add_(gradient.add(parameter, alpha=weight_decay))
                    parameter.sub_(rate.view(-1, *[1] * (parameter.ndim - 1)) * v)
    return weight.detach(), bias.detach()


def accuracies(
    weight: Float[Tensor, "lrs classes dim"],
    bias: Float[Tensor, "lrs classes"],
    features: Float[Tensor, "val dim"],
    labels: Int[Tensor, " val"],
) -> list[float]:
    """Share in [0, 1] that each classifier gets right. One that diverged to NaN counts as nothing right."""
    right = torch.zeros(len(weight), dtype=torch.long, device=weight.device)
    for x, target in zip(torch.split(features, 1024), torch.split(labels, 1024), strict=True):
        logits = _logits(weight, bias, x.to(weight.device))
        hits = logits.argmax(dim=2) == target.to(weight.device)[:, None]
        right += (hits & logits.isfinite().all(dim=2)).sum(dim=0)
    return (right.double() / len(labels)).tolist()


def _logits(weight: Tensor, bias: Tensor, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch lrs classes"]:
    return (x @ weight.flatten(0, 1).T).view(len(x), *bias.shape) + bias


def logistic_regression(
    train: Train, val: Val, C: Sequence[float | int] = PENALTIES, seed: int = 0
) -> dict[str, float]:
    """{"logistic": accuracy in [0, 1] on val, "logistic_C": the C that was chosen}, by scikit-learn, on the CPU.

    On features minus the mean of train, scaled to length 1, as in the low-shot evaluation of MSN (Assran et al. 2022):
    it is their direction that k-NN compares too, and one scale makes a C mean the same for every backbone. C is chosen
    on a fifth of train held out, below 5000 images on each fifth in turn; the smallest of equals; then all are fitted.

    One fit takes seconds for 10 000 images of 10 classes. For ImageNet whole, `linear_probe` is the quicker.
    """
    from sklearn.linear_model import LogisticRegression

    _require_labels(train, val)
    if not C or not min(C) > 0:
        raise ValueError(f"logistic regression: C must be above 0, got {list(C)}.")
    labels = train[1].cpu().numpy()
    mean = train[0].mean(dim=0)
    x, tested = (F.normalize(features - mean.to(features.device), dim=1).cpu().numpy() for features, _ in (train, val))

    def right(fit: ndarray, c: float | int, x_test: ndarray, y_test: ndarray) -> int:
        if len(known := np.unique(labels[fit])) < 2:  # which scikit-learn refuses
            return int(np.isin(y_test, known).sum())
        model: Any = LogisticRegression(C=c, max_iter=2000).fit(x[fit], labels[fit])
        return int((model.predict(x_test) == y_test).sum())

    fold = folds(labels, HELD_OUT, seed)
    parts = np.unique(fold)[: HELD_OUT if len(labels) < 5000 else 1]
    candidates = sorted(C) if len(C) > 1 else []
    of_c = [sum(right(fold != part, c, x[fold == part], labels[fold == part]) for part in parts) for c in candidates]
    chosen = candidates[int(np.argmax(of_c))] if candidates else C[0]
    everything = np.ones(len(labels), dtype=bool)
    return {
        "logistic": right(everything, chosen, tested, val[1].cpu().numpy()) / len(val[1]),
        "logistic_C": float(chosen),
    }


def few_shot(
    train: Train, val: Val, fraction: float | int, seed: int = 0, C: Sequence[float | int] = PENALTIES
) -> dict[str, float]:
    """`logistic_regression` on that fraction of each class of train, rounded, and at least one image a class.

    {"few_shot_<percent>_percent": accuracy, "..._images": how many images that were}. Which ones is `seed`'s.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"few-shot: fraction must be in (0, 1], got {fraction}; 0.01 and 0.1 are usual.")
    part = torch.from_numpy(stratified(train[1].cpu().numpy(), fraction, seed)).to(train[1].device)
    name = f"few_shot_{100 * fraction:g}_percent"
    found = logistic_regression((train[0][part], train[1][part]), val, C, seed)
    return {name: found["logistic"], f"{name}_images": float(len(part))}


def stratified(labels: Int[ndarray, " images"], fraction: float | int, seed: int) -> Int[ndarray, " chosen"]:
    """Indices, rising, of round(fraction x n) of the n images of each class, and at least one."""
    rank, size = _shuffled_ranks(labels, seed)
    return np.flatnonzero(rank < np.maximum(1, np.round(fraction * size)))


def folds(labels: Int[ndarray, " images"], count: int, seed: int) -> Int[ndarray, " images"]:
    """Of each image the part, 0 ... count - 1, that it is in; each part holds like shares of every class."""
    rank, size = _shuffled_ranks(labels, seed)
    return np.where(size > 1, rank % count, count - 1)  # the only one of its class is left in where one part is out


def _shuffled_ranks(
    labels: Int[ndarray, " images"], seed: int
) -> tuple[Int[ndarray, " images"], Int[ndarray, " images"]]:
    """(position of each image in a random order of its class, number of images of its class)."""
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    _, first, count = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank, size = np.empty_like(by_class), np.empty_like(by_class)
    rank[by_class] = np.arange(len(labels)) - np.repeat(first, count)
    size[by_class] = np.repeat(count, count)
    return rank, size


def _require_labels(train: Train, val: Val, classes: int | None = None) -> None:
    for name, (_, labels) in (("train", train), ("val", val)):
        if not len(labels):
            raise ValueError(f"{name} must hold at least one image, got none that could be read.")
        if labels.min() < 0 or (classes is not None and labels.max() >= classes):
            allowed = "0 or more" if classes is None else f"in [0, {classes})"
            raise ValueError(
                f"labels of {name} must be {allowed}, got {int(labels.min())} to {int(labels.max())}; "
                "leave out what was not read or is not labelled."
            )
