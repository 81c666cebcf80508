"""The whole thing: the loop against the paper, and the program as a user runs it."""

import importlib
import math
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from test_dataset import serve_cifar10
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dino import DinoLoss, DinoModel, DinoProjectionHead, DINOTransform, Schedule, Steps, make_teacher, parameter_groups
from dino.backbone.vit import ViT
from dino.config import CONF, compose
from dino.dataset.textures import Textures
from dino.history import History
from dino.loading.micro_batch import MicroBatch
from dino.loading.sampler import Batching
from dino.run.checkpoint import STATES
from dino.run.learner import Learner
from dino.run.parts import assemble
from dino.train import run, train

aten = torch.ops.aten
ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("DINO_TEST_DATA", ROOT.parent / "shared" / "data"))
TINY = [  # seconds on two cores
    "dataset.train.images=96",
    "dataset.val.images=40",
    "backbone.hidden_dim=32",
    "backbone.depth=1",
    "head.hidden_dim=32",
    "head.bottleneck_dim=16",
    "dataset.out_dim=64",
    "augmentation.num_local_views=2",
    "training.batch_size=8",
    "device=cpu",
    "checkpoint.every_epochs=1",
]


def program(*overrides, cwd, **options):
    """`python -m dino.train ...` as a user starts it, with outputs/ below cwd."""
    command = [sys.executable, "-m", "dino.train", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "timeout": 200} | options
    return subprocess.run(command, cwd=cwd, env=environment, **options)


# ---- the loop -------------------------------------------------------------------------------------------------------


class Double(nn.Module):
    """A backbone without batch norm, for exact comparisons."""

    output_dim = 6

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 6)

    def forward(self, images):
        return torch.tanh(self.linear(images.mean((2, 3))))


def constant(lr=0.3, momentum=0.9):
    return Schedule(
        epochs=1,
        steps_per_epoch=100,
        effective_batch=4,
        lr=lr,
        weight_decay=0.0,
        momentum=momentum,
        final_momentum=momentum,
        temp=0.05,
        warmup_temp=0.05,
        warmup_epochs=0.0,
        final_weight_decay=None,
        min_lr=lr,
    )


def test_three_steps_of_the_loop_are_algorithm_1_written_out():
    torch.manual_seed(0)
    head = DinoProjectionHead(6, hidden_dim=5, bottleneck_dim=4, output_dim=7)
    student = DinoModel(Double(), head).double()
    teacher = make_teacher(student)
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.shape[-1] != 1:  # but for the fixed norms: a teacher that differs from the student
                parameter.add_(0.1 * torch.randn_like(parameter))
    loss = DinoLoss(7, ncrops=3, teacher_temp=0.05).double()
    loss.center.normal_(std=0.1)
    batches = [[torch.randn(4, 3, s, s, dtype=torch.float64) for s in (8, 8, 4)] for _ in range(3)]

    s = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in student.named_parameters()}
    t = {name: p.clone() for name, p in teacher.named_parameters()}
    center = loss.center.clone()
    call = torch.func.functional_call
    for x1, x2, x3 in batches:
        s1, s2, s3 = (call(student, s, (x,)) for x in (x1, x2, x3))
        t1, t2 = (call(teacher, t, (x,)).detach() for x in (x1, x2))

        def h(target, output, center=center):
            return -(torch.softmax((target - center) / 0.05, 1) * torch.log_softmax(output / 0.1, 1)).sum(1).mean()

        pairs = [h(t1, s2), h(t1, s3), h(t2, s1), h(t2, s3)]
        trained = [name for name in s if s[name].requires_grad]
        gradients = torch.autograd.grad(sum(pairs) / 4, [s[name] for name in trained])
        for name, gradient in zip(trained, gradients, strict=True):
            s[name] = (s[name] - 0.3 * gradient).detach().requires_grad_()
        t = {name: 0.9 * t[name] + 0.1 * s[name].detach() for name in t}
        center = 0.9 * center + 0.1 * torch.cat([t1, t2]).mean(0)

    optimizer = torch.optim.SGD(parameter_groups(student, head.last_layer), lr=1.0)
    micro_batches = ((step, [MicroBatch(views)]) for step, views in enumerate(batches))
    train(Learner(student, teacher, loss, optimizer, constant()), micro_batches)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter, s[name], rtol=1e-9, atol=1e-9, check_layout=False)
    for name, parameter in teacher.named_parameters():
        torch.testing.assert_close(parameter, t[name], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss.center, center, rtol=1e-9, atol=1e-9)


