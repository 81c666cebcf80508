"""Data sets, on made-up trees; the real ImageNette only where a copy is at hand."""

import hashlib
import inspect
import json
import os
import pickle
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader

from dino.dataset.cache import Cached
from dino.dataset.cifar10 import CIFAR10
from dino.dataset.download import download
from dino.dataset.encoded import BrokenImage
from dino.dataset.folder import Folder
from dino.dataset.imagenet import ImageNet
from dino.dataset.imagenet100 import ImageNet100
from dino.dataset.imagenette import Imagenette
from dino.dataset.textures import TEXTURES, Textures

DATA = Path(os.environ.get("DINO_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
CONF = Path(__file__).parents[2] / "conf" / "dataset"


def write(path: Path, color: tuple[int, int, int] | int = (10, 20, 30), size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(color, int) else "RGB", size, color).save(path)
    return path


def red(dataset) -> list[tuple[int, int]]:
    """(red value, label) of every image: files are written in one colour each, so this says which image is where."""
    return [(image[0, 0, 0].item(), label) for image, label in (dataset[i] for i in range(len(dataset)))]


# Textures


@pytest.fixture(scope="module")
def textures() -> tuple[Textures, Textures]:
    return Textures("train"), Textures("val", images=1000)


def knn(train, val, k: int = 20, temp: float = 0.07) -> float:
    """Weighted k-NN accuracy, cosine, of (features, labels) pairs."""
    similarity, nearest = (F.normalize(val[0]) @ F.normalize(train[0]).T).topk(k)
    votes = torch.zeros(len(val[0]), 10).scatter_add_(1, train[1][nearest], (similarity / temp).exp())
    return (votes.argmax(1) == val[1]).float().mean().item()


def labels_of(dataset) -> torch.Tensor:
    return torch.tensor([dataset[i][1] for i in range(len(dataset))])


def test_textures_are_grey_balanced_and_of_the_size_asked_for():
    dataset = Textures("train", size=24, images=37)
    images = torch.stack([image for image, _ in dataset])
    assert images.shape == (37, 3, 24, 24) and images.dtype == torch.uint8
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    assert labels_of(dataset).bincount().tolist() == [4] * 7 + [3] * 3
    assert labels_of(dataset)[:10].unique().numel() == 10  # balanced from the start, so a part of it is, too
    assert dataset.classes == [texture.__name__ for texture in TEXTURES]
    assert dataset[-1][1] == dataset[36][1]


def test_textures_are_a_function_of_their_arguments_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = Textures("train", images=50, seed=3).pixels
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(first, Textures("train", images=50, seed=3).pixels)
    assert not torch.equal(first, Textures("train", images=50, seed=4).pixels)


def test_no_texture_is_seen_twice_in_either_split(textures):
    seen = torch.cat([dataset.pixels[:, 0].flatten(1) for dataset in textures]).numpy()
    assert len({row.tobytes() for row in seen}) == 5000
    # Nor with other noise: unlike images correlate less than two draws of the noise on one image do (0.98 and more).
    unit = F.normalize(torch.from_numpy(seen).float() - 127.5)
    train, val = unit[:4000], unit[4000:]
    assert (val @ train.T).max() < 0.95


def test_raw_pixels_tell_little_of_a_texture(textures):
    small = [F.interpolate(d.pixels[:, :1].float(), size=(32, 32), mode="bilinear", antialias=True) for d in textures]
    mean = small[0].flatten(1).mean(0)
    train, val = ((x.flatten(1) - mean, labels_of(d)) for x, d in zip(small, textures, strict=True))
    assert 0.10 < knn(train, val) < 0.26  # chance is 0.10; measured 0.22


def test_brightness_and_contrast_tell_next_to_nothing_of_a_texture(textures):
    def statistics(dataset):
        pixels = dataset.pixels[:, 0].flatten(1).float()
        return torch.stack([pixels.mean(1), pixels.std(1)], 1)

    train, val = map(statistics, textures)
    assert train[:, 0].std() < 1  # of 255: the same luminance in all, but for what clipping takes from thin figures
    assert train[:, 1].std() > 3  # contrast varies, and below it is seen to vary alike in all the classes
    scale = train.std(0)
    nearest = torch.cdist(val / scale, train / scale).topk(20, largest=False).indices
    guess = F.one_hot(labels_of(textures[0])[nearest], 10).sum(1).argmax(1)
    assert (guess == labels_of(textures[1])).float().mean() < 0.19  # chance: 0.10; measured 0.16, by that clipping


INRADIUS = 1 / (1 + 2 * 1.25**0.5)  # of the triangle of base and height 1
COVERED = {  # share of the area, by plain geometry of one period
    "stripes": 0.5,
    "checks": 0.5,
    "discs": np.pi * 0.3**2,
    "rings": np.pi * (0.4**2 - 0.26**2),
    "grid": 1 - 0.86**2,
    "bricks": (1.5 - 0.12) * (0.75 - 0.12) / (1.5 * 0.75),
    "zigzag": 0.4,
    "crosses": 2 * 0.2 * 0.76 - 0.2**2,
    "cells": 0.5,
    "triangles": 0.5 * (1 - 0.05 / INRADIUS) ** 2,
}


@pytest.mark.parametrize("texture", TEXTURES, ids=lambda texture: texture.__name__)
def test_a_texture_covers_its_share_of_the_area_and_is_a_distance_at_its_edge(texture):
    axis = torch.arange(0, 12, 1 / 128)  # twelve periods; bricks repeat every 1.5, everything else every 1 (not cells)
    p, q = torch.meshgrid(axis, axis, indexing="ij")
    distance = texture(p, q)
    assert (distance > 0).float().mean().item() == pytest.approx(COVERED[texture.__name__], abs=0.02)
    if texture.__name__ not in ("triangles",):  # whose base is an edge from one cell to the next
        steps = torch.diff(distance, dim=0).abs().max(), torch.diff(distance, dim=1).abs().max()
        assert max(steps) <= 1.05 / 128  # nowhere steeper than a distance, so edges are a pixel wide


def test_a_texture_learned_from_its_spectrum_shows_that_there_is_something_to_learn(textures):
    """The spectrum forgets the phase, which is what raw pixels trip over: it must tell far more than they do."""
    features = [torch.fft.fft2(d.pixels[:, 0].float() / 255 - 0.5).abs().log1p()[:, :17].flatten(1) for d in textures]
    mean = features[0].mean(0)
    train, val = ((x - mean, labels_of(d)) for x, d in zip(features, textures, strict=True))
    assert knn(train, val) > 0.3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"split": "test"}, '"train" or "val", got \'test\''),
        ({"split": "train", "size": 4}, "size must be at least 8 pixels .* got 4"),
        ({"split": "train", "images": 9}, "images must be at least 10, .* got 9"),
        ({"split": "train", "seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_textures_refuse_what_cannot_be_drawn(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Textures(**arguments)


# Files


def test_images_come_as_rgb_whatever_the_file(tmp_path):
    write(tmp_path / "a" / "grey.png", 77)
    write(tmp_path / "b" / "colour.JPEG", (200, 10, 10))
    Image.new("RGBA", (5, 5), (9, 8, 7, 128)).save(tmp_path / "b" / "alpha.webp", lossless=True)
    write(tmp_path / "train.png").rename(tmp_path / "b" / "._notes.png.txt")
    (tmp_path / "b" / "._colour.JPEG").write_bytes(b"not an image")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    dataset = Folder(tmp_path, "train")
    assert dataset.classes == ["a", "b"] and len(dataset) + len(Folder(tmp_path, "val")) == 3
    image, label = dataset[0]
    assert image.shape == (3, 4, 6) and image[:, 0, 0].tolist() == [77, 77, 77] and label == 0
    assert dataset[1][0][:, 0, 0].tolist() == [9, 8, 7]


def test_a_broken_image_is_named(tmp_path):
    for name in "ab":
        for i in range(2):
            write(tmp_path / name / f"{i}.png", (i, 0, 0), (64, 64))
    broken = tmp_path / "a" / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(BrokenImage, match=r"a/0\.png: a PNG image of 64 x 64 pixels that cannot be decoded") as error:
        Folder(tmp_path, "train")[0]
    assert error.value.name == str(broken)


def test_a_file_that_has_gone_is_named(tmp_path):
    paths = [write(tmp_path / name / f"{i}.png") for name in "ab" for i in range(2)]
    dataset = Folder(tmp_path, "train")
    paths[0].unlink()
    with pytest.raises(BrokenImage, match=r"a/0\.png is gone, though it was there when the images were listed\."):
        dataset[0]
    paths[1].unlink()
    paths[1].mkdir()  # what cannot be read, but is there, is not taken for broken
    with pytest.raises(IsADirectoryError):
        dataset[1]


# Folder


def test_class_folders_give_labels_and_every_tenth_image_is_held_out(tmp_path):
    for i in range(25):
        write(tmp_path / ("cat" if i < 12 else "dog") / "deeper" / f"{i:02}.png", (i, 0, 0))
    train, val = Folder(tmp_path, "train"), Folder(str(tmp_path), "val")
    assert train.classes == val.classes == ["cat", "dog"]
    assert red(val) == [(9, 0), (19, 1)]
    assert red(train) == [(i, int(i >= 12)) for i in range(25) if i not in (9, 19)]


def test_a_folder_of_few_images_still_holds_one_out(tmp_path):
    for i in range(3):
        write(tmp_path / "ab"[i % 2] / f"{i}.png", (i, 0, 0))
    assert red(Folder(tmp_path, "train")) == [(0, 0), (2, 0)] and red(Folder(tmp_path, "val")) == [(1, 1)]


def test_train_and_val_folders_are_the_splits_and_their_labels_agree(tmp_path):
    write(tmp_path / "train" / "b" / "x.png", (1, 0, 0))
    write(tmp_path / "train" / "d" / "x.png", (2, 0, 0))
    write(tmp_path / "val" / "d" / "x.png", (3, 0, 0))
    write(tmp_path / "val" / "a" / "x.png", (4, 0, 0))  # a class that train lacks, first in order: it shifts the others
    train, val = Folder(tmp_path, "train"), Folder(tmp_path, "val")
    assert train.classes == val.classes == ["a", "b", "d"]
    assert red(train) == [(1, 1), (2, 2)] and red(val) == [(4, 0), (3, 2)]


@pytest.mark.parametrize("where", [".", "images", "2021/june"], ids=["flat", "one sub-folder", "deep"])
def test_images_without_class_folders_are_unlabelled_and_all_of_them_train(tmp_path, where):
    for i in range(21):
        write(tmp_path / where / f"{i:02}.png", (i, 0, 0))
    train, val = Folder(tmp_path, "train"), Folder(tmp_path, "val")
    assert train.classes is None and val.classes is None
    assert red(train) == [(i, -1) for i in range(21)] and red(val) == [(0, -1), (10, -1), (20, -1)]


def test_images_beside_the_sub_folders_make_a_folder_unlabelled(tmp_path):
    write(tmp_path / "0.png", (0, 0, 0))
    write(tmp_path / "a" / "1.png", (1, 0, 0))
    write(tmp_path / "b" / "2.png", (2, 0, 0))
    dataset = Folder(tmp_path, "train")
    assert dataset.classes is None and red(dataset) == [(0, -1), (1, -1), (2, -1)]


def test_train_and_val_folders_without_classes_are_unlabelled(tmp_path):
    write(tmp_path / "train" / "1.png", (1, 0, 0))
    write(tmp_path / "val" / "a" / "2.png", (2, 0, 0))
    write(tmp_path / "val" / "b" / "3.png", (3, 0, 0))
    train, val = Folder(tmp_path, "train"), Folder(tmp_path, "val")
    assert train.classes is None and val.classes is None
    assert red(train) == [(1, -1)] and red(val) == [(2, -1), (3, -1)]


def test_a_train_folder_alone_is_held_out_from(tmp_path):
    for i in range(10):
        write(tmp_path / "train" / "ab"[i % 2] / f"{i}.png", (i, 0, 0))
    train, val = Folder(tmp_path, "train"), Folder(tmp_path, "val")
    assert train.classes == ["a", "b"] and len(train) == 9 and red(val) == [(9, 1)]


def test_a_folder_that_cannot_be_read_says_what_to_set(tmp_path):
    with pytest.raises(ValueError, match=r"no folder given\. Set dataset\.root"):
        Folder(None, "train")
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder\. Set"):
        Folder(tmp_path / "nowhere", "train")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(FileNotFoundError, match="found no images for train in dataset.root=.* set dataset.root"):
        Folder(tmp_path, "train")
    write(tmp_path / "train" / "a.png")
    (tmp_path / "val").mkdir()
    with pytest.raises(FileNotFoundError, match="found no images for val"):
        Folder(tmp_path, "val")


# ImageNet and ImageNet-100


def test_imagenet_labels_count_the_sorted_wnids(tmp_path):
    for value, wnid in enumerate(["n03", "n01", "n02"]):
        write(tmp_path / "train" / wnid / "x.JPEG", (100 * value, 0, 0))
    write(tmp_path / "val" / "n03" / "y.JPEG", (50, 0, 0))
    train, val = ImageNet(tmp_path, "train"), ImageNet(tmp_path, "val")
    assert train.classes == val.classes == ["n01", "n02", "n03"]
    reference = torchvision.datasets.ImageFolder(tmp_path / "train")
    assert [label for _, label in red(train)] == reference.targets
    expected = [np.asarray(image).tolist() for image, _ in reference]
    assert [image.permute(1, 2, 0).tolist() for image, _ in train] == expected
    assert [label for _, label in red(val)] == [2]


def test_an_imagenet_whose_val_is_not_sorted_says_what_was_expected(tmp_path):
    write(tmp_path / "train" / "n01" / "x.JPEG")
    write(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    assert len(ImageNet(tmp_path, "train")) == 1
    with pytest.raises(FileNotFoundError, match="expected class folders with images, .*/val/<wnid>/.* found none. Set"):
        ImageNet(tmp_path, "val")


def test_imagenet100_joins_its_parts(tmp_path):
    write(tmp_path / "train.X1" / "n02" / "a.JPEG", (0, 0, 0))
    write(tmp_path / "train.X2" / "n01" / "a.JPEG", (100, 0, 0))
    write(tmp_path / "train.X4" / "n03" / "a.JPEG", (200, 0, 0))
    write(tmp_path / "train.X4" / "n02" / "b.JPEG", (50, 0, 0))
    write(tmp_path / "val.X" / "n03" / "a.JPEG", (150, 0, 0))
    (tmp_path / "train.X9.zip").write_bytes(b"left over from unpacking")
    train, val = ImageNet100(tmp_path, "train"), ImageNet100(tmp_path, "val")
    assert train.classes == val.classes == ["n01", "n02", "n03"]
    assert [label for _, label in red(train)] == [0, 1, 1, 2] and [label for _, label in red(val)] == [2]
    assert [value for value, _ in red(train)] == pytest.approx([100, 0, 50, 200], abs=3)  # JPEG
    (tmp_path / "Labels.json").write_text('{"n01": "robin, redbreast", "n03": "crane"}')
    assert ImageNet100(tmp_path, "val").classes == ["robin, redbreast", "n02", "crane"]


def test_imagenet100_in_kaggles_layout_is_one_set_of_a_hundred_classes(tmp_path):
    wnids = [f"n{i:08}" for i in range(100)]
    for i, wnid in enumerate(wnids):  # 25 whole classes in each part, as Kaggle has them
        for j in range(2):
            write(tmp_path / f"train.X{i // 25 + 1}" / wnid / f"{wnid}_{j}.JPEG", (i, 0, 0))
        write(tmp_path / "val.X" / wnid / f"ILSVRC2012_val_{i:08}.JPEG", (i, 0, 0))
    (tmp_path / "Labels.json").write_text(json.dumps({wnid: f"name {wnid}" for wnid in reversed(wnids)}))
    train, val = ImageNet100(tmp_path, "train"), ImageNet100(tmp_path, "val")
    assert train.classes == val.classes == [f"name {wnid}" for wnid in wnids]
    assert train.labels.tolist() == [i for i in range(100) for _ in range(2)] and val.labels.tolist() == list(
        range(100)
    )
    assert train.name(51) == str(tmp_path / "train.X2" / wnids[25] / f"{wnids[25]}_1.JPEG")
    assert all(abs(value - label) <= 3 for value, label in red(train) + red(val))  # JPEG


@pytest.mark.parametrize(
    ("make", "folder"),
    [(ImageNet, "{}"), (ImageNet100, "{}.X"), (Folder, "{}"), (Imagenette, "imagenette2-160/{}")],
)
def test_class_folders_without_images_are_warned_of_and_shift_no_label(tmp_path, caplog, make, folder):
    for split in ("train", "val"):
        for wnid in ("n1", "n3", "n5"):
            write(tmp_path / folder.format(split) / wnid / "x.JPEG")
    for wnid in ("n0", "n2", "n4", "n6", "n5/deeper"):
        (tmp_path / folder.format("train") / wnid).mkdir()
    train, val = (make(tmp_path, split) for split in ("train", "val"))
    assert [train.classes[label] for label in train.labels] == [val.classes[label] for label in val.labels]
    assert len(train) == 3 and len(train.classes) == (3 if make is Folder else 7)
    (record,) = caplog.records
    where = tmp_path / folder.format("train")
    assert record.getMessage() == (
        f"Class folders without images in {where}: n0, n2, n4 and 1 more. Copy them again or remove them."
    )


@pytest.mark.parametrize(
    ("make", "folder", "sentence"),
    [
        (ImageNet, "train", "expected class folders with images, .*/val/<wnid>/.*, found none. Set dataset.root to"),
        (
            ImageNet100,
            "train.X1",
            r"expected class folders with images, .*/val\.X\*/<wnid>/.*, found none. Set dataset",
        ),
        (Imagenette, "imagenette2-160/train", "imagenette2-160/val has no class folders with images. Remove"),
    ],
)
def test_a_missing_val_folder_is_one_sentence_on_what_was_expected(tmp_path, make, folder, sentence):
    for wnid in ("n1", "n2"):
        write(tmp_path / folder / wnid / "x.JPEG")
    assert len(make(tmp_path, "train")) == 2
    with pytest.raises(FileNotFoundError, match=sentence) as error:
        make(tmp_path, "val")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dataset", [ImageNet, ImageNet100])
def test_a_missing_root_is_one_sentence_on_what_to_set(tmp_path, dataset):
    with pytest.raises(
        FileNotFoundError, match="nowhere/train.* found none. Set dataset.root to the folder that holds"
    ):
        dataset(tmp_path / "nowhere", "train")


# Downloads: from a made-up archive on a server of this process, through torchvision


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(folder, its address): what is put there can be downloaded."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "server"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder))) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield folder, f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def serve_imagenette(directory: Path, address: str, monkeypatch) -> Path:
    for value, wnid in enumerate(["n02102040", "n01440764"]):
        for split in ("train", "val"):
            write(directory / "imagenette2-160" / split / wnid / "x.JPEG", (100 * value, 0, 0))
    archive = directory / "imagenette2-160.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(directory / "imagenette2-160", "imagenette2-160")
    checksum = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(torchvision.datasets.Imagenette._ARCHIVES, "160px", (f"{address}/{archive.name}", checksum))
    return archive


def test_imagenette_is_downloaded_where_it_is_missing(tmp_path, server, monkeypatch):
    archive = serve_imagenette(*server, monkeypatch)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    dataset = Imagenette("data", "train")  # a relative root is made
    assert dataset.classes == ["tench", "English springer"]
    assert [label for _, label in red(dataset)] == [0, 1]
    assert [value for value, _ in red(dataset)] == pytest.approx([100, 0], abs=3)
    archive.unlink()
    assert len(Imagenette("data", "val")) == 2  # from the copy
    assert [path.name for path in Path("data").iterdir()] == ["imagenette2-160"]  # no archive, no temporary folder


@pytest.mark.parametrize("kind", ["above the folder", "a link that leads out", "a device"])
def test_an_archive_writes_nothing_outside_its_folder(tmp_path, server, monkeypatch, kind):
    archive = serve_imagenette(*server, monkeypatch)
    member = tarfile.TarInfo("../../../escaped" if kind == "above the folder" else "imagenette2-160/escaped")
    if kind != "above the folder":
        member.type = tarfile.SYMTYPE if kind == "a link that leads out" else tarfile.CHRTYPE
        member.linkname = str(tmp_path) if kind == "a link that leads out" else ""
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "server" / "imagenette2-160", "imagenette2-160")
        tar.addfile(member)
    checksum = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(torchvision.datasets.Imagenette._ARCHIVES, "160px", (f"{server[1]}/{archive.name}", checksum))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileNotFoundError, match="downloading it failed .*escaped"):
        Imagenette("data", "train")
    assert not list(tmp_path.rglob("escaped")) and list(Path().iterdir()) == []


@pytest.mark.parametrize("fault", ["no server", "wrong checksum"])
def test_a_failed_download_is_one_sentence_and_leaves_nothing(tmp_path, server, monkeypatch, fault):
    archive = serve_imagenette(*server, monkeypatch)
    if fault == "no server":
        archive.unlink()
    else:
        archive.write_bytes(archive.read_bytes()[:-100])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    sentence = (
        r"Imagenette: no imagenette2-160 in dataset\.root=data, and downloading it failed .*Download it by hand, or"
    )
    with pytest.raises(FileNotFoundError, match=sentence):
        Imagenette("data", "train")
    assert list(Path().iterdir()) == []
    Path("data").mkdir()
    with pytest.raises(FileNotFoundError, match=sentence):
        Imagenette("data", "train")
    assert list(Path("data").iterdir()) == [] and Path("data").is_dir()  # what was there before stays


def test_a_root_that_is_more_likely_a_mistake_is_not_made(tmp_path, server, monkeypatch):
    serve_imagenette(*server, monkeypatch)
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path / "disk", Path("no/such"), tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(
            FileNotFoundError, match="is not a folder. Create it to download there, or set dataset.root"
        ):
            Imagenette(root, "train")
        assert not root.is_dir()
    with pytest.raises(FileNotFoundError, match="has no folder imagenette2-160. .*dataset.train.download=true"):
        Imagenette(tmp_path, "train", download=False)


def test_a_download_killed_half_way_is_not_taken_for_the_data(tmp_path):
    def fetch(directory):
        Path(directory, "folder").mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download("Test", tmp_path, "folder", fetch)
    assert list(tmp_path.iterdir()) == []


def test_of_two_downloads_at_a_time_the_first_to_end_is_kept(tmp_path):
    def fetch(directory):
        write(Path(directory, "folder", "slow.png"))
        write(tmp_path / "folder" / "quick.png")  # the other process ends meanwhile

    download("Test", tmp_path, "folder", fetch)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "quick.png"]


