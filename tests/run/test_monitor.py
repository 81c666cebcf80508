"""The figures against naive loops and NumPy; the modes of collapse provoked by training into them."""

import math

import numpy as np
import pytest
import torch
from ranks import run_in_ranks
from torch import nn

from dino import DinoLoss, DinoModel, DinoProjectionHead, Schedule, make_teacher, parameter_groups
from dino.head import Factors
from dino.history import History
from dino.loading.micro_batch import MicroBatch
from dino.logger import Loggers
from dino.run.epochs import Epochs
from dino.run.finite import Finite
from dino.run.learner import Learner
from dino.run.monitor import (
    DIRECTIONS,
    LEAST_DIRECTIONS,
    LEAST_INFORMATION,
    MOST_ROWS,
    PATIENCE,
    SPREAD,
    Monitor,
    agreement,
    diagnose,
    feature_std,
)
from dino.run.recorder import Recorder
from dino.runtime.processes import place
from dino.train import train


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the figures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("crops", "globals_"), [(2, 2), (6, 2), (3, 1)])
def test_agreement_is_the_share_of_pairs_of_different_views_with_the_same_choice(crops, globals_):
    student, teacher = torch.randint(3, (crops, 7)), torch.randint(3, (globals_, 7))
    same = [
        int(student[s, image] == teacher[t, image])
        for t in range(globals_)
        for s in range(crops)
        for image in range(7)
        if s != t
    ]
    assert agreement(student, teacher).item() == pytest.approx(sum(same) / len(same))


def test_feature_std_is_1_where_features_point_everywhere_and_0_where_they_are_the_same():
    assert feature_std(normal(4000, 50)).item() == pytest.approx(1, abs=0.01)
    assert feature_std(torch.ones(10, 50)).item() == pytest.approx(0, abs=1e-6)
    features = normal(20, 5) + 1
    unit = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    assert feature_std(features).item() == pytest.approx(unit.std(axis=0).mean() * math.sqrt(5), rel=1e-5)
    assert feature_std(features.bfloat16()).item() == pytest.approx(feature_std(features).item(), rel=1e-2)


def measured(monitor, teacher, student=None, features=None, temp=0.04):
    monitor.see(teacher)
    student = teacher.repeat(monitor.loss.ncrops // monitor.loss.n_global_crops, 1) if student is None else student
    factors = Factors(student, torch.eye(student.shape[1]))
    return monitor.measure(teacher, factors, teacher if features is None else features, temp)


def monitor_of(out_dim=8, ncrops=2, **options):
    monitor = Monitor(nn.Linear(3, 4), DinoLoss(out_dim, ncrops=ncrops), **options)
    monitor.remember_weights()
    return monitor


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (MOST_ROWS + 44, 10)])
def test_rankme_is_garridos_formula_on_numpys_singular_values_of_a_bounded_number_of_rows(shape):
    features = normal(*shape) + 0.5
    values = np.linalg.svd(features[:MOST_ROWS].double().numpy(), compute_uv=False)
    p = values / values.sum() + 1e-7
    figures = measured(monitor_of(), normal(shape[0], 8), features=features)
    assert figures["rankme"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)


def test_a_step_has_the_entropies_the_distance_to_uniform_and_the_norm_of_the_center():
    monitor, teacher = monitor_of(), normal(6, 8)
    monitor.loss.center.copy_(normal(1, 8, seed=1))
    figures = measured(monitor, teacher, temp=0.5)
    p = torch.softmax((teacher.double() - monitor.loss.center) / 0.5, dim=1).numpy()
    mean = p.mean(axis=0)
    assert figures["teacher_entropy"] == pytest.approx(-(p * np.log(p)).sum(axis=1).mean() / math.log(8), rel=1e-5)
    assert figures["teacher_entropy_of_mean"] == pytest.approx(-(mean * np.log(mean)).sum() / math.log(8), rel=1e-5)
    assert figures["kl_to_uniform"] == pytest.approx((mean * np.log(mean * 8)).sum(), rel=1e-4)
    assert figures["center_norm"] == pytest.approx(np.linalg.norm(monitor.loss.center.numpy()), rel=1e-6)


def test_the_update_is_measured_over_all_trained_weights():
    student = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    student[0].bias.requires_grad_(False)
    monitor = Monitor(student, DinoLoss(8, ncrops=2))
    before = [p.detach().clone() for p in student.parameters()]
    monitor.remember_weights()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1 * torch.randn_like(p)) if p.requires_grad else p.fill_(100)
    changes = [(p - b, p) for p, b in zip(student.parameters(), before, strict=True) if p.requires_grad]
    change, weights = (math.sqrt(sum(x[i].square().sum().item() for x in changes)) for i in (0, 1))
    assert measured(monitor, normal(4, 8))["update_to_weight"] == pytest.approx(change / weights, rel=1e-5)


