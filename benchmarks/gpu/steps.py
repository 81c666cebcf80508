"""A training step, from views in memory to the moved teacher, of one contestant in a process of its own."""

import time
from collections.abc import Callable, Sequence

from torch import Tensor

from benchmarks import step as beside
from benchmarks.gpu.measure import times, work
from benchmarks.gpu.turn import Turn
from dino.config import CONF, compose
from dino.loading.micro_batch import MicroBatch
from dino.run.accelerate import accelerate
from dino.run.parts import Parts, assemble
from dino.runtime.device import choose_device, choose_precision, peak_memory
from dino.runtime.flops import images_to_mfu
from dino.train import train

REFERENCE, EAGER, COMPILED, CAPTURED = "reference", "eager", "compiled", "captured"
CONTESTANTS = (REFERENCE, EAGER, COMPILED, CAPTURED)
Step = Callable[[int, list[Tensor]], Tensor | float]  # (number, views) -> loss


def measure(
    turn: Turn, contestant: str, overrides: Sequence[str], rounds: int, only_first: bool = False
) -> dict[str, float]:
    """The figures of one of CONTESTANTS; with `only_first`, how long the first step takes from the process's start."""
    run = assemble(compose([*overrides, f"precision={half_precision()}", "evaluator=none"], "train", CONF))
    sizes, n_global_crops = run.transform.sizes, run.loss.n_global_crops
    factor = images_to_mfu(run.teacher, sizes, n_global_crops, run.device, world_size=1)
    views, step = beside.views_of(run), step_of(run, contestant)
    first_loss = float(step(0, views))
    found = {"first_step_s": time.monotonic() - turn.begun}
    if only_first:
        return found
    turn.alone()
    numbers = iter(range(1, 10**6))
    found |= times(lambda: step(next(numbers), views), rounds, run.device)
    # Since the process began, for what a captured step takes is allocated when it is captured.
    found["peak_gb"] = peak_memory(run.device) / 1e9
    found["images_per_second"] = 1e3 * run.data.batching.batch_size / found["ms_unsynchronised"]
    if factor is not None:
        found["mfu"] = factor * found["images_per_second"]
    found |= work(lambda: step(next(numbers), views), run.device)
    return found | {"first_loss": first_loss, "last_loss": float(step(next(numbers), views))}


def step_of(run: Parts, contestant: str) -> Step:
    """The step of one of CONTESTANTS, from the weights of `run`."""
    if contestant == REFERENCE:
        return beside.reference_step(run, run.precision)
    if contestant in (COMPILED, CAPTURED):
        accelerate(run, compile=True, graph=contestant == CAPTURED)

    def ours(number: int, views: list[Tensor]) -> Tensor:
        losses: list[Tensor] = []
        train(run.learner, [(number, [MicroBatch(views)])], lambda done: losses.append(done.loss))
        return losses[0]

    return ours


def half_precision() -> str:
    """bf16; fp16 on a GPU that has none, fp32 on a CPU that has none."""
    device = choose_device()
    chosen = choose_precision("auto", device)
    return "fp16" if device.type == "cuda" and chosen == "fp32" else chosen