def test_an_imagenette_without_images_says_what_to_do(tmp_path):
    (tmp_path / "imagenette2-160" / "train").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match="imagenette2-160/val has no class folders .*Remove .* or set dataset.root"
    ):
        Imagenette(tmp_path, "val")
    with pytest.raises(ValueError, match="size must be one of 160px, 320px, full, got '100px'"):
        Imagenette(tmp_path, "train", size="100px")


class OldDtype:
    """Pickles as CIFAR's files have their dtype: made by Python 2, with integers for flags."""

    def __reduce__(self):
        return np.dtype, ("u1", 0, 1)


def serve_cifar10(directory: Path, address: str, monkeypatch) -> None:
    folder = directory / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, name in enumerate(files):
        pixels = np.zeros((2, 3, 32, 32), dtype=np.uint8)
        pixels[:, 0], pixels[:, 1, 0, 1] = i, 200  # red says which batch; one green pixel right of the corner
        batch = {"data": pixels.reshape(2, -1), "labels": [i, i + 1], "dtype": OldDtype()}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}, protocol=2))
    archive = directory / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    reference, md5 = torchvision.datasets.CIFAR10, lambda path: hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(reference, "url", f"{address}/{archive.name}")
    monkeypatch.setattr(reference, "tgz_md5", md5(archive))
    monkeypatch.setattr(reference, "train_list", [(name, md5(folder / name)) for name in files[:5]])
    monkeypatch.setattr(reference, "test_list", [("test_batch", md5(folder / "test_batch"))])
    monkeypatch.setattr(reference, "meta", {**reference.meta, "md5": md5(folder / "batches.meta")})


