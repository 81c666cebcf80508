"""Data sets: map-style, `dataset[i] -> (image, label)`.

An image is a PIL RGB image or a uint8 tensor [3, height, width]. `classes` names the labels; where it is None the
images are unlabelled and every label is -1.
"""


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is "train" or "val"."""
    if split not in ("train", "val"):
        raise ValueError(f'A data set\'s split must be "train" or "val", got {split!r}.')
