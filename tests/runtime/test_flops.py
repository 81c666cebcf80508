"""Floating-point operations, against the formula on paper and against those of a step that is taken."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.step import OURS, contestant, views_of
from dino.backbone.resnet import SmallResNet
from dino.backbone.vit import ViT
from dino.head import DinoProjectionHead
from dino.model import DinoModel, make_teacher
from dino.runtime.flops import images_to_mfu, peak_flops, training_flops

DIM, DEPTH, PATCH = 48, 3, 8
HEAD = {"hidden_dim": 64, "bottleneck_dim": 32, "output_dim": 96}


def vit(drop_path=0.0, gradient_checkpointing=False):
    backbone = ViT(DIM, DEPTH, 3, PATCH, 32, drop_path, gradient_checkpointing=gradient_checkpointing)
    return DinoModel(backbone, DinoProjectionHead(DIM, **HEAD))


def of_one_view(size):
    """A forward pass in multiplications and additions; of the last block, only what the CLS token needs."""
    patches = (size // PATCH) ** 2
    tokens = patches + 1
    embedding = 2 * patches * (3 * PATCH**2) * DIM
    block = 24 * tokens * DIM**2 + 4 * tokens**2 * DIM
    last = 6 * tokens * DIM**2 + 18 * DIM**2 + 4 * tokens * DIM
    hidden, bottleneck, outputs = HEAD.values()
    head = 2 * (DIM * hidden + hidden * hidden + hidden * bottleneck + bottleneck * outputs)
    return embedding + (DEPTH - 1) * block + last + head


def resized(dim, learned, grid):
    """Positions of one image size, from a learned square of them, by a product for each axis."""
    return 2 * dim * (grid * learned**2 + grid**2 * learned)


@pytest.mark.parametrize("options", [{}, {"drop_path": 0.5}, {"gradient_checkpointing": True}])
def test_a_vit_takes_what_the_formula_says_whatever_is_dropped_or_computed_again(options):
    sizes = [32, 32, 16, 16, 16]
    student = vit(**options)
    expected = 3 * sum(map(of_one_view, sizes)) + sum(map(of_one_view, sizes[:2])) + 3 * resized(DIM, 4, 2)
    for network in (student, make_teacher(student)):
        assert training_flops(network, sizes, n_global_crops=2) == expected


@pytest.mark.parametrize(
    "backbone",
    [["backbone=dino_vits16", "backbone.drop_path=0", "backbone.depth=2"], ["backbone=resnet_small"]],
    ids=["vit", "resnet"],
)
def test_they_are_those_of_a_step_that_is_taken(backbone):
    """Which spares the gradients of its input and of what resizes positions, once for a batch; the loss has a product
    in place, which the counter does not see."""
    batch, prototypes, bottleneck = 2, 64, 256
    sizes = ["dataset.global_size=64", "dataset.local_size=32", f"dataset.out_dim={prototypes}"]
    small = ["dataset.train.images=16", f"training.batch_size={batch}", "head.hidden_dim=64", "precision=fp32"]
    run, step = contestant(OURS, [*backbone, *sizes, *small, f"head.bottleneck_dim={bottleneck}"])
    with FlopCounterMode(display=False) as counted:
        step(0, views_of(run))
    model = training_flops(run.teacher, run.transform.sizes, 2)
    patches, pixels = 2 * 16 + 4 * 4, 2 * 32**2 + 4 * 16**2
    of_input = 2 * patches * 768 * 384 if "vit" in backbone[0] else 2 * pixels * 27 * 32
    expected = batch * (model - of_input - 2 * 6 * bottleneck * prototypes)
    if "vit" in backbone[0]:
        of_globals, of_locals = resized(384, 14, 4), resized(384, 14, 2)
        expected += 3 * of_globals + 2 * of_locals - batch * (4 * of_globals + 3 * of_locals)
    assert counted.get_total_flops() == expected


def test_the_network_is_left_as_it_is():
    network = DinoModel(SmallResNet(8), DinoProjectionHead(64, use_bn=True, **HEAD))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert training_flops(network, [32, 32], 2) > 0
    assert network.training and all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Foreign(nn.Module):
    def forward(self, views):
        return views[0][views[0] > float(views[0].sum())]


def test_where_the_operations_cannot_be_counted_there_is_no_figure():
    assert training_flops(Foreign(), [32, 32], 2) is None
    assert training_flops(vit(), [], 2) is None


@pytest.mark.parametrize(
    ("gpu", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A10G", None),  # slower than the A10
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_the_peak_is_that_of_the_very_gpu(gpu, tflops):
    assert peak_flops(gpu) == (tflops and tflops * 1e12)


def test_the_mfu_is_what_all_gpus_do_over_what_they_could(monkeypatch):
    network, sizes = vit(), [32, 32]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    factor = images_to_mfu(network, sizes, 2, torch.device("cuda"), world_size=8)
    rate = 8 * 989e12 / training_flops(network, sizes, 2)  # images per second at which eight GPUs have no time to lose
    assert rate * factor == pytest.approx(1)


def test_without_a_known_peak_there_is_no_mfu(monkeypatch):
    assert images_to_mfu(vit(), [32, 32], 2, torch.device("cpu"), 1) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce GTX 1080")
    assert images_to_mfu(vit(), [32, 32], 2, torch.device("cuda"), 1) is None
