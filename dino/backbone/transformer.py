"""What the vision transformers share: pre-norm blocks, and what is read off them."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar, overload

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Number of tokens from which torch's fused attention is faster on a CPU. In fp32 it is 10 to 40 % slower at 17 and 37
# tokens and 20 % faster at 197; its gradients in half precision take twice as long at 197, and as long at 785.
FUSED_FROM, FUSED_FROM_IN_HALF = 128, 768
# Where all image sizes go through a block at once. A GPU has fewer kernels to wait for; a CPU's caches hold one size at
# a time (`vit_tiny` takes 7 % longer at once).
AT_ONCE_ON = {"cuda"}


# (images, tokens of each) of every image size in a batch. The tokens of all sizes lie one after another in one tensor,
# so that a norm or a product is one operation whatever the number of sizes, and a compiled block one graph.
Shapes = tuple[tuple[int, int], ...]
Rows = Float[Tensor, "_ _"]
Branch = Callable[[Tensor, Shapes], Tensor]
Forward = TypeVar("Forward", bound=Callable[..., Any])


def takes_several_sizes(forward: Forward) -> Forward:
    """Marks a backbone's `forward` that takes a list, too: a batch of each image size. One that overrides it is not."""
    forward.several_sizes = True  # type: ignore[attr-defined]
    return forward


