import json
import math
import re
import subprocess
import sys

import pandas
import pytest
from test_directory import HOLD

from dino.compare import compare, main
from dino.history import History
from dino.history.plot import draw_runs
from dino.run.directory import claim

CONFIG = {
    "seed": 0,
    "device": "cpu",
    "training": {"epochs": 3, "num_workers": 0},
    "backbone": {"_target_": "dino.backbone.vit_tiny.ViTTiny", "depth": 4},
    "head": {"output_dim": 64},
    "dataset": {"train": {"_target_": "dino.dataset.textures.Textures", "images": 96}, "epochs": 3, "out_dim": 64},
    "loss": {"_target_": "dino.loss.DinoLoss", "out_dim": 64},
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3, "betas": [0.9, 0.999]},
}


def config(**changes):
    """CONFIG with values at dotted keys, written a__b."""
    changed = json.loads(json.dumps(CONFIG))
    for key, value in changes.items():
        node = changed
        *path, last = key.split("__")
        for part in path:
            node = node[part]
        node[last] = value
    return changed


def begin(directory, settings, losses=(), knn=(), total_steps=40, saved=None):
    """What a run leaves: a loss every ten steps, a k-NN after each, a checkpoint (of no content) at step `saved`."""
    directory.mkdir(parents=True)
    claim(directory, settings)
    history = History({"config": settings})
    history.metadata["total_steps"] = total_steps
    for i, loss in enumerate(losses, start=1):
        history.record_iteration(
            10 * i,
            {
                "loss": loss,
                "learning_rate": 1e-3,
                "momentum": 0.99,
                "loss_over_ln_k": loss / 4,
                "teacher_entropy": 0.5,
                "images_per_second": 100.0 * i,
            },
        )
    for i, accuracy in enumerate(knn, start=1):
        history.record_epoch(i, {"iteration": 10 * i, "knn": accuracy})
    history.save(directory / "history.json")
    if saved is not None:
        (directory / "checkpoints").mkdir()
        (directory / "checkpoints" / f"step_{saved:09d}.pt").touch()
    return directory


@pytest.fixture
def sweep(tmp_path):
    """Three learning rates: finished, better and finished, died without a k-NN; a fourth is planned."""
    sweep = tmp_path / "outputs" / "lr"
    begin(sweep / "lr=0.001", config(), [4.0, 3.0, 2.0, 1.0], [0.2, 0.5, 0.4, 0.3], saved=40)
    begin(sweep / "lr=0.01", config(optimizer__lr=0.01), [4.0, 4.0, 2.0, 2.0], [0.2, 0.6, 0.7, 0.8], saved=40)
    begin(sweep / "lr=10", config(optimizer__lr=10.0), [4.0, 5.0], saved=20)
    runs = {"lr=0.001": ["optimizer.lr=0.001"], "lr=100": ["optimizer.lr=100.0", "name=lr"]}
    (sweep / "sweep.json").write_text(json.dumps({"runs": runs}))
    return sweep


def rows(table):
    """Cells of the table's lines, by two spaces or more."""
    return [re.split(r"\s{2,}", line.strip()) for line in table.splitlines() if not line.startswith("---")]


def test_the_table_has_a_row_a_run_the_best_first_under_what_differs(sweep):
    header, *lines = rows(compare([sweep], width=160))
    assert header == ["lr", "best k-NN", "last", "loss", "/ ln K", "entropy", "img/s", "state"]
    assert lines[0] == ["0.01", "80.0 %", "80.0 %", "3.000", "0.750", "0.500", "250", "finished"]
    assert lines[1] == ["0.001", "50.0 %", "30.0 %", "2.500", "0.625", "0.500", "250", "finished"]
    assert lines[2] == ["10", "4.500", "1.125", "0.500", "150", "died at step 20"]
    assert lines[3] == ["100", "not started"]
    assert lines[4] == [f"in {sweep / 'compare.csv'} and {sweep / 'compare.png'}"]
    assert len(lines) == 5


def test_the_csv_has_the_numbers_in_full(sweep):
    compare([sweep])
    frame = pandas.read_csv(sweep / "compare.csv")
    assert frame["run"].tolist() == [str(sweep / name) for name in ("lr=0.01", "lr=0.001", "lr=10", "lr=100")]
    assert frame["optimizer.lr"].tolist() == [0.01, 0.001, 10.0, 100.0]
    assert (
        frame["best_knn"].tolist()[:2] == [0.8, 0.5] and frame["best_knn"].isna().tolist() == [False] * 2 + [True] * 2
    )
    assert frame["last_knn"].tolist()[:2] == [0.8, 0.3]
    assert frame["loss_over_ln_k"].tolist()[:3] == [0.75, 0.625, 1.125]
    assert frame["state"].tolist() == ["finished", "finished", "died", "not started"]
    assert frame["step"].tolist() == [40, 40, 20, 0]
    assert frame["total_steps"].tolist()[:3] == [40, 40, 40]


