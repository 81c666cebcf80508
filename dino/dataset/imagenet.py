"""ImageNet (ILSVRC 2012) as class folders."""

from pathlib import Path

from dino.dataset import check_split
from dino.dataset.files import ImageFiles, images_by_class, labelled, subfolders


class ImageNet(ImageFiles):
    """`root/train/<wnid>/*.JPEG` and `root/val/<wnid>/*.JPEG`; labels count the sorted wnids of both splits.

    Any other set in this layout is read as well.
    """

    def __init__(self, root: str | Path, split: str) -> None:
        check_split(split)
        root = Path(root).expanduser()
        images = images_by_class(root / split)
        if not images:
            raise FileNotFoundError(
                f"ImageNet: expected class folders with images, {root}/{split}/<wnid>/*.JPEG, found none. Set "
                "dataset.root to the folder that holds train and val, each sorted into one folder per class."
            )
        wnids = subfolders(root / "train", root / "val")
        super().__init__(labelled(images, wnids), wnids)
