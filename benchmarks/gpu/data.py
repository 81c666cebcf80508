"""The data path on the device that trains: photometry of views, and crops of images."""

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.measure import times, work
from benchmarks.gpu.turn import Turn
from dino.augmentation import DINOTransform
from dino.dataset.cache import Cached
from dino.loading.sampler import PHOTOMETRY
from dino.loading.views import Loading, crops_of
from dino.runtime.device import choose_device


class Noise:
    """Images of noise, `side` pixels high and up to 1.6 times as wide, of sizes that differ as ImageNet's do."""

    classes = None

    def __init__(self, number: int, side: int) -> None:
        self.number, self.side = number, side

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        rng = np.random.default_rng(index)
        width = int(self.side * rng.uniform(1, 1.6))
        return torch.from_numpy(rng.integers(256, size=(3, self.side, width), dtype=np.uint8)), -1


def photometry(
    turn: Turn, batch: int, views: tuple[int, int, int], rounds: int, compiled: bool = False
) -> dict[str, float]:
    """Of a batch of views on the device: (global size, local size, number of local views), in pixels."""
    device, transform = choose_device(), transform_of(views)
    sized = [torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, device=device) for size in transform.sizes]
    if compiled:
        transform.compile()
    numbers = iter(range(10**6))

    def call() -> list[Tensor]:
        return transform.augment(sized, (0, PHOTOMETRY, next(numbers)))

    return timed(turn, call, batch, rounds, device)


def crops(turn: Turn, batch: int, side: int, views: tuple[int, int, int], rounds: int) -> dict[str, float]:
    """Of a batch of images that a GPU holds, as with dataset.cache=device; of a CPU, that a worker hands over."""
    device, transform = choose_device(), transform_of(views)
    images: Any = Noise(batch, side)
    if device.type != "cpu":
        images = Cached(images, device=device)
    cropping = crops_of(images, transform, Loading(device, device_does="crops"))
    rng = np.random.default_rng(0)
    handed = cropping.collate([cropping.load(index, rng) for index in range(batch)])
    return timed(turn, lambda: cropping.views(handed, device), batch, rounds, device)


def timed(turn: Turn, call: Any, batch: int, rounds: int, device: torch.device) -> dict[str, float]:
    begin = time.monotonic()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    found = {"first_call_s": time.monotonic() - begin}
    turn.alone()
    found |= times(call, rounds, device)
    found["images_per_second"] = 1e3 * batch / found["ms_unsynchronised"]
    return found | work(call, device)


def transform_of(views: tuple[int, int, int]) -> DINOTransform:
    global_size, local_size, locals_ = views
    return DINOTransform(num_local_views=locals_, global_size=global_size, local_size=local_size)
