"""What data parallelism costs: `python -m benchmarks.scaling` on paper, `... --measure` on this machine's loopback.

Paper: a step of N processes all-reduces S = 4 bytes x trainable parameters (fp32 gradients), 4 x K for the center, and
a few hundred bytes of agreements. In a ring each process sends 2 (N - 1) / N x S. Against that stands the time of the
backward passes, under which torch hides it: 2/3 of a student's 3 passes a view, at FLOPs / (peak x utilisation).

Measured: the bytes that two processes really send over the loopback interface in a step, beside the formula.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from dino.config import CONF, compose
from dino.config.node import build_node
from dino.model import DinoModel

PEAK = 989e12  # FLOP/s of an H100 SXM in dense bf16, NVIDIA's data sheet
UTILISATION = 0.35  # assumed, not measured: of PEAK, on the small matrices of a ViT with local views of 37 tokens
BANDWIDTH = {  # bytes a second that one process's ring moves, each way
    "8 (NVLink)": (8, 370e9),  # of 450e9 on the data sheet; the usual bus bandwidth of an all-reduce in a DGX H100
    "64 (8 x 400 Gb/s a node)": (64, 350e9),  # 8 rings, a network card each: 8 x 50e9 at nine tenths
    "64 (1 x 100 Gb/s a node)": (64, 12.5e9 * 0.9),  # all rings of a node share the card
}


def network(backbone: str) -> tuple[DinoModel, dict]:
    config = compose(["experiment=imagenet_vits16", "dataset.root=/", f"backbone={backbone}"], "train", CONF)
    with torch.device("meta"):
        body = build_node(config["backbone"])
        return DinoModel(body, build_node(config["head"], input_dim=body.output_dim)), config["augmentation"]


def parameters(model: torch.nn.Module) -> int:
    """Those with a gradient."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def flops(model: DinoModel, augmentation: dict) -> tuple[int, int]:
    """Of one image: (student's forward pass of all views, teacher's of the global ones)."""
    sizes = [augmentation["global_size"]] * 2, [augmentation["local_size"]] * augmentation["num_local_views"]
    counted = []
    for views in (sizes[0] + sizes[1], sizes[0]):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model([torch.zeros(1, 3, size, size, device="meta") for size in views])
        counted.append(counter.get_total_flops())
    return counted[0], counted[1]


def paper(batch_size: int) -> None:
    print(f"{batch_size} images a GPU and step; compute at {UTILISATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s (assumed)")
    print(
        "| backbone | parameters | sent a step | compute | GPUs | all-reduce | of the backward | stops at a batch of |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for backbone in ("dino_vits16", "dino_vitb16"):
        model, augmentation = network(backbone)
        size = 4 * parameters(model)
        student, teacher = flops(model, augmentation)
        an_image = (3 * student + teacher) / (PEAK * UTILISATION)
        backward = 2 * student / (PEAK * UTILISATION)
        for name, (processes, bandwidth) in BANDWIDTH.items():
            sent = 2 * (processes - 1) / processes * size
            seconds = sent / bandwidth
            print(
                f"| {backbone} | {size / 4e6:.1f} M | {sent / 1e6:.0f} MB | {1e3 * batch_size * an_image:.0f} ms "
                f"| {name} | {1e3 * seconds:.1f} ms | {seconds / (batch_size * backward):.0%} "
                f"| {math.ceil(seconds / backward)} |"
            )


SMALL = ["backbone=vit_tiny", "head=small", "device=cpu", "precision=fp32", "evaluator=none", "training.epochs=10"]


def measure(steps: int) -> None:
    """Two pairs of runs of 1 and of 2 processes, one after the other, each process with one thread."""
    model_parameters = None
    for _ in range(2):
        for processes in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                speed, sent, model_parameters = train(processes, steps, folder)
            print(f"{processes} processes: {speed:6.1f} images/s, {sent / 1e6:.3f} MB a step over the loopback")
    formula = 2 * (2 - 1) / 2 * 4 * model_parameters * 2
    print(f"formula, both processes together: {formula / 1e6:.3f} MB a step ({model_parameters:,} parameters)")


def train(processes: int, steps: int, folder: str) -> tuple[float, float, int]:
    """(images a second, bytes a step over the loopback, trainable parameters) of a run of 2 x `steps` steps: only what
    its second half adds to a run of `steps` counts, so that starting and saving cancel."""
    seconds, sent, done = [], [], []
    for length in (steps, 2 * steps):
        overrides = [*SMALL, f"training.max_steps={length}", f"name=of_{length}"]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), "-m", "dino.train", *overrides]
        environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
        before = loopback_bytes()
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
        sent.append(loopback_bytes() - before)
        state = torch.load(
            max(Path(folder, "outputs", f"of_{length}", "checkpoints").glob("step_*.pt")), weights_only=True
        )
        seconds.append(state["after_step"]["recorder"]["training_seconds"])
        done.append(state["iteration"])
        batch, student = state["effective_batch"], state["student_state_dict"]
    fixed = ("original0", "running_", "num_batches")  # the last layer's norms, and buffers
    count = sum(value.numel() for name, value in student.items() if not any(word in name for word in fixed))
    assert done == [steps, 2 * steps]
    return steps * batch / (seconds[1] - seconds[0]), (sent[1] - sent[0]) / steps, count


def loopback_bytes() -> int:
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[1])


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--measure", action="store_true")
    arguments.add_argument("--batch-size", type=int, default=64, help="images a GPU and step, on paper")
    arguments.add_argument("--steps", type=int, default=30, help="measured steps")
    chosen = arguments.parse_args()
    measure(chosen.steps) if chosen.measure else paper(chosen.batch_size)
