"""What a run needs to go on exactly where it was."""

import logging
import os
from collections import OrderedDict
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dino.runtime.files import atomic_write, write_durably
from dino.runtime.refused import Refused, first_line
from dino.runtime.sharding import full_tensor, shard_like
from dino.weights.checkpoint_file import other_shapes, read_checkpoint

log = logging.getLogger(__name__)
FOLDER = "checkpoints"
BEST = "best.pt"
STATES = ("student_state_dict", "teacher_state_dict", "optimizer_state_dict", "dino_loss_center", "loss_state_dict")


def save_checkpoint(
    student: nn.Module,
    teacher: nn.Module,
    optimizer: Optimizer,
    loss: nn.Module,
    *,
    path: str | Path,
    epoch: int = 0,
    iteration: int = 0,
    config: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
    wandb_run_id: str | None = None,
    **more: Any,
) -> None:
    """All that training goes on from, in one file at `path`: complete or not there at all.

    It has the same keys as the checkpoints of a run: those in STATES, and the arguments by their names, with a
    `timestamp`. `more`: whatever else is to be kept, such as `scaler_state_dict`. `iteration`: optimizer steps done.
    With several processes one of them saves; where the student is sharded, see `training_state`.
    Raises TypeError for what is neither a tensor nor plain, since it could not be read without executing code.
    """
    facts = {"epoch": epoch, "iteration": iteration, "config": config or {}, "metrics": metrics or {}}
    write_checkpoint(
        Path(path), {**training_state(student, teacher, optimizer, loss), **facts, "wandb_run_id": wandb_run_id, **more}
    )


