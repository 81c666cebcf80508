"""What a run measured: every number of every logged step and epoch, in `history.json`, with its plots."""

import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat

from dino.history.file import HistoryFile, read, read_metadata
from dino.runtime.files import atomic_write

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

Level = Literal["iteration", "epoch"]
Metrics = Mapping[str, SupportsFloat | str]  # by name; NumPy's and torch's scalars are numbers too


class History:
    """Numbers by iteration (an optimizer step) and by epoch.

    `metadata` holds "created_at" (UTC) and whatever JSON can hold, such as "config"; "baselines", accuracies in [0, 1]
    by name, become dashed lines in the k-NN plot. Saved with every `save` and, but for the config, with `state_dict`.
    Non-finite numbers are null in the file (JSON has no NaN) and NaN again when read.
    """

    def __init__(self, metadata: Mapping[str, Any] | None = None) -> None:
        self.metadata: dict[str, Any] = {"created_at": _now(), **(metadata or {})}
        self._entries: dict[Level, list[dict[str, Any]]] = {"iteration": [], "epoch": []}
        self._file = HistoryFile()  # as last saved

    def record_iteration(self, iteration: int, metrics: Metrics) -> None:
        """Iterations must rise: a repeated one is a ValueError, so that a wrong resume shows at once."""
        last = self._entries["iteration"][-1]["iteration"] if self._entries["iteration"] else -math.inf
        if iteration <= last:
            raise ValueError(
                f"history: iterations must rise, got {iteration} after {last}. "
                "After a resume, start at the iteration that the checkpoint holds."
            )
        self._entries["iteration"].append({"iteration": iteration, "timestamp": _now(), **_plain(metrics)})

    def record_epoch(self, epoch: int, metrics: Metrics) -> None:
        """A second call for the last epoch adds to its entry; an earlier epoch is a ValueError."""
        epochs = self._entries["epoch"]
        if epochs and epoch < epochs[-1]["epoch"]:
            raise ValueError(
                f"history: epochs must not fall, got {epoch} after {epochs[-1]['epoch']}. "
                "After a resume, start at the epoch that the checkpoint holds."
            )
        if not epochs or epoch > epochs[-1]["epoch"]:
            epochs.append({"epoch": epoch})
        epochs[-1].update(timestamp=_now(), **_plain(metrics))

    def newest(self, level: Level) -> dict[str, Any]:
        """The last entry's metrics; {} where there is none yet."""
        entries = self._entries[level]
        return {} if not entries else {key: value for key, value in entries[-1].items() if key != "timestamp"}

    def get_iterations(self) -> list[int]:
        return [entry["iteration"] for entry in self._entries["iteration"]]

    def get_metric(self, name: str, level: Level = "iteration") -> list[Any]:
        """One value an entry, NaN where the entry has none: lines up with `get_iterations()` or the "epoch" metric."""
        entries = self._entries[level]
        known = {key for entry in entries for key in entry}
        if entries and name not in known:
            raise ValueError(f"history: no {level} has {name!r}; recorded are {', '.join(sorted(known))}.")
        return [entry.get(name, math.nan) for entry in entries]

    def to_dataframe(self, level: Level = "iteration") -> "pandas.DataFrame":
        """A row an entry, a column a metric; `timestamp` is a UTC time."""
        import pandas

        frame = pandas.DataFrame(self._entries[level])
        if "timestamp" in frame:
            frame["timestamp"] = pandas.to_datetime(frame["timestamp"], utc=True, format="ISO8601")
        return frame

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what is new since the last save to this path: what that costs does not grow with the run.

        The first save to a path replaces whatever stands there. A disk that is full leaves the last save (OSError).
        """
        self._file.write(Path(path), self._entries["iteration"], self._entries["epoch"], self.metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "History":
        """Reads a saved history whole; ValueError where the file is no complete one."""
        history = cls()
        history.metadata, history._entries["iteration"], history._entries["epoch"] = read(Path(path))
        return history

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: "metadata" (without the config), "offset" (bytes of the file that later saves never
        touch), "iterations" (entries in them) and "epoch_metrics". ValueError where an iteration is not saved yet.

        The file is on the disk when this returns, so that no checkpoint points past its end.
        """
        unsaved = len(self._entries["iteration"]) - self._file.iterations
        if unsaved:
            raise ValueError(f"history: {unsaved} iterations are not in the file; call save(path) before state_dict().")
        if self._file.path is not None:
            with self._file.path.open("rb") as file:
                os.fsync(file.fileno())
        return {
            "metadata": {key: value for key, value in self.metadata.items() if key != "config"},
            "offset": self._file.offset,
            "iterations": self._file.iterations,
            "epoch_metrics": [dict(entry) for entry in self._entries["epoch"]],
        }

    @classmethod
    def resume(
        cls, path: str | os.PathLike[str], state: dict[str, Any], metadata: Mapping[str, Any] | None = None
    ) -> "History":
        """The history as it was at `state_dict()`, whatever was written to the file since; the file is cut back to it.

        metadata: what the state does not have, such as the config. What `python -m dino.evaluate` wrote into the file
        since ("evaluations") stays.

        FileNotFoundError or ValueError where the file no longer holds the entries of that time.
        """
        path = Path(path)
        history = cls({**(metadata or {}), **state["metadata"]})
        if (evaluations := read_metadata(path).get("evaluations")) is not None:
            history.metadata["evaluations"] = evaluations
        history._entries["epoch"] = [dict(entry) for entry in state["epoch_metrics"]]
        if state["iterations"] == 0:
            return history
        history._file, history._entries["iteration"] = HistoryFile.cut_back(path, state["offset"], state["iterations"])
        history.save(path)  # a complete file again, before the first new entry
        return history

    def plot_loss(
        self, level: Level = "iteration", save_path: str | os.PathLike[str] | None = None
    ) -> "matplotlib.figure.Figure":
        """The loss, with loss / ln K at the right where `loss_over_ln_k` is recorded: at 1 the output is uniform."""
        return self.plot("loss", level=level, save_path=save_path)

    def plot_learning_rate(
        self, level: Level = "iteration", save_path: str | os.PathLike[str] | None = None
    ) -> "matplotlib.figure.Figure":
        return self.plot("learning_rate", level=level, save_path=save_path)

    def plot_momentum(
        self, level: Level = "iteration", save_path: str | os.PathLike[str] | None = None
    ) -> "matplotlib.figure.Figure":
        """The teacher's momentum, lambda in Algorithm 1."""
        return self.plot("momentum", level=level, save_path=save_path)

    def plot(
        self, *names: str, level: Level = "iteration", save_path: str | os.PathLike[str] | None = None
    ) -> "matplotlib.figure.Figure":
        """Any recorded metrics in one frame."""
        return self._figure([names], level, save_path)

    def plot_all(
        self, level: Level = "iteration", save_path: str | os.PathLike[str] | None = None
    ) -> "matplotlib.figure.Figure":
        """Everything recorded, a frame each, as one figure; saved in the file `save_path`, as its suffix says (png)."""
        from dino.history.plot import panels

        names = {
            name: None for entry in self._entries[level] for name, value in entry.items() if not isinstance(value, str)
        }
        return self._figure(panels(list(names)), level, save_path)

    def _figure(
        self, panels: list[tuple[str, ...]], level: Level, save_path: str | os.PathLike[str] | None
    ) -> "matplotlib.figure.Figure":
        from dino.history.plot import draw

        if not self._entries[level] or not panels:
            raise ValueError(f"history: nothing to plot, no {level} is recorded yet.")
        columns = {
            name: self.get_metric(name, level) for name in {level, *(name for names in panels for name in names)}
        }
        figure = draw(panels, columns, level, self.metadata.get("baselines", {}), self._ln_k())
        if save_path is not None:
            save_path = Path(save_path)
            save_path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(save_path) as partial:
                figure.savefig(partial, dpi=120, format=save_path.suffix[1:] or "png")
        return figure

    def _ln_k(self) -> float | None:
        """From any iteration that has both; the epochs' losses are of the same K."""
        for entry in self._entries["iteration"]:
            loss, relative = (entry.get(name, math.nan) for name in ("loss", "loss_over_ln_k"))
            if math.isfinite(loss) and math.isfinite(relative) and relative > 0:
                return float(loss / relative)
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _plain(values: Metrics) -> dict[str, Any]:
    """NumPy's and torch's scalars as Python's."""
    return {name: value if isinstance(value, int | str) else float(value) for name, value in values.items()}
