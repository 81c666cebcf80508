"""How fast a training step is: `python -m benchmarks.step [--rounds N] [any override of dino.train ...]`.

One table: the reference's step (benchmarks/reference.py), this project's, and this project's compiled, each training
weights of its own on the same views in memory, in turns, so that a busy neighbour slows all of them. A ratio is the
median over the rounds of the reference's time by the contestant's in the same round. Peak memory is measured in a
process for each. Below it, where a step of a whole run (data path and all) goes. `--curves FILE` trains the reference
and ours for 300 steps instead and plots their losses.
"""

import argparse
import contextlib
import re
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import dino.train
from benchmarks.reference import ReferenceTraining
from dino.config import CONF, compose
from dino.loading.micro_batch import MicroBatch
from dino.run.accelerate import accelerate
from dino.run.parts import Parts, assemble
from dino.runtime.device import DTYPES, describe, peak_memory
from dino.train import train

REFERENCE, OURS, COMPILED, BARE = "reference", "this", "this, compiled", "bare forward and backward passes"
CONTESTANTS = (REFERENCE, OURS, COMPILED, BARE)
Step = Callable[[int, list[Tensor]], float]  # (number, views) -> loss


def contestant(name: str, overrides: Sequence[str]) -> tuple[Parts, Step]:
    """One of CONTESTANTS with the weights that a run of these overrides begins with; also "reference, fp32"."""
    run = assemble(compose([*overrides, "evaluator=none"], "train", CONF))
    if name.startswith(REFERENCE):
        return run, reference_step(run, name.partition(", ")[2] or run.precision)
    if name == BARE:
        return run, lambda _, views: bare(run, views)
    if name == COMPILED:
        accelerate(run, compile=True, graph=False)

    def ours(number: int, views: list[Tensor]) -> float:
        losses: list[Tensor] = []
        train(run.learner, [(number, [MicroBatch(views)])], lambda step: losses.append(step.loss))
        return losses[0].item()

    return run, ours


def reference_step(run: Parts, precision: str) -> Step:
    """The reference's, from the weights of `run`, whose own are let go."""
    amp = None if precision == "fp32" else DTYPES[precision]
    reference = ReferenceTraining(run.student, run.transform.ncrops, run.learner.max_norm, amp)
    run.learner.student = run.learner.parallel = run.learner.teacher = run.learner.optimizer = None  # type: ignore[assignment]

    def step(number: int, views: list[Tensor]) -> float:
        now = run.schedule(number)
        return reference.step(views, now.learning_rate, now.weight_decay, now.momentum, now.teacher_temp)

    return step


def bare(run: Parts, views: list[Tensor]) -> float:
    """The passes that a step cannot do without: the teacher's, the student's and its way back."""
    with run.learner.autocast():
        with torch.no_grad():
            run.teacher(views[: run.loss.n_global_crops])
        outputs = run.student(views)
    outputs.backward(torch.ones_like(outputs))
    run.student.zero_grad(set_to_none=True)
    return 0.0


def views_of(run: Parts) -> list[Tensor]:
    """Noise in the shapes of a batch."""
    generator, batch = torch.Generator().manual_seed(0), run.data.batching.batch_size
    return [torch.randn(batch, 3, size, size, generator=generator).to(run.device) for size in run.transform.sizes]


def seconds(step: Callable[[], Any], device: torch.device) -> float:
    finish(device)
    begin = clock(device)
    step()
    finish(device)
    return clock(device) - begin


def clock(device: torch.device) -> float:
    """The wall's; of a single thread the processor's, which other work on the machine does not change much."""
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(name: str, overrides: Sequence[str], threads: int) -> float:
    """GB beyond what the process held when it had imported everything, after three steps of its own."""
    command = [sys.executable, "-m", "benchmarks.step", "--threads", str(threads), "--peak-of", name, *overrides]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(name: str, overrides: Sequence[str]) -> None:
    before = peak_memory(torch.device("cpu"))
    run, step = contestant(name, overrides)
    views = views_of(run)
    for number in range(3):
        step(number, views)
    print((peak_memory(run.device) - (before if run.device.type != "cuda" else 0)) / 1e9)


