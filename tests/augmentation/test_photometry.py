"""Each batched operation against torchvision's, one sample at a time, and against PIL's where the authors use PIL."""

import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as F

from dino.augmentation import photometry
from dino.augmentation.photometry import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    ORDERS,
    PROGRAM,
    SATURATION,
    STEPS,
    UNCHANGED,
    Draws,
    augment,
    blur,
    blur_weights,
    brighten_,
    contrast_,
    program_factors,
    run_program,
    saturate_,
    shift_hue_,
    solarize_,
)

ADJUST = {
    BRIGHTNESS: F.adjust_brightness,
    CONTRAST: F.adjust_contrast,
    SATURATION: F.adjust_saturation,
    HUE: F.adjust_hue,
}
AS_THEY_ARE = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def random_images(samples=7, height=11, width=11, seed=0):
    """Colourful, with black, white, gray and two-equal-channels pixels, which are the corner cases of the hue."""
    images = torch.rand(samples, 3, height, width, generator=torch.Generator().manual_seed(seed))
    corners = torch.tensor(
        [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 1, 0], [0.2, 0.7, 0.7], [0.7, 0.2, 0.7], [1, 0, 0]]
    )
    images[:, :, 0, : len(corners)] = corners.T.float()
    return images


def random_pixels(samples=7, size=11, seed=0):
    return (random_images(samples, size, size, seed) * 255).round().to(torch.uint8)


def one_at_a_time(operation, images, values):
    return torch.stack([operation(image, float(value)) for image, value in zip(images, values, strict=True)])


def batched(operation_, images, values):
    rgb = [channel.clone() for channel in images.unbind(1)]
    operation_(rgb, values[:, None, None])
    return torch.stack(rgb, dim=1)


def blurred(images, sigmas, radius):
    what = draws(len(sigmas), blur=np.ones((1, len(sigmas)), dtype=bool), sigma=np.array(sigmas)[None])
    taps = torch.from_numpy(blur_weights(what, radius)).float()[:, :, None, None].unbind(1)
    return torch.stack([blur(channel, taps) for channel in images.unbind(1)], dim=1)


@pytest.mark.parametrize(
    ("ours_", "theirs"),
    [
        (brighten_, F.adjust_brightness),
        (contrast_, F.adjust_contrast),
        (saturate_, F.adjust_saturation),
    ],
)
def test_a_blend_equals_torchvisions_adjustment_of_each_sample(ours_, theirs):
    images, factors = random_images(height=8, width=11), torch.tensor([0.0, 0.3, 0.6, 1.0, 1.2, 1.4, 2.5])
    expected = one_at_a_time(theirs, images, factors)
    torch.testing.assert_close(batched(ours_, images, factors), expected, atol=2e-6, rtol=0)


def test_a_hue_shift_equals_torchvisions_for_each_sample():
    shifts = torch.linspace(-0.5, 0.5, 41)
    images = random_images(samples=41, height=8, width=11)
    expected = one_at_a_time(F.adjust_hue, images, shifts)
    torch.testing.assert_close(batched(shift_hue_, images, shifts), expected, atol=5e-6, rtol=0)


