"""Which classes a file may name.

A teacher.safetensors, a checkpoint and the config.yaml of a run name with `_target_` the classes to build. Such a file
may come from a stranger. So a name from a file is looked up in a list of what this project has before anything is
imported, and every argument is a plain value. What a user types in a command or writes in conf/ does not pass through
here: it is the user's own. docs/security.md has the whole picture.
"""

import functools
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from dino.runtime.files import path_exists
from dino.runtime.importing import dotted
from dino.runtime.refused import Refused, shown

Group = Literal["backbone", "head", "augmentation", "dataset", "logger"]

# What a class of each group has; a backbone and a head are subclasses of nn.Module besides.
METHODS: dict[Group, tuple[str, ...]] = {
    "backbone": ("forward",),
    "head": ("forward", "factors"),
    "augmentation": ("crop", "augment"),
    "dataset": ("__len__", "__getitem__"),
    "logger": ("start", "log", "finish"),
}

# A file never decides that something is downloaded: these keys have these values, whatever the file says.
OFFLINE = {"pretrained": False, "download": False}

# timm.create_model reads more than these: paths of weights, caches, whole configurations. These only shape the network.
TIMM_OPTIONS = frozenset(
    {"img_size", "patch_size", "in_chans", "num_classes", "global_pool", "dynamic_img_size", "dynamic_img_pad"}
    | {"embed_dim", "depth", "depths", "dims", "widths", "layers", "num_heads", "mlp_ratio", "window_size", "qkv_bias"}
    | {"init_values", "class_token", "reg_tokens", "drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate"}
    | {"pos_drop_rate", "patch_drop_rate"}
)

_shown = functools.partial(shown, most=80)  # names are longer than values


class NotAllowed(Refused):
    """A file names a class or a value that is not on the list."""


def allowed(group: Group, node: Any, source: str | Path, trust: str | Sequence[str] = ()) -> dict[str, Any]:
    """The node that the file `source` has for `group`, safe to build, with all that would download switched off.

    `trust`: packages, modules or classes of the user's own, by their dotted names, that the file may name as well; they
    are imported here. Raises NotAllowed for everything else, and has imported nothing of it.
    """
    trust = _names(trust)
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise NotAllowed(f"{source}: expected a {group} with its _target_ in it, got {_shown(node)}; use another file.")
    target = node["_target_"]
    trusted = isinstance(target, str) and any(target == name or target.startswith(f"{name}.") for name in trust)
    if not trusted and not _known(group, target):
        raise NotAllowed(f"{source}: its {group} is {_shown(target)}, {_no_class(group, target)}")
    found = _class(target)
    if found is None or not _fits(group, found) or not (trusted or found.__module__ == target.rpartition(".")[0]):
        raise NotAllowed(f"{source}: its {group} is {target}, which is no class of a {group}; use another file.")
    plain = {key: value for key, value in node.items() if key != "_target_"}
    _check_plain(plain, f"{source}: its {group}", nodes=trusted)
    arguments = {key: _resolved(value, source, trust) for key, value in node.items()}
    if not trusted:
        _check_values(target, arguments, source)
    return arguments | {key: value for key, value in OFFLINE.items() if key in arguments}


def _known(group: Group, target: Any) -> bool:
    """Whether `target` is spelled as a class in a module of dino/<group>. Nothing of it is imported."""
    if not isinstance(target, str):
        return False
    module, _, name = target.rpartition(".")
    home = importlib.util.find_spec(f"dino.{group}")
    folder = (home and home.submodule_search_locations) or []
    modules = {f"dino.{group}", *(f"dino.{group}.{found.name}" for found in pkgutil.iter_modules(folder))}
    return module in modules and name.isidentifier()


