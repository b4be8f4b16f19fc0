"""Run the command line as `python -m predictions`; it is in `predictions.cli`, which the layer does not ship."""

import sys

from predictions.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
