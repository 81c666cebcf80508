"""Sweeps as a user runs them; hydra's own sweepers and launchers are the witness of which runs there are, and where."""

import contextlib
import gc
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pandas
import pytest
import torch
import yaml
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from test_train import ROOT, TINY, final, program

from dino.config.command import command
from dino.config.sweep import check_runs, run_name, sweep_of
from dino.history import History
from dino.run.finite import NonFiniteLoss
from dino.runtime.refused import Refused

pytestmark = pytest.mark.slow  # whole programs, several processes each


@pytest.fixture
def unchecked(monkeypatch):
    """Without the checks at the door, a part of a second for each run: they have tests of their own."""
    monkeypatch.setattr("dino.config.command.check", lambda config: [])
    monkeypatch.setattr("dino.config.command.check_runs", lambda *_: None)


@pytest.fixture
def sweep(tmp_path, monkeypatch, unchecked):
    """`sweep(main, *arguments)` runs `main(config, directory)` by --multirun in an empty directory.

    Returns what hydra's sweeper had from each run: (its overrides, its directory, what it returned).
    """
    results = []
    (basic,) = (plugin for plugin in Plugins.instance().discover(Sweeper) if plugin.__name__ == "BasicSweeper")
    real = basic.sweep

    def noted(self, arguments):
        for batch in real(self, arguments):
            for job in batch:
                directory = Path(job.hydra_cfg.hydra.runtime.output_dir)
                results.append((list(job.overrides), directory.relative_to(tmp_path), job.return_value))

    monkeypatch.setattr(basic, "sweep", noted)
    monkeypatch.chdir(tmp_path)

    def run(main, *arguments):
        results.clear()
        monkeypatch.setattr(sys, "argv", ["train", "--multirun", *arguments])
        command("train")(main)()
        return results

    run.results = results
    return run


def nothing(config, directory):
    return 0.5


# ---- which runs, and where ------------------------------------------------------------------------------------------

SWEEP_IN_A_FILE = """# @package _global_
hydra:
  sweeper:
    params:
      seed: 3,4
      optimizer.lr: choice(1e-3,1e-4)
"""


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=1,2"],
        ["optimizer.lr=1e-3,5e-4", "device=cpu", "seed=range(2)"],
        ["backbone=glob(resnet*,exclude=[resnet_small,resnet1*])"],
        ["augmentation.global_scale=[0.4,1.0],[0.5,1.0]", "name=mine"],
        ["experiment=sweep", "device=cpu"],
        ["experiment=sweep", "seed=5"],
        ["training.num_workers=0,1"],
        ["name=a,b", "~logger"],
        ["hydra.sweep.dir=elsewhere", "seed=choice(1,2)", "seed=3,4"],
        ["init_from=/,/tmp"],
    ],
    ids=" ".join,
)
def test_its_runs_are_those_of_hydras_sweeper_in_its_order_and_in_its_directories(sweep, tmp_path, overrides):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "sweep.yaml").write_text(SWEEP_IN_A_FILE)
    search = f"hydra.searchpath=[file://{tmp_path / 'conf'}]"
    ours = sweep_of([search, *overrides]).runs
    hydras = sweep(nothing, search, *overrides)
    assert [([search, *job], directory) for job, directory, _ in hydras] == ours


@pytest.mark.parametrize(
    ("overrides", "directory", "runs"),
    [
        (
            ["seed=1,2", "backbone=resnet18", "device=cpu"],
            "outputs/backbone=resnet18,seed=1,2",
            ["seed=1", "seed=2"],
        ),
        (["seed=2", "optimizer.lr=1e-3,0.1", "name=x"], "outputs/x", ["optimizer.lr=0.001", "optimizer.lr=0.1"]),
        (
            ["seed=0,1", "optimizer.lr=1e-3,0.1"],
            "outputs/optimizer.lr=1e-3,0.1,seed=0,1",
            [f"optimizer.lr={lr},seed={seed}" for seed in (0, 1) for lr in ("0.001", "0.1")],
        ),
        (["device=cpu,cuda"], "outputs/device=cpu,cuda", ["device=cpu", "device=cuda"]),
    ],
)
def test_a_sweep_is_named_by_its_overrides_and_its_runs_by_what_differs(overrides, directory, runs):
    sweep = sweep_of(overrides)
    assert sweep.directory == Path(directory)
    assert [path for _, path in sweep.runs] == [Path(directory) / run for run in runs]
    assert sweep_of(overrides[::-1]).directory == sweep.directory


