"""ImageNet (ILSVRC 2012) as class folders."""

from pathlib import Path

from dino.dataset import check_split
from dino.dataset.files import ImageFiles, labelled, subfolders
from dino.dataset.index import find_images


class ImageNet(ImageFiles):
    """`root/train/<wnid>/*.JPEG` and `root/val/<wnid>/*.JPEG`; labels count the sorted wnids of both splits.

    Any other set in this layout is read as well. A class folder without images is a class all the same, and warned of.
    """

    def __init__(self, root: str | Path, split: str) -> None:
        check_split(split)
        root = Path(root).expanduser()
        wnids = subfolders(root / "train", root / "val")
        files = find_images(root, split)
        chosen, labels = labelled(files, wnids)
        if not len(chosen):
            raise FileNotFoundError(
                f"ImageNet: expected class folders with images, {root}/{split}/<wnid>/*.JPEG, found none. Set "
                "dataset.root to the folder that holds train and val, each sorted into one folder per class."
            )
        super().__init__(files, chosen, labels, wnids)