def test_the_loss_is_a_mean_of_the_last_ten_recorded_steps(tmp_path):
    begin(tmp_path / "a", config(), [100.0, *map(float, range(1, 11))])
    _, line, *_ = rows(compare([tmp_path]))
    assert line[:2] == ["a", "5.500"]  # (1 + ... + 10) / 10; with the 100 it would be 14.1


def test_a_run_that_a_process_holds_is_running(sweep):
    hold = [sys.executable, "-c", HOLD, sweep / "lr=10"]
    with subprocess.Popen(hold, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        table = compare([sweep])
        holder.kill()
    assert rows(table)[3][-1] == "running, 20 of 40"
    assert rows(compare([sweep]))[3][-1] == "died at step 20"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"metadata": 1, "iteration_metrics": 5, "epoch_metrics": {"a": 1}}'],
)
def test_a_broken_history_is_named_and_the_others_are_shown(sweep, content):
    (sweep / "lr=0.01" / "history.json").write_bytes(content)
    table = compare([sweep])
    assert rows(table)[1][:2] == ["0.001", "50.0 %"]
    assert f"{sweep / 'lr=0.01'}: history.json cannot be read" in table
    assert ["0.01", "died at step 40"] in rows(table)  # nothing says that step 40 is the last


def test_a_history_that_is_gone_is_named(sweep):
    (sweep / "lr=0.01" / "history.json").unlink()
    assert f"{sweep / 'lr=0.01'}: history.json is not there." in compare([sweep])


def test_a_broken_config_is_named_and_its_run_known_by_its_directory(sweep):
    (sweep / "lr=0.01" / "config.yaml").write_text("{")
    table = compare([sweep])
    assert f"{sweep / 'lr=0.01'}: config.yaml cannot be read" in table
    assert rows(table)[0][:2] == ["run", "lr"]
    assert rows(table)[1][:2] == ["lr=0.01", "80.0 %"]


