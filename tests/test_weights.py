"""teacher.safetensors: what is written comes back, and what is damaged or claims too much is refused in a sentence."""

import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dino.backbone.vit_tiny import ViTTiny
from dino.head import DinoProjectionHead
from dino.model import DinoModel
from dino.weights import checksum, load_teacher, save_teacher

CONFIG = {
    "backbone": {"_target_": "dino.backbone.vit_tiny.ViTTiny", "hidden_dim": 16, "depth": 1, "heads": 2},
    "head": {"_target_": "dino.head.DinoProjectionHead", "_partial_": True, "hidden_dim": 8, "output_dim": 12},
}


def teacher():
    torch.manual_seed(3)
    return DinoModel(
        ViTTiny(hidden_dim=16, depth=1, heads=2), DinoProjectionHead(16, hidden_dim=8, output_dim=12)
    ).eval()


def test_a_teacher_file_rebuilds_the_model_and_says_how_to_prepare_images(tmp_path):
    saved = teacher()
    save_teacher(tmp_path, saved, CONFIG, {"size": 64, "mean": (0.5, 0.4, 0.3), "std": (1.0, 1.0, 1.0)})
    images = torch.randn(2, 3, 64, 64)
    for source in (tmp_path, tmp_path / "teacher.safetensors", str(tmp_path)):
        loaded = load_teacher(source)
        assert not loaded.training
        assert torch.equal(loaded(images), saved(images))
    assert loaded.preprocessing == {"size": 64, "mean": [0.5, 0.4, 0.3], "std": [1.0, 1.0, 1.0]}


def test_anyone_can_read_a_teacher_file_with_safetensors_alone(tmp_path):
    save_teacher(tmp_path, teacher(), CONFIG, {"size": 64})
    weights = load_file(tmp_path / "teacher.safetensors")
    assert torch.equal(weights["backbone.cls_token"], teacher().backbone.cls_token)
    with safe_open(tmp_path / "teacher.safetensors", "pt") as file:
        assert json.loads(file.metadata()["backbone"]) == CONFIG["backbone"]


@pytest.mark.parametrize("case", range(40))
def test_a_flipped_bit_in_a_teacher_file_is_found_or_harmless(tmp_path, case):
    save_teacher(tmp_path, teacher(), CONFIG, {"size": 64, "mean": (0.5, 0.4, 0.3), "std": (1.0, 1.0, 1.0)})
    written, path = load_teacher(tmp_path), tmp_path / "teacher.safetensors"
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    drawn = random.Random(case)
    at = drawn.randrange(8 + header) if case % 2 else drawn.randrange(8 + header, len(content))
    content[at] ^= 1 << drawn.randrange(8)
    path.write_bytes(content)
    try:
        loaded = load_teacher(tmp_path)
    except ValueError as error:
        # A flip in the header may also make names, shapes or the network others: those are looked at before the bits.
        found = (
            "cannot be read as a teacher.safetensors",
            "holds the weights of another network",
            "its backbone",
            "its head",
        )
        assert any(words in str(error) for words in (*found, "cannot be built", "ViTTiny: ", "DinoProjectionHead: "))
    else:
        assert case % 2  # of the weights every bit counts
        assert checksum(loaded.state_dict(), {}) == checksum(written.state_dict(), {})
        assert (loaded.config, loaded.preprocessing) == (written.config, written.preprocessing)


def test_what_is_no_teacher_file_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a run's directory, its teacher.safetensors"):
        load_teacher(tmp_path)
    (tmp_path / "teacher.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be read as a teacher.safetensors"):
        load_teacher(tmp_path)
