"""What launch/ does before and beside SLURM, which here is a few shell scripts; test_slurm.py has a real one."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission, JobPaths
from test_train import TINY

from dino.config import CONF
from dino.run.directory import claim
from dino.runtime.refused import Refused
from launch import job as in_job
from launch.cluster import remarks
from launch.job import Job, NotRequeued, requeue_with_care
from launch.slurm import ROOT, Executor, for_hydra, prepared, settings_of, submit

CPU = ["slurm.gpus_per_node=0", "slurm.cpus_per_task=1"]


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """`programs(sbatch="echo ...")` puts shell scripts on a PATH that holds git and the shell's own programs alone."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "git", "cat", "echo"):
        found = subprocess.run(["which", name], capture_output=True, text=True, check=True).stdout.strip()
        (folder / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.chdir(tmp_path)

    def put(**scripts):
        for name, text in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)

    return put


def finish(directory, step=36, total=36):
    """As a run leaves its directory, for those who only look whether it is finished."""
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "checkpoints" / f"step_{step}.pt").touch()
    (directory / "history.json").write_text(f'{{"epoch_metrics": [],\n"metadata": {{"total_steps": {total}}}}}\n')


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("slurm.partition=gpu", "hydra.launcher.partition=gpu"),
        ("+slurm.comment=x", "+hydra.launcher.comment=x"),
        ("slurm.hours=24", "hydra.launcher.timeout_min=1440"),
        ("slurm.hours=0.01", "hydra.launcher.timeout_min=1"),  # up: SLURM counts in minutes
        ("slurm.gpus_per_node=0", "hydra.launcher.gpus_per_node=null"),
        ("slurm.gpus_per_node=8", "hydra.launcher.gpus_per_node=8"),
        ("slurm=jupiter", "hydra/launcher=jupiter"),
        ("optimizer.lr=1e-3,5e-4", "optimizer.lr=1e-3,5e-4"),
        ("slurmy=1", "slurmy=1"),
    ],
)
def test_slurm_keys_are_short_for_hydra_s(given, meant):
    assert for_hydra(given) == meant


def test_a_sweep_is_hydra_s_product_and_a_list_is_no_sweep(programs):
    sweep, jobs, _ = prepared(
        [*TINY, *CPU, "augmentation.global_scale=[0.4,1.0]", "seed=0,1", "optimizer.lr=1e-3,5e-4"]
    )
    names = ["optimizer.lr=0.001,seed=0", "optimizer.lr=0.0005,seed=0", "optimizer.lr=0.001,seed=1"]
    assert [path.name for path in jobs] == [*names, "optimizer.lr=0.0005,seed=1"]
    assert [job.config["optimizer"]["lr"] for job in jobs.values()] == [1e-3, 5e-4, 1e-3, 5e-4]
    assert {path.parent for path in jobs} == {sweep.directory}
    assert all(job.config["augmentation"]["global_scale"] == [0.4, 1.0] for job in jobs.values())


def test_there_is_one_process_a_gpu(programs):
    wide = ["slurm.nodes=2", "slurm.gpus_per_node=8", "slurm.hours=24"]
    settings = prepared([*TINY, *wide])[2]
    assert (settings["tasks_per_node"], settings["timeout_min"]) == (8, 1440)
    with pytest.raises(Refused, match=r"effective_batch=64: expected a multiple of training.batch_size=8 x 16 proc"):
        prepared([*TINY, *wide, "training.effective_batch=64"])


