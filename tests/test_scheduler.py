import math
import random

import pytest
import torch

from dino.scheduler import Schedule, cosine, cosine_warmup, linear


def schedule(**changes):
    arguments = {
        "epochs": 20,
        "steps_per_epoch": 50,
        "effective_batch": 512,
        "lr": 5e-4,
        "weight_decay": 0.04,
        "momentum": 0.996,
        "final_momentum": 1.0,
        "temp": 0.07,
        "warmup_temp": 0.04,
        "warmup_temp_epochs": 6.0,
        "freeze_last_layer_epochs": 1.0,
        "warmup_epochs": 4.0,
        "reference_batch_size": 256,
    }
    return Schedule(**(arguments | changes))


# Ends, knees (warm-up ends at 200, the temperature's at 300, the freeze at 50), the steps around them, and 100 others.
STEPS = [0, 1, 49, 50, 51, 199, 200, 201, 299, 300, 301, 999, *random.Random(0).sample(range(1000), 100)]


@pytest.mark.parametrize("step", STEPS)
def test_every_curve_is_its_formula(step):
    now = schedule()(step)
    peak = 5e-4 * 512 / 256
    after = (step - 200) / 800
    rate = peak * step / 200 if step < 200 else 1e-6 + 0.5 * (peak - 1e-6) * (1 + math.cos(math.pi * after))
    assert now.learning_rate == pytest.approx(rate, rel=1e-12)
    assert now.last_layer_learning_rate == pytest.approx(0.0 if step < 50 else rate, rel=1e-12)
    assert now.weight_decay == pytest.approx(
        0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * step / 1000)), rel=1e-12
    )
    assert now.momentum == pytest.approx(1 + 0.5 * (0.996 - 1) * (1 + math.cos(math.pi * step / 1000)), rel=1e-12)
    assert now.teacher_temp == pytest.approx(0.04 + 0.03 * min(1, step / 300), rel=1e-12)


def test_the_curves_are_those_of_numpy_as_the_authors_make_them():
    np = pytest.importorskip("numpy")
    warmup, steps = np.linspace(0, 1e-3, 200, endpoint=False), np.arange(800)
    rates = np.concatenate([warmup, 1e-6 + 0.5 * (1e-3 - 1e-6) * (1 + np.cos(np.pi * steps / 800))])
    assert [schedule()(step).learning_rate for step in range(1000)] == pytest.approx(rates.tolist(), rel=1e-9)


def test_past_the_end_everything_stays_where_it_ended():
    now = schedule()(5000)
    assert (now.learning_rate, now.weight_decay, now.momentum, now.teacher_temp) == pytest.approx(
        (1e-6, 0.4, 1.0, 0.07)
    )


def test_a_short_run_warms_up_for_a_fraction_of_itself():
    short = schedule(epochs=3, warmup_epochs=10.0, max_warmup_fraction=0.1, warmup_temp_epochs=0.0)
    assert short.warmup_steps == 15
    assert short(15).learning_rate == pytest.approx(1e-3)


def test_without_a_reference_batch_the_rate_is_as_written_and_null_decay_is_constant():
    plain = schedule(reference_batch_size=None, final_weight_decay=None)
    assert plain(200).learning_rate == pytest.approx(5e-4)
    assert plain(700).weight_decay == pytest.approx(0.04)


def test_no_warm_up_at_all_starts_at_the_peak():
    assert cosine_warmup(0, 1.0, 0.0, 10) == 1.0
    assert linear(0, 0.04, 0.07, 0) == 0.07
    assert cosine(10, 1.0, 0.25, 10) == pytest.approx(0.25)


def test_values_reach_the_groups_they_are_meant_for():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    flags = [(True, False), (False, False), (True, True)]
    groups = [{"params": [p], "decay": d, "last_layer": last} for p, (d, last) in zip(parameters, flags)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    schedule()(20).apply(optimizer)  # the last layer is frozen until step 50
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([1e-4, 1e-4, 0.0])
    assert [g["weight_decay"] for g in optimizer.param_groups] == pytest.approx(
        [schedule()(20).weight_decay, 0, schedule()(20).weight_decay]
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lr": -1.0}, "lr must be above 0, got -1.0"),
        ({"momentum": 1.5}, r"momentum must be in \[0, 1\], got 1.5"),
        ({"temp": 0.0}, r"temp must be in \(0, 1\], got 0.0"),
        ({"warmup_temp_epochs": 21.0}, r"warmup_temp_epochs must be in \[0, epochs=20\], got 21.0"),
        ({"freeze_last_layer_epochs": 20.0}, r"freeze_last_layer_epochs must be in \[0, epochs=20\)"),
        ({"min_lr": 1.0}, "min_lr must not be above the peak learning rate"),
        ({"final_weight_decay": -0.1}, "final_weight_decay must be 0 or more"),
    ],
)
def test_values_that_cannot_work_are_refused_in_a_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        schedule(**change)
