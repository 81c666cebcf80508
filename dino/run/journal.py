"""What happens between two steps: show, record, evaluate, checkpoint, stop. The loop itself knows nothing of it."""

import contextlib
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dino.head import Factors
from dino.history import History
from dino.loading.broken import LIST, MOST, TooManyBroken, too_many
from dino.logger import Loggers
from dino.run.finite import Finite
from dino.run.monitor import Monitor
from dino.runtime.processes import all_reduce_max, all_reduce_mean, place
from dino.runtime.rng import preserve_rng
from dino.scheduler import Values

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """A signal asked for the end; the checkpoint is written."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StopSignal:
    """Turns SIGTERM, SIGINT and SIGUSR2 into a flag, looked at after each step.

    A second SIGINT stops at once, where there is one process alone.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._raises_in: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it a signal raises Interrupted wherever the program is, and one that came before at its beginning: for
        work that can be dropped and done again.

        Not with several processes: a signal may reach one of them, and the others would wait for it.
        """
        self._raises_in = os.getpid() if place().world_size == 1 else None
        try:
            if self._raises_in is not None and self.signum is not None:
                raise Interrupted(self.signum)
            yield
        finally:
            self._raises_in = None

    def _note(self, signum: int, _: FrameType | None) -> None:
        self.signum = signum
        if place().world_size == 1:  # torchrun passes on the terminal's SIGINT, which its processes have had already
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own would wait for whatever hangs
        if self._raises_in == os.getpid():  # data workers, which are forks, have this handler too
            raise Interrupted(signum)


class Journal:
    """Called after every step with what the step knows; keeps the run's history, bar, loggers and checkpoints.

    evaluate: () -> metrics of the teacher now, {} where there is nothing to measure; it changes nothing that trains, so
    that a signal can cut it short (but after the last step): a run that goes on from there evaluates first.
    report: () -> None, after it.
    checkpoint: (iteration, the journal's own state, whether it is the best by k-NN) -> None.
    broken: grows by a sentence for each image, of `images` in all, that could not be read.
    Numbers stay on the device between log steps, so that a GPU is not waited for; every one is looked at all the same.
    With several processes each has a journal, and all decide the same at the same step; `writes` is true in one.
    """

    def __init__(
        self,
        directory: Path,
        history: History,
        loggers: Loggers,
        monitor: Monitor,
        evaluate: Callable[[], dict[str, float]],
        report: Callable[[], None],
        checkpoint: Callable[[int, dict[str, Any], bool], None],
        stop: StopSignal,
        broken: set[str],
        images: int,
        finite: Finite,
        start: int,
        total_steps: int,
        steps_per_epoch: int,
        effective_batch: int,
        log_every_steps: int = 10,
        evaluate_every_epochs: int = 1,
        checkpoint_every_epochs: int = 1,
        checkpoint_every_minutes: float = 15.0,
        state: dict[str, Any] | None = None,
        writes: bool = True,
    ) -> None:
        self.directory, self.history, self.loggers, self.monitor = directory, history, loggers, monitor
        self.writes = writes
        self.evaluate, self.report, self.checkpoint, self.stop = evaluate, report, checkpoint, stop
        self.broken, self.images, self.finite = broken, images, finite
        self.total_steps, self.steps_per_epoch, self.effective_batch = total_steps, steps_per_epoch, effective_batch
        self.log_every_steps, self.evaluate_every_epochs = log_every_steps, evaluate_every_epochs
        self.checkpoint_every_epochs, self.checkpoint_every_minutes = checkpoint_every_epochs, checkpoint_every_minutes
        nothing_yet: dict[str, Any] = {
            "epoch_loss": 0.0,
            "epoch_steps": 0,
            "epoch_ended_at": 0,
            "last_knn": math.nan,
            "best_knn": -1.0,
            "training_seconds": 0.0,
        }
        self.state = state or nothing_yet
        self.last_loss = math.nan
        if "monitor" in self.state:  # from the first checkpoint on
            monitor.load_state_dict(self.state["monitor"])
        if "finite" in self.state:
            finite.load_state_dict(self.state["finite"])
        if self._logs(start):
            monitor.remember_weights()
        self.first_step, self.recent = start, list[Tensor]()
        seconds = 0.1 if sys.stderr.isatty() else 30.0  # a log file is not a terminal
        self.bar = tqdm(
            initial=start,
            total=total_steps,
            unit="step",
            dynamic_ncols=True,
            mininterval=seconds,
            disable=not writes,
        )
        self.last_save = self.last_flush = time.monotonic()

    def close(self) -> None:
        self.bar.close()

    def __call__(
        self,
        step: int,
        now: Values,
        loss: Tensor,
        gradient_norm: Tensor,
        teacher: Tensor,
        student: Factors,
        features: Tensor,
    ) -> None:
        """`step` counts from 0; `iteration` in the history and on checkpoints is the number of updates done."""
        done = step + 1
        self.recent.append(torch.stack((loss, gradient_norm.to(loss))))
        self.monitor.see(teacher)
        self.bar.update()
        if self._logs(step):
            self._record(done, now, gradient_norm, teacher, student, features)
        if self._logs(done):
            self.monitor.remember_weights()
        self._between_steps(done)

    def end_interrupted_epoch(self) -> None:
        """On resume: what a signal left undone between two epochs."""
        if self._ends_epoch(self.first_step) and self.state["epoch_ended_at"] < self.first_step:
            self._between_steps(self.first_step)

    def _between_steps(self, done: int) -> None:
        at_epoch_end = self._ends_epoch(done)
        best = at_epoch_end and self._end_of_epoch(done)
        epoch = done // self.steps_per_epoch
        minutes = (time.monotonic() - self.last_save) / 60
        # A signal may reach one process alone, and clocks differ: all must do the same.
        signum, overdue, broken = all_reduce_max(
            self.stop.signum or 0, minutes >= self.checkpoint_every_minutes, len(self.broken)
        )
        if (
            done == self.total_steps
            or done <= self.first_step + 1  # a full or odd disk shows at once
            or overdue
            or (at_epoch_end and (best or epoch % self.checkpoint_every_epochs == 0))
            or signum
            or too_many(broken, self.images)
        ):
            self._save(done, best)
        if too_many(broken, self.images):
            raise TooManyBroken(
                f"{broken:,} of {self.images:,} images cannot be read, more than {MOST:.0%}; they are listed in "
                f"{self.directory / LIST}. Repair them and run the same command, or start anew without them."
            )
        if signum:
            all_reduce_max(0)  # until the checkpoint is written: a launcher ends all when one process ends
            raise Interrupted(signum)

    def _ends_epoch(self, done: int) -> bool:
        return done % self.steps_per_epoch == 0 or done == self.total_steps

    def _logs(self, step: int) -> bool:
        return step % self.log_every_steps == 0 or step + 1 == self.total_steps

    def _record(
        self, done: int, now: Values, gradient_norm: Tensor, teacher: Tensor, student: Factors, features: Tensor
    ) -> None:
        images_per_second = self._look(done)
        figures = self.monitor.measure(teacher, student, features, now.teacher_temp)
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
            "gradient_norm": gradient_norm.item(),
            "images_per_second": images_per_second,
        }
        self.history.record_iteration(done, values)
        if news := self.monitor.news(done, values, features):
            log.warning(news)
            self.history.metadata.setdefault("collapse", []).append(news)
        self._write_history()
        self.loggers.log(values, done)
        self.bar.set_postfix_str(
            f"loss {self.last_loss:.3f} ({relative:.2f} ln K), lr {now.learning_rate:.1e}, "
            f"{images_per_second:.0f} img/s",
            refresh=False,
        )

    def _look(self, done: int) -> float:
        """Fetches losses and norms of gradients since the last look; returns images per second since then."""
        numbers = all_reduce_mean(torch.stack(self.recent)).tolist()  # what is not finite on one process is so on all
        self.recent.clear()
        for done_then, (loss, norm) in enumerate(numbers, done - len(numbers) + 1):
            if self.finite(done_then, loss, norm):
                self.last_loss = loss
                self.state["epoch_loss"] += loss
                self.state["epoch_steps"] += 1
        seconds = time.monotonic() - self.last_flush
        self.state["training_seconds"] += seconds
        self.last_flush = time.monotonic()
        return len(numbers) * self.effective_batch / seconds

    @preserve_rng()
    def _end_of_epoch(self, done: int) -> bool:
        """Evaluates where it is time, records the epoch; True where k-NN is the best so far."""
        if self.recent:
            self._look(done)
        epoch, at_end = math.ceil(done / self.steps_per_epoch), done == self.total_steps
        measured: dict[str, float] = {}
        if epoch % self.evaluate_every_epochs == 0 or at_end:
            try:
                with contextlib.nullcontext() if at_end else self.stop.at_once():
                    measured = self.evaluate()
            except Interrupted:
                return False
        values = {"loss": self.state["epoch_loss"] / (self.state["epoch_steps"] or math.nan), **measured}
        values["training_seconds"] = self.state["training_seconds"]
        self.state |= {"epoch_loss": 0.0, "epoch_steps": 0, "epoch_ended_at": done}
        self.history.record_epoch(epoch, {"iteration": done, **values})
        self.loggers.log({f"epoch/{name}": value for name, value in values.items()}, done)
        shown = [f"epoch {epoch}", f"loss {values['loss']:.4f}"]
        if "knn" in measured:
            shown.append(f"k-NN {100 * measured['knn']:.1f} %")
        log.info(", ".join(shown))
        best = "knn" in measured and measured["knn"] > self.state["best_knn"]
        if "knn" in measured:
            self.state["last_knn"] = measured["knn"]
            self.state["best_knn"] = max(self.state["best_knn"], measured["knn"])
        if measured or at_end:
            self._write_history(report=True)
        self.last_flush = time.monotonic()
        return best

    def _save(self, done: int, best: bool) -> None:
        if self.recent:
            self._look(done)  # never save over a good checkpoint what is not finite
        self._write_history()
        self.state |= {"monitor": self.monitor.state_dict(), "finite": self.finite.state_dict()}
        self.checkpoint(done, self.state, best)
        self.last_save = self.last_flush = time.monotonic()

    def _write_history(self, report: bool = False) -> None:
        if not self.writes:
            return
        self.history.save(self.directory / "history.json")
        if report:
            self.report()
