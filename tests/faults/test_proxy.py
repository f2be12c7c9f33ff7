"""The fault proxy does to a connection what it says, to that direction alone, and again the same from the same seed."""

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faults.proxy import FaultProxy

SOON_S = 0.3
"""How long a test listens for what must not come."""
TEXT = bytes(range(256)) * 64


class _Echo(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, mark: bytes = b"") -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.mark, self.heard, self.connections = mark, bytearray(), 0


class _Answer(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.server.connections += 1
        self.request.sendall(self.server.mark)
        with contextlib.suppress(OSError):
            while piece := self.request.recv(1 << 16):
                self.server.heard += piece
                self.request.sendall(piece)


@contextlib.contextmanager
def echoing(mark: bytes = b"") -> Iterator[_Echo]:
    server = _Echo(mark)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def echo() -> Iterator[_Echo]:
    with echoing() as server:
        yield server


@pytest.fixture
def proxy(echo) -> Iterator[FaultProxy]:
    found = FaultProxy(echo.server_address[1], seed=7)
    yield found
    found.close()


def connect(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def received(connection: socket.socket, size: int) -> bytes:
    """So many bytes, or those that came before the connection ended."""
    parts = b""
    while len(parts) < size and (part := connection.recv(size - len(parts))):
        parts += part
    return parts


def said(connection: socket.socket, text: bytes = TEXT) -> bytes:
    connection.sendall(text)
    return received(connection, len(text))


def heard(echo: _Echo, size: int) -> bytes:
    """What reached the target, once that is so many bytes or will be no more."""
    deadline = time.monotonic() + 10
    while len(echo.heard) < size and time.monotonic() < deadline:
        time.sleep(0.01)
    return bytes(echo.heard)


def is_silent(connection: socket.socket) -> bool:
    connection.settimeout(SOON_S)
    try:
        connection.recv(1)
    except TimeoutError:
        return True
    finally:
        connection.settimeout(10)
    return False


def test_without_a_fault_every_byte_and_the_end_pass_unchanged(proxy):
    with connect(proxy) as connection:
        assert said(connection) == TEXT
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert proxy.passed == {"up": len(TEXT), "down": len(TEXT)}


def test_a_delay_and_a_rate_make_a_connection_slow_and_healed_it_is_quick(proxy):
    with connect(proxy) as connection:
        for fault in (lambda: proxy.delay(0.2, jitter=0.1), lambda: proxy.slow(4 * len(TEXT))):
            fault()
            began = time.monotonic()
            assert said(connection) == TEXT
            assert time.monotonic() - began >= 0.2
            proxy.heal()
        assert said(connection) == TEXT


def test_a_partition_lets_nothing_through_and_everything_when_it_heals(proxy, echo):
    with connect(proxy) as connection:
        assert said(connection, b"before") == b"before"
        proxy.hold()
        connection.sendall(b"under way")
        assert is_silent(connection) and bytes(echo.heard) == b"before"
        proxy.heal()
        assert received(connection, 9) == b"under way"


@pytest.mark.parametrize("fault", ["hold", "lose"])
def test_in_one_direction_the_request_arrives_and_its_answer_does_not(proxy, echo, fault):
    with connect(proxy) as connection:
        getattr(proxy, fault)("down")
        connection.sendall(b"hello")
        assert is_silent(connection) and heard(echo, 5) == b"hello"
        proxy.heal()
        # Held it comes late, lost it never does.
        assert (received(connection, 5) == b"hello") if fault == "hold" else is_silent(connection)


def test_an_armed_fault_strikes_when_its_mark_goes_by_and_before_that_arrives(proxy, echo):
    with connect(proxy) as connection, connect(proxy) as other:
        proxy.arm(b"POST /second", held=("up",))
        assert said(connection, b"POST /first") == b"POST /first" and not proxy.struck
        connection.sendall(b"POST /second")
        assert is_silent(connection) and proxy.struck and b"second" not in echo.heard
        other.sendall(b"held as well")
        assert is_silent(other)
        proxy.heal()
        assert received(connection, 12) == b"POST /second" and received(other, 12) == b"held as well"
        proxy.arm(b"POST /third", lost=("down",))
        connection.sendall(b"POST /third")
        assert is_silent(connection) and heard(echo, 46).endswith(b"POST /third")
        proxy.arm(b"POST /fourth", held=("up", "down"))
        proxy.heal()
        assert said(connection, b"POST /fourth") == b"POST /fourth"


def test_a_black_hole_takes_what_is_sent_for_good(proxy, echo):
    with connect(proxy) as connection:
        proxy.lose("up")
        connection.sendall(b"gone")
        assert is_silent(connection) and not echo.heard
        proxy.heal()
        assert said(connection, b"here") == b"here" and bytes(echo.heard) == b"here"


def test_a_cut_passes_so_many_bytes_and_resets(proxy, echo):
    proxy.cut(1000, "up")
    with connect(proxy) as connection, pytest.raises(ConnectionError):
        connection.sendall(TEXT[:999])
        assert received(connection, 999) == TEXT[:999]
        connection.sendall(TEXT[999:])
        while connection.recv(1 << 16):
            pass
    assert heard(echo, 1000) == TEXT[:1000]


def test_a_reset_ends_what_is_there_and_a_refusal_what_comes(proxy):
    with connect(proxy) as old, connect(proxy) as kept:
        assert said(old, b"a") == b"a" and said(kept, b"a") == b"a"
        proxy.refuse()
        with pytest.raises(ConnectionError), connect(proxy) as new:
            new.recv(1)
        assert said(kept, b"b") == b"b"
        proxy.reset()
        for connection in (old, kept):
            with pytest.raises(ConnectionError):
                connection.recv(1)
        proxy.heal()
    with connect(proxy) as connection:
        assert said(connection) == TEXT
    assert proxy.accepted == 4


@pytest.mark.parametrize("way", ["up", "down"])
def test_bits_flip_in_one_direction_at_places_that_the_seed_decides(echo, way):
    def places(seed: int, step: int) -> list[int]:
        proxy = FaultProxy(echo.server_address[1], seed=seed)
        proxy.flip(500, way)
        before = len(echo.heard)
        with connect(proxy) as connection:
            back = b"".join(said(connection, TEXT[at : at + step]) for at in range(0, len(TEXT), step))
        proxy.close()
        heard = bytes(echo.heard[before:])
        # What was flipped on the way up comes back as it arrived; on the way down it arrived as it was.
        assert (heard == back) == (way == "up") and (heard == TEXT) == (way == "down")
        wrong = [at for at, (one, other) in enumerate(zip(TEXT, back, strict=True)) if one != other]
        assert all((TEXT[at] ^ back[at]).bit_count() == 1 for at in wrong)
        return wrong

    first = places(3, 4096)
    assert len(TEXT) / 2000 < len(first) < len(TEXT) / 100
    assert places(3, 1000) == first != places(4, 4096)


def test_a_doubled_connection_reaches_the_target_twice_and_is_answered_once(proxy, echo):
    proxy.double()
    with connect(proxy) as connection:
        assert said(connection, b"twice") == b"twice"
        assert heard(echo, 10) == b"twicetwice" and echo.connections == 2
        assert is_silent(connection)


def test_another_target_is_reached_by_new_connections(proxy):
    with echoing(b"moved") as elsewhere, connect(proxy) as old:
        assert said(old, b"old") == b"old"
        proxy.retarget(elsewhere.server_address[1])
        with connect(proxy) as new:
            assert received(new, 5) == b"moved"
        assert said(old, b"still") == b"still"


def test_a_target_that_is_not_there_ends_a_connection(proxy, echo):
    proxy.retarget(1)
    with pytest.raises(ConnectionError), connect(proxy) as connection:
        connection.recv(1)
    proxy.retarget(echo.server_address[1])
    with connect(proxy) as connection:
        assert said(connection) == TEXT


def test_nothing_is_left_of_a_proxy_that_was_closed(echo):
    before = threading.active_count()
    proxy = FaultProxy(echo.server_address[1])
    with connect(proxy) as connection:
        assert said(connection, b"a") == b"a"
        proxy.hold()
        connection.sendall(b"held")
        proxy.close()
        with pytest.raises(ConnectionError):
            while connection.recv(1 << 16):
                pass
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    assert threading.active_count() <= before + 1  # the echo's, for the connection
