"""Submits a run or a sweep to SLURM, and returns: python -m launch.slurm [key=value[,value] ...] [slurm.key=value ...]

The overrides are those of `python -m dino.train --multirun`. slurm.X=Y sets X of conf/hydra/launcher/slurm.yaml for
this command (slurm.hours=24 slurm.nodes=2); slurm=NAME takes conf/hydra/launcher/NAME.yaml instead. A sweep is one job
array. The same command again submits what is missing or died, and passes over what is finished, running or queued.
"""

import argparse
import contextlib
import getpass
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import submitit
from omegaconf import OmegaConf
from submitit.core.utils import DelayedSubmission, FailedJobError, JobPaths
from submitit.helpers import RsyncSnapshot, environment_variables

from dino.config import CONF
from dino.config.check import check, warnings_of
from dino.config.composition import composed, plain
from dino.config.node import did_you_mean
from dino.config.sweep import Sweep, sweep_of
from dino.run.directory import check_claim, state_of
from dino.runtime.annotated import Misfit, described, fitted
from dino.runtime.refused import Refused, shown
from launch.cluster import remarks
from launch.job import Job

ROOT = Path(__file__).resolve().parents[1]
TYPES: dict[str, Any] = {  # of what submitit itself works with; sbatch judges the rest. Numbers are above 0
    "submitit_folder": str,
    "nodes": int,
    "gpus_per_node": int | None,
    "tasks_per_node": int | None,
    "cpus_per_task": int,
    "mem_gb": float | None,
    "timeout_min": int,
    "signal_delay_s": int,
    "array_parallelism": int,
    "additional_parameters": dict[str, Any] | None,
    "setup": list[str] | None,
    "srun_args": list[str] | None,
}


class Executor(submitit.SlurmExecutor):
    """submitit's own, made of the settings in slurm.yaml as hydra-submitit-launcher does it."""

    OF_CONSTRUCTOR = ("_target_", "submitit_folder", "max_num_timeout")

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings["submitit_folder"], max_num_timeout=settings["max_num_timeout"])
        given = {key: value for key, value in settings.items() if value is not None and key not in self.OF_CONSTRUCTOR}
        self.update_parameters(**self._convert_parameters(given))

    @classmethod
    def affinity(cls) -> int:
        return 2  # also where srun is missing: a dry run needs none

    @classmethod
    def takes(cls) -> set[str]:
        return cls._valid_parameters() | {*cls._equivalence_dict(), *cls.OF_CONSTRUCTOR}

    def script(self, runs: int) -> str:
        self.parameters |= {"map_count": runs} if runs > 1 else {}
        return self._make_submission_file_text(self._submitit_command_str, "")


def for_hydra(override: str) -> str:
    """slurm.X=Y in hydra's own words; any other override as it is."""
    key, equals, value = override.partition("=")
    if key == "slurm":
        return f"hydra/launcher{equals}{value}"
    key = re.sub(r"^(\+\+?|~)?slurm\.", r"\1hydra.launcher.", key)
    if key == "hydra.launcher.gpus_per_node" and value == "0":
        value = "null"
    if key == "hydra.launcher.hours":
        key = "hydra.launcher.timeout_min"
        with contextlib.suppress(ValueError, OverflowError):  # what is no finite number is for settings_of to refuse
            value = str(math.ceil(60 * float(value)))
    return f"{key}{equals}{value}"


def settings_of(overrides: list[str], sweep: Path) -> tuple[dict[str, Any], list[str]]:
    """(what hydra/launcher holds, sentences about what is wrong with it)."""
    if not any(override.startswith("hydra/launcher=") for override in overrides):
        overrides = ["hydra/launcher=slurm", *overrides]
    config, problems = composed([*overrides, f"hydra.sweep.dir='{sweep}'"], "train", CONF)
    problems = [re.sub("hydra[./]launcher", "slurm", text.replace("timeout_min", "hours")) for text in problems]
    several = "all jobs get one value; in quotes, 'a,b' is one."
    problems = [re.sub("one run takes one value;.*", several, text) for text in problems]
    settings: Any = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    if not str(settings.get("_target_")).endswith("SlurmLauncher"):
        choice = config.hydra.runtime.choices["hydra/launcher"]
        raise Refused(*[text for text in problems if "no option" in text] or [f"slurm={choice}: that is no cluster."])
    for key in settings.keys() - Executor.takes():
        meant = did_you_mean(key, Executor.takes()) or "."
        problems.append(f"slurm.{key}={shown(settings[key])}: submitit has no parameter {key}{meant}")
    for key, hint in TYPES.items():
        try:
            value = fitted(settings.get(key), hint)
            holds = not isinstance(value, int | float) or value > 0
        except Misfit:
            holds = False
        if not holds:
            value, name, expected = settings.get(key), key, described(hint)
            if key == "timeout_min":
                minutes = isinstance(value, int) and abs(value) < 2**63  # else it is what was given as hours
                value, name, expected = value / 60 if minutes else value, "hours", "a number"
            problems.append(f"slurm.{name}={shown(value)}: expected {expected}{', above 0' * ('number' in expected)}.")
    if not problems and 2 * settings["signal_delay_s"] > 60 * settings["timeout_min"]:
        problems.append(
            f"slurm.signal_delay_s={settings['signal_delay_s']}: expected at most half of the time limit, which is "
            f"{settings['timeout_min']} min, for SLURM may signal a minute earlier still; give more slurm.hours."
        )
    return settings, problems


