"""A small vision transformer with a convolutional stem: the default run's backbone."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth


class ViTTiny(nn.Module):
    """A ViT whose patches are embedded by a few stride-2 convolutions (Xiao et al. 2021, arXiv 2106.14881).

    The stem is why it learns in minutes: with one large patch embedding the same transformer stays near its
    untrained accuracy on the textures for as long as the default run lasts.

    image_size: pixels; the side for which a position is learned for each patch. Any other size is interpolated.
    patch_size: pixels, a power of two from 2 up: each factor of two is one convolution of the stem.
    drop_path: probability of dropping a residual branch in the last block, rising linearly from 0 in the first.
    gradient_checkpointing: keep only the blocks' inputs and compute them again in the backward pass.
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
        super().__init__()
        if patch_size < 2 or patch_size & (patch_size - 1):
            raise ValueError(
                f"ViTTiny: patch_size must be a power of two from 2 up (the stem halves the image), got {patch_size}."
            )
        if depth < 1 or heads < 1 or hidden_dim < 1 or hidden_dim % heads:
            raise ValueError(
                "ViTTiny: depth and heads must be at least 1 and hidden_dim a positive multiple of heads, "
                f"got depth={depth}, heads={heads}, hidden_dim={hidden_dim}."
            )
        if hidden_dim < patch_size:
            raise ValueError(
                f"ViTTiny: hidden_dim must be at least patch_size={patch_size}, since the stem doubles its channels "
                f"up to hidden_dim, got {hidden_dim}."
            )
        if image_size < patch_size:
            raise ValueError(f"ViTTiny: image_size must be at least patch_size={patch_size}, got {image_size}.")
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"ViTTiny: drop_path must be in [0, 1), got {drop_path}.")

        self.output_dim = hidden_dim
        self.gradient_checkpointing = gradient_checkpointing
        grid = image_size // patch_size
        self.stem = convolutional_stem(hidden_dim, halvings=patch_size.bit_length() - 1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_dim))
        self.cls_position = nn.Parameter(torch.zeros(1, 1, hidden_dim))
        self.positions = nn.Parameter(torch.zeros(1, hidden_dim, grid, grid))
        self.blocks = nn.ModuleList(Block(hidden_dim, heads, drop_path * i / max(1, depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(hidden_dim)

        for parameter in (self.cls_token, self.cls_position, self.positions):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch {self.output_dim}"]:
        """The CLS token after the final norm. Height and width: at least one pixel; the stem rounds up."""
        hidden: Tensor = self.norm(self._blocks(images, len(self.blocks))[0][:, 0])
        return hidden

    def tokens(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens {self.output_dim}"]:
        """All tokens after the final norm: CLS, then the patches row by row."""
        return self.last_tokens(images, 1)[0]

    def last_tokens(
        self, images: Float[Tensor, "batch 3 height width"], layers: int
    ) -> list[Float[Tensor, "batch tokens {self.output_dim}"]]:
        """As `tokens`, after each of the last `layers` blocks, all through the final norm; of the last block last."""
        return [self.norm(hidden) for hidden in self._blocks(images, len(self.blocks), layers)]

    def attention(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch heads tokens tokens"]:
        """Attention of the last block, from each token (a row, which sums to 1) to every token; CLS first."""
        last = self.blocks[-1]
        assert isinstance(last, Block)
        return last.attention_weights(self._blocks(images, len(self.blocks) - 1)[0])

    def _blocks(self, images: Tensor, depth: int, keep: int = 1) -> list[Tensor]:
        """The residual stream after the last `keep` of the first `depth` blocks."""
        patches = self.stem(images)
        positions: Tensor = self.positions
        if positions.shape[-2:] != patches.shape[-2:]:
            positions = F.interpolate(positions, size=patches.shape[-2:], mode="bicubic", align_corners=False)
        patches = (patches + positions).flatten(2).transpose(1, 2)
        cls = (self.cls_token + self.cls_position).expand(len(images), -1, -1)
        hidden = torch.cat([cls, patches], dim=1)
        kept = [hidden]
        for block in self.blocks[:depth]:
            if self.gradient_checkpointing and self.training:
                hidden = checkpoint(block, hidden, use_reentrant=False)
            else:
                hidden = block(hidden)
            kept = [*kept, hidden][-keep:]
        return kept


def convolutional_stem(hidden_dim: int, halvings: int) -> nn.Sequential:
    """`halvings` 3x3 convolutions of stride 2 that double the channels up to hidden_dim, then a 1x1 (Xiao et al.)."""
    layers: list[nn.Module] = []
    channels = 3
    for left in reversed(range(halvings)):
        width = hidden_dim >> left
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, hidden_dim, 1))


class Block(nn.Module):
    """A pre-norm transformer block; both residual branches are dropped per sample with probability drop_path."""

    def __init__(self, hidden_dim: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.qkv = nn.Linear(hidden_dim, 3 * hidden_dim)
        self.projection = nn.Linear(hidden_dim, hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_dim, 4 * hidden_dim), nn.GELU(), nn.Linear(4 * hidden_dim, hidden_dim)
        )
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self._qkv(hidden)
        if hidden.device.type == "cpu":
            # The same, written out: on a CPU torch's fused kernel makes a bf16 step take about half as long again.
            mixed = weights(query, key) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(1, 2).flatten(2)
        hidden = hidden + self.drop_path(self.projection(mixed))
        dropped: Tensor = self.drop_path(self.mlp(self.norm2(hidden)))
        return hidden + dropped

    def attention_weights(self, hidden: Tensor) -> Tensor:
        query, key, _ = self._qkv(hidden)
        return weights(query, key)

    def _qkv(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [batch, heads, tokens, hidden_dim / heads]."""
        qkv: Tensor = self.qkv(self.norm1(hidden))
        query, key, value = qkv.view(*hidden.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return query, key, value


def weights(query: Tensor, key: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)), [batch, heads, tokens, tokens]."""
    return torch.softmax(query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1), dim=-1)
