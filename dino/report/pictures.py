"""Pictures: a folder's images, and what is shown of them: heat over one, patches as squares, several in a row."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dino.dataset.encoded import EXTENSIONS, BrokenImage, decode
from dino.runtime.refused import Refused

SHOWN = 256  # pixels; the shorter side of a picture at least


def overlay(image: Image.Image, heat: Float[Tensor, "rows columns"], strength: float = 0.6) -> Image.Image:
    """The image in grey under `heat`, from its smallest value (dark) to its largest (yellow), whatever these are."""
    from matplotlib import colormaps

    values = heat.detach().cpu().double().numpy()
    values = (values - values.min()) / (np.ptp(values) or 1.0)
    large = Image.fromarray(values.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    painted = Image.fromarray(colormaps["inferno"](np.asarray(large).clip(0, 1), bytes=True)[..., :3])
    return Image.blend(image.convert("L").convert("RGB"), painted, strength)


def painted(colours: Float[Tensor, "rows columns 3"], size: tuple[int, int]) -> Image.Image:
    """Colours in [0, 1] as squares on a picture of `size`, (width, height)."""
    pixels = (colours.cpu() * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def picture_of(image: UInt8[Tensor, "3 _ _"]) -> Image.Image:
    """The image itself, its shorter side SHOWN pixels, or up to twice that where it has them."""
    side = min(image.shape[1:])
    scale = min(max(side, SHOWN), 2 * SHOWN) / side
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)


def fitted(picture: Image.Image, height: int) -> Image.Image:
    return picture.resize((max(1, round(picture.width * height / picture.height)), height))


def row_of(pictures: Mapping[str, Image.Image], gap: int = 8) -> Image.Image:
    """Pictures beside each other, each under its name."""
    text = 18
    wide = sum(picture.width + gap for picture in pictures.values()) + gap
    high = max(picture.height for picture in pictures.values()) + text + 2 * gap
    row = Image.new("RGB", (wide, high), "white")
    draw, left = ImageDraw.Draw(row), gap
    for name, picture in pictures.items():
        draw.text((left, gap // 2), name, fill="black", font=ImageFont.load_default(13))
        row.paste(picture, (left, text + gap // 2))
        left += picture.width + gap
    return row


def attention_row(picture: Image.Image, maps: Float[Tensor, "heads rows columns"]) -> Image.Image:
    heads = {f"head {head}": overlay(picture, heat) for head, heat in enumerate(maps, start=1)}
    return row_of({"image": picture, "mean": overlay(picture, maps.mean(0)), **heads})


def patch_row(picture: Image.Image, colours: Float[Tensor, "rows columns 3"]) -> Image.Image:
    return row_of({"image": picture, "PCA": painted(colours, picture.size)})


def opened(files: Sequence[Path]) -> Iterator[Image.Image]:
    """One at a time, each a copy in memory."""
    for file in files:
        with Image.open(file) as image:
            yield image.copy()


def images_in(path: Path) -> list[Path]:
    """The image itself, or the images of a folder, frame_2 before frame_10. Raises Refused where there is none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise Refused(f"{path} is not there; expected an image or a folder of images.")
    found = [child for child in path.iterdir() if child.suffix.lower() in EXTENSIONS and child.is_file()]
    if not found:
        raise Refused(f"{path} has no images; expected files that end in {', '.join(EXTENSIONS)}.")
    return sorted(found, key=lambda child: [*map(_number_or_text, re.split(r"([0-9]+)", child.name))])


def _number_or_text(part: str) -> int | str:
    return int(part) if part.isdecimal() else part


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Names without their ends; with them, where two images would be written to one file."""
    stems = [path.stem for path in paths]
    return [path.name if stems.count(path.stem) > 1 else path.stem for path in paths]


def read(paths: Sequence[Path], unread: list[str]) -> dict[Path, UInt8[Tensor, "3 _ _"]]:
    """Those that can be read; `unread` gets a sentence for each of the others. Raises Refused where none can."""
    images: dict[Path, Tensor] = {}
    for path in paths:
        try:
            images[path] = decode(path.read_bytes(), str(path))
        except BrokenImage as error:
            unread.append(str(error))
    if not images:
        raise Refused(*unread)
    return images