class Laps:
    """A stopwatch: every moment from `start` on belongs to one part, to `rest` where no function that it holds runs."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.parts, self.between = device, Counter[str](), "rest"

    def start(self) -> None:
        finish(self.device)
        self.last = clock(self.device)

    def stop(self, part: str) -> None:
        finish(self.device)
        now = clock(self.device)
        self.parts[part] += now - self.last
        self.last = now

    def of(self, part: str, function: Callable[..., Any], then: str = "rest") -> Callable[..., Any]:
        """`function`, its time counted for `part`, and for `then` what comes after it."""

        def timed(*arguments: Any, **more: Any) -> Any:
            self.stop(self.between)
            answer = function(*arguments, **more)
            self.stop(part)
            self.between = then
            return answer

        return timed


def breakdown(overrides: Sequence[str], steps: int) -> tuple[dict[str, float], float]:
    """Seconds that a step of a run spends in each of its parts, and those of a step without the stopwatch."""
    config = compose([*overrides, "evaluator=none"], "train", CONF)
    run = assemble(config)
    laps, batches = Laps(run.device), iter(run.steps(0))

    def read() -> tuple[int, list[MicroBatch]]:
        step, parts = next(batches)
        return step, list(parts)

    def take(number: int, read: Callable[[], Any] = read) -> None:
        some = ((step, iter(parts)) for step, parts in (read() for _ in range(number)))
        train(run.learner, some)

    @contextlib.contextmanager
    def watched() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for thing, name, part, then in (
                (run.teacher, "forward", "teacher", "rest"),
                (run.student, "forward", "student", "rest"),
                (run.loss, "forward", "loss", "backward"),
                (dino.train, "clip_gradients", "clipping", "rest"),
                (run.optimizer, "step", "optimizer", "rest"),
                (dino.train, "update_teacher_EMA", "EMA", "rest"),
                (run.loss, "update_center", "center", "rest"),
            ):
                stack.enter_context(patch.object(thing, name, laps.of(part, getattr(thing, name), then)))
            yield

    take(2)
    without = 0.0
    for _ in range(steps):  # in turns, so that a busy neighbour slows both
        without += seconds(lambda: take(1), run.device)
        with watched():
            laps.start()
            take(1, laps.of("data: decode, crop, photometry", read))
            laps.stop("rest")
    return {part: spent / steps for part, spent in laps.parts.items()}, without / steps


def print_table(rows: dict[str, tuple[Parts, Step]], rounds: int, peaks: dict[str, float]) -> None:
    first = next(iter(rows.values()))[0]
    views, times = views_of(first), defaultdict[str, list[float]](list)
    for run, step in rows.values():
        for number in range(2):  # in which memory is found
            seconds(lambda: step(number, views), run.device)  # noqa: B023
    for number in range(2, rounds + 2):
        for name, (run, step) in rows.items():
            times[name].append(seconds(lambda: step(number, views), run.device))  # noqa: B023
    print("| | ms a step | best round | images/s | x reference | peak, GB | TFLOP | TFLOP/s |")
    print("|---|---|---|---|---|---|---|---|")
    reference = next(iter(rows))
    for name, (_, step) in rows.items():
        median = statistics.median(times[name])
        ratio = statistics.median(theirs / own for theirs, own in zip(times[reference], times[name], strict=True))
        with FlopCounterMode(display=False) as counted:
            flop = 0.0 if name == COMPILED else float(step(rounds + 2, views) * 0 + counted.get_total_flops())
        cells = [
            f"{1e3 * median:.0f}",
            f"{1e3 * min(times[name]):.0f}",
            f"{first.data.batching.batch_size / median:.1f}",
            f"{ratio:.2f}",
        ]
        cells += [f"{peaks[name]:.2f}" if name in peaks else ""]
        cells += [f"{flop / 1e12:.3f}", f"{flop / median / 1e12:.3f}"] if flop else ["", ""]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def print_breakdown(overrides: Sequence[str], steps: int) -> None:
    parts, without = breakdown(overrides, steps)
    total = sum(parts.values())
    print("\n| a step of a run | ms | of the sum |\n|---|---|---|")
    for part, spent in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"| {part} | {1e3 * spent:.1f} | {spent / total:.1%} |")
    print(f"| **sum** | {1e3 * total:.1f} | 100% |\n| a step without the stopwatch | {1e3 * without:.1f} | |")


def curves(overrides: Sequence[str], steps: int, path: Path) -> None:
    """The losses of the reference and of ours over `steps` steps of one run's views, plotted to `path`."""
    import matplotlib.pyplot as plt

    _, reference = contestant(REFERENCE, overrides)
    run, ours = contestant(OURS, overrides)
    losses: list[tuple[float, float]] = []
    for number, parts in run.steps(0):
        views = next(parts).views
        losses.append((reference(number, views), ours(number, views)))
        if len(losses) == steps:
            break
    apart = [abs(theirs - own) for theirs, own in losses]
    print(
        f"{run.precision}, {steps} steps: the losses differ by {max(apart):.4f} at most, {statistics.fmean(apart):.4f} "
        f"on average; the last 20 have means of {statistics.fmean(r for r, _ in losses[-20:]):.4f} (reference) and "
        f"{statistics.fmean(o for _, o in losses[-20:]):.4f}"
    )
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for label, values, style in zip((REFERENCE, OURS), zip(*losses, strict=True), ("-", "--"), strict=True):
        axes.plot(range(1, steps + 1), values, style, label=label, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss", title=f"{type(run.student.backbone).__name__}, {run.precision}")
    axes.legend()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("overrides", nargs="*", help="of dino.train: backbone=dino_vits16 training.batch_size=8 ...")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, default=1, help="on the CPU; with more than 1 on a quiet machine")
    options.add_argument("--eager", action="store_true", help="leave out what is compiled")
    options.add_argument("--fp32-reference", action="store_true", help="the reference in fp32 too, and first")
    options.add_argument("--no-peaks", action="store_true", help="leave out the memory, which takes a process for each")
    options.add_argument("--no-breakdown", action="store_true")
    options.add_argument("--steps", type=int, help="of the breakdown (20), or of the curves (300)")
    options.add_argument("--curves", type=Path, help="train the reference and ours, plot their losses here, and end")
    options.add_argument("--peak-of", help=argparse.SUPPRESS)
    chosen = options.parse_args(argv)
    torch.set_num_threads(chosen.threads)
    if chosen.peak_of:
        return print_peak(chosen.peak_of, chosen.overrides)
    if chosen.curves:
        return curves(chosen.overrides, chosen.steps or 300, chosen.curves)
    names = [name for name in CONTESTANTS if not (chosen.eager and name == COMPILED)]
    if chosen.fp32_reference:
        names.insert(0, f"{REFERENCE}, fp32")
    rows = {name: contestant(name, chosen.overrides) for name in names}
    run = rows[OURS][0]
    views = ", ".join(f"{number} x {size}" for size, number in Counter(run.transform.sizes).items())
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    print(
        f"{found.group(1) if found else 'unknown CPU'}; {describe(run.device)}; torch {torch.__version__}; "
        f"{run.precision}; {type(run.student.backbone).__name__}, {run.loss.out_dim:,} prototypes, batch "
        f"{run.data.batching.batch_size}, views of {views} pixels; {chosen.rounds} rounds\n"
    )
    peaks = {} if chosen.no_peaks else {name: peak(name, chosen.overrides, chosen.threads) for name in names}
    print_table(rows, chosen.rounds, peaks)
    if not chosen.no_breakdown:
        print_breakdown(chosen.overrides, chosen.steps or 20)
    return None


if __name__ == "__main__":
    main()
