"""The process that works on a server's run, which only `fedlora serve` starts: its order is one line on stdin."""

import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.cli.attached import log_to_stderr


def main() -> int:
    """The exit status of the process, which does nothing where who started it died before it gave the order."""
    line = sys.stdin.readline()
    return work(json.loads(line)) if line else 1


def work(order: dict[str, Any]) -> int:
    """The exit status of the process that works on a run: what the stock ServerApp does, with our own code only."""
    os.set_inheritable(order["held"], False)
    # Flower's client sends SIGINT to end us; a parent in the background may have had it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log_to_stderr()
    from fedlora.cli.app import explain

    try:
        _work(order["config"], order["set"], order)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        message, status = explain(error)
        if status == 1:
            traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            message = "the SuperLink has given this run up"
        logging.getLogger(__name__).error("%s", message)
        return status


def _work(path: str, overrides: Sequence[str], order: dict[str, Any]) -> None:
    from fedlora.config.load import load_config
    from fedlora.config.located import located
    from fedlora.deploy.server_task import server_task

    certificates = None if order["certificates"] is None else Path(order["certificates"]).read_bytes()
    with server_task(order["superlink"], certificates, order["token"]) as grid:
        from fedlora.deploy.server import serve  # imports torch: the SuperLink knows of us by now
        from fedlora.export.deliver import delivering

        config = load_config(path, overrides)
        with located(path, overrides):
            stored = delivering(Path(config.output), config, logging.getLogger("fedlora").info)
            deliver_missing(serve(grid, config, stored))


def deliver_missing(run_dir: Path) -> None:
    """The adapter and the report are there, whichever process died before it had written them."""
    if (run_dir / "adapter").exists() and (run_dir / "report.html").exists():
        return
    from fedlora.export.deliver import deliver

    deliver(run_dir, logging.getLogger("fedlora").info)


if __name__ == "__main__":
    raise SystemExit(main())
