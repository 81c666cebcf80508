"""Fine-tuning: the whole backbone and a linear classifier, trained with labels (DINO, Sec. 3.2 and Table 6)."""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from dino.augmentation import image_tensor
from dino.augmentation.crops import crop_box, cut
from dino.dataset.cache import Images
from dino.evaluator.bench import Bench
from dino.evaluator.features import collate, features_of
from dino.loading.broken import first_readable, note
from dino.loading.sampler import Batching, StepSampler
from dino.loading.views import GEOMETRY
from dino.loading.workers import Loader
from dino.scheduler import cosine_warmup


@dataclass(frozen=True)
class Recipe:
    """DeiT's recipe (Touvron et al. 2021), which DINO follows, but without its mixing of images and RandAugment."""

    epochs: int = 100  # DeiT's 300 are for random weights
    lr: float | int = 5e-4  # DeiT's for a batch of 512; here it is the same for any batch
    batch_size: int = 256  # of one GPU; DeiT's 1,024 are of several
    weight_decay: float | int = 0.05  # DeiT's; biases and the gains of norms get none
    warmup_epochs: float | int = 5  # DeiT's; of a short run at most a fifth
    label_smoothing: float | int = 0.1  # DeiT's
    scale: tuple[float, float] = (0.08, 1.0)  # DeiT's: the crops, as fractions of the image's area

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not self.lr > 0:
            raise ValueError(
                "finetune: epochs and batch_size must be 1 or more and lr above 0, "
                f"got {self.epochs}, {self.batch_size} and {self.lr}."
            )


DEIT = Recipe()


def finetune(
    backbone: nn.Module, bench: Bench, recipe: Recipe = DEIT, seed: int = 0, bar: str | None = None
) -> dict[str, float]:
    """{"finetune": accuracy in [0, 1] of the val images after the last epoch}; {} where a split has no labels.

    A copy of `backbone` is trained: the backbone itself and torch's random numbers stay as they are. The precision is
    fp32 or bf16: gradients are not scaled, as fp16 would need. `bar`: words beside a progress bar; None: no bar.
    """
    if not bench.labelled:
        return {}
    recipe = dataclasses.replace(recipe, batch_size=min(recipe.batch_size, len(bench.train)))
    model = trained(backbone, bench, recipe, seed, bar)
    predictions, truth = features_of(
        model,
        bench.val,
        bench.transform,
        bench.device,
        bench.autocast,
        recipe.batch_size,
        bench.num_workers,
        bench.broken,
    ).read()
    return {"finetune": (predictions.argmax(dim=1) == truth).double().mean().item()}


def trained(backbone: nn.Module, bench: Bench, recipe: Recipe, seed: int, bar: str | None) -> nn.Module:
    """A copy of `backbone` with a linear classifier, after all epochs of `recipe`.

    The rate rises linearly during the warm-up, then falls along half a cosine to 0.
    """
    device = bench.device
    steps_per_epoch = len(bench.train) // recipe.batch_size
    steps = recipe.epochs * steps_per_epoch
    warmup = round(min(recipe.warmup_epochs, recipe.epochs / 5) * steps_per_epoch)
    loader = training_batches(bench, recipe, seed, steps)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # for the classifier, and for drop path
        model = with_classifier(backbone, len(bench.train.classes or ())).to(device).requires_grad_().train()
        optimizer = optimizer_of(model, recipe.weight_decay)
        for step, (images, labels, sentences) in enumerate(tqdm(loader, desc=bar, unit="step", disable=bar is None)):
            for group in optimizer.param_groups:
                group["lr"] = cosine_warmup(step, recipe.lr, 0.0, steps, warmup)
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            with bench.autocast():
                logits = model(bench.transform.normalise(images))
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            note(sentences, bench.broken)
    return model


def training_batches(bench: Bench, recipe: Recipe, seed: int, steps: int) -> Loader:
    """(uint8 crops, labels, a sentence for each image that could not be read), one batch a step."""
    images = len(bench.train)
    return Loader(
        LabelledCrops(bench.train, bench.transform.size, recipe.scale, seed),
        batch_sampler=StepSampler(images, Batching(recipe.batch_size, seed=seed), 0, steps),
        collate_fn=collate,
        num_workers=bench.num_workers,
        pin_memory=bench.device.type == "cuda",
        generator=torch.Generator(),  # else starting the loader would draw from the caller's
    )


def with_classifier(backbone: Any, classes: int) -> nn.Module:
    return nn.Sequential(copy.deepcopy(backbone), nn.Linear(backbone.output_dim, classes))


def optimizer_of(model: nn.Module, weight_decay: float | int) -> torch.optim.AdamW:
    groups: list[dict[str, Any]] = [  # biases and the gains of norms get no decay
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups)


class LabelledCrops(Dataset[tuple[Tensor, int, list[str]]]):
    """`crops[(epoch, index)] -> (random resized crop, mirrored half of the time; label; what could not be read)`.

    The draws depend on (seed, epoch, index) alone. The next image, with its label, takes the place of a broken one.
    """

    def __init__(self, data: Images, size: int, scale: tuple[float, float], seed: int) -> None:
        self.data, self.size, self.scale, self.seed = data, size, scale, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, list[str]]:
        (image, label), broken = first_readable(self.data.__getitem__, key[1], len(self.data))
        image = image_tensor(image)
        rng = np.random.default_rng([self.seed, GEOMETRY, *key])
        box = np.array([(*crop_box(image.shape[1], image.shape[2], self.scale, rng), rng.random() < 0.5)])
        return cut(image, box, [self.size])[0], label, broken
