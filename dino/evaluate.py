"""What a backbone has learned: `python -m dino.evaluate run=outputs/<run> [key=value ...]`.

In place of a run: checkpoint=<a teacher.safetensors or checkpoint>, or backbone=dino_vits16 backbone.pretrained=true
dataset=imagenette dataset.root=<folder>. The features of a data set are computed once and kept; then

  knn           weighted k-NN, every k of `ks` (Wu et al. 2018; DINO, Sec. 3.2)
  linear        a linear classifier by SGD, several learning rates at once (DINO, Sec. 3.2)
  logistic      logistic regression
  few_shot      the same from shares of the labels
  finetune      the whole backbone, trained on
  unsupervised  RankMe, alpha of the spectrum, agreement of two views: without labels, of every checkpoint of a run

are measured, of the backbone, of one that has learned nothing, and of raw pixels. They are printed, and written to
evaluation.json, the run's history and its loggers. Keys: conf/evaluate.yaml.
"""

import argparse
import json
import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from dino.config import CONF, build_node, compose
from dino.config.machine import check_machine
from dino.config.node import Problems, misfits, with_random_weights
from dino.config.settings import Evaluate, Kept, errors_in
from dino.dataset.cache import cached
from dino.evaluator.features import RawPixels
from dino.evaluator.measures import Measures
from dino.evaluator.unsupervised import preferred
from dino.history import History
from dino.logger import Loggers
from dino.run.checkpoint import FOLDER, newest_checkpoint
from dino.run.directory import CONFIG, lock, state_of
from dino.runtime.annotated import is_node
from dino.runtime.device import choose_precision, default_workers, describe, use_device
from dino.runtime.refused import Refused
from dino.weights import load_teacher
from dino.weights.allowlist import allowed
from dino.weights.checkpoint_file import read_checkpoint

log = logging.getLogger("dino.evaluate")
RESULTS = "evaluation.json"
PLAIN = ("rankme", "alpha")  # figures that are no shares


@dataclass
class Subject:
    """What is measured. `run`: the directory of the run that it is the teacher of, None for another's weights.

    The nodes are safe to build: typed in the command, or passed by dino.weights.allowlist.
    """

    name: str
    backbone: nn.Module
    node: dict[str, Any]  # of the config: how the backbone is built
    dataset: dict[str, Any]
    preprocessing: dict[str, Any]  # size in pixels, mean, std
    augmentation: dict[str, Any]
    logger: dict[str, Any]  # nodes by name
    run: Path | None
    output: Path


def main() -> None:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m dino.evaluate",
        description=summary,
        epilog=f"{more}\n{(CONF / 'evaluate.yaml').read_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for dino.train")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        evaluate(compose(parser.parse_args().overrides, "evaluate", CONF))
    except Refused as refused:
        print(*refused.problems, sep="\n", file=sys.stderr)
        sys.exit(2)


