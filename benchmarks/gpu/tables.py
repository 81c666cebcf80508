"""The figures as Markdown."""

from collections.abc import Iterator, Mapping
from typing import Any

Found = Mapping[str, Mapping[str, Any]]  # figures by the name of the part
STEP = {
    "ms": ".1f",
    "ms_unsynchronised": ".1f",
    "images_per_second": ",.0f",
    "x reference": ".2f",
    "peak_gb": ".1f",
    "mfu": ".1%",
    "gpu_ms": ".1f",
    "kernels": ",.0f",
    "first_step_s": ".0f",
    "warm_s": ".0f",
}
DATA = {"ms": ".2f", "ms_unsynchronised": ".2f", "images_per_second": ",.0f", "gpu_ms": ".2f", "kernels": ",.0f"}
DATA |= {"first_call_s": ".1f"}
RUN = {"images_per_second": ",.0f", "mfu": ".1%", "epoch_s": ".2f", "epoch_over_steps": ".2f", "first_step_s": ".0f"}
HEADINGS = {
    "ms": "ms, synchronised",
    "ms_unsynchronised": "ms",
    "images_per_second": "images/s",
    "peak_gb": "peak, GB",
    "mfu": "MFU",
    "gpu_ms": "ms the GPU works",
    "kernels": "kernels",
    "first_step_s": "first step, s",
    "warm_s": "with a warm cache, s",
    "first_call_s": "first call, s",
    "epoch_s": "s an epoch",
    "epoch_over_steps": "epoch / its steps",
}


def markdown(found: Found) -> str:
    failed = {name: figures["failed"] for name, figures in found.items() if "failed" in figures}
    good = {name: figures for name, figures in found.items() if name not in failed}
    blocks = [*step_tables(good)]
    if data := {name: good[name] for name in good if name.startswith(("photometry", "crops"))}:
        blocks.append(table("data path", DATA, data))
    if "end_to_end" in good:
        blocks.append(table("end to end", RUN, {"`python -m dino.train`, second half": good["end_to_end"]}))
    if "resume" in good:
        run = good["resume"]
        blocks.append(
            f"Killed by `kill -9` at step {run['killed_at']} of {run['steps']} and started again: {run['equal']} of "
            f"{run['tensors']} tensors of the last checkpoint equal to the bit those of a run never interrupted."
        )
    if "learning" in good:
        blocks.append(learning(good["learning"]))
    blocks += [f"- `{name}` has no figures: {why}" for name, why in failed.items()]
    return "\n\n".join(blocks)


def step_tables(good: Found) -> Iterator[str]:
    for group in dict.fromkeys(name.partition("/")[0] for name in good if "/" in name):
        rows = {}
        reference = good.get(f"{group}/reference", {}).get("images_per_second")
        for contestant in ("reference", "eager", "compiled", "captured"):
            if row := dict(good.get(f"{group}/{contestant}", {})):
                row["warm_s"] = good.get(f"{group}/{contestant}/warm", {}).get("first_step_s")
                row["x reference"] = row["images_per_second"] / reference if reference else None
                rows[contestant] = row
        if rows:
            yield table(group, STEP, rows)


def table(title: str, columns: Mapping[str, str], rows: Found) -> str:
    """`columns`: how the figures are written, in their order. A figure that is not there is an empty cell."""
    lines = [
        f"| {title} | {' | '.join(HEADINGS.get(name, name) for name in columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for name, figures in rows.items():
        cells = [
            "" if figures.get(column) is None else format(figures[column], form) for column, form in columns.items()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def learning(run: Mapping[str, Any]) -> str:
    cells = {
        "epoch": [f"{point['epoch']}" for point in run["curve"]],
        "minutes": [f"{point['minutes']:.2f}" for point in run["curve"]],
        "k-NN, %": [f"{100 * point['knn']:.1f}" for point in run["curve"]],
    }
    rows = [f"| {name} | {' | '.join(values)} |" for name, values in cells.items()]
    rows.insert(1, "|---" * (1 + len(run["curve"])) + "|")
    return "\n".join(rows)


def one_line(figures: Mapping[str, Any]) -> str:
    """A part's figures, on one line, as it ends."""
    if "failed" in figures:
        return f"FAILED: {figures['failed']}"
    shown = {name: value for name, value in figures.items() if isinstance(value, int | float)}
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
