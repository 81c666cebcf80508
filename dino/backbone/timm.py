"""Any model of the timm library (an extra: `pip install timm`)."""

from difflib import get_close_matches
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from dino.runtime.refused import one_line


class Timm(nn.Module):
    """timm's model of that name without its classifier, pooled as timm pools it.

    options go to timm.create_model (drop_path_rate=0.1, img_size=64, ...). Models that can take images of any size
    when told so (dynamic_img_size) are told so: ViTs then take multiples of their patch size. Some (Swin, for one) take
    only the size that they were made for.
    Raises ValueError for a name that timm does not know, ImportError where timm is not installed, FileNotFoundError
    where the pretrained weights are not to be had.

    `.normalisation`: mean and std of the images that timm's weights were trained on; empty with random weights.
    """

    def __init__(self, model_name: str, pretrained: bool = False, **options: Any) -> None:
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ImportError(
                f"Timm: backbone {model_name} needs the timm package, which is not installed: pip install timm"
            ) from error
        if ":" not in model_name and not timm.is_model(model_name):  # hf-hub:... and local-dir:... are timm's to judge
            nearest = get_close_matches(model_name, timm.list_models(), n=3)
            hint = f"Did you mean {' or '.join(nearest)}?" if nearest else "timm.list_models() lists the names."
            raise ValueError(f"Timm: model_name must be a model of timm, got {model_name!r}. {hint}")
        options = {"pretrained": pretrained, "num_classes": 0, **options}
        try:
            try:
                self.network: Any = timm.create_model(model_name, **{"dynamic_img_size": True, **options})
            except TypeError:  # a convolutional network knows no such option
                self.network = timm.create_model(model_name, **options)
        except (OSError, RuntimeError) as error:  # no network, no such weights
            if not pretrained:
                raise
            raise FileNotFoundError(
                f"Timm: no pretrained weights of {model_name} are to be had ({one_line(error)[:200]}). "
                "Connect to a network once, or set backbone.pretrained=false."
            ) from error
        # The width of the features: some models (MobileNet-V3) have one more layer between the last map and them.
        self.output_dim: int = getattr(self.network, "head_hidden_size", self.network.num_features)
        known = self.network.pretrained_cfg if pretrained else {}
        self.normalisation = {key: tuple(known[key]) for key in ("mean", "std") if key in known}

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch {self.output_dim}"]:
        """The pooled features."""
        features: Tensor = self.network(images)
        return features
