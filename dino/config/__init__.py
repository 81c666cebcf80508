"""From a command line to a checked config, and from a config to objects."""

from dino.config.composition import CONF, compose, composed, plain
from dino.config.node import build_node
from dino.config.program import command
from dino.config.sweep import run_name, sweep_of
from dino.runtime.refused import Refused

__all__ = ["CONF", "Refused", "build_node", "command", "compose", "composed", "plain", "run_name", "sweep_of"]
