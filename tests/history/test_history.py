import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from dino.history import History


def record(history, iterations):
    for i in iterations:
        history.record_iteration(
            i, {"loss": 7.0 - i / 8, "learning_rate": i * 1e-4, "momentum": 0.99, "gradient_norm": i + 0.5}
        )


def without_times(entries):
    return [{key: value for key, value in entry.items() if key != "timestamp"} for entry in entries]


def content(path):
    """By the json module, which refuses what is not JSON, and nothing of ours."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_the_file_holds_what_was_recorded_with_utc_times(tmp_path):
    before = datetime.now(UTC)
    history = History({"config": {"training": {"epochs": 2}}})
    record(history, [1, 11])
    history.record_epoch(1, {"iteration": 11, "loss": 6.0, "knn": 0.5})
    history.save(tmp_path / "history.json")

    saved = content(tmp_path / "history.json")
    assert set(saved) == {"metadata", "iteration_metrics", "epoch_metrics"}
    assert saved["metadata"]["config"] == {"training": {"epochs": 2}}
    assert without_times(saved["iteration_metrics"]) == [
        {"iteration": 1, "loss": 6.875, "learning_rate": 1e-4, "momentum": 0.99, "gradient_norm": 1.5},
        {"iteration": 11, "loss": 5.625, "learning_rate": 11e-4, "momentum": 0.99, "gradient_norm": 11.5},
    ]
    assert without_times(saved["epoch_metrics"]) == [{"epoch": 1, "iteration": 11, "loss": 6.0, "knn": 0.5}]
    stamps = [saved["metadata"]["created_at"], *(entry["timestamp"] for entry in saved["iteration_metrics"])]
    for stamp in stamps:
        assert stamp.endswith("+00:00")
        assert -0.01 <= (datetime.fromisoformat(stamp) - before).total_seconds() < 60


@pytest.mark.parametrize("first", [0, 1, 2], ids="first save after {} iterations".format)
def test_many_small_saves_write_the_content_of_one_save(tmp_path, first):
    history = History()
    record(history, range(first))
    history.save(tmp_path / "often.json")
    for i in range(first, 6):
        record(history, [i])
        if i % 2:
            history.record_epoch(i // 2, {"loss": float(i)})
        history.save(tmp_path / "often.json")
    history.save(tmp_path / "once.json")
    assert content(tmp_path / "often.json") == content(tmp_path / "once.json")
    assert [entry["iteration"] for entry in content(tmp_path / "often.json")["iteration_metrics"]] == list(range(6))


def test_a_save_touches_none_of_the_iterations_already_written(tmp_path):
    path = tmp_path / "history.json"
    history = History()
    record(history, range(3))
    history.save(path)
    marked = path.read_bytes().replace(b'"loss": 7.0', b'"loss": 9.0')
    path.write_bytes(marked)
    record(history, range(3, 5))
    history.save(path)
    assert [entry["loss"] for entry in content(path)["iteration_metrics"]] == [9.0, 6.875, 6.75, 6.625, 6.5]


def test_the_first_save_replaces_the_file_of_a_run_that_died_before_its_first_checkpoint(tmp_path):
    path = tmp_path / "history.json"
    dead = History()
    record(dead, range(50))
    dead.save(path)
    history = History()
    record(history, range(2))
    history.save(path)
    assert [entry["iteration"] for entry in content(path)["iteration_metrics"]] == [0, 1]


def test_a_file_deleted_or_cut_during_the_run_is_written_whole_again(tmp_path):
    path = tmp_path / "history.json"
    history = History()
    record(history, range(3))
    history.save(path)
    path.unlink()
    record(history, [3])
    history.save(path)
    path.write_bytes(path.read_bytes()[:40])
    record(history, [4])
    history.save(path)
    assert [entry["iteration"] for entry in content(path)["iteration_metrics"]] == [0, 1, 2, 3, 4]


def bytes_written():
    """By this process so far, as the kernel counts them."""
    return int(re.search(r"wchar: (\d+)", Path("/proc/self/io").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts a process's bytes")
@pytest.mark.parametrize("epochs", [10, 1000])
def test_a_save_writes_what_is_new_however_many_epochs_and_settings_there_are(tmp_path, epochs):
    path = tmp_path / "history.json"
    history = History({"config": {"text": "x" * 20 * epochs}})
    for epoch in range(epochs):
        history.record_epoch(epoch, {"loss": 5.0, "knn": 0.5})
    record(history, [0])
    history.save(path)
    offset, before = history.state_dict()["offset"], bytes_written()
    for i in range(1, 1001):
        record(history, [i])
        history.save(path)
    written = bytes_written() - before
    assert written < 4 * (history.state_dict()["offset"] - offset)  # the entries, and the rest seldom
    assert len(content(path)["epoch_metrics"]) == epochs and len(content(path)["iteration_metrics"]) == 1001


def test_what_changes_in_the_metadata_and_the_epochs_is_in_the_next_save(tmp_path):
    path = tmp_path / "history.json"
    history = History({"config": {"seed": 1}})
    record(history, [0])
    history.save(path)
    history.metadata.setdefault("collapse", []).append("first")
    history.save(path)
    history.metadata["collapse"].append("second")
    record(history, [1])
    history.save(path)
    assert content(path)["metadata"]["collapse"] == ["first", "second"]
    history.record_epoch(1, {"loss": 2.0})
    history.save(path)
    history.record_epoch(1, {"knn": 0.5})
    history.save(path)
    assert without_times(content(path)["epoch_metrics"]) == [{"epoch": 1, "loss": 2.0, "knn": 0.5}]
    del history.metadata["collapse"]
    history.save(path)
    assert content(path)["metadata"].keys() == {"created_at", "config"}
    assert [entry["iteration"] for entry in content(path)["iteration_metrics"]] == [0, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_valid_json_and_comes_back_as_nan(tmp_path, value):
    history = History({"config": {"limit": value, "list": [value, 1]}})
    history.record_iteration(1, {"loss": value, "learning_rate": 0.1, "momentum": 0.9})
    history.record_epoch(1, {"loss": value})
    history.save(tmp_path / "history.json")
    assert content(tmp_path / "history.json")["metadata"]["config"] == {"limit": None, "list": [None, 1]}
    loaded = History.load(tmp_path / "history.json")
    assert math.isnan(loaded.get_metric("loss")[0])
    assert math.isnan(loaded.get_metric("loss", "epoch")[0])
    assert loaded.get_metric("learning_rate") == [0.1]


def test_scalars_of_numpy_and_torch_are_written_as_numbers(tmp_path):
    history = History()
    history.record_iteration(
        1, {"loss": 2.0, "learning_rate": 0.1, "momentum": 0.9, "count": 3, "a": np.float64(0.5), "note": "warm-up"}
    )
    history.record_epoch(1, {"rank": 7, "b": float(torch.tensor(0.25))})
    history.save(tmp_path / "history.json")
    entry = content(tmp_path / "history.json")["iteration_metrics"][0]
    assert (entry["count"], entry["a"], entry["note"]) == (3, 0.5, "warm-up")
    assert isinstance(entry["count"], int)


def test_a_loaded_history_is_the_saved_one_and_can_go_on(tmp_path):
    history = History({"config": {"seed": 3}})
    record(history, range(4))
    history.record_epoch(1, {"knn": 0.25})
    history.save(tmp_path / "history.json")
    loaded = History.load(tmp_path / "history.json")
    assert loaded.metadata == history.metadata
    record(loaded, [4])
    record(history, [4])
    loaded.save(tmp_path / "history.json")
    saved = content(tmp_path / "history.json")
    assert [entry["iteration"] for entry in saved["iteration_metrics"]] == [0, 1, 2, 3, 4]
    assert loaded.get_metric("loss") == history.get_metric("loss")
    assert without_times(saved["epoch_metrics"]) == [{"epoch": 1, "knn": 0.25}]


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file at .*gone\.json; expected the history\.json of a run"):
        History.load(tmp_path / "gone.json")
    for text in ("", '{"iteration_metrics": [\n{"iteration": 1', "[]", '{"iteration_metrics": []}'):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(ValueError, match=r"broken\.json is not a complete history"):
            History.load(tmp_path / "broken.json")


def test_metrics_line_up_with_the_iterations_where_some_entries_lack_them():
    history = History()
    history.record_iteration(1, {"loss": 3.0, "learning_rate": 0.1, "momentum": 0.9})
    history.record_iteration(5, {"loss": 2.0, "learning_rate": 0.2, "momentum": 0.9, "rank_me": 40.0})
    history.record_epoch(1, {"loss": 3.0})
    history.record_epoch(2, {"loss": 2.0, "knn": 0.5})
    assert history.get_iterations() == [1, 5]
    assert history.get_metric("loss") == [3.0, 2.0]
    assert history.get_metric("rank_me") == [pytest.approx(math.nan, nan_ok=True), 40.0]
    assert history.get_metric("epoch", "epoch") == [1, 2]
    assert history.get_metric("knn", "epoch") == [pytest.approx(math.nan, nan_ok=True), 0.5]
    assert History().get_metric("loss") == []


def test_an_unknown_metric_is_an_error_that_lists_the_known_ones():
    history = History()
    history.record_iteration(1, {"loss": 3.0, "learning_rate": 0.1, "momentum": 0.9})
    with pytest.raises(
        ValueError, match="no iteration has 'lr'; recorded are iteration, learning_rate, loss, momentum"
    ):
        history.get_metric("lr")


def test_a_second_record_of_an_epoch_adds_to_it():
    history = History()
    history.record_epoch(3, {"loss": 2.0})
    history.record_epoch(3, {"knn": 0.5})
    assert history.get_metric("loss", "epoch") == [2.0]
    assert history.get_metric("knn", "epoch") == [0.5]


def test_repeated_iterations_and_earlier_epochs_are_refused():
    history = History()
    record(history, [5])
    for repeated in (5, 4):
        with pytest.raises(ValueError, match=f"iterations must rise, got {repeated} after 5"):
            record(history, [repeated])
    history.record_epoch(2, {"loss": 1.0})
    with pytest.raises(ValueError, match="epochs must not fall, got 1 after 2"):
        history.record_epoch(1, {"loss": 1.0})


def test_a_dataframe_has_a_row_an_entry():
    history = History()
    record(history, [1, 11, 21])
    history.record_epoch(1, {"knn": 0.5})
    frame = history.to_dataframe()
    assert frame["iteration"].tolist() == [1, 11, 21]
    assert frame["gradient_norm"].mean() == 11.5
    assert str(frame["timestamp"].dt.tz) == "UTC"
    assert history.to_dataframe("epoch").loc[0, "knn"] == 0.5
    assert len(History().to_dataframe()) == 0


def more_saves(path, history):
    record(history, range(4, 9))
    history.record_epoch(2, {"loss": 0.0})
    history.save(path)


AFTER_THE_CHECKPOINT = {
    "nothing": lambda path, history: None,
    "more saves": more_saves,
    "half a save": lambda path, history: (more_saves(path, history), path.write_bytes(path.read_bytes()[:-400])),
    "a tail cut in its middle": lambda path, history: path.write_bytes(path.read_bytes()[:-20]),
    "noise": lambda path, history: path.write_bytes(path.read_bytes() + b"\x00\xff,{"),
}


@pytest.mark.parametrize("after", AFTER_THE_CHECKPOINT.values(), ids=AFTER_THE_CHECKPOINT)
def test_a_resumed_run_has_no_duplicate_and_no_missing_entry_whatever_was_written_after_the_checkpoint(tmp_path, after):
    path = tmp_path / "history.json"
    history = History({"config": {"seed": 1}})
    history.metadata["baselines"] = {"raw_pixels": 0.18}
    record(history, range(4))
    history.record_epoch(1, {"loss": 5.0})
    history.save(path)
    torch.save(history.state_dict(), tmp_path / "checkpoint")
    after(path, history)

    state = torch.load(tmp_path / "checkpoint", weights_only=True)
    resumed = History.resume(path, state, {"config": {"seed": 1, "workers": 4}})
    assert without_times(content(path)["iteration_metrics"]) == without_times(history._entries["iteration"][:4])
    record(resumed, range(4, 7))
    resumed.record_epoch(2, {"loss": 4.0})
    resumed.save(path)

    unbroken = History()
    record(unbroken, range(7))
    saved = content(path)
    assert without_times(saved["iteration_metrics"]) == without_times(unbroken._entries["iteration"])
    assert without_times(saved["epoch_metrics"]) == [{"epoch": 1, "loss": 5.0}, {"epoch": 2, "loss": 4.0}]
    assert saved["metadata"] == {
        "created_at": history.metadata["created_at"],
        "baselines": {"raw_pixels": 0.18},
        "config": {"seed": 1, "workers": 4},
    }


WRITER = """
import pickle, sys
from dino.history import History
history = History({"text": "x" * 5000})
for i in range(10**9):
    history.record_iteration(i, {"loss": i / 8, "learning_rate": 0.1, "momentum": 0.9})
    history.save("history.json")
    if i == 40:
        pickle.dump(history.state_dict(), open("state", "wb"))
        print("checkpoint", flush=True)
