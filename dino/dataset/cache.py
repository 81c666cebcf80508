"""A data set decoded once, and kept in memory: this machine's, or the GPU's."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import get_size, pil_to_tensor, resize
from tqdm import tqdm

from dino.dataset.encoded import BrokenImage
from dino.runtime.device import free_memory
from dino.runtime.refused import Refused

log = logging.getLogger(__name__)
Where = Literal["none", "ram", "device"]
BLOCK = 1024  # images to one tensor: few tensors to share with workers, and little memory twice while it is built
CPU = torch.device("cpu")
SEEN = 128  # images looked at for the estimate


@runtime_checkable  # for the type checks of the test run
class Pairs(Protocol):
    """Images and their labels, whatever the labels mean: a data set, or a part of one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image | Tensor, int]: ...


@runtime_checkable
class Images(Pairs, Protocol):
    """A data set as described in dino/dataset/__init__.py."""

    classes: list[str] | None


class Cached(Dataset[tuple[Tensor, int]]):
    """`dataset` as uint8 tensors on `device`, their shorter side at most `shorter_side` pixels (antialiased, never
    enlarged; None: as they are). Takes 3 bytes a pixel: ImageNette's training images at 96 pixels, 0.26 GB.

    An image that is asked for is on the CPU, whatever the device: what shows, names or measures single images knows of
    no other. A broken image raises its BrokenImage.

    blocks: the pixels of `images_per_block` images each, one after another, each [height, width, 3]. In this machine's
    memory BLOCK images, for data workers to share; elsewhere one block of all, so that one gather finds any of them.
    starts: the byte at which each image begins, counted over all blocks.
    """

    def __init__(self, dataset: Images, shorter_side: int | None = None, device: torch.device | str = "cpu") -> None:
        if shorter_side is not None and shorter_side < 1:
            raise ValueError(f"Cached: shorter_side must be at least 1 pixel, got {shorter_side}.")
        self.classes, self.device = dataset.classes, torch.device(device)
        self.fingerprint = getattr(dataset, "fingerprint", None)
        self.broken: dict[int, BrokenImage] = {}
        self.labels = np.full(len(dataset), -1)
        self.shapes = np.zeros((len(dataset), 2), dtype=np.int64)

        def decode(index: int) -> Tensor:
            try:
                image, self.labels[index] = dataset[index]
            except BrokenImage as error:
                self.broken[index] = error
                return torch.empty(0, dtype=torch.uint8)
            bounded = _bounded(image, shorter_side)
            self.shapes[index] = bounded.shape[1:]
            # Channels last, as decoders give it: torchvision resizes that in half the time.
            return bounded.permute(1, 2, 0).flatten()

        self.blocks: list[Tensor] = []
        with ThreadPoolExecutor() as pool:  # threads are enough: decoders let go of the interpreter
            blocks = range(0, len(dataset), BLOCK)
            for start in tqdm(blocks, leave=False, unit="image", unit_scale=BLOCK, disable=None):  # None: on terminals
                decoded = list(pool.map(decode, range(start, min(start + BLOCK, len(dataset)))))
                self.blocks.append(torch.cat(decoded))
        self.images_per_block = BLOCK
        self.starts = np.concatenate([[0], 3 * self.shapes.prod(axis=1).cumsum()])
        if self.device.type != "cpu":
            self.blocks, self.images_per_block = [_joined(self.blocks, self.device)], max(1, len(dataset))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 height width"], int]:
        index = range(len(self))[index]
        if index in self.broken:
            raise self.broken[index].with_traceback(None)
        block, place = divmod(index, self.images_per_block)
        first, begin, end = self.starts[[index - place, index, index + 1]].tolist()
        pixels = self.blocks[block][begin - first : end - first].cpu()
        return pixels.view(*self.shapes[index].tolist(), 3).permute(2, 0, 1), int(self.labels[index])


def cached(
    datasets: dict[str, Images], where: Where, shorter_side: int | None, device: torch.device, processes: int = 1
) -> dict[str, Images]:
    """`datasets` in memory: `ram`, this process's; `device`, where it trains; `none`, as they are.

    `processes` of this machine do the same. Raises Refused, before anything is decoded, where they will not fit.
    """
    if where == "none":
        return datasets
    device = device if where == "device" else CPU
    sizes = [estimated_bytes(dataset, shorter_side) for dataset in datasets.values()]
    images, needed = sum(map(len, datasets.values())), sum(sizes)
    # A GPU is one process's own, but each data set is decoded into this machine's memory first.
    on_gpu = [(device, needed, 1, ""), (CPU, max(sizes), processes, " on their way to the GPU")]
    for place, size, copies, way in [(CPU, needed, processes, "")] if device.type == "cpu" else on_gpu:
        if copies * size > (free := free_memory(place)):
            side = "as they are" if shorter_side is None else f"with a shorter side of {shorter_side} pixels"
            raise Refused(
                f"dataset.cache={where}: {images:,} images {side} take about {_shown(size)}"
                f"{f' in each of {copies} processes' if copies > 1 else ''}{way}, and {_shown(free)} are free; "
                "lower dataset.cache_side, or use dataset.cache=none."
            )
    log.info("decoding %s images into memory, about %s", f"{images:,}", _shown(needed))
    return {split: Cached(dataset, shorter_side, device) for split, dataset in datasets.items()}


def _joined(blocks: list[Tensor], device: torch.device) -> UInt8[Tensor, " bytes"]:
    """All of them in one tensor on `device`. Empties `blocks`, so that no more than one is in memory twice."""
    whole = torch.empty(sum(map(len, blocks)), dtype=torch.uint8, device=device)
    end = len(whole)
    while blocks:
        block = blocks.pop()
        end -= len(block)
        whole[end : end + len(block)] = block
    return whole


def estimated_bytes(dataset: Images, shorter_side: int | None) -> int:
    """What Cached will take, by the images at SEEN places spread over the whole."""
    sizes = [3 * height * width for height, width in _sizes(dataset, shorter_side)]
    return round(len(dataset) * sum(sizes) / max(1, len(sizes)))


def _sizes(dataset: Images, shorter_side: int | None) -> Iterator[tuple[int, int]]:
    for index in np.unique(np.linspace(0, len(dataset) - 1, SEEN).astype(int)).tolist():
        try:
            height, width = get_size(dataset[index][0])
        except BrokenImage:
            continue
        scale = 1.0 if shorter_side is None else min(1.0, shorter_side / min(height, width))
        yield round(height * scale), round(width * scale)


def _bounded(image: Image.Image | Tensor, shorter_side: int | None) -> UInt8[Tensor, "3 height width"]:
    if shorter_side is not None and min(get_size(image)) > shorter_side:
        image = resize(image, [shorter_side], antialias=True)
    return image if isinstance(image, Tensor) else pil_to_tensor(image)


def _shown(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
