"""Composition by hydra that names every bad override, not the first alone, and says which key or option was meant."""

import re
import shlex
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from dino.config.node import did_you_mean, ended
from dino.runtime.refused import Refused, shown

INSIDE = Path(__file__).resolve().parents[1] / "conf"
CONF = INSIDE if INSIDE.is_dir() else INSIDE.parent.parent / "conf"  # in a wheel, in a checkout

# Hydra has plain ValueErrors and TypeErrors too, for an override of a wrong kind (backbone=1).
FAILURES = (HydraException, OmegaConfBaseException, ValueError, TypeError, AssertionError, AttributeError)

SEVERAL = ("logger", "experiment")  # groups of which a run can have several options; of others two would be mixed

Plugins.instance()  # finds the plugins, which store their options
for group, option in (("sweeper", "optuna.yaml"), ("launcher", "joblib.yaml")):
    # Hydra takes a stored option for the schema of a file of the same name, and fails at the defaults in both. Of
    # these two the files in conf/hydra are the ones to use: Optuna's stored one would minimise the k-NN.
    ConfigStore.instance().repo["hydra"][group].pop(option, None)


def quoted(text: str) -> str:
    """An override that hydra's grammar can't read, with its value in quotes where that helps: name=ü, name=a=b."""
    key, equals, value = text.partition("=")
    if equals and not _readable(text):
        inner = re.sub(r"(\\*)'", r"\1\1\'", value)  # in quotes hydra halves the backslashes before a quote
        inner += (len(inner) - len(inner.rstrip("\\"))) * "\\"
        if _readable(f"{key}='{inner}'"):
            return f"{key}='{inner}'"
    return text


def _how_to_write(text: str) -> str | None:
    """For a shell; None where quotes do not help."""
    if (inside := quoted(text)) == text:
        return None
    plain_enough = not re.search(r'["$`\\!]', inside)
    shown_inside = f'"{inside}"' if plain_enough else shlex.quote(inside)
    return f"hydra reads this value in quotes alone; write {shown_inside}"


def _readable(text: str) -> bool:
    try:
        OverridesParser.create().parse_override(text)
    except FAILURES:
        return False
    return True


def compose(overrides: list[str], config_name: str, directory: Path) -> dict[str, Any]:
    """The plain, resolved config of a command line, unchecked. Raises Refused, naming every override that fails."""
    config, problems = composed(overrides, config_name, directory)
    if problems:
        raise Refused(*problems)
    return plain(config)


def plain(config: DictConfig) -> dict[str, Any]:
    """Dicts, lists and scalars, interpolations resolved, without hydra's own settings."""
    config = config.copy()
    with open_dict(config):
        config.pop("hydra", None)
    values = OmegaConf.to_container(config, resolve=True)
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def composed(overrides: list[str], config_name: str, directory: Path) -> tuple[DictConfig, list[str]]:
    """(config with hydra's settings below `hydra`, sentences about the overrides that were left out of it)."""
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # a run's own, where one is under way
    try:
        with hydra.initialize_config_dir(str(directory.resolve()), version_base="1.3"):
            try:
                return _compose(config_name, overrides), []
            except FAILURES:
                return _one_by_one(overrides, config_name)
    finally:
        GlobalHydra.instance().hydra = outer


def _compose(config_name: str, overrides: list[str]) -> DictConfig:
    for override in OverridesParser.create().parse_overrides(overrides):
        value, group = override.value(), override.key_or_group
        if isinstance(value, list) and len(value) > 1 and group not in SEVERAL and _options(group):
            raise HydraException("a run has one of them")
    config: DictConfig = hydra.compose(config_name, overrides, return_hydra_config=True)
    if not isinstance(config.hydra.verbose, bool | str | ListConfig):  # hydra itself only asserts it
        raise HydraException("expected true, false, or names of Python's loggers")
    plain(config)  # an interpolation may fail only when it is resolved
    return config


