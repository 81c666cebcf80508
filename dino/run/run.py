"""From a checked config to the objects of a run."""

import copy
import functools
import math
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from dino.augmentation import DINOTransform, EvalTransform
from dino.config.check import nodes
from dino.config.node import build_node
from dino.dataset.cache import cached
from dino.loading.batches import Steps, TrainLoader, accumulation_for, steps_in_epoch, steps_of
from dino.loss.dino import DinoLoss
from dino.model import DinoModel, make_teacher
from dino.optimizer import parameter_groups
from dino.runtime.batch_norm import synchronise_batch_norm
from dino.runtime.device import autocast_for, choose_device, choose_precision, default_workers, describe
from dino.runtime.processes import barrier_refusals, broadcast_buffers, place, rank_zero_first, topology
from dino.runtime.refused import Refused
from dino.runtime.rng import seed_all
from dino.runtime.sharding import shard
from dino.scheduler import Schedule
from dino.weights import read_teacher
from dino.weights.allowlist import Group, NotAllowed, allowed


@dataclass
class Run:
    """The parts of one configuration, wired: what `python -m dino.train` trains, and what `dino.build` returns.

    `student(views)` is [ncrops x batch, K], `teacher(views[:n_global_crops])` [n_global_crops x batch, K]; `loss` takes
    both; `schedule(step)` are the values of a step; `transform` makes views of an image; `train_loader` yields (views,
    labels) on `device`. Datasets, batches and steps are as dino/dataset and dino/loading/batches.py say.
    """

    device: torch.device
    precision: str
    autocast: Callable[[], AbstractContextManager[Any]]
    num_workers: int
    device_does: str
    cache: str
    train_set: Any
    val_set: Any
    transform: DINOTransform
    eval_size: int  # pixels
    rank: int
    world_size: int
    batch_size: int
    accumulation: int
    steps_per_epoch: int
    total_steps: int
    student: DinoModel
    teacher: DinoModel
    untrained: torch.nn.Module  # the backbone as it was before the first step of all, until it is measured
    loss: DinoLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedule: Schedule
    evaluator: Any
    seed: int
    topology: str
    images: dict[str, Any]  # which images there are, in their order: a run can go on with the same alone
    broken: set[str] = field(default_factory=set)  # a sentence for each image that could not be read so far

    @property
    def effective_batch(self) -> int:
        """Images to one update, of all processes."""
        return self.batch_size * self.accumulation * self.world_size

    def steps(self, start: int, end: int | None = None) -> Steps:
        """The steps from `start` to `end`; None: to the end of the run."""
        return Steps(
            self.train_set,
            self.transform,
            self.batch_size,
            self.accumulation,
            self.seed,
            start,
            self.total_steps if end is None else end,
            self.device,
            self.num_workers,
            self.rank,
            self.world_size,
            self.device_does,
            self.broken,
        )

    @functools.cached_property
    def train_loader(self) -> TrainLoader:
        """The same batches as `steps`, an epoch at a time, with labels: for a loop of one's own."""
        return TrainLoader(functools.partial(self.steps, end=sys.maxsize), self.steps_per_epoch, self.accumulation)

    @property
    def eval_transform(self) -> EvalTransform:
        return EvalTransform(self.eval_size, self.transform.mean, self.transform.std)

    def evaluate(self) -> dict[str, float]:
        """The teacher's backbone by the evaluator; {} where there is nothing to measure."""
        broadcast_buffers(self.teacher)  # each process measures a share of the images, with one network
        return self._measured(self.evaluator, self.teacher.backbone)

    def baselines(self) -> dict[str, float]:
        """Of the untrained backbone and of raw pixels, at whatever step. Once: the backbone is then let go."""
        measured = self._measured(self.evaluator.baselines, self.untrained.to(self.device))
        del self.untrained
        return measured

    def _measured(self, measure: Callable[..., dict[str, float]], backbone: torch.nn.Module) -> dict[str, float]:
        return measure(
            backbone,
            self.train_set,
            self.val_set,
            device=self.device,
            autocast=self.autocast,
            num_workers=0 if self.cache == "device" else self.num_workers,  # a worker has no way to what the GPU holds
            broken=self.broken,
        )

    def __str__(self) -> str:
        classes = self.train_set.classes
        labels = "unlabelled: no k-NN" if classes is None else f"{len(classes)} classes"
        backbone = self.student.backbone
        backbone_size, head_size = _size(backbone), _size(self.student.projection_head)
        return "\n".join(
            [
                f"backbone   {type(backbone).__name__}, {backbone_size} parameters; "
                f"head {head_size}, {self.loss.out_dim:,} prototypes",
                f"data       {len(self.train_set):,} images, {labels}; {len(self.val_set):,} to validate",
                f"steps      {self.total_steps:,} ({self.steps_per_epoch:,} an epoch), "
                f"effective batch {self.effective_batch} = {self.batch_size} images x {self.accumulation} accumulated"
                + (f" x {self.world_size} processes" if self.world_size > 1 else ""),
                f"processes  {self.topology}",
                f"device     {describe(self.device)}, {self.precision}, {self.num_workers} workers",
            ]
        )


