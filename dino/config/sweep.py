"""The runs of a sweep and their directories, known before the first one starts.

What hydra's basic sweeper makes of a list of overrides, so that the check at the door, a launcher and hydra itself mean
the same runs: `outputs/<sweep>/<what differs>`. The same command finds its sweep again.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import OmegaConf

from dino.config.check import check
from dino.config.composition import CONF, composed, plain, quoted
from dino.config.node import locate
from dino.run.directory import CONFIG, SWEEP, changes_no_result
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
    launcher: str = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"

    @property
    def in_workers(self) -> bool:
        return self.launcher.endswith(IN_WORKERS)

    @property
    def here(self) -> bool:
        """Whether the runs are on this machine."""
        return self.in_workers or self.launcher.endswith("BasicLauncher")

    def placed(self) -> list[str]:
        """Overrides that make hydra's --multirun use these very directories.

        Given fixed, for hydra would make the sweep's directory anew from the overrides of each run.
        """
        keys = ",".join(f'"{key}"' for key in self.swept)
        subdir = f"${{run_name:${{hydra:overrides.task}},null,[{keys}]}}" if self.swept else "."
        return [f"hydra.sweep.dir='{self.directory}'", f"hydra.sweep.subdir='{subdir}'"]

    def record(self) -> None:
        """Writes the runs into the sweep's directory, beside those of earlier commands; so `dino.compare` knows of
        those that have not started. Nothing for a single run. Raises Refused where a run has that directory.
        """
        if not self.swept:
            return
        if (self.directory / CONFIG).exists():
            raise Refused(f"{self.directory} holds a single run; give the sweep another name=.")
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

    Raises Refused where the sweeper can't enumerate the values or two runs would share a directory. An override that
    can't be read stays in every run: the check has words for it.
    """
    overrides = [quoted(text) for text in overrides]
    parsed, unreadable = _parsed(overrides)
    config, problems = composed([str(o.input_line) for o in parsed if not o.is_sweep_override()], config_name, conf)
    of_sweeps = tuple(str(o.input_line) for o in parsed if _is_within(o.key_or_group, OF_SWEEPS))
    if wrong := [problem for problem in problems if problem.startswith(of_sweeps)]:
        raise Refused(*wrong)  # the runs don't have these, and so the check of the runs can't find them
    settings = config.hydra
    for part in ("sweeper", "launcher"):
        _check_plugin(part, str(settings[part].get("_target_")))
    params = [f"{key}={value}" for key, value in (settings.sweeper.get("params") or {}).items()]
    with hydra.initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())  # for backbone=glob(*)
        task = [*parser.parse_overrides(params), *parser.parse_overrides([str(o.input_line) for o in parsed])]
        for_hydra = [o for o in task if o.is_hydra_override()]
        # As in hydra, the last override of a key holds, in the place of the first.
        task = [*{o.get_key_element(): o for o in task if not o.is_hydra_override()}.values()]
        swept = [o for o in task if o.is_sweep_override()]
        for_all = [str(o.input_line) for o in for_hydra if not _is_within(o.key_or_group, OF_SWEEPS)] + unreadable
        fixed = [*for_all, *(str(o.input_line) for o in task if not o.is_sweep_override())]
        basic = str(settings.sweeper.get("_target_")).endswith("BasicSweeper")
        choices = _choices(task) if basic else []
    keys = [o.get_key_element() for o in swept]
    directory = _directory(task, for_hydra)
    runs = [
        ([*for_all, *choice], directory / run_name(choice, only=keys) if swept else directory) for choice in choices
    ]
    _check_apart(runs)
    return Sweep(directory, runs, fixed, keys, str(settings.launcher.get("_target_")))


def check_runs(sweep: Sweep, config_name: str = "train", conf: Path = CONF, here: bool | None = None) -> None:
    """Composes and checks every run, or what stays the same in all where a sweeper chooses as it goes.

    Raises Refused with all problems. `here`: as for `check`; None: as the sweep says.
    """
    problems: dict[str, None] = {}
    for overrides in [overrides for overrides, _ in sweep.runs] or [sweep.fixed]:
        config, found = composed(overrides, config_name, conf)
        if not sweep.runs and config.hydra.runtime.choices.get("evaluator") == "none":
            found.append(
                "evaluator=none: the sweeper goes by the k-NN, and nothing would measure it; use evaluator=knn."
            )
        problems |= dict.fromkeys([*found, *check(plain(config), here=sweep.here if here is None else here)])
    if problems:
        raise Refused(*problems)


def run_name(overrides: Sequence[str], name: str | int | None = None, only: Sequence[str] | None = None) -> str:
    """The directory below outputs/: `name`, or the overrides that change a result, sorted; "default" for none.

    An override `name=x` counts as `name`. `only`: keys that alone make the name, in a sweep. What is too long ends in
    a hash of the whole.
    """
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


OmegaConf.register_new_resolver("run_name", run_name, replace=True)

Plugins.instance()  # finds the plugins, which store their options
for group, option in (("sweeper", "optuna.yaml"), ("launcher", "joblib.yaml")):
    # Hydra takes a stored option for the schema of a file of the same name, and fails at the defaults in both. Of
    # these two the files in conf/hydra are the ones to use: Optuna's stored one would minimise the k-NN.
    ConfigStore.instance().repo["hydra"][group].pop(option, None)


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
    return [list(choice) for choice in BasicSweeper.split_arguments(task, None)[0]]


def _directory(task: list[Override], for_hydra: list[Override]) -> Path:
    """The sweep's: of its overrides as they are written, or where hydra.sweep.dir says."""
    given = {o.key_or_group: o for o in for_hydra if o.key_or_group in ("hydra.sweep.dir", "hydra.sweep.subdir")}
    if subdir := given.get("hydra.sweep.subdir"):
        raise Refused(f"{subdir.input_line}: the runs of a sweep are named by what differs; leave it out.")
    if (place := given.get("hydra.sweep.dir")) is None:
        named = any(o.key_or_group == "name" and not o.is_sweep_override() for o in task)
        keys = [o.get_key_element() for o in task if o.is_sweep_override() or not changes_no_result(o.key_or_group)]
        return OUTPUTS / run_name([str(o.input_line) for o in task], only=None if named else keys)
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
