"""For processes of their own, which find this file alone."""

from dino.dataset.textures import Textures
from dino.runtime.processes import place


class BrokenOnOne(Textures):
    """Textures of which the second process can't read one after some time."""

    reads = 0

    def __getitem__(self, index):
        BrokenOnOne.reads += 1
        if place().rank == 1 and self.reads > 60:  # in the second epoch
            raise OSError(f"image {index} can't be read")
        return super().__getitem__(index)
