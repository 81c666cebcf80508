"""Writes the plots and report.html of a run."""

import logging

from dino.evaluator.knn import Measured
from dino.run.run import Run

log = logging.getLogger(__name__)


class Report:
    """Writes both, on rank zero, from what the last evaluation measured. Where a file cannot be written, this warns
    and training goes on.

    The report shows which settings differ from those of a run without overrides.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self, measured: Measured) -> None:
        from dino.config.composition import CONF, compose
        from dino.report import Course, Pictured, write_report

        run = self.run
        if run.parts.place.rank:
            return
        try:
            for level in ("iteration", "epoch"):
                run.history.plot_all(level, run.directory / "plots" / f"{level}.png")
        except OSError as error:
            log.warning("the plots are not written: %s", error)
        try:
            course = Course(
                config=run.config,
                defaults=compose([], "train", CONF),
                history=run.history,
                notes=run.history.metadata.get("collapse", ()),
            )
            data = run.data
            images = Pictured(data.train_set, data.val_set, data.transform, data.eval_transform)
            backbone = run.learner.teacher.backbone
            write_report(run.directory, course, images, backbone, measured, run.parts.device)
        except Exception as error:  # foreign data and foreign libraries, and nothing that training needs
            log.warning("report.html is not written: %s: %s", type(error).__name__, error)