def test_four_batches_of_8_accumulated_take_the_step_of_one_batch_of_32():
    def updated(batch_size, accumulation):
        torch.manual_seed(0)
        backbone = ViT(hidden_dim=32, depth=1, heads=2, patch_size=8, image_size=32)  # no batch norm
        student = DinoModel(backbone, DinoProjectionHead(32, 32, 16, 48))
        teacher, loss = make_teacher(student), DinoLoss(48, ncrops=4)
        transform = DINOTransform(num_local_views=2, global_size=32, local_size=16)
        data = Textures("train", size=32, images=96)
        optimizer = torch.optim.SGD(parameter_groups(student, student.projection_head.last_layer), lr=1.0)
        steps = Steps(data, transform, Batching(batch_size, accumulation))
        train(Learner(student, teacher, loss, optimizer, constant(lr=0.01)), steps)
        assert len(steps) == 3
        return {
            **student.state_dict(),
            **{f"teacher.{k}": v for k, v in teacher.state_dict().items()},
            "c": loss.center,
        }

    whole, parts = updated(32, 1), updated(8, 4)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-6, msg=name)


# ---- every YAML -----------------------------------------------------------------------------------------------------

OPTIONS = [
    (path.parent.name, path.stem)
    for path in sorted(CONF.glob("*/*.yaml"))
    if path.parent.name
    in (
        "backbone",
        "head",
        "augmentation",
        "dataset",
        "loss",
        "optimizer",
        "scheduler",
        "evaluator",
        "logger",
        "experiment",
    )
]
SMALL = [  # the real architectures and settings, for few and small images
    "training.batch_size=4",
    "training.max_steps=2",
    "training.num_workers=0",
    "dataset.global_size=32",
    "dataset.local_size=16",
    "dataset.eval_size=32",
    "checkpoint.keep=1",
    "precision=fp32",
]


