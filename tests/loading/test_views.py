"""What the workers do and what the device: the same views, whoever does it."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from photos import Photos
from PIL import Image
from test_batches import assert_same, views_of
from test_train import TINY, assert_same_run, program

from dino.augmentation import DINOTransform
from dino.augmentation.resampling import cut_together
from dino.dataset.cache import Cached
from dino.dataset.encoded import BrokenImage
from dino.dataset.folder import Folder
from dino.loading import batches
from dino.loading.batches import Steps
from dino.loading.broken import TooManyBroken
from dino.loading.sampler import Batching
from dino.loading.views import CachedCrops, DeviceCrops, DeviceDecodes, Loading, Samples, WorkerCrops, crops_of

TRANSFORM = DINOTransform(num_local_views=2, global_size=24, local_size=12)
CPU = torch.device("cpu")
WAYS = [WorkerCrops, DeviceCrops, CachedCrops]


def crops(way, dataset=None):
    dataset = Photos() if dataset is None else dataset
    return way(Cached(dataset) if way is CachedCrops else dataset, TRANSFORM)


def views(way, dataset=None, seed=3, keys=((0, 1), (0, 2), (4, 1))):
    dataset = Photos() if dataset is None else dataset
    some = crops(way, dataset)
    samples = Samples(some, seed, len(dataset))
    batch, broken = samples.collate([samples[key] for key in keys])
    cut, labels, _ = some.views(batch, torch.device("cpu"))
    if not broken:
        assert labels.tolist() == [index for _, index in keys]  # Photos are labelled by their index
    return cut, broken


def test_whoever_crops_the_views_are_the_same():
    by_worker, _ = views(WorkerCrops)
    assert [tuple(view.shape) for view in by_worker] == [(3, 3, 24, 24)] * 2 + [(3, 3, 12, 12)] * 2
    on_device, _ = views(DeviceCrops)
    for view, other, cached in zip(by_worker, on_device, views(CachedCrops)[0]):
        off = (view.int() - other.int()).abs()
        assert off.max() <= 2 and (off > 0).float().mean() < 0.05  # see tests/augmentation/test_resampling.py
        assert torch.equal(other, cached)


@pytest.mark.parametrize("way", WAYS)
def test_views_depend_on_seed_epoch_and_index_alone(way):
    torch.manual_seed(1)
    first, _ = views(way)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, views(way)[0]))
    alone, _ = views(way, keys=((4, 1),))
    assert all(torch.equal(a[2:], b) for a, b in zip(first, alone))
    assert not torch.equal(first[0][0], first[0][2])  # another epoch
    assert not torch.equal(first[0], views(way, seed=4)[0][0])


def steps(way, monkeypatch, start=0, workers=0, dataset=None):
    monkeypatch.setattr(batches, "crops_of", lambda dataset, *_: crops(way, dataset))
    return Steps(dataset or Photos(), TRANSFORM, Batching(4, seed=1), start, 12, Loading(num_workers=workers))


@pytest.mark.parametrize("way", WAYS)
def test_steps_are_the_same_for_any_number_of_workers_and_from_any_start(way, monkeypatch):
    whole = views_of(steps(way, monkeypatch))
    assert len(whole) == 12
    assert_same(views_of(steps(way, monkeypatch, workers=2)), whole)
    assert_same(views_of(steps(way, monkeypatch, start=7)), whole[7:])
    assert_same(views_of(steps(way, monkeypatch, start=5, workers=1)), whole[5:])


def test_the_device_crops_where_it_is_told_to_or_has_the_images():
    def way(dataset, device_does):
        return type(crops_of(dataset, TRANSFORM, Loading(device_does=device_does)))

    assert way(Photos(), "photometry") is way(Cached(Photos()), "photometry") is WorkerCrops
    assert way(Photos(), "crops") is way(Photos(), "decode") is way(Cached(Photos()), "decode") is DeviceCrops
    assert way(Cached(Photos(), device="meta"), "photometry") is CachedCrops


def test_crops_are_made_on_cuda_unless_the_transform_makes_them_in_its_own_way():
    class Own(DINOTransform):
        def crop(self, image, rng=None):
            return super().crop(image, rng)

    def way(transform, kind, **told):
        return type(crops_of(Photos(), transform, Loading(torch.device(kind), **told)))

    assert [way(TRANSFORM, kind) for kind in ("cuda", "mps", "cpu")] == [DeviceCrops, WorkerCrops, WorkerCrops]
    assert way(Own(), "cuda") is way(TRANSFORM, "cuda", device_does="photometry") is WorkerCrops


def test_workers_get_no_pixels_of_a_cache_on_the_device():
    some = crops(CachedCrops)
    assert len(pickle.dumps(some)) < sum(block.numel() for block in Cached(Photos()).blocks) / 10
    index, boxes = pickle.loads(pickle.dumps(some)).load(3, np.random.default_rng(0))
    assert index == 3 and np.array_equal(boxes, some.load(3, np.random.default_rng(0))[1])


def files(tmp_path, broken=()):
    """JPEGs, one of them to be turned, and a PNG; those at `broken` have a damaged table, which no header shows."""
    for index in range(12):
        image = Image.fromarray(Photos()[index][0].permute(1, 2, 0).numpy())
        path = tmp_path / f"{index:02}.{'png' if index == 4 else 'jpg'}"
        exif = Image.Exif()
        exif[0x0112] = 6 if index == 5 else 1
        image.save(path, exif=exif)
        if index in broken:
            data = bytearray(path.read_bytes())
            table = data.index(b"\xff\xc4")
            data[table + 5 : table + 21] = b"\xff" * 16  # codes of more bits than there are
            path.write_bytes(data)
    return Folder(tmp_path, "train")


def test_what_the_device_decodes_is_what_a_worker_decodes(tmp_path):
    dataset = files(tmp_path)
    some = DeviceDecodes(dataset, TRANSFORM)
    loaded = [some.load(index, np.random.default_rng(index)) for index in range(12)]
    assert [stored.ndim for _, _, stored, _ in loaded] == [3 if index in (4, 5) else 1 for index in range(12)]
    other = DeviceCrops(dataset, TRANSFORM)
    expected = other.collate([other.load(index, np.random.default_rng(index)) for index in range(12)])
    views, _, broken = some.views(some.collate(loaded), CPU)
    for view, same in zip(views, other.views(expected, CPU).views):
        assert torch.equal(view, same)
    assert not broken


def test_a_jpeg_that_is_broken_on_the_device_gives_its_place_to_the_next(tmp_path):
    dataset = files(tmp_path, broken=(7,))
    dataset.labels = np.arange(12)
    with pytest.raises(BrokenImage):
        dataset[7]
    some = DeviceDecodes(dataset, TRANSFORM)
    loaded = [some.load(index, np.random.default_rng(index)) for index in (3, 7, 9)]
    assert loaded[1][2].ndim == 1  # its header is sound
    views, labels, broken = some.views(some.collate(loaded), CPU)
    assert labels.tolist() == [3, 8, 9]
    assert ["07.jpg" in sentence for sentence in broken] == [True]
    pixels = dataset[8][0]
    boxes = TRANSFORM.boxes(*pixels.shape[1:], np.random.default_rng(7))
    alone = pixels.permute(1, 2, 0).flatten(), np.array([0]), np.array([pixels.shape[1:]])
    for view, expected in zip(views, cut_together(*alone, boxes[None], TRANSFORM.sizes)):
        assert torch.equal(view[1], expected[0])
    whole = some.views(some.collate([some.load(index, np.random.default_rng(index)) for index in (3, 9)]), CPU).views
    assert torch.equal(views[0][[0, 2]], whole[0])


def test_a_device_without_memory_is_no_broken_jpeg(tmp_path, monkeypatch):
    def decode_jpeg(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("torchvision.io.decode_jpeg", decode_jpeg)
    some = DeviceDecodes(files(tmp_path), TRANSFORM)
    batch = some.collate([some.load(index, np.random.default_rng(index)) for index in (3, 7)])
    with pytest.raises(torch.OutOfMemoryError):
        some.views(batch, CPU)


# --- broken images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_broken_image_is_passed_over_in_the_same_way_by_all(way, monkeypatch):
    dataset = Photos(images=400, broken=(7, 8))
    keys = ((0, 6), (0, 7), (0, 9))
    (one, *_), broken = views(way, dataset, keys=keys)
    assert [sentence for sentence in broken if "7.jpg" in sentence] and len(broken) == 2
    for (view, *_), key in ((views(way, dataset, keys=((0, 6),))[0], 0), (views(way, dataset, keys=((0, 9),))[0], 2)):
        assert torch.equal(one[key], view[0])
    whole = steps(way, monkeypatch, dataset=Photos(40, broken=(3,)))
    seen = views_of(whole)
    assert len(whole.broken) == 1 and "3.jpg" in whole.broken.pop()
    assert_same(views_of(steps(way, monkeypatch, workers=2, dataset=Photos(40, broken=(3,)))), seen)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_is_gone_ends_the_steps_in_one_sentence(workers, monkeypatch):
    dead = steps(WorkerCrops, monkeypatch, workers=workers, dataset=Photos(40, broken=range(40)))
    with pytest.raises(TooManyBroken, match=r"^2 images in a row cannot be read; the last: [^\n]*$"):
        views_of(dead)


# --- the program ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("way", ["training.device_does=crops", "dataset.cache=ram", "dataset.cache=device"])
def test_a_run_of_each_way_goes_on_bit_identical_from_the_middle(way, tmp_path):
    overrides = [*TINY, way, "checkpoint.keep=5", "evaluator=none", "name=a"]
    assert program(*overrides, cwd=tmp_path).returncode == 0
    whole, again = tmp_path / "outputs" / "a", tmp_path / "again" / "outputs" / "a"
    shutil.copytree(whole, again)
    _, second, *later = sorted((again / "checkpoints").glob("step_*.pt"))
    for path in later:
        path.unlink()
    assert second.stem == "step_000000012"
    resumed = program(*overrides, cwd=tmp_path / "again")
    assert "resumed at step 12" in resumed.stderr
    assert_same_run(again, whole)
