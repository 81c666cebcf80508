"""Witness: the authors' head written out as a formula, with the head's own weights."""

import copy

import pytest
import torch

from dino.head import DinoProjectionHead


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomised(head):
    """Weights and biases that can tell: the initial ones are small, and zero."""
    with torch.no_grad():
        for parameter in head.mlp.parameters():
            parameter.normal_()
    return head


def written_out(head, features, use_bn):
    hidden = features.double()
    linears = [m for m in head.mlp if isinstance(m, torch.nn.Linear)]
    norms = iter([m for m in head.mlp if isinstance(m, torch.nn.BatchNorm1d)])
    for linear in linears[:-1]:
        hidden = hidden @ linear.weight.double().T + linear.bias.double()
        if use_bn:
            norm = next(norms)
            hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + norm.eps).sqrt()
            hidden = hidden * norm.weight.double() + norm.bias.double()
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    hidden = hidden @ linears[-1].weight.double().T + linears[-1].bias.double()
    hidden = hidden / hidden.square().sum(1, keepdim=True).sqrt()
    weight = head.last_layer.parametrizations.weight
    direction = weight.original1.double()
    rows = weight.original0.double() * direction / direction.square().sum(1, keepdim=True).sqrt()
    return (hidden @ rows.T).float(), len(linears)


@pytest.mark.parametrize("use_bn", [False, True])
@pytest.mark.parametrize("norm_last_layer", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_the_head_is_the_formula(num_layers, use_bn, norm_last_layer):
    head = randomised(DinoProjectionHead(6, 8, 5, 7, num_layers, use_bn, norm_last_layer))
    if not norm_last_layer:
        torch.nn.init.uniform_(head.last_layer.parametrizations.weight.original0, 0.5, 2.0)
    features = torch.randn(9, 6)
    expected, linears = written_out(head, features, use_bn)
    assert linears == num_layers
    assert torch.allclose(head(features), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_factors_are_those_of_the_outputs_in_their_precision(dtype):
    head, features = randomised(DinoProjectionHead(6, 8, 5, 7)), torch.randn(9, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        outputs, factors = head(features), head.factors(features)
    assert outputs.dtype == factors.bottleneck.dtype == factors.weight.dtype == dtype
    assert torch.equal(outputs, torch.nn.functional.linear(*factors))


def test_outputs_are_cosines_and_stay_so_after_a_step():
    head = DinoProjectionHead(6, 8, 5, 7)
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=10.0)
    before = head.last_layer.weight.detach().clone()
    head(torch.randn(9, 6)).square().sum().backward()
    optimizer.step()
    after = head.last_layer.weight.detach()
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.allclose(after.norm(dim=1), torch.ones(7), atol=1e-6)
    assert head(torch.randn(99, 6)).abs().max() <= 1.0 + 1e-6


def test_the_norms_are_trained_only_without_norm_last_layer():
    for norm_last_layer in (True, False):
        head = DinoProjectionHead(6, 8, 5, 7, norm_last_layer=norm_last_layer)
        head(torch.randn(9, 6)).pow(3).sum().backward()
        norms = head.last_layer.parametrizations.weight.original0
        assert torch.equal(norms, torch.ones(7, 1))
        assert (norms.grad is None) == norm_last_layer
        others = [p.grad for name, p in head.named_parameters() if "original0" not in name]
        assert all(grad is not None for grad in others)


def test_the_parameters_of_the_last_layer_are_named_so():
    names = {name for name, _ in DinoProjectionHead(6, 8, 5, 7).named_parameters()}
    last = {name for name in names if name.startswith("last_layer.")}
    assert len(last) == 2 and all(name.startswith("mlp.") for name in names - last)


def test_linear_layers_start_as_truncated_normals_of_002_without_bias():
    head = DinoProjectionHead(300, 400, 200, 7)
    for module in head.mlp:
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.02)
            assert module.bias.count_nonzero() == 0


def test_a_copy_gives_the_same_and_shares_nothing():
    head = DinoProjectionHead(6, 8, 5, 7)
    twin = copy.deepcopy(head)
    features = torch.randn(9, 6)
    expected = head(features).detach()
    assert torch.equal(twin(features), expected)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    assert torch.equal(twin(features), expected)


def test_a_saved_state_restores_the_outputs():
    head, other = DinoProjectionHead(6, 8, 5, 7, use_bn=True), DinoProjectionHead(6, 8, 5, 7, use_bn=True)
    head(torch.randn(9, 6))  # moves the running statistics
    other.load_state_dict(head.state_dict())
    features = torch.randn(9, 6)
    assert torch.equal(head.eval()(features), other.eval()(features))


@pytest.mark.parametrize("name", ["input_dim", "hidden_dim", "bottleneck_dim", "output_dim", "num_layers"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        DinoProjectionHead(**{"input_dim": 6, name: 0})
