"""Trains DINO: `python -m dino.train [group=option ...] [key=value ...]`; the same command again resumes."""

import contextlib
import logging
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dino.config import command
from dino.config.node import build_node
from dino.loss.dino import DinoLoss
from dino.model import DinoModel, update_teacher_EMA
from dino.optimizer import clip_gradients
from dino.runtime.device import choose_device, peak_memory
from dino.runtime.processes import all_gather_objects, barrier_refusals, place, processes
from dino.runtime.refused import Refused
from dino.runtime.sharding import data_parallel, no_sync
from dino.scheduler import Schedule

if TYPE_CHECKING:
    from dino.run.journal import Journal, StopSignal

log = logging.getLogger("dino.train")  # not __name__: that is __main__ under `python -m`


def train(
    student: nn.Module,
    teacher: DinoModel,
    loss: DinoLoss,
    steps: Iterable[tuple[int, Iterable[list[Tensor]]]],
    optimizer: Optimizer,
    schedule: Schedule,
    *,
    accumulation: int = 1,
    max_norm: float = math.inf,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    scaler: torch.amp.GradScaler | None = None,
    after_step: Callable[..., None] = lambda *_: None,
) -> None:
    """Algorithm 1 of the paper (arXiv 2104.14294); `steps` yields (step, its parts, each a list of views)."""
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    for step, parts in steps:
        now = schedule(step)  # every scheduled value, from the step alone
        now.apply(optimizer)
        total, teacher_means = torch.zeros((), device=loss.center.device), []
        for part, views in enumerate(parts, start=1):  # one, unless accumulating
            with autocast(), torch.no_grad():
                features, teacher_out = teacher(views[: loss.n_global_crops], return_backbone_features=True)  # t1, t2
            with no_sync(student) if part < accumulation else nullcontext():
                with autocast():
                    student_out = student(views, factored=True)  # s1, s2 and the local views, before the last product
                value = loss(student_out, teacher_out, teacher_temp=now.teacher_temp, move_center=False) / accumulation
                scaler.scale(value).backward()
            total = total + value.detach()
            teacher_means.append(teacher_out.mean(dim=0, dtype=loss.center.dtype))
        scaler.unscale_(optimizer)
        gradient_norm = clip_gradients(student.parameters(), max_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        update_teacher_EMA(student, teacher, now.momentum)
        loss.update_center(torch.stack(teacher_means))  # C, once a step and last
        after_step(step, now, total, gradient_norm, teacher_out, student_out, features)


def run(config: dict[str, Any], directory: Path) -> float:
    """Trains what `config` says in `directory`, from where that stands; returns the last k-NN accuracy (NaN: none).

    In each of the processes that torchrun or SLURM started; the first alone writes.
    """
    from dino.run.checkpoint import newest_checkpoint
    from dino.run.directory import check_claim, full_disk_in_a_sentence, lock
    from dino.run.journal import StopSignal
    from dino.run.log_file import log_to
    from dino.runtime import memory

    first = place().rank == 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(processes(choose_device(config["device"])))
        with barrier_refusals():
            if first:
                stack.enter_context(lock(directory))
                check_claim(directory, config)
        stop = stack.enter_context(StopSignal())
        stack.enter_context(log_to(directory / "train.log", first))
        stack.enter_context(full_disk_in_a_sentence(directory))
        stack.enter_context(
            memory.oom_advice("outside of the steps; a smaller backbone or dataset.cache=none takes less.")
        )
        with barrier_refusals():
            state = newest_checkpoint(directory)
        if len({*all_gather_objects(state and state["iteration"])}) > 1:
            raise Refused(f"{directory}: not every process sees the same checkpoint; put it on a disk that all share.")
        if state is not None and state["iteration"] >= state["total_steps"]:
            log.info("%s is finished; change a setting, or give another name=, to train anew", directory)
            return float(state["journal"]["last_knn"])
        return _go_on(config, directory, state, stop)


def _go_on(config: dict[str, Any], directory: Path, state: dict[str, Any] | None, stop: "StopSignal") -> float:
    from dino.loading.broken import LIST
    from dino.logger import Loggers
    from dino.run.checkpoint import restore
    from dino.run.directory import claim
    from dino.run.run import assemble
    from dino.runtime import memory
    from dino.runtime.rng import set_rng_state

    started = time.monotonic()
    with barrier_refusals(), stop.at_once():
        run = assemble(config)
    with barrier_refusals():
        _check_same(run, state, directory)
    first, start = run.rank == 0, 0 if state is None else state["iteration"]
    if first:
        claim(directory, config)  # not before: a config that can't be had leaves nothing behind
    log.info("%s\ndirectory  %s", run, directory)
    with barrier_refusals():
        history = _history(run, config, directory, state)
    if state is not None:
        restore(state, run.student, run.teacher, run.optimizer, run.loss)
        if state["scaler_state_dict"]:  # a scaler that was off saved nothing
            run.scaler.load_state_dict(state["scaler_state_dict"])
        log.info("resumed at step %d", start)
    loggers = Loggers(list(build_node(config["logger"] or {}).values()) if first else [])
    loggers.start(directory, config, None if state is None else state["wandb_run_id"])
    steps = run.steps(start)
    journal = _journal(run, config, directory, state, history, loggers, steps, stop)
    if config["compile"]:
        run.student.compile()
        run.teacher.compile()
        run.transform.compile()
    student = data_parallel(run.student, run.accumulation)
    if state is not None and run.rank < len(state["rng"]):
        set_rng_state(state["rng"][run.rank])
    try:
        journal.end_interrupted_epoch()
        with memory.oom_advice(_what_takes_it(run, config)):
            train(
                student,
                run.teacher,
                run.loss,
                steps,
                run.optimizer,
                run.schedule,
                accumulation=run.accumulation,
                max_norm=float(config["training"]["gradient_clip"] or math.inf),
                autocast=run.autocast,
                scaler=run.scaler,
                after_step=journal,
            )
    finally:
        journal.close()
        loggers.finish()
    if run.broken:
        log.warning("%d images could not be read and were passed over; see %s", len(run.broken), directory / LIST)
    log.info(
        "done in %.0f s, with %.1f GB of memory at most: teacher in %s, report in %s",
        time.monotonic() - started,
        peak_memory(run.device) / 1e9,
        directory / "teacher.safetensors",
        directory / "report.html",
    )
    return float(journal.state["last_knn"])


def _journal(
    run: Any,
    config: dict[str, Any],
    directory: Path,
    state: dict[str, Any] | None,
    history: Any,
    loggers: Any,
    steps: Any,
    stop: "StopSignal",
) -> "Journal":
    """What is done between two steps, with all that it keeps."""
    from dino.run.checkpoint import FOLDER
    from dino.run.finite import Finite
    from dino.run.journal import Journal
    from dino.run.monitor import Monitor

    start = 0 if state is None else state["iteration"]
    return Journal(
        directory=directory,
        history=history,
        loggers=loggers,
        monitor=Monitor(run.student, run.loss, quiet_steps=run.schedule.warmup_steps),
        evaluate=_evaluator(run, history),
        report=_reporter(run, config, directory, history),
        checkpoint=_checkpointer(run, config, directory, history, loggers, start),
        stop=stop,
        broken=run.broken,
        images=len(run.train_set) + len(run.val_set),
        finite=Finite(
            directory / FOLDER,
            lambda step: [_named(run.train_set, index) for index in steps.sampler.of_step(step - 1)],
            skip=config["training"]["skip_nonfinite_steps"],
            scaled=run.precision == "fp16",
        ),
        start=start,
        total_steps=run.total_steps,
        steps_per_epoch=run.steps_per_epoch,
        effective_batch=run.effective_batch,
        log_every_steps=config["log_every_steps"],
        evaluate_every_epochs=config["evaluate_every_epochs"],
        checkpoint_every_epochs=config["checkpoint"]["every_epochs"],
        checkpoint_every_minutes=float(config["checkpoint"]["every_minutes"]),
        state=state and state["journal"],
        writes=run.rank == 0,
    )


def _what_takes_it(run: Any, config: dict[str, Any]) -> str:
    """Of the memory of a step: what takes it, and the settings with which the same step takes less."""
    from dino.runtime.memory import smaller_batch_overrides

    sizes = Counter(getattr(run.transform, "sizes", ()))
    views = " and ".join(f"{number} views of {size} pixels" for size, number in sizes.items())
    model = sum(parameter.numel() for parameter in run.student.parameters()) / 1e6
    return (
        f"at training.batch_size={run.batch_size}, {views or f'{run.transform.ncrops} views'} an image, "
        f"{type(run.student.backbone).__name__} of {model:.1f} M parameters with its head, {run.precision}; "
        + smaller_batch_overrides(run.batch_size, run.accumulation, config["training"]["effective_batch"] is not None)
    )


def _named(images: Any, index: int) -> str:
    name = getattr(images, "name", None)
    return f"{index} ({name(index)})" if callable(name) else str(index)


def _check_same(run: Any, state: dict[str, Any] | None, directory: Path) -> None:
    """Raises Refused where the processes, or this start of the run and the one before, do not train on the same."""
    if any(images != run.images for images in all_gather_objects(run.images)):
        raise Refused("not every process finds the same images; put them on a disk that all share, or copy them whole.")
    if state is not None and state["images"] != run.images:
        before, now = state["images"]["number"], run.images["number"]
        raise Refused(
            f"{directory} was trained on a list of {before:,} images, and now there is another, of {now:,}; "
            f"restore the files, or start anew with another name= and init_from={directory}. "
            + _changed(state.get("images_by_class", {}), _images_by_class(run.train_set))
        )
    if state is not None and state["effective_batch"] != run.effective_batch:
        raise Refused(
            f"{directory} was trained with steps of {state['effective_batch']} images, and these settings and "
            f"processes make steps of {run.effective_batch}; give training.effective_batch={state['effective_batch']}."
        )


def _images_by_class(images: Any) -> dict[str, int]:
    """How many images each class has; {} where there are no labels, or they are not known without the images."""
    labels = getattr(images, "labels", None)
    return {} if labels is None or images.classes is None else dict(Counter(images.classes[i] for i in labels))


def _changed(before: dict[str, int], now: dict[str, int]) -> str:
    """What a run that finds other images than before is told of them."""
    other = [name for name in sorted(before.keys() | now.keys()) if before.get(name, 0) != now.get(name, 0)]
    if not other:
        return "Names or order are others." if before else ""
    listed = ", ".join(f"{name} had {before.get(name, 0):,}, now {now.get(name, 0):,}" for name in other[:5])
    return f"By class: {listed}{f', and {len(other) - 5:,} more' if len(other) > 5 else ''}."


def _history(run: Any, config: dict[str, Any], directory: Path, state: dict[str, Any] | None) -> Any:
    """The history so far. The first process keeps it on disk; the others know its metadata."""
    from dino.history import History

    if state is None or run.rank:
        history = History({"config": config})
        history.metadata |= {"total_steps": run.total_steps} if state is None else state["history"]["metadata"]
        return history
    try:
        return History.resume(directory / "history.json", state["history"], {"config": config})
    except (OSError, ValueError) as error:
        raise Refused(str(error)) from error


def _evaluator(run: Any, history: Any) -> Callable[[], dict[str, float]]:
    """A function that measures the teacher and, when first called in a run's life, what the teacher must beat."""
    from dino.runtime.memory import skip_when_out_of_memory

    def evaluate() -> dict[str, float]:
        if "baselines" not in history.metadata:
            history.metadata["baselines"] = skip_when_out_of_memory(run.baselines)
            say()
        return skip_when_out_of_memory(run.evaluate)

    def say() -> None:
        if found := history.metadata.get("baselines"):
            log.info("k-NN to beat: raw pixels %.1f %%, untrained backbone %.1f %%", *(100 * a for a in found.values()))

    say()
    return evaluate


def _checkpointer(
    run: Any, config: dict[str, Any], directory: Path, history: Any, loggers: Any, start: int
) -> Callable[[int, dict[str, Any], bool], None]:
    """A function that all processes call and the first writes in: (iteration, the journal's state, best so far?)."""
    from dino.loading.broken import write_list
    from dino.run.checkpoint import check_read_back, training_state, write_step
    from dino.run.finite import check_finite
    from dino.runtime.rng import rng_state
    from dino.weights import save_teacher

    images_by_class = _images_by_class(run.train_set)

    def checkpoint(iteration: int, journal: dict[str, Any], best: bool) -> None:
        rng, state = all_gather_objects(rng_state()), training_state(run.student, run.teacher, run.optimizer, run.loss)
        check_finite(state, iteration)
        run.broken.update(*all_gather_objects(sorted(run.broken)))
        if run.rank:
            return
        write_list(directory, run.broken)
        content = state | {
            "scaler_state_dict": run.scaler.state_dict(),
            "iteration": iteration,
            "epoch": iteration // run.steps_per_epoch,
            "total_steps": run.total_steps,
            "effective_batch": run.effective_batch,
            "images": run.images,
            "images_by_class": images_by_class,
            "rng": rng,
            "config": config,
            "metrics": history.newest("epoch"),
            "journal": journal,
            "history": history.state_dict(),
            "wandb_run_id": loggers.run_id,
        }
        path = write_step(directory, content, config["checkpoint"]["keep"], best)
        if iteration == start + 1:
            check_read_back(path, content)  # an odd disk shows now, not after ten hours
        prepared = run.eval_transform
        save_teacher(
            directory, run.teacher, config, {"size": prepared.size, "mean": prepared.mean, "std": prepared.std}
        )

    return checkpoint


def _reporter(run: Any, config: dict[str, Any], directory: Path, history: Any) -> Callable[[], None]:
    """A function that writes the plots and report.html. Where it cannot, it says so, and training goes on."""
    from dino.config import CONF, compose
    from dino.evaluator.knn import KNN
    from dino.report import write_report

    def report() -> None:
        measured = run.evaluator.last if isinstance(run.evaluator, KNN) else None
        try:
            history.plot_all("iteration", directory / "plots" / "iteration.png")
            history.plot_all("epoch", directory / "plots" / "epoch.png")
        except OSError as error:
            log.warning("the plots are not written: %s", error)
        try:
            write_report(
                directory,
                config=config,
                defaults=compose([], "train", CONF),
                history=history,
                backbone=run.teacher.backbone,
                train_set=run.train_set,
                val_set=run.val_set,
                transform=run.transform,
                eval_transform=run.eval_transform,
                **({} if measured is None else measured._asdict()),
                device=run.device,
                notes=history.metadata.get("collapse", ()),
            )
        except Exception as error:  # foreign data and foreign libraries, and nothing that training needs
            log.warning("report.html is not written: %s: %s", type(error).__name__, error)
        if measured is not None:
            run.evaluator.last = None  # it may hold gigabytes

    return report


def attempt(config: dict[str, Any], directory: Path) -> float:
    """`run`, as a program: a signal ends it with status 128 + its number, after handing it on.

    Whoever handled SIGUSR2 before us (submitit) is told only now, when the checkpoint is written: it requeues the job.
    """
    from dino.run.journal import Interrupted

    try:
        return run(config, Path(os.path.relpath(directory)))  # shorter to read, and the same place
    except Interrupted as stopped:
        if place().rank == 0:
            print(f"{stopped}; the same command resumes", file=sys.stderr, flush=True)
        if callable(signal.getsignal(signal.SIGUSR2)):
            signal.raise_signal(signal.SIGUSR2)
        sys.exit(128 + stopped.signum)


main = command("train")(attempt)

if __name__ == "__main__":
    main()