@pytest.mark.parametrize("overrides", [[], ["augmentation.global_scale=[0.4,1.0]", "seed=1"], ["name=x"]])
def test_a_single_run_is_a_sweep_of_one_in_its_usual_directory(sweep, overrides):
    ((job, directory),) = sweep_of(overrides).runs
    assert (job, directory) == (overrides, Path("outputs") / run_name(overrides))
    ((_, hydras, _),) = sweep(nothing, *overrides)
    assert hydras == directory


def test_a_flag_between_or_after_the_overrides_does_not_part_them(tmp_path, monkeypatch, unchecked):
    seen = []
    monkeypatch.chdir(tmp_path)
    for arguments in (["seed=1,2", "-m"], ["--config-name", "train", "seed=1,2", "hydra.mode=MULTIRUN"]):
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        command("train")(lambda config, directory: seen.append(directory.relative_to(tmp_path)))()
    assert seen == [Path(f"outputs/seed=1,2/seed={seed}") for _ in range(2) for seed in (1, 2)]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["seed=1,1"], "two runs of the sweep would share outputs/seed=1,1/seed=1"),
        (["init_from=/a/b,/a_b"], "two runs of the sweep would share"),
        (["optimizer.lr=interval(1e-4,1e-2)"], r"lr=interval\(1e-4,1e-2\): .* let Optuna choose"),
        (["backbone=glob(nothing*)"], r"backbone=glob\(nothing\*\): there is no such value"),
        (["seed=1,2", "hydra/launcher=joblip"], "hydra/launcher has no option joblip; did you mean joblib?"),
        (["hydra/sweeper=optuna", "hydra.sweeper.n_trail=3"], "has no key n_trail; did you mean n_trials?"),
        (["seed=1,2", "hydra.sweep.subdir=x"], "hydra.sweep.subdir=x: the runs of a sweep are named by what differs"),
        (["seed=1,2", "hydra.sweep.dir='x/${seed}'"], "expected the plain path of a folder"),
        (
            ["seed=1,2", "hydra.launcher._target_=hydra_plugins.hydra_ray_launcher.ray.RayLauncher"],
            "hydra/launcher: .*; pip install hydra-ray-launcher",
        ),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_in_one_sentence(overrides, sentence):
    with pytest.raises(Refused, match=sentence) as refusal:
        sweep_of(overrides)
    assert len(refusal.value.problems) == 1


def test_optuna_with_nothing_to_measure_is_refused():
    with pytest.raises(Refused, match=r"^evaluator=none: the sweeper goes by the k-NN"):
        check_runs(sweep_of(["hydra/sweeper=optuna", "evaluator=none", "optimizer.lr=interval(1e-4,1e-2)"]))


def test_a_key_that_only_the_swept_option_knows_is_refused_with_what_to_write(sweep, capsys, tmp_path):
    with pytest.raises(SystemExit):
        sweep(nothing, "dataset=imagenette,imagenet", f"dataset.root={tmp_path}")
    assert "dataset=textures has no key root" in (said := capsys.readouterr().err)
    assert "++key=value sets a key that only some know" in said
    assert [*tmp_path.iterdir()] == []
    sweep(nothing, "dataset=imagenette,imagenet", f"++dataset.root={tmp_path}")
    assert [overrides[0] for overrides, *_ in sweep.results] == ["dataset=imagenette", "dataset=imagenet"]


