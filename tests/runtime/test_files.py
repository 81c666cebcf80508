import pytest

from dino.runtime.files import atomic_write


def test_two_kinds_of_file_are_written_into_one_folder_at_the_same_time(tmp_path):
    with atomic_write(tmp_path / "a.json") as first, atomic_write(tmp_path / "b.pt") as second:
        first.write_text("first")
        second.write_text("second")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "first", "b.pt": "second"}


def test_what_a_killed_process_left_goes_with_the_next_file_of_its_kind(tmp_path):
    killed = atomic_write(tmp_path / "step_1.pt")
    killed.__enter__().write_text("half of it")
    with atomic_write(tmp_path / "step_2.pt") as partial:
        partial.write_text("whole")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"step_2.pt": "whole"}


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    (tmp_path / "a.json").write_text("before")
    with pytest.raises(OSError, match="no room"), atomic_write(tmp_path / "a.json") as partial:
        partial.write_text("half")
        raise OSError("no room")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "before"}
