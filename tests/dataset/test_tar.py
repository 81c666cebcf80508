"""Tar shards. Witness: the webdataset package, which writes them and reads them back."""

import gzip
import io
import json
import os
import tarfile
import time
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from webdataset import ShardWriter
from webdataset.tariterators import group_by_keys, tar_file_expander

from dino.dataset import tar
from dino.dataset.encoded import BrokenImage
from dino.dataset.tar import Tar, in_braces


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dino-train"


def image(value: int, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (value, 0, 0)).save(buffer, format)
    return buffer.getvalue()


def shard(path, files: dict[str, bytes]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def settle(*paths):
    for path in paths:
        then = path.stat().st_mtime_ns - 3600 * 10**9
        os.utime(path, ns=(then, then))


@pytest.fixture
def root(tmp_path):
    """Shards train-0 and train-1 of three samples each and val-0 of two: the image of value i has the label i % 3."""
    values = iter(range(8))
    for name, count in (("train-0", 3), ("train-1", 3), ("val-0", 2)):
        files = {}
        for i in range(count):
            value = next(values)
            files |= {f"{i}.png": image(value), f"{i}.cls": str(value % 3).encode()}
        shard(tmp_path / "root" / f"{name}.tar", files)
    return tmp_path / "root"


def red(dataset):
    return [(pixels[0, 0, 0].item(), label) for pixels, label in dataset]


def test_samples_are_read_as_webdataset_writes_and_reads_them(tmp_path):
    rng = np.random.default_rng(0)
    with ShardWriter(str(tmp_path / "train-%06d.tar"), maxcount=7, verbose=0) as writer:
        for i in range(20):
            pixels = Image.fromarray(rng.integers(0, 256, (*rng.integers(4, 30, 2), 3), dtype=np.uint8))
            buffer = io.BytesIO()
            pixels.save(buffer, "JPEG" if i % 2 else "PNG")
            kind = "jpg" if i % 2 else "png"
            notes = {"txt": "a caption", "json": {"url": "u"}}
            writer.write({"__key__": f"deep.er/{'long' * 40}{i:03}", kind: buffer.getvalue(), "cls": i % 4, **notes})
    dataset = Tar(tmp_path, "train", "train-{000000..000002}.tar", "none")
    shards = sorted(map(str, tmp_path.glob("train-*.tar")))
    with ExitStack() as streams:  # webdataset.WebDataset would leave the files open
        sources = [{"url": path, "stream": streams.enter_context(open(path, "rb"))} for path in shards]
        theirs = list(group_by_keys(tar_file_expander(sources)))
    assert len(shards) == 3 and len(dataset) == len(theirs) == 20
    for i, sample in enumerate(theirs):
        kind = "jpg" if "jpg" in sample else "png"
        assert dataset.encoded(i) == sample[kind] and dataset.labels[i] == int(sample["cls"])
        assert dataset.name(i) == f"{sample['__url__']}/{sample['__key__']}.{kind}"
    assert dataset.classes == ["0", "1", "2", "3"]


def test_the_splits_are_the_shards_named_for_them(root):
    assert red(Tar(root, "train", "train-*.tar", "val-*.tar")) == [(i, i % 3) for i in range(6)]
    assert red(Tar(str(root), "val", "train-*.tar", "val-{0..0}.tar")) == [(6, 0), (7, 1)]
    assert len(Tar(root.parent, "train", "root", "none")) == 8  # a folder: all in it
    assert len(Tar(root, "train", str(root / "train-*.tar"), "none")) == 6


def test_without_val_shards_every_tenth_sample_is_held_out(root):
    assert red(Tar(root, "train", "*.tar")) == [(i, i % 3) for i in range(7)]
    assert red(Tar(root, "val", "*.tar")) == [(7, 1)]


def test_samples_without_labels_are_unlabelled_and_all_of_them_train(tmp_path):
    shard(tmp_path / "a.tar", {f"{i:02}.png": image(i) for i in range(12)})
    train, val = (Tar(tmp_path, split, "a.tar") for split in ("train", "val"))
    assert train.classes is None and red(train) == [(i, -1) for i in range(12)]
    assert val.classes is None and red(val) == [(0, -1), (10, -1)]


def test_a_label_is_a_number_in_cls_or_json(tmp_path):
    shard(
        tmp_path / "a.tar",
        {
            "a.PNG": image(0),
            "a.cls": b"2\n",
            "b.json": json.dumps({"label": 3, "cls": 9}).encode(),
            "b.png": image(1),
            "c.png": image(2),
            "c.json": json.dumps({"cls": 1}).encode(),
            "c.txt": b"7",
            "d.png": image(3),
            "d.json": json.dumps({"label": 5}).encode(),
            "d.cls": b"0",
        },
    )
    assert red(Tar(tmp_path, "train", "a.tar", "none")) == [(0, 2), (1, 3), (2, 1), (3, 0)]


@pytest.mark.parametrize("place", ["root/classes.txt", "root/shards/classnames.txt"])
def test_classes_have_their_names_from_the_file_beside_the_shards(tmp_path, place):
    shard(tmp_path / "root" / "shards" / "a.tar", {"a.png": image(0), "a.cls": b"1"})
    (tmp_path / place).write_text("cat\ndog\nemu\n")
    assert Tar(tmp_path / "root", "train", "shards", "none").classes == ["cat", "dog", "emu"]
    (tmp_path / place).write_text("cat\n")
    with pytest.raises(ValueError, match="has 1 lines, but the labels go to 1. Add a line each"):
        Tar(tmp_path / "root", "train", "shards", "none")


def test_the_image_that_is_meant_can_be_named(tmp_path):
    files = {"a.jpg": image(1, "JPEG"), "a.seg.png": image(2), "a.png": image(3)}
    shard(tmp_path / "a.tar", files)
    with pytest.raises(
        ValueError, match=r"a\.tar/a: expected one image in a sample, got 2, in the files a\.jpg, a\.seg"
    ):
        Tar(tmp_path, "train", "a.tar")
    assert red(Tar(tmp_path, "train", "a.tar", image="seg.png")) == [(2, -1)]


def test_what_is_no_sample_is_passed_over(tmp_path):
    shard(
        tmp_path / "a.tar",
        {"__shard__/notes.json": b"{}", "README": b"read", "x/.hidden.png": b"", "._a.png": b"", "x/a.png": image(4)},
    )
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        folder = tarfile.TarInfo("b.png")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    assert red(Tar(tmp_path, "train", "a.tar")) == [(4, -1)]


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"a.txt": b"x"}, r"a\.tar/a: expected one image in a sample, got 0, in the files a\.txt\. Make"),
        ({"a.png": b"", "b.png": b"", "a.cls": b"1"}, r"a\.tar/a: expected one image in a sample, got 0, in .* a\.cls"),
        ({"a.png": b"", "a.cls": b"cat"}, r"a\.tar/a: the label must be a number from 0 on, got b'cat'. Correct it"),
        ({"a.png": b"", "a.json": b'{"label": "cat"}'}, r"the label must be a number from 0 on, got 'cat'"),
        ({"a.png": b"", "a.json": b"{"}, r"the label must be a number from 0 on, got b'{'"),
        ({"a.png": b"", "a.cls": b"-2"}, r"the label must be a number from 0 on, got -2"),
        (
            {"a.png": b"", "a.cls": b"1", "b.png": b""},
            r"1 of 2 samples have a label, b\.png has none. Label all or none",
        ),
        ({"README": b"x"}, r"no samples in .*a\.tar"),
    ],
)
def test_shards_that_do_not_fit_are_refused_in_a_sentence(tmp_path, files, sentence):
    shard(tmp_path / "a.tar", files)
    with pytest.raises(ValueError, match=f"^Tar: .*{sentence}"):
        Tar(tmp_path, "train", "a.tar")


