"""`python -m dino.evaluate` on a run of a few steps, on a backbone, and on what it must refuse."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from dino.augmentation import IMAGENET_MEAN, IMAGENET_STD, EvalTransform
from dino.config import CONF, compose
from dino.config.settings import Evaluate, settings_of
from dino.dataset.textures import Textures
from dino.evaluate import evaluate, measures_of
from dino.evaluator.features import Features, features_of
from dino.evaluator.measures import Probed
from dino.history import History
from dino.run.results import RESULTS, table
from dino.run.subject import subject_of
from dino.runtime.refused import Refused
from dino.weights import load_teacher

ROOT = Path(__file__).parents[1]
SMALL = ["dataset.train.images=60", "dataset.val.images=40", "dataset.global_size=32", "dataset.local_size=16"]
SMALL += [
    "dataset.eval_size=32",
    "dataset.train.size=48",
    "dataset.out_dim=32",
    "backbone.depth=2",
    "head.hidden_dim=32",
]
UNSUPERVISED = {"rankme", "alpha", "view_neighbours", "view_match"}
QUICK = ["probe_epochs=3", "finetune_epochs=1", "few_shot=[0.5]", "ks=[3]", "layers=2", "device=cpu"]


def program(module, *arguments, cwd):
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning:dino", "-m", module, *arguments],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where `outputs/a` is a run of six steps with two checkpoints, and its loggers' files."""
    home = tmp_path_factory.mktemp("home")
    settings = ["training.max_steps=6", "training.batch_size=10", "device=cpu", "name=a", "logger=[csv,tensorboard]"]
    done = program("dino.train", *SMALL, *settings, "evaluator.k=3", cwd=home)
    assert done.returncode == 0, done.stderr
    return home


def config_of(*overrides):
    return compose([*QUICK, *overrides], "evaluate", CONF)


