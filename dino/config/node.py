"""A node of the config, `{_target_: package.Class, key: value}`: where it misfits its class, and the object it makes.

Written against `inspect.signature` and the annotations, so that any importable class will do, ours or a third party's.
"""

import difflib
import functools
import importlib
import inspect
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from dino.runtime.annotated import Misfit, annotations, fitted, fitted_or_left, is_node
from dino.runtime.refused import Refused, one_line, shown


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


def sentence(name: str, error: BaseException) -> str:
    """`Name: what the error says`, on one line."""
    text = one_line(error)
    return text if text.startswith(name) else f"{name}: {text}"


class Problems(dict[str, str]):
    """Sentences by key: the first that is said of a key stays."""

    def add(self, key: str, text: str) -> None:
        self.setdefault(key, ended(text))

    def within(self, path: str) -> bool:
        return any(key == path or key.startswith(path + ".") for key in self)
