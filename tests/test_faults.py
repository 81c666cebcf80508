"""Whole runs in which a number is not finite, memory runs out, or a data worker is lost."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_processes import PLAIN, together_until_done
from test_train import ROOT, TINY, final

from dino.augmentation import DINOTransform
from dino.backbone.vit_tiny import ViTTiny
from dino.config import CONF, compose
from dino.dataset.textures import Textures
from dino.loading import workers
from dino.loading.sampler import Batching, StepSampler
from dino.loading.workers import WorkerLost
from dino.loss.dino import DinoLoss
from dino.run.checkpoint import STATES
from dino.run.finite import NonFiniteLoss
from dino.runtime.memory import OutOfMemory
from dino.train import run

SHORT = [*TINY, "evaluator=none", "precision=fp32", "name=a"]  # 36 steps, 12 an epoch
KNN = [override for override in SHORT if override != "evaluator=none"]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Seconds a run, and no part of what is tested."""
    monkeypatch.setattr("dino.report.write_report", lambda *_, **__: None)


def trained(directory, *overrides):
    return run(compose(list(overrides), "train", CONF), directory)


def history_of(directory):
    return json.loads((directory / "history.json").read_text())


def floats(state):
    for value in state.values():
        if isinstance(value, dict):
            yield from floats(value)
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            yield value


def assert_finite(state):
    assert all(value.isfinite().all() for part in STATES for value in floats({part: state[part]}))


# ---- NaN and infinity -----------------------------------------------------------------------------------------------


class NaNInStep15(DINOTransform):
    """One pixel of one view is NaN, in step 15."""

    def augment(self, views, seed, start=0):
        views = super().augment(views, seed, start)
        if seed[-1] == 14 and start == 0:
            views[0][0, 0, 0, 0] = torch.nan
        return views


