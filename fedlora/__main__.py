"""`python -m fedlora` is the console script."""

import sys

from fedlora.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
