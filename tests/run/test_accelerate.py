"""Captured steps on a CPU, with a stand-in for the CUDA graph, and compiled ones, against eager ones."""

import logging
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dino import DinoLoss, DinoModel, DinoProjectionHead, Schedule, make_teacher, parameter_groups
from dino.backbone.vit_tiny import ViTTiny
from dino.config import CONF, compose
from dino.loading.micro_batch import MicroBatch
from dino.run import accelerate as accelerating
from dino.run import session
from dino.run.accelerate import accelerate, captured
from dino.run.learner import Learner
from dino.run.parts import assemble
from dino.run.stop import Interrupted
from dino.train import train

ROOT = Path(__file__).parents[2]
STEPS, BATCH, SIZES = 50, 4, (32, 32, 16)


def replayed(function):
    """In place of a CUDA graph: runs the function again, and writes its outputs where they were, as a replay does."""
    outputs = function()

    def replay():
        with torch.no_grad():
            for before, now in zip(tree_leaves(outputs), tree_leaves(torch.enable_grad()(function)())):
                before.copy_(now)

    return replay, outputs


def learner(scaled=False):
    torch.manual_seed(0)
    backbone = ViTTiny(hidden_dim=16, depth=3, heads=2, image_size=32, drop_path=0.3)
    head = DinoProjectionHead(16, 24, 8, 11, use_bn=True)
    student = DinoModel(backbone, head)
    schedule = Schedule(
        epochs=5,
        steps_per_epoch=10,
        effective_batch=2 * BATCH,
        lr=0.002,
        weight_decay=0.04,
        warmup_temp=0.03,
        warmup_temp_epochs=2.0,
        freeze_last_layer_epochs=1.0,
        warmup_epochs=1.0,
    )
    made = Learner(
        student,
        make_teacher(student),
        DinoLoss(11, ncrops=len(SIZES)),
        torch.optim.AdamW(parameter_groups(student, head.last_layer)),
        schedule,
        max_norm=0.5,
    )
    if scaled:
        made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=4)  # overflows at first
    return made


def micro_batches(start=0):
    """Steps of two micro-batches."""
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        parts = [[torch.randn(BATCH, 3, size, size, generator=generator) for size in SIZES] for _ in range(2)]
        if step >= start:
            yield step, [MicroBatch(views, per_step=2, last=part == 1) for part, views in enumerate(parts)]


def capture(made):
    views = [torch.randn(BATCH, 3, size, size) for size in SIZES]
    with torch.random.fork_rng(), accelerating._left_as_it_was(made):
        made.passes = captured(made, views, 2, record=replayed)


def trained(made, batches):
    losses = []
    train(made, batches, lambda step: losses.append(step.loss.item()))
    return losses


