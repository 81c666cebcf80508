"""Files from a stranger, made with the stranger's own tools: no command that reads one runs anything in it.

Each kind of payload was seen to do its harm before dino/weights/allowlist.py was there: to execute, import or download.
"""

import functools
import hashlib
import importlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_evaluate import program as python
from test_train import ROOT, TINY, program

import dino
from dino import evaluate, visualize
from dino.backbone.vit_tiny import ViTTiny
from dino.head import DinoProjectionHead
from dino.model import DinoModel
from dino.train import main as train
from dino.weights.allowlist import NotAllowed, allowed

VIT = {"_target_": "dino.backbone.vit_tiny.ViTTiny", "hidden_dim": 16, "depth": 1, "heads": 2}
HEAD = {"_target_": "dino.head.DinoProjectionHead", "_partial_": True, "hidden_dim": 8, "output_dim": 12}
PREPARED = {"size": 64, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
TEXTURES = {"_target_": "dino.dataset.textures.Textures", "split": "train", "images": 20, "size": 32}


def write_teacher(path, backbone=VIT, head=HEAD, preprocessing=PREPARED, weights=None):
    """teacher.safetensors as a stranger can write it, its checksum right."""
    weights = {"backbone.x": torch.zeros(2)} if weights is None else weights
    metadata = {"format": "pt", "backbone": json.dumps(backbone), "head": json.dumps(head)}
    metadata["preprocessing"] = json.dumps(preprocessing)
    sha256 = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, value in sorted(weights.items()):
        sha256.update(name.encode() + value.flatten().view(torch.uint8).numpy().tobytes())
    save_file(weights, path, metadata | {"sha256": sha256.hexdigest()})


def write_checkpoint(path, backbone=VIT, head=HEAD, augmentation=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    config = {"backbone": backbone, "head": head, "augmentation": augmentation or {}, "dataset": {"eval_size": 64}}
    torch.save({"iteration": 1, "config": config, "teacher_state_dict": {"backbone.x": torch.zeros(2)}}, path)


def config_of(dataset=TEXTURES, augmentation=None, logger=None):
    """config.yaml as a run has it."""
    data = {"cache": "none", "cache_side": None, "train": dataset, "val": dataset}
    transform = augmentation or {"_target_": "dino.augmentation.DINOTransform"}
    return {"dataset": data, "augmentation": transform, "logger": {"csv": logger} if logger else {}}


class Counting(BaseHTTPRequestHandler):
    """Answers that there is nothing, and notes what was asked for."""

    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        self.send_error(404)

    do_HEAD = do_POST = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with what the payloads use in it; at its end nothing was executed, imported or asked for."""
    (tmp_path / "evil.py").write_text(
        "import pathlib, torch\npathlib.Path('exploded').touch()\n"
        "class Net(torch.nn.Module):\n    def __init__(self, **rest):\n        super().__init__()\n"
    )
    (tmp_path / "hubconf.py").write_text("import evil\ndef model(**rest):\n    pass\n")
    (tmp_path / "photo.png").write_bytes((ROOT / "docs" / "imagenette_small.png").read_bytes())
    (tmp_path / "bomb.pt").write_bytes(b"cposix\nsystem\n(Vtouch exploded\ntR.")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    handler = type("Handler", (Counting,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setenv("HF_ENDPOINT", address)  # read by what a subprocess imports
        for module in ("huggingface_hub.constants", "huggingface_hub.file_download", "huggingface_hub.hf_api"):
            __import__(module)
            for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
                if hasattr(sys.modules[module], name):
                    monkeypatch.setattr(sys.modules[module], name, address + "/{repo_id}" * ("URL" in name))
        yield tmp_path
        server.shutdown()
        thread.join()
    assert not (tmp_path / "exploded").exists()
    assert "evil" not in sys.modules
    assert handler.asked == []


SHELL = {"_target_": "os.system", "command": "touch exploded"}
NETWORKS = {
    # In teacher.safetensors and in a checkpoint these were called.
    "a function of the system": SHELL,
    "a module in the current folder": {"_target_": "evil.Net"},
    "torch.hub": {"_target_": "torch.hub.load", "repo_or_dir": ".", "model": "model", "source": "local"},
    "torch.load": {"_target_": "torch.load", "f": "bomb.pt", "weights_only": False},
    "a name on the hub by timm": {"_target_": "dino.backbone.timm.Timm", "model_name": "hf-hub:stranger/net"},
    "a folder by timm": {"_target_": "dino.backbone.timm.Timm", "model_name": "local-dir:."},
    "a weights file by timm": {
        "_target_": "dino.backbone.timm.Timm",
        "model_name": "vit_tiny_patch16_224",
        "checkpoint_path": "bomb.pt",
    },
    "a function of timm": {"_target_": "timm.create_model", "model_name": "hf-hub:stranger/net"},
    # These ran nothing here before, but did in config.yaml, which Hydra instantiated: see CONFIGS.
    "positional arguments": {"_target_": "subprocess.getoutput", "_args_": ["touch exploded"]},
    "a node within": VIT | {"hidden_dim": SHELL},
    "a node within a list": VIT | {"hidden_dim": [[SHELL]]},
    "a path through an allowed module": {"_target_": "dino.backbone.timm.nn.modules.module.warnings.sys.exit"},
    "another module's function": {"_target_": "dino.weights.json.codecs.sys.modules"},
    "functools.partial": {"_target_": "functools.partial", "func": SHELL},
    "a name on the hub by transformers": {
        "_target_": "transformers.AutoModel.from_pretrained",
        "pretrained_model_name_or_path": "stranger/net",
        "trust_remote_code": True,
    },
    "a lookup of Hydra": VIT | {"hidden_dim": "${oc.env:HOME}"},
    # These are no names of a class at all.
    "a class of torch": {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 2},
    "a helper of ours": {"_target_": "dino.backbone.vit.cut", "images": None, "size": 1, "rows": 1, "columns": 1},
    "a class from elsewhere in a module of ours": {"_target_": "dino.backbone.resnet.BasicBlock", "inplanes": 8},
    "no text": {"_target_": 3},
    "no name": {"_target_": "../evil.Net"},
    "an empty name": {"_target_": ""},
    "no node": [1, 2],
}


def each_command(capsys, monkeypatch, file):
    """(command, exit status, what it said on stderr) of all commands that read the weights of a file."""
    arguments = {
        "evaluate": [f"checkpoint={file}", "dataset=textures", "device=cpu", "measures=[knn]"],
        "visualize": [f"checkpoint={file}", "images=photo.png", "device=cpu"],
        "train": [*TINY, f"init_from={file}", "training.max_steps=1"],
    }
    for name, main in (("evaluate", evaluate.main), ("visualize", visualize.main), ("train", train)):
        monkeypatch.setattr(sys, "argv", [name, *arguments[name]])
        with pytest.raises(SystemExit) as ended:
            main()
        yield name, ended.value.code, capsys.readouterr().err.strip()


def assert_one_sentence(status, said):
    assert status == 2, said
    line = [line for line in said.splitlines() if line.strip()][-1]  # before it: that a run was begun
    assert "Traceback" not in said and line.endswith(".") and ("use another" in line or "trust=" in line), said


@pytest.mark.parametrize("payload", NETWORKS)
@pytest.mark.parametrize("part", ["backbone", "head"])
@pytest.mark.parametrize("kind", ["teacher.safetensors", "step_000000001.pt"])
def test_a_network_that_this_project_does_not_have_is_refused_by_name(here, kind, part, payload):
    write = write_teacher if kind.endswith("safetensors") else write_checkpoint
    write(here / kind, **{part: NETWORKS[payload]})
    with pytest.raises(NotAllowed, match=rf"{kind}: .*(use another|trust=\[)"):
        dino.load_teacher(here / kind)


@pytest.mark.parametrize("payload", ["a function of the system", "a module in the current folder", "torch.hub"])
@pytest.mark.parametrize("kind", ["teacher.safetensors", "step_000000001.pt"])
def test_every_command_refuses_it_in_one_sentence(here, capsys, monkeypatch, kind, payload):
    write = write_teacher if kind.endswith("safetensors") else write_checkpoint
    write(here / kind, backbone=NETWORKS[payload])
    for command, status, said in each_command(capsys, monkeypatch, here / kind):
        assert_one_sentence(status, said)
        assert NETWORKS[payload]["_target_"] in said, command


# Hydra 1.3.8 has a list of what it does not call, os.system among it; that list does not know these.
UNPICKLE = {"_target_": "torch.load", "f": "bomb.pt", "weights_only": False}
POSITIONAL = {"_target_": "torch.load", "_args_": ["bomb.pt"], "weights_only": False}
CONFIGS = {
    "data set, a function of the system": {"dataset": SHELL},
    "data set, a module in the current folder": {"dataset": {"_target_": "evil.Net"}},
    "data set, torch.hub": {"dataset": NETWORKS["torch.hub"]},
    "data set, torch.load": {"dataset": UNPICKLE},
    "data set, a node within": {"dataset": TEXTURES | {"images": UNPICKLE}},
    "data set, positional arguments within": {"dataset": TEXTURES | {"images": [POSITIONAL]}},
    "data set, functools.partial": {
        "dataset": TEXTURES | {"images": [{"_target_": "functools.partial", "_args_": [POSITIONAL]}]}
    },
    "data set, a path through an allowed module": {
        "dataset": {"_target_": "dino.evaluator.features.torch.load", "f": "bomb.pt", "weights_only": False}
    },
    "data set, a function of transformers": {"dataset": NETWORKS["a name on the hub by transformers"]},
    "data set, positional arguments": {"dataset": TEXTURES | {"_args_": ["train"]}},
    "data set, a network": {"dataset": VIT},
    "data set, a name on the hub": {
        "dataset": {"_target_": "dino.dataset.hf.HuggingFace", "path": "stranger/data", "split": "train"}
    },
    "data set, none": {"dataset": {"root": "."}},
    "augmentation, torch.load": {"augmentation": UNPICKLE},
    "augmentation, a node within": {
        "augmentation": {"_target_": "dino.augmentation.DINOTransform", "flip_probability": UNPICKLE}
    },
    "logger, a function of the system": {"logger": SHELL},
    "logger, a module in the current folder": {"logger": {"_target_": "evil.Net"}},
    "logger, functools.partial": {"logger": {"_target_": "functools.partial", "func": UNPICKLE}},
    "logger, a node within": {"logger": {"_target_": "dino.logger.WandbLogger", "project": UNPICKLE}},
}


@pytest.mark.parametrize("payload", CONFIGS)
def test_the_config_of_a_strangers_run_is_read_in_the_same_way(here, capsys, monkeypatch, payload):
    run = here / "run"
    run.mkdir()
    sound = DinoModel(ViTTiny(hidden_dim=16, depth=1, heads=2), DinoProjectionHead(16, hidden_dim=8, output_dim=12))
    write_teacher(run / "teacher.safetensors", weights=dict(sound.state_dict()))
    (run / "history.json").write_text('{"iteration_metrics": [], "epoch_metrics": [], "metadata": {}}')
    (run / "config.yaml").write_text(yaml.safe_dump(config_of(**CONFIGS[payload])))
    quick = ["device=cpu", "measures=[knn]", "ks=[1]", "baselines=false"]
    monkeypatch.setattr(sys, "argv", ["evaluate", f"run={run}", *quick])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and "config.yaml: " in said and len(said.splitlines()) == 1, said


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['touch exploded']", "[1", "- 1", "dataset: 3", "\x00"]
)
def test_a_config_that_is_none_is_refused_in_one_sentence(here, capsys, monkeypatch, text):
    (here / "run").mkdir()
    write_teacher(here / "run" / "teacher.safetensors")
    (here / "run" / "config.yaml").write_text(text)
    monkeypatch.setattr(sys, "argv", ["evaluate", "run=run", "device=cpu", "measures=[knn]"])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and said.startswith("run/config.yaml") and len(said.splitlines()) == 1, said


@pytest.mark.parametrize(
    "preprocessing",
    [
        PREPARED | {"size": SHELL},
        PREPARED | {"size": 10**12},
        PREPARED | {"size": True},
        PREPARED | {"mean": [0.5, "x", 0.5]},
        PREPARED | {"std": [0.2, 0, 0.2]},
        {"_target_": "os.system", "command": "touch exploded"},
        [1],
    ],
)
def test_how_images_are_prepared_is_plain_numbers(here, preprocessing):
    write_teacher(here / "teacher.safetensors", preprocessing=preprocessing)
    with pytest.raises(ValueError, match="cannot be read as a teacher.safetensors"):
        dino.load_teacher(here)


@pytest.mark.slow
def test_what_a_file_says_of_how_images_are_prepared_names_no_class(here, capsys, monkeypatch):
    """`_target_` beside size, mean and std went to Hydra."""
    run = program(*TINY, "training.max_steps=1", "name=a", cwd=here)
    assert run.returncode == 0, run.stderr
    directory = here / "outputs" / "a"
    node = dino.load_teacher(directory).config
    weights = {name: value.contiguous() for name, value in dino.load_teacher(directory).state_dict().items()}
    write_teacher(directory / "teacher.safetensors", node["backbone"], node["head"], PREPARED | SHELL, weights)
    monkeypatch.setattr(
        sys, "argv", ["evaluate", "run=outputs/a", "device=cpu", "measures=[knn]", "baselines=false", "ks=[1]"]
    )
    evaluate.main()
    assert dino.load_teacher(directory).preprocessing == PREPARED


def test_pretrained_weights_are_never_downloaded_for_a_file(here):
    vit = {"_target_": "dino.backbone.vit.ViT", "hidden_dim": 384, "depth": 12, "heads": 6, "patch_size": 16}
    for node in (
        vit | {"pretrained": "stranger/net"},
        {"_target_": "dino.backbone.resnet.ResNet", "arch": "resnet18", "pretrained": True},
        {"_target_": "dino.backbone.timm.Timm", "model_name": "vit_tiny_patch16_224", "pretrained": True},
    ):
        assert allowed("backbone", node, "file")["pretrained"] is False
        write_teacher(here / "teacher.safetensors", backbone=node)
        with pytest.raises(ValueError, match="holds the weights of another network"):
            dino.load_teacher(here)
    data = {"_target_": "dino.dataset.imagenette.Imagenette", "root": "data", "split": "train", "download": True}
    assert allowed("dataset", data, "file")["download"] is False


def test_every_class_of_conf_may_be_named_by_a_file():
    """So that a run of any option can be evaluated, and a new option needs no entry anywhere."""
    found = 0
    for group in ("backbone", "head", "augmentation", "logger", "dataset"):
        for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
            node = yaml.safe_load(path.read_text()) or {}
            nodes = {"logger": list(node.values()), "dataset": [node.get("train")]}.get(group, [node])
            for node in nodes:
                target = {"_target_": node["_target_"]}
                more = (
                    {"model_name": "vit_tiny_patch16_224"}
                    if path.stem == "timm"
                    else {"path": "/"}
                    if path.stem == "hf"
                    else {}
                )
                assert allowed(group, target | more, path) == target | more
                found += 1
    assert found >= 20


# ---- networks of one's own ------------------------------------------------------------------------------------------

OWN = """
from collections.abc import Callable

import torch
from torch import nn

class Stem(nn.Module):
    def __init__(self, width: int, stride: tuple[int, int]) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, width, stride, stride=stride)
        self.gain = {(8, 8): 2.0}[stride]  # no list is a key

    def forward(self, images):
        return self.gain * self.convolution(images)

class Norm(nn.LayerNorm):
    pass

class Net(nn.Module):
    def __init__(self, stem: nn.Module, norm: Callable[[int], nn.Module], width: int = 6) -> None:
        super().__init__()
        self.output_dim, self.stem, self.norm = width, stem, norm(width)

    def forward(self, images):
        return self.norm(self.stem(images).relu().mean(dim=(2, 3)))

def function(width):
    return Stem(width)
"""
OWN_YAML = """
_target_: my_package.nets.Net
width: 6
stem: {_target_: my_package.nets.Stem, width: 6, stride: [8, 8]}
norm: {_target_: my_package.nets.Norm, _partial_: true, eps: 0.001}
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Where a backbone of one's own, with a network within it, was trained for two steps."""
    home = tmp_path_factory.mktemp("own")
    (home / "my_package").mkdir()
    (home / "my_package" / "__init__.py").touch()
    (home / "my_package" / "nets.py").write_text(OWN)
    (home / "conf" / "backbone").mkdir(parents=True)
    (home / "conf" / "backbone" / "own.yaml").write_text(OWN_YAML)
    trained = program(*own_command(2), cwd=home)
    assert trained.returncode == 0, trained.stderr
    return home


def own_command(steps, name="a"):
    small = [override for override in TINY if not override.startswith("backbone.")]
    return ["--config-dir=conf", "backbone=own", *small, f"training.max_steps={steps}", f"name={name}"]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["teacher.safetensors", "checkpoints/step_000000002.pt"])
