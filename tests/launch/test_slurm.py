"""Jobs on a real SLURM cluster, at a time limit, a pre-emption, scancel and a crash: `make test-slurm`."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_train import ROOT, TINY, assert_same_run, final, program

from dino.history import History
from dino.run.directory import state_of


def slurm(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout


NODES = slurm("sinfo", "-h", "-N", "-t", "idle,alloc,mixed", "-o", "%N").split() if shutil.which("sinfo") else []
NODES = sorted({*NODES})
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not shutil.which("sbatch"), reason="there is no sbatch here"),
    pytest.mark.skipif(not NODES, reason="no node of this cluster is up"),
]
two_nodes = pytest.mark.skipif(len(NODES) < 2, reason="needs two nodes")

JOB = {"gpus_per_node": "null", "cpus_per_task": 1, "mem_gb": 1, "signal_delay_s": 10, "timeout_min": 20}
LONG = [*TINY, "training.epochs=25", "evaluate_every_epochs=25"]  # 300 steps
SLOWLY = "dataset.train._target_=slow.Slow"
SLOW = """
import time
from pathlib import Path
from dino.dataset.textures import Textures

class Slow(Textures):
    def __getitem__(self, index):
        if not Path("hurry").exists():
            time.sleep(0.024)
        return super().__getitem__(index)
"""


@pytest.fixture
def cluster(tmp_path):
    """A folder to work in; the jobs that were submitted from it are cancelled in the end."""
    (tmp_path / "slow.py").write_text(SLOW)
    yield Cluster(tmp_path)
    for line in slurm("squeue", "-h", "-r", "-o", "%i %Z").splitlines():
        job, _, folder = line.partition(" ")
        if folder == str(tmp_path):
            slurm("scancel", job)


class Cluster:
    def __init__(self, folder):
        self.folder = folder
        self.environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"}

    def launch(self, *overrides, **settings):
        """python -m launch.slurm: the job of each run directory, and what it said."""
        settings = [f"slurm.{key}={value}" for key, value in (JOB | settings).items()]
        command = [sys.executable, "-m", "launch.slurm", *settings, *overrides]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        jobs = re.findall(r"^([\d_]+)  (\S+)$", done.stdout, re.MULTILINE)
        return {self.folder / directory: job for job, directory in jobs}, done.stdout

    def slow(self, *overrides, **settings):
        """A run of 300 steps and a minute at least, until `hurry`: (directory, job)."""
        [started] = self.launch(*LONG, SLOWLY, "name=a", *overrides, **settings)[0].items()
        return started

    def hurry(self):
        (self.folder / "hurry").touch()


def job(number):
    """What SLURM knows of it."""
    return dict(re.findall(r"(\w+)=(\S+)", slurm("scontrol", "show", "job", number)))


def wait_for(condition, seconds, job_id):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, (job(job_id), slurm("squeue"))
        time.sleep(0.2)


def begin(directory, number, step=1):
    wait_for(lambda: state_of(directory).step >= step, 90, number)
    assert job(number)["JobState"] == "RUNNING"


def requeued(number, seconds):
    """Waits until the job is requeued, and lets it start at once: SLURM's own rule is two minutes later."""
    wait_for(lambda: job(number)["JobState"] == "PENDING" and job(number)["Restarts"] == "1", seconds, number)
    slurm("scontrol", "update", f"JobId={number}", "StartTime=now", "TimeLimit=20")


def finished(directory, number, seconds=150):
    wait_for(lambda: state_of(directory).name == "finished" and job(number)["JobState"] == "COMPLETED", seconds, number)


def ended(number, seconds):
    """Waits until SLURM has no more to do with the job."""
    wait_for(lambda: job(number)["JobState"] in ("CANCELLED", "FAILED", "COMPLETED", "TIMEOUT"), seconds, number)
    return job(number)


