import pytest
import torch
from torch import nn

import dino
from dino.backbone.resnet import ResNet
from dino.backbone.vit_tiny import ViTTiny
from dino.head import DinoProjectionHead
from dino.model import DinoModel
from dino.optimizer import LARS, clip_gradients, parameter_groups


def names_by_group(model):
    name_of = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, model.projection_head.last_layer)
    return {(g["decay"], g["last_layer"]): [name_of[id(p)] for p in g["params"]] for g in groups}


def test_which_parameters_of_a_vit_get_decay():
    model = DinoModel(ViTTiny(depth=1), DinoProjectionHead(128, 32, 16, 8, use_bn=True))
    named = names_by_group(model)
    assert sorted(named[(True, False)]) == sorted(
        [
            "backbone.cls_token",
            "backbone.cls_position",
            "backbone.positions",
            "backbone.stem.0.weight",
            "backbone.stem.3.weight",
            "backbone.stem.6.weight",
            "backbone.stem.9.weight",
            "backbone.blocks.0.qkv.weight",
            "backbone.blocks.0.projection.weight",
            "backbone.blocks.0.mlp.0.weight",
            "backbone.blocks.0.mlp.2.weight",
            "projection_head.mlp.0.weight",
            "projection_head.mlp.3.weight",
            "projection_head.mlp.6.weight",
        ]
    )
    assert named[(True, True)] == ["projection_head.last_layer.parametrizations.weight.original1"]
    assert all(
        name.endswith(".bias") or "norm" in name or ".stem." in name or ".mlp." in name
        for name in named[(False, False)]
    )
    assert sorted(sum(named.values(), [])) == sorted(n for n, p in model.named_parameters() if p.requires_grad)


def test_in_a_resnet_exactly_the_convolutions_and_linear_weights_get_decay():
    model = DinoModel(ResNet("resnet18"), DinoProjectionHead(512, 32, 16, 8))
    named = names_by_group(model)
    weights = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    } - {"projection_head.last_layer.weight"}
    assert set(named[(True, False)]) == weights
    assert set(named[(False, False)]) == {
        name
        for name, p in model.named_parameters()
        if p.requires_grad and name not in weights and "last_layer" not in name
    }


def test_each_gradient_is_clipped_to_the_norm_by_itself_and_the_norm_of_all_is_told():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([0.5])
    norm = clip_gradients(parameters, max_norm=1.0)
    assert norm.item() == pytest.approx((25 + 0.25) ** 0.5)
    assert parameters[0].grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
    assert parameters[1].grad.tolist() == [0.5]
    assert parameters[2].grad is None


def test_without_a_bound_the_gradients_stay_as_they_are():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([30.0, 40.0])
    assert clip_gradients([parameter]).item() == pytest.approx(50)
    assert parameter.grad.tolist() == [30, 40]


def test_lars_takes_the_steps_of_its_paper():
    weight, bias = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([2.0]))
    groups = [{"params": [weight], "decay": True}, {"params": [bias], "decay": False, "weight_decay": 0.0}]
    optimizer = LARS(groups, lr=0.5, momentum=0.9, weight_decay=0.1, trust_coefficient=0.01)
    w, v, b, u = [3.0, 4.0], [0.0, 0.0], 2.0, 0.0
    for gradient, bias_gradient in [([1.0, -2.0], 0.3), ([0.5, 0.25], -0.2)]:
        weight.grad, bias.grad = torch.tensor(gradient), torch.tensor([bias_gradient])
        optimizer.step()
        update = [g + 0.1 * x for g, x in zip(gradient, w)]
        trust = 0.01 * (w[0] ** 2 + w[1] ** 2) ** 0.5 / (update[0] ** 2 + update[1] ** 2) ** 0.5
        v = [0.9 * old + trust * new for old, new in zip(v, update)]
        w = [x - 0.5 * step for x, step in zip(w, v)]
        u = 0.9 * u + bias_gradient
        b -= 0.5 * u
    assert weight.tolist() == pytest.approx(w, rel=1e-5)
    assert bias.item() == pytest.approx(b, rel=1e-5)


def test_lars_allocates_its_momentum_once(monkeypatch):
    weight, allocated, zeros_like = nn.Parameter(torch.ones(2)), [], torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda tensor: allocated.append(tensor) or zeros_like(tensor))
    optimizer = LARS([weight], lr=0.1)
    for _ in range(3):
        weight.grad = torch.ones(2)
        optimizer.step()
    assert len(allocated) == 1


def test_lars_moves_a_weight_of_zero():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    LARS([weight], lr=0.1, momentum=0.0).step()
    assert weight.tolist() == pytest.approx([-0.1, -0.1])


@pytest.mark.parametrize(
    "change", [{"lr": -1.0}, {"momentum": -0.1}, {"weight_decay": -1.0}, {"trust_coefficient": 0.0}]
)
def test_lars_refuses_values_that_cannot_work(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        LARS([nn.Parameter(torch.zeros(1))], **({"lr": 0.1} | change))


RUN = ["dataset.train.images=256", "training.batch_size=64", "training.gradient_accumulation_steps=2", "device=cpu"]
RUN += ["dataset.train.size=48", "dataset.global_size=32", "dataset.local_size=16", "backbone.depth=1"]
LARGE = ["scheduler.final_weight_decay=0.1", "scheduler.reference_batch_size=64"]


@pytest.mark.parametrize(
    ("overrides", "decay", "final_decay", "peak"),
    [
        (["optimizer=adamw"], 0.04, 0.4, 1e-3),
        (["optimizer=sgd"], 1e-4, 1e-4, 0.03 * 128 / 256),
        (["optimizer=lars"], 1e-6, 1e-6, 0.3 * 128 / 256),
        (["optimizer=sgd", "optimizer.lr=0.1", "optimizer.weight_decay=0.01"], 0.01, 0.01, 0.1 * 128 / 256),
        (["optimizer=sgd", *LARGE], 1e-4, 0.1, 0.03 * 128 / 64),
        (["optimizer=adamw", *LARGE], 0.04, 0.1, 1e-3 * 128 / 64),
        (["optimizer=adamw", "optimizer.final_weight_decay=0.2"], 0.04, 0.2, 1e-3),
    ],
)
def test_rate_and_decay_are_the_recipe_of_the_optimizers_yaml(overrides, decay, final_decay, peak):
    run = dino.build(dino.compose([*RUN, *overrides]))
    assert run.data.batching.effective_batch == 128
    first, last = run.schedule(0), run.schedule(run.data.total_steps)
    assert (first.weight_decay, last.weight_decay) == pytest.approx((decay, final_decay))
    assert run.schedule(run.schedule.warmup_steps).learning_rate == pytest.approx(peak)
    run.schedule(0).apply(run.optimizer)
    assert sorted({group["weight_decay"] for group in run.optimizer.param_groups}) == pytest.approx([0.0, decay])
