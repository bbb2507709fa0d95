"""``python -m fxquant.evaluation``: the same as ``fxquant evaluate``."""

import sys

from fxquant.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