@pytest.mark.slow
def test_everything_wrong_is_said_at_once_and_nothing_is_written(programs, tmp_path):
    wrong = ["slurm.partiton=x", "slurm.nodes=two", "slurm.hours=-1", "slurm.mem_gb=0", "+slurm.tasks=3", "seed=-1"]
    with pytest.raises(Refused) as refused:
        submit([*TINY, *CPU, *wrong, "optimizr.lr=3"])
    problems = {text.partition("=")[0]: text for text in refused.value.problems}
    assert problems.keys() == {text.lstrip("+").partition("=")[0] for text in [*wrong, "optimizr.lr=3"]}
    assert "slurm has no key partiton; did you mean partition?" in problems["slurm.partiton"]
    assert problems["slurm.nodes"] == "slurm.nodes=two: expected a whole number, above 0."
    assert problems["slurm.hours"] == "slurm.hours=-1.0: expected a number, above 0."
    assert "submitit has no parameter tasks" in problems["slurm.tasks"]
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("slurm=slrm", "slurm has no option slrm; did you mean slurm?"),
        ("slurm=basic", "slurm=basic: that is no cluster."),
        ("slurm.partition=a,b", "slurm.partition=a,b: all jobs get one value; in quotes, 'a,b' is one."),
        ("slurm.signal_delay_s=120", "expected at most half of the time limit, which is 3 min"),
        ("hydra/sweeper=optuna", "chooses the next run by the results of the last"),
    ],
)
def test_what_cannot_be_is_refused(programs, override, sentence):
    with pytest.raises(Refused) as refused:
        prepared([*TINY, *CPU, "slurm.hours=0.05", "slurm.signal_delay_s=10", override])
    assert sentence in str(refused.value)


@pytest.mark.slow
def test_a_refusal_is_a_sentence_and_status_2(tmp_path):
    command = [sys.executable, "-m", "launch.slurm", "slurm.nodes=0", "--dry-run"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "slurm.nodes=0: expected a whole number, above 0.\n"


def test_the_readme_s_cluster_file_and_container_are_taken(tmp_path, monkeypatch):
    here = tmp_path / "conf"
    (here / "hydra" / "launcher").mkdir(parents=True)
    (here / "hydra" / "launcher" / "slurm.yaml").symlink_to(CONF / "hydra" / "launcher" / "slurm.yaml")
    for path in CONF.iterdir():
        if path.name != "hydra":
            (here / path.name).symlink_to(path)
    cluster, container = re.findall(r"```yaml\n(.*?)```", (ROOT / "launch" / "README.md").read_text(), re.DOTALL)
    (here / "hydra" / "launcher" / "jupiter.yaml").write_text(cluster)
    (here / "hydra" / "launcher" / "boxed.yaml").write_text(f"defaults: [jupiter, _self_]\n{container}")
    monkeypatch.setattr("launch.slurm.CONF", here)
    settings, problems = settings_of(["hydra/launcher=jupiter", "hydra.launcher.nodes=3"], Path("outputs/x"))
    assert problems == []
    assert (settings["partition"], settings["tasks_per_node"], settings["nodes"]) == ("booster", 4, 3)
    assert settings["setup"][0] == "module load CUDA NCCL"
    assert settings["srun_args"] == ["--kill-on-bad-exit=1", "--cpus-per-task=12"]
    assert settings["submitit_folder"] == "outputs/x/.submitit/%j"
    script = Executor(settings_of(["hydra/launcher=boxed"], tmp_path)[0]).script(1)
    command = next(line for line in script.splitlines() if line.startswith("srun"))
    assert "--cpus-per-task=12 apptainer exec --nv /images/dino.sif sh -c 'exec python \"$@\"' /" in command


# ---- submitting -----------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_the_script_without_any_slurm(programs, capsys, tmp_path):
    submit([*TINY, "slurm.nodes=2", "slurm.gpus_per_node=8", "slurm.hours=24", "seed=0,1,2"], dry_run=True)
    shown = capsys.readouterr().out
    for line in (
        "#SBATCH --array=0-2%3",
        "#SBATCH --nodes=2",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --time=1440",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --requeue",
    ):
        assert line in shown.splitlines()
    assert "--kill-on-bad-exit=1 --cpus-per-task=8 " in shown
    assert shown.count("#   outputs/") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_without_sbatch_it_says_so(programs):
    with pytest.raises(Refused, match="there is no sbatch here"):
        submit([*TINY, *CPU])


def test_a_sweep_is_submitted_as_one_array_and_what_is_finished_or_queued_is_passed_over(programs, capsys, tmp_path):
    programs(sbatch=f"cat $1 > {tmp_path}/script; echo Submitted batch job 7", squeue="echo 7_0; echo 8", srun="")
    command = [*TINY, *CPU, "name=s", "seed=0,1,2"]
    finish(Path("outputs/s/seed=2"))
    submit(command)
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        "outputs/s/seed=2: finished; not submitted again",
        "7_0  outputs/s/seed=0",
        "7_1  outputs/s/seed=1",
    ]
    assert "#SBATCH --array=0-1%2" in (tmp_path / "script").read_text()
    pickled = DelayedSubmission.load(JobPaths("outputs/s/.submitit/%j", "7_1").submitted_pickle).function
    assert (type(pickled), pickled.config["seed"]) == (Job, 1)
    submit(command)  # squeue has 7_0 alone: 7_1 died before it began
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        "outputs/s/seed=0: job 7_0 has it; not submitted again",
        "outputs/s/seed=2: finished; not submitted again",
        "7  outputs/s/seed=1",
    ]
    assert "--array" not in (tmp_path / "script").read_text()


