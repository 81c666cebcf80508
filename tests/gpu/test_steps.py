"""Compiled and captured steps are the eager ones: ViT and ResNet, with accumulation, stochastic depth, schedules."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNS = [(network, precision) for network in ("vit", "resnet") for precision in ("fp32", "bf16", "fp16")]


@pytest.fixture(scope="module")
def results():
    """All at once: a small network leaves a GPU room for the others."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    started = {
        run: subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("steps.py")), *run],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for run in RUNS
    }
    found = {}
    for run, process in started.items():
        out, error = process.communicate(timeout=280)
        found[run] = json.loads(out.splitlines()[-1]) if process.returncode == 0 else error[-3000:]
    return found


def apart(one, other):
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_captured_steps_are_the_eager_ones_to_the_bit(results, run):
    assert isinstance(results[run], dict), results[run]
    assert results[run]["captured, graph"]
    assert results[run]["captured"] == results[run]["eager"]
    assert results[run]["captured, scale"] == results[run]["eager, scale"]


@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_compiled_steps_lie_within_the_spread_of_eager_ones_that_round_differently(results, run):
    found = results[run]
    assert isinstance(found, dict), found
    assert found["both, graph"]
    others = [losses for name, losses in found.items() if name.startswith("eager, ") and isinstance(losses, list)]
    spread = max(apart(a, b) for a in [found["eager"], *others] for b in others)
    assert 0 < apart(found["both"], found["eager"]) <= spread
    if run[1] == "fp32":
        assert abs(found["both"][0] - found["eager"][0]) < 1e-5 * found["eager"][0]


@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_a_compiled_and_captured_run_goes_on_to_the_bit(results, run):
    assert isinstance(results[run], dict), results[run]
    resumed = results[run]["both, resumed"]
    assert resumed == results[run]["both"][-len(resumed) :]
