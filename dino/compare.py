"""Runs side by side: `python -m dino.compare runs=outputs/<sweep>`, also of a sweep that still goes on.

Prints a table, the best k-NN first, and writes compare.csv and compare.png into the directory. Of several directories,
`runs=[a,b]`, it writes them into the one that holds them all. k-NN is the accuracy; loss, loss / ln K and the entropy
of the teacher's outputs over ln K are means of the last ten recorded steps, images / s a median.
Keys: conf/compare.yaml.
"""

from pathlib import Path
from typing import Any

from dino.config.program import run_program
from dino.config.settings import Compare, settings_of
from dino.run.comparison import compare


def main() -> None:
    run_program("compare", __doc__, show)


def show(config: dict[str, Any]) -> None:
    print(compare([Path(directory) for directory in settings_of(Compare, config).runs]))


if __name__ == "__main__":
    main()