def test_shards_that_are_not_there_are_named(root):
    with pytest.raises(ValueError, match="no folder given. Set dataset.root"):
        Tar(None, "train", "a.tar")
    with pytest.raises(FileNotFoundError, match=r"no shards .*root/x-\*\.tar. Set dataset.root, or the shards"):
        Tar(root, "train", "x-*.tar")
    with pytest.raises(FileNotFoundError, match=r"2 of 4 shards are missing, the first: .*train-2\.tar. Copy them"):
        Tar(root, "train", "train-{0..3}.tar")


@pytest.mark.parametrize("left", [300, 512, 700, 1024, -10240])
def test_a_shard_that_was_cut_is_named(root, left):
    path = root / "train-1.tar"
    end = path.stat().st_size
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1].offset_data
    assert last + 512 < end
    data = path.read_bytes()
    path.write_bytes(data[:left] if left > 0 else data[: last + 512])
    with pytest.raises(ValueError, match=r"Tar: .*train-1\.tar is cut short or broken \(.*\)\. Copy it again"):
        Tar(root, "train", "train-*.tar")


def test_a_shard_that_is_broken_in_the_middle_is_named(root):
    path = root / "train-1.tar"
    with tarfile.open(path) as archive:
        header = archive.getmembers()[2].offset
    with path.open("r+b") as file:
        file.seek(header)
        file.write(b"rubbish" * 70)
    with pytest.raises(ValueError, match=r"Tar: .*train-1\.tar is cut short or broken"):
        Tar(root, "train", "train-*.tar")


