from collections import OrderedDict

import pytest
import torch

from dino.run.snapshot import Snapshot


def content():
    weight = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    return {
        "student": OrderedDict(weight=weight, count=torch.tensor(3)),
        "groups": [{"lr": 0.1, "params": [0, 1]}],
        "rng": (3, (1, 2), None),
        "half": torch.randn(3, 2).bfloat16().T,
        "notes": ["a sentence"],
    }


def test_a_snapshot_keeps_what_was_there_whatever_changes_since():
    live = content()
    before = {name: live["student"][name].clone() for name in live["student"]}
    half = live["half"].clone()
    snapshot = Snapshot(live)
    live["student"]["weight"].zero_()
    live["student"]["count"] += 1
    live["half"].zero_()
    live["groups"][0]["lr"] = 0.2
    live["groups"][0]["params"].append(2)
    live["notes"].append("another")
    kept = snapshot.content()
    for name, value in before.items():
        assert torch.equal(kept["student"][name], value)
    assert torch.equal(kept["half"], half) and kept["half"].dtype == torch.bfloat16
    assert kept["student"]["weight"].is_contiguous(memory_format=torch.channels_last)
    assert kept["groups"] == [{"lr": 0.1, "params": [0, 1]}]
    assert kept["notes"] == ["a sentence"]
    assert kept["rng"] == (3, (1, 2), None)


def test_a_parameter_that_is_trained_is_kept_without_its_graph():
    kept = Snapshot({"weight": torch.nn.Parameter(torch.ones(2))}).content()["weight"]
    assert type(kept) is torch.Tensor and not kept.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_snapshot_of_a_gpu_is_of_the_moment_it_was_taken_at_though_nobody_waited():
    """Behind a second of work, and before the change that follows."""
    weight, busy = torch.ones(10_000_000, device="cuda"), torch.randn(8192, 8192, device="cuda")
    for _ in range(50):
        busy = (busy @ busy).sigmoid()
    weight += 1
    snapshot = Snapshot({"weight": weight})
    weight.zero_()
    kept = snapshot.content()["weight"]
    assert kept.is_pinned() and bool((kept == 2).all())
