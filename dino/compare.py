"""Runs side by side: `python -m dino.compare outputs/<sweep>`, also of a sweep that still goes on.

Prints a table, the best k-NN first, and writes compare.csv and compare.png into the directory (of several: into the one
that holds them all). k-NN is the accuracy; loss, loss / ln K and the entropy of the teacher's outputs over ln K are
means of the last ten recorded steps, images / s a median.
"""

import argparse
import sys
from pathlib import Path

from dino.run.comparison import compare
from dino.runtime.refused import Refused


def main() -> None:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m dino.compare", description=summary, epilog=more)
    parser.add_argument("directories", nargs="+", type=Path, metavar="directory", help="of a sweep or a run")
    try:
        print(compare(parser.parse_args().directories))
    except (Refused, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
