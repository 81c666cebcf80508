"""What can be measured of a frozen network on the train and val images of one data set, each by its name."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dino.augmentation import DINOTransform, EvalTransform, collate_multi_crop, image_tensor
from dino.dataset.cache import Images
from dino.evaluator import probe, unsupervised
from dino.evaluator.bench import Bench
from dino.evaluator.features import Features, RawPixels, batches, calibrate, features_of, frozen, kept
from dino.evaluator.finetune import Recipe, finetune
from dino.evaluator.neighbours import knn_accuracies
from dino.loading.broken import first_readable
from dino.runtime.refused import Refused

VIT_B = 768  # its width
SHORT = Recipe(epochs=20)  # a check of the features as a start, not a record
MOST_PAIRS = 2000  # images of which two views are compared: the share is then known to about 2 %


class Probed(nn.Module):
    """What the linear probe reads. Of a ViT, these are the CLS tokens of the last `layers` blocks and, with
    `patch_mean`, the mean of the last block's patches; of any other backbone, its features.

    None is the choice of the authors' eval_linear.py: 4 blocks without the mean for ViT-S, 1 block with it for ViT-B.
    """

    def __init__(self, backbone: Any, layers: int | None = None, patch_mean: bool | None = None) -> None:
        super().__init__()
        large = int(backbone.output_dim) >= VIT_B
        self.layers = layers if layers is not None else 1 if large else 4
        self.patch_mean = large if patch_mean is None else patch_mean
        self.backbone = backbone
        self.of_vit = hasattr(backbone, "last_tokens")

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        if not self.of_vit:
            features: Tensor = self.backbone(images)
            return features
        of_layers = self.backbone.last_tokens(images, self.layers)
        parts = [tokens[:, 0] for tokens in of_layers]
        if self.patch_mean:
            parts.append(of_layers[-1][:, 1:].mean(dim=1))
        return torch.cat(parts, dim=1)

    def own(self, probed: Features) -> Features:
        """The features of the backbone itself, which stand among those that the probe reads."""
        if not self.of_vit:
            return probed
        width = int(self.backbone.output_dim)
        end = probed.rows.shape[1] - width * self.patch_mean  # the last CLS token's
        return Features(probed.rows[:, end - width : end], probed.labels)


@dataclass(frozen=True)
class MeasureSettings:
    """How each measure is taken. None: as Probed chooses by the backbone's width."""

    ks: Sequence[int] = (10, 20, 100, 200)  # neighbours; authors' code, --nb_knn
    temperature: float = 0.07  # of the k-NN's weights; authors' code
    layers: int | None = None  # last blocks that the linear probe reads
    patch_mean: bool | None = None  # whether it reads the mean of the patches too
    few_shot: Sequence[float] = (0.01, 0.1)  # shares of the labels
    probe_epochs: int = 100  # authors' code
    finetuning: Recipe = SHORT
    seed: int = 0


