"""Several processes against one: the same steps, the same figures, and one end for all."""

import copy
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_in_ranks
from test_train import TINY, assert_same_run, assert_same_state, final, program
from torch import nn

from dino import KNN, DinoLoss, DinoModel, DinoProjectionHead, DINOTransform, Schedule, Steps, parameter_groups
from dino.backbone.resnet import ResNet, SmallResNet
from dino.backbone.timm import Timm
from dino.backbone.vit import ViT
from dino.config import CONF, compose
from dino.config.check import check
from dino.dataset.textures import Textures
from dino.history import History
from dino.loading.sampler import Batching, StepSampler
from dino.model import make_teacher
from dino.run.checkpoint import STATES
from dino.run.learner import Learner
from dino.run.parts import assemble
from dino.runtime.batch_norm import synchronise_batch_norm
from dino.runtime.processes import (
    Place,
    all_gather_objects,
    all_gather_rows,
    all_reduce_max,
    all_reduce_mean,
    barrier_refusals,
    is_single_process,
    place,
    rank_indices,
    rank_zero_first,
    topology,
)
from dino.runtime.refused import Refused
from dino.runtime.sharding import data_parallel, full_tensor, shard
from dino.train import train

pytestmark = pytest.mark.slow  # whole programs, several processes each

ROOT = Path(__file__).parents[2]
PLAIN = ["backbone=dino_vits16", "backbone.heads=2", "backbone.patch_size=8", "backbone.drop_path=0", "head=dino"]


def torchrun(count, *overrides, cwd, restarts=0, **options):
    """`torchrun --nproc-per-node count -m dino.train ...` as a user starts it."""
    more = [f"--max-restarts={restarts}", "--monitor-interval=0.1", "-m", "dino.train"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *more, *overrides],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def together_until_done(count, *overrides, cwd, restarts=0, timeout=200):
    with torchrun(count, *overrides, cwd=cwd, restarts=restarts) as started:
        said = wait(started, timeout)
    return started.returncode, said


def wait(started, timeout):
    try:
        return started.communicate(timeout=timeout)[1]
    finally:
        kill(started)


def kill(started):
    """torchrun and its processes, at once: they would outlive it."""
    for pid in (*pids_of_ranks(started.pid).values(), *([started.pid] if started.poll() is None else [])):
        os.kill(pid, signal.SIGKILL)


