"""Nested settings by dotted key."""

from collections.abc import Mapping
from typing import Any


def value_at(config: Any, path: str) -> Any:
    """The value at a dotted key, None where there is none."""
    for part in path.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def flat(node: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of every leaf; an empty dict is a leaf."""
    pairs: list[tuple[str, Any]] = []
    for key, value in node.items():
        pairs += flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else [(prefix + key, value)]
    return pairs