def test_a_third_of_the_circle_turns_red_to_green_and_back_to_blue():
    red = torch.tensor([0.8, 0.1, 0.1]).view(1, 3, 1, 1).repeat(2, 1, 1, 1)
    turned = batched(shift_hue_, red, torch.tensor([1 / 3, -1 / 3])).flatten(1)
    torch.testing.assert_close(turned, torch.tensor([[0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]), atol=1e-6, rtol=0)


def test_a_saturation_of_nothing_is_torchvisions_gray():
    images = random_images(height=8, width=11)
    gray = F.rgb_to_grayscale(images, num_output_channels=3)
    torch.testing.assert_close(batched(saturate_, images, torch.zeros(7)), gray, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("size", "radius"), [(17, 6), (8, 6), (5, 2), (3, 2)])
def test_blur_equals_torchvisions_gaussian_of_each_samples_sigma(size, radius):
    sigmas = [0.1, 0.4, 0.7, 1.0, 1.4, 1.8, 2.0]
    images = torch.rand(7, 3, size, size, generator=torch.Generator().manual_seed(1))
    taps = 2 * radius + 1
    expected = one_at_a_time(lambda image, sigma: F.gaussian_blur(image, [taps, taps], [sigma, sigma]), images, sigmas)
    torch.testing.assert_close(blurred(images, sigmas, radius), expected, atol=2e-6, rtol=0)


def test_blur_reaches_no_further_than_a_view_can_be_reflected():
    both = np.ones((1, 2), dtype=bool)
    for size, widest in ((4, 1.0), (1, 0.1)):
        pixels = random_pixels(2, 8)[:, :, :size, :size]
        what = draws(2, blur=both, sigma=np.array([[0.5, 2.0]]))
        beyond, reached = (augment(pixels, what, max_sigma=s, **AS_THEY_ARE) for s in (2.0, widest))
        assert torch.equal(beyond, reached)
        assert torch.equal(beyond, pixels / 255) == (size == 1)


@pytest.mark.parametrize("sigma", [0.6, 1.0, 1.5, 2.0])
def test_pils_blur_which_the_authors_use_is_closest_to_ours_of_the_same_sigma(sigma):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)  # noise shows every frequency
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    pil = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma))
    pil = torch.from_numpy(np.array(pil)).permute(2, 0, 1) / 255
    ours = blurred(image.expand(3, -1, -1, -1), [0.8 * sigma, sigma, 1.25 * sigma], radius=7)
    inside = slice(7, -7)  # PIL repeats the border pixel, torchvision reflects
    distance = (ours - pil)[:, :, inside, inside].square().mean((1, 2, 3)).sqrt()
    assert distance.argmin() == 1
    assert distance[1] < 0.07 * image.std()  # PIL's is three box filters, rounded to 1/255


def test_solarize_equals_pils_and_torchvisions_at_every_level():
    levels = np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 1, 3))
    image = torch.from_numpy(levels).permute(2, 0, 1)[None].float().div_(255)
    ours, left_alone = image[0].clone(), image[0].clone()
    solarize_(ours, torch.ones(3, 1, 1))
    solarize_(left_alone, torch.zeros(3, 1, 1))
    pil = torch.from_numpy(np.array(ImageOps.solarize(Image.fromarray(levels)))).permute(2, 0, 1) / 255
    torch.testing.assert_close(ours, pil, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours, F.solarize(image[0], 128 / 255), atol=1e-6, rtol=0)
    assert torch.equal(left_alone, image[0])


def draws(samples, **what):
    never = np.zeros((1, samples), dtype=bool)
    rest = {
        "order": np.tile(np.arange(4), (1, samples, 1)),
        "factors": np.ones((1, samples, 4)),
        "sigma": np.ones((1, samples)),
    }
    return Draws(**{"jitter": never, "gray": never, "blur": never, "solarize": never} | rest | what)


def everything_drawn(samples, seed=0):
    rng = np.random.default_rng(seed)
    return Draws(
        **{name: rng.random((1, samples)) < 0.5 for name in ("jitter", "gray", "blur", "solarize")},
        order=ORDERS[rng.integers(24, size=(1, samples))],
        factors=rng.uniform([0.4, 0.4, 0.4, -0.3], [1.6, 1.6, 1.6, 0.3], (1, samples, 4)),
        sigma=rng.uniform(0.1, 2.0, (1, samples)),
    )


def test_the_program_contains_every_order():
    what = draws(24, jitter=np.ones((1, 24), dtype=bool), order=ORDERS[None], factors=np.full((1, 24, 4), 0.5))
    factors = program_factors(what)
    for order, taken in zip(ORDERS, factors != UNCHANGED):
        assert [PROGRAM[step] for step in np.flatnonzero(taken)] == order.tolist()
    assert (factors[:, -1] == 1).all()  # gray's own
    assert (program_factors(draws(2, gray=np.array([[False, True]])))[:, -1] == [1, 0]).all()