"""


def test_a_process_killed_while_writing_loses_nothing_before_its_checkpoint(tmp_path):
    import pickle

    for delay in (0.0, 0.03, 0.1):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "checkpoint\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        resumed = History.resume(tmp_path / "history.json", pickle.loads((tmp_path / "state").read_bytes()))
        assert resumed.get_iterations() == list(range(41))
        assert resumed.get_metric("loss") == [i / 8 for i in range(41)]


def test_a_resumed_run_keeps_the_evaluations_that_were_written_since_its_checkpoint(tmp_path):
    path = tmp_path / "history.json"
    history = History({"config": {"seed": 1}})
    record(history, range(4))
    history.save(path)
    state = history.state_dict()
    measured = History.load(path)  # as `python -m dino.evaluate` does it
    measured.metadata |= {"evaluations": [{"measured": {"linear": 0.75}}], "collapse": ["after the checkpoint"]}
    measured.save(path)

    resumed = History.resume(path, state, {"config": {"seed": 1}})
    assert content(path)["metadata"]["evaluations"] == [{"measured": {"linear": 0.75}}]
    assert "collapse" not in resumed.metadata
    record(resumed, [4])
    resumed.save(path)
    assert content(path)["metadata"]["evaluations"] == [{"measured": {"linear": 0.75}}]
    again = History.resume(path, resumed.state_dict())
    assert again.metadata["evaluations"] == [{"measured": {"linear": 0.75}}]


def test_a_run_killed_before_its_first_entry_starts_its_history_afresh(tmp_path):
    state = History().state_dict()
    (tmp_path / "history.json").write_text("left by the killed run")
    resumed = History.resume(tmp_path / "history.json", state)
    record(resumed, [1])
    resumed.save(tmp_path / "history.json")
    assert [entry["iteration"] for entry in content(tmp_path / "history.json")["iteration_metrics"]] == [1]


def test_the_state_of_an_unsaved_history_is_refused(tmp_path):
    history = History()
    record(history, range(3))
    with pytest.raises(ValueError, match="3 iterations are not in the file; call save"):
        history.state_dict()
    history.save(tmp_path / "history.json")
    assert history.state_dict()["iterations"] == 3


def test_a_resume_from_a_file_that_lost_entries_is_refused(tmp_path):
    path = tmp_path / "history.json"
    history = History()
    record(history, range(4))
    history.save(path)
    state = history.state_dict()
    good = path.read_bytes()
    for damaged in (good[: state["offset"] - 1], good.replace(b'{"iteration": 1', b'["iteration": 1'), b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"should hold 4 iterations.*Put the run's own history\.json back"):
            History.resume(path, state)
        assert path.read_bytes() == damaged
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"history\.json is gone, but the checkpoint goes on from it"):
        History.resume(path, state)