def test_a_network_of_ones_own_is_loaded_with_trust_alone(own, monkeypatch, file):
    monkeypatch.chdir(own)
    monkeypatch.syspath_prepend(str(own))
    path = f"outputs/a/{file}"
    sentence = (
        r"its backbone is my_package\.nets\.Net, which is no backbone of this project, so nothing of it was imported\. "
        r"If you know who made the file .*trust=\[my_package\] \(in Python: "
        r'load_teacher\(path, trust=\("my_package",\)\)'
    )
    with pytest.raises(NotAllowed, match=sentence):
        dino.load_teacher(path)
    for other in ("my", "my_package.net", "my_package.nets.Stem", "evil"):  # a part of a name is not the name
        with pytest.raises(NotAllowed, match="trust="):
            dino.load_teacher(path, trust=(other,))
    assert "my_package" not in sys.modules
    for name in ("my_package", "my_package.nets"):
        teacher = dino.load_teacher(path, trust=(name,))
        assert teacher.backbone(torch.zeros(2, 3, 64, 64)).shape == (2, 6)
    with pytest.raises(NotAllowed, match="my_package.nets.Stem, which is no backbone"):  # the network within it
        dino.load_teacher(path, trust="my_package.nets.Net")
    with pytest.raises(ValueError, match="trust=.*expected dotted names"):
        dino.load_teacher(path, trust=("my package",))
    for name in ("my_package", "my_package.nets"):
        sys.modules.pop(name, None)


