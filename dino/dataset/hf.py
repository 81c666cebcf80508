"""Hugging Face image data sets (an extra: `pip install 'dino-train[hf]'`): from the hub, or from disk."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from dino.dataset import check_split, part_of
from dino.dataset.encoded import BrokenImage, EncodedImages

VAL = ("validation", "val", "valid", "dev", "test")  # what the split to test on is called, best first


class HuggingFace(EncodedImages):
    """`path`: what `save_to_disk` wrote, a parquet file, a folder that `datasets.load_dataset` can read (class folders,
    parquet files, ...), or a name on the hub, `name` being the configuration. It is downloaded if it has to be.

    train is the split of that name, or the only one. val is the first of validation, val, valid, dev and test; where
    there is none, it is made of train, as the folder data set does it: every tenth image, which labelled train then
    does without. `train_split` and `val_split` name others.

    `image` and `label` are columns: where they are None, the one of that kind (datasets.Image, datasets.ClassLabel).
    Without a label column the images are unlabelled; one of whole numbers can be named.

    Raises FileNotFoundError for what cannot be loaded, ValueError for what does not fit, ImportError without datasets.
    """

    def __init__(
        self,
        path: str | Path | None,
        split: str,
        name: str | None = None,
        train_split: str | None = None,
        val_split: str | None = None,
        image: str | None = None,
        label: str | None = None,
    ) -> None:
        check_split(split)
        if path is None:
            raise ValueError("HuggingFace: no data set given. Set dataset.train.path to a folder or a name on the hub.")
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                f"HuggingFace: the data set {path} needs the datasets package, which is not installed: "
                "pip install 'dino-train[hf]'"
            ) from error

        self.path = path = str(path)
        splits = loaded(path, name)
        train = train_split or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
        val = val_split or next((held for held in VAL if held in splits and held != train), None)
        self.split = val if val and split == "val" else train
        if self.split not in splits:
            raise ValueError(
                f"HuggingFace: {path} has no split {self.split}, it has {', '.join(splits)}. Set "
                f"dataset.train.{split}_split to one of them."
            )
        whole = splits[self.split]
        self.image = image or only(path, "image", whole.features, datasets.Image)
        label = label or only(path, "label", whole.features, datasets.ClassLabel)
        for column in filter(None, (self.image, label)):
            if column not in whole.features:
                raise ValueError(
                    f"HuggingFace: {path} has no column {column}, it has {', '.join(whole.features)}. Set "
                    "dataset.train.image and dataset.train.label to some of them."
                )
        labels, self.classes = labels_of(path, whole, label)
        self.rows = part_of(len(whole), split, self.classes is not None) if val is None else np.arange(len(whole))
        self.labels = labels[self.rows]
        self.images: Any = whole.select_columns([self.image]).cast_column(self.image, datasets.Image(decode=False))
        first = self.row(0) if len(self.rows) else {"bytes": b""}
        self.files = first["bytes"] is None and first["path"] is not None  # beside the table, not in it

    def row(self, index: int) -> dict[str, Any]:
        return self.images[int(self.rows[index])][self.image] or {"bytes": None, "path": None}

    def name(self, index: int) -> str:
        return (self.files and self.row(index)["path"]) or f"{self.path}/{self.split}/{self.rows[index]}"

    def encoded(self, index: int) -> bytes:
        row = self.row(index)
        if row["bytes"] is not None:
            return bytes(row["bytes"])
        try:
            if row["path"] is not None:
                return Path(row["path"]).read_bytes()
        except FileNotFoundError:
            pass
        message = f"{self.name(index)} has no image, or its file is gone. Restore it or remove the row."
        raise BrokenImage(message, self.name(index))

    def listed(self) -> Iterator[bytes | memoryview]:
        """Paths and lengths: the data set's own fingerprint changes with the place where it lies."""
        import pyarrow.compute

        yield np.ascontiguousarray(self.rows, np.int64).tobytes()
        for table in self.images.with_format("arrow").iter(1000):
            for column in table[self.image].chunks:
                paths = (
                    os.path.relpath(p, self.path) if p and self.files else p for p in column.field("path").to_pylist()
                )
                yield "\0".join(path or "" for path in paths).encode(errors="surrogateescape")
                lengths = pyarrow.compute.binary_length(column.field("bytes")).fill_null(-1)
                yield np.ascontiguousarray(lengths, np.int64).tobytes()


def loaded(path: str, name: str | None) -> dict[str, Any]:
    """The data set's splits."""
    import datasets

    place = Path(path).expanduser()
    try:
        if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
            found: Any = datasets.load_from_disk(place)
        elif place.suffix == ".parquet" and place.is_file():
            found = datasets.load_dataset("parquet", data_files=str(place))
        else:
            found = datasets.load_dataset(str(place) if place.exists() else path, name)
    except Exception as error:  # whatever its readers, and the network, meet
        reason = (str(error).splitlines() or [""])[0].strip().rstrip(".") or type(error).__name__
        raise FileNotFoundError(
            f"HuggingFace: cannot load {path} ({reason}). Set dataset.train.path to a folder, a parquet file or a name "
            "on the hub; without a network, to one that was loaded before."
        ) from error
    return {"train": found} if isinstance(found, datasets.Dataset) else dict(found)


def only(path: str, kind: str, features: Any, of: type) -> str | None:
    """The one column of this type. None where a label has none; else one is needed."""
    columns = [column for column, feature in features.items() if isinstance(feature, of)]
    if len(columns) > 1 or (kind == "image" and not columns):
        raise ValueError(
            f"HuggingFace: {path} has {len(columns)} {kind} columns, expected one; its columns are "
            f"{', '.join(features)}. Set dataset.train.{kind} to the one that is meant."
        )
    return columns[0] if columns else None


def labels_of(path: str, dataset: Any, label: str | None) -> tuple[Int[ndarray, " images"], list[str] | None]:
    if label is None:
        return np.full(len(dataset), -1), None
    values = np.asarray(dataset.select_columns([label]).with_format("numpy")[:][label])
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(
            f"HuggingFace: column {label} of {path} must have one whole number for each image, got "
            f"{dataset.features[label]}. Name another in dataset.train.label, or make it a datasets.ClassLabel."
        )
    if not len(values) or values.max() < 0:  # as in test splits whose labels are kept secret
        return np.full(len(dataset), -1), None
    names = getattr(dataset.features[label], "names", None)
    return values.astype(np.int64), names or [str(number) for number in range(values.max() + 1)]
