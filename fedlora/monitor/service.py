"""A read-only gRPC service over a run's directory: how far it is, and its rounds as they come.

It takes nothing from the server's memory, so it is a process of its own beside it: neither can stop the other.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedlora.errors import ConfigError, FedLoraError, IncompleteError, LedgerError
from fedlora.monitor.address import is_loopback
from fedlora.monitor.messages import (
    GREETING,
    MESSAGE_BYTES,
    REQUEST_BYTES,
    SERVICE,
    round_message,
    status_message,
)
from fedlora.monitor.metrics import metrics_served
from fedlora.monitor.proto.monitor_pb2 import EventsRequest, Round, RunStatus, StatusRequest
from fedlora.monitor.view import View
from fedlora.provision.certificate_check import inspect_certificate
from fedlora.runs.rundir import run_config

log = logging.getLogger(__name__)

CODES = {
    IncompleteError: grpc.StatusCode.FAILED_PRECONDITION,
    LedgerError: grpc.StatusCode.DATA_LOSS,
    ConfigError: grpc.StatusCode.NOT_FOUND,
}
"""What a follower is told, by what went wrong here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What readers may take, all together.

    streams: followers at once.
    calls: other calls at once, health checks among them.
    poll_s: seconds between two looks at the directory for each follower.
    connection_age_s: then a connection has to be made anew, so that whoever reads nothing holds no place for ever.
    connection_grace_s: what is left to calls on it then.
    connections: at once.
    """

    streams: int = 16
    calls: int = 8
    poll_s: float = 0.5
    connection_age_s: float = 3600.0
    connection_grace_s: float = 10.0
    connections: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Where the monitor is reached. metrics_port is None without an HTTP endpoint."""

    host: str
    port: int
    metrics_port: int | None
    tls: bool


@contextmanager
def monitored(
    run_dir: Path,
    *,
    host: str = "127.0.0.1",
    port: int,
    metrics_port: int | None = None,
    certificate: Path | None = None,
    key: Path | None = None,
    wait: bool = False,
    limits: Limits | None = None,
) -> Iterator[Bound]:
    """The run is served for as long as the block runs.

    Args:
        run_dir: of a simulation or of a server, finished or not.
        host: an address or name of this machine; without a certificate, loopback only.
        port: of gRPC; 0 for a free one.
        metrics_port: of `/metrics`; 0 for a free one, None for none.
        certificate: PEM of the server's certificate; both ports then speak TLS only.
        key: PEM of its private key.
        wait: whether the run may begin later.
        limits: on readers.

    Raises:
        ConfigError: there is no such run, the certificate cannot be used, or a port is taken.
    """
    if not wait:
        run_config(run_dir)
    _require_sense(host, certificate, key)
    view, stopping, bounds = View(run_dir), threading.Event(), limits or Limits()
    with ExitStack() as stack:
        pool = stack.enter_context(
            ThreadPoolExecutor(bounds.streams + bounds.calls, thread_name_prefix="monitor")
        )
        server = grpc.server(
            pool, options=_options(bounds), maximum_concurrent_rpcs=bounds.streams + bounds.calls
        )
        server.add_generic_rpc_handlers((_handlers(view, bounds, stopping),))
        healthy = health.HealthServicer(experimental_non_blocking=True, experimental_thread_pool=pool)
        health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
        for name in ("", SERVICE):
            healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
        bound = _bind(server, host, port, certificate, key)
        served = None
        if metrics_port is not None:
            served = stack.enter_context(
                metrics_served(view, host, metrics_port, certificate=certificate, key=key)
            )
        server.start()
        try:
            yield Bound(host=host, port=bound, metrics_port=served, tls=certificate is not None)
        finally:
            healthy.enter_graceful_shutdown()
            stopping.set()
            server.stop(grace=2.0).wait()


