"""Makes each cheap part of a config once, without weights, so that the constructors' own rules speak at the door."""

import contextlib
import inspect
import re
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dino.config.node import Problems, build_node, locate, sentence
from dino.runtime.annotated import annotations, fitted_or_left, is_node
from dino.runtime.nested import value_at
from dino.runtime.processes import place
from dino.runtime.refused import shown
from dino.weights.weightless import needs_weights, weightless

# Arguments that the run gives to a part, with the key that each comes from and a value to try where that key is wrong.
GIVEN_BY_THE_RUN: dict[str, dict[str, tuple[str, Any]]] = {
    "head": {"input_dim": ("backbone", 8)},
    "loss": {"ncrops": ("augmentation.num_local_views", 8), "n_global_crops": ("augmentation", 2)},
    "optimizer": {"params": ("optimizer", None)},
    "scheduler": {
        "epochs": ("training.epochs", 1000),
        "steps_per_epoch": ("training.epochs", 1),
        "effective_batch": ("training.effective_batch", 256),
        "lr": ("optimizer.lr", 1.0),
        "weight_decay": ("optimizer.weight_decay", 0.04),
        "momentum": ("teacher.momentum", 0.99),
        "final_momentum": ("teacher.final_momentum", 1.0),
        "temp": ("teacher.temp", 0.04),
        "warmup_temp": ("teacher.warmup_temp", 0.04),
        "warmup_temp_epochs": ("teacher.warmup_temp_epochs", 0.0),
        "freeze_last_layer_epochs": ("training.freeze_last_layer_epochs", 0.0),
    },
}

# Keys of a node that its class does not take: the YAMLs of other parts read them, by interpolation.
READ_BY_OTHERS = {"optimizer": ("final_weight_decay", "reference_batch_size")}

BUGS = (NameError, AttributeError, SyntaxError)  # a mistake in a class, not in its values: its traceback is what helps


def try_parts(config: Mapping[str, Any], problems: Problems) -> int:
    """Makes each cheap part once (no dataset is cheap); returns how many parameters backbone and head have."""
    augmentation = _attempt("augmentation", config, problems)
    backbone = _attempt("backbone", config, problems, within=weightless, drop=("pretrained",))
    if backbone is not None:
        _check_forward(backbone, config, problems)
    head = _attempt("head", config, problems, {"input_dim": getattr(backbone, "output_dim", None)}, within=weightless)
    if missing := [name for name in ("factors", "last_layer") if head is not None and not hasattr(head, name)]:
        lacks = f"{type(head).__name__} has no {' and no '.join(missing)}"
        problems.add("head", f"head: {lacks}, which training uses: write it as dino/head.py does, or take head=dino.")
    crops = {name: getattr(augmentation, name, None) for name in ("ncrops", "n_global_crops")}
    _attempt("loss", config, problems, crops, within=weightless)
    _attempt("optimizer", config, problems, after=lambda made: made.step(), fresh={"params": _dummy_parameters})
    late = {
        name: value_at(config, path)
        for name, (path, _) in GIVEN_BY_THE_RUN["scheduler"].items()
        if path not in problems
    }
    if late.get("effective_batch") is None and not problems.within("training"):
        training = config["training"]
        late["effective_batch"] = training["batch_size"] * training["gradient_accumulation_steps"] * place().world_size
    _attempt("scheduler", config, problems, late | {"steps_per_epoch": 1})
    _attempt("evaluator", config, problems)
    for name in config["logger"] if isinstance(config.get("logger"), Mapping) else ():
        _attempt(f"logger.{name}", config, problems)
    return sum(p.numel() for part in (backbone, head) if hasattr(part, "parameters") for p in part.parameters())


def arguments_of(path: str, node: dict[str, Any]) -> dict[str, Any]:
    """The node at `path` of a config, without the keys that only other parts read."""
    return {key: value for key, value in node.items() if key not in READ_BY_OTHERS.get(path, ())}


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
                problems.add(key, f"{key}={size}: the backbone takes no such images: {' '.join(str(error).split())}")
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


