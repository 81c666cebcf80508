import logging
import math

import pytest
import torch

from dino.loading.sampler import Batching, StepSampler
from dino.run.finite import OVERFLOWS, Finite, NonFiniteLoss, check_finite


def test_a_step_is_named_with_its_images_the_first_on_the_terminal_and_all_in_the_log_file(tmp_path, caplog):
    finite = Finite(
        tmp_path / "checkpoints", lambda step: [f"{i} (cat/{i}.jpg)" for i in range(100 * step, 100 * step + 20)]
    )
    assert finite(1, 2.5, 1.0)
    with caplog.at_level(logging.DEBUG, "dino"), pytest.raises(NonFiniteLoss) as stopped:
        finite(7, math.nan, 1.0)
    text = str(stopped.value)
    assert text.startswith(f"the loss is nan at step 7; the last good checkpoint is in {tmp_path / 'checkpoints'}. ")
    assert "The step took the images 700 (cat/700.jpg), 701 (cat/701.jpg)" in text
    assert "707 (cat/707.jpg) and 12 more, all in train.log" in text
    assert "708" not in text
    (entry,) = caplog.records
    assert entry.levelno == logging.DEBUG  # train.log has these too, the terminal does not
    assert all(f"cat/{i}.jpg" in entry.getMessage() for i in range(700, 720))


def test_as_many_steps_as_allowed_are_left_out_each_with_a_warning_and_the_next_one_stops(tmp_path, caplog):
    finite = Finite(tmp_path, lambda step: ["3"], skip=2)
    with caplog.at_level(logging.WARNING, "dino"):
        assert not finite(4, math.inf, math.nan)
        assert finite(5, 1.0, 1.0)
        assert finite(6, 1.0, math.nan)  # the loss itself is one
        with pytest.raises(NonFiniteLoss, match="the gradient is inf at step 8"):
            finite(8, 1.0, math.inf)
    assert [record.getMessage() for record in caplog.records] == [
        "the loss is inf at step 4, which is left out (1 of at most 2). The step took the images 3.",
        "the gradient is nan at step 6, which is left out (2 of at most 2). The step took the images 3.",
    ]


def test_gradients_that_overflow_fp16_are_the_scalers_business_unless_they_never_end(tmp_path):
    finite = Finite(tmp_path, lambda step: [], scaled=True)
    for step in range(1, 1000):
        assert finite(step, 1.0, math.inf if step % 5 else 1.0)
    assert finite.skipped == 0
    assert finite(1000, 1.0, 1.0)
    for step in range(1001, 1001 + OVERFLOWS):
        assert finite(step, 1.0, math.nan)
    with pytest.raises(NonFiniteLoss, match="the gradient is nan at step 1051"):
        finite(1051, 1.0, math.nan)
    with pytest.raises(NonFiniteLoss, match="the loss is nan"):
        Finite(tmp_path, lambda step: [], scaled=True)(1, math.nan, 1.0)


def test_what_is_not_finite_is_named_before_it_is_saved():
    good = {"weight": torch.tensor([1.0, -1e38]), "steps": torch.tensor(3)}
    rest = {"teacher_state_dict": good, "loss_state_dict": {}, "dino_loss_center": torch.zeros(1, 4)}
    check_finite({"student_state_dict": good, "optimizer_state_dict": {}} | rest, 5)
    bad = {"norm.running_mean": torch.tensor([0.0, math.nan]), "norm.running_var": torch.tensor([-math.inf])}
    with pytest.raises(
        NonFiniteLoss, match=r"after step 5 .* not saved: student.norm.running_mean, student.norm.running_"
    ):
        check_finite({"student_state_dict": bad | good} | rest, 5)
    with pytest.raises(NonFiniteLoss, match="not saved: loss.center"):
        check_finite({"student_state_dict": good} | rest | {"dino_loss_center": torch.tensor([[math.nan]])}, 5)


@pytest.mark.parametrize(("batch", "accumulation", "ranks"), [(12, 1, 1), (3, 2, 2), (2, 3, 2), (4, 1, 3)])
def test_the_images_of_a_step_are_those_that_its_processes_take_together(batch, accumulation, ranks):
    samplers = [StepSampler(40, Batching(batch, accumulation, 7, rank, ranks), 0, 8) for rank in range(ranks)]
    batches = [list(sampler) for sampler in samplers]
    for step in (0, 1, 2, 3, 5):
        mine = slice(step * accumulation, (step + 1) * accumulation)
        taken = [index for each in batches for part in each[mine] for _, index in part]
        assert sorted(taken) == sorted(samplers[-1].of_step(step))
        assert samplers[0].of_step(step) == StepSampler(40, Batching(12, seed=7), 0, 8).of_step(
            step
        )  # whoever shares it
