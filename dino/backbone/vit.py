"""The paper's vision transformers (ViT-S and ViT-B), through transformers."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

if TYPE_CHECKING:
    from transformers import ViTModel

# The authors' DINO weights, by (hidden_dim, depth, heads, patch_size).
PUBLISHED = {
    (384, 12, 6, 8): "facebook/dino-vits8",
    (384, 12, 6, 16): "facebook/dino-vits16",
    (768, 12, 12, 8): "facebook/dino-vitb8",
    (768, 12, 12, 16): "facebook/dino-vitb16",
}


class ViT(nn.Module):
    """A ViT whose features are the CLS token after the final norm (arXiv 2104.14294, Sec. 3.2).

    image_size: pixels; the side for which a position is learned for each patch. Any other size is interpolated.
    patch_size: pixels. Where it does not divide the image, the right and lower rest are not seen.
    drop_path: probability of dropping a residual branch in the last layer, rising linearly from 0 in the first.
    pretrained: true for the authors' published weights of this architecture (downloaded once by transformers), or the
        name of another ViT on the Hugging Face hub, or a local folder that save_pretrained wrote. Its image size wins
        over image_size. False builds the same architecture with random weights, with no network.
    gradient_checkpointing: keep only the layers' inputs and compute them again in the backward pass.

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
        super().__init__()
        if depth < 1 or heads < 1 or hidden_dim < 1 or hidden_dim % heads:
            raise ValueError(
                "ViT: depth and heads must be at least 1 and hidden_dim a positive multiple of heads, "
                f"got depth={depth}, heads={heads}, hidden_dim={hidden_dim}."
            )
        if patch_size < 1 or image_size < patch_size:
            raise ValueError(
                "ViT: patch_size must be at least 1 and image_size at least patch_size, "
                f"got patch_size={patch_size}, image_size={image_size}."
            )
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"ViT: drop_path must be in [0, 1), got {drop_path}.")
        # Here, not above: transformers takes seconds to import, and only a ViT should pay for them.
        from transformers import ViTConfig, ViTModel

        self.network: Any  # a ViTModel, whose layers' attributes are Any as well
        if pretrained:
            self.network = pretrained_network(pretrained, (hidden_dim, depth, heads, patch_size))
        else:
            config = ViTConfig(
                hidden_size=hidden_dim,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                intermediate_size=4 * hidden_dim,
                patch_size=patch_size,
                image_size=image_size,
            )
            self.network = ViTModel(config, add_pooling_layer=False)
        self.output_dim = hidden_dim
        self.patch_size = patch_size
        self.gradient_checkpointing = gradient_checkpointing
        for i, layer in enumerate(self.network.layers):
            # The layer's dropout stands at the end of both residual branches, and its probability is 0.
            layer.dropout = StochasticDepth(drop_path * i / max(1, depth - 1), mode="row")

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch {self.output_dim}"]:
        """The CLS token after the final norm. Height and width: at least patch_size."""
        return self.tokens(images)[:, 0]

    def tokens(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens {self.output_dim}"]:
        """All tokens after the final norm: CLS, then the patches row by row."""
        return self.last_tokens(images, 1)[0]

    def last_tokens(
        self, images: Float[Tensor, "batch 3 height width"], layers: int
    ) -> list[Float[Tensor, "batch tokens {self.output_dim}"]]:
        """As `tokens`, after each of the last `layers` layers, all through the final norm; of the last layer last."""
        return [self.network.layernorm(hidden) for hidden in self._layers(images, len(self.network.layers), layers)]

    def attention(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch heads tokens tokens"]:
        """Attention of the last layer, from each token (a row, which sums to 1) to every token; CLS first."""
        last = self.network.layers[-1]
        hidden = last.layernorm_before(self._layers(images, len(self.network.layers) - 1)[0])
        query, key = (
            project(hidden).unflatten(-1, (last.attention.num_attention_heads, -1)).transpose(1, 2)
            for project in (last.attention.q_proj, last.attention.k_proj)
        )
        weights: Tensor = (query @ key.transpose(-2, -1) * last.attention.scaling).softmax(dim=-1)
        return weights

    def _layers(self, images: Tensor, depth: int, keep: int = 1) -> list[Tensor]:
        """The residual stream after the last `keep` of the first `depth` layers."""
        if min(images.shape[-2:]) < self.patch_size:
            raise ValueError(
                f"ViT: images must be at least one patch ({self.patch_size} pixels) high and wide, "
                f"got {images.shape[-2]} x {images.shape[-1]}. Take larger crops or a smaller backbone.patch_size."
            )
        hidden: Tensor = self.network.embeddings(images, interpolate_pos_encoding=True)
        kept = [hidden]
        for layer in self.network.layers[:depth]:
            if self.gradient_checkpointing and self.training:
                hidden = checkpoint(layer, hidden, use_reentrant=False)
            else:
                hidden = layer(hidden)
            kept = [*kept, hidden][-keep:]
        return kept


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
        return ViTModel.from_pretrained(
            pretrained, config=config, add_pooling_layer=False, attn_implementation="sdpa", dtype=torch.float32
        )
    except OSError as error:
        raise FileNotFoundError(
            f"ViT: no pretrained weights at {pretrained}: it is neither a folder with config.json and "
            "model.safetensors nor in the local Hugging Face cache, and it cannot be downloaded. "
            "Connect to a network once, give a folder, or set backbone.pretrained=false."
        ) from error