def assemble(config: dict[str, Any]) -> Run:
    """Builds every part, on its device. Raises Refused, in sentences, where one can't be had."""
    training = config["training"]
    device = choose_device(config["device"])
    precision = choose_precision(config["precision"], device)
    workers = training["num_workers"]

    here = place()
    processes, on_this_machine = topology(device)

    with barrier_refusals(), rank_zero_first():
        datasets = {split: build_node(config["dataset"][split]) for split in ("train", "val")}
    accumulation = accumulation_for(
        training["batch_size"],
        training["gradient_accumulation_steps"],
        training["effective_batch"],
        here.world_size,
    )
    passes = accumulation * here.world_size
    effective_batch = training["batch_size"] * passes
    images, cache = len(datasets["train"]), config["dataset"]["cache"]
    steps_in_epoch(images, training["batch_size"], passes)  # refuses too few images before any is used
    steps_per_epoch, total_steps = steps_of(images, effective_batch, training["epochs"], training["max_steps"])
    with barrier_refusals():
        datasets = cached(datasets, cache, config["dataset"]["cache_side"], device, on_this_machine)
    transform = build_node(config["augmentation"])

    seed_all(config["seed"])
    backbone = build_node(config["backbone"])
    head = build_node(config["head"], input_dim=backbone.output_dim)
    student = DinoModel(backbone, head)
    if config["init_from"] is not None:
        _initialise(student, config)
    if training["synchronise_batch_norm"]:
        synchronise_batch_norm(student, device)
    student.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    teacher = make_teacher(student)
    if training["sharded"]:
        shard(student, device)
    optimizer = build_node(config["optimizer"], params=parameter_groups(student, head.last_layer))
    schedule = build_node(
        config["scheduler"],
        epochs=training["epochs"],
        steps_per_epoch=steps_per_epoch,
        effective_batch=effective_batch,
        lr=config["optimizer"]["lr"],
        weight_decay=config["optimizer"]["weight_decay"],
        freeze_last_layer_epochs=training["freeze_last_layer_epochs"],
        **config["teacher"],
    )
    if here.rank:
        seed_all((config["seed"] + here.rank) % 2**32)  # the same weights, from here on other draws (of drop path)
    return Run(
        device=device,
        precision=precision,
        autocast=autocast_for(device, precision),
        num_workers=default_workers(device) if workers == "auto" else workers,
        device_does=training["device_does"],
        cache=cache,
        train_set=datasets["train"],
        val_set=datasets["val"],
        transform=transform,
        eval_size=config["dataset"]["eval_size"],
        rank=here.rank,
        world_size=here.world_size,
        batch_size=training["batch_size"],
        accumulation=accumulation,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        student=student,
        teacher=teacher,
        untrained=copy.deepcopy(teacher.backbone).cpu(),  # a GPU has better use for its memory
        loss=_loss(config["loss"], transform).to(device),
        optimizer=optimizer,
        scaler=_scaler(device, precision, training["skip_nonfinite_steps"]),
        schedule=schedule,
        evaluator=build_node(config["evaluator"]),
        seed=config["seed"],
        topology=processes,
        images={"number": images, "fingerprint": getattr(datasets["train"], "fingerprint", None)},
    )


def _loss(node: dict[str, Any], transform: DINOTransform) -> DinoLoss:
    with warnings.catch_warnings():  # what it warns of, the check of the config says in the config's own words
        warnings.filterwarnings("ignore", message="DinoLoss: student_temp")
        loss: DinoLoss = build_node(node, ncrops=transform.ncrops, n_global_crops=transform.n_global_crops)
    return loss


def _scaler(device: torch.device, precision: str, skip: int) -> torch.amp.GradScaler:
    """fp16's; or, for `skip`, one that leaves out the steps whose gradient is not finite, its scale 1 for ever."""
    if precision == "fp16" or not skip:
        return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    stays = math.nextafter(1, 0)  # the largest factor that torch takes; in the scale's fp32 it is 1
    return torch.amp.GradScaler(device.type, init_scale=1.0, backoff_factor=stays, growth_interval=2**31 - 1)


def _initialise(student: DinoModel, config: dict[str, Any]) -> None:
    """The weights of config["init_from"]. Nothing that the file names is built; the command names the student."""
    source = config["init_from"]
    try:
        file = read_teacher(source)
        parts: dict[Group, Any] = {"backbone": file.backbone, "head": file.head}
        for group, node in parts.items():
            named = [str(own["_target_"]) for _, own in nodes(config[group])]  # in the command: it is trusted
            allowed(group, node, file.path, [*config["trust"], *named])
        file.check_shapes(student.state_dict())
        student.load_state_dict(file.weights())
    except NotAllowed as refused:
        raise Refused(f"init_from={source}: {refused}") from refused
    except (RuntimeError, ValueError, FileNotFoundError) as error:
        words = " ".join(str(error).split())
        raise Refused(f"init_from={source}: {words[:300]}; give a run of the same backbone and head.") from error


def _size(module: torch.nn.Module) -> str:
    count = sum(parameter.numel() for parameter in module.parameters())
    return f"{count / 1e6:.1f} M" if count >= 100_000 else f"{count / 1e3:.1f} k"