@pytest.mark.slow
def test_a_checkpoint_that_is_broken_is_left_out_of_the_figures_of_each(home, tmp_path, monkeypatch, caplog):
    shutil.copytree(home / "outputs", tmp_path / "outputs")
    monkeypatch.chdir(tmp_path)
    broken = tmp_path / "outputs" / "a" / "checkpoints" / "step_000000001.pt"
    content = bytearray(broken.read_bytes())
    content[len(content) // 2] ^= 1
    broken.write_bytes(content)
    results = evaluate(config_of("run=outputs/a", "measures=[unsupervised]", "baselines=false"))
    assert results.keys() == {"backbone"}  # with one checkpoint left there is nothing to compare
    assert "step_000000001.pt cannot be read" in caplog.text


@pytest.mark.slow
def test_a_run_is_measured_beside_what_has_learned_nothing(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    results = evaluate(config_of("run=outputs/a", "measures=[knn,linear,logistic,few_shot,finetune,unsupervised]"))
    measured = {"knn_3", "linear", "logistic", "few_shot_50_percent", *UNSUPERVISED}
    assert results.keys() == {"backbone", "untrained", "raw_pixels", "step 1", "step 6"}
    for name in ("backbone", "untrained", "raw_pixels"):
        figures = results[name]
        assert measured | ({"finetune"} if name != "raw_pixels" else set()) <= figures.keys()
        assert all(math.isfinite(value) for value in figures.values())
        assert all(0 <= figures[key] <= 1 for key in measured - {"rankme", "alpha"})
    assert results["step 6"] == {key: results["backbone"][key] for key in UNSUPERVISED}
    shown = capsys.readouterr().out
    assert "raw_pixels" in shown and f"{results['backbone']['knn_3']:.1%}" in shown

    run = home / "outputs" / "a"
    (entry,) = json.loads((run / RESULTS).read_text())
    assert entry["measured"] == results
    history = History.load(run / "history.json")
    assert history.metadata["evaluations"] == [entry] and history.get_iterations()[-1] == 6
    assert results["backbone"]["knn_3"] == history.get_metric("knn", "epoch")[-1]
    assert results["raw_pixels"]["knn_3"] == history.metadata["baselines"]["raw_pixels"]
    assert "evaluation/linear" in (run / "metrics.csv").read_text().splitlines()[0]
    again = program(
        "dino.train",
        *SMALL,
        "training.max_steps=6",
        "training.batch_size=10",
        "device=cpu",
        "name=a",
        "evaluator.k=3",
        cwd=home,
    )
    assert again.returncode == 0 and "is finished" in again.stderr


def test_what_is_measured_of_the_teacher_is_what_scikit_learn_says_of_its_features(home, monkeypatch):
    monkeypatch.chdir(home)
    results = evaluate(config_of("run=outputs/a", "measures=[knn,logistic]", "baselines=false", "output=elsewhere"))
    teacher = load_teacher(home / "outputs" / "a")
    config = yaml.safe_load((home / "outputs" / "a" / "config.yaml").read_text())["dataset"]
    sets = [Textures(**{k: v for k, v in config[split].items() if k != "_target_"}) for split in ("train", "val")]
    (x, y), (x_val, y_val) = (
        [part.numpy() for part in features_of(teacher.backbone, data, EvalTransform(32))] for data in sets
    )
    neighbours = KNeighborsClassifier(
        3, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(x, y)
    assert results["backbone"]["knn_3"] == pytest.approx(neighbours.score(x_val, y_val), abs=1e-6)
    centred = [(part - x.mean(0)) for part in (x, x_val)]
    unit = [part / (part**2).sum(1, keepdims=True) ** 0.5 for part in centred]
    model = LogisticRegression(C=results["backbone"]["logistic_C"], max_iter=2000).fit(unit[0], y)
    assert results["backbone"]["logistic"] == pytest.approx(model.score(unit[1], y_val), abs=1e-6)
    assert (home / "elsewhere" / RESULTS).is_file() and History.load(home / "outputs/a/history.json")


def test_features_are_computed_once_for_the_same_weights_and_images(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    wanted = ["run=outputs/a", "measures=[knn]", "output=once"]
    before = evaluate(config_of(*wanted))
    files = {path: path.stat().st_mtime_ns for path in (home / "once" / "features").iterdir()}
    assert len(files) == 6  # of three networks
    monkeypatch.setattr("dino.evaluator.measures.features_of", None)
    assert evaluate(config_of(*wanted, "ks=[3,5]"))["backbone"]["knn_3"] == before["backbone"]["knn_3"]
    assert {path: path.stat().st_mtime_ns for path in (home / "once" / "features").iterdir()} == files
    (entry,) = json.loads((home / "once" / RESULTS).read_text())
    assert entry["measured"]["backbone"].keys() == {"knn_3", "knn_5"}
    with pytest.raises(TypeError, match="NoneType"):
        evaluate(config_of(*wanted, "size=40"))


def test_a_checkpoint_of_a_run_holds_the_same_teacher(home, monkeypatch):
    monkeypatch.chdir(home)
    path = "outputs/a/checkpoints/step_000000006.pt"
    loaded, teacher = load_teacher(path), load_teacher("outputs/a")
    assert loaded.preprocessing == teacher.preprocessing and loaded.config == teacher.config
    for name, value in teacher.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    of_run = evaluate(config_of("run=outputs/a", "measures=[knn]", "baselines=false"))
    assert evaluate(config_of(f"checkpoint={path}", "measures=[knn]", "baselines=false")) == of_run


def test_a_backbone_is_measured_on_images_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 128, (40, 40, 3), dtype=np.uint8) + np.uint8(120 * (number % 2))).save(path)
    images = ["dataset=folder", f"dataset.root={tmp_path / 'images'}", "size=32", "measures=[knn,unsupervised]"]
    results = evaluate(config_of("backbone=resnet_small", "backbone.width=8", *images))
    assert results["raw_pixels"].keys() == {"knn_3", *UNSUPERVISED}
    assert (tmp_path / "outputs" / "evaluate" / "SmallResNet_random_weights" / RESULTS).is_file()


def test_weights_of_timms_own_are_measured_on_images_normalised_as_timm_says(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0).state_dict(), "weights.pth")
    overrides = ["backbone=timm", "backbone.model_name=vit_tiny_patch16_224", "+backbone.depth=1", "dataset=textures"]
    local = "+backbone.pretrained_cfg_overlay={file: weights.pth, mean: [0.5, 0.5, 0.5], std: [0.5, 0.4, 0.3]}"

    def transform(*more):
        settings = settings_of(Evaluate, config_of(*overrides, *more))
        return measures_of(settings, subject_of(settings)).transform

    of_timm = transform("backbone.pretrained=true", local)
    assert (of_timm.mean, of_timm.std) == ((0.5, 0.5, 0.5), (0.5, 0.4, 0.3))
    assert (transform().mean, transform().std) == (IMAGENET_MEAN, IMAGENET_STD)  # random weights know no images


def test_images_without_labels_are_measured_without(tmp_path, home, monkeypatch, capsys):
    for number in range(30):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    monkeypatch.chdir(home)
    images = ["dataset=folder", f"dataset.root={tmp_path}", f"output={tmp_path}"]
    results = evaluate(config_of("run=outputs/a", "measures=[knn,linear,unsupervised]", *images))
    assert all(figures.keys() == UNSUPERVISED for figures in results.values())
    assert "step 6" in capsys.readouterr().out.splitlines()[-1] or "step 1" in results


def test_the_probe_reads_the_last_cls_tokens_and_the_mean_patch(home):
    backbone = load_teacher(home / "outputs" / "a").backbone
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        row = Probed(backbone, 2, patch_mean=True)(images)
        before, last = backbone.last_tokens(images, 2)
    dim = backbone.output_dim
    assert row.shape == (3, 3 * dim)
    for part, expected in zip(row.split(dim, dim=1), (before[:, 0], last[:, 0], last[:, 1:].mean(1))):
        assert torch.equal(part, expected)
    probed = Probed(backbone, 2, patch_mean=True)
    assert torch.equal(probed.own(Features(row, torch.zeros(3))).rows, last[:, 0])


class Blocks(nn.Module):
    """A ViT as the probe asks it: each of its last blocks gives tokens of its own."""

    def __init__(self, output_dim, depth=12):
        super().__init__()
        self.output_dim = output_dim
        self.outputs = list(torch.randn(depth, 3, 5, output_dim, generator=torch.Generator().manual_seed(0)))

    def last_tokens(self, images, count):
        return self.outputs[-count:]


@pytest.mark.parametrize(
    ("output_dim", "options", "blocks", "with_mean"),
    [
        (384, {}, 4, False),  # ViT-S: eval_linear.py --n_last_blocks 4 --avgpool_patchtokens false
        (768, {}, 1, True),  # ViT-B: --n_last_blocks 1 --avgpool_patchtokens true
        (768, {"layers": 4, "patch_mean": False}, 4, False),
        (192, {"patch_mean": True}, 4, True),
    ],
)
def test_the_probe_reads_what_the_authors_read_of_an_architecture(output_dim, options, blocks, with_mean):
    config = compose([f"{key}={value}" for key, value in options.items()], "evaluate", CONF)
    backbone = Blocks(output_dim)
    probed = Probed(backbone, config["layers"], config["patch_mean"])
    row = probed(torch.zeros(3, 3, 32, 32))
    expected = [tokens[:, 0] for tokens in backbone.outputs[-blocks:]]
    expected += [backbone.outputs[-1][:, 1:].mean(dim=1)] * with_mean
    assert torch.equal(row, torch.cat(expected, dim=1))
    assert torch.equal(probed.own(Features(row, torch.zeros(3))).rows, backbone.outputs[-1][:, 0])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([], "run, checkpoint, backbone: expected one of them, got none"),
        (["run=outputs/a", "checkpoint=x.pt"], "got run and checkpoint"),
        (["run=nowhere"], "nowhere is not there; expected a run's directory"),
        (["backbone=resnet18"], "dataset: a backbone comes with no images"),
        (["run=outputs/a", "measures=[knnn]"], "measures=['knnn']: expected a list"),
        (["run=outputs/a", "ks=[0]"], "ks=[0]: expected whole numbers above 0"),
        (["run=outputs/a", "few_shot=[1.5]"], "few_shot=[1.5]: expected shares of the labels, in (0, 1]"),
        (["run=outputs/a", "batch_size=many"], "batch_size=many: expected a whole number"),
        (["run=outputs/a", "device=gpu"], "device=gpu: expected auto, cpu, cuda"),
        (["run=outputs/a", "sizee=3"], "did you mean size?"),
        (["backbone=resnet_small", "backbone.width=x", "dataset=textures"], "backbone.width=x: expected"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(home, monkeypatch, overrides, sentence):
    monkeypatch.chdir(home)
    with pytest.raises(Refused) as refused:
        evaluate(config_of(*overrides))
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.slow
def test_the_program_answers_a_mistake_with_status_2_and_help_with_the_keys(tmp_path):
    done = program("dino.evaluate", "run=nowhere", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not [*tmp_path.iterdir()]
    help_ = program("dino.evaluate", "--help", cwd=tmp_path)
    assert help_.returncode == 0 and "few_shot" in help_.stdout


def test_the_table_has_a_line_a_measure_and_a_column_a_network():
    shown = table({"backbone": {"knn_20": 0.5, "linear_lr": 1.0, "rankme": 12.345}, "raw_pixels": {"knn_20": 0.25}})
    assert [line.split() for line in shown.splitlines()] == [
        ["backbone", "raw_pixels"],
        ["knn", "20", "50.0%", "25.0%"],
        ["rankme", "12.35"],
    ]
