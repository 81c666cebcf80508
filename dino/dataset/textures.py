"""Ten classes of procedural texture, made in memory: the default run's data, with nothing to download.

The texture is the only cue: angle, scale, phase, contrast, shading and which side of the texture is dark are drawn
alike for every class, and all images are grey with the same mean luminance (to a grey level) and, but for contrast,
the same variance. So raw pixels say little of the class, and neither brightness nor colour agrees between the crops of
one image more than between images (DINO would learn that agreement instead). How much of the area a figure covers does
differ: with figures of half the area each, only their edges tell the classes apart, and little is learned in two
minutes (measured: k-NN 41 % after three epochs, where these reach 74 % after one).
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from dino.dataset import check_split

# More periods, or stronger bending, and the blur and the small crops of the augmentation destroy the texture.
PERIODS = (2.5, 4.0)  # across the image
BEND = 0.05  # standard deviation of the displacement, in image widths
CONTRAST = (0.25, 0.5)  # between figure and ground, of the full range
SHADING = (0.5, 1.5)  # factor on the luminance, smooth over the image
MOST_PIXELS = 2**29  # of all images: made in a minute or two, in some 8 GB
NOISE = 0.03  # standard deviation per pixel, of the full range


def centred(x: Tensor) -> Tensor:
    """Position in the nearest period, in [-0.5, 0.5]."""
    return x - x.round()


# A texture is the signed distance from (p, q), in periods, to the edge of the figure: positive inside.


def stripes(p: Tensor, q: Tensor) -> Tensor:
    return 0.25 - centred(p).abs()


def checks(p: Tensor, q: Tensor) -> Tensor:
    a, b = 0.25 - centred(p).abs(), 0.25 - centred(q).abs()
    return torch.minimum(a.abs(), b.abs()) * a.sign() * b.sign()


def discs(p: Tensor, q: Tensor) -> Tensor:
    return 0.3 - torch.hypot(centred(p), centred(q))


def rings(p: Tensor, q: Tensor) -> Tensor:
    return 0.07 - (torch.hypot(centred(p), centred(q)) - 0.33).abs()


def grid(p: Tensor, q: Tensor) -> Tensor:
    return torch.maximum(centred(p).abs(), centred(q).abs()) - 0.43


def bricks(p: Tensor, q: Tensor) -> Tensor:
    """Bricks of 1.5 by 0.75 periods, every other row shifted by half a brick."""
    row = (q / 0.75).round()
    along = 1.5 * centred(p / 1.5 + row / 2)
    across = 0.75 * centred(q / 0.75)
    return torch.minimum(0.75 - along.abs(), 0.375 - across.abs()) - 0.06


def zigzag(p: Tensor, q: Tensor) -> Tensor:
    return (0.2 - centred(q + centred(p).abs()).abs()) / 2**0.5


def crosses(p: Tensor, q: Tensor) -> Tensor:
    a, b = centred(p).abs(), centred(q).abs()
    return torch.minimum(0.1 - torch.minimum(a, b), 0.38 - torch.maximum(a, b))


def cells(p: Tensor, q: Tensor) -> Tensor:
    """Cells as large as those of `checks`. A coin for each pair of neighbours says which of the two is inked: single
    coins would make large even patches, which raw pixels tell from the other classes.
    """
    edge = 0.1  # cells pass into each other over this share of their width, so that equal neighbours join seamlessly
    p, q = 2 * p, 2 * q
    i, j = p.floor(), q.floor()
    a = ((p - i - 0.5) / edge + 0.5).clamp(0, 1)
    b = ((q - j - 0.5) / edge + 0.5).clamp(0, 1)

    def coin(i: Tensor, j: Tensor) -> Tensor:
        """-1 or 1, the same for the same cell: an integer hash of the pair."""
        h = i.long() * 374761393 + (j.long() >> 1) * 668265263
        h = (h ^ (h >> 13)) * 1274126177
        return (((h >> 16) ^ j.long()) & 1) * 2.0 - 1.0

    near = torch.lerp(coin(i, j), coin(i + 1, j), a)
    far = torch.lerp(coin(i, j + 1), coin(i + 1, j + 1), a)
    return torch.lerp(near, far, b) * edge / 4


def triangles(p: Tensor, q: Tensor) -> Tensor:
    height = centred(q) + 0.5
    return torch.minimum((height / 2 - centred(p).abs()) / 1.25**0.5, 1 - height) - 0.05


TEXTURES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    stripes, checks, discs, rings, grid, bricks, zigzag, crosses, cells, triangles,
)  # fmt: skip


def smooth(control: Float[Tensor, "n c k k"], size: int) -> Float[Tensor, "n c size size"]:
    """A smooth field through k x k control points spread over the image."""
    return F.interpolate(control, size=(size, size), mode="bicubic", align_corners=True)


def draw(
    texture: Callable[[Tensor, Tensor], Tensor], count: int, size: int, rng: np.random.Generator
) -> UInt8[Tensor, "{count} {size} {size}"]:
    """`count` grey images of one texture."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (count, *shape)).astype(np.float32))

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal((count, *shape), dtype=np.float32))

    axis = (torch.arange(size) + 0.5) / size - 0.5
    bend = smooth(BEND * normal(2, 4, 4), size)
    x, y = axis + bend[:, 0], axis[:, None] + bend[:, 1]

    angle, periods = uniform(0.0, 2 * torch.pi, 1, 1), uniform(*PERIODS, 1, 1)
    # The phase picks the coins of `cells`, too: from a thousand periods, so that no two images have the same.
    p = periods * (angle.cos() * x - angle.sin() * y) + uniform(0.0, 1000.0, 1, 1)
    q = periods * (angle.sin() * x + angle.cos() * y) + uniform(0.0, 1000.0, 1, 1)

    pixels_per_period = size / periods
    figure = (texture(p, q) * pixels_per_period + 0.5).clamp(0, 1)  # an edge is a pixel wide
    figure = figure - figure.mean((1, 2), keepdim=True)
    figure = figure / figure.std((1, 2), keepdim=True).clamp(min=0.1)  # at least 0.1: a tiny image may be all ground
    swap = uniform(-1.0, 1.0, 1, 1).sign()
    image = 0.5 + uniform(*CONTRAST, 1, 1) / 2 * swap * figure
    image = image * smooth(uniform(*SHADING, 1, 3, 3), size)[:, 0]
    image = image - image.mean((1, 2), keepdim=True) + 0.5 + NOISE * normal(size, size)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


