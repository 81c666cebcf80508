"""Every key of the configuration with every bad value: refused in sentences that name it, or a run that is right.

The cases are made of the composed configuration itself, of the default one and of each option of each group: some five
thousand, of which a plain `make test` takes a few from everywhere, always the same.
"""

import copy
import math
import shutil
import sys
import tarfile
import zlib

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from test_dataset import serve_cifar10

from dino.augmentation import IMAGENET_MEAN, IMAGENET_STD
from dino.backbone.vit_tiny import ViTTiny
from dino.config import CONF
from dino.config import trial as config_trial
from dino.config.check import check
from dino.config.command import command
from dino.config.composition import compose, quoted
from dino.head import DinoProjectionHead
from dino.model import DinoModel
from dino.run.parts import assemble
from dino.runtime.refused import Refused
from dino.train import run, train
from dino.weights import save_teacher

# As one writes it in an override, and what it means.
BAD = {
    "abc": "abc",
    "-1": -1,
    "0": 0,
    "0.5": 0.5,
    "7": 7,
    "1e30": 1e30,
    "1e-320": 1e-320,
    "1000000": 10**6,
    "1000000000000000000": 10**18,
    "1" + 400 * "0": 10**400,
    "''": "",
    "null": None,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "[1,2]": [1, 2],
    "[]": [],
    "{a:1}": {"a": 1},
    "true": True,
    "false": False,
    "'ü \"q\"=,'": 'ü "q"=,',
}
SMALL = [  # a run of a fraction of a second
    "dataset.global_size=16",
    "dataset.local_size=16",
    "dataset.eval_size=16",
    "dataset.out_dim=16",
    "head.hidden_dim=16",
    "head.bottleneck_dim=8",
    "augmentation.num_local_views=1",
    "training.epochs=3",
    "training.batch_size=4",
    "training.max_steps=2",
    "training.num_workers=0",
    "device=cpu",
    "precision=fp32",
]
BACKBONE = ["backbone.hidden_dim=16", "backbone.depth=1"]
TEXTURES = ["dataset.train.images=32", "dataset.val.images=20", "dataset.train.size=16"]
VIT = ["backbone.hidden_dim=12", "backbone.heads=2", "backbone.depth=1", "backbone.patch_size=8"]
# What is fuzzed: the overrides of a configuration, and below which keys; "" is all of them.
OPTIONS: dict[str, tuple[list[str], str]] = {
    "default": ([*BACKBONE, *TEXTURES], ""),
    "resnet_small": (["backbone=resnet_small", "backbone.width=16", *TEXTURES], "backbone"),
    "dino_vits16": (["backbone=dino_vits16", "backbone.image_size=16", *VIT, *TEXTURES], "backbone"),
    "resnet18": (["backbone=resnet18", *TEXTURES], "backbone"),
    "timm": (["backbone=timm", "backbone.model_name=resnet10t", *TEXTURES], "backbone"),
    "sgd": (["optimizer=sgd", *BACKBONE, *TEXTURES], "optimizer"),
    "lars": (["optimizer=lars", *BACKBONE, *TEXTURES], "optimizer"),
    "no evaluator": (["evaluator=none", *BACKBONE, *TEXTURES], "evaluator"),
    "loggers": (["logger=[csv,tensorboard,wandb]", *BACKBONE, *TEXTURES], "logger"),
    "folder": (["dataset=folder", "dataset.root=DATA/folder", *BACKBONE], "dataset"),
    "imagenet": (["dataset=imagenet", "dataset.root=DATA/folder", *BACKBONE], "dataset.train"),
    "imagenette": (["dataset=imagenette", "dataset.root=DATA", *BACKBONE], "dataset.train"),
    "imagenet100": (["dataset=imagenet100", "dataset.root=DATA/imagenet100", *BACKBONE], "dataset.train"),
    "tar": (["dataset=tar", "dataset.root=DATA/tar", *BACKBONE], "dataset.train"),
    "cifar10": (["dataset=cifar10", "dataset.root=DATA/cifar10", *BACKBONE], "dataset.train"),
    "hf": (["dataset=hf", "dataset.train.path=PLAIN/folder", *BACKBONE], "dataset.train"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few images in the layout of each data set, below a folder of an awkward name."""
    top, rng = tmp_path_factory.mktemp("d") / AWKWARD, np.random.default_rng(0)
    for split, images in (("train", 12), ("val", 4)):
        for label in "ab":
            for folder in (
                top / "folder" / split,
                top / "imagenette2-160" / split,
                top / "imagenet100" / f"{split}.X1",
            ):
                (folder / label).mkdir(parents=True)
                for i in range(images):
                    pixels = rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / label / f"{i}.png")
        (top / "tar").mkdir(exist_ok=True)
        with tarfile.open(top / "tar" / f"{split}-0.tar", "w") as tar:
            for path in (top / "folder" / split).glob("*/*.png"):
                tar.add(path, f"{path.parent.name}{path.name}")
    shutil.copytree(top / "folder", top.parent / "folder")  # the datasets package takes [a] in a path for a pattern
    with pytest.MonkeyPatch.context() as sums:
        serve_cifar10(top / "cifar10", "http://localhost:9", sums)  # where nobody answers
        yield top


@pytest.fixture(autouse=True)
def nothing_from_elsewhere(tmp_path, monkeypatch):
    """An empty directory to run in, no hub to ask, and each forward pass of the check once for the same network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("WANDB_MODE", "offline")
    forward, sound = config_trial._check_forward, set()

    def once(backbone, config, problems):
        case = None
        if not problems:
            case = repr(
                [config["backbone"], *(config["augmentation"].get(key) for key in ("global_size", "local_size"))]
            )
        if case not in sound:
            forward(backbone, config, problems)
            sound.update([case] if case and not problems else [])

    monkeypatch.setattr(config_trial, "_check_forward", once)


def composed(option: str, data) -> dict:
    overrides, _ = OPTIONS[option]
    found = [quoted(text.replace("DATA", str(data)).replace("PLAIN", str(data.parent))) for text in overrides]
    return compose([*SMALL, *found], "train", CONF)


def keys_of(node: dict, below: str = "", prefix: str = ""):
    """Dotted keys of all values, those of sections as well."""
    for key, value in node.items():
        name = f"{prefix}{key}"
        if name == below or name.startswith(f"{below}." if below else ""):
            yield name
        if isinstance(value, dict):
            yield from keys_of(value, below, f"{name}.")


def changed(config: dict, key: str, value) -> dict:
    config = copy.deepcopy(config)
    *sections, last = key.split(".")
    node = config
    for section in sections:
        node = node[section]
    node[last] = value
    return config


def cases(option: str, config: dict, one_in: int):
    """(key, text, value); the same of each `one_in` whenever it is asked."""
    for key in keys_of(config, OPTIONS[option][1]):
        for text, value in BAD.items():
            section = isinstance(value, dict) and "." not in key  # an override cannot put a section in another's place
            if not section and zlib.crc32(f"{option} {key} {text}".encode()) % one_in == 0:
                yield key, text, value


def complaint(lines: list[str], key: str) -> str | None:
    """What is wrong with a refusal."""
    leaf = key.rpartition(".")[2]
    if not 1 <= len(lines) <= 5 or any("\n" in line or not line.strip() for line in lines):
        return f"{len(lines)} lines: {lines}"
    return None if any(leaf in line for line in lines) else f"does not name it: {lines}"


def take_two_steps(config: dict) -> None:
    made = assemble(config)
    train(made.learner, made.steps(0))
    made.evaluate()


def faults(option: str, data, one_in: int) -> list[str]:
    base, found, tried = composed(option, data), [], 0
    assert check(base) == []
    take_two_steps(base)
    for key, text, value in cases(option, base, one_in):
        config, wrong = changed(base, key, value), None
        tried += 1
        try:
            if problems := check(config):
                wrong = complaint(problems, key)
            else:
                take_two_steps(config)
        except Refused as refused:
            wrong = complaint([*refused.problems], key)
        except Exception as error:  # but for those that the program says in their own words
            wrong = None if hasattr(error, "exit_status") else f"{type(error).__name__}: {error}"
        found += [f"{key}={text[:60]}: {wrong}"] if wrong else []
    assert tried
    return found


@pytest.mark.parametrize("option", [name for name in OPTIONS if name not in ("timm", "hf")])
def test_a_bad_value_is_refused_naming_its_key_or_the_run_is_right(option, data):
    assert faults(option, data, 100 if option == "default" else 5 if option == "no evaluator" else 30) == []


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("ignore:This DataLoader will create 7 worker processes")
@pytest.mark.parametrize("option", OPTIONS)
def test_every_bad_value_of_every_key_is_refused_or_the_run_is_right(option, data):
    for package in {"timm": ["timm"], "hf": ["datasets"]}.get(option, []):
        pytest.importorskip(package)
    assert faults(option, data, 1) == []


def answers(capsys, tmp_path, key: str, text: str, one: bool = True) -> str | None:
    """What is wrong with how the program takes `key=text`, on its way from the command line to a run."""
    started = []

    @command("train")
    def main(config, directory):
        started.append(directory)

    sys.argv = ["train", "device=cpu", quoted(f"{key}={text}")]
    try:
        main()
    except SystemExit as stopped:
        said = capsys.readouterr()
        if stopped.code != 2 or said.out or started:
            return f"status {stopped.code}, {said.out}"
        return complaint(said.err.splitlines(), key)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if foreign := {path.name for path in tmp_path.iterdir()} - {"outputs"}:
            raise AssertionError(f"{key}={text}: wrote {foreign}")
    return None if len(started) == 1 else "did not run"


def overrides_of(one_in: int) -> list[tuple[str, str]]:
    return [(key, text) for key, text, _ in cases("default", compose([], "train", CONF), one_in)]


@pytest.mark.parametrize(("one_in"), [150, pytest.param(4, marks=[pytest.mark.soak, pytest.mark.timeout(3000)])])
def test_an_override_ends_with_status_2_and_sentences_or_starts_a_run(one_in, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    wrong = {f"{k}={text[:60]}": answers(capsys, tmp_path, k, text) for k, text in overrides_of(one_in)}
    assert len(wrong) >= 10
    assert {case: words for case, words in wrong.items() if words} == {}


JOURNAL = ("log_every_steps", "profile", "evaluate_every_epochs", "checkpoint", "logger", "init_from", "name")


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("option", ["default", "loggers"])
@pytest.mark.filterwarnings("ignore:.*Logger failed and is switched off")
def test_what_only_a_whole_run_reads_is_right_in_it(option, data, tmp_path):
    base, ran = composed(option, data), 0
    for key, _, value in cases(option, base, 1):
        config = changed(base, key, value)
        if key.startswith(JOURNAL) and not check(config):
            ran += 1
            run(config, tmp_path / f"outputs/{ran}")
            assert (tmp_path / f"outputs/{ran}/teacher.safetensors").exists(), (key, value)
    assert ran >= 10


# ---- names ----------------------------------------------------------------------------------------------------------

AWKWARD = 'Jürgen\'s [a]=1, "2" (ß) 🦕'


@pytest.mark.parametrize(
    "text", ["ü", "a=b", "a=1,b=2", "it's ü", 'ü "x"', "[a", "{", "(x)", "~/x", "ü\\", "a\\'ü", AWKWARD, "ü ${seed}"]
)
def test_a_text_that_hydra_cannot_read_is_taken_as_it_is(text):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(quoted(f"name={text}"))
    assert getattr(override.value(), "text", override.value()) == text


@pytest.mark.parametrize("text", ["name=a,b", "name=[a,b]", "name='ü'", "seed=1", "--config-dir=ü", "ü=1", "name"])
def test_what_hydra_can_read_or_nobody_can_is_left_alone(text):
    assert quoted(text) == text


def called(main, *arguments, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", ["program", *map(quoted, arguments)])
    main()
    return capsys.readouterr().out


@pytest.mark.slow
def test_awkward_names_of_folders_and_runs_do_in_every_program(data, tmp_path, monkeypatch, capsys):
    from dino import compare, evaluate, visualize
    from dino.train import main

    torch.manual_seed(0)
    here = tmp_path / AWKWARD
    here.mkdir()
    monkeypatch.chdir(here)
    told = {"monkeypatch": monkeypatch, "capsys": capsys}
    small = [*SMALL, *BACKBONE, "dataset=folder", f"dataset.root={data / 'folder'}", "evaluator.k=1"]
    called(main, *small, f"name={AWKWARD}", "logger=[csv,tensorboard]", **told)
    (directory,) = (here / "outputs").iterdir()
    assert all(sign in directory.name for sign in "ü=,ß[")
    assert {"teacher.safetensors", "metrics.csv", "report.html"} <= {path.name for path in directory.iterdir()}

    called(main, *small, "name=b", f"init_from={directory.relative_to(here)}", **told)
    assert (here / "outputs" / "b" / "teacher.safetensors").exists()
    measured = called(
        evaluate.main, f"run={directory}", "measures=[knn]", "ks=[1]", "device=cpu", "baselines=false", **told
    )
    assert "knn" in measured and (directory / "evaluation.json").exists()
    images = data / "folder" / "val" / "a"
    called(visualize.main, f"checkpoint={directory}", f"images={images}", f"output={AWKWARD}", **told)
    assert len(list((here / AWKWARD).glob("*.png"))) == 8
    assert called(compare.main, "runs=outputs", **told).count("finished") == 2


# ---- the other programs ---------------------------------------------------------------------------------------------


def refused(main, *arguments, monkeypatch, capsys) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The directory of a teacher, and a folder of one image."""
    top = tmp_path_factory.mktemp("t")
    backbone = {"_target_": "dino.backbone.vit_tiny.ViTTiny", "hidden_dim": 16, "depth": 1, "image_size": 16}
    head = {"_target_": "dino.head.DinoProjectionHead", "hidden_dim": 8, "bottleneck_dim": 8, "output_dim": 8}
    model = DinoModel(ViTTiny(16, 1, image_size=16), DinoProjectionHead(16, 8, 8, 8))
    prepared = {"size": 16, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    save_teacher(top, model.state_dict(), {"backbone": backbone, "head": head}, prepared)
    (top / "images").mkdir()
    Image.new("RGB", (20, 20)).save(top / "images" / "a.png")
    return top


@pytest.mark.parametrize(
    ("option", "named"),
    [
        *((f"device={device}", "device=") for device in ("gpu", "cuda:99", "", "meta", "xla", "hpu", "mps")),
        *((f"size={size}", "size=") for size in ("0", "-1", "x", "1000000", "1" + 400 * "0")),
        *((f"mass={mass}", "mass=") for mass in ("nan", "0", "2", "inf", "x")),
        *((f"k={k}", "k=") for k in ("0", "-1", "1.5")),
        *((f"fps={fps}", "fps=") for fps in ("nan", "inf", "0", "1e-9", "-1")),
        *((f"output={output}", "output=") for output in ("file", "file/below", "x" * 5000)),
        *((f"neighbours={folder}", folder) for folder in ("nowhere", "file")),
        ("animation=mp4", "animation="),
        ("trust=[no package]", "trust="),
        ("nope=1", "nope"),
        ("+nope=1", "nope"),
        ("--nope", "--nope"),
        ("more", "more: expected key=value"),
    ],
)
def test_visualize_answers_a_bad_option_in_sentences(teacher, option, named, tmp_path, monkeypatch, capsys):
    from dino.visualize import main

    (tmp_path / "file").write_text("no image")
    given = [f"checkpoint={teacher}", f"images={teacher / 'images'}", option]
    lines = refused(main, *given, monkeypatch=monkeypatch, capsys=capsys)
    assert 1 <= len(lines) <= 2 and named in lines[-1]
    assert [path.name for path in tmp_path.rglob("*.png")] == []


@pytest.mark.parametrize("wrong", ["nowhere", "file", "", "x" * 5000, "empty"])
@pytest.mark.parametrize("name", ["compare runs", "visualize checkpoint", "evaluate run", "evaluate checkpoint"])
def test_a_run_that_is_not_there_is_said_in_a_sentence(name, wrong, tmp_path, monkeypatch, capsys):
    from dino import compare, evaluate, visualize

    (tmp_path / "file").write_text("no run")
    (tmp_path / "empty").mkdir()
    module, key = name.split()
    arguments = [f"{key}={wrong}", *(["images=file"] if module == "visualize" else [])]
    program = {"compare": compare, "visualize": visualize, "evaluate": evaluate}[module]
    lines = refused(program.main, *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert len(lines) == 1 and (wrong[:20] in lines[0] or "expected" in lines[0])
    assert {path.name for path in tmp_path.iterdir()} == {"file", "empty"}


SLURM = OmegaConf.load(CONF / "hydra" / "launcher" / "slurm.yaml").launcher


@pytest.mark.slow
@pytest.mark.parametrize(("one_in"), [12, pytest.param(1, marks=[pytest.mark.soak, pytest.mark.timeout(3000)])])
def test_a_setting_of_slurm_is_refused_naming_it_or_stands_in_the_script(one_in, tmp_path, monkeypatch, capsys):
    from launch.slurm import main

    monkeypatch.setenv("PATH", "")  # a squeue without a cluster takes nine seconds to say so
    found, tried = {}, 0
    for key in ["hours", *SLURM.keys() - {"_target_", "timeout_min"}]:  # slurm=NAME and hours are their names here
        for text in BAD:
            if zlib.crc32(f"{key} {text}".encode()) % one_in:
                continue
            tried += 1
            monkeypatch.setattr(sys, "argv", ["launch.slurm", "--dry-run", *TEXTURES, f"slurm.{key}={text}"])
            try:
                main()
            except SystemExit as stopped:
                said = capsys.readouterr()
                wrong = complaint(said.err.splitlines(), key) if (stopped.code, said.out) == (2, "") else said
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            else:
                wrong = None if capsys.readouterr().out.startswith("#!/bin/bash\n") else "no script"
            found |= {f"slurm.{key}={text[:60]}": wrong} if wrong else {}
    assert tried >= 20
    assert found == {}
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_of_the_training_program_is_two_lines(monkeypatch, capsys):
    from dino.train import main

    usage, words = refused(main, "--nope", monkeypatch=monkeypatch, capsys=capsys)
    assert usage.startswith("usage: ") and "--nope" in words
