"""Reading a checkpoint that may come from a stranger, and comparing what it holds with a network."""

import pickletools
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONSTRUCTORS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch [A-Z][A-Za-z0-9]*Storage")


def other_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, Tensor]) -> str:
    """Where the names or shapes of a file differ from those of a network, in words; "" where they are the same."""
    shapes = {name: tuple(value.shape) for name, value in expected.items()}
    missing, unexpected = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    other = [
        f"{name} is {list(found[name])} in the file and {list(shape)} in the network"
        for name, shape in shapes.items()
        if name in found and found[name] != shape
    ]
    kinds = {"missing: ": missing, "unexpected: ": unexpected, "": other}
    return "; ".join(kind + _first(names) for kind, names in kinds.items() if names)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint in this file, on the CPU. It may come from a stranger: nothing in it is executed, and it takes no
    more memory than the file has bytes.

    Each part is compared with the checksum beside it, which torch.load ignores. Raises where anything is wrong with the
    file, be it one bit, and it can be any exception.
    """
    with zipfile.ZipFile(path) as parts:
        entries = parts.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, as no checkpoint of this project is")
        if (claimed := sum(entry.file_size for entry in entries)) > path.stat().st_size:
            raise ValueError(f"its parts claim {claimed:,} bytes, and the file has {path.stat().st_size:,}")
        if (part := parts.testzip()) is not None:
            raise ValueError(f"{part} in it is not what was written")
        for entry in entries:
            if entry.filename.endswith("/data.pkl"):
                _check_constructors(parts.read(entry))
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _check_constructors(program: bytes) -> None:
    """Raises ValueError where the pickle in a checkpoint calls more than dicts and tensors of the file's parts need.

    torch.load with weights_only=True executes no code, but allows some more calls: torch.Tensor(10**12), for one, which
    takes as much memory as the file asks for.
    """
    for opcode, name, _ in pickletools.genops(program):
        if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST") and not CONSTRUCTORS.fullmatch(str(name)):
            raise ValueError(f"it calls {name}, as no checkpoint of this project does")


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
