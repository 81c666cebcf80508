"""Losses of 50 steps, eager, compiled and captured, printed as JSON; tests/gpu/test_steps.py reads them.

A program of its own: the compiler does not see through the checks of shapes that are on in a test run.
"""

import contextlib
import json
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import config as inductor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dino.config import CONF, compose
from dino.loading.micro_batch import MicroBatch
from dino.run.accelerate import accelerate
from dino.run.parts import assemble
from dino.train import train

inductor.fallback_random = True  # the draws of eager torch, in place of the compiler's own
STEPS, ACCUMULATION = 50, 2
COMMON = [
    "device=cuda",
    "evaluator=none",
    "training.batch_size=8",
    f"training.gradient_accumulation_steps={ACCUMULATION}",
    "training.freeze_last_layer_epochs=0.1",
    "teacher.warmup_temp=0.03",
    "teacher.warmup_temp_epochs=1",
    "training.skip_nonfinite_steps=50",
    "dataset.train.images=800",
]
NETWORKS = {
    "vit": [
        "backbone=dino_vits16",
        "backbone.hidden_dim=128",
        "backbone.depth=3",
        "backbone.heads=2",
        "backbone.drop_path=0.2",
    ],
    "resnet": ["backbone=resnet_small"],
}


def learner(*overrides):
    return assemble(compose([*COMMON, *overrides], "train", CONF))


def steps_of(sizes, start=0):
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        parts = [[torch.randn(8, 3, size, size, generator=generator) for size in sizes] for _ in range(ACCUMULATION)]
        if step >= start:
            on_gpu = [[view.cuda() for view in views] for views in parts]
            yield (
                step,
                [MicroBatch(views, per_step=ACCUMULATION, last=views is on_gpu[-1]) for views in on_gpu],
            )


def losses_of(parts, start=0, end=STEPS):
    losses = []
    batches = ((step, parts_of) for step, parts_of in steps_of(parts.transform.sizes, start) if step < end)
    train(parts.learner, batches, lambda step: losses.append(step.loss))
    return torch.stack(losses).tolist()


def made(overrides, compile=False, graph=False):
    parts = learner(*overrides)
    began = time.perf_counter()
    accelerate(parts, compile, graph)
    torch.cuda.synchronize()
    torch.manual_seed(2)
    return parts, time.perf_counter() - began


def resumed(overrides, compile, graph):
    """The last losses of a run that was saved and went on in a learner of its own."""
    first, _ = made(overrides, compile, graph)
    losses_of(first, end=STEPS // 2)
    state, rng = first.learner.state_dict(), torch.cuda.get_rng_state()
    second, _ = made(overrides, compile, graph)
    second.learner.load_state_dict(state)
    torch.cuda.set_rng_state(rng)
    return losses_of(second, start=STEPS // 2)


def of_network(name, precision):
    overrides = [*NETWORKS[name], f"precision={precision}", "deterministic=true"]
    torch.backends.cuda.enable_cudnn_sdp(False)
    results, seconds = {}, {}
    for way, (compile, graph) in {"eager": (0, 0), "captured": (0, 1), "both": (1, 1)}.items():
        torch._dynamo.reset()
        parts, seconds[way] = made(overrides, bool(compile), bool(graph))
        torch._dynamo.config.error_on_recompile = bool(compile)
        results[way] = losses_of(parts)
        torch._dynamo.config.error_on_recompile = False
        results[f"{way}, scale"] = parts.learner.scaler.get_scale()
        results[f"{way}, graph"] = parts.learner.passes != parts.learner.forward_backward
    results["both, resumed"] = resumed(overrides, True, True)
    for label, context in other_rounding(name):
        with context:
            results[label] = losses_of(made(overrides)[0])
    return results | {"seconds": seconds}


def other_rounding(name):
    """Eager runs of the same numbers, rounded elsewhere."""
    if name == "vit":
        yield "eager, attention written out", sdpa_kernel(SDPBackend.MATH)
        yield "eager, other attention", sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION)
    yield "eager, other convolutions", without_cudnn()
    yield "eager, bias added apart", bias_added_apart()


@contextlib.contextmanager
def without_cudnn():
    torch.backends.cudnn.enabled = False
    yield
    torch.backends.cudnn.enabled = True


@contextlib.contextmanager
def bias_added_apart():
    """Linear layers that round after the product and after the bias, in place of once."""
    forward = nn.Linear.forward

    def apart(self, x):
        out = F.linear(x, self.weight)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    nn.Linear.forward = apart
    yield
    nn.Linear.forward = forward


if __name__ == "__main__":
    print(json.dumps(of_network(*sys.argv[1:])))
