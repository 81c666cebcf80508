"""From a checked config to the parts of a run."""

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from dino.augmentation import DINOTransform
from dino.config.check import nodes
from dino.config.node import build_node, with_random_weights
from dino.config.settings import Settings
from dino.config.trial import arguments_of
from dino.dataset.cache import Images, cached
from dino.evaluator.knn import Evaluator, Measured
from dino.loading.batches import Steps, TrainLoader
from dino.loading.data import Data
from dino.loading.sampler import Batching, accumulation_for, steps_of
from dino.loading.views import Loading
from dino.loss.dino import DinoLoss
from dino.model import DinoModel, make_teacher
from dino.optimizer import parameter_groups
from dino.run.learner import Learner
from dino.runtime.batch_norm import synchronise_batch_norm
from dino.runtime.device import autocast_for, choose_kernels, choose_precision, default_workers, describe, use_device
from dino.runtime.processes import Place, barrier_refusals, broadcast_buffers, place, rank_zero_first, topology
from dino.runtime.refused import Refused, one_line
from dino.runtime.rng import preserve_rng, seed_all
from dino.runtime.sharding import shard
from dino.scheduler import Schedule
from dino.weights import read_teacher
from dino.weights.allowlist import Group, NotAllowed, allowed

T = TypeVar("T")


@dataclass
class Parts:
    """The parts of one configuration, wired: what `python -m dino.train` trains, and what `dino.build` returns.

    `student(views)` is [ncrops x batch, K], `teacher(views[:n_global_crops])` [n_global_crops x batch, K]; `loss` takes
    both; `schedule(step)` are the values of a step; `transform` makes views of an image; `train_loader` yields (views,
    labels) on `device`.
    """

    device: torch.device
    precision: str
    place: Place
    topology: str  # the processes and their machines, in words
    data: Data
    learner: Learner
    schedule: Schedule
    untrained: torch.nn.Module  # the backbone with random weights, until it is measured
    evaluator: Evaluator

    @property
    def student(self) -> DinoModel:
        return self.learner.student

    @property
    def teacher(self) -> DinoModel:
        return self.learner.teacher

    @property
    def loss(self) -> DinoLoss:
        return self.learner.loss

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.learner.optimizer

    @property
    def transform(self) -> DINOTransform:
        return self.data.transform

    @property
    def train_set(self) -> Images:
        return self.data.train_set

    @property
    def val_set(self) -> Images:
        return self.data.val_set

    @property
    def train_loader(self) -> TrainLoader:
        return self.data.train_loader

    def steps(self, start: int, end: int | None = None) -> Steps:
        return self.data.steps(start, end)

    def evaluate(self) -> Measured:
        """The teacher's backbone by the evaluator."""
        broadcast_buffers(self.teacher)  # each process measures a share of the images, with one network
        return self._with_data(self.evaluator.measure, self.teacher.backbone)

    def baselines(self) -> dict[str, float]:
        """Of the untrained backbone and of raw pixels, at whatever step. Once: the backbone is then let go."""
        measured = self._with_data(self.evaluator.baselines, self.untrained.to(self.device))
        del self.untrained
        return measured

    def _with_data(self, measure: Callable[..., T], backbone: torch.nn.Module) -> T:
        loading = self.data.loading
        return measure(
            backbone,
            self.data.train_set,
            self.data.val_set,
            mean=self.data.transform.mean,
            std=self.data.transform.std,
            device=self.device,
            autocast=self.learner.autocast,
            num_workers=0 if loading.cached_on_device else loading.num_workers,  # workers cannot reach a GPU's images
            broken=self.data.broken,
        )

    def __str__(self) -> str:
        data, batching, backbone = self.data, self.data.batching, self.student.backbone
        classes = data.train_set.classes
        labels = "unlabelled: no k-NN" if classes is None else f"{len(classes)} classes"
        backbone_size, head_size = _size(backbone), _size(self.student.projection_head)
        return "\n".join(
            [
                f"backbone   {type(backbone).__name__}, {backbone_size} parameters; "
                f"head {head_size}, {self.loss.out_dim:,} prototypes",
                f"data       {len(data.train_set):,} images, {labels}; {len(data.val_set):,} to validate",
                f"steps      {data.total_steps:,} ({data.steps_per_epoch:,} an epoch), "
                f"effective batch {batching.effective_batch} = {batching.batch_size} images x "
                f"{batching.accumulation} accumulated"
                + (f" x {batching.world_size} processes" if batching.world_size > 1 else ""),
                f"processes  {self.topology}",
                f"device     {describe(self.device)}, {self.precision}, {data.loading.num_workers} workers",
            ]
        )