def test_a_directory_of_other_settings_is_refused_before_it_is_queued(programs):
    config = prepared([*TINY, *CPU, "name=a"])[1][Path("outputs/a")].config
    Path("outputs/a").mkdir(parents=True)
    claim(Path("outputs/a"), config | {"seed": 5})
    with pytest.raises(Refused, match="seed was 5, now 0"):
        prepared([*TINY, *CPU, "name=a"])


def test_a_queue_that_does_not_answer_is_no_empty_queue(programs):
    programs(squeue="echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1")
    with pytest.raises(Refused, match="squeue does not answer.*Unable to contact"):
        submit([*TINY, *CPU], dry_run=True)


def test_sbatch_s_refusal_is_passed_on(programs, capsys):
    programs(sbatch="echo sbatch: error: invalid partition specified: nope >&2; exit 1", srun="")
    with pytest.raises(Refused, match="sbatch refused it; nothing was submitted"):
        submit([*TINY, *CPU, "slurm.partition=nope"])
    assert "invalid partition specified: nope" in capsys.readouterr().err


def test_a_snapshot_without_rsync_is_refused_in_a_sentence(programs):
    programs(sbatch="exit 1")
    with pytest.raises(Refused, match="--snapshot: needs rsync and a git checkout"):
        submit([*TINY, *CPU], snapshot=True)


# ---- what the cluster says of itself --------------------------------------------------------------------------------

CONFIG = "JobRequeue = {requeue}\\nKillWait                = 30 sec\\nPreemptMode = REQUEUE\\nPreemptType = {kind}\\n"
PARTITION = "PartitionName={name} Default={default} GraceTime={grace} PreemptMode={mode} State=UP"


def says(programs, requeue=1, kind="preempt/partition_prio", **partitions):
    lines = [
        PARTITION.format(name=name, default="YES" if name == "batch" else "NO", grace=grace, mode=mode)
        for name, (grace, mode) in partitions.items()
    ]
    config = CONFIG.format(requeue=requeue, kind=kind)
    script = f"case $1 in show) printf '{config}';; *) printf '" + "\\n".join(lines) + "\\n';; esac"
    programs(scontrol=script)


def test_a_partition_without_grace_is_remarked_on(programs):
    settings = {"partition": None, "additional_parameters": {"requeue": True}}
    says(programs, batch=(0, "REQUEUE"), urgent=(0, "OFF"), graceful=(20, "REQUEUE"))
    [remark] = remarks(settings)
    assert "partition batch has no GraceTime: a pre-empted job is killed 30 s after its signal" in remark
    assert [*remarks(settings | {"partition": "urgent"})] == []
    assert [*remarks(settings | {"partition": "graceful"})] == []
    assert len([*remarks(settings | {"partition": "graceful,batch"})]) == 1
    says(programs, kind="preempt/none", batch=(0, "REQUEUE"))
    assert [*remarks(settings)] == []


