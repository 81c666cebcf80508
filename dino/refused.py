"""The exception of every refusal."""


class Refused(ValueError):
    """What the user asked for cannot be done. `problems`: sentences, the key first; printed one a line."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