def evaluate(config: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{"backbone": {measure: figure}, "untrained": ..., "raw_pixels": ...}; also written, see above.

    Raises Refused, in sentences, for what cannot be measured.
    """
    config = {"backbone": None, "dataset": None} | config
    if problems := list(problems_of(config)):
        raise Refused(*problems)
    subject = subject_of(config)
    measures = measures_of(config, subject)
    size, of = measures.transform.size, " and ".join(f"{len(data):,}" for data in measures.data.values())
    log.info("%s at %d pixels on %s images, by %s", subject.name, size, of, describe(measures.device))
    if not measures.labelled:
        log.info("the images have no labels: only what needs none is measured")
    results = {"backbone": measures.of("backbone", subject.backbone, config["measures"])}
    if config["baselines"]:
        torch.manual_seed(config["seed"])
        untrained = measures.untrained(build_node(with_random_weights(subject.node)))
        results["untrained"] = measures.of("untrained", untrained, config["measures"])
        results["raw_pixels"] = measures.of("raw_pixels", RawPixels(), config["measures"])
    print(table(results), flush=True)
    if "unsupervised" in config["measures"] and len(rows := of_checkpoints(measures, subject, config["trust"])) > 1:
        print(table(rows), preferred(rows), sep="\n", flush=True)
        results |= rows
    record(results, subject)
    return results


def problems_of(config: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each key that cannot be used, the key first."""
    problems = Problems()
    for key, text in errors_in(Evaluate, config):
        problems.add(key, text)
    check_machine(config, problems, parameters=0)
    yield from problems.values()
    given = [key for key in ("run", "checkpoint", "backbone") if config[key] is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        yield f"run, checkpoint, backbone: expected one of them, got {got}; give run=outputs/<run>, say."
    if given == ["backbone"] and config["dataset"] is None:
        yield "dataset: a backbone comes with no images; give dataset=imagenette dataset.root=<folder>, say."
    for path, node in (
        ("backbone", config["backbone"]),
        *((f"dataset.{split}", (config["dataset"] or {}).get(split)) for split in ("train", "val")),
    ):
        if is_node(node):
            yield from (sentence for _, sentence in misfits(path, node))


def subject_of(config: dict[str, Any]) -> Subject:
    """Raises Refused where weights or images are not to be had, or a file names what it may not."""
    trained: dict[str, Any] = {}
    if config["backbone"] is not None:
        backbone, node = build_node(config["backbone"]), config["backbone"]
        weights = {True: "pretrained", False: "random weights"}.get(
            pretrained := node.get("pretrained", False), pretrained
        )
        name = f"{type(backbone).__name__}, {weights}"
        size = {"size": config["dataset"]["eval_size"]}
        prepared, directory = size | getattr(backbone, "normalisation", {}), None  # those without it want ImageNet's
    else:
        given = Path(config["run"] or config["checkpoint"])
        try:
            directory = next((folder for folder in (given, *given.parents[:2]) if (folder / CONFIG).is_file()), None)
            if directory is not None:
                trained = from_run(directory / CONFIG, config)
            teacher: Any = load_teacher(given, config["trust"])
        except Refused:
            raise
        except (OSError, ValueError) as error:
            raise Refused(str(error)) from error
        backbone, node, prepared, name = teacher.backbone, teacher.config["backbone"], teacher.preprocessing, str(given)
    dataset = config["dataset"] or trained.get("dataset")
    if dataset is None:
        raise Refused(f"dataset: nothing beside {name} says which images; give dataset=<one> dataset.root=<folder>.")
    return Subject(
        name=name,
        backbone=backbone,
        node=node,
        dataset=dataset,
        preprocessing=prepared | ({"size": config["size"]} if config["size"] else {}),
        augmentation=trained.get("augmentation", {"_target_": "dino.augmentation.DINOTransform"}),
        logger=trained.get("logger", {}),
        run=directory if config["run"] else None,
        output=Path(config["output"] or directory or Path("outputs", "evaluate", re.sub(r"[^\w.-]+", "_", name))),
    )


def from_run(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Of a run's config.yaml what is built of it, as far as the command says nothing: the run may be a stranger's.

    Raises Refused for what a file may not name, and for a file that is no config of a run.
    """
    try:
        said = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise Refused(f"{path} cannot be read ({str(error).splitlines()[0]}); mend it, or give checkpoint=.") from error
    parts = [said.get(part) or {} for part in ("dataset", "augmentation", "logger")] if isinstance(said, dict) else []
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise Refused(f"{path}: expected the config of a run, with its dataset and augmentation; give checkpoint=.")
    dataset, augmentation, loggers = parts
    trust, found = config["trust"], dict[str, Any]()
    if config["dataset"] is None and dataset:
        if problems := list(errors_in(Kept, {key: dataset.get(key) for key in Kept.model_fields})):
            raise Refused(*(f"{path}: dataset.{text}" for _, text in problems))
        found["dataset"] = {key: dataset[key] for key in Kept.model_fields}
        found["dataset"] |= {split: allowed("dataset", dataset.get(split), path, trust) for split in ("train", "val")}
    if augmentation:
        found["augmentation"] = allowed("augmentation", augmentation, path, trust)
    if config["run"]:
        found["logger"] = {name: allowed("logger", node, path, trust) for name, node in loggers.items()}
    return found


def measures_of(config: dict[str, Any], subject: Subject) -> Measures:
    """As in training, down to the size at which images are kept in memory: so k-NN is that of the run's history."""
    device, workers, dataset = use_device(config["device"]), config["num_workers"], subject.dataset
    cache = dataset.get("cache", "none")
    data = cached(
        {split: build_node(dataset[split]) for split in ("train", "val")}, cache, dataset.get("cache_side"), device, 1
    )
    if cache == "device":
        workers = 0  # which have no way to what the GPU holds
    sizes = {"global_size": subject.preprocessing["size"], "num_local_views": 0}
    return Measures(
        data=data,
        transform=build_node(subject.preprocessing | {"_target_": "dino.augmentation.EvalTransform"}),
        augmentation=build_node(subject.augmentation | sizes),
        kept_in=subject.output / "features",
        device=device,
        precision=choose_precision(config["precision"], device),
        num_workers=default_workers(device) if workers == "auto" else workers,
        batch_size=config["batch_size"],
        seed=config["seed"],
        ks=config["ks"],
        temperature=config["temperature"],
        layers=config["layers"],
        patch_mean=config["patch_mean"],
        few_shot=config["few_shot"],
        probe_epochs=config["probe_epochs"],
        finetune_epochs=config["finetune_epochs"],
    )


def of_checkpoints(measures: Measures, subject: Subject, trust: Sequence[str]) -> dict[str, dict[str, float]]:
    """The figures that need no labels, of every checkpoint of the run that can be read, the oldest first."""
    steps = []
    for path in (subject.run / FOLDER).glob("*.pt") if subject.run is not None else ():
        try:
            steps.append((read_checkpoint(path)["iteration"], path))
        except Exception as error:  # as in newest_checkpoint
            log.warning("%s cannot be read (%s) and is left out", path, str(error).split("\n")[0])
    each = sorted(dict(steps).items())  # the best may be one of the others
    backbones = ((at, load_teacher(path, trust).backbone) for at, path in each)  # one at a time in memory
    return {f"step {at}": measures.of(f"step {at}", backbone, ["unsupervised"]) for at, backbone in backbones}


def record(results: dict[str, dict[str, float]], subject: Subject) -> None:
    """evaluation.json, with what earlier commands measured of the same; of a run its history and loggers as well."""
    path = subject.output / RESULTS
    try:
        entries = json.loads(path.read_text()) if path.is_file() else []
    except ValueError:
        aside = path.replace(path.with_suffix(".unreadable"))
        log.warning("%s cannot be read and is now %s", path, aside)
        entries = []
    of = {"subject": subject.name, "size": subject.preprocessing["size"], "dataset": subject.dataset["val"]}
    before: dict[str, Any] = next((entry for entry in entries if entry["of"] == of), {"measured": {}})
    finite = {n: {k: v if math.isfinite(v) else None for k, v in row.items()} for n, row in results.items()}  # JSON's
    measured = {name: before["measured"].get(name, {}) | figures for name, figures in finite.items()}
    entry = {"of": of, "measured": before["measured"] | measured, "created_at": datetime.now(UTC).isoformat()}
    entries = [*(other for other in entries if other["of"] != of), entry]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n")
    partial.replace(path)
    log.info("written to %s", path)
    if subject.run is None:
        return
    try:
        with lock(subject.run):
            history = History.load(subject.run / "history.json")
            history.metadata["evaluations"] = entries
            history.save(subject.run / "history.json")
            tell_loggers(subject.run, subject.logger, results["backbone"])
    except (Refused, OSError, ValueError) as error:
        log.warning("not in the run's history: %s", error)


def tell_loggers(run: Path, nodes: dict[str, Any], figures: dict[str, float]) -> None:
    if not nodes:
        return
    state = newest_checkpoint(run)
    loggers = Loggers(list(build_node(nodes).values()))
    config = yaml.safe_load((run / CONFIG).read_text())
    loggers.start(run, config, None if state is None else state["wandb_run_id"])
    # A step of its own: TensorBoard forgets what it was told of a step with which a run goes on.
    loggers.log({f"evaluation/{name}": value for name, value in figures.items()}, state_of(run).step + 1)
    loggers.finish()


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    """A line a measure, a column a network; accuracies in per cent."""
    names = dict.fromkeys(name for figures in results.values() for name in figures)
    measures = [name for name in names if not re.search(r"_lr|_C$|_images$", name)]  # how they were had is in the file
    lines = [["", *results]]
    for measure in measures:
        shown_ = [figures.get(measure) for figures in results.values()]
        as_text = "{:.2f}".format if measure in PLAIN else "{:.1%}".format
        lines.append([measure.replace("_", " "), *("" if value is None else as_text(value) for value in shown_)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


if __name__ == "__main__":
    main()
