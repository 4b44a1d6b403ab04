"""`python -m dsjax` is the command `dsjax`."""

import sys

from dsjax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
