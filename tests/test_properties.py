"""What holds for every input: of the loss, the schedules and the order of images."""

from itertools import pairwise

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dino.loading.sampler import Batching, StepSampler
from dino.loss.dino import DinoLoss
from dino.scheduler import Schedule, cosine, cosine_warmup, linear

# ---- the loss -------------------------------------------------------------------------------------------------------


@st.composite
def logits(draw):
    """(loss with a center, student [views, images, K], teacher [globals, images, K]), in fp64."""
    globals_ = draw(st.integers(1, 2))
    views, images, k = draw(st.integers(2, 5)), draw(st.integers(1, 4)), draw(st.integers(2, 6))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.floats(0.01, 5))
    loss = DinoLoss(k, ncrops=views, n_global_crops=globals_).double()
    loss.center.copy_(torch.randn(1, k, generator=random))
    student = torch.randn(views, images, k, generator=random, dtype=torch.float64) * scale
    teacher = torch.randn(globals_, images, k, generator=random, dtype=torch.float64) * scale
    return loss, student, teacher


def value(loss, student, teacher):
    return loss(student.flatten(0, 1), teacher.flatten(0, 1), teacher_temp=0.05, move_center=False)


def assert_equal(left, right):
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@given(logits(), st.floats(-50, 50))
def test_a_constant_added_to_all_logits_of_an_image_changes_no_loss(case, constant):
    loss, student, teacher = case
    shift = constant * torch.arange(1.0, student.shape[1] + 1)[:, None]  # another for each image
    assert_equal(value(loss, student + shift, teacher), value(loss, student, teacher))
    assert_equal(value(loss, student, teacher - shift), value(loss, student, teacher))


@given(logits(), st.randoms(use_true_random=False))
def test_the_order_of_images_and_that_of_prototypes_change_no_loss(case, random):
    loss, student, teacher = case
    before = value(loss, student, teacher)
    images = random.sample(range(student.shape[1]), student.shape[1])
    assert_equal(value(loss, student[:, images], teacher[:, images]), before)
    prototypes = random.sample(range(student.shape[2]), student.shape[2])
    loss.center.copy_(loss.center[:, prototypes].clone())
    assert_equal(value(loss, student[..., prototypes], teacher[..., prototypes]), before)


@given(logits())
def test_the_order_of_local_views_changes_no_loss_and_neither_does_an_exchange_of_the_global_ones(case):
    loss, student, teacher = case
    globals_ = len(teacher)
    turned = torch.cat([student[:globals_].flip(0), student[globals_:].flip(0)])
    assert_equal(value(loss, turned, teacher.flip(0)), value(loss, student, teacher))


@given(logits())
def test_every_image_twice_is_the_same_mean_and_the_teacher_and_the_center_may_move_together(case):
    loss, student, teacher = case
    before = value(loss, student, teacher)
    assert_equal(value(loss, student.repeat(1, 2, 1), teacher.repeat(1, 2, 1)), before)
    move = torch.linspace(-3, 3, student.shape[2], dtype=torch.float64)
    loss.center.add_(move)
    assert_equal(value(loss, student, teacher + move), before)


@given(logits())
def test_the_gradient_of_each_image_sums_to_zero_over_the_prototypes(case):
    loss, student, teacher = case
    student.requires_grad_()
    value(loss, student, teacher).backward()
    assert_equal(student.grad.sum(-1), torch.zeros(student.shape[:2], dtype=torch.float64))


@given(logits(), st.floats(-3, 3), st.floats(-3, 3))
def test_the_center_moves_linearly_and_stays_among_what_it_was_and_the_mean(case, a, b):
    loss, _, teacher = case
    start, rows = loss.center.clone(), teacher.flatten(0, 1)
    other = rows.flip(0).cos()

    def moved(outputs):
        loss.center.copy_(start)
        loss.update_center(outputs)
        return loss.center.clone()

    still = moved(torch.zeros_like(rows))
    assert_equal(moved(a * rows + b * other) - still, a * (moved(rows) - still) + b * (moved(other) - still))
    ends = torch.stack([start, rows.mean(0, keepdim=True)])
    assert (moved(rows) >= ends.amin(0) - 1e-9).all()
    assert (moved(rows) <= ends.amax(0) + 1e-9).all()


# ---- schedules ------------------------------------------------------------------------------------------------------

NUMBERS = st.floats(0, 10)
STEPS = st.integers(1, 300)


