"""Where the figures of an evaluation go: a file beside the run, its history and loggers, the terminal."""

import json
import logging
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from dino.config.node import build_node
from dino.history import History
from dino.logger import Loggers
from dino.run.checkpoint import newest_checkpoint
from dino.run.directory import CONFIG, lock, state_of
from dino.run.subject import Subject
from dino.runtime.refused import Refused

log = logging.getLogger("dino.evaluate")
RESULTS = "evaluation.json"
PLAIN = ("rankme", "alpha")  # figures that are no shares


def record(results: dict[str, dict[str, float]], subject: Subject) -> None:
    """evaluation.json, with what earlier commands measured of the same; of a run its history and loggers as well."""
    path = subject.output / RESULTS
    try:
        entries = json.loads(path.read_text()) if path.is_file() else []
    except ValueError:
        aside = path.replace(path.with_suffix(".unreadable"))
        log.warning("%s cannot be read and is now %s", path, aside)
        entries = []
    of = {"subject": subject.name, "size": subject.preprocessing["size"], "dataset": subject.dataset["val"]}
    before: dict[str, Any] = next((entry for entry in entries if entry["of"] == of), {"measured": {}})
    finite = {n: {k: v if math.isfinite(v) else None for k, v in row.items()} for n, row in results.items()}  # JSON's
    measured = {name: before["measured"].get(name, {}) | figures for name, figures in finite.items()}
    entry = {"of": of, "measured": before["measured"] | measured, "created_at": datetime.now(UTC).isoformat()}
    entries = [*(other for other in entries if other["of"] != of), entry]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n")
    partial.replace(path)
    log.info("written to %s", path)
    if subject.run is None:
        return
    try:
        with lock(subject.run):
            history = History.load(subject.run / "history.json")
            history.metadata["evaluations"] = entries
            history.save(subject.run / "history.json")
            tell_loggers(subject.run, subject.logger, results["backbone"])
    except (Refused, OSError, ValueError) as error:
        log.warning("not in the run's history: %s", error)


def tell_loggers(run: Path, nodes: dict[str, Any], figures: dict[str, float]) -> None:
    if not nodes:
        return
    state = newest_checkpoint(run)
    loggers = Loggers(list(build_node(nodes).values()))
    config = yaml.safe_load((run / CONFIG).read_text())
    loggers.start(run, config, None if state is None else state["wandb_run_id"])
    # A step of its own: TensorBoard forgets what it was told of a step with which a run goes on.
    loggers.log({f"evaluation/{name}": value for name, value in figures.items()}, state_of(run).step + 1)
    loggers.finish()


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    """A line a measure, a column a network; accuracies in per cent."""
    names = dict.fromkeys(name for figures in results.values() for name in figures)
    measures = [name for name in names if not re.search(r"_lr|_C$|_images$", name)]  # how they were had is in the file
    lines = [["", *results]]
    for measure in measures:
        shown_ = [figures.get(measure) for figures in results.values()]
        as_text = "{:.2f}".format if measure in PLAIN else "{:.1%}".format
        lines.append([measure.replace("_", " "), *("" if value is None else as_text(value) for value in shown_)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
