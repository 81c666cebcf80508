"""The geometric half of the augmentation: where a view is cut out, and cutting it from one image in a data worker."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))  # width / height of a crop; RandomResizedCrop's default


def crop_box(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) as RandomResizedCrop draws it: area uniform in `scale`, log-uniform ratio; after ten
    draws that do not fit, the largest central crop of an admissible ratio."""
    (smallest, largest), (lowest, highest) = scale, LOG_RATIO
    for _ in range(10):  # `random` needs a third of the time of `uniform`, which is the same numbers
        area = height * width * (smallest + (largest - smallest) * rng.random())
        ratio = math.exp(lowest + (highest - lowest) * rng.random())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    narrowest, widest = map(math.exp, LOG_RATIO)
    w, h = min(width, round(height * widest)), min(height, round(width / narrowest))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image: UInt8[Tensor, "3 _ _"], size: list[int]) -> UInt8[Tensor, "3 _ _"]:
    """Antialiased and bicubic, as the authors' (PIL antialiases always); one number is the shorter side."""
    resized: Tensor = F.resize(image, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return resized


def cut(
    image: UInt8[Tensor, "3 _ _"], boxes: Int[ndarray, "views 5"], sizes: Sequence[int]
) -> list[UInt8[Tensor, "3 _ _"]]:
    """The views of one image. A box is (top, left, height, width, 1 where it is mirrored), a size a view's side."""
    views = []
    for (top, left, height, width, mirrored), size in zip(boxes.tolist(), sizes, strict=True):
        # As `resize`, without torchvision's checks: they would take a third of a small view's time.
        crop = image[None, :, top : top + height, left : left + width]
        view = interpolate(crop, (size, size), mode="bicubic", antialias=True)[0]
        views.append((view.flip(2) if mirrored else view).contiguous())
    return views
