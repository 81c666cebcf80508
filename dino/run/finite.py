"""NaN and infinity: found before anything is saved, and named with the step and the images that it took."""

import itertools
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dino.runtime.processes import all_gather_objects

log = logging.getLogger(__name__)
TRY = "Try a lower optimizer.lr, a longer warm-up, or precision=fp32, with another name=."
SHOWN = 8  # images of a step that are named on the terminal; the log file has all
# Steps in a row that fp16's scaler may leave out. Each halves the scale, which begins at 2^16: after as many no finite
# gradient overflows any more.
OVERFLOWS = 50


class NonFiniteLoss(ArithmeticError):
    """The loss, its gradient or what a step made of the weights is NaN or infinite: training cannot go on from here."""

    exit_status = 3


class Finite:
    """Looks at the loss and the norm of the gradient of each step.

    images_of: the names of the images that a step took; steps count from 1 here.
    skip: steps of the run, at most, that may be left out; the optimizer does not take them (dino/run/parts.py).
    scaled: fp16's scaler leaves out the steps whose gradient overflows, and those are no fault.
    """

    def __init__(
        self, checkpoints: Path, images_of: Callable[[int], list[str]], skip: int = 0, scaled: bool = False
    ) -> None:
        self.checkpoints, self.images_of, self.skip, self.scaled = checkpoints, images_of, skip, scaled
        self.skipped, self.overflows = 0, 0  # in the run; in a row

    def __call__(self, step: int, loss: float, gradient_norm: float) -> bool:
        """Whether the step's loss is finite. Raises NonFiniteLoss where training must stop."""
        overflow = self.scaled and not math.isfinite(gradient_norm)
        self.overflows = self.overflows + 1 if overflow else 0
        if not math.isfinite(loss):
            self._leave_out(step, f"the loss is {loss}")
        elif self.overflows > OVERFLOWS or not (overflow or math.isfinite(gradient_norm)):
            self._leave_out(step, f"the gradient is {gradient_norm}")
        return math.isfinite(loss)

    def _leave_out(self, step: int, what: str) -> None:
        images = self.images_of(step)
        log.debug("step %d took the images %s", step, ", ".join(images))
        rest = f" and {len(images) - SHOWN:,} more, all in train.log" if len(images) > SHOWN else ""
        took = f"The step took the images {', '.join(images[:SHOWN])}{rest}."
        self.skipped += 1
        if self.skipped > self.skip:
            raise NonFiniteLoss(
                f"{what} at step {step}; the last good checkpoint is in {self.checkpoints}. {took} {TRY}"
            )
        count = f"{self.skipped} of at most {self.skip}"
        log.warning("%s at step %d, which is left out (%s). %s", what, step, count, took)

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "overflows": self.overflows}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.skipped, self.overflows = state["skipped"], state["overflows"]


def check_finite(state: Mapping[str, Any], step: int) -> None:
    """Raises NonFiniteLoss, on all processes, where weights, statistics or center in a run's `state` are not finite.

    Weights can overflow with finite gradients, and batch-norm statistics include the steps that were skipped.
    """
    values = {
        f"{part}.{name}": value
        for part in ("student", "teacher", "loss")
        for name, value in state[f"{part}_state_dict"].items()
        if value.is_floating_point()
    } | {"loss.center": state["dino_loss_center"]}
    extremes = torch.stack([norm.float() for norm in torch._foreach_norm([*values.values()], math.inf)])
    broken = [name for name, finite in zip(values, extremes.isfinite().tolist(), strict=True) if not finite]
    if broken := [*dict.fromkeys(itertools.chain(*all_gather_objects(broken)))]:
        listed = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if broken[3:] else "")
        raise NonFiniteLoss(
            f"after step {step} these are not finite, and not saved: {listed}. What was saved before stays. {TRY}"
        )
