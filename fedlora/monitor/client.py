"""Asks a run's monitor from afar: once, or line by line as rounds are done."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from fedlora.errors import ConfigError, FedLoraError, IncompleteError, LedgerError
from fedlora.monitor.address import MonitorAddress
from fedlora.monitor.messages import MESSAGE_BYTES, REQUEST_BYTES, SERVICE, round_words, status_words
from fedlora.monitor.proto.monitor_pb2 import EventsRequest, Round, RunStatus, StatusRequest
from fedlora.monitor.trouble import trouble

STATUS_S = 30.0
"""Epsilon of many nodes may have to be computed first."""
STREAM_S = 1800.0
"""Then a stream is asked for anew, from the next round on."""
PATIENCE_S = 90.0
"""How long a monitor that was there may be away: it is being restarted."""
PAUSE_S = 1.0

_AGAIN = (
    grpc.StatusCode.UNAVAILABLE,  # restarted, or the connection reached its age
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,  # its own old place may not be free yet
)


@dataclass(slots=True)
class _Patience:
    """Ends a follower that was away from the monitor for `limit_s`."""

    limit_s: float
    lost_since: float | None = None

    def is_over(self) -> bool:
        now = time.monotonic()
        self.lost_since = now if self.lost_since is None else self.lost_since
        return now - self.lost_since >= self.limit_s


def ask_status(server: MonitorAddress, *, timeout_s: float = STATUS_S) -> dict[str, Any]:
    """What `View.status` found at the server.

    Raises:
        IncompleteError: the server cannot be reached, or can tell nothing yet.
        ConfigError: its certificate is not trusted, no monitor is there, or the run's files are damaged.
    """
    with _channel(server) as channel:
        status = channel.unary_unary(
            f"/{SERVICE}/Status",
            request_serializer=StatusRequest.SerializeToString,
            response_deserializer=RunStatus.FromString,
        )
        try:
            return status_words(status(StatusRequest(), timeout=timeout_s))
        except grpc.RpcError as error:
            raise _explained(server, error) from None


def follow(
    server: MonitorAddress, first: int = 0, *, patience_s: float = PATIENCE_S
) -> Iterator[dict[str, Any]]:
    """Lines of rounds.jsonl from round `first` on, each once; ends when the run is finished.

    A monitor that goes away is looked for again, for `patience_s`; one that never was there is not.

    Raises:
        IncompleteError, ConfigError: as `ask_status`.
    """
    wanted, patience, was_there = first, _Patience(patience_s), False
    with _channel(server) as channel:
        events = channel.unary_stream(
            f"/{SERVICE}/Events",
            request_serializer=EventsRequest.SerializeToString,
            response_deserializer=Round.FromString,
        )
        while True:
            call = events(EventsRequest(from_round=wanted), timeout=STREAM_S)
            try:
                for message in call:
                    yield round_words(message)
                    wanted = message.round + 1
                return
            except grpc.RpcError as error:
                if call.initial_metadata():  # the monitor's greeting: all was well until now
                    was_there, patience.lost_since = True, None
                if call.code() not in _AGAIN or not was_there or patience.is_over():
                    raise _explained(server, error) from None
                time.sleep(PAUSE_S)
            finally:
                call.cancel()


@contextmanager
def _channel(server: MonitorAddress) -> Iterator[grpc.Channel]:
    options = [
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.max_send_message_length", REQUEST_BYTES),
        ("grpc.enable_http_proxy", 0),  # a proxy meant for the web would hide what is wrong
        ("grpc.enable_retries", 0),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]
    if server.roots is None:
        opened = grpc.insecure_channel(server.target, options=options)
    else:
        opened = grpc.secure_channel(
            server.target, grpc.ssl_channel_credentials(_roots(server.roots)), options=options
        )
    with opened as channel:
        yield channel


def _roots(path: Path) -> bytes:
    try:
        found = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"--root-certificates: {path} cannot be read ({error.strerror}); copy ca.crt from the operator's kit"
        ) from None
    if b"-----BEGIN CERTIFICATE-----" not in found:
        raise ConfigError(
            f"--root-certificates: {path} holds no PEM certificate; copy ca.crt from the operator's kit"
        )
    return found


def _explained(server: MonitorAddress, error: grpc.RpcError) -> FedLoraError:
    assert isinstance(error, grpc.Call)
    code, text = error.code(), (error.details() or "no reason given").splitlines()[0][:500]
    match code:
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED | grpc.StatusCode.CANCELLED:
            return trouble(server) or IncompleteError(
                f"{server} is there but did not answer ({code.name.lower()}: {text}); ask again later"
            )
        case grpc.StatusCode.FAILED_PRECONDITION | grpc.StatusCode.RESOURCE_EXHAUSTED:
            return IncompleteError(f"{server}: {text}")
        case grpc.StatusCode.UNIMPLEMENTED:
            return ConfigError(
                f"{server} speaks gRPC but is no monitor; give the port of `fedlora monitor` there"
            )
        case grpc.StatusCode.NOT_FOUND:
            return ConfigError(f"{server}: {text}")
        case grpc.StatusCode.DATA_LOSS:
            return LedgerError(f"{server}: {text}")
        case _:
            return FedLoraError(f"{server}: {code.name.lower()}: {text}")
