import re
import shlex
import sys
from pathlib import Path

import pytest

from dino.config import CONF, compose
from dino.config.command import command
from dino.config.sweep import run_name
from dino.runtime.refused import Refused

NO_OPTION = "backbone has no option"
ADAMW = "optimizer=adamw has no key"


@pytest.fixture
def program(tmp_path, monkeypatch):
    """`program(*overrides)` runs a command that only notes what it was given, in an empty directory."""
    seen = []

    @command("train")
    def main(config, directory):
        seen.append((config, directory))
        return 0.5

    def call(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        main()
        return seen

    return call


def refused(program, capsys, *arguments, left=()) -> list[str]:
    """The sentences; `left`: what lies in the directory before and after."""
    with pytest.raises(SystemExit) as stopped:
        program(*arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert {path.name for path in Path.cwd().iterdir()} == {*left}
    return said.err.splitlines()


@pytest.mark.parametrize(
    ("overrides", "starts"),
    [
        (["backbone=resnet19"], ["backbone=resnet19: backbone has no option resnet19; did you mean resnet18?"]),
        (["backbone=dino_vits61"], [f"backbone=dino_vits61: {NO_OPTION} dino_vits61; did you mean dino_vits16?"]),
        (["optimizer.weigth_decay=0"], [f"optimizer.weigth_decay=0: {ADAMW} weigth_decay; did you mean weight_decay?"]),
        (["optimizer.lrr=1"], ["optimizer.lrr=1: optimizer=adamw has no key lrr; did you mean lr?"]),
        (["min_lr=1"], ["min_lr=1: the config has no key min_lr; did you mean scheduler.min_lr?"]),
        (["dataset.root=/nowhere"], ["dataset.root=/nowhere: dataset=textures has no key root."]),
        (["dataset=imagenette", "dataset.root=/nowhere"], ["dataset.root=/nowhere: there is no such folder"]),
        (["loss.student_temp=0"], ["loss.student_temp=0: "]),
        (["optimizer.lr=-1"], ["optimizer.lr=-1: "]),
        (["seed=1,2"], ["seed=1,2: one run takes one value; use --multirun"]),
        (["seed"], ["seed: expected key=value"]),
        (["backbone=5"], ["backbone=5: "]),
        (["dataset=null"], ["dataset=null: "]),
        (["backbone=[vit_tiny,resnet18]"], ["backbone=[vit_tiny,resnet18]: backbone takes one of dino_vitb16, "]),
        (["head=[dino,small]"], ["head=[dino,small]: head takes one of dino, small; a run has one of them."]),
        (["hydra.verbose=nan"], ["hydra.verbose=nan: expected true, false, or names of Python's loggers."]),
        (["training.epochs.x=1"], ["training.epochs.x=1: training.epochs is a value"]),
        (["optimizer.lr=-1", "optimzer.lr=2"], ["optimzer.lr=2: ", "optimizer.lr=-1: "]),
        (["training.epochs=0", "head=big", "x y"], ["x y: ", "head=big: ", "training.epochs=0: "]),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_in_one_line_each_and_leaves_nothing(program, capsys, tmp_path, overrides, starts):
    lines = refused(program, capsys, *overrides)
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    assert list(tmp_path.iterdir()) == []


def test_a_sound_command_runs_in_the_directory_of_its_overrides_with_plain_values(program, tmp_path):
    ((config, directory),) = program("seed=3", "augmentation.global_scale=[0.5,1]", "device=cpu")
    assert directory == tmp_path / "outputs" / "augmentation.global_scale=[0.5,1],seed=3"
    assert type(config) is dict and type(config["training"]) is dict and type(config["optimizer"]["betas"]) is list
    assert config["seed"] == 3
    assert config["training"]["epochs"] == config["dataset"]["epochs"]


def test_a_sweep_with_one_bad_job_is_refused_as_a_whole(program, capsys, tmp_path):
    (line,) = refused(program, capsys, "-m", "seed=1,2", "optimizer.lr=1e-3,-1")
    assert line.startswith("optimizer.lr=-1: ")
    assert list(tmp_path.iterdir()) == []


def test_a_sound_sweep_runs_every_job_in_its_own_directory(program, capsys):
    seen = program("-m", "seed=1,2", "device=cpu")
    assert [(config["seed"], directory.name) for config, directory in seen] == [(1, "seed=1"), (2, "seed=2")]


def test_a_refusal_of_the_run_itself_is_a_sentence_and_its_empty_directory_goes(tmp_path, monkeypatch, capsys):
    @command("train")
    def main(config, directory):
        raise Refused("dataset: no images.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert (stopped.value.code, capsys.readouterr().err) == (2, "dataset: no images.\n")
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_the_program_keeps_its_traceback(tmp_path, monkeypatch, capsys):
    @command("train")
    def main(config, directory):
        raise KeyError("a bug")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(SystemExit) as stopped:
        main()
    words = capsys.readouterr().err
    assert stopped.value.code == 1
    assert "Traceback" in words and 'raise KeyError("a bug")' in words


def test_a_mistake_beside_an_experiment_of_ones_own_is_the_only_sentence(program, capsys, tmp_path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
    (line,) = refused(program, capsys, "--config-dir", "conf", "experiment=mine", "optimizer.lrr=1", left=["conf"])
    assert line.startswith("optimizer.lrr=1: optimizer=adamw has no key lrr; did you mean lr?")


def test_hydras_own_record_of_a_command_is_beside_the_run(program):
    ((_, directory),) = program("seed=3", "device=cpu")
    assert {path.name for path in (directory / ".hydra").iterdir()} == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    assert (directory / ".hydra" / "overrides.yaml").read_text() == "- seed=3\n- device=cpu\n"


def test_another_config_for_a_run_is_refused_before_hydra_writes_its_record(program, capsys, tmp_path):
    directory = tmp_path / "outputs" / "x"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("seed: 1\n")
    (line,) = refused(program, capsys, "name=x", "seed=2", left=["outputs"])
    assert line.startswith("outputs/x holds a run of other settings (seed was 1, now 2)")
    assert [path.name for path in directory.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(("text", "written"), [("ü", "\"name='ü'\""), ("a=b", "\"name='a=b'\""), ("it's ü", None)])
def test_a_value_that_hydra_reads_in_quotes_alone_is_shown_in_them(program, capsys, text, written):
    (line,) = refused(program, capsys, f"name={text}")
    assert line.startswith(f"name={text}: hydra reads this value in quotes alone; write ")
    shell = line.rpartition("write ")[2].removesuffix(".")
    assert written in (None, shell)
    ((_, directory),) = program(*shlex.split(shell))
    assert directory.name == re.sub(r"[^\w=]", "_", text)


def test_compose_names_every_override_that_it_cannot_use():
    with pytest.raises(Refused) as refusal:
        compose(["head=x", "seed=4", "lr=1"], "train", CONF)
    assert [problem.split(":")[0] for problem in refusal.value.problems] == ["head=x", "lr=1"]


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "default"),
        (["device=cpu", "training.num_workers=0", "logger=csv", "hydra.job.name=x", "checkpoint.keep=1"], "default"),
        (["seed=1", "backbone=resnet18"], "backbone=resnet18,seed=1"),
        (["seed=1", "seed=2"], "seed=2"),
        (["+experiment=smoke"], "experiment=smoke"),
        (["dataset.root=/a/b"], "dataset.root=_a_b"),
        (["seed=1", "name=mine"], "mine"),
        (["name=../../x"], "_.._x"),
        (["name=null", "seed=1"], "seed=1"),
    ],
)
def test_a_run_is_named_after_the_overrides_that_change_its_result(overrides, name):
    assert run_name(overrides) == name
    assert run_name(overrides[::-1]) == name or overrides == ["seed=1", "seed=2"]


def test_a_long_name_is_cut_to_200_bytes_and_stays_its_own():
    long = [f"init_from={'ü' * 300}{end}" for end in "ab"]
    names = [run_name([override]) for override in long]
    assert all(len(name.encode()) <= 200 for name in names)
    assert names[0] != names[1]
    assert run_name([long[0]]) == names[0]
