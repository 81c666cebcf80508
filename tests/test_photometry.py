"""Each batched operation against torchvision's, one sample at a time, and against PIL's where the authors use PIL."""

from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as F

from dino.photometry import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    Draws,
    augment_,
    blend_,
    blur,
    gray_,
    shift_hue_,
    solarize_,
)

ADJUST = {
    BRIGHTNESS: F.adjust_brightness,
    CONTRAST: F.adjust_contrast,
    SATURATION: F.adjust_saturation,
    HUE: F.adjust_hue,
}


def random_images(samples=7, height=11, width=11, seed=0):
    """Colourful, with black, white, gray and two-equal-channels pixels, which are the corner cases of the hue."""
    images = torch.rand(samples, 3, height, width, generator=torch.Generator().manual_seed(seed))
    corners = torch.tensor(
        [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 1, 0], [0.2, 0.7, 0.7], [0.7, 0.2, 0.7], [1, 0, 0]]
    )
    images[:, :, 0, : len(corners)] = corners.T.float()
    return images


def one_at_a_time(operation, images, values):
    return torch.stack([operation(image, float(value)) for image, value in zip(images, values, strict=True)])


@pytest.mark.parametrize(
    ("operation", "coefficients"),
    [
        (F.adjust_brightness, lambda f: (f, 0 * f, 0 * f)),
        (F.adjust_contrast, lambda f: (f, 0 * f, 1 - f)),
        (F.adjust_saturation, lambda f: (f, 1 - f, 0 * f)),
    ],
)
def test_a_blend_equals_torchvisions_adjustment_of_each_sample(operation, coefficients):
    images, factors = random_images(height=8, width=11), torch.tensor([0.0, 0.3, 0.6, 1.0, 1.2, 1.4, 2.5])
    expected = one_at_a_time(operation, images, factors)
    torch.testing.assert_close(blend_(images.clone(), *coefficients(factors)), expected, atol=2e-6, rtol=0)


def test_a_hue_shift_equals_torchvisions_for_each_sample():
    shifts = torch.linspace(-0.5, 0.5, 41)
    images = random_images(samples=41, height=8, width=11)
    expected = one_at_a_time(F.adjust_hue, images, shifts)
    torch.testing.assert_close(shift_hue_(images.clone(), shifts), expected, atol=5e-6, rtol=0)


def test_a_third_of_the_circle_turns_red_to_green_and_back_to_blue():
    red = torch.tensor([0.8, 0.1, 0.1]).view(1, 3, 1, 1).repeat(2, 1, 1, 1)
    turned = shift_hue_(red, torch.tensor([1 / 3, -1 / 3])).flatten(1)
    torch.testing.assert_close(turned, torch.tensor([[0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]), atol=1e-6, rtol=0)


def test_gray_equals_torchvisions():
    images = random_images(height=8, width=11)
    torch.testing.assert_close(
        gray_(images.clone()), F.rgb_to_grayscale(images, num_output_channels=3), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(("size", "radius"), [(17, 6), (8, 6), (5, 2), (3, 2)])
def test_blur_equals_torchvisions_gaussian_of_each_samples_sigma(size, radius):
    sigmas = torch.tensor([0.1, 0.4, 0.7, 1.0, 1.4, 1.8, 2.0])
    images = torch.rand(7, 3, size, size, generator=torch.Generator().manual_seed(1))
    taps = 2 * radius + 1
    expected = one_at_a_time(lambda image, sigma: F.gaussian_blur(image, [taps, taps], [sigma, sigma]), images, sigmas)
    torch.testing.assert_close(blur(images, sigmas, radius), expected, atol=2e-6, rtol=0)


def test_blur_reaches_no_further_than_a_view_can_be_reflected():
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.5, 2.0])
    assert torch.equal(blur(images, sigma, radius=6), blur(images, sigma, radius=3))
    pixel = torch.rand(2, 3, 1, 1)
    assert torch.equal(blur(pixel, sigma, radius=6), pixel)


@pytest.mark.parametrize("sigma", [0.6, 1.0, 1.5, 2.0])
def test_pils_blur_which_the_authors_use_is_closest_to_ours_of_the_same_sigma(sigma):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)  # noise shows every frequency
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    pil = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma))
    pil = torch.from_numpy(np.array(pil)).permute(2, 0, 1) / 255
    candidates = sigma * torch.tensor([0.8, 1.0, 1.25])
    ours = blur(image.expand(3, -1, -1, -1), candidates, radius=7)
    inside = slice(7, -7)  # PIL repeats the border pixel, torchvision reflects
    distance = (ours - pil)[:, :, inside, inside].square().mean((1, 2, 3)).sqrt()
    assert distance.argmin() == 1
    assert distance[1] < 0.07 * image.std()  # PIL's is three box filters, rounded to 1/255


def test_solarize_equals_pils_and_torchvisions_at_every_level():
    levels = np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 1, 3))
    image = torch.from_numpy(levels).permute(2, 0, 1)[None].float().div_(255)
    ours = solarize_(image.clone())
    pil = torch.from_numpy(np.array(ImageOps.solarize(Image.fromarray(levels)))).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(ours, pil, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours, F.solarize(image, 128 / 255), atol=1e-6, rtol=0)


def draws(samples, **what):
    never = np.zeros((1, samples), dtype=bool)
    rest = {
        "order": np.tile(np.arange(4), (1, samples, 1)),
        "factors": np.ones((1, samples, 4)),
        "sigma": np.ones((1, samples)),
    }
    return Draws(**{"jitter": never, "gray": never, "blur": never, "solarize": never} | rest | what)


def test_jitter_takes_the_four_operations_in_the_order_of_each_sample():
    orders = np.array(list(permutations(range(4))))
    factors = np.random.default_rng(0).uniform([0.4, 0.4, 0.4, -0.3], [1.6, 1.6, 1.6, 0.3], (24, 4))
    images = random_images(24)
    expected = images.clone()
    for i in range(24):
        for operation in orders[i]:
            expected[i] = ADJUST[int(operation)](expected[i], float(factors[i, operation]))
    what = draws(24, jitter=np.ones((1, 24), dtype=bool), order=orders[None], factors=factors[None])
    torch.testing.assert_close(augment_(images, what, max_sigma=2.0), expected, atol=1e-5, rtol=0)
    assert len({expected[i].mean().item() for i in range(24)}) == 24


def test_a_sample_with_nothing_drawn_is_left_alone_to_the_bit():
    images = random_images(4)
    some = np.array([[True, False, True, False]])
    out = augment_(
        images.clone(), draws(4, jitter=some, gray=some, blur=some, solarize=some, factors=np.full((1, 4, 4), 0.5)), 2.0
    )
    assert torch.equal(out[[1, 3]], images[[1, 3]])
    assert not torch.equal(out[0], images[0])
    assert torch.equal(augment_(images.clone(), draws(4), 2.0), images)
