import io
import re

import numpy as np
import pytest

from benchmarks import data
from benchmarks.reference import photograph


@pytest.fixture
def images(tmp_path):
    for number in range(2):
        photograph(np.random.default_rng(number), 60, 80).save(tmp_path / f"{number}.jpg")
    return str(tmp_path)


def rows(shown):
    return {
        name.strip(): [float(cell.strip(" %")) for cell in cells.split("|")]
        for name, cells in re.findall(r"^\|(.+?)\|(.*\d.*)\|$", shown, re.MULTILINE)
    }


def test_the_table_has_every_contestant_with_its_ratio_to_the_reference(images, capsys):
    data.main(["--images", images, "--rounds", "1", "--eager"])
    shown = capsys.readouterr().out
    assert "2 images of a folder" in shown and "2 of them 80 x 60" in shown
    table = rows(shown)
    assert list(table) == [
        "JPEG decoding alone, torchvision",
        "JPEG decoding alone, PIL",
        data.REFERENCE,
        "worker's half: read, decode, crop, stack",
        "worker's half from memory: crop, stack",
        "photometry",
        "both halves",
    ]
    for ms, best, per_second, ratio in table.values():
        assert ms == best > 0
        assert per_second == pytest.approx(1e3 / ms, rel=0.1) or ms < 0.1
        assert ratio == pytest.approx(table[data.REFERENCE][0] / ms, rel=0.1) or ms < 0.1
    assert table[data.REFERENCE][3] == 1


def test_the_profile_names_every_stage_and_adds_them_up(images, capsys):
    data.main(["--images", images, "--rounds", "1", "--profile"])
    table = rows(capsys.readouterr().out)
    *stages, handed, whole, _, _ = (ms for ms, _, _ in table.values())
    assert len(stages) == len(data.STAGES) + 1  # the resizing is two: to global and to local views
    assert min(stages) >= 0 and sum(stages) + handed == pytest.approx(whole, abs=0.1)


def test_without_a_gpu_its_rows_are_left_out_in_a_sentence(images, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    data.main(["--images", images, "--rounds", "1", "--eager", "--device", "cuda"])
    shown = capsys.readouterr().out
    assert shown.startswith("This torch sees no CUDA device: the GPU's rows are left out.")
    assert "photometry" in rows(shown) and "GPU: photometry" not in rows(shown)


def test_photographs_are_made_up_of_the_size_of_imagenets():
    file = io.BytesIO()
    image = photograph(np.random.default_rng(0))
    image.save(file, "jpeg", quality=data.QUALITY)
    assert image.size == (500, 375) and 80_000 < file.tell() < 130_000
