"""check(config): everything that is wrong with a config, at once, in sentences, before any data or model work.

Names and types come from the signatures (dino/config/node.py), value rules from the constructors, which are tried
without weights; here stand the types of conf/train.yaml's own keys and the rules between parts.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from dino.config.machine import check_machine
from dino.config.node import Problems, did_you_mean, misfits
from dino.config.trial import GIVEN_BY_THE_RUN, arguments_of, try_parts
from dino.runtime.annotated import Misfit, TooLarge, fitted, is_node
from dino.runtime.device import DEVICES
from dino.runtime.nested import value_at
from dino.runtime.processes import place
from dino.runtime.refused import shown
from dino.weights.allowlist import dotted


class Rule(NamedTuple):
    hint: Any
    expected: str = ""
    holds: Callable[[Any], bool] = lambda value: True

    def against(self, key: str, value: Any) -> str | None:
        """A sentence where `key` cannot have that value."""
        try:
            holds = value != "???" and self.holds(fitted(value, self.hint))
        except TooLarge as misfit:
            return f"{key}={shown(value)}: expected {misfit}."
        except Misfit as misfit:
            return f"{key}={shown(value)}: expected {self.expected or misfit}."
        return None if holds else f"{key}={shown(value)}: expected {self.expected or 'a value'}."


def _from(least: float | int, unless_null: bool = False, hint: Any = int) -> Rule:
    words = f"{'a whole number' if hint is int else 'a finite number'}, {least} or more"
    return Rule(
        hint | None if unless_null else hint,
        words + (", or null" if unless_null else ""),
        lambda v: v is None or v >= least,
    )


def _above_zero(unless_null: bool = False) -> Rule:
    words = "a finite number above 0" + (", or null" if unless_null else "")
    return Rule(float | None if unless_null else float, words, lambda v: v is None or v > 0)


FRACTION = Rule(float, "a number in [0, 1]", lambda v: 0 <= v <= 1)
TEXT = Rule(str | None, "a text or null", lambda v: v != "")
NAMES = Rule(
    list[str],
    "a list of dotted names, such as [my_package]",
    lambda v: all(map(dotted, v)),
)

MOST_EVAL_PIXELS = 2**14  # that of dino.augmentation, which takes a second to import

# conf/train.yaml's keys outside the groups, and what every dataset's YAML gives for others to read.
OWN: dict[str, Rule] = {
    "seed": Rule(int, "a whole number from 0 to 4294967295", lambda v: 0 <= v < 2**32),
    "name": Rule(str | int | None, "a text or null", lambda v: v != ""),
    "device": Rule(str, "auto, cpu, cuda, cuda:N or mps", lambda v: bool(re.fullmatch(DEVICES, v))),
    "precision": Rule(Literal["auto", "fp32", "bf16", "fp16"]),
    "compile": Rule(bool),
    "init_from": TEXT,
    "trust": NAMES,
    "training.epochs": _from(1),
    "training.max_steps": _from(1, unless_null=True),
    "training.batch_size": _from(1),
    "training.gradient_accumulation_steps": _from(1),
    "training.effective_batch": _from(1, unless_null=True),
    "training.gradient_clip": _above_zero(unless_null=True),
    "training.freeze_last_layer_epochs": _from(0, hint=float),
    "training.skip_nonfinite_steps": _from(0),
    "training.synchronise_batch_norm": Rule(bool),
    "training.sharded": Rule(bool),
    "training.num_workers": Rule(
        int | Literal["auto"], "auto or a whole number, 0 or more", lambda v: v == "auto" or v >= 0
    ),
    "training.device_does": Rule(Literal["photometry", "crops", "decode"]),
    "teacher.momentum": FRACTION,
    "teacher.final_momentum": FRACTION,
    "teacher.temp": _above_zero(),
    "teacher.warmup_temp": _above_zero(),
    "teacher.warmup_temp_epochs": _from(0, hint=float),
    "checkpoint.every_epochs": _from(1),
    "checkpoint.every_minutes": _above_zero(),
    "checkpoint.keep": _from(1),
    "evaluate_every_epochs": _from(1),
    "log_every_steps": _from(1),
    "dataset.cache": Rule(Literal["none", "ram", "device"]),
    "dataset.cache_side": _from(1, unless_null=True),
    "dataset.epochs": _from(1),
    "dataset.global_size": _from(1),
    "dataset.local_size": _from(1),
    "dataset.num_local_views": _from(0),
    "dataset.global_scale": Rule(tuple[float, float]),
    "dataset.local_scale": Rule(tuple[float, float]),
    "dataset.out_dim": Rule(int, "a whole number from 2 to 10,000,000", lambda v: 2 <= v <= 10**7),
    "dataset.teacher_momentum": FRACTION,
    "dataset.eval_size": Rule(
        int, f"a whole number from 1 to {MOST_EVAL_PIXELS}", lambda v: 1 <= v <= MOST_EVAL_PIXELS
    ),
    "dataset.evaluate_every_epochs": _from(1),
}
MOST_VIEWS = 1000  # of one image, each a forward pass: far above any use, and still made in an instant
SECTIONS = ("training", "teacher", "checkpoint")
NODES = (
    "backbone",
    "head",
    "augmentation",
    "loss",
    "optimizer",
    "scheduler",
    "evaluator",
    "dataset.train",
    "dataset.val",
)


def check(config: Any, here: bool = True) -> list[str]:
    """Every problem of a plain, resolved config, one sentence each, the key first; [] where it can run.

    here=False leaves out what this machine decides (its devices, memory, files): for a job that will run on another.
    """
    if not isinstance(config, Mapping) or not all(isinstance(key, str) for key in config):
        return [f"the config: expected a dict with texts for keys, got {shown(config)}."]
    problems = Problems()
    _check_own_keys(config, problems)
    for path, node in nodes(config):
        for key, text in misfits(path, arguments_of(path, node), GIVEN_BY_THE_RUN.get(path, {})):
            problems.add(key, text)
    _check_between_parts(config, problems)
    parameters = try_parts(config, problems)
    if here:
        check_machine(config, problems, parameters)
    return list(problems.values())


def warnings_of(config: Mapping[str, Any]) -> list[str]:
    """What can run and is probably not meant. For a config that `check` accepts."""
    found = []
    student = value_at(config, "loss.student_temp")
    for key in ("teacher.temp", "teacher.warmup_temp"):
        temp = value_at(config, key)
        if student is not None and temp is not None and student <= temp:
            found.append(
                f"loss.student_temp={shown(student)} is not above {key}={shown(temp)}: the teacher should be sharper "
                "(the paper has 0.1 and 0.04), or the outputs drift to uniform."
            )
    if (
        value_at(config, "training.effective_batch") is not None
        and value_at(config, "training.gradient_accumulation_steps") != 1
    ):
        found.append("training.gradient_accumulation_steps is not read: training.effective_batch is set and decides.")
    return found


def nodes(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, node) of every node of a plain config: itself, and those within it."""
    if is_node(value):
        yield path, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in items:
        yield from nodes(inner, f"{path}.{key}" if path else str(key))


