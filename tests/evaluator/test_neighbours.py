import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import knn
from dino.evaluator.neighbours import knn_accuracies, knn_predictions, nearest


def blobs(n, seed, spread=0.8, dim=16):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(5, dim, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(5, (n,), generator=generator)
    return means[labels] + spread * torch.randn(n, dim, generator=generator), labels


@pytest.mark.parametrize(("bank", "queries", "k", "block"), [(50, 7, 50, 60), (131, 40, 9, 70), (131, 40, 1, 10**6)])
def test_the_nearest_are_those_of_a_sorted_whole_product(bank, queries, k, block):
    bank, queries = blobs(bank, 1)[0], blobs(queries, 2)[0]
    similarity, index = nearest(bank, queries, k, block)
    a, b = (x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True) for x in (queries, bank))
    order = np.argsort(-(a @ b.T), axis=1)[:, :k]
    np.testing.assert_array_equal(index, order)
    np.testing.assert_allclose(similarity, np.take_along_axis(a @ b.T, order, 1), atol=1e-6)


class LargestOutput(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mm.default:
            self.numel = max(self.numel, out.numel())
        return out


def test_no_more_similarities_are_held_than_the_block_has():
    bank, queries = torch.randn(900, 4), torch.randn(600, 4)
    with LargestOutput() as largest:
        nearest(bank, queries, k=20, block=2**13)
        knn_predictions((bank, torch.arange(900) % 7), queries, (5, 20), block=2**13)
    assert 2**12 < largest.numel <= 2**13


@pytest.mark.parametrize("block", [500, 2**26])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_votes_of_every_k_are_those_of_scikit_learn(temperature, block):
    bank, queries = blobs(900, seed=1, spread=2.0), blobs(400, seed=2, spread=2.0)
    predicted = knn_predictions(bank, queries[0], (200, 1, 20), temperature, block)
    assert list(predicted) == [200, 1, 20]
    for k, of_k in predicted.items():
        neighbours = KNeighborsClassifier(
            n_neighbors=k,
            metric="cosine",
            algorithm="brute",
            weights=lambda distance: np.exp((1 - distance) / temperature),
        ).fit(bank[0].numpy(), bank[1].numpy())
        expected = neighbours.predict(queries[0].numpy())
        assert 0.3 < (expected == queries[1].numpy()).mean() < 0.999
        assert (of_k.numpy() != expected).sum() <= 1  # a tie within rounding


def test_accuracies_are_the_share_of_right_predictions_of_each_k():
    bank, queries = blobs(300, seed=1, spread=2.0), blobs(70, seed=2, spread=2.0)
    predicted = knn_predictions(bank, queries[0], (1, 30))
    right = {k: sum(int(a) == int(b) for a, b in zip(of_k, queries[1])) for k, of_k in predicted.items()}
    assert right[1] != right[30]
    assert knn_accuracies(bank, queries, (1, 30)) == {"knn_1": right[1] / 70, "knn_30": right[30] / 70}


def test_blobs_are_classified_within_sampling_error_of_bayes():
    # Two classes at angle 0 and pi of a circle, blurred by angle: with many neighbours the vote is the larger density.
    def circle(n, seed):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(2, (n,), generator=generator)
        angle = labels * math.pi + 1.2 * torch.randn(n, generator=generator)
        return torch.stack([angle.cos(), angle.sin()], 1), labels

    def phi(x):
        return (1 + math.erf(x / math.sqrt(2))) / 2

    bayes = sum(phi((math.pi / 2 + 2 * math.pi * turn) / 1.2) - phi((-math.pi / 2 + 2 * math.pi * turn) / 1.2)
                for turn in range(-3, 4))  # fmt: skip
    measured = knn_accuracies(circle(20_000, 0), circle(5_000, 1), (100, 200))
    assert 0.75 < bayes < 0.85
    for accuracy in measured.values():
        assert abs(accuracy - bayes) < 3 * math.sqrt(bayes * (1 - bayes) / 5_000)


def test_k_is_cut_to_the_bank():
    bank, queries = blobs(50, 1), blobs(33, 2)
    predicted = knn_predictions(bank, queries[0], (50, 200))
    assert torch.equal(predicted[50], predicted[200])


def test_a_tie_goes_to_the_smaller_label():
    bank = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([4, 2])
    assert knn_predictions(bank, torch.tensor([[1.0, 0.0]]), (2,))[2].item() == 2


def test_a_low_temperature_overflows_nothing():
    bank, queries = blobs(200, 1), blobs(50, 2)
    predicted = knn_predictions(bank, queries[0], (1, 20), temperature=1e-4)
    assert torch.equal(predicted[1], predicted[20])


def test_no_queries_have_no_predictions():
    assert knn_predictions(blobs(20, 1), torch.zeros(0, 16), (5,))[5].shape == (0,)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("1 of 20 images with a label below 0", {"bank": (torch.randn(20, 16), torch.arange(20) - 1)}),
        ("a bank of 0 images", {"bank": (torch.zeros(0, 16), torch.zeros(0, dtype=torch.long))}),
        ("ks must be 1 or more", {"ks": (0, 5)}),
        ("ks must be 1 or more", {"ks": ()}),
        ("temperature above 0", {"temperature": 0}),
        ("at least one image to classify", {"queries": (torch.zeros(0, 16), torch.zeros(0, dtype=torch.long))}),
    ],
)
def test_what_cannot_be_measured_is_refused(message, change):
    with pytest.raises(ValueError, match=message):
        knn_accuracies(**({"bank": blobs(20, 1), "queries": blobs(5, 2), "ks": (5,)} | change))


@pytest.mark.parametrize("installed", [None, "faiss"])
def test_the_benchmark_has_a_row_for_each_contestant(installed, capsys, monkeypatch):
    if installed:
        pytest.importorskip(installed)
    monkeypatch.setattr(knn, "find_spec", lambda name: installed)
    knn.main(["--bank", "400", "--queries", "50", "--dim", "8", "--classes", "5", "--part", "20"])
    shown = capsys.readouterr().out
    _, *rows = [line[2:-2].split(" | ") for line in shown.splitlines() if line.startswith("| ")]
    names = [
        "the matrix product alone",
        "dino.evaluator.neighbours.nearest",
        "the same and the votes of k = 10",
        "scikit-learn",
    ]
    assert [name.split(",")[0] for name, *_ in rows] == names + ([installed] if installed else [])
    assert [int(queries) for _, queries, *_ in rows] == [50, 50, 50, 20, 50][: len(rows)]
    assert ("faiss is not installed." in shown) == (not installed)
