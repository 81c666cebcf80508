"""What a device makes of a batch, against PIL, torchvision and what a data worker makes of each image."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from dino.augmentation import EvalTransform, resampling
from dino.augmentation.crops import crop_box, cut
from dino.augmentation.resampling import crop_weights, cut_together


def photo(height, width, seed=0):
    """Bright and dark areas with sharp edges and noise: where bicubic weights overshoot, and 8 bits end."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice([0, 40, 128, 215, 255], size=(height // 8 + 1, width // 8 + 1, 3))
    pixels = coarse.repeat(8, 0).repeat(8, 1)[:height, :width] + rng.normal(0, 12, (height, width, 3))
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)


SIZES = [48, 48, 20, 20, 20]


def batch(count=12, seed=0):
    rng = np.random.default_rng(seed)
    images = [photo(int(h), int(w), i) for i, (h, w) in enumerate(rng.integers(9, 150, (count, 2)))]
    boxes = [
        [
            (*crop_box(*image.shape[1:], (0.4, 1.0) if size == 48 else (0.05, 0.4), rng), rng.random() < 0.5)
            for size in SIZES
        ]
        for image in images
    ]
    return images, np.array(boxes)


def joined(images):
    """As `cut_together` takes images: (pixels, starts, shapes); the first begins behind another one."""
    pixels = torch.cat([torch.full((12,), 255, dtype=torch.uint8), *(i.permute(1, 2, 0).flatten() for i in images)])
    sizes = [image.numel() for image in images]
    return pixels, 12 + np.cumsum([0, *sizes[:-1]]), np.array([image.shape[1:] for image in images])


def by_pil(image, top, left, height, width, mirrored, size):
    """Columns first, then rows, each rounded to 8 bits: two resizes of PIL, one a direction."""
    crop = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((left, top, left + width, top + height))
    narrow = crop.resize((size, height), Image.Resampling.BICUBIC)
    view = torch.from_numpy(np.array(narrow.resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    return view.flip(2) if mirrored else view


def test_a_batch_cut_on_the_device_is_pils_resized_crops_within_one_grey_level():
    images, boxes = batch()
    for number, view in enumerate(cut_together(*joined(images), boxes, SIZES)):
        assert view.shape == (12, 3, SIZES[number], SIZES[number]) and view.dtype == torch.uint8
        expected = torch.stack(
            [by_pil(image, *box, SIZES[number]) for image, box in zip(images, boxes[:, number].tolist())]
        )
        off = (view.int() - expected.int()).abs()
        assert off.max() <= 1 and (off > 0).float().mean() < 0.01


def test_half_precision_as_on_a_gpu_holds_the_grey_levels(monkeypatch):
    images, boxes = batch()
    exact = cut_together(*joined(images), boxes, SIZES)
    in_float32 = resampling._padded
    monkeypatch.setattr(resampling, "_padded", lambda *given: in_float32(*given).half())
    for view, expected in zip(cut_together(*joined(images), boxes, SIZES), exact):
        off = (view.int() - expected.int()).abs()
        assert off.max() <= 2 and (off > 1).float().mean() < 1e-3 and (off > 0).float().mean() < 0.1


def test_the_worker_and_the_device_cut_the_same_views():
    images, boxes = batch()
    one_by_one = [torch.stack(views) for views in zip(*map(lambda i, b: cut(i, b, SIZES), images, boxes))]
    for view, expected in zip(cut_together(*joined(images), boxes, SIZES), one_by_one):
        off = (view.int() - expected.int()).abs()  # torchvision's weights are of 16 bits, and rounded twice
        assert off.max() <= 2 and (off > 1).float().mean() < 1e-3 and (off > 0).float().mean() < 0.05


def test_images_of_any_size_are_cut_in_chunks_and_come_back_in_their_order(monkeypatch):
    images, boxes = batch()
    together = cut_together(*joined(images), boxes, SIZES)
    monkeypatch.setattr(resampling, "CHUNK", 100 * 100)  # the largest images are chunks of their own
    shapes = np.array(sorted(tuple(image.shape[1:]) for image in images))
    chunks = list(resampling._of_similar_size(shapes))
    assert len(chunks) > 3 and [i for chunk, _, _ in chunks for i in range(12)[chunk]] == list(range(12))
    for chunk, height, width in chunks:
        assert (height, width) == tuple(shapes[chunk].max(0))
        assert len(shapes[chunk]) == 1 or len(shapes[chunk]) * height * width <= 100 * 100
    for view, expected in zip(cut_together(*joined(images), boxes, SIZES), together):
        assert torch.equal(view, expected)


class Operations(TorchDispatchMode):
    """Counts them: each is a launch on a GPU, or a view."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_more_images_take_no_more_operations():
    counts = []
    for count in (2, 50):
        images, boxes = batch(count)
        given = joined(images)
        with Operations() as operations:
            cut_together(*given, boxes, SIZES)
        counts.append(operations.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("size", [32, 45])
def test_a_batch_is_prepared_for_evaluation_as_each_image_is(size, monkeypatch):
    images = [*batch()[0], photo(size, size), photo(size, 90), photo(90, size)]
    monkeypatch.setattr(resampling, "CHUNK", 3 * 150 * 150)
    transform = EvalTransform(size)
    together = transform.of_batch(*joined(images))
    off = (together.int() - torch.stack([*map(transform, images)]).int()).abs()
    assert off.max() <= 2 and (off > 1).float().mean() < 1e-3 and (off > 0).float().mean() < 0.05
    assert torch.equal(together[12], images[12])  # which has the right size already


def test_each_pixel_of_a_crop_is_a_weighted_mean_of_the_crop_alone():
    start, length = torch.tensor([3, 0, 90]), torch.tensor([7, 100, 1])
    weights = crop_weights(start, length, torch.tensor([0, 1, 0]), size=16, extent=100)
    torch.testing.assert_close(weights.sum(2), torch.ones(3, 16))
    for crop, (first, count) in enumerate(zip(start.tolist(), length.tolist())):
        outside = torch.ones(100, dtype=torch.bool)
        outside[first : first + count] = False
        assert not weights[crop][:, outside].any()
    assert weights[1, 0].argmax() > 90 and weights[1, -1].argmax() < 10  # mirrored


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_cuts_what_the_cpu_cuts():
    images, boxes = batch()
    pixels, *places = joined(images)
    on_cuda = cut_together(pixels.cuda(), *places, boxes, SIZES)
    for view, expected in zip(on_cuda, cut_together(*joined(images), boxes, SIZES)):
        assert (view.cpu().int() - expected.int()).abs().max() <= 1