def test_cifar10_is_downloaded_and_a_broken_copy_is_noticed(tmp_path, server, monkeypatch):
    serve_cifar10(*server, monkeypatch)
    monkeypatch.chdir(tmp_path)
    train, val = CIFAR10("data", "train"), CIFAR10("data", "val", download=False)
    assert train.classes == list("abcdefghij") and len(train) == 10 and len(val) == 2
    assert [(image[0, 0, 0].item(), label) for image, label in val] == [(5, 5), (5, 6)]
    assert [image[0, 0, 0].item() for image, _ in train] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    image, _ = train[3]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    assert image[1].nonzero().tolist() == [[0, 1]]  # row 0, column 1: neither transposed nor in another channel
    (tmp_path / "data" / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"torn")
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py is incomplete or broken. Remove it to have"):
        CIFAR10("data", "train")
    with pytest.raises(FileNotFoundError, match="has no folder cifar-10-batches-py. .*dataset.train.download=true"):
        CIFAR10(tmp_path, "train", download=False)


# Cache


def test_a_cache_holds_the_images_reduced_once_in_their_order(tmp_path):
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate([(40, 60), (70, 30), (10, 8), (20, 21)] * 8):
        path = tmp_path / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    dataset = Folder(tmp_path, "train")
    cached = Cached(dataset, 20)
    assert len(cached) == len(dataset) and cached.classes == dataset.classes
    shapes = set()
    for i in (*range(len(dataset)), -1):
        (image, label), (pixels, cached_label) = dataset[i], cached[i]
        image = Image.fromarray(image.permute(1, 2, 0).numpy())
        if min(image.size) > 20:  # PIL's own antialiased bilinear
            scale = 20 / min(image.size)
            image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BILINEAR)
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert (pixels.int() - expected.int()).abs().max() <= 1 and cached_label == label  # 1: another rounding
        shapes.add(tuple(pixels.shape))
    assert shapes == {(3, 20, 30), (3, 46, 20), (3, 10, 8), (3, 20, 21)}
    with pytest.raises(IndexError):
        cached[len(dataset)]
    with pytest.raises(ValueError, match="shorter_side must be at least 1 pixel, got 0"):
        Cached(dataset, 0)


