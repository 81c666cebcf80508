"""From a command line to a checked, plain config: the program around `main(config, directory)`.

`@command("train")` refuses a config that can't run before anything is written: each problem in one line on stderr, exit
status 2. In a sweep a run that dies says why, the others run, and the status is 1. HYDRA_FULL_ERROR=1 shows the
traceback behind a refusal.
"""

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser  # the one place that knows hydra's own flags
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dino.config.check import check, warnings_of
from dino.config.composition import CONF, compose, composed, plain, quoted
from dino.config.multirun import TRACEBACKS, described, of_a_sweep, one_line, one_of_a_sweep, say
from dino.config.node import build_node
from dino.config.sweep import Sweep, check_runs, is_multirun, run_name, sweep_of
from dino.loading.workers import WorkerLost
from dino.runtime.memory import OutOfMemory
from dino.runtime.processes import PeerLost
from dino.runtime.refused import Refused

__all__ = ["CONF", "Refused", "build_node", "command", "compose", "run_name", "sweep_of"]


def command(config_name: str) -> Callable[[Callable[[dict[str, Any], Path], Any]], Callable[[], None]]:
    """Makes `main(plain resolved config, run directory)` a program with hydra's command line.

    An exception of `main` that has an `exit_status` is said in its own words; any other but Refused with its traceback.
    """

    def decorate(main: Callable[[dict[str, Any], Path], Any]) -> Callable[[], None]:
        begun = False

        @functools.wraps(main)
        def task(config: DictConfig) -> Any:
            nonlocal begun
            begun = True
            several = HydraConfig.get().mode == RunMode.MULTIRUN
            directory = Path(HydraConfig.get().runtime.output_dir)

            def run() -> Any:
                try:
                    values = plain(config)
                    if several and (problems := check(values)):  # perhaps on another machine than the first check
                        raise Refused(*problems)
                    say(f"warning: {text}" for text in warnings_of(values))
                    return main(values, directory)
                except Refused:
                    _remove_if_empty(directory)
                    raise

            return one_of_a_sweep(run, directory.name) if several else _alone(run)

        @functools.wraps(main)
        def program() -> None:
            full_error, argv = os.environ.get("HYDRA_FULL_ERROR", "0"), sys.argv
            parser = get_args_parser()
            parser.usage = "%(prog)s [option] [key=value ...]; --help shows all"  # hydra's own takes seven lines
            try:
                sys.argv = [*argv[:1], *map(quoted, argv[1:])]
                arguments = parser.parse_args()
                sweep = _refuse_early(arguments, config_name)
                if sweep is not None:
                    sys.argv = _with(sweep.placed(), arguments.overrides, sys.argv)
                os.environ["HYDRA_FULL_ERROR"] = "1"  # else hydra ends the process itself, in its own words
                with contextlib.nullcontext() if sweep is None else of_a_sweep(sweep):
                    hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(task)()
            except (Refused, HydraException, OmegaConfBaseException) as error:
                if TRACEBACKS:
                    raise
                say(error.problems if isinstance(error, Refused) else [one_line(error)])
                sys.exit(2)
            except OSError as error:  # hydra's, who makes the directory of the run before `main` can
                if TRACEBACKS or begun:
                    raise
                place = f"{error.filename} cannot be written to ({error.strerror})"
                say([f"{place}; make it writable, or give another hydra.run.dir="])
                sys.exit(2)
            finally:
                os.environ["HYDRA_FULL_ERROR"], sys.argv = full_error, argv

        return program

    return decorate


def _alone(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as error:
        status, words = described(error)
        if TRACEBACKS or status is None:
            raise
        say(words, by_all=isinstance(error, PeerLost | OutOfMemory | WorkerLost))
        sys.exit(status)


def _refuse_early(arguments: argparse.Namespace, config_name: str) -> Sweep | None:
    """Composes and checks what hydra is about to run, all runs of a sweep, before it makes a directory."""
    if arguments.hydra_help or arguments.shell_completion or arguments.experimental_rerun or arguments.info:
        return None
    if arguments.help and not arguments.overrides:
        return None
    overrides, conf = list(arguments.overrides), Path(arguments.config_path or CONF)
    if arguments.config_dir is not None:
        overrides.append(f"hydra.searchpath=['file://{Path(arguments.config_dir).resolve()}']")
    name = arguments.config_name or config_name
    if arguments.cfg or arguments.help:
        compose(overrides, name, conf)
        return None
    if not (arguments.multirun or is_multirun(overrides)):
        check_runs(Sweep(Path(), [(overrides, Path())]), name, conf)
        return None
    sweep = sweep_of(overrides, name, conf)
    check_runs(sweep, name, conf)
    _, problems = composed(sweep.fixed, name, conf)  # dataset=a,b dataset.root=x is sound in each run, and not here
    hint = "(--multirun first composes what all runs have: there, ++key=value sets a key that only some know.)"
    if problems:
        raise Refused(*problems, hint)
    return sweep


def _with(more: list[str], overrides: list[str], argv: list[str]) -> list[str]:
    """The command line with more overrides: beside its own, for argparse takes them in one place alone."""
    end = len(argv) - argv[::-1].index(overrides[-1]) if overrides else len(argv)
    return [*argv[:end], *more, *argv[end:]]


def _remove_if_empty(directory: Path) -> None:
    """The run directory that hydra made, and outputs/ where that was made for it."""
    try:
        directory.rmdir()
        directory.parent.rmdir()
    except OSError:
        pass
