"""Resized crops of a batch of images at once, on the device on which they lie."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from torch import Tensor

from dino.runtime.transfer import to_device

CHUNK = 2**23  # pixels cut together on the device: some 30 photographs, whose intermediates take about 300 MB


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
    views = boxes.shape[1]
    groups = [(size, len(list(group))) for size, group in groupby(sizes)]
    out = [_empty(pixels, count, len(boxes), size) for size, count in groups]
    for images, index, _, of_images in _chunks(pixels, starts, shapes, boxes.reshape(len(boxes), -1)):
        of_groups = torch.split(of_images.view(-1, views, 5), [count for _, count in groups], dim=1)
        for whole, (size, count), some in zip(out, groups, of_groups, strict=True):
            top, left, height, width, mirrored = some.flatten(0, 1).unbind(1)
            rows = crop_weights(top, height, torch.zeros_like(mirrored), size, images.shape[2])
            columns = crop_weights(left, width, mirrored, size, images.shape[3])
            whole.index_copy_(1, index, _products(images, rows, columns, count))
    return [view for whole in out for view in whole.unbind()]


@torch.no_grad()
def resize_together(
    pixels: UInt8[Tensor, " bytes"],
    starts: Int[ndarray, " batch"],
    shapes: Int[ndarray, "batch 2"],
    resized: Int[ndarray, "batch 2"],
    size: int,
) -> UInt8[Tensor, "batch 3 {size} {size}"]:
    """Each image resized to the (height, width) `resized`, and the central square of `size` pixels of that.

    For a batch on its device, as `cut_together`, which says what `pixels`, `starts` and `shapes` are.
    """
    out = _empty(pixels, 1, len(shapes), size)
    for images, index, own, to in _chunks(pixels, starts, shapes, resized):
        rows = centre_weights(own[:, 0], to[:, 0], size, images.shape[2])
        columns = centre_weights(own[:, 1], to[:, 1], size, images.shape[3])
        out.index_copy_(1, index, _products(images, rows, columns, views=1))
    return out[0]


def _empty(pixels: Tensor, views: int, batch: int, size: int) -> UInt8[Tensor, "{views} {batch} 3 {size} {size}"]:
    return torch.empty(views, batch, 3, size, size, dtype=torch.uint8, device=pixels.device)


Chunk = tuple[
    Float[Tensor, "chunk 3 height width"], Int[Tensor, " chunk"], Int[Tensor, "chunk 2"], Int[Tensor, "chunk more"]
]


def _chunks(
    pixels: UInt8[Tensor, " bytes"],
    starts: Int[ndarray, " batch"],
    shapes: Int[ndarray, "batch 2"],
    more: Int[ndarray, "batch more"],
) -> Iterator[Chunk]:
    """The batch in chunks of similar size: (images padded to one size, their places in the batch, their own sizes,
    their rows of `more`)."""
    order = np.lexsort(shapes.T[::-1])  # by height, then by width
    host = np.concatenate([order[:, None], starts[order, None], shapes[order], more[order]], axis=1)
    table = to_device(host.astype(np.int64), pixels.device)  # all of it in one copy
    for chunk, height, width in _of_similar_size(shapes[order]):
        rows = table[chunk]
        yield _padded(pixels, rows[:, 1:4], height, width), rows[:, 0], rows[:, 2:4], rows[:, 4:]


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


def _products(
    images: Float[Tensor, "batch 3 height width"],
    rows: Float[Tensor, "crops size height"],
    columns: Float[Tensor, "crops size width"],
    views: int,
) -> UInt8[Tensor, "{views} batch 3 size size"]:
    """Crops are in the order of the images, `views` of each."""
    batch, _, height, width = images.shape
    size = rows.shape[1]
    rows, columns = rows.to(images.dtype), columns.to(images.dtype)
    with torch.autocast(images.device.type, enabled=False):
        narrow = columns.view(batch, views * size, width) @ images.flatten(1, 2).mT
        narrow = narrow.round_().clamp_(0, 255)  # as in 8 bits: else its overshoot would reach into the second product
        narrow = narrow.view(batch, views, size * 3, height)
        cropped = rows.view(batch, views, size, height) @ narrow.mT
    pixels = cropped.round_().clamp_(0, 255).to(torch.uint8)
    return pixels.view(batch, views, size, size, 3).permute(1, 0, 4, 2, 3)


def crop_weights(
    start: Int[Tensor, " crops"], length: Int[Tensor, " crops"], mirrored: Int[Tensor, " crops"], size: int, extent: int
) -> Float[Tensor, "crops {size} {extent}"]:
    """Of each of `extent` pixels of a line in each of the `size` pixels that its `length` from `start` on become."""
    to, scale = torch.arange(size, device=start.device) + 0.5, length / size
    centre = torch.where(mirrored[:, None] > 0, size - to, to) * scale[:, None]
    return filter_weights(start, length, centre, scale, extent)


def centre_weights(
    length: Int[Tensor, " images"], to: Int[Tensor, " images"], size: int, extent: int
) -> Float[Tensor, "images {size} {extent}"]:
    """Of each of `extent` pixels of a line in the `size` in the middle of the `to` pixels that its first `length`
    become."""
    scale = length / to
    first = ((to - size) / 2).round()  # as torchvision's center_crop
    centre = (first[:, None] + torch.arange(size, device=to.device) + 0.5) * scale[:, None]
    return filter_weights(torch.zeros_like(length), length, centre, scale, extent)


def filter_weights(
    start: Int[Tensor, " crops"],
    length: Int[Tensor, " crops"],
    centre: Float[Tensor, "crops size"],
    scale: Float[Tensor, " crops"],
    extent: int,
) -> Float[Tensor, "crops size {extent}"]:
    """Of each of `extent` pixels of a line in the pixels around each `centre`, which is counted from `start`: PIL's
    bicubic (a = -1/2), widened by `scale` where that makes smaller, of the `length` pixels from `start` on alone."""
    inside = torch.arange(extent, device=start.device) + 0.5 - start[:, None]
    x = ((inside[:, None, :] - centre[:, :, None]) / scale.clamp(min=1)[:, None, None]).abs_()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    weights = torch.where(((inside > 0) & (inside < length[:, None]))[:, None, :], weights, 0)
    return weights / weights.sum(2, keepdim=True)