def test_a_sweep_records_its_runs_beside_those_of_earlier_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep_of(["name=x", "seed=1,2"]).record()
    sweep_of(["name=x", "seed=2,3"]).record()
    runs = json.loads(Path("outputs/x/sweep.json").read_text())["runs"]
    assert runs == {f"seed={seed}": ["name=x", f"seed={seed}"] for seed in (1, 2, 3)}
    sweep_of(["name=y", "seed=1"]).record()
    assert not Path("outputs/y").exists()


def test_a_sweep_in_the_directory_of_a_single_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("outputs/x").mkdir(parents=True)
    Path("outputs/x/config.yaml").write_text("seed: 0\n")
    with pytest.raises(Refused, match="outputs/x holds a single run; give the sweep another name="):
        sweep_of(["name=x", "seed=1,2"])


# ---- runs that die --------------------------------------------------------------------------------------------------


def test_a_run_that_dies_gives_nan_says_why_and_the_others_run(sweep, capsys):
    def main(config, directory):
        if config["seed"] == 1:
            raise NonFiniteLoss("the loss is nan at step 7")
        if config["seed"] == 2:
            raise Refused("dataset: no images.", "dataset: none at all.")
        if config["seed"] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        return config["seed"] / 10

    with pytest.raises(SystemExit) as stopped:
        sweep(main, "seed=0,1,2,3,4")
    assert stopped.value.code == 1
    assert [result for *_, result in sweep.results] == pytest.approx(
        [0.0, math.nan, math.nan, math.nan, 0.4], nan_ok=True
    )
    *_, one, two, three, last = capsys.readouterr().err.splitlines()
    assert one == "seed=1 died: the loss is nan at step 7"
    assert two == "seed=2 died: dataset: no images. dataset: none at all."
    assert three == "seed=3 died: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert last.startswith("3 died; the same command tries again")


def test_only_an_error_without_words_of_its_own_shows_its_traceback(sweep, capsys):
    def main(config, directory):
        raise NonFiniteLoss("the loss is nan") if config["seed"] == 1 else KeyError("a bug")

    with pytest.raises(SystemExit):
        sweep(main, "seed=1,2")
    said = capsys.readouterr().err
    assert said.count("Traceback") == 1
    assert said.index("seed=1 died: the loss is nan") < said.index("Traceback") < said.index("seed=2 died: KeyError")


def test_what_a_dead_run_held_is_free_before_the_next_begins(sweep):
    class Held:
        pass

    alive, references = [], []

    def main(config, directory):
        alive.extend(reference() for reference in references)
        held = Held()
        held.itself = held  # as a model with hooks is
        references.append(weakref.ref(held))
        raise KeyError("a bug")

    gc.disable()  # it would come by some time
    try:
        with pytest.raises(SystemExit):
            sweep(main, "seed=1,2,3")
    finally:
        gc.enable()
    assert alive == [None] * 3  # one in the second run, two in the third


def test_an_exit_ends_the_whole_sweep_with_its_status(sweep):
    ran = []

    def main(config, directory):
        ran.append(config["seed"])
        sys.exit(143)

    with pytest.raises(SystemExit) as stopped:
        sweep(main, "seed=1,2,3")
    assert (stopped.value.code, ran) == (143, [1])


def test_a_single_run_that_fails_in_its_own_words_has_its_own_exit_status(tmp_path, monkeypatch, capsys):
    @command("train")
    def main(config, directory):
        raise NonFiniteLoss("the loss is nan at step 7")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert (stopped.value.code, capsys.readouterr().err) == (3, "the loss is nan at step 7\n")


# ---- real sweeps ----------------------------------------------------------------------------------------------------

QUICK = [*TINY, "training.max_steps=3", "log_every_steps=1", "scheduler.warmup_epochs=0", "precision=fp32"]


