"""What a backbone has learned, as sections of a report: neighbours, attention, patches, classes, a map."""

import importlib.util
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from torch import Tensor, nn

from dino.augmentation import image_tensor
from dino.dataset.cache import Images
from dino.dataset.encoded import BrokenImage
from dino.evaluator.features import UNREAD, Features
from dino.evaluator.neighbours import nearest
from dino.report.attention import attention_maps, has_attention, has_tokens, patch_tokens, pca_rgb
from dino.report.page import cut, figure, note, percent, picture, scroll, table, text
from dino.report.pictures import overlay, painted

NEIGHBOURS = 6  # of each val image
POINTS = 500  # of the map
MOST_CLASSES = 20  # in a matrix, a legend, a table's half


def one_of_each(queries: Features | None, images: int, seed: int = 0) -> list[int]:
    """Rows in a random order that is always the same: first one of each class, then the others. Unread ones last."""
    order: ndarray = np.random.default_rng(seed).permutation(images)[:5000]
    if queries is None:
        return [*map(int, order)]
    labels: ndarray = queries[1].cpu().numpy()[order]
    seen: dict[int, int] = {}
    turn = [seen.setdefault(label, 0) for label in labels.tolist()]
    for i, label in enumerate(labels.tolist()):
        turn[i], seen[label] = seen[label], seen[label] + 1
    return [*map(int, order[np.lexsort((np.array(turn), labels == UNREAD))])]  # stable: else in the random order


def readable(data: Images, rows: Sequence[int], most: int) -> Iterator[tuple[int, UInt8[Tensor, "3 _ _"], int]]:
    """(row, image, label) of the first `most` of `rows` that can be read; looks at twice as many at most."""
    found = 0
    for row in rows[: 2 * most]:
        if found == most:
            return
        try:
            image, label = data[row]
        except BrokenImage:
            continue
        found += 1
        yield row, image_tensor(image), int(label)


def neighbour_section(
    val: Sequence[tuple[int, Tensor, int]],
    train_set: Images,
    bank: Features | None,
    queries: Features | None,
    classes: Sequence[str] | None,
) -> str:
    if bank is None or queries is None or not val:
        return ""
    read = (bank.labels != UNREAD).nonzero()[:, 0]
    similarity, found = nearest(bank.rows[read], queries.rows[[row for row, _, _ in val]], NEIGHBOURS)
    found = read[found.to(read.device)]
    lines = []
    for (_, image, label), similarities, indices in zip(val, similarity.tolist(), found.tolist(), strict=True):
        name = classes[label] if classes else "val image"
        cells = [f'<div class="query">{figure(picture(image), name)}</div>']
        for alike, index in zip(similarities, indices, strict=True):
            for _, other, its in readable(train_set, [index], 1):
                kind = "" if classes is None else "same" if its == label else "other"
                sign = {"same": "✓ ", "other": "✗ "}.get(kind, "")
                words = f"{sign}{classes[its]}" if classes else f"{alike:.2f}"
                cells.append(figure(picture(other), words, kind, hover=f"{words}, cosine {alike:.3f}"))
        lines.append(f'<div class="row">{"".join(cells)}</div>')
    marks = " ✓ green: of the same class, ✗ red: of another." if classes else ""
    intro = f"Held-out images at the left, and the most alike of the {len(train_set):,} train images, by cosine.{marks}"
    return note(intro) + scroll(f'<div class="rows">{"".join(lines)}</div>')


def attention_section(backbone: nn.Module, batch: Tensor | None, images: Sequence[Tensor]) -> str:
    if batch is None:
        return ""
    if not has_attention(backbone):
        return note(f"{type(backbone).__name__} has no attention to show.")
    lines = []
    for image, maps in zip(images, attention_maps(backbone, batch).cpu(), strict=True):
        shown = picture(image)
        cells = [figure(shown, "image"), figure(overlay(shown, maps.mean(0)), "mean of heads")]
        cells += [figure(overlay(shown, heat), f"head {head}") for head, heat in enumerate(maps[:16], start=1)]
        lines.append(f'<div class="row">{"".join(cells)}</div>')
    intro = "How the teacher's CLS token attends to the patches in the last layer; each map from its least to its most."
    return note(intro) + scroll(f'<div class="rows">{"".join(lines)}</div>')


def patch_section(backbone: nn.Module, batch: Tensor | None, images: Sequence[Tensor]) -> str:
    if batch is None or not has_tokens(backbone):
        return ""
    pairs = []
    for image, colours in zip(images, pca_rgb(patch_tokens(backbone, batch)), strict=True):
        shown = picture(image)
        pairs.append(f'<div class="pair">{figure(shown)}{figure(painted(colours, shown.size))}</div>')
    intro = (
        "Features of the patches: their first three principal components, over all these images, as red, green, blue."
    )
    return note(intro) + f'<div class="pairs">{"".join(pairs)}</div>'


