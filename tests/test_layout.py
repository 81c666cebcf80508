"""The rules that hold the shape of the project."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUPS = sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir())
ENTRANCES = {"train.py", "config.py", "evaluate.py"}
PARTS = sorted(path.relative_to(ROOT) for path in (ROOT / "dino").rglob("*.py") if path.name not in ENTRANCES)
MODULES = sorted(
    path.stem for path in (ROOT / "dino").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
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


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__"])
def test_a_module_has_a_test_file_of_its_name(module):
    assert (ROOT / "tests" / f"test_{module}.py").is_file()


@pytest.mark.parametrize("path", PARTS, ids=str)
def test_a_part_imports_neither_an_entrance_nor_hydra_nor_submitit(path):
    forbidden = ("dino.train", "dino.evaluate", "dino.config", "hydra", "omegaconf", "submitit")
    found = [name for name in imported(ast.parse((ROOT / path).read_text())) if name.startswith(forbidden)]
    assert found == []


@pytest.mark.parametrize(
    "program", ["import dino", "import sys; sys.argv = ['x', '--help']; from dino.train import main; main()"]
)
def test_a_program_that_does_not_use_them_does_not_load_heavy_packages(program):
    heavy = ("transformers", "timm", "wandb", "matplotlib", "pandas", "tensorboard", "torchvision")
    code = f"try:\n    {program.replace('; ', chr(10) + '    ')}\nexcept SystemExit: pass\nimport sys; print('loaded:', *[m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert shown.splitlines()[-1] == "loaded:"


def test_files_and_functions_are_of_a_size_to_be_read():
    for path in PARTS:
        text = (ROOT / path).read_text()
        assert len(text.splitlines()) <= 320, path
    loop = next(n for n in ast.parse((ROOT / "dino/train.py").read_text()).body if getattr(n, "name", "") == "train")
    assert loop.end_lineno - loop.body[1].lineno + 1 <= 40  # its body, without signature and docstring
