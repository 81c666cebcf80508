"""How fast images become views: `python -m benchmarks.data --images FOLDER`, or without, on photographs made up here.

One table, from one process with one thread: JPEG decoding alone (the floor), the reference in PIL, and this project's
halves apart and together. The contestants take turns, round by round, so that a busy neighbour slows all of them; a
ratio is the median over the rounds of the reference's time by the contestant's in the same round.
`--device cuda` adds what a GPU and some workers make of it; `--profile` says where a worker's milliseconds go instead.
"""

import argparse
import os
import re
import statistics
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg

from benchmarks.reference import ReferenceImages, ReferenceTransform, photograph
from dino import augmentation
from dino.augmentation import DINOTransform, collate_multi_crop, crops
from dino.dataset import encoded
from dino.dataset.cache import Cached
from dino.dataset.files import ImageFiles
from dino.dataset.folder import Folder
from dino.loading import views
from dino.loading.batches import Steps
from dino.loading.sampler import Batching
from dino.loading.views import Loading

LOCAL_VIEWS = 8  # of 96 pixels, beside the two of 224
REFERENCE = "reference: decode, crop, photometry, all in PIL"
QUALITY = 88  # of JPEG: the made-up photographs take 110 kB as ImageNet's do
COMPILED = ", compiled"
Contestant = Callable[[int], float]  # the number of the round -> milliseconds an image


class Course:
    """An epoch over the images, in steps of at most `batch_size` of them; what fills no step is left out."""

    def __init__(self, images: ImageFiles, batch_size: int, device: str) -> None:
        self.images, self.device = images, device
        self.size = len(images) // -(-len(images) // batch_size)
        self.jpegs = [images.encoded(index) for index in range(len(images))]

    def ms(self, things: Iterable[Any], images: int) -> float:
        """Milliseconds an image that it takes to go through `things`, which are made of so many."""
        begin = time.perf_counter()
        for _ in things:
            pass
        if self.device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - begin) / images

    def alone(self, decode: Callable[[bytes], Any]) -> Contestant:
        return lambda _: self.ms(map(decode, self.jpegs), len(self.jpegs))

    def reference(self) -> Contestant:
        """Which has no halves: all of it is a worker's."""
        transform, images = ReferenceTransform(LOCAL_VIEWS), ReferenceImages(self.images)
        batches = list(Steps(images, transform, Batching(self.size)).sampler)
        cut = lambda batch: collate_multi_crop([(transform.crop(images[i][0]), -1) for _, i in batch])  # noqa: E731
        return lambda _: self.ms(map(cut, batches), len(batches) * self.size)

    def half(self, dataset: Any, transform: DINOTransform) -> Contestant:
        """The worker's, in this process."""

        def run(seed: int) -> float:
            steps = Steps(dataset, transform, Batching(self.size, seed=seed))
            return self.ms(steps.loader, len(steps) * self.size)

        return run

    def photometry(self, transform: DINOTransform, batches: list[list[torch.Tensor]]) -> Contestant:
        count = len(batches) * self.size
        return lambda seed: self.ms((transform.augment(views, (seed, i)) for i, views in enumerate(batches)), count)

    def both(self, dataset: Any, transform: DINOTransform, workers: int = 0, **options: Any) -> Contestant:
        """Both halves; with workers, from when their head start is used up, two batches each."""

        def run(seed: int) -> float:
            end, start = (8 * workers, 2 * workers) if workers else (None, 0)
            batching, loading = Batching(self.size, seed=seed), Loading(num_workers=workers, **options)
            steps = Steps(dataset, transform, batching, end=end, loading=loading)
            views = (part for _, parts in steps for part in parts)
            for _ in range(start):
                next(views)
            return self.ms(views, (len(steps) - start) * self.size)

        return run


