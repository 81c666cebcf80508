"""ImageNet-100 as Kaggle hands it out (ambityga/imagenet100): 100 classes of ImageNet, train in four parts."""

import json
from pathlib import Path

from dino.dataset import check_split
from dino.dataset.files import ImageFiles, labelled, subfolders
from dino.dataset.index import find_images


class ImageNet100(ImageFiles):
    """`root/train.X1` ... `root/train.X4` (any number), each with class folders, joined; `root/val.X` alike.

    Labels count the sorted wnids of all of them. `root/Labels.json` ({wnid: name}), where it is there, names `classes`.
    """

    def __init__(self, root: str | Path, split: str) -> None:
        check_split(split)
        root = Path(root).expanduser()
        wnids = subfolders(*root.glob("train.X*"), *root.glob("val.X*"))
        files = find_images(root, *sorted(path.name for path in root.glob(f"{split}.X*")))
        chosen, labels = labelled(files, wnids)
        if not len(chosen):
            raise FileNotFoundError(
                f"ImageNet100: expected class folders with images, {root}/{split}.X*/<wnid>/*.JPEG, found none. "
                "Set dataset.root to the folder that holds train.X1 ... train.X4 and val.X."
            )
        path = root / "Labels.json"
        names = json.loads(path.read_text()) if path.is_file() else {}
        super().__init__(files, chosen, labels, [names.get(wnid, wnid) for wnid in wnids])