def stand_in(root, layout, per_class=6):
    """Images of noise in the layout of a data set that this machine does not have."""
    classes = {
        "imagenet": [f"{split}/{name}" for split in ("train", "val") for name in ("n01440764", "n02102040")],
        "imagenet100": ["train.X1/n01440764", "train.X2/n02102040", "train.X3/n02979186", "train.X4/n03000684"]
        + [f"val.X/{name}" for name in ("n01440764", "n02102040", "n02979186", "n03000684")],
        "folder": ["cats", "dogs"],
        "huggingface": ["cats", "dogs"],
        "tar": ["train", "val"],
        "imagenette": [f"imagenette2-160/{split}/{name}" for split in ("train", "val") for name in WNIDS],
    }[layout]
    for number, folder in enumerate(classes):
        (root / folder).mkdir(parents=True)
        for i in range(per_class):
            noise = torch.randint(
                256, (40, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(99 * number + i)
            )
            Image.fromarray(noise.numpy()).save(root / folder / f"{i}.JPEG")
            if layout == "tar":
                (root / folder / f"{i}.cls").write_text(str(i % 2))
        if layout == "tar":
            with tarfile.open(root / f"{folder}-000.tar", "w") as shard:
                for path in sorted((root / folder).iterdir()):
                    shard.add(path, path.name)
    return root


WNIDS = [
    "n01440764",
    "n02102040",
    "n02979186",
    "n03000684",
    "n03028079",
    "n03394916",
    "n03417042",
    "n03425413",
    "n03445777",
    "n03888257",
]


LARGE = re.compile("resnet(34|50|101|152)|dino_vit(s8|b8|b16)|timm|kaggle_.*|image(net|nette)_(vits16|resnet18)")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "option"),
    [pytest.param(*case, marks=[pytest.mark.slow] if LARGE.fullmatch(case[1]) else []) for case in OPTIONS],
    ids=str,
)
def test_every_yaml_trains_two_steps(group, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    overrides = [*SMALL, f"{group}={option}", "training.effective_batch=null"]
    base = compose([f"{group}={option}"], "train", CONF)
    target = base["dataset"]["train"]["_target_"].rpartition(".")[2].lower()
    if target == "textures":
        overrides += ["dataset.train.images=24", "dataset.val.images=12"]
    elif target == "imagenette":
        overrides.append("dataset.train.size=160px")
    if target == "cifar10":
        serve_cifar10(tmp_path / "images", "", monkeypatch)
    elif target != "textures":
        stand_in(tmp_path / "images", target)
    if target != "textures":
        overrides.append(f"dataset.{'train.path' if target == 'huggingface' else 'root'}={tmp_path / 'images'}")
    config = compose(overrides, "train", CONF)
    knn = run(config, tmp_path / "run")
    labelled = group != "evaluator" or option == "knn"
    assert math.isnan(knn) != labelled
    history = History.load(tmp_path / "run" / "history.json")
    assert history.get_iterations() == [1, 2]
    assert all(math.isfinite(value) for value in history.get_metric("loss"))
    assert (tmp_path / "run" / "teacher.safetensors").is_file()


class Waits(TorchDispatchMode):
    """Notes at which step the host asks a tensor for its value: on a GPU it would wait for all that was begun."""

    def __init__(self):
        super().__init__()
        self.step, self.steps = -1, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal):
            self.steps.append(self.step)
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_between_log_steps_nothing_asks_a_tensor_for_its_value(precision, tmp_path, monkeypatch):
    config = compose([*TINY, "training.epochs=1", "log_every_steps=5", f"precision={precision}"], "train", CONF)
    waits, schedule = Waits(), Schedule.__call__

    def noting(self, step):
        waits.step = step
        return schedule(self, step)

    monkeypatch.setattr(Schedule, "__call__", noting)
    with waits:
        run(config, tmp_path / "run")
    # Counted from 0: the first, sixth and eleventh are logged, the twelfth is the last.
    assert {*waits.steps} <= {-1, 0, 5, 10, 11}
    assert {0, 5, 10, 11} <= {*waits.steps}


# ---- the program ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of 36 steps, 12 an epoch, and what it printed."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    return directory, program(*TINY, "name=a", cwd=directory)


def final(directory):
    return torch.load(max((directory / "checkpoints").glob("step_*.pt")), weights_only=True)


def assert_same_state(left, right):
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same_state(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right):
            assert_same_state(a, b)
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


def assert_same_run(directory, reference):
    one, other = final(directory), final(reference)
    for part in (*STATES, "scaler_state_dict", "rng", "iteration", "epoch"):
        assert_same_state(one[part], other[part])
    for level in ("iteration", "epoch"):
        frames = [History.load(d / "history.json").to_dataframe(level) for d in (directory, reference)]
        measured_in_time = ["timestamp", "images_per_second", "training_seconds"]
        one, other = (frame.drop(columns=measured_in_time, errors="ignore") for frame in frames)
        assert one.equals(other)


def test_a_run_that_is_profiled_is_the_very_run(tmp_path):
    for name in ("false", "true"):
        overrides = [*TINY, "evaluator=none", "training.max_steps=17", f"profile={name}"]
        run(compose(overrides, "train", CONF), tmp_path / name)
    assert_same_run(tmp_path / "true", tmp_path / "false")
    assert "profiled 5 steps" in (tmp_path / "true" / "train.log").read_text()
    assert {path.name for path in (tmp_path / "true" / "profile").iterdir()} == {"trace.json", "operations.txt"}
    assert not (tmp_path / "false" / "profile").exists()


