"""From a command line to a checked, plain config: the program around `main(config, directory)`.

`@command("train")` refuses a config that can't run before anything is written: each problem in one line on stderr, exit
status 2. HYDRA_FULL_ERROR=1 shows the traceback behind a refusal.
"""

import argparse
import functools
import hashlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser  # the one place that knows hydra's own flags
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dino.config.check import check, warnings_of
from dino.config.composition import compose, composed, plain
from dino.config.node import build
from dino.refused import Refused
from dino.run_directory import changes_no_result

__all__ = ["CONF", "Refused", "build", "command", "compose", "run_name"]

INSIDE = Path(__file__).resolve().parents[1] / "conf"
CONF = INSIDE if INSIDE.is_dir() else INSIDE.parent.parent / "conf"  # in a wheel, in a checkout

TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1"  # as the user set it; `command` sets it for hydra
LONGEST_NAME = 200  # bytes; file systems take 255, and files beside it may want a suffix


def run_name(overrides: Sequence[str], name: str | int | None = None) -> str:
    """The directory below outputs/: `name`, or the overrides that change a result, sorted; "default" for none.

    An override `name=x` counts as `name`. What is too long ends in a hash of the whole.
    """
    kept = {}
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key == "name":
            name = None if value == "null" else value.strip("\"'")
        elif not changes_no_result(key.lstrip("~")):
            kept[key] = override.lstrip("+")
    text = ",".join(sorted(kept.values())) if name is None else str(name)
    safe = re.sub(r"[^\w.,=+:@~\[\]-]+", "_", text).lstrip(".") or "default"
    if len(safe.encode()) > LONGEST_NAME:
        digest = hashlib.sha256(safe.encode()).hexdigest()[:12]
        safe = f"{safe.encode()[: LONGEST_NAME - 13].decode(errors='ignore')}-{digest}"
    return safe


OmegaConf.register_new_resolver("run_name", run_name, replace=True)


def command(config_name: str) -> Callable[[Callable[[dict[str, Any], Path], Any]], Callable[[], None]]:
    """Makes `main(plain resolved config, run directory)` a program with hydra's command line."""

    def decorate(main: Callable[[dict[str, Any], Path], Any]) -> Callable[[], None]:
        @functools.wraps(main)
        def task(config: DictConfig) -> Any:
            directory = Path(HydraConfig.get().runtime.output_dir)
            several = HydraConfig.get().mode == RunMode.MULTIRUN
            try:
                values = plain(config)
                if several and (problems := check(values)):  # perhaps on another machine than the first check
                    raise Refused(*problems)
                _say(f"warning: {text}" for text in warnings_of(values))
                return main(values, directory)
            except Refused as refused:
                _remove_if_empty(directory)
                if several or TRACEBACKS:
                    raise  # hydra runs the other jobs, then names this one
                _say(refused.problems)
                sys.exit(2)

        @functools.wraps(main)
        def program() -> None:
            arguments = get_args_parser().parse_args()
            before = os.environ.get("HYDRA_FULL_ERROR", "0")
            try:
                _refuse_early(arguments, config_name)
                os.environ["HYDRA_FULL_ERROR"] = "1"  # else hydra ends the process itself, in its own words
                hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(task)()
            except (Refused, HydraException, OmegaConfBaseException) as error:
                if TRACEBACKS:
                    raise
                _say(error.problems if isinstance(error, Refused) else [" ".join(str(error).split())])
                sys.exit(2)
            finally:
                os.environ["HYDRA_FULL_ERROR"] = before

        return program

    return decorate


def _refuse_early(arguments: argparse.Namespace, config_name: str) -> None:
    """Composes and checks what hydra is about to run, all jobs of a sweep, before it makes a directory."""
    if arguments.hydra_help or arguments.shell_completion or arguments.experimental_rerun or arguments.info:
        return
    if arguments.help and not arguments.overrides:
        return
    overrides, directory = list(arguments.overrides), Path(arguments.config_path or CONF)
    if arguments.config_dir is not None:
        overrides.append(f"hydra.searchpath=['file://{Path(arguments.config_dir).resolve()}']")
    name = arguments.config_name or config_name
    if arguments.cfg or arguments.help:
        compose(overrides, name, directory)
        return
    problems: dict[str, None] = {}
    for job, here in _jobs(overrides, name, directory, arguments.multirun):
        config, found = composed(job, name, directory)
        problems |= dict.fromkeys([*found, *check(plain(config), here=here)])
    if problems:
        raise Refused(*problems)


def _jobs(overrides: list[str], name: str, directory: Path, multirun: bool) -> Iterator[tuple[list[str], bool]]:
    """(overrides, does it run on this machine) of each job: one, or what hydra's basic sweeper makes of a sweep.

    Other sweepers choose as they go; of theirs, what stays the same in all jobs is checked.
    """
    parsed, fixed = [], []
    for override in overrides:
        try:
            parsed.append(OverridesParser.create().parse_override(override))
        except HydraException:
            fixed.append(override)  # composed() has words for it
    if not multirun and not any(o.key_or_group == "hydra.mode" and "MULTIRUN" in str(o.value()) for o in parsed):
        yield overrides, True
        return
    fixed += [str(o.input_line) for o in parsed if not o.is_sweep_override()]
    settings = composed(fixed, name, directory)[0].hydra
    here = str(settings.launcher.get("_target_", "")).endswith("BasicLauncher")
    if not str(settings.sweeper.get("_target_", "")).endswith("BasicSweeper"):
        yield fixed, here
        return
    swept = OverridesParser.create().parse_overrides(
        [f"{key}={value}" for key, value in (settings.sweeper.params or {}).items()]
    )
    choices = {o.get_key_element(): [str(o.input_line)] for o in swept if not o.is_sweep_override()}
    for o in [*swept, *parsed]:
        if o.is_sweep_override():
            choices[o.get_key_element()] = [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
    for choice in itertools.product(*choices.values()):
        yield [*fixed, *choice], here


def _say(sentences: Any) -> None:
    if os.environ.get("RANK", "0") == "0":  # under torchrun every process finds the same
        for text in sentences:
            print(text, file=sys.stderr, flush=True)


def _remove_if_empty(directory: Path) -> None:
    """The run directory that hydra made, and outputs/ where that was made for it."""
    try:
        directory.rmdir()
        directory.parent.rmdir()
    except OSError:
        pass
