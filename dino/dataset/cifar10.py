"""CIFAR-10: 50,000 train and 10,000 val images of 32 x 32 pixels in ten classes."""

import warnings
from pathlib import Path

import torch
import torchvision
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from dino.dataset import check_split
from dino.dataset.download import download as download_whole

FOLDER = "cifar-10-batches-py"


class CIFAR10(Dataset[tuple[Tensor, int]]):
    """`root/cifar-10-batches-py`, downloaded by torchvision where it is missing; val is CIFAR's test set.

    torchvision checks the files' checksums, here and after a download, so a broken copy is noticed.
    """

    def __init__(self, root: str | Path, split: str, download: bool = True) -> None:
        check_split(split)
        root = Path(root).expanduser()
        if not (root / FOLDER).is_dir():
            if not download:
                raise FileNotFoundError(
                    f"CIFAR10: dataset.root={root} has no folder {FOLDER}. Set dataset.root to the folder that holds "
                    "it, or allow the download with dataset.train.download=true."
                )
            download_whole("CIFAR10", root, FOLDER, lambda to: torchvision.datasets.CIFAR10(to, download=True))
        try:
            with warnings.catch_warnings():
                # The files were pickled by a numpy of Python 2, and say so in a way that numpy 2.4 warns of.
                warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
                files = torchvision.datasets.CIFAR10(root, train=split == "train")
        except RuntimeError as error:
            raise FileNotFoundError(
                f"CIFAR10: {root / FOLDER} is incomplete or broken. Remove it to have it downloaded again, or set "
                "dataset.root to a whole copy."
            ) from error
        self.classes: list[str] = files.classes
        self.pixels = torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous()
        self.labels: list[int] = files.targets

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 32 32"], int]:
        return self.pixels[index], self.labels[index]