def contestants(course: Course, compiling: bool, workers: int) -> dict[str, Contestant]:
    images, ours = course.images, DINOTransform(LOCAL_VIEWS)
    cut = [views for (views, _), _ in Steps(images, ours, Batching(course.size)).loader]
    ways = {"": ours}
    if compiling:
        ways[COMPILED] = DINOTransform(LOCAL_VIEWS)
        ways[COMPILED].compile()
    found = {
        "JPEG decoding alone, torchvision": course.alone(lambda jpeg: decode_jpeg(in_tensor(jpeg), ImageReadMode.RGB)),
        "JPEG decoding alone, PIL": course.alone(lambda jpeg: Image.open(BytesIO(jpeg)).convert("RGB")),
        REFERENCE: course.reference(),
        "worker's half: read, decode, crop, stack": course.half(images, ours),
        "worker's half from memory: crop, stack": course.half(Cached(images), ours),
    }
    for how, by in ways.items():
        found[f"photometry{how}"] = course.photometry(by, cut)
        found[f"both halves{how}"] = course.both(images, by)
    if course.device == "cuda":
        there, held = [[view.cuda() for view in batch] for batch in cut], Cached(images, device=torch.device("cuda"))
        gpu = torch.device("cuda")
        for how, by in ways.items():
            found[f"GPU: photometry{how}"] = course.photometry(by, there)
            found[f"GPU: crops and photometry, images in its memory{how}"] = course.both(
                held, by, device=torch.device("cuda")
            )
        jpegs = [in_tensor(jpeg) for jpeg in course.jpegs]
        found["GPU: JPEG decoding alone, nvJPEG"] = lambda _: course.ms(
            (decode_jpeg(jpegs[i::2], ImageReadMode.RGB, device=torch.device("cuda")) for i in range(2)), len(jpegs)
        )
        for does in ("photometry", "crops"):
            found[f"{workers} workers, the GPU does the {does}"] = course.both(
                images, ours, workers, device=gpu, device_does=does
            )
        reference = ReferenceImages(images), ReferenceTransform(LOCAL_VIEWS)
        found[f"{workers} workers, the reference"] = course.both(*reference, workers, device=gpu)
    return found


def in_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def race(running: dict[str, Contestant], rounds: int) -> dict[str, list[float]]:
    """Milliseconds an image of each in each round, after a round that warms up and compiles."""
    for name, run in running.items():
        begin = time.perf_counter()
        run(0)
        if name.endswith(COMPILED):
            print(f"Not in the table: the first pass of {name!r} took {time.perf_counter() - begin:.0f} s.")
    taken: dict[str, list[float]] = {name: [] for name in running}
    for number in range(1, rounds + 1):
        for name, run in running.items():
            taken[name].append(run(number))
    return taken


def print_race(taken: dict[str, list[float]]) -> None:
    print("\n| | ms an image | best round | images/s | x reference |\n|---|---|---|---|---|")
    for name, times in taken.items():
        median = statistics.median(times)
        ratio = statistics.median(a / b for a, b in zip(taken[REFERENCE], times, strict=True))
        print(f"| {name} | {median:.2f} | {min(times):.2f} | {1e3 / median:.1f} | {ratio:.2f} |")


STAGES: dict[str, tuple[Any, str]] = {  # what a worker calls, and where it looks that up
    "read the file": (ImageFiles, "encoded"),
    "read the header": (Image, "open"),
    "decode the JPEG": (torchvision.io, "decode_jpeg"),
    "channels last": (encoded, "pixels_of"),
    "what else an image is checked for": (encoded, "decode"),
    "draw the boxes": (DINOTransform, "boxes"),
    "resize to the {} px views": (crops, "interpolate"),
    "flip and copy": (augmentation, "cut"),
    "random generators, look-ups": (views.Samples, "__getitem__"),
    "stack the batch": (views.Samples, "collate"),
}