@dataclass(frozen=True)
class Measures:
    """`kept_in` is the folder of the features, which are computed once per network.

    `augmentation` makes the two views that are compared; its global views should be of the bench's size.
    """

    bench: Bench
    augmentation: DINOTransform
    kept_in: Path
    settings: MeasureSettings = MeasureSettings()

    @property
    def data(self) -> dict[str, Images]:
        return self.bench.splits

    @property
    def transform(self) -> EvalTransform:
        return self.bench.transform

    @property
    def device(self) -> torch.device:
        return self.bench.device

    @property
    def labelled(self) -> bool:
        return self.bench.labelled

    def of(self, name: str, backbone: nn.Module, wanted: Sequence[str]) -> dict[str, float]:
        """Each of `wanted` (knn, linear, logistic, few_shot, finetune, unsupervised) that these images allow."""
        wanted = [measure for measure in wanted if self.labelled or measure == "unsupervised"]
        how, found = self.settings, dict[str, float]()
        network = Probed(backbone.to(self.device), how.layers, how.patch_mean)
        wide = {split: self.features(name, network, split) for split in self.data}
        train, val = network.own(wide["train"]), network.own(wide["val"])
        if "knn" in wanted:
            queries = (val.rows.to(self.device), val.labels)
            found |= knn_accuracies(train, queries, how.ks, how.temperature)
        if "linear" in wanted:
            found |= probe.linear_probe(
                wide["train"],
                wide["val"],
                len(self.bench.train.classes or ()),
                epochs=how.probe_epochs,
                seed=how.seed,
                device=self.device,
            )
        if "logistic" in wanted:
            found |= probe.logistic_regression(train, val, seed=how.seed)
        for share in how.few_shot if "few_shot" in wanted else ():
            found |= probe.few_shot(train, val, share, seed=how.seed)
        if "finetune" in wanted and not isinstance(backbone, RawPixels):
            found |= finetune(backbone, self.bench, how.finetuning, how.seed, bar=f"{name}, fine-tuning")
        if "unsupervised" in wanted:
            found |= {"rankme": unsupervised.rankme(train.rows), "alpha": unsupervised.alpha_req(train.rows)}
            views = self.two_views(backbone)
            found |= unsupervised.view_consistency(*views, k=min(20, len(views[0]) - 1), seed=how.seed)
        return found

    def features(self, name: str, network: Probed, split: str) -> Features:
        """Without the images that cannot be read. Raises Refused where none can."""
        data, transform = self.data[split], self.transform

        def make() -> Features:
            found = features_of(
                network,
                data,
                transform,
                self.device,
                self.bench.autocast,
                self.bench.batch_size,
                self.bench.num_workers,
                self.bench.broken,
                bar=f"{name}, {split}",
            )
            return Features(found.rows.cpu(), found.labels.cpu())

        depends_on = {
            "images": [split, type(data).__name__, len(data), fingerprint_of(data)],
            "transform": [transform.size, transform.mean, transform.std],
            "network": [str(network), network.layers, network.patch_mean, self.bench.precision],
        }
        found = kept(self.kept_in, depends_on, network, make).read()
        if not len(found.labels):
            raise Refused(f"none of the {len(data)} {split} images can be read; give others.")
        return found

    def untrained(self, backbone: nn.Module) -> nn.Module:
        """`backbone`, which has learned nothing, with batch norms that know the images."""
        shuffled = batches(self.bench.train, self.transform, self.bench.batch_size, self.device, shuffle=True)
        images = (self.transform.normalise(images) for images, *_ in shuffled)
        return calibrate(backbone.to(self.device), images, self.bench.autocast)

    def two_views(self, backbone: nn.Module) -> tuple[Float[Tensor, "images dim"], Float[Tensor, "images dim"]]:
        """Features of two global views, as in training, of up to MOST_PAIRS val images."""
        data, batch_size, seed = self.bench.val, self.bench.batch_size, self.settings.seed
        some = range(0, len(data), -(-len(data) // MOST_PAIRS))
        features: list[list[Tensor]] = [[], []]
        for start in range(0, len(some), batch_size):
            crops = []
            for index in some[start : start + batch_size]:
                (image, label), _ = first_readable(data.__getitem__, index, len(data))
                crops.append((self.augmentation.crop(image, np.random.default_rng([seed, index])), label))
            views = [view.to(self.device) for view in collate_multi_crop(crops)[0]]
            augmented = self.augmentation.augment(views, [seed], start)
            for of_view, view in zip(features, augmented[: self.augmentation.n_global_crops], strict=True):
                with frozen(backbone), self.bench.autocast():
                    of_view.append(backbone(view).float().cpu())
        return torch.cat(features[0]), torch.cat(features[1])


def fingerprint_of(data: Images) -> str:
    """A hash that tells images from others: of their names, if they have any, and of the first and the last image."""
    digest = hashlib.sha256(str(getattr(data, "fingerprint", None)).encode())
    for index in (0, len(data) - 1):
        (image, label), _ = first_readable(data.__getitem__, index, len(data))
        digest.update(f"{label} ".encode() + image_tensor(image).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
