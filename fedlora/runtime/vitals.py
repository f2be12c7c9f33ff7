"""Whether the processes of Ray that nobody replaces still live. Ray itself ends this process when they do not."""

import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import ray
from ray.util.client import ray as from_outside

from fedlora.errors import IncompleteError

HEAD_S = 20.0
"""Seconds in which a head that does not answer may come back."""
LOOK_S = 5.0
"""Seconds between looks at the head."""
REACH_S = 3.0
"""Seconds that the head has to take a connection."""


class Vitals:
    """Watches the cluster's head and, on this machine, the raylet, through which all work is handed out.

    Ray ends this process within a second of its raylet, whatever it does, with status 1 and not a word of what
    happened: so it is ended here as soon as the raylet is, with status 4 and how to go on. It is interrupted as by
    kill -9, which every file of a run outlives. From outside (ray://) neither can be reached: there, Ray Client says
    when its connection is lost.
    """

    def __init__(self, run_dir: Path, head_s: float = HEAD_S, go_on: str | None = None) -> None:
        self._go_on = go_on or f"every finished round is kept, go on with: fedlora resume {run_dir}"
        self._head_s = head_s
        self._looked = time.monotonic()
        self._missed: float | None = None
        self._head: tuple[str, int] | None = None
        self._line: socket.socket | None = None
        self._closing = threading.Event()
        if not from_outside.is_connected():
            host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
            self._head = host.strip("[]"), int(port)
            path = _raylet()
            self._line = _line(path)
            threading.Thread(target=self._end_with_raylet, args=(path,), daemon=True).start()

    def require_head(self) -> None:
        """The head answers, or did so lately.

        Raises:
            IncompleteError: it has been out of reach for too long.
        """
        now = time.monotonic()
        if self._head is None or now - self._looked < LOOK_S:
            return
        self._looked = now
        if _answers(self._head):
            self._missed = None
        elif self._missed is None:
            self._missed = now
        elif now - self._missed > self._head_s:
            host, port = self._head
            raise IncompleteError(
                f"the head of the Ray cluster ({host}:{port}) does not answer any more; {self._go_on}"
            )

    def close(self) -> None:
        """Nothing is watched any more. Must come before Ray is shut down."""
        self._closing.set()
        if self._line is not None:
            with suppress(OSError):  # it was cut at the other end
                self._line.shutdown(socket.SHUT_RDWR)

    def _end_with_raylet(self, path: str) -> None:
        while self._line is not None:
            with suppress(OSError), self._line:
                self._line.recv(1)  # nothing is ever said: it ends with the process at the other end
            if self._closing.is_set():
                return
            try:
                self._line = _line(path)  # it only hung up
            except OSError:
                os.write(2, f"Ray's process on this machine (raylet) died; {self._go_on}\n".encode())
                os._exit(IncompleteError.exit_status)


def _raylet() -> str:
    here = ray.get_runtime_context().get_node_id()
    (path,) = [node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == here]
    return path


def _line(path: str) -> socket.socket:
    line = socket.socket(socket.AF_UNIX)
    try:
        line.connect(path)
    except OSError:
        line.close()
        raise
    return line


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, REACH_S).close()
    except OSError:
        return False
    return True