def test_jitter_takes_the_four_operations_in_the_order_of_each_sample():
    orders = np.array(list(permutations(range(4))))
    factors = np.random.default_rng(0).uniform([0.4, 0.4, 0.4, -0.3], [1.6, 1.6, 1.6, 0.3], (24, 4))
    pixels = random_pixels(24)
    expected = pixels / 255
    for i in range(24):
        for operation in orders[i]:
            expected[i] = ADJUST[int(operation)](expected[i], float(factors[i, operation]))
    what = draws(24, jitter=np.ones((1, 24), dtype=bool), order=orders[None], factors=factors[None])
    torch.testing.assert_close(augment(pixels, what, max_sigma=2.0, **AS_THEY_ARE), expected, atol=1e-5, rtol=0)
    assert len({expected[i].mean().item() for i in range(24)}) == 24


def test_a_sample_with_nothing_drawn_is_left_alone_to_the_bit():
    pixels, images = random_pixels(4), random_pixels(4) / 255
    some = np.array([[True, False, True, False]])
    what = draws(4, jitter=some, gray=some, blur=some, solarize=some, factors=np.full((1, 4, 4), 0.5))
    out = augment(pixels, what, 2.0, **AS_THEY_ARE)
    assert torch.equal(out[[1, 3]], images[[1, 3]])
    assert not torch.equal(out[0], images[0])
    assert torch.equal(augment(pixels, draws(4), 2.0, **AS_THEY_ARE), images)


def test_the_last_operation_is_torchvisions_normalisation():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    normalised = augment(random_pixels(), draws(7), 2.0, mean, std)
    torch.testing.assert_close(normalised, F.normalize(random_pixels() / 255, list(mean), list(std)), atol=1e-6, rtol=0)


def test_blocks_that_leave_steps_out_give_what_the_whole_program_gives(monkeypatch):
    pixels, what = random_pixels(50), everything_drawn(50)
    values = [program_factors(what), blur_weights(what, 6), what.solarize.reshape(-1, 1)]
    values = torch.from_numpy(np.concatenate(values, axis=1)).float()
    whole = run_program(pixels, values, range(STEPS), 6, True, *AS_THEY_ARE.values())
    for samples in (1, 4, 7, 49, 50):
        monkeypatch.setattr(photometry, "BLOCK", samples * 11 * 11 // torch.get_num_threads())
        blocks = augment(pixels, what, 2.0, **AS_THEY_ARE)
        torch.testing.assert_close(blocks, whole, atol=1e-6, rtol=0)


COMPILED = """
import torch
from torch._dynamo.utils import counters

from dino.augmentation import photometry
from test_photometry import AS_THEY_ARE, everything_drawn, random_pixels

torch.set_num_threads(1)
photometry.BLOCK = 8 * 16 * 16  # three blocks of 8, of which the last two share 4 samples
for step in range(30):
    pixels, draws = random_pixels(20, 16, seed=step), everything_drawn(20, seed=step)
    eager = photometry.augment(pixels, draws, 0.6, **AS_THEY_ARE)  # a short blur, which is the sooner compiled
    compiled = photometry.augment(pixels, draws, 0.6, **AS_THEY_ARE, compiled=True)
    close = (eager - compiled).abs() < 1e-5
    assert close.double().mean() > 0.9999, step  # at solarize's threshold the last bit decides
assert counters["stats"]["unique_graphs"] == 1, counters
"""


@pytest.mark.slow
def test_compiled_it_gives_the_same_and_is_compiled_once_whatever_is_drawn():
    """In a process of its own: the compiler does not see through the checks of shapes that are on in this one."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-W", "error", "-c", COMPILED]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
