"""Losses, one per file."""

from dino.loss.dino import DinoLoss

__all__ = ["DinoLoss"]
