"""check(config): everything that is wrong with a config, at once, in sentences, before any data or model work.

Names and types come from the signatures (dino/config/node.py), value rules from the constructors, which are tried
without weights; here stand the types of conf/train.yaml's own keys and the rules between parts.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from dino.config.machine import check_machine
from dino.config.node import Problems, misfits
from dino.config.settings import Settings, errors_in
from dino.config.trial import GIVEN_BY_THE_RUN, arguments_of, try_parts
from dino.runtime.annotated import is_node
from dino.runtime.nested import value_at
from dino.runtime.processes import place
from dino.runtime.refused import shown

MOST_VIEWS = 1000  # of one image, each a forward pass: far above any use, and still made in an instant


def check(config: Any, here: bool = True) -> list[str]:
    """Every problem of a plain, resolved config, one sentence each, the key first; [] where it can run.

    here=False leaves out what this machine decides (its devices, memory, files): for a job that will run on another.
    """
    if not isinstance(config, Mapping) or not all(isinstance(key, str) for key in config):
        return [f"the config: expected a dict with texts for keys, got {shown(config)}."]
    problems = Problems()
    for key, text in errors_in(Settings, config):
        problems.add(key, text)
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