def test_a_real_sweep_ends_in_its_table_and_the_same_command_runs_only_what_died(tmp_path):
    arguments = ["--multirun", *QUICK, "name=x", "optimizer.lr=1e-3,1e30,1e-2"]
    first = program(*arguments, cwd=tmp_path)
    assert first.returncode == 1, first.stderr
    sweep = tmp_path / "outputs" / "x"
    good, dead, other = (sweep / f"optimizer.lr={lr}" for lr in ("0.001", "1e+30", "0.01"))
    assert re.search(r"optimizer\.lr=1e\+30 died: the loss is (nan|inf) at step [23];", first.stderr)
    assert first.stderr.splitlines()[-1].startswith("1 died;")
    header, _, *lines, files = first.stdout.splitlines()
    assert header.split()[:2] == ["lr", "best"]
    assert {line.split()[0]: line.split("  ")[-1] for line in lines} == {
        "0.001": "finished",
        "0.01": "finished",
        "1e+30": "died at step 1",
    }
    assert files == "in outputs/x/compare.csv and outputs/x/compare.png"
    frame = pandas.read_csv(sweep / "compare.csv").set_index("optimizer.lr")
    for run, lr in ((good, 0.001), (other, 0.01)):
        assert frame.loc[lr, "last_knn"] == History.load(run / "history.json").get_metric("knn", "epoch")[-1]
        assert final(run)["iteration"] == 3

    files = [path for run in (good, other) for path in run.rglob("*") if path.is_file()]
    before = {
        path: path.stat().st_mtime_ns for path in files if path.parent.name != ".hydra"
    }  # hydra's, of each command
    again = program(*arguments[:-1], "optimizer.lr=1e-3,1e30,1e-2,2e-2", cwd=tmp_path)
    assert again.returncode == 1
    assert again.stderr.count("is finished; change a setting") == 2
    assert again.stderr.count("resumed at step 1") == 1
    assert final(sweep / "optimizer.lr=0.02")["iteration"] == 3
    after = {path: path.stat().st_mtime_ns for path in before}
    locks = {run / ".lock" for run in (good, other)}
    assert {path for path in before if after[path] != before[path]} <= locks | {
        run / "train.log" for run in (good, other)
    }
    assert final(dead)["iteration"] == 1


