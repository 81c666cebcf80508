"""What a vision transformer looks at: attention of the CLS token, and its patch tokens in three colours."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dino.evaluator.features import frozen


def has_attention(backbone: nn.Module) -> bool:
    return hasattr(backbone, "attention")


def has_tokens(backbone: nn.Module) -> bool:
    return hasattr(backbone, "tokens")


def attention_maps(
    backbone: nn.Module, images: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch heads rows columns"]:
    """How the CLS token of the last layer looks at the patches (DINO, Fig. 1 and 3); images normalised, of any size.

    A map sums to 1 less what the token gives itself. Raises ValueError for a backbone without `attention`.
    """
    if not has_attention(backbone):
        raise ValueError(
            f"attention_maps: {type(backbone).__name__} has no attention; expected a ViT. Look at its tokens."
        )
    with frozen(backbone):
        weights: Tensor = backbone.attention(images)[:, :, 0, 1:].float()  # type: ignore[operator]
    return weights.reshape(*weights.shape[:2], *grid_of(weights.shape[-1], *images.shape[-2:]))


def patch_tokens(
    backbone: nn.Module, images: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch rows columns dim"]:
    """Features of each patch after the last layer (a ResNet's: each place of the last map); images normalised.

    Raises ValueError for a backbone without `tokens`.
    """
    if not has_tokens(backbone):
        raise ValueError(f"patch_tokens: {type(backbone).__name__} has no tokens(images); expected a ViT or a ResNet.")
    with frozen(backbone):
        tokens: Tensor = backbone.tokens(images)[:, 1:].float()  # type: ignore[operator]
    return tokens.reshape(len(tokens), *grid_of(tokens.shape[1], *images.shape[-2:]), -1)


def grid_of(patches: int, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of that many square patches on an image of height x width pixels.

    A patch larger by a pixel never makes more rows or columns, so that one number of patches means one grid; but some
    backbones drop the rest at the border and others do not.
    """
    for round_up in (0, 1):
        for side in range(1, max(height, width) + 1):
            rows, columns = ((length + round_up * (side - 1)) // side for length in (height, width))
            if rows * columns == patches:
                return rows, columns
    raise ValueError(f"grid_of: {patches} square patches do not cover an image of {height} x {width} pixels.")


def mass_mask(maps: Float[Tensor, "*batch rows columns"], mass: float = 0.6) -> Bool[Tensor, "*batch rows columns"]:
    """The patches with the most attention that hold `mass` of a map's sum (DINO, Fig. 4: 0.6)."""
    if not 0 < mass <= 1:
        raise ValueError(f"mass_mask: mass must be a fraction above 0 and at most 1, got {mass}.")
    values, order = maps.flatten(-2).sort(dim=-1)  # the smallest first
    below = values.cumsum(-1) / values.sum(-1, keepdim=True)
    kept = below > 1 - mass
    return torch.zeros_like(kept).scatter_(-1, order, kept).view(maps.shape)


def pca_rgb(
    tokens: Float[Tensor, "images rows columns dim"], foreground: Bool[Tensor, "images rows columns"] | None = None
) -> Float[Tensor, "images rows columns 3"]:
    """`principal_colours` of all the images together, so that the same colour means the same in each."""
    chosen = None if foreground is None else foreground.flatten()
    return principal_colours(tokens.flatten(0, 2), chosen).view(*tokens.shape[:3], 3)


def principal_colours(
    tokens: Float[Tensor, "tokens dim"], foreground: Bool[Tensor, " tokens"] | None = None
) -> Float[Tensor, "tokens 3"]:
    """The first three principal components as red, green and blue in [0, 1] (DINOv2, arXiv 2304.07193, Fig. 1).

    Each is stretched over its range, but for 1 % at either end. Of the foreground alone, where that is given, and the
    rest is black. A component that there is none of is 0.5.
    """
    from sklearn.decomposition import PCA

    kept = torch.ones(len(tokens), dtype=torch.bool) if foreground is None else foreground.cpu()
    colours = torch.zeros(len(tokens), 3)
    points = tokens.detach().cpu().double().numpy()[kept.numpy()]
    if len(points):
        components = min(3, *points.shape)
        if np.ptp(points, axis=0).max() > 0:
            values = PCA(components, random_state=0).fit_transform(points)
        else:
            values = np.zeros((len(points), components))  # all alike
        low, high = np.quantile(values, (0.01, 0.99), axis=0)
        stretched = np.full((len(points), 3), 0.5)
        varies = np.flatnonzero(high - low > 1e-9 * max(1e-300, np.abs(points).max()))
        stretched[:, varies] = ((values - low) / np.where(high > low, high - low, 1))[:, varies].clip(0, 1)
        colours[kept] = torch.from_numpy(stretched).float()
    return colours.to(tokens.device)


# ---- the command ----------------------------------------------------------------------------------------------------
