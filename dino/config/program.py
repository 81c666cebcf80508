"""The program around a function of a config: its command line, its --help, and what it refuses."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from dino.config.composition import CONF, compose
from dino.runtime.importing import find_in_current_folder
from dino.runtime.refused import Refused


def run_program(name: str, doc: str | None, function: Callable[[dict[str, Any]], object]) -> None:
    """`python -m dino.<name> [key=value ...]`: calls `function` with the config of conf/<name>.yaml.

    `doc`, the docstring of the program, and the YAML are its --help. A refusal is printed on stderr, a line for each
    problem, and the exit status is 2.
    """
    summary, _, more = (doc or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog=f"python -m dino.{name}",
        description=summary,
        epilog=f"{more}\n{(CONF / f'{name}.yaml').read_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for dino.train")
    overrides = parser.parse_args().overrides
    find_in_current_folder()
    try:
        _refuse_without_key(overrides, name)
        function(compose(overrides, name, CONF))
    except (Refused, OSError) as error:
        print(*(error.problems if isinstance(error, Refused) else [error]), sep="\n", file=sys.stderr)
        sys.exit(2)


def _refuse_without_key(overrides: list[str], name: str) -> None:
    """Says of each value without a key which one it may be for: the first of the YAML that the command leaves out."""
    values = [text for text in overrides if "=" not in text and not text.startswith("~")]  # ~key takes a key out
    if values:
        given = [text.partition("=")[0] for text in overrides if "=" in text]
        keys = [key for key in compose([], name, CONF) if key not in given]
        meant = {value: f"; write {key}={value}" for value, key in zip(values, keys, strict=False)}
        raise Refused(*(f"{value}: expected key=value{meant.get(value, '')}." for value in values))
