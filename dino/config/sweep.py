"""The runs of a sweep and their directories, known before the first one starts.

What hydra's basic sweeper makes of a list of overrides, so that the check at the door, a launcher and hydra itself mean
the same runs: `outputs/<sweep>/<what differs>`, by the resolvers below, which conf/train.yaml uses. The same command
finds its sweep again.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from dino.config.check import check
from dino.config.composition import CONF, composed, plain
from dino.config.node import locate
from dino.run.directory import CONFIG, SWEEP, changes_no_result, check_claim, check_writable
from dino.runtime.files import atomic_write
from dino.runtime.refused import Refused

OUTPUTS = Path("outputs")
LONGEST_NAME = 200  # bytes; file systems take 255, and files beside it may want a suffix
# Settings of hydra that say how a sweep is run; its runs have no use for them.
OF_SWEEPS = ("hydra.mode", "hydra.sweep", "hydra.sweeper", "hydra/sweeper", "hydra.launcher", "hydra/launcher")
IN_WORKERS = "JoblibLauncher"  # the launcher with processes of its own on this machine


@dataclass(frozen=True)
class Sweep:
    """`runs`: (overrides, directory) of each, in the order in which they start; none where a sweeper such as Optuna
    chooses them as it goes. `fixed`: the overrides that all runs have; `swept`: the keys of the others.
    """

    directory: Path
    runs: list[tuple[list[str], Path]]
    fixed: list[str] = field(default_factory=list)
    swept: list[str] = field(default_factory=list)
    launcher: str = "BasicLauncher"

    @property
    def in_workers(self) -> bool:
        return self.launcher.endswith(IN_WORKERS)

    @property
    def here(self) -> bool:
        """Whether the runs are on this machine."""
        return self.in_workers or self.launcher.endswith("BasicLauncher")

    def record(self) -> None:
        """Writes the runs into the sweep's directory, beside those of earlier commands; so `dino.compare` knows of
        those that have not started. Nothing for a single run.
        """
        if not self.swept:
            return
        path = self.directory / SWEEP
        try:
            runs = dict(json.loads(path.read_text())["runs"])
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or cut short
            runs = {}
        runs |= {directory.name: overrides for overrides, directory in self.runs}
        self.directory.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            partial.write_text(json.dumps({"runs": runs}, ensure_ascii=False) + "\n")


def sweep_of(overrides: Sequence[str], config_name: str = "train", conf: Path = CONF) -> Sweep:
    """What `--multirun` makes of the overrides; where none is swept, a single run in its usual directory.

    Raises Refused where the sweeper can't enumerate the values, two runs would share a directory, or a single run has
    the sweep's. An override that can't be read stays in every run: the check has words for it.
    """
    parsed, unreadable = _parsed(overrides)
    config, problems = composed([str(o.input_line) for o in parsed if not o.is_sweep_override()], config_name, conf)
    of_sweeps = tuple(str(o.input_line) for o in parsed if _is_within(o.key_or_group, OF_SWEEPS))
    if wrong := [problem for problem in problems if problem.startswith(of_sweeps)]:
        raise Refused(*wrong)  # the runs don't have these, and so the check of the runs can't find them
    settings = config.hydra
    for part in ("sweeper", "launcher"):
        _check_plugin(part, str(settings[part].get("_target_")))
    params = _of_file(settings.sweeper.get("params"))
    with hydra.initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())  # for backbone=glob(*)
        task = [*parser.parse_overrides(params), *parser.parse_overrides([str(o.input_line) for o in parsed])]
        for_hydra = [o for o in task if o.is_hydra_override()]
        task = _last_of_each(o for o in task if not o.is_hydra_override())
        for_all = [str(o.input_line) for o in for_hydra if not _is_within(o.key_or_group, OF_SWEEPS)] + unreadable
        fixed = [*for_all, *(str(o.input_line) for o in task if not o.is_sweep_override())]
        basic = str(settings.sweeper.get("_target_")).endswith("BasicSweeper")
        choices = _choices(task) if basic else []
    keys = [o.get_key_element() for o in task if o.is_sweep_override()]
    directory = _directory(task, for_hydra)
    runs = [([*for_all, *choice], directory / run_name(choice, None, keys)) for choice in choices]
    _check_apart(runs)
    if keys and (directory / CONFIG).exists():
        raise Refused(f"{directory} holds a single run; give the sweep another name=.")
    return Sweep(directory, runs, fixed, keys, str(settings.launcher.get("_target_")))


def check_runs(sweep: Sweep, config_name: str = "train", conf: Path = CONF) -> None:
    """Checks every run, or what stays the same in all where a sweeper chooses as it goes. Raises Refused with all
    problems."""
    problems: dict[str, None] = {}
    for overrides, directory in sweep.runs or [(sweep.fixed, sweep.directory)]:
        config, found = composed(overrides, config_name, conf)
        if not sweep.runs and config.hydra.runtime.choices.get("evaluator") == "none":
            found.append(
                "evaluator=none: the sweeper goes by the k-NN, and nothing would measure it; use evaluator=knn."
            )
        problems |= dict.fromkeys([*found, *_problems_of(plain(config), directory, sweep.here)])
    if problems:
        raise Refused(*problems)


def check_run(overrides: list[str], config_name: str, conf: Path) -> None:
    """Checks the one run that the overrides make, and the directory that it would have. Raises Refused."""
    config, found = composed(overrides, config_name, conf)
    problems = [*found, *_problems_of(plain(config), Path(str(config.hydra.run.dir)), here=True)]
    if problems:
        raise Refused(*problems)


def _problems_of(values: dict[str, Any], directory: Path, here: bool) -> list[str]:
    """All that keeps a run from starting in its directory."""
    problems = check(values, here)
    try:
        check_writable(directory)
        check_claim(directory, values)
    except Refused as refused:
        problems += refused.problems
    return problems


def run_name(overrides: Sequence[str], name: str | int | None = None, only: Sequence[str] | None = None) -> str:
    """The directory below outputs/: `name`, or the overrides that change a result, sorted; "default" for none.

    An override `name=x` counts as `name`. What is too long ends in a hash of the whole.
    only: the swept keys, which alone name a run within its sweep's directory; that itself (".") where none is swept.
    """
    if only is not None and not only:
        return "."
    kept = {}
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if only is not None:
            if key in [wanted.lstrip("+") for wanted in only]:
                kept[key] = override.lstrip("+")
        elif key == "name":
            name = None if value == "null" else value.strip("\"'")
        elif not changes_no_result(key.lstrip("~")):
            kept[key] = override.lstrip("+")
    text = ",".join(sorted(kept.values())) if name is None else str(name)
    safe = re.sub(r"[^\w.,=+:@~\[\]-]+", "_", text).lstrip(".") or "default"
    if len(safe.encode()) > LONGEST_NAME:
        digest = hashlib.sha256(safe.encode()).hexdigest()[:12]
        safe = f"{safe.encode()[: LONGEST_NAME - 13].decode(errors='ignore')}-{digest}"
    return safe


def sweep_name(overrides: Sequence[str], params: Mapping[str, Any] | None = None) -> str:
    """The directory of a sweep below outputs/: of its overrides as they are written, those of a file included."""
    task = _last_of_each(_parsed([*_of_file(params), *overrides])[0])
    named = any(o.key_or_group == "name" and not o.is_sweep_override() for o in task)
    keys = [o.get_key_element() for o in task if o.is_sweep_override() or not changes_no_result(o.key_or_group)]
    return run_name([str(o.input_line) for o in task], only=None if named or not keys else keys)


def swept_keys(overrides: Sequence[str], params: Mapping[str, Any] | None = None) -> list[str]:
    """The keys that have several values."""
    task = _last_of_each(_parsed([*_of_file(params), *overrides])[0])
    return [o.get_key_element() for o in task if o.is_sweep_override()]


def _last_of_each(overrides: Iterable[Override]) -> list[Override]:
    """As in hydra, the last override of a key holds, in the place of the first."""
    return [*{override.get_key_element(): override for override in overrides}.values()]


def _of_file(params: Mapping[str, Any] | None) -> list[str]:
    return [f"{key}={value}" for key, value in (params or {}).items()]


# A cached resolver has in a run the value that it had for the whole command: a run's own overrides are no sweep.
OmegaConf.register_new_resolver("run_name", run_name, replace=True)
OmegaConf.register_new_resolver("sweep_name", sweep_name, replace=True, use_cache=True)
OmegaConf.register_new_resolver("swept_keys", swept_keys, replace=True, use_cache=True)


class NameRuns(Callback):  # type: ignore[misc]
    """Resolves the name of a run once before there is one, so that the cache holds the swept keys."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        OmegaConf.select(config, "hydra.sweep.subdir")


