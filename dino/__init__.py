"""DINO, self-distillation with no labels: the parts, usable without any config. Names load when they are first used."""

import os
from importlib import import_module
from typing import Any

# Tensors from 2 MB on in pages of 2 MB, where Linux lets a program ask for them: on a CPU most of the wait for fresh
# memory goes (ViT-S/16 in bf16: up to a tenth of a step). torch reads it once, before its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"

_HOME = {
    "DINOTransform": "augmentation",
    "EvalTransform": "augmentation",
    "collate_multi_crop": "augmentation",
    "Batching": "loading.sampler",
    "MicroBatch": "loading.micro_batch",
    "Steps": "loading.batches",
    "Learner": "run.learner",
    "load_checkpoint": "run.checkpoint",
    "load_teacher": "weights",
    "save_checkpoint": "run.checkpoint",
    "KNN": "evaluator",
    "DinoProjectionHead": "head",
    "History": "history",
    "DinoLoss": "loss",
    "DinoModel": "model",
    "make_teacher": "model",
    "update_teacher_EMA": "model",
    "parameter_groups": "optimizer",
    "Schedule": "scheduler",
    "attention_maps": "report.attention",
    "build": "config.parts",
    "clip_gradients": "optimizer",
    "compose": "config.parts",
    "get_backbone": "config.parts",
    "get_dataset": "config.parts",
    "get_momentum_schedule": "scheduler",
    "patch_tokens": "report.attention",
    "pca_rgb": "report.attention",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dino' has no attribute {name!r}")
    return getattr(import_module(f"dino.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
