import copy

import pytest
import torch
from ranks import run_in_ranks
from torch import nn

from dino.runtime.batch_norm import SyncBatchNorm, synchronise_batch_norm
from dino.runtime.processes import place

IMAGES = torch.randn(12, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1


def normalised(momentum, share):
    """Outputs, gradients (of a loss that weighs every value differently) and statistics of one pass."""
    norm = nn.Sequential(nn.BatchNorm2d(3, momentum=momentum)).double()
    nn.init.normal_(norm[0].weight, generator=torch.Generator().manual_seed(1))
    if share:
        synchronise_batch_norm(norm, torch.device("cpu"))
        assert isinstance(copy.deepcopy(norm)[0], SyncBatchNorm)  # as a teacher is made
    here = place()
    each = len(IMAGES) // here.world_size
    mine = IMAGES[here.rank * each :][:each].clone().requires_grad_()
    weights = torch.arange(IMAGES.numel(), dtype=torch.float64).view(IMAGES.shape).sin()[here.rank * each :][:each]
    out = norm(mine)
    (out.square() * weights).sum().backward()
    return out.detach(), mine.grad, norm.state_dict(), norm.eval()(mine).detach()


@pytest.mark.slow
def test_normalises_and_counts_as_torchs_own_does_the_whole_batch():
    for momentum in (0.1, None):
        out, gradient, state, in_eval = normalised(momentum, share=False)
        parts = run_in_ranks(3, normalised, momentum, True)
        torch.testing.assert_close(torch.cat([part[0] for part in parts]), out)
        torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient * 1.0)
        torch.testing.assert_close(torch.cat([part[3] for part in parts]), in_eval)
        for part in parts:
            torch.testing.assert_close(part[2], state)


def test_one_process_keeps_torchs_own():
    norm = nn.Sequential(nn.BatchNorm2d(3))
    synchronise_batch_norm(norm, torch.device("cpu"))
    assert type(norm[0]) is nn.BatchNorm2d
