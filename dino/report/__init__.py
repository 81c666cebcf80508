"""report.html: a run in one file that opens from disk, written anew while the run goes on so that it can be watched."""

import copy
import json
import math
import statistics
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dino.augmentation import DINOTransform, EvalTransform
from dino.dataset.cache import Images
from dino.evaluator.knn import NOTHING, Measured
from dino.history import History, Level
from dino.report.curves import charts
from dino.report.environment import environment
from dino.report.learned import (
    attention_section,
    class_section,
    map_section,
    neighbour_section,
    one_of_each,
    patch_section,
    readable,
)
from dino.report.page import WIDE, duration, figure, finite, note, percent, picture, scroll, text
from dino.runtime.files import atomic_write
from dino.runtime.nested import flat

NAME = "report.html"
SHOWN, CROPPED = 6, 4  # val images, train images
REFRESH = 30  # seconds


@dataclass(frozen=True)
class Course:
    """How a run is set and how it has gone. `defaults` is the config of a run in which no setting is changed.

    `notes` are sentences that stand above everything else.
    """

    config: Mapping[str, Any]
    defaults: Mapping[str, Any]
    history: History
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Pictured:
    """The images that a report shows, and how they are prepared: `transform` for training, `eval_transform` else."""

    train_set: Images
    val_set: Images
    transform: DINOTransform
    eval_transform: EvalTransform


