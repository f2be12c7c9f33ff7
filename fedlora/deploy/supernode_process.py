"""`python -m fedlora.deploy.supernode_process`: flower-supernode as it is, but its process ends with its work.

Where Flower's own gives up (an HTTP 500, a certificate that fails for a moment), the thread of its Runtime API keeps
the process alive, healthy and idle for ever; one that is gone is started again (flwr 1.41.0).
"""

import os
import sys
import traceback
from typing import NoReturn

import httpx
from flwr.supercore.error.base import ApiErrorCode, FlowerError
from flwr.supernode.cli import flower_supernode

TURNED_AWAY = (
    "fedlora: turned away, since the SuperLink knows no node with this key, or has not yet given up the one that died "
    "(up to 60 s). Keys are registered by `fedlora serve --nodes nodes.json`: see that it runs (in fedlora's checkout "
    "or with --app) and that its nodes.json lists this key, then start this again"
)


def main() -> NoReturn:
    """The SuperNode of the command line; the process is gone when it is."""
    status = 1
    try:
        flower_supernode()
        status = 0
    except SystemExit as told:
        status = told.code if isinstance(told.code, int) else int(told.code is not None)
        if _is_turned_away(told):
            print(TURNED_AWAY, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _is_turned_away(told: BaseException | None) -> bool:
    """Whether the SuperLink's refusal to activate this node is what ended it."""
    while told is not None:
        if isinstance(told, httpx.HTTPStatusError):
            error = FlowerError.from_json(told.response.text)
            return error is not None and error.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED
        told = told.__context__
    return False


if __name__ == "__main__":
    main()
