"""The one file that people want from a run: teacher.safetensors, written and read. It may come from a stranger."""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino.model import DinoModel
from dino.runtime.files import write_durably
from dino.runtime.refused import one_line
from dino.weights.allowlist import allowed
from dino.weights.checkpoint_file import other_shapes, read_checkpoint
from dino.weights.weightless import needs_weights, weightless

TEACHER = "teacher.safetensors"
LARGEST_SIDE = 100_000  # pixels; no image is prepared larger, whatever a file says


@dataclass(frozen=True)
class TeacherFile:
    """What a teacher.safetensors or a checkpoint says. Nothing is built yet; `weights()` reads the tensors.

    `backbone`, `head`: the nodes of the config, unchecked; `preprocessing`: size in pixels, mean and std of the images.
    """

    path: Path
    backbone: Any
    head: Any
    preprocessing: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    weights: Callable[[], dict[str, Tensor]]

    def check_shapes(self, expected: Mapping[str, Tensor]) -> None:
        """Raises ValueError, before any weights are read, where names or shapes differ from those `expected`."""
        if found := other_shapes(self.shapes, expected):
            raise ValueError(f"{self.path} holds the weights of another network ({found}).")


def save_teacher(
    directory: Path, weights: Mapping[str, Tensor], config: dict[str, Any], preprocessing: dict[str, Any]
) -> None:
    """directory/teacher.safetensors: backbone and head; in the metadata, how to build them and to prepare images.

    weights: the state_dict of a DinoModel.
    """
    from safetensors.torch import save

    weights = {name: value.detach().contiguous().clone() for name, value in weights.items()}
    metadata = {
        "format": "pt",
        "backbone": json.dumps(config["backbone"]),
        "head": json.dumps(config["head"]),
        "preprocessing": json.dumps(preprocessing),
    }
    data = save(weights, metadata | {"sha256": checksum(weights, metadata)})
    write_durably(directory / TEACHER, lambda file: file.write(data))


def load_teacher(path: str | Path, trust: str | Sequence[str] = ()) -> DinoModel:
    """A run's teacher in eval mode: from its directory, its teacher.safetensors or one of its checkpoints (.pt).

    The file may come from a stranger: only networks of this project are built, and of the packages in `trust`, by their
    dotted names. Nothing in it is executed, and nothing is downloaded.

    `.preprocessing` on the result: size in pixels, mean and std of the images it expects; `.config`: "backbone" and
    "head", how they were built.

    Raises FileNotFoundError where there is no file, ValueError where it is damaged or holds the weights of another
    network, Refused (a ValueError) where it names a network that is neither of this project nor trusted.
    """
    file = read_teacher(path)
    config = {
        "backbone": allowed("backbone", file.backbone, file.path, trust),
        "head": allowed("head", file.head, file.path, trust),
    }
    try:
        with weightless():
            expected = _built(config).state_dict()
    except Exception as error:  # arguments from a file can make a constructor raise anything
        if not needs_weights(error):  # a trusted network that cannot be made without: compared as soon as it is made
            raise _unfit(file, error) from error
    else:
        file.check_shapes(expected)
    model = _built(config)
    file.check_shapes(model.state_dict())
    model.load_state_dict(file.weights())
    facts: Any = model  # torch types a module's attributes as tensors and modules
    facts.preprocessing, facts.config = file.preprocessing, config
    return model.eval()


def read_teacher(path: str | Path) -> TeacherFile:
    """What is said in a run's directory, its teacher.safetensors or one of its checkpoints (.pt); raises as above."""
    path = Path(path) / TEACHER if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there; expected a run's directory, its {TEACHER} or a checkpoint of it."
        )
    try:
        return (_in_checkpoint if path.suffix in (".pt", ".pth") else _in_safetensors)(path)
    except Exception as error:  # safetensors raises an exception type of its own for each fault, torch any
        raise _unreadable(path, error) from error


def checksum(weights: Mapping[str, Tensor], about: dict[str, Any]) -> str:
    """SHA-256 of names and bits of the weights, and of plain values beside them, in hexadecimal digits.

    A check against damage. It is no proof of origin: whoever changes a file can compute it anew.
    """
    sha256 = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, value in sorted(weights.items()):
        sha256.update(name.encode())
        sha256.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _built(config: dict[str, dict[str, Any]]) -> DinoModel:
    from dino.config.node import build_node  # loads hydra, which a loop of one's own does without

    backbone = build_node(config["backbone"])
    return DinoModel(backbone, build_node(config["head"], input_dim=backbone.output_dim))


def _in_safetensors(path: Path) -> TeacherFile:
    from safetensors import safe_open

    file: Any = safe_open(path, framework="pt")  # reads the header alone, and holds it against the size of the file
    metadata = dict(file.metadata())
    return TeacherFile(
        path=path,
        backbone=json.loads(metadata["backbone"]),
        head=json.loads(metadata["head"]),
        preprocessing=_preprocessing(json.loads(metadata["preprocessing"])),
        shapes={name: tuple(file.get_slice(name).get_shape()) for name in file.keys()},  # noqa: SIM118 - no dict
        weights=functools.partial(_undamaged, path, file, metadata),
    )


def _undamaged(path: Path, file: Any, metadata: dict[str, str]) -> dict[str, Tensor]:
    weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    about = {key: value for key, value in metadata.items() if key != "sha256"}
    if metadata.get("sha256") != checksum(weights, about):
        raise _unreadable(path, ValueError("its checksum is another: the file was damaged after it was written"))
    return weights


def _in_checkpoint(path: Path) -> TeacherFile:
    from dino.augmentation import IMAGENET_MEAN, IMAGENET_STD

    state = read_checkpoint(path)
    config, colours, weights = state["config"], state["config"]["augmentation"], state["teacher_state_dict"]
    preprocessing = {
        "size": config["dataset"]["eval_size"],
        "mean": colours.get("mean", IMAGENET_MEAN),
        "std": colours.get("std", IMAGENET_STD),
    }
    return TeacherFile(
        path=path,
        backbone=config["backbone"],
        head=config["head"],
        preprocessing=_preprocessing(preprocessing),
        shapes={name: tuple(value.shape) for name, value in weights.items()},
        weights=lambda: dict(weights),
    )


def _preprocessing(given: Any) -> dict[str, Any]:
    """Size, mean and std of the images, as a file gives them. Raises ValueError for what cannot be."""
    size, mean, std = (given[key] for key in ("size", "mean", "std"))
    if type(size) is not int or not 1 <= size <= LARGEST_SIDE:
        raise ValueError(f"size must be 1 to {LARGEST_SIDE} pixels, got {size}")
    for name, values in (("mean", mean), ("std", std)):
        numbers = isinstance(values, list | tuple) and all(type(v) in (int, float) and math.isfinite(v) for v in values)
        if not numbers or len(values) != 3 or (name == "std" and min(values) <= 0):
            raise ValueError(f"{name} must be three finite numbers{', above 0' * (name == 'std')}, got {values}")
    return {"size": size, "mean": mean, "std": std}


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read as a {TEACHER} or a checkpoint of this project ({error}).")


def _unfit(file: TeacherFile, error: Exception) -> ValueError:
    return ValueError(f"{file.path}: the network that it describes cannot be built ({one_line(error)}).")