def pids_of_ranks(launcher):
    """The processes that torchrun started, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (path / "environ").read_text() if parent == launcher else ""
        except (OSError, ValueError):
            continue
        if rank := re.search("\0RANK=([0-9]+)\0", f"\0{environment}"):
            found[int(rank[1])] = int(path.name)
    return found


# ---- the same steps -------------------------------------------------------------------------------------------------


def five_steps(kind, dtype, batch_size, accumulation, lr, synchronise=True, share=False):
    """Five steps from the same weights on the same images; parameters, center and mean loss of each step."""
    torch.manual_seed(0)
    backbone = (
        ViT(hidden_dim=32, depth=2, heads=2, patch_size=8, image_size=32) if kind == "vit" else SmallResNet(width=8)
    )
    student = DinoModel(backbone, DinoProjectionHead(backbone.output_dim, 32, 16, 48, use_bn=kind != "vit")).to(dtype)
    if synchronise:
        synchronise_batch_norm(student, torch.device("cpu"))
    teacher, loss = make_teacher(student), DinoLoss(48, ncrops=4).to(dtype)
    last_layer = student.projection_head.last_layer
    if share:
        shard(student, torch.device("cpu"))
    optimizer = torch.optim.SGD(parameter_groups(student, last_layer), lr=1.0, momentum=0.9)
    here, losses = place(), []
    steps = Steps(
        Textures("train", size=32, images=80),
        DINOTransform(num_local_views=2, global_size=32, local_size=16),
        Batching(batch_size, accumulation, rank=here.rank, world_size=here.world_size),
    )
    assert len(steps) == 5
    schedule = Schedule(
        epochs=1,
        steps_per_epoch=1000,
        effective_batch=16,
        lr=lr,
        weight_decay=0.1,
        momentum=0.9,
        warmup_epochs=0.0,
        min_lr=0.0,
    )
    learner = Learner(student, teacher, loss, optimizer, schedule)
    learner.parallel = data_parallel(student, accumulation)
    in_dtype = (
        (step, (replace(part, views=[view.to(dtype) for view in part.views]) for part in parts))
        for step, parts in steps
    )
    train(learner, in_dtype, lambda step: losses.append(all_reduce_mean(step.loss.clone()).item()))
    state = {name: full_tensor(value).clone() for name, value in student.state_dict().items()}
    state |= {f"teacher.{name}": value for name, value in teacher.state_dict().items()}
    return state | {"center": loss.center, "losses": torch.tensor(losses, dtype=torch.float64)}


@pytest.mark.parametrize(
    ("kind", "dtype", "lr", "tolerance"),
    [
        ("vit", torch.float32, 0.03, 1e-6),
        ("vit", torch.float64, 0.03, 1e-12),
        ("resnet", torch.float64, 0.03, 1e-9),
        ("resnet", torch.float32, 1e-5, 1e-6),  # a larger rate blows up rounding at the kinks of its ReLUs
    ],
)
def test_two_processes_take_the_steps_of_one_with_twice_the_batch(kind, dtype, lr, tolerance):
    one = five_steps(kind, dtype, 16, 1, lr)
    for two in run_in_ranks(2, five_steps, kind, dtype, 8, 1, lr):
        assert two.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=tolerance, atol=tolerance, msg=name)


def test_two_processes_accumulating_two_batches_take_the_steps_of_one_with_four_times_the_batch():
    one = five_steps("vit", torch.float64, 16, 1, 0.03)
    for two in run_in_ranks(2, five_steps, "vit", torch.float64, 4, 2, 0.03):
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(("kind", "accumulation"), [("vit", 1), ("vit", 2), ("resnet", 1)])
def test_a_sharded_student_takes_the_same_steps(kind, accumulation):
    one = five_steps(kind, torch.float64, 16, 1, 0.03)
    for two in run_in_ranks(2, five_steps, kind, torch.float64, 8 // accumulation, accumulation, 0.03, True, True):
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-9, atol=1e-9, msg=name)


def sharded_parts():
    """Of each model: the parts that gather their parameters on their own."""
    from torch.distributed.fsdp import FSDPModule

    torch.manual_seed(0)
    models = {
        "vit": ViT(hidden_dim=32, depth=2, heads=2, patch_size=8, image_size=32),
        "resnet": ResNet("resnet18"),
        "timm": Timm("vit_tiny_patch16_224", depth=3),
        "timm_stages": Timm("convnext_atto", depths=(1, 1, 2, 1)),
    }
    found, images = {}, torch.rand(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name, model in models.items():
        whole = copy.deepcopy(model.double())
        for one in (whole, model):
            if one is model:
                shard(model, torch.device("cpu"))
            one(images).square().sum().backward()
        for expected, parameter in zip(whole.parameters(), model.parameters()):
            torch.testing.assert_close(full_tensor(parameter.grad), expected.grad, msg=name)
        found[name] = [part for part, module in model.named_modules() if isinstance(module, FSDPModule)]
    return found


def test_every_block_of_a_sharded_network_gathers_its_own_parameters():
    blocks = {
        "vit": [f"blocks.{i}" for i in range(2)],
        "resnet": [f"network.layer{stage}.{block}" for stage in range(1, 5) for block in range(2)],
        "timm": [f"network.blocks.{i}" for i in range(3)],
    }
    for found in run_in_ranks(2, sharded_parts):
        for name, parts in blocks.items():
            assert found[name] == ["", *parts]
        stages = found["timm_stages"]
        assert {f"network.stages.{stage}.blocks.0" for stage in range(4)} < set(stages)
        assert {f"network.stages.{stage}" for stage in range(4)} < set(stages)


def test_batch_norms_that_are_not_synchronised_take_other_steps():
    one = five_steps("resnet", torch.float64, 16, 1, 0.03)
    two, _ = run_in_ranks(2, five_steps, "resnet", torch.float64, 8, 1, 0.03, False)
    assert (two["losses"] - one["losses"]).abs().max() > 1e-4


def test_every_step_holds_the_same_images_however_many_processes_share_it():
    def keys(world_size, batch_size, accumulation):
        samplers = [
            StepSampler(50, Batching(batch_size, accumulation, 3, r, world_size), 0, 10) for r in range(world_size)
        ]
        assert len({sampler.steps_per_epoch for sampler in samplers}) == 1
        passes = [list(sampler) for sampler in samplers]
        steps = [[] for _ in range(10)]
        for number in range(10 * accumulation):
            for rank in range(world_size):
                steps[number // accumulation] += passes[rank][number]
        return steps

    one = keys(1, 12, 1)
    assert one == keys(2, 6, 1) == keys(2, 3, 2) == keys(3, 2, 2) == keys(4, 3, 1)
    assert all(len(set(step)) == 12 for step in one)


# ---- the same figures -----------------------------------------------------------------------------------------------


def joined(total, chunk):
    rows = torch.arange(total * 3).view(total, 3)
    mine = rows[rank_indices(total)]
    return all_gather_rows(mine, total, chunk), all_gather_rows(mine[:, 0] % 2 == 0, total, chunk)


@pytest.mark.parametrize(("total", "chunk"), [(41, 7), (3, 65536), (2, 1)])
def test_rows_computed_by_three_processes_come_together_in_order(total, chunk):
    for rows, even in run_in_ranks(3, joined, total, chunk):
        assert torch.equal(rows, torch.arange(total * 3).view(total, 3))
        assert torch.equal(even, torch.arange(0, total * 3, 3) % 2 == 0)


def measured():
    torch.manual_seed(0)
    backbone = ViT(hidden_dim=32, depth=1, heads=2, patch_size=8, image_size=32)
    images, held_out = Textures("train", size=32, images=101), Textures("val", size=32, images=47)
    return KNN(size=32, batch_size=16)(backbone, images, held_out), KNN(size=32).baselines(backbone, images, held_out)


def test_knn_of_three_processes_is_that_of_one():
    one = measured()
    assert 0.1 < one[0]["knn"] < 1
    assert all(three == one for three in run_in_ranks(3, measured))


def entropies():
    logits = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    loss, here = DinoLoss(8), place()
    mine = logits[here.rank :: here.world_size]
    loss.update_center(mine)
    return loss.center, *loss.entropies(mine)


def test_center_and_entropies_are_of_all_processes():
    one = entropies()
    for three in run_in_ranks(3, entropies):
        torch.testing.assert_close(three, one)


# ---- one end for all ------------------------------------------------------------------------------------------------


def order():
    with rank_zero_first():
        began = time.monotonic()
        time.sleep(0.2)
        ended = time.monotonic()
    return began, ended


def test_the_first_process_has_its_turn_before_the_others():
    first, *others = run_in_ranks(3, order)
    assert all(began >= first[1] for began, _ in others)


def refused():
    problems = []
    for refusing in (set(), {1}, {0, 1}):
        try:
            with barrier_refusals(), rank_zero_first():
                if place().rank in refusing:
                    raise Refused(f"rank {place().rank} has no data.")
            problems.append(())
        except Refused as error:
            problems.append(error.problems)
    return problems, all_reduce_max(place().rank, -place().rank), all_gather_objects(place().rank)


def test_a_refusal_on_one_is_one_on_all_in_its_words():
    for problems, most, everyone in run_in_ranks(2, refused):
        assert problems == [(), ("rank 1 has no data.",), ("rank 0 has no data.", "rank 1 has no data.")]
        assert most == [1, 0]
        assert everyone == [0, 1]


def test_one_process_has_no_process_group():
    assert is_single_process()
    assert place() == Place(0, 1, 0)
    model = nn.Linear(2, 2)
    assert data_parallel(model, 1) is model
    weight = torch.ones(3)
    assert all_reduce_mean(weight) is weight
    assert all_gather_rows(weight, 3) is weight
    assert topology(torch.device("cpu"))[0].startswith("1 on ")


def learning_rate():
    overrides = [*TINY, "scheduler.reference_batch_size=16", "scheduler.warmup_epochs=0"]
    return assemble(compose(overrides, "train", CONF)).schedule(0).learning_rate


def test_the_learning_rate_follows_the_effective_batch():
    one = learning_rate()
    assert run_in_ranks(2, learning_rate) == [2 * one, 2 * one]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Place(5, 8, 1)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}, Place(3, 4, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, Place()),  # a batch script, not a step
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, Place(1, 2, 0)),
    ],
)
def test_a_process_finds_its_place_as_torchrun_or_slurm_tells_it(monkeypatch, environment, expected):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert place() == expected


class GPU:
    uuid = "GPU-1"


def test_gpus_that_are_left_idle_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: GPU)
    assert "3 of 4 GPUs here are not used: torchrun --nproc-per-node 4" in topology(torch.device("cuda"))[0]


def on_one_gpu():
    torch.cuda.get_device_properties = lambda _: GPU
    try:
        topology(torch.device("cuda", 0))
    except Refused as error:
        return error.problems


def test_two_processes_on_one_gpu_are_refused():
    for problems in run_in_ranks(2, on_one_gpu):
        assert re.search("2 processes of .* would share one GPU; start as many as it has GPUs", problems[0])


def test_one_device_for_several_processes_is_refused_at_the_door(monkeypatch):
    config = compose(["device=cuda:1", "training.sharded=true", "optimizer=sgd"], "train", CONF)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    config["training"]["effective_batch"] = 64
    found = "\n".join(check(config))
    assert "device=cuda:1: one device for 3 processes; use device=cuda or cpu" in found
    assert "training.effective_batch=64: expected a multiple of training.batch_size=32 x 3 processes" in found
    assert "torch's fused SGD takes no sharded parameters; set optimizer.fused=false" in found


# ---- the program ----------------------------------------------------------------------------------------------------

LONG = [*TINY, *PLAIN, "training.effective_batch=8", "precision=fp32", "name=a"]  # 36 steps, 12 an epoch


@pytest.fixture(scope="module")
def by_one(tmp_path_factory):
    directory = tmp_path_factory.mktemp("by_one")
    assert program(*LONG, cwd=directory).returncode == 0
    return directory


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("by_two")
    status, said = together_until_done(2, *LONG, "training.batch_size=4", cwd=directory)
    assert status == 0, said
    return directory, said


def curve(directory):
    history = History.load(directory / "outputs" / "a" / "history.json")
    return history.get_iterations(), torch.tensor(history.get_metric("loss"))


def test_two_processes_write_one_run_and_say_what_they_are(by_two, by_one):
    directory, said = by_two
    assert "effective batch 8 = 4 images x 1 accumulated x 2 processes" in said
    assert re.search(r"processes  2 on \S+ \(2\)", said)
    assert said.count("epoch 3, loss") == 1
    names = [
        sorted(path.relative_to(d / "outputs" / "a").as_posix() for path in (d / "outputs" / "a").rglob("*"))
        for d in (directory, by_one)
    ]
    assert names[0] == names[1]
    one, two = curve(by_one), curve(directory)
    assert one[0] == two[0] == [1, 11, 21, 31, 36]
    torch.testing.assert_close(two[1], one[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_the_checkpoint_of_some_processes_is_continued_by_others_on_the_same_curve(by_one, tmp_path, before, after):
    cut = [*LONG, "checkpoint.every_epochs=1"]
    batch = {1: "training.batch_size=8", 2: "training.batch_size=4"}
    with torchrun(before, *cut, batch[before], cwd=tmp_path) as stopped:
        checkpoints = tmp_path / "outputs" / "a" / "checkpoints"
        while stopped.poll() is None and not list(checkpoints.glob("step_000000012.pt")):
            time.sleep(0.005)
        kill(stopped)
        wait(stopped, 60)
    stopped_at = max(int(path.stem[5:]) for path in checkpoints.glob("step_*.pt"))
    assert 12 <= stopped_at < 36
    status, said = together_until_done(after, *cut, batch[after], cwd=tmp_path)
    assert status == 0, said
    assert f"resumed at step {stopped_at}" in said
    (iterations, losses), (expected, reference) = curve(tmp_path), curve(by_one)
    assert iterations == expected
    torch.testing.assert_close(losses, reference, rtol=1e-3, atol=1e-3)


def test_another_effective_batch_does_not_continue_a_run(by_one):
    config = [override for override in LONG if "effective_batch" not in override]
    refused = program(*config, "training.batch_size=4", "training.max_steps=40", cwd=by_one)
    assert refused.returncode == 2
    assert "training.max_steps" in refused.stderr  # another setting is named as such
    state = final(by_one / "outputs" / "a")
    state |= {"total_steps": 99}
    torch.save(state, by_one / "outputs" / "a" / "checkpoints" / "step_000000036.pt")
    try:
        refused = program(*config, "training.batch_size=4", cwd=by_one)
    finally:
        torch.save(state | {"total_steps": 36}, by_one / "outputs" / "a" / "checkpoints" / "step_000000036.pt")
    assert refused.returncode == 2
    assert "was trained with steps of 8 images" in refused.stderr
    assert "make steps of 4; give training.effective_batch=8" in refused.stderr


DROPPING = [*TINY, *PLAIN[:3], "backbone.drop_path=0.3", "training.batch_size=4", "name=a", "evaluator=none"]


def test_a_process_that_is_killed_ends_the_others_torchrun_restarts_all_and_the_run_ends_bit_identical(tmp_path):
    (tmp_path / "whole").mkdir()
    status, said = together_until_done(2, *DROPPING, cwd=tmp_path / "whole")
    assert status == 0, said

    command = [*DROPPING, "checkpoint.every_minutes=0.002"]
    with torchrun(2, *command, cwd=tmp_path, restarts=1) as started:
        checkpoints = tmp_path / "outputs" / "a" / "checkpoints"
        while started.poll() is None and not any(int(path.stem[5:]) >= 9 for path in checkpoints.glob("step_*.pt")):
            time.sleep(0.005)
        first, second = (pids_of_ranks(started.pid)[rank] for rank in (0, 1))
        os.kill(second, signal.SIGKILL)
        killed = time.monotonic()
        while first in pids_of_ranks(started.pid).values() and time.monotonic() - killed < 60:
            time.sleep(0.05)
        assert first not in pids_of_ranks(started.pid).values()
        said = wait(started, 120)
    assert started.returncode == 0, said
    assert "process 0 of 2 lost another, which failed or was killed" in said
    assert "the same command resumes from it" in said
    assert re.search(r"resumed at step \d+", said)
    assert_same_run(tmp_path / "outputs" / "a", tmp_path / "whole" / "outputs" / "a")


def test_the_others_say_so_where_the_first_is_killed(tmp_path):
    with torchrun(2, *DROPPING, "training.epochs=500", cwd=tmp_path) as started:
        checkpoints = tmp_path / "outputs" / "a" / "checkpoints"
        while started.poll() is None and not list(checkpoints.glob("step_*.pt")):
            time.sleep(0.005)
        os.kill(pids_of_ranks(started.pid)[0], signal.SIGKILL)
        said = wait(started, 60)
    assert started.returncode == 1
    assert said.count("process 1 of 2 lost another, which failed or was killed") == 1


def test_a_signal_to_one_process_stops_all_at_the_same_step_with_a_checkpoint(tmp_path):
    with torchrun(2, *DROPPING, "training.epochs=500", cwd=tmp_path) as started:
        checkpoints = tmp_path / "outputs" / "a" / "checkpoints"
        while started.poll() is None and not list(checkpoints.glob("step_*.pt")):
            time.sleep(0.005)
        os.kill(pids_of_ranks(started.pid)[1], signal.SIGTERM)
        said = wait(started, 60)
    assert started.returncode == 1  # torchrun's own
    assert said.count("stopped by SIGTERM; the same command resumes") == 1
    assert len(final(tmp_path / "outputs" / "a")["rng"]) == 2
    assert "lost another" not in said


def test_a_loss_that_is_not_finite_stops_all(tmp_path):
    wild = ["optimizer.lr=1e30", "scheduler.warmup_epochs=0", "precision=fp32"]
    status, said = together_until_done(2, *DROPPING, *wild, cwd=tmp_path, timeout=60)
    assert status == 1
    assert len(re.findall(r"the loss is (?:nan|inf) at step \d+; the last good checkpoint", said)) == 1
    assert final(tmp_path / "outputs" / "a")["iteration"] == 1


def test_an_exception_in_one_process_ends_all(tmp_path):
    broken = ["dataset.train._target_=broken_on_one.BrokenOnOne"]
    status, said = together_until_done(2, *DROPPING, *broken, cwd=tmp_path, timeout=60)
    assert status == 1
    assert "can't be read" in said
    assert "process 0 of 2 lost another" in said


def test_a_refusal_is_said_once(tmp_path):
    status, said = together_until_done(2, *DROPPING, "training.batch_size=64", cwd=tmp_path, timeout=60)
    assert status == 1
    assert said.count("one step takes 128 images (batch_size 64 x 2 passes), and the dataset has 96") == 1
    assert "dino.runtime.refused" not in said
    assert not [*tmp_path.rglob("config.yaml")]


def test_sharded_students_resume_and_their_checkpoints_hold_whole_tensors(tmp_path):
    (tmp_path / "whole").mkdir()
    sharded = [*LONG, "training.batch_size=4", "training.sharded=true", "training.epochs=1", "checkpoint.keep=20"]
    sharded.append("evaluator=none")
    status, said = together_until_done(2, *sharded, "checkpoint.every_minutes=1e-9", cwd=tmp_path)
    assert status == 0, said
    run = tmp_path / "outputs" / "a"
    before = final(run)
    assert not [name for name, value in before["student_state_dict"].items() if type(value) is not torch.Tensor]
    assert math.prod(before["student_state_dict"]["backbone.blocks.0.mlp.0.weight"].shape) == 32 * 128
    for path in (run / "checkpoints").glob("step_*.pt"):
        if int(path.stem[5:]) > 5:
            path.unlink()
    status, said = together_until_done(2, *sharded, cwd=tmp_path)
    assert status == 0, said
    assert "resumed at step 5" in said
    after = copy.deepcopy(final(run))
    for part in STATES:
        assert_same_state(after[part], before[part])
