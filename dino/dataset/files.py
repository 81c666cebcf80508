"""Image files on disk with a label each: what every data set that reads folders comes down to."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension


def is_image(name: str) -> bool:
    # "._x.jpg" and the like are an operating system's notes, not images.
    return not name.startswith(".") and has_file_allowed_extension(name, IMG_EXTENSIONS)


def subfolders(*folders: Path) -> list[str]:
    """Names of the folders in `folders`, each once, sorted, without the hidden ones (.ipynb_checkpoints, ...). A folder
    that does not exist has none."""
    inside = (path for folder in folders if folder.is_dir() for path in folder.iterdir())
    return sorted({path.name for path in inside if not path.name.startswith(".") and path.is_dir()})


def images_under(folder: Path) -> list[str]:
    """Every image file below `folder` at any depth, sorted by path; links are followed, hidden folders are not."""
    found: list[str] = []
    for parent, inside, names in os.walk(folder, followlinks=True):
        inside[:] = [name for name in inside if not name.startswith(".")]
        found += [os.path.join(parent, name) for name in names if is_image(name)]  # noqa: PTH118 - a million Paths take seconds
    return sorted(found)


def images_by_class(*folders: Path) -> dict[str, list[str]]:
    """Images of each class folder that has some, classes sorted; a class may be spread over several of `folders`."""
    images = {
        name: [path for folder in folders for path in images_under(folder / name)] for name in subfolders(*folders)
    }
    return {name: paths for name, paths in images.items() if paths}


def labelled(images: Mapping[str, Sequence[str]], classes: Sequence[str]) -> list[tuple[str, int]]:
    """(path, label) of each image, a label being the place of its class in `classes`."""
    label = {name: i for i, name in enumerate(classes)}
    return [(path, label[name]) for name, paths in images.items() for path in paths]


class ImageFiles(Dataset[tuple[Image.Image, int]]):
    """Decodes to PIL RGB on demand. Raises ValueError, naming the file, where one cannot be decoded."""

    def __init__(self, samples: Sequence[tuple[str, int]], classes: list[str] | None) -> None:
        self.classes = classes
        # Arrays, not lists: reading a list's items counts references, which makes each worker process copy its pages.
        self.paths = np.array([os.fsencode(path) for path, _ in samples])
        self.labels = np.array([label for _, label in samples])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path = os.fsdecode(self.paths[index])
        try:
            with Image.open(path) as image:
                return image.convert("RGB"), int(self.labels[index])
        except FileNotFoundError:
            raise
        except (OSError, SyntaxError) as error:  # SyntaxError is PIL's word for a broken PNG
            raise ValueError(
                f"{path}: expected an image, PIL cannot decode it ({error}). Repair or remove it."
            ) from error
