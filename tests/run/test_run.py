import torch
from test_train import TINY

from dino.config import CONF, compose
from dino.run.parts import assemble


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
