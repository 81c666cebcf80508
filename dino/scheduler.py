"""Every value that changes during training, as a pure function of the step: nothing to save, nothing to restore."""

import math
from dataclasses import dataclass

from torch.optim import Optimizer

from dino.loss.dino import check_temperature


def cosine(step: int, start: float, end: float, total_steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at `total_steps`, `end` ever after."""
    progress = min(1.0, step / total_steps)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def linear(step: int, start: float, end: float, total_steps: int) -> float:
    """From `start` at step 0 to `end` at `total_steps` (at once where that is 0), `end` ever after."""
    return end if step >= total_steps else start + (end - start) * step / total_steps


def cosine_warmup(
    step: int, peak: float, end: float, total_steps: int, warmup_steps: int = 0, warmup_start: float = 0.0
) -> float:
    """Linear from `warmup_start` to `peak` over `warmup_steps`, then half a cosine to `end` (Sec. 3.2)."""
    if step < warmup_steps:
        return linear(step, warmup_start, peak, warmup_steps)
    return cosine(step - warmup_steps, peak, end, max(1, total_steps - warmup_steps))


def get_momentum_schedule(base: float, final: float, epochs: int, steps_per_epoch: int) -> list[float]:
    """The teacher's momentum in each of epochs * steps_per_epoch steps, a cosine from `base` to `final` (Sec. 3.1)."""
    _require("base", base, 0 <= base <= 1, "in [0, 1]")
    _require("final", final, 0 <= final <= 1, "in [0, 1]")
    _require("epochs", epochs, epochs >= 1, "at least 1")
    _require("steps_per_epoch", steps_per_epoch, steps_per_epoch >= 1, "at least 1")
    total_steps = epochs * steps_per_epoch
    return [cosine(step, base, final, total_steps) for step in range(total_steps)]


@dataclass(frozen=True)
class Values:
    """What holds during one step."""

    learning_rate: float
    last_layer_learning_rate: float
    weight_decay: float
    momentum: float
    teacher_temp: float

    def apply(self, optimizer: Optimizer) -> None:
        """Sets rates and decay of the groups that `parameter_groups` made."""
        for group in optimizer.param_groups:
            group["lr"] = self.last_layer_learning_rate if group["last_layer"] else self.learning_rate
            group["weight_decay"] = self.weight_decay if group["decay"] else 0.0


class Schedule:
    """`schedule(step) -> Values`.

    Epochs become steps here and nowhere else. `lr` is multiplied by effective batch / `reference_batch_size` where that
    is set (Sec. 3.2: 256). The last layer is frozen by a rate of 0 for `freeze_last_layer_epochs`; Adam's moments of it
    go on moving meanwhile, so it starts warm.
    """

    def __init__(
        self,
        epochs: int,
        steps_per_epoch: int,
        effective_batch: int,
        lr: float,
        weight_decay: float,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
        temp: float = 0.04,
        warmup_temp: float = 0.04,
        warmup_temp_epochs: float = 0.0,
        freeze_last_layer_epochs: float = 0.0,
        warmup_epochs: float = 10.0,
        max_warmup_fraction: float = 1.0,
        warmup_start_lr: float = 0.0,
        min_lr: float = 1e-6,
        final_weight_decay: float | None = 0.4,
        reference_batch_size: int | None = None,
    ) -> None:
        _require("epochs", epochs, epochs >= 1, "at least 1")
        _require("lr", lr, 0 < lr < math.inf, "above 0")
        _require("min_lr", min_lr, 0 <= min_lr < math.inf, "0 or more")
        _require("warmup_start_lr", warmup_start_lr, 0 <= warmup_start_lr < math.inf, "0 or more")
        _require("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "0 or more")
        _require("warmup_epochs", warmup_epochs, 0 <= warmup_epochs < math.inf, "0 or more epochs")
        _require("max_warmup_fraction", max_warmup_fraction, 0 <= max_warmup_fraction <= 1, "in [0, 1]")
        _require("momentum", momentum, 0 <= momentum <= 1, "in [0, 1]")
        _require("final_momentum", final_momentum, 0 <= final_momentum <= 1, "in [0, 1]")
        check_temperature("temp", temp)
        check_temperature("warmup_temp", warmup_temp)
        _require(
            "warmup_temp_epochs", warmup_temp_epochs, 0 <= warmup_temp_epochs <= epochs, f"in [0, epochs={epochs}]"
        )
        _require(
            "freeze_last_layer_epochs",
            freeze_last_layer_epochs,
            0 <= freeze_last_layer_epochs < epochs,
            f"in [0, epochs={epochs})",
        )
        if final_weight_decay is not None:
            _require("final_weight_decay", final_weight_decay, 0 <= final_weight_decay < math.inf, "0 or more, or null")
        if reference_batch_size is not None:
            _require("reference_batch_size", reference_batch_size, reference_batch_size >= 1, "at least 1, or null")
        self.total_steps = epochs * steps_per_epoch
        self.warmup_steps = round(min(warmup_epochs, max_warmup_fraction * epochs) * steps_per_epoch)
        self.freeze_steps = round(freeze_last_layer_epochs * steps_per_epoch)
        self.temp_steps = round(warmup_temp_epochs * steps_per_epoch)
        scale = 1.0 if reference_batch_size is None else effective_batch / reference_batch_size
        self.peak_lr, self.warmup_start_lr, self.min_lr = lr * scale, warmup_start_lr, min_lr
        self.weight_decay = weight_decay
        self.final_weight_decay = weight_decay if final_weight_decay is None else final_weight_decay
        self.momentum, self.final_momentum = momentum, final_momentum
        self.warmup_temp, self.temp = warmup_temp, temp
        if self.min_lr > self.peak_lr:
            raise ValueError(
                f"min_lr must not be above the peak learning rate {self.peak_lr:g}, got {min_lr:g}; "
                "lower scheduler.min_lr or raise optimizer.lr."
            )

    def __call__(self, step: int) -> Values:
        total = self.total_steps
        rate = cosine_warmup(step, self.peak_lr, self.min_lr, total, self.warmup_steps, self.warmup_start_lr)
        return Values(
            learning_rate=rate,
            last_layer_learning_rate=0.0 if step < self.freeze_steps else rate,
            weight_decay=cosine(step, self.weight_decay, self.final_weight_decay, total),
            momentum=cosine(step, self.momentum, self.final_momentum, total),
            teacher_temp=linear(step, self.warmup_temp, self.temp, self.temp_steps),
        )


def _require(name: str, value: float | int, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {value}.")
