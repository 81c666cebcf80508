"""How a history is drawn: which metrics share a frame, their labels, and the lines that they are to be read against;
and how the histories of several runs are laid over each other.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

LABELS = {
    "iteration": "step",
    "knn": "k-NN accuracy",
    "momentum": "teacher momentum",
    "loss_over_ln_k": "loss / ln K",
    "kl_over_ln_k": "KL(teacher, student)",
    "teacher_entropy": "entropy of the teacher's outputs",
    "teacher_entropy_of_mean": "entropy of their mean",
    "teacher_temp": "teacher temperature",
    "agreement": "student and teacher agree",
    "feature_std": "standard deviation of features",
    "rankme": "RankMe of features",
    "update_to_weight": "update / weights",
    "images_per_second": "images / s",
}
FIRST = ("knn", "loss", "learning_rate", "momentum")
# Read together they show collapse: to uniform (both entropies at 1) or to one prototype (both at 0; Sec. 5.3).
OVER_LN_K = ("teacher_entropy_of_mean", "teacher_entropy", "kl_over_ln_k")
SHARES = ("agreement", "prototypes_in_use")
TOGETHER = {"over ln K": OVER_LN_K, "share": SHARES}
NOISY = {"loss", "gradient_norm", "images_per_second", "feature_std", "rankme", "update_to_weight", *OVER_LN_K, *SHARES}
MOST_IN_LEGEND = 10  # runs, as many as there are colours; the others are grey
# The loss over ln K is the right axis of the loss, KL to uniform follows from the entropy of the mean, the MFU is a
# multiple of images per second; the others are what metrics are drawn against, or a clock.
NO_PANEL = {"loss_over_ln_k", "kl_to_uniform", "mfu", "iteration", "epoch", "timestamp", "training_seconds"}


def panels(names: Sequence[str]) -> list[tuple[str, ...]]:
    """The metrics of each frame, in order of what one looks at first."""
    shared = [tuple(name for name in of_frame if name in names) for of_frame in TOGETHER.values()]
    rest = [name for name in names if name not in NO_PANEL.union(FIRST, *TOGETHER.values())]
    return [
        *((name,) for name in FIRST if name in names),
        *filter(None, shared),
        *((name,) for name in rest),
    ]


def draw(
    frames: Sequence[tuple[str, ...]],
    columns: Mapping[str, Sequence[Any]],
    x: str,
    baselines: Mapping[str, float],
    ln_k: float | None,
) -> "matplotlib.figure.Figure":
    """`columns` holds every metric named in `frames`, and `x`; NaN is a gap. `baselines` are accuracies in [0, 1]."""
    from matplotlib.figure import Figure  # not pyplot: its global state belongs to the caller
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    wide = min(len(frames), 3)
    high = math.ceil(len(frames) / wide)
    figure = Figure(figsize=(5.6 * wide, 3.6 * high), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))  # inches
    for index, names in enumerate(frames, start=1):
        axes = figure.add_subplot(high, wide, index)
        axes.set_xlabel(_label(x))
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))  # no epoch 1.5
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
        for color, name in enumerate(names):
            _curve(axes, np.array(columns[x], dtype=float), np.array(columns[name], dtype=float), name, f"C{color}")
        of_frame = next((label for label, shared in TOGETHER.items() if set(names) <= set(shared)), "")
        axes.set_ylabel(_label(names[0]) if len(names) == 1 else of_frame)
        if names == ("knn",):
            _against_baselines(axes, baselines)
        if names == ("loss",) and ln_k is not None:
            _against_ln_k(axes, ln_k)
        if len(axes.get_lines()) > 1:
            axes.legend(framealpha=0.8, edgecolor="none", fontsize="small")
    return figure


def draw_runs(
    labels: Sequence[str],
    curves: Mapping[str, Sequence[tuple[Sequence[Any], Sequence[Any]]]],
    settings: Mapping[str, Sequence[Any]],
    best: Sequence[float | int],
) -> "matplotlib.figure.Figure":
    """Runs laid over each other: a frame for each metric of `curves`, which has (steps, values) of every run, and one
    for each setting, which has its value in every run ("" for none), with the runs' `best` k-NN above it. NaN is a gap.
    """
    from matplotlib.figure import Figure

    names = [name for name, of_runs in curves.items() if any(len(steps) for steps, _ in of_runs)]
    metrics = len(names)
    names += list(settings) if np.isfinite(best).any() else []
    wide = len(names) if len(names) < 4 else 2 if len(names) == 4 else 3
    figure = Figure(figsize=(5.6 * wide, 4 * math.ceil(len(names) / wide)), layout="constrained")  # inches
    colors = [f"C{i}" if i < MOST_IN_LEGEND else "0.8" for i in range(len(labels))]
    for index, name in enumerate(names):
        axes = figure.add_subplot(math.ceil(len(names) / wide), wide, index + 1)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if index < metrics:
            of_runs = [*zip(labels, colors, curves[name], strict=True)]
            for label, color, (steps, values) in of_runs[::-1]:  # the first on top
                _mean_curve(axes, np.array(steps, dtype=float), np.array(values, dtype=float), label, color)
        else:
            _best_against(axes, settings[name], np.array(best, dtype=float), colors)
        axes.set_xlabel("step" if index < metrics else name)
        axes.set_ylabel(_label(name) if index < metrics else "best k-NN accuracy")
        if name == "knn" or index >= metrics:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    lines = figure.axes[0].get_lines()[::-1][:MOST_IN_LEGEND]
    title = f"first {MOST_IN_LEGEND} of {len(labels)}" if len(labels) > MOST_IN_LEGEND else None
    place = {"loc": "outside lower center", "ncols": 2 * wide if max(map(len, labels)) < 24 else wide}
    figure.legend(handles=lines, title=title, frameon=False, fontsize="small", **place)
    return figure


def _mean_curve(axes: "matplotlib.axes.Axes", x: Any, y: Any, label: str, color: Any) -> None:
    """A fiftieth of the curve goes into each mean, so that several can be read in one frame."""
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    window = max(1, len(y) // 50)
    y = np.convolve(y, np.full(window, 1 / window), mode="valid") if len(y) else y
    axes.plot(
        x[window - 1 :], y, color=color, linewidth=1.2, marker="o" if len(y) <= 40 else "", markersize=3, label=label
    )


def _best_against(axes: "matplotlib.axes.Axes", values: Sequence[Any], best: Any, colors: Sequence[Any]) -> None:
    """Numbers on an axis, a logarithmic one where they span a factor of ten; anything else side by side."""
    known = [value for value in values if value != ""]
    if all(isinstance(value, float | int) and not isinstance(value, bool) for value in known):
        x = np.array([math.nan if value == "" else value for value in values], dtype=float)
        if min(known) > 0 and max(known) >= 10 * min(known):
            axes.set_xscale("log")
        elif len(set(known)) <= 6:
            axes.set_xticks(sorted(set(known)))  # no seed 0.5
    else:
        kinds = list(dict.fromkeys(str(value) for value in known))
        x = np.array([math.nan if value == "" else kinds.index(str(value)) for value in values])
        axes.set_xticks(range(len(kinds)), kinds, rotation=30 if max(map(len, kinds)) > 10 else 0)
        axes.margins(x=0.2)
    there = np.isfinite(x) & np.isfinite(best)
    middle = np.unique(x[there])
    axes.plot(middle, [best[there & (x == at)].mean() for at in middle], color="0.7", linewidth=1, zorder=1)
    axes.scatter(
        x[there], best[there], c=[color for color, drawn in zip(colors, there, strict=True) if drawn], zorder=2
    )


def _curve(axes: "matplotlib.axes.Axes", x: Any, y: Any, name: str, color: str) -> None:
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    label, window = _label(name), len(y) // 50
    if name in NOISY and window > 1:
        axes.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
        y = np.convolve(y, np.full(window, 1 / window), mode="valid")
        x, label = x[window - 1 :], f"{label} (mean of {window})"
    axes.plot(x, y, color=color, marker="o" if len(y) <= 40 else "", markersize=3.5, label=label)


def _against_baselines(axes: "matplotlib.axes.Axes", baselines: Mapping[str, float]) -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    for color, (name, value) in enumerate(baselines.items(), start=1):
        axes.axhline(value, color=f"C{color}", linestyle="--", linewidth=1.2, label=f"{_label(name)}: {value:.1%}")


def _against_ln_k(axes: "matplotlib.axes.Axes", ln_k: float) -> None:
    axes.axhline(ln_k, color="0.4", linestyle="--", linewidth=1.2, label=f"ln K = {ln_k:.2f}: uniform output")
    right = axes.secondary_yaxis("right", functions=(lambda y: np.divide(y, ln_k), lambda y: np.multiply(y, ln_k)))
    right.set_ylabel(_label("loss_over_ln_k"))


def _label(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))