def log_of(number, folder, process=0):
    return next(folder.glob(f"**/.submitit/{number}/{number}_{process}_log.out")).read_text()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = program(*LONG, "name=a", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "outputs" / "a"


def test_a_sweep_of_four_runs_finishes_and_is_not_run_again(cluster):
    sweep = [*TINY, "training.epochs=1", "seed=0,1", "optimizer.lr=1e-3,5e-4", "name=four"]
    sweep.append("+slurm.additional_parameters.hold=true")  # else they might be through before the second command
    jobs, _ = cluster.launch(*sweep)
    assert {number.partition("_")[2] for number in jobs.values()} == {"0", "1", "2", "3"}  # one array
    _, again = cluster.launch(*sweep)
    assert again.count("has it; not submitted again") == 4
    for number in jobs.values():
        slurm("scontrol", "release", number)
    for directory, number in jobs.items():
        finished(directory, number)
    _, again = cluster.launch(*sweep)
    assert again.count("finished; not submitted again") == 4
    assert [final(directory)["config"]["seed"] for directory in jobs] == [0, 0, 1, 1]


def test_a_job_at_its_time_limit_is_requeued_and_ends_as_if_it_had_none(cluster, uninterrupted):
    directory, number = cluster.slow(timeout_min=1)  # the signal comes 20 to 50 s after the start
    requeued(number, 90)
    cluster.hurry()
    stopped_at = state_of(directory).step
    assert 0 < stopped_at < 300
    finished(directory, number)
    log = log_of(number, cluster.folder)
    assert "stopped by SIGUSR2" in log and "this job is timed-out" in log and f"resumed at step {stopped_at}" in log
    assert_same_run(directory, uninterrupted)


@two_nodes
def test_a_pre_empted_job_is_requeued_and_ends_as_if_it_had_not_been(cluster, uninterrupted):
    if "urgent" not in slurm("sinfo", "-h", "-o", "%R").split():
        pytest.skip("this cluster has no partition `urgent`, which pre-empts")
    directory, number = cluster.slow(exclude=NODES[0])
    begin(directory, number)
    urgent = [
        "sbatch",
        "--parsable",
        "-p",
        "urgent",
        "-w",
        NODES[1],
        "--exclusive",
        "-o",
        "/dev/null",
        "--wrap=sleep 3",
    ]
    other = subprocess.run(urgent, cwd=cluster.folder, capture_output=True, text=True, check=True).stdout.strip()
    requeued(number, 30)
    cluster.hurry()
    assert ended(other, 30)["JobState"] == "COMPLETED"
    finished(directory, number)
    log = log_of(number, cluster.folder)
    assert "stopped by SIGTERM" in log and "Requeued job" in log and "resumed at step" in log
    assert_same_run(directory, uninterrupted)


def test_a_cancelled_job_saves_and_is_not_requeued(cluster):
    directory, number = cluster.slow()
    begin(directory, number, step=12)
    slurm("scancel", number)
    assert ended(number, 30)["JobState"] == "CANCELLED"
    stopped_at = state_of(directory).step
    assert stopped_at % 12  # saved by the signal: the epochs, after which it saves too, are of 12 steps
    time.sleep(5)  # a requeue would show by now
    assert (job(number)["JobState"], job(number)["Restarts"]) == ("CANCELLED", "0")
    assert "stopped by SIGTERM" in log_of(number, cluster.folder)
    directory, again = cluster.slow()
    assert again != number
    begin(directory, again, step=stopped_at + 1)


def test_a_job_that_dies_of_its_own_fault_is_not_requeued(cluster):
    broken = [*TINY, "optimizer.lr=1e30", "scheduler.warmup_epochs=0", "precision=fp32", "name=a"]
    [(_, number)] = cluster.launch(*broken)[0].items()
    end = ended(number, 60)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "3:0", "0")
    log = log_of(number, cluster.folder)
    assert "the last good checkpoint is in" in log and "Traceback" not in log


@two_nodes
def test_two_nodes_train_as_one_and_stop_and_resume_together(cluster):
    directory, number = cluster.slow("training.batch_size=4", "training.epochs=10", nodes=2)
    begin(directory, number)
    slurm("scancel", "--signal=USR2", number)  # as at a time limit
    requeued(number, 30)
    cluster.hurry()
    stopped_at = state_of(directory).step
    finished(directory, number)
    log = log_of(number, cluster.folder)
    assert "effective batch 8 = 4 images x 1 accumulated x 2 processes" in log
    assert "processes  2 on" in log and f"resumed at step {stopped_at}" in log
    assert History.load(directory / "history.json").get_iterations() == [*range(1, 121, 10), 120]
    assert "epoch" not in log_of(number, cluster.folder, process=1)  # the first alone speaks


@two_nodes
def test_a_killed_process_ends_the_others_and_the_same_command_resumes(cluster):
    two = ["training.batch_size=4", "training.epochs=4"]
    directory, number = cluster.slow(*two, nodes=2)
    begin(directory, number)
    [process] = processes_of(number, rank=1)
    os.kill(process, 9)
    end = ended(number, 60)
    assert (end["JobState"], end["Restarts"]) == ("FAILED", "0")
    assert "process 0 of 2 lost another" in log_of(number, cluster.folder)
    cluster.hurry()
    directory, number = cluster.slow(*two, nodes=2)
    finished(directory, number)


def processes_of(number, rank):
    """On this machine, which has both nodes."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        wanted = {f"SLURM_JOB_ID={number}".encode(), f"SLURM_PROCID={rank}".encode()}
        if wanted <= {*environment} and b"submitit.core._submit" in command:
            yield int(folder.name)


def test_hydra_s_multirun_waits_for_its_jobs_through_a_requeue_and_a_scancel(cluster):
    settings = [f"hydra.launcher.{key}={value}" for key, value in JOB.items()]
    arguments = ["--multirun", "hydra/launcher=slurm", *settings, *TINY, SLOWLY, "seed=0,1", "name=sweep"]
    command = [sys.executable, "-m", "dino.train", *arguments]
    with subprocess.Popen(
        command, cwd=cluster.folder, env=cluster.environment, stderr=subprocess.PIPE, text=True
    ) as sweep:
        first, second = (cluster.folder / "outputs" / "sweep" / f"seed={seed}" for seed in (0, 1))
        wait_for(lambda: [*cluster.folder.glob("outputs/sweep/.submitit/*_0/*_submitted.pkl")], 60, "")
        [pickled] = cluster.folder.glob("outputs/sweep/.submitit/*_0/*_submitted.pkl")
        array = pickled.parent.name.partition("_")[0]
        begin(first, f"{array}_0")
        begin(second, f"{array}_1")
        slurm("scancel", "--signal=USR2", f"{array}_0")
        slurm("scancel", f"{array}_1")
        requeued(f"{array}_0", 30)
        cluster.hurry()
        _, said = sweep.communicate(timeout=150)
    assert sweep.returncode == 1
    assert state_of(first).name == "finished" and state_of(second).name == "died"
    assert "seed=1 died: the job is COMPLETING: not requeued" in said
    assert "1 died; the same command tries again" in said