@contextmanager
def stopwatch() -> Iterator[Counter[str]]:
    """Seconds spent in each of STAGES, without what is spent in another of them that it calls."""
    seconds: Counter[str] = Counter()
    inside = 0.0

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal inside
            before, inside = inside, 0.0
            begin = time.perf_counter()
            result = function(*args, **options)
            took = time.perf_counter() - begin
            seconds[name.format(*args[1]) if "{}" in name else name] += took - inside
            inside = before + took
            return result

        return call

    with ExitStack() as patches:
        for name, (owner, attribute) in STAGES.items():
            patches.enter_context(patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        yield seconds


def profile(course: Course, rounds: int) -> dict[str, list[float]]:
    """Milliseconds an image of each stage and of their sum, beside the whole without a stopwatch, in each round."""
    ours, taken = DINOTransform(LOCAL_VIEWS), defaultdict(list)
    steps = Steps(course.images, ours, Batching(course.size))
    batches, collate = list(steps.sampler), steps.loader.collate_fn
    ready = {key: steps.loader.dataset[key] for batch in batches for key in batch}
    for number in range(rounds + 1):
        with stopwatch() as seconds:
            course.half(course.images, ours)(number)
        row = {name: 1e3 * of_it / len(ready) for name, of_it in seconds.items()}
        handed = by_one_worker(course, ready, batches * 4, collate)
        row["hand over to the main process"] = handed - row["stack the batch"]
        row["**sum**"] = sum(row.values())
        row["all but the last, without the stopwatch"] = course.half(course.images, ours)(number)
        row["all, by one worker process"] = by_one_worker(course, steps.loader.dataset, batches * 3, collate)
        for name, ms in row.items():
            taken[name] += [ms] if number else []  # the first round warms up
    return taken


def by_one_worker(course: Course, samples: Any, batches: list[Any], collate: Any) -> float:
    """Milliseconds an image, from the first batch that a worker of a DataLoader hands over to the last."""
    loaded = iter(DataLoader(samples, batch_sampler=batches, collate_fn=collate, num_workers=1))
    next(loaded)
    return course.ms(loaded, sum(map(len, batches[1:])))


def print_profile(taken: dict[str, list[float]]) -> None:
    print("\n| a worker's time | ms an image | best round | of the sum |\n|---|---|---|---|")
    median = {name: statistics.median(times) for name, times in taken.items()}
    for name, times in taken.items():
        print(f"| {name} | {median[name]:.2f} | {min(times):.2f} | {median[name] / median['**sum**']:.0%} |")


def description(course: Course, what: str) -> str:
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    cpu = found.group(1) if found else "unknown CPU"
    gpu = f" and {torch.cuda.get_device_name()}" if course.device == "cuda" else ""
    size, often = Counter(Image.open(BytesIO(jpeg)).size for jpeg in course.jpegs).most_common(1)[0]
    kilobytes = sum(map(len, course.jpegs)) / len(course.jpegs) / 1e3
    return (
        f"{cpu}, one thread on {os.cpu_count()} cores{gpu}; torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}; {len(course.jpegs)} {what}, {kilobytes:.0f} kB on average, {often} of "
        f"them {size[0]} x {size[1]}; views 2 x 224 and {LOCAL_VIEWS} x 96, batches of {course.size}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--images", help="a folder of JPEG files; where none is given, 64 are made up")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--batch-size", type=int, default=64, help="at most")
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: what a GPU does, as well")
    options.add_argument("--workers", type=int, default=8, help="on the way to the GPU")
    options.add_argument("--eager", action="store_true", help="leave out what is compiled")
    options.add_argument("--profile", action="store_true", help="where a worker's time goes, instead of the table")
    chosen = options.parse_args(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "The image decoding and encoding")  # torchvision 0.29 announces torchcodec
    device = chosen.device
    if device == "cuda" and not torch.cuda.is_available():
        print("This torch sees no CUDA device: the GPU's rows are left out.\n")
        device = "cpu"
    with tempfile.TemporaryDirectory() as made_up:
        for number in range(0 if chosen.images else 64):
            photograph(np.random.default_rng(number)).save(Path(made_up, f"{number}.jpg"), quality=QUALITY)
        course = Course(Folder(chosen.images or made_up, "train"), chosen.batch_size, device)
        print(description(course, "images of a folder" if chosen.images else "images made up of 1/f noise"))
        if chosen.profile:
            print_profile(profile(course, chosen.rounds))
        else:
            print_race(race(contestants(course, not chosen.eager, chosen.workers), chosen.rounds))


if __name__ == "__main__":
    main()