def _check_own_keys(config: Mapping[str, Any], problems: Problems) -> None:
    groups = {path.partition(".")[0] for path in NODES} | {"logger"}
    known = {key.partition(".")[0] for key in OWN} | groups
    for key in config:
        if key not in known:
            problems.add(str(key), f"{key}: there is no such key{did_you_mean(str(key), known)}")
    for section in SECTIONS:
        keys = [key.partition(".")[2] for key in OWN if key.startswith(section + ".")]
        if not isinstance(config.get(section), Mapping):
            problems.add(section, f"{section}={shown(config.get(section))}: expected the keys {', '.join(keys)}")
            continue
        for key in config[section]:
            if key not in keys:
                meant = did_you_mean(str(key), keys) or f"; there are {', '.join(keys)}"
                problems.add(f"{section}.{key}", f"{section}.{key}: there is no such key{meant}")
    for path in NODES:
        group, _, part = path.partition(".")
        if part and not isinstance(config.get(group), Mapping):
            problems.add(group, f"{group}={shown(config.get(group))}: choose one of conf/{group}/ with {group}=...")
        elif not is_node(value_at(config, path)) and not problems.within(group):
            problems.add(
                path, f"{path}={shown(value_at(config, path))}: expected a node with its _target_; choose {group}=..."
            )
    loggers = {} if config.get("logger") is None else config["logger"]
    if not isinstance(loggers, Mapping):
        problems.add("logger", f"logger={shown(loggers)}: expected loggers by name, such as logger=[csv,tensorboard]")
        loggers = {}
    for name, logger in loggers.items():
        if not is_node(logger):
            text = f"logger.{name}={shown(logger)}: expected a node with its _target_; choose logger=[csv,tensorboard]"
            problems.add(f"logger.{name}", text)
    for key, rule in OWN.items():
        section, _, name = key.rpartition(".")
        if section in problems:
            continue
        if name not in (value_at(config, section) if section else config):
            problems.add(key, f"{key}: missing; add it to the YAML")
            continue
        if wrong := rule.against(key, value_at(config, key)):
            problems.add(key, wrong)


def _check_between_parts(config: Mapping[str, Any], problems: Problems) -> None:
    head, loss = value_at(config, "head.output_dim"), value_at(config, "loss.out_dim")
    if None not in (head, loss) and head != loss and not {"head.output_dim", "loss.out_dim"} & problems.keys():
        problems.add(
            "loss.out_dim",
            f"loss.out_dim={shown(loss)}: expected head.output_dim={shown(head)}; set dataset.out_dim for both",
        )
    whole, batch = value_at(config, "training.effective_batch"), value_at(config, "training.batch_size")
    ranks = place().world_size
    if whole is not None and not problems.within("training") and whole % (batch * ranks):
        problems.add(
            "training.effective_batch",
            f"training.effective_batch={whole}: expected a multiple of training.batch_size={batch}"
            f"{f' x {ranks} processes' if ranks > 1 else ''}; change one of them",
        )
    sharded, target = value_at(config, "training.sharded") is True, str(value_at(config, "optimizer._target_"))
    if sharded and value_at(config, "optimizer.fused") is True and target.endswith("SGD"):
        text = "optimizer.fused=True: torch's fused SGD takes no sharded parameters; set optimizer.fused=false"
        problems.add("optimizer.fused", text)
    if sharded and value_at(config, "precision") == "fp16":
        problems.add("precision", "precision=fp16: needs training.sharded=false; use bf16 or fp32")
    if sharded and value_at(config, "training.skip_nonfinite_steps"):
        key = "training.skip_nonfinite_steps"
        problems.add(key, f"{key}={config['training']['skip_nonfinite_steps']}: needs training.sharded=false; use 0")
    views = value_at(config, "augmentation.num_local_views")
    if isinstance(views, int) and views > MOST_VIEWS:
        text = f"augmentation.num_local_views={views}: expected at most {MOST_VIEWS}; the paper's longest runs have 10"
        problems.add("augmentation.num_local_views", text)
    optimizer: Any = config.get("optimizer")
    for key in ("lr", "weight_decay"):  # the class may have a default, and the schedule must start at the same
        if is_node(optimizer) and key not in optimizer:
            problems.add(
                f"optimizer.{key}", f"optimizer.{key}: missing, and the schedule starts there; give it a value"
            )
