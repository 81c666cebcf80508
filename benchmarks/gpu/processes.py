"""Runs the parts, each in a process of its own that costs only itself where it fails or takes too long."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.gpu.part import FIGURES, folder_of
from benchmarks.gpu.plan import Part, Settings

ROOT = Path(__file__).parents[2]
Figures = dict[str, Any]  # numbers by name; of a part without any {"failed": a sentence}


class Processes:
    """folder: for what they write. jobs: parts at a time. until: when all end, by time.monotonic."""

    def __init__(self, folder: Path, settings: Settings, jobs: int, until: float) -> None:
        self.folder, self.settings, self.jobs, self.until = folder, settings, jobs, until
        self.figures: dict[str, Future[Figures]] = {}
        self.running: set[subprocess.Popen[bytes]] = set()

    def run(self, parts: Sequence[Part]) -> Iterator[tuple[Part, Figures]]:
        """Each part with its figures, as it ends. Where this is broken off, no process stays behind."""
        for alone, some in groupby(parts, key=lambda part: part.alone):
            pool = ThreadPoolExecutor(1 if alone else self.jobs)
            try:
                begun = {pool.submit(self._one, part): part for part in some}
                self.figures |= {part.name: future for future, part in begun.items()}
                for future in as_completed(begun):
                    yield begun[future], future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in self.running.copy():
                    os.killpg(process.pid, signal.SIGKILL)

    def _one(self, part: Part) -> Figures:
        measured: Figures = {}
        if part.needs is not None:  # begun before this one, and so never waiting for it
            measured = self.figures[part.needs].result()
            if "failed" in measured:
                return {"failed": f"left out, since it needs {part.needs}"}
        left = self.until - time.monotonic()
        if left < part.seconds:
            return {"failed": f"left out: it takes about {part.seconds:.0f} s, and {max(0, left):.0f} s are left"}
        return self._process(part, measured, min(part.limit, left))

    def _process(self, part: Part, measured: Figures, limit: float) -> Figures:
        folder, begun = folder_of(self.folder, part.name), time.monotonic()
        folder.mkdir(parents=True)
        settings = json.dumps(dataclasses.asdict(self.settings))
        command = [sys.executable, "-m", "benchmarks.gpu.part", part.name, str(self.folder), settings]
        with (folder / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                [*command, json.dumps(measured)],
                stdout=log,
                stderr=log,
                env=self._environment(part),
                start_new_session=True,  # a group of its own, to be killed with all that it began
            )
            self.running.add(process)
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return {"failed": f"not through after {limit:.0f} s: {last_line(folder)}"}
            finally:
                self.running.discard(process)
        if status:
            return {"failed": f"status {status}: {last_line(folder)}"}
        figures: Figures = json.loads((folder / FIGURES).read_text())
        return figures | {"process_s": time.monotonic() - begun}

    def _environment(self, part: Part) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "cache" / part.cache),
            "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs)),
        }


def last_line(folder: Path) -> str:
    """What the process said last: of an error, its type and message."""
    said = (folder / "log.txt").read_text(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip()[:300] for line in reversed(said) if line.strip()), "it said nothing")