def test_a_run_says_what_it_does_and_leaves_everything_behind(uninterrupted):
    directory, done = uninterrupted
    assert done.returncode == 0, done.stderr
    run_directory = directory / "outputs" / "a"
    for words in (
        "ViTTiny, 22.0 k parameters",
        "96 images, 10 classes",
        "36 (12 an epoch)",
        "effective batch 8 = 8 images x 1",
        "k-NN to beat: raw pixels",
        "epoch 3",
        "k-NN",
    ):
        assert words in done.stderr
        assert words in (run_directory / "train.log").read_text()
    names = {path.relative_to(run_directory).as_posix() for path in run_directory.rglob("*")}
    assert {
        "config.yaml",
        "history.json",
        "train.log",
        "teacher.safetensors",
        "report.html",
        "plots/iteration.png",
        "plots/epoch.png",
        "checkpoints/best.pt",
    } <= names
    history = History.load(run_directory / "history.json")
    assert history.get_iterations() == [1, 11, 21, 31, 36]
    for name in ("agreement", "feature_std", "rankme", "prototypes_in_use", "kl_to_uniform", "center_norm"):
        assert all(math.isfinite(value) and value >= 0 for value in history.get_metric(name)), name
    assert history.get_metric("update_to_weight")[0] == 0  # the rate warms up from 0
    assert all(0 < ratio < 0.1 for ratio in history.get_metric("update_to_weight")[1:])
    assert [entry for entry in history.get_metric("epoch", "epoch")] == [1, 2, 3]
    assert set(history.metadata["baselines"]) == {"raw_pixels", "untrained"}
    assert yaml.safe_load((run_directory / "config.yaml").read_text())["dataset"]["train"]["images"] == 96


def test_the_report_shows_how_the_run_ended_and_what_it_was_told(uninterrupted):
    page = (uninterrupted[0] / "outputs" / "a" / "report.html").read_text()
    for words in ("finished", "step 36 of 36", "raw pixels", "augmentation.num_local_views", "head 1", "t-SNE"):
        assert words in page, words


def test_the_first_step_waits_for_no_measurement(tmp_path, monkeypatch):
    def baselines(*_, **__):
        (step,) = (tmp_path / "run" / "checkpoints").glob("step_*.pt")
        assert step.stem == "step_000000001"
        return {"raw_pixels": 0.1, "untrained": 0.2}

    monkeypatch.setattr("dino.evaluator.KNN.baselines", baselines)
    run(compose([*TINY, "training.max_steps=2"], "train", CONF), tmp_path / "run")
    assert "k-NN to beat: raw pixels 10.0 %, untrained backbone 20.0 %" in (tmp_path / "run/train.log").read_text()


@pytest.mark.slow
def test_what_the_baselines_measure_is_the_backbone_before_the_first_step(tmp_path):
    config = compose([*TINY, "training.max_steps=12", "optimizer.lr=0.1"], "train", CONF)
    run(config, tmp_path / "run")
    assert History.load(tmp_path / "run" / "history.json").metadata["baselines"] == assemble(config).baselines()


