"""What compiling a step costs: `python -m benchmarks.compiling [any override of dino.train ...]`.

Prints the operations of an eager step, and of the compiled one its graphs, their breaks, what was compiled again in the
steps after, and seconds. For the seconds of a first time set TORCHINDUCTOR_CACHE_DIR to an empty folder.
"""

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step import views_of
from dino.config import CONF, compose
from dino.loading.micro_batch import MicroBatch
from dino.run.accelerate import accelerate
from dino.run.parts import Parts, assemble
from dino.train import train

STEPS = 3  # after the first, in which nothing may be compiled again


class Operations(TorchDispatchMode):
    """Counts those that torch dispatches: on a GPU, about the kernels that the CPU must launch."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def step(parts: Parts, number: int) -> None:
    train(parts.learner, [(number, [MicroBatch(views_of(parts))])])


def measured(overrides: Sequence[str]) -> dict[str, float]:
    parts = assemble(compose([*overrides, "evaluator=none"], "train", CONF))
    step(parts, 0)  # in which the optimizer makes its state
    with Operations() as eager:
        step(parts, 1)
    begun, cpu = time.perf_counter(), sum(os.times()[:4])
    accelerate(parts, compile=True, graph=False)
    found = {"seconds": time.perf_counter() - begun, "seconds of all cores": sum(os.times()[:4]) - cpu}
    counters = torch._dynamo.utils.counters
    graphs = counters["stats"]["unique_graphs"]
    for number in range(2, 2 + STEPS):
        step(parts, number)
    return {
        "operations of an eager step": eager.count,
        "graphs": graphs,
        "graph breaks": sum(counters["graph_break"].values()),
        "compiled again": counters["stats"]["unique_graphs"] - graphs,
        **found,
    }


def main(argv: Sequence[str] | None = None) -> None:
    for name, value in measured(sys.argv[1:] if argv is None else argv).items():
        print(f"{name}: {value:,.0f}")


if __name__ == "__main__":
    main()