def _class(target: str) -> type | None:
    """The class that the module itself holds under that name: no walk through attributes, and no function."""
    module, _, name = target.rpartition(".")
    try:
        found = vars(importlib.import_module(module)).get(name)
    except (ImportError, ValueError) as error:
        raise NotAllowed(
            f"{target}: its module cannot be imported ({error}); install it, or use another file."
        ) from error
    return found if isinstance(found, type) else None


def _fits(group: Group, found: type) -> bool:
    network = issubclass(found, nn.Module) or group not in ("backbone", "head")
    return network and all(hasattr(found, method) for method in METHODS[group])


def _check_plain(value: Any, where: str, nodes: bool) -> None:
    """Raises NotAllowed unless `value` is null, a truth value, a number, a text, or a list or dict of such.

    `nodes`: a dict may be a node, which is then resolved in its turn. A text is taken as it stands: `${...}`, which
    Hydra would look up, is refused.
    """
    if isinstance(value, list | tuple):
        for item in value:
            _check_plain(item, where, nodes)
    elif isinstance(value, Mapping):
        if "_target_" in value and not nodes:
            raise NotAllowed(f"{where} is an object to build, where only plain values are allowed; use another file.")
        for key, item in value.items():
            if not isinstance(key, str) or (key.startswith("_") and key not in ("_target_", "_partial_")):
                raise NotAllowed(f"{where} has the key {_shown(key)}, which no file may have; use another file.")
            _check_plain(item, f"{where}.{key}", nodes)
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise NotAllowed(
            f"{where} is of {type(value).__name__}, where only plain values are allowed; use another file."
        )
    elif isinstance(value, str) and "${" in value:
        raise NotAllowed(
            f"{where} is {_shown(value)}, and a file may not have Hydra look anything up; use another file."
        )


def _resolved(value: Any, source: str | Path, trust: Sequence[str]) -> Any:
    """`value` with the nodes in it, which only a trusted class may have, checked as the network that holds them."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            return allowed("backbone", value, source, trust)
        return {key: _resolved(item, source, trust) for key, item in value.items()}
    return [_resolved(item, source, trust) for item in value] if isinstance(value, list | tuple) else value


def _check_values(target: str, arguments: Mapping[str, Any], source: str | Path) -> None:
    """Values with which a known class would read or download what the file chooses."""
    if target == "dino.backbone.timm.Timm":
        given = {key for key in arguments if not key.startswith("_")} - {"model_name", "pretrained"}
        if more := sorted(given - TIMM_OPTIONS):
            raise NotAllowed(f"{source}: its backbone has the timm option {_shown(more[0])}, {_only_trusted(target)}")
        if not re.fullmatch(r"[A-Za-z0-9_.]+", str(arguments.get("model_name"))):
            name = _shown(arguments.get("model_name"))
            raise NotAllowed(
                f"{source}: its backbone is {name}, no plain name of a timm model, {_only_trusted(target)}"
            )
    if target == "dino.dataset.hf.HuggingFace" and not path_exists(str(arguments.get("path"))):
        path = _shown(arguments.get("path"))
        raise NotAllowed(
            f"{source}: its data set is {path}, which is not on this machine, and a file may not have it downloaded; "
            f"give dataset=hf dataset.train.path={path}."
        )


def _names(trust: str | Sequence[str]) -> tuple[str, ...]:
    names = (trust,) if isinstance(trust, str) else tuple(trust)
    for name in names:
        if not isinstance(name, str) or not dotted(name):
            raise Refused(f"trust={_shown(name)}: expected dotted names of packages or classes, such as my_package.")
    return names


def _no_class(group: Group, target: Any) -> str:
    package = target.partition(".")[0] if isinstance(target, str) else ""
    if package == "dino" or not package.isidentifier():
        return f"and this project has no such {group}; use another file."
    return f"which is no {group} of this project, {_only_trusted(package)}"


def _only_trusted(name: str) -> str:
    return (
        "so nothing of it was imported. If you know who made the file and what that code does, give "
        f'trust=[{name}] (in Python: load_teacher(path, trust=("{name}",))).'
    )
