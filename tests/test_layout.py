"""The rules that hold the shape of the project."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUPS = sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir())
MODULES = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "dino").rglob("*.py")
    if path.parent != ROOT / "dino" or path.name != "__init__.py"
)

# From the bottom to the top; a module imports what is below it, and what is in its own folder. The method's files stand
# in the order in which they need each other.
LAYERS = [
    ["runtime"],
    ["head", "optimizer", "augmentation", "backbone"],
    ["loss", "model"],
    ["scheduler", "dataset"],
    ["weights", "history", "logger", "loading"],
    ["evaluator"],
    ["report"],
    ["config.check", "config.composition", "config.machine", "config.node", "config.settings", "config.trial"],
    ["run"],
    ["config"],
    ["train", "evaluate", "visualize", "compare"],
]
LAYER = {name: height for height, names in enumerate(LAYERS) for name in names}


def imported(tree):
    """Names of all imports, wherever they stand; `from . import train` and `from .train import x` count too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["dino" * bool(node.level), node.module]))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def layer_of(module):
    """The height of a dotted name below dino, by its longest known beginning."""
    parts = module.split(".")
    return next(LAYER[name] for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in LAYER)


@pytest.mark.parametrize("group", [group for group in GROUPS if group not in ("experiment", "hydra")])
def test_a_config_group_has_a_module_of_its_name(group):
    assert importlib.util.find_spec(f"dino.{group}")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_one_way(path):
    parts = path.with_suffix("").parts[1:]
    own = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    names = imported(ast.parse((ROOT / path).read_text()))
    used = [name.removeprefix("dino.") for name in names if name.startswith("dino.")]
    up = [name for name in used if name.split(".")[0] != own.split(".")[0] and layer_of(name) >= layer_of(own)]
    assert up == []


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_part_imports_neither_hydra_nor_submitit(path):
    forbidden = ("submitit",) if path.parts[1] in ("config", "train.py") else ("hydra", "omegaconf", "submitit")
    found = [name for name in imported(ast.parse((ROOT / path).read_text())) if name.startswith(forbidden)]
    assert found == []


def test_the_top_level_is_easy_to_see():
    entries = [path for path in (ROOT / "dino").iterdir() if not path.name.startswith("__")]
    assert len(entries) <= 22
    for path in entries:
        if path.is_dir():
            assert (path / "__init__.py").is_file(), path


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
    for path in MODULES:
        assert len((ROOT / path).read_text().splitlines()) <= 300, path
    loop = next(n for n in ast.parse((ROOT / "dino/train.py").read_text()).body if getattr(n, "name", "") == "train")
    assert loop.end_lineno - loop.body[1].lineno + 1 <= 40  # its body, without signature and docstring
