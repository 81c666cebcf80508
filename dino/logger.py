"""Where a run's numbers go beside its history: CSV, TensorBoard, Weights & Biases, or several at once."""

import csv
import functools
import importlib
import io
import netrc
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from dino.runtime.files import atomic_write
from dino.runtime.refused import one_line

FINISH = 300.0  # seconds to send the end of a run to W&B


class Logger(Protocol):
    """`start` once, `log` with steps that never fall, `finish` once.

    A run that resumes gives `log` steps that the killed run has logged already: those replace, nothing is logged twice.
    `run_id`: what finds the run again at its service, None where there is none; `resume_id` is an earlier run's.
    """

    run_id: str | None

    def start(self, directory: Path, config: dict[str, Any], resume_id: str | None) -> None: ...
    def log(self, metrics: dict[str, float], step: int) -> None: ...
    def finish(self) -> None: ...


class Loggers:
    """Several loggers as one. One that fails warns once and is dropped: no logger is worth a training run."""

    def __init__(self, loggers: list[Any]) -> None:
        self.loggers: list[Logger] = list(loggers)

    @property
    def run_id(self) -> str | None:
        return next((logger.run_id for logger in self.loggers if logger.run_id is not None), None)

    def start(self, directory: Path, config: dict[str, Any], resume_id: str | None) -> None:
        self._each(lambda logger: logger.start(directory, config, resume_id))

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._each(lambda logger: logger.log(metrics, step))

    def finish(self) -> None:
        self._each(lambda logger: logger.finish())

    def _each(self, call: Callable[[Logger], None]) -> None:
        for logger in list(self.loggers):
            try:
                call(logger)
            except Exception as error:  # other people's code may raise anything
                self.loggers.remove(logger)
                warnings.warn(
                    f"{type(logger).__name__} failed and is switched off; training goes on without it "
                    f"({type(error).__name__}: {error}).",
                    stacklevel=3,
                )


