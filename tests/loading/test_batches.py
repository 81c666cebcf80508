import numpy as np
import pytest
import torch

from dino.augmentation import DINOTransform
from dino.loading.batches import Steps
from dino.loading.sampler import Batching, StepSampler, accumulation_for, steps_of
from dino.loading.views import Loading


class Noise:
    """Images that differ from each other, labelled by their index."""

    classes = None

    def __len__(self):
        return 23

    def __getitem__(self, index):
        return torch.from_numpy(np.random.default_rng(index).integers(0, 256, (3, 20, 24), dtype=np.uint8)), index


TRANSFORM = DINOTransform(num_local_views=2, global_size=16, local_size=8)


def views_of(steps):
    return [(step, [[view.clone() for view in part.views] for part in parts]) for step, parts in steps]


def assert_same(left, right):
    assert [step for step, _ in left] == [step for step, _ in right]
    for (_, parts), (_, others) in zip(left, right, strict=True):
        for part, other in zip(parts, others, strict=True):
            for view, expected in zip(part, other, strict=True):
                assert torch.equal(view, expected)


def test_an_epoch_shows_every_image_once_but_for_those_that_fill_no_step():
    keys = [key for batch in StepSampler(23, Batching(3, accumulation=2), start=0, end=6) for key in batch]
    for epoch in (0, 1):
        images = [index for e, index in keys if e == epoch]
        assert len(images) == len(set(images)) == 18
    assert [i for e, i in keys if e == 0] != [i for e, i in keys if e == 1]


def test_the_sampler_goes_on_in_the_middle_of_an_epoch_as_if_never_stopped():
    whole = list(StepSampler(23, Batching(4, seed=5), start=0, end=12))
    for start in range(13):
        assert list(StepSampler(23, Batching(4, seed=5), start=start, end=12)) == whole[start:]


def test_another_seed_is_another_order():
    assert list(StepSampler(23, Batching(4, seed=0), 0, 5)) != list(StepSampler(23, Batching(4, seed=1), 0, 5))


def test_a_step_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match=r"one step takes 32 images \(batch_size 16 x 2 .*the dataset has 23"):
        StepSampler(23, Batching(16, 2), 0, 1)


def test_views_are_the_same_for_any_number_of_workers_and_from_any_start():
    def steps(start, workers):
        return views_of(Steps(Noise(), TRANSFORM, Batching(4, seed=1), start, 8, Loading(num_workers=workers)))

    whole = steps(0, 0)
    assert len(whole) == 8
    assert_same(steps(0, 2), whole)
    assert_same(steps(3, 0), whole[3:])
    assert_same(steps(6, 1), whole[6:])


def test_a_step_in_parts_holds_the_views_of_the_step_whole():
    whole = views_of(Steps(Noise(), TRANSFORM, Batching(8, seed=1)))
    parts = views_of(Steps(Noise(), TRANSFORM, Batching(2, accumulation=4, seed=1)))
    joined = [(step, [[torch.cat(views) for views in zip(*split, strict=True)]]) for step, split in parts]
    assert len(whole) == 2
    for (_, [views]), (_, [expected]) in zip(joined, whole, strict=True):
        for view, other in zip(views, expected, strict=True):
            torch.testing.assert_close(view, other, rtol=0, atol=1e-6)  # blur is one product a batch, of any size


def test_the_loader_draws_nothing_from_the_runs_own_generator():
    before = torch.get_rng_state()
    views_of(Steps(Noise(), TRANSFORM, Batching(4), end=2, loading=Loading(num_workers=1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_accumulation_is_given_or_derived_from_the_effective_batch():
    assert accumulation_for(8, passes=3, effective_batch=None) == 3
    assert accumulation_for(8, passes=3, effective_batch=64) == 8
    assert accumulation_for(8, passes=3, effective_batch=64, world_size=4) == 2
    with pytest.raises(ValueError, match=r"must be a multiple of batch_size x processes = 24 x 1, got 64; 72 would do"):
        accumulation_for(24, 1, 64)


def test_the_steps_of_a_run_are_whole_epochs_unless_max_steps_ends_it():
    assert steps_of(100, 32, 5, None) == (3, 15)
    assert steps_of(100, 32, 5, 7) == (3, 7)
    assert steps_of(100, 32, 5, 700) == (3, 15)