def _parsed(overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
    """(overrides that hydra can read, those that it can't)."""
    parsed, unreadable = [], []
    for text in overrides:
        try:
            parsed.append(OverridesParser.create().parse_override(text))
        except HydraException:
            unreadable.append(text)
    return parsed, unreadable


def is_multirun(overrides: Sequence[str]) -> bool:
    """Whether hydra.mode=MULTIRUN is among them, the other way to write --multirun."""
    return any(o.key_or_group == "hydra.mode" and "MULTIRUN" in str(o.value()) for o in _parsed(overrides)[0])


def _choices(task: list[Override]) -> list[list[str]]:
    """Hydra's own product of the swept values, each with the fixed overrides in their places."""
    for override in task:
        if override.is_interval_sweep():
            raise Refused(
                f"{override.input_line}: a sweep of all combinations takes values, not an interval; "
                "list them, or let Optuna choose with hydra/sweeper=optuna."
            )
        if override.is_sweep_override() and not list(override.sweep_iterator()):
            raise Refused(f"{override.input_line}: there is no such value.")
    values = [o.sweep_string_iterator() if o.is_sweep_override() else [o.get_value_element_as_str()] for o in task]
    keyed = [[f"{o.get_key_element()}={value}" for value in of] for o, of in zip(task, values, strict=True)]
    return [list(choice) for choice in itertools.product(*keyed)]


def _directory(task: list[Override], for_hydra: list[Override]) -> Path:
    """The sweep's: of its overrides as they are written, or where hydra.sweep.dir says."""
    given = {o.key_or_group: o for o in for_hydra if o.key_or_group in ("hydra.sweep.dir", "hydra.sweep.subdir")}
    if subdir := given.get("hydra.sweep.subdir"):
        raise Refused(f"{subdir.input_line}: the runs of a sweep are named by what differs; leave it out.")
    if (place := given.get("hydra.sweep.dir")) is None:
        return OUTPUTS / sweep_name([str(o.input_line) for o in task])
    if re.search(r"[$'\"\\]", str(place.value())):
        raise Refused(f"{place.input_line}: expected the plain path of a folder, the same in every run; or use name=.")
    return Path(str(place.value()))


def _check_apart(runs: list[tuple[list[str], Path]]) -> None:
    seen: dict[Path, list[str]] = {}
    for overrides, directory in runs:
        if directory in seen:
            both = f"{' '.join(seen[directory])} and {' '.join(overrides)}"
            raise Refused(f"two runs of the sweep would share {directory} ({both}); give each value once.")
        seen[directory] = overrides


def _check_plugin(part: str, target: str) -> None:
    try:
        locate(target)
    except ImportError as error:
        extra = re.sub(r".*hydra_(\w+)_(sweeper|launcher)\..*", r"hydra-\1-\2", target)
        raise Refused(f"hydra/{part}: {error}; pip install {extra}.") from error


def _is_within(key: str, groups: Sequence[str]) -> bool:
    return any(key == group or key.startswith((f"{group}.", f"{group}/")) for group in groups)
