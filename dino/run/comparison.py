"""Runs side by side, also of a sweep that still goes on: a table, and the same figures as a CSV file and a plot."""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dino.history import History
from dino.run.directory import CONFIG, SWEEP, State, changes_no_result, state_of
from dino.runtime.nested import flat
from dino.runtime.refused import Refused, first_line

UNSET, UNKNOWN = "unset", ""  # of a setting: its config has no such key; nothing tells yet
HEADINGS = {
    "best_knn": "best k-NN",
    "last_knn": "last",
    "loss": "loss",
    "loss_over_ln_k": "/ ln K",
    "teacher_entropy": "entropy",
    "images_per_second": "img/s",
}
DISPENSABLE = ("img/s", "entropy", "last", "loss")  # where the terminal is narrow, in this order
MOST_SETTINGS = 6  # columns; where more differ, names of runs say it shorter


@dataclass
class Run:
    """`settings`: its config by dotted key; of one that has no config yet, the overrides that it will have.

    `curves`: (steps, values) by metric.
    """

    directory: Path
    state: State
    has_config: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, tuple[list[Any], list[Any]]] = field(default_factory=dict)
    measured: dict[str, float | int] = field(default_factory=lambda: dict.fromkeys(HEADINGS, math.nan))
    problems: list[str] = field(default_factory=list)


def compare(directories: Sequence[Path], width: int | None = None) -> str:
    """The table and, below it, what could not be read; writes the files.

    `width`: columns; None: the terminal's. Raises Refused where there are no runs.
    """
    found = {path: overrides for given in directories for path, overrides in _runs_in(given).items()}
    home = Path(os.path.commonpath([d.absolute() for d in directories])) if len(directories) > 1 else directories[0]
    runs = [_read(directory, overrides) for directory, overrides in found.items()]
    runs.sort(key=lambda run: (-_or(run.measured["best_knn"], -1.0), run.state.name == "not started"))
    every = _differing(runs)
    settings = _telling(every)
    paths = [os.path.relpath(run.directory, home) for run in runs]
    names = [run.directory.name if path == "." else path for run, path in zip(runs, paths, strict=True)]
    lines = _table(runs, names, settings, width or shutil.get_terminal_size((160, 24)).columns)
    lines += [f"{run.directory}: {problem}." for run in runs for problem in run.problems]
    try:
        _frame(runs, every).to_csv(home / "compare.csv", index=False)
        lines.append(f"in {home / 'compare.csv'}")
        if any(steps for run in runs for steps, _ in run.curves.values()):
            _plot(runs, names, settings, home / "compare.png")
            lines[-1] += f" and {home / 'compare.png'}"
    except OSError as error:  # a full or foreign disk; what was found is above
        lines.append(f"not written: {error}")
    return "\n".join(lines)


# ---- what there is --------------------------------------------------------------------------------------------------


def _runs_in(given: Path) -> dict[Path, list[str]]:
    """The run at `given`, or those below it and in sweeps below it; with their overrides, where a sweep tells them."""
    if not given.is_dir():
        raise Refused(f"{given}: there is no such directory; give one below outputs/.")
    found = dict(_below(given, depth=2))
    if not found:
        raise Refused(f"{given}: there are no runs in it; give the directory of a sweep or of a run.")
    return found


def _below(directory: Path, depth: int) -> Iterator[tuple[Path, list[str]]]:
    if _is_run(directory):
        yield directory, []
    elif depth:
        planned = _planned(directory)
        yield from ((directory / name, overrides) for name, overrides in planned.items())
        for child in sorted(path for path in directory.iterdir() if path.is_dir() and path.name not in planned):
            yield from _below(child, depth - 1)


def _is_run(directory: Path) -> bool:
    return any((directory / name).exists() for name in (CONFIG, "history.json", "checkpoints", ".lock"))


