"""DINOTransform against torchvision's own transforms on PIL images (benchmarks/reference.py): as a whole, in where its
views are cut and in what they look like, and one operation at a time on 8-bit images.

Each comparison of two samples is also run on transforms that are wrong on purpose, which it must tell apart.
"""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional
from PIL import Image, ImageFilter
from torchvision.transforms.v2 import functional as F

from benchmarks.reference import ReferenceTransform, photograph
from dino.augmentation import DINOTransform, collate_multi_crop
from dino.augmentation.photometry import blur, brighten_, contrast_, saturate_, shift_hue_, solarize_

DATA = Path(os.environ.get("DINO_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # views stay in [0, 1]


# --- where the views are cut ------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 250, 190
BARE = RAW | {"jitter_probability": 0.0, "gray_probability": 0.0, "blur_probability": (0.0, 0.0, 0.0)}
BARE |= {"solarize_probability": 0.0, "num_local_views": 8, "global_size": 64, "local_size": 48}


def coordinates():
    """An image whose red is x and whose green is y."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))


def lines(values):
    """(start, length, mirrored) of the pieces of 0, 1, 2, ... that were resized to the rows of `values`. A resized ramp
    is a ramp, but for the pixels near its ends, where the filter is cut off."""
    size = values.shape[1]
    inner = np.arange(6, size - 6)
    slope, first = np.polyfit(inner + 0.5, values[:, inner].T + 0.5, 1)
    return np.minimum(first, first + slope * size), abs(slope) * size, slope < 0


def places(views):
    """Where in `coordinates()` the uint8 views [n, 3, size, size] were cut out, in pixels."""
    views = views.numpy().astype(float)
    left, width, mirrored = lines(views[:, 0].mean(1))
    top, height, _ = lines(views[:, 1].mean(2))
    return {"top": top, "left": left, "area": width * height, "ratio": width / height, "mirrored": mirrored}


def drawn(transform, images=400):
    torch.manual_seed(0)
    rng, image = np.random.default_rng(0), coordinates()
    views, _ = collate_multi_crop([(transform.crop(image, rng), 0) for _ in range(images)])
    if views[0].is_floating_point():
        views = [view.mul(255).round() for view in views]
    return {"global": places(torch.cat(views[:2])), "local": places(torch.cat(views[2:]))}


def ks_distance(a, b):
    at = np.sort(np.concatenate([a, b]))
    return np.abs(np.searchsorted(np.sort(a), at, "right") / len(a) - np.searchsorted(np.sort(b), at, "right") / len(b))


def cut_differently(ours, theirs):
    """What is distributed differently, at p = 0.001 each (Kolmogorov-Smirnov; for coins as for lengths)."""
    return {
        f"{kind} {name}"
        for kind in ours
        for name, values in ours[kind].items()
        if ks_distance(values, theirs[kind][name]).max() > 1.95 * np.sqrt(2 / len(values))
    }


@pytest.fixture(scope="module")
def drawn_by_torchvision():
    return drawn(ReferenceTransform(**BARE))


@pytest.mark.parametrize("box", [(0, 0, 250, 190), (31, 17, 90, 75), (100, 110, 33, 40)])
def test_a_view_of_coordinates_tells_where_it_was_cut(box):
    left, top, width, height = box
    for flipped in (False, True):
        view = coordinates().crop((left, top, left + width, top + height)).resize((48, 48), Image.Resampling.BICUBIC)
        view = F.pil_to_tensor(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else view)
        found = {name: value.item() for name, value in places(view[None]).items()}
        assert (found["left"], found["top"]) == pytest.approx((left, top), abs=0.5)
        assert (found["area"], found["ratio"]) == pytest.approx((width * height, width / height), rel=0.02)
        assert found["mirrored"] == flipped


def test_views_are_cut_where_torchvision_cuts_them_and_mirrored_as_often(drawn_by_torchvision):
    assert cut_differently(drawn(DINOTransform(**BARE)), drawn_by_torchvision) == set()


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        ({"global_scale": (0.3, 1.0)}, ["global area"]),
        ({"local_scale": (0.05, 0.3)}, ["local area", "local top"]),
        ({"local_scale": (0.08, 0.4)}, ["local area"]),
        ({"horizontal_flip": 0.4}, ["global mirrored", "local mirrored"]),
    ],
    ids=str,
)
def test_views_cut_wrongly_are_told_apart(wrong, seen, drawn_by_torchvision):
    assert cut_differently(drawn(DINOTransform(**BARE | wrong)), drawn_by_torchvision) >= {*seen}


# --- what the views look like -----------------------------------------------------------------------------------------

SMALL = RAW | {"num_local_views": 4, "global_size": 48, "local_size": 32, "blur_full_size": 1}
UNCUT = SMALL | {"global_scale": (1.0, 1.0), "local_scale": (1.0, 1.0)}  # of a square image: crops add no variance
KINDS = {"first global": slice(0, 1), "second global": slice(1, 2), "local": slice(2, 6)}
LIMIT = 4.0  # standard errors: 96 comparisons exceed it by chance in 0.6 % of all seeds
TRUNCATION = 1.5 / 255  # of a channel's mean: PIL's four jitters each round down, by 0.4 of a grey level on average


def looks(views):
    """{name: a number of each view, or nan where it has none}."""
    views = views.double()
    pixels, light, chroma = views.flatten(2), views.mean(1), (views.amax(1) - views.amin(1)).mean((1, 2))
    red, green, blue = means = pixels.mean(2).T
    centred = pixels - pixels.mean(2, keepdim=True)
    covariance = centred @ centred.mT / pixels.shape[2]
    # Of areas that the blur leaves alone, away from the border, which PIL's repeats and torchvision's reflects.
    contrast = pooled(light[:, 4:-4, 4:-4], 8).flatten(1).std(1)
    gray = chroma < 2 / 255
    return {
        **{f"mean {channel}": mean for channel, mean in zip("RGB", means)},
        "mean R - G": red - green,  # varies with the hue, as the next
        "mean G - B": green - blue,
        **{f"covariance {'RGB'[i]}{'RGB'[j]}": covariance[:, i, j] for i in range(3) for j in range(i, 3)},
        "gradient energy": energy(light),
        "gradient energy, fine to coarse": energy(light) - energy(pooled(light, 2)),
        "contrast to light": contrast / light.mean((1, 2)),
        "chroma to contrast": torch.where(gray, torch.nan, chroma / contrast),
        "gray": gray.double(),
    }


def pooled(light, side):
    return torch.nn.functional.avg_pool2d(light[:, None], side)[:, 0]


def energy(light):
    """Logarithm of the squared gradient's mean; a floor of two grey levels hides what rounding adds to it."""
    return (sum(light.diff(dim=axis).square().mean((1, 2)) for axis in (1, 2)) + (2 / 255) ** 2).log()


def cut(transform, images, each):
    """Of each image, its views stacked over `each` crops. (The reference's are finished.)"""
    torch.manual_seed(0)
    random.seed(0)
    rng = np.random.default_rng(0)
    return [collate_multi_crop([(transform.crop(image, rng), 0) for _ in range(each)])[0] for image in images]


def sample(transform, cut):
    """{kind of view: {name: [image, view]}}."""
    augmented = [transform.augment(views, seed=[number]) for number, views in enumerate(cut)]
    found = {kind: [looks(torch.cat(views[which])) for views in augmented] for kind, which in KINDS.items()}
    return {kind: {name: np.stack([of[name] for of in rows]) for name in rows[0]} for kind, rows in found.items()}


def deviations(ours, theirs):
    """{kind and name: standard errors between the two samples}, of each number's mean and of its variance.

    With a, b an image's n values in the two samples, and images i = 1..I alike in both:
    z = |mean_i(mean a_i - mean b_i)| / sqrt(sum_i (var a_i + var b_i) / n) · I.
    The variance is compared as a mean too, of the squared distance to what a_i and b_i have as their common mean.
    """
    found = {}
    for kind in ours:
        for name, a in ours[kind].items():
            b = theirs[kind][name]
            common = np.nanmean(np.concatenate([a, b], axis=1), axis=1, keepdims=True)
            for what, pair in {"": (a, b), ", variance": ((a - common) ** 2, (b - common) ** 2)}.items():
                (x, y), counts = pair, [np.isfinite(of).sum(1) for of in pair]
                difference = abs((np.nanmean(x, 1) - np.nanmean(y, 1)).mean())
                if name in ("mean R", "mean G", "mean B") and not what:
                    difference = max(0, difference - TRUNCATION)
                error = np.sqrt(sum(np.nanvar(of, 1, ddof=1) / n for of, n in zip(pair, counts)).sum()) / len(a)
                found[f"{kind}: {name}{what}"] = difference / max(error, 1e-9)
    return found


def beyond(found):
    return {name: round(z, 1) for name, z in found.items() if z > LIMIT}


@pytest.fixture(scope="module")
def made_up():
    """Four photographs, each of a colour as photographs are: of sky, skin, grass and bricks."""
    colours = [(90, 140, 210), (220, 170, 130), (100, 150, 60), (170, 80, 60)]
    noise = [photograph(np.random.default_rng(seed), 64, 64) for seed in range(4)]
    return [Image.blend(of, Image.new("RGB", of.size, colour), 0.5) for of, colour in zip(noise, colours)]


@pytest.fixture(scope="module")
def sampled_from_torchvision(made_up):
    reference = ReferenceTransform(**UNCUT)
    return sample(reference, cut(reference, made_up, each=200))


@pytest.fixture(scope="module")
def uncut(made_up):
    return cut(DINOTransform(**UNCUT), made_up, each=200)


@pytest.mark.slow
def test_views_have_the_mean_covariance_and_gradients_of_torchvisions(uncut, sampled_from_torchvision):
    assert beyond(deviations(sample(DINOTransform(**UNCUT), uncut), sampled_from_torchvision)) == {}


def test_views_cut_from_photographs_look_like_torchvisions():
    files = sorted((DATA / "imagenette2-160" / "val").rglob("*.JPEG"))[::900]
    if not files:
        pytest.skip(f"no imagenette2-160 in {DATA}; set DINO_TEST_DATA to its folder")
    photographs = [Image.open(path).convert("RGB").resize((80, 60)) for path in files]
    ours, reference = DINOTransform(**SMALL), ReferenceTransform(**SMALL)
    samples = [sample(by, cut(by, photographs, each=80)) for by in (ours, reference)]
    assert beyond(deviations(*samples)) == {}


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        ({"brightness": 0.3}, "local: mean R, variance"),
        ({"contrast": 0.3}, "local: contrast to light, variance"),
        ({"saturation": 0.1}, "local: chroma to contrast, variance"),
        ({"hue": 0.05}, "local: mean G - B, variance"),
        ({"jitter_probability": 0.65}, "local: mean R, variance"),
        ({"gray_probability": 0.1}, "local: gray"),
        ({"blur_probability": (0.8, 0.1, 0.5)}, "first global: gradient energy, fine to coarse"),
        ({"blur_probability": (1.0, 0.3, 0.5)}, "second global: gradient energy, fine to coarse"),
        ({"blur_probability": (1.0, 0.1, 0.4)}, "local: gradient energy, fine to coarse"),
        ({"blur_sigma": (0.1, 1.5)}, "local: gradient energy"),
        ({"solarize_probability": 0.0}, "second global: chroma to contrast"),
    ],
    ids=str,
)
def test_a_wrong_augmentation_is_told_apart(wrong, seen, uncut, sampled_from_torchvision):
    found = deviations(sample(DINOTransform(**UNCUT | wrong), uncut), sampled_from_torchvision)
    assert found[seen] > LIMIT