def test_a_cluster_that_requeues_nothing_unasked_is_remarked_on(programs):
    says(programs, requeue=0, kind="preempt/none")
    assert [*remarks({"partition": None, "additional_parameters": {"requeue": True}})] == []
    [remark] = remarks({"partition": None, "additional_parameters": {}})
    assert "requeues only jobs that ask for it" in remark


def test_without_scontrol_nothing_is_remarked(programs):
    assert [*remarks({"partition": None, "additional_parameters": None})] == []


# ---- in the job -----------------------------------------------------------------------------------------------------


@pytest.fixture
def requeues(monkeypatch, tmp_path):
    """A job of one process as submitit starts it, with a run at step 3; the list counts calls of submitit's handler."""
    for name, value in {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    finish(tmp_path / "run", step=3)
    calls = []
    before = signal.signal(signal.SIGUSR2, lambda signum, frame: calls.append(signum))
    sigterm = signal.getsignal(signal.SIGTERM)
    yield calls
    signal.signal(signal.SIGUSR2, before)
    signal.signal(signal.SIGTERM, sigterm)


def stopped(tmp_path, step=4):
    """Takes a step, then hands the signal on as dino.train.attempt does."""
    requeue_with_care(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / f"step_{step}.pt").touch()
    signal.raise_signal(signal.SIGUSR2)


@pytest.mark.parametrize(
    "shown",
    [
        "JobState=RUNNING Restarts=0 PreemptTime=None",  # at the time limit
        "JobState=RUNNING Restarts=2 PreemptTime=2026-01-01T00:00:00",  # in the grace time
        "JobState=COMPLETING Restarts=0 PreemptTime=2026-01-01T00:00:00",  # PreemptMode=CANCEL without grace
    ],
)
def test_a_job_that_slurm_stops_is_requeued(programs, requeues, tmp_path, shown):
    programs(scontrol=f'[ "$*" = "show job 7" ] && echo {shown}')
    stopped(tmp_path)
    assert requeues == [signal.SIGUSR2]


def test_a_cancelled_job_is_not(programs, requeues, tmp_path):
    programs(scontrol="echo JobState=COMPLETING Restarts=0 PreemptTime=None")
    with pytest.raises(NotRequeued, match="the job is COMPLETING: not requeued"):
        stopped(tmp_path)
    assert requeues == []


def test_a_job_that_slurm_itself_requeued_is_left_to_it(programs, requeues, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    programs(scontrol="echo JobState=COMPLETING Restarts=2")
    stopped(tmp_path)
    assert requeues == []


def test_where_scontrol_is_missing_the_job_ends_saying_so(programs, requeues, tmp_path):
    with pytest.raises(NotRequeued, match="scontrol says nothing of the job"):
        stopped(tmp_path)


def test_a_job_without_a_step_is_not_requeued(programs, requeues, tmp_path, capsys):
    programs(scontrol="echo JobState=RUNNING")
    stopped(tmp_path, step=3)
    assert requeues == []
    assert "no step since the job's start" in capsys.readouterr().out


def test_only_the_first_process_requeues_and_the_others_wait_for_their_end(programs, requeues, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setattr(in_job.time, "sleep", slept.append)
    programs(scontrol="echo JobState=RUNNING")
    stopped(tmp_path)
    assert (requeues, slept) == ([], [600])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_requeue_that_scontrol_denies_ends_the_job_saying_so(programs, requeues, tmp_path):
    def denied(signum, frame):
        subprocess.run(["scontrol", "requeue", "7"], check=True)

    signal.signal(signal.SIGUSR2, denied)
    programs(scontrol='[ "$1" = show ] && echo JobState=RUNNING')
    with pytest.raises(NotRequeued, match="scontrol would not requeue the job"):
        stopped(tmp_path)


def test_what_a_requeued_job_runs_is_the_same_run(tmp_path):
    run = Job({"seed": 1}, tmp_path)
    again = DelayedSubmission(run)._checkpoint_function()  # as submitit asks for it
    assert again.function is run and hasattr(run, "checkpoint")
