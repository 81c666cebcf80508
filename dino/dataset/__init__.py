"""Data sets: map-style, `dataset[i] -> (image, label)`.

An image is a PIL RGB image or a uint8 tensor [3, height, width]. `classes` names the labels; where it is None the
images are unlabelled and every label is -1. An image that cannot be read raises `dino.dataset.encoded.BrokenImage`.

Those that read encoded images (folders, tar shards, Hugging Face) are `EncodedImages`: `encoded(i)` are the bytes,
`name(i)` says which image it is, `labels` is an array, `fingerprint` is the same as long as names, labels and their
order are, wherever they lie. What they hold survives a spawned worker, and nothing is open when one is forked.
"""

import numpy as np
from jaxtyping import Int
from numpy import ndarray


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is "train" or "val"."""
    if split not in ("train", "val"):
        raise ValueError(f'A data set\'s split must be "train" or "val", got {split!r}.')


def part_of(images: int, split: str, labelled: bool) -> Int[ndarray, " chosen"]:
    """Which images are those of a split where there is one set for both.

    Labelled: val is every tenth (of fewer than ten the last), train the others. Unlabelled there is nothing to test:
    train is all of them, and val every tenth, to watch the features by.
    """
    place = np.arange(images)
    if not labelled:
        return place if split == "train" else place[::10]
    mine: ndarray = place[(place % 10 == min(9, images - 1)) == (split == "val")]
    return mine
