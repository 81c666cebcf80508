"""What a run needs to go on exactly where it was."""

import contextlib
import logging
import os
import pickletools
import random
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dino.distributed import sharded_as
from dino.distributed import whole as unsharded
from dino.refused import Refused
from dino.whole import whole, write_durably

log = logging.getLogger(__name__)
FOLDER = "checkpoints"
BEST = "best.pt"
STATES = ("student_state_dict", "teacher_state_dict", "optimizer_state_dict", "dino_loss_center", "loss_state_dict")
CONSTRUCTORS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch [A-Z][A-Za-z0-9]*Storage")


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
        raise ValueError(f"{path} cannot be read as a checkpoint ({_first_line(error)}).") from error
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
    student.load_state_dict({name: sharded_as(of_student[name], p) for name, p in student.state_dict().items()})
    teacher.load_state_dict(of_teacher)
    loss.load_state_dict(of_loss)


def other_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, Tensor]) -> str:
    """Where the names or shapes of a file differ from those of a network, in words; "" where they are the same."""
    shapes = {name: tuple(value.shape) for name, value in expected.items()}
    missing, unexpected = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    other = [
        f"{name} is {list(found[name])} in the file and {list(shape)} in the network"
        for name, shape in shapes.items()
        if name in found and found[name] != shape
    ]
    kinds = {"missing: ": missing, "unexpected: ": unexpected, "": other}
    return "; ".join(kind + _first(names) for kind, names in kinds.items() if names)


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Written under another name, synced, renamed. Raises TypeError where it is more than tensors and plain values."""
    for key, value in content.items():
        _check_plain(value, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    stamped = {**content, "timestamp": datetime.now(UTC).isoformat()}
    write_durably(path, lambda file: torch.save(stamped, file))


def write_step(directory: Path, content: dict[str, Any], keep: int = 2, best: bool = False) -> Path:
    """Writes a run's checkpoint below directory/checkpoints; its `iteration` names it.

    Then all but this one and the `keep` - 1 before it go: one of a later step was passed over as broken. With `best`,
    this one is kept as best.pt too (a second name of the same file, no second copy).
    """
    path = directory / FOLDER / f"step_{content['iteration']:09d}.pt"
    write_checkpoint(path, content)
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
    """The checkpoint in this file, on the CPU. It may come from a stranger: nothing in it is executed, and it takes no
    more memory than the file has bytes.

    Each part is compared with the checksum beside it, which torch.load ignores. Raises where anything is wrong with the
    file, be it one bit, and it can be any exception.
    """
    with zipfile.ZipFile(path) as parts:
        entries = parts.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, as no checkpoint of this project is")
        if (claimed := sum(entry.file_size for entry in entries)) > path.stat().st_size:
            raise ValueError(f"its parts claim {claimed:,} bytes, and the file has {path.stat().st_size:,}")
        if (part := parts.testzip()) is not None:
            raise ValueError(f"{part} in it is not what was written")
        for entry in entries:
            if entry.filename.endswith("/data.pkl"):
                _check_constructors(parts.read(entry))
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _check_constructors(program: bytes) -> None:
    """Raises ValueError where the pickle in a checkpoint calls more than dicts and tensors of the file's parts need.

    torch.load with weights_only=True executes no code, but allows some more calls: torch.Tensor(10**12), for one, which
    takes as much memory as the file asks for.
    """
    for opcode, name, _ in pickletools.genops(program):
        if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST") and not CONSTRUCTORS.fullmatch(str(name)):
            raise ValueError(f"it calls {name}, as no checkpoint of this project does")


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
            log.warning("%s cannot be read (%s); trying the one before.", path, _first_line(error))
    if paths:
        raise Refused(
            f"none of the {len(paths)} checkpoints in {directory / FOLDER} can be read; restore one from a backup, "
            "or move the directory away to start afresh."
        )
    return None


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
    return unsharded(state) if isinstance(state, Tensor) else state


def _as(value: Any, parameter: Tensor) -> Any:
    """What an optimizer keeps of `parameter`: its moments are sharded as it is, its count of steps is not."""
    same = isinstance(value, Tensor) and value.shape == parameter.shape
    return sharded_as(value, parameter) if same else value


def _first_line(error: Exception) -> str:
    """Of the message, which may be empty and then leaves the type alone to be told."""
    return str(error).split("\n")[0] or type(error).__name__


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def _newest_first(directory: Path) -> list[Path]:
    return sorted((directory / FOLDER).glob("step_*.pt"), reverse=True)
