import math
from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from torch import nn

from dino.evaluator.features import Features
from dino.evaluator.probe import accuracies, few_shot, folds, linear_probe, logistic_regression, stratified, train_heads


def blobs(n, seed, classes=3, dim=6, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(classes, (n,), generator=generator)
    return means[labels] + spread * torch.randn(n, dim, generator=generator), labels


def two_blobs(n, seed, distance=2.0, dim=8):
    """Two Gaussians of unit variance around +-distance / 2 along a diagonal: Bayes is right with Phi(distance / 2)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n,), generator=generator)
    means = (2 * labels[:, None] - 1) * distance / 2 / math.sqrt(dim) * torch.ones(dim)
    return means + torch.randn(n, dim, generator=generator), labels


BAYES = (1 + math.erf(1 / math.sqrt(2))) / 2  # Phi(1) = 0.841


def test_rates_trained_together_end_where_torchs_sgd_brings_each_alone():
    features, labels = blobs(150, 1)
    lrs, epochs, batch_size, decay = (0.01, 0.3, 2.0), 12, 64, 0.02
    weight, bias = train_heads(features, labels, 3, lrs, epochs, batch_size, 0.9, decay, seed=5)
    for i, lr in enumerate(lrs):
        generator = torch.Generator().manual_seed(5)
        layer = nn.Linear(6, 3)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(3, 6, generator=generator) * 0.01)
            layer.bias.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), lr=lr * batch_size / 256, momentum=0.9, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=0)
        for _ in range(epochs):
            order = torch.randperm(150, generator=generator)
            for rows in (order[:64], order[64:128], order[128:]):
                optimizer.zero_grad()
                nn.functional.cross_entropy(layer(features[rows]), labels[rows]).backward()
                optimizer.step()
            schedule.step()
        torch.testing.assert_close(weight[i], layer.weight.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(bias[i], layer.bias.detach(), rtol=0, atol=1e-5)
        expected = (layer(features).argmax(1) == labels).double().mean().item()
        assert accuracies(weight, bias, features, labels)[i] == pytest.approx(expected, abs=1e-9)


def test_a_rate_that_diverges_gets_nothing_right_and_disturbs_no_other():
    train = blobs(100, 1)
    alone = linear_probe(train, blobs(80, 2), 3, lrs=(0.1,), epochs=5, batch_size=32)
    beside = linear_probe(train, blobs(80, 2), 3, lrs=(1e38, 0.1), epochs=5, batch_size=32)
    assert beside["linear_lr_1e+38"] == 0
    assert beside["linear"] == alone["linear"] > 0.5
    assert beside["linear_lr"] == 0.1


def test_two_gaussians_are_told_apart_within_sampling_error_of_bayes():
    train, val = two_blobs(8000, 1), two_blobs(20_000, 2)
    error = 3 * math.sqrt(BAYES * (1 - BAYES) / 20_000)
    assert linear_probe(train, val, 2, epochs=20)["linear"] == pytest.approx(BAYES, abs=error)


def test_a_common_offset_far_larger_than_the_differences_costs_nothing():
    train, val = blobs(600, 1, spread=2.0), blobs(400, 2, spread=2.0)
    offset = 300 * torch.ones(train[0].shape[1])
    moved = ((train[0] + offset, train[1]), (val[0] + offset, val[1]))
    here, there = (linear_probe(*of, 3, epochs=20)["linear"] for of in ((train, val), moved))
    assert here > 0.6
    assert there == pytest.approx(here, abs=0.01)


def test_the_rate_is_chosen_without_val_and_the_best_on_val_is_said_beside_it():
    train = blobs(300, 1, spread=2.0)
    found = linear_probe(train, blobs(100, 2, spread=2.0), 3, lrs=(1e-6, 0.01, 1.0), epochs=10)
    of_rate = {lr: found[f"linear_lr_{lr:g}"] for lr in (1e-6, 0.01, 1.0)}
    assert found["linear_best"] == max(of_rate.values())
    assert found["linear"] == of_rate[found["linear_lr"]]
    wrong = (train[0], (train[1] + 1) % 3)  # as val: right answers are wrong there, so what is best there is another
    assert linear_probe(train, wrong, 3, lrs=(1e-6, 0.01, 1.0), epochs=10)["linear_lr"] == found["linear_lr"]


def test_a_probe_is_a_function_of_its_seed_and_leaves_torchs_generator_alone():
    train, val = Features(*blobs(200, 1, spread=3.0)), Features(*blobs(99, 2, spread=3.0))
    state = torch.get_rng_state()
    one, same, other = (linear_probe(train, val, 3, epochs=3, batch_size=16, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert torch.equal(torch.get_rng_state(), state)


def test_features_made_in_inference_mode_can_be_learned_from():
    with torch.inference_mode():
        train, val = blobs(60, 1), blobs(30, 2)
    assert linear_probe(train, val, 3, epochs=2)["linear_best"] > 0.4
    assert logistic_regression(train, val, C=(1.0,))["logistic"] > 0.5


def test_logistic_regression_is_scikit_learns_on_centred_rows_of_length_one():
    train, val = blobs(300, 1, spread=2.0), blobs(200, 2, spread=2.0)
    train[0].add_(3.0)
    val[0].add_(3.0)
    pipeline = make_pipeline(StandardScaler(with_std=False), Normalizer(), LogisticRegression(C=2.0, max_iter=2000))
    expected = pipeline.fit(*(x.numpy() for x in train)).score(*(x.numpy() for x in val))
    found = logistic_regression(train, val, C=(2.0,))
    assert 0.4 < expected < 0.95
    assert found == {"logistic": pytest.approx(expected, abs=1 / 200), "logistic_C": 2.0}


@pytest.mark.parametrize("images", [400, 6000])  # each fifth in turn; the first alone
def test_c_is_chosen_on_what_is_held_out(images):
    # 70 % of the labels are 0. Where the features know nothing, saying 0 is best, for which C must be small: on train
    # itself, here also val, a large one does better. Where they know all, a small one goes on saying 0.
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(images, generator=generator) > 0.7).long()
    noise = torch.randn(images, images // 10, generator=generator)
    told = torch.cat([noise[:, :10] / 10, labels[:, None]], 1)
    assert logistic_regression((noise, labels), (noise, labels), C=(1e3, 1e-6))["logistic_C"] == 1e-6
    assert logistic_regression((told, labels), (told, labels), C=(1e-6, 1e3))["logistic_C"] == 1e3


def test_two_gaussians_are_told_apart_by_logistic_regression_too():
    # Of length one, what is left of the two is their angle: less than all, which in 8 dimensions costs little.
    train, val = two_blobs(4000, 1, dim=32), two_blobs(20_000, 2, dim=32)
    sampling = math.sqrt(BAYES * (1 - BAYES) / 20_000)
    assert logistic_regression(train, val, C=(10.0,))["logistic"] == pytest.approx(BAYES, abs=4 * sampling)


def test_a_class_may_be_missing_from_val_or_train():
    train, val = blobs(150, 1), blobs(90, 2)
    but_two = val[0][val[1] != 2], val[1][val[1] != 2]
    assert logistic_regression(train, but_two)["logistic"] > 0.6
    assert linear_probe(train, but_two, 3, epochs=20)["linear"] > 0.6
    of_two = train[0][train[1] == 2], train[1][train[1] == 2]
    share = (val[1] == 2).double().mean().item()
    assert logistic_regression(of_two, val)["logistic"] == pytest.approx(share)


def test_a_few_shot_takes_that_share_of_each_class_and_at_least_one_image():
    labels = np.repeat([7, 3, 5], [200, 41, 1])
    chosen = stratified(labels, 0.1, seed=0)
    assert Counter(labels[chosen].tolist()) == {7: 20, 3: 4, 5: 1}
    assert np.array_equal(chosen, stratified(labels, 0.1, seed=0))
    assert not np.array_equal(chosen, stratified(labels, 0.1, seed=1))
    often = Counter(np.concatenate([stratified(labels, 0.1, seed) for seed in range(300)]).tolist())
    assert max(often[i] for i in range(200)) < 60 and min(often[i] for i in range(200)) > 8  # 30 expected, sd 5.2


def test_few_shots_learn_from_no_more_than_they_say():
    train, val = blobs(400, 1, spread=1.5), blobs(300, 2, spread=1.5)
    found = few_shot(train, val, 0.01)
    rows = torch.from_numpy(stratified(train[1].numpy(), 0.01, 0))
    again = logistic_regression((train[0][rows], train[1][rows]), val)
    assert found == {"few_shot_1_percent": again["logistic"], "few_shot_1_percent_images": len(rows)}
    assert len(rows) in (3, 4, 5) and found == few_shot(train, val, 0.01)
    assert few_shot(train, val, 1)["few_shot_100_percent"] == logistic_regression(train, val)["logistic"]


def test_folds_share_every_class_alike():
    labels = np.repeat([0, 1, 2], [50, 10, 1])
    fold = folds(labels, 5, seed=2)
    assert [Counter(labels[fold == part].tolist()) for part in range(4)] == [{0: 10, 1: 2}] * 4
    assert Counter(labels[fold == 4].tolist()) == {0: 10, 1: 2, 2: 1}


UNLABELLED = torch.randn(2, 6), torch.tensor([0, -1])
NONE = torch.zeros(0, 6), torch.zeros(0, dtype=torch.long)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("lrs must be above 0", lambda: linear_probe(blobs(9, 1), blobs(9, 1), 3, lrs=(0.1, 0))),
        ("epochs and batch_size", lambda: linear_probe(blobs(9, 1), blobs(9, 1), 3, epochs=0)),
        (r"labels of train must be in \[0, 2\), got 0 to 2", lambda: linear_probe(blobs(30, 1), blobs(9, 1), 2)),
        ("labels of val must be 0 or more", lambda: logistic_regression(blobs(9, 1), UNLABELLED)),
        ("val must hold at least one image", lambda: logistic_regression(blobs(9, 1), NONE)),
        ("C must be above 0", lambda: logistic_regression(blobs(9, 1), blobs(9, 1), C=())),
        ("fraction must be in", lambda: few_shot(blobs(9, 1), blobs(9, 1), 1.5)),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()
