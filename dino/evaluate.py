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

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from dino.config import build_node
from dino.config.machine import check_machine
from dino.config.node import Problems, misfits, with_random_weights
from dino.config.program import run_program
from dino.config.settings import Evaluate, errors_in
from dino.dataset.cache import cached
from dino.evaluator.bench import Bench
from dino.evaluator.features import RawPixels
from dino.evaluator.finetune import Recipe
from dino.evaluator.measures import Measures, MeasureSettings
from dino.evaluator.unsupervised import preferred
from dino.run.checkpoint import FOLDER
from dino.run.results import record, table
from dino.run.subject import Subject, subject_of
from dino.runtime.annotated import is_node
from dino.runtime.device import choose_precision, default_workers, describe, use_device
from dino.runtime.nested import value_at
from dino.runtime.refused import Refused, first_line
from dino.weights import load_teacher
from dino.weights.checkpoint_file import read_checkpoint

log = logging.getLogger("dino.evaluate")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    run_program("evaluate", __doc__, evaluate)


def evaluate(config: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{"backbone": {measure: figure}, "untrained": ..., "raw_pixels": ...}; also written, see above.

    Raises Refused, in sentences, for what cannot be measured.
    """
    if problems := list(problems_of(config)):
        raise Refused(*problems)
    settings = Evaluate.model_validate(config)
    subject = subject_of(settings)
    measures = measures_of(settings, subject)
    size, of = measures.transform.size, " and ".join(f"{len(data):,}" for data in measures.data.values())
    log.info("%s at %d pixels on %s images, by %s", subject.name, size, of, describe(measures.device))
    if not measures.labelled:
        log.info("the images have no labels: only what needs none is measured")
    results = {"backbone": measures.of("backbone", subject.backbone, settings.measures)}
    if settings.baselines:
        torch.manual_seed(settings.seed)
        untrained = measures.untrained(build_node(with_random_weights(subject.node)))
        results["untrained"] = measures.of("untrained", untrained, settings.measures)
        results["raw_pixels"] = measures.of("raw_pixels", RawPixels(), settings.measures)
    print(table(results), flush=True)
    if "unsupervised" in settings.measures and len(rows := of_checkpoints(measures, subject, settings.trust)) > 1:
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
    given = [key for key in ("run", "checkpoint", "backbone") if config.get(key) is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        yield f"run, checkpoint, backbone: expected one of them, got {got}; give run=outputs/<run>, say."
    if given == ["backbone"] and config.get("dataset") is None:
        yield "dataset: a backbone comes with no images; give dataset=imagenette dataset.root=<folder>, say."
    for path in ("backbone", "dataset.train", "dataset.val"):
        if is_node(node := value_at(config, path)):
            yield from (sentence for _, sentence in misfits(path, node))


def measures_of(settings: Evaluate, subject: Subject) -> Measures:
    """As in training, down to the size at which images are kept in memory: so k-NN is that of the run's history."""
    device, workers, dataset = use_device(settings.device), settings.num_workers, subject.dataset
    cache = dataset.get("cache", "none")
    data = cached(
        {split: build_node(dataset[split]) for split in ("train", "val")}, cache, dataset.get("cache_side"), device, 1
    )
    if cache == "device":
        workers = 0  # which have no way to what the GPU holds
    sizes = {"global_size": subject.preprocessing["size"], "num_local_views": 0}
    bench = Bench(
        train=data["train"],
        val=data["val"],
        transform=build_node(subject.preprocessing | {"_target_": "dino.augmentation.EvalTransform"}),
        device=device,
        precision=choose_precision(settings.precision, device),
        batch_size=settings.batch_size,
        num_workers=default_workers(device) if workers == "auto" else workers,
    )
    of_each = MeasureSettings(
        ks=settings.ks,
        temperature=settings.temperature,
        layers=settings.layers,
        patch_mean=settings.patch_mean,
        few_shot=settings.few_shot,
        probe_epochs=settings.probe_epochs,
        finetuning=Recipe(epochs=settings.finetune_epochs),
        seed=settings.seed,
    )
    return Measures(bench, build_node(subject.augmentation | sizes), subject.output / "features", of_each)


def of_checkpoints(measures: Measures, subject: Subject, trust: Sequence[str]) -> dict[str, dict[str, float]]:
    """The figures that need no labels, of every checkpoint of the run that can be read, the oldest first."""
    steps = []
    for path in (subject.run / FOLDER).glob("*.pt") if subject.run is not None else ():
        try:
            steps.append((read_checkpoint(path)["iteration"], path))
        except Exception as error:  # as in newest_checkpoint
            log.warning("%s cannot be read (%s) and is left out", path, first_line(error))
    each = sorted(dict(steps).items())  # the best may be one of the others
    backbones = ((at, load_teacher(path, trust).backbone) for at, path in each)  # one at a time in memory
    return {f"step {at}": measures.of(f"step {at}", backbone, ["unsupervised"]) for at, backbone in backbones}


if __name__ == "__main__":
    main()
