"""What the vision transformers share: pre-norm blocks, and what is read off them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Number of tokens from which torch's fused attention is faster on a CPU. In fp32 it is 10 to 40 % slower at 17 and 37
# tokens and 20 % faster at 197; its gradients in half precision take twice as long at 197, and as long at 785.
FUSED_FROM, FUSED_FROM_IN_HALF = 128, 768


class Transformer(nn.Module):
    """Blocks and a final norm behind `embed`, which a child defines: images to tokens [batch, 1 + patches, dim].

    drop_path: stochastic depth of the last block, the share of a batch that skips a residual branch. It rises linearly
        from 0 in the first block.
    gradient_checkpointing: activation checkpointing: keep only the inputs of the blocks, and recompute the rest in the
        backward pass.
    """

    def __init__(
        self, hidden_dim: int, depth: int, heads: int, drop_path: float, gradient_checkpointing: bool, eps: float
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for what, value in (("depth", depth), ("heads", heads), ("hidden_dim", hidden_dim)):
            if value < 1:
                raise ValueError(f"{name}: {what} must be at least 1, got {value}.")
        if hidden_dim % heads:
            raise ValueError(
                f"{name}: hidden_dim must be a multiple of heads, got hidden_dim={hidden_dim}, heads={heads}."
            )
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"{name}: drop_path must be in [0, 1), got {drop_path}.")
        self.output_dim = hidden_dim
        self.gradient_checkpointing = gradient_checkpointing
        self.blocks = nn.ModuleList(
            Block(hidden_dim, heads, drop_path * i / max(1, depth - 1), eps) for i in range(depth)
        )
        self.norm = nn.LayerNorm(hidden_dim, eps)

    def embed(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch {self.output_dim}"]:
        """The CLS token after the final norm; the last block computes no other (a twelfth of ViT-S saved)."""
        hidden = self.embed(images)
        for i, block in enumerate(self.blocks, start=1):
            hidden = self._through(block, hidden, cls_only=i == len(self.blocks))
        normed: Tensor = self.norm(hidden[:, 0])
        return normed

    def tokens(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens {self.output_dim}"]:
        """All tokens after the final norm: CLS, then the patches row by row."""
        return self.last_tokens(images, 1)[0]

    def last_tokens(
        self, images: Float[Tensor, "batch 3 height width"], layers: int
    ) -> list[Float[Tensor, "batch tokens {self.output_dim}"]]:
        """As `tokens`, after each of the last `layers` blocks, all through the final norm; of the last block last."""
        hidden, kept = self.embed(images), list[Tensor]()
        for block in self.blocks:
            hidden = self._through(block, hidden)
            kept = [*kept, hidden][-layers:]
        return [self.norm(hidden) for hidden in kept]

    def attention(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch heads tokens tokens"]:
        """Attention of the last block, from each token (a row, which sums to 1) to every token; CLS first."""
        hidden = self.embed(images)
        *before, last = self.blocks
        for block in before:
            hidden = self._through(block, hidden)
        weights: Tensor = last.attention_weights(hidden)  # type: ignore[operator]
        return weights

    def _through(self, block: nn.Module, hidden: Tensor, cls_only: bool = False) -> Tensor:
        if self.gradient_checkpointing and self.training:
            hidden = checkpoint(block, hidden, cls_only, use_reentrant=False)
        else:
            hidden = block(hidden, cls_only)
        return hidden


class Block(nn.Module):
    """Attention, then an MLP, each behind a norm and added to the stream.

    In training, stochastic depth drops a fixed number of samples per batch from each residual branch (as in DINOv2,
    arXiv 2304.07193, Sec. 5), so that shapes are static; the branch of the others is scaled by batch / kept. Dropped
    samples are not computed, except in a model compiled for a CPU.
    """

    def __init__(self, hidden_dim: int, heads: int, drop_path: float = 0.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(hidden_dim, eps)
        self.qkv = nn.Linear(hidden_dim, 3 * hidden_dim)
        self.projection = nn.Linear(hidden_dim, hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim, eps)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_dim, 4 * hidden_dim), nn.GELU(), nn.Linear(4 * hidden_dim, hidden_dim)
        )
        self.drop_path = drop_path
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, hidden: Tensor, cls_only: bool = False) -> Tensor:
        """[batch, tokens, dim] to the same; with `cls_only` to [batch, 1, dim], the first token alone."""
        stream = hidden[:, :1] if cls_only else hidden
        stream = self._add(stream, lambda of: self._attend(of, cls_only), hidden)
        return self._add(stream, self._widen, stream)

    def attention_weights(self, hidden: Tensor) -> Float[Tensor, "batch heads tokens tokens"]:
        query, key, _ = self._qkv(hidden)
        return weights(query, key)

    def _add(self, stream: Tensor, branch: Callable[[Tensor], Tensor], of: Tensor) -> Tensor:
        batch = len(stream)
        skip = min(round(self.drop_path * batch), batch - 1) if self.training else 0
        if skip == 0:
            return stream + branch(of)
        rest, scale = torch.rand(batch, device=stream.device).argsort()[skip:], batch / (batch - skip)
        # What the compiler writes for a CPU adds rows a number at a time, which takes longer than to compute them all.
        if torch.compiler.is_compiling() and stream.device.type == "cpu":
            return stream + branch(of) * torch.zeros(batch, 1, 1).index_fill(0, rest, scale)
        added = branch(of.index_select(0, rest)).to(stream.dtype)  # the gradients of of[rest] take ten times as long
        return stream.index_add(0, rest, added, alpha=scale)

    def _widen(self, hidden: Tensor) -> Tensor:
        wide = recompute_inner(lambda of: self.mlp[0](self.norm2(of)), hidden)
        return recompute_inner(lambda of: self.mlp[2](self.mlp[1](of)), wide)

    def _attend(self, hidden: Tensor, cls_only: bool) -> Tensor:
        qkv, two_products = self._qkv(hidden), explicit_attention_is_faster(hidden)
        query, key, value = qkv.contiguous() if two_products else qkv  # else each product copies what it takes
        if cls_only:
            query = query[:, :, :1]
        mixed = weights(query, key) @ value if two_products else F.scaled_dot_product_attention(query, key, value)
        added: Tensor = self.projection(mixed.transpose(1, 2).flatten(2))
        return added

    def _qkv(self, hidden: Tensor) -> Float[Tensor, "3 batch heads tokens dim"]:
        """Queries, keys and values."""
        qkv = recompute_inner(lambda of: self.qkv(self.norm1(of)), hidden)
        return qkv.view(*hidden.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)


def recompute_inner(product_of: Callable[[Tensor], Tensor], of: Tensor) -> Tensor:
    """Runs `product_of(of)` (a norm or GELU, then a Linear), and recomputes the norm or GELU in the backward pass
    instead of storing its output.

    No product is computed twice. A block keeps a third less, and takes 1 % more time (ViT-S/16 in fp32 on a CPU). Off
    in a compiled model, whose compiler decides for itself, and in half precision on a CPU, where it would cost 17 %.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or half_on_cpu(of):
        return product_of(of)
    out: Tensor = checkpoint(product_of, of, use_reentrant=False, preserve_rng_state=False)
    return out


def explicit_attention_is_faster(hidden: Tensor) -> bool:
    """Whether attention as two products and a softmax is faster than torch's fused attention for these tokens."""
    least = FUSED_FROM_IN_HALF if half_on_cpu(hidden) and torch.is_grad_enabled() else FUSED_FROM
    return hidden.device.type == "cpu" and hidden.shape[1] < least


def half_on_cpu(hidden: Tensor) -> bool:
    return hidden.device.type == "cpu" and torch.is_autocast_enabled("cpu")


def weights(query: Tensor, key: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)), [batch, heads, queries, keys]."""
    unused, scale = query.new_empty(()), query.shape[-1] ** -0.5  # a product that scales saves a pass over the queries
    logits = torch.baddbmm(unused, query.flatten(0, 1), key.flatten(0, 1).mT, beta=0, alpha=scale)
    return logits.softmax(dim=-1).view(*query.shape[:3], -1)
