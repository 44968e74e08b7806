"""`python -m qflax` is the `qflax` command."""

import sys

from qflax import cpu
from qflax.cli import main


def run() -> int:
    """Runs the program; returns the exit code."""
    cpu.use_huge_pages()
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run())
