"""The images of a run, and the batches that they make."""

import functools
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from dino.augmentation import DINOTransform, EvalTransform
from dino.dataset.cache import Images
from dino.loading.batches import Steps, TrainLoader
from dino.loading.sampler import Batching
from dino.loading.views import Loading


@dataclass
class Data:
    """Both splits, the transforms, and the order of the training images."""

    train_set: Images
    val_set: Images
    transform: DINOTransform
    eval_size: int  # pixels
    batching: Batching
    steps_per_epoch: int
    total_steps: int
    loading: Loading
    broken: set[str] = field(default_factory=set)  # a sentence for each image that could not be read so far

    def steps(self, start: int, end: int | None = None) -> Steps:
        """The steps from `start` to `end`; None: to the end of the run."""
        end = self.total_steps if end is None else end
        return Steps(self.train_set, self.transform, self.batching, start, end, self.loading, self.broken)

    @functools.cached_property
    def train_loader(self) -> TrainLoader:
        """The same batches as `steps`, an epoch at a time: for a loop of one's own."""
        endless = functools.partial(self.steps, end=sys.maxsize)
        return TrainLoader(endless, self.steps_per_epoch, self.batching.accumulation)

    @property
    def eval_transform(self) -> EvalTransform:
        return EvalTransform(self.eval_size, self.transform.mean, self.transform.std)

    @property
    def identity(self) -> dict[str, Any]:
        """Number and fingerprint of the training images; a resume must find the same."""
        return {"number": len(self.train_set), "fingerprint": getattr(self.train_set, "fingerprint", None)}

    @property
    def images_by_class(self) -> dict[str, int]:
        """How many training images each class has; {} where labels are missing, or unknown until an image is read."""
        labels, classes = getattr(self.train_set, "labels", None), self.train_set.classes
        return {} if labels is None or classes is None else dict(Counter(classes[i] for i in labels))

    def name_of(self, index: int) -> str:
        """A training image in words, for messages."""
        name = getattr(self.train_set, "name", None)
        return f"{index} ({name(index)})" if callable(name) else str(index)
