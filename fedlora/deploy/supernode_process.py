"""`python -m fedlora.deploy.supernode_process`: flower-supernode as it is, but its process ends with its work.

Where Flower's own gives up (an HTTP 500, a certificate that fails for a moment), the thread of its Runtime API keeps
the process alive, healthy and idle for ever; one that is gone is started again (flwr 1.41.0).
"""

import os
import sys
import traceback
from typing import NoReturn

from flwr.supernode.cli import flower_supernode


def main() -> NoReturn:
    """The SuperNode of the command line; the process is gone when it is."""
    status = 1
    try:
        flower_supernode()
        status = 0
    except SystemExit as told:
        status = told.code if isinstance(told.code, int) else int(told.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
