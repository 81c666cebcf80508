"""What happens inside a SLURM job, by either route: the run, and whether the job may be requeued when it is stopped."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import submitit
from hydra.experimental.callback import Callback
from submitit.core.utils import DelayedSubmission

from dino.run.directory import state_of
from dino.runtime.refused import Refused
from launch.cluster import remarks, scontrol


class Job:
    """One run. submitit pickles it by the name of its class, so the job runs the code that it finds when it starts."""

    def __init__(self, config: dict[str, Any], directory: Path) -> None:
        self.config, self.directory, self.cwd = config, directory.absolute(), Path.cwd()

    def __call__(self) -> float:
        from dino.train import attempt

        os.chdir(self.cwd)  # a job with a snapshot starts there; the relative paths of the config were meant from here
        requeue_with_care(self.directory)
        try:
            return attempt(self.config, self.directory)
        except Exception as error:
            status = 2 if isinstance(error, Refused) else getattr(error, "exit_status", None)
            if status is None:
                raise
            print(error, file=sys.stderr, flush=True)
            sys.exit(status)

    def checkpoint(self) -> DelayedSubmission:
        """What the requeued job runs: the same, since the run's directory knows how far it came."""
        return DelayedSubmission(self)

    __submitit_checkpoint__ = checkpoint  # submitit asks whether there is the one, and calls the other


class NotRequeued(RuntimeError):
    """The job ends here, cancelled or not to be requeued. Its checkpoint is written."""

    exit_status = 1


class Care(Callback):  # type: ignore[misc]
    """`requeue_with_care` for `python -m dino.train --multirun hydra/launcher=slurm`, where hydra calls the run."""

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        for text in remarks(config.hydra.launcher):
            print(f"note: {text}", file=sys.stderr)

    def on_job_start(self, config: Any, **_: Any) -> None:
        requeue_with_care(Path(config.hydra.runtime.output_dir))


def requeue_with_care(directory: Path) -> None:
    """Puts conditions before submitit's handler of SIGUSR2, which requeues the job.

    At a time limit and before a pre-emption `dino.run.session` hands the signal on to it, once the checkpoint is
    written. But SLURM sends the same SIGTERM for scancel, and a requeue brings a cancelled job back to life.
    """
    job, start = submitit.JobEnvironment(), state_of(directory).step
    requeue: Any = signal.getsignal(signal.SIGUSR2)

    def handler(signum: int, frame: FrameType | None) -> None:
        if job.global_rank != 0:
            # Its exit would end the job's other processes, of which the first may have yet to save and to requeue.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which SLURM then ends this one
            time.sleep(600)
            return
        if state_of(directory).step == start:  # so it was not handed on: it came before the first step
            print("no step since the job's start: at this time limit it is not requeued", flush=True)
            return
        shown = scontrol("show", "job", job.job_id)
        # In its grace time a job is RUNNING. Pre-empted without one it is COMPLETING, like a cancelled one, and has a
        # PreemptTime, or SLURM has requeued it already.
        state, restarts = re.search(r"JobState=(\w+)", shown), re.search(r"Restarts=(\d+)", shown)
        if "JobState=RUNNING" in shown or re.search(r"PreemptTime=\d", shown):
            try:
                requeue(signum, frame)
            except subprocess.CalledProcessError as error:
                raise NotRequeued(f"scontrol would not requeue the job: {error}") from error
        elif restarts is None or int(restarts[1]) <= int(os.environ.get("SLURM_RESTART_COUNT", 0)):
            raise NotRequeued(f"the job is {state[1]}: not requeued" if state else "scontrol says nothing of the job")

    signal.signal(signal.SIGUSR2, handler)
