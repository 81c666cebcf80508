"""One configuration in one directory: what is there already, and what goes on from it."""

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino.config.node import build_node
from dino.config.settings import Settings
from dino.history import History
from dino.loading.data import Data
from dino.logger import Loggers
from dino.run.checkpoint import newest_checkpoint
from dino.run.directory import claim
from dino.run.epochs import Epochs
from dino.run.learner import Learner
from dino.run.parts import Parts, assemble
from dino.run.stop import StopSignal
from dino.runtime.memory import smaller_batch_overrides
from dino.runtime.processes import all_gather_objects, barrier_refusals, place
from dino.runtime.refused import Refused

log = logging.getLogger(__name__)


@dataclass
class Run:
    """Settings and parts, and all that is kept of them in `directory`."""

    config: dict[str, Any]  # as composed: what config.yaml, checkpoints and the report show
    settings: Settings
    directory: Path
    parts: Parts
    epochs: Epochs
    history: History
    loggers: Loggers
    after_step: dict[str, Any] | None  # the saved state of those that act after a step; None at the first start
    rng: list[dict[str, Any]]  # the saved state of the generators, by rank

    @property
    def data(self) -> Data:
        return self.parts.data

    @property
    def learner(self) -> Learner:
        return self.parts.learner

    @classmethod
    def open(cls, config: dict[str, Any], directory: Path, state: dict[str, Any] | None, stop: StopSignal) -> "Run":
        """Builds the parts, claims the directory, and goes on from `state`, its newest checkpoint.

        Raises Refused, before anything is written, where a part can't be had or the state is of another run.
        """
        with barrier_refusals(), stop.at_once():
            parts = assemble(config)
        with barrier_refusals():
            _check_same(parts.data, state, directory)
        if parts.place.rank == 0:
            claim(directory, config)  # not before: a config that can't be had leaves nothing behind
        log.info("%s\ndirectory  %s", parts, directory)
        epochs = Epochs(state["iteration"] if state else 0, parts.data.total_steps, parts.data.steps_per_epoch)
        with barrier_refusals():
            history = _history(config, directory, state, epochs.total_steps)
        if state is not None:
            parts.learner.load_state_dict(state)
            log.info("resumed at step %d", epochs.start)
        loggers = Loggers(list(build_node(config["logger"] or {}).values()) if parts.place.rank == 0 else [])
        loggers.start(directory, config, None if state is None else state["wandb_run_id"])
        saved = state or {"after_step": None, "rng": []}
        settings = Settings.model_validate(config)
        return cls(config, settings, directory, parts, epochs, history, loggers, saved["after_step"], saved["rng"])

    def memory_advice(self) -> str:
        """What takes the memory of a step, and the overrides with which the same step takes less."""
        data, batching = self.data, self.data.batching
        sizes = Counter(getattr(data.transform, "sizes", ()))
        views = " and ".join(f"{number} views of {size} pixels" for size, number in sizes.items())
        model = sum(parameter.numel() for parameter in self.learner.student.parameters()) / 1e6
        derived = self.settings.training.effective_batch is not None
        return (
            f"at training.batch_size={batching.batch_size}, {views or f'{data.transform.ncrops} views'} an image, "
            f"{type(self.learner.student.backbone).__name__} of {model:.1f} M parameters with its head, "
            f"{self.parts.precision}; {smaller_batch_overrides(batching.batch_size, batching.accumulation, derived)}"
        )


def newest_of_all(directory: Path) -> dict[str, Any] | None:
    """The newest checkpoint. Raises Refused where the processes see different ones."""
    with barrier_refusals():
        state = newest_checkpoint(directory)
    if len({*all_gather_objects(state and state["iteration"])}) > 1:
        raise Refused(f"{directory}: not every process sees the same checkpoint; put it on a disk that all share.")
    return state


def _check_same(data: Data, state: dict[str, Any] | None, directory: Path) -> None:
    """Raises Refused where the processes, or this start of the run and the one before, do not train on the same."""
    identity, effective_batch = data.identity, data.batching.effective_batch
    if any(images != identity for images in all_gather_objects(identity)):
        raise Refused("not every process finds the same images; put them on a disk that all share, or copy them whole.")
    if state is not None and state["images"] != identity:
        before, now = state["images"]["number"], identity["number"]
        raise Refused(
            f"{directory} was trained on a list of {before:,} images, and now there is another, of {now:,}; "
            f"restore the files, or start anew with another name= and init_from={directory}. "
            + _changed(state.get("images_by_class", {}), data.images_by_class)
        )
    if state is not None and state["effective_batch"] != effective_batch:
        raise Refused(
            f"{directory} was trained with steps of {state['effective_batch']} images, and these settings and "
            f"processes make steps of {effective_batch}; give training.effective_batch={state['effective_batch']}."
        )


def _changed(before: dict[str, int], now: dict[str, int]) -> str:
    """What a run that finds other images than before is told of them."""
    other = [name for name in sorted(before.keys() | now.keys()) if before.get(name, 0) != now.get(name, 0)]
    if not other:
        return "Names or order are others." if before else ""
    listed = ", ".join(f"{name} had {before.get(name, 0):,}, now {now.get(name, 0):,}" for name in other[:5])
    return f"By class: {listed}{f', and {len(other) - 5:,} more' if len(other) > 5 else ''}."


def _history(config: dict[str, Any], directory: Path, state: dict[str, Any] | None, total_steps: int) -> History:
    """The history so far. Rank zero keeps it on disk; the others know its metadata."""
    if state is None or place().rank:
        history = History({"config": config})
        history.metadata |= {"total_steps": total_steps} if state is None else state["history"]["metadata"]
        return history
    try:
        return History.resume(directory / "history.json", state["history"], {"config": config})
    except (OSError, ValueError) as error:
        raise Refused(str(error)) from error
