"""What a run runs on and from: versions, processor, command line, commit, memory."""

import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from dino.runtime.device import peak_memory


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """In words, for people to read; all of this process and machine, now."""
    on = torch.device(device)
    found = {
        "command": command_line(),
        "commit": commit(),
        "dino-train": version("dino-train"),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "processor": f"{processor()}, {torch.get_num_threads()} threads",
    }
    if on.type == "cuda":
        memory = torch.cuda.get_device_properties(on).total_memory
        found["GPU"] = f"{torch.cuda.get_device_name(on)}, {memory / 2**30:.0f} GiB"
        found["CUDA"] = str(torch.version.cuda)
    return found | {"system": platform.platform(), "peak memory": memory_in_words(on)}


def command_line() -> str:
    """As one would type it: without the path of the interpreter."""
    program, *arguments = sys.orig_argv or ["python"]
    return shlex.join([Path(program).name, *arguments])


def commit() -> str:
    """Of the checkout that this package is run from, and whether files differ from it; "none" where it is installed."""
    here = Path(__file__).parent
    try:
        # An installed package may lie in the checkout of another project, which does not track it.
        _git(here, "ls-files", "--error-unmatch", "__init__.py")
        changed = len(_git(here, "status", "--porcelain", "--untracked-files=no").splitlines())
        return _git(here, "rev-parse", "HEAD").strip() + (f", {changed} files changed since" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "none: not run from a checkout"


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # no Linux
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def memory_in_words(device: torch.device) -> str:
    """The most that this process has held so far, in GiB."""
    host, peak = (f"{peak_memory(on) / 2**30:.1f} GiB" for on in (torch.device("cpu"), device))
    return f"{peak} on the GPU, {host} on the host" if device.type == "cuda" else host


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout
