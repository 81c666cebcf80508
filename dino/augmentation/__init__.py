"""Multi-crop augmentation (DINO, arXiv 2104.14294, Sec. 3.1 and 3.2) in two halves, each usable alone.

`crop` is the geometry: in the data worker, from one decoded image to uint8 views (or for a batch on the device that
trains: resampling.py). `augment` is the photometry: batched, on whatever device the views are on. `transform(image)` is
the one applied to the other.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms.v2 import functional as F

from dino.augmentation.crops import crop_box, cut, resize
from dino.augmentation.photometry import ORDERS, Draws, augment
from dino.augmentation.resampling import resize_together

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MOST_PIXELS = 2**14  # of a side: one such image is 3 GB
DRAWS = 10  # uniform numbers that decide what happens to one view of one sample


class DINOTransform:
    """Two global views, then `num_local_views` local ones.

    Sizes are sides in pixels, scales are fractions of the image's area. `blur_probability` is that of the first global,
    the second global and the local views; only the second global view is solarized. `blur_sigma` is in pixels and holds
    for views of `blur_full_size` pixels and above (the paper's views have 224 and 96). Smaller views get proportionally
    less, because a blur of two pixels leaves nothing of a 32 px view. `blur_full_size=1` blurs every size alike.

    Without a `rng` or `seed` the draws come from torch's global generator: `torch.manual_seed` repeats them.
    """

    n_global_crops = 2

    def __init__(
        self,
        num_local_views: int = 6,
        global_size: int = 224,
        local_size: int = 96,
        global_scale: tuple[float, float] = (0.4, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.4),
        horizontal_flip: float = 0.5,
        jitter_probability: float = 0.8,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.2,
        hue: float = 0.1,
        gray_probability: float = 0.2,
        blur_probability: tuple[float, float, float] = (1.0, 0.1, 0.5),
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        blur_full_size: int = 96,
        solarize_probability: float = 0.2,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        _check_lengths(2, {"global_scale": global_scale, "local_scale": local_scale, "blur_sigma": blur_sigma})
        _check_lengths(3, {"blur_probability": blur_probability, "mean": mean, "std": std})
        _require(num_local_views >= 0, "num_local_views", "0 or more", num_local_views)
        _check_sizes({"global_size": global_size, "local_size": local_size, "blur_full_size": blur_full_size})
        _check_scales({"global_scale": global_scale, "local_scale": local_scale})
        _check_probabilities({"horizontal_flip": horizontal_flip, "jitter_probability": jitter_probability})
        _check_probabilities({"gray_probability": gray_probability, "solarize_probability": solarize_probability})
        for probability in blur_probability:
            _check_probabilities({"blur_probability": probability})
        _check_strengths({"brightness": brightness, "contrast": contrast, "saturation": saturation}, hue)
        _require(0 < blur_sigma[0] <= blur_sigma[1] < math.inf, "blur_sigma", "two rising numbers above 0", blur_sigma)
        _require(all(s > 0 for s in std), "std", "above 0 in every channel", std)

        self.num_local_views = num_local_views
        self.ncrops = self.n_global_crops + num_local_views
        self.global_size, self.local_size = global_size, local_size
        self.sizes = [global_size] * self.n_global_crops + [local_size] * num_local_views
        self.global_scale, self.local_scale = global_scale, local_scale
        self.horizontal_flip = horizontal_flip
        self.jitter_probability, self.gray_probability = jitter_probability, gray_probability
        strengths = np.array([brightness, contrast, saturation])
        self._lowest_factor = np.array([*np.maximum(1 - strengths, 0), -hue])  # as ColorJitter: no negative factor
        self._highest_factor = np.array([*(1 + strengths), hue])
        first, second, local = blur_probability
        self._blur_probability = np.array([[first], [second]] + [[local]] * num_local_views)
        self._solarize_probability = np.array([[0], [solarize_probability]] + [[0]] * num_local_views)
        self.blur_sigma, self.blur_full_size = blur_sigma, blur_full_size
        self.mean, self.std = mean, std
        self.compiled = False

    def compile(self) -> None:
        """Has `augment` compiled, once for each size of views, when it is next called."""
        self.compiled = True  # and not the compiled function, which does not pickle for the data workers

    def __call__(self, image: Image.Image | Tensor) -> list[Float[Tensor, "3 _ _"]]:
        """PIL image or uint8 [3, H, W] in, 2 + num_local_views normalised views out."""
        return [view[0] for view in self.augment([view[None] for view in self.crop(image)])]

    def crop(self, image: Image.Image | Tensor, rng: np.random.Generator | None = None) -> list[UInt8[Tensor, "3 _ _"]]:
        """Random resized and flipped views of a PIL image or a uint8 [3, H, W]; all of them are a function of `rng`."""
        image = image_tensor(image)
        rng = np.random.default_rng(_fresh_seed()) if rng is None else rng
        return cut(image, self.boxes(image.shape[1], image.shape[2], rng), self.sizes)

    def boxes(self, height: int, width: int, rng: np.random.Generator) -> Int[ndarray, "views 5"]:
        """Where `crop` cuts the views of an image of this size: (top, left, height, width, 1 where it is mirrored)."""
        scales = [self.global_scale] * self.n_global_crops + [self.local_scale] * self.num_local_views
        return np.array([(*crop_box(height, width, s, rng), rng.random() < self.horizontal_flip) for s in scales])

    def augment(
        self, views: Sequence[UInt8[Tensor, "batch 3 _ _"]], seed: Sequence[int] | None = None, start: int = 0
    ) -> list[Float[Tensor, "batch 3 _ _"]]:
        """Jitter, gray, blur, solarize and normalise, on the views' device.

        What sample i gets is a function of `seed` (non-negative integers) and `start + i` alone: a batch augmented in
        parts, each with its `start`, is the batch augmented whole.
        """
        if len(views) != self.ncrops:
            raise ValueError(
                f"DINOTransform.augment: expected {self.ncrops} views (2 global, then {self.num_local_views} local), "
                f"got {len(views)}. Pass the views of `crop`, each stacked to [B, 3, S, S]."
            )
        if any(view.dtype != torch.uint8 for view in views):
            raise TypeError(
                f"DINOTransform.augment: expected uint8 views, got {sorted({str(view.dtype) for view in views})}. "
                "Pass the views as `crop` returns them."
            )
        batch = len(views[0])
        augmented: list[Tensor] = []
        for same_size, draws in zip(
            (views[: self.n_global_crops], views[self.n_global_crops :]), self.draw(batch, seed, start), strict=True
        ):
            if same_size:
                max_sigma = self.blur_sigma[1] * self._blur_scale(same_size[0].shape[-1])
                images = augment(torch.cat(list(same_size)), draws, max_sigma, self.mean, self.std, self.compiled)
                augmented += torch.split(images, batch)
        return augmented

    def draw(self, batch: int, seed: Sequence[int] | None = None, start: int = 0) -> tuple[Draws, Draws]:
        """What `augment` does with the same arguments: to the global views, then to the local ones."""
        bits = np.random.PCG64(_fresh_seed() if seed is None else list(seed))
        bits.advance(start * self.ncrops * DRAWS)  # past the samples before: one number is one state of this generator
        uniform = (
            np.random.Generator(bits).random((batch, self.ncrops, DRAWS)).transpose(2, 1, 0)
        )  # [draw, view, sample]

        jitter, order, *factors, gray, blur, sigma, solarize = uniform
        low, high = self.blur_sigma
        scale = np.array([[self._blur_scale(size)] for size in self.sizes])
        whole = Draws(
            jitter=jitter < self.jitter_probability,
            order=ORDERS.take((order * len(ORDERS)).astype(int), axis=0),
            factors=self._lowest_factor + np.stack(factors, -1) * (self._highest_factor - self._lowest_factor),
            gray=gray < self.gray_probability,
            blur=blur < self._blur_probability,
            sigma=(low + sigma * (high - low)) * scale,
            solarize=solarize < self._solarize_probability,
        )
        return whole.views(slice(0, self.n_global_crops)), whole.views(slice(self.n_global_crops, None))

    def _blur_scale(self, size: int) -> float:
        return min(1.0, size / self.blur_full_size)


class EvalTransform:
    """A uint8 view for evaluation: the shorter side to 256/224 of `size` pixels, then the central square of `size`."""

    def __init__(
        self,
        size: int,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        if not 0 < size <= MOST_PIXELS:
            expected = "1 pixel or more" if size < 1 else f"at most {MOST_PIXELS} pixels"
            raise ValueError(f"EvalTransform: size must be {expected}, got {size}. Change dataset.eval_size.")
        self.size, self.mean, self.std = size, mean, std

    def __call__(self, image: Image.Image | Tensor) -> UInt8[Tensor, "3 {self.size} {self.size}"]:
        """An image that is of the right size already is returned as it is, uncropped."""
        image = image_tensor(image)
        if image.shape[1:] == (self.size, self.size):
            return image.contiguous()
        centre: Tensor = F.center_crop(resize(image, [self._shorter_side]), [self.size, self.size])
        return centre.contiguous()

    @property
    def _shorter_side(self) -> int:
        return round(self.size * 256 / 224)

    def of_batch(
        self, pixels: UInt8[Tensor, " bytes"], starts: Int[ndarray, " batch"], shapes: Int[ndarray, "batch 2"]
    ) -> UInt8[Tensor, "batch 3 {self.size} {self.size}"]:
        """The views of many images that lie in one tensor, as `cut_together` takes them, made on its device at once."""
        resized = shapes * self._shorter_side // shapes.min(axis=1, keepdims=True)
        right = (shapes == self.size).all(axis=1, keepdims=True)
        return resize_together(pixels, starts, shapes, np.where(right, shapes, resized), self.size)

    def normalise(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
        """Batched and on the images' device, as the training views are."""
        return standardise_(images.float().div_(255), self.mean, self.std)


def collate_multi_crop(
    batch: Sequence[tuple[Sequence[Tensor], int]],
) -> tuple[list[Shaped[Tensor, "batch 3 _ _"]], Int[Tensor, " batch"]]:
    """[(views, label), ...] -> (each view stacked over the batch, labels)."""
    views, labels = zip(*batch, strict=True)
    # torch's own collation writes what a worker makes to shared memory at once, where stacking would copy it there.
    return [default_collate(list(same_view)) for same_view in zip(*views, strict=True)], torch.tensor(labels)


def image_tensor(image: Image.Image | Tensor) -> UInt8[Tensor, "3 height width"]:
    if isinstance(image, Image.Image):
        pixels: Tensor = F.pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))
        return pixels
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise TypeError(
            f"an image must be a PIL image or a uint8 tensor [3, H, W], got {image.dtype} {list(image.shape)}. "
            "Convert it in the dataset's __getitem__."
        )
    return image


