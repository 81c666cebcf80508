import math

import numpy as np
import pytest
import torch

from dino.evaluator.unsupervised import alpha_req, preferred, rankme, view_consistency


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(variances, images, offset=0.0):
    """Features whose covariance has exactly these eigenvalues, in directions that are no axes."""
    dim = len(variances)
    white = normal(images, dim).double()
    white = torch.linalg.qr(white - white.mean(0))[0]
    turn = torch.linalg.qr(normal(dim, dim, seed=1).double())[0]
    return (white * torch.as_tensor(variances).double().sqrt() @ turn + offset).float()


@pytest.mark.parametrize(("images", "dim"), [(500, 20), (20, 64)])
def test_rankme_is_the_papers_formula_on_numpys_singular_values(images, dim):
    features = normal(images, dim) * torch.arange(1, dim + 1) + 2.0
    values = np.linalg.svd(features.double().numpy(), compute_uv=False)
    p = values / values.sum() + 1e-7
    assert rankme(features) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)), rel=1e-6)


def test_rankme_counts_the_directions_in_use():
    assert rankme(torch.eye(7)) == pytest.approx(7, rel=1e-4)
    assert rankme(normal(300, 3) @ normal(3, 50, seed=1)) < 3.01
    assert rankme(torch.ones(100, 50)) == pytest.approx(1, rel=1e-3)
    assert math.isnan(rankme(torch.zeros(100, 50)))
    assert math.isnan(rankme(torch.full((100, 50), torch.nan)))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_is_the_exponent_that_the_spectrum_was_made_with(alpha):
    spectrum = np.arange(1, 81.0) ** -alpha
    spectrum[:10] *= 5  # outside the ranks that are fitted
    assert alpha_req(with_spectrum(spectrum, 300, offset=3.0)) == pytest.approx(alpha, abs=0.01)


def test_alpha_is_numpys_line_through_the_ranks_that_are_asked_for():
    features = normal(400, 30) * torch.linspace(3, 0.1, 30)
    eigenvalues = np.linalg.eigvalsh(np.cov(features.double().numpy().T))[::-1][2:18]
    slope = np.polyfit(np.log(np.arange(3, 19)), np.log(eigenvalues), 1)[0]
    assert alpha_req(features, ranks=(3, 18)) == pytest.approx(-slope, rel=1e-6)
    assert alpha_req(features, ranks=(3, 18)) != pytest.approx(alpha_req(features, ranks=(3, 25)), rel=1e-2)


def test_alpha_of_too_few_directions_is_not_a_number():
    assert math.isnan(alpha_req(normal(400, 15)))
    assert math.isnan(alpha_req(normal(400, 12) @ normal(12, 200, seed=1)))
    assert math.isnan(alpha_req(torch.ones(400, 200)))


def test_views_that_know_nothing_of_each_other_agree_by_chance():
    n, k = 1500, 20
    found = view_consistency(normal(n, 32), normal(n, 32, seed=1), k)
    chance = k / (n - 1)
    assert found["view_neighbours"] == pytest.approx(chance, abs=4 * math.sqrt(chance / (n * k)))
    assert found["view_match"] <= 5 / n


def test_constant_features_agree_by_chance_too():
    n, k = 500, 20
    found = view_consistency(torch.ones(n, 8), torch.ones(n, 8), k)
    assert found["view_neighbours"] < 3 * k / n
    assert found["view_match"] <= 5 / n


def test_equal_views_agree_wholly():
    features = normal(200, 16)
    assert view_consistency(features, 2 * features, k=7, block=500) == {"view_neighbours": 1.0, "view_match": 1.0}


def test_consistency_is_that_of_a_naive_count():
    a = normal(60, 5).double()
    b = a + 0.7 * normal(60, 5, seed=1).double()

    def cosine(x, y):
        return float(x @ y / x.norm() / y.norm())

    shared, matches = 0, 0
    for i in range(60):
        near = [
            {j for _, j in sorted((-cosine(x[i], x[j]), j) for j in range(60) if j != i)[:4]} for x in (a, b)
        ]  # fmt: skip
        shared += len(near[0] & near[1])
        matches += max(range(60), key=lambda j: cosine(a[i], b[j])) == i
    found = view_consistency(a.float(), b.float(), k=4)
    assert 0.1 < shared / 240 < 0.9
    assert found["view_neighbours"] == pytest.approx(shared / 240)
    assert found["view_match"] == pytest.approx(matches / 60)


ROWS = {
    "early": {"rankme": 20.0, "alpha": 1.5, "view_neighbours": 0.2},
    "middle": {"rankme": 40.0, "alpha": 1.1, "view_neighbours": 0.3},
    "late": {"rankme": 50.0, "alpha": 1.6, "view_neighbours": 0.4},
}


def test_the_sentence_names_what_most_figures_prefer_and_what_they_say():
    assert preferred(ROWS) == (
        "late is preferred of 3: it has the highest RankMe (50.0) and most neighbours shared by two views (40.0%); "
        "middle has the alpha nearest to 1 (1.10). A hint, not an accuracy."
    )
    assert preferred({name: ROWS[name] | {"alpha": 1.3} for name in ("early", "late")}).startswith("late is preferred")


def test_figures_that_disagree_prefer_none():
    rows = ROWS | {"early": {"rankme": 20.0, "alpha": 1.5, "view_neighbours": 0.9}}
    assert preferred(rows) == (
        "None of 3 is preferred: late has the highest RankMe (50.0); middle has the alpha nearest to 1 (1.10); "
        "early has most neighbours shared by two views (90.0%). Labels would decide."
    )


def test_what_is_not_finite_is_not_preferred():
    nan = dict.fromkeys(("rankme", "alpha", "view_neighbours"), math.nan)
    assert "the highest RankMe (20.0)" in preferred({"nan": nan, "early": ROWS["early"]})
    assert preferred({"a": nan, "b": {}}) == "No checkpoint is preferred: none has a finite figure."
    assert preferred({"early": ROWS["early"]}) == "No checkpoint is preferred: there is only one."


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("k must be in", lambda: view_consistency(normal(5, 3), normal(5, 3), k=5)),
        ("two rising numbers", lambda: alpha_req(normal(5, 3), ranks=(10, 10))),
        ("at least one image", lambda: rankme(torch.zeros(0, 3))),
    ],
)
def test_what_cannot_be_measured_is_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()
