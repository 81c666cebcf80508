"""The rules that hold the shape of the project."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUPS = sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir())
PARTS = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "dino").rglob("*.py")
    if path.name not in ("train.py", "evaluate.py", "run.py") and path.parent.name != "config"
)


def imported(tree):
    """Names of all imports, wherever they stand; `from . import train` and `from .train import x` count too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["dino" * bool(node.level), node.module]))
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("group", [group for group in GROUPS if group not in ("experiment", "hydra")])
def test_a_config_group_has_a_module_of_its_name(group):
    assert importlib.util.find_spec(f"dino.{group}")


@pytest.mark.parametrize("path", PARTS, ids=str)
def test_a_part_imports_neither_an_entrance_nor_hydra_nor_submitit(path):
    forbidden = ("dino.train", "dino.config", "hydra", "omegaconf", "submitit")
    found = [name for name in imported(ast.parse((ROOT / path).read_text())) if name.startswith(forbidden)]
    assert found == []


PROGRAM = """
import sys
try:
    {}
except SystemExit:
    pass
print("loaded:", *[name for name in {} if name in sys.modules])
"""
HEAVY = ("transformers", "timm", "wandb", "matplotlib", "pandas", "tensorboard", "torchvision")


@pytest.mark.parametrize("line", ["import dino", "sys.argv = ['', '--help']; import dino.train; dino.train.main()"])
def test_a_program_does_not_load_the_heavy_packages_that_it_does_not_use(line):
    program = [sys.executable, "-c", PROGRAM.format(line, HEAVY)]
    shown = subprocess.run(program, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert shown.splitlines()[-1] == "loaded:"


def test_files_and_functions_are_of_a_size_to_be_read():
    for path in PARTS:
        text = (ROOT / path).read_text()
        assert len(text.splitlines()) <= 320, path
    loop = next(n for n in ast.parse((ROOT / "dino/train.py").read_text()).body if getattr(n, "name", "") == "train")
    assert loop.end_lineno - loop.body[1].lineno + 1 <= 40  # its body, without signature and docstring
