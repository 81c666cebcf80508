"""The keys of the YAMLs of all commands outside the groups: type, range and words in one place.

`Settings.model_validate(config)` gives `settings.training.batch_size`; `errors_in` gives all errors, in sentences.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictStr, ValidationError
from pydantic_core import ErrorDetails

from dino.config.node import Problems, did_you_mean
from dino.runtime.annotated import is_node
from dino.runtime.importing import dotted
from dino.runtime.nested import value_at
from dino.runtime.refused import Refused, shown

MOST_EVAL_PIXELS = 2**14  # that of dino.augmentation, which takes a second to import
NODE = "a node with its _target_"
LARGEST = 2**63 - 1  # the largest whole number that torch and numpy hold


def _dotted(names: list[str]) -> list[str]:
    if not all(map(dotted, names)):
        raise ValueError
    return names


def _device(name: str) -> str:
    from dino.runtime.device import DEVICES  # loads torch, which a command without a device does not need

    if not re.fullmatch(DEVICES, name):
        raise ValueError
    return name


def _node(value: dict[str, Any]) -> dict[str, Any]:
    if not is_node(value):
        raise ValueError
    return value


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


# The description is what an error says was expected.
Count = Annotated[int, Field(ge=1, le=LARGEST, description="a whole number, 1 or more")]
CountOrZero = Annotated[int, Field(ge=0, le=LARGEST, description="a whole number, 0 or more")]
MaybeCount = Annotated[Count | None, Field(description="a whole number, 1 or more, or null")]
Duration = Annotated[float, Field(ge=0, description="a finite number, 0 or more")]
Positive = Annotated[float, Field(gt=0, description="a finite number above 0")]
MaybePositive = Annotated[Positive | None, Field(description="a finite number above 0, or null")]
Fraction = Annotated[float, Field(ge=0, le=1, description="a number in [0, 1]")]
Switch = Annotated[bool, Field(description="true or false")]
Automatic = Annotated[bool | Literal["auto"], Field(description="auto, true or false")]
Text = Annotated[StrictStr, Field(min_length=1)]
MaybeText = Annotated[Text | None, Field(description="a text or null")]
Range = Annotated[tuple[float, float], BeforeValidator(_pair), Field(description="a list of 2, each a finite number")]
Names = Annotated[list[str], AfterValidator(_dotted), Field(description="a list of dotted names, such as [my_package]")]
Seed = Annotated[int, Field(ge=0, lt=2**32, description="a whole number from 0 to 4294967295")]
Device = Annotated[StrictStr, AfterValidator(_device), Field(description="auto, cpu, cuda, cuda:N or mps")]
Workers = Annotated[CountOrZero | Literal["auto"], Field(description="auto or a whole number, 0 or more")]
Node = Annotated[dict[str, Any], AfterValidator(_node), Field(description=NODE)]


class Section(BaseModel):
    """Values keep their types: a text is no number, and true is no 1. A whole number may stand for a float."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Training(Section):
    epochs: Count
    max_steps: MaybeCount
    batch_size: Count  # images per process in one forward pass
    gradient_accumulation_steps: Count  # forward passes per optimizer update
    effective_batch: MaybeCount  # images per optimizer update; where set, the accumulation follows from it
    gradient_clip: MaybePositive
    skip_nonfinite_steps: CountOrZero
    freeze_last_layer_epochs: Duration
    synchronise_batch_norm: Switch
    sharded: Switch
    num_workers: Workers
    device_does: Annotated[
        Literal["auto", "photometry", "crops", "decode"], Field(description="auto, photometry, crops or decode")
    ]


class Teacher(Section):
    momentum: Fraction
    final_momentum: Fraction
    temp: Positive
    warmup_temp: Positive
    warmup_temp_epochs: Duration


class Checkpoint(Section):
    every_minutes: Positive
    every_epochs: MaybeCount
    keep: Count


class Kept(Section):
    """How the images of a data set are kept in memory."""

    cache: Annotated[Literal["none", "ram", "device"], Field(description="none or ram or device")]
    cache_side: MaybeCount  # pixels


class Dataset(Kept):
    """What every dataset's YAML gives for other keys to read, and its two splits; it may have keys of its own."""

    model_config = ConfigDict(extra="allow")

    train: Node
    val: Node
    epochs: Count
    global_size: Count  # pixels
    local_size: Count  # pixels
    num_local_views: CountOrZero
    global_scale: Range
    local_scale: Range
    out_dim: Annotated[int, Field(ge=2, le=10**7, description="a whole number from 2 to 10,000,000")]
    teacher_momentum: Fraction
    eval_size: Annotated[
        int, Field(ge=1, le=MOST_EVAL_PIXELS, description=f"a whole number from 1 to {MOST_EVAL_PIXELS}")
    ]
    evaluate_every_epochs: Count


class Settings(Section):
    seed: Seed
    name: Annotated[Text | int | None, Field(description="a text or null")]
    device: Device
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], Field(description="auto or fp32 or bf16 or fp16")]
    compile: Automatic
    graph: Automatic
    deterministic: Switch
    init_from: MaybeText
    trust: Names
    training: Training
    teacher: Teacher
    checkpoint: Checkpoint
    evaluate_every_epochs: Count
    log_every_steps: Count
    profile: Switch
    dataset: Dataset
    backbone: Node
    head: Node
    augmentation: Node
    loss: Node
    optimizer: Node
    scheduler: Node
    evaluator: Node
    logger: Annotated[dict[str, Node] | None, Field(description="loggers by name, such as logger=[csv,tensorboard]")]


