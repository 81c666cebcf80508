"""Your own images: a folder, with or without class folders in it."""

from pathlib import Path

from dino.dataset import check_split
from dino.dataset.files import ImageFiles, images_by_class, images_under, is_image, labelled


def classes_in(folder: Path) -> dict[str, list[str]]:
    """Images by class, or {} where the folder is not sorted into classes: images lie beside the sub-folders, or all
    lie in one sub-folder, which tells nothing apart."""
    if any(is_image(path.name) for path in folder.iterdir()):
        return {}
    images = images_by_class(folder)
    return images if len(images) > 1 else {}


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
        train, val = root / "train", root / "val"
        if train.is_dir() and val.is_dir():
            samples, classes = self._split(train, val, split)
        else:
            samples, classes = self._whole(train if train.is_dir() else root, split)
        if not samples:
            raise FileNotFoundError(
                f"Folder: found no images for {split} in dataset.root={root}. Expected image files (.jpg, .png, "
                ".webp, ...), at best 10 or more, in class folders or not; set dataset.root to a folder that has them."
            )
        super().__init__(samples, classes)

    @staticmethod
    def _split(train: Path, val: Path, split: str) -> tuple[list[tuple[str, int]], list[str] | None]:
        by_class = {"train": classes_in(train), "val": classes_in(val)}
        if by_class["train"] and by_class["val"]:
            classes = sorted(by_class["train"].keys() | by_class["val"].keys())
            return labelled(by_class[split], classes), classes
        return [(path, -1) for path in images_under(train if split == "train" else val)], None

    @staticmethod
    def _whole(folder: Path, split: str) -> tuple[list[tuple[str, int]], list[str] | None]:
        if by_class := classes_in(folder):
            classes = list(by_class)
            samples = labelled(by_class, classes)
            held_out = range(min(9, len(samples) - 1), len(samples), 10)
            return [sample for i, sample in enumerate(samples) if (i in held_out) == (split == "val")], classes
        images = [(path, -1) for path in images_under(folder)]
        return images if split == "train" else images[::10], None
