import csv
import http.server
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import types
from contextlib import contextmanager

import pytest

from dino.logger import CSVLogger, Loggers, TensorBoardLogger, WandbLogger

CONFIG = {
    "backbone": {"_target_": "dino.backbone.resnet.ResNet", "arch": "resnet18"},
    "dataset": {"train": {"_target_": "dino.dataset.imagenette.Imagenette"}},
}


def started(logger, directory, resume_id=None):
    logger.start(directory, CONFIG, resume_id)
    return logger


# --- CSV


def rows(directory):
    with (directory / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_csv_has_a_row_a_step(tmp_path):
    logger = started(CSVLogger(), tmp_path)
    for step in (1, 11, 21):
        logger.log({"loss": step / 8, "learning_rate": 1e-5}, step)
    logger.finish()
    assert (tmp_path / "metrics.csv").read_text().split() == [
        "step,loss,learning_rate",
        "1,0.125,1e-05",
        "11,1.375,1e-05",
        "21,2.625,1e-05",
    ]


def test_a_column_that_appears_later_is_empty_before(tmp_path):
    logger = started(CSVLogger(), tmp_path)
    logger.log({"loss": 3.0}, 1)
    logger.log({"loss": 2.0, "knn": 0.5}, 2)
    logger.log({"loss": 1.0}, 3)
    assert [(row["step"], row["loss"], row["knn"]) for row in rows(tmp_path)] == [
        ("1", "3.0", ""),
        ("2", "2.0", "0.5"),
        ("3", "1.0", ""),
    ]


def test_two_calls_for_one_step_make_one_row(tmp_path):
    logger = started(CSVLogger(), tmp_path)
    for step in (1, 2):
        logger.log({"loss": 9.0 - step}, step)
        logger.log({"epoch/loss": 7.5, "epoch/knn": step / 4}, step)
    logger.log({"loss": 5.0625}, 3)
    logger.log({"loss": 5.0}, 3)  # a shorter row in its place
    assert [(row["step"], row["loss"], row["epoch/knn"]) for row in rows(tmp_path)] == [
        ("1", "8.0", "0.25"),
        ("2", "7.0", "0.5"),
        ("3", "5.0", ""),
    ]


@pytest.mark.parametrize("tail", ["", "31,0.", "3"], ids=["whole rows", "cut in a value", "cut in the step"])
def test_a_resumed_csv_drops_the_rows_past_the_resumed_step(tmp_path, tail):
    killed = started(CSVLogger(), tmp_path)
    for step in (1, 11, 21):
        killed.log({"loss": float(step), "knn": 0.5}, step)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write(tail)
    resumed = started(CSVLogger(), tmp_path)
    for step in (11, 21, 31):
        resumed.log({"loss": -float(step)}, step)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [
        ("1", "1.0"),
        ("11", "-11.0"),
        ("21", "-21.0"),
        ("31", "-31.0"),
    ]
    assert rows(tmp_path)[0]["knn"] == "0.5"


def test_a_run_from_the_start_replaces_the_rows_of_one_that_died_before_its_first_checkpoint(tmp_path):
    dead = started(CSVLogger(), tmp_path)
    for step in (2, 4):
        dead.log({"loss": 1.0}, step)
    started(CSVLogger(), tmp_path).log({"loss": 2.0}, 1)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [("1", "2.0")]


# --- TensorBoard


def scalars(directory):
    """By TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    logger = started(TensorBoardLogger(), tmp_path)
    logger.log({"loss": 3.5}, 1)
    logger.log({"loss": 2.5, "epoch/knn": 0.5}, 11)
    assert scalars(tmp_path) == {"loss": [(1, 3.5), (11, 2.5)], "epoch/knn": [(11, 0.5)]}  # unfinished runs too
    logger.finish()
    assert scalars(tmp_path) == {"loss": [(1, 3.5), (11, 2.5)], "epoch/knn": [(11, 0.5)]}


def test_a_resumed_tensorboard_run_shows_each_step_once(tmp_path):
    killed = started(TensorBoardLogger(), tmp_path)
    for step in (1, 11, 21, 31):
        killed.log({"loss": float(step), "learning_rate": 0.5}, step)
    resumed = started(TensorBoardLogger(), tmp_path)
    for step in (21, 31, 41):
        resumed.log({"loss": -float(step)}, step)
    resumed.finish()
    killed.finish()
    shown = scalars(tmp_path)
    assert shown["loss"] == [(1, 1.0), (11, 11.0), (21, -21.0), (31, -31.0), (41, -41.0)]
    assert shown["learning_rate"] == [(1, 0.5), (11, 0.5)]


def test_a_logger_that_never_logged_finishes(tmp_path):
    started(TensorBoardLogger(), tmp_path).finish()
    started(CSVLogger(), tmp_path).finish()


# --- Weights & Biases


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    """No key anywhere, and nothing of W&B outside the test's folder."""
    for name in [name for name in os.environ if name.startswith(("WANDB", "KAGGLE"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def wandb_records(path):
    """The records of an offline run: LevelDB's log (blocks of 32 KiB; crc, length, type) around W&B's messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, part = path.read_bytes(), 7, b""  # 7 bytes name the format
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(part)
            yield record
            part = b""


def wandb_run(path):
    records = list(wandb_records(path))
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    history = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or item.nested_key[0]: float(item.value_json) for item in record.history.item}
            history.append({key: value for key, value in items.items() if key in ("_step", "loss", "epoch/knn")})
    return run, history


@pytest.mark.slow
def test_without_a_key_wandb_writes_an_offline_run_that_its_own_format_reads(tmp_path, no_account):
    directory = tmp_path / "backbone=resnet18,dataset=imagenette"
    directory.mkdir()
    loggers = Loggers([CSVLogger(), WandbLogger(project="toy", tags=["mine"])])
    loggers.start(directory, CONFIG, None)
    loggers.log({"loss": 3.5}, 1)
    loggers.log({"loss": 2.5}, 11)
    loggers.log({"epoch/knn": 0.5}, 11)
    run_id = loggers.run_id
    loggers.finish()

    (path,) = directory.glob("wandb/offline-run-*/*.wandb")
    run, history = wandb_run(path)
    assert (run.run_id, run.project, run.display_name) == (run_id, "toy", directory.name)
    assert sorted(run.tags) == ["imagenette", "mine", "resnet18"]
    assert history == [{"_step": 1, "loss": 3.5}, {"_step": 11, "loss": 2.5, "epoch/knn": 0.5}]
    config = {item.key: item.value_json for item in run.config.update}
    assert '"arch":"resnet18"' in config["backbone"].replace(" ", "")

    again = started(WandbLogger(project="toy"), directory, resume_id=run_id)
    again.log({"loss": 1.5}, 21)
    again.finish()
    paths = sorted(directory.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len(paths) == 2
    run, history = wandb_run(paths[1])
    assert (again.run_id, run.run_id) == (run_id, run_id)
    assert history == [{"_step": 21, "loss": 1.5}]


@pytest.fixture
def init(monkeypatch):
    """Stands in for wandb.init: the arguments it was given, for what needs an account or a network."""
    import wandb

    given = {}
    run = types.SimpleNamespace(id="abc", starting_step=12, logged=[])
    run.log = lambda metrics, step: run.logged.append(step)
    monkeypatch.setattr(wandb, "init", lambda **arguments: (given.update(arguments, run=run), run)[1])
    return given


@contextmanager
def a_server_that_knows_nothing(answer=404):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("content-length") or 0))
            self.send_error(answer)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_wandb_is_online_where_there_is_a_key_and_the_server_answers(tmp_path, no_account, init, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with a_server_that_knows_nothing() as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        started(WandbLogger(), tmp_path)
        assert init["mode"] == "offline"  # no key
        (tmp_path / "netrc").write_text(f"machine {url.removeprefix('http://')}\n  login user\n  password {'0' * 40}\n")
        started(WandbLogger(), tmp_path)
        assert init["mode"] == "online"  # `wandb login` writes that file
        (tmp_path / "netrc").unlink()
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        started(WandbLogger(), tmp_path)
        assert init["mode"] == "online"
    started(WandbLogger(), tmp_path)
    assert init["mode"] == "offline"  # the server is gone


def test_a_server_that_is_out_of_reach_costs_nothing_but_the_wait_and_the_run_is_kept_offline(
    tmp_path, no_account, monkeypatch
):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567")
    loggers = Loggers([WandbLogger()])
    loggers.start(tmp_path, CONFIG, None)
    loggers.log({"loss": 3.5}, 1)
    loggers.finish()
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert wandb_run(path)[1] == [{"_step": 1, "loss": 3.5}]


def test_a_wrong_key_is_one_warning_and_the_run_is_kept_offline(tmp_path, no_account, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567")
    loggers = Loggers([WandbLogger(), CSVLogger()])
    with a_server_that_knows_nothing(answer=401) as url, pytest.warns(UserWarning, match="401") as warned:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        loggers.start(tmp_path, CONFIG, None)
        loggers.log({"loss": 3.5}, 1)
        loggers.finish()
    assert len(warned) == 1
    assert [row["loss"] for row in rows(tmp_path)] == ["3.5"]
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert wandb_run(path)[1] == [{"_step": 1, "loss": 3.5}]


def test_an_explicit_mode_wins_and_wandbs_own_variable_wins_over_auto(tmp_path, no_account, init, monkeypatch):
    started(WandbLogger(mode="online"), tmp_path)
    assert init["mode"] == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    started(WandbLogger(), tmp_path)
    assert init["mode"] is None
    started(WandbLogger(mode="offline"), tmp_path)
    assert init["mode"] == "offline"


def test_the_key_is_taken_from_kaggles_secrets(tmp_path, no_account, init, monkeypatch):
    class UserSecretsClient:
        def get_secret(self, name):
            return {"WANDB_API_KEY": "1" * 40}[name]

    monkeypatch.setitem(sys.modules, "kaggle_secrets", types.SimpleNamespace(UserSecretsClient=UserSecretsClient))
    started(WandbLogger(mode="offline"), tmp_path)
    assert init["settings"].api_key == "1" * 40
    monkeypatch.setattr(UserSecretsClient, "get_secret", lambda self, name: {}[name])  # the notebook has no such secret
    started(WandbLogger(mode="offline"), tmp_path)
    assert init["settings"].api_key is None


def test_a_resumed_online_run_is_not_given_steps_that_wandb_already_has(tmp_path, no_account, init):
    logger = started(WandbLogger(mode="online"), tmp_path, resume_id="abc")
    assert (init["id"], init["resume"]) == ("abc", "allow")
    for step in (1, 11, 12, 21):
        logger.log({"loss": 1.0}, step)
    assert init["run"].logged == [12, 21]


@pytest.mark.parametrize(
    ("backbone", "tags"),
    [
        ({"_target_": "dino.backbone.vit_tiny.ViTTiny", "patch_size": 8}, ["imagenette", "patch8", "vit_tiny"]),
        ({"_target_": "dino.backbone.timm.Timm", "name": "convnext_tiny"}, ["convnext_tiny", "imagenette"]),
        ({"_target_": "torchvision.models.resnet18"}, ["imagenette", "resnet18"]),
    ],
)
def test_backbone_and_dataset_become_tags(tmp_path, no_account, init, backbone, tags):
    WandbLogger().start(tmp_path, {**CONFIG, "backbone": backbone}, None)
    assert init["tags"] == tags
    WandbLogger().start(tmp_path, {}, None)
    assert init["tags"] == []


# --- several at once


class Breaks:
    """Raises in the named method; notes every call."""

    run_id = None

    def __init__(self, method):
        self.method, self.calls = method, []

    def start(self, *_):
        self._call("start")

    def log(self, metrics, step):
        self._call("log")

    def finish(self):
        self._call("finish")

    def _call(self, method):
        self.calls.append(method)
        if method == self.method:
            raise OSError("the disk is full")


@pytest.mark.parametrize(
    ("method", "calls"),
    [("start", ["start"]), ("log", ["start", "log"]), ("finish", ["start", "log", "log", "finish"])],
)
def test_a_logger_that_fails_warns_once_and_the_others_go_on(tmp_path, method, calls):
    def run():
        loggers.start(tmp_path, CONFIG, None)
        loggers.log({"loss": 1.0}, 1)
        loggers.log({"loss": 2.0}, 2)
        loggers.finish()

    broken = Breaks(method)
    loggers = Loggers([broken, CSVLogger()])
    with pytest.warns(UserWarning) as warned:
        run()
    assert [str(warning.message) for warning in warned] == [
        "Breaks failed and is switched off; training goes on without it (OSError: the disk is full)."
    ]
    assert broken.calls == calls
    assert [row["loss"] for row in rows(tmp_path)] == ["1.0", "2.0"]


def test_an_interrupt_is_no_failure_of_a_logger(tmp_path):
    class Interrupted(Breaks):
        def _call(self, method):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Loggers([Interrupted("log")]).log({"loss": 1.0}, 1)


def test_no_loggers_do_nothing(tmp_path):
    loggers = Loggers([])
    loggers.start(tmp_path, CONFIG, "id")
    loggers.log({"loss": 1.0}, 1)
    loggers.finish()
    assert loggers.run_id is None
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_not_installed_costs_the_logger_not_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    loggers = Loggers([WandbLogger(), CSVLogger()])
    with pytest.warns(UserWarning, match=r"WandbLogger failed .*wandb"):
        loggers.start(tmp_path, CONFIG, None)
    loggers.log({"loss": 1.0}, 1)
    assert [row["loss"] for row in rows(tmp_path)] == ["1.0"]


KILLED = """
import os, pathlib, signal, sys
sys.path[:0] = {path!r}
from dino.logger import CSVLogger, Loggers, TensorBoardLogger
loggers = Loggers([CSVLogger(), TensorBoardLogger()])
loggers.start(pathlib.Path({directory!r}), {{}}, None)
for step in range(1, 30):
    loggers.log({{"loss": float(step)}}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_logged_before_a_kill_is_in_the_files(tmp_path):
    """A checkpoint may follow any log: its steps are not logged again."""
    program = KILLED.format(path=sys.path, directory=str(tmp_path))
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    expected = [(step, float(step)) for step in range(1, 30)]
    assert scalars(tmp_path)["loss"] == expected
    assert [(int(row["step"]), float(row["loss"])) for row in rows(tmp_path)] == expected
