"""A data set of small images of many sizes, some of which cannot be read."""

import numpy as np
import torch

from dino.dataset.encoded import BrokenImage


class Photos:
    """Blocks of colour of `block` pixels (1: noise), labelled by their index; those at `broken` cannot be read."""

    classes = None

    def __init__(self, images=40, broken=(), block=8):
        self.images, self.broken, self.block = images, broken, block

    def __len__(self):
        return self.images

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenImage(f"{index}.jpg")
        rng = np.random.default_rng(index)
        height, width = rng.integers(20, 60, 2)
        colours = rng.integers(0, 256, (64 // self.block, 64 // self.block, 3), dtype=np.uint8)
        pixels = colours.repeat(self.block, 0).repeat(self.block, 1)[:height, :width]
        return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1), index
