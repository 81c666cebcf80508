"""ImageNette: ten easily told classes of ImageNet, 9,469 train and 3,925 val images (github.com/fastai/imagenette)."""

from pathlib import Path

import torchvision

from dino.dataset import check_split
from dino.dataset.download import download as download_whole
from dino.dataset.files import ImageFiles, labelled, subfolders
from dino.dataset.index import find_images

FOLDERS = {"160px": "imagenette2-160", "320px": "imagenette2-320", "full": "imagenette2"}
NAMES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


class Imagenette(ImageFiles):
    """`root/imagenette2-160` (or -320, or imagenette2 for the full size), downloaded by torchvision if missing.

    `size` names the shorter side of the files. A folder that is there is read as it is: no checksum, no network.
    """

    def __init__(self, root: str | Path, split: str, size: str = "160px", download: bool = True) -> None:
        check_split(split)
        if size not in FOLDERS:
            raise ValueError(f"Imagenette: size must be one of {', '.join(FOLDERS)}, got {size!r}.")
        root, folder = Path(root).expanduser(), FOLDERS[size]
        if not (root / folder).is_dir():
            if not download:
                raise FileNotFoundError(
                    f"Imagenette: dataset.root={root} has no folder {folder}. Set dataset.root to the folder that "
                    "holds it, or allow the download with dataset.train.download=true."
                )
            download_whole(
                "Imagenette", root, folder, lambda to: torchvision.datasets.Imagenette(to, size=size, download=True)
            )

        wnids = subfolders(root / folder / "train", root / folder / "val")  # of both, so that their labels agree
        files = find_images(root / folder, split)
        chosen, labels = labelled(files, wnids)
        if not len(chosen):
            raise FileNotFoundError(
                f"Imagenette: {root / folder / split} has no class folders with images. "
                f"Remove {root / folder} to have it downloaded again, or set dataset.root to a whole copy."
            )
        super().__init__(files, chosen, labels, [NAMES.get(wnid, wnid) for wnid in wnids])
