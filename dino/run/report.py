"""Writes the plots and report.html of a run."""

import logging
import time

from dino.evaluator.knn import Measured
from dino.run.run import Run

log = logging.getLogger(__name__)


class Report:
    """Writes both, on rank zero, from what the last evaluation measured. Where a file cannot be written, this warns
    and training goes on.

    every_minutes: of the first ones, none is written sooner after the one before; the last one always is. Training
        waits for them. In a thread, plots and t-SNE would hold the interpreter's lock, which training needs for each of
        its operations: a thread would slow both down and save nothing.

    The report shows which settings differ from those of a run without overrides.
    """

    def __init__(self, run: Run, every_minutes: float) -> None:
        self.run, self.every_minutes = run, every_minutes
        self.written_at: float | None = None  # by the monotonic clock, in seconds

    def __call__(self, measured: Measured, last: bool) -> None:
        if self.run.parts.place.rank or not (last or self._is_due()):
            return
        try:
            self._write_plots()
        except Exception as error:  # a full disk, a foreign library; nothing that training needs
            log.warning("the plots are not written: %s", error)
        try:
            self._write_page(measured)
        except Exception as error:
            log.warning("report.html is not written: %s: %s", type(error).__name__, error)
        self.written_at = time.monotonic()

    def _is_due(self) -> bool:
        return self.written_at is None or (time.monotonic() - self.written_at) / 60 >= self.every_minutes

    def _write_plots(self) -> None:
        for level in ("iteration", "epoch"):
            self.run.history.plot_all(level, self.run.directory / "plots" / f"{level}.png")

    def _write_page(self, measured: Measured) -> None:
        from dino.config.composition import CONF, compose
        from dino.report import Course, Pictured, write_report

        run, data = self.run, self.run.data
        course = Course(
            config=run.config,
            defaults=compose([], "train", CONF),
            history=run.history,
            notes=run.history.metadata.get("collapse", ()),
        )
        images = Pictured(data.train_set, data.val_set, data.transform, data.eval_transform)
        backbone = run.learner.teacher.backbone
        write_report(run.directory, course, images, backbone, measured, run.parts.device)
