"""What this machine decides about a config: its devices, its memory, the files that it has."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dino.config.node import Problems
from dino.runtime.files import path_exists
from dino.runtime.nested import value_at
from dino.runtime.processes import place
from dino.runtime.refused import Refused, shown


def check_machine(config: Mapping[str, Any], problems: Problems, parameters: int) -> None:
    """Adds what can't run here. `parameters`: of backbone and head."""
    from dino.runtime.device import usable_cores

    device = _device(config, problems)
    if device == "cpu" and value_at(config, "precision") == "fp16":
        problems.add(
            "precision", "precision=fp16: needs a GPU, and the run would be on the CPU; use auto, bf16 or fp32"
        )
    cores = usable_cores()
    for key in ("training.num_workers", "num_workers"):  # dino.train's, dino.evaluate's
        workers = value_at(config, key)
        if isinstance(workers, int) and workers > 16 * cores:
            problems.add(key, f"{key}={workers}: far too many for {cores} cores; use auto, or at most {16 * cores}")
    start = value_at(config, "init_from")
    if "init_from" not in problems and start is not None and not path_exists(start):
        problems.add("init_from", f"init_from={shown(start)}: there is no such run directory or file")
    _check_root(config, problems)
    _check_memory(config, problems, parameters)


def _device(config: Mapping[str, Any], problems: Problems) -> str:
    """The kind of device that the run would take."""
    from dino.runtime.device import choose_device

    kind, _, index = str(value_at(config, "device")).partition(":")
    if "device" in problems:
        return kind
    if place().world_size > 1 and (index or kind == "mps"):
        text = f"device={config['device']}: one device for {place().world_size} processes; use device=cuda or cpu"
        problems.add("device", text)
        return kind
    try:
        return choose_device(config["device"]).type
    except Refused as refused:
        problems.add("device", str(refused))
        return kind


def _check_root(config: Mapping[str, Any], problems: Problems) -> None:
    dataset = config.get("dataset")
    if not isinstance(dataset, Mapping) or "root" not in dataset:
        return
    root, fetches = dataset["root"], bool(value_at(config, "dataset.train.download"))
    if not isinstance(root, str) or root in ("", "???"):
        problems.add(
            "dataset.root", f"dataset.root={shown(root)}: expected the folder of the images; give dataset.root=<folder>"
        )
    elif not path_exists(root) and (Path(root).is_absolute() or not fetches or "\0" in root or len(root) > 4096):
        problems.add(
            "dataset.root", f"dataset.root={shown(root)}: there is no such folder; give the one that holds the images"
        )
    if "dataset.root" in problems:  # train and val read the same value: one sentence is enough
        for key in ("dataset.train.root", "dataset.val.root"):
            problems.pop(key, None)


def _check_memory(config: Mapping[str, Any], problems: Problems, parameters: int) -> None:
    """Only what cannot be: student, teacher, gradients and two moments, or one pass's views alone, above all memory."""
    if not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 20 * parameters > memory and not problems.within("backbone") and not problems.within("head"):
        text = f"backbone: {parameters:,} parameters with the head need {20 * parameters / 1e9:,.0f} GB to train"
        problems.add("backbone", f"{text}, and this machine has {memory / 1e9:,.0f}; choose a smaller one")
    keys = (
        "training.batch_size",
        "augmentation.global_size",
        "augmentation.num_local_views",
        "augmentation.local_size",
    )
    batch, side, views, local = (value_at(config, key) for key in keys)
    if (
        any(isinstance(v, bool) or not isinstance(v, int) for v in (batch, side, views, local))
        or set(keys) & problems.keys()
    ):
        return
    needed = 12 * batch * (2 * side**2 + views * local**2)
    if needed > memory:
        views_of = ", ".join(f"{key}={value_at(config, key)}" for key in keys[1:])
        text = f"training.batch_size={batch}: the views of one pass ({views_of}) take {needed / 1e9:,.0f} GB"
        problems.add("training.batch_size", f"{text}, and this machine has {memory / 1e9:,.0f}")
