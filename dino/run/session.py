"""A run from its start, or from where it stands, to its end or to a signal."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from dino.loading.batches import Steps
from dino.loading.broken import LIST
from dino.loading.data import Data
from dino.loading.micro_batch import MicroBatch
from dino.loading.sampler import StepSampler
from dino.run.accelerate import accelerate
from dino.run.after_step import AfterStep
from dino.run.checkpoint import FOLDER
from dino.run.directory import check_claim, full_disk_in_a_sentence, lock
from dino.run.evaluation import Evaluation
from dino.run.finite import Finite
from dino.run.learner import Learner
from dino.run.log_file import log_to
from dino.run.monitor import Monitor
from dino.run.recorder import Recorder
from dino.run.report import Report
from dino.run.run import Run, newest_of_all
from dino.run.saving import Saving
from dino.run.step import Step
from dino.run.stop import Interrupted, StopSignal
from dino.runtime.device import peak_memory, use_device
from dino.runtime.flops import images_to_mfu
from dino.runtime.memory import oom_advice
from dino.runtime.processes import barrier_refusals, is_single_process, place, processes
from dino.runtime.profile import profiled
from dino.runtime.rng import set_rng_state
from dino.runtime.sharding import data_parallel

log = logging.getLogger("dino.train")
OUTSIDE_OF_STEPS = "outside of the steps; a smaller backbone or dataset.cache=none takes less."


Loop = Callable[[Learner, Iterable[tuple[int, Iterable[MicroBatch]]], Callable[[Step], None]], None]


def run(config: dict[str, Any], directory: Path, loop: Loop) -> float:
    """Trains what `config` says in `directory`, from where that stands; returns the last k-NN accuracy (NaN: none).

    In each of the processes that torchrun or SLURM started; rank zero alone writes. `loop`: dino.train.train.
    """
    rank_zero = place().rank == 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(processes(use_device(config["device"])))
        with barrier_refusals():
            if rank_zero:
                stack.enter_context(lock(directory))
                check_claim(directory, config)
        stop = stack.enter_context(StopSignal())
        stack.enter_context(log_to(directory / "train.log", rank_zero))
        stack.enter_context(full_disk_in_a_sentence(directory))
        stack.enter_context(oom_advice(OUTSIDE_OF_STEPS))
        state = newest_of_all(directory)
        if state is not None and state["iteration"] >= state["total_steps"]:
            log.info("%s is finished; change a setting, or give another name=, to train anew", directory)
            return float(state["after_step"]["evaluation"]["last_knn"])
        started = time.monotonic()
        opened = Run.open(config, directory, state, stop)
        del state  # its tensors are in the parts now
        return _train(opened, loop, stop, started)


def _train(run: Run, loop: Loop, stop: StopSignal, started: float) -> float:
    learner, steps = run.learner, run.data.steps(run.epochs.start)
    after_step = after_step_of(run, steps, stop)
    compile, graph = run.settings.compile, run.settings.graph
    on_cuda = run.parts.device.type == "cuda"
    try:
        with oom_advice(run.memory_advice()), stop.at_once():
            accelerate(
                run.parts,
                compile=on_cuda if compile == "auto" else compile,
                graph=on_cuda and is_single_process() if graph == "auto" else graph,
            )
        learner.parallel = data_parallel(learner.student, run.data.batching.accumulation)
        if run.parts.place.rank < len(run.rng):
            set_rng_state(run.rng[run.parts.place.rank])
        after_step.recorder.restart_clock()
        after_step.end_interrupted_epoch()
        with oom_advice(run.memory_advice()):
            rank_zero_profiles = run.settings.profile and run.parts.place.rank == 0
            loop(learner, profiled(steps, run.directory / "profile" if rank_zero_profiles else None), after_step)
    except Interrupted as stopped:
        if run.parts.place.rank == 0:
            print(f"{stopped}; the same command resumes", file=sys.stderr, flush=True)
        stop.hand_on()  # before the loggers finish, which may take minutes
        raise
    finally:
        after_step.saving.writer.close()
        after_step.recorder.close()
        run.loggers.finish()
    _say_done(run, time.monotonic() - started)
    return after_step.evaluation.last_knn


def after_step_of(run: Run, steps: Steps, stop: StopSignal) -> AfterStep:
    """Those that act after a step, as they were at the last checkpoint."""
    settings, learner, epochs = run.settings, run.learner, run.epochs
    finite = Finite(
        run.directory / FOLDER,
        partial(_images_of_step, run.data, steps.sampler),
        skip=settings.training.skip_nonfinite_steps,
        scaled=run.parts.precision == "fp16",
    )
    recorder = Recorder(
        run.history,
        run.loggers,
        Monitor(learner.student, learner.loss, quiet_steps=run.parts.schedule.warmup_steps),
        finite,
        epochs,
        run.data.batching.effective_batch,
        every=settings.log_every_steps,
        file=run.directory / "history.json" if run.parts.place.rank == 0 else None,
        images_to_mfu=images_to_mfu(
            learner.teacher,
            getattr(run.data.transform, "sizes", ()),  # of a transform of one's own
            learner.loss.n_global_crops,
            run.parts.device,
            run.parts.place.world_size,
        ),
    )
    report = Report(run, settings.checkpoint.every_minutes)
    evaluation = Evaluation(run.parts, run.history, epochs, stop, report, every=settings.evaluate_every_epochs)
    checkpoint = settings.checkpoint
    saving = Saving(run, epochs, checkpoint.every_minutes, checkpoint.every_epochs, checkpoint.keep)
    after_step = AfterStep(epochs, recorder, evaluation, saving, stop, run.data, run.directory)
    if run.after_step is not None:
        after_step.load_state_dict(run.after_step)
    return after_step


def _images_of_step(data: Data, sampler: StepSampler, step: int) -> list[str]:
    """The training images of a step, counted from 1, in words."""
    return [data.name_of(index) for index in sampler.of_step(step - 1)]


def _say_done(run: Run, seconds: float) -> None:
    if broken := run.data.broken:
        log.warning("%d images could not be read and were passed over; see %s", len(broken), run.directory / LIST)
    log.info(
        "done in %.0f s, with %.1f GB of memory at most: teacher in %s, report in %s",
        seconds,
        peak_memory(run.parts.device) / 1e9,
        run.directory / "teacher.safetensors",
        run.directory / "report.html",
    )
