"""What a backbone sees: attention, patches in colours, nearest neighbours.

`python -m dino.visualize <run, or file of its teacher> <image, or folder>` writes, for each image, attention of the CLS
token (mean and each head of the last layer) over the image, and its patch tokens with their first three principal
components as red, green and blue. Components are those of all images of the call together, so that colours agree.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor, nn

from dino.augmentation import MOST_PIXELS, EvalTransform
from dino.augmentation.crops import resize
from dino.evaluator.features import features_of
from dino.evaluator.neighbours import nearest
from dino.report.attention import (
    attention_maps,
    has_attention,
    has_tokens,
    mass_mask,
    patch_tokens,
    principal_colours,
)
from dino.report.pictures import (
    attention_row,
    fitted,
    images_in,
    opened,
    patch_row,
    picture_of,
    read,
    row_of,
    unique_names,
)
from dino.runtime.device import use_device
from dino.runtime.importing import find_in_current_folder
from dino.runtime.memory import is_out_of_memory
from dino.runtime.refused import Refused
from dino.weights import load_teacher

SIDE = 16  # pixels; images are brought to multiples of it, so that patches of 8 and 16 pixels see all of them


def main() -> None:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m dino.visualize", description=summary, epilog=more)
    parser.usage = "%(prog)s [options] checkpoint images"  # argparse's own buries a mistake under seven lines
    parser.add_argument(
        "checkpoint", type=Path, help="a run's directory, its teacher.safetensors or a checkpoint (.pt)"
    )
    parser.add_argument("images", type=Path, help="an image, a folder of images, or of a video's frames")
    parser.add_argument("--output", type=Path, default=Path("visualized"), help="folder for the pictures (%(default)s)")
    parser.add_argument(
        "--size",
        type=int,
        help="pixels of the shorter side that the backbone is given; default: as "
        "the run was evaluated. More pixels make finer maps",
    )
    parser.add_argument(
        "--mass",
        type=float,
        help="show only the patches that hold this share of the attention; 0.6 in the paper's Fig. 4",
    )
    parser.add_argument(
        "--foreground", action="store_true", help="components of the patches that hold 0.6 of the attention alone"
    )
    parser.add_argument("--neighbours", type=Path, metavar="FOLDER", help="show the most alike of its images")
    parser.add_argument("--k", type=int, default=8, help="number of neighbours (%(default)s)")
    parser.add_argument("--video", action="store_true", help="images are frames: numbered pictures and an animation")
    parser.add_argument("--fps", type=float, default=12.0, help="frames a second of the animation (%(default)s)")
    parser.add_argument("--animation", choices=("gif", "webp"), default="gif", help="its format (%(default)s)")
    parser.add_argument(
        "--trust", nargs="+", default=[], metavar="PACKAGE", help="packages of yours whose networks the file may name"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (%(default)s)")
    arguments = vars(parser.parse_args())
    find_in_current_folder()
    try:
        print("\n".join(visualize(**arguments)))
    except (Refused, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"--size={arguments['size']}: there is not enough memory; give a smaller one.", file=sys.stderr)
        sys.exit(2)


def visualize(
    checkpoint: Path,
    images: Path,
    output: Path = Path("visualized"),
    *,
    size: int | None = None,
    mass: float | None = None,
    foreground: bool = False,
    neighbours: Path | None = None,
    k: int = 8,
    video: bool = False,
    fps: float | int = 12.0,
    animation: str = "gif",
    trust: Sequence[str] = (),
    device: str = "auto",
) -> list[str]:
    """Writes the pictures; returns sentences about what was written and what could not be.

    Raises Refused for images that cannot be read, ValueError and FileNotFoundError for a checkpoint that cannot.
    """
    for name, value, most in (("size", size, MOST_PIXELS), ("k", k, math.inf), ("fps", fps, 1000)):
        least = 0.01 if name == "fps" else 1  # a GIF knows no slower
        if value is not None and not least <= value <= most:
            raise Refused(f"--{name} must be {least} or more{f', at most {most}' * (most < math.inf)}, got {value}.")
    if mass is not None and not 0 < mass <= 1:
        raise Refused(f"--mass must be a fraction above 0 and at most 1, got {mass}.")
    model, on = load_teacher(checkpoint, trust), use_device(device)
    backbone = model.backbone.to(on)
    known: dict[str, Any] = model.preprocessing  # type: ignore[assignment]
    if foreground and not has_attention(backbone):
        raise Refused(f"--foreground needs attention, and {type(backbone).__name__} has none; leave it out.")
    as_trained = EvalTransform(known["size"], tuple(known["mean"]), tuple(known["std"]))
    said: list[str] = []
    originals = read(images_in(images), said)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"--output={output}: {error.strerror}; give a folder that can be written to.") from error
    names = [f"{i:04d}" for i in range(1, len(originals) + 1)] if video else unique_names([*originals])
    maps, tokens = [], []
    for image in originals.values():
        batch = as_trained.normalise(prepared(image, size or known["size"])[None].to(on))
        maps += [attention_maps(backbone, batch)[0].cpu()] if has_attention(backbone) else []
        tokens += [patch_tokens(backbone, batch)[0].cpu()] if has_tokens(backbone) else []

    # Rows of pictures, made as they are written: those of a whole video would not fit into memory.
    sheets: dict[str, Iterator[Image.Image]] = {}
    if maps:
        heats = (heat if mass is None else heat * mass_mask(heat, mass) for heat in maps)
        pairs = zip(originals.values(), heats, strict=True)
        sheets["attention"] = (attention_row(picture_of(image), heat) for image, heat in pairs)
    else:
        said.append(f"{type(backbone).__name__} has no attention: no attention maps.")
    if tokens:
        masks = torch.cat([mass_mask(heat.mean(0)).flatten() for heat in maps]) if foreground else None
        colours = principal_colours(torch.cat([grid.flatten(0, 1) for grid in tokens]), masks)
        parts = torch.split(colours, [grid.shape[0] * grid.shape[1] for grid in tokens])
        grids = (part.view(*grid.shape[:2], 3) for part, grid in zip(parts, tokens, strict=True))
        sheets["pca"] = (patch_row(picture_of(i), grid) for i, grid in zip(originals.values(), grids, strict=True))
    else:
        said.append(f"{type(backbone).__name__} has no patch tokens: no PCA.")
    if neighbours is not None:
        sheets["neighbours"] = neighbour_rows(backbone, originals, read(images_in(neighbours), said), k, as_trained, on)
    for kind, rows in sheets.items():
        files = [output / (f"{kind}_{name}.png" if video else f"{name}_{kind}.png") for name in names]
        for file, row in zip(files, rows, strict=True):
            row.save(file)
        if video:
            frames, file = opened(files), output / f"{kind}.{animation}"
            next(frames).save(file, save_all=True, append_images=frames, duration=round(1000 / fps), loop=0)
    if sheets:
        said.append(f"{', '.join(sheets)} of {len(names)} {'frames' if video else 'images'} in {output}")
    return said


def neighbour_rows(
    backbone: nn.Module,
    images: Mapping[Path, Tensor],
    bank: Mapping[Path, Tensor],
    k: int,
    transform: EvalTransform,
    device: torch.device,
) -> Iterator[Image.Image]:
    """Of each image, a row of those in `bank` that are most alike; never the image itself."""
    of_images, of_bank = (
        features_of(backbone, [(image, -1) for image in some.values()], transform, device, batch_size=64).rows.cpu()
        for some in (images, bank)
    )
    found, others = nearest(of_bank, of_images, k + 1), [*bank]
    for (path, image), similarities, indices in zip(images.items(), *map(Tensor.tolist, found), strict=True):
        ranked = [(others[i], s) for i, s in zip(indices, similarities, strict=True) if not others[i].samefile(path)]
        row = {"image": picture_of(image)}
        for rank, (other, similarity) in enumerate(ranked[:k], start=1):
            row[f"{rank}. {similarity:.2f} {other.name[:24]}"] = fitted(picture_of(bank[other]), row["image"].height)
        yield row_of(row)


def prepared(image: UInt8[Tensor, "3 _ _"], size: int) -> UInt8[Tensor, "3 _ _"]:
    """The whole image, its shorter side about `size` pixels, both sides multiples of SIDE."""
    scale = size / min(image.shape[1:])
    return resize(image, [max(1, round(length * scale / SIDE)) * SIDE for length in image.shape[1:]])


if __name__ == "__main__":
    main()