@given(NUMBERS, NUMBERS, STEPS)
def test_cosine_and_line_go_from_start_to_end_without_turning_and_stay_there(start, end, total):
    for curve in (cosine, linear):
        values = [curve(step, start, end, total) for step in range(total + 20)]
        assert abs(values[0] - start) < 1e-9
        assert all(abs(value - end) < 1e-9 for value in values[total:])
        sign = 1 if end >= start else -1
        assert all(sign * (after - before) >= -1e-9 for before, after in pairwise(values))


@given(st.floats(1e-6, 10), st.floats(0, 1), STEPS, STEPS)
def test_the_rate_rises_to_its_peak_and_falls_to_its_end(peak, fraction, total, warmup):
    end = peak * fraction
    values = [cosine_warmup(step, peak, end, total, warmup) for step in range(max(total, warmup) + 20)]
    assert all(0 <= value <= peak * (1 + 1e-9) for value in values)
    assert values.index(max(values)) == warmup
    assert all(after >= before for before, after in pairwise(values[: warmup + 1]))
    assert all(after <= before + 1e-9 for before, after in pairwise(values[warmup:]))
    if warmup < total:
        assert abs(values[total] - end) < 1e-9


@given(
    epochs=st.integers(1, 5),
    steps=st.integers(1, 20),
    batch=st.integers(1, 4096),
    lr=st.floats(1e-5, 1),
    warmup=st.floats(0, 10),
    momentum=st.floats(0, 1),
    temps=st.tuples(st.floats(0.01, 0.1), st.floats(0.01, 0.1)),
)
def test_all_that_is_scheduled_stays_between_its_ends_at_every_step(epochs, steps, batch, lr, warmup, momentum, temps):
    schedule = Schedule(
        epochs=epochs,
        steps_per_epoch=steps,
        effective_batch=batch,
        lr=lr,
        weight_decay=0.04,
        momentum=momentum,
        warmup_temp=temps[0],
        temp=temps[1],
        warmup_temp_epochs=epochs / 2,
        warmup_epochs=warmup,
        min_lr=0.0,
        reference_batch_size=256,
    )
    for now in map(schedule, range(2 * epochs * steps)):
        assert 0 <= now.learning_rate <= lr * batch / 256 * (1 + 1e-9)
        assert 0.04 - 1e-9 <= now.weight_decay <= 0.4 + 1e-9
        assert momentum - 1e-9 <= now.momentum <= 1 + 1e-9
        assert min(temps) - 1e-9 <= now.teacher_temp <= max(temps) + 1e-9


# ---- the order of images --------------------------------------------------------------------------------------------


@st.composite
def shared(draw):
    """(images, batch of each process, passes, processes, seed), with a step to each epoch at least."""
    batch, passes, ranks = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    images = draw(st.integers(1, 200))
    assume(images >= batch * passes * ranks)
    return images, batch, passes, ranks, draw(st.integers(0, 2**32 - 1))


def steps_of(images, batch, passes, ranks, seed, start, end):
    """The keys of each step, those of all processes together, as they stand in the effective batch."""
    samplers = [StepSampler(images, Batching(batch, passes, seed, rank, ranks), start, end) for rank in range(ranks)]
    parts = [list(sampler) for sampler in samplers]
    assert all(len(mine) == len(sampler) for mine, sampler in zip(parts, samplers))
    return [
        [key for part in range(passes) for mine in parts for key in mine[step * passes + part]]
        for step in range(end - start)
    ]


@settings(max_examples=50)
@given(shared())
def test_an_epoch_has_every_image_at_most_once_and_leaves_out_less_than_a_step(case):
    images, batch, passes, ranks, _ = case
    whole = batch * passes * ranks
    steps = images // whole
    for epoch in (0, 1):
        keys = sum(steps_of(*case, epoch * steps, (epoch + 1) * steps), [])
        assert {e for e, _ in keys} == {epoch}
        indices = [index for _, index in keys]
        assert len(indices) == len(set(indices)) == steps * whole > images - whole
        assert set(indices) <= set(range(images))


@settings(max_examples=50)
@given(shared(), st.data())
def test_a_step_is_the_same_whoever_shares_it_and_wherever_the_run_began(case, data):
    images, batch, passes, ranks, seed = case
    whole = batch * passes * ranks
    end = 2 * (images // whole) + 1
    alone = steps_of(images, whole, 1, 1, seed, 0, end)
    start = data.draw(st.integers(0, end))
    assert steps_of(*case, start, end) == alone[start:]
