import os
import re
import signal
import subprocess
import sys

import pytest
import yaml

from dino.run_directory import check_claim, claim, differences, lock

HOLD = """
import sys, time
from pathlib import Path
from dino.run_directory import lock
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
    now = {
        "device": "cuda",
        "training": {"num_workers": 0, "epochs": 3},
        "logger": {"csv": {"_target_": "x"}},
        "log_every_steps": 9,
    }
    assert differences(before, now) == []
    assert differences(before, {**now, "training": {"num_workers": 0, "epochs": 4}}) == [("training.epochs", 3, 4)]


def test_a_key_that_came_or_went_is_a_difference():
    assert differences({"a": {"b": 1}}, {"a": {"c": 1}}) == [("a.b", 1, "unset"), ("a.c", "unset", 1)]


@pytest.mark.parametrize("content", ["", "[1, 2]", "{", "\x00"])
def test_a_broken_config_is_refused_not_overwritten(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match="cannot be read as YAML"):
        check_claim(tmp_path, {"seed": 0})
    assert (tmp_path / "config.yaml").read_text() == content