def test_a_network_of_ones_own_is_built_as_in_training(own, monkeypatch):
    """Its networks first, lists as tuples where the class says so, and what is partial waits for its arguments."""
    monkeypatch.syspath_prepend(str(own))
    nets = importlib.import_module("my_package.nets")
    by_hand = nets.Net(nets.Stem(6, (8, 8)), functools.partial(nets.Norm, eps=0.001))
    saved = load_file(own / "outputs" / "a" / "teacher.safetensors")
    weights = {name: value for name, value in saved.items() if name.startswith("backbone.")}
    by_hand.load_state_dict({name.removeprefix("backbone."): value for name, value in weights.items()})
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    teacher = dino.load_teacher(own / "outputs" / "a", trust=("my_package",))
    assert torch.equal(teacher.backbone(images), by_hand.eval()(images))
    for name in ("my_package", "my_package.nets"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_every_command_takes_trust(own):
    quick = ["device=cpu", "measures=[knn]", "ks=[1]"]
    refused = python("dino.evaluate", "run=outputs/a", *quick, cwd=own)
    assert refused.returncode == 2 and "trust=[my_package]" in refused.stderr, refused.stderr
    measured = python("dino.evaluate", "run=outputs/a", *quick, "trust=[my_package]", cwd=own)
    assert measured.returncode == 0 and "knn" in measured.stdout, measured.stderr
    photo = str(ROOT / "docs" / "imagenette_small.png")
    drawn = ["checkpoint=outputs/a", f"images={photo}"]
    refused = python("dino.visualize", *drawn, cwd=own)
    assert refused.returncode == 2 and "trust=[my_package]" in refused.stderr, refused.stderr
    shown = python("dino.visualize", *drawn, "trust=[my_package]", cwd=own)
    assert shown.returncode == 0, shown.stderr


@pytest.mark.slow
def test_what_the_command_names_needs_no_trust(own):
    """A resume in one's own directory, and a start from weights of the network that the command itself names."""
    again = program(*own_command(2), cwd=own)
    assert again.returncode == 0 and "is finished" in again.stderr, again.stderr
    started = program(*own_command(1, "b"), "init_from=outputs/a", cwd=own)
    assert started.returncode == 0, started.stderr
    (own / "outputs" / "b" / "checkpoints" / "step_000000001.pt").rename(own / "outputs" / "moved.pt")
    resumed = program(*own_command(2, "c"), "checkpoint.every_minutes=1e-9", cwd=own)
    assert resumed.returncode == 0, resumed.stderr
    (own / "outputs" / "c" / "checkpoints" / "step_000000002.pt").unlink()
    (own / "outputs" / "c" / "checkpoints" / "best.pt").unlink(missing_ok=True)
    resumed = program(*own_command(2, "c"), "checkpoint.every_minutes=1e-9", cwd=own)
    assert resumed.returncode == 0 and "resumed at step 1" in resumed.stderr, resumed.stderr
    other = [*TINY, "training.max_steps=1", "name=d", "init_from=outputs/a"]
    refused = program(*other, cwd=own)
    assert refused.returncode == 2 and "trust=[my_package]" in refused.stderr, refused.stderr


def test_a_trusted_name_is_still_a_network(own, monkeypatch):
    monkeypatch.syspath_prepend(str(own))
    for target in ("my_package.nets.function", "my_package.nets.torch", "my_package.nets.nn.Linear"):
        write_teacher(own / "x.safetensors", backbone={"_target_": target})
        with pytest.raises(NotAllowed):
            dino.load_teacher(own / "x.safetensors", trust=("my_package",))
    with pytest.raises(NotAllowed, match="no class of a backbone"):
        allowed("backbone", {"_target_": "os.system"}, Path("x"), trust=("os",))
    for name in ("my_package", "my_package.nets"):
        sys.modules.pop(name, None)
