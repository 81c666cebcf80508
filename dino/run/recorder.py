"""A run's numbers: to history.json, to the loggers, to the progress bar."""

import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dino.history import History
from dino.logger import Loggers
from dino.run.epochs import Epochs
from dino.run.finite import Finite
from dino.run.monitor import Monitor
from dino.run.step import Step
from dino.runtime.processes import all_reduce_mean

log = logging.getLogger(__name__)


class Recorder:
    """Records every step. Numbers stay on the device between log steps, so nothing waits for a GPU; each one is looked
    at all the same.

    file: history.json, on rank zero; None on the other ranks, which compute the same numbers and write nothing.
    effective_batch: images per step, for images per second.
    every: steps from one entry of the history to the next.
    images_to_mfu: the model FLOPs utilisation at one image per second; None where the peak of the device is not known.
    """

    def __init__(
        self,
        history: History,
        loggers: Loggers,
        monitor: Monitor,
        finite: Finite,
        epochs: Epochs,
        effective_batch: int,
        every: int = 10,
        file: Path | None = None,
        images_to_mfu: float | None = None,
    ) -> None:
        self.history, self.loggers, self.monitor, self.finite = history, loggers, monitor, finite
        self.epochs, self.effective_batch, self.every, self.file = epochs, effective_batch, every, file
        self.images_to_mfu = images_to_mfu
        self.epoch_loss, self.epoch_steps, self.training_seconds = 0.0, 0, 0.0
        self.last_loss = math.nan
        self.recent = list[Tensor]()  # (loss, gradient norm) of the steps that nobody has looked at yet
        if self._logs(epochs.start):
            monitor.remember_weights()
        self.bar = tqdm(
            initial=epochs.start,
            total=epochs.total_steps,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 30.0,  # a log file is not a terminal
            disable=file is None,
        )
        self.restart_clock()

    def __call__(self, step: Step) -> None:
        self.recent.append(torch.stack((step.loss, step.gradient_norm.to(step.loss))))
        self.monitor.see(step.last.teacher)
        self.bar.update()
        if self._logs(step.done - 1):
            self._record(step)
        if self._logs(step.done):
            self.monitor.remember_weights()

    def look(self, done: int) -> float:
        """Fetches the losses and gradient norms since the last look; returns images per second since then.

        Raises NonFiniteLoss where one of them is not finite and may not be.
        """
        if not self.recent:
            return math.nan
        numbers = all_reduce_mean(torch.stack(self.recent)).tolist()  # what is not finite on one rank is so on all
        self.recent.clear()
        for done_then, (loss, norm) in enumerate(numbers, done - len(numbers) + 1):
            if self.finite(done_then, loss, norm):
                self.last_loss = loss
                self.epoch_loss += loss
                self.epoch_steps += 1
        seconds = time.monotonic() - self.looked_at
        self.training_seconds += seconds
        self.restart_clock()
        return len(numbers) * self.effective_batch / seconds

    def end_epoch(self, done: int, measured: Mapping[str, float]) -> None:
        """Records the epoch that ends at `done`, with what was measured of the teacher there."""
        values = {"loss": self.epoch_loss / (self.epoch_steps or math.nan), **measured}
        values["training_seconds"] = self.training_seconds
        self.epoch_loss, self.epoch_steps = 0.0, 0
        epoch = self.epochs.number(done)
        self.history.record_epoch(epoch, {"iteration": done, **values})
        self.loggers.log({f"epoch/{name}": value for name, value in values.items()}, done)
        shown = [f"epoch {epoch}", f"loss {values['loss']:.4f}"]
        if "knn" in measured:
            shown.append(f"k-NN {100 * measured['knn']:.1f} %")
        log.info(", ".join(shown))

    def write(self) -> None:
        if self.file is not None:
            self.history.save(self.file)

    def restart_clock(self) -> None:
        """The time since the last look was spent on something else than training."""
        self.looked_at = time.monotonic()

    def close(self) -> None:
        self.bar.close()

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch_loss": self.epoch_loss,
            "epoch_steps": self.epoch_steps,
            "training_seconds": self.training_seconds,
            "monitor": self.monitor.state_dict(),
            "finite": self.finite.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch_loss, self.epoch_steps = state["epoch_loss"], state["epoch_steps"]
        self.training_seconds = state["training_seconds"]
        self.monitor.load_state_dict(state["monitor"])
        self.finite.load_state_dict(state["finite"])

    def _logs(self, step: int) -> bool:
        return step % self.every == 0 or step + 1 == self.epochs.total_steps

    def _record(self, step: Step) -> None:
        images_per_second, now, last = self.look(step.done), step.now, step.last
        figures = self.monitor.measure(last.teacher, last.student, last.features, now.teacher_temp)
        relative = self.last_loss / self.monitor.ln_k
        values = {
            "loss": self.last_loss,
            "loss_over_ln_k": relative,
            "kl_over_ln_k": relative - figures["teacher_entropy"],
            **figures,
            "learning_rate": now.learning_rate,
            "weight_decay": now.weight_decay,
            "momentum": now.momentum,
            "teacher_temp": now.teacher_temp,
            "gradient_norm": step.gradient_norm.item(),
            "images_per_second": images_per_second,
        }
        speed = f"{images_per_second:.0f} img/s"
        if self.images_to_mfu is not None:
            values["mfu"] = images_per_second * self.images_to_mfu
            speed += f", MFU {100 * values['mfu']:.0f} %"
        self.history.record_iteration(step.done, values)
        if news := self.monitor.news(step.done, values, last.features):
            log.warning(news)
            self.history.metadata.setdefault("collapse", []).append(news)
        self.write()
        self.loggers.log(values, step.done)
        self.bar.set_postfix_str(
            f"loss {self.last_loss:.3f} ({relative:.2f} ln K), lr {now.learning_rate:.1e}, {speed}",
            refresh=False,
        )
