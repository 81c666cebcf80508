import math

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from dino.augmentation.crops import crop_box


def ks_distance(a, b):
    at = np.sort(np.concatenate([a, b]))
    return np.abs(
        np.searchsorted(np.sort(a), at, "right") / len(a) - np.searchsorted(np.sort(b), at, "right") / len(b)
    ).max()


@pytest.mark.parametrize(
    ("height", "width"), [(60, 100), (64, 64), (30, 300)], ids=["wide", "square", "often the fallback"]
)
@pytest.mark.parametrize("scale", [(0.05, 0.4), (0.4, 1.0)])
def test_crop_boxes_are_distributed_as_torchvisions(height, width, scale):
    draws = 3000
    rng = np.random.default_rng(0)
    ours = np.array([crop_box(height, width, scale, rng) for _ in range(draws)], dtype=float)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(draws)], dtype=float
    )
    limit = 1.95 * math.sqrt(2 / draws)  # Kolmogorov-Smirnov, p = 0.001
    for name, of in {
        "top": lambda box: box[:, 0],
        "left": lambda box: box[:, 1],
        "area": lambda box: box[:, 2] * box[:, 3],
        "ratio": lambda box: box[:, 3] / box[:, 2],
        "right": lambda box: box[:, 1] + box[:, 3],
    }.items():
        assert ks_distance(of(ours), of(theirs)) < limit, name


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (50, 1), (2, 90), (300, 20)])
def test_where_no_draw_fits_the_box_is_torchvisions_central_one(height, width):
    fallback = RandomResizedCrop.get_params(torch.empty(3, height, width), [1.0, 1.0], [3 / 4, 4 / 3])
    assert crop_box(height, width, (1.0, 1.0), np.random.default_rng(0)) == tuple(fallback)