# --- one operation, on 8-bit images -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pil(made_up):
    """Noise, which has every colour and every frequency, beside a photograph."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(np.concatenate([noise, np.asarray(made_up[0])], axis=1).repeat(2, axis=0)[:128])


def distance(ours, theirs):
    """Grey levels between [1, 3, H, W] in floats, once rounded, and an 8-bit image."""
    eight_bit = theirs if isinstance(theirs, torch.Tensor) else F.pil_to_tensor(theirs)
    return ((255 * ours[0]).round() - eight_bit).abs()


def channels(pil):
    return [channel[None] for channel in F.pil_to_tensor(pil) / 255]


def by(operation_, pil, value):
    rgb = channels(pil)
    operation_(rgb, torch.full((1, 1, 1), value))
    return torch.stack(rgb, dim=1)


def solarized(pil):
    rgb = channels(pil)
    for channel in rgb:
        solarize_(channel, torch.ones(1, 1, 1))
    return torch.stack(rgb, dim=1)


def blurred(pil, sigma, radius):
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma).square())
    taps = (weights / weights.sum())[:, None, None, None].unbind(0)
    return torch.stack([blur(channel, taps) for channel in channels(pil)], dim=1)


@pytest.mark.parametrize("form", [lambda pil: pil, F.pil_to_tensor], ids=["PIL", "tensor"])
@pytest.mark.parametrize("factor", [0.0, 0.6, 0.8, 1.0, 1.2, 1.4])
@pytest.mark.parametrize(
    ("ours_", "theirs"),
    [(brighten_, F.adjust_brightness), (contrast_, F.adjust_contrast), (saturate_, F.adjust_saturation)],
    ids=["brightness", "contrast", "saturation"],
)
def test_a_blend_is_within_a_grey_level_of_torchvisions_in_8_bits(ours_, theirs, factor, form, pil):
    assert distance(by(ours_, pil, factor), theirs(form(pil), factor)).max() <= 1


@pytest.mark.parametrize("form", [lambda pil: pil, F.pil_to_tensor], ids=["PIL", "tensor"])
def test_gray_and_solarized_images_are_within_a_grey_level_of_torchvisions_in_8_bits(form, pil):
    assert distance(by(saturate_, pil, 0.0), F.rgb_to_grayscale(form(pil), num_output_channels=3)).max() <= 1
    assert distance(solarized(pil), F.solarize(form(pil), 128)).max() == 0


@pytest.mark.parametrize("shift", [-0.1, -0.03, 0.05, 0.07, 0.1])
def test_a_hue_shift_is_within_a_grey_level_of_torchvisions_and_within_pils_own_steps_of_pils(shift, pil):
    """PIL has 256 hues, a step is 6 / 255 of the chroma. One is lost at most where the image is converted, one where
    torchvision makes the shift an integer, and one where the hue passes 255; saturation and value cost 2 levels."""
    ours, pixels = by(shift_hue_, pil, shift), F.pil_to_tensor(pil).float()
    assert distance(ours, F.adjust_hue(F.pil_to_tensor(pil), shift)).max() <= 1
    from_pil = distance(ours, F.adjust_hue(pil, shift))
    assert (from_pil <= 3 * 6 / 255 * (pixels.amax(0) - pixels.amin(0)) + 2).all()
    assert from_pil.mean() < 1.2


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.5, 2.0])
def test_a_blur_is_within_a_grey_level_of_torchvisions_and_as_far_from_pils_as_torchvisions_is(sigma, pil):
    ours = blurred(pil, sigma, radius=6)
    theirs = F.gaussian_blur(F.pil_to_tensor(pil), [13, 13], [sigma, sigma])
    assert distance(ours, theirs).max() <= 1
    by_pil = pil.filter(ImageFilter.GaussianBlur(sigma))
    ours_to_pil, theirs_to_pil = distance(ours, by_pil), distance(theirs[None] / 255, by_pil)
    assert (ours_to_pil - theirs_to_pil).abs().max() <= 1
    inside = ours_to_pil[:, 7:-7, 7:-7]  # PIL repeats the border's pixels, torchvision reflects: up to 40 levels there
    assert inside.max() <= 7 and inside.mean() < 1  # three box filters are not quite a Gaussian
