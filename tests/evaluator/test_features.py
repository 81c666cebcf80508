"""Features of whole data sets, wherever their images lie."""

import pytest
import torch
from elsewhere import cached_elsewhere
from photos import Photos
from torch import nn
from torch.utils.data import Subset

from dino.augmentation import EvalTransform
from dino.dataset.cache import Cached
from dino.evaluator import features
from dino.evaluator.features import UNREAD, batches, features_of

TRANSFORM = EvalTransform(24)


@pytest.mark.parametrize("part", [range(40), range(3, 40, 2)], ids=["whole", "part"])
def test_images_on_a_gpu_give_the_features_of_those_on_the_cpu(part, monkeypatch):
    dataset, said = Photos(400, broken=(4, 7, 39), block=1), [set(), set()]
    expected = features_of(nn.Flatten(), Subset(dataset, part), TRANSFORM, batch_size=16, broken=said[0])
    held = cached_elsewhere(dataset, torch.Tensor.clone)
    monkeypatch.setattr(Cached, "__getitem__", None)  # not one by one
    found = features_of(nn.Flatten(), Subset(held, part), TRANSFORM, batch_size=16, broken=said[1])
    assert torch.equal(found.labels, expected.labels) and (found.labels == UNREAD).any()
    assert said[0] == said[1] and len(said[0]) > 1
    grey_level = 1 / 255 / min(TRANSFORM.std)
    assert (found.rows - expected.rows).abs().max() < 2.1 * grey_level
    assert len(found.rows.unique(dim=0)) > 10


def test_images_on_a_gpu_are_shuffled_alike_each_time():
    held = cached_elsewhere(Photos(30, block=1), torch.Tensor.clone)
    first, again = ([labels for _, labels, _ in batches(held, TRANSFORM, 8, shuffle=True)] for _ in range(2))
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert torch.equal(torch.cat(first).sort().values, torch.arange(30))
    assert not torch.equal(torch.cat(first), torch.arange(30))


def test_what_goes_to_a_gpu_is_pinned(monkeypatch):
    pinned = []

    def loader(dataset, **options):
        pinned.append(options["pin_memory"])
        return []

    monkeypatch.setattr(features, "Loader", loader)
    for device in ("cpu", "cuda:1"):
        assert list(batches(Photos(4), TRANSFORM, 2, device)) == []
    assert pinned == [False, True]
