"""The paper's vision transformers (ViT-S and ViT-B); transformers has their published weights."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dino.backbone.transformer import Transformer, resized

if TYPE_CHECKING:
    from transformers import ViTModel

# The authors' DINO weights, by (hidden_dim, depth, heads, patch_size).
PUBLISHED = {
    (384, 12, 6, 8): "facebook/dino-vits8",
    (384, 12, 6, 16): "facebook/dino-vits16",
    (768, 12, 12, 8): "facebook/dino-vitb8",
    (768, 12, 12, 16): "facebook/dino-vitb16",
}


class ViT(Transformer):
    """A ViT whose features are the CLS token after the final norm (arXiv 2104.14294, Sec. 3.2).

    image_size: pixels; the side for which a position is learned for each patch. Any other size is interpolated.
    patch_size: pixels. Where it does not divide the image, the right and lower rest are not seen.
    pretrained: true for the authors' published weights of this architecture (downloaded once by transformers), or the
        name of another ViT on the Hugging Face hub, or a local folder that save_pretrained wrote. Its image size wins
        over image_size. False builds the same architecture with random weights, with no network.
    drop_path, gradient_checkpointing: see Transformer.

    Raises ValueError for an architecture that cannot be or that differs from the pretrained one,
    FileNotFoundError when the pretrained weights are not to be had.
    """

    def __init__(
        self,
        hidden_dim: int,
        depth: int,
        heads: int,
        patch_size: int,
        image_size: int = 224,
        drop_path: float = 0.0,
        pretrained: bool | str = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(hidden_dim, depth, heads, drop_path, gradient_checkpointing, eps=1e-6)
        if patch_size < 1 or image_size < patch_size:
            raise ValueError(
                "ViT: patch_size must be at least 1 and image_size at least patch_size, "
                f"got patch_size={patch_size}, image_size={image_size}."
            )
        network = pretrained_network(pretrained, (hidden_dim, depth, heads, patch_size)) if pretrained else None
        self.patch_size = patch_size
        grid = (network.config.image_size if network else image_size) // patch_size
        self.patches = nn.Linear(3 * patch_size**2, hidden_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_dim))
        self.positions = nn.Parameter(torch.zeros(1, 1 + grid**2, hidden_dim))  # of CLS first
        for parameter in (self.patches.weight, self.cls_token, self.positions):
            nn.init.trunc_normal_(parameter, std=0.02)
        if network:
            self.load_state_dict(renamed(network.state_dict()))

    def embed(self, images: Tensor) -> Tensor:
        if min(images.shape[-2:]) < self.patch_size:
            raise ValueError(
                f"ViT: images must be at least one patch ({self.patch_size} pixels) high and wide, "
                f"got {images.shape[-2]} x {images.shape[-1]}. Take larger crops or a smaller backbone.patch_size."
            )
        rows, columns = (side // self.patch_size for side in images.shape[-2:])
        return self.placed(self.patches(cut(images, self.patch_size, rows, columns)), rows, columns)

    def placed(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """Embedded patches, row by row, with their positions, behind the CLS token with its own."""
        positions: Tensor = self.positions[:, 1:]
        if (rows, columns) != (grid := round(positions.shape[1] ** 0.5), grid):
            square = positions.mT.reshape(1, -1, grid, grid)
            positions = resized(square, rows, columns).flatten(2).mT
        cls = (self.cls_token + self.positions[:, :1]).expand(len(patches), -1, -1)
        return torch.cat([cls, patches + positions], dim=1)


def cut(images: Tensor, size: int, rows: int, columns: int) -> Float[Tensor, "batch patches pixels"]:
    """Patches row by row, of size x size pixels in three colours. A product with them is a convolution in steps of
    `size`, whose gradients take a sixth of the time (in bf16 on a CPU)."""
    tiles = images[..., : rows * size, : columns * size].reshape(-1, 3, rows, size, columns, size)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(len(images), rows * columns, -1)


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a transformers' ViTModel, whose queries, keys and values are three layers, by the names of ViT."""
    names = {
        "patches.weight": "embeddings.patch_embeddings.projection.weight",
        "patches.bias": "embeddings.patch_embeddings.projection.bias",
        "cls_token": "embeddings.cls_token",
        "positions": "embeddings.position_embeddings",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    of_block = {
        "norm1": ["layernorm_before"],
        "qkv": ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
        "projection": ["attention.o_proj"],
        "norm2": ["layernorm_after"],
        "mlp.0": ["mlp.fc1"],
        "mlp.2": ["mlp.fc2"],
    }
    ours = {ours: state[theirs] for ours, theirs in names.items()}
    ours["patches.weight"] = ours["patches.weight"].flatten(1)  # published as a convolution
    for i in range(sum(name.endswith("mlp.fc1.weight") for name in state)):
        for name, theirs in of_block.items():
            for kind in ("weight", "bias"):
                ours[f"blocks.{i}.{name}.{kind}"] = torch.cat([state[f"layers.{i}.{part}.{kind}"] for part in theirs])
    return ours


def pretrained_network(pretrained: bool | str, architecture: tuple[int, int, int, int]) -> "ViTModel":
    """The ViTModel of that name or folder, after a look at whether it is of the architecture asked for."""
    from transformers import ViTConfig, ViTModel

    words = "hidden_dim={}, depth={}, heads={}, patch_size={}".format(*architecture)
    if isinstance(pretrained, bool):
        if architecture not in PUBLISHED:
            raise ValueError(
                f"ViT: the authors published no weights for {words}. "
                f"Set pretrained to false, or take the architecture of one of {', '.join(PUBLISHED.values())}."
            )
        pretrained = PUBLISHED[architecture]
    try:
        config = ViTConfig.from_pretrained(pretrained)
        found = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.patch_size)
        if found != architecture:
            raise ValueError(
                f"ViT: {pretrained} has hidden_dim={found[0]}, depth={found[1]}, heads={found[2]}, "
                f"patch_size={found[3]}, but {words} was asked for. Make the two agree."
            )
        if (config.intermediate_size, config.hidden_act, config.qkv_bias) != (4 * architecture[0], "gelu", True):
            raise ValueError(
                f"ViT: {pretrained} has an MLP of {config.intermediate_size}, {config.hidden_act} and "
                f"qkv_bias={config.qkv_bias}; expected {4 * architecture[0]}, gelu and true. Take another ViT."
            )
        return ViTModel.from_pretrained(
            pretrained, config=config, add_pooling_layer=False, dtype=torch.float32, use_safetensors=True
        )
    except OSError as error:
        raise FileNotFoundError(
            f"ViT: no pretrained weights at {pretrained}: it is neither a folder with config.json and "
            "model.safetensors nor in the local Hugging Face cache, and it cannot be downloaded. "
            "Connect to a network once, give a folder, or set backbone.pretrained=false."
        ) from error