class Overflow(torch.autograd.Function):
    """Nothing forward; an infinite gradient."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


class OverflowInStep12(DinoLoss):
    """A finite loss with an infinite gradient in step 12, after which a checkpoint is due."""

    calls = 0

    def forward(self, student, teacher, **of_step):
        value = super().forward(student, teacher, **of_step)
        OverflowInStep12.calls += 1
        return Overflow.apply(value) if OverflowInStep12.calls == 12 else value


NAN_INPUT = "augmentation._target_=test_faults.NaNInStep15"
INF_GRADIENT = "loss._target_=test_faults.OverflowInStep12"


def test_a_nan_in_an_input_stops_the_run_names_the_images_and_does_so_again_when_resumed(tmp_path):
    taken = StepSampler(96, Batching(8), 0, 36).of_step(14)
    for saved in (12, 13):  # a resumed run saves after its first step
        with pytest.raises(NonFiniteLoss, match="the loss is nan at step 15; the last good checkpoint") as stopped:
            trained(tmp_path / "a", *SHORT, NAN_INPUT)
        assert f"The step took the images {', '.join(map(str, taken))}." in str(stopped.value)
        kept = final(tmp_path / "a")
        assert kept["iteration"] == saved
        assert_finite(kept)
    said = (tmp_path / "a" / "train.log").read_text()
    assert f"step 15 took the images {', '.join(map(str, taken))}" in said
    assert "resumed at step 12" in said


def test_an_infinite_gradient_in_the_very_step_of_a_checkpoint_is_seen_before_it_is_written(tmp_path):
    OverflowInStep12.calls = 0
    with pytest.raises(NonFiniteLoss, match="the gradient is (nan|inf) at step 12; the last good checkpoint"):
        trained(tmp_path / "a", *SHORT, INF_GRADIENT)
    assert final(tmp_path / "a")["iteration"] == 1
    assert_finite(final(tmp_path / "a"))


def test_where_steps_may_be_left_out_the_weights_stay_as_they_were_in_one_and_the_run_goes_on(tmp_path):
    OverflowInStep12.calls = 0
    skip = ["training.skip_nonfinite_steps=1", "log_every_steps=1", "training.max_steps=14"]
    trained(tmp_path / "a", *SHORT, INF_GRADIENT, *skip)
    entries = {entry["iteration"]: entry for entry in history_of(tmp_path / "a")["iteration_metrics"]}
    assert [i for i, entry in entries.items() if entry["update_to_weight"] == 0] == [1, 12]  # 1: the rate starts at 0
    assert final(tmp_path / "a")["iteration"] == 14
    assert_finite(final(tmp_path / "a"))
    said = (tmp_path / "a" / "train.log").read_text()
    assert re.search(r"the gradient is (nan|inf) at step 12, which is left out \(1 of at most 1\)", said)


def test_a_step_that_may_be_left_out_and_has_spoilt_the_batch_norms_is_not_saved(tmp_path):
    with pytest.raises(NonFiniteLoss):
        trained(tmp_path / "a", *SHORT, NAN_INPUT, "training.skip_nonfinite_steps=2", "training.max_steps=16")
    assert final(tmp_path / "a")["iteration"] == 12
    assert_finite(final(tmp_path / "a"))


def test_a_scaler_that_leaves_steps_out_changes_nothing_where_all_is_finite(tmp_path):
    for name, skip in (("a", 0), ("b", 3)):
        trained(tmp_path / name, *SHORT, "training.max_steps=4", f"training.skip_nonfinite_steps={skip}")
    one, other = (final(tmp_path / name) for name in "ab")
    for value, same in zip(floats(one["student_state_dict"]), floats(other["student_state_dict"]), strict=True):
        assert torch.equal(value, same)


@pytest.mark.soak
def test_a_nan_in_the_input_of_one_process_stops_both_and_a_resumed_run_again(tmp_path):
    command = [*TINY, *PLAIN[:3], "training.batch_size=4", "evaluator=none", "name=a", NAN_INPUT]
    for saved, said_before in ((12, ""), (13, "resumed at step 12")):
        status, said = together_until_done(2, *command, cwd=tmp_path, timeout=100)
        assert status == 1
        assert said_before in said
        assert said.count("the loss is nan at step 15; the last good checkpoint") == 1
        assert final(tmp_path / "outputs" / "a")["iteration"] == saved


# ---- memory ---------------------------------------------------------------------------------------------------------


class TooLarge(ViTTiny):
    """Asks for petabytes of the CPU's memory in training, or when it is measured."""

    in_training = True

    def forward(self, images):
        if torch.is_grad_enabled() if self.in_training else torch.is_inference_mode_enabled():
            images = images + torch.empty(10**15).sum()
        return super().forward(images)


class TooLargeInKNN(TooLarge):
    in_training = False


class TooLargeForAGPU(ViTTiny):
    def forward(self, images):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB."
            )
        return super().forward(images)


@pytest.mark.parametrize(
    ("backbone", "asked"), [("TooLarge", "4000000000000000 bytes"), ("TooLargeForAGPU", "2.00 GiB")]
)
def test_out_of_memory_is_one_sentence_with_batch_crops_model_and_what_takes_less(tmp_path, backbone, asked):
    with pytest.raises(OutOfMemory) as ended:
        trained(tmp_path / "a", *SHORT, f"backbone._target_=test_faults.{backbone}")
    text = str(ended.value)
    for words in (
        asked,
        "training.batch_size=8, 2 views of 64 pixels and 2 views of 32 pixels an image",
        f"{backbone} of 0.0 M parameters",
        "training.batch_size=4 training.gradient_accumulation_steps=2",
    ):
        assert words in text
    assert "\n" not in text
    assert text in (tmp_path / "a" / "train.log").read_text()


def test_out_of_memory_in_knn_is_a_warning_and_training_goes_on(tmp_path):
    trained(tmp_path / "a", *KNN, "training.max_steps=13", "backbone._target_=test_faults.TooLargeInKNN")
    said = (tmp_path / "a" / "train.log").read_text()
    assert said.count("not measured: out of memory (") == 3  # the baselines, the first epoch, the end
    assert "evaluator.batch_size below 256 takes less" in said
    assert final(tmp_path / "a")["iteration"] == 13
    assert len(history_of(tmp_path / "a")["epoch_metrics"]) == 2


