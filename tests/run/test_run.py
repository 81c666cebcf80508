import pytest
import torch
from test_train import TINY

from dino.backbone.vit_tiny import ViTTiny
from dino.config import CONF, compose
from dino.run.parts import assemble
from dino.weights import save_teacher


def assembled(*overrides):
    return assemble(compose([*TINY, *overrides], "train", CONF))


def test_knn_sees_the_images_normalised_as_those_of_the_training():
    run = assembled("augmentation.mean=[0.5,0.4,0.3]", "augmentation.std=[0.25,0.5,1.0]")
    image = run.train_set[0][0]  # of the size at which it is measured
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in ((0.5, 0.4, 0.3), (0.25, 0.5, 1.0)))
    expected = (run.data.eval_transform(image) / 255 - shift) / scale
    seen = []
    for backbone in (run.teacher.backbone, run.untrained):
        backbone.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    for measure in (run.evaluate, run.baselines):
        seen.clear()
        measure()
        assert any((image - expected).abs().amax() < 1e-5 for batch in seen for image in batch)


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class Pretrained(ViTTiny):
    """Its pretrained weights are ones."""

    def __init__(self, pretrained: bool = False, **options):
        super().__init__(**options)
        if pretrained:
            for parameter in self.parameters():
                torch.nn.init.ones_(parameter)


@pytest.mark.parametrize("source", ["pretrained", "init_from"])
def test_the_untrained_backbone_of_a_run_that_begins_with_weights_is_that_of_one_that_does_not(tmp_path, source):
    target = f"backbone._target_={__name__}.Pretrained"
    config = compose([*TINY, target, "seed=1"], "train", CONF)
    save_teacher(
        tmp_path, assemble(config).teacher.state_dict(), config, {"size": 64, "mean": [0.5] * 3, "std": [0.5] * 3}
    )
    plain = assembled(target)
    after = torch.get_rng_state()
    begins = "+backbone.pretrained=true" if source == "pretrained" else f"init_from={tmp_path}"
    run = assembled(target, begins)
    assert torch.equal(torch.get_rng_state(), after)  # another network is made, and draws nothing from the run
    assert not same_weights(run.teacher.backbone, plain.teacher.backbone)
    assert same_weights(run.untrained, plain.untrained)
    assert run.baselines() == plain.baselines()


def test_the_untrained_backbone_is_else_the_one_that_is_trained():
    run = assembled()
    assert same_weights(run.untrained, run.teacher.backbone)
