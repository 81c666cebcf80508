"""Finding images once. Witness: os.walk."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from dino.dataset import index
from dino.dataset.folder import Folder
from dino.dataset.imagenet import ImageNet
from dino.dataset.imagenet100 import ImageNet100
from dino.dataset.index import Names, find_images


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "WORTH", 1)
    return tmp_path / "cache" / "dino-train"


@pytest.fixture
def root(tmp_path):
    names = [
        "b/2.jpg",
        "b/1.PNG",
        "b/deep/er/3.jpeg",
        "b-/4.webp",
        "a/5.tif",
        "a/note.txt",
        "a/.6.jpg",
        ".c/7.jpg",
        "8.gif",
    ]
    for name in [f"train/{name}" for name in names] + ["val/a/9.bmp"]:
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "root" / "train" / "empty").mkdir()
    settle(tmp_path / "root")
    return tmp_path / "root"


def settle(root: Path) -> None:
    """An hour passes."""
    for folder, _, _ in os.walk(root, followlinks=True):
        then = Path(folder).stat().st_mtime_ns - 3600 * 10**9
        os.utime(folder, ns=(then, then))


def paths(files) -> list[str]:
    folders = np.repeat(np.arange(len(files.folders)), files.counts)
    return [str(Path(*files.folders[folder], files.names[i])) for i, folder in enumerate(folders)]


def unread(monkeypatch):
    """From here on no folder can be listed."""
    monkeypatch.setattr(os, "scandir", None)


def test_images_come_folder_by_folder_in_the_order_of_their_paths(root):
    expected = ["8.gif", "a/5.tif", "b/1.PNG", "b/2.jpg", "b/deep/er/3.jpeg", "b-/4.webp"]
    files = find_images(root, "train")
    assert paths(files) == [f"train/{name}" for name in expected]
    assert files.heads() == ["", "a", "b", "b", "b", "b-", "empty"]
    assert paths(find_images(root, "val", "missing", "train")) == [
        "val/a/9.bmp",
        *(f"train/{name}" for name in expected),
    ]
    assert paths(find_images(root / "train", "")) == expected
    assert paths(find_images(root, "missing")) == []


def test_an_index_is_used_while_no_folder_has_changed(root, cache, monkeypatch):
    first = find_images(root, "train")
    assert len(list(cache.iterdir())) == 1
    unread(monkeypatch)
    again = find_images(root, "train")
    assert paths(again) == paths(first) and again.folders == first.folders and again.heads() == first.heads()
    monkeypatch.chdir(root)
    assert paths(find_images(Path(), "train")) == paths(first)  # the same place by another name


@pytest.mark.parametrize("change", ["add", "remove", "rename", "add a folder", "deep"])
def test_a_change_in_any_folder_is_seen(root, change):
    before = paths(find_images(root, "train"))
    train = root / "train"
    if change == "add":
        (train / "empty" / "new.jpg").touch()
    elif change == "remove":
        (train / "b-" / "4.webp").unlink()
    elif change == "rename":
        (train / "a" / "5.tif").rename(train / "a" / "6.tif")
    elif change == "add a folder":
        (train / "b" / "new").mkdir()
        (train / "b" / "new" / "1.jpg").touch()
    else:
        (train / "b" / "deep" / "er" / "new.jpg").touch()
    after = paths(find_images(root, "train"))
    found = {str(Path(p, n).relative_to(root)) for p, _, names in os.walk(train) for n in names}
    assert after != before and set(after) == {n for n in found if "/." not in n and not n.endswith(".txt")}


def test_what_changed_a_moment_ago_is_not_kept(root, cache):
    (root / "train" / "b" / "deep" / "new.jpg").touch()
    find_images(root, "train")
    assert not cache.exists()


def test_few_images_are_not_worth_an_index(root, cache, monkeypatch):
    monkeypatch.setattr(index, "WORTH", 7)
    find_images(root, "train")
    assert not cache.exists()
    monkeypatch.setattr(index, "WORTH", 6)
    find_images(root, "train")
    assert cache.exists()


@pytest.mark.parametrize("fault", ["a file", "read only", "torn", "rubbish", "no home"])
def test_an_index_that_cannot_be_kept_or_read_is_done_without(root, cache, monkeypatch, fault):
    expected = paths(find_images(root, "train"))
    (kept,) = cache.iterdir()
    if fault == "torn":
        kept.write_bytes(kept.read_bytes()[:-50])
    elif fault == "rubbish":
        kept.write_bytes(b"rubbish")
    elif fault == "a file":
        shutil.rmtree(cache)
        cache.touch()
    elif fault == "read only":
        shutil.rmtree(cache)
        monkeypatch.setattr(index.tempfile, "NamedTemporaryFile", lambda **_: (_ for _ in ()).throw(PermissionError()))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    assert paths(find_images(root, "train")) == expected
    if fault in ("torn", "rubbish"):
        unread(monkeypatch)
        assert paths(find_images(root, "train")) == expected  # it was made anew


def test_nothing_half_written_is_left(root, cache, monkeypatch):
    monkeypatch.setattr(index.np, "savez", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    assert len(paths(find_images(root, "train"))) == 6
    assert list(cache.iterdir()) == []


def test_links_are_followed_but_not_in_circles(root, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jpg").touch()
    (root / "train" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "a" / "up").symlink_to(root / "train")
    settle(root)
    assert paths(find_images(root, "train"))[-1] == "train/linked/x.jpg" and len(paths(find_images(root, "train"))) == 7
    (tmp_path / "elsewhere" / "y.jpg").touch()
    assert paths(find_images(root, "train"))[-1] == "train/linked/y.jpg"


def test_names_are_any_that_a_file_can_have(root, monkeypatch):
    odd = ["ä ö.jpg", "new\nline.jpg", os.fsdecode(b"\xff\xfe.jpg")]
    for name in odd:
        (root / "val" / "a" / name).touch()
    settle(root)
    expected = sorted(["9.bmp", *odd])
    for _ in range(2):
        files = find_images(root, "val")
        assert [files.names[i] for i in range(4)] == expected and files.names[-4] == expected[0]
        unread(monkeypatch)
    assert len(Names.of([])) == 0


def test_every_data_set_of_folders_starts_from_its_index(tmp_path, monkeypatch):
    for split, part in (("train", "train.X1"), ("train", "train.X2"), ("val", "val.X")):
        for wnid in ("n1", "n2"):
            for folder in (tmp_path / "net" / split, tmp_path / "net100" / part):
                (folder / wnid).mkdir(parents=True, exist_ok=True)
                (folder / wnid / f"{part}.JPEG").touch()
    settle(tmp_path / "net")
    settle(tmp_path / "net100")
    makers = [(kind, tmp_path / name) for kind, name in ((ImageNet, "net"), (Folder, "net"), (ImageNet100, "net100"))]
    first = [make(root, split) for make, root in makers for split in ("train", "val")]
    monkeypatch.setattr(index, "walk", None)
    again = [make(root, split) for make, root in makers for split in ("train", "val")]
    for before, after in zip(first, again):
        assert [before.name(i) for i in range(len(before))] == [after.name(i) for i in range(len(after))]
        assert before.fingerprint == after.fingerprint and before.classes == after.classes
        assert before.labels.tolist() == after.labels.tolist()
    joined = first[4]
    assert [Path(joined.name(i)).parts[-3:] for i in range(4)] == [
        ("train.X1", "n1", "train.X1.JPEG"),
        ("train.X2", "n1", "train.X2.JPEG"),
        ("train.X1", "n2", "train.X1.JPEG"),
        ("train.X2", "n2", "train.X2.JPEG"),
    ]


def test_a_data_set_that_moved_has_its_fingerprint_still(tmp_path):
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).touch()
    before = {split: Folder(tmp_path / "here", split).fingerprint for split in ("train", "val")}
    assert before["train"] != before["val"]
    (tmp_path / "here").rename(tmp_path / "there")
    there = tmp_path / "there"
    (there / "empty").mkdir()  # changes no image
    assert {split: Folder(there, split).fingerprint for split in ("train", "val")} == before
    (there / "b" / "1.jpg").rename(there / "b" / "2.jpg")
    assert Folder(there, "val").fingerprint != before["val"]


def test_an_index_is_read_in_a_fraction_of_a_second(tmp_path, cache):
    for i in range(20):
        (tmp_path / "many" / f"{i}").mkdir(parents=True)
        for j in range(500):
            (tmp_path / "many" / f"{i}" / f"{j}.jpg").touch()
    settle(tmp_path / "many")
    find_images(tmp_path / "many", "")
    (kept,) = cache.iterdir()
    assert kept.stat().st_size < 20 * 10_000
    start = time.perf_counter()
    assert len(find_images(tmp_path / "many", "").names) == 10_000
    assert time.perf_counter() - start < 0.5
