"""The photometric half of the augmentation: whole batches on their own device, every sample with its own parameters.

Images are float32 in [0, 1]. Each operation equals torchvision's function of the same meaning on float images, one
sample at a time; the order (jitter, gray, blur, solarize) is the authors'. Names ending in `_` write in place.
"""

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import permutations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = np.array(list(permutations(range(4))))  # the 24 orders in which ColorJitter may take its four operations
LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights (ITU-R 601, which sum to .9999 here as there)
SOLARIZE_THRESHOLD = 128 / 255  # PIL.ImageOps.solarize's default, on its scale of 0..255


@dataclass(frozen=True)
class Draws:
    """What happens to each sample of each view, drawn on the host: so the device is never asked which are concerned."""

    jitter: Bool[ndarray, "views batch"]
    order: Int[ndarray, "views batch 4"]  # of BRIGHTNESS, CONTRAST, SATURATION, HUE
    factors: Float[ndarray, "views batch 4"]  # as ColorJitter's, in the order of the constants
    gray: Bool[ndarray, "views batch"]
    blur: Bool[ndarray, "views batch"]
    sigma: Float[ndarray, "views batch"]  # pixels
    solarize: Bool[ndarray, "views batch"]

    def views(self, which: slice) -> "Draws":
        return Draws(**{field.name: getattr(self, field.name)[which] for field in fields(self)})


@torch.no_grad()
def augment_(
    images: Float[Tensor, "samples 3 size size"], draws: Draws, max_sigma: float
) -> Float[Tensor, "samples 3 size size"]:
    """Does what `draws` says to the views of one size, [views · batch, ...] view after view. `max_sigma` (pixels)
    is the bound of `draws.sigma`: it sets the blur's reach, 3 sigma."""
    # Grouped by the place of hue among the four operations: a group is three blends and one hue shift for all of it.
    place = (draws.order == HUE).argmax(2)
    groups = [np.flatnonzero(draws.jitter & (place == step)) for step in range(4)]
    rows = [*groups, *(np.flatnonzero(which) for which in (draws.gray, draws.blur, draws.solarize))]
    indices = torch.from_numpy(np.concatenate(rows)).to(images.device, non_blocking=True)
    *grouped, grayed, blurred, solarized = torch.split(indices, [len(r) for r in rows])

    jittered = np.concatenate(groups)
    coefficients = _device_floats(
        _blend_coefficients(draws.order.reshape(-1, 4)[jittered], draws.factors.reshape(-1, 4)[jittered]), images.device
    )
    start = 0
    for step, index in enumerate(grouped):
        if count := len(index):
            part = images.index_select(0, index)
            jitter_(part, coefficients[start : start + count], hue_step=step)
            images.index_copy_(0, index, part)
            start += count
    if len(grayed):
        images.index_copy_(0, grayed, gray_(images.index_select(0, grayed)))
    if len(blurred):
        sigma = _device_floats(draws.sigma[draws.blur], images.device)
        images.index_copy_(0, blurred, blur(images.index_select(0, blurred), sigma, radius=math.ceil(3 * max_sigma)))
    if len(solarized):
        images.index_copy_(0, solarized, solarize_(images.index_select(0, solarized)))
    return images


def _device_floats(values: Float[ndarray, "..."], device: torch.device) -> Float[Tensor, "..."]:
    return torch.from_numpy(values.astype(np.float32)).to(device, non_blocking=True)


def _blend_coefficients(
    order: Int[ndarray, "samples 4"], factors: Float[ndarray, "samples 4"]
) -> Float[ndarray, "samples 10"]:
    """(keep, gray, mean) of the first, second and third blend of each sample, then its hue shift."""
    blends = order[order != HUE].reshape(-1, 3)
    keep = np.take_along_axis(factors, blends, axis=1)
    steps = np.stack([keep, (1 - keep) * (blends == SATURATION), (1 - keep) * (blends == CONTRAST)], axis=2)
    return np.concatenate([steps.reshape(-1, 9), factors[:, [HUE]]], axis=1)


def jitter_(
    images: Float[Tensor, "samples 3 height width"], coefficients: Float[Tensor, "samples 10"], hue_step: int
) -> Float[Tensor, "samples 3 height width"]:
    """Three blends, with the hue shift before blend number `hue_step` (3: after all of them)."""
    for step in range(4):
        if step == hue_step:
            shift_hue_(images, coefficients[:, 9])
        if step < 3:
            blend_(images, *coefficients[:, 3 * step : 3 * step + 3].unbind(1))
    return images


