import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from dino.augmentation import EvalTransform
from dino.dataset.encoded import BrokenImage
from dino.evaluator.bench import Bench
from dino.evaluator.features import features_of
from dino.evaluator.finetune import LabelledCrops, Recipe, finetune
from dino.evaluator.probe import linear_probe


class Slopes:
    """Grey noise whose rows (class 0) or columns (class 1) are alike: no pixel knows the class, an edge filter does."""

    classes = ["rows", "columns"]  # noqa: RUF012
    size = 16

    def __init__(self, images, seed, broken=()):
        self.images, self.seed, self.broken = images, seed, broken

    def __len__(self):
        return self.images

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenImage(f"{index}.jpg is no image.", f"{index}.jpg")
        line = np.random.default_rng([self.seed, index]).integers(0, 256, self.size, dtype=np.uint8)
        image = torch.from_numpy(line)[None, :].expand(self.size, self.size)
        return (image.T if index % 2 == 0 else image).expand(3, -1, -1).contiguous(), index % 2


class One(list):
    """A data set of a single image."""

    classes = ["one"]  # noqa: RUF012

    def __init__(self, image):
        super().__init__([(image, 0)])


class Backbone(nn.Sequential):
    output_dim = 4

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten())  # fmt: skip


@pytest.fixture
def backbone():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = Backbone()
    with torch.no_grad():
        made[0].weight.copy_(made[0].weight.mean((2, 3), keepdim=True).expand_as(made[0].weight))  # blurs: sees no edge
    return made.requires_grad_(False)  # as a teacher's


SIZE = EvalTransform(16)
SHORT = {"epochs": 15, "lr": 0.03, "batch_size": 32, "scale": (0.5, 1.0), "label_smoothing": 0.0}


def test_it_learns_what_a_linear_classifier_on_frozen_features_cannot(backbone):
    train, val = Slopes(160, 0), Slopes(80, 1)
    frozen = [features_of(backbone, data, SIZE) for data in (train, val)]
    linear = linear_probe(*frozen, classes=2, epochs=20, batch_size=32)["linear_best"]
    tuned = finetune(backbone, Bench(train, val, SIZE), Recipe(**SHORT))["finetune"]
    assert tuned > 0.9 > linear + 0.1


def test_the_backbone_and_torchs_random_numbers_stay_as_they_were(backbone):
    before, state = copy.deepcopy(backbone.state_dict()), torch.get_rng_state()
    finetune(backbone, Bench(Slopes(40, 0), Slopes(20, 1), SIZE), Recipe(epochs=2))
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert backbone.training and not any(p.requires_grad or p.grad is not None for p in backbone.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_it_is_a_function_of_its_seed_for_any_number_of_workers(backbone):
    class Confidence(Slopes):
        classes = [str(i) for i in range(50)]  # noqa: RUF012

        def __getitem__(self, index):
            return super().__getitem__(index)[0], index  # hard: so that the accuracy depends on all that is drawn

    def accuracy(seed, num_workers=0):
        data = Confidence(50, 0)
        recipe = Recipe(**(SHORT | {"epochs": 10, "batch_size": 10}))
        return finetune(backbone, Bench(data, data, SIZE, num_workers=num_workers), recipe, seed)["finetune"]

    one = accuracy(seed=3)
    assert 0.05 < one < 0.95
    assert accuracy(seed=3) == one == accuracy(seed=3, num_workers=1)
    assert len({one, accuracy(seed=4), accuracy(seed=5)}) > 1


def test_crops_are_the_images_own_and_change_with_the_epoch():
    crops = LabelledCrops(Slopes(10, 0), 8, (0.1, 0.5), seed=0)
    first, again, later = crops[0, 3][0], crops[0, 3][0], crops[1, 3][0]
    assert torch.equal(first, again) and not torch.equal(first, later)
    assert first.shape == (3, 8, 8) and first.dtype == torch.uint8
    assert (first.float().std(1) < 1).all()  # columns, still: image 3 is of class 1
    left_lit = torch.zeros(3, 16, 16, dtype=torch.uint8)
    left_lit[..., :8] = 200
    whole = LabelledCrops(One(left_lit), 16, (0.999, 1.0), seed=0)
    mirrored = sum(bool(whole[epoch, 0][0][0, 8, 0] < 100) for epoch in range(200))
    assert abs(mirrored - 100) < 4 * math.sqrt(50)


def test_the_rate_warms_up_and_ends_near_zero_and_gains_do_not_decay(backbone, monkeypatch):
    seen = []

    class Spy(torch.optim.AdamW):
        def step(self):
            seen.append([(g["lr"], g["weight_decay"], {p.ndim for p in g["params"]}) for g in self.param_groups])
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    options = {"epochs": 10, "lr": 0.1, "batch_size": 10, "weight_decay": 0.3, "warmup_epochs": 2}
    finetune(backbone, Bench(Slopes(20, 0), Slopes(4, 1), SIZE), Recipe(**options))
    assert [(decay, dims) for _, decay, dims in seen[0]] == [(0.3, {2, 4}), (0.0, {1})]
    rates = [weights[0] for weights, _ in seen]
    warm = [0.1 * step / 4 for step in range(4)]
    assert rates == pytest.approx(warm + [0.05 * (1 + math.cos(math.pi * step / 16)) for step in range(16)])


def test_broken_images_are_passed_over_and_said(backbone):
    bench = Bench(Slopes(200, 0, broken={3}), Slopes(200, 1, broken={5}), SIZE)
    finetune(backbone, bench, Recipe(epochs=1))
    assert bench.broken == {"3.jpg is no image.", "5.jpg is no image."}


def test_without_labels_nothing_is_measured(backbone):
    unlabelled = Slopes(20, 0)
    unlabelled.classes = None
    assert finetune(backbone, Bench(unlabelled, Slopes(20, 1), SIZE)) == {}


@pytest.mark.parametrize("change", [{"epochs": 0}, {"batch_size": 0}, {"lr": 0}])
def test_values_that_cannot_work_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Recipe(**change)