def prepared(overrides: list[str]) -> tuple[Sweep, dict[Path, Job], dict[str, Any]]:
    """(the sweep, its runs by directory, the settings of their jobs). Raises Refused with all that is wrong."""
    translated = [for_hydra(override) for override in overrides]
    of_launcher = [text for text in translated if re.match(r"[+~]*hydra[./]launcher\b", text)]
    sweep = sweep_of([text for text in translated if text not in of_launcher])
    settings, problems = settings_of(of_launcher, sweep.directory)
    if not sweep.runs:
        problems.append(
            "hydra/sweeper: this one chooses the next run by the results of the last, for which nobody waits here; "
            "use python -m dino.train --multirun hydra/launcher=slurm."
        )
    jobs = {}
    processes = 1 if problems else settings["nodes"] * (settings["tasks_per_node"] or 1)
    with environment_variables(RANK=0, WORLD_SIZE=processes):  # rules about the effective batch count them
        for run, directory in sweep.runs:
            config, found = composed(run, "train", CONF)
            values = plain(config)
            problems += [*found, *check(values, here=False)]
            try:
                check_claim(directory, values)
            except Refused as refused:
                problems += refused.problems
            jobs[directory] = Job(values, directory)
    if problems:
        raise Refused(*dict.fromkeys(problems))
    return sweep, jobs, settings


def queued(folder: str) -> dict[Path, str]:
    """Job ids by run directory: of the jobs submitted with this submitit folder, those that SLURM still has."""
    if shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={getpass.getuser()}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"squeue does not answer, so what is queued is not known: {' '.join(done.stderr.split())}.")
    found = {}
    for job_id in done.stdout.split():
        submitted = JobPaths(folder, job_id).submitted_pickle
        if submitted.exists() and isinstance(job := DelayedSubmission.load(submitted).function, Job):
            found[job.directory] = job_id
    return found


def copy_of_code(folder: Path) -> RsyncSnapshot:
    """A context in which jobs are submitted from a copy, below `folder`, of all files that git does not ignore."""
    if not (RsyncSnapshot.available() and (ROOT / ".git").exists()):
        raise Refused(
            "--snapshot: needs rsync and a git checkout; without it jobs run the code as it is when they start."
        )
    new = ["git", "ls-files", "--others", "--exclude-standard"]
    include = subprocess.run(new, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return RsyncSnapshot(folder / time.strftime("code_%Y-%m-%dT%H-%M-%SZ", time.gmtime()), ROOT, include=include)


def submit(overrides: list[str], dry_run: bool = False, snapshot: bool = False) -> None:
    sweep, jobs, settings = prepared(overrides)
    for text in dict.fromkeys(text for job in jobs.values() for text in warnings_of(job.config)):
        print(f"warning: {text}", file=sys.stderr)
    for text in remarks(settings):
        print(f"note: {text}", file=sys.stderr)
    waiting, wanted = queued(settings["submitit_folder"]), dict(jobs)
    for directory, job in jobs.items():
        state = state_of(directory)
        if job.directory in waiting or state.name in ("finished", "running"):
            words = f"job {waiting[job.directory]} has it" if job.directory in waiting else str(state)
            print(f"{directory}: {words}; not submitted again")
            del wanted[directory]
    if not wanted:
        return
    executor = Executor(settings)
    if dry_run:
        print(executor.script(len(wanted)), "# runs", *(f"#   {directory}" for directory in wanted), sep="\n")
        return
    if shutil.which("sbatch") is None:
        raise Refused("there is no sbatch here: start this where SLURM is, or see its script with --dry-run.")
    folder = JobPaths.get_first_id_independent_folder(executor.folder)
    code = copy_of_code(folder) if snapshot else contextlib.nullcontext()
    sweep.record()
    try:
        with code, executor.batch():
            submitted = [executor.submit(job) for job in wanted.values()]
    except FailedJobError as error:
        raise Refused("sbatch refused it; nothing was submitted.") from error  # submitit has shown its words
    for number, directory in zip(submitted, wanted, strict=True):
        print(f"{number.job_id}  {directory}")
    print(f"logs in {os.path.relpath(folder)}; python -m dino.compare runs={sweep.directory} shows how far they are")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.slurm", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("overrides", nargs="*", metavar="override")
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch script and what it would run")
    parser.add_argument("--snapshot", action="store_true", help="run a copy of the code as it is now")
    arguments = parser.parse_intermixed_args()
    try:
        submit(arguments.overrides, arguments.dry_run, arguments.snapshot)
    except Refused as refused:
        print(*refused.problems, sep="\n", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
