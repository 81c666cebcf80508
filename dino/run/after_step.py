"""What happens after a step, in order: record, evaluate, agree over the processes, save, stop."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dino.loading.broken import refusal, too_many
from dino.loading.data import Data
from dino.run.epochs import Epochs
from dino.run.evaluation import Evaluation
from dino.run.recorder import Recorder
from dino.run.saving import Saving
from dino.run.step import Step
from dino.run.stop import Interrupted, StopSignal
from dino.runtime.compile import eager
from dino.runtime.processes import all_reduce_max
from dino.runtime.rng import preserve_rng


class AfterStep:
    """The only place that knows the order. Its members save themselves through state_dict.

    With several processes each has its own, and all decide the same at the same step.
    """

    def __init__(
        self,
        epochs: Epochs,
        recorder: Recorder,
        evaluation: Evaluation,
        saving: Saving,
        stop: StopSignal,
        data: Data,
        directory: Path,
    ) -> None:
        self.epochs, self.recorder, self.evaluation, self.saving = epochs, recorder, evaluation, saving
        self.stop, self.data, self.directory = stop, data, directory

    def __call__(self, step: Step) -> None:
        self.recorder(step)
        self.saving.writer.check()
        self._between_steps(step.done)

    def end_interrupted_epoch(self) -> None:
        """On resume: what a signal left undone between two epochs."""
        start = self.epochs.start
        if self.epochs.end_at(start) and self.evaluation.epoch_ended_at < start:
            self._between_steps(start)

    def state_dict(self) -> dict[str, Any]:
        return {"recorder": self.recorder.state_dict(), "evaluation": self.evaluation.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.recorder.load_state_dict(state["recorder"])
        self.evaluation.load_state_dict(state["evaluation"])

    def _between_steps(self, done: int) -> None:
        ends_epoch = self.epochs.end_at(done)
        best = ends_epoch and self._end_epoch(done)
        # A signal may reach one process alone, and clocks differ: all must do the same.
        signum, overdue, broken = all_reduce_max(self.stop.signum or 0, self.saving.is_overdue(), len(self.data.broken))
        images = len(self.data.train_set) + len(self.data.val_set)
        if signum or overdue or too_many(broken, images) or self.saving.is_due(done, best):
            self.recorder.look(done)  # never save over a good checkpoint what is not finite
            self.recorder.write()
            self.saving(done, best, self.state_dict())
            self.recorder.restart_clock()
        if signum or too_many(broken, images):
            self.saving.writer.wait()
        if too_many(broken, images):
            raise refusal(broken, images, self.directory)
        if signum:
            all_reduce_max(0)  # until the checkpoint is written: a launcher ends all when one process ends
            raise Interrupted(signum)

    @preserve_rng()
    @eager()
    def _end_epoch(self, done: int) -> bool:
        """Evaluates where it is time and records the epoch; True where the teacher is the best so far."""
        self.recorder.look(done)
        try:
            measured = self.evaluation.measure(done)
        except Interrupted:
            return False
        self.recorder.end_epoch(done, measured.figures)
        best = self.evaluation.note(done, measured.figures)
        if measured.figures or self.epochs.is_over(done):
            self.recorder.write()
            self.evaluation.report(measured, self.epochs.is_over(done))
        self.recorder.restart_clock()
        return best
