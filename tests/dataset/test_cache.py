"""Data sets in memory."""

import logging
import shutil

import numpy as np
import pytest
import torch
from elsewhere import cached_elsewhere
from PIL import Image

from dino.augmentation import DINOTransform
from dino.dataset import cache
from dino.dataset.cache import BLOCK, Cached, cached, estimated_bytes
from dino.dataset.encoded import BrokenImage
from dino.dataset.folder import Folder
from dino.dataset.textures import Textures
from dino.loading.batches import Steps
from dino.loading.sampler import Batching
from dino.runtime.refused import Refused

CPU = torch.device("cpu")


def folder(path, images=40):
    rng = np.random.default_rng(0)
    for i in range(images):
        target = path / "ab"[i % 2] / f"{i:03}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*rng.integers(20, 60, 2), 3), dtype=np.uint8)).save(target)
    return {split: Folder(path, split) for split in ("train", "val")}


def test_an_epoch_from_memory_needs_no_file_any_more(tmp_path):
    datasets = folder(tmp_path / "images")
    transform = DINOTransform(num_local_views=1, global_size=16, local_size=8)
    from_files = [
        [v.clone() for v in next(parts).views] for _, parts in Steps(datasets["train"], transform, Batching(4))
    ]
    in_memory = cached(datasets, "ram", None, CPU)
    shutil.rmtree(tmp_path / "images")
    from_memory = [
        [v.clone() for v in next(parts).views] for _, parts in Steps(in_memory["train"], transform, Batching(4))
    ]
    assert len(from_memory) == 9
    for views, expected in zip(from_memory, from_files):
        assert all(torch.equal(a, b) for a, b in zip(views, expected))
    assert in_memory["train"].fingerprint == datasets["train"].fingerprint


def test_pixels_lie_channels_last_which_resizes_in_half_the_time(tmp_path):
    for image, _ in (Cached(folder(tmp_path)["train"])[3], Cached(Textures("val", size=16, images=10))[3]):
        assert image.permute(1, 2, 0).is_contiguous()


def test_more_images_than_a_block_are_found_again(monkeypatch):
    textures = Textures("val", size=8, images=40)
    monkeypatch.setattr(cache, "BLOCK", 16)
    whole = Cached(textures)
    assert [len(block) for block in whole.blocks] == [16 * 192, 16 * 192, 8 * 192]
    assert all(torch.equal(whole[i][0], textures[i][0]) and whole[i][1] == textures[i][1] for i in (*range(40), -1))
    assert BLOCK == 1024


def test_on_a_device_all_images_are_one_tensor(monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 4)
    dataset = Textures("val", size=8, images=10)
    whole = Cached(dataset, device="meta")
    assert [(block.device.type, block.shape) for block in whole.blocks] == [("meta", (10 * 192,))]
    monkeypatch.setattr(cache, "BLOCK", 1024)
    decoded = [torch.full((n,), n, dtype=torch.uint8) for n in (3, 6, 9)]
    assert torch.equal(cache._joined([*decoded], CPU), torch.cat(decoded))


def test_an_image_of_any_device_is_handed_out_on_the_cpu(tmp_path):
    dataset = folder(tmp_path)["train"]
    whole = cached_elsewhere(dataset)
    assert whole.blocks[0].device.type == "meta"
    for index in (0, 7, -1):
        (image, label), (expected, of_it) = whole[index], dataset[index]
        assert image.device == CPU and torch.equal(image, expected) and label == of_it


def test_the_estimate_is_what_the_cache_takes(tmp_path):
    datasets = folder(tmp_path)
    for dataset in datasets.values():  # all of them are looked at, for they are few
        for side in (None, 24):
            taken = sum(block.numel() for block in Cached(dataset, side).blocks)
            assert estimated_bytes(dataset, side) == pytest.approx(taken, rel=0.03)


def test_what_does_not_fit_is_refused_before_it_is_decoded(monkeypatch):
    datasets = {"train": Textures("train", size=32, images=2000), "val": Textures("val", size=32, images=500)}
    monkeypatch.setattr(cache, "free_memory", lambda device: 10_000_000)
    assert cached(datasets, "none", None, CPU) is datasets
    cached(datasets, "ram", None, CPU)
    monkeypatch.setattr(cache, "Cached", None)  # nothing is made
    with pytest.raises(Refused) as refused:
        cached(datasets, "ram", None, CPU, processes=2)
    assert refused.value.problems == (
        "dataset.cache=ram: 2,500 images as they are take about 7.7 MB in each of 2 processes, and 10.0 MB are free; "
        "lower dataset.cache_side, or use dataset.cache=none.",
    )


def test_what_goes_to_a_gpu_must_fit_into_this_machines_memory_first(monkeypatch):
    free = {"meta": 10_000_000, "cpu": 13_000_000}
    monkeypatch.setattr(cache, "free_memory", lambda device: free[device.type])
    monkeypatch.setattr(cache, "Cached", lambda dataset, *_: dataset)
    datasets = {"train": Textures("train", size=32, images=2000), "val": Textures("val", size=32, images=500)}
    meta = torch.device("meta")
    assert cached(datasets, "device", None, meta, processes=2) == datasets
    with pytest.raises(
        Refused, match=r"take about 6\.1 MB in each of 3 processes on their way to the GPU, and 13\.0 MB"
    ):
        cached(datasets, "device", None, meta, processes=3)
    free["meta"] = 7_000_000
    with pytest.raises(Refused, match=r"2,500 images as they are take about 7\.7 MB, and 7\.0 MB are free"):
        cached(datasets, "device", None, meta)


def test_it_says_what_it_does(caplog):
    with caplog.at_level(logging.INFO):
        cached({"train": Textures("train", size=100, images=1000)}, "ram", 50, CPU)
    assert [record.getMessage() for record in caplog.records] == ["decoding 1,000 images into memory, about 7.5 MB"]


def test_a_broken_image_is_broken_in_memory_too(tmp_path):
    dataset = folder(tmp_path)["train"]
    (tmp_path / "a" / "004.png").write_bytes(b"no image")
    whole = Cached(dataset, 24)
    broken = [i for i in range(len(dataset)) if i in whole.broken]
    assert len(broken) == 1
    for _ in range(2):
        with pytest.raises(BrokenImage, match=r"004\.png"):
            whole[broken[0]]
