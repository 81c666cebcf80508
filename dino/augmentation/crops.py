"""The geometric half of the augmentation: where a view is cut out, and cutting it: from one image in a data worker, or
from a batch of images on the device that trains."""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from dino.runtime.transfer import to_device

LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))  # width / height of a crop; RandomResizedCrop's default
CHUNK = 2**23  # pixels cut together on the device: some 30 photographs, whose intermediates take about 300 MB


def crop_box(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) as RandomResizedCrop draws it: area uniform in `scale`, log-uniform ratio; after ten
    draws that do not fit, the largest central crop of an admissible ratio."""
    (smallest, largest), (lowest, highest) = scale, LOG_RATIO
    for _ in range(10):  # `random` needs a third of the time of `uniform`, which is the same numbers
        area = height * width * (smallest + (largest - smallest) * rng.random())
        ratio = math.exp(lowest + (highest - lowest) * rng.random())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    narrowest, widest = map(math.exp, LOG_RATIO)
    w, h = min(width, round(height * widest)), min(height, round(width / narrowest))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image: UInt8[Tensor, "3 _ _"], size: list[int]) -> UInt8[Tensor, "3 _ _"]:
    """Antialiased and bicubic, as the authors' (PIL antialiases always); one number is the shorter side."""
    resized: Tensor = F.resize(image, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return resized


def cut(
    image: UInt8[Tensor, "3 _ _"], boxes: Int[ndarray, "views 5"], sizes: Sequence[int]
) -> list[UInt8[Tensor, "3 _ _"]]:
    """The views of one image. A box is (top, left, height, width, 1 where it is mirrored), a size a view's side."""
    views = []
    for (top, left, height, width, mirrored), size in zip(boxes.tolist(), sizes, strict=True):
        # As `resize`, without torchvision's checks: they would take a third of a small view's time.
        crop = image[None, :, top : top + height, left : left + width]
        view = interpolate(crop, (size, size), mode="bicubic", antialias=True)[0]
        views.append((view.flip(2) if mirrored else view).contiguous())
    return views


@torch.no_grad()
def cut_together(
    pixels: UInt8[Tensor, " bytes"],
    starts: Int[ndarray, " batch"],
    shapes: Int[ndarray, "batch 2"],
    boxes: Int[ndarray, "batch views 5"],
    sizes: Sequence[int],
) -> list[UInt8[Tensor, "batch 3 _ _"]]:
    """`cut` for a batch on its device: each view of all images.

    `pixels` holds images one after another, each [height, width, 3]: image i has the (height, width) `shapes[i]` and
    begins at byte `starts[i]`, a multiple of 3. There may be others between them.

    A resized crop is Rows · image · Columns, with the filter's weights in two matrices: zero outside the crop,
    normalised inside it, mirrored where it is. So any crops of any images are two batched products, for which GPUs are
    made. (A CPU is quicker with `cut`, which leaves out the zeros.) Equal to PIL within one grey level; in float16 a
    pixel in some thousand, at edges from black to white, is two off.
    """
    device, (batch, views) = pixels.device, boxes.shape[:2]
    order = np.lexsort(shapes.T[::-1])  # by height, then by width
    host = np.concatenate([order[:, None], starts[order, None], shapes[order], boxes[order].reshape(batch, -1)], axis=1)
    table = to_device(host.astype(np.int64), device)
    groups = [(size, len(list(group))) for size, group in groupby(sizes)]
    out = [torch.empty(count, batch, 3, size, size, dtype=torch.uint8, device=device) for size, count in groups]
    for chunk, height, width in _of_similar_size(shapes[order]):
        rows = table[chunk]
        padded = _padded(pixels, rows[:, 1:4], height, width)
        of_each = torch.split(rows[:, 4:].view(-1, views, 5), [count for _, count in groups], dim=1)
        for whole, (size, _), some in zip(out, groups, of_each, strict=True):
            whole.index_copy_(1, rows[:, 0], _cut(padded, some, size))
    return [view for whole in out for view in whole.unbind()]


def _of_similar_size(shapes: Int[ndarray, "batch 2"]) -> Iterator[tuple[slice, int, int]]:
    """Chunks of images sorted by height, each with the (height, width) to which its images are padded: within CHUNK
    pixels together; a larger image is a chunk of its own."""
    start = 0
    while start < len(shapes):
        heights, widths = shapes[start:, 0], np.maximum.accumulate(shapes[start:, 1])
        fit = np.arange(1, len(heights) + 1) * heights * widths <= CHUNK
        count = len(fit) if fit.all() else max(1, int(fit.argmin()))
        yield slice(start, start + count), int(heights[count - 1]), int(widths[count - 1])
        start += count


def _padded(
    pixels: UInt8[Tensor, " bytes"], places: Int[Tensor, "batch 3"], height: int, width: int
) -> Float[Tensor, "batch 3 {height} {width}"]:
    """The images at `places`, (start, height, width), by one gather. Beyond its borders an image repeats its last row
    and column, to which no crop gives any weight."""
    start, h, w = places[:, :, None].unbind(1)
    y, x = (torch.arange(extent, device=pixels.device) for extent in (height, width))
    rows, columns = start // 3 + torch.minimum(y, h - 1) * w, torch.minimum(x, w - 1)
    found = pixels.view(-1, 3).index_select(0, (rows[:, :, None] + columns[:, None, :]).flatten())
    # float16 holds every grey level, and a weight to 1/2048 of itself: enough, and the speed of tensor cores.
    dtype = torch.float16 if pixels.is_cuda else torch.float32
    batch = found.view(-1, height, width, 3).permute(0, 3, 1, 2)
    return batch.to(dtype, memory_format=torch.contiguous_format)


def _cut(
    images: Float[Tensor, "batch 3 height width"], boxes: Int[Tensor, "batch views 5"], size: int
) -> UInt8[Tensor, "views batch 3 {size} {size}"]:
    batch, views = boxes.shape[:2]
    height, width = images.shape[2:]
    top, left, h, w, mirrored = boxes.flatten(0, 1).unbind(1)
    rows = filter_weights(top, h, torch.zeros_like(mirrored), size, height).to(images.dtype)
    columns = filter_weights(left, w, mirrored, size, width).to(images.dtype)
    with torch.autocast(images.device.type, enabled=False):
        narrow = columns.view(batch, views * size, width) @ images.flatten(1, 2).mT
        narrow = narrow.round_().clamp_(0, 255)  # as in 8 bits: else its overshoot would reach into the second product
        narrow = narrow.view(batch, views, size * 3, height)
        cropped = rows.view(batch, views, size, height) @ narrow.mT
    pixels = cropped.round_().clamp_(0, 255).to(torch.uint8)
    return pixels.view(batch, views, size, size, 3).permute(1, 0, 4, 2, 3)


def filter_weights(
    start: Int[Tensor, " crops"], length: Int[Tensor, " crops"], mirrored: Int[Tensor, " crops"], size: int, extent: int
) -> Float[Tensor, "crops {size} {extent}"]:
    """Of each of `extent` pixels of a line in each of the `size` pixels that its `length` from `start` on become:
    PIL's bicubic (a = -1/2), widened by length / size where that makes smaller."""
    to, source = (torch.arange(n, device=start.device) + 0.5 for n in (size, extent))
    scale = (length / size)[:, None]
    centre = torch.where(mirrored[:, None] > 0, size - to, to) * scale
    inside = source - start[:, None]
    x = ((inside[:, None, :] - centre[:, :, None]) / scale.clamp(min=1)[:, :, None]).abs_()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    weights = torch.where(((inside > 0) & (inside < length[:, None]))[:, None, :], weights, 0)
    return weights / weights.sum(2, keepdim=True)