class Textures(Dataset[tuple[Tensor, int]]):
    """`images` images of size x size pixels; image i is of class i % 10, so every run of ten is balanced.

    A pure function of its arguments: each split and seed draws from a stream of its own, never from the global one.
    """

    def __init__(self, split: str, size: int = 64, images: int = 4000, seed: int = 0) -> None:
        check_split(split)
        if size < 8:
            raise ValueError(
                f"Textures: size must be at least 8 pixels to show a texture, got {size}. Change dataset.{split}.size."
            )
        if images < len(TEXTURES):
            raise ValueError(
                f"Textures: images must be at least {len(TEXTURES)}, one a class, got {images}. "
                f"Change dataset.{split}.images."
            )
        if seed < 0:
            raise ValueError(f"Textures: seed must be 0 or more, got {seed}. Change dataset.{split}.seed.")
        if images * size**2 > MOST_PIXELS:
            raise ValueError(
                f"Textures: {images} images of {size} x {size} pixels are too many to be made in memory, where "
                f"{MOST_PIXELS // size**2} are the most. Lower dataset.{split}.images or dataset.{split}.size."
            )
        self.classes = [texture.__name__ for texture in TEXTURES]
        self.pixels = torch.empty(images, 3, size, size, dtype=torch.uint8)
        for label, texture in enumerate(TEXTURES):
            rng = np.random.default_rng([seed, label, split == "val"])
            count = len(range(label, images, len(TEXTURES)))
            self.pixels[label :: len(TEXTURES)] = draw(texture, count, size, rng)[:, None]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 height width"], int]:
        return self.pixels[index], range(len(self))[index] % len(self.classes)