@pytest.mark.parametrize("out_dim", [8, 300])  # fewer than the views seen, and more
def test_prototypes_in_use_are_those_chosen_since_the_last_measurement_of_those_that_can_have_been(out_dim):
    monitor = monitor_of(out_dim)
    monitor.loss.center.copy_(normal(1, out_dim, seed=9))
    for again in range(2):
        steps = [normal(4, out_dim, seed=3 * again + i) for i in range(3)]
        for teacher in steps[:2]:
            monitor.see(teacher)
        monitor.remember_weights()
        share = measured(monitor, steps[2])["prototypes_in_use"]
        chosen = {int(np.argmax(row)) for teacher in steps for row in (teacher - monitor.loss.center).numpy()}
        assert share == pytest.approx(len(chosen) / min(out_dim, 12))


def test_a_resumed_run_measures_what_the_uninterrupted_one_does():
    whole, other = monitor_of(50), monitor_of(50)
    whole.weights, whole.weights_before = other.weights, other.weights_before
    whole.see(normal(4, 50, seed=1))
    other.load_state_dict(whole.state_dict())
    assert measured(other, normal(4, 50, seed=2)) == measured(whole, normal(4, 50, seed=2))


def in_processes():
    torch.manual_seed(0)
    here, monitor = place(), monitor_of(30)
    for step in range(3):
        monitor.see(normal(12, 30, seed=step)[here.rank :: here.world_size])
    states = monitor.state_dict()
    mine = normal(12, 30, seed=3)[here.rank :: here.world_size]
    return states, measured(monitor, mine)


@pytest.mark.slow
def test_processes_have_one_answer_and_share_what_they_saw():
    (alone, one), *both = in_processes(), *run_in_ranks(2, in_processes)
    assert both[0][1] == both[1][1]
    for state, figures in both:
        assert state["in_use"].tolist() == alone["in_use"].tolist()
        assert state["outputs"] == alone["outputs"]
        for name in ("teacher_entropy", "teacher_entropy_of_mean", "prototypes_in_use", "center_norm", "kl_to_uniform"):
            assert figures[name] == pytest.approx(one[name], rel=1e-5), name


# ---- what they say --------------------------------------------------------------------------------------------------

LN_K = math.log(1024)
HEALTHY = {"teacher_entropy": 0.8, "teacher_entropy_of_mean": 0.95, "feature_std": 0.4, "rankme": 10.0}


@pytest.mark.parametrize(
    ("figures", "mode"),
    [
        ({}, None),
        ({"teacher_entropy": 1 - 0.99 * LEAST_INFORMATION / LN_K, "teacher_entropy_of_mean": 1.0}, "uniform"),
        ({"teacher_entropy": 1 - 1.01 * LEAST_INFORMATION / LN_K, "teacher_entropy_of_mean": 1.0}, None),
        ({"teacher_entropy": 0.0, "teacher_entropy_of_mean": 0.99 * LEAST_INFORMATION / LN_K}, "constant"),
        ({"teacher_entropy": 0.0, "teacher_entropy_of_mean": 1.01 * LEAST_INFORMATION / LN_K}, None),
        ({"teacher_entropy": 0.6, "teacher_entropy_of_mean": 0.6}, "constant"),  # all outputs the same, and not sharp
        ({"feature_std": 0.99 * SPREAD}, "constant"),
        ({"feature_std": 1.01 * SPREAD}, None),
        ({"rankme": 0.99 * DIRECTIONS}, "dimensional"),
        ({"rankme": 1.01 * DIRECTIONS}, None),
        ({"rankme": math.nan}, None),
        ({"rankme": 1.0, "feature_std": 0.0}, "constant"),
    ],
)
def test_a_mode_begins_at_its_threshold(figures, mode):
    assert diagnose(HEALTHY | figures, LN_K, images=32, directions=64) == mode


def test_few_outputs_say_nothing_of_what_they_cannot_show():
    assert diagnose(HEALTHY | {"rankme": 1.0}, LN_K, images=4, directions=LEAST_DIRECTIONS - 1) is None
    assert diagnose(HEALTHY | {"rankme": 1.0}, LN_K, images=8, directions=LEAST_DIRECTIONS) == "dimensional"
    one_image = {"teacher_entropy": 0.8, "teacher_entropy_of_mean": 0.8, "feature_std": 0.0}  # two views, both alike
    assert diagnose(HEALTHY | one_image, LN_K, images=1, directions=2) is None


UNIFORM = HEALTHY | {"teacher_entropy": 1.0, "teacher_entropy_of_mean": 1.0, "loss_over_ln_k": 1.0}
UNIFORM |= {"momentum": 0.99, "teacher_temp": 0.07, "prototypes_in_use": 0.5}


def said(monitor, *periods, start=1, every=10):
    """What is said over periods of (steps, figures)."""
    sentences, step = [], start
    for steps, figures in periods:
        for now in range(step, step + steps, every):
            sentences += [monitor.news(now, UNIFORM | figures, torch.zeros(64, 32))]
        step += steps
    return [sentence for sentence in sentences if sentence]


