"""Values of a config as the annotations of a class want them, and in words what an annotation allows."""

import math
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from dino.runtime.refused import shown


class Misfit(TypeError):
    """A value that its annotation doesn't allow; the message says what was expected."""


class TooLarge(Misfit):
    """A whole number that neither torch nor numpy can hold, whatever it is for."""


def is_node(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def annotations(target: Callable[..., Any]) -> dict[str, Any]:
    """Hints of a class's constructor or of a function; none where they can't be evaluated."""
    try:
        return typing.get_type_hints(target.__init__ if isinstance(target, type) else target, include_extras=True)  # type: ignore[misc]
    except (NameError, TypeError, AttributeError):
        return {}


def fitted_or_left(value: Any, hint: Any) -> Any:
    """As `fitted`, and as it is where it does not fit: then the constructor has the word."""
    try:
        return fitted(value, hint)
    except Misfit:
        return value


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