def class_section(queries: Features | None, predicted: Tensor | None, classes: Sequence[str] | None) -> str:
    if queries is None or predicted is None or classes is None:
        return ""
    labels, guesses = queries[1].cpu(), predicted.cpu()
    labels, guesses = labels[labels != UNREAD], guesses[labels != UNREAD]
    counts = torch.bincount(labels * len(classes) + guesses, minlength=len(classes) ** 2).view(len(classes), -1).numpy()
    of_class = counts.sum(1)
    there = np.flatnonzero(of_class)
    accuracy = counts.diagonal() / np.maximum(of_class, 1)
    order = there[np.argsort(-accuracy[there], kind="stable")]
    parts = [matrix(counts, classes)] if len(classes) <= MOST_CLASSES else []
    halves = {"Accuracy by class": order}
    if len(order) > 2 * MOST_CLASSES:
        halves = {f"Best {MOST_CLASSES} classes": order[:MOST_CLASSES], f"Worst {MOST_CLASSES}": order[-MOST_CLASSES:]}
    for heading, chosen in halves.items():
        lines = [(classes[i], float(accuracy[i]), percent(accuracy[i]), f"{of_class[i]:,}") for i in chosen]
        parts.append(table(heading, ("class", "", "k-NN", "images"), lines))
    wrong = counts - np.diag(counts.diagonal())
    worst = [divmod(int(i), len(classes)) for i in np.argsort(-wrong, axis=None, kind="stable")[:10]]
    pairs = [
        (classes[i], classes[j], f"{wrong[i, j]:,}", percent(wrong[i, j] / of_class[i]))
        for i, j in worst
        if wrong[i, j]
    ]
    if pairs:
        parts.append(table("Most confused", ("class", "taken for", "images", "share"), pairs))
    return f'<div class="columns">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def matrix(counts: Int[ndarray, "classes classes"], classes: Sequence[str]) -> str:
    """Rows: the class; columns: what k-NN says; in percent of the row."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    head = "".join(f"<th><span>{text(cut(name))}</span></th>" for name in classes)
    lines = []
    for i, name in enumerate(classes):
        cells = "".join(
            f'<td style="background:color-mix(in srgb, var(--{"accent" if i == j else "bad"}) {90 * share:.0f}%, '
            f'transparent)" title="{counts[i, j]}">{100 * share:.0f}</td>'
            for j, share in enumerate(shares[i])
        )
        lines.append(f"<tr><th>{text(cut(name))}</th>{cells}</tr>")
    intro = note("Rows: the class; columns: what its nearest neighbours say; percent of the row.")
    return intro + scroll(
        f'<table class="confusion"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    )


def map_section(queries: Features | None, classes: Sequence[str] | None, seed: int = 0) -> str:
    if queries is None:
        return ""
    rows, labels = queries
    read = (labels != UNREAD).nonzero()[:, 0]
    chosen = np.random.default_rng(seed).permutation(len(read))[:POINTS]
    if len(chosen) < 10:
        return ""
    chosen_rows = read[torch.from_numpy(chosen).to(read.device)]
    method, places = flat_map(torch.nn.functional.normalize(rows[chosen_rows].float(), dim=1).cpu().numpy(), seed)
    low, high = places.min(0), places.max(0)
    places = 10 + (places - low) / np.maximum(high - low, 1e-9) * (780, 480)
    colours, dots = class_colours(classes), []
    for (x, y), label in zip(places.tolist(), labels[chosen_rows].tolist(), strict=True):
        name = f"<title>{text(classes[label])}</title>" if classes else ""
        colour = colours[label] if classes else "var(--accent)"
        dots.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4.5" fill="{colour}">{name}</circle>')
    legend = ""
    if classes is not None and len(classes) <= MOST_CLASSES:
        marks = (
            f'<span><i class="dot" style="color:{c}"></i>{text(n)}</span>'
            for c, n in zip(colours, classes, strict=True)
        )
        legend = f'<div class="legend">{"".join(marks)}</div>'
    intro = f"{method} of the features of {len(chosen)} held-out images" + (", coloured by class." if classes else ".")
    return (
        note(intro)
        + f'<svg class="map" viewBox="0 0 800 500" role="img" aria-label="{method}">{"".join(dots)}</svg>{legend}'
    )


def flat_map(rows: Float[ndarray, "points dim"], seed: int) -> tuple[str, Float[ndarray, "points 2"]]:
    """(name of the method, places): UMAP where umap-learn is installed, else t-SNE."""
    if importlib.util.find_spec("umap") is not None:
        from umap import UMAP

        return "UMAP", np.asarray(UMAP(random_state=seed, n_jobs=1).fit_transform(rows), dtype=float)
    from sklearn.manifold import TSNE

    # Fewer than scikit-learn's 1,000 iterations: the picture changes little after these, and a run waits for it.
    tsne = TSNE(init="pca", perplexity=min(30, (len(rows) - 1) / 3), max_iter=400, random_state=seed)
    return "t-SNE", np.asarray(tsne.fit_transform(rows), dtype=float)


def class_colours(classes: Sequence[str] | None) -> list[str]:
    """Hues around the circle, neighbours on it of unlike lightness."""
    number = len(classes or ())
    return [f"hsl({360 * i / number:.0f} 70% {(45, 60)[i % 2]}%)" for i in range(number)]
