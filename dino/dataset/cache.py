"""A data set decoded once and kept in memory."""

from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import get_size, pil_to_tensor, resize


@runtime_checkable  # for the type checks of the test run
class Images(Protocol):
    """A data set as described in dino/dataset/__init__.py."""

    classes: list[str] | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image | Tensor, int]: ...


class Cached(Dataset[tuple[Tensor, int]]):
    """`dataset` as uint8 tensors whose shorter side is at most `shorter_side` pixels (antialiased, never enlarged).

    Takes 3 bytes a pixel (ImageNette's training images at 96 pixels: 0.26 GB), twice that while it is built.
    """

    def __init__(self, dataset: Images, shorter_side: int) -> None:
        if shorter_side < 1:
            raise ValueError(f"Cached: shorter_side must be at least 1 pixel, got {shorter_side}.")

        def decode(index: int) -> tuple[Tensor, int]:
            image, label = dataset[index]
            if min(get_size(image)) > shorter_side:
                image = resize(image, [shorter_side], antialias=True)
            return image if isinstance(image, Tensor) else pil_to_tensor(image), label

        with ThreadPoolExecutor() as pool:  # threads are enough: PIL lets go of the interpreter while it decodes
            decoded = list(pool.map(decode, range(len(dataset))))
        self.classes = dataset.classes
        self.labels = [label for _, label in decoded]
        self.shapes = [image.shape for image, _ in decoded]
        self.starts = [0, *accumulate(image.numel() for image, _ in decoded)]
        # One tensor for all: handing a list of them to a spawned worker takes a file descriptor for each.
        self.pixels = torch.cat([image.flatten() for image, _ in decoded])

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 height width"], int]:
        index = range(len(self))[index]
        start, end = self.starts[index], self.starts[index + 1]
        return self.pixels[start:end].view(self.shapes[index]), self.labels[index]
