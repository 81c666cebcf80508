"""Everything on one GPU beside the reference: `python -m benchmarks.gpu [--minutes 8] [--only part,...]`.

Each part (a contestant's step, the data path, a run from files, a killed run, a run that learns) is a process of its
own with a time limit, the most important ones first, as many as there is time for. Says a line as each ends, prints
Markdown tables at the end, and keeps the raw figures in benchmarks/results/<gpu>_<date>.json from the first on, with
the history of the run that learns beside them.
Where there is no GPU it does the same with tiny sizes, to be tried out.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks.gpu.part import folder_of
from benchmarks.gpu.plan import LEARNED, Part, Settings, parts
from benchmarks.gpu.processes import ROOT, Processes
from benchmarks.gpu.tables import markdown, one_line

MEMORY = 16  # GB of the GPU for each part that is there at a time; the reference of ViT-S/16 with 128 images takes 25
CORES = 3  # for each of them: the compiler uses several
MOST_JOBS = 6
RECIPE = "experiment=imagenette_speedrun"


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM is an exception in it, so that the parts' processes and the folder are cleared away too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@ended_by_sigterm()
def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--minutes", type=float, default=8, help="all of it, at most")
    options.add_argument("--learn-minutes", type=float, default=2, help="of them, of the run that learns")
    options.add_argument("--only", help="parts whose names begin so, such as vits16_64,end_to_end; and what they need")
    options.add_argument("--data", default=os.environ.get("DATA"), help="the folder that holds imagenette2-160; $DATA")
    options.add_argument("--recipe", help=f"overrides of the run that learns; where none are given {RECIPE}")
    options.add_argument("--jobs", type=int, help="parts at a time, of which one is timed")
    options.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options.add_argument("--tiny", action="store_true", help="sizes for a CPU; so by itself where there is no GPU")
    options.add_argument("--list", action="store_true", help="say which parts there are, and end")
    chosen = options.parse_args(argv)
    begun, facts = time.monotonic(), machine()
    tiny = chosen.tiny or "gpu" not in facts
    data = str(Path(chosen.data).resolve()) if chosen.data else None
    recipe = tuple(shlex.split(chosen.recipe if chosen.recipe is not None else "" if tiny else RECIPE))
    settings = Settings(tiny, data, 0.2 if tiny else chosen.learn_minutes, recipe)
    wanted = selected(parts(settings), chosen.only)
    if chosen.list:
        print(*(part.name for part in wanted), sep="\n")
        return
    if data is None and not tiny:
        print("end_to_end and learning are left out: give --data, the folder that holds imagenette2-160.")
    path = chosen.results / f"{facts.get('gpu', 'cpu').replace(' ', '_').lower()}_{datetime.now(UTC):%Y-%m-%d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text())["parts"] if path.exists() else {}  # of a command before, on the same day
    found: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory(prefix="benchmarks_gpu_", ignore_cleanup_errors=True) as folder:
        jobs = chosen.jobs or default_jobs(facts, tiny)
        processes = Processes(Path(folder), settings, jobs, begun + 60 * chosen.minutes)
        for part, figures in processes.run(wanted):
            found[part.name] = figures | {"commit": facts.get("commit")}
            print(f"{time.monotonic() - begun:4.0f} s  {part.name}: {one_line(figures)}", flush=True)
            if (history := folder_of(Path(folder), part.name) / LEARNED).exists():
                shutil.copy(history, path.with_suffix(".history.json"))
            better = {name: new for name, new in found.items() if "failed" not in new or name not in kept}
            path.write_text(json.dumps({"machine": facts, "parts": kept | better}, indent=1) + "\n")
    print(f"\n{'; '.join(f'{name} {value}' for name, value in facts.items())}\n\n{markdown(found)}\n\n{path}")


def selected(planned: list[Part], only: str | None) -> list[Part]:
    """Those whose names begin as `only` says, with those that they need; None: all."""
    if only is None:
        return planned
    names = {part.name for part in planned if part.name.startswith(tuple(only.split(",")))}
    if not names:
        raise SystemExit(f"--only {only}: no part begins so; there are {', '.join(part.name for part in planned)}.")
    names |= {part.needs for part in planned if part.name in names and part.needs}
    return [part for part in planned if part.name in names]


def machine() -> dict[str, str]:
    """In words. "gpu" and "gpu memory" only where there is a GPU; torch is not asked, since the parts need its time."""
    facts = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
    }
    query = "--query-gpu=name,memory.total,driver_version"
    if listed := output("nvidia-smi", query, "--format=csv,noheader"):
        name, memory, driver = listed.splitlines()[0].split(", ")
        facts |= {"gpu": re.sub("^NVIDIA ", "", name), "gpu memory": memory, "driver": driver}
    facts |= {"torch": version("torch"), "cores": str(os.cpu_count()), "system": platform.platform()}
    return {key: value for key, value in facts.items() if value}


def output(*command: str) -> str:
    """What it prints; nothing where there is no such program, or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def default_jobs(facts: dict[str, str], tiny: bool) -> int:
    if tiny:
        return 1
    gigabytes = int(facts["gpu memory"].split()[0]) / 1024  # "81559 MiB"
    return max(1, min(MOST_JOBS, (os.cpu_count() or 1) // CORES, int(gigabytes // MEMORY)))


if __name__ == "__main__":
    main()
