"""The program around `main(config, directory)`: hydra's own, after a check of its whole command line.

A config that cannot run is refused before anything is written: each problem in one line on stderr, exit status 2. In a
sweep a run that dies says why, the others run, and the status is 1. HYDRA_FULL_ERROR=1 shows the traceback behind a
refusal.
"""

import argparse
import contextlib
import functools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dino.config.check import check, warnings_of
from dino.config.composition import CONF, compose, composed, plain
from dino.config.multirun import TRACEBACKS, described, of_a_sweep, one_of_a_sweep, say
from dino.config.sweep import Sweep, check_run, check_runs, is_multirun, sweep_of
from dino.loading.workers import WorkerLost
from dino.runtime.memory import OutOfMemory
from dino.runtime.processes import PeerLost
from dino.runtime.refused import Refused

Main = Callable[[dict[str, Any], Path], Any]


def command(config_name: str) -> Callable[[Main], Callable[[], None]]:
    """Makes `main(plain resolved config, run directory)` a program with hydra's command line.

    An exception of `main` that has an `exit_status` ends the program in its own words; hydra reports any other.
    """

    def decorate(main: Main) -> Callable[[], None]:
        @functools.wraps(main)
        def task(config: DictConfig) -> Any:
            several = HydraConfig.get().mode == RunMode.MULTIRUN
            directory = Path(HydraConfig.get().runtime.output_dir)
            run = functools.partial(_run, main, plain(config), directory, checked=not several)
            return one_of_a_sweep(run, directory.name) if several else _alone(run)

        @functools.wraps(main)
        def program() -> None:
            try:
                sweep = _check_command_line(sys.argv[1:], config_name)
            except Refused as refused:
                if TRACEBACKS:
                    raise
                say(refused.problems)
                sys.exit(2)
            with contextlib.nullcontext() if sweep is None else of_a_sweep(sweep):
                hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(task)()

        return program

    return decorate


def _run(main: Main, config: dict[str, Any], directory: Path, checked: bool) -> Any:
    try:
        if not checked and (problems := check(config)):  # perhaps on another machine than the first check
            raise Refused(*problems)
        say(f"warning: {text}" for text in warnings_of(config))
        return main(config, directory)
    except Refused:
        _remove_if_unused(directory)
        raise


def _alone(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as error:
        status, words = described(error)
        if TRACEBACKS or status is None:
            raise
        say(words, by_all=isinstance(error, PeerLost | OutOfMemory | WorkerLost))
        sys.exit(status)


def _check_command_line(argv: list[str], config_name: str) -> Sweep | None:
    """Composes and checks what hydra is about to run, before it makes a directory. Returns the sweep, if it is one.

    Raises Refused with every problem of every run.
    """
    given = _parser().parse_args(argv)
    overrides: list[str] = given.overrides
    conf, name = Path(given.config_path or CONF), given.config_name or config_name
    if given.config_dir is not None:
        overrides.append(f"hydra.searchpath=['file://{Path(given.config_dir).resolve()}']")
    if given.of_hydra or (given.help and not overrides):
        return None
    if given.cfg or given.help:
        compose(overrides, name, conf)
        return None
    if not (given.multirun or is_multirun(overrides)):
        check_run(overrides, name, conf)
        return None
    sweep = sweep_of(overrides, name, conf)
    check_runs(sweep, name, conf)
    _, problems = composed(sweep.fixed, name, conf)  # dataset=a,b dataset.root=x is sound in each run, and not here
    hint = "(--multirun first composes what all runs have: there, ++key=value sets a key that only some know.)"
    if problems:
        raise Refused(*problems, hint)
    return sweep


def _parser() -> argparse.ArgumentParser:
    """Hydra's flags, as far as the check needs them: which arguments are overrides, and what is to be run.

    https://hydra.cc/docs/advanced/hydra-command-line-flags
    """
    parser = argparse.ArgumentParser(add_help=False, usage="%(prog)s [option] [key=value ...]; --help shows all")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--cfg", "-c")
    for long, short in (("--config-path", "-cp"), ("--config-name", "-cn"), ("--config-dir", "-cd")):
        parser.add_argument(long, short)
    parser.add_argument("--package", "-p")
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--run", "-r", action="store_true")
    for flag in ("--hydra-help", "--version", "--shell-completion", "-sc"):
        parser.add_argument(flag, action="store_true", dest="of_hydra")
    parser.add_argument("--info", "-i", nargs="?", const="all", dest="of_hydra")
    parser.add_argument("--experimental-rerun", dest="of_hydra")
    return parser


def _remove_if_unused(directory: Path) -> None:
    """Takes away the directory that hydra made for a run which was refused, and outputs/ where that is then empty."""
    own = directory / str(HydraConfig.get().output_subdir)
    with contextlib.suppress(OSError):
        if [*directory.iterdir()] in ([], [own]):
            shutil.rmtree(own, ignore_errors=True)
            directory.rmdir()
            directory.parent.rmdir()
