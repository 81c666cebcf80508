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
    ["config.node"],
    ["weights", "history", "logger", "loading"],
    ["evaluator"],
    ["report"],
    ["config.check", "config.composition", "config.machine", "config.settings", "config.trial"],
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


def test_files_are_of_a_size_to_be_read():
    for path in MODULES:
        assert len((ROOT / path).read_text().splitlines()) <= 300, path
    loop = next(n for n in ast.parse((ROOT / "dino/train.py").read_text()).body if getattr(n, "name", "") == "train")
    assert loop.end_lineno - loop.body[1].lineno + 1 <= 40  # its body, without signature and docstring


MOST_LINES, MOST_PARAMETERS = 60, 10
# Public classes whose parameters are the paper's hyperparameters, each with a name and a default of its own.
OF_THE_PAPER = {"DINOTransform", "Schedule"}


def definitions(tree, owner=""):
    """(owner, node) of every class and function, however deep; the owner is the class that a method stands in."""
    for node in ast.iter_child_nodes(tree):
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if function or isinstance(node, ast.ClassDef):
            yield owner, node
        yield from definitions(node, node.name if isinstance(node, ast.ClassDef) else "" if function else owner)


def named_parameters(function, is_method):
    """What a call can name; `*rest` and `**more` take any number and are not counted."""
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return names[1:] if is_method and names[:1] in (["self"], ["cls"]) else names


def fields_to_be_given(dataclass):
    """The fields that its constructor takes."""
    for line in dataclass.body:
        constant = isinstance(line, ast.AnnAssign) and "ClassVar" in ast.unparse(line.annotation)
        if isinstance(line, ast.AnnAssign) and not constant and "init=False" not in ast.unparse(line):
            yield line.target.id


def every_definition():
    for folder in ("dino", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for owner, node in definitions(ast.parse(path.read_text())):
                yield f"{path.relative_to(ROOT)}: {f'{owner}.' * bool(owner)}{node.name}", owner, node


def test_functions_are_short():
    sizes = {
        name: node.end_lineno - node.lineno + 1
        for name, _, node in every_definition()
        if not isinstance(node, ast.ClassDef)
    }
    assert len(sizes) > 500
    assert {name: size for name, size in sizes.items() if size > MOST_LINES} == {}


def test_functions_and_dataclasses_take_few_parameters():
    counts = {}
    for name, owner, node in every_definition():
        if not isinstance(node, ast.ClassDef):
            if (owner, node.name) not in [(exempt, "__init__") for exempt in OF_THE_PAPER]:
                counts[name] = len(named_parameters(node, bool(owner)))
        elif any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            counts[name] = len([*fields_to_be_given(node)])
    assert {name: count for name, count in counts.items() if count > MOST_PARAMETERS} == {}
