"""Pieces of an HTML page. What comes from data (names of classes and folders, settings) is escaped here."""

import base64
import html
import io
import math
from collections.abc import Sequence
from typing import Any

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

WIDE = 128  # pixels of a picture on the page
NUMBERS = ("k-NN", "images", "share")  # headings
FINE = 192  # pixels that it has at most, for fine screens


def text(value: object) -> str:
    return html.escape(str(value))


def cut(name: str, longest: int = 24) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


def note(sentence: str) -> str:
    return f'<p class="note">{text(sentence)}</p>'


def scroll(content: str) -> str:
    """What may be wider than a phone scrolls by itself."""
    return f'<div class="scroll" tabindex="0">{content}</div>'


def table(heading: str, heads: Sequence[str], rows: Sequence[Sequence[str | float]]) -> str:
    """Words, numbers under a heading of NUMBERS, and shares in [0, 1] (floats) as a bar."""
    head = "".join(cell("th", name, name) for name in heads)
    body = ("".join(cell("td", value, name) for value, name in zip(row, heads, strict=True)) for row in rows)
    lines = "".join(f"<tr>{cells}</tr>" for cells in body)
    return f"<p><b>{text(heading)}</b></p>" + scroll(
        f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    )


def cell(tag: str, value: str | float, heading: str) -> str:
    kind = ' class="number"' if heading in NUMBERS else ""
    bar = f'<span class="meter"><i style="width:{100 * value:.0f}%"></i></span>' if isinstance(value, float) else ""
    return f"<{tag}{kind}>{bar or text(value)}</{tag}>"


def picture(image: UInt8[Tensor, "3 _ _"], least: int = WIDE) -> Image.Image:
    """The image, its longer side between `least` and FINE pixels: small ones are enlarged as they are, unsmoothed."""
    shown = Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())
    longer = max(shown.size)
    if longer > FINE:
        shown.thumbnail((FINE, FINE), Image.Resampling.BICUBIC)
    elif longer < least:
        factor = -(-least // longer)
        shown = shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)
    return shown


def figure(picture: Image.Image, caption: str = "", kind: str = "", wide: int = WIDE, hover: str = "") -> str:
    """A picture whose longer side is `wide` pixels on the page."""
    scale = wide / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    words = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    shown = f'<img src="{data_uri(picture)}" width="{width}" height="{height}" alt="{text(caption)}">'
    hover = text(hover or caption)
    return f'<figure class="picture {kind}" style="width:{width}px" title="{hover}">{shown}{words}</figure>'


def data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def percent(share: float | int) -> str:
    return f"{100 * share:.1f} %"


def duration(seconds: float | int) -> str:
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{hours:.1f} h"


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
