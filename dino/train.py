"""Trains DINO: `python -m dino.train [group=option ...] [key=value ...]`; the same command again resumes."""

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from dino.loading.micro_batch import MicroBatch
from dino.model import update_teacher_EMA
from dino.optimizer import clip_gradients
from dino.run.learner import Learner
from dino.run.step import Step
from dino.runtime.importing import find_in_current_folder
from dino.runtime.sharding import no_sync


def train(
    learner: Learner,
    batches: Iterable[tuple[int, Iterable[MicroBatch]]],
    after_step: Callable[[Step], None] = lambda step: None,
) -> None:
    """Algorithm 1 of the paper (arXiv 2104.14294). `batches` yields (step, its micro-batches); steps count from 0."""
    student, teacher, loss = learner.student, learner.teacher, learner.loss
    optimizer, scaler = learner.optimizer, learner.scaler
    for step, micro_batches in batches:
        now = learner.schedule(step)  # every scheduled value, from the step alone
        now.apply(optimizer)
        total, teacher_means = torch.zeros((), device=loss.center.device), []
        for micro_batch in micro_batches:  # one, unless accumulating
            with nullcontext() if micro_batch.last else no_sync(learner.parallel):
                out = learner.distil(micro_batch.views, now.teacher_temp, micro_batch.per_step)
            total = total + out.loss
            teacher_means.append(out.teacher.mean(dim=0, dtype=loss.center.dtype))
        scaler.unscale_(optimizer)
        gradient_norm = clip_gradients(student.parameters(), learner.max_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        update_teacher_EMA(student, teacher, now.momentum)
        loss.update_center(torch.stack(teacher_means))  # C, once a step and last
        after_step(Step(step + 1, now, total, gradient_norm, out))


def main() -> None:
    from dino.config.command import command

    find_in_current_folder()
    command("train")(attempt)()


def attempt(settings: dict[str, Any], directory: Path) -> float:
    """`run`, as a program: a signal ends it with status 128 + its number."""
    from dino.run.stop import Interrupted

    try:
        return run(settings, Path(os.path.relpath(directory)))  # shorter to read, and the same place
    except Interrupted as stopped:
        sys.exit(128 + stopped.signum)


def run(settings: dict[str, Any], directory: Path) -> float:
    """Trains what `settings` say in `directory`, from where that stands; returns the last k-NN accuracy (NaN: none)."""
    from dino.run import session  # not before the command line is checked: it loads the rest

    return session.run(settings, directory, train)


if __name__ == "__main__":
    main()