def test_a_cache_takes_tensors_as_well():
    dataset = Textures("val", size=16, images=10)
    assert torch.equal(Cached(dataset, 16)[7][0], dataset[7][0])
    small, label = Cached(dataset, 8)[7]
    expected = F.interpolate(dataset[7][0][None].float(), size=(8, 8), mode="bilinear", antialias=True)[0]
    assert small.shape == (3, 8, 8) and label == 7 and (small.float() - expected).abs().max() <= 1


# All


@pytest.mark.slow
def test_datasets_travel_to_spawned_workers(tmp_path):
    for i in range(6):
        write(tmp_path / "ab"[i % 2] / f"{i}.png", (i, 0, 0))
    files = Folder(tmp_path, "train")
    assert red(pickle.loads(pickle.dumps(files))) == red(files)
    cached, textures = Cached(files, 4), Textures("val", size=8, images=10)
    both = ConcatDataset([cached, textures])
    loader = DataLoader(both, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    for (image, label), (expected, expected_label) in zip(loader, both, strict=True):
        assert torch.equal(image, expected) and label == expected_label


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_datasets_yaml_has_what_the_others_read_and_fits_its_class(path):
    config = OmegaConf.to_container(OmegaConf.create({"dataset": OmegaConf.load(path)}), resolve=True)["dataset"]
    expected = {"train", "val", "epochs", "global_size", "local_size", "global_scale", "local_scale", "out_dim"}
    expected |= {"cache", "cache_side", "teacher_momentum", "eval_size", "evaluate_every_epochs", "num_local_views"}
    assert set(config) == expected | ({"root"} if "root" in config["train"] else set())
    for split in ("train", "val"):
        target, given = config[split].pop("_target_"), config[split]
        module, name = target.rsplit(".", 1)
        assert module == f"dino.dataset.{path.stem}" and given["split"] == split
        inspect.signature(getattr(import_module(module), name)).bind(**given)
        assert given.get("root") == config.get("root")
    assert config["local_size"] <= config["global_size"] and 0 < config["teacher_momentum"] < 1


def test_the_default_data_are_made_by_their_yaml():
    config = OmegaConf.to_container(OmegaConf.create({"dataset": OmegaConf.load(CONF / "textures.yaml")}), resolve=True)
    arguments = {key: value for key, value in config["dataset"]["val"].items() if key != "_target_"}
    dataset = Textures(**arguments)
    assert len(dataset) == 1000 and dataset[0][0].shape == (
        3,
        config["dataset"]["eval_size"],
        config["dataset"]["global_size"],
    )


# The real ImageNette

real = pytest.mark.skipif(
    not (DATA / "imagenette2-160").is_dir(), reason=f"no imagenette2-160 in {DATA}; set DINO_TEST_DATA to its folder"
)


@real
def test_the_real_imagenette_is_read_as_torchvision_reads_it():
    for split, count in (("train", 9469), ("val", 3925)):
        dataset = Imagenette(DATA, split)
        reference = torchvision.datasets.Imagenette(DATA, split=split, size="160px")
        assert len(dataset) == len(reference) == count
        assert dataset.classes == [names[0] for names in reference.classes]
        for i in (0, 1000, count // 2, count - 1):
            (image, label), (expected, expected_label) = dataset[i], reference[i]
            assert label == expected_label and np.array_equal(image.permute(1, 2, 0), np.asarray(expected))
