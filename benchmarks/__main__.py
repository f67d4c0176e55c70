"""``python -m benchmarks``: ``fusedopt bench`` with the contenders of the suite too."""

import sys

from fusedopt.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
