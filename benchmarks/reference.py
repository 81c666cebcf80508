"""What the project measures itself against: DINO's augmentation in the official style, one image at a time, in PIL; and
images to measure on where there are none."""

import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torchvision.transforms as T
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.datasets.folder import default_loader
from torchvision.transforms.functional import to_pil_image

from dino.augmentation import DINOTransform
from dino.dataset.files import ImageFiles


class ReferenceTransform(DINOTransform):
    """The same arguments and views as DINOTransform's, by torchvision's transforms on PIL images: all of it in `crop`.

    The draws come from the global generators of torch and Python. As an experiment:
    `python -m dino.train augmentation._target_=benchmarks.reference.ReferenceTransform`
    """

    def crop(self, image: Image.Image | Tensor, rng: Any = None) -> list[Tensor]:
        """Finished views, in floats; `rng` is not used."""
        pil = to_pil_image(image) if isinstance(image, Tensor) else image
        return [view(pil) for view in self._views]

    def augment(self, views: Sequence[Tensor], seed: Sequence[int] | None = None, start: int = 0) -> list[Tensor]:
        """Nothing is left to be done."""
        return list(views)

    @cached_property
    def _views(self) -> list[T.Compose]:
        blur, solarize = self._blur_probability[:, 0], self._solarize_probability[:, 0]
        return [self._view(number, blur[number], solarize[number]) for number in range(self.ncrops)]

    def _view(self, number: int, blur: float, solarize: float) -> T.Compose:
        whole = number < self.n_global_crops
        size, scale = (self.global_size, self.global_scale) if whole else (self.local_size, self.local_scale)
        low, high = (sigma * self._blur_scale(size) for sigma in self.blur_sigma)
        brightness, contrast, saturation, hue = (self._highest_factor - [1, 1, 1, 0]).tolist()
        return T.Compose(
            [
                T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC),
                T.RandomHorizontalFlip(self.horizontal_flip),
                T.RandomApply([T.ColorJitter(brightness, contrast, saturation, hue)], self.jitter_probability),
                T.RandomGrayscale(self.gray_probability),
                T.RandomApply([GaussianBlur(low, high)], float(blur)),
                T.RandomApply([ImageOps.solarize], float(solarize)),
                T.ToTensor(),
                T.Normalize(self.mean, self.std),
            ]
        )


class GaussianBlur:
    """PIL's, of a standard deviation drawn between two numbers of pixels."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(self.low, self.high)))


class ReferenceImages:
    """The same images as torchvision's ImageFolder reads them, in PIL."""

    def __init__(self, images: ImageFiles) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return default_loader(self.images.name(index)), int(self.images.labels[index])


def photograph(rng: np.random.Generator, height: int = 375, width: int = 500) -> Image.Image:
    """Noise with the spectrum of photographs, amplitude 1/frequency, more of it in the light than in the colours."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)) + 1 / width
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((4, height, width))) / frequency, s=(height, width))
    light, *colour = noise / noise.std((1, 2), keepdims=True)
    pixels = 120 + 50 * light[:, :, None] + 15 * np.stack(colour, axis=2)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
