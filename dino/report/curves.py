"""The curves of a report, as plain values: which share a chart, thinned to what a screen can show."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dino.history import History
from dino.history.plot import LABELS, NOISY, OVER_LN_K, panels
from dino.report.page import finite, percent

MOST_POINTS = 400  # of one curve
TITLES = dict.fromkeys(OVER_LN_K, "entropies and KL, over ln K")  # of a chart of several; the other one is of shares


def charts(history: History) -> Iterator[dict[str, Any]]:
    """A chart for each frame that the run's plots have, all over the step: {"title", "percent", "series", "lines"}."""
    for level in ("epoch", "iteration"):
        frame = history.to_dataframe(level)
        if "iteration" not in frame:
            continue
        numbers: dict[str, Any] = dict(frame.select_dtypes("number").items())  # type: ignore[arg-type]
        own = [name for name in numbers if level == "iteration" or name != "loss"]  # whose curve is the steps'
        for names in panels(own):
            series = [
                part for i, name in enumerate(names) for part in curve(numbers["iteration"], numbers[name], name, i)
            ]
            if not series:
                continue
            lines = []
            if names == ("knn",):
                baselines = (history.metadata.get("baselines") or {}).items()
                lines = [(f"{named(name)} {percent(y)}", y) for name, y in baselines if finite(y)]
            elif names == ("loss",) and (ln_k := history._ln_k()):
                lines = [(f"ln K = {ln_k:.2f}: uniform output", ln_k)]
            yield {
                "title": named(names[0]) if len(names) == 1 else TITLES.get(names[0], "share"),
                "percent": names == ("knn",),
                "series": series,
                "lines": [{"name": name, "y": y, "colour": i} for i, (name, y) in enumerate(lines, start=1)],
            }


def curve(x: Any, y: Any, name: str, colour: int) -> Iterator[dict[str, Any]]:
    """A line, thinned; of a noisy metric it is a running mean, with the numbers themselves faint behind it."""
    steps, values = x.to_numpy(float), y.to_numpy(float)
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if not len(values):
        return
    window, label = len(values) // 50, named(name)
    if name in NOISY and window > 1:
        yield {"name": label, "faint": True, "colour": colour, **points(*thinned(steps, values))}
        values = np.convolve(values, np.full(window, 1 / window), mode="valid")
        steps, label = steps[window - 1 :], f"{label} (mean of {window})"
    yield {"name": label, "faint": False, "colour": colour, **points(*thinned(steps, values))}


def thinned(x: Float[ndarray, " n"], y: Float[ndarray, " n"], most: int = MOST_POINTS) -> tuple[ndarray, ndarray]:
    """At most `most` of the points: the first and last, and the least and greatest of each stretch between them."""
    if len(x) <= most:
        return x, y
    kept = {0, len(x) - 1}
    for stretch in np.array_split(np.arange(1, len(x) - 1), (most - 2) // 2):
        kept |= {int(stretch[y[stretch].argmin()]), int(stretch[y[stretch].argmax()])}
    chosen = sorted(kept)
    return x[chosen], y[chosen]


def points(x: ndarray, y: ndarray) -> dict[str, list[float | int]]:
    return {"x": [int(v) for v in x], "y": [float(f"{v:.5g}") for v in y]}


def named(metric: str) -> str:
    return LABELS.get(metric, metric.replace("_", " "))
