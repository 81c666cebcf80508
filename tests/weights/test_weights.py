"""teacher.safetensors: what is written comes back, and what is damaged or claims too much is refused in a sentence."""

import contextlib
import json
import os
import random
import re
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dino.backbone.vit_tiny import ViTTiny
from dino.head import DinoProjectionHead
from dino.model import DinoModel
from dino.run.checkpoint import write_step
from dino.weights import checksum, load_teacher, save_teacher
from dino.weights.checkpoint_file import read_checkpoint

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
    save_teacher(tmp_path, saved.state_dict(), CONFIG, {"size": 64, "mean": (0.5, 0.4, 0.3), "std": (1.0, 1.0, 1.0)})
    images = torch.randn(2, 3, 64, 64)
    for source in (tmp_path, tmp_path / "teacher.safetensors", str(tmp_path)):
        loaded = load_teacher(source)
        assert not loaded.training
        assert torch.equal(loaded(images), saved(images))
    assert loaded.preprocessing == {"size": 64, "mean": [0.5, 0.4, 0.3], "std": [1.0, 1.0, 1.0]}


def test_anyone_can_read_a_teacher_file_with_safetensors_alone(tmp_path):
    save_teacher(tmp_path, teacher().state_dict(), CONFIG, {"size": 64})
    weights = load_file(tmp_path / "teacher.safetensors")
    assert torch.equal(weights["backbone.cls_token"], teacher().backbone.cls_token)
    with safe_open(tmp_path / "teacher.safetensors", "pt") as file:
        assert json.loads(file.metadata()["backbone"]) == CONFIG["backbone"]


@pytest.mark.parametrize("case", range(40))
def test_a_flipped_bit_in_a_teacher_file_is_found_or_harmless(tmp_path, case):
    save_teacher(
        tmp_path, teacher().state_dict(), CONFIG, {"size": 64, "mean": (0.5, 0.4, 0.3), "std": (1.0, 1.0, 1.0)}
    )
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
        sentences = (
            "cannot be read as a teacher|holds the weights of another|its (backbone|head)|cannot be built|: .* must be"
        )
        assert re.search(sentences, str(error))
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


# ---- what a stranger's file may claim -------------------------------------------------------------------------------

PREPARED = {"size": 64, "mean": (0.5, 0.4, 0.3), "std": (1.0, 1.0, 1.0)}


