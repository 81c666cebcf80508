import pytest
from test_train import SMALL, program, stand_in

from dino.dataset.encoded import BrokenImage
from dino.loading.broken import LIST, TooManyBroken, first_readable, note, too_many, write_list


def loader(broken):
    def load(index):
        if index in broken:
            raise BrokenImage(f"{index}.jpg")
        return index

    return load


def test_the_next_image_that_can_be_read_stands_in_for_a_broken_one():
    assert first_readable(loader({}), 3, 500) == (3, [])
    loaded, broken = first_readable(loader({3, 4}), 3, 500)
    assert loaded == 5 and len(broken) == 2 and "3.jpg" in broken[0] and "4.jpg" in broken[1]
    assert first_readable(loader({499}), 499, 500)[0] == 0  # after the last comes the first


def test_more_than_one_percent_broken_in_a_row_are_no_accident():
    assert first_readable(loader(range(5)), 0, 500)[0] == 5
    with pytest.raises(TooManyBroken, match=r"6 images in a row cannot be read; the last: .*5\.jpg"):
        first_readable(loader(range(9)), 0, 500)
    with pytest.raises(TooManyBroken):
        first_readable(loader(range(3)), 0, 3)
    assert [too_many(n, 300) for n in (0, 3, 4)] == [False, False, True]


def test_a_broken_image_is_noted_once(caplog):
    broken = set()
    for sentences in (["a is broken"], ["a is broken", "b is gone"], []):
        note(sentences, broken)
    assert broken == {"a is broken", "b is gone"}
    assert [record.getMessage() for record in caplog.records] == [
        "passed over: a is broken",
        "passed over: b is gone",
    ]


def test_the_list_keeps_what_an_earlier_start_of_the_run_found(tmp_path):
    write_list(tmp_path, set())
    assert not (tmp_path / LIST).exists()
    write_list(tmp_path, {"b is gone"})
    write_list(tmp_path, {"a is broken", "b is gone"})
    write_list(tmp_path, {"b is gone"})
    assert (tmp_path / LIST).read_text() == "a is broken\nb is gone\n"


# --- the program ------------------------------------------------------------------------------------------------------

RUN = ["dataset=folder", *SMALL, "backbone.depth=1", "training.max_steps=4", "name=a"]


def with_broken(tmp_path, per_class, broken):
    images = stand_in(tmp_path / "images", "folder", per_class)
    for number in broken:
        path = images / "cats" / f"{number}.JPEG"
        path.write_bytes(path.read_bytes()[:200])
    return f"dataset.root={images}"


@pytest.mark.slow
def test_a_run_passes_over_a_few_broken_images_and_lists_them(tmp_path):
    root = with_broken(tmp_path, 120, [3, 59])  # train and val alike: the evaluation reads all of them
    done = program(*RUN, root, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    listed = (tmp_path / "outputs" / "a" / LIST).read_text().splitlines()
    assert len(listed) == 2
    for number, sentence in zip((3, 59), listed, strict=True):
        assert sentence.startswith(str(tmp_path / "images" / "cats" / f"{number}.JPEG: "))
        assert done.stderr.count(f"passed over: {sentence}") == 1
    assert "2 images could not be read" in done.stderr


@pytest.mark.slow
def test_a_run_ends_where_more_than_one_percent_is_broken_and_goes_on_when_they_are_repaired(tmp_path):
    root = with_broken(tmp_path, 12, [2])
    stopped = program(*RUN, root, cwd=tmp_path)
    assert stopped.returncode == 5, stopped.stderr
    sentence = "1 of 24 images cannot be read, more than 1%; they are listed in outputs/a/broken_images.txt."
    assert stopped.stderr.splitlines()[-1].startswith(sentence)
    assert "Traceback" not in stopped.stderr and "2.JPEG" in (tmp_path / "outputs" / "a" / LIST).read_text()
    good = tmp_path / "images" / "cats" / "3.JPEG"
    (good.parent / "2.JPEG").write_bytes(good.read_bytes())
    done = program(*RUN, root, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 2\n" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_list_of_files_that_changed_is_not_resumed(tmp_path):
    root = with_broken(tmp_path, 12, [2])
    assert program(*RUN, root, cwd=tmp_path).returncode == 5
    (tmp_path / "images" / "cats" / "2.JPEG").unlink()
    refused = program(*RUN, root, cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1] == (
        "outputs/a was trained on a list of 22 images, and now there is another, of 21; restore the files, or start "
        "anew with another name= and init_from=outputs/a. By class: cats had 11, now 10."
    )