def test_a_report_that_fails_is_said_and_ends_nothing(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("dino.report.write_report", fails)
    run(compose([*TINY, "training.max_steps=1"], "train", CONF), tmp_path / "run")
    assert "report.html is not written: OSError: no space left" in (tmp_path / "run" / "train.log").read_text()
    assert final(tmp_path / "run")["iteration"] == 1


@pytest.mark.slow
def test_the_same_command_again_says_that_the_run_is_finished(uninterrupted):
    directory, _ = uninterrupted
    again = program(*TINY, "name=a", cwd=directory)
    assert again.returncode == 0
    assert "is finished" in again.stderr


def test_other_settings_in_its_directory_are_refused(uninterrupted):
    directory, _ = uninterrupted
    refused = program(*TINY, "name=a", "optimizer.lr=0.5", "seed=3", "training.num_workers=1", cwd=directory)
    assert refused.returncode == 2
    assert "optimizer.lr was 0.001, now 0.5; seed was 0, now 3" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_killed_at_a_random_moment_and_started_again_ends_bit_identical(uninterrupted, tmp_path, workers):
    reference = uninterrupted[0] / "outputs" / "a"
    command = [*TINY, "name=a", f"training.num_workers={workers}", "checkpoint.every_minutes=0.002"]
    arguments = [sys.executable, "-m", "dino.train", *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        arguments, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    ) as killed:
        history = tmp_path / "outputs" / "a" / "checkpoints"
        at_least = random.choice([1, 9, 14, 20])  # of 12 an epoch
        while killed.poll() is None and not any(int(p.stem[5:]) >= at_least for p in history.glob("step_*.pt")):
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.1))
        os.killpg(killed.pid, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL  # it was in the middle
    stopped_at = max(int(p.stem[5:]) for p in history.glob("step_*.pt"))
    assert stopped_at < 36
    resumed = program(*command, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed at step {stopped_at}" in resumed.stderr
    assert_same_run(tmp_path / "outputs" / "a", reference)


HALF = """
import io, runpy, time
import torch
save = torch.save

def half(content, file):
    if content["iteration"] == 1:
        return save(content, file)
    whole = io.BytesIO()
    save(content, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    print("half", flush=True)
    time.sleep(600)

torch.save = half
runpy.run_module("dino.train", run_name="__main__", alter_sys=True)
"""


def test_a_run_killed_while_a_checkpoint_is_written_goes_on_from_the_one_before_and_ends_bit_identical(
    uninterrupted, tmp_path
):
    arguments = [sys.executable, "-c", HALF, *TINY, "name=a"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        arguments, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as killed:
        assert killed.stdout.readline() == "half\n"
        killed.kill()
    directory = tmp_path / "outputs" / "a"
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == [".partial.pt", "step_000000001.pt"]
    resumed = program(*TINY, "name=a", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step 1\n" in resumed.stderr
    assert_same_run(directory, uninterrupted[0] / "outputs" / "a")
    assert not [*directory.rglob(".partial*")]


@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGINT, signal.SIGUSR2))]
)
def test_a_signal_lets_the_step_end_saves_and_the_same_command_resumes(uninterrupted, tmp_path, signum):
    arguments = [sys.executable, "-m", "dino.train", *TINY, "name=a"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(arguments, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as stopped:
        checkpoints = tmp_path / "outputs" / "a" / "checkpoints"
        while stopped.poll() is None and not list(checkpoints.glob("step_*.pt")):
            time.sleep(0.005)
        stopped.send_signal(signum)
        _, said = stopped.communicate(timeout=60)
    assert stopped.returncode == 128 + signum
    assert f"stopped by {signum.name}; the same command resumes" in said
    assert "Traceback" not in said
    if signum == signal.SIGTERM:
        assert program(*TINY, "name=a", cwd=tmp_path).returncode == 0
        assert_same_run(tmp_path / "outputs" / "a", uninterrupted[0] / "outputs" / "a")


def test_a_loss_that_is_not_finite_stops_the_run_naming_the_step_and_keeps_the_checkpoint(tmp_path):
    stopped = program(*TINY, "name=a", "optimizer.lr=1e30", "scheduler.warmup_epochs=0", "precision=fp32", cwd=tmp_path)
    assert stopped.returncode == 3
    assert re.search(r"the loss is (nan|inf) at step \d+; the last good checkpoint is in", stopped.stderr)
    assert "Traceback" not in stopped.stderr
    kept = final(tmp_path / "outputs" / "a")
    assert kept["iteration"] == 1


def test_a_step_larger_than_the_data_is_refused_and_leaves_nothing(tmp_path):
    refused = program(*TINY, "training.batch_size=128", cwd=tmp_path)
    assert refused.returncode == 2
    assert "one step takes 128 images (batch_size 128 x 1 passes), and the dataset has 96" in refused.stderr
    assert not [*tmp_path.rglob("config.yaml")]


@pytest.mark.slow
def test_unlabelled_images_train_without_knn_saying_so(tmp_path):
    images = stand_in(tmp_path, "folder", per_class=12)
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(images.rglob("*.JPEG"))):
        path.rename(flat / f"{number}.jpg")
    done = program("dataset=folder", f"dataset.root={flat}", *SMALL, "backbone.depth=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "unlabelled: no k-NN" in done.stderr
    assert "to beat" not in done.stderr


def test_a_run_starts_from_the_teacher_of_another(uninterrupted, tmp_path):
    source = uninterrupted[0] / "outputs" / "a"
    config = compose(
        [*TINY, "training.max_steps=1", "optimizer.lr=1e-30", "scheduler.min_lr=0", f"init_from={source}"],
        "train",
        CONF,
    )
    run(config, tmp_path / "run")
    first, last = final(tmp_path / "run")["student_state_dict"], final(source)["teacher_state_dict"]
    assert torch.equal(first["backbone.cls_token"], last["backbone.cls_token"])


@pytest.mark.slow
def test_weights_of_another_architecture_are_refused(uninterrupted, tmp_path):
    refused = program("init_from=" + str(uninterrupted[0] / "outputs" / "a"), cwd=tmp_path)
    assert refused.returncode == 2
    assert "give a run of the same backbone and head" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_all_is_compiled_in_the_first_step_and_names_stay(tmp_path, monkeypatch):
    """Two resolutions and two networks, over an evaluation, warm-ups and stochastic depth."""
    monkeypatch.setenv("TORCH_LOGS", "recompiles")
    moving = ["teacher.warmup_temp=0.03", "teacher.warmup_temp_epochs=1", "backbone.drop_path=0.3", "backbone.depth=2"]
    few = ["dataset.train.images=48", "training.epochs=2", "name=a"]
    done = program(*TINY, *few, *moving, "compile=true", cwd=tmp_path, timeout=880)
    assert done.returncode == 0, done.stderr
    assert "epoch 2" in done.stderr
    # Of student and teacher, blocks and the last block; heads; photometry of both sizes. Each once more than the first.
    expected = ["forward"] * 5 + ["inner", "run_program"]
    assert sorted(re.findall(r"Recompiling function (\w+)", done.stderr)) == expected
    assert "backbone.cls_token" in final(tmp_path / "outputs" / "a")["student_state_dict"]


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "imagenette2-160").is_dir(), reason="no copy of ImageNette beside the checkout")
def test_the_paper_s_vit_trains_on_real_photographs(tmp_path):
    done = program(
        "backbone=dino_vits16",
        "dataset=imagenette",
        f"dataset.root={DATA}",
        "training.max_steps=3",
        "training.batch_size=4",
        "evaluator=none",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "9,469 images, 10 classes" in done.stderr


# ---- the console scripts ---------------------------------------------------------------------------------------------

NET = """
from torch import nn

class Net(nn.Module):
    output_dim = 4

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, images):
        return self.layer(images.mean((2, 3)))
"""


@pytest.mark.slow
def test_the_console_script_trains_a_class_of_the_current_folder_as_python_m_does(tmp_path):
    (tmp_path / "of_mine.py").write_text(NET)
    script = Path(sys.executable).with_name("dino-train")
    tiny = [override for override in TINY if not override.startswith("backbone.")]
    mine = ["~backbone", "+backbone={_target_: of_mine.Net}", "training.max_steps=1", "name=a"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([script, *tiny, *mine], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert final(tmp_path / "outputs" / "a")["config"]["backbone"] == {"_target_": "of_mine.Net"}


@pytest.mark.parametrize("command", ["train", "evaluate", "visualize", "compare"])
def test_every_command_is_a_console_script(command):
    (script,) = entry_points(group="console_scripts", name=f"dino-{command}")
    assert script.load() is importlib.import_module(f"dino.{command}").main