def _require_sense(host: str, certificate: Path | None, key: Path | None) -> None:
    if (certificate is None) != (key is None):
        raise ConfigError("--certificate and --key belong together; give both, or neither for loopback")
    if certificate is None:
        if not is_loopback(host):
            raise ConfigError(
                f"--host: {host!r} is reached from outside, where nothing may travel in plain text; give "
                "--certificate and --key (fedlora provision makes them), or take 127.0.0.1"
            )
        return
    fatal = [found for found in inspect_certificate(certificate, datetime.now(UTC), key=key) if found.fatal]
    if fatal:
        raise ConfigError("\n".join(f"--certificate: {found.text}; {found.mend}" for found in fatal))


def _bind(server: grpc.Server, host: str, port: int, certificate: Path | None, key: Path | None) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if certificate is None or key is None:
            return server.add_insecure_port(address)
        pair = (key.read_bytes(), certificate.read_bytes())
        return server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    except RuntimeError:
        raise ConfigError(
            f"--port: {address} cannot be used: another process has it, or {host!r} is not this machine's; "
            "choose another, or end what uses it"
        ) from None


def _options(limits: Limits) -> list[tuple[str, int]]:
    age_ms, grace_ms = int(1000 * limits.connection_age_s), int(1000 * limits.connection_grace_s)
    return [
        (
            "grpc.so_reuseport",
            0,
        ),  # else a second monitor takes the same port, and readers get one or the other
        ("grpc.max_receive_message_length", REQUEST_BYTES),
        ("grpc.max_send_message_length", MESSAGE_BYTES),
        ("grpc.max_metadata_size", 8192),
        ("grpc.max_concurrent_streams", limits.streams + limits.calls),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.max_connection_idle_ms", 60_000),
        ("grpc.max_connection_age_ms", age_ms),
        ("grpc.max_connection_age_grace_ms", grace_ms),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
    ]


def _handlers(view: View, limits: Limits, stopping: threading.Event) -> grpc.GenericRpcHandler:
    places = threading.BoundedSemaphore(limits.streams)

    def status(request: StatusRequest, context: grpc.ServicerContext) -> RunStatus:
        return _told(context, lambda: status_message(view.status()))

    def events(request: EventsRequest, context: grpc.ServicerContext) -> Iterator[Round]:
        if not places.acquire(blocking=False):
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{limits.streams} follow this run already; try later"
            )
        try:
            context.send_initial_metadata(GREETING)
            wanted = request.from_round
            while context.is_active():
                finished = view.is_finished()  # before the rounds are read, so that none is missed
                for line in _told(context, lambda first=wanted: view.rounds(first)):
                    yield _told(context, lambda line=line: round_message(line))
                    wanted = line["round"] + 1
                if finished:
                    return
                if stopping.wait(limits.poll_s):
                    context.abort(grpc.StatusCode.UNAVAILABLE, "the monitor is stopping; follow again later")
        finally:
            places.release()

    unary = grpc.unary_unary_rpc_method_handler(
        status,
        request_deserializer=StatusRequest.FromString,
        response_serializer=RunStatus.SerializeToString,
    )
    stream = grpc.unary_stream_rpc_method_handler(
        events, request_deserializer=EventsRequest.FromString, response_serializer=Round.SerializeToString
    )
    return grpc.method_handlers_generic_handler(SERVICE, {"Status": unary, "Events": stream})


def _told(context: grpc.ServicerContext, read: Callable[[], Any]) -> Any:
    """What `read` gives; else the call ends with our own words, and with nothing of anybody else's exception."""
    try:
        return read()
    except FedLoraError as error:
        log.info("%s", error)
        code = next((code for kind, code in CODES.items() if isinstance(error, kind)), None)
        _end(context, code or grpc.StatusCode.INTERNAL, str(error))
    except Exception:
        log.exception("the run cannot be read")
        _end(context, grpc.StatusCode.INTERNAL, "the run cannot be read; the monitor's own log says why")


def _end(context: grpc.ServicerContext, code: grpc.StatusCode, text: str) -> NoReturn:
    context.abort(code, text[:1000])
    raise AssertionError("abort raises")
