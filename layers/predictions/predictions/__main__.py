"""Run the command line of `predictions.cli` as `python -m predictions`."""

import sys

from predictions.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
