"""docs/features.ipynb, run from its first cell to its last."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from test_train import TINY, program

NOTEBOOK = Path(__file__).parents[1] / "docs" / "features.ipynb"


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["vit_tiny", pytest.param("resnet_small", marks=pytest.mark.slow)])
def test_the_notebook_shows_what_a_run_has_learned(backbone, tmp_path, monkeypatch):
    options = [option for option in TINY if not option.startswith("backbone.")]
    options += ["backbone=resnet_small", "backbone.width=8"] if backbone == "resnet_small" else ["backbone.depth=1"]
    done = program(*options, "evaluator=none", "training.max_steps=2", "name=a", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("DINO_RUN", str(tmp_path / "outputs" / "a"))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert len(notebook.cells) < 20
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    pictures = [out for cell in notebook.cells for out in cell.get("outputs", ()) if "image/png" in out.get("data", {})]
    assert len(pictures) == 3


def test_the_notebook_is_kept_without_outputs():
    assert all(not cell.get("outputs") for cell in nbformat.read(NOTEBOOK, as_version=4).cells)
