"""Frozen features: what a network makes of a whole data set, and the two networks that have learned nothing."""

import contextlib
import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset, default_collate
from tqdm import tqdm

from dino.augmentation import EvalTransform
from dino.dataset.cache import Cached, Pairs
from dino.loading.broken import first_readable, note
from dino.loading.workers import Loader
from dino.model import teacher_mode
from dino.weights import checksum

log = logging.getLogger(__name__)
UNREAD = -2  # label of an image that could not be read; -1 is that of images without classes


class Features(NamedTuple):
    """A row for each image, in the order of its data set, and its label: -1 without classes, UNREAD."""

    rows: Float[Tensor, "images dim"]
    labels: Int[Tensor, " images"]

    def read(self) -> "Features":
        """Without the images that could not be read."""
        return Features(self.rows[self.labels != UNREAD], self.labels[self.labels != UNREAD])


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; afterwards every module is in the mode that it was in."""
    was_training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in was_training.items():
            module.training = training


@torch.inference_mode()
def features_of(
    network: nn.Module,
    data: Pairs,
    transform: EvalTransform,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    batch_size: int = 256,
    num_workers: int = 0,
    broken: set[str] | None = None,
    bar: str | None = None,
) -> Features:
    """`network` in eval mode, [B, 3, S, S] -> [B, dim], on each image of `data` once.

    Where an image cannot be read, the row is another's and the label UNREAD, and log and `broken` have a sentence.
    `bar`: words beside a progress bar; None: no bar.
    """
    broken = set() if broken is None else broken
    rows, labels = [], []
    prepared = batches(data, transform, batch_size, device, num_workers)
    with frozen(network):
        for images, targets, sentences in tqdm(
            prepared, desc=bar, unit="batch", total=-(-len(data) // batch_size), disable=bar is None
        ):
            with autocast():
                out = network(transform.normalise(images))
            rows.append(out.float())
            labels.append(targets.to(device, non_blocking=True))
            note(sentences, broken)
    return Features(torch.cat(rows), torch.cat(labels))


def batches(
    data: Pairs,
    transform: EvalTransform,
    batch_size: int,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    shuffle: bool = False,
) -> Iterator[tuple[UInt8[Tensor, "batch 3 _ _"], Int[Tensor, " batch"], list[str]]]:
    """(images on `device`, labels, a sentence for each image that could not be read).

    Images that a GPU holds are prepared there, a batch at once; all others one by one, on the CPU.
    """
    generator = torch.Generator().manual_seed(0)  # the caller's own generator stays where it is
    if (held := _held_elsewhere(data)) is not None:
        order = torch.randperm(len(data), generator=generator) if shuffle else torch.arange(len(data))
        for start in range(0, len(order), batch_size):
            yield _prepared_there(*held, order[start : start + batch_size].tolist(), transform)
        return
    loader = Loader(
        _Prepared(data, transform),
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.device(device).type == "cuda",
        generator=generator,
    )
    for images, labels, sentences in loader:
        yield images.to(device, non_blocking=True), labels, sentences


def _held_elsewhere(data: Pairs) -> tuple[Cached, Sequence[int]] | None:
    """The cache on a GPU of which `data` is the whole or a part, and which of its images that is."""
    whole, indices = (data.dataset, data.indices) if isinstance(data, Subset) else (data, range(len(data)))
    return (whole, indices) if isinstance(whole, Cached) and whole.device.type != "cpu" else None


def _prepared_there(
    whole: Cached, indices: Sequence[int], places: Sequence[int], transform: EvalTransform
) -> tuple[UInt8[Tensor, "batch 3 _ _"], Int[Tensor, " batch"], list[str]]:
    """Of the images at `places` of `indices`: as `_Prepared` and `collate` make a batch."""

    def readable(place: int) -> int:
        if (index := indices[place]) in whole.broken:
            raise whole.broken[index]
        return index

    found, broken = zip(*(first_readable(readable, place, len(indices)) for place in places), strict=True)
    chosen, sentences = np.array(found), [sentence for of_one in broken for sentence in of_one]
    labels = np.where([bool(of_one) for of_one in broken], UNREAD, whole.labels[chosen])
    (pixels,) = whole.blocks
    images = transform.of_batch(pixels, whole.starts[chosen], whole.shapes[chosen])
    return images, torch.from_numpy(labels), sentences


def kept(folder: Path, what: dict[str, Any], weights: nn.Module, make: Callable[[], Features]) -> Features:
    """The features in `folder`, or those that `make` gives, which are then written there.

    Found by the weights (names and bits) and by `what`, plain values that say all else that they depend on.
    """
    from safetensors.torch import load_file, save_file

    path = folder / f"{checksum(weights.state_dict(), what)[:24]}.safetensors"
    if path.is_file():
        try:
            found = load_file(path)
            return Features(found["rows"], found["labels"])
        except Exception as error:  # safetensors raises an exception type of its own for each fault
            log.warning("%s cannot be read (%s); its features are computed again", path, error)
    features = make()
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({"rows": features.rows.cpu().contiguous(), "labels": features.labels.cpu()}, partial)
    partial.replace(path)
    return features


class RawPixels(nn.Module):
    """Images of 32 x 32 pixels as they are, their mean removed: what a backbone must beat to have learned anything."""

    output_dim = 3 * 32 * 32

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch {self.output_dim}"]:
        small = F.interpolate(images, size=(32, 32), mode="bilinear", antialias=True, align_corners=False).flatten(1)
        return small - small.mean(dim=1, keepdim=True)


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
    calibrated = copy.deepcopy(backbone)
    teacher_mode(calibrated)  # no drop path, so no draws: measuring leaves a run's random state where it is
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

    def __init__(self, data: Pairs, transform: EvalTransform) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int, list[str]]:
        (image, label), broken = first_readable(self.data.__getitem__, index, len(self.data))
        return self.transform(image), UNREAD if broken else label, broken


def collate(samples: Sequence[tuple[Tensor, int, list[str]]]) -> tuple[Tensor, Tensor, list[str]]:
    """(images stacked, labels, what could not be read) of samples that are such each."""
    images, labels, broken = zip(*samples, strict=True)
    together = default_collate(list(images))  # which a worker writes to shared memory at once
    return together, torch.tensor(labels), [sentence for sentences in broken for sentence in sentences]
