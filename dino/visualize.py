"""What a backbone sees: attention, patches in colours, nearest neighbours.

`python -m dino.visualize checkpoint=<run, or file of its teacher> images=<image, or folder> [key=value ...]` writes,
for each image, attention of the CLS token (mean and each head of the last layer) over the image, and its patch tokens
with their first three principal components as red, green and blue. Components are those of all images of the call
together, so that colours agree. Keys: conf/visualize.yaml.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor, nn

from dino.augmentation import EvalTransform
from dino.augmentation.crops import resize
from dino.config.program import run_program
from dino.config.settings import Visualize, settings_of
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
from dino.runtime.memory import is_out_of_memory
from dino.runtime.refused import Refused, shown
from dino.weights import load_teacher

SIDE = 16  # pixels; images are brought to multiples of it, so that patches of 8 and 16 pixels see all of them


def main() -> None:
    run_program("visualize", __doc__, show)


def show(config: dict[str, Any]) -> None:
    settings = settings_of(Visualize, config)
    try:
        print("\n".join(visualize(settings)))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise Refused(f"size={shown(settings.size)}: there is not enough memory; give a smaller one.") from error
    except Refused:
        raise
    except ValueError as error:  # of a file that is damaged, or of a network that is no ViT of square patches
        raise Refused(str(error)) from error


def visualize(settings: Visualize) -> list[str]:
    """Writes the pictures; returns sentences about what was written and what could not be.

    Raises Refused for images that cannot be read, ValueError and FileNotFoundError for a checkpoint that cannot.
    """
    model, device = load_teacher(settings.checkpoint, settings.trust), use_device(settings.device)
    backbone = model.backbone.to(device)
    known: dict[str, Any] = model.preprocessing  # type: ignore[assignment]
    name = type(backbone).__name__
    if settings.foreground and not has_attention(backbone):
        raise Refused(f"foreground=true: needs attention, and {name} has none; leave it out.")
    as_trained = EvalTransform(known["size"], tuple(known["mean"]), tuple(known["std"]))
    notes: list[str] = []
    images = read(images_in(Path(settings.images)), notes)
    output = folder_for(settings)
    maps, tokens = [], []
    for image in images.values():
        batch = as_trained.normalise(prepared(image, settings.size or known["size"])[None].to(device))
        maps += [attention_maps(backbone, batch)[0].cpu()] if has_attention(backbone) else []
        tokens += [patch_tokens(backbone, batch)[0].cpu()] if has_tokens(backbone) else []

    # Rows of pictures, made as they are written: those of a whole video would not fit into memory.
    sheets: dict[str, Iterator[Image.Image]] = {}
    if maps:
        sheets["attention"] = attention_rows([*images.values()], maps, settings.mass)
    else:
        notes.append(f"{name} has no attention: no attention maps.")
    if tokens:
        sheets["pca"] = patch_rows([*images.values()], tokens, maps if settings.foreground else [])
    else:
        notes.append(f"{name} has no patch tokens: no PCA.")
    if settings.neighbours is not None:
        bank = read(images_in(Path(settings.neighbours)), notes)
        sheets["neighbours"] = neighbour_rows(backbone, images, bank, settings.k, as_trained, device)
    names = [f"{i:04d}" for i in range(1, len(images) + 1)] if settings.video else unique_names([*images])
    for kind, rows in sheets.items():
        write(kind, rows, names, output, settings)
    if sheets:
        notes.append(f"{', '.join(sheets)} of {len(names)} {'frames' if settings.video else 'images'} in {output}")
    return notes


def folder_for(settings: Visualize) -> Path:
    output = Path(settings.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"output={output}: {error.strerror}; give a folder that can be written to.") from error
    return output


def attention_rows(images: Sequence[Tensor], maps: Sequence[Tensor], mass: float | None) -> Iterator[Image.Image]:
    """Of each image, a row of its attention; with `mass` only of the patches that hold this share of it."""
    for image, heat in zip(images, maps, strict=True):
        yield attention_row(picture_of(image), heat if mass is None else heat * mass_mask(heat, mass))


def patch_rows(images: Sequence[Tensor], tokens: Sequence[Tensor], maps: Sequence[Tensor]) -> Iterator[Image.Image]:
    """Of each image, a row of its patches in colours; of the patches that `maps`, where given, look at most."""
    masks = torch.cat([mass_mask(heat.mean(0)).flatten() for heat in maps]) if maps else None
    colours = principal_colours(torch.cat([grid.flatten(0, 1) for grid in tokens]), masks)
    parts = torch.split(colours, [grid.shape[0] * grid.shape[1] for grid in tokens])
    for image, part, grid in zip(images, parts, tokens, strict=True):
        yield patch_row(picture_of(image), part.view(*grid.shape[:2], 3))


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


def write(kind: str, rows: Iterator[Image.Image], names: Sequence[str], output: Path, settings: Visualize) -> None:
    """A file for each row; of a video's, an animation as well."""
    files = [output / (f"{kind}_{name}.png" if settings.video else f"{name}_{kind}.png") for name in names]
    for file, row in zip(files, rows, strict=True):
        row.save(file)
    if settings.video:
        frames, file = opened(files), output / f"{kind}.{settings.animation}"
        milliseconds = round(1000 / settings.fps)
        next(frames).save(file, save_all=True, append_images=frames, duration=milliseconds, loop=0)


def prepared(image: UInt8[Tensor, "3 _ _"], size: int) -> UInt8[Tensor, "3 _ _"]:
    """The whole image, its shorter side about `size` pixels, both sides multiples of SIDE."""
    scale = size / min(image.shape[1:])
    return resize(image, [max(1, round(length * scale / SIDE)) * SIDE for length in image.shape[1:]])


if __name__ == "__main__":
    main()
