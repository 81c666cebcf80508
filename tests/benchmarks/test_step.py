"""The reference step of benchmarks/reference.py, as the oracle of the loop; and the table of benchmarks/step.py."""

import math
import re

import pytest
import torch

from benchmarks import step
from benchmarks.reference import ReferenceModel, ReferenceTraining
from dino.backbone.resnet import SmallResNet
from dino.backbone.vit import ViT
from dino.backbone.vit_tiny import ViTTiny
from dino.head import DinoProjectionHead
from dino.loading.micro_batch import MicroBatch
from dino.loss.dino import DinoLoss
from dino.model import DinoModel, make_teacher
from dino.optimizer import parameter_groups
from dino.run.learner import Learner
from dino.scheduler import Schedule
from dino.train import train

BACKBONES = {
    "vit": lambda: ViT(48, 3, 3, patch_size=8, image_size=32),
    "vit_tiny": lambda: ViTTiny(hidden_dim=32, depth=2, heads=2, image_size=32),
    "resnet": lambda: SmallResNet(width=8),
}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_ten_steps_are_those_of_the_reference(backbone):
    torch.manual_seed(0)
    backbone = BACKBONES[backbone]()
    student = DinoModel(backbone, DinoProjectionHead(backbone.output_dim, 64, 32, 96))
    before = [parameter.clone() for parameter in student.parameters()]
    reference, teacher, loss = ReferenceTraining(student, 4, math.inf), make_teacher(student), DinoLoss(96, ncrops=4)
    optimizer = torch.optim.AdamW(parameter_groups(student, student.projection_head.last_layer), fused=True)
    schedule = Schedule(
        epochs=1, steps_per_epoch=10, effective_batch=8, lr=1e-3, weight_decay=0.04, warmup_epochs=0.2, warmup_temp=0.06
    )
    batches = [[torch.randn(8, 3, size, size) for size in (32, 32, 16, 16)] for _ in range(10)]
    ours = []
    steps = ((number, [MicroBatch(views)]) for number, views in enumerate(batches))
    train(Learner(student, teacher, loss, optimizer, schedule), steps, lambda step: ours.append(step.loss))
    theirs = []
    for number, views in enumerate(batches):
        now = schedule(number)
        theirs.append(reference.step(views, now.learning_rate, now.weight_decay, now.momentum, now.teacher_temp))
    assert torch.stack(ours).tolist() == pytest.approx(theirs, abs=1e-5)
    torch.testing.assert_close(loss.center, reference.loss.center, rtol=0, atol=1e-5)
    for model, other in ((student, reference.student), (teacher, reference.teacher)):
        compared = ReferenceModel(model)
        for (name, one), two in zip(compared.named_parameters(), other.parameters(), strict=True):
            if name.endswith("qkv.bias"):  # that of the keys changes no softmax: its gradient is rounding alone
                keys = slice(len(one) // 3, 2 * len(one) // 3)
                assert (one[keys] - two[keys]).abs().max() < 1e-3
                one, two = (torch.cat([x[: keys.start], x[keys.stop :]]) for x in (one, two))
            torch.testing.assert_close(one, two, rtol=0, atol=1e-5, check_stride=False, msg=name)
    moved = [(now - then).abs().max() for now, then in zip(student.parameters(), before, strict=True)]
    assert max(moved) > 1e-3  # a hundred tolerances


def test_the_reference_clips_each_gradient_as_we_do():
    torch.manual_seed(0)
    student = DinoModel(BACKBONES["resnet"](), DinoProjectionHead(64, 64, 32, 96)).double()
    reference, teacher, loss = (
        ReferenceTraining(student, 3, 1e-3),
        make_teacher(student),
        DinoLoss(96, ncrops=3).double(),
    )
    optimizer = torch.optim.AdamW(parameter_groups(student, student.projection_head.last_layer), eps=1.0)
    reference.optimizer = torch.optim.AdamW(reference.student.parameters(), eps=1.0)
    schedule = Schedule(epochs=1, steps_per_epoch=10, effective_batch=8, lr=1.0, weight_decay=0.0, warmup_epochs=0.0)
    views = [torch.randn(8, 3, size, size, dtype=torch.float64) for size in (32, 32, 16)]
    before = [parameter.clone() for parameter in student.parameters()]
    train(Learner(student, teacher, loss, optimizer, schedule, max_norm=1e-3), [(0, [MicroBatch(views)])])
    reference.step(views, 1.0, 0.0, schedule(0).momentum, 0.04)
    changes = [now - then for now, then in zip(student.parameters(), before, strict=True)]
    theirs = [now - then for now, then in zip(reference.student.parameters(), before, strict=True)]
    assert max(change.abs().max() for change in changes) > 1e-5
    for change, other in zip(changes, theirs, strict=True):
        torch.testing.assert_close(change, other, rtol=0, atol=1e-12, check_stride=False)


def rows(shown):
    return dict(re.findall(r"^\| \**(.+?)\** \|(.*)\|$", shown, re.MULTILINE))


TINY = ["training.batch_size=4", "dataset.train.images=32", "backbone.hidden_dim=16", "backbone.heads=2"]
TINY += ["backbone.depth=2", "head.output_dim=16", "head.hidden_dim=32"]


def test_the_table_has_every_contestant_with_its_ratio_to_the_reference(capsys):
    step.main([*TINY, "--eager", "--no-peaks", "--rounds", "2", "--steps", "3"])
    shown = capsys.readouterr().out
    assert "ViTTiny, 16 prototypes, batch 4, views of 2 x 64, 4 x 32 pixels; 2 rounds" in shown
    table = rows(shown)
    for name in (step.REFERENCE, step.OURS, step.BARE):
        median, best, per_second, ratio = map(float, table[name].split("|")[:4])
        assert 0 < best <= median and per_second == pytest.approx(4000 / median, rel=0.1) and ratio > 0
    assert float(table[step.REFERENCE].split("|")[3]) == 1


@pytest.mark.slow
def test_the_peak_is_that_of_the_steps_alone():
    small, large = (
        step.peak(step.OURS, [*TINY, f"training.batch_size={size}", "dataset.train.images=256"], 1) for size in (2, 256)
    )
    assert 0 < small < large < 0.5  # GB; torch and the rest of the program take about as much


def test_the_parts_of_a_step_are_the_step():
    parts, without = step.breakdown(TINY, 10)
    assert set(parts) == {
        "data: decode, crop, photometry",
        "teacher",
        "student",
        "loss",
        "backward",
        "clipping",
        "optimizer",
        "EMA",
        "center",
        "rest",
    }
    assert sum(parts.values()) == pytest.approx(without, rel=0.5)
    assert parts["backward"] > parts["teacher"] and parts["rest"] < 0.2 * without


def test_the_curves_of_both_are_drawn(tmp_path, capsys):
    step.main([*TINY, "precision=fp32", "--curves", str(tmp_path / "curves.png"), "--steps", "6"])
    assert re.search(r"fp32, 6 steps: the losses differ by 0\.000\d at most", capsys.readouterr().out)
    assert (tmp_path / "curves.png").stat().st_size > 5000
