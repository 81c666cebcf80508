"""The exception of every refusal, and how a value or an error stands in its sentence."""

from typing import Any


class Refused(ValueError):
    """What the user asked for cannot be done. `problems`: sentences, the key first; printed one a line."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def shown(value: Any, most: int = 60) -> str:
    """A value as one would write it in an override, cut where it has more than `most` letters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = " ".join(str(value).split()) or repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def one_line(error: BaseException) -> str:
    """The message of an error on one line; its type where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where it has none."""
    return str(error).partition("\n")[0] or type(error).__name__
