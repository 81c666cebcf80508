"""Witnesses: one pass a view for the multi-crop forward, the formula in floats for the EMA."""

import pytest
import torch
from torch import nn

from dino.backbone.resnet import SmallResNet
from dino.backbone.vit_tiny import ViTTiny
from dino.head import DinoProjectionHead
from dino.model import DinoModel, make_teacher, teacher_mode, update_teacher_EMA


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build(drop_path=0.0):
    backbone = ViTTiny(hidden_dim=16, depth=2, heads=2, image_size=32, drop_path=drop_path)
    return DinoModel(backbone, DinoProjectionHead(16, 24, 8, 11, use_bn=True))


def views_of(*sizes, batch=3):
    return [torch.randn(batch, 3, size, size) for size in sizes]


class CountedBackbone(nn.Module):
    """Mean colour of an image; remembers the shapes that it was given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        self.seen.append(tuple(images.shape))
        return images.mean(dim=(2, 3))


@pytest.mark.parametrize("sizes", [(32, 32, 16, 16), (16, 32, 16, 24, 32), (16,)])
def test_a_list_of_views_gives_what_one_pass_a_view_gives_in_the_order_of_the_views(sizes):
    model = build().eval()
    views = views_of(*sizes)
    features, outputs = model(views, return_backbone_features=True)
    expected_features = torch.cat([model.backbone(view) for view in views])
    assert torch.allclose(features, expected_features, atol=1e-5)
    assert torch.allclose(outputs, model.projection_head(expected_features), atol=1e-5)
    assert torch.equal(model(views), outputs)
    assert outputs.shape == (len(sizes) * 3, 11)


def test_one_tensor_is_one_view():
    model = build().eval()
    (view,) = views_of(32)
    assert torch.equal(model(view), model([view]))
    assert torch.equal(model(view), model.projection_head(model.backbone(view)))


def test_a_list_runs_once_a_resolution_and_the_head_once():
    model = DinoModel(CountedBackbone(), DinoProjectionHead(3, 24, 8, 11))
    head_inputs = []
    model.projection_head.register_forward_hook(lambda module, inputs, output: head_inputs.append(inputs[0].shape))
    model(views_of(32, 16, 32, 16, 16))
    assert model.backbone.seen == [(6, 3, 32, 32), (9, 3, 16, 16)]
    assert head_inputs == [(15, 3)]
    model([torch.randn(3, 3, 8, 16), torch.randn(3, 3, 16, 8)])  # as many pixels, another shape
    assert model.backbone.seen[2:] == [(3, 3, 8, 16), (3, 3, 16, 8)]


class Doubled(ViTTiny):
    def forward(self, images):
        return 2 * super().forward(images)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_vit_takes_all_sizes_at_once_and_a_forward_of_ones_own_that_replaces_it_each_of_them(monkeypatch, at_once):
    monkeypatch.setattr("dino.backbone.transformer.AT_ONCE_ON", {"cpu"} if at_once else {"cuda"})
    seen = []
    for kind, factor in ((ViTTiny, 1), (Doubled, 2)):
        torch.manual_seed(0)
        backbone = kind(hidden_dim=16, depth=2, heads=2, image_size=32).eval()
        backbone.register_forward_hook(lambda module, inputs, output: seen.append(type(inputs[0])))
        views = views_of(32, 16)
        expected = factor * torch.cat([ViTTiny.forward(backbone, view) for view in views])
        assert torch.allclose(DinoModel(backbone, nn.Identity())(views), expected, atol=1e-5)
    assert seen == [list, torch.Tensor, torch.Tensor]


def test_batch_norm_sees_the_views_of_one_resolution_together():
    backbone = SmallResNet(width=8)
    model = DinoModel(backbone, nn.Identity())
    small, large, other = views_of(16, 32, 16)
    with torch.no_grad():
        first, _, last = model([small, large, other]).split(3)
        assert torch.allclose(torch.cat([first, last]), backbone(torch.cat([small, other])), atol=1e-5)
        assert not torch.allclose(first, backbone(small), atol=1e-3)


def test_no_view_is_refused():
    with pytest.raises(ValueError, match="at least one view"):
        build()([])


# ------------------------------------------------------------------------------------------------ the teacher


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9, 0.996, 1.0])
def test_the_teacher_is_the_moving_average_of_every_parameter(momentum):
    student, teacher = build(), make_teacher(build())
    before = {name: p.clone().double() for name, p in teacher.named_parameters()}
    student_before = {name: p.detach().clone() for name, p in student.named_parameters()}
    update_teacher_EMA(student, teacher, momentum)
    moved = 0
    for name, now in teacher.named_parameters():
        expected = momentum * before[name] + (1 - momentum) * student_before[name].double()
        assert torch.allclose(now.double(), expected, atol=1e-6), name
        moved += not torch.equal(now.double(), before[name])
    assert all(torch.equal(p, student_before[name]) for name, p in student.named_parameters())
    assert moved == 0 if momentum == 1.0 else moved > 10


def test_factored_outputs_are_the_outputs():
    model, views = build(), views_of(32, 32, 16)
    assert torch.equal(torch.nn.functional.linear(*model(views, factored=True)), model(views))


def test_the_fixed_norms_of_the_last_layer_stay_exactly_one():
    student = build()
    teacher = make_teacher(student)
    for step in range(200):
        update_teacher_EMA(student, teacher, 0.99 + step / 30000)
    assert torch.equal(teacher.projection_head.last_layer.parametrizations.weight.original0, torch.ones(11, 1))


def test_the_teachers_batch_norm_statistics_are_its_own():
    student = build()
    teacher = make_teacher(student)
    views = views_of(32, 32, 16)
    student(views)
    theirs = {name: b.clone() for name, b in teacher.named_buffers()}
    update_teacher_EMA(student, teacher, 0.5)
    assert all(torch.equal(b, theirs[name]) for name, b in teacher.named_buffers())

    # They come from its own passes: after one, 0.9 * start + 0.1 * the statistic of the global views.
    norm = teacher.backbone.stem[1]
    maps = teacher.backbone.stem[0](torch.cat(views[:2])).detach()
    teacher(views[:2])
    assert torch.allclose(norm.running_mean, 0.1 * maps.mean(dim=(0, 2, 3)), atol=1e-6)
    assert not torch.allclose(norm.running_mean, student.backbone.stem[1].running_mean, atol=1e-4)


def test_a_new_teacher_is_the_student_without_gradient_drop_path_or_shared_memory():
    student = build(drop_path=0.9)
    teacher = make_teacher(student)
    views = views_of(32, 32)
    assert [name for name, p in teacher.named_parameters() if p.requires_grad] == []
    assert [name for name, p in student.named_parameters() if not p.requires_grad] == [
        "projection_head.last_layer.parametrizations.weight.original0"
    ]
    first, second = teacher(views), teacher(views)
    assert torch.equal(first, second)  # the student's drop path would differ from pass to pass
    assert not torch.equal(student(views), student(views))

    plain = build()  # the same weights without drop path, in train mode: batch norm by the batch's statistics
    plain.load_state_dict(student.state_dict())
    assert torch.allclose(first, plain(views), atol=1e-5)

    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert torch.equal(teacher(views), first)


def test_teacher_mode_brings_a_teacher_back_from_evaluation():
    teacher = make_teacher(build(drop_path=0.9))
    views = views_of(32, 32)
    expected = teacher(views)
    teacher.eval()
    assert not torch.allclose(teacher(views), expected, atol=1e-3)
    teacher.train()
    teacher_mode(teacher)
    assert torch.equal(teacher(views), expected)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_an_alpha_outside_0_to_1_is_refused(alpha):
    student = build()
    with pytest.raises(ValueError, match=rf"alpha must be in \[0, 1\], got {alpha}"):
        update_teacher_EMA(student, make_teacher(student), alpha)