class Transformer(nn.Module):
    """Blocks and a final norm behind `embed`, which a child defines: images to tokens [batch, 1 + patches, dim].

    drop_path: stochastic depth of the last block, the probability that an image skips a residual branch. It rises
        linearly from 0 in the first block.
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
        rates = (drop_path * i / max(1, depth - 1) if drop_path else None for i in range(depth))
        self.blocks = nn.ModuleList(Block(hidden_dim, heads, rate, eps) for rate in rates)
        self.norm = nn.LayerNorm(hidden_dim, eps)

    def embed(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    @overload
    def forward(self, images: Tensor) -> Tensor: ...
    @overload
    def forward(self, images: Sequence[Tensor]) -> list[Tensor]: ...
    @takes_several_sizes
    def forward(
        self, images: Float[Tensor, "batch 3 height width"] | Sequence[Float[Tensor, "_ 3 _ _"]]
    ) -> Float[Tensor, "batch {self.output_dim}"] | list[Float[Tensor, "_ {self.output_dim}"]]:
        """The CLS token after the final norm; the last block computes no other (a twelfth of ViT-S saved).

        Batches of several image sizes, as a list, give a list: on a GPU they go through the blocks at once.
        """
        if not isinstance(images, Tensor) and images[0].device.type not in AT_ONCE_ON:
            return [self.forward(of_one_size) for of_one_size in images]
        rows, shapes = self._embedded([images] if isinstance(images, Tensor) else images)
        for i, block in enumerate(self.blocks, start=1):
            rows = self._through(block, rows, shapes, cls_only=i == len(self.blocks))
        features = list(torch.split(self.norm(rows), [batch for batch, _ in shapes]))
        return features[0] if isinstance(images, Tensor) else features

    def tokens(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens {self.output_dim}"]:
        """All tokens after the final norm: CLS, then the patches row by row."""
        return self.last_tokens(images, 1)[0]

    def last_tokens(
        self, images: Float[Tensor, "batch 3 height width"], layers: int
    ) -> list[Float[Tensor, "batch tokens {self.output_dim}"]]:
        """As `tokens`, after each of the last `layers` blocks, all through the final norm; of the last block last."""
        (rows, shapes), kept = self._embedded([images]), list[Tensor]()
        for block in self.blocks:
            rows = self._through(block, rows, shapes)
            kept = [*kept, rows][-layers:]
        return [self.norm(rows).view(*shapes[0], -1) for rows in kept]

    def attention(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch heads tokens tokens"]:
        """Attention of the last block, from each token (a row, which sums to 1) to every token; CLS first."""
        rows, shapes = self._embedded([images])
        *before, last = self.blocks
        for block in before:
            rows = self._through(block, rows, shapes)
        weights: Tensor = last.attention_weights(rows, *shapes[0])  # type: ignore[operator]
        return weights

    def _embedded(self, images: Sequence[Tensor]) -> tuple[Rows, Shapes]:
        tokens = [self.embed(of_one_size) for of_one_size in images]
        rows = joined([of_one_size.flatten(0, 1) for of_one_size in tokens])
        if rows.is_cuda and torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16:
            rows = rows.bfloat16()  # the residual stream: half the memory traffic, a step of ViT-S/16 is 5 % faster
        return rows, tuple((len(of_one_size), of_one_size.shape[1]) for of_one_size in tokens)

    def _through(self, block: nn.Module, rows: Rows, shapes: Shapes, cls_only: bool = False) -> Rows:
        if self.gradient_checkpointing and self.training:
            rows = checkpoint(block, rows, shapes, cls_only, use_reentrant=False)
        else:
            rows = block(rows, shapes, cls_only)
        return rows


class Block(nn.Module):
    """Attention, then an MLP, each behind a norm and added to the stream.

    drop_path: stochastic depth (arXiv 1603.09382): in training each residual branch is left out of an image with this
    probability, and else scaled by 1 / (1 - drop_path). None: never. On a CPU the images left out are not computed;
    elsewhere, and compiled, their branch is multiplied by 0: shapes stay static, and as `rate` is a buffer, all blocks
    share one compiled graph.
    """

    rate: Tensor | None

    def __init__(self, hidden_dim: int, heads: int, drop_path: float | None = None, eps: float = 1e-5) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(hidden_dim, eps)
        self.qkv = nn.Linear(hidden_dim, 3 * hidden_dim)
        self.projection = nn.Linear(hidden_dim, hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim, eps)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_dim, 4 * hidden_dim), nn.GELU(), nn.Linear(4 * hidden_dim, hidden_dim)
        )
        self.drop_path = drop_path or 0.0
        self.register_buffer("rate", None if drop_path is None else torch.tensor(drop_path), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, rows: Rows, shapes: Shapes, cls_only: bool = False) -> Rows:
        """The tokens of `shapes` to the same; with `cls_only` to the first token of each image alone."""
        stream, kept = (first_tokens(rows, shapes), one_token(shapes)) if cls_only else (rows, shapes)
        stream = self._add(stream, kept, lambda of, its: self._attend(of, its, cls_only), rows, shapes)
        return self._add(stream, kept, lambda of, _: self._widen(of), stream, kept)

    def attention_weights(self, rows: Rows, batch: int, tokens: int) -> Float[Tensor, "batch heads tokens tokens"]:
        query, key, _ = self._heads(self._qkv(rows), batch, tokens)
        return weights(query, key)

    def _add(self, stream: Rows, shapes: Shapes, branch: Branch, of: Rows, its: Shapes) -> Rows:
        """`stream`, of `shapes`, with what `branch` makes of the rows `of`, which are of the shapes `its`."""
        if self.rate is None or not self.training:
            return stream + branch(of, its)
        taken = [torch.rand(batch, device=stream.device) >= self.rate for batch, _ in shapes]
        if stream.device.type == "cpu" and not torch.compiler.is_compiling():
            some = tuple((int(take.sum()), tokens) for take, (_, tokens) in zip(taken, its, strict=True))
            added = branch(of.index_select(0, rows_of(taken, its)), some).to(stream.dtype)
            return stream.index_add(0, rows_of(taken, shapes), added, alpha=1 / (1 - float(self.rate)))
        scales = [
            (take / (1 - self.rate)).repeat_interleave(tokens) for take, (_, tokens) in zip(taken, shapes, strict=True)
        ]
        return stream + branch(of, its) * joined(scales)[:, None].to(stream.dtype)

    def _widen(self, rows: Rows) -> Rows:
        wide = recompute_inner(lambda of: self.mlp[0](self.norm2(of)), rows)
        return recompute_inner(lambda of: self.mlp[2](self.mlp[1](of)), wide)

    def _attend(self, rows: Rows, shapes: Shapes, cls_only: bool) -> Rows:
        of_sizes = torch.split(self._qkv(rows), [batch * tokens for batch, tokens in shapes])
        mixed = [self._mix(qkv, batch, tokens, cls_only) for qkv, (batch, tokens) in zip(of_sizes, shapes, strict=True)]
        added: Tensor = self.projection(joined(mixed))
        return added

    def _mix(self, qkv: Rows, batch: int, tokens: int, cls_only: bool) -> Rows:
        two_products = explicit_attention_is_faster(qkv, tokens)
        of_heads = self._heads(qkv, batch, tokens)
        query, key, value = (
            of_heads.contiguous() if two_products else of_heads
        )  # else each product copies what it takes
        if cls_only:
            query = query[:, :, :1]
        mixed = weights(query, key) @ value if two_products else F.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1)

    def _qkv(self, rows: Rows) -> Rows:
        return recompute_inner(lambda of: self.qkv(self.norm1(of)), rows)

    def _heads(self, qkv: Rows, batch: int, tokens: int) -> Float[Tensor, "3 batch heads tokens dim"]:
        """Queries, keys and values."""
        return qkv.view(batch, tokens, 3, self.heads, qkv.shape[1] // (3 * self.heads)).permute(2, 0, 3, 1, 4)


def first_tokens(rows: Rows, shapes: Shapes) -> Rows:
    of_sizes = torch.split(rows, [batch * tokens for batch, tokens in shapes])
    return joined([of.view(*shape, rows.shape[1])[:, 0] for of, shape in zip(of_sizes, shapes, strict=True)])


def one_token(shapes: Shapes) -> Shapes:
    return tuple((batch, 1) for batch, _ in shapes)


def rows_of(taken: Sequence[Bool[Tensor, " _"]], shapes: Shapes) -> Int[Tensor, " _"]:
    """Where the tokens of the images that are taken lie."""
    of_tokens = [take.repeat_interleave(tokens) for take, (_, tokens) in zip(taken, shapes, strict=True)]
    return joined(of_tokens).nonzero()[:, 0]


def joined(tensors: list[Tensor]) -> Tensor:
    """torch.cat, without the copy where there is nothing to join."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def recompute_inner(product_of: Callable[[Tensor], Tensor], of: Tensor) -> Tensor:
    """Runs `product_of(of)` (a norm or GELU, then a Linear), and recomputes the norm or GELU in the backward pass
    instead of storing its output.

    No product is computed twice. A block keeps a third less, and takes 1 % more time (ViT-S/16 in fp32 on a CPU). Off
    in a compiled model, whose compiler decides for itself, in half precision, where it would cost 17 % on a CPU, and on
    a GPU, which would wait for the Python that it takes.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or of.device.type != "cpu" or half_on_cpu(of):
        return product_of(of)
    out: Tensor = checkpoint(product_of, of, use_reentrant=False, preserve_rng_state=False)
    return out


def explicit_attention_is_faster(rows: Tensor, tokens: int) -> bool:
    """Whether attention as two products and a softmax is faster than torch's fused attention of so many tokens."""
    least = FUSED_FROM_IN_HALF if half_on_cpu(rows) and torch.is_grad_enabled() else FUSED_FROM
    return rows.device.type == "cpu" and tokens < least


