import concurrent.futures
import copy
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_in_ranks

from dino.augmentation import DINOTransform
from dino.evaluator.knn import Measured
from dino.head import Factors
from dino.history import History
from dino.loading.broken import TooManyBroken
from dino.loading.data import Data
from dino.loading.sampler import Batching
from dino.loading.views import Loading
from dino.logger import Loggers
from dino.loss.dino import DinoLoss
from dino.run.after_step import AfterStep
from dino.run.epochs import Epochs
from dino.run.evaluation import Evaluation
from dino.run.finite import Finite, NonFiniteLoss
from dino.run.monitor import Monitor
from dino.run.parts import Parts
from dino.run.recorder import Recorder
from dino.run.run import Run
from dino.run.saving import Saving
from dino.run.step import Distilled, Step
from dino.run.stop import Interrupted, StopSignal
from dino.runtime.processes import place
from dino.scheduler import Values

NOW = Values(learning_rate=1e-3, last_layer_learning_rate=1e-3, weight_decay=0.04, momentum=0.99, teacher_temp=0.04)


class Spy:
    def __init__(self):
        self.logged = {}

    run_id = None

    def start(self, directory, config, resume_id):
        pass

    def log(self, metrics, step):
        self.logged.setdefault(step, {}).update(metrics)

    def finish(self):
        pass


class Counted(list):
    """A data set of which only the number of images matters."""

    classes = None

    def __init__(self, images):
        super().__init__([None] * images)


class Measures(Parts):
    """The parts of a run, of which none is there but what measures the teacher."""

    def __init__(self, evaluate):
        self.evaluate, self.baselines = evaluate, dict


class Kept(Saving):
    """Keeps in memory what it should write."""

    def __call__(self, done, best, after_step):
        self.saved.append((done, copy.deepcopy(after_step), best))


def after_step_of(tmp_path, stop=None, measured=(), start=0, total_steps=12, steps_per_epoch=4, state=None, **changes):
    results, spy, stop = iter(measured), Spy(), stop or StopSignal()
    epochs, history = Epochs(start, total_steps, steps_per_epoch), History({"config": {}})
    recorder = Recorder(
        history,
        Loggers([spy]),
        Monitor(torch.nn.Linear(2, 2), DinoLoss(4, ncrops=2)),
        changes.get("finite", Finite(tmp_path / "checkpoints", lambda step: [f"image of step {step}"])),
        epochs,
        effective_batch=8,
        every=changes.get("log_every_steps", 5),
        file=tmp_path / "history.json" if changes.get("writes", True) else None,
        images_to_mfu=changes.get("images_to_mfu"),
    )
    evaluate = changes.get("evaluate", lambda: next(results, {}))
    evaluation = Evaluation(
        Measures(lambda: Measured(evaluate())),
        history,
        epochs,
        stop,
        changes.get("report", lambda measured, last: None),
        every=changes.get("evaluate_every_epochs", 1),
    )
    saving = Kept(
        object.__new__(Run),
        epochs,
        changes.get("checkpoint_every_minutes", 15.0),
        changes.get("checkpoint_every_epochs", 1),
    )
    saving.saved = []
    data = Data(Counted(900), Counted(100), DINOTransform(), 32, Batching(8), steps_per_epoch, total_steps, Loading())
    keeper = AfterStep(epochs, recorder, evaluation, saving, stop, data, tmp_path)
    if state is not None:
        keeper.load_state_dict(state)
    return keeper, saving.saved, spy


def take(keeper, step, loss, teacher=None, norm=2.0):
    outputs = torch.zeros(4, 4) if teacher is None else teacher  # of 2 images in 2 views
    student = Factors(outputs, torch.eye(4))
    last = Distilled(torch.tensor(float(loss)), outputs, student, outputs)
    keeper(Step(step + 1, NOW, torch.tensor(float(loss)), torch.tensor(norm), last))


def walk(keeper, losses, start=0, teacher=None, norms=()):
    norms = {**dict.fromkeys(range(start, start + len(losses)), 2.0), **dict(norms)}
    for step, loss in enumerate(losses, start):
        take(keeper, step, loss, teacher, norms[step])
    keeper.recorder.close()


def test_what_happens_between_epochs_draws_nothing_from_the_run(tmp_path):
    """Each start of a run would draw it again, where it is an import that draws."""

    def draw():
        np.random.rand(), torch.rand(1)
        return {"knn": 0.5}

    keeper, *_ = after_step_of(tmp_path, evaluate=draw, report=lambda measured, last: draw())
    numpy, of_torch = np.random.get_state()[2], torch.get_rng_state()
    walk(keeper, [1.0] * 12)
    assert np.random.get_state()[2] == numpy
    assert torch.equal(torch.get_rng_state(), of_torch)


