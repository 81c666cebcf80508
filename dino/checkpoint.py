"""What a run needs to go on exactly where it was, and the one file that people want from it: teacher.safetensors."""

import contextlib
import hashlib
import importlib
import json
import logging
import os
import random
import zipfile
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dino.model import DinoModel
from dino.refused import Refused
from dino.whole import whole

log = logging.getLogger(__name__)
FOLDER = "checkpoints"
BEST = "best.pt"
TEACHER = "teacher.safetensors"


def save_checkpoint(directory: Path, state: dict[str, Any], keep: int = 2, best: bool = False) -> Path:
    """Writes `state` (tensors and plain values; `iteration` names the file) below directory/checkpoints.

    Complete or not there at all: written under another name, synced, renamed. Then all but this one and the `keep` - 1
    before it go: one of a later step was passed over as broken. With `best`, this one is kept as best.pt too (a second
    name of the same file, no second copy).
    """
    path = directory / FOLDER / f"step_{state['iteration']:09d}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, lambda file: torch.save({**state, "timestamp": datetime.now(UTC).isoformat()}, file))
    if best:
        with whole(path.with_name(BEST)) as link:
            link.unlink(missing_ok=True)
            os.link(path, link)
    paths = _newest_first(directory)
    kept = paths[paths.index(path) :][:keep]
    for other in paths:
        if other not in kept:
            other.unlink()
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint in this file, on the CPU. With weights_only: it can hold no code.

    Each part is compared with the checksum beside it, which torch.load ignores. Raises where anything is wrong with the
    file, be it one bit, and it can be any exception.
    """
    with zipfile.ZipFile(path) as parts:
        if (part := parts.testzip()) is not None:
            raise ValueError(f"{part} in it is not what was written")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def check_read_back(path: Path, state: dict[str, Any]) -> None:
    """Raises Refused where the file at `path` does not give the student's weights of `state` back, bit for bit."""
    try:
        student = read_checkpoint(path)["student"]
        written = {name: value.cpu() for name, value in state["student"].items()}
        same = all(torch.allclose(student[name], written[name], 0, 0, equal_nan=True) for name in written)
    except Exception as error:
        raise Refused(f"{path} was written and cannot be read back ({error}); use another disk.") from error
    if not same:
        raise Refused(f"{path} was written and reads back other weights; use another disk.")


def load_checkpoint(directory: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint below `directory`, on the CPU; None where there is none yet.

    A broken one is passed over, saying so; after all others comes the best. Raises Refused where all are broken: to
    start afresh without a word would throw the run away.
    """
    paths = [*_newest_first(directory), *(directory / FOLDER).glob(BEST)]
    for path in paths:
        try:
            return read_checkpoint(path)
        except Exception as error:
            log.warning("%s cannot be read (%s); trying the one before.", path, str(error).split("\n")[0])
    if paths:
        raise Refused(
            f"none of the {len(paths)} checkpoints in {directory / FOLDER} can be read; restore one from a backup, "
            "or move the directory away to start afresh."
        )
    return None


def save_teacher(directory: Path, teacher: DinoModel, config: dict[str, Any], preprocessing: dict[str, Any]) -> None:
    """directory/teacher.safetensors: backbone and head; in the metadata, how to build them and to prepare images."""
    from safetensors.torch import save

    weights = {name: value.detach().contiguous().clone() for name, value in teacher.state_dict().items()}
    metadata = {
        "format": "pt",
        "backbone": json.dumps(config["backbone"]),
        "head": json.dumps(config["head"]),
        "preprocessing": json.dumps(preprocessing),
    }
    data = save(weights, metadata | {"sha256": digest(weights, metadata)})
    _write(directory / TEACHER, lambda file: file.write(data))


def load_teacher(path: str | Path) -> DinoModel:
    """A run's teacher in eval mode: from its directory, its teacher.safetensors or one of its checkpoints (.pt).

    `.preprocessing` on the result: size in pixels, mean and std of the images it expects; `.config`: "backbone" and
    "head", how they were built.
    """
    path = Path(path) / TEACHER if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there; expected a run's directory, its {TEACHER} or a checkpoint of it."
        )
    try:
        config, preprocessing, weights = (_in_checkpoint if path.suffix == ".pt" else _in_safetensors)(path)
    except Exception as error:  # safetensors raises an exception type of its own for each fault, torch any
        raise ValueError(f"{path} cannot be read as a {TEACHER} or a checkpoint of this project ({error}).") from error
    backbone = untrained_backbone(config["backbone"])
    model = DinoModel(backbone, _construct(config["head"], input_dim=backbone.output_dim))
    model.load_state_dict(weights)
    facts: Any = model  # torch types a module's attributes as tensors and modules
    facts.preprocessing, facts.config = preprocessing, config
    return model.eval()


def digest(weights: Mapping[str, Tensor], about: dict[str, Any]) -> str:
    """SHA-256 of names and bits of the weights, and of plain values beside them, in hexadecimal digits."""
    sha256 = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, value in sorted(weights.items()):
        sha256.update(name.encode())
        sha256.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def untrained_backbone(config: dict[str, Any]) -> nn.Module:
    """The backbone of that node of a config, with random weights whatever it says of pretrained ones."""
    return _construct({**config, **({"pretrained": False} if "pretrained" in config else {})})


def _in_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(how backbone and head are built, how images are prepared, the weights)."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    if metadata.pop("sha256", None) != digest(weights, metadata):
        raise ValueError("what is in it is not what was written")
    parts = {key: json.loads(metadata[key]) for key in ("backbone", "head")}
    return parts, json.loads(metadata["preprocessing"]), weights


def _in_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    from dino.augmentation import IMAGENET_MEAN, IMAGENET_STD

    state = read_checkpoint(path)
    config, colours = state["config"], state["config"]["augmentation"]
    preprocessing = {
        "size": config["dataset"]["eval_size"],
        "mean": colours.get("mean", IMAGENET_MEAN),
        "std": colours.get("std", IMAGENET_STD),
    }
    return {key: config[key] for key in ("backbone", "head")}, preprocessing, state["teacher"]


def seed_all(seed: int) -> None:
    """Seeds the generators that `rng_state` saves."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """Every global random generator of this process and its device, as plain values and tensors."""
    numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))
    return {
        "python": random.getstate(),
        "numpy": {
            **numpy,
            "state": {**numpy["state"], "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64))},
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    inner = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {**inner, "key": inner["key"].numpy().astype(np.uint32)}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """What the block draws is not drawn from the run: an import may draw too (that of rich), at each start."""
    before = rng_state()
    try:
        yield
    finally:
        set_rng_state(before)


def _construct(node: dict[str, Any], **late: Any) -> nn.Module:
    module, name = node["_target_"].rsplit(".", 1)
    arguments = {key: value for key, value in node.items() if not key.startswith("_")}
    built: nn.Module = getattr(importlib.import_module(module), name)(**arguments, **late)
    return built


def _newest_first(directory: Path) -> list[Path]:
    return sorted((directory / FOLDER).glob("step_*.pt"), reverse=True)


def _write(path: Path, write: Callable[[Any], object]) -> None:
    with whole(path) as partial, open(partial, "wb") as file:
        try:
            write(file)
        except RuntimeError as error:  # torch.save's own, of a file that it could not end; in the disk's words
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself survives a power cut
    finally:
        os.close(folder)
