"""Whole runs and the faults of machines: kills, full disks, directories that are not ours, clocks, long runs."""

import ast
import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from test_train import ROOT, TINY, assert_same_run, assert_same_state, final, program
from test_weights import CONFIG, teacher

import dino.evaluator.knn
import dino.report
from dino.config import CONF, compose
from dino.history import History
from dino.logger import CSVLogger, Loggers
from dino.run.checkpoint import STATES, newest_checkpoint, write_step
from dino.run.directory import DiskFull, claim, lock
from dino.run.recorder import Recorder
from dino.run.stop import Interrupted
from dino.train import run
from dino.weights import save_teacher

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SHORT = [*TINY, "evaluator=none", "training.max_steps=24"]  # two epochs


def without_pictures(monkeypatch):
    """Seconds a run, and no part of what is tested."""
    monkeypatch.setattr("dino.report.write_report", lambda *_, **__: None)
    monkeypatch.setattr(History, "plot_all", lambda *_, **__: None)


@pytest.fixture
def no_pictures(monkeypatch):
    without_pictures(monkeypatch)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    directory = tmp_path_factory.mktemp("unbroken") / "a"
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_pictures(monkeypatch)
        run(compose([*SHORT, "checkpoint.keep=3"], "train", CONF), directory)
    return directory


def assert_same_end(one, other):
    """As assert_same_run, but for the random states: what checks types here draws numbers of its own."""
    for part in (*STATES, "iteration"):
        assert_same_state(final(one)[part], final(other)[part])
    histories = [History.load(directory / "history.json") for directory in (one, other)]
    for level, metric in (("iteration", "iteration"), ("iteration", "loss"), ("epoch", "epoch"), ("epoch", "loss")):
        assert histories[0].get_metric(metric, level) == histories[1].get_metric(metric, level)


@pytest.fixture
def disk(tmp_path):
    """A real disk, of 3 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount a small disk: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(disk, leave=0):
    free = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - leave))


def files_in(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != "filler"}


# ---- kills ----------------------------------------------------------------------------------------------------------

KILLED_WHILE_SAVING = """
import os, runpy, signal, sys
from dino.run.saving import Saving

files, lines = sys.argv.pop(1), int(sys.argv.pop(1))
steps = {name: getattr(Saving, name) for name in ("__call__", "_write")}  # in the training thread, and beside it

def trace(frame, event, _):
    global lines
    if not frame.f_code.co_filename.endswith(tuple(files.split(","))):
        return None
    lines -= event == "line"
    if lines <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return trace

def traced(step):
    def run(*arguments):
        sys.settrace(trace)
        step(*arguments)
        sys.settrace(None)
    return run

for name, step in steps.items():
    setattr(Saving, name, traced(step))