def rewritten(path, change):
    """The file with another header, made from its own by `change`."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@contextlib.contextmanager
def little_memory():
    """At no time within the block this process has 200 MB more than at its beginning."""

    def status(name):
        return int(re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)[1])

    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what there is now
    before = status("VmRSS")
    yield
    assert status("VmHWM") - before < 200_000


def test_the_memory_of_a_block_is_seen():
    with pytest.raises(AssertionError), little_memory():
        torch.ones(100_000_000)


def test_a_header_that_claims_ten_terabytes_is_refused_in_a_sentence(tmp_path):
    save_teacher(tmp_path, teacher().state_dict(), CONFIG, PREPARED)

    def claim(header):
        header["backbone.cls_token"] |= {"shape": [2_500_000_000_000], "data_offsets": [0, 10_000_000_000_000]}

    rewritten(tmp_path / "teacher.safetensors", claim)
    with little_memory(), pytest.raises(ValueError, match="cannot be read as a teacher.safetensors"):
        load_teacher(tmp_path)


@pytest.mark.parametrize("size", [5_000_000_000, 10_000_000_000_000])
def test_a_large_file_without_content_is_refused_before_it_is_read(tmp_path, size):
    """Such a file takes no room on a disk: its header is right, and its content a hole."""
    save_teacher(tmp_path, teacher().state_dict(), CONFIG, PREPARED)
    path = tmp_path / "teacher.safetensors"

    def claim(header):
        end = max(value["data_offsets"][1] for key, value in header.items() if key != "__metadata__")
        header["backbone.more"] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}

    rewritten(path, claim)
    try:
        os.truncate(path, path.stat().st_size + size)
    except OSError as error:
        pytest.skip(f"this disk takes no file of {size} bytes, not even an empty one: {error.strerror}")
    sentence = r"weights of another network \(unexpected: backbone.more\)|unable to mmap \d+ bytes"
    with little_memory(), pytest.raises(ValueError, match=sentence):
        load_teacher(tmp_path)


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("backbone", "hidden_dim", 2**20),  # 13 TB
        ("backbone", "depth", 10**9),
        ("backbone", "image_size", 10**6),
        ("backbone", "hidden_dim", 10**30),
        ("head", "output_dim", 10**10),
        ("head", "num_layers", 10**9),
    ],
)
def test_a_network_larger_than_its_weights_takes_no_memory(tmp_path, part, key, value):
    config = {**CONFIG, part: CONFIG[part] | {key: value}}
    save_teacher(tmp_path, teacher().state_dict(), config, PREPARED)
    sentences = "weights of another network|cannot be built|make it smaller"
    with little_memory(), pytest.raises(ValueError, match=sentences):
        load_teacher(tmp_path)


def test_weights_of_another_network_are_named(tmp_path):
    save_teacher(tmp_path, teacher().state_dict(), {**CONFIG, "head": CONFIG["head"] | {"hidden_dim": 9}}, PREPARED)
    with pytest.raises(ValueError, match=r"head\.mlp\.0\.weight is \[8, 16\] in the file and \[9, 16\] in the network"):
        load_teacher(tmp_path)
    save_teacher(tmp_path, teacher().state_dict(), {**CONFIG, "backbone": CONFIG["backbone"] | {"depth": 2}}, PREPARED)
    with pytest.raises(ValueError, match=r"missing: backbone\.blocks\.1\..* and \d+ more\)"):
        load_teacher(tmp_path)


@pytest.mark.parametrize("key, value", [("pages", 3), ("hidden_dim", "wide"), ("depth", None)])
def test_arguments_that_the_class_does_not_take_are_a_sentence(tmp_path, key, value):
    save_teacher(tmp_path, teacher().state_dict(), {**CONFIG, "backbone": CONFIG["backbone"] | {key: value}}, PREPARED)
    with pytest.raises(ValueError, match="the network that it describes cannot be built"):
        load_teacher(tmp_path)


def test_a_part_of_a_network_is_no_backbone(tmp_path):
    node = {"_target_": "dino.backbone.transformer.Block", "hidden_dim": 16, "heads": 2}
    save_teacher(tmp_path, teacher().state_dict(), {**CONFIG, "backbone": node}, PREPARED)
    with pytest.raises(ValueError, match="cannot be built .*output_dim"):
        load_teacher(tmp_path)


def test_a_checksum_tells_of_damage_and_says_so(tmp_path):
    save_teacher(tmp_path, teacher().state_dict(), CONFIG, PREPARED)
    path = tmp_path / "teacher.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="its checksum is another: the file was damaged after it was written"):
        load_teacher(tmp_path)


# ---- a checkpoint ---------------------------------------------------------------------------------------------------


def packed(path, program=None, compression=zipfile.ZIP_STORED):
    """The checkpoint at `path` written anew, with other bytes for its pickle."""
    with zipfile.ZipFile(path) as before:
        parts = {entry.filename: before.read(entry) for entry in before.infolist()}
    with zipfile.ZipFile(path, "w", compression) as after:
        for name, content in parts.items():
            after.writestr(name, program if program and name.endswith("data.pkl") else content)


def calling(name, argument):
    """A pickle of {"x": name(argument)}."""
    return b"\x80\x02}X\x01\x00\x00\x00xc" + name.replace(" ", "\n").encode() + b"\n" + argument + b"\x85Rs."


TEN_TERABYTES = b"\x8a\x06" + (10**13).to_bytes(6, "little")


@pytest.mark.parametrize("name", ["torch Tensor", "__builtin__ bytearray", "torch FloatTensor", "posix system"])
def test_a_checkpoint_calls_nothing_but_what_makes_its_tensors(tmp_path, name):
    """torch.load with weights_only=True allows the first three, which take as much memory as the file asks for."""
    path = write_step(tmp_path, {"iteration": 1, "x": torch.zeros(3)})
    packed(path, calling(name, TEN_TERABYTES))
    with little_memory(), pytest.raises(ValueError, match=f"it calls {name}"):
        read_checkpoint(path)


def test_a_checkpoint_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    path = write_step(tmp_path, {"iteration": 1, "x": torch.zeros(100_000_000)})
    packed(path, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1_000_000
    with little_memory(), pytest.raises(ValueError, match="it is compressed"):
        read_checkpoint(path)


def test_a_checkpoint_whose_parts_lie_over_each_other_is_refused(tmp_path):
    path = write_step(tmp_path, {"iteration": 1, "x": torch.zeros(1000), "y": torch.ones(1000)})
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as parts:
        first, second = (next(e for e in parts.infolist() if e.filename.endswith(f"data/{i}")) for i in (0, 1))
        start = parts.start_dir
    at = content.index(b"PK\x01\x02", start)
    while at != -1:  # the directory's entry of each part: its checksum, its two sizes, and where it lies
        name = content[at + 46 : at + 46 + int.from_bytes(content[at + 28 : at + 30], "little")].decode()
        if name == second.filename:
            content[at + 20 : at + 28] = (first.file_size + 10_000).to_bytes(4, "little") * 2
        at = content.find(b"PK\x01\x02", at + 4)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="its parts claim .* bytes, and the file has"):
        read_checkpoint(path)