Measure = Literal["knn", "linear", "logistic", "few_shot", "finetune", "unsupervised"]
AboveZero = Annotated[int, Field(gt=0, le=LARGEST, description="a whole number above 0")]
MaybeAboveZero = Annotated[AboveZero | None, Field(description="a whole number above 0, or null")]


ChosenGroup = Annotated[dict[str, Any] | None, Field(description="an option of the group, or null")]


class Evaluate(Section):
    """conf/evaluate.yaml; the groups backbone and dataset are chosen on the command line, or are the run's."""

    backbone: ChosenGroup = None
    dataset: ChosenGroup = None
    run: MaybeText
    checkpoint: MaybeText
    trust: Names
    measures: Annotated[list[Measure], Field(description=f"a list, each {' or '.join(get_args(Measure))}")]
    baselines: Switch
    size: MaybeAboveZero  # pixels
    output: MaybeText
    seed: Seed
    device: Device
    precision: Annotated[Literal["auto", "fp32", "bf16"], Field(description="auto or fp32 or bf16")]
    batch_size: AboveZero
    num_workers: Workers
    ks: Annotated[list[AboveZero], Field(min_length=1, description="whole numbers above 0, one or more")]
    temperature: Positive
    layers: MaybeAboveZero
    patch_mean: Annotated[bool | None, Field(description="true, false or null")]
    few_shot: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(description="shares of the labels, in (0, 1]")]
    probe_epochs: AboveZero
    finetune_epochs: AboveZero


A_TEACHER = "a run's directory, its teacher.safetensors or a checkpoint (.pt), such as checkpoint=outputs/<run>"
SOME_IMAGES = "the path of an image or of a folder of images, such as images=photo.jpg"


class Visualize(Section):
    """conf/visualize.yaml."""

    checkpoint: Annotated[Text, Field(description=A_TEACHER)]
    images: Annotated[Text, Field(description=SOME_IMAGES)]
    output: Annotated[Text, Field(description="the path of a folder")]
    size: Annotated[  # pixels
        Annotated[int, Field(ge=1, le=MOST_EVAL_PIXELS)] | None,
        Field(description=f"a whole number from 1 to {MOST_EVAL_PIXELS}, or null"),
    ]
    mass: Annotated[
        Annotated[float, Field(gt=0, le=1)] | None,
        Field(description="a share of the attention, above 0 and at most 1, or null"),
    ]
    foreground: Switch
    neighbours: MaybeText
    k: Count
    video: Switch
    fps: Annotated[float, Field(ge=0.01, le=1000, description="a number from 0.01 to 1000")]  # a GIF knows no slower
    animation: Annotated[Literal["gif", "webp"], Field(description="gif or webp")]
    trust: Names
    device: Device


class Compare(Section):
    """conf/compare.yaml."""

    runs: Annotated[
        list[Text],
        BeforeValidator(_listed),
        Field(min_length=1, description="the directory of a sweep or a run, or a list of them: runs=outputs/<sweep>"),
    ]


Model = TypeVar("Model", bound=Section)


def settings_of(model: type[Model], config: Mapping[str, Any]) -> Model:
    """The config as `model`. Raises Refused, with a sentence for each value that it does not take."""
    problems = Problems()
    for key, text in errors_in(model, config):
        problems.add(key, text)
    if problems:
        raise Refused(*problems.values())
    return model.model_validate(config)


def errors_in(model: type[Section], config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, sentence) of every value that `model` does not take."""
    try:
        model.model_validate(config)
    except ValidationError as error:
        for found in error.errors(include_url=False):
            yield _in_a_sentence(model, found, config)


def _in_a_sentence(model: type[Section], found: ErrorDetails, config: Mapping[str, Any]) -> tuple[str, str]:
    at, keys, expected = model, list[str](), ""
    for name in map(str, found["loc"]):
        keys.append(name)
        field = at.model_fields.get(name)
        if field is None:
            break
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            at, expected = field.annotation, f"the keys {', '.join(field.annotation.model_fields)}"
            continue
        expected = field.description or ""
        if name == "logger" and len(found["loc"]) > 1:
            keys.append(str(found["loc"][1]))
            expected = NODE
        break
    key, group = ".".join(keys), keys[0]
    if found["type"] == "extra_forbidden":
        meant = did_you_mean(keys[-1], at.model_fields) or f"; there are {', '.join(at.model_fields)}"
        return key, f"{key}: there is no such key{meant}"
    if found["type"] == "missing":
        return key, f"{key}: missing; add it to the YAML"
    value = value_at(config, key)
    if isinstance(value, int) and abs(value) > LARGEST:
        expected = "a number of at most 19 digits"
    if expected == NODE or (group == "dataset" and len(keys) == 1):
        expected += f"; choose {'logger=[csv,tensorboard]' if group == 'logger' else f'{group}=...'}"
    return key, f"{key}={shown(value)}: expected {expected}"