def luma(images: Float[Tensor, "samples 3 height width"]) -> Float[Tensor, "samples height width"]:
    red, green, blue = images.unbind(1)
    return red.mul(LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def blend_(
    images: Float[Tensor, "samples 3 height width"],
    keep: Float[Tensor, " samples"],
    gray: Float[Tensor, " samples"],
    mean: Float[Tensor, " samples"],
) -> Float[Tensor, "samples 3 height width"]:
    """clamp(keep · image + gray · luma + mean · mean luma): with f the factor, brightness is (f, 0, 0), contrast
    (f, 0, 1 - f) and saturation (f, 1 - f, 0), so that samples at different operations go through together."""
    light = luma(images)
    average = light.mean((1, 2), keepdim=True)
    light.mul_(gray[:, None, None]).add_(average.mul_(mean[:, None, None]))
    return images.mul_(keep[:, None, None, None]).add_(light[:, None]).clamp_(0, 1)


def shift_hue_(
    images: Float[Tensor, "samples 3 height width"], shift: Float[Tensor, " samples"]
) -> Float[Tensor, "samples 3 height width"]:
    """Turns the hue by `shift` of the full circle. HSV keeps the largest and the smallest channel, so with H in [0, 6)
    the channels are read off three trapezoids of height `chroma`, without a table of sectors."""
    red, green, blue = images.unbind(1)
    top, bottom = red.maximum(green).maximum(blue), red.minimum(green).minimum(blue)
    chroma = top - bottom
    # Sectors by lerp with a weight of exactly 0 or 1, the remainder by floor: on CPU that takes half the time of
    # torch.where and torch.remainder.
    from_green = torch.lerp(blue - red + 2 * chroma, red - green + 4 * chroma, (top - green).sign_())
    hue = torch.lerp(green - blue, from_green, (top - red).sign_())
    hue.div_(chroma.clamp(min=1e-12).mul_(6)).add_(shift[:, None, None])  # a gray pixel has no hue: 0 / 6e-12
    hue.sub_(hue.floor()).mul_(6)
    torch.addcmul(bottom, chroma, (hue - 3).abs_().sub_(1).clamp_(0, 1), out=red)
    torch.addcmul(top, chroma, (hue - 2).abs_().sub_(1).clamp_(0, 1), value=-1, out=green)
    torch.addcmul(top, chroma, (hue - 4).abs_().sub_(1).clamp_(0, 1), value=-1, out=blue)
    return images


def gray_(images: Float[Tensor, "samples 3 height width"]) -> Float[Tensor, "samples 3 height width"]:
    return images.copy_(luma(images)[:, None].expand_as(images))


def blur(
    images: Float[Tensor, "samples 3 size size"], sigma: Float[Tensor, " samples"], radius: int
) -> Float[Tensor, "samples 3 size size"]:
    """Gaussian of 2 · radius + 1 taps with reflected borders, as torchvision's; PIL's GaussianBlur, which the authors
    use, approximates this Gaussian by three box filters. Two products with one band matrix a sample, which holds the
    reflection too: one batched call where a kernel a sample would need a grouped convolution."""
    size = images.shape[-1]
    radius = min(radius, size - 1)  # there is nothing to reflect beyond
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]).square())
    weights /= weights.sum(1, keepdim=True)
    with torch.autocast(images.device.type, enabled=False):  # a product in bfloat16 would leave 8 bits of the image
        band = (weights @ _reflected_taps(size, radius, images.device)).view(-1, size, size)
        rows = (images.reshape(-1, 3 * size, size) @ band.mT).view_as(images)
        return torch.stack([band @ channel for channel in rows.unbind(1)], dim=1)


@lru_cache(maxsize=16)
def _reflected_taps(size: int, radius: int, device: torch.device) -> Float[Tensor, "taps size_by_size"]:
    """[tap, to, from] flattened: 1 where the tap of pixel `to` reads pixel `from`."""
    source = np.arange(size)[:, None] + np.arange(-radius, radius + 1)
    source = np.abs(source)  # reflection about the first pixel's centre, then about the last one's
    source = size - 1 - np.abs(size - 1 - source)
    taps = source.T[:, :, None] == np.arange(size)
    return torch.from_numpy(taps.reshape(2 * radius + 1, size * size).astype(np.float32)).to(device)


def solarize_(images: Float[Tensor, "samples 3 height width"]) -> Float[Tensor, "samples 3 height width"]:
    return images.copy_(torch.where(images >= SOLARIZE_THRESHOLD, 1 - images, images))