def half_on_cpu(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and torch.is_autocast_enabled("cpu")


def weights(query: Tensor, key: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)), [batch, heads, queries, keys]."""
    unused, scale = query.new_empty(()), query.shape[-1] ** -0.5  # a product that scales saves a pass over the queries
    logits = torch.baddbmm(unused, query.flatten(0, 1), key.flatten(0, 1).mT, beta=0, alpha=scale)
    return logits.softmax(dim=-1).view(*query.shape[:3], key.shape[2])


def resized(positions: Float[Tensor, "1 dim _ _"], rows: int, columns: int) -> Float[Tensor, "1 dim {rows} {columns}"]:
    """Learned positions for another grid, bicubic as F.interpolate.

    Interpolation is linear and works on each axis alone, so it is a product with a matrix on either side: what
    F.interpolate makes of the unit matrix. Unlike F.interpolate's, the gradient of a product is the same each time on a
    GPU.
    """
    whole = nullcontext() if positions.is_meta else torch.autocast(positions.device.type, enabled=False)
    with whole:  # not in half precision
        return of_axis(positions, rows).mT @ positions @ of_axis(positions.mT, columns)


def of_axis(positions: Tensor, to: int) -> Float[Tensor, "_ {to}"]:
    """What each place on the next to last axis gives to each of `to` places."""
    places = positions.shape[-2]
    unit = torch.eye(places, dtype=positions.dtype, device=positions.device)
    return F.interpolate(unit[None, None], size=(places, to), mode="bicubic")[0, 0]