def standardise_(
    images: Float[Tensor, "batch 3 height width"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "batch 3 height width"]:
    for channel, m, s in zip(images.unbind(1), mean, std, strict=True):  # plain numbers: nothing to move to the device
        channel.sub_(m).div_(s)
    return images


def _fresh_seed() -> int:
    return int(torch.randint(2**63 - 1, ()))


def _check_lengths(length: int, given: Mapping[str, Sequence[float]]) -> None:
    for name, values in given.items():
        _require(len(values) == length, name, f"exactly {length} numbers", values)


def _check_sizes(given: Mapping[str, int]) -> None:
    for name, size in given.items():
        _require(size > 0, name, "1 pixel or more", size)
        _require(size <= MOST_PIXELS, name, f"at most {MOST_PIXELS} pixels", size)


def _check_scales(given: Mapping[str, Sequence[float]]) -> None:
    for name, (low, high) in given.items():
        _require(0 < low <= high <= 1, name, "two rising fractions of the area in (0, 1]", given[name])


def _check_probabilities(given: Mapping[str, float]) -> None:
    for name, probability in given.items():
        _require(0 <= probability <= 1, name, "a probability in [0, 1]", probability)


def _check_strengths(given: Mapping[str, float], hue: float) -> None:
    """Of the colour jitter."""
    for name, strength in given.items():
        _require(0 <= strength < math.inf, name, "0 or more", strength)
    _require(0 <= hue <= 0.5, "hue", "a fraction of the colour circle in [0, 0.5]", hue)


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"DINOTransform: {name} must be {expected}, got {got}. Change augmentation.{name}.")
