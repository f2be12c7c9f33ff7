"""A SuperNode that has given up is gone, so that whoever keeps it going starts it again."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fedlora.deploy.supernode_process import TURNED_AWAY
from tests.deploy.processes import Processes, free_port


class Refusing(BaseHTTPRequestHandler):
    """A SuperLink that answers every call so."""

    status, said = 500, b""  # its database is locked

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(self.said)))
        self.end_headers()
        self.wfile.write(self.said)

    def log_message(self, format: str, *arguments: object) -> None:
        return


class Unregistered(Refusing):
    """One that does not know the node's key."""

    status, said = 412, b'{"code": 2004, "detail": "Failed to activate SuperNode."}'


def ended(processes: Processes, link: type[Refusing]) -> str:
    """What a SuperNode says that finds this SuperLink, and ends with status 1."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), link)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    places = ["--superlink", f"127.0.0.1:{server.server_port}", "--port", str(free_port())]
    command = ["python", "-m", "fedlora.deploy.supernode_process", "--insecure", *places]
    processes.start("supernode", *command, "--isolation", "process")
    try:
        assert processes.started["supernode"].wait(60) == 1
    finally:
        server.shutdown()
        server.server_close()
    return processes.logs()


@pytest.mark.fault("F54")
def test_a_supernode_that_meets_an_error_it_cannot_mend_ends_and_does_not_stay_idle(processes):
    said = ended(processes, Refusing)
    assert "500" in said and TURNED_AWAY not in said


def test_a_supernode_whose_key_nobody_registered_says_who_registers_it(processes):
    assert TURNED_AWAY in ended(processes, Unregistered)


def test_its_command_line_is_flowers(processes):
    processes.start("supernode", "python", "-m", "fedlora.deploy.supernode_process", "--no-such-option")
    assert processes.started["supernode"].wait(60) == 2
    assert "--superlink" in processes.logs()
