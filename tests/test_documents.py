"""What the README and CONTRIBUTING show is run as it stands."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from dino.config import CONF
from dino.config.node import build_node

ROOT = Path(__file__).parents[1]


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_readmes_loop_and_its_parts_train_and_measure(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loop, parts, _ = blocks("README.md", "python")
    names = {}
    exec(compile(loop, "README.md", "exec"), names)
    assert names["step"] == 19 and names["loss"].item() < math.log(1024)
    assert torch.load("checkpoint.pth", weights_only=True)["config"] == names["config"]
    capsys.readouterr()
    exec(compile(parts, "README.md", "exec"), {})
    assert re.fullmatch(r"\{'knn': 0\.\d+\}\n", capsys.readouterr().out)


def test_contributings_backbone_is_one_class_and_one_yaml(tmp_path, monkeypatch):
    (source,) = blocks("CONTRIBUTING.md", "python")
    (config,) = blocks("CONTRIBUTING.md", "yaml")
    (tmp_path / "tiny_conv.py").write_text(source)
    (tmp_path / "conf" / "backbone").mkdir(parents=True)
    (tmp_path / "conf" / "backbone" / "tiny_conv.yaml").write_text(config)
    monkeypatch.setattr("dino.backbone.__path__", [*sys.modules["dino.backbone"].__path__, str(tmp_path)])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        search = f"hydra.searchpath=[file://{tmp_path / 'conf'}]"
        composed = compose("train", ["backbone=tiny_conv", search])
    backbone = build_node({key: composed.backbone[key] for key in composed.backbone})
    assert backbone(torch.zeros(2, 3, 64, 64)).shape == (2, backbone.output_dim)


def test_every_option_of_the_configuration_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    row = {line.split("|")[1].strip(" `"): line for line in text.splitlines() if line.startswith("| `")}
    for group in ("backbone", "dataset", "head", "optimizer", "evaluator", "logger", "experiment"):
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            if not re.fullmatch(r"resnet(34|50|101)", path.stem):  # written as a range
                assert f"`{path.stem}`" in row[group], path