def test_one_run_by_its_own_directory(sweep):
    header, line, *_ = rows(compare([sweep / "lr=0.01"]))
    assert header[0] == "run"
    assert line[:2] == ["lr=0.01", "80.0 %"]
    assert (sweep / "lr=0.01" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_several_directories_end_in_one_table_in_the_directory_that_holds_them(sweep):
    other = begin(sweep.parent / "seed=1", config(seed=1), [3.0], [0.9], saved=40)
    table = compare([sweep, other])
    assert [line[:3] for line in rows(table)[:3]] == [
        ["seed", "lr", "best k-NN"],
        ["1", "0.001", "90.0 %"],
        ["0", "0.01", "80.0 %"],
    ]
    assert (sweep.parent / "compare.csv").is_file()
    assert [line[:2] for line in rows(compare([sweep.parent]))[1:3]] == [["1", "0.001"], ["0", "0.01"]]


def header_of(tmp_path, *configs):
    """The columns of settings that a table of such runs has, and their cells."""
    for number, settings in enumerate(configs):
        begin(tmp_path / f"run{number}", settings, [3.0], [0.9 - number / 10])
    header, *lines = rows(compare([tmp_path], width=160))
    count = header.index("best k-NN")
    return header[:count], [line[:count] for line in lines[: len(configs)]]


def test_a_setting_that_others_read_is_shown_once_under_the_data_sets_name(tmp_path):
    larger = config(head__output_dim=128, dataset__out_dim=128, loss__out_dim=128)
    assert header_of(tmp_path, config(), larger) == (["dataset.out_dim"], [["64"], ["128"]])
    assert {"dataset.out_dim", "loss.out_dim"} <= set(pandas.read_csv(tmp_path / "compare.csv").columns)


def test_another_class_is_shown_by_its_name_not_by_each_of_its_keys(tmp_path):
    resnet = config(backbone={"_target_": "dino.backbone.resnet.ResNet", "arch": "resnet18"})
    deeper = config(backbone__depth=8)
    columns, cells = header_of(tmp_path, config(), resnet)
    assert (columns, cells) == (["backbone"], [["ViTTiny"], ["ResNet"]])
    columns, cells = header_of(tmp_path / "more", config(), resnet, deeper)  # and what differs within a class
    assert columns == ["backbone", "depth"]
    assert cells == [["ViTTiny", "4"], ["ResNet", "unset"], ["ViTTiny", "8"]]


def test_keys_that_change_no_result_count_only_where_nothing_else_differs(tmp_path):
    assert header_of(tmp_path / "a", config(), config(device="cuda", seed=1))[0] == ["seed"]
    assert header_of(tmp_path / "b", config(), config(device="cuda"))[0] == ["device"]
    assert header_of(tmp_path / "c", config(), config()) == (["run"], [["run0"], ["run1"]])


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_fits_the_terminal_and_says_what_it_leaves_out(tmp_path, width):
    for number in range(3):
        settings = config(seed=number, optimizer__lr=0.1 / (number + 3), init_from="/a/long/path/" * 8 + str(number))
        begin(tmp_path / str(number), settings, [3.0], [0.5], saved=12)
    table = compare([tmp_path], width=width)
    assert max(map(len, table.splitlines()[:5])) <= width
    assert ("left out for want of width: img/s" in table) == (width == 80)
    assert "0.03333" in table and "0.02" in table


def test_more_settings_than_a_table_can_show_give_way_to_the_names_of_the_runs(tmp_path):
    many = {f"key{i}": i for i in range(9)}
    columns, cells = header_of(tmp_path, config(), {**config(), **many})
    assert (columns, cells) == (["run"], [["run0"], ["run1"]])
    assert "9 settings differ; compare.csv has them." in compare([tmp_path])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["runs=nowhere"], "nowhere: there is no such directory"),
        (["runs=[.,nowhere]"], ".: there are no runs in it"),
        (["runs=."], ".: there are no runs in it"),
        ([], "runs=null: expected the directory of a sweep or a run"),
        (["runs=[]"], "runs=[]: expected the directory of a sweep or a run"),
        (["outputs/x"], "outputs/x: expected key=value; write runs=outputs/x."),
        (["+run=a", "runs=a"], "run: there is no such key; did you mean runs?"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr()
    assert (stopped.value.code, said.out, len(said.err.splitlines())) == (2, "", 1)
    assert said.err.startswith(sentence)


def test_a_disk_that_takes_no_files_still_shows_the_table(sweep, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pandas.DataFrame, "to_csv", full)
    table = compare([sweep])
    assert rows(table)[1][0] == "0.01"
    assert "not written: [Errno 28] No space left on device" in table


def test_it_loads_no_torch(sweep):
    program = "import sys; from dino.compare import main; main(); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program, f"runs={sweep}"], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "False"


# ---- the plot -------------------------------------------------------------------------------------------------------


def test_curves_are_laid_over_each_other_and_the_best_knn_stands_over_each_value():
    curves = {
        "knn": [([10, 20], [0.2, 0.4]), ([10, 20], [0.3, math.nan]), ([], [])],
        "loss_over_ln_k": [([1, 2], [1.0, 0.9]), ([1], [1.1]), ([], [])],
    }
    settings = {"lr": [1e-4, 1e-2, ""], "depth": [4, 4, 6], "backbone": ["ViT", "ResNet", "ViT"]}
    figure = draw_runs(["a", "b", "c"], curves, settings, [0.4, 0.3, math.nan])
    knn, loss, lr, depth, backbone = figure.axes
    by_label = {line.get_label(): line.get_xydata().tolist() for line in knn.get_lines()}
    assert by_label == {"a": [[10, 0.2], [20, 0.4]], "b": [[10, 0.3]], "c": []}
    assert {line.get_label() for line in loss.get_lines()} == {"a", "b", "c"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]
    points = [axes.collections[0].get_offsets().tolist() for axes in (lr, depth, backbone)]
    assert points == [[[1e-4, 0.4], [1e-2, 0.3]], [[4, 0.4], [4, 0.3]], [[0, 0.4], [1, 0.3]]]
    assert [axes.get_xscale() for axes in (lr, depth, backbone)] == ["log", "linear", "linear"]
    assert [text.get_text() for text in backbone.get_xticklabels()] == ["ViT", "ResNet"]
    assert depth.get_lines()[0].get_ydata() == pytest.approx([0.35])  # the mean of both
    assert knn.get_lines()[-1].get_color() == "C0"  # drawn last, on top


def test_of_many_runs_the_first_have_colours_and_names_and_the_rest_are_grey():
    runs = [([1, 2], [i / 100, i / 50]) for i in range(30)]
    figure = draw_runs([f"run {i}" for i in range(30)], {"knn": runs}, {"seed": list(range(30))}, [0.5] * 30)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"run {i}" for i in range(10)]
    assert figure.legends[0].get_title().get_text() == "first 10 of 30"
    assert sum(line.get_color() == "0.8" for line in figure.axes[0].get_lines()) == 20


def test_a_long_curve_is_drawn_as_means_of_a_fiftieth():
    steps, values = list(range(1000)), [float(i % 20) for i in range(1000)]
    figure = draw_runs(["a"], {"loss_over_ln_k": [(steps, values)]}, {}, [math.nan])
    (line,) = figure.axes[0].get_lines()
    assert line.get_ydata() == pytest.approx([9.5] * 981)  # any twenty in a row
    assert line.get_xdata()[0] == 19