class CSVLogger:
    """`metrics.csv`: a row a step, a column a metric; a column that appears later is empty in the rows before."""

    run_id: str | None = None

    def start(self, directory: Path, config: dict[str, Any], resume_id: str | None) -> None:
        self.path = directory / "metrics.csv"
        self.columns: list[str] | None = None  # unread until the first step is known
        self.last: dict[str, Any] = {}
        self.last_at = 0  # byte at which the last row begins

    def log(self, metrics: dict[str, float], step: int) -> None:
        if self.columns is None:
            self._take_up(step)
        columns = self.columns or ["step"]
        # Two calls for one step (its own numbers, then those of the epoch that it ends) make one row.
        same_step = self.last.get("step") == str(step)
        row = {**(self.last if same_step else {}), "step": str(step), **metrics}
        missing = [name for name in row if name not in columns]
        if missing:
            rows = self._rows()
            self._rewrite(columns + missing, [*(rows[:-1] if same_step else rows), row])
            return
        try:
            with self.path.open("r+", newline="", encoding="utf-8") as file:
                self.last_at = file.seek(self.last_at) if same_step else file.seek(0, io.SEEK_END)
                csv.DictWriter(file, columns).writerow(row)
                file.truncate()
        except OSError:
            os.truncate(self.path, self.last_at)  # no half row
            raise
        self.last = row

    def finish(self) -> None:
        pass  # every row is in the file already

    def _take_up(self, step: int) -> None:
        """Rows past `step` are of a killed run that got further than its checkpoint; this one writes them again."""
        rows = [row for row in self._rows() if int(row["step"]) <= step]
        self._rewrite(list(dict.fromkeys(["step", *(name for row in rows for name in row)])), rows)

    def _rows(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        text = self.path.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]  # a kill may have cut the last row short
        return list(csv.DictReader(io.StringIO(complete)))

    def _rewrite(self, columns: list[str], rows: list[dict[str, Any]]) -> None:
        with atomic_write(self.path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for row in rows:
                file.flush()
                self.last_at = file.tell()
                writer.writerow(row)
        self.columns, self.last = columns, rows[-1] if rows else {}


class TensorBoardLogger:
    """Event files in `tensorboard/`: `tensorboard --logdir outputs` compares all runs."""

    run_id: str | None = None

    def start(self, directory: Path, config: dict[str, Any], resume_id: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Opened at the first step, since TensorBoard must be told from which one on to forget those of a killed run.
        self.open = functools.partial(SummaryWriter, str(directory / "tensorboard"))
        self.writer: Any = None
        self.hook = threading.excepthook
        threading.excepthook = self._shown

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.writer = self.writer or self.open(purge_step=step)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a checkpoint may follow: its steps will not be logged again

    def finish(self) -> None:
        threading.excepthook = self.hook
        if self.writer is not None:
            self.writer.close()

    def _shown(self, arguments: threading.ExceptHookArgs) -> None:
        """What a thread of TensorBoard's fails with its next flush raises: a traceback of it is no news."""
        if not type(arguments.thread).__module__.startswith("tensorboard."):
            self.hook(arguments)


class WandbLogger:
    """Weights & Biases. `mode`: online, offline, disabled, or auto: online where a key is found and the server answers.

    The key comes from the environment, from netrc (`wandb login`), or from Kaggle's secret WANDB_API_KEY. Offline runs
    lie in `wandb/` in the run's directory; `wandb sync` sends them later. Backbone and dataset become tags.
    """

    def __init__(
        self,
        project: str = "dino",
        mode: Literal["auto", "online", "offline", "disabled"] = "auto",
        entity: str | None = None,
        tags: list[str] | None = None,
    ) -> None:
        self.project, self.mode, self.entity, self.tags = project, mode, entity, tags or []
        self.run_id: str | None = None

    def start(self, directory: Path, config: dict[str, Any], resume_id: str | None) -> None:
        import wandb

        key = _kaggle_key()
        init = functools.partial(
            wandb.init,
            project=self.project,
            entity=self.entity,
            name=directory.name,
            dir=str(directory),
            config=config,
            tags=sorted({*self.tags, *_tags(config)}),
            id=resume_id,
            resume="allow",
            # Without a timeout W&B tries for ever to send the end of a run, and the program would not end.
            settings=wandb.Settings(finish_timeout=FINISH, **({"api_key": key} if key else {})),
        )
        try:
            self.run = init(mode=_mode(key) if self.mode == "auto" else self.mode)
        except Exception as error:  # a wrong key, a server out of reach: what is raised has no common class
            warnings.warn(
                "W&B refuses the key or cannot be reached; the run is written offline, and `wandb sync` sends it "
                f"({type(error).__name__}: {one_line(error)}).",
                stacklevel=2,
            )
            self.run = init(mode="offline")
        self.run_id = self.run.id

    def log(self, metrics: dict[str, float], step: int) -> None:
        if step >= self.run.starting_step:  # a resumed run: W&B has the earlier steps, and takes none twice
            self.run.log(metrics, step=step)

    def finish(self) -> None:
        import wandb

        self.run.finish()
        wandb.teardown()  # else the run's file may be unwritten still (seen in 0.31: offline, and after FINISH)


def _tags(config: dict[str, Any]) -> list[str]:
    """resnet18, vit and patch16, imagenette: what a list of runs is filtered by."""
    backbone, data = config.get("backbone") or {}, (config.get("dataset") or {}).get("train") or {}
    tags = [backbone.get("arch") or backbone.get("name") or _module(backbone), _module(data)]
    if "patch_size" in backbone:
        tags.append(f"patch{backbone['patch_size']}")
    return [tag[:64] for tag in tags if tag]  # W&B refuses longer ones


def _module(node: dict[str, Any]) -> str:
    """`dino.dataset.imagenette.Imagenette` -> imagenette; other people's classes by their own name."""
    target = str(node.get("_target_", "")).split(".")
    return target[-2] if target[0] == "dino" else target[-1]


def _mode(kaggle_key: str | None) -> Literal["online", "offline"] | None:
    if os.environ.get("WANDB_MODE"):
        return None  # W&B reads it itself
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return "online" if (kaggle_key or _has_key(url)) and _answers(url) else "offline"


def _has_key(url: str) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(urllib.parse.urlsplit(url).netloc) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _kaggle_key() -> str | None:
    """Kaggle hands its secrets to a notebook through a module that exists nowhere else."""
    if os.environ.get("WANDB_API_KEY"):
        return None
    try:
        return str(importlib.import_module("kaggle_secrets").UserSecretsClient().get_secret("WANDB_API_KEY"))
    except Exception:  # no Kaggle, no internet, no such secret: its errors have no common class
        return None


def _answers(url: str, seconds: float = 3.0) -> bool:
    """Any answer will do, an error's too; urllib goes through the proxies of the environment, as W&B does."""
    try:
        urllib.request.urlopen(url, timeout=seconds).close()
    except urllib.error.HTTPError as error:
        error.close()
    except OSError:
        return False
    return True