def test_steps_are_recorded_at_the_cadence_and_epochs_with_the_mean_of_all_their_losses(tmp_path):
    keeper, _, spy = after_step_of(tmp_path, evaluate_every_epochs=2, measured=[{"knn": 0.5}, {"knn": 0.25}])
    walk(keeper, range(12))
    history = History.load(tmp_path / "history.json")
    assert history.get_iterations() == [1, 6, 11, 12]
    assert history.get_metric("loss") == [0, 5, 10, 11]
    assert history.get_metric("loss_over_ln_k") == pytest.approx([x / math.log(4) for x in (0, 5, 10, 11)])
    assert history.get_metric("teacher_entropy") == pytest.approx([1, 1, 1, 1])
    assert history.get_metric("loss", "epoch") == [1.5, 5.5, 9.5]
    assert history.get_metric("knn", "epoch")[1:] == [0.5, 0.25]  # at epoch 2, and always at the end
    assert math.isnan(history.get_metric("knn", "epoch")[0])
    assert spy.logged[6]["loss"] == 5
    assert spy.logged[12]["epoch/knn"] == 0.25


def test_checkpoints_are_written_at_the_first_and_last_step_and_where_the_teacher_is_the_best_so_far(tmp_path):
    keeper, saved, _ = after_step_of(
        tmp_path, measured=[{"knn": 0.5}, {"knn": 0.7}, {"knn": 0.6}], checkpoint_every_epochs=None
    )
    walk(keeper, [1] * 12)
    assert [(iteration, best) for iteration, _, best in saved] == [(1, False), (4, True), (8, True), (12, False)]
    assert saved[-1][1]["evaluation"]["last_knn"] == 0.6
    assert saved[-1][1]["evaluation"]["best_knn"] == 0.7


def fails():
    raise OSError("the disk is gone")


def test_what_the_writing_of_a_checkpoint_raised_is_raised_after_the_next_step(tmp_path):
    keeper, _, _ = after_step_of(tmp_path, log_every_steps=1)
    walk(keeper, [1, 1])
    keeper.saving.writer.submit(fails)
    concurrent.futures.wait([keeper.saving.writer._job])
    with pytest.raises(OSError, match="the disk is gone"):
        take(keeper, 2, 1)
    assert keeper.recorder.history.get_iterations() == [1, 2, 3]


def test_the_checkpoint_before_too_many_broken_images_is_waited_for(tmp_path):
    keeper, _, _ = after_step_of(tmp_path)
    walk(keeper, [1])
    keeper.data.broken.update(f"{i}.jpg is no image" for i in range(11))  # of 1,000
    written = []
    keeper.saving.writer.submit(lambda: (time.sleep(0.3), written.append(1)))
    with pytest.raises(TooManyBroken):
        take(keeper, 1, 1)
    assert written == [1]


def test_a_resumed_epoch_has_the_mean_of_the_whole_epoch(tmp_path):
    whole, saved, _ = after_step_of(tmp_path, checkpoint_every_minutes=1e-9)
    walk(whole, [1, 2, 3, 4, 9, 9])
    state = next(state for iteration, state, _ in saved if iteration == 2)
    resumed, _, _ = after_step_of(tmp_path / "resumed", start=2, state=state)
    walk(resumed, [3, 4, 9], start=2)
    assert resumed.recorder.history.get_metric("loss", "epoch") == [2.5]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_naming_its_step_before_anything_is_saved(tmp_path, value):
    keeper, saved, _ = after_step_of(tmp_path)
    with pytest.raises(NonFiniteLoss, match=rf"the loss is {value} at step 4; the last good checkpoint is in"):
        walk(keeper, [1, 1, 1, value, 1, 1])  # seen at the end of the epoch, one step before the log
    keeper.recorder.close()
    assert [iteration for iteration, *_ in saved] == [1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_before_what_its_step_did_is_saved(tmp_path, value):
    keeper, saved, _ = after_step_of(tmp_path)
    with pytest.raises(NonFiniteLoss, match=rf"the gradient is {value} at step 4; .*images image of step 4\."):
        walk(keeper, [1] * 6, norms={3: value})  # a checkpoint is due after step 4
    keeper.recorder.close()
    assert [iteration for iteration, *_ in saved] == [1]


def test_a_loss_that_is_not_finite_goes_before_a_signal_and_nothing_is_saved(tmp_path):
    with StopSignal() as stop:
        keeper, saved, _ = after_step_of(tmp_path, stop)
        walk(keeper, [1, 1])
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(NonFiniteLoss, match="the loss is nan at step 3"):
            take(keeper, 2, math.nan)
    assert [iteration for iteration, *_ in saved] == [1]


def test_no_number_is_fetched_from_the_device_between_two_looks(tmp_path, monkeypatch):
    keeper, _, _ = after_step_of(tmp_path, total_steps=100, steps_per_epoch=100, log_every_steps=10)
    walk(keeper, [1])
    for name in ("item", "tolist", "__bool__", "__float__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the device"))
    walk(keeper, [1] * 9, start=1)


