"""Which regions of a network are compiled."""

import pytest
import torch
from torch import nn

from dino.backbone.resnet import ResNet, SmallResNet
from dino.backbone.timm import Timm
from dino.backbone.vit_tiny import ViTTiny
from dino.runtime.compile import compile_regions, eager, repeated_blocks


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_each_block_of_a_vision_transformer_is_a_region(depth):
    network = ViTTiny(hidden_dim=32, depth=depth, heads=2)
    assert repeated_blocks(network) == [*network.blocks]


def test_so_is_each_of_timm_s():
    network = Timm("vit_tiny_patch16_224", img_size=32)
    assert repeated_blocks(network) == [*network.network.blocks]


@pytest.mark.parametrize("network", [ResNet("resnet18"), ResNet("resnet50"), SmallResNet(8), nn.Linear(3, 3)])
def test_a_network_of_unlike_blocks_is_one_region(network, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    assert repeated_blocks(network) == []
    compile_regions(network)
    assert compiled == [(network, {"dynamic": False})]


def test_what_is_compiled_runs_eagerly_in_an_evaluation():
    calls = []

    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    double = torch.compile(lambda x: x * 2, backend=backend)
    x = torch.ones(3)
    with eager():
        assert double(x).tolist() == [2, 2, 2] and calls == []
    assert double(x).tolist() == [2, 2, 2] and len(calls) == 1
