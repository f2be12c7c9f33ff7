"""A hub that is there, and gives nothing."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer


class Unfriendly(BaseHTTPRequestHandler):
    """Answers that there is no such thing."""

    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, *words: object) -> None:
        pass


@contextmanager
def unfriendly_hub() -> Iterator[str]:
    """Its address."""
    server = HTTPServer(("127.0.0.1", 0), Unfriendly)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