def _attempt(
    path: str,
    config: Mapping[str, Any],
    problems: Problems,
    late: Mapping[str, Any] = {},
    *,
    drop: tuple[str, ...] = (),
    fresh: Mapping[str, Callable[[], Any]] = {},
    after: Callable[[Any], Any] = lambda made: None,
    within: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Any:
    """Makes the part at `path`; what its constructor objects to becomes problems, each with the key to blame.

    A key that is wrong already, or blamed here, is tried with its default instead: so the next wrong one is found too.
    Returns the part, or None where even so it can't be made.
    """
    node = value_at(config, path)
    if not is_node(node) or f"{path}._target_" in problems or f"{path}._partial_" in problems:
        return None
    node, target = arguments_of(path, node), locate(node["_target_"])
    name = str(node["_target_"]).rpartition(".")[2]
    takes, hints, sources = inspect.signature(target).parameters, annotations(target), GIVEN_BY_THE_RUN.get(path, {})
    origin = {key: f"{path}.{key}" for key in node if key not in ("_target_", "_partial_")}
    origin |= {key: source for key, (source, _) in sources.items()}
    given = {key: node[key] for key in origin if key in node and key not in sources and key not in drop}
    given |= {key: standin if late.get(key) is None else late[key] for key, (_, standin) in sources.items()}
    given = {
        key: value
        for key, value in given.items()
        if key in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values())
    }

    def without(key: str) -> dict[str, Any] | None:
        """The arguments with the default of `key`, or the stand-in for it; None where it has none."""
        if key in sources:
            return given | {key: sources[key][1]}
        parameter = takes.get(key)
        if parameter is not None and parameter.default is parameter.empty:
            return None
        return {k: v for k, v in given.items() if k != key}

    def make(arguments: Mapping[str, Any]) -> Any:
        with within(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the part that is made to be used warns
            made = target(
                **{
                    k: fresh[k]() if k in fresh else build_node(fitted_or_left(v, hints.get(k, Any)))
                    for k, v in arguments.items()
                }
            )
            after(made)
        return made

    def error_of(arguments: Mapping[str, Any]) -> Exception | None:
        try:
            make(arguments)
        except BUGS as error:
            if "site-packages" not in traceback.extract_tb(error.__traceback__)[-1].filename:
                raise
            return error
        except Exception as error:
            return None if needs_weights(error) else error
        return None

    for key in [key for key in given if origin[key] in problems]:
        rest = without(key)
        if rest is None:
            return None
        given = rest
    if any(
        p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and k not in given
        for k, p in takes.items()
    ):
        return None  # misfits has said what is missing
    while (error := error_of(given)) is not None:
        blamed = _to_blame(error, name, given, without, error_of)
        if blamed is None:
            problems.add(path, f"{path}: {_words(error, name)}")
            return None
        value = "" if blamed in sources and late.get(blamed) is None else f"={shown(given[blamed])}"
        problems.add(origin[blamed], f"{origin[blamed]}{value}: {_words(error, name)}")
        rest = without(blamed)
        if rest is None or rest == given:
            return None
        given = rest
    with contextlib.suppress(Exception):  # not an error of values, or error_of would have seen it: it needs weights
        return make(given)
    return None


def _to_blame(
    error: Exception,
    name: str,
    given: Mapping[str, Any],
    without: Callable[[str], dict[str, Any] | None],
    error_of: Callable[[Mapping[str, Any]], Exception | None],
) -> str | None:
    """The key whose default makes the error go away or give way to another, else the first that the message names."""
    gives_way = None
    begins = re.match(rf"(?:{re.escape(name)}: )?(\w+)", str(error))
    first = begins[1] if begins else None
    numbers = {key: value for key, value in given.items() if isinstance(value, int) and not isinstance(value, bool)}
    for key in sorted(given, key=lambda key: (key != first, -abs(numbers.get(key, 0)))):  # what is enormous, soon
        rest = without(key)
        if rest is None and key in numbers:  # one that has no default
            rest = {**given, key: 1}
        if rest is None or rest == given:
            continue
        other = error_of(rest)
        if other is None:
            return key
        if gives_way is None and _form(other) != _form(error):
            gives_way = key
    return gives_way or (first if first in given else None)


def _form(error: Exception) -> str:
    """The message without its numbers."""
    return re.sub(r"[-+\d.]+(e[-+]?\d+)?", "#", f"{type(error).__name__} {error}")


def _words(error: Exception, name: str) -> str:
    said = sentence(name, error)
    if isinstance(error, ValueError | TypeError | OSError | ImportError):
        return said
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{said} ({type(error).__name__} in {Path(where.filename).name}, line {where.lineno})"