def test_a_mode_is_named_once_when_it_lasts_and_again_when_it_returns():
    few, long = PATIENCE, 4 * PATIENCE
    assert said(monitor_of(), (few, {}), (few, HEALTHY), (few, {}), (few, HEALTHY)) == []
    first, over, second = said(monitor_of(), (long, {}), (long, HEALTHY), (long, {}))
    assert first.startswith(f"step {1 + PATIENCE}: collapse to uniform: ")
    assert "(entropy of its outputs 1.000 ln K, loss 1.000 ln K)" in first
    assert "teacher.temp and teacher.warmup_temp below 0.07" in first
    assert over == f"step {1 + long + PATIENCE}: the collapse (uniform) is over"
    assert second.startswith(f"step {1 + 2 * long + PATIENCE}: collapse to uniform: ")
    one, other = said(monitor_of(), (long, {}), (few, HEALTHY), (long, {"teacher_entropy": 0.0} | {"rankme": 1.0}))
    assert ("collapse to uniform" in one, "collapse of dimensions" in other) == (True, True)


def test_the_first_steps_say_nothing():
    (sentence,) = said(monitor_of(quiet_steps=200), (400, {}))
    assert sentence.startswith("step 251: ")


def test_a_resumed_run_does_not_repeat_what_was_said_and_waits_no_longer():
    before, after = monitor_of(), monitor_of()
    assert len(said(before, (100, {}))) == 1
    after.load_state_dict(before.state_dict())
    assert said(after, (100, {}), start=101) == []
    before, after = monitor_of(), monitor_of()
    assert said(before, (30, {})) == []
    after.load_state_dict(before.state_dict())
    assert said(after, (60, {}), start=31)[0].startswith("step 51: ")


# ---- trained into it ------------------------------------------------------------------------------------------------


class Points(nn.Module):
    output_dim = 16

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, images):
        return self.net(images)


def trained(tmp_path, caplog, groups=8, out_dim=32, use_bn=True, temp=0.04, center_momentum=0.9, lr=1e-2, decay=0.0):
    """150 steps on noisy views of a few points, with a recorder: its history, and what it said."""
    torch.manual_seed(0)
    steps, batch = 150, 16
    student = DinoModel(Points(), DinoProjectionHead(16, 32, 16, out_dim, use_bn=use_bn))
    loss = DinoLoss(out_dim, ncrops=2, center_momentum=center_momentum)
    schedule = Schedule(
        epochs=1,
        steps_per_epoch=steps,
        effective_batch=batch,
        lr=lr,
        weight_decay=decay,
        final_weight_decay=None,
        momentum=0.9,
        temp=temp,
        warmup_temp=temp,
        max_warmup_fraction=0.1,
    )
    points = torch.randn(groups, 3, 2, 2)

    def batches():
        for step in range(steps):
            images = points[torch.randint(groups, (batch,))]
            yield step, [MicroBatch([images + 0.3 * torch.randn_like(images) for _ in range(2)])]

    recorder = Recorder(
        History({"config": {}}),
        Loggers([]),
        Monitor(student, loss, quiet_steps=schedule.warmup_steps),
        Finite(tmp_path, lambda step: []),
        Epochs(0, steps, steps),
        batch,
    )
    optimizer = torch.optim.AdamW(parameter_groups(student, student.projection_head.last_layer))
    train(Learner(student, make_teacher(student), loss, optimizer, schedule), batches(), recorder)
    recorder.close()
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert recorder.history.metadata.get("collapse", []) == warnings
    return recorder.history, warnings


def test_a_healthy_run_is_silent_and_has_every_figure(tmp_path, caplog):
    history, warnings = trained(tmp_path, caplog)
    assert warnings == []
    last = history.to_dataframe().iloc[-1]
    assert last["agreement"] > 0.9
    assert last["rankme"] > 5
    assert last["feature_std"] > 0.5
    assert 0 < last["update_to_weight"] < 1e-3  # the rate is nearly at its end
    assert last["prototypes_in_use"] >= 6 / 32


def test_a_teacher_too_hot_to_choose_collapses_to_uniform(tmp_path, caplog):
    _, warnings = trained(tmp_path, caplog, temp=1.0, use_bn=False)
    assert len(warnings) == 1
    assert "collapse to uniform" in warnings[0]
    assert "entropy of its outputs 1.000 ln K, loss 1.000 ln K" in warnings[0]
    assert "below 1," in warnings[0]


def test_without_centering_all_images_get_one_prototype(tmp_path, caplog):
    history, warnings = trained(tmp_path, caplog, center_momentum=1 - 1e-9, use_bn=False)
    assert len(warnings) == 1
    assert "collapse to a constant" in warnings[0]
    assert "of their mean 0.000 ln K, 3.1% of the prototypes in use" in warnings[0]  # 1 of 32
    assert history.get_metric("teacher_entropy_of_mean")[-1] < 0.01


def test_two_prototypes_and_a_strong_decay_leave_features_one_direction(tmp_path, caplog):
    history, warnings = trained(tmp_path, caplog, groups=2, out_dim=2, lr=0.02, decay=4.0)
    assert "collapse of dimensions" in warnings[0]
    assert "of 16, standard deviation" in warnings[0]
    assert history.get_metric("rankme")[0] > 5
    assert min(history.get_metric("rankme")) < DIRECTIONS
