import functools
import pickle
from pathlib import Path
from typing import Literal

import pytest

from dino.config.node import build_node, misfits
from dino.runtime.annotated import Misfit, fitted
from dino.runtime.refused import Refused


class Part:
    def __init__(
        self,
        width: int,
        rate: float = 0.5,
        betas: tuple[float, float] = (0.9, 0.99),
        mode: Literal["a", "b"] = "a",
        inner: object = None,
    ) -> None:
        if width < 1:
            raise ValueError(f"Part: width must be at least 1, got {width}.")
        self.width, self.rate, self.betas, self.mode, self.inner = width, rate, betas, mode, inner


TARGET = f"{__name__}.Part"


def keys_of(node: dict, late=()) -> list[str]:
    return [key for key, _ in misfits("part", {"_target_": TARGET, **node}, late)]


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, 1.0),
        (1, float | int, 1),
        ([1, 2], tuple[float, float], (1.0, 2.0)),
        ([1, 2, 3], tuple[int, ...], (1, 2, 3)),
        ([[1, 2]], list[tuple[int, int]], [(1, 2)]),
        ("x", str | Path, "x"),
        ("x", Path, Path("x")),
        (None, int | None, None),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
    ],
)
def test_a_yaml_value_becomes_what_is_annotated(value, hint, expected):
    result = fitted(value, hint)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (True, int),
        (True, float),
        (1.5, int),
        (1.0, int),
        ("1", float),
        (float("nan"), float),
        (float("inf"), float),
        (10**400, float),
        ([0.4], tuple[float, float]),
        ([0.4, "x"], tuple[float, float]),
        ("ab", list[str]),
        (1, bool),
        (1, Literal[True]),
        ("c", Literal["a", "b"]),
        ({"a": 1}, int | None),
        ([], str),
    ],
)
def test_a_value_of_another_type_is_a_misfit(value, hint):
    with pytest.raises(Misfit):
        fitted(value, hint)


def test_a_sound_node_has_no_misfits():
    assert keys_of({"width": 3, "rate": 1, "betas": [0, 1], "mode": "b", "inner": {"_target_": "pathlib.Path"}}) == []


def test_all_misfits_of_a_node_are_named_together():
    assert keys_of({"rate": "x", "betas": [1], "mode": "c", "widht": 3}) == [
        "part.rate",
        "part.betas",
        "part.mode",
        "part.widht",
        "part.width",
    ]


def test_a_misspelt_argument_is_answered_with_the_one_that_was_meant():
    ((_, sentence), *_) = misfits("part", {"_target_": TARGET, "width": 1, "ratte": 1})
    assert sentence == "part.ratte=1: Part takes no ratte; did you mean rate?"


def test_what_the_run_gives_is_neither_missing_nor_to_be_given():
    assert keys_of({}, late=("width",)) == []
    assert keys_of({"width": 3}, late=("width",)) == ["part.width"]
    assert keys_of({"_partial_": True}) == []


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("torch.optim.AdmW", "torch.optim has no AdmW; did you mean Adam"),
        ("no_such_package.Thing", "no module no_such_package"),
        ("AdamW", "dotted name"),
        ("torch.pi", "neither"),
        (3, "dotted name"),
    ],
)
def test_a_target_that_is_none_is_one_sentence(target, words):
    ((key, sentence),) = misfits("part", {"_target_": target})
    assert key == "part._target_"
    assert words in sentence


def test_build_makes_nested_parts_with_converted_values():
    part = build_node(
        {"_target_": TARGET, "width": 2, "rate": 1, "inner": {"_target_": TARGET, "width": 3, "betas": [1, 2]}}
    )
    assert (part.width, part.rate, part.inner.betas) == (2, 1.0, (1.0, 2.0))
    assert isinstance(part.rate, float)


def test_a_partial_waits_for_its_late_arguments_and_pickles():
    node = {"_target_": TARGET, "_partial_": True, "betas": [1, 2]}
    waiting = build_node(node)
    assert isinstance(waiting, functools.partial)
    assert pickle.loads(pickle.dumps(waiting))(width=4).betas == (1.0, 2.0)
    assert build_node(node, width=5).width == 5


def test_what_a_constructor_objects_to_is_a_refusal_in_its_words():
    with pytest.raises(Refused, match=r"^Part: width must be at least 1, got 0\.$"):
        build_node({"_target_": TARGET, "width": 0})


def test_a_mistake_inside_a_constructor_keeps_its_traceback():
    with pytest.raises(NameError):
        build_node({"_target_": f"{__name__}.broken"})


def broken() -> None:
    undefined_name  # noqa: B018, F821