runpy.run_module("dino.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_a_run_killed_twenty_times_while_saving_too_ends_bit_identical(tmp_path):
    """Half of the kills fall on a random line of ours, or of torch.save, in the saving of a checkpoint."""
    command = [*TINY, "name=a", "training.epochs=8", "evaluate_every_epochs=8", "checkpoint.every_minutes=1e-9"]
    (tmp_path / "unbroken").mkdir()
    assert program(*command, cwd=tmp_path / "unbroken", timeout=600).returncode == 0
    directory = tmp_path / "outputs" / "a"

    def newest():
        return max((int(path.stem[5:]) for path in (directory / "checkpoints").glob("step_*.pt")), default=0)

    for kill in range(20):
        arguments, before = ["-m", "dino.train"], newest()
        if while_saving := kill % 2 == 1:
            ours = [
                "dino/run/saving.py,dino/run/checkpoint.py,dino/weights/__init__.py,dino/runtime/files.py,dino/history/__init__.py",
                str(random.randint(1, 150)),
            ]
            torchs = ["torch/serialization.py", str(random.randint(1, 3000))]
            arguments = ["-c", KILLED_WHILE_SAVING, *random.choice([ours, torchs])]
        with subprocess.Popen(
            [sys.executable, *arguments, *command],
            cwd=tmp_path,
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as killed:
            if not while_saving:
                until = before + random.randint(0, 3)
                while killed.poll() is None and newest() < until:
                    time.sleep(0.001)
                time.sleep(random.uniform(0, 0.1) if until > before else random.uniform(0, 10))
                os.killpg(killed.pid, signal.SIGKILL)
            said = killed.communicate(timeout=200)[1]
        assert killed.returncode == -signal.SIGKILL, said
        assert "cannot be read" not in said
        assert before == 0 or newest() == before or f"resumed at step {before}" in said
    assert 0 < newest() < 96
    assert program(*command, cwd=tmp_path, timeout=600).returncode == 0
    reference = tmp_path / "unbroken" / "outputs" / "a"
    assert_same_run(directory, reference)
    one, other = ({path.relative_to(d) for path in d.rglob("*")} for d in (directory, reference))
    assert one == other  # nothing half-written is left behind


SLOW = """
import sys, time
from dino.dataset.textures import Textures

class Slow(Textures):
    def __getitem__(self, index):
        self.given = getattr(self, "given", 0) + 1
        if self.given == 20:
            print("in a step", flush=True)
            time.sleep(seconds)
        return super().__getitem__(index)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "twice"),
    [
        (signal.SIGINT, True),
        *(pytest.param(s, False, marks=pytest.mark.soak) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)),
    ],
)
def test_a_signal_within_a_step_ends_the_run_in_15_seconds_of_its_end_and_a_second_sigint_at_once(
    tmp_path, signum, twice
):
    """A step of 3 seconds, or, for the second SIGINT, one that hangs."""
    (tmp_path / "slow.py").write_text(f"seconds = {600 if twice else 3}\n{SLOW}")
    command = [sys.executable, "-m", "dino.train", *SHORT, "name=a", "dataset.train._target_=slow.Slow"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as stopped:
        assert stopped.stdout.readline() == "in a step\n"
        stopped.send_signal(signum)
        if twice:
            with pytest.raises(subprocess.TimeoutExpired):
                stopped.wait(1)
            stopped.send_signal(signum)
        asked = time.monotonic()
        _, said = stopped.communicate(timeout=60)
    assert time.monotonic() - asked < (3 if twice else 3 + 15)
    assert "Traceback" not in said
    kept = final(tmp_path / "outputs" / "a")["iteration"]
    if twice:
        assert (stopped.returncode, kept) == (-signal.SIGINT, 1)
    else:
        assert (stopped.returncode, kept) == (128 + signum, 3)
        assert f"stopped by {signum.name}; the same command resumes" in said


@pytest.mark.slow
@pytest.mark.parametrize("measured_before", [0, 2, 4], ids=["raw pixels", "untrained", "teacher"])
def test_a_run_stopped_in_an_evaluation_resumes_with_it_and_ends_bit_identical(
    measured_before, tmp_path, no_pictures, monkeypatch
):
    config = compose([*TINY, "training.max_steps=24"], "train", CONF)  # two epochs
    run(config, tmp_path / "unbroken")
    features_of, calls = dino.evaluator.knn.features_of, itertools.count()

    def stopped(*arguments):
        if next(calls) == measured_before:
            os.kill(os.getpid(), signal.SIGTERM)
        return features_of(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(dino.evaluator.knn, "features_of", stopped)
        with pytest.raises(Interrupted):
            run(config, tmp_path / "a")
    assert final(tmp_path / "a")["iteration"] == 12
    assert next(calls) == measured_before + 1  # the rest was not waited for
    run(config, tmp_path / "a")
    assert_same_end(tmp_path / "a", tmp_path / "unbroken")
    ends = [History.load(tmp_path / name / "history.json") for name in ("a", "unbroken")]
    assert ends[0].get_metric("knn", "epoch") == ends[1].get_metric("knn", "epoch")
    assert ends[0].metadata["baselines"] == ends[1].metadata["baselines"]


def test_the_requeue_is_asked_for_right_after_the_checkpoint_and_before_the_loggers_finish(
    tmp_path, no_pictures, monkeypatch
):
    """W&B may take minutes to finish, and the scheduler kills the job before that."""
    order, record = [], Recorder.__call__

    def requeue(*_):  # as submitit's handler, which was there first
        order.append(f"requeue after step {final(tmp_path / 'a')['iteration']}")

    def stopped(self, step):
        record(self, step)
        if step.done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Recorder, "__call__", stopped)
    monkeypatch.setattr(Loggers, "finish", lambda self: order.append("loggers"))
    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        with pytest.raises(Interrupted):
            run(compose(SHORT, "train", CONF), tmp_path / "a")
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert order == ["requeue after step 3", "loggers"]


def test_a_signal_while_the_parts_are_built_is_not_waited_for(tmp_path, monkeypatch):
    def build(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the building went on after the signal")

    monkeypatch.setattr("dino.run.parts.cached", build)
    with pytest.raises(Interrupted):
        run(compose(SHORT, "train", CONF), tmp_path / "a")
    assert not (tmp_path / "a" / "checkpoints").exists()


# ---- checkpoints that are broken ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_whose_newest_checkpoint_is_broken_goes_on_from_the_one_before_to_the_same_end(
    unbroken, tmp_path, no_pictures, capsys
):
    shutil.copytree(unbroken, tmp_path / "a")
    broken = tmp_path / "a" / "checkpoints" / "step_000000024.pt"
    broken.write_bytes(broken.read_bytes()[:-1000])
    run(compose([*SHORT, "checkpoint.keep=1"], "train", CONF), tmp_path / "a")
    said = capsys.readouterr().err
    assert "step_000000024.pt cannot be read" in said
    assert "resumed at step 12" in said
    assert_same_end(tmp_path / "a", unbroken)


# ---- disks ----------------------------------------------------------------------------------------------------------


def history_of(entries):
    history = History()
    for i in range(entries):
        history.record_iteration(i, {"loss": 7.0, "learning_rate": 0.1, "momentum": 0.9})
    return history


class Saved:
    """Each writes a small file, then a larger one in its place."""

    def checkpoint(self, directory, n):
        write_step(directory, {"iteration": n, "weights": torch.zeros(20_000 * n)}, best=True)

    def teacher(self, directory, n):
        torch.manual_seed(n)
        save_teacher(directory, teacher().state_dict(), CONFIG, {"size": 64, "more": "x" * 20_000 * n})

    def history(self, directory, n):
        self.grown = getattr(self, "grown", History())
        for i in range(100 * (n - 1), 100 * n):
            self.grown.record_iteration(i, {"loss": 7.0, "learning_rate": 0.1, "momentum": 0.9})
        self.grown.save(directory / "history.json")

    def first_history(self, directory, n):
        history_of(100 * n).save(directory / "history.json")

    def plots(self, directory, n):
        history_of(30 * n).plot_all("iteration", directory / "plots" / "iteration.png")

    def config(self, directory, n):
        claim(directory, {"seed": n, "name": "x" * 20_000 * n})

    def row(self, directory, n):
        if n == 1:
            self.logger = CSVLogger()
            self.logger.start(directory, {}, None)
        self.logger.log({f"figure_{i}": 1 / 3 for i in range(1000)}, step=n)


@pytest.mark.parametrize("leave", [0, 8192], ids="{} bytes free".format)
@pytest.mark.parametrize("what", [name for name in vars(Saved) if not name.startswith("_")])
def test_a_full_disk_leaves_each_file_as_it_was_and_no_half_one(disk, what, leave):
    write = getattr(Saved(), what)
    write(disk, 1)
    before = files_in(disk)
    fill(disk, leave)
    with pytest.raises(OSError) as full:
        write(disk, 2)
    assert full.value.errno == errno.ENOSPC
    assert files_in(disk) == before
    (disk / "filler").unlink()
    write(disk, 3)
    assert files_in(disk) != before


@pytest.mark.slow
def test_a_run_whose_disk_fills_up_stops_with_a_sentence_and_goes_on_when_there_is_room(
    unbroken, disk, no_pictures, monkeypatch
):
    config = compose(SHORT, "train", CONF)
    record = History.record_iteration

    def record_on_a_full_disk(self, iteration, *rest, **more):
        record(self, iteration, *rest, **more)
        if iteration == 21 and not (disk / "filler").exists():
            fill(disk)

    monkeypatch.setattr(History, "record_iteration", record_on_a_full_disk)
    with pytest.raises(
        DiskFull,
        match=r"a takes no more \(No space left on device\); the last good checkpoint is .*000012.pt. Make room",
    ):
        run(config, disk / "a")
    assert {path.name for path in (disk / "a" / "checkpoints").iterdir()} == {"step_000000001.pt", "step_000000012.pt"}
    assert newest_checkpoint(disk / "a")["iteration"] == 12
    assert History.load(disk / "a" / "history.json").get_iterations()[:2] == [1, 11]
    assert not [*disk.rglob(".partial*")]
    (disk / "filler").unlink()
    monkeypatch.setattr(History, "record_iteration", record)
    run(config, disk / "a")
    assert_same_end(disk / "a", unbroken)


@pytest.mark.slow
def test_what_training_can_do_without_is_said_once_where_its_disk_is_full(disk, tmp_path, capsys, monkeypatch):
    """Plots, log and TensorBoard lie on a full disk."""
    monkeypatch.setattr("dino.report.write_report", lambda *_, **__: None)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # pytest's collects what threads fail with
    directory = tmp_path / "a"
    directory.mkdir()
    for name in ("plots", "tensorboard"):
        (disk / name).mkdir()
        (directory / name).symlink_to(disk / name)
    (disk / "train.log").touch()
    (directory / "train.log").symlink_to(disk / "train.log")
    fill(disk)
    with pytest.warns(UserWarning, match="TensorBoardLogger failed and is switched off; training goes on") as warned:
        run(compose([*SHORT, "training.max_steps=12", "logger=[csv,tensorboard]"], "train", CONF), directory)
    assert len(warned) == 1
    said = capsys.readouterr().err
    for words in (
        "train.log is not written: [Errno 28]",
        "the plots are not written: [Errno 28]",
    ):
        assert said.count(words) == 1, said
    assert final(directory)["iteration"] == 12
    rows = (directory / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "1", "11", "12"]
    assert not [*tmp_path.rglob("*.tmp"), *tmp_path.rglob(".partial*")]
    assert "Traceback" not in said


def test_a_report_on_a_full_disk_leaves_the_one_before_and_training_goes_on(disk, monkeypatch, capsys):
    write_report, before = dino.report.write_report, disk / "a" / "report.html"

    def on_a_full_disk(*arguments, **named):
        before.write_text("the one before")
        fill(disk)
        try:
            write_report(*arguments, **named)
        finally:
            (disk / "filler").unlink()

    monkeypatch.setattr("dino.report.write_report", on_a_full_disk)
    monkeypatch.setattr(History, "plot_all", lambda *_, **__: None)
    run(compose([*SHORT, "training.max_steps=1"], "train", CONF), disk / "a")
    assert capsys.readouterr().err.count("report.html is not written: OSError: [Errno 28]") == 1
    assert before.read_text() == "the one before"
    assert not [*disk.rglob(".partial*")]
    assert final(disk / "a")["iteration"] == 1


# ---- directories that are not ours ----------------------------------------------------------------------------------

AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


def test_a_directory_that_cannot_be_written_to_is_one_sentence_before_any_work(disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    (tmp_path / "file").touch()
    for place, words in {
        disk / "a": "Read-only file system",
        disk: "Read-only file system",
        tmp_path / "file" / "a": "Not a directory",
        tmp_path / "file": "File exists",
        Path("/proc/a"): "No such file or directory",
    }.items():
        with (
            pytest.raises(ValueError, match=rf"{place} cannot be written to \({words}\); make it writable"),
            lock(place),
        ):
            pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be someone else")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="no setpriv")
def test_a_directory_of_another_user_is_one_sentence(tmp_path):
    program = (
        "import sys; from pathlib import Path; from dino.run.directory import lock; lock(Path(sys.argv[1])).__enter__()"
    )
    with subprocess.Popen([*AS_NOBODY, sys.executable, "-c", "pass"]) as possible:
        pass
    if possible.returncode:
        pytest.skip("nobody has no right to this Python")
    (tmp_path / "theirs").mkdir(mode=0o755)
    for path in [tmp_path, *tmp_path.parents][:4]:
        if path.stat().st_mode & 0o001 == 0 and path.owner() == "root":
            path.chmod(path.stat().st_mode | 0o001)  # pytest's folders are closed to others
    command = [*AS_NOBODY, sys.executable, "-c", program, tmp_path / "theirs" / "a"]
    refused = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert "Refused: " in refused.stderr
    assert "theirs/a cannot be written to (Permission denied); make it writable" in refused.stderr


@pytest.mark.slow
def test_the_program_refuses_a_directory_that_it_cannot_write_to(tmp_path):
    (tmp_path / "outputs").touch()
    refused = program(*SHORT, "name=a", cwd=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.count("\n") == 1
    assert "outputs" in refused.stderr and "cannot be written to (Not a directory: " in refused.stderr


# ---- clocks ---------------------------------------------------------------------------------------------------------

WALL_CLOCK = ["dino/dataset/index.py", "dino/dataset/tar.py"]  # compare it with the times of files


@pytest.mark.parametrize(
    "path", sorted(p.relative_to(ROOT).as_posix() for d in ("dino", "launch") for p in (ROOT / d).rglob("*.py"))
)
def test_durations_are_of_the_monotonic_clock_and_times_of_day_are_utc(path):
    wall = 0
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            wall += called == "time.time"
            assert not called.endswith(("utcnow", "localtime", "ctime", "today")), called
            assert called != "time.strftime" or "gmtime" in ast.unparse(node), ast.unparse(node)
            if called.endswith(("datetime.now", "fromtimestamp")):
                assert "UTC" in ast.unparse(node), ast.unparse(node)
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            assert "time" not in [alias.name for alias in node.names]
    assert wall == (path in WALL_CLOCK)


def test_all_that_a_run_dates_is_utc_in_any_time_zone(tmp_path, no_pictures, monkeypatch):
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")  # 14 hours ahead
    time.tzset()
    try:
        assert time.localtime().tm_gmtoff == 14 * 3600
        before = datetime.now(UTC)
        run(compose([*SHORT, "training.max_steps=2"], "train", CONF), tmp_path / "a")
    finally:
        monkeypatch.undo()
        time.tzset()
    history = json.loads((tmp_path / "a" / "history.json").read_text())
    stamps = [
        history["metadata"]["created_at"],
        history["iteration_metrics"][-1]["timestamp"],
        history["epoch_metrics"][-1]["timestamp"],
        final(tmp_path / "a")["timestamp"],
        (tmp_path / "a" / "train.log").read_text().split(" ")[0],
    ]
    for stamp in stamps:
        seconds = (datetime.fromisoformat(stamp) - before).total_seconds()
        assert -1 <= seconds < 120, stamp


# ---- long runs ------------------------------------------------------------------------------------------------------

SOAK = """
import json, os, sys
from pathlib import Path
from dino.config import CONF, compose
from dino.run.after_step import AfterStep
from dino.train import run

def now():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {
        "MB": int(status["VmRSS"].split()[0]) // 1024,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "processes": len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()),
    }

seen, call = {}, AfterStep.__call__

def counted(self, step):
    call(self, step)
    if step.done in (1000, 1500, 1990):
        seen[step.done] = now()

AfterStep.__call__ = counted
run(compose(sys.argv[1:], "train", CONF), Path("run"))
print(json.dumps([*seen.values(), now()]))
"""


@pytest.mark.soak
@pytest.mark.timeout(2400)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_two_thousand_steps_leave_memory_open_files_and_processes_as_they_were(tmp_path):
    """From after the second evaluation, at step 1,000, on; with workers, loggers, evaluations, reports, checkpoints."""
    overrides = [
        *TINY,
        "dataset.train.images=160",
        "training.epochs=100",
        "training.num_workers=2",
        "evaluate_every_epochs=25",
        "log_every_steps=5",
        "checkpoint.every_minutes=0.02",
        "logger=[csv,tensorboard]",
    ]
    done = subprocess.run(
        [sys.executable, "-c", SOAK, *overrides], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, *_, last, after = json.loads(done.stdout)
    assert last["MB"] - first["MB"] < 20, done.stdout
    for count in ("files", "threads", "processes"):
        assert last[count] <= first[count], done.stdout
    assert after["processes"] == 0
