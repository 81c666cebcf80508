import copy
import inspect
import math
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from dino.augmentation import DINOTransform, EvalTransform, collate_multi_crop
from dino.augmentation.crops import crop_box

YAML = Path(__file__).parents[2] / "conf" / "augmentation" / "dino.yaml"
ADJUST = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]


def small(**changes):
    return DINOTransform(**{"num_local_views": 3, "global_size": 24, "local_size": 12} | changes)


def photo(height=40, width=56, seed=0):
    """Smooth with noise, in colour: unlike pure noise, it shows where it was cut."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    smooth = np.stack([np.sin(7 * x), np.cos(5 * y), np.sin(4 * (x + y))], axis=2) * 100 + 127
    return Image.fromarray(
        (smooth + np.random.default_rng(seed).uniform(-20, 20, smooth.shape)).clip(0, 255).astype(np.uint8)
    )


def stacked_views(transform, batch, seed=0):
    crops = [transform.crop(photo(seed=i), np.random.default_rng([seed, i])) for i in range(batch)]
    return [torch.stack(view) for view in zip(*crops, strict=True)]


# --- geometry ---------------------------------------------------------------------------------------------------------


def test_views_are_two_global_then_the_local_ones():
    transform = small()
    views = transform(photo())
    assert [tuple(view.shape) for view in views] == [(3, 24, 24)] * 2 + [(3, 12, 12)] * 3
    assert all(view.dtype == torch.float32 for view in views)
    assert (transform.n_global_crops, transform.ncrops) == (2, 5)
    assert DINOTransform().ncrops == 8
    assert len(small(num_local_views=0)(photo())) == 2


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (50, 1), (3, 3), (2, 90)])
def test_tiny_and_one_pixel_wide_images_are_cut_into_full_views(height, width):
    transform = small()
    for image in (photo(height, width), F.pil_to_tensor(photo(height, width))):
        assert [view.shape[1] for view in transform.crop(image)] == [24, 24, 12, 12, 12]
        assert all(view.isfinite().all() for view in transform(image))


def test_a_view_is_torchvisions_resized_crop_of_the_box_that_was_drawn():
    transform, image = small(horizontal_flip=0.0), photo()
    rng = np.random.default_rng(3)
    for number, view in enumerate(transform.crop(image, np.random.default_rng(3))):
        is_global = number < 2
        top, left, height, width = crop_box(40, 56, (0.4, 1.0) if is_global else (0.05, 0.4), rng)
        rng.random()  # the flip
        side = 24 if is_global else 12
        expected = F.resized_crop(
            F.pil_to_tensor(image), top, left, height, width, [side, side], InterpolationMode.BICUBIC
        )
        assert torch.equal(view, expected)
        assert view.dtype == torch.uint8 and view.is_contiguous()
        by_pil = image.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BICUBIC)
        assert (view.int() - F.pil_to_tensor(by_pil).int()).abs().max() <= 2  # another implementation's rounding


def test_flips_are_mirror_images_at_the_given_rate():
    plain, mirrored, half = small(horizontal_flip=0.0), small(horizontal_flip=1.0), small(horizontal_flip=0.5)
    flipped = 0
    for seed in range(100):
        views = [t.crop(photo(), np.random.default_rng(seed)) for t in (plain, mirrored, half)]
        assert torch.equal(views[1][0], views[0][0].flip(2))
        flipped += torch.equal(views[2][0], views[1][0])
    assert 35 <= flipped <= 65  # 3 standard deviations


def test_a_pil_image_and_its_tensor_give_the_same_views_and_gray_images_are_taken_as_rgb():
    transform, image = small(), photo()
    for form in (F.pil_to_tensor(image), F.pil_to_tensor(image).contiguous()):
        for a, b in zip(
            transform.crop(image, np.random.default_rng(5)), transform.crop(form, np.random.default_rng(5)), strict=True
        ):
            assert torch.equal(a, b)
    gray = transform.crop(image.convert("L"), np.random.default_rng(5))[0]
    assert torch.equal(gray[0], gray[2])


def test_crops_are_a_function_of_the_generator_alone():
    transform = small()
    state = torch.get_rng_state()
    first = transform.crop(photo(), np.random.default_rng([1, 2]))
    assert torch.equal(torch.get_rng_state(), state)
    again = transform.crop(photo(), np.random.default_rng([1, 2]))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = transform.crop(photo(), np.random.default_rng([1, 3]))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])


def test_an_image_that_is_no_uint8_rgb_is_refused():
    for wrong in (torch.rand(3, 8, 8), torch.zeros(8, 8, 3, dtype=torch.uint8), torch.zeros(3, 8, dtype=torch.uint8)):
        with pytest.raises(TypeError, match=r"must be a PIL image or a uint8 tensor \[3, H, W\], got torch"):
            small().crop(wrong)


# --- photometry -------------------------------------------------------------------------------------------------------


def by_torchvision(view, draws, number, sample, mean, std):
    """One sample of one view, one operation at a time."""
    image = view.float() / 255
    if draws.jitter[number, sample]:
        for operation in draws.order[number, sample]:
            image = ADJUST[operation](image, float(draws.factors[number, sample, operation]))
    if draws.gray[number, sample]:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if draws.blur[number, sample]:
        sigma = float(draws.sigma[number, sample])
        reach = math.ceil(3 * 2.0 * min(1, view.shape[-1] / 96))
        image = F.gaussian_blur(image, [2 * reach + 1] * 2, [sigma, sigma])
    if draws.solarize[number, sample]:
        image = F.solarize(image, 128 / 255)
    return F.normalize(image, list(mean), list(std))


def test_augmented_views_equal_torchvisions_operations_one_at_a_time():
    transform = small(
        global_size=96, local_size=48, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25), solarize_probability=0.5
    )
    views = stacked_views(transform, 24)
    parts = transform.draw(24, seed=[7, 8])
    for flag in ("jitter", "gray", "blur", "solarize"):
        assert any(getattr(part, flag).any() for part in parts), flag
    for number, augmented in enumerate(transform.augment(views, seed=[7, 8])):
        part, at = (parts[0], number) if number < 2 else (parts[1], number - 2)
        expected = torch.stack(
            [by_torchvision(views[number][i], part, at, i, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)) for i in range(24)]
        )
        # A value within rounding of the solarize threshold might differ by more: none does here.
        torch.testing.assert_close(augmented, expected, atol=1e-4, rtol=0)


def test_a_batch_in_parts_gets_what_the_batch_whole_gets():
    transform = small()
    views = stacked_views(transform, 12)
    whole = transform.augment(views, seed=[3, 1])
    parts = [transform.augment([v[a:b] for v in views], seed=[3, 1], start=a) for a, b in pairwise([0, 5, 6, 12])]
    for view, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(pieces), view, atol=1e-6, rtol=0)


def test_draws_are_a_function_of_seed_and_position_alone():
    transform = small()
    views = stacked_views(transform, 4)
    torch.manual_seed(0)
    first = transform.augment(views, seed=[0, 1])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = transform.augment(views, seed=[0, 1])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], transform.augment(views, seed=[0, 2])[0])
    assert not torch.equal(first[0], transform.augment(views, seed=[0, 1], start=1)[0])
    same = [views[0][:1].expand(4, -1, -1, -1)] * 2 + [views[2][:1].expand(4, -1, -1, -1)] * 3
    globals_, *_, local_a, local_b = transform.augment(same, seed=[0, 1])
    assert not torch.equal(globals_[0], globals_[1])  # samples draw for themselves,
    assert not torch.equal(local_a, local_b)  # and views


def test_without_a_seed_torchs_generator_decides():
    transform = small()
    runs = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        runs.append(transform(photo()))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][0], runs[2][0])


def test_draws_have_the_papers_rates_and_ranges():
    globals_, locals_ = DINOTransform().draw(20_000, seed=[0])
    rates = {
        "jitter": ([0.8, 0.8], 0.8),
        "gray": ([0.2, 0.2], 0.2),
        "blur": ([1.0, 0.1], 0.5),
        "solarize": ([0.0, 0.2], 0.0),
    }
    for name, (of_globals, of_locals) in rates.items():
        assert getattr(globals_, name).mean(1) == pytest.approx(of_globals, abs=0.012), name
        assert getattr(locals_, name).mean(1) == pytest.approx([of_locals] * 6, abs=0.012), name
    for part in (globals_, locals_):
        # a uniform distribution is known by its ends and its standard deviation
        low, high = np.array([0.6, 0.6, 0.8, -0.1]), np.array([1.4, 1.4, 1.2, 0.1])
        factors = part.factors.reshape(-1, 4)
        assert (factors.min(0) >= low).all() and factors.min(0) == pytest.approx(low, abs=1e-3)
        assert (factors.max(0) <= high).all() and factors.max(0) == pytest.approx(high, abs=1e-3)
        assert factors.std(0) == pytest.approx((high - low) / math.sqrt(12), rel=0.02)
        assert (part.sigma.min(), part.sigma.max()) == pytest.approx((0.1, 2.0), abs=1e-3)
        assert part.sigma.std() == pytest.approx(1.9 / math.sqrt(12), rel=0.02)
        orders, counts = np.unique(part.order.reshape(-1, 4), axis=0, return_counts=True)
        assert len(orders) == 24 and counts.std() / counts.mean() < 0.06
        flags = np.stack(
            [part.jitter[-1], part.gray[-1], part.factors[-1, :, 0], part.sigma[-1], part.factors[-1, :, 3]]
        )
        assert np.abs(np.corrcoef(flags) - np.eye(5)).max() < 0.03  # independent of one another


def test_factors_never_fall_below_zero():
    factors = small(brightness=3.0).draw(500, seed=[0])[0].factors[..., 0]
    assert factors.min() >= 0 and factors.max() > 3.9


def test_small_views_are_blurred_in_proportion_to_their_side():
    at_full_size = DINOTransform(global_size=224, local_size=96).draw(50, seed=[0])
    smaller = DINOTransform(global_size=48, local_size=24).draw(50, seed=[0])
    unscaled = DINOTransform(global_size=48, local_size=24, blur_full_size=1).draw(50, seed=[0])
    for part, factor in enumerate((0.5, 0.25)):
        np.testing.assert_allclose(smaller[part].sigma, at_full_size[part].sigma * factor)
        np.testing.assert_array_equal(unscaled[part].sigma, at_full_size[part].sigma)


def test_autocast_around_it_costs_no_precision():
    transform = small()
    views = stacked_views(transform, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = transform.augment(views, seed=[0])
    for a, b in zip(inside, transform.augment(views, seed=[0]), strict=True):
        assert torch.equal(a, b)


def test_the_views_given_are_not_changed():
    transform = small()
    views = stacked_views(transform, 4)
    before = copy.deepcopy(views)
    transform.augment(views, seed=[0])
    assert all(torch.equal(a, b) for a, b in zip(views, before, strict=True))


def test_augment_refuses_a_wrong_number_of_views():
    views = stacked_views(small(), 2)
    with pytest.raises(ValueError, match=r"expected 5 views \(2 global, then 3 local\), got 4"):
        small().augment(views[:-1])


def test_a_single_image_is_cropped_and_then_augmented():
    transform = small()
    torch.manual_seed(11)
    whole = transform(photo())
    torch.manual_seed(11)
    halves = transform.augment([view[None] for view in transform.crop(photo())])
    assert all(torch.equal(a, b[0]) for a, b in zip(whole, halves, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_gives_what_the_cpu_gives():
    transform = small(global_size=96, local_size=48, solarize_probability=0.0)  # solarizing would magnify the last bit
    views = stacked_views(transform, 16)
    on_cuda = transform.augment([view.cuda() for view in views], seed=[2])
    for a, b in zip(on_cuda, transform.augment(views, seed=[2]), strict=True):
        assert a.is_cuda
        torch.testing.assert_close(a.cpu(), b, atol=1e-4, rtol=0)


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_collate_stacks_each_view_over_the_batch():
    transform = small()
    samples = [(transform.crop(photo(seed=i)), label) for i, label in enumerate([3, 0, -1, 7])]
    views, labels = collate_multi_crop(samples)
    assert [tuple(view.shape) for view in views] == [(4, 3, 24, 24)] * 2 + [(4, 3, 12, 12)] * 3
    assert torch.equal(views[3][2], samples[2][0][3])
    assert labels.dtype == torch.int64 and labels.tolist() == [3, 0, -1, 7]


def test_the_transform_pickles_for_the_workers():
    transform = small()
    transform(photo())
    again = pickle.loads(pickle.dumps(transform))
    views = stacked_views(transform, 2)
    assert torch.equal(again.augment(views, seed=[1])[0], transform.augment(views, seed=[1])[0])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_local_views": -1}, "num_local_views must be 0 or more, got -1"),
        ({"global_size": 0}, "global_size must be 1 pixel or more, got 0"),
        ({"local_size": -3}, "local_size must be 1 pixel or more, got -3"),
        ({"blur_full_size": 0}, "blur_full_size must be 1 pixel or more, got 0"),
        (
            {"global_scale": (0.0, 1.0)},
            r"global_scale must be two rising fractions of the area in \(0, 1\], got \(0.0, 1.0\)",
        ),
        ({"local_scale": (0.4, 0.05)}, "local_scale must be two rising fractions"),
        ({"local_scale": (0.4, 1.5)}, "local_scale must be two rising fractions"),
        ({"global_scale": (math.nan, 1.0)}, "global_scale must be two rising fractions"),
        ({"horizontal_flip": 1.5}, r"horizontal_flip must be a probability in \[0, 1\], got 1.5"),
        ({"jitter_probability": -0.1}, "jitter_probability must be a probability"),
        ({"gray_probability": 2.0}, "gray_probability must be a probability"),
        ({"solarize_probability": math.nan}, "solarize_probability must be a probability"),
        ({"blur_probability": (1.0, 0.1, 1.1)}, r"blur_probability must be a probability in \[0, 1\], got 1.1"),
        ({"brightness": -0.1}, "brightness must be 0 or more, got -0.1"),
        ({"contrast": math.inf}, "contrast must be 0 or more, got inf"),
        ({"saturation": -1.0}, "saturation must be 0 or more"),
        ({"hue": 0.6}, r"hue must be a fraction of the colour circle in \[0, 0.5\], got 0.6"),
        ({"blur_sigma": (0.0, 2.0)}, "blur_sigma must be two rising numbers above 0"),
        ({"std": (0.2, 0.0, 0.2)}, "std must be above 0 in every channel"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name(changes, sentence):
    with pytest.raises(ValueError, match=f"DINOTransform: {sentence}.*Change augmentation."):
        small(**changes)


def test_eval_images_are_resized_and_cropped_as_torchvision_does():
    transform = EvalTransform(28)
    for image in (photo(40, 56), photo(90, 33), photo(5, 7)):
        resized = F.resize(F.pil_to_tensor(image), [32], InterpolationMode.BICUBIC, antialias=True)
        view = transform(image)
        assert torch.equal(view, F.center_crop(resized, [28, 28]))
        assert view.dtype == torch.uint8
    assert transform(photo(1, 60)).shape == (3, 28, 28)


def test_an_eval_image_of_the_right_size_is_returned_as_it_is():
    image = photo(28, 28)
    assert torch.equal(EvalTransform(28)(image), F.pil_to_tensor(image))
    assert not torch.equal(EvalTransform(28)(photo(28, 30)), F.pil_to_tensor(photo(28, 30))[:, :, 1:-1])


def test_eval_images_are_normalised_as_the_views_are():
    batch = torch.stack([F.pil_to_tensor(photo(28, 28, seed=i)) for i in range(3)])
    normalised = EvalTransform(28, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)).normalise(batch)
    torch.testing.assert_close(normalised, F.normalize(batch / 255, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    with pytest.raises(ValueError, match="EvalTransform: size must be 1 pixel or more, got 0"):
        EvalTransform(0)


def test_the_yaml_names_every_argument_and_gives_the_default_except_for_what_the_dataset_decides():
    dataset = {"global_size": 32, "local_size": 16, "global_scale": [0.5, 1.0], "local_scale": [0.1, 0.5]}
    dataset["num_local_views"] = 3
    loaded = OmegaConf.create({"dataset": dataset, "augmentation": OmegaConf.load(YAML)})
    values = OmegaConf.to_container(loaded, resolve=True)["augmentation"]
    assert values.pop("_target_") == "dino.augmentation.DINOTransform"
    parameters = inspect.signature(DINOTransform).parameters
    assert values.keys() == parameters.keys()
    for name, parameter in parameters.items():
        expected = dataset.get(name, parameter.default)
        assert values[name] == (list(expected) if isinstance(expected, tuple) else expected), name
