"""What the teacher has learned so far: when it is measured, what it must beat, whether it is the best."""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from dino.evaluator.knn import NOTHING, Measured
from dino.history import History
from dino.run.epochs import Epochs
from dino.run.parts import Parts
from dino.run.stop import StopSignal
from dino.runtime.memory import skip_when_out_of_memory

log = logging.getLogger(__name__)


class Evaluation:
    """Measures the teacher every `every` epochs, and always at the end of the run. `report` shows what was measured;
    it is told whether the run is at its end.

    It changes nothing that trains, so a signal may cut it short (but after the last step): a run that goes on from
    there evaluates first.
    """

    def __init__(
        self,
        parts: Parts,
        history: History,
        epochs: Epochs,
        stop: StopSignal,
        report: Callable[[Measured, bool], None],
        every: int = 1,
    ) -> None:
        self.parts, self.history, self.epochs, self.stop = parts, history, epochs, stop
        self.report, self.every = report, every
        self.epoch_ended_at = 0  # steps done at the end of the last epoch that was recorded
        self.last_knn, self.best_knn = math.nan, -1.0
        self._say_baselines()

    def measure(self, done: int) -> Measured:
        """Raises Interrupted where a signal cut it short."""
        at_end = self.epochs.is_over(done)
        if self.epochs.number(done) % self.every and not at_end:
            return NOTHING
        with nullcontext() if at_end else self.stop.at_once():
            metadata, none = self.history.metadata, dict[str, float]()
            if "baselines" not in metadata:  # once in a run's life
                metadata["baselines"] = skip_when_out_of_memory(self.parts.baselines, none)
                self._say_baselines()
            return skip_when_out_of_memory(self.parts.evaluate, NOTHING)

    def note(self, done: int, figures: Mapping[str, float]) -> bool:
        """Takes the figures of the epoch that ended at `done`; True where k-NN is the best so far."""
        self.epoch_ended_at = done
        if "knn" not in figures:
            return False
        best = figures["knn"] > self.best_knn
        self.last_knn, self.best_knn = figures["knn"], max(self.best_knn, figures["knn"])
        return best

    def state_dict(self) -> dict[str, Any]:
        return {"epoch_ended_at": self.epoch_ended_at, "last_knn": self.last_knn, "best_knn": self.best_knn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch_ended_at = state["epoch_ended_at"]
        self.last_knn, self.best_knn = state["last_knn"], state["best_knn"]

    def _say_baselines(self) -> None:
        if found := self.history.metadata.get("baselines"):
            log.info("k-NN to beat: raw pixels %.1f %%, untrained backbone %.1f %%", *(100 * a for a in found.values()))
