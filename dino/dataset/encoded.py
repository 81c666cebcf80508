"""Encoded images, and what becomes of one: `decode`, the one way from bytes to pixels."""

import hashlib
import io
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Int, UInt8
from numpy import ndarray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".avif")
# No other: PIL hands some (EPS) to a program, which is not what bytes from anywhere may ask for.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF")
ORIENTATION = 0x0112  # EXIF's tag
TURNS = {  # its values: (mirror the columns, mirror the rows, then swap rows and columns)
    2: (True, False, False),
    3: (True, True, False),
    4: (False, True, False),
    5: (False, False, True),
    6: (False, True, True),
    7: (True, True, True),
    8: (True, False, True),
}


class BrokenImage(ValueError):
    """An image that cannot be read, in one sentence; `name` says which: a path, or "shard.tar/key"."""

    def __init__(self, message: str, name: str = "") -> None:  # the message first: a data worker hands on nothing else
        super().__init__(message)
        self.name = name


def decode(data: bytes, name: str) -> UInt8[Tensor, "3 height width"]:
    """The image in these bytes as RGB, upright, in channels-last memory (strides 1, 3 * width, 3).

    Of an animation, its first frame. Transparency is dropped, EXIF's orientation carried out. 16 bits are cut to the
    upper 8, for gray as PIL does for colour. An image cut short is broken, a JPEG be it by one byte: without its end
    marker it may have lost pixels. Damage that a decoder conceals (libjpeg only warns of some) goes unseen.

    Raises:
        BrokenImage: whatever is wrong with the bytes; also for more than 2 * PIL.Image.MAX_IMAGE_PIXELS pixels, before
            memory is taken for them, and for floating-point and 32-bit pixels, which have no agreed range.
    """
    if not data:
        raise BrokenImage(f"{name}: an empty file, where an image was expected. Copy it again or remove it.", name)
    what = "cannot be read as an image"
    try:
        with quiet(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            what = f"a {image.format} image of {image.width} x {image.height} pixels that cannot be decoded"
            return upright(pixels_of(image, data), orientation(image)).permute(2, 0, 1)
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        message = f"{name}: an image of more than {most:,} pixels, the most that is decoded. Reduce or remove it."
        raise BrokenImage(message, name) from error
    except UnidentifiedImageError as error:
        message = f"{name}: cannot be opened as an image ({', '.join(FORMATS)}). Repair, convert or remove it."
        raise BrokenImage(message, name) from error
    except Exception as error:  # PIL raises what its parsers meet: OSError, SyntaxError, struct.error, KeyError, ...
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise BrokenImage(f"{name}: {what} ({reason}). Repair or remove it.", name) from error


def plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that any decoder reads alike: whole, upright, in gray or YCbCr. None for all others."""
    if not data.startswith(b"\xff\xd8") or b"\xff\xd9" not in data[-16:]:
        return None
    try:
        with quiet(), Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            plain = image.mode in ("RGB", "L") and orientation(image) not in TURNS and min(image.size) > 0
            return (image.height, image.width) if plain else None
    except Exception:  # as in `decode`, which will say it
        return None


def pixels_of(image: Image.Image, data: bytes) -> UInt8[Tensor, "height width 3"]:
    """The pixels of an opened image, as they are stored."""
    if image.format in ("JPEG", "MPO") and data.rfind(b"\xff\xd9") < 0:  # decoders differ on what may then be missing
        raise ValueError("it has no end marker, so it was cut")
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        try:  # PIL's pixels, in less time, as long as torchvision has a decoder: 0.29 calls it deprecated
            from torchvision.io import ImageReadMode, decode_jpeg

            pixels: Tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
            return pixels.permute(1, 2, 0).contiguous()
        except (ImportError, RuntimeError):
            pass  # one rule on what is broken, PIL's
    image.load()
    if image.mode in ("I", "F"):
        values = np.array(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"{values.dtype} pixels from {values.min():g} to {values.max():g}, expected 8 or 16 bits")
    if image.mode.startswith("I"):
        gray = np.array(image).astype(np.uint16) >> 8
        return torch.from_numpy(np.repeat(gray.astype(np.uint8)[:, :, None], 3, axis=2))
    image.info.pop("transparency", None)  # else a palette's alpha is mixed in, or warned of
    return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB")))


def orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # notes that cannot be read do not spoil the pixels
        return None


def upright(pixels: UInt8[Tensor, "_ _ 3"], orientation: object) -> UInt8[Tensor, "height width 3"]:
    columns, rows, swap = (
        TURNS.get(orientation, (False, False, False)) if isinstance(orientation, int) else (False,) * 3
    )
    pixels = pixels.flip([axis for axis, mirror in enumerate((rows, columns)) if mirror]) if rows or columns else pixels
    return pixels.transpose(0, 1).contiguous() if swap else pixels


class Quiet:
    """While any thread is inside, no warning is shown: those of PIL tell of what `decode` deals with or refuses.

    `warnings.catch_warnings` alone is not for threads: two that overlap can leave the filters of the one behind.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.filters = threading.Lock(), 0, warnings.catch_warnings()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.filters = warnings.catch_warnings()
                self.filters.__enter__()
                warnings.simplefilter("ignore")
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if self.inside == 0:
                    self.filters.__exit__(None, None, None)


quiet = Quiet()


class EncodedImages(Dataset[tuple[Tensor, int]], ABC):
    """A data set of encoded images, decoded on demand. `labels` are -1 where `classes` is None."""

    labels: Int[ndarray, " images"]
    classes: list[str] | None

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The file as it is stored. Raises BrokenImage where it is gone."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Which image it is, for people: its path, or "shard.tar/key"."""

    @abstractmethod
    def listed(self) -> Iterator[bytes | memoryview]:
        """The names of all images in their order, without the place where the data set lies, in pieces."""

    @property
    def fingerprint(self) -> str:
        """The same for the same names and labels in the same order, wherever they lie."""
        digest = hashlib.sha256(np.ascontiguousarray(self.labels, dtype=np.int64).data)
        for piece in self.listed():
            digest.update(len(piece).to_bytes(8, "little"))
            digest.update(piece)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 height width"], int]:
        label = int(self.labels[index])  # first: it raises the IndexError that ends an iteration
        return decode(self.encoded(index), self.name(index)), label
