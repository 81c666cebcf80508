"""The command that measures a GPU, with tiny sizes on the CPU; and what holds its parts apart."""

import dataclasses
import json
import threading
import time
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.measure import covered
from benchmarks.gpu.plan import Settings, parts
from benchmarks.gpu.processes import Processes
from benchmarks.gpu.runs import epochs_in, tensors
from benchmarks.gpu.tables import markdown
from benchmarks.gpu.turn import Turn
from dino.history import History

TINY = Settings(tiny=True, data=None, minutes=0.1, recipe=())
STEP = {"ms", "ms_unsynchronised", "images_per_second", "peak_gb", "first_step_s", "first_loss", "last_loss"}


def plan(settings=TINY):
    return {part.name: part for part in parts(settings)}


def measured(directory, only, capsys):
    command.main(["--tiny", "--minutes", "9", "--only", only, "--results", str(directory)])
    (path,) = (path for path in directory.glob("cpu_*.json") if ".history" not in path.suffixes)
    return json.loads(path.read_text())["parts"], capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_part_has_its_figures_and_one_that_fails_costs_only_itself(tmp_path, capsys, monkeypatch):
    broken = dataclasses.replace(plan()["crops_128"], name="of no plan")  # so that its process does not find it
    monkeypatch.setattr(command, "parts", lambda settings: [broken, *parts(settings)])
    found, shown = measured(tmp_path, "of no plan,vits16_64/reference,vits16_64/eager,photometry_128,crops_224", capsys)
    assert found["of no plan"]["failed"].startswith("status 1: ValueError: ")
    for name in ("reference", "eager"):
        figures = found[f"vits16_64/{name}"]
        assert figures.keys() >= STEP and min(figures[key] for key in STEP) > 0
        assert figures["images_per_second"] == pytest.approx(4e3 / figures["ms_unsynchronised"])
    reference, eager = (found[f"vits16_64/{name}"] for name in ("reference", "eager"))
    for loss in ("first_loss", "last_loss"):
        assert eager[loss] == pytest.approx(reference[loss], abs=0.05)  # the same steps
    for name in ("photometry_128", "photometry_128_compiled", "crops_224"):
        assert found[name]["ms"] > 0 and found[name]["images_per_second"] > 0
    for words in ("| reference |", "| eager |", "| crops_224 |", "FAILED", "- `of no plan` has no figures"):
        assert words in shown


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_run_that_learns_has_a_curve_and_leaves_its_history(tmp_path, capsys):
    found, _ = measured(tmp_path, "learning", capsys)
    run = found["end_to_end"]
    assert run["epoch_over_steps"] > 1 and run["epoch_s"] > 96 / run["images_per_second"] and run["first_step_s"] > 0
    run = found["learning"]
    epochs = [point["epoch"] for point in run["curve"]]
    assert epochs == sorted(set(epochs)) and epochs[-1] == run["epochs"] >= 2  # as many as the machine has time for
    assert 0 < run["minutes"] <= run["process_s"] / 60 and 0 < run["knn"] < 1
    (history,) = map(History.load, tmp_path.glob("cpu_*.history.json"))
    assert history.get_metric("knn", "epoch") == [point["knn"] for point in run["curve"]]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_run_is_compared_with_one_that_was_not(tmp_path, capsys):
    found, _ = measured(tmp_path, "resume", capsys)
    resumed = found["resume"]
    assert resumed["equal"] == resumed["tensors"] > 100 and 1 < resumed["killed_at"] < resumed["steps"] == 36


def processes(tmp_path, until=60.0):
    return Processes(tmp_path, TINY, 1, time.monotonic() + until)


def test_a_part_that_takes_too_long_is_ended_with_all_that_it_began(tmp_path):
    slow = dataclasses.replace(plan()["vits16_64/eager"], limit=0.5)
    begun = time.monotonic()
    ((_, figures),) = processes(tmp_path).run([slow])
    assert figures["failed"].startswith("not through after 0 s") and time.monotonic() - begun < 5


def test_a_part_for_which_no_time_is_left_is_not_begun_nor_is_what_needs_it(tmp_path):
    some = plan()
    chosen = [some["vits16_64/compiled"], some["vits16_64/compiled/warm"]]
    found = {part.name: figures["failed"] for part, figures in processes(tmp_path, until=20.0).run(chosen)}
    assert found["vits16_64/compiled"] == "left out: it takes about 100 s, and 20 s are left"
    assert found["vits16_64/compiled/warm"] == "left out, since it needs vits16_64/compiled"
    assert not (tmp_path / "parts").exists()


def test_what_fails_is_said_in_its_last_words(tmp_path):
    broken = dataclasses.replace(TINY, minutes="no number")
    only = Processes(tmp_path, broken, 1, time.monotonic() + 60)
    ((_, figures),) = only.run([plan()["crops_224"]])
    assert figures["failed"].startswith("status 1: TypeError: ")