def test_a_compressed_shard_is_refused_with_the_reason(root):
    path = root / "train-0.tar"
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(
        ValueError, match=r"train-0\.tar is compressed \(gzip\), so that an image .* Unpack it to a plain"
    ):
        Tar(root, "train", "train-*.tar")


def test_braces_are_read_as_a_shell_reads_them():
    assert in_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert in_braces("{9..10}") == ["9", "10"] and in_braces("{1..001}") == ["001"]
    assert in_braces("{a,b}/{0..1}{,x}") == [f"{p}/{n}{x}" for p in "ab" for n in "01" for x in ("", "x")]
    assert in_braces("{one}.tar") == ["{one}.tar"] and in_braces("a*.tar") == ["a*.tar"]


def test_an_index_is_used_while_no_shard_has_changed(root, cache, monkeypatch):
    first = red(Tar(root, "train", "train-*.tar"))
    assert not cache.exists()  # made a moment ago
    settle(*root.iterdir())
    Tar(root, "train", "train-*.tar")
    assert len(list(cache.iterdir())) == 1
    reader = tar.samples_in
    monkeypatch.setattr(tar, "samples_in", None)
    assert red(Tar(root, "train", "train-*.tar")) == first
    monkeypatch.setattr(tar, "samples_in", reader)
    time.sleep(0.01)
    shard(root / "train-1.tar", {"0.png": image(99), "0.cls": b"1"})
    assert red(Tar(root, "train", "train-*.tar", "none")) == [(0, 0), (1, 1), (2, 2), (99, 1)]


def test_a_shard_that_changed_or_has_gone_breaks_its_samples_alone(root):
    dataset = Tar(root, "train", "train-*.tar", "none")
    (root / "train-0.tar").unlink()
    shard(root / "train-1.tar", {"0.png": image(99), "0.cls": b"1"})
    shard(root / "train-2.tar", {"0.png": image(98), "0.cls": b"1"})
    for i, name in ((1, "train-0.tar/1.png"), (4, "train-1.tar/1.png")):
        with pytest.raises(BrokenImage, match="the shard has gone or changed since it was indexed. Restore") as error:
            dataset[i]
        assert error.value.name == f"{root}/{name}"


def test_a_broken_image_is_named_by_shard_and_key(tmp_path):
    shard(tmp_path / "a.tar", {"x/a.jpg": image(1, "JPEG")[:200], "x/b.png": image(2)})
    dataset = Tar(tmp_path, "train", "a.tar")
    with pytest.raises(BrokenImage, match=r"a\.tar/x/a\.jpg: .* or remove it"):
        dataset[0]
    assert dataset[1][0][0, 0, 0] == 2


def test_the_fingerprint_is_of_the_samples_and_not_of_their_place(root):
    before = {split: Tar(root, split, "*.tar").fingerprint for split in ("train", "val")}
    assert before["train"] != before["val"]
    moved = root.rename(root.parent / "moved")
    assert {split: Tar(moved, split, "*.tar").fingerprint for split in ("train", "val")} == before
    shard(moved / "val-0.tar", {"0.png": image(6), "0.cls": b"0", "1.png": image(7), "1.cls": b"2"})  # another label
    assert Tar(moved, "val", "*.tar").fingerprint != before["val"]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_any_sample_in_any_order(root, context):
    dataset = Tar(root, "train", "train-*.tar", "none")
    order = [5, 0, 3, 3, 1, 4, 2, 0] * 3
    expected = [dataset[i] for i in order]  # what the parent has read leaves nothing open to be shared
    loader = DataLoader(dataset, sampler=order, batch_size=None, num_workers=1, multiprocessing_context=context)
    for (pixels, label), (wanted, wanted_label) in zip(loader, expected, strict=True):
        assert torch.equal(pixels, wanted) and label == wanted_label
