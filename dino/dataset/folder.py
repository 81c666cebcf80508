"""Your own images: a folder, with or without class folders in it."""

from pathlib import Path

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from dino.dataset import check_split, part_of
from dino.dataset.encoded import EXTENSIONS
from dino.dataset.files import ImageFiles, images_by_class, labelled
from dino.dataset.index import Files, find_images

Chosen = tuple[Int[ndarray, " images"], Int[ndarray, " images"], list[str] | None]  # which files, labels, classes


def classes_in(files: Files) -> list[str]:
    """The class folders with images, or none where the files are not sorted into classes: images lie beside the
    sub-folders, or all lie in one sub-folder, which tells nothing apart."""
    classes = [name for name, count in images_by_class(files).items() if count]
    return classes if len(classes) > 1 and "" not in classes else []


class Folder(ImageFiles):
    """What `root` holds is found by looking:

    - `root/train` and `root/val`: these are the splits; with class folders in both, they give the labels.
    - class folders (two sub-folders or more, and no image beside them): labelled. Every tenth image, in the order of
      class and path, is held out as val.
    - anything else: all images below `root`, at any depth, unlabelled (`classes` None, labels -1). Nothing is
      held out, since there is nothing to test: val is every tenth image, to watch the features by.

    `root/train` without `root/val` is treated as if it were `root`.
    """

    def __init__(self, root: str | Path | None, split: str) -> None:
        check_split(split)
        if root is None:
            raise ValueError("Folder: no folder given. Set dataset.root to the folder that holds the images.")
        root = Path(root).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"Folder: dataset.root={root} is not a folder. Set it to one that holds images.")
        whole = [top for top in ("train", "val") if (root / top).is_dir()] != ["train", "val"]
        files = find_images(root, ("train" if (root / "train").is_dir() else "") if whole else split)
        chosen, labels, classes = self._whole(files, split) if whole else self._split(root, files, split)
        if not len(chosen):
            raise FileNotFoundError(
                f"Folder: found no images for {split} in dataset.root={root}. Expected image files "
                f"({', '.join(EXTENSIONS)}), at best 10 or more, in class folders or not; set dataset.root to a folder "
                "that has them."
            )
        super().__init__(files, chosen, labels, classes)

    @staticmethod
    def _split(root: Path, files: Files, split: str) -> Chosen:
        both = classes_in(files), classes_in(find_images(root, "val" if split == "train" else "train"))
        if not all(both):
            return np.arange(len(files.names)), np.full(len(files.names), -1), None
        classes = sorted({*both[0], *both[1]})
        return *labelled(files, classes), classes

    @staticmethod
    def _whole(files: Files, split: str) -> Chosen:
        if classes := classes_in(files):
            chosen, labels = labelled(files, classes)
            part = part_of(len(chosen), split, labelled=True)
            return chosen[part], labels[part], classes
        part = part_of(len(files.names), split, labelled=False)
        return part, np.full(len(part), -1), None