LIMITED = """
import resource, sys
import torch, torchvision, matplotlib, dino.run.session, dino.train, dino.report
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 1_200_000_000,) * 2)
dino.train.main()
"""


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is kept on Linux alone")
def test_a_machine_without_enough_memory_ends_the_program_with_a_sentence_and_a_status(tmp_path):
    """A student's outputs take 2 GB here, and 1.2 GB can be had."""
    large = ["dataset.out_dim=4000000", "head.bottleneck_dim=4", "training.batch_size=32", "dataset.train.images=32"]
    arguments = [sys.executable, "-c", LIMITED, *SHORT, *large]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 6, ended.stderr
    assert "Traceback" not in ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("out of memory (can't allocate memory: you tried to allocate ")
    assert last.endswith("take less: training.batch_size=16 training.gradient_accumulation_steps=2")


# ---- data workers ---------------------------------------------------------------------------------------------------


class LateFault(Textures):
    """A fault in the one worker that reads more than 200 images: that of the training, around step 28."""

    reads = 0

    def fault(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def __getitem__(self, index):
        self.reads += 1
        if self.reads == 230:
            self.fault()
        return super().__getitem__(index)


class LateHang(LateFault):
    def fault(self):
        time.sleep(10_000)


class HangsInEvaluation(Textures):
    def __getitem__(self, index):
        time.sleep(10_000 if index == 7 else 0)
        return super().__getitem__(index)


WORKER = "training.num_workers=1"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "words"),
    [
        ("LateFault", r"a data worker \(pid \d+\) was killed by SIGKILL, by the system if memory was short"),
        ("LateHang", r"the data workers \(pids [\d, ]+\) have handed over nothing for 2 s: the disk"),
    ],
)
def test_a_worker_that_dies_or_hangs_ends_the_run_which_goes_on_from_its_checkpoint(
    tmp_path, monkeypatch, images, words
):
    monkeypatch.setattr(workers, "PATIENCE", 2.0)
    with pytest.raises(WorkerLost, match=words) as ended:
        trained(tmp_path / "a", *SHORT, WORKER, f"dataset.train._target_=test_faults.{images}")
    assert str(ended.value) in (tmp_path / "a" / "train.log").read_text()
    assert final(tmp_path / "a")["iteration"] == 24
    trained(tmp_path / "a", *SHORT, WORKER, f"dataset.train._target_=test_faults.{images}")  # it reads less now
    assert final(tmp_path / "a")["iteration"] == 36


@pytest.mark.slow
def test_a_worker_of_the_evaluation_that_hangs_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 2.0)
    with pytest.raises(WorkerLost, match="have handed over nothing for 2 s"):
        trained(tmp_path / "a", *KNN, WORKER, "dataset.val._target_=test_faults.HangsInEvaluation")


class SlowOnce(Textures):
    """The 30th image that a worker reads takes 4 seconds, and leaves a file where the program runs."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        if self.reads == 30:
            Path(f"reads_{os.getpid()}").touch()
            time.sleep(4)
        return super().__getitem__(index)


@pytest.mark.slow
@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGINT, signal.SIGUSR2))]
)
def test_a_signal_to_the_whole_process_group_while_a_batch_is_waited_for_saves_and_leaves_no_worker(tmp_path, signum):
    slow = ["training.num_workers=2", "dataset.train._target_=test_faults.SlowOnce"]
    arguments = [sys.executable, "-m", "dino.train", *SHORT, *slow]
    environment = {**os.environ, "PYTHONPATH": ":".join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        arguments, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as stopped:
        while stopped.poll() is None and len(list(tmp_path.glob("reads_*"))) < 2:
            time.sleep(0.005)
        time.sleep(1)  # the batches before are used up
        os.killpg(stopped.pid, signum)
        _, said = stopped.communicate(timeout=60)
    assert stopped.returncode == 128 + signum, said
    assert f"stopped by {signum.name}; the same command resumes" in said
    assert 1 < final(tmp_path / "outputs" / "a")["iteration"] < 36
    with pytest.raises(ProcessLookupError):  # nobody is left in it
        os.killpg(stopped.pid, 0)
