"""Writes the plots and report.html of a run."""

import logging

from dino.evaluator.knn import Measured
from dino.run.run import Run

log = logging.getLogger(__name__)


class Report:
    """Writes both with what the last evaluation saw, on rank zero. Where it cannot, it warns, and training goes on.

    The report shows which settings differ from those of a run without overrides.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self, measured: Measured) -> None:
        from dino.config.composition import CONF, compose
        from dino.report import write_report

        run = self.run
        if run.parts.place.rank:
            return
        try:
            for level in ("iteration", "epoch"):
                run.history.plot_all(level, run.directory / "plots" / f"{level}.png")
        except OSError as error:
            log.warning("the plots are not written: %s", error)
        try:
            write_report(
                run.directory,
                config=run.config,
                defaults=compose([], "train", CONF),
                history=run.history,
                backbone=run.learner.teacher.backbone,
                train_set=run.data.train_set,
                val_set=run.data.val_set,
                transform=run.data.transform,
                eval_transform=run.data.eval_transform,
                bank=measured.bank,
                queries=measured.queries,
                predicted=measured.predicted,
                device=run.parts.device,
                notes=run.history.metadata.get("collapse", ()),
            )
        except Exception as error:  # foreign data and foreign libraries, and nothing that training needs
            log.warning("report.html is not written: %s: %s", type(error).__name__, error)
