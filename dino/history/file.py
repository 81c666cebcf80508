"""history.json on the disk."""

import json
import os
import re
from pathlib import Path
from typing import Any


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a history.json, which are its last line: the file itself may be large. {} where it has none."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            for tail in (65536, size):
                file.seek(max(0, size - tail))
                if found := re.search(rb'^"metadata": (.*)\}\s*\Z', file.read(), re.MULTILINE):
                    metadata = json.loads(found[1])
                    return metadata if isinstance(metadata, dict) else {}
    except (OSError, ValueError):  # none yet, or being written at this moment
        pass
    return {}
