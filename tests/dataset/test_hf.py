"""Hugging Face data sets: real ones, small, made here and read back."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

datasets = pytest.importorskip("datasets", reason="datasets is an extra")

from dino.dataset.encoded import BrokenImage  # noqa: E402
from dino.dataset.hf import HuggingFace  # noqa: E402


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def image(value: int, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (value, 0, 0)).save(buffer, format)
    return buffer.getvalue()


def made(values, names=("cat", "dog"), columns=("picture", "kind")):
    """Image i is of value i and label i % 2."""
    picture, kind = columns
    features = datasets.Features({picture: datasets.Image(), kind: datasets.ClassLabel(names=list(names))})
    content = {picture: [{"bytes": image(v), "path": None} for v in values], kind: [v % 2 for v in values]}
    return datasets.Dataset.from_dict(content, features=features)


def red(dataset):
    return [(pixels[0, 0, 0].item(), label) for pixels, label in dataset]


def test_a_saved_data_set_is_read_and_every_tenth_held_out(tmp_path):
    made(range(25)).save_to_disk(tmp_path / "saved")
    train, val = (HuggingFace(tmp_path / "saved", split) for split in ("train", "val"))
    assert train.classes == val.classes == ["cat", "dog"]
    assert red(val) == [(9, 1), (19, 1)] and red(train) == [(i, i % 2) for i in range(25) if i not in (9, 19)]
    pixels, _ = train[3]
    assert pixels.shape == (3, 4, 6) and pixels.stride() == (1, 18, 3)
    assert val.name(1) == f"{tmp_path}/saved/train/19" and val.encoded(1) == image(19)


@pytest.mark.parametrize("val", ["validation", "val", "test"])
def test_the_splits_go_by_their_usual_names(tmp_path, val):
    splits = {"extra": made([7]), "train": made(range(3)), "test": made([8]), val: made([4, 5])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert red(HuggingFace(tmp_path / "saved", "train")) == [(0, 0), (1, 1), (2, 0)]
    assert red(HuggingFace(tmp_path / "saved", "val")) == [(4, 0), (5, 1)]
    assert red(HuggingFace(tmp_path / "saved", "train", train_split="extra")) == [(7, 1)]
    assert red(HuggingFace(tmp_path / "saved", "val", val_split="extra")) == [(7, 1)]
    with pytest.raises(
        ValueError, match=r"saved has no split dev, it has extra, .*\. Set dataset\.train\.val_split to one"
    ):
        HuggingFace(tmp_path / "saved", "val", val_split="dev")


def test_a_parquet_file_is_read(tmp_path):
    made(range(12)).to_parquet(tmp_path / "x.parquet")
    assert red(HuggingFace(str(tmp_path / "x.parquet"), "val")) == [(9, 1)]
    (tmp_path / "folder" / "data").mkdir(parents=True)
    made(range(3)).to_parquet(tmp_path / "folder" / "data" / "train-00000-of-00001.parquet")
    made([7]).to_parquet(tmp_path / "folder" / "data" / "test-00000-of-00001.parquet")
    assert red(HuggingFace(tmp_path / "folder", "train")) == [(0, 0), (1, 1), (2, 0)]
    assert red(HuggingFace(tmp_path / "folder", "val")) == [(7, 1)]


def test_columns_of_plain_types_can_be_named(tmp_path):
    content = {"jpg": [image(i) for i in range(4)], "number": [3, 0, 2, 1], "text": list("abcd")}
    datasets.Dataset.from_dict(content).to_parquet(tmp_path / "x.parquet")
    path = tmp_path / "x.parquet"
    assert HuggingFace(path, "train", image="jpg").classes is None
    dataset = HuggingFace(path, "train", image="jpg", label="number")
    assert red(dataset) == [(0, 3), (1, 0), (2, 2)] and dataset.classes == ["0", "1", "2", "3"]
    with pytest.raises(ValueError, match="column text of .* must have one whole number for each image, got .*string"):
        HuggingFace(path, "train", image="jpg", label="text")
    with pytest.raises(ValueError, match="has no column png, it has jpg, number, text. Set"):
        HuggingFace(path, "train", image="png")
    with pytest.raises(ValueError, match="has 0 image columns, expected one; its columns are jpg, number, text. Set"):
        HuggingFace(path, "train")


def test_of_two_columns_of_a_kind_one_must_be_named(tmp_path):
    whole = made(range(3))
    whole = whole.add_column("fine", [1, 0, 1], feature=datasets.ClassLabel(names=["x", "y"]))
    whole.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="has 2 label columns, expected one; .* Set dataset.train.label to the one"):
        HuggingFace(tmp_path / "saved", "train")
    assert red(HuggingFace(tmp_path / "saved", "train", label="fine")) == [(0, 1), (1, 0)]


def test_a_folder_of_images_is_read_with_its_labels(tmp_path):
    for i in range(6):
        path = tmp_path / "root" / ("train" if i < 4 else "test") / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(i))
    train, val = (HuggingFace(tmp_path / "root", split) for split in ("train", "val"))
    assert sorted(red(train)) == [(0, 0), (1, 1), (2, 0), (3, 1)] and sorted(red(val)) == [(4, 0), (5, 1)]
    assert train.classes == ["a", "b"] and train.name(0) == str(tmp_path / "root" / "train" / "a" / "0.png")
    (tmp_path / "root" / "train" / "a" / "0.png").unlink()
    with pytest.raises(BrokenImage, match=r"train/a/0\.png has no image, or its file is gone\. Restore it"):
        train[0]


def test_broken_and_missing_images_are_named(tmp_path):
    rows = [{"bytes": image(0), "path": None}, {"bytes": b"rubbish", "path": None}, None]
    datasets.Dataset.from_dict({"i": rows}, features=datasets.Features({"i": datasets.Image()})).save_to_disk(
        tmp_path / "x"
    )
    dataset = HuggingFace(tmp_path / "x", "train")
    assert dataset.classes is None and dataset[0][1] == -1
    with pytest.raises(BrokenImage, match=r"x/train/1: cannot be opened as an image"):
        dataset[1]
    with pytest.raises(BrokenImage, match=r"x/train/2 has no image, or its file is gone\. .* remove the row"):
        dataset[2]


def test_a_data_set_that_begins_without_an_image_is_read(tmp_path):
    rows = [None, {"bytes": image(5), "path": None}]
    datasets.Dataset.from_dict({"i": rows}, features=datasets.Features({"i": datasets.Image()})).save_to_disk(
        tmp_path / "x"
    )
    assert HuggingFace(tmp_path / "x", "train")[1][0][0, 0, 0] == 5


def test_labels_that_are_kept_secret_are_none(tmp_path):
    whole = made([2, 3]).cast_column("kind", datasets.Value("int64"))
    whole = whole.map(lambda row: {"kind": -1}).cast_column("kind", datasets.ClassLabel(names=["cat", "dog"]))
    datasets.DatasetDict(train=made([0, 1]), test=whole).save_to_disk(tmp_path / "x")
    val = HuggingFace(tmp_path / "x", "val")
    assert val.classes is None and red(val) == [(2, -1), (3, -1)]


def test_what_cannot_be_loaded_is_said_in_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no data set given. Set dataset.train.path to a folder or a name on the hub"):
        HuggingFace(None, "train")
    for path in ("nobody/nothing", str(tmp_path / "nowhere"), str(tmp_path / "x.parquet")):
        with pytest.raises(
            FileNotFoundError, match=f"cannot load {path} .*Set dataset.train.path to a folder, "
        ) as error:
            HuggingFace(path, "train")
        assert "\n" not in str(error.value)
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(FileNotFoundError, match=r"cannot load .*x\.parquet \("):
        HuggingFace(tmp_path / "x.parquet", "train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ImportError, match=r"the data set a/b needs the datasets package, .* pip install 'dino-train\[hf\]'"
    ):
        HuggingFace("a/b", "train")


def test_the_fingerprint_is_of_the_images_and_not_of_their_place(tmp_path):
    made(range(12)).save_to_disk(tmp_path / "a")
    first = {split: HuggingFace(tmp_path / "a", split).fingerprint for split in ("train", "val")}
    assert first["train"] != first["val"]
    (tmp_path / "a").rename(tmp_path / "b")
    assert {split: HuggingFace(tmp_path / "b", split).fingerprint for split in ("train", "val")} == first
    made(range(12)).to_parquet(tmp_path / "x.parquet")
    assert HuggingFace(tmp_path / "x.parquet", "train").fingerprint == first["train"]
    made(range(13)).save_to_disk(tmp_path / "c")
    made([*range(11), 12]).save_to_disk(tmp_path / "d")  # another label
    noise = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    other = made(range(12)).to_list()
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    other[3]["picture"] = {"bytes": buffer.getvalue(), "path": None}
    datasets.Dataset.from_list(other, features=made([0]).features).save_to_disk(tmp_path / "e")
    assert first["train"] not in [HuggingFace(tmp_path / name, "train").fingerprint for name in "cde"]


def test_the_fingerprint_of_files_stays_when_their_folder_moves(tmp_path):
    for i in range(4):
        (tmp_path / "a" / "xy"[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / "xy"[i % 2] / f"{i}.png").write_bytes(image(i))
    before = HuggingFace(tmp_path / "a", "train").fingerprint
    (tmp_path / "a").rename(tmp_path / "b")
    assert HuggingFace(tmp_path / "b", "train").fingerprint == before
    (tmp_path / "b" / "x" / "0.png").rename(tmp_path / "b" / "x" / "00.png")
    assert HuggingFace(tmp_path / "b", "train").fingerprint != before


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_any_image_in_any_order(tmp_path, context):
    made(range(12)).save_to_disk(tmp_path / "saved")
    dataset = HuggingFace(tmp_path / "saved", "train")
    order = [5, 0, 3, 3, 1, 4, 2, 10] * 3
    expected = [dataset[i] for i in order]
    loader = DataLoader(dataset, sampler=order, batch_size=None, num_workers=1, multiprocessing_context=context)
    for (pixels, label), (wanted, wanted_label) in zip(loader, expected, strict=True):
        assert torch.equal(pixels, wanted) and label == wanted_label
