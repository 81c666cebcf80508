"""What networks are measured on: the images of one data set, how they are prepared, and the device."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from dino.augmentation import EvalTransform
from dino.dataset.cache import Images
from dino.runtime.device import autocast_for

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Bench:
    """`precision` is that of the forward passes: fp32 or bf16. `batch_size` is the number of images in one of them.

    `broken` fills with a sentence for each image that cannot be read.
    """

    train: Images
    val: Images
    transform: EvalTransform
    device: torch.device = CPU
    precision: str = "fp32"
    batch_size: int = 256
    num_workers: int = 0
    broken: set[str] = field(default_factory=set)

    @property
    def splits(self) -> dict[str, Images]:
        return {"train": self.train, "val": self.val}

    @property
    def labelled(self) -> bool:
        return all(images.classes is not None for images in self.splits.values())

    @property
    def autocast(self) -> Callable[[], AbstractContextManager[Any]]:
        """A context for each forward pass."""
        return autocast_for(self.device, self.precision)