def assemble(config: dict[str, Any]) -> Parts:
    """Builds every part, on its device. Raises Refused, in sentences, where one can't be had."""
    settings = Settings.model_validate(config)
    device = use_device(settings.device)
    choose_kernels(settings.deterministic, device)
    precision, here = choose_precision(settings.precision, device), place()
    words, on_this_machine = topology(device)
    data = _data(settings, device, here, on_this_machine)
    seed_all(settings.seed)
    schedule = _schedule(settings, data)
    learner = _learner(settings, data, schedule, device, precision)
    untrained = _untrained(settings, learner.teacher.backbone)
    if here.rank:
        seed_all((settings.seed + here.rank) % 2**32)  # the same weights, from here on other draws (of drop path)
    return Parts(
        device=device,
        precision=precision,
        place=here,
        topology=words,
        data=data,
        learner=learner,
        schedule=schedule,
        untrained=untrained,
        evaluator=build_node(settings.evaluator),
    )


def _data(settings: Settings, device: torch.device, here: Place, on_this_machine: int) -> Data:
    training, cache = settings.training, settings.dataset.cache
    with barrier_refusals(), rank_zero_first():
        datasets = {split: build_node(getattr(settings.dataset, split)) for split in ("train", "val")}
    accumulation = accumulation_for(
        training.batch_size,
        training.gradient_accumulation_steps,
        training.effective_batch,
        here.world_size,
    )
    batching = Batching(training.batch_size, accumulation, settings.seed, here.rank, here.world_size)
    images = len(datasets["train"])
    batching.steps_per_epoch(images)  # refuses too few images before any is used
    steps_per_epoch, total_steps = steps_of(images, batching.effective_batch, training.epochs, training.max_steps)
    with barrier_refusals():
        datasets = cached(datasets, cache, settings.dataset.cache_side, device, on_this_machine)
    workers = training.num_workers
    workers = default_workers(device) if workers == "auto" else workers
    return Data(
        train_set=datasets["train"],
        val_set=datasets["val"],
        transform=build_node(settings.augmentation),
        eval_size=settings.dataset.eval_size,
        batching=batching,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        loading=Loading(device, workers, training.device_does, cached_on_device=cache == "device"),
    )


def _schedule(settings: Settings, data: Data) -> Schedule:
    schedule: Schedule = build_node(
        settings.scheduler,
        epochs=settings.training.epochs,
        steps_per_epoch=data.steps_per_epoch,
        effective_batch=data.batching.effective_batch,
        lr=settings.optimizer["lr"],
        weight_decay=settings.optimizer["weight_decay"],
        freeze_last_layer_epochs=settings.training.freeze_last_layer_epochs,
        **settings.teacher.model_dump(),
    )
    return schedule


def _learner(settings: Settings, data: Data, schedule: Schedule, device: torch.device, precision: str) -> Learner:
    training = settings.training
    backbone = build_node(settings.backbone)
    head = build_node(settings.head, input_dim=backbone.output_dim)
    student = DinoModel(backbone, head)
    if settings.init_from is not None:
        _initialise(student, settings.init_from, settings)
    if training.synchronise_batch_norm:
        synchronise_batch_norm(student, device)
    student.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    teacher = make_teacher(student)
    if training.sharded:
        shard(student, device)
    return Learner(
        student=student,
        teacher=teacher,
        loss=_loss(settings.loss, data.transform).to(device),
        optimizer=build_node(
            arguments_of("optimizer", settings.optimizer), params=parameter_groups(student, head.last_layer)
        ),
        schedule=schedule,
        max_norm=float(training.gradient_clip or math.inf),
        autocast=autocast_for(device, precision),
        scaler=_scaler(device, precision, training.skip_nonfinite_steps),
    )


def _untrained(settings: Settings, backbone: torch.nn.Module) -> torch.nn.Module:
    """The backbone before the first step; where it is pretrained or comes from `init_from`, another one with the random
    weights that it would have had. On the CPU, since a GPU has better use for its memory.
    """
    node = settings.backbone
    if not node.get("pretrained") and settings.init_from is None:
        return copy.deepcopy(backbone).cpu()
    with preserve_rng():
        seed_all(settings.seed)
        untrained: torch.nn.Module = build_node(with_random_weights(node))
    return untrained


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


def _initialise(student: DinoModel, source: str, settings: Settings) -> None:
    """Gives `student` the weights at `source`. Nothing that the file names is built; the command names the student."""
    try:
        file = read_teacher(source)
        parts: dict[Group, Any] = {"backbone": file.backbone, "head": file.head}
        for group, node in parts.items():
            # What the command names is trusted.
            named = [str(own["_target_"]) for _, own in nodes(getattr(settings, group))]
            allowed(group, node, file.path, [*settings.trust, *named])
        file.check_shapes(student.state_dict())
        student.load_state_dict(file.weights())
    except NotAllowed as refused:
        raise Refused(f"init_from={source}: {refused}") from refused
    except (RuntimeError, ValueError, FileNotFoundError) as error:
        raise Refused(
            f"init_from={source}: {one_line(error)[:300]}; give a run of the same backbone and head."
        ) from error


def _size(module: torch.nn.Module) -> str:
    count = sum(parameter.numel() for parameter in module.parameters())
    return f"{count / 1e6:.1f} M" if count >= 100_000 else f"{count / 1e3:.1f} k"