def load_checkpoint(
    path: str | Path, student: nn.Module, teacher: nn.Module, optimizer: Optimizer, loss: nn.Module
) -> dict[str, Any]:
    """Puts a checkpoint back into the objects, and returns the rest of it: epoch, iteration, config, metrics, ...

    Nothing in the file is executed. Raises FileNotFoundError where there is none, and ValueError where it is damaged or
    is of other networks or another optimizer; the objects are then as they were.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not there; expected a checkpoint.")
    try:
        state = read_checkpoint(Path(path))
    except Exception as error:  # zipfile and torch raise many kinds
        raise ValueError(f"{path} cannot be read as a checkpoint ({first_line(error)}).") from error
    try:
        restore(state, student, teacher, optimizer, loss)
    except (KeyError, ValueError) as error:
        lacks = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} does not fit what it is loaded into: {lacks}.") from error
    return {key: value for key, value in state.items() if key not in STATES}


def training_state(student: nn.Module, teacher: nn.Module, optimizer: Optimizer, loss: nn.Module) -> dict[str, Any]:
    """What a checkpoint keeps of the objects, by the names in STATES.

    Tensors are whole, however the student is sharded: then all processes must ask, and one of them writes.
    """
    of_loss = dict(loss.state_dict())
    return {
        "student_state_dict": _whole(_bare(student).state_dict()),
        "teacher_state_dict": _bare(teacher).state_dict(),
        "optimizer_state_dict": _whole(optimizer.state_dict()),
        "dino_loss_center": of_loss.pop("center"),
        "loss_state_dict": of_loss,  # of a loss of one's own; DinoLoss has no more than its center
    }


def restore(
    state: Mapping[str, Any], student: nn.Module, teacher: nn.Module, optimizer: Optimizer, loss: nn.Module
) -> None:
    """Puts what `training_state` gave back into objects of the same making; shards it where they are sharded.

    Raises ValueError, and changes nothing, where they are of another.
    """
    student, teacher = _bare(student), _bare(teacher)
    of_loss = {"center": state["dino_loss_center"], **state["loss_state_dict"]}
    of_student, of_teacher, of_optimizer = (state[f"{name}_state_dict"] for name in ("student", "teacher", "optimizer"))
    for name, module, saved in (
        ("student", student, of_student),
        ("teacher", teacher, of_teacher),
        ("loss", loss, of_loss),
    ):
        shapes = {key: tuple(value.shape) for key, value in saved.items()}
        if found := other_shapes(shapes, module.state_dict()):
            raise ValueError(f"the {name} is another ({found})")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        i: {key: _as(value, parameters[i]) for key, value in of_one.items()} if i < len(parameters) else of_one
        for i, of_one in of_optimizer["state"].items()
    }
    # The optimizer first: it compares its groups with the file's before it changes anything.
    optimizer.load_state_dict({**of_optimizer, "state": moments})
    student.load_state_dict({name: shard_like(of_student[name], p) for name, p in student.state_dict().items()})
    teacher.load_state_dict(of_teacher)
    loss.load_state_dict(of_loss)


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Written under another name, synced, renamed. Raises TypeError where it is more than tensors and plain values."""
    for key, value in content.items():
        _check_plain(value, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    stamped = {**content, "timestamp": datetime.now(UTC).isoformat()}
    write_durably(path, lambda file: torch.save(stamped, file))


def write_step(directory: Path, content: dict[str, Any], keep: int = 2, best: bool = False) -> Path:
    """Writes a run's checkpoint below directory/checkpoints; its `iteration` names it.

    Keeps this checkpoint and the `keep - 1` before it. Checkpoints of later steps are deleted too: the run came here
    because they were broken. With `best`, this one also stays as best.pt (a hard link, not a copy).
    """
    path = directory / FOLDER / f"step_{content['iteration']:09d}.pt"
    write_checkpoint(path, content)
    if best:
        with atomic_write(path.with_name(BEST)) as link:
            link.unlink(missing_ok=True)
            os.link(path, link)
    paths = _newest_first(directory)
    kept = paths[paths.index(path) :][:keep]
    for other in paths:
        if other not in kept:
            other.unlink()
    return path


def check_read_back(path: Path, state: dict[str, Any]) -> None:
    """Raises Refused where the file at `path` does not give the student's weights of `state` back, bit for bit."""
    try:
        student = read_checkpoint(path)["student_state_dict"]
        written = {name: value.cpu() for name, value in state["student_state_dict"].items()}
        same = all(torch.allclose(student[name], written[name], 0, 0, equal_nan=True) for name in written)
    except Exception as error:
        raise Refused(f"{path} was written and cannot be read back ({error}); use another disk.") from error
    if not same:
        raise Refused(f"{path} was written and reads back other weights; use another disk.")


def newest_checkpoint(directory: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint below `directory`, on the CPU; None where there is none yet.

    A broken one is passed over, saying so; after all others comes the best. Raises Refused where all are broken: to
    start afresh without a word would throw the run away.
    """
    paths = [*_newest_first(directory), *(directory / FOLDER).glob(BEST)]
    for path in paths:
        try:
            return read_checkpoint(path)
        except Exception as error:
            log.warning("%s cannot be read (%s); trying the one before.", path, first_line(error))
    if paths:
        raise Refused(
            f"none of the {len(paths)} checkpoints in {directory / FOLDER} can be read; restore one from a backup, "
            "or move the directory away to start afresh."
        )
    return None


def _newest_first(directory: Path) -> list[Path]:
    return sorted((directory / FOLDER).glob("step_*.pt"), reverse=True)


def _check_plain(value: Any, where: str) -> None:
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}.{key}")
    elif type(value) in (list, tuple):
        for item in value:
            _check_plain(item, where)
    elif value is not None and type(value) not in (bool, int, float, str, Tensor):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(
            f"checkpoint: {where} is a {kind}, expected a tensor or plain values: numbers, texts, lists and dicts of "
            "them (of an OmegaConf config: OmegaConf.to_container(config, resolve=True))."
        )


def _bare(model: nn.Module) -> nn.Module:
    """The network within what DistributedDataParallel and torch.compile wrap around it."""
    inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", model)
    return inner if inner is model else _bare(inner)


def _whole(state: Any) -> Any:
    if isinstance(state, Mapping):
        return {key: _whole(value) for key, value in state.items()}
    return full_tensor(state) if isinstance(state, Tensor) else state


def _as(value: Any, parameter: Tensor) -> Any:
    """What an optimizer keeps of `parameter`: its moments are sharded as it is, its count of steps is not."""
    same = isinstance(value, Tensor) and value.shape == parameter.shape
    return shard_like(value, parameter) if same else value
