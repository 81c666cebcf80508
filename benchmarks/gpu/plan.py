"""What is measured, the most important first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

LARGE, SMALL = (
    (224, 96, 8),
    (128, 64, 6),
)  # global and local size in pixels, local views: the paper's, ImageNette's
LEARNED = "outputs/learning/history.json"  # below the folder of that part


@dataclass(frozen=True)
class Settings:
    """tiny: sizes for a CPU. data: the folder that holds imagenette2-160; None: what needs it is left out."""

    tiny: bool
    data: str | None
    minutes: float  # of the learning run
    recipe: tuple[str, ...]  # overrides of the learning run

    @property
    def rounds(self) -> int:
        return 2 if self.tiny else 20


@dataclass(frozen=True)
class Part:
    """A process that calls `function` ("steps.measure") with a Turn and `arguments`, and returns its figures.

    seconds: what it takes where nothing goes wrong; it is not begun where less is left. limit: when it is killed.
    alone: nothing else may run, not even a compiler. needs: the part without whose figures it is left out.
    given_them: and those figures are its first argument. cache: of compiled code, a folder that begins empty.
    """

    name: str
    function: str
    arguments: tuple[Any, ...]
    seconds: float
    limit: float
    alone: bool = False
    needs: str | None = None
    given_them: bool = False
    cache: str = "shared"


def parts(settings: Settings) -> list[Part]:
    whole = list(runs(settings))
    first = [*of_steps(settings, "vits16_64"), *of_steps(settings, "resnet18_256")]
    rest = [part for name in ("resnet50_64", "vits16_128", "vitb16_64") for part in of_steps(settings, name)]
    warm = [again(settings, part) for part in [*first, *rest] if not part.name.endswith(("reference", "eager"))]
    return [*first, *whole, *of_data(settings), *warm[:4], *rest, *warm[4:]]


def of_steps(settings: Settings, name: str) -> Iterator[Part]:
    """The contestants of one table; those that take the least time to be ready are the last to be begun."""
    overrides = step_overrides(settings, name)
    for contestant in ("captured", "compiled", "reference", "eager"):
        compiles = contestant in ("captured", "compiled")
        yield Part(
            f"{name}/{contestant}",
            "steps.measure",
            (contestant, overrides, settings.rounds),
            seconds=100 if compiles else 25,
            limit=330 if compiles else 240,  # for one that is ready waits until the others have compiled
            cache=f"{name}_{contestant}",
        )


def again(settings: Settings, part: Part) -> Part:
    """Its first step, with the compiled code of `part` in the cache."""
    arguments = (*part.arguments, True)
    return Part(f"{part.name}/warm", part.function, arguments, seconds=20, limit=120, needs=part.name, cache=part.cache)


def step_overrides(settings: Settings, name: str) -> list[str]:
    backbone, _, batch = name.partition("_")
    small = backbone == "resnet18"
    named = {"vits16": "dino_vits16", "vitb16": "dino_vitb16"}.get(backbone, backbone)
    images = ["dataset=textures", "dataset.train.images=1024", "dataset.val.images=10", "training.num_workers=0"]
    overrides = [f"backbone={named}", f"training.batch_size={batch}", *images, *of_views(SMALL if small else LARGE)]
    overrides += ["dataset.out_dim=2048"] if small else ["head=dino", "dataset.out_dim=65536"]  # the paper's
    if settings.tiny:
        overrides += [*of_views((32, 16, 2)), "training.batch_size=4", "dataset.out_dim=64"]
        overrides += ["backbone.depth=2", "backbone.hidden_dim=48", "backbone.heads=3"] if "vit" in name else []
    return overrides


def of_views(views: tuple[int, int, int]) -> list[str]:
    names = ("global_size", "local_size", "num_local_views")
    return [f"dataset.{name}={value}" for name, value in zip(names, views, strict=True)]


def runs(settings: Settings) -> Iterator[Part]:
    short = ["backbone=resnet18", "dataset=textures", "training.batch_size=64", "training.epochs=2"]
    if settings.tiny:
        tiny = ["dataset.train.images=96", "dataset.val.images=40", "training.batch_size=8", "training.num_workers=0"]
        tiny += ["backbone.hidden_dim=32", "backbone.depth=1", "head.hidden_dim=32", "dataset.out_dim=64"]
        learns, short = tiny, [*tiny, "training.epochs=3"]
        steps = [*short, "evaluate_every_epochs=3"]
    elif settings.data is None:
        yield resume(short)
        return
    else:
        images = f"dataset.root={settings.data}"
        steps = ["backbone=resnet18", "dataset=imagenette", images, "training.batch_size=256", "training.max_steps=360"]
        learns = [images]
    yield Part("end_to_end", "runs.end_to_end", (steps,), seconds=60, limit=150, alone=True)
    yield Part(
        "learning",
        "runs.learning",
        (settings.minutes, [*learns, *settings.recipe]),
        seconds=60 * settings.minutes,
        limit=60 * settings.minutes + 60,
        alone=True,
        needs="end_to_end",
        given_them=True,
    )
    yield resume(short)


def resume(overrides: Sequence[str]) -> Part:
    return Part("resume", "runs.resume", ([*overrides, "evaluator=none"],), seconds=60, limit=200)


def of_data(settings: Settings) -> Iterator[Part]:
    for batch, views in ((64, LARGE), (256, SMALL)):
        size, side = views[0], 160
        if settings.tiny:
            batch, views, side = 2, (32, 16, 2), 40
        for how, compiled, seconds in (("", False, 15), ("_compiled", True, 40)):
            arguments = (batch, views, settings.rounds, compiled)
            yield Part(f"photometry_{size}{how}", "data.photometry", arguments, seconds, limit=200)
        yield Part(f"crops_{size}", "data.crops", (batch, side, views, settings.rounds), seconds=15, limit=200)