def test_a_signal_stops_a_real_sweep_after_the_step_and_no_further_run_starts(tmp_path):
    arguments = [sys.executable, "-m", "dino.train", "--multirun", *TINY, "name=x", "seed=1,2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(arguments, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as running:
        first = tmp_path / "outputs" / "x" / "seed=1" / "checkpoints"
        while running.poll() is None and not list(first.glob("step_*.pt")):
            time.sleep(0.005)
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; the same command resumes" in said
    assert "Traceback" not in said
    assert final(first.parent)["iteration"] < 36
    assert not (first.parents[1] / "seed=2").exists()


def test_joblib_trains_in_processes_of_its_own_and_the_program_names_what_died_there(tmp_path):
    done = program("--multirun", *QUICK, "hydra/launcher=joblib", "name=x", "optimizer.lr=1e-3,1e30", cwd=tmp_path)
    assert done.returncode == 1
    runs = [tmp_path / "outputs" / "x" / f"optimizer.lr={lr}" for lr in ("0.001", "1e+30")]
    assert [final(run)["iteration"] for run in runs] == [3, 1]
    assert len({(run / ".lock").read_text() for run in runs}) == 2  # host and pid
    death, last = done.stderr.splitlines()[-2:]
    assert death.startswith("optimizer.lr=1e+30 died: the loss is ")
    assert last.startswith("1 died")
    assert done.stdout.splitlines()[0].startswith("lr ")


def test_optuna_goes_by_the_knn_and_the_same_command_returns_what_is_finished_at_once(tmp_path):
    arguments = ["--multirun", *TINY, "training.max_steps=2", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3"]
    arguments += ["optimizer.lr=tag(log,interval(1e-4,1e-2))", "name=x"]
    done = program(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sweep = tmp_path / "outputs" / "x"
    runs = sorted(path for path in sweep.iterdir() if path.is_dir())
    assert len(runs) == 3
    rates = [float(run.name.removeprefix("optimizer.lr=")) for run in runs]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert rates == [yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["lr"] for run in runs]
    knn = [History.load(run / "history.json").get_metric("knn", "epoch")[-1] for run in runs]
    found = yaml.safe_load((sweep / "optimization_results.yaml").read_text())
    assert found["best_value"] == max(knn)
    again = program(*arguments, cwd=tmp_path)
    assert again.returncode == 0
    assert again.stderr.count("is finished; change a setting") == 3
    assert sorted(path for path in sweep.iterdir() if path.is_dir()) == runs


# ---- the same with a program that trains nothing --------------------------------------------------------------------

PROGRAM = """
import os, signal, sys, time
from dino.config.command import command
from dino.run.finite import NonFiniteLoss
from dino.run.stop import StopSignal

@command("train")
def main(config, directory):
    if config["seed"] == 1:
        raise NonFiniteLoss("the loss is nan at step 7")
    if config["seed"] == 2:
        raise KeyError("a bug")
    if config["seed"] == 3:
        return float("nan")
    if config["seed"] >= 10:
        with StopSignal() as stop:
            (directory / "started").touch()
            while stop.signum is None:
                time.sleep(0.01)
            time.sleep(0.3 * (config["seed"] - 9))  # each its own time to save
            (directory / "saved").touch()
            sys.exit(128 + stop.signum)
    return config["optimizer"]["lr"]

main()
"""


@contextlib.contextmanager
def pretend(*arguments, cwd):
    """PROGRAM as it runs; whatever is left of it and its workers is killed at the end."""
    (cwd / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "program.py", "--multirun", *arguments]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    running = subprocess.Popen(command, cwd=cwd, env=environment, **options)
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.communicate()


def test_optuna_goes_on_after_a_trial_that_dies_or_measures_nothing_and_names_it(tmp_path):
    arguments = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "optimizer.lr=interval(1e-4,1e-2)", "name=x"]
    with pretend(*arguments, "seed=0,1,2,3", cwd=tmp_path) as running:
        _, said = running.communicate(timeout=100)
    assert running.returncode == 1
    names = re.findall(r"^(\S+,seed=(\d)) died: (.*)", said[said.rindex("Failed experiment") :], re.MULTILINE)
    reasons = {
        "1": "the loss is nan at step 7",
        "2": "KeyError: 'a bug'",
        "3": "it measured no k-NN, which the sweeper",
    }
    assert {seed for _, seed, _ in names} == {"1", "2", "3"}
    assert all(words.startswith(reasons[seed]) for _, seed, words in names)
    assert said.splitlines()[-1].startswith(f"{len(names)} died")
    best = yaml.safe_load((tmp_path / "outputs" / "x" / "optimization_results.yaml").read_text())
    assert best["best_params"]["seed"] == 0
    assert best["best_value"] == best["best_params"]["optimizer.lr"]


def test_optuna_with_no_trial_left_ends_with_what_died(tmp_path):
    arguments = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=1", "optimizer.lr=interval(1e-4,1e-2)", "seed=1"]
    with pretend(*arguments, cwd=tmp_path) as running:
        _, said = running.communicate(timeout=100)
    assert running.returncode == 1
    assert said.splitlines()[-1].startswith("1 died")


def test_a_signal_to_the_program_lets_its_workers_save_and_starts_no_further_run(tmp_path):
    with pretend("hydra/launcher=joblib", "name=x", "seed=10,11,12,13", cwd=tmp_path) as running:
        sweep = tmp_path / "outputs" / "x"
        while running.poll() is None and len([*sweep.glob("*/started")]) < 2:
            time.sleep(0.01)
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM, said
    assert {path.parent.name for path in sweep.glob("*/saved")} == {"seed=10", "seed=11"}
    assert len([*sweep.glob("*/started")]) == 2
    assert "Traceback" not in said
