"""From the samples of a dataset to uint8 views on the device that trains: which half of it a data worker does.

Four ways, of the same three methods: `load` and `collate` run in a worker, `views` where the model trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Shaped
from numpy import ndarray
from torch import Tensor
from torch.utils.data import Dataset

from dino.augmentation import DINOTransform, collate_multi_crop, image_tensor
from dino.augmentation.resampling import cut_together
from dino.dataset.cache import Cached, Pairs
from dino.dataset.encoded import EncodedImages, plain_jpeg, quiet
from dino.loading.broken import first_readable

GEOMETRY = 2  # its stream of random numbers: see dino/loading/sampler.py
Views = list[Shaped[Tensor, "batch 3 _ _"]]  # uint8, but for a transform of one's own
Boxes = Int[ndarray, "batch views 5"]
Labels = Int[Tensor, " batch"]
# Indices, labels, all that is stored, its shapes (of an encoded image: bytes, 1, 1), boxes.
Handed = tuple[Int[ndarray, " batch"], Labels, Tensor, Int[ndarray, "batch 3"], Boxes]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Loading:
    """Where images become views. `device_does`: photometry, crops (and photometry), decode (and both); auto: crops on
    CUDA, else photometry."""

    device: torch.device = CPU
    num_workers: int = 0
    device_does: str = "auto"
    cached_on_device: bool = False  # then crops are made there too, and an evaluation has no use for workers


class Cropped(NamedTuple):
    """A batch on the device that trains."""

    views: Views
    labels: Labels  # on the CPU, -1 where there is none
    broken: Sequence[str] = ()  # a sentence for each image that turned out to be broken on the device


class WorkerCrops:
    """Workers decode and crop. The least to hand over where images are large, and the quickest on a CPU."""

    def __init__(self, dataset: Pairs, transform: DINOTransform) -> None:
        self.dataset, self.transform = dataset, transform

    def load(self, index: int, rng: np.random.Generator) -> tuple[list[Tensor], int]:
        image, label = self.dataset[index]
        return self.transform.crop(image, rng), label

    def collate(self, loaded: Sequence[tuple[list[Tensor], int]]) -> tuple[Views, Labels]:
        return collate_multi_crop(loaded)

    def views(self, batch: tuple[Views, Labels], device: torch.device) -> Cropped:
        views, labels = batch
        return Cropped([view.to(device, non_blocking=True) for view in views], labels)


class DeviceCrops:
    """Workers decode and draw the boxes; the device crops. They hand over whole images, as they are."""

    def __init__(self, dataset: Pairs, transform: DINOTransform) -> None:
        self.dataset, self.transform = dataset, transform

    def load(self, index: int, rng: np.random.Generator) -> tuple[int, int, Tensor, ndarray]:
        image, label = self.dataset[index]
        image = image_tensor(image)
        return index, label, image.permute(1, 2, 0), self.transform.boxes(image.shape[1], image.shape[2], rng)

    def collate(self, loaded: Sequence[tuple[int, int, Tensor, ndarray]]) -> Handed:
        indices, labels, stored, boxes = zip(*loaded, strict=True)
        # One tensor for all: each tensor that a worker hands over costs a file descriptor, and each copy a launch.
        whole = torch.cat([one.flatten() for one in stored])
        shapes = np.array([one.shape if one.ndim == 3 else (len(one), 1, 1) for one in stored])
        return np.array(indices), torch.tensor(labels), whole, shapes, np.stack(boxes)

    def views(self, batch: Handed, device: torch.device) -> Cropped:
        _, labels, whole, shapes, boxes = batch
        pixels = whole.to(device, non_blocking=True)
        return Cropped(cut_together(pixels, *_places(shapes), boxes, self.transform.sizes), labels)


class DeviceDecodes(DeviceCrops):
    """Workers read and draw the boxes; the device decodes (by nvJPEG, where it is CUDA) and crops.

    What is no JPEG, or one to be turned, a worker decodes. A JPEG that turns out to be broken on the device gives its
    place to the next image.
    """

    def __init__(self, dataset: EncodedImages, transform: DINOTransform) -> None:
        super().__init__(dataset, transform)
        self.dataset: EncodedImages = dataset

    def load(self, index: int, rng: np.random.Generator) -> tuple[int, int, Tensor, ndarray]:
        data = self.dataset.encoded(index)
        if (shape := plain_jpeg(data)) is None:
            return super().load(index, rng)
        stored = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return index, int(self.dataset.labels[index]), stored, self.transform.boxes(*shape, rng)

    def views(self, batch: Handed, device: torch.device) -> Cropped:
        indices, labels, whole, shapes, boxes = batch
        images = split(whole, shapes)  # on the CPU: from there nvJPEG reads
        jpegs, broken = np.flatnonzero(shapes[:, 2] == 1).tolist(), list[str]()
        encoded = [images[i].flatten() for i in jpegs]
        try:
            from torchvision.io import ImageReadMode, decode_jpeg

            with quiet():
                decoded = decode_jpeg(encoded, ImageReadMode.RGB, device=device) if encoded else []
        except torch.OutOfMemoryError:  # a RuntimeError too, and no image's fault
            raise
        except RuntimeError:  # of one of them, and it does not say which
            decoded = [self._one(i, int(indices[i]), labels, boxes, broken) for i in jpegs]
        for i, image in zip(jpegs, decoded, strict=True):
            images[i] = image.permute(1, 2, 0)
        pixels = torch.cat([image.to(device, non_blocking=True).flatten() for image in images])
        places = _places(np.array([image.shape for image in images]))
        return Cropped(cut_together(pixels, *places, boxes, self.transform.sizes), labels, broken)

    def _one(self, place: int, index: int, labels: Tensor, boxes: Boxes, broken: list[str]) -> Tensor:
        """Decoded as a worker does it; label and boxes change where another image takes the place of a broken one."""
        image: Tensor
        (image, labels[place]), passed_over = first_readable(self.dataset.__getitem__, index, len(self.dataset))
        if passed_over:
            boxes[place] = self.transform.boxes(image.shape[1], image.shape[2], np.random.default_rng(index))
            broken += passed_over
        return image


class CachedCrops:
    """The device holds the images and crops them; workers draw the boxes."""

    def __init__(self, dataset: Cached, transform: DINOTransform) -> None:
        self.broken, self.labels, self.transform = dataset.broken, dataset.labels, transform
        self.starts, self.shapes, (self.pixels,) = dataset.starts, dataset.shapes, dataset.blocks

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"pixels": None}  # workers need no way to the device

    def load(self, index: int, rng: np.random.Generator) -> tuple[int, ndarray]:
        if index in self.broken:
            raise self.broken[index]
        height, width = self.shapes[index].tolist()
        return index, self.transform.boxes(height, width, rng)

    def collate(self, loaded: Sequence[tuple[int, ndarray]]) -> tuple[Int[ndarray, " batch"], Boxes]:
        indices, boxes = zip(*loaded, strict=True)
        return np.array(indices), np.stack(boxes)

    def views(self, batch: tuple[Int[ndarray, " batch"], Boxes], device: torch.device) -> Cropped:
        indices, boxes = batch
        views = cut_together(self.pixels, self.starts[indices], self.shapes[indices], boxes, self.transform.sizes)
        return Cropped(views, torch.from_numpy(self.labels[indices]))


Crops = WorkerCrops | DeviceCrops | DeviceDecodes | CachedCrops


def crops_of(dataset: Pairs, transform: DINOTransform, loading: Loading) -> Crops:
    """As `loading.device_does` says, as far as `dataset` lets it: what is on a GPU already is cropped there, and what
    is decoded already is not decoded again. auto leaves the crops to a transform that makes them in a way of its own.
    """
    if isinstance(dataset, Cached) and dataset.device.type != "cpu":
        return CachedCrops(dataset, transform)
    device_does = loading.device_does
    if device_does == "auto":
        can_crop = loading.device.type == "cuda" and type(transform).crop is DINOTransform.crop
        device_does = "crops" if can_crop else "photometry"
    if device_does == "photometry":
        return WorkerCrops(dataset, transform)
    if device_does == "decode" and isinstance(dataset, EncodedImages):
        return DeviceDecodes(dataset, transform)
    return DeviceCrops(dataset, transform)


def split(whole: Tensor, shapes: Int[ndarray, "batch 3"]) -> list[Tensor]:
    pieces = torch.split(whole, shapes.prod(axis=1).tolist())
    return [piece.view(shape) for piece, shape in zip(pieces, shapes.tolist(), strict=True)]


def _places(shapes: Int[ndarray, "batch 3"]) -> tuple[Int[ndarray, " batch"], Int[ndarray, "batch 2"]]:
    """(starts, shapes) of images [height, width, 3] one after another, as `cut_together` takes them."""
    return np.concatenate([[0], shapes.prod(axis=1).cumsum()[:-1]]), shapes[:, :2]


class Samples(Dataset[Any]):
    """`samples[(epoch, index)] -> (what `crops` loaded, a sentence of each image passed over as broken)`.

    What is drawn depends on (seed, epoch, index) alone: the same for any number of workers, and on resume.
    """

    def __init__(self, crops: Crops, seed: int, images: int) -> None:
        self.crops, self.seed, self.images = crops, seed, images

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, list[str]]:
        def load(index: int) -> Any:
            return self.crops.load(index, np.random.default_rng([self.seed, GEOMETRY, *key]))

        return first_readable(load, key[1], self.images)

    def collate(self, samples: Sequence[tuple[Any, list[str]]]) -> tuple[Any, list[str]]:
        loaded, broken = zip(*samples, strict=True)
        return self.crops.collate(loaded), [sentence for sentences in broken for sentence in sentences]