def _planned(sweep: Path) -> dict[str, list[str]]:
    try:
        runs = json.loads((sweep / SWEEP).read_text())["runs"]
        return {str(name): [str(override) for override in overrides] for name, overrides in runs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or broken: the others are there to see
        return {}


def _read(directory: Path, overrides: list[str]) -> Run:
    run = Run(directory, state_of(directory))
    try:
        config = yaml.load((directory / CONFIG).read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if not isinstance(config, dict):
            raise TypeError("no settings in it")
        run.has_config, run.settings = True, dict(flat(config))
    except FileNotFoundError:
        run.settings = dict(map(_parsed, overrides))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        run.problems.append(f"{CONFIG} cannot be read ({first_line(error).rstrip('.')})")
    try:
        _read_history(run)
    except FileNotFoundError:
        if run.state.step:
            run.problems.append("history.json is not there")
    except Exception as error:  # bytes that are no history can raise anything
        run.problems.append(f"history.json cannot be read ({first_line(error).rstrip('.')})")
    return run


def _read_history(run: Run) -> None:
    history = History.load(run.directory / "history.json")
    iterations, epochs = history.to_dataframe("iteration"), history.to_dataframe("epoch")
    if "knn" in epochs and "iteration" in epochs:
        knn = epochs[["iteration", "knn"]].dropna()
        run.curves["knn"] = knn["iteration"].tolist(), knn["knn"].tolist()
        if len(knn):
            run.measured |= {"best_knn": float(knn["knn"].max()), "last_knn": float(knn["knn"].iloc[-1])}
    if "loss_over_ln_k" in iterations:
        loss = iterations[["iteration", "loss_over_ln_k"]].dropna()
        run.curves["loss_over_ln_k"] = loss["iteration"].tolist(), loss["loss_over_ln_k"].tolist()
    for name in ("loss", "loss_over_ln_k", "teacher_entropy"):
        if name in iterations:
            run.measured[name] = float(iterations[name].dropna().tail(10).mean())
    if "images_per_second" in iterations:
        run.measured["images_per_second"] = float(iterations["images_per_second"].median())


def _parsed(override: str) -> tuple[str, Any]:
    key, _, value = override.lstrip("+").partition("=")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        return key, value


# ---- what differs ---------------------------------------------------------------------------------------------------


def _differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Every setting that differs, by its key: one value a run, UNKNOWN where nothing tells it."""
    have_config = [run for run in runs if run.has_config]
    keys = dict.fromkeys(key for run in have_config or runs for key in run.settings)
    columns = {key: [run.settings.get(key, UNSET if run.has_config else UNKNOWN) for run in runs] for key in keys}
    return {key: values for key, values in columns.items() if len({repr(v) for v in values if v is not UNKNOWN}) > 1}


def _telling(every: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The few columns that tell the runs apart, under short names.

    Keys that change no result only where no other differs; a part of another class by its class, with those of its keys
    that differ within a class; a setting that others read by interpolation once.
    """
    every = {key: values for key, values in every.items() if not changes_no_result(key)} or dict(every)
    classes: dict[str, list[Any]] = {}
    for key, values in every.items():
        if key.endswith("._target_"):
            classes.setdefault(key.partition(".")[0], [str(value).rpartition(".")[2] for value in values])
    kept, seen = set(), set()
    for key in sorted(every, key=lambda key: not key.startswith("dataset.")):  # which others read
        of = classes.get(key.partition(".")[0], [""] * len(every[key]))
        pairs = {(kind, repr(value)) for kind, value in zip(of, every[key], strict=True)}
        if repr(every[key]) not in seen and len(pairs) > len(set(of)):
            kept.add(key)
        seen.add(repr(every[key]))
    columns: dict[str, list[Any]] = {}
    for key, values in every.items():
        if (group := key.partition(".")[0]) in classes:
            columns.setdefault(group, classes[group])
        if key in kept:
            columns[_shortest(key, every)] = values
    return columns


def _shortest(key: str, keys: Iterable[str]) -> str:
    """The end of the dotted key that no other has."""
    parts = key.split(".")
    ends = (".".join(parts[-length:]) for length in range(1, len(parts)))
    return next((end for end in ends if sum(f".{k}".endswith(f".{end}") for k in keys) == 1), key)


# ---- what is shown --------------------------------------------------------------------------------------------------


def _table(runs: Sequence[Run], names: list[str], settings: Mapping[str, list[Any]], width: int) -> list[str]:
    """Lines of at most `width` characters, as far as shorter cells and fewer columns can bring that about."""
    cells = _cells(settings)
    telling = cells if _all_told_apart(cells, len(runs)) else {"run": names, **cells}
    measured = {heading: [_number(name, run.measured[name]) for run in runs] for name, heading in HEADINGS.items()}
    states = {"state": [str(run.state) for run in runs]}
    lines, without = [""], 0
    for longest, without in ((60, 0), (24, 0), (14, 0), (14, 1), (14, 2), (14, 3), (14, 4), (8, 4)):
        columns = {_cut(name, longest): [_cut(cell, longest) for cell in values] for name, values in telling.items()}
        columns |= {name: values for name, values in measured.items() if name not in DISPENSABLE[:without]} | states
        lines = _lines(columns, right=set(measured))
        if max(map(len, lines)) <= width:
            break
    if len(settings) > MOST_SETTINGS:
        lines.append(f"{len(settings)} settings differ; compare.csv has them.")
    if without:
        lines.append(f"left out for want of width: {', '.join(DISPENSABLE[:without])}; compare.csv has them.")
    return lines


def _cells(settings: Mapping[str, list[Any]]) -> dict[str, list[str]]:
    """The settings as they are shown; none where there are too many of them."""
    return {name: list(map(_cell, values)) for name, values in settings.items() if len(settings) <= MOST_SETTINGS}


def _lines(columns: Mapping[str, list[str]], right: set[str]) -> list[str]:
    padded = []
    for name, cells in columns.items():
        wide = max(map(len, (name, *cells)))
        padded.append([cell.rjust(wide) if name in right else cell.ljust(wide) for cell in (name, *cells)])
    lines = ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _all_told_apart(cells: Mapping[str, list[str]], runs: int) -> bool:
    rows = {*zip(*cells.values(), strict=True)}
    return len(rows) == runs and all(any(row) for row in rows)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _cell(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(name: str, value: float | int) -> str:
    if math.isnan(value):
        return ""
    return f"{100 * value:.1f} %" if name.endswith("knn") else f"{value:.{0 if name == 'images_per_second' else 3}f}"


def _frame(runs: Sequence[Run], every: Mapping[str, list[Any]]) -> Any:
    """A row a run, in full: fractions, not percent, and every setting that differs, by its whole key."""
    import pandas

    columns: dict[str, list[Any]] = {"run": [str(run.directory) for run in runs]}
    for key, values in every.items():
        columns[key] = [json.dumps(value) if isinstance(value, list | dict) else value for value in values]
    columns |= {name: [run.measured[name] for run in runs] for name in HEADINGS}
    columns["state"] = [run.state.name for run in runs]
    columns["step"] = [run.state.step for run in runs]
    columns["total_steps"] = [run.state.total_steps for run in runs]
    return pandas.DataFrame(columns, dtype=object)


def _plot(runs: Sequence[Run], names: list[str], settings: Mapping[str, list[Any]], path: Path) -> None:
    from dino.history.plot import draw_runs

    labels, cells = names, _cells(settings)
    if _all_told_apart(cells, len(runs)):
        rows = zip(*cells.values(), strict=True)
        labels = [", ".join(f"{name} {cell}" for name, cell in zip(cells, row, strict=True) if cell) for row in rows]
    curves = {metric: [run.curves.get(metric, ([], [])) for run in runs] for metric in ("knn", "loss_over_ln_k")}
    best = [run.measured["best_knn"] for run in runs]
    against = dict(list(settings.items())[:MOST_SETTINGS])
    draw_runs([_cut(label, 60) for label in labels], curves, against, best).savefig(path, dpi=120)


def _or(value: float | int, instead: float | int) -> float | int:
    return value if math.isfinite(value) else instead
