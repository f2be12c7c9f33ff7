"""A run's figures as Prometheus reads them: its text format, and the small HTTP server that gives it out."""

import logging
import math
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from fedlora.errors import ConfigError, FedLoraError
from fedlora.monitor.view import View

log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CONNECTIONS = 8
"""At once; a scraper needs one. The next is closed unheard."""
PATIENCE_S = 10.0
"""For a whole connection, however slowly the other side writes or reads."""

Samples = Mapping[tuple[tuple[str, str], ...], float | None]


def metrics_text(found: Mapping[str, Any] | None, last: Mapping[str, float] | None = None) -> str:
    """Everything of `found` in the text format 0.0.4; of a run that cannot be told anything of, only that.

    Args:
        found: as from `View.status`.
        last: as from `View.last_round`.
    """
    lines = _family(
        "run_readable",
        "gauge",
        "1: the run's files can be read, 0: not yet, or damaged.",
        {(): found is not None},
    )
    if found is None:
        return "\n".join(lines) + "\n"
    epsilons = found.get("epsilon_by_client") or {}
    unknown = sum(value is None for value in epsilons.values())
    metric, last = str(found["metric"]), last or {}
    one = {
        "run_finished": ("gauge", "1: no round will follow.", found["finished"]),
        "run_private": ("gauge", "1: records are protected by differential privacy.", found["private"]),
        "rounds": ("gauge", "Rounds in all.", found["rounds"]),
        "rounds_completed": ("gauge", "Rounds done.", found["rounds_completed"]),
        "rounds_seconds": ("gauge", "Seconds that the rounds took.", found["seconds"]),
        "clients": ("gauge", "Nodes that take part.", found["clients"]),
        **{f"last_round_{name}": ("gauge", meaning, last.get(name)) for name, meaning in _LAST.items()},
        "client_rounds_per_second": ("gauge", "Answers a second.", found["client_rounds_per_second"]),
        "rejected_replies": ("gauge", "Replies that could not count.", found["rejections"]),
        "epsilon_max": ("gauge", "Epsilon of the node that spent most.", found["epsilon_max"]),
        "epsilon_unknown_clients": ("gauge", "Nodes whose account is short.", unknown if found["private"] else None),
        "delta": ("gauge", "The delta of every epsilon here.", found.get("delta")),
        "update_bytes": ("gauge", "Of one node's reply.", found.get("bytes_up_per_client_round")),
        "request_bytes": ("gauge", "Of what one node is sent.", found.get("bytes_down_per_client_round")),
    }  # fmt: skip
    for name, (kind, meaning, value) in one.items():
        lines += _family(name, kind, meaning, {(): value})
    scores = {(("metric", metric), ("model", model)): found[key] for model, key in _MODELS.items()}
    lines += _family("score", "gauge", "On the public test data.", scores)
    many = {
        "client_participations": ("client", "Rounds that a node answered.", found["participations"]),
        "epsilon": ("client", "Spent by a node, as it reports.", epsilons),
        "refused_replies": ("reason", "Replies that refused.", found["refusals_by_reason"]),
    }
    for name, (label, meaning, values) in many.items():
        lines += _family(name, "gauge", meaning, {((label, key),): value for key, value in values.items()})
    return "\n".join(lines) + "\n"


_LAST = {
    "asked": "Nodes that were asked in the last round.",
    "answered": "Nodes whose update counted in it.",
    "refused": "Nodes that refused in it.",
    "rejected": "Nodes whose reply could not count in it.",
    "seconds": "Seconds that it took.",
    "reply_bytes": "Of one node's reply, as it came.",
    "public_clip_share": "Of public test records, the part whose gradient is clipped.",
}
_MODELS = {"first": "score_before", "newest": "score"}


def _family(name: str, kind: str, meaning: str, samples: Samples) -> list[str]:
    """One metric under its heading; a value that is not known is left out, and so is a metric without values."""
    known = {labels: value for labels, value in samples.items() if value is not None}
    if not known:
        return []
    heading = [f"# HELP fedlora_{name} {meaning}", f"# TYPE fedlora_{name} {kind}"]
    return heading + [f"fedlora_{name}{_labels(labels)} {_number(value)}" for labels, value in known.items()]


def _labels(labels: tuple[tuple[str, str], ...]) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels) + "}" if labels else ""


def _escaped(value: str) -> str:
    sound = value.encode("utf-8", "replace").decode()
    return sound.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(float(value)).removesuffix(".0")
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


@contextmanager
def metrics_served(
    view: View, host: str, port: int, *, certificate: Path | None = None, key: Path | None = None
) -> Iterator[int]:
    """`/metrics` is served for as long as the block runs; gives the port.

    Args:
        view: of the run.
        host: an address of this machine, or a name of it.
        port: 0 for a free one.
        certificate: PEM; then it is HTTPS.
        key: PEM, of the certificate.

    Raises:
        ConfigError: the port is taken, or the host is not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        server = _Server(view, host, port, family)
    except OSError as error:
        raise ConfigError(
            f"--metrics-port: {host}:{port} cannot be used ({error.strerror}); choose another, or end what uses it"
        ) from None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        # The handshake waits for the other side, so it belongs to the connection's own thread.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield server.socket.getsockname()[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    request_queue_size = 128  # a burst of connections must not make a scraper wait for its SYN to be repeated
    daemon_threads = True
    block_on_close = False

    def __init__(self, view: View, host: str, port: int, family: int) -> None:
        self.address_family = family
        self.view = view
        self._room = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        # Past the TLS layer: it is not made for two threads at once.
        enough = threading.Timer(PATIENCE_S, _cut, (request,))
        enough.daemon = True
        enough.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            enough.cancel()
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a connection to /metrics failed", exc_info=True)


def _cut(request: socket.socket) -> None:
    try:
        socket.socket.shutdown(request, socket.SHUT_RDWR)
    except OSError:
        log.debug("a connection to /metrics was gone already")


class _Handler(BaseHTTPRequestHandler):
    timeout = PATIENCE_S
    server_version = "fedlora"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(HTTPStatus.NOT_FOUND, "only /metrics is here")
            return
        assert isinstance(self.server, _Server)
        try:
            text = metrics_text(self.server.view.status(), self.server.view.last_round())
        except FedLoraError as error:
            log.info("%s", error)
            text = metrics_text(None)
        except Exception:
            log.exception("the run cannot be read")
            text = metrics_text(None)
        body = text.encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)