def same_state(one, other):
    pairs = zip(tree_leaves(one.state_dict()), tree_leaves(other.state_dict()), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("scaled", [False, True])
def test_captured_steps_are_the_eager_ones_to_the_bit(scaled):
    """Accumulation, stochastic depth, a frozen last layer, batch norm, clipping and every schedule are in them."""
    eager, graph = learner(scaled), learner(scaled)
    torch.manual_seed(2)
    expected = trained(eager, micro_batches())
    capture(graph)
    torch.manual_seed(2)
    assert trained(graph, micro_batches()) == expected
    assert same_state(eager, graph)
    assert len(set(expected)) == STEPS
    if scaled:
        assert 0 < eager.scaler.get_scale() < 2.0**127


def test_a_captured_run_resumed_in_the_middle_is_the_run_in_one_go():
    whole, first = learner(), learner()
    for made in (whole, first):
        capture(made)
    torch.manual_seed(2)
    expected = trained(whole, micro_batches())
    torch.manual_seed(2)
    batches = micro_batches()
    trained(first, (next(batches) for _ in range(23)))
    state, rng = first.state_dict(), torch.get_rng_state()
    resumed = learner()
    capture(resumed)
    resumed.load_state_dict(state)
    torch.set_rng_state(rng)
    assert trained(resumed, micro_batches(23)) == expected[23:]
    assert same_state(whole, resumed)


def test_a_parameter_that_takes_no_part_gets_no_gradient_and_no_decay():
    made = learner()
    unused = made.student.unused = nn.Parameter(torch.ones(3, 3))
    made.teacher.unused = nn.Parameter(torch.ones(3, 3), requires_grad=False)
    made.optimizer.add_param_group({"params": [unused], "decay": True, "last_layer": False})
    capture(made)
    trained(made, (next(micro_batches()) for _ in range(2)))
    assert torch.equal(unused, torch.ones(3, 3))


def tiny_parts(*overrides):
    few = ["dataset.train.images=32", "dataset.val.images=10", "training.batch_size=4", "evaluator=none", "device=cpu"]
    small = ["backbone.hidden_dim=32", "backbone.depth=1", "head.hidden_dim=32", "dataset.out_dim=64"]
    return assemble(compose([*few, *small, *overrides], "train", CONF))


def test_a_machine_that_cannot_compile_is_a_warning_and_leaves_the_run_as_it_was(caplog, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("Triton is not installed\nfor all that it may be")

    eager, parts = tiny_parts(), tiny_parts()
    monkeypatch.setattr(parts.loss, "compile", broken)
    monkeypatch.setattr(accelerating, "compile_regions", lambda network: None)
    monkeypatch.setattr(parts.student.projection_head, "compile", lambda **_: None)
    monkeypatch.setattr(parts.teacher.projection_head, "compile", lambda **_: None)
    rng = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        accelerate(parts, compile=True, graph=True)
    said, of_graph = caplog.messages
    assert of_graph.startswith("a step cannot be recorded as a CUDA graph here (the device is cpu); the run goes on")
    assert said.startswith("a step cannot be compiled here (Triton is not installed for all that it may be); the run")
    assert torch.equal(torch.get_rng_state(), rng) and same_state(eager.learner, parts.learner)
    assert all(p.grad is None for p in parts.student.parameters())
    assert torch.compiler.is_compiling() is False


def test_a_step_that_cannot_be_captured_is_a_warning_and_stays_eager(caplog, monkeypatch):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    eager, parts = tiny_parts(), tiny_parts()
    monkeypatch.setattr(parts, "device", torch.device("cuda"))
    monkeypatch.setattr(accelerating, "_views", lambda _: [torch.rand(4, 3, s, s) for s in parts.transform.sizes])
    monkeypatch.setattr(accelerating, "captured", partial(captured, record=refuse))
    with caplog.at_level(logging.WARNING):
        accelerate(parts, compile=False, graph=True)
    (said,) = caplog.messages
    assert "cannot be recorded as a CUDA graph here (operation not permitted when stream is capturing)" in said
    assert parts.learner.passes == parts.learner.forward_backward
    assert same_state(eager.learner, parts.learner)


def test_a_signal_while_it_compiles_is_no_failure_of_the_compiler(monkeypatch):
    def interrupted(_):
        raise Interrupted(15)

    monkeypatch.setattr(accelerating, "compile_regions", interrupted)
    with pytest.raises(Interrupted):
        accelerate(tiny_parts(), compile=True, graph=False)


def test_a_signal_before_the_first_step_is_said_and_handed_on_to_be_requeued(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise Interrupted(signal.SIGUSR2)

    handed_on = []
    before = signal.signal(signal.SIGUSR2, lambda signum, frame: handed_on.append(signum))  # as submitit's
    monkeypatch.setattr(session, "accelerate", interrupted)
    few = ["dataset.train.images=32", "dataset.val.images=10", "training.batch_size=4", "evaluator=none", "device=cpu"]
    try:
        with pytest.raises(Interrupted):
            session.run(compose([*few, "compile=true"], "train", CONF), tmp_path / "a", train)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert handed_on == [signal.SIGUSR2]
    assert "stopped by SIGUSR2; the same command resumes" in capsys.readouterr().err


@pytest.mark.slow
def test_a_program_on_a_machine_without_a_compiler_trains_with_one_warning(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CXX": "/nowhere/c++"}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    few = ["training.max_steps=2", "training.batch_size=4", "dataset.train.images=32", "evaluator=none", "device=cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "dino.train", *few, "compile=true", "name=a"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("a step cannot be compiled here") == 1
    assert "Traceback" not in done.stderr
    assert (tmp_path / "outputs" / "a" / "teacher.safetensors").is_file()


COMPILED = """
import sys
sys.path[:0] = {paths!r}
import torch
from torch._inductor import config as inductor
from test_accelerate import Breaking, learner, micro_batches, trained
from dino.loading.micro_batch import MicroBatch
from dino.runtime.compile import compile_regions

inductor.fallback_random = True  # the draws of eager torch, in place of the compiler's own


def losses(compiled, dtype):
    torch._dynamo.reset()
    made = learner()
    for model in (made.student, made.teacher, made.loss):
        model.to(dtype)
    made.teacher_temp = made.teacher_temp.to(dtype)
    batches = (
        (step, [MicroBatch([view.to(dtype) for view in part.views], per_step=2, last=part.last) for part in parts])
        for step, parts in micro_batches()
    )
    if not compiled:
        return trained(made, batches)
    for model in (made.student, made.teacher):
        compile_regions(model.backbone)
        model.projection_head.compile(dynamic=False)
    made.loss.compile(dynamic=False)
    first = trained(made, [next(batches)])
    torch._dynamo.config.error_on_recompile = True
    rest = trained(made, batches)
    torch._dynamo.config.error_on_recompile = False
    return first + rest


def apart(one, other):
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


print(apart(losses(True, torch.float64), losses(False, torch.float64)))
counters = torch._dynamo.utils.counters
print(counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
print(apart(losses(True, torch.float32)[:1], losses(False, torch.float32)[:1]))

torch._dynamo.reset()
network, x = Breaking(), torch.randn(3, 4)
expected = network(x)
compile_regions(network)
print(apart(network(x).flatten().tolist(), expected.flatten().tolist()), sum(counters["graph_break"].values()))
"""


class Breaking(nn.Module):
    """A foreign network that decides on data, which no graph can hold."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        x = self.inner(x)
        return x * 2 if x.sum().item() > 0 else x


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_steps_are_the_eager_ones_and_few_graphs_serve_all_of_them():
    """In a process of its own: the compiler does not see through the checks of shapes that are on in this one."""
    paths = [str(ROOT), str(Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-c", COMPILED.format(paths=paths)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=880,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    in_fp64, counts, in_fp32, of_foreign = done.stdout.splitlines()[-4:]
    assert float(in_fp64) < 1e-6
    # Blocks and the last block, of the teacher and of the student in two sizes (on a GPU at once); heads; the loss.
    assert counts == "9 0"
    # Of the first step: Adam divides gradients by themselves, and so makes much of rounding in those that follow.
    assert float(in_fp32) < 1e-5 * 2.4  # ln 11, about the loss
    difference, breaks = map(float, of_foreign.split())
    assert difference < 1e-5 and breaks > 0
