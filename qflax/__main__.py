"""`python -m qflax` is the `qflax` command."""

import sys

from qflax.cli import main

sys.exit(main())