def test_none_is_timed_while_another_warms_up(tmp_path):
    one, other, order = Turn(tmp_path / "lock"), Turn(tmp_path / "lock"), []

    def timed():
        one.alone()
        order.append("timed")
        one.file.close()

    thread = threading.Thread(target=timed)
    thread.start()
    time.sleep(0.2)
    order.append("warm")
    other.file.close()
    thread.join(5)
    assert order == ["warm", "timed"]


def test_none_begins_while_another_is_timed(tmp_path):
    one, order = Turn(tmp_path / "lock"), []
    one.alone()
    thread = threading.Thread(target=lambda: order.append(Turn(tmp_path / "lock")))
    thread.start()
    time.sleep(0.2)
    let_go = time.monotonic()
    one.file.close()
    thread.join(5)
    assert order[0].begun >= let_go  # its clock begins when it may begin
    order[0].file.close()


def test_every_table_has_the_reference_and_ours_and_what_compiles_a_warm_start():
    names = [*plan(Settings(False, "/data", 2, ())), *plan()]
    for table in ("vits16_64", "vits16_128", "vitb16_64", "resnet50_64", "resnet18_256"):
        assert {name for name in names if name.startswith(f"{table}/")} == {
            *(f"{table}/{contestant}" for contestant in ("reference", "eager", "compiled", "captured")),
            *(f"{table}/{contestant}/warm" for contestant in ("compiled", "captured")),
        }
    assert "learning" not in plan(Settings(False, None, 2, ()))  # which wants images
    assert len({part.cache for part in parts(TINY) if part.name.endswith(("compiled", "captured"))}) == 11


def test_a_part_is_chosen_by_how_its_name_begins_with_what_it_needs():
    chosen = [part.name for part in command.selected(parts(TINY), "learning,vits16_64/compiled/warm")]
    assert chosen == ["vits16_64/compiled", "end_to_end", "learning", "vits16_64/compiled/warm"]
    with pytest.raises(SystemExit, match="--only nope: no part begins so; there are vits16_64/captured, "):
        command.selected(parts(TINY), "nope")


def test_kernels_that_overlap_are_time_once():
    assert covered([(5, 7), (0, 2), (1, 3), (1.5, 2.5)]) == 5
    assert covered([]) == 0


def test_the_epochs_of_the_run_that_learns_fill_its_time():
    assert epochs_in(120, {"first_step_s": 20.0, "epoch_s": 1.5}) == 60
    assert epochs_in(10, {"first_step_s": 20.0, "epoch_s": 1.5}) == 2


def test_the_tables_are_of_what_was_measured():
    step = {"ms": 100.0, "ms_unsynchronised": 90.0, "images_per_second": 700.0, "peak_gb": 12.4, "first_step_s": 4.0}
    found = {
        "vits16_64/captured": {**step, "images_per_second": 2100.0, "mfu": 0.215, "gpu_ms": 32.5, "kernels": 777.0},
        "vits16_64/captured/warm": {"first_step_s": 12.0},
        "vits16_64/reference": step,
        "vits16_64/compiled": {"failed": "status 1: no compiler"},
        "resume": {"tensors": 231, "equal": 230, "killed_at": 12, "steps": 48},
        "learning": {"curve": [{"epoch": 7, "minutes": 0.5, "knn": 0.413}]},
    }
    shown = markdown(found).splitlines()
    assert "| reference | 100.0 | 90.0 | 700 | 1.00 | 12.4 |  |  |  | 4 |  |" in shown
    assert "| captured | 100.0 | 90.0 | 2,100 | 3.00 | 12.4 | 21.5% | 32.5 | 777 | 4 | 12 |" in shown
    assert "| minutes | 0.50 |" in shown and "| k-NN, % | 41.3 |" in shown
    assert any("230 of 231 tensors" in line for line in shown)
    assert "- `vits16_64/compiled` has no figures: status 1: no compiler" in shown


def test_tensors_are_found_in_whatever_holds_them():
    import torch

    found = tensors({"a": [torch.ones(1), 2], "b": {0: torch.zeros(2)}, "c": "text"})
    assert {name: value.tolist() for name, value in found.items()} == {".a.0": [1], ".b.0": [0, 0]}


def test_the_lists_of_parts_name_functions_that_are_there():
    import importlib

    for part in parts(TINY):
        module, _, function = part.function.partition(".")
        assert callable(getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function))
        assert Path(command.__file__).with_name(f"{module}.py").exists()


def test_the_gpu_is_named_and_holds_as_many_parts_as_fit_in_its_memory(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559 MiB, 550.54.15'\necho 'NVIDIA A10, 24 MiB, 1'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    facts = command.machine()
    assert (facts["gpu"], facts["driver"]) == ("H100 80GB HBM3", "550.54.15")
    assert command.default_jobs(facts, tiny=False) == 4  # of 16 GB each
    assert command.default_jobs(facts | {"gpu memory": "143771 MiB"}, tiny=False) == 6
    assert command.default_jobs(facts | {"gpu memory": "8192 MiB"}, tiny=False) == 1