def write_report(
    directory: Path,
    course: Course,
    images: Pictured,
    backbone: nn.Module,
    measured: Measured = NOTHING,
    device: torch.device | str = "cpu",
) -> Path:
    """Writes directory/report.html, whole or not at all, and returns its path.

    `measured` holds the features and labels of both data sets, in their order (UNREAD where an image cannot be read),
    and the k-NN labels of the val images. A part for which there is nothing to show (no labels, no attention) is left
    out, or a sentence says so. Draws nothing from the global random generators and leaves the backbone in the mode that
    it was in. Takes a few seconds, whatever the size of the data.
    """
    history, train_set, val_set = course.history, images.train_set, images.val_set
    bank, queries, classes = measured.bank, measured.queries, val_set.classes
    step, total = progress(history)
    curves = list(charts(history))
    facts = environment(device)
    val = list(readable(val_set, one_of_each(queries, len(val_set)), SHOWN))
    seen = {index: images.eval_transform(image) for index, image, _ in val}
    batch = images.eval_transform.normalise(torch.stack([*seen.values()])).to(device) if seen else None
    sections = {
        "Curves": curve_section(curves),
        "Neighbours": neighbour_section(val, train_set, bank, queries, classes),
        "Attention": attention_section(backbone, batch, [*seen.values()]),
        "Patches": patch_section(backbone, batch, [*seen.values()]),
        "Classes": class_section(queries, measured.predicted, classes),
        "Map": map_section(queries, classes),
        "Crops": crop_section(train_set, images.transform, len(train_set)),
        "Settings": settings_section(course.config, course.defaults),
        "Environment": environment_section(facts),
    }
    sections = {name: content for name, content in sections.items() if content}
    template = string.Template((Path(__file__).with_name(NAME)).read_text())
    page = template.substitute(
        title=text(f"{Path(directory).name}: DINO run"),
        header=header(Path(directory).name, history, step, total, facts["peak memory"], course.notes),
        links="".join(f'<a href="#{name}">{name}</a>' for name in sections),
        sections="".join(
            f'<section id="{name}"><h2>{name}</h2>{content}</section>' for name, content in sections.items()
        ),
        curves=json.dumps(curves, allow_nan=False).replace("<", "\\u003c"),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        refresh=0 if total is not None and step >= total else REFRESH,
    )
    path = Path(directory) / NAME
    with atomic_write(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


# ---- the run --------------------------------------------------------------------------------------------------------


def progress(history: History) -> tuple[int, int | None]:
    """(steps done, of how many); None where the history does not say."""
    steps = [*history.get_iterations()[-1:], *(epoch.get("iteration", 0) for epoch in entries(history, "epoch")[-1:])]
    return max(steps, default=0), history.metadata.get("total_steps")


def entries(history: History, level: Level) -> list[dict[str, Any]]:
    records: list[Any] = history.to_dataframe(level).to_dict("records")
    return records


def header(name: str, history: History, step: int, total: int | None, memory: str, notes: Sequence[str]) -> str:
    finished = total is not None and step >= total
    state = "finished" if finished else "running"
    epochs, iterations = entries(history, "epoch"), entries(history, "iteration")
    knn = [epoch["knn"] for epoch in epochs if finite(epoch.get("knn"))]
    seconds = max(
        (epoch["training_seconds"] for epoch in epochs if finite(epoch.get("training_seconds"))), default=None
    )
    speeds = [entry["images_per_second"] for entry in iterations if finite(entry.get("images_per_second"))]
    loss = iterations[-1] if iterations else {}
    baselines: dict[str, float] = history.metadata.get("baselines") or {}
    tiles = []
    if knn:
        best = f"k-NN, best {percent(max(knn))}" if max(knn) > knn[-1] else "k-NN accuracy"
        tiles.append(("first", percent(knn[-1]), best))
    for key, label in (("raw_pixels", "k-NN of raw pixels"), ("untrained", "k-NN of the untrained backbone")):
        if finite(value := baselines.get(key, math.nan)):
            tiles.append(("", percent(value), label))
    if finite(value := loss.get("loss", math.nan)):
        relative = loss.get("loss_over_ln_k")
        tiles.append(("", f"{value:.3f}", f"loss, {relative:.2f} ln K" if finite(relative) else "loss"))
    if seconds is not None:
        left = f", about {duration(seconds / step * (total - step))} left" if total and step and not finished else ""
        tiles.append(("", duration(seconds), f"of training{left}"))
    if speeds:
        used = [entry["mfu"] for entry in iterations if finite(entry.get("mfu"))]
        of_peak = f", {percent(statistics.median(used))} MFU" if used else ""
        tiles.append(("", f"{statistics.median(speeds):,.0f}", f"images / s (median){of_peak}"))
    tiles.append(("", memory.partition(" GiB")[0] + " GiB", "peak memory"))
    steps = f"step {step:,}" + (f" of {total:,}" if total else "")
    return (
        f'<div class="title"><h1>{text(name)}</h1><span class="pill {state}">{state}</span></div>'
        + (f'<div class="bar"><i style="width:{100 * min(1, step / total):.1f}%"></i></div>' if total else "")
        + f'<div class="soft">{steps}</div>'
        + "".join(f'<p class="warning">{text(note)}</p>' for note in notes)
        + '<div class="tiles">'
        + "".join(f'<div class="tile {kind}"><b>{value}</b><span>{label}</span></div>' for kind, value, label in tiles)
        + "</div>"
    )


def curve_section(curves: Sequence[Mapping[str, Any]]) -> str:
    if not curves:
        return ""
    drawn = "".join(
        f'<figure class="chart"><figcaption>{text(chart["title"])}</figcaption>'
        '<svg role="img"></svg><div class="legend"></div></figure>'
        for chart in curves
    )
    return (
        note(
            "Over the step. Drag to look closer, Shift + wheel to zoom, double-click for all. Of long curves the "
            "extremes are drawn; history.json has every number."
        )
        + f'<div class="charts">{drawn}</div>'
    )


# ---- what it is -----------------------------------------------------------------------------------------------------


def crop_section(train_set: Images, transform: DINOTransform, images: int, seed: int = 0) -> str:
    """Views as the student and the teacher get them, but drawn with another seed; all are shown at one scale."""
    plain = copy.copy(transform)
    plain.compiled = False  # a graph compiled for a batch of this size would take a minute
    order = np.random.default_rng(seed).permutation(images)[: 4 * CROPPED].tolist()
    chosen = list(readable(train_set, order, CROPPED))
    if not chosen:
        return ""
    cropped = [plain.crop(image, np.random.default_rng([seed, row])) for row, image, _ in chosen]
    views = plain.augment([torch.stack(same) for same in zip(*cropped, strict=True)], seed=(seed,))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (plain.mean, plain.std))
    lines = []
    for i, (_, image, _) in enumerate(chosen):
        cells = [f'<div class="query">{figure(picture(image), "image")}</div>']
        for number, (view, size) in enumerate(zip(views, plain.sizes, strict=True)):
            kind = "global" if number < plain.n_global_crops else "local"
            pixels = ((view[i] * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
            wide = max(24, round(WIDE * size / max(plain.sizes)))
            cells.append(figure(picture(pixels, wide), kind if wide < 100 else f"{kind}, {size} px", wide=wide))
        lines.append(f'<div class="row">{"".join(cells)}</div>')
    intro = (
        f"Train images and the views of them that the networks get: {plain.n_global_crops} global of "
        f"{plain.global_size} pixels and {plain.num_local_views} local of {plain.local_size}, after augmentation."
    )
    return note(intro) + scroll(f'<div class="rows">{"".join(lines)}</div>')


def settings_section(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    now, usual = dict(flat(config)), dict(flat(defaults))
    changed = [key for key in now if key not in usual or now[key] != usual[key]]
    cell = '<td class="{}">{}</td>'
    lines = []
    for key in changed:
        values = setting(now[key]), setting(usual[key]) if key in usual else "–"
        lines.append(
            "<tr>" + cell.format("key", text(key)) + "".join(cell.format("value", v) for v in values) + "</tr>"
        )
    heads = "<thead><tr><th>key</th><th>this run</th><th>default</th></tr></thead>"
    differing = (
        scroll(f"<table>{heads}<tbody>{''.join(lines)}</tbody></table>") if lines else note("All as by default.")
    )
    every = "".join(f"<tr>{cell.format('key', text(k))}{cell.format('value', setting(v))}</tr>" for k, v in now.items())
    return (
        note("What differs from the defaults.")
        + differing
        + f"<details><summary>All {len(now)} settings</summary>{scroll(f'<table>{every}</table>')}</details>"
    )


def setting(value: Any) -> str:
    return text(json.dumps(value, default=str, ensure_ascii=False) if not isinstance(value, str) else value)


def environment_section(facts: Mapping[str, str]) -> str:
    lines = "".join(f"<tr><td>{text(name)}</td><td>{text(value)}</td></tr>" for name, value in facts.items())
    return f'<table class="facts">{lines}</table>'
