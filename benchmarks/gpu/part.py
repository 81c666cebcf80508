"""The process of one part: `python -m benchmarks.gpu.part NAME FOLDER SETTINGS MEASURED`, begun by processes.py.

It works in FOLDER/NAME, shares the lock in FOLDER with the other parts, and leaves its figures in figures.json there.
SETTINGS: the fields of plan.Settings as JSON. MEASURED: figures of the part that it needs, as JSON.
"""

import importlib
import json
import os
import sys
from pathlib import Path

from benchmarks.gpu.plan import Settings, parts
from benchmarks.gpu.turn import Turn

LOCK, FIGURES = "gpu.lock", "figures.json"


def main() -> None:
    name, folder, settings, measured = sys.argv[1:]
    turn = Turn(Path(folder, LOCK))
    (part,) = (part for part in parts(Settings(**json.loads(settings))) if part.name == name)
    module, _, function = part.function.partition(".")
    call = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)  # loads torch: in this part's time
    os.chdir(folder_of(Path(folder), name))
    figures = call(turn, *([json.loads(measured)] if part.given_them else []), *part.arguments)
    Path(FIGURES).write_text(json.dumps(figures))


def folder_of(folder: Path, name: str) -> Path:
    return folder / "parts" / name.replace("/", "_")


if __name__ == "__main__":
    main()
