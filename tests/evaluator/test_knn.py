import pytest
import torch
from torch import nn

from dino.dataset.encoded import BrokenImage
from dino.dataset.textures import Textures
from dino.evaluator.features import RawPixels, calibrate
from dino.evaluator.knn import KNN, NoEvaluator


class Threes(nn.Module):
    """A backbone with batch norm, whose features are the channels' means."""

    output_dim = 3

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images):
        return self.norm(images).mean((2, 3))


def test_calibration_gives_batch_norm_the_plain_mean_of_its_statistics_and_leaves_the_original_alone():
    batches = [torch.randn(8, 3, 4, 4) * scale + scale for scale in (1.0, 2.0, 3.0)]
    backbone = Threes()
    calibrated = calibrate(backbone, iter(batches))
    expected = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(calibrated.norm.running_mean, expected)
    assert not calibrated.training
    assert backbone.training
    assert torch.equal(backbone.norm.running_mean, torch.zeros(3))


def test_raw_pixels_are_the_image_without_its_mean():
    image = torch.rand(1, 3, 32, 32) + 5
    features = RawPixels()(image)
    assert features.shape == (1, 3072)
    torch.testing.assert_close(features[0], image.flatten() - image.mean(), rtol=0, atol=1e-5)
    assert torch.equal(RawPixels()(image + 1).argsort(), features.argsort())


def test_an_evaluation_leaves_modes_and_random_numbers_as_they_were():
    backbone = nn.Sequential(Threes(), nn.Dropout())
    backbone[0].eval()
    train, val = Textures("train", images=40), Textures("val", images=20)
    state = torch.get_rng_state()
    measured = KNN(size=64, k=5, batch_size=16)(backbone, train, val)
    assert 0 <= measured["knn"] <= 1
    assert [m.training for m in (backbone, backbone[0], backbone[1])] == [True, False, True]
    assert torch.equal(torch.get_rng_state(), state)


def test_features_that_hold_the_label_are_classified_without_a_fault():
    class Coloured(Textures):
        def __getitem__(self, index):
            label = super().__getitem__(index)[1]
            image = torch.zeros(3, 64, 64, dtype=torch.uint8)
            image[label % 3] = 20 * label + 20
            return image, label

    backbone = nn.Sequential(nn.AvgPool2d(64), nn.Flatten())
    backbone.output_dim = 3
    evaluator = KNN(size=64, k=1)
    assert evaluator(backbone, Coloured("train", images=100), Coloured("val", images=50))["knn"] == 1.0


def test_both_baselines_are_measured():
    train, val = Textures("train", images=60), Textures("val", images=20)
    baselines = KNN(size=64, k=5).baselines(Threes(), train, val)
    assert baselines.keys() == {"raw_pixels", "untrained"}
    assert baselines["raw_pixels"] == KNN(size=64, k=5)(RawPixels(), train, val)["knn"]


def test_without_labels_nothing_is_measured():
    unlabelled = Textures("train", images=20)
    unlabelled.classes = None
    assert KNN(size=64)(Threes(), unlabelled, unlabelled) == {}
    assert KNN(size=64).baselines(Threes(), unlabelled, unlabelled) == {}
    assert NoEvaluator()(Threes(), unlabelled, unlabelled) == {}


class WithoutTheThird(Textures):
    def __getitem__(self, index):
        if index == 3:
            raise BrokenImage("3.jpg is no image.", "3.jpg")
        return super().__getitem__(index)


def test_what_cannot_be_read_is_left_out_and_said_also_to_who_keeps_no_list(caplog):
    train, val = WithoutTheThird("train", images=200), Textures("val", images=20)
    KNN(size=64)(Threes(), train, val)
    assert [record.message for record in caplog.records] == ["passed over: 3.jpg is no image."]


@pytest.mark.parametrize("change", [{"k": 0}, {"temperature": 0.0}, {"size": 0}, {"batch_size": 0}])
def test_values_that_cannot_work_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        KNN(**({"size": 64} | change))
