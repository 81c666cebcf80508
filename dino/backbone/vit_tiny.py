"""A small vision transformer with a convolutional stem: the default run's backbone."""

import torch
from torch import Tensor, nn

from dino.backbone.transformer import Transformer, resized


class ViTTiny(Transformer):
    """A ViT whose patches are embedded by a few stride-2 convolutions (Xiao et al. 2021, arXiv 2106.14881).

    The stem is why it learns in minutes: with one large patch embedding the same transformer stays near its
    untrained accuracy on the textures for as long as the default run lasts.

    image_size: pixels; the side for which a position is learned for each patch. Any other size is interpolated; images
        may have any size from a pixel up, and the stem rounds up.
    patch_size: pixels, a power of two from 2 up: each factor of two is one convolution of the stem.
    drop_path, gradient_checkpointing: see Transformer.
    """

    def __init__(
        self,
        hidden_dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        patch_size: int = 8,
        image_size: int = 64,
        drop_path: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(hidden_dim, depth, heads, drop_path, gradient_checkpointing, eps=1e-5)
        if patch_size < 2 or patch_size & (patch_size - 1):
            raise ValueError(
                f"ViTTiny: patch_size must be a power of two from 2 up (the stem halves the image), got {patch_size}."
            )
        if hidden_dim < patch_size:
            raise ValueError(
                f"ViTTiny: hidden_dim must be at least patch_size={patch_size}, since the stem doubles its channels "
                f"up to hidden_dim, got {hidden_dim}."
            )
        if image_size < patch_size:
            raise ValueError(f"ViTTiny: image_size must be at least patch_size={patch_size}, got {image_size}.")
        grid = image_size // patch_size
        self.stem = convolutional_stem(hidden_dim, halvings=patch_size.bit_length() - 1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_dim))
        self.cls_position = nn.Parameter(torch.zeros(1, 1, hidden_dim))
        self.positions = nn.Parameter(torch.zeros(1, hidden_dim, grid, grid))
        for parameter in (self.cls_token, self.cls_position, self.positions):
            nn.init.trunc_normal_(parameter, std=0.02)

    def embed(self, images: Tensor) -> Tensor:
        patches = self.stem(images)
        positions: Tensor = self.positions
        if positions.shape[-2:] != patches.shape[-2:]:
            positions = resized(positions, *patches.shape[-2:])
        patches = (patches + positions).flatten(2).transpose(1, 2)
        cls = (self.cls_token + self.cls_position).expand(len(images), -1, -1)
        return torch.cat([cls, patches], dim=1)


def convolutional_stem(hidden_dim: int, halvings: int) -> nn.Sequential:
    """`halvings` 3x3 convolutions of stride 2 that double the channels up to hidden_dim, then a 1x1 (Xiao et al.)."""
    layers: list[nn.Module] = []
    channels = 3
    for left in reversed(range(halvings)):
        width = hidden_dim >> left
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, hidden_dim, 1))
