"""Makes each cheap part of a config once, without weights, so that the constructors' own rules speak at the door."""

import contextlib
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dino.config.node import Problems, build_node, with_random_weights
from dino.runtime.annotated import is_node
from dino.runtime.nested import value_at
from dino.runtime.processes import place
from dino.runtime.refused import one_line, shown
from dino.weights.weightless import needs_weights, weightless

# Arguments that the run gives to a part, and the key that each comes from.
GIVEN_BY_THE_RUN: dict[str, dict[str, str]] = {
    "head": {"input_dim": "backbone"},
    "loss": {"ncrops": "augmentation", "n_global_crops": "augmentation"},
    "optimizer": {"params": "optimizer"},
    "scheduler": {
        "epochs": "training.epochs",
        "steps_per_epoch": "training.epochs",
        "effective_batch": "training.effective_batch",
        "lr": "optimizer.lr",
        "weight_decay": "optimizer.weight_decay",
        "momentum": "teacher.momentum",
        "final_momentum": "teacher.final_momentum",
        "temp": "teacher.temp",
        "warmup_temp": "teacher.warmup_temp",
        "warmup_temp_epochs": "teacher.warmup_temp_epochs",
        "freeze_last_layer_epochs": "training.freeze_last_layer_epochs",
    },
}

# Keys of a node that its class does not take: the YAMLs of other parts read them, by interpolation.
READ_BY_OTHERS = {"optimizer": ("final_weight_decay", "reference_batch_size")}

BUGS = (NameError, AttributeError, SyntaxError)  # a mistake in a class, not in its values: its traceback is what helps


def try_parts(config: Mapping[str, Any], problems: Problems) -> int:
    """Makes each cheap part once (no dataset is cheap); returns how many parameters backbone and head have.

    A part of which a name or type is wrong is not tried: its constructor would say the same.
    """
    augmentation = _made("augmentation", config, problems)
    backbone = _made("backbone", config, problems, weightless)
    if backbone is not None:
        _check_forward(backbone, config, problems)
    head = _made("head", config, problems, weightless, {"input_dim": getattr(backbone, "output_dim", None)})
    if missing := [name for name in ("factors", "last_layer") if head is not None and not hasattr(head, name)]:
        lacks = f"{type(head).__name__} has no {' and no '.join(missing)}"
        problems.add("head", f"head: {lacks}, which training uses: write it as dino/head.py does, or take head=dino.")
    _made("loss", config, problems, weightless, {n: getattr(augmentation, n, None) for n in GIVEN_BY_THE_RUN["loss"]})
    _made("scheduler", config, problems, late=_of_schedule(config))
    # After the schedule, which names a rate or a decay of the optimizer that is wrong.
    optimizer = _made("optimizer", config, problems, late={"params": _dummy_parameters()})
    if optimizer is not None:
        with _refusals_of("optimizer", config, problems):
            optimizer.step()
    _made("evaluator", config, problems)
    for name in config["logger"] if isinstance(config.get("logger"), Mapping) else ():
        _made(f"logger.{name}", config, problems)
    return sum(p.numel() for part in (backbone, head) if hasattr(part, "parameters") for p in part.parameters())


def arguments_of(path: str, node: dict[str, Any]) -> dict[str, Any]:
    """The node at `path` of a config, without the keys that only other parts read."""
    return {key: value for key, value in node.items() if key not in READ_BY_OTHERS.get(path, ())}


def _made(
    path: str,
    config: Mapping[str, Any],
    problems: Problems,
    within: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    late: Mapping[str, Any] = {},
) -> Any:
    """The part at `path`; None where it cannot be made, or where what it is made of is wrong already."""
    node, sources = value_at(config, path), GIVEN_BY_THE_RUN.get(path, {})
    if not is_node(node) or problems.within(path) or any(problems.within(key) for key in sources.values()):
        return None
    if any(late.get(name) is None for name in sources):
        return None  # another part could not be made
    with _refusals_of(path, config, problems), within(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the part that is made to be used warns
        return build_node(with_random_weights(arguments_of(path, node)), **late)


@contextlib.contextmanager
def _refusals_of(path: str, config: Mapping[str, Any], problems: Problems) -> Iterator[None]:
    """What a constructor refuses becomes a problem of the first key that its message names, else of the whole part."""
    try:
        yield
    except Exception as error:
        if isinstance(error, BUGS) and "site-packages" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise
        if needs_weights(error):
            return
        keys = {name: f"{path}.{name}" for name in value_at(config, path)} | GIVEN_BY_THE_RUN.get(path, {})
        words = one_line(error)
        named = next((word for word in re.findall(r"\w+", words) if word in keys), None)
        if named is not None:
            key = keys[named]
            problems.add(key, f"{key}={shown(value_at(config, key))}: {words}")
        else:
            node = arguments_of(path, value_at(config, path))
            given = ", ".join(f"{name}={shown(value)}" for name, value in node.items() if name != "_target_")
            problems.add(path, f"{path}: {words}; it was given {given}")


def _of_schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the run gives the schedule, for an epoch of one step."""
    late = {name: value_at(config, key) for name, key in GIVEN_BY_THE_RUN["scheduler"].items()}
    training = config["training"] if isinstance(config.get("training"), Mapping) else {}
    batch, accumulation = training.get("batch_size"), training.get("gradient_accumulation_steps")
    if late["effective_batch"] is None and isinstance(batch, int) and isinstance(accumulation, int):
        late["effective_batch"] = batch * accumulation * place().world_size
    return late | {"steps_per_epoch": 1}


def _check_forward(backbone: Any, config: Mapping[str, Any], problems: Problems) -> None:
    """Two images of each size through the weightless backbone: shapes that don't fit show here."""
    import torch

    for key in ("augmentation.global_size", "augmentation.local_size"):
        size = value_at(config, key)
        if not isinstance(size, int) or not 0 < size < 100_000 or key in problems or "backbone" in problems:
            continue
        try:
            with torch.no_grad(), weightless():
                shape = tuple(backbone(torch.zeros(2, 3, size, size)).shape)
        except (RuntimeError, ValueError) as error:
            if not needs_weights(error):
                problems.add(key, f"{key}={size}: the backbone takes no such images: {one_line(error)}")
            continue
        if shape != (2, getattr(backbone, "output_dim", None)):
            name = type(backbone).__name__
            expected = f"[2, output_dim={getattr(backbone, 'output_dim', 'missing')}]"
            problems.add("backbone", f"backbone: {name}: expected features {expected} of 2 images, got {list(shape)}")


def _dummy_parameters() -> list[dict[str, Any]]:
    """Groups as dino.optimizer.parameter_groups makes them, of one matrix and one bias."""
    import torch

    weights = [torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    return [{"params": [weight], "decay": weight.ndim > 1, "last_layer": False} for weight in weights]
