"""ImageNet-100 as Kaggle hands it out (ambityga/imagenet100): 100 classes of ImageNet, train in four parts."""

import json
from pathlib import Path

from dino.dataset import check_split
from dino.dataset.files import ImageFiles, images_by_class, labelled, subfolders


class ImageNet100(ImageFiles):
    """`root/train.X1` ... `root/train.X4` (any number), each with class folders, joined; `root/val.X` alike.

    Labels count the sorted wnids of all of them. `root/Labels.json` ({wnid: name}), where it is there, names `classes`.
    """

    def __init__(self, root: str | Path, split: str) -> None:
        check_split(split)
        root = Path(root).expanduser()
        images = images_by_class(*sorted(root.glob(f"{split}.X*")))
        if not images:
            raise FileNotFoundError(
                f"ImageNet100: expected class folders with images, {root}/{split}.X*/<wnid>/*.JPEG, found none. "
                "Set dataset.root to the folder that holds train.X1 ... train.X4 and val.X."
            )
        wnids = subfolders(*root.glob("train.X*"), *root.glob("val.X*"))
        labels = root / "Labels.json"
        names = json.loads(labels.read_text()) if labels.is_file() else {}
        super().__init__(labelled(images, wnids), [names.get(wnid, wnid) for wnid in wnids])
