"""The photometric half of the augmentation: uint8 views in, normalised float32 views out, on the device they are on.

Each operation equals torchvision's function of the same meaning on float images, one sample at a time; the order
(jitter, gray, blur, solarize, normalise) is the authors'. Names ending in `_` write in place.

ColorJitter draws an order of its operations for each sample. Here every sample runs the same fixed sequence of
operations, PROGRAM, which contains every order; an operation that a sample did not draw gets a neutral factor, which
changes no bit of it. Shapes are static, which torch.compile needs. In eager mode on a CPU, where every operation costs
time, samples with similar operations run together, and operations that none of them drew are skipped.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import permutations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from numpy import ndarray
from torch import Tensor

from dino.runtime.transfer import to_device

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = np.array(list(permutations(range(4))))  # the 24 orders in which ColorJitter may take its four operations
PROGRAM = ["BCSH".index(step) for step in "BSBCBSBHBSBCBSBS"]  # the last is gray: a saturation of 0
STEPS = len(PROGRAM)
PLACES = np.array([64, 16, 4, 1])  # an order as a number to base 4
UNCHANGED = [0.0 if operation == HUE else 1.0 for operation in PROGRAM]  # the neutral factors
LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights (ITU-R 601, which sum to .9999 here as there)
SOLARIZE_THRESHOLD = 128 / 255  # PIL.ImageOps.solarize's default, on its scale of 0..255
BLOCK = 2**16  # pixels per block on a CPU core: few enough for its cache
NEGLIGIBLE = 1e-8  # the weight of a pixel, at most 1, that a sum in float32 does not feel

Channel = Float[Tensor, "samples height width"]
PerSample = Float[Tensor, "samples 1 1"]


@dataclass(frozen=True)
class Draws:
    """What happens to each sample of each view. Drawn on the host, so that nothing waits for the device."""

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
def augment(
    images: UInt8[Tensor, "samples 3 size size"],
    draws: Draws,
    max_sigma: float,
    mean: Sequence[float],
    std: Sequence[float],
    compiled: bool = False,
) -> Float[Tensor, "samples 3 size size"]:
    """Does what `draws` says to the views of one size, [views · batch, ...] view after view, and normalises them.
    `max_sigma` (pixels) is the bound of `draws.sigma`: it sets the blur's reach, 3 sigma."""
    samples, size = len(images), images.shape[-1]
    radius = min(math.ceil(3 * max_sigma), size - 1)  # there is nothing to reflect beyond
    factors, weights, solarized = program_factors(draws), blur_weights(draws, radius), draws.solarize.ravel()
    host = np.empty((samples, STEPS + 2 * radius + 2), dtype=np.float32)
    host[:, :STEPS], host[:, STEPS:-1], host[:, -1] = factors, weights, solarized
    values = to_device(host, images.device)
    run, every = (_compiled() if compiled else run_program), range(STEPS)
    if images.device.type != "cpu":
        return run(images, values, every, radius, True, mean, std)

    out = torch.empty(images.shape)
    block = min(samples, max(1, BLOCK * torch.get_num_threads() // size**2))
    starts = [*range(0, samples - block, block), samples - block]  # all of one shape: the last two may share samples
    parts = [slice(start, start + block) for start in starts]
    if compiled:
        for part in parts:  # converted here, as inductor's conversion takes four times as long
            out[part] = run(images[part].float(), values[part], every, radius, True, mean, std)
        return out
    taken, reach = factors != UNCHANGED, (weights > NEGLIGIBLE).sum(1) // 2
    order = np.lexsort([solarized, reach, *taken.T])
    for some in (order[part] for part in parts):
        rows, steps = torch.from_numpy(some), np.flatnonzero(taken[some].any(0)).tolist()
        pixels, own = images.index_select(0, rows), values.index_select(0, rows)
        out[rows] = run(pixels, own, steps, int(reach[some].max()), bool(solarized[some].any()), mean, std)
    return out


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(run_program, dynamic=False, fullgraph=True)


def program_factors(draws: Draws) -> Float[ndarray, "samples steps"]:
    """Each sample's factor at each step of PROGRAM: an operation goes to the first step of its kind after the last."""
    factors = np.tile(UNCHANGED, (draws.jitter.size, 1))
    rows = np.flatnonzero(draws.jitter)
    # Rows by `take`, which needs a tenth of the time of an index in brackets.
    steps = _steps_of_orders().take(draws.order.reshape(-1, 4).take(rows, axis=0) @ PLACES, axis=0)
    factors.reshape(-1)[steps + STEPS * rows[:, None]] = draws.factors.reshape(-1, 4).take(rows, axis=0)
    factors[draws.gray.ravel(), -1] = 0
    return factors


@cache
def _steps_of_orders() -> Int[ndarray, "numbers 4"]:
    """[order @ PLACES, operation]: the step of PROGRAM at which it takes place in that order."""
    found = np.zeros((4**4, 4), dtype=np.int64)
    for order in ORDERS.tolist():
        step = -1
        for operation in order:
            step = PROGRAM.index(operation, step + 1)
            found[order @ PLACES, operation] = step
    return found


def blur_weights(draws: Draws, radius: int) -> Float[ndarray, "samples taps"]:
    """Gaussian of 2 · radius + 1 taps as torchvision's; a single 1 in the middle where there is no blur. (PIL's
    GaussianBlur, which the authors use, approximates this Gaussian by three box filters.)"""
    weights = np.zeros((draws.blur.size, 2 * radius + 1))
    weights[:, radius] = 1
    rows = np.flatnonzero(draws.blur)
    sigma = draws.sigma.reshape(-1, 1).take(rows, axis=0)
    half = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    blurred = np.concatenate([half[:, :0:-1], half], axis=1)
    weights[rows] = blurred / blurred.sum(1, keepdims=True)
    return weights


def run_program(
    images: Shaped[Tensor, "samples 3 size size"],
    values: Float[Tensor, "samples values"],
    steps: Sequence[int],
    radius: int,
    solarize: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Tensor, "samples 3 size size"]:
    """Images of 0..255. `values` has a column for each step of PROGRAM, each tap of the blur and solarization."""
    rgb = [channel.float() / 255 for channel in images.unbind(1)]
    for step in steps:
        OPERATIONS[PROGRAM[step]](rgb, values[:, step, None, None])
    middle = (values.shape[1] - 1 + STEPS) // 2
    taps = values[:, middle - radius : middle + radius + 1, None, None].unbind(1)
    rgb = [blur(channel, taps) for channel in rgb] if radius else rgb
    for channel, m, s in zip(rgb, mean, std, strict=True):
        if solarize:
            solarize_(channel, values[:, -1, None, None])
        channel.sub_(m).div_(s)
    return torch.stack(rgb, dim=1)


def luma(rgb: Sequence[Channel]) -> Channel:
    red, green, blue = rgb
    return red.mul(LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def clamp_(channel: Channel) -> Channel:
    return channel.relu_().clamp_(max=1)  # inductor makes twice the instructions of clamp_(0, 1)


def brighten_(rgb: Sequence[Channel], factor: PerSample) -> None:
    for channel in rgb:
        channel.mul_(factor).clamp_(max=1)


def blend_(rgb: Sequence[Channel], factor: PerSample, gray: Float[Tensor, "samples _ _"]) -> None:
    gray = gray * (1 - factor)
    for channel in rgb:
        clamp_(channel.mul_(factor).add_(gray))


def contrast_(rgb: Sequence[Channel], factor: PerSample) -> None:
    blend_(rgb, factor, luma(rgb).mean((1, 2), keepdim=True))


def saturate_(rgb: Sequence[Channel], factor: PerSample) -> None:
    blend_(rgb, factor, luma(rgb))


def shift_hue_(rgb: Sequence[Channel], shift: PerSample) -> None:
    """Turns the hue by `shift` of the full circle. HSV keeps the largest and the smallest channel, so with H in [0, 6)
    the channels are read off three trapezoids of height `chroma`, without a table of sectors."""
    red, green, blue = rgb
    top, bottom = red.maximum(green).maximum(blue), red.minimum(green).minimum(blue)
    chroma = top - bottom
    # Sectors by lerp with a weight of exactly 0 or 1, the remainder by floor: eagerly on a CPU that takes a fraction of
    # the time of torch.where and torch.remainder.
    from_blue = (red - green).add_(chroma, alpha=4)
    from_green = (blue - red).add_(chroma, alpha=2).lerp_(from_blue, (top - green).sign_())
    hue = (green - blue).lerp_(from_green, (top - red).sign_())
    hue.div_(chroma.clamp(min=1e-12).mul_(6)).add_(shift)  # a gray pixel has no hue: 0 / 6e-12
    hue.sub_(hue.floor()).mul_(6)
    shifted = shift.abs().sign()
    for channel, start, sign, centre in zip(rgb, (bottom, top, top), (1, -1, -1), (3, 2, 4), strict=True):
        height = clamp_((hue - centre).abs_().sub_(1))
        channel.lerp_(torch.addcmul(start, chroma, height, value=sign), shifted)


OPERATIONS: list[Callable[..., None]] = [brighten_, contrast_, saturate_, shift_hue_]


def blur(channel: Channel, taps: Sequence[PerSample]) -> Channel:
    """Along the rows, then along the columns, with reflected borders."""
    radius, size = len(taps) // 2, channel.shape[-1]
    for axis in (2, 1):
        before, after = channel.narrow(axis, 1, radius), channel.narrow(axis, size - 1 - radius, radius)
        wide = torch.cat([before.flip(axis), channel, after.flip(axis)], axis)
        channel = wide.narrow(axis, 0, size) * taps[0]
        for offset in range(1, 2 * radius + 1):
            channel.addcmul_(wide.narrow(axis, offset, size), taps[offset])
    return channel


def solarize_(channel: Channel, which: PerSample) -> None:
    bright = torch.ge(channel, SOLARIZE_THRESHOLD, out=torch.empty_like(channel))
    channel.lerp_(1 - channel, bright.mul_(which))
