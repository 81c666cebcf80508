"""Values of a config as the annotations of a class want them, and in words what an annotation allows."""

import functools
import json
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

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
    """`value` as `hint` wants it: an int as float, a list as tuple, a text as Path. Raises Misfit: "a number", ...

    JSON has no tuples and no paths, so pydantic's strict mode takes them from lists and texts there, and else keeps a
    text from being a number and true from being 1.
    """
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise TooLarge("a number of at most 19 digits")
    if isinstance(hint, typing.TypeVar | str) or _holds_node(value):
        return value  # a nested node is checked as itself
    try:
        taken = _adapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError:
        raise Misfit(described(hint)) from None
    except (TypeError, PydanticUserError):  # an object that the run gives; a hint such as a Protocol
        return value
    if isinstance(taken, bool) is not isinstance(value, bool):  # pydantic takes 1 for Literal[True]
        raise Misfit(described(hint))
    return taken


@functools.cache
def _adapter(hint: Any) -> Any:  # a TypeAdapter, which beartype cannot read as an annotation
    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))


def _holds_node(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return is_node(value) or any(map(_holds_node, inner))


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


def _is_list_like(kind: Any) -> bool:
    return (
        isinstance(kind, type) and kind is not str and (kind in (list, set) or kind in (Sequence, Iterable, Collection))
    )
