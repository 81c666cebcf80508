"""The parts of a config for programs of one's own: what `python -m dino.train` has, by the same names.

`compose(overrides)` is a command line's config, `build(config)` its parts, wired; `get_backbone` and `get_dataset` are
one part alone, by the name of its YAML in conf/.
"""

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from dino.config.check import check, warnings_of
from dino.config.composition import CONF, composed, plain
from dino.config.composition import compose as compose_in
from dino.config.node import build_node, misfits
from dino.runtime.nested import value_at
from dino.runtime.refused import Refused

if TYPE_CHECKING:
    from dino.dataset.cache import Images
    from dino.run.parts import Parts


def compose(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The config of `python -m dino.train <overrides>`, in plain dicts: compose(["backbone=resnet18", "seed=1"]).

    Raises ValueError, naming every override that fails and what may be meant. Values are checked by `build`.
    """
    return compose_in(list(overrides), "train", CONF)


def build(config: dict[str, Any]) -> "Parts":
    """The parts of a config as objects, wired, on their device: what `python -m dino.train` trains.

    `.student` and `.teacher` (DinoModel), `.loss`, `.optimizer`, `.schedule` (a function of the step), `.transform`,
    `.train_set`, `.val_set`, and `.train_loader`, which yields (views, labels): a list of [batch, 3, size, size] in
    view order, and [batch]. Seeds Python's, NumPy's and torch's generators with the config's seed.
    Raises ValueError with all that is wrong with the config, a sentence each.
    """
    from dino.run.parts import assemble

    if problems := check(config):
        raise Refused(*problems)
    for text in warnings_of(config):
        warnings.warn(text, stacklevel=2)
    return assemble(config)


def get_backbone(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
    """The backbone of conf/backbone/<name>.yaml: images [batch, 3, height, width] to features [batch, output_dim].

    options: other arguments of its class than the YAML has: get_backbone("dino_vits16", drop_path=0.1).
    Raises ValueError for a name or an option that there is not, saying which there are.
    """
    backbone: nn.Module = build_node(_node("backbone", name, "backbone", {"pretrained": pretrained, **options}))
    return backbone


def get_dataset(name: str, split: Literal["train", "val"] = "train", **options: Any) -> "Images":
    """A split of the data set of conf/dataset/<name>.yaml: dataset[i] is (image, label), the image uint8 or PIL.

    options: other arguments of its class than the YAML has: get_dataset("imagenette", root="/data", download=False).
    Raises ValueError for a name or an option that there is not, saying which there are.
    """
    if split not in ("train", "val"):
        raise Refused(f"split={split!r}: expected train or val.")
    dataset: Images = build_node(_node("dataset", name, f"dataset.{split}", options))
    return dataset


def _node(group: str, name: str, path: str, options: dict[str, Any]) -> dict[str, Any]:
    """The checked node at `path` of a config whose `group` is `name`, with `options` in place of the YAML's values."""
    config, problems = composed([f"{group}={name}"], "train", CONF)
    if problems:
        raise Refused(*problems)
    node: dict[str, Any] = value_at(plain(config), path)
    if not options.get("pretrained", True) and "pretrained" not in node:
        options = {key: value for key, value in options.items() if key != "pretrained"}  # it never is
    node |= {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in options.items()}
    if found := [text for _, text in misfits(path, node)]:
        raise Refused(*found)
    return node
