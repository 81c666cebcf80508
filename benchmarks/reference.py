"""What the project measures itself against, in the official style: DINO's augmentation, one image at a time, in PIL; a
training step in plain eager torch; and images to measure on where there are none."""

import math
import random
from collections.abc import Sequence
from copy import deepcopy
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn
from torchvision.datasets.folder import default_loader
from torchvision.ops import StochasticDepth
from torchvision.transforms.functional import to_pil_image

from dino.augmentation import DINOTransform
from dino.backbone.transformer import Block, Transformer
from dino.backbone.vit import ViT
from dino.dataset.files import ImageFiles
from dino.model import DinoModel, make_teacher


class ReferenceTransform(DINOTransform):
    """The same arguments and views as DINOTransform's, by torchvision's transforms on PIL images: all of it in `crop`.

    The draws come from the global generators of torch and Python. As an experiment:
    `python -m dino.train augmentation._target_=benchmarks.reference.ReferenceTransform`
    """

    def crop(self, image: Image.Image | Tensor, rng: Any = None) -> list[Tensor]:
        """Finished views, in floats; `rng` is not used."""
        pil = to_pil_image(image) if isinstance(image, Tensor) else image
        return [view(pil) for view in self._views]

    def augment(self, views: Sequence[Tensor], seed: Sequence[int] | None = None, start: int = 0) -> list[Tensor]:
        """Nothing is left to be done."""
        return list(views)

    @cached_property
    def _views(self) -> list[T.Compose]:
        blur, solarize = self._blur_probability[:, 0], self._solarize_probability[:, 0]
        return [self._view(number, blur[number], solarize[number]) for number in range(self.ncrops)]

    def _view(self, number: int, blur: float, solarize: float) -> T.Compose:
        whole = number < self.n_global_crops
        size, scale = (self.global_size, self.global_scale) if whole else (self.local_size, self.local_scale)
        low, high = (sigma * self._blur_scale(size) for sigma in self.blur_sigma)
        brightness, contrast, saturation, hue = (self._highest_factor - [1, 1, 1, 0]).tolist()
        return T.Compose(
            [
                T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC),
                T.RandomHorizontalFlip(self.horizontal_flip),
                T.RandomApply([T.ColorJitter(brightness, contrast, saturation, hue)], self.jitter_probability),
                T.RandomGrayscale(self.gray_probability),
                T.RandomApply([GaussianBlur(low, high)], float(blur)),
                T.RandomApply([ImageOps.solarize], float(solarize)),
                T.ToTensor(),
                T.Normalize(self.mean, self.std),
            ]
        )


class GaussianBlur:
    """PIL's, of a standard deviation drawn between two numbers of pixels."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(self.low, self.high)))


class ReferenceImages:
    """The same images as torchvision's ImageFolder reads them, in PIL."""

    def __init__(self, images: ImageFiles) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return default_loader(self.images.name(index)), int(self.images.labels[index])


