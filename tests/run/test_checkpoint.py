import os
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino.run.checkpoint import check_read_back, newest_checkpoint, write_step
from dino.runtime.rng import preserve_rng, rng_state, set_rng_state
from dino.weights import load_teacher


def state(iteration):
    return {"iteration": iteration, "weights": torch.full((3,), float(iteration)), "config": {"seed": 0, "x": None}}


def test_what_was_saved_comes_back_with_a_utc_timestamp(tmp_path):
    write_step(tmp_path, state(7))
    loaded = newest_checkpoint(tmp_path)
    assert loaded["iteration"] == 7
    assert torch.equal(loaded["weights"], torch.full((3,), 7.0))
    assert loaded["config"] == {"seed": 0, "x": None}
    assert loaded["timestamp"].endswith("+00:00")


def test_a_new_directory_holds_none(tmp_path):
    assert newest_checkpoint(tmp_path) is None


def test_the_newest_are_kept_and_the_best_beside_them(tmp_path):
    for iteration in range(1, 6):
        write_step(tmp_path, state(iteration), keep=2, best=iteration == 2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["best.pt", "step_000000004.pt", "step_000000005.pt"]
    assert torch.load(tmp_path / "checkpoints" / "best.pt", weights_only=True)["iteration"] == 2
    assert newest_checkpoint(tmp_path)["iteration"] == 5


@pytest.mark.parametrize("damage", ["truncated", "zeroed", "text", "empty"])
def test_a_broken_newest_gives_way_to_the_one_before_saying_so(tmp_path, caplog, damage):
    write_step(tmp_path, state(1))
    newest = write_step(tmp_path, state(2))
    whole = newest.read_bytes()
    newest.write_bytes(
        {"truncated": whole[: len(whole) // 2], "zeroed": bytes(len(whole)), "text": b"hello", "empty": b""}[damage]
    )
    assert newest_checkpoint(tmp_path)["iteration"] == 1
    assert "step_000000002.pt cannot be read" in caplog.text


SOUND = {
    "iteration": 2,
    "student_state_dict": {"w": torch.arange(300.0)},
    "config": {"lr": 0.1, "name": None},
    "rng": [1, (2, 3)],
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A directory with two checkpoints, the newest of them, and its bytes."""
    directory = tmp_path_factory.mktemp("sound")
    write_step(directory, state(1))
    newest = write_step(directory, SOUND)
    return directory, newest, newest.read_bytes()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_flipped_bit_changes_nothing_or_the_one_before_is_used(sound, data):
    directory, newest, whole = sound
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    flipped = bytearray(whole)
    flipped[bit // 8] ^= 1 << bit % 8
    newest.write_bytes(flipped)
    loaded = newest_checkpoint(directory)
    if loaded["iteration"] == 2:
        assert torch.equal(loaded["student_state_dict"]["w"], SOUND["student_state_dict"]["w"])
        assert {key: loaded[key] for key in ("config", "rng")} == {key: SOUND[key] for key in ("config", "rng")}
        assert loaded["timestamp"].endswith("+00:00")
    else:
        assert loaded["iteration"] == 1


def test_the_best_is_gone_on_from_where_all_others_are_broken(tmp_path, caplog):
    for iteration in range(1, 5):
        write_step(tmp_path, state(iteration), best=iteration == 2)
    for path in (tmp_path / "checkpoints").glob("step_*.pt"):
        path.write_bytes(b"broken")
    assert newest_checkpoint(tmp_path)["iteration"] == 2
    assert "step_000000003.pt cannot be read" in caplog.text


def test_a_broken_one_that_was_passed_over_does_not_count_as_kept_and_goes(tmp_path):
    for iteration in (1, 2):
        write_step(tmp_path, state(10 * iteration))
    (tmp_path / "checkpoints" / "step_000000020.pt").write_bytes(b"broken")
    write_step(tmp_path, state(15), keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000000015.pt"]


def test_when_all_are_broken_a_fresh_start_is_refused(tmp_path):
    for iteration in (1, 2):
        write_step(tmp_path, state(iteration)).write_bytes(b"broken")
    with pytest.raises(ValueError, match="none of the 2 checkpoints in .* can be read; restore one"):
        newest_checkpoint(tmp_path)


def test_a_first_checkpoint_that_does_not_come_back_as_written_stops_the_run(tmp_path):
    content = {"iteration": 1, "student_state_dict": {"weight": torch.arange(3.0)}}
    path = write_step(tmp_path, content)
    check_read_back(path, content)
    with pytest.raises(ValueError, match="reads back other weights"):
        check_read_back(path, {"student_state_dict": {"weight": torch.arange(3.0) + 1e-6}})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read back"):
        check_read_back(path, content)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    torch.save({"iteration": 1, "bomb": Bomb()}, tmp_path / "checkpoints" / "step_000000001.pt")
    with pytest.raises(ValueError, match="can be read"):
        newest_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="cannot be read as a teacher.safetensors or a checkpoint"):
        load_teacher(tmp_path / "checkpoints" / "step_000000001.pt")  # as init_from= and checkpoint= do
    assert not (tmp_path / "exploded").exists()


def test_a_save_that_fails_leaves_the_last_good_one_and_no_half_file(tmp_path, monkeypatch):
    write_step(tmp_path, state(1))

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_step(tmp_path, state(2))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000000001.pt"]


def test_every_random_generator_goes_on_where_it_was():
    def draw():
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist(), torch.randn(3).tolist()

    np.random.randn()  # leaves a cached second normal behind, which must come back too
    saved = rng_state()
    first = draw()
    assert draw() != first
    set_rng_state(saved)
    assert draw() == first


def test_preserve_rng_puts_the_generators_back():
    saved = rng_state()
    expected = random.random(), np.random.rand(), torch.rand(2).tolist()
    set_rng_state(saved)
    with pytest.raises(KeyError), preserve_rng():
        random.random(), np.random.rand(), torch.rand(1)
        raise KeyError
    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == expected


def test_the_state_of_the_generators_passes_through_a_file_without_code(tmp_path):
    saved = rng_state()
    expected = random.random(), np.random.rand(), torch.rand(2).tolist()
    write_step(tmp_path, {"iteration": 0, "rng": saved})
    set_rng_state(newest_checkpoint(tmp_path)["rng"])
    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == expected