def _one_by_one(overrides: list[str], config_name: str) -> tuple[DictConfig, list[str]]:
    """Adds the overrides in turn, groups first, without those that fail; for a misspelt option, the nearest goes in."""
    good = [text for text in overrides if text.startswith("hydra.searchpath=")]  # where the options of groups lie
    try:
        config = _compose(config_name, good)
    except FAILURES as error:
        raise Refused(f"{config_name}.yaml can't be composed: {_first_line(error)}") from error
    problems, parsed = [], []
    for text in overrides:
        try:
            parsed += [] if text in good else [OverridesParser.create().parse_override(text)]
        except FAILURES as error:
            problems.append(ended(f"{text}: {_how_to_write(text) or f'expected key=value; {_first_line(error)}'}"))
    for override in sorted(parsed, key=lambda o: not _options(o.key_or_group)):
        text = str(override.input_line)
        try:
            config = _compose(config_name, [*good, text])
        except FAILURES as error:
            sentence, instead = _explained(override, error, config)
            problems.append(ended(sentence))
            if instead is not None:
                try:
                    config = _compose(config_name, [*good, instead])
                except FAILURES:
                    continue
                good.append(instead)
        else:
            good.append(text)
    return config, problems


def _explained(override: Override, error: Exception, config: DictConfig) -> tuple[str, str | None]:
    """(what is wrong with `override`, on top of `config`; another one to go on with)."""
    text, key = str(override.input_line), override.key_or_group
    options = _options(key)
    if override.is_sweep_override():
        words = "one run takes one value; use --multirun for several, [a,b] for a list, '\"a,b\"' for a text"
        return f"{text}: {words}", None
    if options and override.value() is None:
        return f"{text}: choose one of {', '.join(options)}", None
    if options and isinstance(error, MissingConfigException):
        wrong = (error.missing_cfg_file or "").rpartition("/")[2] or shown(override.value())
        meant = did_you_mean(wrong, options)
        nearest = meant.removeprefix("; did you mean ").rstrip("?")
        sentence = f"{text}: {key} has no option {wrong}{meant or '.'} There are {', '.join(options)}"
        return sentence, f"{key}={nearest}" if meant else None
    if options:
        return f"{text}: {key} takes one of {', '.join(options)}; {_first_line(error)}", None
    parent: Any = config
    name = ""
    at: list[str] = []
    for name in key.split("."):
        if not isinstance(parent, DictConfig) or parent._is_none():
            return f"{text}: {'.'.join(at)} is a value and has no keys; set it with {'.'.join(at)}=...", None
        if name not in parent:
            break
        at.append(name)
        parent = parent._get_node(name)
    else:
        return f"{text}: {_first_line(error)}", None
    names = [str(known) for known in parent if not str(known).startswith("_") and (at or known != "hydra")]
    choice = config.hydra.runtime.choices.get(at[0]) if at else None
    where = ".".join([f"{at[0]}={choice}" if choice else at[0], *at[1:]]) if at else "the config"
    meant = did_you_mean(name, names)
    if not meant:  # lr=1 for optimizer.lr=1
        last = key.rpartition(".")[2]
        meant = next((f"; did you mean {known}?" for known in _keys(config) if known.endswith("." + last)), ".")
    return f"{text}: {where} has no key {name}{meant} There are {', '.join(names)}", None


def _options(group: str) -> list[str]:
    """What a config group offers, none for a plain key."""
    if not re.fullmatch(r"[\w/]+", group):
        return []
    loader = GlobalHydra.instance().config_loader()
    return sorted(loader.get_group_options(group, ObjectType.CONFIG)) if group != "hydra" else []


def _keys(config: DictConfig) -> list[str]:
    def walk(node: DictConfig, prefix: str) -> list[str]:
        found = []
        for key in map(str, node):
            child = node._get_node(key)
            found += [prefix + key, *(walk(child, f"{prefix}{key}.") if isinstance(child, DictConfig) else [])]
        return found

    return [key for key in walk(config, "") if not key.startswith("hydra")]


def _first_line(error: BaseException) -> str:
    """Hydra's own words, to the first line that is one."""
    lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines()]
    return next((line for line in lines if line), type(error).__name__)
