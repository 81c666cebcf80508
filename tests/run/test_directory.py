import fcntl
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import yaml

from dino.history import History
from dino.run.directory import State, check_claim, claim, differences, is_held, lock, state_of

HOLD = """
import sys, time
from pathlib import Path
from dino.run.directory import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_with_the_first_ones_host_and_pid_until_that_dies(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        said = rf"in use by {re.escape(os.uname().nodename)} pid {holder.pid}"
        with pytest.raises(ValueError, match=said), lock(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
    with lock(tmp_path):
        (tmp_path / "config.yaml").touch()
    assert tmp_path.is_dir()


def test_the_lock_of_a_process_that_is_gone_is_taken_over_whatever_host_it_names(tmp_path):
    (tmp_path / ".lock").write_text("another-host pid 1\n")  # a pid that is alive, here
    with lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.uname().nodename} pid {os.getpid()}\n"
        (tmp_path / "file").touch()


def test_a_run_that_wrote_nothing_leaves_no_directory(tmp_path):
    with lock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").is_file()
    assert [*(tmp_path / "a").iterdir()] == []


def test_a_claimed_directory_keeps_its_configuration(tmp_path):
    config = {"seed": 0, "optimizer": {"lr": 1e-5, "betas": [0.9, 0.999]}, "name": None, "precision": "auto"}
    claim(tmp_path, config)
    check_claim(tmp_path, config)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == config


def test_other_settings_are_refused_listing_every_key_with_both_values(tmp_path):
    claim(tmp_path, {"seed": 0, "optimizer": {"lr": 0.1}, "training": {"epochs": 3}})
    with pytest.raises(ValueError, match=r"optimizer.lr was 0.1, now 0.2; seed was 0, now 1\)"):
        check_claim(tmp_path, {"seed": 1, "optimizer": {"lr": 0.2}, "training": {"epochs": 3}})


def test_keys_that_change_no_result_may_differ():
    before = {"device": "cpu", "training": {"num_workers": 2, "epochs": 3}, "logger": {}, "log_every_steps": 1}
    before["profile"] = False
    now = {
        "profile": True,
        "device": "cuda",
        "training": {"num_workers": 0, "epochs": 3},
        "logger": {"csv": {"_target_": "x"}},
        "log_every_steps": 9,
    }
    assert differences(before, now) == []
    assert differences(before, {**now, "training": {"num_workers": 0, "epochs": 4}}) == [("training.epochs", 3, 4)]


def test_a_key_that_is_gone_or_has_another_value_is_refused_and_one_that_is_new_is_not(tmp_path):
    claim(tmp_path, {"a": {"b": 1, "d": 2}})
    with pytest.raises(ValueError, match=r"\(a.b was 1, now 'unset'; a.d was 2, now 3\)"):
        check_claim(tmp_path, {"a": {"c": 1, "d": 3}})
    check_claim(tmp_path, {"a": {"b": 1, "c": None, "d": 2}, "e": {"f": 1}})


def test_data_may_lie_elsewhere_on_resume():
    def config(root, download, size):
        parts = {
            split: {"root": root, "split": split, "size": size, "download": download} for split in ("train", "val")
        }
        return {"dataset": {"root": root, **parts}}

    assert differences(config("data", True, 160), config("/scratch/7", False, 160)) == []
    changed = differences(config("data", True, 160), config("/scratch/7", False, 320))
    assert changed == [("dataset.train.size", 160, 320), ("dataset.val.size", 160, 320)]


@pytest.mark.parametrize("content", ["", "[1, 2]", "{", "\x00"])
def test_a_broken_config_is_refused_not_overwritten(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match="cannot be read as YAML"):
        check_claim(tmp_path, {"seed": 0})
    assert (tmp_path / "config.yaml").read_text() == content


# ---- where a run stands ---------------------------------------------------------------------------------------------


def begun(directory, *checkpoints, total_steps=36, entries=3):
    """A run's files as state_of reads them; the checkpoints are empty, for their names are what counts."""
    claim(directory, {"seed": 0})
    (directory / "checkpoints").mkdir()
    for step in checkpoints:
        (directory / "checkpoints" / f"step_{step:09d}.pt").touch()
    history = History({"config": {"text": '}\n{ "metadata": '}})
    history.metadata["total_steps"] = total_steps
    for iteration in range(entries):
        history.record_iteration(iteration, {"loss": 1.0, "learning_rate": 1.0, "momentum": 1.0})
    history.save(directory / "history.json")
    return directory


def test_a_run_is_finished_where_the_checkpoint_of_its_last_step_is_there(tmp_path):
    assert state_of(begun(tmp_path, 24, 36)) == State("finished", 36, 36)
    assert str(state_of(tmp_path)) == "finished"


def test_a_run_that_nobody_holds_before_its_last_step_died_at_its_newest_checkpoint(tmp_path):
    assert state_of(begun(tmp_path, 12, 24)) == State("died", 24, 36)
    assert str(state_of(tmp_path)) == "died at step 24"
    (tmp_path / "checkpoints" / ".step_000000036.pt.tmp").touch()  # written when it was killed
    (tmp_path / "checkpoints" / "best.pt").touch()
    assert state_of(tmp_path).step == 24


def test_a_run_that_a_process_holds_is_running_also_before_its_first_checkpoint(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        try:
            assert state_of(tmp_path) == State("running", 0, None)
            begun(tmp_path, 12)
            assert str(state_of(tmp_path)) == "running, 12 of 36"
        finally:
            holder.kill()
    assert state_of(tmp_path).name == "died"


def test_nothing_or_no_directory_is_a_run_that_has_not_started_and_looking_makes_none(tmp_path):
    assert state_of(tmp_path / "none") == State("not started")
    assert state_of(tmp_path) == State("not started")
    assert [*tmp_path.iterdir()] == []


def test_the_total_is_found_at_the_end_of_a_history_of_any_length(tmp_path):
    assert state_of(begun(tmp_path, 36, entries=3000)).name == "finished"
    assert (tmp_path / "history.json").stat().st_size > 2 * 65536
    history = History({"config": {"long": "x" * 100_000}})  # a config larger than what is read first
    history.metadata["total_steps"] = 36
    history.save(tmp_path / "history.json")
    assert state_of(tmp_path).name == "finished"


@pytest.mark.parametrize("content", [b"", b'"metadata": {}}', b'"metadata": {"total_steps": "36"}}', b"\xff"])
def test_a_history_that_does_not_tell_the_total_leaves_a_run_unfinished(tmp_path, content):
    begun(tmp_path, 36)
    (tmp_path / "history.json").write_bytes(content)
    assert state_of(tmp_path) == State("died", 36, None)


def test_a_run_starts_although_another_process_looks_at_its_directory(tmp_path):
    with lock(tmp_path):
        (tmp_path / "file").touch()  # so that the lock's file stays
        assert is_held(tmp_path)
    assert not is_held(tmp_path)
    look = open(tmp_path / ".lock")  # noqa: SIM115 - closed by the timer
    fcntl.flock(look, fcntl.LOCK_SH | fcntl.LOCK_NB)  # is_held, for far longer than its instant
    threading.Timer(0.2, look.close).start()
    with lock(tmp_path):
        assert look.closed


def test_looking_at_a_run_loads_no_torch(tmp_path):
    program = "import sys; from dino.run.directory import state_of; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"
