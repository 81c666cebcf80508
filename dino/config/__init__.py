"""From a command line to a checked, plain config. Imports no torch, so that a program without it starts at once."""

from dino.config.composition import CONF, compose
from dino.config.node import build_node
from dino.runtime.refused import Refused

__all__ = ["CONF", "Refused", "build_node", "compose"]