def photograph(rng: np.random.Generator, height: int = 375, width: int = 500) -> Image.Image:
    """Noise with the spectrum of photographs, amplitude 1/frequency, more of it in the light than in the colours."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)) + 1 / width
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((4, height, width))) / frequency, s=(height, width))
    light, *colour = noise / noise.std((1, 2), keepdims=True)
    pixels = 120 + 50 * light[:, :, None] + 15 * np.stack(colour, axis=2)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


# ---- a step in the official style: one thing after the other, in the words of the paper's pseudo-code ---------------


class ReferenceTransformer(nn.Module):
    """A vision transformer with attention written out, whose last block, too, computes every token; `vit`'s weights.

    The patches of a ViT are embedded by a convolution.
    """

    def __init__(self, vit: Transformer) -> None:
        super().__init__()
        self.vit = deepcopy(vit)
        self.vit.blocks = nn.ModuleList(ReferenceBlock(block) for block in self.vit.blocks)

    def embed(self, images: Tensor) -> Tensor:
        if not isinstance(self.vit, ViT):
            return self.vit.embed(images)
        size, weight = self.vit.patch_size, self.vit.patches.weight
        patches = F.conv2d(images, weight.view(-1, 3, size, size), self.vit.patches.bias, stride=size)
        return self.vit.placed(patches.flatten(2).transpose(1, 2), *patches.shape[-2:])

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.embed(images)
        for block in self.vit.blocks:
            hidden = block(hidden)
        return self.vit.norm(hidden)[:, 0]


class ReferenceBlock(nn.Module):
    """Attention with its matrix in memory; drop path as a product with zeros."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.heads = block.heads
        self.norm1, self.qkv, self.proj = block.norm1, block.qkv, block.projection
        self.norm2, self.mlp = block.norm2, block.mlp
        self.drop_path = StochasticDepth(block.drop_path, mode="row").train(block.training)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, tokens, dim = hidden.shape
        qkv = self.qkv(self.norm1(hidden)).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1)) * (dim // self.heads) ** -0.5
        attention = attention.softmax(dim=-1)
        hidden = hidden + self.drop_path(self.proj((attention @ v).transpose(1, 2).reshape(batch, tokens, dim)))
        return hidden + self.drop_path(self.mlp(self.norm2(hidden)))


class ReferenceModel(nn.Module):
    """Backbone and head, with one forward pass of the backbone a resolution; a copy of `model`'s weights."""

    def __init__(self, model: DinoModel) -> None:
        super().__init__()
        vit = isinstance(model.backbone, Transformer)
        self.backbone = ReferenceTransformer(model.backbone) if vit else deepcopy(model.backbone)
        self.head = deepcopy(model.projection_head)

    def forward(self, views: list[Tensor]) -> Tensor:
        sizes = torch.tensor([view.shape[-1] for view in views])
        ends = torch.cumsum(torch.unique_consecutive(sizes, return_counts=True)[1], 0)
        start, output = 0, torch.empty(0, device=views[0].device)
        for end in ends:
            output = torch.cat([output, self.backbone(torch.cat(views[start:end]))])
            start = end
        return self.head(output)


class ReferenceLoss:
    """Cross-entropy in a loop over pairs of views; the center moves with each call."""

    def __init__(self, out_dim: int, ncrops: int, device: str | torch.device = "cpu") -> None:
        self.ncrops, self.center = ncrops, torch.zeros(1, out_dim, device=device)

    def __call__(self, student: Tensor, teacher: Tensor, teacher_temp: float) -> Tensor:
        student_out = (student / 0.1).chunk(self.ncrops)
        teacher_out = torch.softmax((teacher - self.center) / teacher_temp, dim=-1).detach().chunk(2)
        total, pairs = 0, 0
        for i, q in enumerate(teacher_out):
            for v, output in enumerate(student_out):
                if v == i:
                    continue
                total += torch.sum(-q * torch.log_softmax(output, dim=-1), dim=-1).mean()
                pairs += 1
        with torch.no_grad():
            self.center = self.center * 0.9 + teacher.float().mean(dim=0, keepdim=True) * 0.1
        return total / pairs


class ReferenceTraining:
    """Student, teacher, loss and torch's default AdamW of the same weights as `student` has; `step` is one update.

    amp: a number format that both forward passes and the loss are cast to, as the official loop does.
    """

    def __init__(self, student: DinoModel, ncrops: int, clip: float = 3.0, amp: torch.dtype | None = None) -> None:
        device = next(student.parameters()).device
        self.student, self.teacher = (
            ReferenceModel(model).to(memory_format=torch.contiguous_format)
            for model in (student, make_teacher(student))
        )
        self.loss = ReferenceLoss(student.projection_head.output_dim, ncrops, device)
        named = [p for p in self.student.named_parameters() if p[1].requires_grad]
        flat = [p for name, p in named if p.ndim == 1]
        self.optimizer = torch.optim.AdamW([{"params": [p for _, p in named if p.ndim > 1]}, {"params": flat}])
        self.clip, self.amp = clip, amp

    def step(self, views: list[Tensor], lr: float, decay: float, momentum: float, teacher_temp: float) -> float:
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = lr
            group["weight_decay"] = decay if i == 0 else 0.0
        with torch.autocast(views[0].device.type, dtype=self.amp, enabled=self.amp is not None):
            with torch.no_grad():
                teacher_out = self.teacher(views[:2])
            student_out = self.student(views)
            loss = self.loss(student_out, teacher_out, teacher_temp)
        value = loss.item()
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.student.parameters():
            if parameter.grad is not None and self.clip < math.inf:
                coefficient = self.clip / (parameter.grad.norm(2) + 1e-6)
                if coefficient < 1:
                    parameter.grad.mul_(coefficient)
        self.optimizer.step()
        with torch.no_grad():
            for q, k in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                k.mul_(momentum).add_((1 - momentum) * q.detach())
        return value
