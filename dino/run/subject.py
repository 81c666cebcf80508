"""What an evaluation measures: the teacher of a run or a file, or a backbone that the command names."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from dino.config.node import build_node
from dino.config.settings import Evaluate, Kept, errors_in
from dino.run.directory import CONFIG
from dino.runtime.refused import Refused, first_line
from dino.weights import load_teacher
from dino.weights.allowlist import allowed


@dataclass
class Subject:
    """What is measured. `run`: the directory of the run that it is the teacher of, None for another's weights.

    The nodes are safe to build: typed in the command, or passed by dino.weights.allowlist.
    """

    name: str
    backbone: nn.Module
    node: dict[str, Any]  # of the config: how the backbone is built
    dataset: dict[str, Any]
    preprocessing: dict[str, Any]  # size in pixels, mean, std
    augmentation: dict[str, Any]
    logger: dict[str, Any]  # nodes by name
    run: Path | None
    output: Path


def subject_of(settings: Evaluate) -> Subject:
    """Raises Refused where weights or images are not to be had, or a file names what it may not."""
    trained: dict[str, Any] = {}
    if settings.backbone is not None:
        backbone, node = build_node(settings.backbone), settings.backbone
        weights = {True: "pretrained", False: "random weights"}.get(
            pretrained := node.get("pretrained", False), pretrained
        )
        name = f"{type(backbone).__name__}, {weights}"
        size = {"size": (settings.dataset or {})["eval_size"]}
        prepared, directory = size | getattr(backbone, "normalisation", {}), None  # those without it want ImageNet's
    else:
        given = Path(settings.run or settings.checkpoint or "")  # one of them, as the check made sure
        try:
            directory = next((folder for folder in (given, *given.parents[:2]) if (folder / CONFIG).is_file()), None)
            if directory is not None:
                trained = from_run(directory / CONFIG, settings)
            teacher: Any = load_teacher(given, settings.trust)
        except Refused:
            raise
        except (OSError, ValueError) as error:
            raise Refused(str(error)) from error
        backbone, node, prepared, name = teacher.backbone, teacher.config["backbone"], teacher.preprocessing, str(given)
    dataset = settings.dataset or trained.get("dataset")
    if dataset is None:
        raise Refused(f"dataset: nothing beside {name} says which images; give dataset=<one> dataset.root=<folder>.")
    return Subject(
        name=name,
        backbone=backbone,
        node=node,
        dataset=dataset,
        preprocessing=prepared | ({"size": settings.size} if settings.size else {}),
        augmentation=trained.get("augmentation", {"_target_": "dino.augmentation.DINOTransform"}),
        logger=trained.get("logger", {}),
        run=directory if settings.run else None,
        output=Path(settings.output or directory or Path("outputs", "evaluate", re.sub(r"[^\w.-]+", "_", name))),
    )


def from_run(path: Path, settings: Evaluate) -> dict[str, Any]:
    """Of a run's config.yaml what is built of it, as far as the command says nothing: the run may be a stranger's.

    Raises Refused for what a file may not name, and for a file that is no config of a run.
    """
    try:
        saved = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise Refused(f"{path} cannot be read ({first_line(error)}); mend it, or give checkpoint=.") from error
    parts = [saved.get(part) or {} for part in ("dataset", "augmentation", "logger")] if isinstance(saved, dict) else []
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise Refused(f"{path}: expected the config of a run, with its dataset and augmentation; give checkpoint=.")
    dataset, augmentation, loggers = parts
    trust, found = settings.trust, dict[str, Any]()
    if settings.dataset is None and dataset:
        if problems := list(errors_in(Kept, {key: dataset.get(key) for key in Kept.model_fields})):
            raise Refused(*(f"{path}: dataset.{text}" for _, text in problems))
        found["dataset"] = {key: dataset[key] for key in Kept.model_fields}
        found["dataset"] |= {split: allowed("dataset", dataset.get(split), path, trust) for split in ("train", "val")}
    if augmentation:
        found["augmentation"] = allowed("augmentation", augmentation, path, trust)
    if settings.run:
        found["logger"] = {name: allowed("logger", node, path, trust) for name, node in loggers.items()}
    return found
