"""Fine-tuning: the whole backbone and a linear classifier, trained with labels (DINO, Sec. 3.2 and Table 6)."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from dino.augmentation import EvalTransform, image_tensor
from dino.augmentation.crops import crop_box, cut
from dino.evaluator.features import collate, features_of
from dino.loading.broken import first_readable, note
from dino.loading.sampler import Batching, StepSampler
from dino.loading.views import GEOMETRY
from dino.loading.workers import Loader
from dino.scheduler import cosine_warmup


def finetune(
    backbone: Any,
    train: Any,
    val: Any,
    transform: EvalTransform,
    epochs: int = 100,
    lr: float | int = 5e-4,
    batch_size: int = 256,
    weight_decay: float | int = 0.05,
    warmup_epochs: float | int = 5,
    label_smoothing: float | int = 0.1,
    scale: tuple[float, float] = (0.08, 1.0),
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    num_workers: int = 0,
    seed: int = 0,
    broken: set[str] | None = None,
    bar: str | None = None,
) -> dict[str, float]:
    """{"finetune": accuracy in [0, 1] of `val` after the last epoch}; {} where one of the two has no labels.

    A copy of `backbone` is trained: it stays as it is, and so do torch's random numbers. AdamW at `lr`, whatever the
    batch; linear warm-up (of at most a fifth of the run), then half a cosine to 0. After DeiT's recipe (Touvron et al.
    2021), which DINO follows, but without its mixing of images and RandAugment. `scale`: of the crops, fractions of the
    image's area. `autocast` in bf16 or fp32: gradients are not scaled, as fp16 would need.
    """
    if train.classes is None or val.classes is None:
        return {}
    if epochs < 1 or batch_size < 1 or not lr > 0:
        raise ValueError(
            f"finetune: epochs and batch_size must be 1 or more and lr above 0, got {epochs}, {batch_size} and {lr}."
        )
    device, broken = torch.device(device), set() if broken is None else broken
    batch_size = min(batch_size, len(train))
    steps_per_epoch = len(train) // batch_size
    steps, warmup = epochs * steps_per_epoch, round(min(warmup_epochs, epochs / 5) * steps_per_epoch)
    loader = Loader(
        LabelledCrops(train, transform.size, scale, seed),
        batch_sampler=StepSampler(len(train), Batching(batch_size, seed=seed), 0, steps),
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else starting the loader would draw from the caller's
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # for the classifier, and for drop path
        model = nn.Sequential(copy.deepcopy(backbone), nn.Linear(backbone.output_dim, len(train.classes)))
        model.to(device).requires_grad_().train()
        groups: list[dict[str, Any]] = [  # biases and the gains of norms get no decay
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups)
        for step, (images, labels, sentences) in enumerate(tqdm(loader, desc=bar, unit="step", disable=bar is None)):
            for group in optimizer.param_groups:
                group["lr"] = cosine_warmup(step, lr, 0.0, steps, warmup)
            with autocast():
                logits = model(transform.normalise(images.to(device, non_blocking=True)))
            loss = F.cross_entropy(logits.float(), labels.to(device), label_smoothing=label_smoothing)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            note(sentences, broken)
    found, truth = features_of(model, val, transform, device, autocast, batch_size, num_workers, broken).read()
    return {"finetune": (found.argmax(dim=1) == truth).double().mean().item()}


class LabelledCrops(Dataset[tuple[Tensor, int, list[str]]]):
    """`crops[(epoch, index)] -> (random resized crop, mirrored half of the times; label; what could not be read)`.

    What is drawn depends on (seed, epoch, index) alone. In place of a broken image stands the next, with its label.
    """

    def __init__(self, data: Any, size: int, scale: tuple[float, float], seed: int) -> None:
        self.data, self.size, self.scale, self.seed = data, size, scale, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, list[str]]:
        (image, label), broken = first_readable(self.data.__getitem__, key[1], len(self.data))
        image = image_tensor(image)
        rng = np.random.default_rng([self.seed, GEOMETRY, *key])
        box = np.array([(*crop_box(image.shape[1], image.shape[2], self.scale, rng), rng.random() < 0.5)])
        return cut(image, box, [self.size])[0], label, broken