def test_the_mfu_follows_from_images_per_second_where_the_peak_is_known(tmp_path):
    keeper, _, spy = after_step_of(tmp_path, log_every_steps=1, images_to_mfu=1e-6)
    walk(keeper, [1, 1])
    speed, used = (keeper.recorder.history.get_metric(name) for name in ("images_per_second", "mfu"))
    assert used == pytest.approx([1e-6 * per_second for per_second in speed]) and min(used) > 0
    assert "MFU" in keeper.recorder.bar.postfix
    keeper, _, spy = after_step_of(tmp_path / "unknown", log_every_steps=1)
    walk(keeper, [1, 1])
    assert "images_per_second" in spy.logged[1] and "mfu" not in spy.logged[1]
    assert "MFU" not in keeper.recorder.bar.postfix


def test_steps_that_may_be_left_out_are_counted_over_resumes_and_not_in_the_mean_of_the_epoch(tmp_path):
    def finite():
        return Finite(tmp_path / "checkpoints", lambda step: [], skip=2)

    keeper, saved, _ = after_step_of(tmp_path, finite=finite())
    walk(keeper, [1, math.nan, 3, 5], norms={1: math.nan})
    assert keeper.recorder.history.get_metric("loss", "epoch") == [3]
    _, state, _ = saved[-1]
    resumed, _, _ = after_step_of(tmp_path / "resumed", start=4, state=state, finite=finite())
    walk(resumed, [1, 1], start=4, norms={4: math.inf})
    with pytest.raises(NonFiniteLoss, match="the loss is inf at step 8"):
        walk(resumed, [1, math.inf], start=6)
    resumed.recorder.close()


def on_one_of_two(folder):
    keeper, saved, _ = after_step_of(Path(folder), log_every_steps=3, writes=place().rank == 0)
    try:
        walk(keeper, [1, math.nan if place().rank else 1, 1, 1])
    except NonFiniteLoss as error:
        return str(error), len(saved)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_process_stops_all_at_the_same_step(tmp_path):
    first, second = run_in_ranks(2, on_one_of_two, str(tmp_path))
    assert first == second
    assert "the loss is nan at step 2; " in first[0]
    assert first[1] == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_is_acted_on_after_the_step_with_a_checkpoint(tmp_path, signum):
    before = signal.getsignal(signum)
    with StopSignal() as stop:
        keeper, saved, _ = after_step_of(tmp_path, stop)
        walk(keeper, [1, 1])
        os.kill(os.getpid(), signum)
        with pytest.raises(Interrupted, match=signum.name) as stopped:
            take(keeper, 2, 1)
    assert stopped.value.signum == signum
    assert saved[-1][0] == 3
    assert signal.getsignal(signum) == before


def interrupted(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    pytest.fail("the evaluation went on after the signal")


def test_a_signal_in_an_evaluation_cuts_it_short_and_a_resumed_run_evaluates_first(tmp_path):
    with StopSignal() as stop:
        keeper, saved, _ = after_step_of(tmp_path, stop, evaluate=interrupted)
        with pytest.raises(Interrupted, match="SIGTERM"):
            walk(keeper, [1, 2, 3, 4])
        keeper.recorder.close()
    iteration, state, best = saved[-1]
    assert (iteration, best, state["recorder"]["epoch_loss"]) == (4, False, 10)
    assert keeper.recorder.history.get_metric("epoch", "epoch") == []
    resumed, saved, _ = after_step_of(tmp_path / "resumed", start=4, state=state, measured=[{"knn": 0.5}])
    resumed.end_interrupted_epoch()
    assert [(iteration, best) for iteration, _, best in saved] == [(4, True)]
    assert resumed.recorder.history.get_metric("loss", "epoch") == [2.5]
    assert resumed.recorder.history.get_metric("knn", "epoch") == [0.5]
    resumed.recorder.close()
    again, saved, _ = after_step_of(tmp_path / "again", start=4, state=saved[-1][1])
    again.end_interrupted_epoch()
    assert saved == []
    again.recorder.close()


def test_a_signal_in_the_last_step_of_an_epoch_is_not_kept_waiting_for_the_evaluation(tmp_path):
    with StopSignal() as stop:
        keeper, saved, _ = after_step_of(tmp_path, stop, evaluate=lambda: pytest.fail("it was begun"))
        walk(keeper, [1, 1, 1])
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            take(keeper, 3, 1)
    assert saved[-1][0] == 4


def test_a_signal_in_the_evaluation_after_the_last_step_waits_for_it(tmp_path):
    def evaluate():
        os.kill(os.getpid(), signal.SIGTERM)
        return {"knn": 0.5}

    with StopSignal() as stop:
        keeper, saved, _ = after_step_of(tmp_path, stop, evaluate=evaluate, total_steps=4)
        with pytest.raises(Interrupted):
            walk(keeper, [1, 2, 3, 4])
        keeper.recorder.close()
    assert (saved[-1][0], saved[-1][1]["evaluation"]["last_knn"]) == (4, 0.5)


def test_data_workers_which_are_forks_do_not_take_a_signal_for_the_run_s():
    with StopSignal() as stop, stop.at_once():
        if (child := os.fork()) == 0:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os._exit(0 if stop.signum == signal.SIGTERM and sys.exc_info()[0] is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_second_interrupt_is_left_to_the_system_which_ends_the_process():
    before = signal.getsignal(signal.SIGINT)  # a program in the background may be made to ignore it
    with StopSignal():
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == before
