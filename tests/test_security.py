"""Nothing from outside is executed, and no key of an account is written down.

What a file may name is tested in test_allowlist.py, that downloads are held against their checksums in test_dataset.py.
"""

import ast
import zipfile

import pytest
from test_train import ROOT, TINY, program

SOURCES = sorted(path.relative_to(ROOT) for folder in ("dino", "launch") for path in (ROOT / folder).rglob("*.py"))
FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "os.execl",
    "os.execv",
    "os.spawnl",
    "subprocess.getoutput",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.loads",
    "shelve.open",
    "joblib.load",
    "dill.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "tempfile.mktemp",
}


def dangers(tree):
    """(line, what) of each call that executes what it is given, and of each import of pickle."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in modules:
                if name.partition(".")[0] in ("pickle", "cPickle", "dill", "marshal", "shelve", "cloudpickle"):
                    yield node.lineno, f"import {name}"
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in FORBIDDEN:
            yield node.lineno, name
        if name == "yaml.load" and "SafeLoader" not in ast.unparse(node):
            yield node.lineno, name
        if given.get("shell", "False") != "False":
            yield node.lineno, f"{name}(shell=...)"
        if given.get("allow_pickle", "False") != "False" or given.get("trust_remote_code", "False") != "False":
            yield node.lineno, f"{name} takes code"
        if name.endswith(("torch.load", "load_state_dict_from_url")) and given.get("weights_only") != "True":
            yield node.lineno, f"{name} without weights_only=True"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_nothing_that_is_read_is_executed(path):
    assert list(dangers(ast.parse((ROOT / path).read_text()))) == []


# What imports a module of a name that is not written there: names from a command, from conf/ and from the list.
IMPORTS_BY_NAME = {"dino/__init__.py", "dino/weights/allowlist.py", "dino/config/node.py"}


def test_a_module_is_imported_by_name_in_few_places():
    importers = ("import_module", "_locate", "get_class", "get_method", "get_object")
    found = {
        str(path)
        for path in SOURCES
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(importers)
        if not isinstance(node.args[0], ast.Constant)
    }
    assert found == IMPORTS_BY_NAME


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)",
        "exec(text)",
        "import pickle",
        "from pickle import loads",
        "os.system('ls')",
        "subprocess.run(line, shell=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "yaml.load(file)",
        "datasets.load_dataset(name, trust_remote_code=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(line):
    assert len(list(dangers(ast.parse(line)))) == 1
    assert list(dangers(ast.parse("torch.load(path, weights_only=True); yaml.safe_load(text)"))) == []


KEY = "5ec2e7" + "0123456789abcdef" * 2 + "ab"  # 40 digits, as W&B's are


def bytes_of(directory):
    """(name, content) of every file, those within zip files (a checkpoint is one) too."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            yield path.name, content
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    yield from ((f"{path.name}/{name}", archive.read(name)) for name in archive.namelist())


@pytest.mark.slow
def test_a_key_of_wandb_is_in_no_file_that_a_run_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "outputs" / "wandb-home"))
    small = [*TINY, "dataset.train.images=16", "dataset.val.images=20", "training.max_steps=2", "name=a"]
    done = program(*small, "logger=[csv,wandb]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    contents = dict(bytes_of(tmp_path))
    assert any(name.endswith(".wandb") for name in contents)
    assert any("step_000000002.pt/" in name for name in contents)
    assert b"vit_tiny" in contents["config.yaml"]
    told = {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    assert [name for name, content in (contents | told).items() if KEY.encode() in content] == []
