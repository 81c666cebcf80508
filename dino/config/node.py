"""A node of the config, `{_target_: package.Class, key: value}`: where it misfits its class, and the object it makes.

Written against `inspect.signature` and the annotations, so that any importable class will do, ours or a third party's.
"""

import difflib
import functools
import importlib
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from dino.runtime.refused import Refused, shown


class Misfit(TypeError):
    """A value that its annotation doesn't allow; the message says what was expected."""


class TooLarge(Misfit):
    """A whole number that neither torch nor numpy can hold, whatever it is for."""


def is_node(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def locate(name: Any) -> Callable[..., Any]:
    """The class or function of that dotted name. Raises ImportError, in one sentence; its module's own errors pass."""
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ImportError("expected the dotted name of a class, such as torch.optim.AdamW")
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
                continue  # no module of this name; a shorter one may hold a class that holds the rest
            raise ImportError(
                f"{module} needs {error.name}, which is not installed; pip install {error.name}"
            ) from error
        for at, part in enumerate(parts[end:], start=end):
            if not hasattr(found, part):
                where = ".".join(parts[:at])
                raise ImportError(f"{where} has no {part}{did_you_mean(part, dir(found))}")
            found = getattr(found, part)
        if not callable(found):
            raise ImportError(f"expected a class or function, and {name} is neither")
        return typing.cast(Callable[..., Any], found)
    raise ImportError(f"there is no module {parts[0]}; is its package installed?")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" of the nearest known word, or nothing."""
    close = difflib.get_close_matches(word, [name for name in known if isinstance(name, str)], n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def ended(text: str) -> str:
    """`text` with a full stop, where it has no mark at its end."""
    return text if text.endswith((".", "?", "!")) else text + "."


def annotations(target: Callable[..., Any]) -> dict[str, Any]:
    """Hints of a class's constructor or of a function; none where they can't be evaluated."""
    try:
        return typing.get_type_hints(target.__init__ if isinstance(target, type) else target, include_extras=True)  # type: ignore[misc]
    except (NameError, TypeError, AttributeError):
        return {}


def misfits(path: str, node: Mapping[str, Any], late: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """(key, sentence) of each name and type that the class doesn't take. `late`: arguments that the run gives."""
    try:
        target = locate(node["_target_"])
        takes = inspect.signature(target).parameters
    except (ImportError, ValueError, TypeError) as error:
        yield f"{path}._target_", ended(f"{path}._target_={shown(node['_target_'])}: {error}")
        return
    name, hints = str(node["_target_"]).rpartition(".")[2], annotations(target)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    names = [k for k, p in takes.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    partial = node.get("_partial_", False)
    if not isinstance(partial, bool):
        yield f"{path}._partial_", f"{path}._partial_={shown(partial)}: expected true or false."
    for key, value in node.items():
        where = f"{path}.{key}"
        if key in ("_target_", "_partial_"):
            continue
        if key in late:
            yield where, f"{where}={shown(value)}: the run itself gives {name} its {key}; remove the key."
        elif str(key).startswith("_") or (key not in names and not open_ended):
            free = [k for k in names if k not in late]
            hint = did_you_mean(str(key), free) or f"; it takes {', '.join(free) or 'nothing'}"
            yield where, ended(f"{where}={shown(value)}: {name} takes no {key}{hint}")
        elif value == "???":
            yield where, f"{where}: no value yet; give one with {where}=..."
        else:
            try:
                fitted(value, hints.get(key, Any))
            except Misfit as misfit:
                yield where, f"{where}={shown(value)}: expected {misfit}."
    for key in names:
        if (
            takes[key].default is inspect.Parameter.empty
            and key not in node
            and key not in late
            and partial is not True
        ):
            yield (
                f"{path}.{key}",
                f"{path}.{key}: missing, and {name} needs it; add it to the YAML or give {path}.{key}=...",
            )


def build_node(node: Any, **late: Any) -> Any:
    """The object that `node` describes, by hydra.utils.instantiate; lists become tuples, ints floats as annotated.

    `late`: arguments known only to the run. With `_partial_: true` and no late ones: a functools.partial that waits for
    them. A dict without `_target_` comes back with its nodes built. Raises Refused where a constructor objects.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    if not is_node(node):
        return {key: build_node(value) for key, value in node.items()} if isinstance(node, dict) else node
    name = str(node["_target_"]).rpartition(".")[2]
    try:
        hints = annotations(locate(node["_target_"]))
        nested = {key: build_node(value) for key, value in node.items() if is_node(value)}
        make = instantiate({**node, **dict.fromkeys(nested), "_partial_": True}, _convert_="all")
        given = {**make.keywords, **nested, **late}
        arguments = {key: fitted_or_left(value, hints.get(key, Any)) for key, value in given.items()}
        if node.get("_partial_", False) and not late:
            return functools.partial(make.func, **arguments)
        return make.func(**arguments)
    except Refused:
        raise
    except InstantiationException as error:  # from a node inside this one
        raise Refused(sentence(name, error.__cause__ or error)) from error
    except (ValueError, TypeError, OSError, ImportError, MemoryError, OverflowError) as error:
        raise Refused(sentence(name, error)) from error
    except RuntimeError as error:
        if "allocate" in str(error):  # torch's words for a lack of memory
            raise Refused(sentence(name, error)) from error
        raise


def with_random_weights(node: dict[str, Any]) -> dict[str, Any]:
    """The node of a backbone, its pretrained weights switched off."""
    return node | {"pretrained": False} if "pretrained" in node else node


def fitted_or_left(value: Any, hint: Any) -> Any:
    """As `fitted`, and as it is where it does not fit: then the constructor has the word."""
    try:
        return fitted(value, hint)
    except Misfit:
        return value


def sentence(name: str, error: BaseException) -> str:
    """`Name: what the error says`, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.startswith(name) else f"{name}: {text}"


def fitted(value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it: an int as float, a list as tuple, a str as Path. Raises Misfit: "a number", ..."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise TooLarge("a number of at most 19 digits")
    if hint is Any or isinstance(hint, typing.TypeVar | str) or is_node(value):
        return value  # a nested node is checked as itself
    if origin is typing.Annotated:
        return fitted(value, arguments[0])
    if isinstance(hint, typing.NewType):
        return fitted(value, hint.__supertype__)
    if origin is Literal:
        if any(value == allowed and type(value) is type(allowed) for allowed in arguments):
            return value
    elif origin in (Union, types.UnionType):
        for exact in (True, False):  # 1 for `float | int` stays an int
            for option in arguments:
                try:
                    result = fitted(value, option)
                except Misfit:
                    continue
                if not exact or type(result) is type(value):
                    return result
    elif hint is None or hint is types.NoneType:
        if value is None:
            return value
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and _finite(value):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is Path:
        if isinstance(value, str | Path):
            return Path(value)
    elif hint is tuple or origin is tuple:
        if isinstance(value, list | tuple):
            inner = _of_each(arguments, len(value))
            if inner is not None:
                return tuple(_each(value, inner, hint))
    elif _is_list_like(origin or hint):
        if isinstance(value, list | tuple):
            return _each(value, [arguments[0] if arguments else Any] * len(value), hint)
    elif isinstance(origin or hint, type) and issubclass(origin or hint, Mapping):
        if isinstance(value, dict):
            of = arguments[1] if len(arguments) == 2 else Any
            return dict(zip(value, _each(list(value.values()), [of] * len(value), hint), strict=True))
    else:
        try:
            if isinstance(value, origin or hint):
                return value
        except TypeError:  # a Protocol, say, that can't be asked
            return value
    raise Misfit(described(hint))


def described(hint: Any) -> str:
    """What `hint` allows, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    words = {
        int: "a whole number",
        float: "a finite number",
        bool: "true or false",
        str: "a text",
        Path: "a path",
        type(None): "null",
    }
    if hint in words or hint is None:
        return words.get(hint, "null")
    if origin is typing.Annotated:
        return described(arguments[0])
    if origin is Literal:
        return " or ".join(shown(allowed) for allowed in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(described(option) for option in arguments if "Tensor" not in str(option)))
    if hint is tuple or origin is tuple or _is_list_like(origin or hint):
        fixed = origin is tuple and Ellipsis not in arguments
        each = f", each {described(arguments[0])}" if arguments and arguments[0] is not Any else ""
        return f"a list{f' of {len(arguments)}' if fixed else ''}{each}"
    if isinstance(origin or hint, type) and issubclass(origin or hint, Mapping):
        return "a dict"
    return f"an object of {getattr(hint, '__name__', str(hint))} (a node with its _target_)"


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _is_list_like(kind: Any) -> bool:
    return (
        isinstance(kind, type) and kind is not str and (kind in (list, set) or kind in (Sequence, Iterable, Collection))
    )


def _of_each(arguments: tuple[Any, ...], length: int) -> list[Any] | None:
    """The hint of each of `length` elements of a tuple; None where it must be of another length."""
    if not arguments:
        return [Any] * length
    if Ellipsis in arguments:
        return [arguments[0]] * length
    return list(arguments) if len(arguments) == length else None


def _each(values: Sequence[Any], hints: list[Any], whole: Any) -> list[Any]:
    try:
        return [fitted(value, hint) for value, hint in zip(values, hints, strict=True)]
    except Misfit:
        raise Misfit(described(whole)) from None


class Problems(dict[str, str]):
    """Sentences by key: the first that is said of a key stays."""

    def add(self, key: str, text: str) -> None:
        self.setdefault(key, ended(text))

    def within(self, path: str) -> bool:
        return any(key == path or key.startswith(path + ".") for key in self)
