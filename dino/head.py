"""The projection head between the backbone's features and the K outputs that student and teacher compare."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class Factors(NamedTuple):
    """The two factors of the logits: `logits = bottleneck @ weight.T`. Much smaller than the logits when K is large."""

    bottleneck: Float[Tensor, "samples bottleneck"]
    weight: Float[Tensor, "outputs bottleneck"]


class DinoProjectionHead(nn.Module):
    """MLP with GELU, a bottleneck, L2 norm, and a weight-normalised last layer (arXiv 2104.14294, Appendix C).

    num_layers counts the Linear layers up to and with the bottleneck; with 1 there is no hidden layer.
    use_bn: batch norm after each hidden Linear. The paper's ViT head has none; short runs collapse without it.
    norm_last_layer: the rows of the last layer keep norm 1, so that the outputs are cosines in [-1, 1]; else the
    norms start at 1 and are trained.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int = 1024,
        bottleneck_dim: int = 256,
        output_dim: int = 2048,
        num_layers: int = 3,
        use_bn: bool = False,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        sizes = {
            "input_dim": input_dim,
            "hidden_dim": hidden_dim,
            "bottleneck_dim": bottleneck_dim,
            "output_dim": output_dim,
            "num_layers": num_layers,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"DinoProjectionHead: {name} must be at least 1, got {size}.")

        self.input_dim = input_dim
        self.output_dim = output_dim
        layers: list[nn.Module] = []
        for _ in range(num_layers - 1):
            layers.append(nn.Linear(input_dim, hidden_dim))
            if use_bn:
                layers.append(nn.BatchNorm1d(hidden_dim))
            layers.append(nn.GELU())
            input_dim = hidden_dim
        self.mlp = nn.Sequential(*layers, nn.Linear(input_dim, bottleneck_dim))
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

        # weight = original0 (the norm of each row) * original1 / |original1|. As in the authors' code the direction
        # keeps torch's default for a Linear.
        self.last_layer = weight_norm(nn.Linear(bottleneck_dim, output_dim, bias=False))
        norms = self.last_layer.parametrizations.weight.original0
        nn.init.ones_(norms)
        norms.requires_grad_(not norm_last_layer)

    def compile(self, **options: Any) -> None:
        self.mlp.compile(**options)

    def forward(self, features: Float[Tensor, "batch {self.input_dim}"]) -> Float[Tensor, "batch {self.output_dim}"]:
        """Logits, before any temperature or centering."""
        return F.linear(*self.factors(features))

    def factors(self, features: Float[Tensor, "batch {self.input_dim}"]) -> Factors:
        """The same before the last product, which the loss then computes for some images at a time."""
        bottleneck, weight = F.normalize(self.mlp(features), dim=-1), self.last_layer.weight
        if torch.is_autocast_enabled(features.device.type):  # once, not again for each part of the loss
            dtype = torch.get_autocast_dtype(features.device.type)
            bottleneck, weight = bottleneck.to(dtype), weight.to(dtype)
        return Factors(bottleneck, weight)
