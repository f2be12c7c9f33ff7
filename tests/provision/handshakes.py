"""Servers on loopback that answer a connection and hang up: in TLS with a certificate, or however a test says."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path


def handshakes(certificate: Path, key: Path, host: str = "127.0.0.1") -> AbstractContextManager[int]:
    """The port of a server that shakes hands in TLS, any number of times, and says nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return answering(lambda plain: context.wrap_socket(plain, server_side=True).close(), host)


@contextmanager
def answering(answer: Callable[[socket.socket], object], host: str = "127.0.0.1") -> Iterator[int]:
    """The port of a server that gives one connection after another to `answer`; who breaks one off breaks no more."""
    with socket.create_server((host, 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, suppress(OSError):
                    connection.settimeout(5)
                    answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
